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


def floats(bits: Array, layout: Any) -> Array:
    """Returns e4m3 scales, whose bits are int8 [R], as float32, in a kernel.

    Two are converted at once.

    Args:
      bits: in the layout.
      layout: in which a lane has them: of a wgmma's rows, one in each register, those of rows i and
        i + 8; or of its columns, two neighbours in each.
    """

    def values(_, bits):
        i8, i16, i32 = (ir.IntegerType.get_signless(n) for n in (8, 16, 32))
        f32 = ir.F32Type.get()
        pair, kind = ir.VectorType.get((2,), i16), bits.layout.registers_element_type(f32)
        per_register = bits.layout.vector_length
        registers = bits.registers.reshape(-1, 2 // per_register)
        out = np.empty_like(registers)
        for i, own in enumerate(registers):
            if per_register == 2:
                both = mgpu.utils.bitcast(own[0], i16)
            else:
                first, second = (arith.extui(i16, mgpu.utils.bitcast(r, i8)) for r in own)
                both = arith.ori(first, arith.shli(second, arith.constant(i16, 8)))
            halves = mgpu.utils.bitcast(llvm.inline_asm(i32, [both], CONVERT, "=r,h"), pair)
            values = []
            for n in range(2):
                half = llvm.extractelement(halves, arith.constant(i32, n))
                # Not `arith.extf`: with a cast to bfloat16 that becomes one slow conversion.
                values.append(llvm.inline_asm(f32, [half], "cvt.f32.f16 $0, $1;", "=f,h"))
            if per_register == 2:
                out[i, 0] = vector.from_elements(kind, values)
            else:
                out[i] = [vector.broadcast(kind, value) for value in values]
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
