"""The manifest: the JSON text that says what a checkpoint holds."""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath
from jax.core import Tracer

from qjax.format import Format
from qjax.latent import Latent
from qjax.layout import Axis, Layout
from qjax.paths import check_pattern, key_str, matches
from qjax.qtensor import PARTS, QTensor, is_qtensor

FILE = "qjax_manifest.json"
METADATA_FILE = "qjax_metadata.json"
VERSION = 1
VERSION_FACTORS = 2  # of a tree whose QTensors have factors of activations
VERSION_PERM = 3  # of a tree with stored rows in an order of their own
VERSION_LATENT = 4  # of a tree of weights in training
_TMP = ".orbax-checkpoint-tmp"
PACKING_VERSION = 1  # the bit order of qjax.packing

# What the array store keeps bit for bit.
_DTYPES = frozenset(
    {"bool", "int2", "float4_e2m1fn", "bfloat16", "complex64", "complex128"}
    | {f"int{bits}" for bits in (4, 8, 16, 32, 64)}
    | {f"uint{bits}" for bits in (8, 16, 32, 64)}
    | {f"float{bits}" for bits in (16, 32, 64)}
    | {f"float8_{f}" for f in ("e4m3fn", "e4m3fnuz", "e4m3b11fnuz")}
    | {f"float8_{f}" for f in ("e5m2", "e5m2fnuz", "e8m0fnu")}
)
_NUMBERS = {"bool": bool, "int": int, "float": float, "complex": complex}
_FACTORS = PARTS[3:]
LATENT_PARTS = ("value", "scale", "act_scale")

# A node is None or a dict with a "kind":
#   dict          items: [[key, node], ...], keys are strings or integers
#   list, tuple   items: [node, ...]
#   array         name: in the array store, null for an array without elements; dtype, shape
#   key           impl, data: the node of the key data's array
#   number        type, value: text that gives the number back exactly
#   qtensor       format, layout, dtype, pad; data, scale, zero: nodes; pre_scale, act_scale
#                 and perm where there are
#   latent        act_rule; value, and scale and act_scale where there are: nodes
Node = dict[str, Any] | None


class CheckpointError(ValueError):
    """A directory that is no readable checkpoint; the message names it and what to do."""


class Leaf(NamedTuple):
    """One line of a checkpoint's table of contents.

    Attributes:
      path: keys joined by "/".
      kind: "qtensor", "latent" (a weight in training), "array", "key" (a PRNG key) or "number".
      format: of a QTensor, else None.
      shape: logical shape.
      dtype: name of the logical dtype.
      nbytes: bytes of all stored arrays, scales included.
    """

    path: str
    kind: str
    format: Format | None
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


