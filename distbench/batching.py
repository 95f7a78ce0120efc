"""Dynamic batching: one function decides when queries that wait are issued, and how many.

A batch is due when it is full, or when its oldest query has waited for ``max_wait_ns``, whichever
comes first. What is due and finds the system under test busy grows on while it waits, up to
``max_batch``. Under static dispatch the times are the schedule, under central dispatch those of
arrival: the decision uses none that lies ahead of the clock.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence


def next_batch(
    times: Sequence[int], first: int, end: int, now_ns: int, max_batch: int, max_wait_ns: int
) -> tuple[int, int]:
    """Return how many queries to issue now, and when their batch was or will be due.

    Args:
        times: when each query came, ns, not decreasing.
        first: position of the oldest query that was not issued; below ``end``.
        end: one past the last query that may be issued.
        now_ns: the clock.
        max_batch: queries of a batch at most.
        max_wait_ns: how long the oldest one waits for others at most.

    Returns:
        The size, 0 before the batch is due; and the instant at which it is due, ns.

    Example:
        >>> next_batch([0, 5, 9], 0, 3, now_ns=6, max_batch=2, max_wait_ns=100)
        (2, 5)
        >>> next_batch([0, 5, 9], 0, 3, now_ns=6, max_batch=3, max_wait_ns=100)
        (0, 9)
    """
    due = times[first] + max_wait_ns
    full = first + max_batch - 1
    if full < end and times[full] < due:
        due = times[full]
    if now_ns < due:
        return 0, due
    last = full + 1 if full < end else end
    return bisect_right(times, now_ns, first + 1, last) - first, due
