"""How often an optimized program of XLA executes what, loops counted."""

from __future__ import annotations

import collections
import re

COLLECTIVES = (
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "ragged-all-to-all",
    "collective-permute", "collective-broadcast",
)  # fmt: skip
_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.-]+) [^\n]*\{\n(.*?)^\}", re.M | re.S)
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?\S+ = (?:\(.*?\)|\S+) ([a-z][a-z0-9-]*)\((.*)$", re.M)
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def executed(hlo: str) -> collections.Counter[str]:
    """Returns how many times each instruction runs in one execution of the program.

    Instructions of loops count as often as the loop is known to run, those of branches once each.
    The two halves of an asynchronous operation are one. A custom call is counted by its target, a
    fusion that is a matrix product in Triton as "triton gemm".

    Raises:
      ValueError: if a loop runs an unknown number of times.

    Example:
      >>> text = '''
      ... body (p: f32[2]) -> f32[2] {
      ...   %p = f32[2] parameter(0)
      ...   ROOT %r = f32[2] all-reduce(%p), to_apply=sum
      ... }
      ... ENTRY main (x: f32[2]) -> f32[2] {
      ...   %x = f32[2] parameter(0)
      ...   ROOT %w = f32[2] while(%x), body=%body, backend_config={"known_trip_count":{"n":"80"}}
      ... }
      ... '''
      >>> executed(text)["all-reduce"]
      80
    """
    bodies: dict[str, str] = {}
    entry = None
    for found in _COMPUTATION.finditer(hlo):
        bodies[found[2]] = found[3]
        if found[1]:
            entry = found[2]
    assert entry is not None, hlo[:200]
    total: collections.Counter[str] = collections.Counter()

    def visit(name: str, times: int) -> None:
        for found in _INSTRUCTION.finditer(bodies.get(name, "")):
            op, rest = found[1], found[2]
            if op.endswith("-done"):
                continue
            kind = op.removesuffix("-start")
            total[_label(kind, rest)] += times
            if kind == "fusion":  # no steps of their own, but for kernels and collectives
                for other in _CALLED.findall(rest):
                    for inside in _INSTRUCTION.finditer(bodies.get(other, "")):
                        if inside[1] in ("custom-call", *COLLECTIVES):
                            total[_label(inside[1], inside[2])] += times
                continue
            if op not in ("while", "conditional", "call", "async-start"):
                continue  # what reduces two numbers is no program
            inner = times * _trips(rest) if op == "while" else times
            called = _CALLED.findall(rest)
            for branches in _BRANCHES.findall(rest):
                called += [b.strip().lstrip("%") for b in branches.split(",")]
            for other in called:
                visit(other, inner)

    visit(entry, 1)
    return total


def collectives(hlo: str) -> dict[str, int]:
    """Returns how many collectives of every kind one execution has, without those of none."""
    found = executed(hlo)
    return {kind: found[kind] for kind in COLLECTIVES if found[kind]}


def _label(op: str, rest: str) -> str:
    if op == "custom-call" and (target := re.search(r'custom_call_target="([^"]+)"', rest)):
        return target[1]
    if op == "fusion" and re.search(r'"kind":"__triton_[a-z_]*gemm', rest):
        return "triton gemm"
    return op


def _trips(rest: str) -> int:
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"', rest)
    if found is None:
        raise ValueError("a loop runs an unknown number of times, so that nothing can be counted.")
    return int(found[1])