class Manifest:
    """What a checkpoint holds, known without reading its arrays."""

    def __init__(self, tree: Node):
        self.tree = tree

    @property
    def leaves(self) -> list[Leaf]:
        """One entry for each array, QTensor, Latent and number, in the order of the tree."""
        return [_leaf(path, node) for path, node in walk(self.tree)]

    @property
    def nbytes(self) -> int:
        """Bytes of all stored arrays."""
        return sum(leaf.nbytes for leaf in self.leaves)

    def abstract(self) -> Any:
        """Returns the saved tree with `jax.ShapeDtypeStruct`s in place of arrays."""
        return rebuild(self.tree, _shape)

    def to_json(self) -> str:
        # A reader that does not know of the factors would leave them out in silence.
        nodes = [node for _, node in walk(self.tree)]
        parts = {name for node in nodes for name in _FACTORS if name in node}
        version = VERSION_PERM if "perm" in parts else VERSION_FACTORS if parts else VERSION
        if any(node["kind"] == "latent" for node in nodes):
            version = VERSION_LATENT
        head = {"version": version, "packing": PACKING_VERSION, "crc32": _crc(self.tree)}
        return json.dumps({**head, "tree": self.tree}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str, where: Any) -> Manifest:
        """Reads a manifest; `where` is the directory that errors name.

        Raises:
          CheckpointError: if the text is cut short, was changed, or is of a newer version.
        """
        try:
            spec = json.loads(text)
            versions, crc, tree = (
                (spec["version"], spec["packing"]),
                spec["crc32"],
                spec.get("tree"),
            )
        except (ValueError, KeyError, TypeError, AttributeError):
            raise CheckpointError(
                f"{where}: {FILE} is damaged (cut short, or not written by qjax). Restore it from a"
                " copy of the checkpoint, or save the model again."
            ) from None
        ours = ((VERSION, VERSION_FACTORS, VERSION_PERM, VERSION_LATENT), (PACKING_VERSION,))
        for name, version, known in zip(("manifest", "packing"), versions, ours, strict=True):
            if version not in known:
                readable = " or ".join(map(str, known))
                raise CheckpointError(
                    f"{where}: was saved with {name} version {version!r}; this qjax reads version"
                    f" {readable}. Update qjax, or save again with an older one."
                )
        if crc != _crc(tree):
            raise CheckpointError(
                f"{where}: {FILE} is damaged, its checksum does not match. Restore it from a copy"
                " of the checkpoint, or save the model again."
            )
        return cls(tree)


def _crc(tree: Node) -> int:
    return zlib.crc32(json.dumps(tree, separators=(",", ":"), sort_keys=True).encode())


# ---- tree to manifest ---------------------------------------------------------------------------


def describe(tree: Any) -> tuple[Node, dict[str, Any]]:
    """Returns the node of a tree, and its arrays by their names in the array store.

    Dicts, lists, tuples and Latents are kept. Any other pytree node (a NamedTuple, a dataclass, an
    `nnx.State`) becomes a dict of its fields, or a tuple if they have no names, and the box of an
    `nnx.Variable` or a Linen `Partitioned` what is in it, so that the path of every leaf is the
    same before and after.

    Raises:
      ValueError: for a leaf or a key that cannot be kept; the message starts with its path.
    """
    arrays: dict[str, Any] = {}
    return _describe(tree, (), arrays), arrays


def _describe(x: Any, path: tuple[str, ...], arrays: dict[str, Any]) -> Node:
    if x is None:
        return None
    if isinstance(x, QTensor):
        return _describe_qtensor(x.canonical(), path, arrays)  # no kernel's layout is stored
    if isinstance(x, Latent):
        node = {"kind": "latent", "act_rule": x.act_rule}
        given = {part: getattr(x, part) for part in LATENT_PARTS if getattr(x, part) is not None}
        return node | {part: _describe(a, (*path, part), arrays) for part, a in given.items()}
    if type(x) is dict:
        items = [[_key(k, path), _describe(v, (*path, str(k)), arrays)] for k, v in x.items()]
        return {"kind": "dict", "items": items}
    if type(x) in (list, tuple):
        items = [_describe(v, (*path, str(i)), arrays) for i, v in enumerate(x)]
        return {"kind": type(x).__name__, "items": items}
    if type(x).__name__ in _NUMBERS and type(x) is _NUMBERS[type(x).__name__]:
        value = x.hex() if isinstance(x, float) else str(x)
        return {"kind": "number", "type": type(x).__name__, "value": value}
    if isinstance(x, jax.Array | np.ndarray | np.generic):
        return _describe_array(x, path, arrays)
    items, _ = jax.tree_util.tree_flatten_with_path(x, is_leaf=lambda y: y is not x)
    if items and items[0][0] == ():  # no node at all
        raise ValueError(
            f"{_join(path)}: cannot save a {type(x).__name__}. Parameters are arrays, QTensors,"
            " numbers and None; put anything else in `metadata`."
        )
    keys = [key for (key,), _ in items]
    if [getattr(key, "name", None) for key in keys] == ["value"]:  # a box, see `path_str`
        return _describe(items[0][1], path, arrays)
    nodes = [_describe(child, (*path, key_str(key)), arrays) for (key,), child in items]
    positional = (jax.tree_util.SequenceKey, jax.tree_util.FlattenedIndexKey)
    if items and all(isinstance(k, positional) for k in keys):
        return {"kind": "tuple", "items": nodes}
    names = [_key(k.key, path) if hasattr(k, "key") else key_str(k) for k in keys]
    return {"kind": "dict", "items": [list(item) for item in zip(names, nodes, strict=True)]}


