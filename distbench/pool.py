"""The samples of all ranks, wherever they lie: one rank's facts, and order statistics over all.

Figures are made of two operations: a function of one rank's record, gathered; and the k-th smallest
of a series over all ranks. Where all samples are in one place both are plain numpy; where they stay
on their ranks every rank runs the same judgement and the two are collectives. The figures are equal
to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench.bounds import Bound
from distbench.judged import stream_estimate_ns
from distbench.laps import laps
from distbench.quantiles import percentiles_ns
from distbench.run import RankRecord, Run
from distbench.samples import FAILED, PENDING
from distbench.scenarios import Scenario, scenario, series_of
from distbench.times import possible

Series = NDArray[np.int64]
NONE = 2**63 - 1
"""Stands for a time that a query does not have, in arrays of all queries."""
OWN = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
"""Percentiles of a rank's own latencies that stand in its row."""


@dataclass(frozen=True)
class Pool:
    """How a judgement reaches the samples of all ranks.

    Attributes:
        run: its records.
        gather: takes a function of a record, returns its JSON-able value for each record of
            ``run.official``, in order.
        order: takes a series' name and zero-based positions in the sorted series over all ranks,
            returns the values there.
    """

    run: Run
    gather: Callable[[Callable[[RankRecord], Any]], list[Any]]
    order: Callable[[str, Sequence[int]], list[int]]


def in_one_place(run: Run) -> Pool:
    """Return the pool of a run whose samples are all in its records."""
    from distbench.joined import official  # noqa: PLC0415  which joins what this module reads

    records, ordered = official(run), dict[str, Series]()

    def order(name: str, places: Sequence[int]) -> list[int]:
        if name not in ordered:
            parts = [series(record, name) for record in records]
            ordered[name] = np.sort(np.concatenate(parts))
        return [int(ordered[name][place]) for place in places]

    return Pool(run, lambda fact: [fact(record) for record in records], order)


def series(record: RankRecord, name: str) -> Series:
    """Return one rank's series in the order of its samples; int64, ns.

    Args:
        record: of the rank; a record without samples gives an empty series.
        name: one of its scenario's; see ``scenarios``.
    """
    return record.made[name] if name in record.made else _SERIES[name](record)


def _kind(record: RankRecord) -> Scenario:
    return scenario(record.before["scenario"])


def _latency(record: RankRecord) -> Series:
    if _kind(record).stream:
        return np.asarray(record.first_rows("completed") - record.first_rows("issued"))
    return _per_sample(record, "scheduled", "completed")


def _batch_latency(record: RankRecord) -> Series:
    return np.asarray(record.first_rows("completed") - record.first_rows("issued"))


def _service(record: RankRecord) -> Series:
    if _kind(record).open_loop:
        return _per_sample(record, "started", "finished")
    started, finished = record.first_rows("started"), record.first_rows("finished")
    true = possible(record.first_rows, started)
    return np.asarray(finished[true] - started[true])


def _contradicting(record: RankRecord) -> int:
    """Count the ended groups whose stamps by the engine are there and cannot be true."""
    started, finished = record.first_rows("started"), record.first_rows("finished")
    untrue = 0
    if len(started) and len(finished):
        stamped = (started != 0) & (finished != 0)
        untrue = int((stamped & ~possible(record.first_rows, started)).sum())
    good = record.column("completed") >= 0
    if "tokens" not in record.before["columns"]:
        return untrue
    return untrue + int(((record.column("tokens")[good] > 0) & ~_possible_tokens(record)).sum())


def _possible_tokens(record: RankRecord) -> NDArray[np.bool_]:
    """Tell of every sample that completed whether its tokens have stamps that can be true.

    issued <= first token <= ... <= last token <= completed.
    """
    good = record.column("completed") >= 0
    first, completed = record.column("first_token")[good], record.column("completed")[good]
    true = (record.column("issued")[good] <= first) & (first <= completed) & (first != 0)
    if record.token_ns is None or not good.any():
        return np.asarray(true)
    stamps, tokens = record.token_ns[good], record.column("tokens")[good]
    inside = np.arange(stamps.shape[1] - 1) < tokens[:, None] - 1
    ordered = ((np.diff(stamps, axis=1) >= 0) | ~inside).all(axis=1)
    last = stamps[np.arange(len(stamps)), np.clip(tokens, 1, stamps.shape[1]) - 1]
    return np.asarray(true & ordered & (last <= completed) & (stamps[:, 0] == first))


