"""Rows that are looked up are those of the reference, bit for bit."""

from __future__ import annotations

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import few_bits, four_bits, h100, interpreter, lookup, reference, whole_bytes
from pallas_kernels.testing import mutation
from tests.pallas_kernels import test_weight_only as products
from tests.pallas_kernels.test_across import registers
from tests.pallas_kernels.test_addresses import Registers
from tests.pallas_kernels.test_weight_only import E2M1, LEVELS, in_order

FORMATS = {
    "int4 groups of 128": {"w": "int4", "group": 128},
    "int4 groups of 32": {"w": "int4", "group": 32, "scale": "float32"},
    "int4 channels": {"w": "int4", "group": 384, "scale": "float16"},
    "zero points": {"w": "int4", "group": 64, "zero": True},
    "int4 less one zero point": {"w": "int4", "group": 128, "zero": 3},
    "a codebook": {"w": "int4", "group": 64, "codebook": LEVELS},
    "powers of two": {"w": "int4", "group": 32, "codebook": E2M1, "scale": "uint8"},
    "scales of e4m3": {"w": "int4", "group": 16, "codebook": E2M1, "scale": "float8_e4m3fn"},
    "int3": {"w": "int8", "group": 32, "bits": 3},
    "int3, zero points": {"w": "int8", "group": 128, "bits": 3, "zero": True},
    "int2": {"w": "int8", "group": 64, "bits": 2},
    "int2, zero points": {"w": "int8", "group": 32, "bits": 2, "zero": True},
    "int8 channels": {"w": "int8", "group": 384},
    "int8, zero points": {"w": "int8", "group": 128, "zero": True},
    "fp8": {"w": "float8_e4m3fn", "group": 384, "scale": "float32"},
}
K, N = 384, 256


