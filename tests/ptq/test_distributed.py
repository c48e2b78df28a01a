"""Laws of quantizing on several devices and in several processes."""

import os
import re
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax.layout import Layout
from qjax.ptq import columns, gptq, grid, solve
from qjax.ptq.moments import Moments

D, TOKENS = 32, 8
FORMAT = qjax.Format("int4", group_size=16)
POLICY = qjax.Policy([qjax.Rule(("up", "down"), FORMAT)], recipe=qjax.Recipe(sweeps=1, damping=0.1))
AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
# Sums of a few hundred products in float32, in another order.
ROUNDING = 1e-5


def fn(params, x):
    return jnp.tanh(x @ params["up"]) @ params["down"]


def make():
    """Returns the parameters and the batches, as numpy arrays."""
    random = np.random.default_rng(0)
    normal = lambda *shape: random.normal(size=shape).astype(np.float32)
    # Few directions carry most of the input.
    batches = [normal(16, TOKENS, D) * np.exp(-np.arange(D) / 8).astype(np.float32)] * 2
    return {"up": normal(D, D), "down": normal(D, D)}, [b * (1 + i) for i, b in enumerate(batches)]


def run(params, batches):
    """Returns second moments, results and report as numpy arrays by name."""
    calibration = qjax.calibrate(fn, params, batches, report=None)
    qparams, report = qjax.quantize(params, POLICY, fn=fn, calibration=batches, report=None)
    out = {f"H/{path}": calibration[path].stats["hessian"] for path in calibration.paths}
    for path in ("up", "down"):
        out |= {f"data/{path}": qparams[path].data, f"scale/{path}": qparams[path].scale}
    out = {name: columns.fetch(a) for name, a in out.items()}
    return qparams, out | {"final": np.array([s.final for s in report.solved])}


def assert_alike(actual, expected):
    """Compares runs whose second moments are rounded differently."""
    for name, a in expected.items():
        if name.startswith("data"):
            continue  # a near-tie may be rounded the other way
        atol = (ROUNDING if name.startswith("H") else 1e-3) * np.abs(a).max()
        np.testing.assert_allclose(actual[name], a, rtol=0, atol=atol, err_msg=name)


def place(mesh, tree, *spec):
    sharding = NamedSharding(mesh, P(*spec))
    # In a program of several processes each of them makes its own part.
    put = lambda a: jax.make_array_from_callback(a.shape, sharding, lambda at: np.asarray(a)[at])
    return jax.tree.map(put, tree)


@pytest.fixture(scope="module")
def alone():
    params, batches = jax.tree.map(jnp.asarray, make())
    return run(params, batches)[1]


# ---- one process, eight devices ------------------------------------------------------------------


@pytest.mark.parametrize("kind", [AUTO, EXPLICIT])
def test_batches_over_devices_and_columns_over_devices(kind, alone):
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(kind,) * 2)
    params, batches = make()
    params = {"up": place(mesh, params["up"], None, "model"), "down": place(mesh, params["down"])}
    qparams, out = run(params, place(mesh, batches, "data"))
    assert_alike(out, alone)
    for path, w in params.items():
        for leaf in (qparams[path].data, qparams[path].scale):
            assert leaf.sharding.is_equivalent_to(w.sharding, 2)
            assert leaf.sharding.mesh == w.sharding.mesh


def test_statistics_of_leading_axes_stay_where_the_stack_is():
    mesh = jax.make_mesh((8,), ("expert",), axis_types=(EXPLICIT,))
    params = {"w": np.ones((8, 16, 4), np.float32)}
    x = np.random.default_rng(0).normal(size=(8, 5, 16)).astype(np.float32)
    product = lambda p, x: jnp.einsum("emk,ekn->emn", x, p["w"])
    args = place(mesh, (params, x), "expert")
    h = qjax.calibrate(product, args[0], [args[1]], report=None)["w"].stats["hessian"]
    assert h.sharding.spec[0] == "expert"
    expected = np.einsum("emk,eml->ekl", x, x) / 5
    np.testing.assert_allclose(h, expected, rtol=0, atol=ROUNDING * np.abs(expected).max())


K, N = 64, (128, 64)


def problem():
    """Returns two weights, and moments of an input that they share in two models."""
    random = np.random.default_rng(0)
    x = random.normal(size=(2 * K, K)) * np.exp(-np.arange(K) / 20)
    other = x + 0.1 * random.normal(size=x.shape)
    total, cross = jnp.asarray(x.T @ x, jnp.float32), jnp.asarray(x.T @ other, jnp.float32)
    weights = [jnp.asarray(random.normal(size=(K, n)), jnp.float32) for n in N]
    return weights, Moments(total, cross, jnp.float32(2 * K))


def solve_all(weights, moments):
    items = [solve.Item("w", w, FORMAT, Layout.parse("kn", w.shape)) for w in weights]
    options = solve.SolverOptions(sweeps=2)
    return [qt for qt, _ in solve.solve_weights(items, moments, moments, options)]