def _key(key: Any, path: tuple[str, ...]) -> str | int:
    if isinstance(key, str) or type(key) is int:
        return key
    raise ValueError(
        f"{_join(path)}: cannot save a dict with the key {key!r} of type {type(key).__name__}. Use"
        " strings or integers."
    )


def _describe_array(x: Any, path: tuple[str, ...], arrays: dict[str, Any]) -> dict[str, Any]:
    if isinstance(x, Tracer):
        raise ValueError(f"{_join(path)}: is traced. Save outside of `jit`, `grad` and `vmap`.")
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _describe_array(jax.random.key_data(x), path, arrays)
        return {"kind": "key", "impl": str(jax.random.key_impl(x)), "data": data}
    if x.dtype.name not in _DTYPES:
        raise ValueError(
            f"{_join(path)}: cannot save an array of dtype {x.dtype}. Cast it to one of"
            f" {', '.join(sorted(_DTYPES))}."
        )
    name = None
    if x.size:  # the array store keeps no empty arrays; the shape says all there is to say
        # Only characters that every file system and URL allows; the tree keeps the true keys.
        stem = re.sub(r"[^A-Za-z0-9_.-]", "_", ".".join(path)).lstrip(".") or "array"
        name = stem
        i = 1
        while name in arrays:
            name, i = f"{stem}~{i}", i + 1
        arrays[name] = np.asarray(x) if isinstance(x, np.generic) else x
    return {"kind": "array", "name": name, "dtype": x.dtype.name, "shape": list(x.shape)}


def _describe_qtensor(qt: QTensor, path: tuple[str, ...], arrays: dict[str, Any]) -> Node:
    qt.check_codes(_join(path))
    node: dict[str, Any] = {
        "kind": "qtensor",
        "format": qt.format.to_dict(),
        "layout": [list(axis if axis.rank else axis[:2]) for axis in qt.layout],
        "dtype": qt.dtype,
        "pad": qt.pad,
    }
    for part in PARTS:
        stored = getattr(qt, part)
        if stored is not None or part not in _FACTORS:
            node[part] = _describe(stored, (*path, part), arrays)
    return node


def _join(path: tuple[str, ...]) -> str:
    return "/".join(path) or "."


# ---- manifest to tree ---------------------------------------------------------------------------


def rebuild(node: Node, array: Callable[[dict[str, Any]], Any]) -> Any:
    """Returns the tree of a node, with `array(node)` for every array."""
    if node is None:
        return None
    kind = node["kind"]
    if kind == "dict":
        return {key: rebuild(item, array) for key, item in node["items"]}
    if kind in ("list", "tuple"):
        items = [rebuild(item, array) for item in node["items"]]
        return items if kind == "list" else tuple(items)
    if kind == "number":
        read = float.fromhex if node["type"] == "float" else _NUMBERS[node["type"]]
        return node["value"] == "True" if node["type"] == "bool" else read(node["value"])
    if kind == "key":
        data = array(node["data"])
        wrap = lambda d: jax.random.wrap_key_data(d, impl=node["impl"])
        return jax.eval_shape(wrap, data) if isinstance(data, jax.ShapeDtypeStruct) else wrap(data)
    if kind == "latent":
        parts = {part: rebuild(node.get(part), array) for part in LATENT_PARTS}
        return Latent(**parts, act_rule=node["act_rule"])
    if kind == "qtensor":
        parts = {part: rebuild(node.get(part), array) for part in PARTS}
        fmt = Format.from_dict(node["format"])
        layout = Layout(Axis(*axis) for axis in node["layout"])
        return QTensor(format=fmt, layout=layout, dtype=node["dtype"], pad=node["pad"], **parts)
    return array(node)


