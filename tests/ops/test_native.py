"""The native kernel against float64, under JAX's transforms, built anew and not at all."""

import concurrent.futures
import dataclasses
import functools
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import numerics
from qjax.format import Format
from qjax.ops import native
from qjax.ops.packed_dot import packed_dot
from qjax.qtensor import dequantize_array, dequantize_canonical, quantize_array
from qjax.sharding import shardings_of

needs_kernel = pytest.mark.skipif(
    native.why_not() is not None, reason=f"no native kernel: {native.why_not()}"
)
needs_compiler = pytest.mark.skipif(
    not (os.environ.get("CXX") or any(map(native.shutil.which, native.COMPILERS))),
    reason="no C++ compiler",
)

product = jax.jit(functools.partial(packed_dot, implementation="native"))
# One program for a new shape instead of one for every operation.
quantize = jax.jit(quantize_array, static_argnums=1)
dequantize = jax.jit(dequantize_canonical)


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape, np.float32))


def assert_close(y, x, w):
    """Float32 sums of K products, each rounded a few times, whatever their order."""
    x, w = np.asarray(x, np.float64), np.asarray(w, np.float64)
    bound = np.abs(x) @ np.abs(w) + np.abs(x).sum(-1, keepdims=True) * np.abs(w).max(initial=0)
    error = np.abs(np.asarray(y, np.float64) - x @ w)
    assert y.shape == bound.shape
    assert (error <= 2 * (4 + np.sqrt(x.shape[-1])) * 2.0**-23 * bound).all()


def holds_kernel(fn, *args):
    return native._SYMBOL in jax.jit(fn).lower(*args).as_text()


# ---- the product --------------------------------------------------------------------------------

INTEGERS = [name for name, e in numerics.ELEMENTS.items() if e.kind == "int"]


@st.composite
def formats(draw):
    element = draw(st.sampled_from(sorted(numerics.ELEMENTS)))
    extra = {}
    if element in INTEGERS and element != "ternary":
        extra["zero_point"] = draw(st.booleans())
    if element.startswith("uint") and not extra["zero_point"] and draw(st.booleans()):
        extra["offset"] = "float16"
    return Format(
        element,
        group_size=draw(st.sampled_from([None, 1, 7, 16, 32, 100])),
        group_columns=draw(st.sampled_from([1, 1, 1, 5, 32, None])),
        scale=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        remainder="ragged",
        **extra,
    )


@needs_kernel
@settings(max_examples=25)
@given(
    fmt=formats(),
    M=st.sampled_from([1, 2, 3, 6, 7, 8, 13]),
    K=st.sampled_from([1, 2, 5, 64, 65, 130, 200]),
    N=st.sampled_from([1, 3, 16, 64, 65, 150]),
    seed=st.integers(0, 99),
)
def test_every_format_and_shape(fmt, M, K, N, seed):
    qt = quantize(normal(K, N, seed=seed), fmt)
    x = normal(M, K, seed=seed + 1)
    assert_close(product(x, qt), x, dequantize(qt))


@needs_kernel
@pytest.mark.parametrize("M", [1, 5, 40])
@pytest.mark.parametrize("element", sorted(numerics.ELEMENTS))
def test_every_code_is_read(element, M):
    """Rows of one 1 read the weight itself, exactly: all 2^bits codes, wherever they lie."""
    e = numerics.get_element(element)
    K, N = 203, 150  # groups end inside of packed bytes and tiles
    rng = np.random.default_rng(0)
    qt = quantize(normal(K, N), Format(element, 50, remainder="ragged"))
    data = rng.integers(0, 256, qt.data.shape, dtype=np.uint8)
    if e.kind == "float":  # what is stored is finite
        data[~np.isfinite(data.view(jnp.dtype(e.dtype)).astype(np.float32))] = 0
    qt = dataclasses.replace(qt, data=lax.bitcast_convert_type(jnp.asarray(data), qt.data.dtype))
    rows = rng.permutation(K)[:M]
    y = product(jnp.eye(K)[rows], qt)
    np.testing.assert_array_equal(y, dequantize(qt)[rows])


@needs_kernel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_result_has_the_type_of_x_and_float32_sums(dtype):
    qt = quantize_array(normal(512, 70), Format("nf4", 64, scale="bfloat16"))
    x = normal(4, 512).astype(dtype)
    wide = product(x.astype(jnp.float32), qt)
    assert_close(wide, x.astype(jnp.float32), dequantize_canonical(qt))
    np.testing.assert_array_equal(product(x, qt), wide.astype(dtype))


