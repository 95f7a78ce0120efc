"""Peak search: the highest rate at which the user's bounds hold, as a decision on outcomes alone.

    doubling    from a quarter of what the warm-up did, until a rate fails
    bisection   between the last rate that passed and the first that failed, on a log scale
    confirming  a fresh window of the full duration at the best rate; while it does not keep the
                bounds, a lower rate; where the first one does, higher ones until one does not

``search`` is a generator: it yields each window to take and is sent what became of it. It knows
nothing of clocks, ranks or files, so that whoever has the outcomes can ask it again what followed
from them (``replay``), as ``verify`` does.

What a probe can tell: it is short, and rests on few slow queries. 459 queries, none of them slow,
are the fewest after which early stopping takes p99 for kept, and it takes a system that just keeps
it for kept once in a hundred times. Queries that wait in one queue are slow together, which early
stopping does not know. So a probe only says where to look; the peak rests on the confirming window
and its interval.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

from distbench.early_stopping import CHANCE, least_queries
from distbench.stats import order_ranks

PROBE, CONFIRM = "probe", "confirm"
PASS, FAIL, UNCLEAR, UNKNOWN = "pass", "fail", "unclear", "unknown"

FIRST_SHARE = 0.25
"""The first rate, of the warm-up's: there hardly a query waits, so it should pass."""
DOUBLINGS = 6
"""16 times what the warm-up did. A rate beyond that is none of this system's, or it answers without
working, and nothing is learnt from going on."""
HALVINGS = 8
"""Down to a thousandth of what the warm-up did: a bound that is missed there is missed by the
system without a queue."""
RESOLUTION = 0.03
"""A bracket as narrow as this is not divided: of two rates 3 % apart a probe cannot tell the better
one, and the confirming window steps down by less."""
LONGER = 3.0
"""What is unclear is tried for so much longer at the same rate, up to ``LONGEST``."""
LONGEST = 10
"""Times --probe that a probe lasts at most, so that a slow model ends too."""
PROBE_MOST = 200_000
"""Queries that a probe has at most: of these 2,000 are slower than p99, enough to judge by."""
PROBE_LEAST = 16
"""Queries for each replica that the longest probe must have, or there is nothing to judge."""
CONFIRM_STEPS = (0.0, 0.02, 0.04, 0.06, 0.08, 0.11, 0.15, 0.22)
"""By so much the rate is below the best one in each confirming window, until one keeps the bounds.

The first steps are less than a bracket is wide, so that the peak is not missed by much. Where they
do not suffice, the window is too short to tell such rates apart, and a wider margin is all that it
can confirm. A window that is far from confirming, its whole interval above the limit or none there,
is followed by the step after next.
"""
RAISE_STEPS = (0.02, 0.04, 0.07, 0.11, 0.15, 0.22)
"""By so much the rate is above the best one in the windows that follow where the first confirming
window keeps the bounds, until one does not: a rate whose probes failed by chance is never probed
again, and all above it would be lost."""
LIMITS = 10
"""Times the longest bound that a window lasts at least: at a rate 10 % above what is completed the
queue then grows to the bound within it, and in a shorter one it would pass."""
DIGITS = 4
"""Significant digits of a rate."""


@dataclass(frozen=True)
class Plan:
    """What a search is to do; fixed before it begins.

    Attributes:
        first_qps: rate of the first probe, queries/s over all replicas.
        probe_ns: how long a probe lasts at least.
        duration_ns: of a confirming window.
        quantiles: those that are bounded.
        replicas: among which queries are divided.
        limit_ns: the longest bound; a probe is no shorter, or it could not tell.
    """

    first_qps: float
    probe_ns: int
    duration_ns: int
    quantiles: tuple[float, ...]
    replicas: int
    limit_ns: int = 0

    @property
    def lowest_qps(self) -> float:
        """At a lower rate even the longest probe has too few queries."""
        return PROBE_LEAST * self.replicas / (LONGEST * self.probe_ns / 1e9)


