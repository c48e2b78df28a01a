"""The benchmark of training steps runs, and each step compiles once."""

from qjax import Format
from qjax.qat import bench


def test_every_step_compiles_once():
    size = bench.Size(D=32, F=64, L=2, H=2, V=32, B=2, T=8)
    cases = {"w4a8": (Format("int4", 16, activation="int8"), 1.7)}
    found = bench.run(size, 2, cases)
    assert set(found["rows"]) == {"float32", "w4a8"}
    assert all(row["compilations"] == 1 for row in found["rows"].values())
    assert all(row["ms"] > 0 for row in found["rows"].values())
