"""Observers: statistics of a weight's input, folded over batches.

Every module is one statistic, with the same four pure functions around a NamedTuple `State`:

  init(lead, K)            the state before any data
  update(state, x, mask)   folds in activations x [*lead, M, K]; rows with mask False do not count
  merge(a, b)              the state of both data sets together
  finalize(state)          the statistic

The law they keep: merge is associative with `init` as its identity, and updating with two batches
equals updating with their concatenation: exactly for extrema, counts and samples, up to float32
summation order for sums. It is commutative, except for `sample`, which keeps what came first.
"""

from qjax.observers import absmax, hessian, minmax, moments, percentile, sample

OBSERVERS = {
    m.__name__.rpartition(".")[2]: m for m in (absmax, hessian, minmax, moments, percentile, sample)
}

__all__ = ["OBSERVERS", "absmax", "hessian", "minmax", "moments", "percentile", "sample"]
