"""Run + --rules -> MLPerf's word on it: gates from recorded samples, and what they leave open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from distbench.bounds import Bound, bounds_of
from distbench.early_stopping import over_allowed
from distbench.findings import Finding
from distbench.gates import WORDING, Bounded, Gate, offline_gates, server_gates, stream_gates
from distbench.pool import Pool, series
from distbench.rounds import Tokens
from distbench.rules import Limits, Rules, limits, parse_rules
from distbench.run import RankRecord
from distbench.scenarios import scenario
from distbench.times import Makespan, RankTimes, since_start_ns


def ruled(
    pool: Pool, times: Sequence[RankTimes], span: Makespan
) -> tuple[dict[str, Any], list[Gate]]:
    """Judge a window by the rules that were asked for.

    Args:
        pool: how to reach the samples; every rank calls this, and makes the same calls of it.
        times: of all ranks.
        span: their makespan, which is Offline's largest latency on one clock.

    Returns:
        ``verdict.rules`` of result.json, and its gates.
    """
    before = pool.run.first.before
    rules = parse_rules(before.get("rules", "none"))
    if rules.round is None:
        return _section(rules, None, []), []
    limit = round_limits(rules, before)
    queries = sum(t.ok for t in times)
    halted = any((record.after or {}).get("halted") for record in pool.run.present)
    if span.value_ns is None or queries == 0 or halted:
        return _section(rules, "INVALID", []), []
    kind = scenario(before["scenario"])
    errors = sum(t.failed + t.pending + t.short for t in times)
    if kind.drained:
        gates = offline_gates(span.value_ns, queries, errors, limit)
    elif kind.stream:
        gates = _worst([_stream(t, limit) for t in times])
    else:
        last_ns = max(since_start_ns(t) for t in times)
        bounded, absent = _bounded(pool, times, limit)
        errors += queries * absent  # a limit on what the model does not have is kept by no query
        gates = server_gates(last_ns, queries, errors, bounded, limit)
    word = "SHORTENED" if limit.shortened else "VALID"
    return _section(rules, word if all(g.passed for g in gates) else "INVALID", gates), gates


def _stream(t: RankTimes, limit: Limits) -> list[Gate]:
    queries = t.series["latency"][0]
    return stream_gates(since_start_ns(t), queries, t.failed + t.pending + t.short, limit)


def _worst(replicas: Sequence[Sequence[Gate]]) -> list[Gate]:
    """Return of each gate the replica's that stands worst: each replica is a stream of its own."""
    return [
        min(same, key=lambda gate: (gate.passed, -gate.value if gate.limit == 0 else gate.value))
        for same in zip(*replicas, strict=True)
    ]


def _bounded(pool: Pool, times: Sequence[RankTimes], limit: Limits) -> tuple[list[Bounded], bool]:
    """Return the percentiles that a round limits, over all ranks, and whether one is absent."""
    named = {"latency": limit.latency_ns, "ttft": limit.ttft_ns, "tpot": limit.tpot_ns}
    found, absent = [], False
    for name, limit_ns in named.items():
        if limit_ns is None:
            continue
        n = sum(t.series[name][0] for t in times)
        if n == 0:
            absent = True
            continue
        (value_ns,) = pool.order(name, [int(n * limit.percentile)])
        over = pool.gather(partial(_over, name=name, limit_ns=limit_ns))
        found.append(Bounded(name, value_ns, limit_ns, sum(over)))
    return found, absent


def _over(record: RankRecord, name: str, limit_ns: int) -> int:
    return int((series(record, name) > limit_ns).sum())


def round_limits(rules: Rules, before: Mapping[str, Any]) -> Limits:
    """Return a round's limits for a run: of its model, or of a model that the round lacks."""
    model = before["model"]
    return limits_for(rules, before["scenario"], model["name"], model["total"], bounds_of(before))


