"""Tests of qjax/policy.py: which rule decides, and what is said about a bad policy."""

import pathlib

import jax
import jax.numpy as jnp
import pytest

import qjax
from qjax.format import Format
from qjax.policy import Policy, Rule, presets

INT4, INT8 = Format("int4"), Format("int8")


def format_of(policy, path, ndim=2):
    rule = policy.rule_for(path, ndim)
    return rule and rule.format


def test_the_first_rule_that_matches_decides():
    policy = Policy([Rule("*/head", INT8), Rule("*embed*"), Rule("*", INT4)])
    assert format_of(policy, "model/head") == INT8
    assert format_of(policy, "model/embed/table") is None
    assert format_of(policy, "layers/0/up") == INT4
    assert format_of(Policy([Rule("*", INT4), Rule("*/head", INT8)]), "model/head") == INT4


@pytest.mark.parametrize(
    ("pattern", "path", "matches"),
    [
        ("*", "a/b/c", True),
        ("*/kernel", "layers/0/attn/kernel", True),
        ("*/kernel", "kernel", False),
        ("layers/[0-3]/*", "layers/2/up", True),
        ("layers/[0-3]/*", "layers/4/up", False),
        ("layers/?/up", "layers/12/up", False),
        ("kernel", "Kernel", False),
        ("re:layers/1[0-9]/.*", "layers/12/up", True),
        ("re:layers/1", "layers/12/up", False),  # a regular expression matches the whole path
        ("re:.*(up|down)", "layers/12/down", True),
        (("a/*", "b/*"), "b/c", True),
        (("a/*", "b/*"), "c/b/c", False),
    ],
)
def test_patterns(pattern, path, matches):
    assert Rule(pattern, INT4).matches(path, 2) == matches


def test_min_ndim_leaves_vectors_alone():
    assert not Rule("*", INT4).matches("bias", 1)
    assert Rule("*", INT4, min_ndim=1).matches("bias", 1)


@pytest.mark.parametrize("match", ["", (), ("a", ""), ("a", 1), "re:("])
def test_a_rule_has_patterns_that_are_patterns(match):
    with pytest.raises(ValueError, match="match"):
        Rule(match, INT4)


def test_a_rule_is_hashable_however_it_was_written():
    assert hash(Rule(["a", "b"])) == hash(Rule(("a", "b")))


def test_a_policy_has_rules():
    with pytest.raises(ValueError, match="'empty' has no rules; it would quantize nothing"):
        Policy([], name="empty")
    with pytest.raises(TypeError, match="expected a Rule, got"):
        Policy([("*", INT4)])  # pyright: ignore[reportArgumentType]


def test_of_takes_every_spelling(tmp_path):
    policy = Policy([Rule("*", INT4)])
    assert Policy.of(policy) is policy
    assert Policy.of(INT4).rules == (Rule("*", INT4),)
    assert Policy.of("int8").name == "int8"
    file = tmp_path / "mine.toml"
    file.write_text('[[rules]]\nmatch = "*"\nformat = { element = "int4" }\n')
    for path in (file, str(file)):
        assert Policy.of(path) == Policy(policy.rules, name="mine")
    with pytest.raises(TypeError, match="expected a Policy, a Format, a preset name"):
        Policy.of(4)