def _make(name, M):
    arrays = products.TestWeightOnly().make(1, K, N, **FORMATS[name])
    del arrays["x"]
    indices = jax.random.randint(jax.random.key(7), (M,), 0, N)
    return arrays | {"indices": indices.at[0].set(N - 1).at[M // 2].set(0)}


def _run(arrays, out_dtype="bfloat16"):
    with interpreter.interpreting() as races:
        y = lookup.rows(
            **arrays | {"w": in_order(**arrays)},
            out_dtype=jnp.dtype(out_dtype),
            interpret=interpreter.params(),
        )
        y = np.asarray(y)
    return y, races.found


def _wanted(arrays, out_dtype="bfloat16"):
    i = np.asarray(arrays["indices"])
    w, scale = np.asarray(arrays["w"]).astype(np.float32)[i], np.asarray(arrays["scale"])
    if arrays["codebook"] is not None:
        w = np.float32(arrays["codebook"])[w.astype(int) & 15]
    scale = np.exp2(scale - np.float32(127)) if scale.dtype == np.uint8 else np.float32(scale)
    of_inputs = lambda a: np.repeat(a[:, i].T, K // len(a), axis=1)
    if (zero := arrays.get("zero")) is not None:
        bits = arrays.get("bits") or (4 if arrays["w"].dtype == jnp.int4 else 8)
        zero = np.broadcast_to(np.asarray(zero, np.float32), scale.shape)
        w = w + 2 ** (bits - 1) - of_inputs(zero)
    return (w * of_inputs(scale)).astype(jnp.dtype(out_dtype))


def _same(got, wanted):
    assert got.dtype == wanted.dtype
    np.testing.assert_array_equal(got.astype(np.float32), np.asarray(wanted, np.float32))


@pytest.mark.parametrize("name", FORMATS)
def test_rows_are_codes_times_scales_rounded_once(name):
    arrays = _make(name, 5)
    y, races = _run(arrays)
    assert not races
    _same(y, _wanted(arrays))
    if "bits" not in arrays:
        _same(y, reference.rows(**arrays))


@pytest.mark.parametrize(
    ("M", "out_dtype"),
    [(1, "float16"), (8, "float32"), (20, "float16"), (64, "float32"), (75, "float32")],
)
def test_any_number_of_rows_in_any_float(M, out_dtype):
    arrays = _make("zero points", M)
    y, races = _run(arrays, out_dtype)
    assert not races
    _same(y, _wanted(arrays, out_dtype))


def test_rows_outside_are_nan_and_no_others():
    arrays = _make("int4 groups of 128", 7)
    wanted = np.array(_wanted(arrays))
    outside = {1: N, 2: -1, 6: np.iinfo(np.int32).min}
    arrays["indices"] = (
        arrays["indices"].at[jnp.array([*outside])].set(jnp.array([*outside.values()]))
    )
    wanted[[*outside]] = np.nan
    y, races = _run(arrays)
    assert not races
    _same(y, wanted)
    _same(y, reference.rows(**arrays))


def test_what_is_no_number_poisons_its_group_alone():
    arrays = _make("int4 groups of 128", 3)
    row = int(arrays["indices"][2])
    arrays["scale"] = arrays["scale"].at[1, row].set(jnp.nan)
    y, _ = _run(arrays)
    assert np.isnan(y[2, 128:256].astype(np.float32)).all()
    assert np.isfinite(np.delete(y, 2, axis=0).astype(np.float32)).all()
    assert np.isfinite(y[2, :128].astype(np.float32)).all()


def _is_caught(arrays, wanted):
    try:
        y, races = _run(arrays)
    except Exception as e:
        if "before kernel finished" in str(e):  # copies that nothing waits for
            return True
        raise
    return races or not np.array_equal(y, wanted)


def test_every_fence_and_wait_is_needed():
    if interpreter.on_gpu():
        pytest.skip("without them it may be right there by chance")
    arrays = _make("int4 groups of 128", 70)
    wanted = _wanted(arrays)
    with mutation(None) as possible:
        assert not _is_caught(arrays, wanted)
    assert [name.split()[1] for name in possible] == ["commit_smem", "wait_smem_to_gmem"]
    for name in possible:
        with mutation(name):
            assert _is_caught(arrays, wanted), name


@pytest.mark.parametrize("broken", ["scale of the first group", "zero point", "tile", "row"])
def test_what_is_read_from_elsewhere_is_an_error(monkeypatch, broken):
    of_rows, codes, axis = lookup._of_rows, lookup._codes, lookup.lax.axis_index
    if broken == "tile":
        monkeypatch.setattr(lookup.lax, "axis_index", lambda name: axis(name) // 2)
    elif broken == "row":
        monkeypatch.setattr(lookup, "_codes", lambda ref, i, *rest: codes(ref, i * 0, *rest))
    else:
        is_zero = broken == "zero point"
        first = lambda ref, g, i: of_rows(ref, g * (is_zero != (ref.dtype == jnp.uint8)), i)
        monkeypatch.setattr(lookup, "_of_rows", first)
    arrays = _make("zero points", 70)
    assert _is_caught(arrays, _wanted(arrays))


def test_refuses_what_it_cannot_look_up():
    arrays = _make("int4 groups of 128", 3)
    arrays["w"] = in_order(**arrays)
    with pytest.raises(ValueError, match="indices int8"):
        lookup.rows(**arrays | {"indices": arrays["indices"].astype(jnp.int8)})
    with pytest.raises(ValueError, match="groups of 8"):
        lookup.rows(**arrays | {"scale": jnp.ones((48, N))})
    with pytest.raises(ValueError, match="bits=3 with int4"):
        lookup.rows(**arrays, bits=3)
    with pytest.raises(ValueError, match="a codebook of 2 values with int4"):
        lookup.rows(**arrays | {"codebook": (0.0, 1.0)})
    with pytest.raises(ValueError, match="a zero point of 16"):
        lookup.rows(**arrays, zero=16)


# ---- as compiled --------------------------------------------------------------------------------

COMPILED = {
    "int4": ("int4", None, four_bits.READ),
    "int8": ("int8", None, whole_bytes.READ),
    "int3": ("uint8", 3, few_bits.READ),
    "int2": ("uint8", 2, few_bits.READ),
}


class _Loads(Registers):
    """What a thread of the first CTA computes; an index is that of its token, times 3."""

    def value(self, register, thread):
        ((operation, sources),) = self.definitions.get(register, [(None, None)])[:1]
        if operation is None or operation.startswith("ld.param"):
            return super().value(register, thread) if operation is None else 0
        if operation.startswith("ld."):
            return 3 * self.address(sources[0], thread) // 4
        if operation.startswith("selp"):  # of an index, which is inside
            return self.value(sources[0], thread)
        return super().value(register, thread)

    def address(self, text, thread):
        register, _, offset = text.strip("[]").partition("+")
        return self.value(register, thread) + int(offset or 0)


@pytest.mark.h100(code=False)
@pytest.mark.parametrize("name", COMPILED)
def test_lanes_read_the_words_of_their_rows(name):
    """The code that is inlined, and that the interpreter has a reference for, addresses these."""
    dtype, bits, layout = COMPILED[name]
    V, width = 4096, lookup.TILE_K * (bits or 8) // 8
    columns = 512 * (bits or 8) // 8
    struct = lambda dtype, *shape: jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))
    program = h100.compile(
        lambda *a: lookup.rows(*a, bits=bits),
        struct("int32", 64), struct(dtype, V, columns), struct("bfloat16", 4, V),
    )  # fmt: skip
    (kernel,) = program.kernels
    own = _Loads(kernel.ptx)
    places = re.findall(r"ld(?:\.global)?\.b(?:16|32) \s*%\w+, (\[[^]]*\]);", kernel.ptx)
    got = np.array([[own.address(a, thread) for a in places] for thread in range(128)])
    got = got.reshape(4, 32, -1)
    # Two indices, then the words of their rows, then two scales of the first group, bfloat16.
    rows = registers(np.arange(64), layout.reduce(1).to_mgpu())[..., 0]
    token, column = np.divmod(np.arange(64 * width), width)
    words = (3 * token * columns + column).reshape(64, width)
    words = registers(words, layout.to_mgpu())[..., 0] // (2 if dtype == "int4" else 1)
    np.testing.assert_array_equal(got, np.concatenate([4 * rows, words, 6 * rows], axis=2))