def _lateness(record: RankRecord) -> Series:
    return _per_sample(record, "ready", "issued")


def _queue(record: RankRecord) -> Series:
    handed = _per_sample(record, "issued", "started")
    if len(handed) == 0:
        return handed
    return _per_sample(record, "scheduled", "ready")[_known(record, "started")] + handed


def _return(record: RankRecord) -> Series:
    return _per_sample(record, "finished", "completed")


def _in_time(record: RankRecord) -> Series:
    """Return what the latencies would have been if the harness had issued every query at once."""
    return _latency(record) - _lateness(record)


def _ttft_in_time(record: RankRecord) -> Series:
    every = of_every_query(record, "ttft")
    return (every - _lateness(record))[every < NONE]


def _device(record: RankRecord) -> Series:
    device = record.first_rows("device")
    return np.asarray(device[device > 0])


def _ttft(record: RankRecord) -> Series:
    every = of_every_query(record, "ttft")
    return every[every < NONE]


def _tpot(record: RankRecord) -> Series:
    every = of_every_query(record, "tpot")
    return every[every < NONE]


def of_every_query(record: RankRecord, name: str) -> Series:
    """Return a time of every query that completed, ``NONE`` where it has no such time.

    Args:
        record: of the rank.
        name: "latency"; "ttft", to the first token; "tpot", per token after the first, of queries
            with two tokens at the least.
    """
    if name == "latency":
        return _latency(record)
    if f"every_{name}" in record.made:
        return record.made[f"every_{name}"]
    good = record.column("completed") >= 0
    if "tokens" not in record.before["columns"]:
        return np.full(int(good.sum()), NONE)
    begin = "issued" if _kind(record).stream else "scheduled"
    first, tokens = record.column("first_token")[good], record.column("tokens")[good]
    true = _possible_tokens(record)
    if name == "ttft":
        return np.where(true, first - record.column(begin)[good], NONE)
    after = (record.column("completed")[good] - first) // np.maximum(tokens - 1, 1)
    return np.where(true & (tokens > 1), after, NONE)


def _gap(record: RankRecord) -> Series:
    """Return the times between neighbouring tokens of all queries that completed, in order."""
    if record.token_ns is None:
        return np.zeros(0, np.int64)
    good, true = record.column("completed") >= 0, _possible_tokens(record)
    gaps, tokens = np.diff(record.token_ns[good], axis=1), record.column("tokens")[good]
    between = np.arange(gaps.shape[1]) < tokens[:, None] - 1
    return np.asarray(gaps[between & true[:, None]])


def within(record: RankRecord, bounds: Sequence[Bound]) -> int:
    """Count the queries that keep every bound themselves, whatever its percentile."""
    good = record.column("completed") >= 0
    kept = np.ones(int(good.sum()), np.bool_)
    for bound in bounds:
        within_it = of_every_query(record, bound.series) <= bound.limit_ns
        if bound.series == "tpot" and "tokens" in record.before["columns"]:
            within_it |= record.column("tokens")[good] == 1  # which has no time between tokens
        kept &= within_it
    return int(kept.sum())


def _per_sample(record: RankRecord, begin: str, end: str) -> Series:
    """Return the time between two stamps of every sample that completed and has both."""
    columns = record.before["columns"]
    if begin not in columns or end not in columns:
        return np.zeros(0, np.int64)
    known = _known(record, begin) & _known(record, end)
    good = record.column("completed") >= 0
    return np.asarray(stamp(record, end)[good][known] - stamp(record, begin)[good][known])


def _known(record: RankRecord, name: str) -> NDArray[np.bool_]:
    """Tell of every sample that completed whether it has a stamp, the engine's a possible one."""
    good = record.column("completed") >= 0
    if name in ("started", "finished"):
        if not {"started", "finished"} <= set(record.before["columns"]):
            return np.zeros(int(good.sum()), np.bool_)
        return possible(lambda each: record.column(each)[good], record.column("started")[good])
    return np.asarray(record.column(name)[good] > 0)


