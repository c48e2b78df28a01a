"""Tests of qjax/checkpoint: what is saved comes back, whole or not at all."""

import collections
import json
import logging
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import nnx
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import qjax
from qjax import Policy, Rule, checkpoint, qat
from qjax.checkpoint import (
    CheckpointError,
    QTreeRestore,
    QTreeSave,
    checksum,
    load,
    save,
    save_async,
)
from qjax.checkpoint.manifest import FILE, METADATA_FILE
from qjax.format import Format
from qjax.qtensor import QTensor, is_qtensor, quantize_array

FORMATS = {
    "int2": Format("int2", 32),
    "int3": Format("int3", 32, scale="bfloat16"),
    "int4": Format("int4", 32, zero_point=True, scale="float16"),
    "uint5": Format("uint5", 32, offset="float16"),
    "int6": Format("int6", 16, scale=Format("int8", None, scale="float16")),
    "int8": Format("int8", activation="int8"),
    "ternary": Format("ternary", None, None),
    "nf4": Format("nf4", 64, scale=Format("uint8", 2, offset="float32")),
    "fp4": Format("fp4", 64, scale="bfloat16"),
    "mxfp4": Format("e2m1", 32, scale="e8m0"),
    "nvfp4": Format("e2m1", 16, scale=Format("e4m3", None, None)),
    "e4m3": Format("e4m3", 128, 128),
    "e5m2": Format("e5m2", scale="bfloat16"),
    "q4_k": Format(
        "uint4", 32, scale=Format("uint6", 8, scale="float16"),
        offset=Format("uint6", 8, scale="float16", rule="absmax"),
    ),
    "ragged": Format("int3", 96, remainder="ragged"),
}  # fmt: skip


def filled(shape, fmt, layout="kn", seed=0):
    """A QTensor of random bits: NaN codes and all, without compiling a quantizer."""
    shapes = jax.eval_shape(
        lambda w: quantize_array(w, fmt, layout), jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    )
    random = np.random.default_rng(seed)

    def bits(a):
        n = int(np.prod(a.shape)) * a.dtype.itemsize
        raw = random.integers(0, 256, n).astype(np.uint8)
        return jnp.asarray(raw.view(a.dtype).reshape(a.shape))

    return jax.tree.map(bits, shapes)


def assert_same(a, b):
    """Equal in structure, statics, types and bits."""
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert isinstance(y, jax.Array) == isinstance(x, jax.Array)
        if isinstance(x, jax.Array | np.ndarray):
            assert (x.dtype, x.shape) == (y.dtype, y.shape)
            assert np.asarray(x).tobytes() == np.asarray(y).tobytes()
        else:
            assert type(x) is type(y)
            assert repr(x) == repr(y)


@pytest.fixture(scope="module")
def formats():
    return {
        **{name: filled((512, 128), fmt) for name, fmt in FORMATS.items()},
        "stack": filled((2, 256, 4, 32), FORMATS["int4"], "knn"),
        "experts": filled((256, 4, 32), FORMATS["int3"], "kbn"),
        "embedding": filled((96, 512), FORMATS["nf4"], "nk"),
        "padded": filled((33, 8), Format("int3")),
    }


@pytest.fixture(scope="module")
def saved(tmp_path_factory, formats):
    path = tmp_path_factory.mktemp("saved") / "ckpt"
    save(path, formats, metadata={"model": "tiny", "layers": [1, 2], "none": None})
    return path


@pytest.fixture
def broken(saved, tmp_path):
    """A copy of a checkpoint for a test to break."""
    return pathlib.Path(shutil.copytree(saved, tmp_path / "broken"))


def mesh(*shape):
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, ("x", "y")[: len(shape)])


# ---- identity -----------------------------------------------------------------------------------


def test_every_format_comes_back_bit_for_bit(saved, formats):
    assert_same(formats, load(saved))


