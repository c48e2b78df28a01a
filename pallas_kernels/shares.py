"""Which steps of a product each CTA computes, and how the sums of one tile are added."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array

from pallas_kernels.tuning import TILE_N, Tuning


@dataclasses.dataclass(frozen=True)
class Share:
    """The steps that a CTA computes, in order.

    K of every tile is cut into `split` pieces. With one, a CTA computes every C-th tile, so that
    neighbours read the same weights at once. With more, the pieces of all tiles are dealt out in
    order and as evenly as can be; those of one tile on one CTA are a fragment, with one sum
    (Osama et al., 2023, "Stream-K", section 4).

    Attributes:
      cta, ctas: its number, and how many there are.
      tiles: how many there are; traced for experts.
      steps: of a tile.
      split: pieces of a tile, a divisor of `steps`.
    """

    cta: Any
    ctas: int
    tiles: Any
    steps: int
    split: int

    @property
    def start(self) -> Any:
        """The first step, counted through all tiles."""
        if self.split == 1:
            return self.cta * self.steps
        return self.cta * (self.tiles * self.split) // self.ctas * (self.steps // self.split)

    @property
    def count(self) -> Any:
        """How many steps there are."""
        if self.split == 1:
            mine = (self.tiles - self.cta + self.ctas - 1) // self.ctas
            return jnp.maximum(mine, 0) * self.steps
        return dataclasses.replace(self, cta=self.cta + 1).start - self.start

    @property
    def fragments(self) -> Any:
        """How many tiles it computes, wholly or in part."""
        count = self.count
        last = (self.start % self.steps + count - 1) // self.steps
        return jnp.where(count == 0, 0, last + 1)

    def step(self, i: Any) -> tuple[Any, Any]:
        """Returns the tile and the step in it of the i-th step."""
        i = self.start % self.steps + i
        return self.tile(i // self.steps), i % self.steps

    def tile(self, i: Any) -> Any:
        """Returns the tile of fragment i."""
        return self.start // self.steps + i * (self.ctas if self.split == 1 else 1)

    def bounds(self, i: Any) -> tuple[Any, Any]:
        """Returns the first step of fragment i in its tile, and the one after the last."""
        skipped = self.start % self.steps
        first = jnp.where(i == 0, skipped, 0)
        return first, jnp.minimum(self.steps, skipped + self.count - i * self.steps)

    def part(self, i: Any) -> Any:
        """Returns which of the sums of its tile fragment i is."""
        if self.split == 1:
            return 0
        piece = self.bounds(i)[0] // (self.steps // self.split)
        # Where there are fewer pieces than CTAs, some of these have none.
        return jnp.minimum(piece, self.cta - self.owner(self.tile(i) * self.split))

    def parts(self, tile: Any) -> Any:
        """Returns how many sums a tile has."""
        if self.split == 1:
            return tile * 0 + 1
        first, last = tile * self.split, (tile + 1) * self.split - 1
        minimum = np.minimum if isinstance(self.tiles, int) else jnp.minimum
        return minimum(self.split, self.owner(last) - self.owner(first) + 1)

    def owner(self, piece: Any) -> Any:
        """Returns the CTA that computes a piece, of all tiles' pieces."""
        pieces = self.tiles * self.split
        # Its start is the last one that is not after the piece.
        return ((piece + 1) * self.ctas - 1) // pieces


def share_of(
    tuning: Tuning, sizes: tuple[int, int, int], cta: Any = 0, m_tiles: Any = None
) -> Share:
    """Returns what a CTA of a product does.

    Args:
      m_tiles: tiles of tokens, if they are fewer than there may be.
    """
    M, K, N = sizes
    most = N // TILE_N * -(-M // tuning.tile_m)
    tiles = most if m_tiles is None else N // TILE_N * m_tiles
    ctas = min(tuning.sms, most * tuning.split_k)
    return Share(cta, ctas, tiles, K // tuning.tile_k, tuning.split_k)


def most_parts(tuning: Tuning, sizes: tuple[int, int, int]) -> int:
    """Returns the most sums that a tile has, however many tiles of tokens there are."""
    share = share_of(tuning, sizes)
    return int(np.max(share.parts(np.arange(share.tiles))))


def added(sums: Array, share: Share, tile_m: int) -> Array:
    """Returns the sum over the parts that each tile has, [M, N]; there is no number in others."""
    P, M, N = sums.shape
    n_tiles, m_tiles = N // TILE_N, -(-M // tile_m)
    tile = np.arange(n_tiles) * share.tiles // n_tiles + np.arange(m_tiles)[:, None]
    has = jnp.repeat(jnp.asarray(share.parts(tile)), tile_m, axis=0)[:M]  # of each token
    is_part = jnp.arange(P)[:, None, None] < has[None]
    tiles = jnp.where(is_part[..., None], sums.reshape(P, M, n_tiles, TILE_N), 0)
    return jnp.sum(tiles, axis=0, dtype=sums.dtype).reshape(M, N)
