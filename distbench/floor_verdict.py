"""What LoadGen and dispatch cost alone, beside an official run, and which figures are near it.

A percentile below ``floor.NEAR`` times the floor's own, or an Offline rate above that part of the
floor's, tells of the harness as much as of the system.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distbench.errors import DRIVER
from distbench.findings import Finding
from distbench.floor import NEAR
from distbench.loadgen_verdict import QUERIES, RATES, SERIES, official_of, taken
from distbench.loadgen_verdict import series as series_of
from distbench.metrics import QUANTILES, metric
from distbench.run import Run

BEYOND = 5
"""Queries that must lie beyond a percentile of the floor: 500 for its p99."""
ALONE = ("latency", "ttft")
"""Series that begin with a sample's way to a replica; a TPOT is a difference without it."""


def floor_of(run: Run) -> dict[str, Any] | None:
    """Return what was recorded of the floor; None where none was measured."""
    found: dict[str, Any] | None = (run.first.after or {}).get("floor")
    return found


def floor_figures(run: Run) -> dict[str, dict[str, Any]]:
    """Return the floor's metrics; none of a run beside which none was measured."""
    floor = floor_of(run)
    if floor is None:
        return {}
    keys, why = floor.get("keys", {}), floor.get("problem", "LoadGen's log has it not")
    if run.scenario == "offline":
        key = RATES["offline"]["throughput"]
        return _alone({"floor.throughput": taken(keys, key, "samples/s", 1, why, 1.0)})
    n = int(keys.get("result_query_count", 0))
    named = QUERIES if run.scenario == "multistream" else SERIES["latency"]
    figures = _alone(series_of(keys, "floor.latency", n, why, named))
    for label, p in QUANTILES.items():
        if 0 < n * (1 - p) < BEYOND:
            told = figures[f"floor.latency.{label}"]
            figures[f"floor.latency.{label}"] = metric(
                None, "s", n, told["definition"], reason=f"{n} queries tell no {label}"
            )
    return figures


def _alone(figures: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    reason = "it was measured once, beside the run"
    for each in figures.values():
        each["definition"] += ", with replicas that do nothing"
        each["reason"] = reason if each["value"] is not None else each["reason"]
    return figures


def near_floor(metrics: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    """Tell whether a percentile is less than ``NEAR`` times the floor's.

    Args:
        metrics: of result.json.
        name: such as "latency.p99".
    """
    series, _, label = name.partition(".")
    floor, found = metrics.get(f"floor.latency.{label}"), metrics.get(name)
    if series not in ALONE or floor is None or found is None:
        return False
    known = floor["value"] is not None and found["value"] is not None
    return bool(known and found["value"] < NEAR * floor["value"])


def _times(metrics: Mapping[str, Mapping[str, Any]], name: str) -> float:
    floor = metrics[f"floor.latency.{name.partition('.')[2]}"]
    return float(metrics[name]["value"] / floor["value"])


def floor_found(run: Run, metrics: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Return what there is to find: figures near the floor, or that it is not known."""
    floor, official = floor_of(run), official_of(run)
    if floor is None or official is None or run.driver is None:
        return []
    host = run.driver.host
    if "problem" in floor:
        return [
            Finding(
                "doubtful",
                "floor-unknown",
                f"what LoadGen and dispatch cost alone is not known: {floor['problem']}",
                DRIVER,
                host,
                remedy="run again",
            )
        ]
    near = [f"{s}.{x}" for s in ALONE for x in QUANTILES if near_floor(metrics, f"{s}.{x}")]
    times = [_times(metrics, name) for name in near]
    if run.scenario == "offline":
        rate, most = metrics["throughput"]["value"], metrics["floor.throughput"]["value"]
        if rate and most and most < NEAR * rate:
            near, times = ["throughput"], [most / rate]
    if not near:
        return []
    return [
        Finding(
            "doubtful",
            "near-floor",
            f"{', '.join(near)}: less than {NEAR:g} times what LoadGen and dispatch cost alone, "
            f"down to {min(times):.3g} times",
            DRIVER,
            host,
            min(times),
            NEAR,
            "read these figures as the system's and the harness's together",
        )
    ]