def test_every_kind_of_node_and_leaf_comes_back(tmp_path):
    tree = {
        "list": [jnp.ones(2), [jnp.zeros((2, 3))], []],
        "tuple": (jnp.ones(1), (), {}),
        "none": {"a": None, "b": [None, jnp.ones(1)]},
        0: {10: jnp.ones(1), 9: jnp.ones(2)},
        "0": jnp.ones(3),
        "a.b": jnp.ones(4),
        "a": {"b": jnp.ones(5), "b/c": jnp.ones(6)},
        "a/b": jnp.ones(7),
        "": jnp.ones(8),
        "..": jnp.ones(9),
        "später #?%20": jnp.ones(10),
        "numbers": [1, -(2**70), True, False, 0.1, float("nan"), float("-inf"), -0.0, 1 + 2j],
        "scalar": jnp.float32(3),
        "empty": jnp.zeros((0, 4), jnp.int8),
        "key": jax.random.key(1),
        "keys": jax.random.split(jax.random.key(1, impl="rbg"), 3),
    }
    save(tmp_path / "c", tree)
    loaded = load(tmp_path / "c")
    assert list(loaded) == list(tree)  # JAX cannot sort keys of both types: compare one by one
    for key in ("key", "keys"):
        saved, found = tree.pop(key), loaded.pop(key)
        assert saved.dtype == found.dtype
        assert_same(jax.random.key_data(saved), jax.random.key_data(found))
    for key, value in tree.items():
        assert_same(value, loaded[key])


def test_every_dtype_comes_back(tmp_path):
    names = sorted(checkpoint.manifest._DTYPES)
    random = np.random.default_rng(0).integers(0, 2, 64).astype(np.uint8)
    tree = {n: random.astype(jnp.dtype(n)).reshape(8, 8) for n in names}
    held = lambda a: jax.dtypes.canonicalize_dtype(a.dtype) == a.dtype  # not int64 and the like
    tree = {n: jnp.asarray(a) if held(a) else a for n, a in tree.items()}
    save(tmp_path / "c", tree)
    assert_same(tree, load(tmp_path / "c"))


@pytest.mark.parametrize("tree", [None, {}, [], {"a": None}, 3, jnp.ones(3)], ids=repr)
def test_small_trees_come_back(tmp_path, tree):
    save(tmp_path / "c", tree)
    assert_same(tree, load(tmp_path / "c"))


def test_other_nodes_become_dicts_of_their_fields(tmp_path):
    Point = collections.namedtuple("Point", "x y")
    state = nnx.State({"layer": nnx.State({"kernel": nnx.Param(jnp.ones((2, 2)))})})
    save(tmp_path / "c", {"p": Point(jnp.ones(1), 2), "e": optax.EmptyState(), "s": state})
    expected = {
        "p": {"x": jnp.ones(1), "y": 2},
        "e": {},
        "s": {"layer": {"kernel": jnp.ones((2, 2))}},
    }
    assert_same(expected, load(tmp_path / "c"))


def test_a_parameter_has_the_same_path_after_its_box_is_gone(tmp_path):
    model = nnx.Sequential(nnx.Linear(8, 4, rngs=nnx.Rngs(0)))
    graph, params = nnx.split(model)
    quantized = qjax.quantize(params, "int8")
    save(tmp_path / "c", quantized)
    loaded, paths = load(tmp_path / "c"), []
    load(tmp_path / "c", shardings=paths.append)
    assert paths == ["layers/0/bias", "layers/0/kernel"]
    assert load(tmp_path / "c", select="layers/0/kernel").keys() == {"layers"}
    boxed = {"w": nn.Partitioned(jnp.ones((2, 2)), ("a", None))}
    save(tmp_path / "linen", boxed)
    assert_same(nn.meta.unbox(boxed), load(tmp_path / "linen"))
    # It is what NNX calls a pure dict: its own ways back take it.
    run = qjax.apply(lambda params, x: nnx.merge(graph, params)(x))
    x = jnp.arange(8.0)
    nnx.replace_by_pure_dict(params, loaded)
    np.testing.assert_array_equal(run(loaded, x), run(quantized, x))
    np.testing.assert_array_equal(run(params, x), run(quantized, x))


def test_weights_in_training_come_back_as_such(tmp_path):
    params = {"a": {"w": jnp.arange(64.0).reshape(16, 4)}, "b": jnp.ones(4)}
    policy = Policy([Rule("a/w", Format("int4", 8))])
    tree = qat.init(params, policy)
    tree["c"] = qat.Latent(jnp.ones((4, 4)), None, jnp.float32(0.5), "pact")
    save(tmp_path / "c", tree)
    assert_same(tree, load(tmp_path / "c"))
    assert_same(tree["a"], load(tmp_path / "c", select="a/w")["a"])
    first = checkpoint.read_manifest(tmp_path / "c").leaves[0]
    assert (first.path, first.kind, first.shape) == ("a/w", "latent", (16, 4))
    mesh = Mesh(np.array(jax.devices()[:4]), ("x",))
    spread = lambda path: NamedSharding(mesh, P("x") if path == "a/w" else P())
    placed = load(tmp_path / "c", shardings=spread)
    assert placed["a"]["w"].value.sharding.spec == P("x")
    assert placed["a"]["w"].scale.sharding == NamedSharding(mesh, P())
    assert_same(qjax.quantize(tree["a"]["w"], Format("int4", 8)),
                qjax.quantize(load(tmp_path / "c")["a"]["w"], Format("int4", 8)))  # fmt: skip
    with pytest.raises(ValueError, match="b: `shardings` has a Latent"):
        load(tmp_path / "c", shardings={"a": None, "b": tree["c"], "c": None})