@dataclass(frozen=True)
class Step:
    """A window to take.

    Attributes:
        kind: ``PROBE`` or ``CONFIRM``.
        target_qps: queries/s over all replicas.
        duration_ns: how long queries come.
    """

    kind: str
    target_qps: float
    duration_ns: int


@dataclass(frozen=True)
class Outcome:
    """What became of a window.

    Attributes:
        word: ``PASS``, ``FAIL``, ``UNCLEAR``; ``UNKNOWN`` where something bounded does not exist.
        kept: whether the percentiles themselves are within their limits.
        resolved: of a confirming window, whether the percentiles have intervals.
        hopeless: likewise, whether it had fewer queries than any interval needs.
    """

    word: str
    kept: bool
    resolved: bool = True
    hopeless: bool = False


@dataclass(frozen=True)
class End:
    """Where a search ended.

    Attributes:
        found: whether a rate passed, so that there were confirming windows.
        confirmed: whether one of them kept the bounds; the peak is the rate of the last that did.
        capped: whether the highest rate that is tried keeps the bounds: the peak lies beyond.
        why: in words, where something is missing.
    """

    found: bool
    confirmed: bool
    capped: bool
    why: str = ""


class _Stop(Exception):
    """The search cannot go on; the text says why."""


Search = Generator[Step, Outcome, End]
_Probing = Generator[Step, Outcome, bool]


def judged(queries: int, over: int, quantile: float) -> tuple[str, bool, str]:
    """Judge one bound of a probe by how many queries were above its limit.

    It passes by early stopping, and fails where a system that just keeps the bound would show as
    many slow queries with a probability below 0.01, likewise for independent queries. With fewer
    queries than early stopping needs at all, the percentile itself decides.

    Args:
        queries: that completed.
        over: of these, above the limit.
        quantile: that is bounded, in (0, 1).

    Returns:
        The word, whether the percentile itself is within the limit, and what decided.

    Example:
        >>> [judged(1000, over, 0.99)[:2] for over in (2, 3, 11, 19)]
        [('pass', True), ('unclear', True), ('unclear', False), ('fail', False)]
    """
    if queries == 0:
        return UNKNOWN, False, "no query has this time"
    kept = int(queries * quantile) < queries - over
    if queries < least_queries(quantile, 0):
        return (PASS if kept else FAIL), kept, "few queries: by the percentile alone"
    if queries >= least_queries(quantile, over):
        return PASS, kept, "early stopping passes"
    ranks = order_ranks(queries, quantile, 1 - 2 * CHANCE)
    if ranks is not None and over >= queries - ranks[0]:
        return FAIL, kept, "more above the limit than by chance"
    return UNCLEAR, kept, "chance may give as many"


def search(plan: Plan) -> Search:
    """Yield the windows of a search; each must be answered by its outcome.

    Args:
        plan: what it is to do.

    Returns:
        Where it ended.
    """
    try:
        low, high = yield from _bracket(plan)
        if high is not None:
            low = yield from _bisected(plan, low, high)
        return (yield from _confirm(plan, low, capped=high is None))
    except _Stop as stop:
        return End(False, False, False, str(stop))


def _bisected(plan: Plan, low: float, high: float) -> Generator[Step, Outcome, float]:
    """Return the best rate between one that passed and one that failed.

    The nearer to each other they are, the longer the probes: a queue near its peak needs time to
    grow, and rates that hardly differ need more queries to be told apart.
    """
    while high / low > 1 + RESOLUTION:
        middle = rounded((low * high) ** 0.5)
        if not low < middle < high:  # no digits are left between them
            break
        if (yield from _holds(plan, middle, math.log(2) / math.log(high / low))):
            low = middle
        else:
            high = middle
    return low


def _bracket(plan: Plan) -> Generator[Step, Outcome, tuple[float, float | None]]:
    """Return a rate that passed, and twice that, which failed; None where none failed."""
    rate = plan.first_qps
    if (yield from _holds(plan, rate)):
        for _ in range(DOUBLINGS):
            if not (yield from _holds(plan, rounded(2 * rate))):
                return rate, rounded(2 * rate)
            rate = rounded(2 * rate)
        return rate, None
    for _ in range(HALVINGS):
        below = rounded(rate / 2)
        if below < plan.lowest_qps:
            raise _Stop(
                f"{rate:g} queries/s failed, and the longest probe of half as many would have too "
                "few queries to judge"
            )
        if (yield from _holds(plan, below)):
            return below, rate
        rate = below
    raise _Stop(f"every rate down to {rate:g} queries/s failed")