@needs_kernel
def test_nan_and_inf_stay_where_they_are():
    qt = quantize_array(normal(64, 70), Format("int4", 16))
    x = normal(3, 64).at[1, 5].set(jnp.nan)
    assert jnp.isfinite(product(x, qt)).all(1).tolist() == [True, False, True]
    qt = dataclasses.replace(qt, scale=qt.scale.at[2, 69].set(jnp.inf))
    bad = ~jnp.isfinite(product(normal(3, 64), qt))
    assert bad[:, 69].all()
    assert not bad[:, :69].any()


@needs_kernel
def test_no_tokens():
    qt = quantize_array(normal(64, 8), Format("int8"))
    assert product(jnp.zeros((0, 64)), qt).shape == (0, 8)


# ---- transforms ---------------------------------------------------------------------------------


@needs_kernel
def test_it_is_what_apply_runs():
    w, x = qjax.quantize({"w": normal(128, 96)}, Format("int4", 32))["w"], normal(3, 128)
    fn = qjax.apply(lambda w, x: x @ w)
    assert holds_kernel(fn, w, x)
    assert not holds_kernel(qjax.apply(lambda w, x: x @ w, implementation="xla"), w, x)
    np.testing.assert_array_equal(fn(w, x), product(x, w))  # eager


@needs_kernel
def test_derivatives_vmap_scan_and_cond():
    qt = quantize_array(normal(3, 64, 48), Format("int4", 16, zero_point=True))
    w, x = dequantize_array(qt), normal(3, 5, 64)
    one = jax.tree.map(lambda a: a[0], qt)
    value, back = jax.vjp(lambda x: packed_dot(x, one), x[0])
    assert_close(value, x[0], w[0])
    assert_close(back(value)[0], value, w[0].T)
    _, tangent = jax.jvp(lambda x: packed_dot(x, one), (x[0],), (2 * x[0],))
    assert_close(tangent, 2 * x[0], w[0])
    mapped = jax.jit(jax.vmap(packed_dot))
    assert holds_kernel(jax.vmap(packed_dot), x, qt)
    _, scanned = jax.jit(lambda *xs: lax.scan(lambda c, a: (c, packed_dot(*a)), 0, xs))(x, qt)
    for i, y in enumerate(mapped(x, qt)):
        assert_close(y, x[i], w[i])
        assert_close(scanned[i], x[i], w[i])
    maybe = jax.jit(lambda p, x: lax.cond(p, lambda x: packed_dot(x, one), lambda x: x[:, :48], x))
    assert_close(maybe(True, x[0]), x[0], w[0])
    np.testing.assert_array_equal(maybe(False, x[0]), x[0][:, :48])