def test_the_path_may_hold_any_character_and_be_relative(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save("a b#?%20é/c", {"w": jnp.ones(3)})
    assert_same({"w": jnp.ones(3)}, load(tmp_path / "a b#?%20é" / "c"))


def test_a_bracket_in_the_path_is_refused_before_anything_is_written(saved, tmp_path):
    where, tree = tmp_path / "lr[0.1]" / "c", {"w": jnp.ones(3)}
    refused = pytest.raises(NotImplementedError, match="orbax cannot save below a name with a brac")
    with refused:
        save(where, tree)
    assert not os.listdir(tmp_path)
    with refused, ocp.Checkpointer(checkpoint.QTreeHandler()) as checkpointer:
        checkpointer.save(where, args=QTreeSave(tree))
    shutil.copytree(saved, where)  # what was saved elsewhere is read from there
    assert_same(load(saved), load(where))


def test_a_link_is_overwritten_where_it_leads(tmp_path):
    save(tmp_path / "step_1", {"a": 1})
    (tmp_path / "latest").symlink_to("step_1")
    save(tmp_path / "latest", {"a": 2}, overwrite=True)
    assert load(tmp_path / "latest") == load(tmp_path / "step_1") == {"a": 2}
    assert (tmp_path / "latest").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["latest", "step_1"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a": {"b": "text"}}, "a/b: cannot save a str"),
        ({"a": [object()]}, "a/0: cannot save a object"),
        ({"a": {(1, 2): 3}}, r"a: cannot save a dict with the key \(1, 2\)"),
        ({"a": {True: 3}}, "a: cannot save a dict with the key True"),
        ({"a": np.array(["x"])}, "a: cannot save an array of dtype"),
        ({"a": jax.ShapeDtypeStruct((1,), jnp.int8)}, "a: cannot save a ShapeDtypeStruct"),
    ],
)
def test_refuses_what_it_cannot_keep(tmp_path, tree, message):
    with pytest.raises(ValueError, match=message):
        save(tmp_path / "c", tree)
    assert os.listdir(tmp_path) == []


def test_refuses_to_save_under_jit(tmp_path):
    with pytest.raises(ValueError, match="w: is traced"):
        jax.jit(lambda w: save(tmp_path / "c", {"w": w}))(jnp.ones(3))


# ---- the manifest -------------------------------------------------------------------------------


def test_the_manifest_lists_every_leaf(saved, formats):
    manifest = checkpoint.read_manifest(saved)
    assert [leaf.path for leaf in manifest.leaves] == list(formats)
    for leaf in manifest.leaves:
        qt = formats[leaf.path]
        assert leaf == (leaf.path, "qtensor", qt.format, qt.shape, qt.dtype, qt.nbytes)
    assert manifest.nbytes == sum(qt.nbytes for qt in formats.values())
    abstract = manifest.abstract()
    assert jax.tree.structure(abstract) == jax.tree.structure(formats)
    for a, b in zip(jax.tree.leaves(abstract), jax.tree.leaves(formats), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)


def test_metadata_comes_back_without_arrays(saved, tmp_path):
    assert checkpoint.read_metadata(saved) == {"model": "tiny", "layers": [1, 2], "none": None}
    save(tmp_path / "c", {"a": 1})
    assert checkpoint.read_metadata(tmp_path / "c") == {}


@pytest.mark.parametrize("metadata", [{1: "int key"}, {"x": (1, 2)}, {"x": np.ones(1)}, [1]])
def test_refuses_metadata_that_json_changes(tmp_path, metadata):
    with pytest.raises(ValueError, match="`metadata` must be a dict that JSON can keep"):
        save(tmp_path / "c", {"a": 1}, metadata=metadata)


