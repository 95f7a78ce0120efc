"""Run -> verdict: the whole of result.json, from a run's records alone."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from distbench import metrics as m
from distbench.bounds import bounds_found, bounds_of
from distbench.checks import facts_found
from distbench.fabric_verdict import SCENARIO, collectives_result
from distbench.findings import Finding, status, worst_first
from distbench.floor_verdict import floor_figures, floor_found
from distbench.joined import driver_found, driver_section, worker_times
from distbench.laps import stragglers_found
from distbench.loadgen_verdict import (
    figures_of,
    gates_of,
    loadgen_found,
    official_of,
    rules_section,
)
from distbench.metrics import harness
from distbench.pool import Pool, facts, in_one_place
from distbench.ruling import bounds_table, marginal, ruled
from distbench.run import Run
from distbench.scenarios import scenario
from distbench.stages import stage_section
from distbench.times import Makespan, RankTimes, makespan, rank_times
from distbench.trust import measurement_found


def result(run: Run, pool: Pool | None = None) -> dict[str, Any]:
    """Judge a run: everything that stands in result.json, from the records alone.

    Args:
        run: of one window.
        pool: how to reach the samples; without it they are all in the records.

    Returns:
        The JSON-able result, keys in the order of the schema.
    """
    if run.scenario == SCENARIO:
        return collectives_result(run)
    pool = pool or in_one_place(run)
    found_of = pool.gather(facts)
    times = [rank_times(run, r, f) for r, f in zip(run.official, found_of, strict=True)]
    ranks = times if run.driver is None else worker_times(run)
    span = makespan(run, times)
    first = run.first.before
    figures = m.metrics(pool, times, span)
    found = findings(pool, times, span, figures, ranks)
    if official_of(run) is None:
        rules, gates = ruled(pool, times, span)
    else:
        figures, own = figures_of(run, figures) | floor_figures(run), loadgen_found(run)
        found += floor_found(run, figures)
        gates, found = gates_of(run, figures), found + own
        rules = rules_section(run, gates, facts_found(run, ranks) + driver_found(run) + own)
    tables = bounds_table(pool, times)
    staged, stages = stage_section(run, span)
    figures, tables = figures | staged, tables | stages
    found += marginal(gates, figures) + bounds_found(bounds_of(first), figures)
    found = worst_first(found)
    common, rest = common_and_rest([record.before["environment"] for record in run.workers])
    described = list(zip(run.workers, rest, strict=True))
    active = set(run.active)
    followers = [{"rank": r.rank, **own} for r, own in described if r.rank not in active]
    return {
        "schema_version": first["schema_version"],
        "scenario": run.scenario,
        "run_id": first["run_id"],
        "windows": [],
        "verdict": {
            "status": status(found),
            "rules": rules,
            "findings": [asdict(finding) for finding in found],
        },
        "metrics": figures,
        "per_rank": m.per_rank(run, ranks, span),
        "clock": m.clock_section(run, ranks, span) | {"driver": driver_section(run, times)},
        "start": m.start_section(run, ranks),
        "config": first["config"],
        "environment": {
            "common": common,
            "ranks": [own for record, own in described if record.rank in active],
        }
        | ({"followers": followers} if followers else {}),
        "harness": harness(run),
        "tables": tables,
        "window": window_section(run, times, span),
    }


def findings(
    pool: Pool,
    times: list[RankTimes],
    span: Makespan,
    figures: dict[str, dict[str, Any]],
    ranks: list[RankTimes],
) -> list[Finding]:
    """Return what is found of a run whatever it was asked to keep, worst first.

    Args:
        pool: its records.
        times: of all logs that time the samples.
        span: their makespan.
        figures: its metrics.
        ranks: times of all ranks; ``times`` without a driver.
    """
    run, headline = pool.run, scenario(pool.run.scenario).headline
    found = [Finding(**note) for record in run.left for note in record.before["findings"]]
    found += facts_found(run, ranks) + driver_found(run) + stragglers_found(run, ranks)
    if (official_of(run) or {}).get("mode") == "accuracy":  # which times nothing
        return worst_first(found)
    found += measurement_found(pool, times, span, figures)
    unknown = figures[headline]["reason"] if headline in figures else "no query completed"
    if headline not in figures or figures[headline]["value"] is None:
        found += _unknown(headline, unknown) * (status(found) == "VALID")
    return worst_first(found)


def _unknown(headline: str, reason: str) -> list[Finding]:
    return [
        Finding(
            "invalid",
            "headline-unknown",
            f"{headline} is unknown: {reason}",
            remedy="mend what the sentence names, and run again",
        )
    ]


def window_section(run: Run, times: list[RankTimes], span: Makespan) -> dict[str, Any]:
    """Return the ``window`` section: what was run, where, for how long."""
    first = run.first.before
    place = first.get("window") or {"number": None, "planned": None}
    return {
        "world_size": len(run.working),
        "hosts": sorted({record.host for record in run.workers}),
        "started_utc": first["started_utc"],
        "command": first["command"],
        "model": first["model"],
        "group": first["group"],
        "load": first.get("load"),
        "official": first.get("official"),
        "until": first.get("until"),
        "number": place["number"],
        "planned": place["planned"],
        "search": place.get("search"),
        "scaling": place.get("scaling"),
        "sharding": place.get("sharding"),
        "samples": sum(t.ok for t in times),
        "makespan_s": None if span.value_ns is None else span.value_ns / m.NS,
        "makespan_bound_s": None if span.bound_ns is None else span.bound_ns / m.NS,
        "makespan_reason": span.reason,
        "gpus": [
            {
                "rank": record.rank,
                "before": record.before.get("gpu_before"),
                "after": (record.after or {}).get("gpu_after"),
            }
            for record in run.workers
        ],
    }


def common_and_rest(
    descriptions: Sequence[dict[str, Any]],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Lift what is equal in all descriptions out of them, also from within their dicts.

    Args:
        descriptions: one a rank; not changed.

    Returns:
        What all have in common, and of each description what is left. Laid over each other, the
        two give the description again.

    Example:
        >>> common_and_rest([{"os": "x", "rank": 0}, {"os": "x", "rank": 1}])
        ({'os': 'x'}, [{'rank': 0}, {'rank': 1}])
    """
    common: dict[str, Any] = {}
    rest: list[dict[str, Any]] = [{} for _ in descriptions]
    for key in dict.fromkeys(key for each in descriptions for key in each):
        found = [each[key] for each in descriptions if key in each]
        everywhere = len(found) == len(descriptions)
        # As JSON, where 1, 1.0 and true differ.
        if everywhere and len({json.dumps(value, sort_keys=True) for value in found}) == 1:
            common[key] = found[0]
            continue
        if everywhere and all(isinstance(value, dict) for value in found):
            shared, found = common_and_rest(found)
            if shared:
                common[key] = shared
        left = iter(found)
        for each, its in zip(descriptions, rest, strict=True):
            if key in each and ((value := next(left)) != {} or key not in common):
                its[key] = value
    return common, rest