def stamp(record: RankRecord, name: str) -> Series:
    """Return one column for every sample; a sample that came after its group was due was not ready.

    ``ready`` in a group's first row is when the loop could have issued the group; a sample of it
    that was scheduled later, while the loop was at work, was ready when it was scheduled.
    """
    if name == "ready":
        return np.maximum(record.column("ready"), record.column("scheduled"))
    return record.column(name)


_SERIES: dict[str, Callable[[RankRecord], Series]] = {
    "latency": _latency,
    "batch_latency": _batch_latency,
    "service": _service,
    "device": _device,
    "lateness": _lateness,
    "queue": _queue,
    "return": _return,
    "in_time": _in_time,
    "ttft_in_time": _ttft_in_time,
    "ttft": _ttft,
    "tpot": _tpot,
    "gap": _gap,
}


def facts(record: RankRecord) -> dict[str, Any]:
    """Return what a judgement needs of one rank's samples, as JSON: counts, stamps, sums.

    Returns:
        ``whole`` (whether its samples are there), ``ok``, ``failed``, ``pending`` samples,
        ``groups`` that ended well, ``scheduled_ns`` and ``issued_ns`` of the first row,
        ``finished_ns`` (last completion), ``last_due_ns`` and ``last_done_ns`` (schedule, in a
        stream the issue, and completion of the last query); None where there is none;
        ``contradicting`` groups, whose stamps by the engine cannot be true; ``tokens`` and
        ``short`` queries of a token model; for each series of the scenario ``[n, largest, sum]``;
        ``laps``; and ``own``, this rank's latencies at some percentiles, ns, and early stopping's
        estimate in a stream, where a rank's alone mean something.
    """
    kind = _kind(record)
    completed, scheduled = record.column("completed"), record.column("scheduled")
    good = completed[completed >= 0]
    due = record.first_rows("issued") if kind.stream else scheduled
    return {
        "whole": record.rows is not None,
        "ok": len(good),
        "failed": int((completed == FAILED).sum()),
        "pending": int((completed == PENDING).sum()),
        "groups": len(record.first_rows("completed")),
        "scheduled_ns": int(scheduled[0]) if len(scheduled) and scheduled[0] > 0 else None,
        "issued_ns": _first_issue(record),
        "finished_ns": int(good.max()) if len(good) else None,
        "last_due_ns": int(due[-1]) if len(due) else None,
        "last_done_ns": int(completed[-1]) if len(completed) and completed[-1] >= 0 else None,
        "contradicting": _contradicting(record),
        **_tokens(record),
        "laps": laps(record),
        "series": {n: _sums(series(record, n)) for n in series_of(kind, bool(record.made))},
        "own": {} if kind.drained else _own(series(record, "latency"), kind),
    }


def _tokens(record: RankRecord) -> dict[str, int | None]:
    """Return the tokens of completed queries, None where the model has none, and those at fault.

    LoadGen logs an error for a query of fewer than two tokens, or without a first; a stamp that
    cannot be true is none.
    """
    if "tokens" not in record.before["columns"]:
        return {"tokens": None, "short": 0}
    good = record.column("completed") >= 0
    tokens = record.column("tokens")[good]
    short = (tokens < 2) | ~_possible_tokens(record)
    return {"tokens": int(tokens.sum()), "short": int(short.sum())}


def _own(latency_ns: Series, kind: Scenario) -> dict[str, int]:
    if len(latency_ns) == 0:
        return {}
    found = percentiles_ns(latency_ns, list(OWN.values()))
    own = {f"latency.{label}": value for label, value in zip(OWN, found, strict=True)}
    estimate_ns = stream_estimate_ns(latency_ns, kind.percentile) if kind.stream else None
    if estimate_ns is not None:
        own[f"{kind.headline}.early_stopping"] = estimate_ns
    return own


def _first_issue(record: RankRecord) -> int | None:
    if record.rows is None or len(record.first_rows("issued")) == 0:
        return None  # of a rank killed between two stores even the first stamp may be another's
    issued = int(record.rows[0, record.before["columns"].index("issued")])
    return issued if issued > 0 else None


def _sums(values: Series) -> list[int]:
    # Python integers: the sum of 1e7 latencies of hours is past what int64 must promise.
    total = sum(int(part.sum()) for part in np.array_split(values, 64))
    return [len(values), int(values.max()) if len(values) else 0, total]