def test_reading_a_manifest_does_not_import_orbax(saved):
    code = (
        "import sys; from qjax.checkpoint import read_manifest;"
        f" assert read_manifest({str(saved)!r}).leaves; assert 'orbax' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ)


# ---- size ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nf4", "int3", "int6", "int4", "q4_k"])
def test_the_disk_holds_at_most_five_percent_more_than_the_arrays(tmp_path, name):
    # Random bits: nothing to compress, as in real codes.
    tree = {f"layer{i}": {"w": filled((1024, 512), FORMATS[name], seed=i)} for i in range(8)}
    nbytes = sum(leaf.nbytes for leaf in jax.tree.leaves(tree, is_leaf=is_qtensor))
    assert nbytes > 1e6
    save(tmp_path / "c", tree)
    on_disk = sum(f.stat().st_size for f in (tmp_path / "c").rglob("*") if f.is_file())
    assert on_disk <= 1.05 * nbytes
    assert checkpoint.read_manifest(tmp_path / "c").nbytes == nbytes


# ---- placement ----------------------------------------------------------------------------------


def test_saved_on_one_device_and_loaded_on_eight_and_back(saved, formats, tmp_path):
    grid = mesh(2, 4)

    def where(path):
        spec = {"stack": P(None, "x", "y"), "embedding": P("y", "x"), "experts": P("x", "y")}
        return NamedSharding(grid, P() if path == "padded" else spec.get(path, P("x", "y")))

    sharded = load(saved, shardings=where)
    assert_same(formats, sharded)
    int4 = sharded["int4"]
    assert int4.data.sharding == NamedSharding(grid, P("x", "y"))
    assert int4.scale.sharding == NamedSharding(grid, P("x", "y"))
    assert sharded["int8"].scale.sharding.spec == P(None, "y")

    save(tmp_path / "sharded", sharded)
    line = NamedSharding(mesh(4), P(None, "x"))
    other = {**dict.fromkeys(formats, line), "embedding": None, "padded": None, "experts": None}
    resharded = load(tmp_path / "sharded", shardings=other)
    assert_same(formats, resharded)
    assert resharded["int4"].data.sharding == line
    back = load(tmp_path / "sharded")
    assert_same(formats, back)
    assert {a.sharding for a in jax.tree.leaves(back)} == {SingleDeviceSharding(jax.devices()[0])}


def test_one_sharding_serves_all(saved, formats):
    everywhere = NamedSharding(mesh(8), P())
    loaded = load(saved, shardings=everywhere)
    assert all(a.sharding.is_equivalent_to(everywhere, a.ndim) for a in jax.tree.leaves(loaded))
    last = SingleDeviceSharding(jax.devices()[-1])
    assert {a.sharding for a in jax.tree.leaves(load(saved, shardings=last))} == {last}


def test_the_shardings_of_a_tree_restore_it_as_it_was(tmp_path):
    s = NamedSharding(mesh(2, 4), P("x", "y"))
    tree = {"w": filled((256, 128), FORMATS["nf4"]), "l": [jax.device_put(jnp.ones((8, 8)), s)]}
    save(tmp_path / "c", tree)
    loaded = load(tmp_path / "c", shardings=jax.tree.map(lambda a: a.sharding, tree))
    assert_same(tree, loaded)
    same = jax.tree.map(lambda a, b: a.sharding == b.sharding, tree, loaded)
    assert all(jax.tree.leaves(same))


def test_refuses_shardings_that_do_not_fit(tmp_path):
    save(tmp_path / "c", {"a": {"w": filled((256, 100), FORMATS["int4"]), "b": jnp.ones(6)}})
    s = NamedSharding(mesh(8), P(None, "x"))
    for shardings, message in [
        (s, "a/w: the sharding .* axis of size 100"),
        ({"a": {"w": None}}, "a/b: `shardings` has no entry"),
        (P("x"), "`shardings` has no entry"),
        ({"a": P("x")}, "a/w: `shardings` has no entry"),
        (lambda path: P("x"), "a/w: expected a jax.sharding.Sharding, got P"),
        ({"a": {"w": None, "b": NamedSharding(mesh(8), P("x"))}}, "a/b: the sharding"),
        (lambda path: NamedSharding(mesh(2), P(None, "x")), "a/b: .* it names 2 axes"),
    ]:
        with pytest.raises(ValueError, match=message):
            load(tmp_path / "c", shardings=shardings)


# ---- a part -------------------------------------------------------------------------------------


def test_a_part_equals_that_part_of_the_whole(saved, formats):
    for patterns, names in [
        ("int?", ["int2", "int3", "int4", "int6", "int8"]),
        (["nf4", "re:e[45]m[23]"], ["nf4", "e4m3", "e5m2"]),
        ("*", list(formats)),
    ]:
        assert_same({n: formats[n] for n in names}, load(saved, select=patterns))


def test_a_part_keeps_its_paths(tmp_path):
    layer = lambda i: {"attn": {"q": jnp.full(2, i), "k": jnp.full(3, i)}, "mlp": jnp.full(4, i)}
    save(tmp_path / "c", {"layers": [layer(i) for i in range(3)], "head": jnp.ones(1)})
    attn = lambda i: {"attn": layer(i)["attn"]}
    for patterns, expected in [
        ("layers/1", {"layers": [None, layer(1), None]}),
        ("layers/*/attn", {"layers": [attn(0), attn(1), attn(2)]}),
        ("*/1/mlp", {"layers": [None, {"mlp": jnp.full(4, 1)}, None]}),
        (["layers", "layers/0/mlp"], {"layers": [layer(0), layer(1), layer(2)]}),
    ]:
        assert_same(expected, load(tmp_path / "c", select=patterns))


def test_a_part_reads_only_its_bytes(tmp_path):
    save(tmp_path / "c", {"large": filled((1024, 512), FORMATS["int8"]), "small": jnp.ones(3)})
    largest = max((tmp_path / "c").rglob("*"), key=lambda f: f.is_file() and f.stat().st_size)
    os.truncate(largest, 1000)
    assert_same({"small": jnp.ones(3)}, load(tmp_path / "c", select="small"))
    with pytest.raises(CheckpointError, match="the stored arrays cannot be read"):
        load(tmp_path / "c", select="large")


def test_a_pattern_that_matches_nothing_is_an_error(saved):
    with pytest.raises(ValueError, match="'attn' matches nothing in the checkpoint"):
        load(saved, select=["int4", "attn"])


def test_patterns_that_are_none_are_refused(saved):
    with pytest.raises(ValueError, match=r"`select`: 're:\(' is no regular expression"):
        load(saved, select="re:(")
    with pytest.raises(ValueError, match="`select` has no patterns"):
        load(saved, select=[])


# ---- damage -------------------------------------------------------------------------------------


def test_refuses_what_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match=r"does not exist. Check the path"):
        load(tmp_path / "nothing")
    (tmp_path / "file").write_text("x")
    with pytest.raises(CheckpointError, match="is a file"):
        load(tmp_path / "file")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="is no qjax checkpoint"):
        load(tmp_path / "empty")
    with ocp.StandardCheckpointer() as other:
        other.save(tmp_path / "orbax", {"a": jnp.ones(3)})
    with pytest.raises(CheckpointError, match="is no qjax checkpoint"):
        load(tmp_path / "orbax")
    save(tmp_path / "run" / "params", {"a": 1})
    with pytest.raises(CheckpointError, match=r"Load .*params"):
        load(tmp_path / "run")