@needs_kernel
@pytest.mark.parametrize("spec", [P(None, "x"), P("x"), P("y", "x")], ids=str)
def test_every_shard_runs_it(spec):
    mesh = jax.make_mesh((2, 4), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    qt = quantize_array(normal(256, 64), Format("int4", 32))
    x = normal(4, 256)
    placed = jax.device_put(qt, shardings_of(qt, NamedSharding(mesh, spec)))
    compiled = jax.jit(packed_dot).lower(x, placed).compile()
    text = compiled.as_text() or ""
    assert native._SYMBOL in text
    assert "all-gather" not in text
    assert_close(compiled(x, placed), x, dequantize_array(qt))


@needs_kernel
def test_inside_shard_map():
    mesh = jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,))
    qt, x = quantize_array(normal(64, 64), Format("int8")), normal(16, 64)
    run = jax.shard_map(lambda x: packed_dot(x, qt), mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    assert holds_kernel(run, x)
    assert_close(jax.jit(run)(x), x, dequantize_array(qt))


@needs_kernel
def test_a_donated_activation_is_not_overwritten_while_it_is_read():
    qt = quantize_array(normal(512, 512), Format("int4", 32))
    x = normal(64, 512)
    want = product(x, qt)
    donating = jax.jit(packed_dot, donate_argnums=0)
    np.testing.assert_array_equal(donating(jnp.copy(x), qt), want)
    both = jax.jit(lambda x, qt: (x + packed_dot(x, qt), x), donate_argnums=0)
    got, kept = both(jnp.copy(x), qt)
    np.testing.assert_allclose(got, x + want, rtol=1e-6, atol=1e-5)
    np.testing.assert_array_equal(kept, x)


@needs_kernel
def test_several_threads_at_once():
    qts = [quantize_array(normal(512, 512, seed=i), Format("nf4", 64)) for i in range(4)]
    xs = [normal(16, 512, seed=i) for i in range(4)]
    want = [np.asarray(product(x, qt)) for x, qt in zip(xs, qts, strict=True)]

    def run(i):
        return np.asarray(product(xs[i % 4], qts[i % 4]))

    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for i, y in enumerate(pool.map(run, range(64))):
            np.testing.assert_array_equal(y, want[i % 4])


@needs_kernel
def test_an_export_holds_no_kernel():
    qt, x = quantize_array(normal(64, 48), Format("int4", 16)), normal(3, 64)
    exported = jax.export.export(jax.jit(packed_dot))(x, qt)
    assert native._SYMBOL not in exported.mlir_module()
    assert_close(exported.call(x, qt), x, dequantize_array(qt))
    with pytest.raises(NotImplementedError, match="not in an exported program"):
        jax.export.export(product)(x, qt)


@needs_kernel
@pytest.mark.parametrize("M", [1, 16, 128])
@pytest.mark.parametrize("fmt", [Format("int4", 128), Format("int8"), Format("nf4", 64)], ids=str)
def test_it_allocates_scales_and_no_weight(fmt, M):
    K = N = 2048
    qt = jax.eval_shape(lambda: quantize_array(jnp.zeros((K, N)), fmt))
    compiled = product.lower(jax.ShapeDtypeStruct((M, K), jnp.float32), qt).compile()
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes <= 4 * K * N // 64


# ---- what it does not take ----------------------------------------------------------------------


def test_what_it_does_not_take_is_refused():
    x = normal(3, 64)
    qt = quantize_array(normal(64, 48), Format("int8", activation="int8"))
    with pytest.raises(ValueError, match=r'"native" has no kernel .*: its activations are quant'):
        packed_dot(x, qt, implementation="native")
    qt = quantize_array(normal(64, 48), Format("int8"))
    with pytest.raises(NotImplementedError, match="x @ Wᵀ, as in derivatives"):
        packed_dot(normal(3, 48), qt, transposed=True, implementation="native")
    with pytest.raises(ValueError, match=r"prepared for another kernel\. With None, plain JAX"):
        packed_dot(
            x, qjax.prepare(quantize_array(normal(64, 48), Format("int8")), "h100"),
            implementation="native",
        )  # fmt: skip


@needs_kernel
@pytest.mark.parametrize("has_matrix_unit", [False, True])
def test_where_bytes_are_faster_they_are_multiplied(monkeypatch, has_matrix_unit):
    words = native.cpu.features() - {"amx_int8"} | ({"amx_int8"} if has_matrix_unit else set())
    monkeypatch.setattr(native.cpu, "features", lambda: words)
    monkeypatch.setattr(native.cpu, "has_int8_dot", lambda: True)
    fn = lambda w, x: x @ w
    int8, int4 = (quantize_array(normal(64, 48), Format(e)) for e in ("int8", "int4"))
    for M in (1, 63, 64, 128, 129):
        x = normal(M, 64)
        assert holds_kernel(qjax.apply(fn), int8, x) == (not has_matrix_unit or not 64 <= M <= 128)
        assert holds_kernel(qjax.apply(fn), int4, x)
    (use,) = qjax.explain(fn)(int8, normal(1, 64))
    assert use.implementation.endswith("xla in bytes for 64 to 128 tokens") == has_matrix_unit
    assert holds_kernel(qjax.apply(fn, implementation="native"), int8, normal(64, 64))


# ---- building -----------------------------------------------------------------------------------


def test_without_it_products_run_in_plain_jax_and_say_so(monkeypatch):
    monkeypatch.setenv("QJAX_NATIVE", "0")
    w, x = quantize_array(normal(64, 48), Format("int4", 16)), normal(3, 64)
    fn = lambda w, x: x @ w
    (use,) = qjax.explain(fn)(w, x)
    assert use.implementation.startswith("xla, blocks of K: no native kernel, the environment")
    assert not holds_kernel(qjax.apply(fn), w, x)
    assert_close(qjax.apply(fn)(w, x), x, dequantize_array(w))
    with pytest.raises(native.Unavailable, match=r"cannot be had: .*QJAX_NATIVE turns it off; uns"):
        qjax.apply(fn, implementation="native")(w, x)


def test_a_machine_without_a_compiler_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(native.Unavailable, match=r"no C\+\+ compiler .* Install one, or name it"):
        native.compiler()
    monkeypatch.setenv("CXX", "ccache g++")
    assert native.compiler() == ["ccache", "g++"]


@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'native.cc:1: error: no such thing' >&2; exit 1", "failed: native.cc:1: error: no"),
        ("exit 0", "failed: nothing"),
        (None, "does not run: .*No such file"),
        ('while [ "$1" != -o ]; do shift; done; echo text > "$2"', "cannot be loaded"),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="a shell script")
def test_what_a_compiler_does_wrong_is_said(script, says, tmp_path):
    compiler = tmp_path / "c++"
    if script is not None:
        compiler.write_text(f"#!/bin/sh\n{script}\n")
        compiler.chmod(0o700)
    cache = tmp_path / "cache"
    cache.mkdir()
    with pytest.raises(native.Unavailable, match=says):
        native.load([str(compiler)], [], cache)


