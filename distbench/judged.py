"""LoadGen's whole word on recorded latencies: gates, headline, percentiles, further figures.

Each ``judge_`` function takes the latencies of one window, all in one place, and the limits. The
tests hold it against LoadGen itself on the latencies that LoadGen recorded; a run's own gates come
from ``gates`` by the same functions.

Latencies count from the scheduled instant: Server's own, Offline's start of the run, in the streams
the instant of issue.

Source: mlcommons/inference, loadgen/results.cc and logging.cc, in mlcommons-loadgen 5.0.13 and
6.0.17, which differ there only in labels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distbench.early_stopping import over_allowed
from distbench.gates import NS, Bounded, Gate, offline_gates, server_gates, stream_gates
from distbench.quantiles import percentiles_ns
from distbench.rounds import SAMPLES_PER_QUERY
from distbench.rules import Limits

Times = NDArray[np.int64]

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p97": 0.97, "p99": 0.99, "p99.9": 0.999}
"""What LoadGen prints of every set of latencies."""
STREAM_PERCENTILE = 0.99
"""SingleStream's second estimate, from which edge submissions infer MultiStream."""


@dataclass(frozen=True)
class Spread:
    """What LoadGen prints of a set of latencies.

    Attributes:
        count: how many.
        min_ns: shortest, ns.
        max_ns: longest, ns.
        mean_ns: sum over count, cut to whole ns.
        quantiles_ns: by the names of ``QUANTILES``, ns.
    """

    count: int
    min_ns: int
    max_ns: int
    mean_ns: int
    quantiles_ns: dict[str, int]


@dataclass(frozen=True)
class Judged:
    """What the rules say of one window.

    Attributes:
        scenario: "offline", "server", "singlestream" or "multistream".
        result: "VALID", "INVALID", or "SHORTENED": all gates passed, the round's duration was not.
        gates: each one.
        headline: LoadGen's name of the figure that is published.
        value: that figure; None where it does not exist.
        unit: its unit.
        spreads: of "latency", and where they exist of "query_latency", "ttft" and "tpot".
        figures: further figures by LoadGen's names: rates in 1/s, estimates in ns, counts.
    """

    scenario: str
    result: str
    gates: tuple[Gate, ...]
    headline: str
    value: float | None
    unit: str
    spreads: dict[str, Spread]
    figures: dict[str, float]


def spread(latency_ns: Times) -> Spread:
    """Return LoadGen's statistics of latencies.

    Args:
        latency_ns: shape (n,), int64, ns; n at least 1.

    Raises:
        ValueError: there are none.
    """
    found = percentiles_ns(latency_ns, list(QUANTILES.values()))
    return Spread(
        count=len(latency_ns),
        min_ns=int(latency_ns.min()),
        max_ns=int(latency_ns.max()),
        mean_ns=int(latency_ns.sum()) // len(latency_ns),
        quantiles_ns=dict(zip(QUANTILES, found, strict=True)),
    )


def judge_offline(
    latency_ns: Times, limits: Limits, errors: int = 0, tokens: Times | None = None
) -> Judged:
    """Judge an Offline run.

    Args:
        latency_ns: completion of each sample since the start, shape (n,), int64, ns.
        limits: ``min_queries`` is of samples.
        errors: samples that failed, and other errors of fact.
        tokens: output tokens of each sample, shape (n,), of a token model.

    Raises:
        ValueError: there are no samples.
    """
    found = spread(latency_ns)
    figures: dict[str, float] = {}
    headline, unit = "result_samples_per_second", "samples/s"
    _rate(figures, headline, found.count, found.max_ns)
    if tokens is not None:
        headline, unit = "result_tokens_per_second", "tokens/s"
        _rate(figures, headline, _counted(tokens), found.max_ns)
        errors += int((tokens < 2).sum())
    gates = offline_gates(found.max_ns, found.count, errors, limits)
    return _judged("offline", gates, limits, headline, unit, {"latency": found}, figures)


