"""quantize and dequantize: a policy over a pytree of parameters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.sharding import NamedSharding, PartitionSpec

from qjax import numerics, qtensor
from qjax.errors import QuantizationError
from qjax.format import Format
from qjax.latent import is_latent
from qjax.layout import DEFAULT, Layout
from qjax.paths import check_unique, path_str
from qjax.policy import Policy, Rule
from qjax.ptq import hqq
from qjax.qtensor import QTensor, is_qtensor
from qjax.recipe import Recipe
from qjax.scale_range import check_range
from qjax.sharding import float_sharding, shardings_of
from qjax.summary import Summary, energies, row_of


class Assignment(NamedTuple):
    """What will become of one leaf: `format` None leaves it as it is, `note` says why if odd."""

    path: str
    leaf: Any
    format: Format | None
    layout: Layout | None
    note: str = ""


def assign(params: Any, policy: Policy, usage: Any = None) -> list[Assignment]:
    """Returns the format and layout of every leaf, after checking that they fit.

    Raises:
      QuantizationError: a rule that matches nothing although it is not optional, or matches a leaf
        that is not float, has no data, or is quantized already; two leaves with one path.
    """
    if usage is not None and not hasattr(usage, "layout"):
        raise TypeError(
            "`usage` must be what `qjax.usage(fn)(params, *args)` returns, an abstract trace of fn,"
            f" got a {type(usage).__name__}."
        )
    leaves = jax.tree_util.tree_flatten_with_path(params, is_leaf=_is_weight)[0]
    if callable(params) and len(leaves) == 1 and leaves[0][1] is params:
        raise TypeError(f"`params` must be a tree of arrays, got the function {params!r}.")
    named = [(path_str(key_path), leaf) for key_path, leaf in leaves]
    try:
        check_unique(path for path, _ in named)
    except ValueError as e:
        raise QuantizationError(str(e)) from None
    out, used = [], set()
    for path, leaf in named:
        rule = policy.rule_for(path, leaf.ndim if _is_weight(leaf) else np.ndim(leaf))
        used.add(id(rule))
        if rule is None or rule.format is None:
            if is_latent(leaf) and (leaf.scale is not None or leaf.act_scale is not None):
                raise QuantizationError(
                    f"{path}: has learned steps, but policy {policy.name!r} leaves it in float."
                    " Give the policy that it was trained with."
                )
            out.append(Assignment(path, leaf, None, None))
            continue
        _check_leaf(path, leaf, rule, rule.format)
        letters = rule.layout
        if letters is None and usage is not None:
            letters = usage.layout(path)
            if letters is None:
                out.append(Assignment(path, leaf, None, None, usage.why_not(path)))
                continue
        try:
            layout = Layout.parse(letters or DEFAULT, leaf.shape)
            _shapes(rule.format, layout, leaf)
        except ValueError as e:
            raise QuantizationError(f"{path}: {e}") from None
        out.append(Assignment(path, leaf, rule.format, layout))
    for i, rule in enumerate(policy.rules):
        if rule.optional or id(rule) in used:
            continue
        matched = [p for p, _ in named if rule.matches(p, 99)]
        fitting = [p for p, leaf in named if rule.matches(p, getattr(leaf, "ndim", 0))]
        if not matched:
            why = f"There are: {_some([p for p, _ in named])}."
        elif fitting:
            why = f"All that it matches ({_some(fitting)}) is taken by earlier rules."
        else:
            why = f"It matches {_some(matched)}, of fewer than min_ndim={rule.min_ndim} axes."
        raise QuantizationError(
            f"policy {policy.name!r}: rule {i + 1} ({rule}) applies to no parameter. {why}"
            " Correct the pattern, or mark the rule optional."
        )
    return out


def _check_any(plan: list[Assignment], policy: Policy) -> None:
    """Raises where none of all that rules give formats to is the weight of a product."""
    unfit = [f"{a.path} is {a.note}" for a in plan if a.note]
    if unfit and all(a.format is None for a in plan):
        raise QuantizationError(
            f"policy {policy.name!r} would quantize nothing: {'; '.join(unfit[:4])}"
            + (f"; ... ({len(unfit)} in all)" if len(unfit) > 4 else "")
            + ". Trace a function that multiplies by its parameters."
        )


def _is_weight(x: Any) -> bool:
    return is_qtensor(x) or is_latent(x)


def _some(paths: list[str], most: int = 4) -> str:
    more = f", ... ({len(paths)} in all)" if len(paths) > most else ""
    return ", ".join(map(repr, paths[:most])) + more if paths else "no parameters at all"


def _check_leaf(path: str, leaf: Any, rule: Rule, fmt: Format) -> None:
    if is_qtensor(leaf):
        raise QuantizationError(
            f"{path}: is quantized already ({leaf.format}). Dequantize it first, or skip it."
        )
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or not jnp.issubdtype(dtype, jnp.floating):
        raise QuantizationError(
            f"{path}: the rule {rule} applies to it, but its type is"
            f" {dtype or type(leaf).__name__}, not float. Put a rule with skip before it."
        )
    if 0 in leaf.shape:
        raise QuantizationError(f"{path}: has no data, its shape is {leaf.shape}. Skip it.")
    element = numerics.get_element(fmt.element)
    if element.qmin >= 0 and not fmt.zero_point and fmt.offset is None:
        raise QuantizationError(
            f"{path}: {fmt.element!r} has no negative values, weights do. Set zero_point=True or an"
            f" offset, or use 'int{element.bits}'."
        )


def _check_data_free(plan: list[Assignment]) -> None:
    """Refuses formats that only calibration data can complete."""
    for a in plan:
        if a.format is None or a.format.activation_scale != "static":
            continue
        if getattr(a.leaf, "act_scale", None) is None:
            raise QuantizationError(
                f"{a.path}: `activation_scale='static'` is a step measured on activations. Pass"
                " `fn` and `calibration` data, or `qjax.qat.init` for a learned one, or use"
                " activation_scale='token' or 'tensor'."
            )


# Weights in a leaf above which its parts (slices of a stack, blocks of columns) are quantized one
# after the other: float32 temporaries are then those of one part, not several times the leaf.
_SEQUENTIAL_SIZE = 1 << 24


@functools.lru_cache(maxsize=1024)
def _quantizer(
    fmt: Format,
    layout: Layout,
    shardings: Any,
    with_energy: bool,
    sequential: bool = False,
    rounding: str = "nearest",
):
    """Returns the jitted quantization of one leaf; equal leaves share one compilation."""

    def whole(w):
        if rounding == "hqq":
            qt = hqq.solve(w, fmt, layout)
        else:
            qt = qtensor.quantize_array(w, fmt, layout)
        return qt, energies(w, qt) if with_energy else None

    def latent(w):
        qt = qtensor.quantize_array(w.value, fmt, layout, scale=w.scale, act_scale=w.act_scale)
        return qt, energies(w.value, qt) if with_energy else None

    def plain(w):
        if is_latent(w):
            return latent(w)
        if not sequential:
            return whole(w)
        if w.ndim > len(layout):
            qt, energy = jax.lax.map(whole, w)
            return qt, jax.tree.map(jnp.sum, energy)
        # Columns do not know of each other: walk blocks of them.
        n = _column_blocks(w)
        width = w.shape[1] // n

        def block(i):
            return whole(jax.lax.dynamic_slice_in_dim(w, i * width, width, axis=1))

        qt, energy = jax.lax.map(block, jnp.arange(n))
        qt = jax.tree.map(lambda a: a.swapaxes(0, 1).reshape(a.shape[1], -1), qt)
        return qt, jax.tree.map(jnp.sum, energy)

    def one(w):
        if not _is_explicit(w):
            return plain(w)
        sharding = jax.typeof(_array(w)).sharding
        out = shardings_of(_shapes(fmt, layout, w), sharding)
        energy = (NamedSharding(sharding.mesh, PartitionSpec()),) * 2 if with_energy else None
        return _auto(plain, w, sharding.mesh, (out, energy))

    if shardings is None:
        return jax.jit(one)
    leaves, tree = shardings
    return jax.jit(one, out_shardings=(jax.tree.unflatten(tree, leaves), None))


def _is_explicit(x: Any) -> bool:
    """Whether an array lies on a mesh whose axes are part of its type."""
    return jax.sharding.AxisType.Explicit in jax.typeof(_array(x)).sharding.mesh.axis_types


def _array(leaf: Any) -> Any:
    return leaf.value if is_latent(leaf) else leaf


def _auto(fn: Any, x: Any, mesh: Any, out: Any) -> Any:
    """Runs `fn(x)` with the partitioner in charge; `out` are the shardings of the results.

    Sharding in types has no rule for splitting an axis into groups and bytes.
    """
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.sharding.auto_axes(fn, out_sharding=out)(x)


def _out_shardings(leaf: Any, fmt: Format, layout: Layout) -> Any:
    sharding = getattr(_array(leaf), "sharding", None)
    if not isinstance(sharding, NamedSharding) or sharding.is_fully_replicated:
        return None
    leaves, tree = jax.tree.flatten(shardings_of(_shapes(fmt, layout, leaf), sharding))
    return tuple(leaves), tree


def _is_sequential(leaf: Any, fmt: Format, layout: Layout) -> bool:
    """Whether to quantize a large leaf piece by piece: by its stacked axis, or by its columns."""
    if leaf.size < _SEQUENTIAL_SIZE or is_latent(leaf):
        return False
    sharding = jax.typeof(leaf).sharding if _is_abstract(leaf) else getattr(leaf, "sharding", None)
    spec = tuple(sharding.spec) if isinstance(sharding, NamedSharding) else ()
    if leaf.ndim > len(layout):
        return not any(spec[:1])
    separable = fmt.group_columns == 1 and not isinstance(fmt.scale, Format)
    separable = separable and not isinstance(fmt.offset, Format)
    return separable and layout.letters == "kn" and not any(spec) and _column_blocks(leaf) > 1


def _column_blocks(leaf: Any) -> int:
    """Returns into how many blocks to cut the columns of a large [K, N] leaf."""
    K, N = leaf.shape
    wanted = max(1, min(N, K * N // _SEQUENTIAL_SIZE * 8))
    return next((n for n in range(wanted, min(N, 4 * wanted) + 1) if N % n == 0), 1)


def _shapes(fmt: Format, layout: Layout, leaf: Any) -> QTensor:
    def shape(a):
        dtype = jax.dtypes.canonicalize_dtype(a.dtype)  # numpy's float64 is float32 to JAX
        return jax.ShapeDtypeStruct(a.shape, dtype)

    return jax.eval_shape(_quantizer(fmt, layout, None, False), jax.tree.map(shape, leaf))[0]


def _planned(leaf: jax.ShapeDtypeStruct, fmt: Format, layout: Layout) -> QTensor:
    """Returns the ShapeDtypeStructs of a quantized leaf, sharded if the leaf is."""
    qt = _shapes(fmt, layout, leaf)
    leaf = _array(leaf)
    if not isinstance(leaf.sharding, NamedSharding):
        return qt
    return jax.tree.map(
        lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s),
        qt,
        shardings_of(qt, leaf.sharding),
    )


@jax.jit
def _zero_if_finite(w):
    # 0 * x is NaN for NaN and Inf; a max would drop NaN on some backends.
    return jnp.sum(w.astype(jnp.float32) * 0.0)


def _is_trained(plan: list[Assignment]) -> bool:
    """Whether every weight brings steps of its own, so that no recipe is needed to find them."""
    given = [a.leaf for a in plan if a.format is not None]
    return all(is_latent(leaf) and leaf.scale is not None for leaf in given)


def check_finite(plan: list[Assignment]) -> None:
    """Refuses NaN and Inf weights, before anything is computed or freed.

    Under `jit` those that are closed over are values too.
    """
    with jax.ensure_compile_time_eval():
        _check_finite(plan)


def _check_finite(plan: list[Assignment]) -> None:
    for path, leaf, fmt, *_ in plan:
        if fmt is not None and is_latent(leaf) and not _is_abstract(leaf):
            for name in ("scale", "act_scale"):
                steps = getattr(leaf, name)
                if steps is not None and not np.isfinite(_zero_if_finite(steps)):
                    raise QuantizationError(f"{path}/{name}: a learned step is NaN or Inf.")
        leaf = _array(leaf)
        if fmt is None or _is_abstract(leaf) or np.isfinite(_zero_if_finite(leaf)):
            continue
        bad = int(jnp.sum(~jnp.isfinite(jnp.asarray(leaf).astype(jnp.float32))))
        wide = " in float32" if np.dtype(leaf.dtype).itemsize > 4 else ""
        raise QuantizationError(
            f"{path}: {bad} of its {leaf.size} weights are NaN or Inf{wide}. Repair the checkpoint,"
            " or skip this parameter."
        )


def _is_abstract(leaf: Any) -> bool:
    return isinstance(_array(leaf), Tracer | jax.ShapeDtypeStruct)


def quantize(
    params: Any,
    policy: Any,
    *,
    usage: Any = None,
    donate: bool = False,
    return_report: bool = False,
    fn: Callable | None = None,
    calibration: Iterable[Any] | None = None,
    mask: Callable[[Any], Any] | None = None,
    resume: Any = None,
    report: Callable[[str], None] | None = print,
) -> Any:
    """Quantizes a tree of parameters by policy: rounded to nearest, or with calibration data.

    Without data it is pure: works under `jit`, `vmap` and `eval_shape` (which plans a tree without
    its memory), on stacked kernels, and on sharded arrays, whose sharding codes and scales inherit.

    Args:
      params: tree of arrays; ShapeDtypeStructs are planned instead of computed.
      policy: a Policy, a Format, the name of a preset ("w4a16") or the path of a TOML file.
      usage: what `qjax.usage(fn)(params, ...)` returned: how fn contracts each leaf. Without it
        the last axis is N, the one before K, and earlier ones are stacked, unless a rule says
        otherwise.
      donate: free each float leaf as soon as its quantized one exists. Peak memory is then the
        float tree plus one leaf. An array that also stays in the tree as it is stays alive.
      return_report: also return a `Summary` with the SQNR of every leaf.
      fn: with `calibration`, the function of `(params, *batch)` whose outputs are to be kept.
      calibration: batches for fn. Every weight of a product then gets its codes by the policy's
        `Recipe`: without one, by GPTQ and coordinate descent on inputs that the quantized model
        before it makes. Every fifth batch is held out to choose the damping and to judge the
        result. What is only looked up is rounded to nearest.
      mask: with `calibration`, function of a batch that says which tokens count, [B, T].
      resume: with `calibration`, a directory for finished weights: the same call, interrupted and
        made again, goes on from there and gives the same result bit for bit. Yours to delete.
      report: with `calibration`, called with a line for each step; None: silent.

    Returns:
      The same tree with a QTensor in place of each leaf that a rule gave a format; with
      `return_report`, a pair of that and the `Summary`; with `calibration`, a pair of that and a
      `Report`.

    Raises:
      QuantizationError: naming the parameter path, for rules that match nothing, NaN or Inf
        weights, scales that their type cannot hold, group sizes that do not divide, integer leaves,
        and layouts that do not fit. Under `jit` values are not known: there a NaN or Inf weight
        makes the scale of its group NaN.
    """
    policy = Policy.of(policy)
    if calibration is not None:
        if fn is None or donate or return_report:
            raise ValueError(
                "`calibration` needs `fn`, the function that the data is for; it does not go with"
                " `donate` or `return_report`."
            )
        return _quantize_with_data(
            params, policy, usage, fn, list(calibration), mask, resume, report
        )
    plan = assign(params, policy, usage)
    _check_any(plan, policy)
    # Of shapes only a plan is made.
    if not all(isinstance(_array(a.leaf), jax.ShapeDtypeStruct) for a in plan):
        _check_data_free(plan)
        if policy.recipe is not None and policy.recipe.needs_data and not _is_trained(plan):
            raise QuantizationError(
                f"policy {policy.name!r} needs calibration data: pass `fn` and `calibration`."
            )
    check_finite(plan)
    rounding = policy.recipe.rounding if policy.recipe else "nearest"
    tree = jax.tree.structure(params, is_leaf=_is_weight)
    # One array under several paths (tied weights) is freed after its last use, if it is not kept.
    last_use = {id(a.leaf): i for i, a in enumerate(plan)}
    kept = {id(a.leaf) for a in plan if a.format is None}
    out, rows = [], []
    for i, (path, leaf, fmt, layout, note) in enumerate(plan):
        if fmt is None or layout is None:
            leaf = _array(leaf)  # a Latent whose rule leaves it in float is its array
            out.append(leaf)
            rows.append(row_of(path, leaf, None, note))
            continue
        if isinstance(_array(leaf), jax.ShapeDtypeStruct):
            qt, energy = _planned(leaf, fmt, layout), None
        else:
            shardings = _out_shardings(leaf, fmt, layout)
            sequential = _is_sequential(leaf, fmt, layout)
            run = _quantizer(fmt, layout, shardings, return_report, sequential, rounding)
            qt, energy = run(leaf)
        is_made = not any(map(_is_abstract, jax.tree.leaves(qt)))
        if is_made:
            check_range(path, _array(leaf), qt)
        done = last_use[id(leaf)] == i and id(leaf) not in kept
        if donate and done and isinstance(leaf, jax.Array) and is_made:
            jax.block_until_ready(qt)
            leaf.delete()
        out.append(qt)
        rows.append(row_of(path, qt, energy, note))
    qparams = jax.tree.unflatten(tree, out)
    if not return_report:
        return qparams
    return qparams, Summary(tuple(rows))


def _quantize_with_data(
    params: Any,
    policy: Policy,
    usage: Any,
    fn: Callable,
    batches: list[Any],
    mask: Any,
    resume: Any,
    report: Any,
) -> Any:
    from qjax.ptq import pipeline
    from qjax.transform.usage import usage as usage_of

    if not batches:
        raise QuantizationError("`calibration` has no batches; pass at least one.")
    if usage is None:
        first = batches[0] if isinstance(batches[0], tuple) else (batches[0],)
        usage = usage_of(fn)(params, *first)
    plan = assign(params, policy, usage)
    _check_any(plan, policy)
    if any(_is_abstract(a.leaf) for a in plan):
        raise NotImplementedError(
            "quantizing with data computes, weight after weight: call it outside of `jit`, with"
            " arrays and not with shapes."
        )
    check_finite(plan)
    weights, out = [], {}
    for path, leaf, fmt, layout, _ in plan:
        if fmt is None or layout is None:
            continue
        if usage[path].is_multiplied:
            weights.append(pipeline.Weight(path, leaf, fmt, layout))
        else:  # only looked up: no product whose error could be measured
            out[path] = _quantizer(fmt, layout, None, False)(leaf)[0]
            check_range(path, leaf, out[path])
    made, params, what = pipeline.run(
        fn, params, weights, batches, policy.recipe or Recipe(), usage,
        mask=mask, resume=resume, report=report,
    )  # fmt: skip
    out |= made
    what = dataclasses.replace(what, in_float={a.path: a.note for a in plan if a.note})
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: out.get(path_str(path), leaf), params, is_leaf=is_qtensor
    ), what


def dequantize(qparams: Any) -> Any:
    """Returns the tree with every QTensor replaced by the float array it stands for."""

    def one(leaf):
        if not is_qtensor(leaf):
            return leaf
        if any(_is_explicit(a) for a in jax.tree.leaves(leaf)):
            out = float_sharding(leaf)
            return _auto(qtensor.dequantize_array, leaf, out.mesh, out)
        return qtensor.dequantize_array(leaf)

    return jax.tree.map(one, qparams, is_leaf=is_qtensor)
