"""What arrives in a Server window: options of the load, and the schedule drawn from them.

One schedule is drawn from one seed before the window, the same on every rank; each query goes to
the replica that a second seeded draw gave it. An independent draw splits a Poisson process into
Poisson processes; taking turns would not. No message is needed in the window.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench.arrivals import GENERATORS, Offsets, constant_ns, poisson_ns, trace_ns
from distbench.bounds import Bound, parse_bounds
from distbench.errors import UsageError
from distbench.loadgen_rng import LEMIRE, WHOLE, Order, loadable_set, sample_order
from distbench.rounds import MIN_DURATION_NS, MIN_QUERIES, Seeds
from distbench.rules import Rules
from distbench.talk import address_of

DISPATCHES, PAYLOADS = ("static", "central"), ("index", "data")
BACKLOG_S = 2.0
"""So many seconds of arrivals may be outstanding, or four times the largest bound or the longest
group of the warm-up; then a window is given up: a queue that long does not shrink at a rate that
may be offered for good."""
BACKLOG_LEAST = 64


@dataclass(frozen=True)
class Load:
    """What is offered to the system under test.

    Attributes:
        target_qps: queries/s over all replicas; of a trace, its own mean rate; 0 where the peak is
            searched for.
        arrival: "poisson", "constant" or "trace:FILE".
        dispatch: "static" or "central".
        max_batch: queries of a group at most.
        max_wait_ns: how long the oldest query of a group waits for others at most.
        bounds: limits of the user's own.
        probe_ns: above 0, the peak under the bounds is searched for, with probes at least so long;
            see ``auto``.
        payload: what crosses the wire under central dispatch, "index" or "data".
        driver: ADDR:PORT of a driver that was started by hand; "": rank 0 starts one.
        driver_token: the file of its token, on rank 0's host.

    Raises:
        UsageError: a value is out of its range.
    """

    target_qps: float
    arrival: str = "poisson"
    dispatch: str = "static"
    max_batch: int = 1
    max_wait_ns: int = 0
    bounds: tuple[Bound, ...] = ()
    probe_ns: int = 0
    payload: str = "index"
    driver: str = ""
    driver_token: str = ""

    def __post_init__(self) -> None:
        if self.searched:
            self._check_search()
        elif not (math.isfinite(self.target_qps) and self.target_qps > 0):
            raise UsageError(
                f"a target of {self.target_qps} queries/s is not above 0 (--target-qps)"
            )
        check_arrival(self.arrival)
        if self.dispatch not in DISPATCHES:
            raise UsageError(
                f"dispatch {self.dispatch!r} is neither static nor central (--dispatch)"
            )
        self._check_central()
        if self.max_batch < 1:
            raise UsageError(f"groups of {self.max_batch} queries are below 1 (--max-batch)")
        if self.max_wait_ns < 0:
            raise UsageError("queries cannot wait for less than no time (--max-wait)")

    def _check_search(self) -> None:
        if self.probe_ns < 0 or self.target_qps:
            raise UsageError(
                f"a search with probes of {self.probe_ns} ns at {self.target_qps:g} queries/s: "
                "give either a rate or the length of a probe (--target-qps, --probe)"
            )
        if not self.bounds:
            raise UsageError(
                "--target-qps auto searches for the highest rate that keeps a bound: give one, "
                "such as --latency-bound 15ms@p99"
            )
        if self.arrival.startswith("trace:"):
            raise UsageError(
                "a trace has its own rate, so there is none to search for: leave out --target-qps "
                "auto, or give --arrival poisson"
            )
        if self.dispatch == "central":
            raise UsageError(
                "a search for the peak deals its queries out before each window: leave out "
                "--dispatch central, with --driver and --payload, and measure the rate that is "
                "found with them afterwards"
            )

    @property
    def searched(self) -> bool:
        """Whether the peak is searched for."""
        return self.probe_ns != 0

    @classmethod
    def auto(cls, bounds: str, probe_s: float = 2.0, **others: Any) -> Load:
        """Return the load of a peak search: the highest rate that keeps some bounds.

        Args:
            bounds: such as "15ms@p99"; see ``bounds.parse_bounds``.
            probe_s: how long a probe lasts at least, s.
            others: further options of the load.

        Raises:
            UsageError: a value is out of its range.
        """
        if not 0 < probe_s < math.inf:
            raise UsageError(f"a probe of {probe_s} s is not above 0 (--probe)")
        probe_ns = max(1, round(probe_s * 1e9))
        return cls(0.0, bounds=parse_bounds(bounds), probe_ns=probe_ns, **others)

    def at(self, target_qps: float) -> Load:
        """Return the load of one window at this rate."""
        return replace(self, target_qps=target_qps, probe_ns=0)

    def _check_central(self) -> None:
        if self.payload not in PAYLOADS:
            raise UsageError(f"payload {self.payload!r} is neither index nor data (--payload)")
        asked = [("--payload", self.payload != "index"), ("--driver", bool(self.driver))]
        named = [name for name, given in asked if given]
        if named and self.dispatch != "central":
            raise UsageError(f"{named[0]} is for central dispatch: give --dispatch central")
        if bool(self.driver) != bool(self.driver_token):
            raise UsageError(
                "a driver is called with its token: give --dispatch central, --driver and "
                "--driver-token"
            )
        if self.driver and not address_of(self.driver)[1]:
            raise UsageError(
                f"{self.driver!r} has no port: write ADDR:PORT, such as 10.0.0.2:29600"
            )


def check_arrival(text: str) -> str:
    """Check what --arrival was given as far as that needs no file; returns it unchanged.

    Raises:
        UsageError: it is no kind of arrival.
    """
    name, colon, path = text.partition(":")
    known = text in ("poisson", "constant") or (name == "trace" and colon and path)
    if not known:
        raise UsageError(f"{text!r} is none of poisson, constant, trace:FILE (--arrival)")
    return text


@dataclass(frozen=True)
class Schedule:
    """All queries of a window, over all replicas.

    Attributes:
        due_ns: since the agreed instant, shape (n,), int64, ns, not decreasing.
        index: sample index of each, shape (n,), int64.
        replica: which replica serves it, shape (n,), int64.
        made: how it was drawn, as rank.json tells it.
    """

    due_ns: Offsets
    index: Order
    replica: NDArray[np.int64]
    made: dict[str, Any]


def schedule(
    load: Load,
    rules: Rules,
    *,
    duration_ns: int,
    num_queries: int | None,
    seed: int,
    model: str,
    total: int,
    resident: int,
    replicas: int,
) -> Schedule:
    """Draw the schedule of a window; every rank draws the same.

    Under the rules of a round its seeds are used, and its minimum duration and number of queries
    where nothing else was asked for, in LoadGen's own order; else ``seed`` stands for all of them.

    Args:
        load: what is offered.
        rules: of a round, or none.
        duration_ns: how long queries come, ns.
        num_queries: so many queries in place of a duration.
        seed: without rules.
        model: name of the model.
        total: sample indices are 0 .. total-1.
        resident: how many are in memory at once.
        replicas: among which the queries are divided.

    Raises:
        UsageError: the rate, the duration or the trace cannot be used, or a replica gets nothing.
    """
    round_ = rules.round
    # Streams of their own: the same one twice would tie what comes to when it comes.
    seeds = round_.seeds if round_ else Seeds(seed + 2, seed + 1, seed)
    variant, subset = (round_.variant, round_.subset) if round_ else (LEMIRE, WHOLE)
    known = [each for each in round_.models if each.name == model] if round_ else []
    equal_issue = bool(known and known[0].equal_issue)
    loaded = loadable_set(total, resident, seeds.qsl, variant, subset)
    least = num_queries or (MIN_QUERIES["server"] if round_ else 1)
    if round_:
        duration_ns = max(duration_ns, rules.shortened_ns or MIN_DURATION_NS)
    multiple = len(loaded) if equal_issue else 1
    due = _due(load, 0 if num_queries else duration_ns, least, seeds.schedule, multiple)
    due = due[:num_queries]
    index = sample_order(loaded, len(due), least, seeds.sample_index, variant, equal_issue)
    made = {
        "generator": GENERATORS[load.arrival.partition(":")[0]],
        "queries": len(due),
        "seed": seed,
        "round": rules.name,
        "variant": variant,
        "subset": subset,
        "equal_issue": equal_issue,
    }
    replica = _assigned(seed, replicas, len(due))
    drawn = b"".join(each.astype("<i8").tobytes() for each in (due, index, replica))
    made["digest"] = f"sha256:{hashlib.sha256(drawn).hexdigest()}"
    return Schedule(due, index, replica, made)


def _assigned(seed: int, replicas: int, queries: int) -> NDArray[np.int64]:
    """Draw which replica serves each query.

    Raises:
        UsageError: a replica gets nothing; every rank raises it.
    """
    drawn = np.random.default_rng([seed, replicas]).integers(0, replicas, queries)
    missing = sorted(set(range(replicas)) - set(drawn.tolist()))
    if missing:
        error = UsageError(
            f"{queries} queries leave replica {missing[0]} of {replicas} without any: give a "
            "longer --duration, a higher --target-qps or fewer ranks"
        )
        error.agreed = True
        raise error
    return drawn


def check_trace(load: Load, num_queries: int | None) -> None:
    """Refuse to cut or stretch a trace; all ranks see the same.

    Raises:
        UsageError: more queries are asked for than it has.
    """
    if num_queries is None or not load.arrival.startswith("trace:"):
        return
    there = len(trace_ns(Path(load.arrival.partition(":")[2])))
    if num_queries > there:
        error = UsageError(
            f"the trace has {there} queries, and --num-samples asks for {num_queries}: give fewer"
        )
        error.agreed = True
        raise error


def _due(load: Load, duration_ns: int, least: int, seed: int, multiple: int) -> Offsets:
    if load.arrival.startswith("trace:"):
        return trace_ns(Path(load.arrival.partition(":")[2]))
    if load.arrival == "constant":
        return constant_ns(load.target_qps, duration_ns, least, multiple)
    return poisson_ns(load.target_qps, duration_ns, least, seed, multiple)


def backlog_limit(load: Load, replicas: int, slowest_ns: int = 0) -> int:
    """Return how many queries of one replica may be due and not done before a window is given up.

    Args:
        load: what is offered.
        replicas: among which it is divided.
        slowest_ns: the longest group of the warm-up.
    """
    longest_ns = [slowest_ns, *(bound.limit_ns for bound in load.bounds)]
    seconds = max(BACKLOG_S, 4 * max(longest_ns) / 1e9)
    share = math.ceil(load.target_qps / replicas * seconds)
    return max(BACKLOG_LEAST, 2 * load.max_batch, share)