@pytest.fixture(scope="module")
def solved():
    weights, moments = problem()
    columns_mesh = jax.make_mesh((8,), ("model",), axis_types=(AUTO,))
    split = place(columns_mesh, weights, None, "model")
    return solve_all(weights, moments), solve_all(split, moments)


def test_columns_solved_on_eight_devices_get_the_codes_of_one(solved):
    for one, eight in zip(*solved, strict=True):
        np.testing.assert_array_equal(one.data, eight.data)
        np.testing.assert_allclose(one.scale, eight.scale, rtol=1e-6)
        assert eight.data.sharding.spec == eight.scale.sharding.spec == P(None, "model")


def test_columns_solved_on_eight_devices_are_those_of_one_bit_for_bit(solved):
    for one, eight in zip(*solved, strict=True):
        np.testing.assert_array_equal(one.data, eight.data)
        np.testing.assert_array_equal(one.scale, eight.scale)


def test_nothing_of_a_weight_is_sent():
    weights, moments = problem()
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AUTO,))
    split = columns.Split(mesh, "model")
    program = columns._sharded(FORMAT, gptq.Options(tolerance=0.0), solve.target, split)
    weights = tuple(place(mesh, weights, None, "model"))
    strength = jnp.float32(0.5)
    others = (moments.hessian, jnp.float32(0.1), (moments.shift, strength))
    hlo = program.lower(weights, *columns.beside(others, weights[0])).compile().as_text()
    sent = re.findall(r"= (.*?) (all-\w+|collective-\w+|reduce-scatter)[\w-]*\(", hlo)
    assert {kind for _, kind in sent} == {"all-reduce"}
    # The diagnostics, which are numbers.
    assert all(set(re.findall(r"\w+\[.*?\]", shapes)) == {"f32[]"} for shapes, _ in sent)


def test_columns_that_share_a_scale_are_not_taken_apart():
    fmt = qjax.Format("e4m3", group_size=16, group_columns=16)
    assert grid.is_by_column(FORMAT)
    assert not grid.is_by_column(fmt)


class Stopped(Exception):
    pass


def stop(line):
    if " in " in line:  # a weight is solved, and kept
        raise Stopped


def assert_goes_on(params, batches, whole, directory):
    """Interrupts a run after its first weight, makes it again, and compares it with a whole one."""
    call = {"policy": POLICY, "fn": fn, "calibration": batches, "resume": directory}
    with pytest.raises(Stopped):
        qjax.quantize(params, report=stop, **call)
    lines = []
    resumed, _ = qjax.quantize(params, report=lines.append, **call)
    assert sum("solved in an earlier run" in line for line in lines) == 1
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(resumed), strict=True):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(columns.fetch(a), columns.fetch(b))


def test_a_sharded_run_goes_on_where_it_was(tmp_path):
    mesh = jax.make_mesh((8,), ("model",), axis_types=(AUTO,))
    params, batches = make()
    params = {"up": place(mesh, params["up"], None, "model"), "down": place(mesh, params["down"])}
    batches = place(mesh, batches)
    assert_goes_on(params, batches, run(params, batches)[0], tmp_path / "run")


# ---- two processes -------------------------------------------------------------------------------


def work(index: int, port: str, directory: str) -> None:
    """What each of two processes does: `down` has its columns on both."""
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=index)
    mesh = Mesh(np.array(jax.devices()), ("data",))
    assert len(mesh.devices) == 4
    params, batches = make()
    params = {"up": place(mesh, params["up"]), "down": place(mesh, params["down"], None, "data")}
    batches = place(mesh, batches, "data")
    qparams, out = run(params, batches)
    assert not qparams["down"].data.is_fully_addressable
    path = os.path.join(directory, "checkpoint")
    qjax.save(path, qparams)
    shardings = {path: w.sharding for path, w in params.items()}
    for a, b in zip(
        jax.tree.leaves(qparams), jax.tree.leaves(qjax.load(path, shardings=shardings)), strict=True
    ):
        assert a.sharding.is_equivalent_to(b.sharding, a.ndim)
        np.testing.assert_array_equal(columns.fetch(a), columns.fetch(b))
    assert_goes_on(params, batches, qparams, os.path.join(directory, "run"))
    np.savez(os.path.join(directory, f"{index}.npz"), allow_pickle=False, **out)


def test_two_processes_do_what_one_does(tmp_path, alone):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    started = []
    try:
        for index in range(2):
            command = [sys.executable, __file__, str(index), port, str(tmp_path)]
            with open(tmp_path / f"{index}.txt", "w") as log:
                started.append(
                    subprocess.Popen(command, env=os.environ | flags, stdout=log, stderr=log)
                )
        codes = [process.wait(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    assert codes == [0, 0], "\n".join((tmp_path / f"{i}.txt").read_text() for i in range(2))
    first, second = ({**np.load(tmp_path / f"{i}.npz")} for i in range(2))
    for name, a in first.items():
        np.testing.assert_array_equal(a, second[name], err_msg=name)
    assert_alike(first, alone)


if __name__ == "__main__":
    work(int(sys.argv[1]), *sys.argv[2:])