def _holds(plan: Plan, qps: float, longer: float = 1.0) -> _Probing:
    """Return whether a rate passes, after one to three probes of growing length.

    One pause of the host fails a short probe at any rate, and a rate that is taken for too high is
    never tried again: so a fail counts when it comes twice.
    """
    fails, kept = 0, False
    for length_ns in probe_lengths_ns(plan, qps, longer):
        found = yield Step(PROBE, qps, length_ns)
        if found.word == UNKNOWN:
            raise _Stop("what is bounded is not known of this model")
        if found.word == PASS:
            return True
        fails += found.word == FAIL
        if fails == 2:
            return False
        kept = found.kept
    return kept


def probe_lengths_ns(plan: Plan, qps: float, longer: float = 1.0) -> list[int]:
    """Return how long the probes of one rate are, one after the other while it is not clear.

    The first is --probe, or as long as it takes to have the queries that early stopping needs where
    none is slow, or ten times the longest bound. None is longer than ``LONGEST`` times --probe, or
    has above ``PROBE_MOST`` queries by much, unless the bound asks for it.
    """
    least_ns = max(round(longer * plan.probe_ns), LIMITS * plan.limit_ns)
    need = max(least_queries(quantile, 0) for quantile in plan.quantiles)
    most_ns = min(LONGEST * plan.probe_ns, round(PROBE_MOST / qps * 1e9))
    most_ns = max(most_ns, min(LONGEST * plan.probe_ns, LIMITS * plan.limit_ns))
    # A tenth more: a Poisson schedule of a given length often has a few queries less.
    at_ns = min(max(least_ns, round(1.1 * need / qps * 1e9)), most_ns)
    lengths = [at_ns, min(round(at_ns * LONGER), most_ns)]
    return [*lengths, most_ns]


def _confirm(plan: Plan, qps: float, capped: bool) -> Search:
    """Confirm the best rate, or a lower one, by windows of full length."""
    place, tried, last = 0, 0, len(CONFIRM_STEPS) - 1
    while True:
        found = yield Step(CONFIRM, rounded(qps * (1 - CONFIRM_STEPS[place])), plan.duration_ns)
        tried += 1
        if found.word == PASS:
            if tried == 1 and not capped:
                capped = yield from _raise(plan, qps)
            return End(True, True, capped and tried == 1)
        if found.hopeless:
            why = "it has fewer queries than any interval needs, and a lower rate has fewer still"
            return End(True, False, False, why)
        if place == last:
            break
        place = min(last, place + (2 if found.word == FAIL or not found.resolved else 1))
    return End(True, False, False, f"{tried} windows were tried")


def _raise(plan: Plan, qps: float) -> _Probing:
    """Confirm higher rates than one that is confirmed; returns whether all kept the bounds."""
    for share in RAISE_STEPS:
        found = yield Step(CONFIRM, rounded(qps * (1 + share)), plan.duration_ns)
        if found.word != PASS:
            return False
    return True


def rounded(qps: float) -> float:
    """Return a rate to as many digits as are told."""
    return float(f"{qps:.{DIGITS}g}")


def replay(plan: Plan, outcomes: Sequence[Outcome]) -> tuple[list[Step], Step | End]:
    """Return the windows that these outcomes belong to, and what follows from the last of them.

    Args:
        plan: of the search.
        outcomes: of its windows, in order.

    Returns:
        As many windows as there are outcomes, or fewer where the search ends before; and the one
        that is to come next, or where it ended.
    """
    going = search(plan)
    steps, wanted = list[Step](), next(going)
    for outcome in outcomes:
        steps.append(wanted)
        try:
            wanted = going.send(outcome)
        except StopIteration as stop:
            end: End = stop.value
            return steps, end
    return steps, wanted
