"""Zero points meet the codes of their row and group: inlined code, run for all threads at once."""

from __future__ import annotations

import types
from unittest import mock

import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir

from pallas_kernels import few_bits, four_bits, planes, whole_bytes, zero_points
from pallas_kernels.interleave import interleaved_pairs, of_int4
from tests.pallas_kernels.test_across import array, assembled, fragmented

R, C = 128, 256
LOADS = {
    2: lambda ref, dtype, zero: few_bits.load(ref, 2, dtype, zero),
    3: lambda ref, dtype, zero: few_bits.load(ref, 3, dtype, zero),
    4: lambda ref, dtype, zero: four_bits.load(ref, dtype, zero=zero),
    8: whole_bytes.load,
}


def _word(a):
    """Four bytes of a register as a word, or eight codes of 4 bits; a word as it is."""
    if a.dtype.itemsize > 1:
        return a
    if a.shape[-1] == 8:
        fields = a.astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))
        return np.sum(fields, axis=-1, keepdims=True, dtype=np.uint32)
    return np.ascontiguousarray(a).view(np.uint32) if a.shape[-1] == 4 else a


def _inlined(arg_types, return_type):
    def wrap(code):
        def run(*arrays):
            operands = [
                fragmented(a, kind.to_mgpu()) for a, kind in zip(arrays, arg_types, strict=True)
            ]
            with ir.Context(), ir.Location.unknown():
                registers = code(None, *operands)
            out = np.stack([r.reshape(4, 32, -1) for r in registers.flat], axis=2)
            layout = return_type.layout.to_mgpu()
            return array(out.view(jnp.dtype(return_type.dtype)), layout, return_type.shape)

        return run

    return wrap


@pytest.fixture
def threads(monkeypatch):
    """Has the code that a kernel inlines run in numpy, a value being that of every thread."""
    word = lambda n: np.full((1, 1, 1), n, np.uint32)
    names = {
        "arith": types.SimpleNamespace(
            andi=lambda a, b: a & b,
            constant=lambda _, n: word(n % 2**32),
            extui=lambda _, a: a.astype(np.uint32),
            index_cast=lambda _, a: a,
            shli=lambda a, b: a << b,
            shrui=lambda a, b: a >> b,
            xori=lambda a, b: a ^ b,
        ),
        "gpu": types.SimpleNamespace(
            Dimension=types.SimpleNamespace(x=None),
            thread_id=lambda _: np.arange(128, dtype=np.uint32).reshape(4, 32, 1),
        ),
        "llvm": types.SimpleNamespace(
            inline_asm=lambda _, operands, text, constraints: assembled(text, *operands)
        ),
        "mgpu": types.SimpleNamespace(
            utils=types.SimpleNamespace(
                bitcast=lambda a, _: _word(a),
                dtype_to_ir_type=lambda _: ir.F32Type.get(),
            ),
            FragmentedArray=lambda _registers, **_: _registers,
        ),
    }
    for module in (four_bits, few_bits, whole_bytes, zero_points):
        for name in names.keys() & vars(module).keys():
            monkeypatch.setattr(module, name, names[name])
    with mock.patch.multiple(plgpu, inline_mgpu=_inlined, load=lambda ref, layout: ref):
        yield


@pytest.mark.parametrize("bits", LOADS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("groups", [1, 2, 8, 16])
def test_every_code_is_less_the_zero_point_of_its_row_and_group(threads, bits, dtype, groups):
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 2**bits, (R, C))
    zeros = rng.integers(0, 2**bits, (groups, R)).astype(np.uint8)
    if bits < 4:
        stored = np.asarray(planes.packed(jnp.asarray(codes, jnp.uint8), bits))
    elif bits == 4:
        signed = jnp.asarray(codes - 8, jnp.int4)
        stored = np.asarray(of_int4(signed)).astype(np.uint8) & 15
    else:
        stored = np.asarray(interleaved_pairs(jnp.asarray(codes - 128, jnp.int8)))
    unit = zero_points.unit("int4" if bits == 4 else stored.dtype, dtype)
    loaded = lambda zero: (LOADS[bits](stored, dtype, zero).astype(float) / unit).astype(int)
    wanted = codes - np.repeat(zeros, C // groups, axis=0).T
    np.testing.assert_array_equal(loaded(list(zeros)), wanted)
    one = int(zeros[0, 0])  # for all of them
    np.testing.assert_array_equal(loaded(one), codes - one)