def _shape(node: dict[str, Any]) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(node["shape"]), jnp.dtype(node["dtype"]))


def abstract(node: Node) -> Any:
    """Returns the tree of a node with `jax.ShapeDtypeStruct`s in place of arrays."""
    return rebuild(node, _shape)


def children(node: Node) -> list[tuple[str | int, Node]]:
    """Returns the keys and nodes below a dict, list or tuple; nothing for a leaf."""
    if node is None or node["kind"] not in ("dict", "list", "tuple"):
        return []
    if node["kind"] == "dict":
        return [(key, item) for key, item in node["items"]]
    return list(enumerate(node["items"]))


def walk(node: Node, path: tuple[str, ...] = ()) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the path and node of every array, PRNG key, number, QTensor and Latent (one leaf)."""
    if node is None:
        return
    if node["kind"] not in ("dict", "list", "tuple"):
        yield _join(path), node
    for key, item in children(node):
        yield from walk(item, (*path, str(key)))


def arrays_of(node: Node) -> list[dict[str, Any]]:
    """Returns the array nodes below a node, the parts of QTensors and Latents included."""
    found: list[dict[str, Any]] = []
    rebuild(node, lambda a: found.append(a) or _shape(a))
    return found


def _leaf(path: str, node: dict[str, Any]) -> Leaf:
    kind = node["kind"]
    if kind == "number":
        return Leaf(path, kind, None, (), node["type"], 0)
    nbytes = sum(math.prod(a["shape"]) * jnp.dtype(a["dtype"]).itemsize for a in arrays_of(node))
    x = abstract(node)
    fmt = x.format if is_qtensor(x) else None  # arrays have a `format` too
    return Leaf(path, kind, fmt, x.shape, str(x.dtype), nbytes)


# ---- a part of the tree -------------------------------------------------------------------------


def select(node: Node, patterns: str | Sequence[str]) -> Node:
    """Returns the part of a tree at paths that match.

    A pattern is a glob (`*` also matches `/`), or a regular expression after `re:`, over the path
    of a leaf or of any node above it. Dicts lose the other keys; lists and tuples keep their
    length, with None in place of what was not selected, so that paths stay the same.

    Raises:
      ValueError: if there is no pattern, or one that is none, or that matches nothing.
    """
    patterns = [patterns] if isinstance(patterns, str) else list(patterns)
    if not patterns:
        raise ValueError("`select` has no patterns; give one or more, or None for the whole tree.")
    for pattern in patterns:
        try:
            check_pattern(pattern)
        except ValueError as e:
            raise ValueError(f"`select`: {e}") from e
    used: set[str] = set()
    selected = _select(node, (), patterns, used)
    for pattern in patterns:
        if pattern not in used:
            paths = [path for path, _ in walk(node)]
            more = f", ... ({len(paths)} in all)" if len(paths) > 4 else ""
            raise ValueError(
                f"`select`: {pattern!r} matches nothing in the checkpoint. There are"
                f" {', '.join(map(repr, paths[:4]))}{more}. A glob matches whole paths: write"
                f" '*{pattern.strip('*')}*' to match a part."
            )
    return selected


def _select(node: Node, path: tuple[str, ...], patterns: list[str], used: set[str]) -> Node:
    at = _join(path)
    hits = {p for p in patterns if matches(p, at)}
    # Patterns that match below a selected node are no mistake either.
    for key, item in children(node):
        if hits:
            _select(item, (*path, str(key)), patterns, used)
    used |= hits
    if hits:
        return node
    parts = [
        (key, _select(item, (*path, str(key)), patterns, used)) for key, item in children(node)
    ]
    if not any(part is not None for _, part in parts):
        return None
    assert node is not None
    if node["kind"] == "dict":
        items = [[key, part] for key, part in parts if part is not None]
    else:
        items = [part for _, part in parts]
    return {**node, "items": items}


# ---- files --------------------------------------------------------------------------------------


def resolve(path: Any) -> epath.Path:
    """Returns an absolute path; URLs of cloud storage stay what they are."""
    path = epath.Path(path).expanduser()
    return path if "://" in str(path) else path.absolute()


def read_manifest(path: Any) -> Manifest:
    """Reads what a checkpoint holds: every leaf with its format, shape and bytes, but no array.

    Raises:
      CheckpointError: if there is no checkpoint at `path`, or its manifest is damaged.

    Example:
      >>> read_manifest("ckpt").leaves[0]  # doctest: +SKIP
      Leaf(path='mlp/kernel', kind='qtensor', format=..., shape=(64, 32), dtype='float32', ...)
    """
    directory = resolve(path)
    if _TMP in str(directory):
        raise CheckpointError(
            f"{directory}: is left of a save that was interrupted or is still running. Wait for it,"
            " or save the model again."
        )
    return Manifest.from_json(_read(directory, FILE), directory)


def read_metadata(path: Any) -> dict[str, Any]:
    """Reads the `metadata` that was given to `save`; an empty dict if there was none.

    Raises:
      CheckpointError: if there is no checkpoint at `path`, or its metadata is damaged.
    """
    read_manifest(path)
    try:
        return json.loads(_read(resolve(path), METADATA_FILE))
    except ValueError as e:
        if isinstance(e, CheckpointError):
            raise
        raise CheckpointError(
            f"{path}: {METADATA_FILE} is damaged (cut short, or edited). Restore it from a copy of"
            " the checkpoint, or save the model again."
        ) from None


def check_metadata(metadata: Any) -> None:
    """Refuses metadata that JSON cannot keep."""
    if metadata is None:
        return
    try:
        if not isinstance(metadata, Mapping) or json.loads(json.dumps(metadata)) != metadata:
            raise TypeError("it is not a dict, or JSON changes it (int keys, tuples, NaN)")
    except (TypeError, ValueError) as e:
        raise ValueError(
            f"`metadata` must be a dict that JSON can keep as it is: {e}. Use dicts with string"
            " keys, lists, strings, numbers and None."
        ) from None


def _read(directory: epath.Path, name: str) -> str:
    try:
        return (directory / name).read_text()
    except (OSError, UnicodeDecodeError):
        raise CheckpointError(_why_missing(directory, name)) from None


def _why_missing(directory: epath.Path, name: str) -> str:
    if not directory.exists():
        parent, prefix = directory.parent, directory.name + "."
        beside = []
        if parent.is_dir():
            beside = sorted(p.name for p in parent.iterdir() if p.name.startswith(prefix))
        whole = [b for b in beside if b.endswith((".qjax-new", ".qjax-old"))]
        if whole:
            return (
                f"{directory}: does not exist, but {', '.join(whole)} does: overwriting was"
                " interrupted. What is there is complete; rename it to get it back."
            )
        if beside:
            return (
                f"{directory}: does not exist. {', '.join(beside)} is left of a save that was"
                " interrupted and is not complete; save the model again."
            )
        return f"{directory}: does not exist. Check the path of the checkpoint."
    if not directory.is_dir():
        return f"{directory}: is a file. A checkpoint is the directory that `qjax.save` wrote."
    inside = sorted(p.name for p in directory.iterdir() if (p / FILE).exists())
    if inside:
        return (
            f"{directory}: is no checkpoint, but {', '.join(inside)} inside it is. Load"
            f" {directory / inside[0]}."
        )
    return (
        f"{directory}: is no qjax checkpoint, it has no readable {name}. A checkpoint is written by"
        " `qjax.save`; checkpoints of other tools have to be loaded, quantized and saved."
    )
