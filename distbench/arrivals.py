"""When queries are due: schedules in absolute time, and how many queries LoadGen would make.

A schedule is a sorted int64 array of offsets, ns, from the agreed instant at which a window starts.
It is fixed before the window, so that a slow system under test delays no later query: latencies
count from these instants, whatever became of the issuing.

Source of LoadGen's rules: mlcommons/inference, loadgen/loadgen.cc (``GenerateQueries``) and
loadgen/test_settings_internal.cc, in mlcommons-loadgen 5.0.13 and 6.0.17.
"""

from __future__ import annotations

import decimal
import math
import re
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distbench.errors import UsageError
from distbench.loadgen_rng import Stream

Offsets = NDArray[np.int64]

GENERATORS = {
    "poisson": "loadgen-mt19937-exponential",
    "constant": "constant-period",
    "trace": "trace-file",
}
"""What made a schedule, as a record names it; the seed stands beside it."""

NS = 1_000_000_000
OFFLINE_SLACK = 1.1
"""LoadGen's one Offline query is for so much more than the minimum duration."""
SINGLE_STREAM_SLACK = 2.0
"""With equal issue LoadGen plans SingleStream for a system so much faster than expected."""
LONGEST_S, MOST_QUERIES = 1e8, 10**8
"""Above three years, which int64 ns still hold, or where it fills memory, a schedule is refused."""
_LAST_NS = 2**63 - 1


def poisson_ns(
    target_qps: float, min_duration_ns: int, min_queries: int, seed: int, multiple: int = 1
) -> Offsets:
    """Return LoadGen's Server schedule, to the ns.

    The first query is due at 0. Each gap is exponential, cut to whole ns before it is added. The
    last query is the first one at or after ``min_duration_ns``, or later ones until there are
    ``min_queries``; with equal issue, until they are a multiple of the loaded set.

    Args:
        target_qps: mean rate, queries/s.
        min_duration_ns: ns.
        min_queries: at least so many.
        seed: ``schedule_rng_seed`` of the round; taken modulo 2**32.
        multiple: size of the loaded set under equal issue, else 1.

    Returns:
        Shape (n,), int64, ns, not decreasing.

    Raises:
        UsageError: the rate is not above 0, the duration and the count ask for no query, or for
            too many or too long a time.
    """
    _check(target_qps, min_duration_ns, min_queries, multiple)
    # Neither the generator nor its distribution depends on the variant.
    stream, times = Stream(seed), np.zeros(1, np.int64)
    while (count := _enough(times, min_duration_ns, min_queries, multiple)) is None:
        left_s = max(0, min_duration_ns - int(times[-1])) / NS
        more = max(math.ceil(left_s * target_qps * 1.01), min_queries - len(times), multiple)
        gaps = (stream.exponential(more + 16, target_qps) * 1e9).astype(np.int64)
        times = np.concatenate((times, times[-1] + np.cumsum(gaps)))
    return times[:count]


def constant_ns(
    target_qps: float, min_duration_ns: int, min_queries: int, multiple: int = 1
) -> Offsets:
    """Return a schedule of equal gaps, without drift: query i is due at i / target_qps.

    Args:
        target_qps: rate, queries/s.
        min_duration_ns: the last query is due then or later, ns.
        min_queries: at least so many.
        multiple: the count is a multiple of it.

    Returns:
        Shape (n,), int64, ns, cut to whole ns.

    Raises:
        UsageError: as ``poisson_ns``.
    """
    _check(target_qps, min_duration_ns, min_queries, multiple)
    planned = max(math.ceil(min_duration_ns / NS * target_qps) + 2, min_queries)
    places = np.arange(planned + multiple, dtype=np.float64)
    times = (places * 1e9 / target_qps).astype(np.int64)
    return times[: _enough(times, min_duration_ns, min_queries, multiple)]


