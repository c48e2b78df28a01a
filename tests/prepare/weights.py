"""Weights of every form that kernels take, and how tests of prepared ones run them."""

from __future__ import annotations

import dataclasses
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

import qjax
from pallas_kernels import interpreter
from qjax.ops.dispatch import compute
from qjax.ops.packed_dot import packed_dot, packed_dot_p
from qjax.qtensor import quantize_array

FORMATS = {
    "int4": qjax.Format("int4", group_size=128, scale="bfloat16"),
    "zero point": qjax.Format("uint4", group_size=64, zero_point=True, scale="bfloat16"),
    "zero point, last group shorter": qjax.Format(
        "int4",
        group_size=32,
        zero_point=True,
        scale=qjax.Format("e4m3", group_columns=None),
        remainder="ragged",
    ),
    "zero point, one": qjax.Format("uint4", group_columns=None, zero_point=True),
    "unsigned": qjax.Format("uint4", group_size=64, scale="bfloat16"),
    "offset": qjax.Format("uint4", group_size=32, offset="float32"),
    "channels": qjax.Format("int8"),
    "uint8": qjax.Format("uint8", group_size=128, zero_point=True),
    "int8, zero point": qjax.Format("int8", zero_point=True, scale="bfloat16"),
    "one scale": qjax.Format("int4", group_columns=None),
    "int3": qjax.Format("int3", group_size=64, scale="bfloat16"),
    "uint3": qjax.Format("uint3", group_size=32, zero_point=True, scale="bfloat16"),
    "int2": qjax.Format("int2", group_size=128),
    "uint2": qjax.Format("uint2", group_size=64, offset="float16"),
    "ternary": qjax.Format("ternary", group_columns=None),
    "last group shorter": qjax.Format("int4", group_size=128, remainder="ragged"),
    "fp8": qjax.Format("e4m3"),
    "fp8 blocks": qjax.Format("e4m3", group_size=128, group_columns=128),
    "nf4": qjax.Format("nf4", group_size=64),
    "nf4-dq": qjax.Format(
        "nf4", group_size=64, scale=qjax.Format("uint8", group_size=1, group_columns=128)
    ),
    "int4, nested with offsets": qjax.Format(
        "int4",
        group_size=64,
        scale=qjax.Format("uint8", group_size=1, group_columns=256, offset="float32"),
    ),
    "fp4": qjax.Format("fp4", group_size=128, scale="bfloat16"),
    "mxfp4": qjax.Format("e2m1", group_size=32, scale="e8m0"),
    "nvfp4": qjax.Format("e2m1", group_size=16, scale=qjax.Format("e4m3", group_columns=None)),
    "nvfp4, one scale": qjax.Format("e2m1", group_columns=None, scale="e4m3"),
}


QUANTIZED = {
    "w8a8": qjax.Format("int8", activation="int8"),
    "w8a8 tensor": qjax.Format("int8", activation="int8", activation_scale="tensor"),
    "w4a8": qjax.Format("int4", group_size=128, scale="bfloat16", activation="int8"),
    "w4a8 channels": qjax.Format("int4", activation="int8"),
    "w4a8 multiples": qjax.Format(
        "int4", group_size=128, scale=qjax.Format("int8_max15"), activation="int8"
    ),
    "w4a8 multiples of 32": qjax.Format(
        "int4",
        group_size=32,
        scale=qjax.Format("int8_max15", scale="bfloat16"),
        remainder="ragged",
        activation="int8",
        activation_scale="tensor",
    ),
    "w4a8 fp8": qjax.Format("int4", group_size=128, scale="bfloat16", activation="e4m3"),
    "fp4 x fp8": qjax.Format(
        "e2m1", group_size=128, scale=qjax.Format("e4m3_for_e2m1"), activation="e4m3"
    ),
    "fp4 x fp8, groups of 32": qjax.Format(
        "e2m1",
        group_size=32,
        scale=qjax.Format("e4m3_for_e2m1", scale="bfloat16"),
        remainder="ragged",
        activation="e4m3",
        activation_scale="tensor",
    ),
    "w4a8 fp8 channels": qjax.Format("int4", activation="e4m3"),
    "w8a8 groups": qjax.Format("int8", group_size=128, activation="int8"),
    "fp8": qjax.Format("e4m3", activation="e4m3"),
    "fp8 static": qjax.Format("e4m3", activation="e4m3", activation_scale="static"),
    "fp8 blocks": qjax.Format("e4m3", group_size=128, group_columns=128, activation="e4m3"),
    "fp8 1x128": qjax.Format("e4m3", 128, 128, activation="e4m3", activation_scale="group"),
    "w4a8 1x128": qjax.Format("int4", 128, activation="int8", activation_scale="group"),
    "fp8 shorter": qjax.Format("e4m3", group_size=128, remainder="ragged", activation="e4m3"),
    "llm-int8": qjax.Format(
        "int8", activation="int8", outliers=2.5, outlier_capacity=16, rule="absmax"
    ),
}


