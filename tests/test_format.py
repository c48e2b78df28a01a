"""Tests of qjax/format.py: what a Format allows, costs and is called."""

import dataclasses

import pytest

from qjax.format import Format

NVFP4 = Format("e2m1", 16, scale=Format("e4m3", group_columns=None))
DOUBLE = Format("nf4", 64, scale=Format("uint8", 1, 256))
Q4_K = Format("uint4", 32, scale=Format("uint6", 8, scale="float16"),
              offset=Format("uint6", 8, scale="float16", rule="absmax"))  # fmt: skip
FORMATS = [
    Format("int4"),
    Format("int4", 128, scale="bfloat16", rule="mse", remainder="ragged"),
    Format("int8", group_columns=None, activation="int8"),
    Format("int8", activation="int8", activation_scale="static"),
    Format("int4", activation="uint4", activation_scale="static"),
    Format("e4m3", 128, 128, activation="e4m3", activation_scale="group"),
    Format("int8", activation="int8", outliers=6.0, outlier_capacity=8),
    Format("e4m3", 128, 128, remainder="shrink"),
    Format("int3", 32, zero_point=True),
    NVFP4,
    DOUBLE,
    Q4_K,
]


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_a_dict_holds_everything(fmt):
    assert Format.from_dict(fmt.to_dict()) == fmt
    assert hash(Format.from_dict(fmt.to_dict())) == hash(fmt)


def test_a_dict_leaves_defaults_out():
    assert Format("int4").to_dict() == {"element": "int4"}
    assert Format("int8", group_columns=None).to_dict() == {
        "element": "int8",
        "group_columns": "all",
    }


@pytest.mark.parametrize(
    ("fmt", "text"),
    [
        (Format("int8"), "int8 ch f32"),
        (Format("int8", group_columns=None), "int8 tensor f32"),
        (Format("int4", 128, scale="bfloat16", zero_point=True), "int4 g128 zp bf16"),
        (Format("e4m3", 128, 128), "e4m3 b128x128 f32"),
        (Format("uint4", 32, offset="float16"), "uint4 g32 f32 +f16"),
        (DOUBLE, "nf4 g64 (uint8 b1x256 f32)"),
        (Format("int8", activation="int8"), "int8 ch f32 a:int8"),
        (Format("e4m3", activation="e4m3", activation_scale="static"), "e4m3 ch f32 a:e4m3/static"),
        (Format("int8", activation="int8", outliers=6), "int8 ch f32 a:int8 o>=6"),
    ],
)
def test_short_names(fmt, text):
    assert str(fmt) == text


@pytest.mark.parametrize(
    ("fmt", "bits"),
    [
        (Format("int4", 128, scale="bfloat16"), 4.125),
        (Format("int3", 128, scale="bfloat16"), 3.125),
        (Format("int2", 32, scale="float16"), 2.5),
        (Format("int4", 32, scale="float16"), 4.5),  # Q4_0
        (Format("int4", 128, scale="bfloat16", zero_point=True), 4 + (16 + 4) / 128),
        (Format("e2m1", 32, scale="e8m0"), 4.25),  # MXFP4
        (NVFP4, 4.5 + 32 / 1024**2),
        (DOUBLE, 4 + (8 + 32 / 256) / 64),  # 4.127, Dettmers et al., 2023
        (Q4_K, 4.5),
        (Format("e4m3", 128, 128), 8 + 32 / 128**2),
        (Format("int4", 1000, remainder="ragged"), 4 + 2 * 32 / 1024),
        (Format("int4", 1000, remainder="shrink"), 4 + 2 * 32 / 1024),  # 512
    ],
    ids=str,
)
def test_bits_per_weight(fmt, bits):
    assert fmt.bits_per_weight(1024, 1024) == pytest.approx(bits, rel=1e-12)


def test_bits_per_weight_counts_padding():
    # 9 codes of 3 bits take two units of 3 bytes.
    assert Format("int3").bits_per_weight(9, 2) == (48 + 32) / 9


