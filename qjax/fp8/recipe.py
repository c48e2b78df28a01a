"""Fp8Recipe: which products run in FP8, and where the scales of their operands come from."""

from __future__ import annotations

import dataclasses
from typing import Any

from qjax.format import Format
from qjax.policy import Policy, Rule

# What a policy gives a weight says how all three operands of its products are scaled.
TENSOR = Format("e4m3", group_columns=None)
BLOCK = Format("e4m3", group_size=128, group_columns=128, remainder="ragged")

# Every product with a weight.
EVERYWHERE = Policy((Rule("*", TENSOR),), name="fp8")

SCALINGS = ("current", "delayed")
GRADIENTS = ("e5m2", "e4m3")


@dataclasses.dataclass(frozen=True)
class Fp8Recipe:
    """How a function trains in FP8. Hashable, static under `jit`.

    Attributes:
      policy: which parameters take part; a rule without a format leaves what it matches in float,
        and so does being matched by none. The format also says how an operand is scaled:
        `fp8.TENSOR`, one scale for each of input, weight and gradient (of each layer, where layers
        are stacked); `fp8.BLOCK`, one for every 128 x 128 block of the weight and every 1 x 128
        entries of inputs and gradients along the contraction (DeepSeek-AI, 2024, DeepSeek-V3,
        section 3.3.2). A Format or patterns' Policy; see `qjax.Policy.of`.
      scaling: of TENSOR: "current", by the largest magnitude of this tensor in this step;
        "delayed", by the largest of the last `history` steps (Micikevicius et al., 2022, section
        3; as in NVIDIA's Transformer Engine). BLOCK is always current.
      history: steps that delayed scaling looks back.
      margin: powers of two by which scales leave room above the largest magnitude.
      gradient: the type of gradients of outputs: "e5m2", or "e4m3" as DeepSeek-V3 has it.
      power_of_two: whether scales are rounded up to powers of two. They then lose no bit wherever
        they are multiplied, so results come out of the matmul in bfloat16, scaled.

    Raises:
      ValueError: for a field out of range, or a format that is neither e4m3 per tensor nor e4m3 in
        square blocks.
    """

    policy: Policy = EVERYWHERE
    scaling: str = "current"
    history: int = 16
    margin: int = 0
    gradient: str = "e5m2"
    power_of_two: bool = True

    def __post_init__(self):
        object.__setattr__(self, "policy", Policy.of(self.policy))
        for name, known in (("scaling", SCALINGS), ("gradient", GRADIENTS)):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"`{name}` must be one of {', '.join(known)}, got {getattr(self, name)!r}."
                )
        if type(self.history) is not int or self.history < 1:
            raise ValueError(f"`history` must be a positive integer, got {self.history!r}.")
        if type(self.margin) is not int or not 0 <= self.margin <= 8:
            raise ValueError(f"`margin` must be an integer from 0 to 8, got {self.margin!r}.")
        if type(self.power_of_two) is not bool:
            raise ValueError(f"`power_of_two` must be true or false, got {self.power_of_two!r}.")
        formats = [rule.format for rule in self.policy.rules if rule.format is not None]
        for fmt in formats:
            check_format(fmt)
        if self.scaling == "delayed" and all(is_block(fmt) for fmt in formats):
            raise ValueError(
                "`scaling='delayed'` is for one scale a tensor, and the policy has none: blocks are"
                " scaled by what is in them. Use scaling='current', or fp8.TENSOR formats."
            )

    @classmethod
    def of(cls, recipe: Any) -> Fp8Recipe:
        """Returns the recipe that `recipe` means.

        Args:
          recipe: an Fp8Recipe; "current", "delayed" or "block", for all weights of products; or
            what `qjax.Policy.of` takes, with current scaling. "block" has e4m3 gradients, as its
            paper does: with a scale for every 128 entries they lack digits, not range.
        """
        if isinstance(recipe, Fp8Recipe):
            return recipe
        if recipe in ("current", "delayed"):
            return cls(scaling=recipe)
        if recipe == "block":
            return cls(Policy.of(BLOCK), gradient="e4m3")
        return cls(Policy.of(recipe))


def is_block(fmt: Format) -> bool:
    return fmt.granularity == "block"


def check_format(fmt: Format) -> None:
    """Refuses formats in which no product can be trained."""
    square = fmt.group_size is not None and fmt.group_size == fmt.group_columns
    whole = fmt.group_size is None and fmt.group_columns is None
    plain = fmt.element == "e4m3" and fmt.activation is None and isinstance(fmt.scale, str)
    if not plain or not (square or whole):
        raise ValueError(
            f"FP8 training multiplies e4m3 weights scaled per tensor or in square blocks, got"
            f" {fmt!r}. Use fp8.TENSOR or fp8.BLOCK."
        )
