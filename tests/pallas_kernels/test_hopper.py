"""What the skeleton of all products refuses."""

from __future__ import annotations

import jax.numpy as jnp
import pytest

from pallas_kernels.hopper import Operand


def test_blocks_that_tma_could_not_write_are_refused():
    rows = Operand(jnp.zeros((4, 64), jnp.float32), "m", is_row=True)
    with pytest.raises(ValueError, match=r"blocks \(1, 8\) of float32 have 32 bytes"):
        rows.ring(2, 8, 128)
    Operand(rows.array, "m", is_row=True, width=32).ring(2, 8, 128)