def test_refuses_a_damaged_manifest(broken):
    text = (broken / FILE).read_text()
    for damaged in ("", "[]", "null", text[: len(text) // 2], text[:-1]):
        (broken / FILE).write_text(damaged)
        with pytest.raises(CheckpointError, match="is damaged"):
            load(broken)
    (broken / FILE).write_text(text.replace('"group_size":32', '"group_size":64', 1))
    with pytest.raises(CheckpointError, match="checksum"):
        load(broken)
    (broken / FILE).write_bytes(b"\xff\xfe")
    with pytest.raises(CheckpointError, match="no readable"):
        load(broken)
    (broken / FILE).write_text(text)
    (broken / METADATA_FILE).write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.read_metadata(broken)


@pytest.mark.parametrize("name", ["version", "packing"])
def test_refuses_a_newer_version(broken, name):
    spec = json.loads((broken / FILE).read_text())
    (broken / FILE).write_text(json.dumps({**spec, name: 99}))
    with pytest.raises(
        CheckpointError, match=r"version 99; this qjax reads version 1( or 2 or 3 or 4)?\. Update"
    ):
        load(broken)


def flipped(file):
    raw = bytearray(file.read_bytes())
    raw[np.random.default_rng(0).integers(len(raw))] ^= 0x10
    file.write_bytes(raw)


DAMAGE = {
    "removed": lambda file: file.unlink(),
    "truncated": lambda file: os.truncate(file, file.stat().st_size // 2),
    "emptied": lambda file: os.truncate(file, 0),
    "flipped": flipped,
}


def damaged_copies(saved, tmp_path, how):
    """Yields copies with one file damaged, for every file that orbax has not written for itself."""
    for i, file in enumerate(sorted(f for f in saved.rglob("*") if f.is_file())):
        if file.name not in ("_CHECKPOINT_METADATA", "commit_success.txt"):
            copy = pathlib.Path(shutil.copytree(saved, tmp_path / str(i)))
            DAMAGE[how](copy / file.relative_to(saved))
            yield copy


@pytest.mark.parametrize("how", DAMAGE)
def test_refuses_damage_to_any_file(saved, tmp_path, how):
    for copy in damaged_copies(saved, tmp_path, how):
        with pytest.raises(CheckpointError, match=r"(?s)copy|is no qjax checkpoint") as e:
            load(copy)
        assert str(copy) in str(e.value)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # abandoned reads
@pytest.mark.parametrize("how", DAMAGE)
def test_without_checksums_damage_is_an_error_or_unnoticed_but_no_crash(tmp_path, how, capfd):
    n_errors, tree = 0, {"a": jnp.ones((64, 64)), "q": filled((256, 64), FORMATS["int4"])}
    save(tmp_path / "c", tree)
    for copy in damaged_copies(tmp_path / "c", tmp_path, how):
        try:
            assert jax.tree.structure(load(copy, verify=False)) == jax.tree.structure(tree)
        except CheckpointError as e:
            n_errors += 1
            assert str(copy) in str(e)  # noqa: PT017
            assert len(str(e)) < 600 + 2 * len(str(copy))  # noqa: PT017
    assert n_errors >= 4
    assert capfd.readouterr() == ("", "")


def test_refuses_arrays_of_another_checkpoint(saved, tmp_path):
    def mixed(tree):
        path = tmp_path / "mixed"
        save(path, tree, overwrite=path.exists())
        shutil.copy(saved / FILE, path / FILE)
        checksum.write(checkpoint.manifest.resolve(path))
        return path

    with pytest.raises(CheckpointError, match=r"the array .* is missing"):
        load(mixed({"a": jnp.ones(3)}))
    shapes = {"int4": filled((512, 64), FORMATS["int4"])}
    with pytest.raises(CheckpointError, match="mixes two checkpoints"):
        load(mixed(shapes), select="int4")
    signed = {"int4": filled((512, 128), FORMATS["int4"])}
    qt = signed["int4"]
    signed["int4"] = QTensor(
        qt.data.view(jnp.int8), qt.scale, qt.zero, qt.format, qt.layout, qt.dtype, qt.pad
    )
    with pytest.raises(CheckpointError, match=r"is stored as int8\[256, 128\], but the manifest"):
        load(mixed(signed), select="int4")


# ---- whole or not at all ------------------------------------------------------------------------

_SAVE = """
import functools, os, pathlib, signal, sys, threading
import jax.numpy as jnp, numpy as np
import qjax
from qjax import Policy, Rule, checkpoint, qat
from qjax.checkpoint import checksum, manifest

path, point = sys.argv[1:]
die = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
Handler = checkpoint.QTreeHandler

def after(function):
    def run(*args, **kwargs):
        function(*args, **kwargs)
        die()
    return run

def half_a_manifest(self, directory, texts):
    (directory / manifest.FILE).write_text(texts[manifest.FILE][:100])
    die()

tree = {f"w{i}": jnp.asarray(np.random.default_rng(i).integers(0, 256, 1 << 20).astype(np.uint8))
        for i in range(24)}
def once_begun():
    while not any(p.is_file() for p in pathlib.Path(path).parent.glob("fresh*/**/*")):
        pass
    die()

if point == "arrays half written":
    threading.Thread(target=once_begun).start()
if point == "arrays written":
    Handler._write = die
if point == "manifest half written":
    Handler._write = half_a_manifest
if point == "manifest written":
    Handler._write = after(Handler._write)
if point == "complete but for its name":
    checksum.write = after(checksum.write)
checkpoint.save(path, tree, overwrite=True)
"""


@pytest.mark.parametrize(
    "point",
    [
        "arrays half written",
        "arrays written",
        "manifest half written",
        "manifest written",
        "complete but for its name",
    ],
)
def test_a_killed_save_leaves_nothing_readable_and_what_was_there(tmp_path, point):
    fresh, old = tmp_path / "fresh", tmp_path / "old"
    save(old, {"old": 1})
    for path in (fresh, old) if point == "manifest written" else (fresh,):
        child = subprocess.run([sys.executable, "-c", _SAVE, str(path), point], env=os.environ)
        assert child.returncode == -signal.SIGKILL
    assert not fresh.exists()
    with pytest.raises(CheckpointError, match="is left of a save that was interrupted"):
        load(fresh)
    for left in tmp_path.glob("*.orbax-checkpoint-tmp*"):
        with pytest.raises(CheckpointError, match="interrupted or is still running"):
            load(left)
    assert load(old) == {"old": 1}
    for path in (fresh, old):  # what is left is in nobody's way
        save(path, {"new": 1}, overwrite=True)
        assert load(path) == {"new": 1}
    assert sorted(os.listdir(tmp_path)) == ["fresh", "old"]


@pytest.mark.parametrize("step", ["rename", "rmtree"])
def test_a_save_killed_while_replacing_loses_nothing(tmp_path, monkeypatch, step):
    save(tmp_path / "c", {"a": 1})
    cls = type(checkpoint.manifest.resolve(tmp_path))
    original, calls = getattr(cls, step), []

    def killed(self, *args, **kwargs):
        if str(tmp_path / "c") in str(self) and ".orbax" not in str(self):
            calls.append(self)
            if len(calls) == (2 if step == "rename" else 1):
                raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as m:
        m.setattr(cls, step, killed)
        with pytest.raises(CheckpointError, match="could not be saved"):
            save(tmp_path / "c", {"a": 2}, overwrite=True)
    if step == "rename":  # the worst moment: the old one is aside, the new one not yet in place
        with pytest.raises(CheckpointError, match=r"c\.qjax-new, c\.qjax-old does"):
            load(tmp_path / "c")
        assert load(tmp_path / "c.qjax-old") == {"a": 1}
        assert load(tmp_path / "c.qjax-new") == {"a": 2}
    else:
        assert load(tmp_path / "c") == {"a": 2}
        save(tmp_path / "c", {"a": 3}, overwrite=True)
        assert load(tmp_path / "c") == {"a": 3}
        assert os.listdir(tmp_path) == ["c"]


def test_overwrites_only_when_told_and_only_checkpoints(tmp_path):
    save(tmp_path / "c", {"a": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"exists. Pass overwrite=True"):
        save(tmp_path / "c", {"a": jnp.ones(4)})
    save(tmp_path / "c", {"a": jnp.ones(4)}, overwrite=True)
    assert load(tmp_path / "c")["a"].shape == (4,)
    assert os.listdir(tmp_path) == ["c"]
    (tmp_path / "thesis").mkdir()
    with pytest.raises(ValueError, match="is no qjax checkpoint, so it is not replaced"):
        save(tmp_path / "thesis", {"a": 1}, overwrite=True)


def test_a_path_that_cannot_be_made_is_refused_at_once(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match=r"cannot be made, as .*file is a file"):
        save(tmp_path / "file" / "deep" / "c", {"a": 1})
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(ValueError, match=r"cannot be made, as .* cannot be written to"):
        save(tmp_path / "c", {"a": 1})


# ---- in the background --------------------------------------------------------------------------


def test_arrays_may_be_donated_changed_and_deleted_while_saving(tmp_path):
    values = np.arange(1 << 20, dtype=np.int32)
    tree = {"donated": jnp.array(values), "deleted": jnp.array(values), "changed": values.copy()}
    pending = save_async(tmp_path / "c", tree)
    jax.block_until_ready(jax.jit(lambda x: x * 0, donate_argnums=0)(tree["donated"]))
    tree["deleted"].delete()
    tree["changed"][:] = 0
    pending.wait_until_finished()
    assert pending.done()
    for array in load(tmp_path / "c").values():
        np.testing.assert_array_equal(array, values)


def test_a_failed_background_save_raises_when_waited_for(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError("No space left on device")

    monkeypatch.setattr(checkpoint.QTreeHandler, "_write", full)
    pending = save_async(tmp_path / "c", {"a": jnp.ones(3)})
    with pytest.raises(CheckpointError, match="could not be saved: No space left on device"):
        pending.wait_until_finished()
    assert not (tmp_path / "c").exists()


def test_is_silent(tmp_path, caplog, capfd):
    with warnings.catch_warnings(), caplog.at_level(logging.DEBUG):
        warnings.simplefilter("error")
        save(tmp_path / "c", {"a": jnp.ones(3), "q": filled((128, 8), FORMATS["nf4"])})
        load(tmp_path / "c", shardings=NamedSharding(mesh(8), P()))
        load(tmp_path / "c", select="a")
    # Threads of other saves may still log what nobody is shown by default.
    shown = [r for r in caplog.records if r.levelno >= logging.WARNING]
    assert not [r for r in shown if "orbax" in r.pathname]
    assert capfd.readouterr() == ("", "")


# ---- inside a CheckpointManager -----------------------------------------------------------------


def test_lives_beside_an_optimizer_state_in_a_checkpoint_manager(tmp_path):
    base = {"w": filled((256, 64), FORMATS["nf4"]), "norm": jnp.ones(64)}
    adapters = {"a": jnp.ones((64, 4)), "b": jnp.zeros((4, 64))}
    optimizer = optax.adam(1e-3)
    state = optimizer.init(adapters)
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(tmp_path, options=options) as manager:
        for step in range(4):
            updates, state = optimizer.update(adapters, state)
            adapters = optax.apply_updates(adapters, updates)
            base["norm"] = base["norm"] + 1
            manager.save(
                step,
                args=ocp.args.Composite(
                    params=QTreeSave({"base": base, "adapters": adapters}, {"step": step}),
                    opt=ocp.args.StandardSave(state),
                ),
            )
    with ocp.CheckpointManager(tmp_path, options=options) as manager:  # as a new program would
        assert manager.all_steps() == [2, 3]
        restored = manager.restore(
            manager.latest_step(),
            args=ocp.args.Composite(
                params=QTreeRestore(), opt=ocp.args.StandardRestore(jax.eval_shape(lambda: state))
            ),
        )
        assert_same({"base": base, "adapters": adapters}, restored["params"])
        assert_same(state, restored["opt"])
        sharding = NamedSharding(mesh(8), P())
        part = manager.restore(
            3, args=ocp.args.Composite(params=QTreeRestore(sharding, select="base/*"))
        )["params"]
        assert_same({"base": base}, part)
        assert part["base"]["norm"].sharding == sharding
        params = manager.directory / "2" / "params"
    assert checkpoint.read_metadata(params) == {"step": 2}
    assert (load(params)["base"]["norm"] == 4).all()  # an item is a checkpoint of its own
    with pytest.raises(CheckpointError, match=r"Load .*params"):
        load(params.parent)


def test_works_with_a_plain_checkpointer(tmp_path):
    tree = {"w": filled((256, 8), FORMATS["q4_k"])}
    with ocp.Checkpointer(checkpoint.QTreeHandler()) as checkpointer:
        checkpointer.save(tmp_path / "c", args=QTreeSave(tree))
        assert_same(tree, checkpointer.restore(tmp_path / "c", args=QTreeRestore()))
    assert_same(tree, load(tmp_path / "c"))


# ---- factors of the activation ------------------------------------------------------------------


@pytest.fixture(scope="module")
def factored():
    fmt = Format("int4", 32, activation="int8", activation_scale="static")
    w = np.random.default_rng(0).normal(size=(2, 64, 16)).astype(np.float32)
    smooth = quantize_array(
        jnp.asarray(w), fmt, pre_scale=jnp.full((2, 64), 0.5), act_scale=jnp.array([0.1, 0.2])
    )
    return {"smooth": smooth, "plain": filled((64, 16), Format("int8"))}


def test_factors_come_back(factored, tmp_path):
    save(tmp_path / "c", factored)
    assert_same(factored, load(tmp_path / "c"))
    assert_same(factored["smooth"], load(tmp_path / "c", select="smooth")["smooth"])
    leaves = {leaf.path: leaf for leaf in checkpoint.read_manifest(tmp_path / "c").leaves}
    assert leaves["smooth"].nbytes == factored["smooth"].nbytes


def test_factors_are_placed_as_the_weight_is(factored, tmp_path):
    save(tmp_path / "c", factored)
    where = NamedSharding(mesh(2, 4), P("x", "y"))
    got = load(tmp_path / "c", select="smooth", shardings={"smooth": where})["smooth"]
    assert got.pre_scale.sharding.spec == P("x", "y")
    assert got.act_scale.sharding.spec == P("x")
    assert_same(jax.device_get(factored["smooth"]), jax.device_get(got))


def test_only_a_tree_with_factors_needs_a_reader_that_knows_them(factored, tmp_path):
    for name, version in (("plain", 1), ("smooth", 2)):
        save(tmp_path / name, {"w": factored[name]})
        spec = json.loads((tmp_path / name / FILE).read_text())
        assert spec["version"] == version
        assert ("pre_scale" in json.dumps(spec)) == (version == 2)
