"""Percentiles by LoadGen's rule."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

RULE = "LoadGen's rule: sorted[int(n * p)]"


def percentiles_ns(latency_ns: NDArray[np.int64], quantiles: Sequence[float]) -> list[int]:
    """Return latencies at quantiles, by LoadGen's rule.

    Each is a latency that was observed: the value at zero-based position ``int(n * p)`` of the
    sorted latencies, the product taken in double precision and cut. Nothing is interpolated. Where
    n * p is whole this is one sample above textbook nearest rank, so it never flatters the system.

    Args:
        latency_ns: shape (n,), int64, ns; any order; unchanged.
        quantiles: each in [0, 1).

    Returns:
        The latencies, ns, in the order of ``quantiles``.

    Raises:
        ValueError: ``latency_ns`` is empty or a quantile is outside [0, 1).

    Example:
        >>> percentiles_ns(np.arange(1, 101), [0.5, 0.99])
        [51, 100]

    Source:
        mlcommons/inference, loadgen/results.cc, lines 36-43 at b66003e.
    """
    if len(latency_ns) == 0:
        raise ValueError("percentiles of no latencies")
    if any(not 0 <= q < 1 for q in quantiles):
        raise ValueError(f"quantiles {list(quantiles)} are not all in [0, 1)")
    places = [int(len(latency_ns) * q) for q in quantiles]
    ordered = np.partition(latency_ns, sorted(set(places)))
    return [int(ordered[place]) for place in places]