def _check(target_qps: float, min_duration_ns: int, min_queries: int, multiple: int) -> None:
    if not (math.isfinite(target_qps) and target_qps > 0):
        raise UsageError(f"a target of {target_qps} queries/s is not above 0: give a rate")
    if min_duration_ns <= 0 and min_queries <= 0:
        raise UsageError(
            f"a schedule of {min_duration_ns} ns and {min_queries} queries is empty: give a "
            "duration or a count above 0"
        )
    if multiple < 1:
        raise UsageError(f"a schedule cannot be a multiple of {multiple}: give at least 1")
    # A few more than asked for are drawn, so that even one query takes some time.
    longest_s = max(min_duration_ns / NS, (max(min_queries, multiple) + 16) / target_qps)
    most = max(min_duration_ns / NS * target_qps, min_queries, multiple)
    if longest_s > LONGEST_S or most > MOST_QUERIES:
        raise UsageError(
            f"a schedule of {most:.3g} queries in {longest_s:.3g} s at {target_qps:g} queries/s is "
            f"above {MOST_QUERIES:.0e} queries or {LONGEST_S:.0e} s: give another rate or duration"
        )


def _enough(times: Offsets, min_duration_ns: int, min_queries: int, multiple: int) -> int | None:
    """Return how many of these queries the schedule has; None if there are not enough yet."""
    if times[-1] < min_duration_ns:
        return None
    first_late = int(np.searchsorted(times, min_duration_ns))
    # The first query at or after the minimum duration is issued as well.
    wanted = max(min_queries, first_late + 1)
    wanted += -wanted % multiple
    return wanted if wanted <= len(times) else None


def trace_ns(path: Path) -> Offsets:
    """Read a schedule from a text file: one offset a line, in order of time.

    An offset is in seconds ("0.25", "0.25s"), or in ns ("250000000ns"). Empty lines, and what
    follows a "#", are left out.

    Args:
        path: of the file.

    Returns:
        Shape (n,), int64, ns, not decreasing; seconds are cut to whole ns.

    Raises:
        UsageError: the file cannot be read, has no offset, or a line is not an offset, is negative,
            too large, or earlier than the one before it.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"the trace {path} cannot be read: {error}") from None
    times: list[int] = []
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"([0-9]+)\s*ns|([0-9]*\.?[0-9]+(?:[eE][-+]?[0-9]{1,3})?)\s*s?", text)
        if not match:
            raise UsageError(
                f"{path}, line {number}: {text!r} is no offset: write seconds from the start such "
                "as 0.25, or ns such as 250000000ns"
            )
        whole, seconds = match.groups()
        # Decimal, since 0.3 s in double precision would be cut to 299999999 ns.
        at_ns = int(whole) if whole else int(decimal.Decimal(seconds).scaleb(9))
        if at_ns > _LAST_NS:
            raise UsageError(f"{path}, line {number}: {text!r} is above {_LAST_NS} ns: give less")
        if at_ns > LONGEST_S * NS:
            raise UsageError(
                f"{path}, line {number}: {text!r} is more than {LONGEST_S:.0e} s after the start: "
                "write offsets from the start of the window, not times of day"
            )
        if times and at_ns < times[-1]:
            raise UsageError(
                f"{path}, line {number}: {text!r} is earlier than the line before it, {times[-1]} "
                "ns: sort the trace"
            )
        times.append(at_ns)
    if not times:
        raise UsageError(f"the trace {path} has no offset: write one a line, in seconds")
    return np.array(times, np.int64)


def offline_samples(
    min_samples: int, min_duration_ns: int, target_qps: float, multiple: int = 1
) -> int:
    """Return how many samples LoadGen's Offline query has.

    Args:
        min_samples: of the round (``min_query_count`` in LoadGen's settings).
        min_duration_ns: ns.
        target_qps: expected samples/s; below truth / 1.1 the run ends before its minimum duration.
        multiple: size of the loaded set under equal issue, else 1.
    """
    planned = max(min_samples, int(OFFLINE_SLACK * (min_duration_ns / NS) * target_qps))
    return planned + -planned % multiple


def single_stream_queries(
    min_queries: int, min_duration_ns: int, expected_latency_ns: int, loaded: int
) -> int:
    """Return LoadGen's minimum query count of SingleStream with equal issue.

    Where the count is a multiple of the set already, LoadGen adds one more set.

    Args:
        min_queries: of the round.
        min_duration_ns: ns.
        expected_latency_ns: ``single_stream_expected_latency_ns``, ns; above 0.
        loaded: size of the loaded set.
    """
    expected = int(SINGLE_STREAM_SLACK * (min_duration_ns / NS) * (1e9 / expected_latency_ns))
    planned = max(min_queries, expected)
    return planned + loaded - planned % loaded