def judge_server(scheduled_ns: Times, latency_ns: Times, limits: Limits, errors: int = 0) -> Judged:
    """Judge a Server run with one limit on latency.

    Args:
        scheduled_ns: offsets of the queries from the start, in order of issue, shape (n,), ns.
        latency_ns: completion minus scheduled, in the same order, shape (n,), ns.
        limits: with ``latency_ns``.
        errors: samples that failed, and other errors of fact.

    Raises:
        ValueError: there are no queries, or no limit.
    """
    if limits.latency_ns is None:
        raise ValueError("Server needs a latency limit")
    found = spread(latency_ns)
    bounded = [_bounded("latency", latency_ns, limits.latency_ns, limits.percentile)]
    gates = server_gates(int(scheduled_ns[-1]), found.count, errors, bounded, limits)
    figures = _rates(scheduled_ns, latency_ns)
    figures["result_overlatency_query_count"] = int((latency_ns > limits.latency_ns).sum())
    headline = "result_completed_samples_per_sec"
    return _judged("server", gates, limits, headline, "samples/s", {"latency": found}, figures)


def judge_tokens(
    scheduled_ns: Times,
    latency_ns: Times,
    ttft_ns: Times,
    tokens: Times,
    limits: Limits,
    errors: int = 0,
) -> Judged:
    """Judge a Server run of a token model, interactive or not: limits on TTFT and TPOT.

    LoadGen writes an error for a sample of fewer than two tokens, or without a first one, and
    nevertheless says VALID; here the gate "errors" counts these.

    Args:
        scheduled_ns: offsets of the queries from the start, in order of issue, shape (n,), ns.
        latency_ns: last token minus scheduled, in the same order, shape (n,), ns.
        ttft_ns: first token minus scheduled, shape (n,), ns; negative: there was none.
        tokens: output tokens, the first one included, shape (n,).
        limits: with ``ttft_ns`` and ``tpot_ns``.
        errors: samples that failed, and other errors of fact.

    Raises:
        ValueError: there are no queries, or a limit is missing.
    """
    if limits.ttft_ns is None or limits.tpot_ns is None:
        raise ValueError("a token model needs limits on TTFT and TPOT")
    tpot_ns = time_per_token_ns(latency_ns, ttft_ns, tokens)
    found = spread(latency_ns)
    bounded = [
        _bounded("ttft", ttft_ns, limits.ttft_ns, limits.percentile),
        _bounded("tpot", tpot_ns, limits.tpot_ns, limits.percentile),
    ]
    errors += int(((tokens < 2) | (ttft_ns < 0)).sum())
    gates = server_gates(int(scheduled_ns[-1]), found.count, errors, bounded, limits)
    figures = _rates(scheduled_ns, latency_ns)
    headline = "result_completed_tokens_per_second"
    figures[headline] = _counted(tokens) / (int(scheduled_ns[-1] + latency_ns[-1]) / NS)
    spreads = {"latency": found, "ttft": spread(ttft_ns), "tpot": spread(tpot_ns)}
    return _judged("server", gates, limits, headline, "tokens/s", spreads, figures)


def time_per_token_ns(latency_ns: Times, ttft_ns: Times, tokens: Times) -> Times:
    """Return LoadGen's time per output token after the first: whole ns, cut towards 0.

    Fewer than two tokens count as none, as there, and give a negative time.
    """
    divisor = np.where(tokens > 1, tokens, 0) - 1
    after = latency_ns - ttft_ns
    cut: Times = np.abs(after) // np.abs(divisor)
    return np.where((after < 0) == (divisor < 0), cut, -cut)


def _counted(tokens: Times) -> int:
    """Return LoadGen's number of tokens: samples that it finds at fault have none."""
    return int(tokens[tokens > 1].sum())


def judge_single_stream(
    issued_ns: Times, latency_ns: Times, limits: Limits, errors: int = 0
) -> Judged:
    """Judge a SingleStream run.

    Args:
        issued_ns: when each query was issued, from the start, shape (n,), ns.
        latency_ns: completion minus issue, in the same order, shape (n,), ns.
        limits: of the scenario.
        errors: samples that failed, and other errors of fact.

    Raises:
        ValueError: there are no queries.
    """
    found = spread(latency_ns)
    headline = "early_stopping_latency_ss"
    gates, figures = _stream(issued_ns, latency_ns, limits, errors, headline)
    estimate = stream_estimate_ns(latency_ns, STREAM_PERCENTILE)
    if headline in figures and estimate is not None:
        figures["early_stopping_latency_ms"] = estimate
    _rate(figures, "result_qps_with_loadgen_overhead", found.count - 1, int(issued_ns[-1]))
    _rate(figures, "result_qps_without_loadgen_overhead", 1, found.mean_ns)
    return _judged("singlestream", gates, limits, headline, "s", {"latency": found}, figures)


