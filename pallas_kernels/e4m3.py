"""How a kernel reads scales of e4m3."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

CONVERT = "cvt.rn.f16x2.e4m3x2 $0, $1;"  # two bytes; float16 has all values of e4m3, and NaN


def load(ref: Any) -> Array:
    """Returns e4m3 scales, whose bits are int8 [R] in shared memory, as float32, in a kernel.

    There is one for every row of weights, as for an accumulator of wgmma: a lane has those of rows
    i and i + 8, which it converts at once.
    """
    layout = plgpu.Layout.WGMMA.reduce(1)
    bits = plgpu.load(ref, layout=layout)

    def values(_, bits):
        i16, i32 = (ir.IntegerType.get_signless(n) for n in (16, 32))
        f32 = ir.F32Type.get()
        pair, one = ir.VectorType.get((2,), i16), ir.VectorType.get((1,), f32)
        rows = bits.registers.reshape(-1, 2)
        out = np.empty_like(rows)
        for (i, _), _ in np.ndenumerate(rows[:, :1]):
            byte = [
                arith.extui(i16, mgpu.utils.bitcast(r, ir.IntegerType.get_signless(8)))
                for r in rows[i]
            ]
            both = arith.ori(byte[0], arith.shli(byte[1], arith.constant(i16, 8)))
            halves = mgpu.utils.bitcast(llvm.inline_asm(i32, [both], CONVERT, "=r,h"), pair)
            for row in range(2):
                half = llvm.extractelement(halves, arith.constant(i32, row))
                # Not `arith.extf`: with a cast to bfloat16 that becomes one slow conversion.
                value = llvm.inline_asm(f32, [half], "cvt.f32.f16 $0, $1;", "=f,h")
                out[i, row] = vector.broadcast(one, value)
        return mgpu.FragmentedArray(
            _registers=out.reshape(bits.registers.shape), _layout=layout.to_mgpu(), _is_signed=None
        )

    def reference(bits):  # read by the interpreter
        return lax.bitcast_convert_type(bits, jnp.float8_e4m3fn).astype(jnp.float32)

    values.reference = reference  # pyright: ignore[reportFunctionMemberAccess]
    return plgpu.inline_mgpu(
        arg_types=(layout,),
        return_type=plgpu.ShapeDtypeStruct(bits.shape, jnp.dtype("float32"), layout),
    )(values)(bits)
