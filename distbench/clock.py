"""Clocks: what time it is here, and how far another rank's clock is from it, with a bound.

A stamp is int64 ns of CLOCK_MONOTONIC_RAW, which NTP neither steps nor slews. Two ranks share a
clock when they share a kernel boot and a time namespace (``clock_domain``). Between domains an
``Exchange`` of messages gives an interval that must contain the offset, whatever the network did;
``ClockModel`` interpolates exchanges and says how wrong it can be at each instant.

Source of the interval: Cristian, "Probabilistic clock synchronization", Distributed Computing 3
(1989); the intersection over many trips is that of SKaMPI and ReproMPI.
"""

from __future__ import annotations

import bisect
import functools
import itertools
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distbench.errors import ClockError

Now = Callable[[], int]

now_ns: Now = functools.partial(time.clock_gettime_ns, time.CLOCK_MONOTONIC_RAW)
"""Read this process's clock: ns of CLOCK_MONOTONIC_RAW."""

WANDER_PPM = 2.0
"""How far a clock's rate may move while two exchanges bracket an instant.

The assumption behind every published bound. Quartz in a machine room moves by well under 1 ppm per
kelvin, and a measured window is minutes long; a rate that is merely wrong (tens of ppm) is measured
by the exchanges and costs nothing.
"""
RATE_LIMIT_PPM = 100.0
"""How far two clocks' rates may differ at all; used within one exchange and outside all of them.

Huygens (NSDI 2018) reports 5 to 10 us/s as typical and 30 us/s at most.
"""


@dataclass(frozen=True)
class SkewedClock:
    """A clock that is wrong in a known way, for tests.

    Attributes:
        base: the clock that is taken to be true.
        offset_ns: what it shows more than ``base`` at ``origin_ns``.
        ppm: how much faster it runs, parts per million.
        origin_ns: when, on ``base``, the offset holds.
        bend_ppm: by how much the rate changes ``bend_after_ns`` past the origin.
        bend_after_ns: when the rate changes.
    """

    base: Now
    offset_ns: int
    ppm: float
    origin_ns: int
    bend_ppm: float = 0.0
    bend_after_ns: int = 0

    def offset_at(self, base_ns: int) -> int:
        """Return the true offset at an instant of ``base``, ns."""
        elapsed = base_ns - self.origin_ns
        bent = max(0, elapsed - self.bend_after_ns)
        return self.offset_ns + round(elapsed * self.ppm * 1e-6 + bent * self.bend_ppm * 1e-6)

    def __call__(self) -> int:
        """Read the clock, ns."""
        now = self.base()
        return now + self.offset_at(now)


