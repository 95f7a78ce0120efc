"""What LoadGen and dispatch cost alone: a short run of LoadGen's with replicas that do nothing.

It is taken after an official run, when what that left is on disk, by the same processes over the
same links, and its logs are read and not kept. What of the official run is less than ``NEAR``
times as long tells of the harness as much as of the system.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distbench.clock import Now
from distbench.dispatch import COLUMNS, Hub
from distbench.loadgen import Session, start_test
from distbench.mllog import read_detail
from distbench.rounds import MS, SAMPLES_PER_QUERY
from distbench.samples import SampleLog
from distbench.user_conf import SCENARIOS

NEAR = 10.0
SHARE, LEAST_NS, MOST_NS = 0.01, 200 * MS, 6_000 * MS
"""It lasts a hundredth of the official run's least duration, within these: 6 s beside 600 s."""
QPS = (100.0, 10_000.0)
"""Server's own rate within these: of fewer queries no percentile could be told, and of more LoadGen
itself would be what is measured."""
OFFLINE_SAMPLES = 100_000
QUERIES = 100
EXPECTED_NS = 20_000
"""Of a stream's query: shorter than any is, so that LoadGen does not run out of queries."""


@dataclass(frozen=True)
class Plan:
    """What is asked of LoadGen.

    Attributes:
        duration_ns: at least.
        qps: of Server; 0 of other scenarios.
        capacity: samples at most.
    """

    duration_ns: int
    qps: float
    capacity: int


def planned(official: Mapping[str, Any]) -> Plan:
    """Return the plan, which follows from that of the official run.

    Args:
        official: from ``official.settled``.
    """
    scenario = official["scenario"]
    duration_ns = int(min(max(official["min_duration_ns"] * SHARE, LEAST_NS), MOST_NS))
    if scenario == "offline":
        return Plan(duration_ns, 0.0, min(OFFLINE_SAMPLES, official["capacity"]))
    if scenario == "server":
        qps = min(max(official["target_qps"], QPS[0]), QPS[1])
        return Plan(duration_ns, qps, 2 * int(qps * duration_ns / 1e9) + 20 * QUERIES)
    queries = 3 * duration_ns // EXPECTED_NS + QUERIES
    return Plan(duration_ns, 0.0, queries * (SAMPLES_PER_QUERY if scenario[0] == "m" else 1))


def run_floor(
    hub: Hub, official: Mapping[str, Any], now: Now, fail: Callable[[Exception], None]
) -> dict[str, Any]:
    """Take the run, in the driver process.

    Args:
        hub: the links to the replicas, which serve what does nothing.
        official: from ``official.settled``.
        now: the clock.
        fail: called when it cannot go on; does not return.

    Returns:
        ``duration_ns``, ``qps``, and ``keys`` of LoadGen's detail log that are numbers; or the
        ``problem``.
    """
    plan = planned(official)
    log = SampleLog.in_memory(plan.capacity, COLUMNS)
    log.served_by[:] = -1
    session = Session(hub, log, 0, now, fail, False)
    with tempfile.TemporaryDirectory(prefix="distbench-floor-") as name:
        folder = Path(name)
        start_test(session, _settings(session.lg, official, plan), official, folder)
        session.leave()
        found = read_detail(folder)
    if found.errors:
        return {"problem": f"LoadGen logged {found.errors[0]}"}
    keys = {key: value for key, value in found.keys.items() if isinstance(value, int | float)}
    told = {key: value for key, value in keys.items() if key.startswith("result_")}
    return {"duration_ns": plan.duration_ns, "qps": plan.qps, "keys": told}


def _settings(lg: Any, official: Mapping[str, Any], plan: Plan) -> Any:
    kind, seeds = SCENARIOS[official["scenario"]], official["seeds"]
    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, kind)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = plan.duration_ns // MS
    settings.min_query_count = QUERIES
    settings.qsl_rng_seed = seeds["qsl"]
    settings.sample_index_rng_seed = seeds["sample_index"]
    settings.schedule_rng_seed = seeds["schedule"]
    if kind == "Server":
        settings.server_target_qps = plan.qps
    elif kind == "Offline":
        settings.min_query_count = plan.capacity
        settings.offline_expected_qps = 1.0
    elif kind == "SingleStream":
        settings.single_stream_expected_latency_ns = EXPECTED_NS
    else:
        settings.multi_stream_expected_latency_ns = EXPECTED_NS
        settings.multi_stream_samples_per_query = SAMPLES_PER_QUERY
    return settings