def test_a_dict_holds_everything():
    policy = Policy(
        [
            Rule(("*embed*", "re:.*norm"), optional=True, min_ndim=0),
            Rule("*/o/kernel", Format("int4", 32, scale=Format("uint8", 4)), layout="kkn"),
            Rule("*", INT8),
        ],
        name="mine",
    )
    assert Policy.from_dict(policy.to_dict(), name="mine") == policy


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a = ?\nb = 1", r"'p' is not valid TOML: .*line 1"),
        ("", "'p': `rules` is missing"),
        ("[rules]\nmatch = '*'", "'p': `rules` is missing; a policy is a list of"),
        ("rules = [1]", r"'p', rule 1: expected a table.*got 1"),
        ("rules = []\nrule = 1", "'p': unknown key 'rule'. Known: description, recipe, rules"),
        (
            "[[rules]]\nmatch='a'\nskip=true\n[[rules]]\nmatch='*'\nformt={}",
            "'p', rule 2: unknown key 'formt'. Known: format, layout, match, min_ndim, optional",
        ),
        ("[[rules]]\nskip=true", "'p', rule 1: `match` is missing"),
        ("[[rules]]\nmatch='*'", "'p', rule 1: give either a `format` or `skip = true`"),
        (
            "[[rules]]\nmatch='*'\nskip=true\nformat={element='int4'}",
            "'p', rule 1: give either a `format` or `skip = true`",
        ),
        (
            "[[rules]]\nmatch='*'\nformat={element='int4', groupsize=32}",
            "'p', rule 1, format: unknown key 'groupsize'",
        ),
        (
            "[[rules]]\nmatch='*'\nformat={element='int4', scale={element='int8', g=1}}",
            "'p', rule 1, format.scale: unknown key 'g'",
        ),
        (
            "[[rules]]\nmatch='*'\nformat={element='int5x'}",
            "'p', rule 1, format: unknown element type 'int5x'",
        ),
        ("[[rules]]\nmatch='re:['\nskip=true", "'p', rule 1: `match`.*no regular expression"),
        ("[[rules]]\nmatch='*'\nskip=true\nmin_ndim='2'", "'p', rule 1: `min_ndim` must be"),
        ("[[rules]]\nmatch='*'\nskip=true\noptional=1", "'p', rule 1: `optional` must be"),
        ("[[rules]]\nmatch='*'\nskip='false'", "'p', rule 1: `skip` must be true or false, got 'f"),
        ("[[rules]]\nmatch=3\nskip=true", "'p', rule 1: `match` must be one or more patterns"),
        ("[[rules]]\nmatch='*'\nskip=true\nlayout='xy'", "'p', rule 1: .*layout"),
    ],
)
def test_bad_toml_says_what_and_where(text, message):
    with pytest.raises(ValueError, match=message):
        Policy.from_toml(text, name="p")


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match=r"no preset is called 'int5'. Presets: .*int4-g128.*nf4"):
        Policy.load("int5")
    with pytest.raises(ValueError, match=r"no policy file at 'nowhere/x\.toml'"):
        Policy.load(pathlib.Path("nowhere/x.toml"))


def test_presets_are_the_promised_ones():
    promised = {"int8", "int4-g128", "w4a16", "nf4", "nf4-dq", "fp8", "w8a8", "mxfp4", "nvfp4"}
    promised |= {"w8a8-tensor", "llm-int8", "fp8-dynamic"}
    assert promised <= set(presets())


SMOL = {  # shapes of SmolLM2-135M, two layers stacked
    "embed": {"embedding": (49152, 576)},
    "layers": {
        "attn": {"q": {"kernel": (2, 576, 576)}, "k": {"kernel": (2, 576, 192)}},
        "mlp": {"up": {"kernel": (2, 576, 1536)}, "down": {"kernel": (2, 1536, 576)}},
        "norm": {"scale": (2, 576)},
    },
    "lm_head": {"kernel": (576, 49152)},
}
BITS = {"int8": 8, "int4-g128": 4, "nf4": 4, "w3a16": 3, "w2a16": 2, "ternary": 2, "fp8": 8}


@pytest.mark.parametrize("name", presets())
def test_every_preset_plans_a_real_model(name):
    shapes = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct(s, jnp.bfloat16), SMOL, is_leaf=lambda s: type(s) is tuple
    )
    rows = {r.path: r for r in qjax.summary(qjax.quantize(shapes, name)).rows}
    quantized = {p for p, r in rows.items() if r.quantized}
    assert quantized == {p for p in rows if p.startswith("layers/") and p.endswith("/kernel")}
    bits = BITS.get(name, 0)
    for path in quantized:
        if bits:
            assert bits < rows[path].bits_per_weight < bits + 1.1
    policy = Policy.load(name)
    assert Policy.from_dict(policy.to_dict(), name=name) == policy


@pytest.mark.parametrize("name", [p for p in presets() if not Policy.load(p).needs_data])
def test_every_preset_without_data_quantizes(name):
    w = jax.random.normal(jax.random.key(0), (192, 48))
    deq = qjax.dequantize(qjax.quantize({"kernel": w}, name))["kernel"]
    relative = jnp.linalg.norm(deq - w) / jnp.linalg.norm(w)
    bounds = {"ternary": 0.55, "bitnet": 0.55, "w2a16": 0.45, "w2a8": 0.45, "w3a16": 0.25}
    assert relative < bounds.get(name, 0.16)
