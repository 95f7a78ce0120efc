"""MLPerf's gates as functions of what a window comes down to: what LoadGen would say of it.

What goes in are counts and order statistics, so that the same gates judge samples in one place and
samples that stay on their ranks. ``judged.py`` makes LoadGen's whole word of recorded latencies.
What comes out is ``WORDING``: a result of MLPerf needs the unmodified LoadGen, a submission and a
review. LoadGen's VALID says nothing of errors in its log; here errors are a gate.

Source: mlcommons/inference, loadgen/results.cc and logging.cc, in mlcommons-loadgen 5.0.13 and
6.0.17, which differ there only in labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from distbench.early_stopping import least_queries
from distbench.rules import Limits

WORDING = "MLPerf-style, unverified"
NS = 1e9


@dataclass(frozen=True)
class Gate:
    """One condition, as result.json has it.

    Attributes:
        name: of the gate.
        value: what was found, in ``unit``.
        limit: what it is held against.
        unit: SI, or "queries" or "samples".
        passed: whether it holds.
        needed: how many more queries would be needed at least; None if it passed, or if no number
            of queries tells.
    """

    name: str
    value: float
    limit: float
    unit: str
    passed: bool
    needed: int | None = None


@dataclass(frozen=True)
class Bounded:
    """A percentile that a scenario limits, and how it stands.

    Attributes:
        name: "latency", "ttft" or "tpot".
        value_ns: the percentile, by LoadGen's rule.
        limit_ns: what it may be at most.
        over: queries above the limit.
    """

    name: str
    value_ns: int
    limit_ns: int
    over: int


def offline_gates(last_ns: int, count: int, errors: int, limits: Limits) -> list[Gate]:
    """Return Offline's gates, which need no more of the samples than this.

    Args:
        last_ns: last completion since the start, ns.
        count: samples that completed.
        errors: samples that did not, and other errors of fact.
        limits: ``min_queries`` is of samples.
    """
    return [
        _duration(last_ns, limits),
        _at_least("min_samples", count, limits.min_queries, "samples"),
        _errors(errors),
    ]


def server_gates(
    last_ns: int, queries: int, errors: int, bounded: Sequence[Bounded], limits: Limits
) -> list[Gate]:
    """Return Server's gates.

    Args:
        last_ns: schedule of the last query since the start, ns.
        queries: how many completed.
        errors: samples that did not, and other errors of fact.
        bounded: the limited percentiles.
        limits: whose ``percentile`` the bounded ones are.
    """
    gates = [
        _duration(last_ns, limits),
        _at_least("min_queries", queries, limits.min_queries),
    ]
    for each in bounded:
        gates += _percentile(each, queries, limits.percentile)
    return [*gates, _errors(errors)]


def stream_gates(last_ns: int, queries: int, errors: int, limits: Limits) -> list[Gate]:
    """Return the gates of SingleStream and MultiStream.

    Args:
        last_ns: issue of the last query since the start, ns.
        queries: how many completed.
        errors: samples that did not, and other errors of fact.
        limits: of the scenario.
    """
    return [
        _duration(last_ns, limits),
        _at_least("min_queries", queries, limits.min_queries),
        # One slow query at least: with none to discard there is no estimate.
        _at_least("early_stopping", queries, least_queries(limits.percentile, 1)),
        _errors(errors),
    ]


def _percentile(bounded: Bounded, queries: int, percentile: float) -> list[Gate]:
    """Return the gates of one limited percentile: its value, and early stopping."""
    stopping = _at_least("early_stopping", queries, least_queries(percentile, bounded.over))
    if bounded.name != "latency":
        stopping = replace(stopping, name=f"early_stopping.{bounded.name}")
    value_ns, limit_ns = bounded.value_ns, bounded.limit_ns
    label = f"{bounded.name}.p{100 * percentile:.6g}"
    passed = value_ns <= limit_ns
    return [Gate(label, value_ns / NS, limit_ns / NS, "s", passed), stopping]


def _at_least(name: str, value: int, limit: int, unit: str = "queries") -> Gate:
    passed = value >= limit
    return Gate(name, value, limit, unit, passed, None if passed else limit - value)


def _duration(value_ns: int, limits: Limits) -> Gate:
    passed = value_ns >= limits.min_duration_ns
    return Gate("min_duration", value_ns / NS, limits.min_duration_ns / NS, "s", passed)


def _errors(errors: int) -> Gate:
    return Gate("errors", errors, 0, "samples", errors == 0)