def test_remainder_policies():
    fmt = Format("int4", 128)
    with pytest.raises(ValueError, match=r"group_size=128 does not divide .* 576.* is 96\)"):
        fmt.fit(576)
    assert dataclasses.replace(fmt, remainder="ragged").fit(576).groups(576, 3) == (5, 3)
    assert dataclasses.replace(fmt, remainder="shrink").fit(576).group_size == 96
    # A group longer than K is one group: per channel, or K itself.
    assert dataclasses.replace(fmt, remainder="ragged").fit(100).group_size is None
    assert dataclasses.replace(fmt, remainder="shrink").fit(100).group_size == 100
    assert fmt.fit(256) is fmt


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"element": "int9"}, "unknown element type 'int9'"),
        ({"element": "int4", "group_size": 0}, "`group_size` must be a positive integer"),
        ({"element": "int4", "group_size": True}, "`group_size` must be a positive integer"),
        ({"element": "int4", "group_columns": 1.5}, "`group_columns` must be a positive integer"),
        ({"element": "int4", "scale": "f32"}, "`scale` must be a Format or one of float32"),
        ({"element": "int4", "scale": 3}, "`scale` must be a Format or one of float32"),
        ({"element": "uint4", "offset": 3}, "`offset` must be a Format or one of float32"),
        ({"element": "int4", "zero_point": "false"}, "`zero_point` must be true or false"),
        ({"element": "int4", "flatten": "no"}, "`flatten` must be true or false"),
        ({"element": "int4", "rule": "max"}, "`rule` must be one of absmax"),
        ({"element": "int4", "remainder": "pad"}, "`remainder` must be one of error"),
        ({"element": "int4", "activation": "int2"}, "`activation` must be None or one of int8"),
        ({"element": "nf4", "zero_point": True}, "need an integer element, got 'nf4'"),
        ({"element": "ternary", "zero_point": True}, "ternary has no zero point"),
        ({"element": "int4", "offset": "float16"}, "needs an unsigned element.*'uint4'"),
        ({"element": "uint4", "offset": "e8m0"}, "`offset` has a sign"),
        ({"element": "uint4", "offset": "float16", "zero_point": True}, "exclude each other"),
        ({"element": "int4", "zero_point": True, "rule": "absmax"}, "needs `rule='minmax'`"),
        ({"element": "int4", "rule": "minmax"}, "set `zero_point=True`"),
        ({"element": "nf4", "rule": "signed_absmax"}, "'nf4' has none"),
        ({"element": "ternary", "rule": "absmax_full"}, "'ternary' has none"),
        ({"element": "int4", "rule": "signed_absmax", "scale": "e8m0"}, r"\(e8m0\) has no sign"),
        (
            {"element": "int4", "rule": "signed_absmax", "scale": Format("uint8")},
            r"\(uint8 ch f32\) has no sign",
        ),
        ({"element": "nf4", "activation": "int8"}, "needs a signed integer element"),
        ({"element": "int8", "activation": "int8", "zero_point": True}, "without zero point"),
        ({"element": "int8", "activation": "e4m3", "zero_point": True}, "without zero point"),
        (
            {"element": "int8", "activation": "int8", "activation_scale": "row"},
            "`activation_scale` must be one of token, group, tensor, static",
        ),
        ({"element": "int8", "activation_scale": "static"}, "set `activation` too"),
        (
            {"element": "int8", "activation": "int8", "activation_scale": "group"},
            "set `group_size` too",
        ),
        ({"element": "int8", "activation": "int8", "outliers": -1.0}, "a positive magnitude"),
        ({"element": "int8", "activation": "int8", "outliers": True}, "a positive magnitude"),
        ({"element": "int8", "activation": "int8", "outlier_capacity": 8}, "set their threshold"),
        (
            {"element": "int8", "activation": "int8", "outliers": 6.0, "outlier_capacity": 0},
            "`outlier_capacity` must be a positive integer",
        ),
        ({"element": "int8", "outliers": 6.0}, "needs `activation='int8'`"),
        ({"element": "e4m3", "activation": "e4m3", "outliers": 6.0}, "needs `activation='int8'`"),
        (
            {
                "element": "int8",
                "activation": "int8",
                "activation_scale": "tensor",
                "outliers": 6.0,
            },
            "with 'tensor'",
        ),
    ],
)
def test_contradictions_are_refused(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Format(**kwargs)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"element": "int4", "group": 32}, r"here: unknown key 'group'. Known: .*group_size"),
        ({"group_size": 32}, "here: `element` is missing"),
        ("int4", "here: expected a table of Format fields, got 'int4'"),
        ({"element": "int4", "rule": "best"}, "here: `rule` must be one of"),
        ({"element": "int4", "scale": {"element": "int8", "x": 1}}, "here.scale: unknown key 'x'"),
    ],
)
def test_bad_dicts_say_where(spec, message):
    with pytest.raises(ValueError, match=message):
        Format.from_dict(spec, where="here")


def test_a_format_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Format("int4").element = "int8"  # pyright: ignore[reportAttributeAccessIssue]


def test_weight_only_drops_what_activations_need():
    fmt = Format("int4", 32)
    assert fmt.weight_only is fmt
    fmt = Format("int8", 32, activation="int8", outliers=6.0, outlier_capacity=4)
    assert fmt.weight_only == Format("int8", 32)
    assert Format("e4m3", activation="e4m3", activation_scale="static").weight_only == Format(
        "e4m3"
    )