def clock_domain() -> str:
    """Name the clock that this process reads; equal names mean the same clock.

    The boot id alone does not tell: processes in different time namespaces of one kernel have
    different offsets. The hostname does not either: containers share or change it.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        boot = f"host-{socket.gethostname()}"
    try:
        space = str(Path("/proc/self/ns/time").stat().st_ino)
    except OSError:
        space = "none"
    return f"{boot}/{space}"


@dataclass(frozen=True)
class Exchange:
    """The outcome of one series of round trips between a reference clock and a peer's.

    Attributes:
        at_ns: the instant it holds for, on the reference clock.
        offset_ns: peer's clock minus the reference clock: middle of the interval.
        bound_ns: half the interval's width, rounded up; the truth is within offset +- bound.
        round_trip_ns: the shortest round trip.
        trips: round trips that were used.
    """

    at_ns: int
    offset_ns: int
    bound_ns: int
    round_trip_ns: int
    trips: int


def measure_exchange(trips: Sequence[tuple[int, int, int, int]]) -> Exchange:
    """Turn the stamps of round trips into an offset with a bound that always holds.

    A message cannot arrive before it was sent. So the offset is at most t1 - t0 (request: sent t0
    on the reference, received t1 at the peer) and at least t2 - t3 (reply: sent t2, received t3).
    The intersection over all trips holds the offset; trips away from the instant it is stated for
    are first widened by ``RATE_LIMIT_PPM`` of the distance, since the clocks drift meanwhile.

    Args:
        trips: (t0, t1, t2, t3) each, ns; t0 and t3 on the reference clock, t1 and t2 on the peer's.

    Returns:
        The exchange, stated for the middle of its shortest trip.

    Raises:
        ClockError: no trips, or intervals that do not meet: a clock stepped, or runs outside
            ``RATE_LIMIT_PPM``.
    """
    if not trips:
        raise ClockError("an exchange of clock stamps had no round trip that came back")
    best = min(trips, key=lambda t: (t[3] - t[0]) - (t[2] - t[1]))
    at = (best[0] + best[3]) // 2
    low, high = -(2**63), 2**63
    for t0, t1, t2, t3 in trips:
        low = max(low, t2 - t3 - _widening(t3 - at))
        high = min(high, t1 - t0 + _widening(t0 - at))
    if low > high:
        raise ClockError(
            f"{len(trips)} exchanges with a peer's clock contradict each other by {low - high} ns: "
            "a clock was stepped, or a virtual machine was paused or moved; run again"
        )
    return Exchange(
        at_ns=at,
        offset_ns=(low + high) // 2,
        bound_ns=(high - low + 1) // 2 + 1,
        round_trip_ns=(best[3] - best[0]) - (best[2] - best[1]),
        trips=len(trips),
    )


def _widening(distance_ns: int) -> int:
    return int(abs(distance_ns) * RATE_LIMIT_PPM // 1_000_000) + (distance_ns != 0)


def contradiction_ns(exchanges: Sequence[Exchange]) -> int:
    """Return by how much exchanges contradict the assumptions behind the bounds, ns; 0 if not.

    Two neighbours that differ by more than both bounds and ``RATE_LIMIT_PPM`` of the time between
    them show a clock that was stepped. An exchange whose interval does not meet the model's at its
    own instant shows a rate that moved by more than ``WANDER_PPM``.

    Args:
        exchanges: all that were made with one peer, any order.
    """
    ordered = sorted(exchanges, key=_at)
    worst = 0
    for one, other in itertools.pairwise(ordered):
        apart = abs(other.offset_ns - one.offset_ns) - one.bound_ns - other.bound_ns
        worst = max(worst, apart - _widening(other.at_ns - one.at_ns))
    model = ClockModel.fit(ordered)
    for each in ordered:
        apart = abs(each.offset_ns - model.offset_ns(each.at_ns))
        worst = max(worst, apart - each.bound_ns - model.bound_ns(each.at_ns))
    return worst


def _at(exchange: Exchange) -> int:
    return exchange.at_ns


@dataclass(frozen=True)
class ClockModel:
    """A peer's clock against the reference clock: piecewise linear between exchanges.

    Attributes:
        exchanges: in order of time; empty where the peer reads the reference clock itself.
    """

    exchanges: tuple[Exchange, ...] = ()

    @staticmethod
    def fit(exchanges: Sequence[Exchange]) -> ClockModel:
        """Keep the exchanges that tighten the bound.

        An exchange made while the loop was busy can be far looser than its neighbours; it is left
        out where the others, interpolated, are at least as tight at every instant. Two instants
        tell: its own, and the middle of its neighbours, where the wander between them is largest.

        Args:
            exchanges: any number, any order.
        """
        kept = sorted(exchanges, key=_at)
        for exchange in sorted(kept[1:-1], key=lambda e: -e.bound_ns):
            here = bisect.bisect_left(kept, exchange.at_ns, key=_at)
            left, right = kept[here - 1], kept[here + 1]
            without, middle = ClockModel((left, right)), (left.at_ns + right.at_ns) // 2
            if without.bound_ns(exchange.at_ns) > exchange.bound_ns:
                continue
            if without.bound_ns(middle) <= ClockModel((left, exchange, right)).bound_ns(middle):
                del kept[here]
        return ClockModel(tuple(kept))

    def offset_ns(self, at_ns: int) -> int:
        """Return the peer's clock minus the reference clock at a reference instant, ns."""
        if not self.exchanges:
            return 0
        left, right = self._bracket(at_ns)
        if left is right:
            return left.offset_ns
        # Integers throughout: float64 has steps of 128 ns at 1e18 ns.
        share = (at_ns - left.at_ns) * (right.offset_ns - left.offset_ns)
        return left.offset_ns + share // (right.at_ns - left.at_ns)

    def bound_ns(self, at_ns: int) -> int:
        """Return how far ``offset_ns`` can be from the truth at a reference instant, ns.

        Between two exchanges: their bounds, interpolated, plus ``WANDER_PPM`` times the distance to
        the nearer one. A rate that stays within a band of that width deviates from the chord by no
        more: (t - a)(b - t)/(b - a) times the width, which is below the smaller distance. Outside
        all exchanges: the nearest bound plus ``RATE_LIMIT_PPM`` times the distance.
        """
        if not self.exchanges:
            return 0
        left, right = self._bracket(at_ns)
        if left is right:
            return left.bound_ns + _widening(at_ns - left.at_ns)
        before, after = at_ns - left.at_ns, right.at_ns - at_ns
        mixed = (left.bound_ns * after + right.bound_ns * before) // (before + after) + 1
        return mixed + int(min(before, after) * WANDER_PPM // 1_000_000) + 2

    def _bracket(self, at_ns: int) -> tuple[Exchange, Exchange]:
        """Return the exchanges on both sides, or the nearest one twice outside all of them."""
        if at_ns <= self.exchanges[0].at_ns:
            return self.exchanges[0], self.exchanges[0]
        if at_ns >= self.exchanges[-1].at_ns:
            return self.exchanges[-1], self.exchanges[-1]
        right = bisect.bisect_right(self.exchanges, at_ns, key=_at)
        return self.exchanges[right - 1], self.exchanges[right]

    def to_reference_ns(self, peer_ns: int) -> int:
        """Map an instant of the peer's clock to the reference clock, ns.

        Three fixed-point steps: each shrinks the error by the rate difference (below 1e-4).
        """
        at = peer_ns
        if self.exchanges:
            at = peer_ns - self.exchanges[0].offset_ns
        for _ in range(3):
            at = peer_ns - self.offset_ns(at)
        return at

    def to_peer_ns(self, reference_ns: int) -> int:
        """Map an instant of the reference clock to the peer's clock, ns."""
        return reference_ns + self.offset_ns(reference_ns)

    def many_to_reference_ns(self, peer_ns: NDArray[np.int64]) -> NDArray[np.int64]:
        """Map many instants of the peer's clock to the reference clock.

        Args:
            peer_ns: shape (n,), int64, ns on the peer's clock.

        Returns:
            Shape (n,), int64, ns on the reference clock; within 1 ns of ``to_reference_ns``.
        """
        if not self.exchanges:
            return np.array(peer_ns)
        at = peer_ns - self.exchanges[0].offset_ns
        times = np.array([e.at_ns for e in self.exchanges], np.int64)
        first = self.exchanges[0].offset_ns
        extra = np.array([e.offset_ns - first for e in self.exchanges], np.float64)
        for _ in range(3):
            step = np.interp((at - times[0]).astype(np.float64), times - times[0], extra)
            at = peer_ns - first - np.rint(step).astype(np.int64)
        return at

    @property
    def drift_ppm(self) -> float | None:
        """Rate difference between the first and last exchange, ppm; None with fewer than two."""
        if len(self.exchanges) < 2:
            return None
        first, last = self.exchanges[0], self.exchanges[-1]
        return (last.offset_ns - first.offset_ns) / (last.at_ns - first.at_ns) * 1e6