# Those whose codes are multiplied in 16 bits.
IN_SIXTEEN_BITS = {
    "w3a8": qjax.Format("int3", group_size=64, scale="bfloat16", activation="int8"),
    "ternary": qjax.Format("ternary", group_columns=None, activation="int8"),
    "w4a4": qjax.Format("int4", group_size=128, scale="bfloat16", activation="int4"),
    "w4a8, groups of 64": qjax.Format("int4", 64, activation="int8", activation_scale="tensor"),
    "w4a8, multiples of 16": qjax.Format(
        "int4", group_size=16, scale=qjax.Format("int8_max15"), activation="int8"
    ),
    "unsigned activations": qjax.Format("int8", activation="uint8"),
    "w8a8, shorter": qjax.Format("int8", 256, remainder="ragged", activation="int8"),
    "w8a8, groups of 64": qjax.Format("int8", 64, activation="int8", activation_scale="group"),
    "nf4 x fp8": qjax.Format("nf4", group_size=64, activation="e4m3"),
    "nf4-dq x fp8": dataclasses.replace(FORMATS["nf4-dq"], activation="e4m3"),
    "mxfp4 x fp8": dataclasses.replace(FORMATS["mxfp4"], activation="e4m3"),
    "nvfp4 x fp8": dataclasses.replace(
        FORMATS["nvfp4"], activation="e4m3", activation_scale="group"
    ),
    "w8a8, fp8 activations": qjax.Format("int8", activation="e4m3"),
}


QUANTIZED |= IN_SIXTEEN_BITS


def weight(name, shape=(256, 128)):
    if name.endswith("last group shorter"):
        shape = (*shape[:-2], 200, 100)
    w = jax.random.normal(jax.random.key(0), shape)
    return quantize_array(w, FORMATS[name])


def assert_same(a, b):
    assert type(a) is type(b)
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)


def quantized_weight(name):
    shape = (200, 100) if name == "fp8 shorter" else (256, 128)
    step = jnp.float32(0.02) if "static" in name else None
    w = jax.random.normal(jax.random.key(0), shape)
    return quantize_array(w, QUANTIZED[name], act_scale=step)


def by_the_kernel(x, prepared, **options):
    """The product as a GPU computes it, interpreted."""

    # Not a lowered program: the interpreter calls back into Python, which that cannot.
    def bind(*args, spec):
        return compute(*args, spec=spec, platform="cuda")

    with (
        mock.patch.object(packed_dot_p, "bind", bind),
        interpreter.interpreting(),
        interpreter.everywhere(),
    ):
        return np.asarray(
            packed_dot(x, prepared, out_dtype=jnp.float32, implementation="mosaic", **options)
        )


def for_gpus(f, *args):
    """The program for an NVIDIA GPU."""
    return jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def count_kernels(f, *args):
    """How many Hopper kernels it has."""
    return for_gpus(f, *args).count("@mosaic_gpu_v2")