def limits_for(
    rules: Rules, scenario: str, model: str, total: int, bounds: Sequence[Bound]
) -> Limits:
    """Return a round's limits before a run.

    Args:
        rules: of a round.
        scenario: its name.
        model: NAME[,key=value...]; the round may know NAME.
        total: samples of the model.
        bounds: the user's own; of a model that the round does not know, those on latency.p99, or
            on ttft.p99 and tpot.p99, are Server's limits.

    Raises:
        UsageError: the round has no such variant, or no limit for this model.
    """
    assert rules.round is not None
    name = model.partition(",")[0]
    known = name if name in [each.name for each in rules.round.models] else ""
    own = {each.series: each.limit_ns for each in bounds if each.label == "p99"}
    return limits(
        rules,
        scenario,
        known,
        interactive=rules.interactive,
        dataset_size=total,
        latency_ns=own.get("latency"),
        tokens=Tokens(own["ttft"], own["tpot"]) if {"ttft", "tpot"} <= own.keys() else None,
    )


BOUND_COLUMNS = (
    ("bound", "", "metric that --latency-bound limits"),
    ("limit", "s", "what it may be at most"),
    ("queries", "queries", "that completed and have this time"),
    ("over", "queries", "of these, above the limit"),
    ("allowed", "queries", "how many may be for early stopping to pass; null: too few queries"),
)


def bounds_table(pool: Pool, times: Sequence[RankTimes]) -> dict[str, Any]:
    """Return the table ``bounds``: how many queries were above each limit of the user's own.

    Args:
        pool: how to reach the samples; every rank calls this, and makes the same calls of it.
        times: of all ranks.

    Returns:
        Empty without bounds.
    """
    bounds, kind = bounds_of(pool.run.first.before), scenario(pool.run.scenario)
    rows: list[list[Any]] = []
    for each in bounds:
        queries = sum(t.series[each.series][0] for t in times if each.series in t.series)
        over = 0
        if each.series in kind.series:
            over = sum(pool.gather(partial(_over, name=each.series, limit_ns=each.limit_ns)))
        allowed = over_allowed(queries, each.quantile) if queries else None
        rows.append([each.metric, each.limit_ns / 1e9, queries, over, allowed])
    return {"bounds": table(BOUND_COLUMNS, rows)} if rows else {}


def table(columns: Sequence[tuple[str, str, str]], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Return a table as result.json has it.

    Args:
        columns: name, unit and definition of each.
        rows: with a value for each column.
    """
    named = [dict(zip(("name", "unit", "definition"), each, strict=True)) for each in columns]
    return {"columns": named, "rows": [list(row) for row in rows]}


def _section(rules: Rules, word: str | None, gates: Sequence[Gate]) -> dict[str, Any]:
    return {
        "set": rules.name,
        "source": "native",
        "wording": None if word is None else WORDING,
        "shortened": rules.shortened_ns is not None,
        "result": word,
        "gates": [asdict(gate) for gate in gates],
    }


def marginal(gates: Sequence[Gate], metrics: Mapping[str, Mapping[str, Any]]) -> list[Finding]:
    """Return the findings that a percentile passed its gate and its interval does not.

    Early stopping asks whether this run could be luck; the interval, which knows of the memory
    between samples that early stopping does not, says what another run may show.

    Args:
        gates: those named as a metric, such as "latency.p99", are looked at.
        metrics: of the run.
    """
    return [
        Finding(
            "doubtful",
            "rules-marginal",
            f"{gate.name} passes at {gate.value:.6g} s, but its 95 % interval reaches "
            f"{metrics[gate.name]['ci_high']:.6g} s and the limit is {gate.limit:.6g} s: a repeat "
            "may fail",
            value=metrics[gate.name]["ci_high"],
            limit=gate.limit,
            remedy="lower the rate a little, or run longer to narrow the interval",
        )
        for gate in gates
        if gate.passed
        and gate.name in metrics
        and metrics[gate.name]["ci_high"] is not None
        and metrics[gate.name]["ci_high"] > gate.limit
    ]
