"""Run + --rules -> MLPerf's word on it: gates from recorded samples, and what they leave open."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from distbench.findings import Finding
from distbench.gates import WORDING, Gate, offline_gates
from distbench.rules import Limits, Rules, limits, parse_rules
from distbench.times import Makespan, RankTimes


def ruled(
    before: Mapping[str, Any], times: Sequence[RankTimes], span: Makespan
) -> tuple[dict[str, Any], list[Gate]]:
    """Judge an Offline window by the rules that were asked for.

    Args:
        before: rank.json of a rank, whose ``rules``, ``scenario`` and ``model`` count.
        times: of all ranks.
        span: their makespan, which is Offline's largest latency on one clock.

    Returns:
        ``verdict.rules`` of result.json, and its gates.
    """
    rules = parse_rules(before.get("rules", "none"))
    if rules.round is None:
        return _section(rules, None, []), []
    limit = round_limits(rules, before)
    if span.value_ns is None:
        return _section(rules, "INVALID", []), []
    errors = sum(t.failed + t.pending for t in times)
    gates = offline_gates(span.value_ns, sum(t.ok for t in times), errors, limit)
    word = "SHORTENED" if limit.shortened else "VALID"
    return _section(rules, word if all(g.passed for g in gates) else "INVALID", gates), gates


def round_limits(rules: Rules, before: Mapping[str, Any]) -> Limits:
    """Return a round's limits for a run: of its model, or of a model that the round lacks."""
    assert rules.round is not None
    name = before["model"]["name"].partition(",")[0]
    known = name if name in [model.name for model in rules.round.models] else ""
    return limits(rules, before["scenario"], known, dataset_size=before["model"]["total"])


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