def judge_multi_stream(
    issued_ns: Times, latency_ns: Times, limits: Limits, errors: int = 0
) -> Judged:
    """Judge a MultiStream run. A query's latency is that of its last sample.

    Args:
        issued_ns: when each query was issued, from the start, shape (n,), ns.
        latency_ns: completion minus issue of each sample, shape (n, samples per query), ns.
        limits: of the scenario.
        errors: samples that failed, and other errors of fact.

    Raises:
        ValueError: there are no queries, or they do not have ``SAMPLES_PER_QUERY`` samples.
    """
    if latency_ns.ndim != 2 or latency_ns.shape[1] != SAMPLES_PER_QUERY:
        raise ValueError(f"MultiStream latencies of shape {latency_ns.shape}")
    query_ns = latency_ns.max(axis=1)
    headline = "early_stopping_latency_ms"
    gates, figures = _stream(issued_ns, query_ns, limits, errors, headline)
    spreads = {"latency": spread(latency_ns.reshape(-1)), "query_latency": spread(query_ns)}
    return _judged("multistream", gates, limits, headline, "s", spreads, figures)


def stream_estimate_ns(latency_ns: Times, percentile: float) -> int | None:
    """Return early stopping's estimate of a percentile, ns; None with too few queries.

    With n queries and t the number of slow ones that n allows, t - 1 of the longest are discarded
    and the longest of the others stands for the percentile.

    Args:
        latency_ns: shape (n,), int64, ns.
        percentile: in (0, 1).
    """
    allowed = over_allowed(len(latency_ns), percentile)
    if not allowed:
        return None
    place = len(latency_ns) - allowed
    return int(np.partition(latency_ns, place)[place])


# What the scenarios share


def _bounded(name: str, latency_ns: Times, limit_ns: int, percentile: float) -> Bounded:
    value_ns = percentiles_ns(latency_ns, [percentile])[0]
    return Bounded(name, value_ns, limit_ns, int((latency_ns > limit_ns).sum()))


def _stream(
    issued_ns: Times, latency_ns: Times, limits: Limits, errors: int, name: str
) -> tuple[list[Gate], dict[str, float]]:
    """Return the gates of a stream, and its estimate by LoadGen's name, in ns, if there is one.

    LoadGen prints 0 where there are too few queries.
    """
    estimate = stream_estimate_ns(latency_ns, limits.percentile)
    gates = stream_gates(int(issued_ns[-1]), len(latency_ns), errors, limits)
    return gates, {} if estimate is None else {name: estimate}


def _rates(scheduled_ns: Times, latency_ns: Times) -> dict[str, float]:
    """Return Server's rates: of all queries but the last, up to its schedule and completion."""
    figures: dict[str, float] = {}
    more, last_ns = len(latency_ns) - 1, int(scheduled_ns[-1])
    _rate(figures, "result_scheduled_samples_per_sec", more, last_ns)
    _rate(figures, "result_completed_samples_per_sec", more, last_ns + int(latency_ns[-1]))
    return figures


def _rate(figures: dict[str, float], name: str, count: int, time_ns: int) -> None:
    """Add a rate, 1/s, where there is one: LoadGen divides by 0 for a single query."""
    if time_ns > 0:
        figures[name] = count / (time_ns / NS)


def _judged(
    scenario: str,
    gates: Sequence[Gate],
    limits: Limits,
    headline: str,
    unit: str,
    spreads: dict[str, Spread],
    figures: dict[str, float],
) -> Judged:
    result = "SHORTENED" if limits.shortened else "VALID"
    if not all(gate.passed for gate in gates):
        result = "INVALID"
    value = figures.get(headline)
    if value is not None and unit == "s":
        value /= NS
    return Judged(scenario, result, tuple(gates), headline, value, unit, spreads, figures)
