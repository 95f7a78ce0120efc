"""What each scenario measures, as data: its headline, and which times make up a latency.

A figure of one scenario means nothing in another: Offline's latencies are places in one queue that
is drained, Server's are waits of users, those of the streams are service alone. So every part that
judges or reports asks here, and an unknown scenario is refused, never judged as another.
"""

from __future__ import annotations

from dataclasses import dataclass

from distbench.cli import nearest
from distbench.errors import UsageError


@dataclass(frozen=True)
class Scenario:
    """What a scenario measures.

    Attributes:
        name: as it stands in a result.
        headline: name of the metric that is judged where the user bounds nothing.
        series: definitions of its series of times, by name; ``latency`` is one of them.
        drained: whether all samples are scheduled at one instant, so that a latency tells a place
            in a queue.
        stream: whether a query is issued when the one before has ended, so that latency counts from
            the issue.
        percentile: of the headline, where it is one of latencies, else 0; it is MLPerf's.
    """

    name: str
    headline: str
    series: dict[str, str]
    drained: bool = False
    stream: bool = False
    percentile: float = 0.0

    @property
    def open_loop(self) -> bool:
        """Whether queries come by a schedule, whatever became of those before."""
        return not self.drained and not self.stream


DEVICE = "device time between two events, per group"
ENGINE = "engine's end - engine's start, per {}"
TOKENS = {
    "tpot": "(completion - first token) / (tokens - 1), per query, cut to ns as LoadGen does",
    "gap": "between one token and the next of a query",
}
STREAM = {
    "latency": "completion - issue, per query",
    "service": ENGINE.format("query"),
    "device": DEVICE,
    "ttft": "first token - issue, per query",
    **TOKENS,
}

SCENARIOS = {
    each.name: each
    for each in (
        Scenario(
            "offline",
            "throughput",
            {
                "latency": "completion - agreed instant, per sample",
                "batch_latency": "completion - issue, per group",
                "service": ENGINE.format("group"),
                "device": DEVICE,
                **TOKENS,
            },
            drained=True,
        ),
        Scenario(
            "server",
            "latency.p99",
            {
                "latency": "completion - scheduled, per query",
                "batch_latency": "completion - issue, per group",
                "lateness": "issue - ready, per query: by how much the harness was late",
                "queue": "(ready - scheduled) + (engine's start - issue), per query",
                "service": ENGINE.format("query"),
                "return": "completion - engine's end, per query",
                "device": DEVICE,
                "ttft": "first token - scheduled, per query",
                **TOKENS,
            },
            percentile=0.99,
        ),
        Scenario("singlestream", "latency.p90", STREAM, stream=True, percentile=0.9),
        Scenario("multistream", "latency.p99", STREAM, stream=True, percentile=0.99),
    )
}


CENTRAL = {
    "latency": "completion message - scheduled, per query, on the driver's clock",
    "batch_latency": "completion - issue, per group, on its rank's clock",
    "lateness": "issue - scheduled on the driver + issue - ready on the rank, per query: by how "
    "much the harness was late",
    "queue": "engine's start - driver's issue - lateness of the rank, per query, by the clocks",
    "service": "engine's end - engine's start, per query, on its rank's clock",
    "return": "completion message - engine's end, per query, by the clocks: the rest",
}
"""What Server's series are under central dispatch, where a query meets two clocks."""


OFFICIAL = {
    "latency": "completion message - LoadGen's issue, per sample, on the driver's clock",
    "lateness": "issue - ready on the rank, per sample: by how much the rank's loop was late",
}
"""What these are where LoadGen drives, which tells nobody when a query was due."""


def series_of(kind: Scenario, driven: bool, official: bool = False) -> dict[str, str]:
    """Return definitions of a run's series of times, by name.

    Args:
        kind: the scenario.
        driven: whether a driver issued.
        official: whether that was LoadGen.
    """
    return kind.series | (CENTRAL if driven else {}) | (OFFICIAL if official else {})


def scenario(name: str) -> Scenario:
    """Return what a scenario measures.

    Raises:
        UsageError: there is no such scenario.
    """
    if name not in SCENARIOS:
        raise UsageError(
            f"scenario {name!r} is none of {', '.join(SCENARIOS)}{nearest(name, [*SCENARIOS])}: it "
            "was measured by another version of distbench"
        )
    return SCENARIOS[name]