ISAS = {  # what the compiler is told: the instruction set of the vectors
    "-march=native": None,
    "-march=haswell": "AVX2",
    "-march=x86-64": "portable",
}
IS_X86 = native.platform.machine().lower() in ("x86_64", "amd64")


@needs_compiler
@pytest.mark.skipif(not IS_X86, reason="flags of x86")
@pytest.mark.parametrize("flag", ISAS)
def test_every_instruction_set_computes_the_same(flag, monkeypatch, tmp_path):
    if flag == "-march=haswell" and not {"avx2", "fma"} <= native.cpu.features():
        pytest.skip("this CPU has no AVX2")
    kernel = native.load(native.compiler(), [flag, "-Wall", "-Wextra"], tmp_path)
    assert kernel.isa == (ISAS[flag] or kernel.isa)
    monkeypatch.setattr(native, "kernel", lambda: kernel)
    for element in ("int3", "int4", "uint8", "int8", "nf4", "e2m1", "dynamic8"):
        qt = quantize_array(normal(130, 150), Format(element, 50, remainder="ragged"))
        for M in (1, 8):
            x = normal(M, 130)
            # A function of its own: the kernel is chosen when it is lowered.
            run = jax.jit(lambda x, qt: packed_dot(x, qt, implementation="native"))
            assert kernel.target in run.lower(x, qt).as_text()
            assert_close(run(x, qt), x, dequantize_array(qt))


@needs_compiler
def test_a_library_is_built_once_and_again_if_it_is_damaged(tmp_path, monkeypatch):
    compiled = []
    compile_ = native._compile
    monkeypatch.setattr(native, "_compile", lambda *a: compiled.append(a) or compile_(*a))
    build = functools.partial(native.built, native.compiler(), directory=tmp_path)
    first = build(["-O0"])
    assert [p.name for p in tmp_path.iterdir()] == [first.name]
    assert build(["-O0"]) == first
    assert len(compiled) == 1
    content = first.read_bytes()
    first.write_bytes(content[: len(content) // 2])
    assert build(["-O0"]) == first
    assert first.read_bytes() == content
    assert len(compiled) == 2
    assert build(["-O0", "-g0"]) != first  # made of something else


_OTHER_PROCESS = """
import jax, jax.numpy as jnp
import qjax
from qjax.ops import native
import pathlib, sys
cache = pathlib.Path(sys.argv[1])
assert not cache.exists()
qt = qjax.quantize({"w": jnp.ones((64, 32))}, qjax.Format("int4", 16))
assert not cache.exists()  # neither import nor quantization builds anything
x = jnp.ones((2, 64))
y = jax.jit(qjax.apply(lambda p, x: x @ p["w"]))(qt, x)
print("ok", float(y[0, 0]), native.kernel().isa)
"""


@needs_compiler
@pytest.mark.slow
def test_processes_that_start_together_share_a_cache(tmp_path):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    cache = tmp_path / "qjax" / "native"
    call = [sys.executable, "-c", _OTHER_PROCESS.replace("assert not cache.exists()", "pass")]
    pipe = subprocess.PIPE
    started = [
        subprocess.Popen([*call, cache], env=env, stdout=pipe, stderr=pipe, text=True)
        for _ in range(3)
    ]
    for process in started:
        out, err = process.communicate()
        assert out.startswith("ok 64.0"), err
    assert len(list(cache.iterdir())) == 1  # their compilers made the same bytes
    assert (cache.stat().st_mode & 0o777) == 0o700


@needs_compiler
def test_nothing_is_built_before_a_product_is_lowered(tmp_path):
    env = os.environ | {"XDG_CACHE_HOME": str(tmp_path)}
    call = [sys.executable, "-c", _OTHER_PROCESS, tmp_path / "qjax"]
    done = subprocess.run(call, env=env, capture_output=True, text=True)
    assert done.stdout.startswith("ok 64.0"), done.stderr


def test_a_cache_that_others_can_write_to_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    directory = tmp_path / "qjax" / "native"
    assert native.cache_directory() == directory
    directory.chmod(0o777)
    assert native.cache_directory() is None
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    (tmp_path / "file").write_text("")
    assert native.cache_directory() is None


def test_a_cache_that_cannot_be_written_is_a_reason(monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(native, "_found", native._found.__wrapped__)  # as in a new process
    monkeypatch.setattr(native, "load", full)
    monkeypatch.setattr(native, "compiler", lambda: ["c++"])
    assert "No space left on device" in (native.why_not() or "")
