"""Handler: what a transform does with stored weights, a method for each way to use one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import PartitionSpec

from qjax.view import Contraction, View, contraction


class Handler:
    """What a transform does with weights; the walk does everything else.

    A method that returns None has no way to do the operation on the stored weight: the walk then
    calls `materialize` and runs the operation as it stands.
    """

    def materialize(self, view: View, primitive: str, why: str) -> Any:
        """Returns the float array of a view that `primitive` cannot use as it is."""
        raise NotImplementedError

    def contraction(self, view: View, contracting: Sequence[int], batch: Sequence[int]) -> Any:
        """Returns how a dot uses the weight, passed on to `dot_general`, or None if unsuitable."""
        return contraction(view, contracting, batch)

    def dot_general(
        self, view: View, x: Any, how: Contraction, *, weight_first: bool,
        x_axes: tuple, w_axes: tuple, params: dict,
    ) -> Any:  # fmt: skip
        return None

    def placed(self, run: Callable, view: View, arrays: Sequence[Any], out: Any) -> Any:
        """Calls `run(view, *arrays)`, whose result stands for one of the abstract type `out`."""
        return run(view, *arrays)

    def conv(self, view: View, x: Any, params: dict) -> Any:
        return None

    def ragged_dot(self, view: View, x: Any, group_sizes: Any, params: dict) -> Any:
        return None

    def gather(self, view: View, axis: int, indices: Any, params: dict) -> Any:
        """Looks up entries of one axis; returns [*indices.shape, *other axes].

        Args:
          params: with "mode" and "fill_value", as for `lax.gather`.
        """
        return None

    def take_axis(self, view: View, axis: int, take: Callable, size: int) -> View | None:
        return None

    def reshaped(self, view: View) -> View:
        """Lets the stored arrays follow a reshape; they need not."""
        return view

    def unstack(self, view: View) -> bool:
        """Whether the leading axis of the view is the leading axis of every stored array."""
        return False

    def rebind(self, view: View, bind: Callable) -> View | None:
        """Applies an operation that leaves values alone to all stored arrays."""
        return view.with_payload(jax.tree.map(bind, view.payload))

    def reshard(self, view: View, sharding: Any) -> View | None:
        """Moves the stored arrays to where `sharding` has the logical array."""
        return None

    # What a handler collects inside the body of an operation has to leave it as an output.

    def nested(self, run: Callable) -> tuple[Any, Any]:
        """Evaluates a body; returns its outputs and a dict of what was collected in it."""
        return run(), {}

    def absorb(self, collected: Any) -> None:
        """Takes what a body collected, outside of it."""

    def absorb_stacked(self, collected: Any, sliced: set[str]) -> None:
        """Takes what the steps of a scan collected; `sliced` names the weights it walked along."""

    def empty_like(self, collected: Any) -> Any:
        """Returns what a body collects that does not run."""
        return {}

    def joined(self, a: Any, b: Any) -> Any:
        """Returns two collections as one."""
        return {}

    def checkpoint_policy(self, policy: Any) -> Any:
        """Returns a `jax.checkpoint` policy for what the handler makes of the operations."""
        return policy

    def shard(self, view: View, spec: PartitionSpec, mesh: Any) -> tuple[Any, View] | None:
        """Returns PartitionSpecs for the stored arrays, and the view of one shard."""
        return None


def arrays_of(handler: Handler, values: Sequence[Any], primitive: str, why: str) -> list[Any]:
    """Returns values with the float array of each View in its place, because of `why`."""
    return [handler.materialize(v, primitive, why) if isinstance(v, View) else v for v in values]
