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

from distbench.judged import stream_estimate_ns
from distbench.quantiles import percentiles_ns
from distbench.run import RankRecord, Run
from distbench.samples import FAILED, PENDING
from distbench.scenarios import Scenario, scenario

Series = NDArray[np.int64]
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


def possible(stamps: Callable[[str], Series], started: Series) -> NDArray[np.bool_]:
    """Tell which groups, or which samples, have stamps of the engine that can be true.

    A group is handed over before the engine starts it, and has ended there before it completes:
    issued <= started <= finished <= completed. Stamps of another clock, or swapped, break that.

    Args:
        stamps: returns a column by its name.
        started: one of them; empty where the log has none.
    """
    if len(started) == 0:
        return np.zeros(0, np.bool_)
    finished = stamps("finished")
    inside = (stamps("issued") <= started) & (finished <= stamps("completed"))
    return np.asarray(inside & (started <= finished) & (started != 0) & (finished != 0))


def _contradicting(record: RankRecord) -> int:
    """Count the ended groups whose stamps by the engine are there and cannot be true."""
    started, finished = record.first_rows("started"), record.first_rows("finished")
    stamped = (started != 0) & (finished != 0)
    return int((stamped & ~possible(record.first_rows, started)).sum())


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


def _device(record: RankRecord) -> Series:
    device = record.first_rows("device")
    return np.asarray(device[device > 0])


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
}


def facts(record: RankRecord) -> dict[str, Any]:
    """Return what a judgement needs of one rank's samples, as JSON: counts, stamps, sums.

    Returns:
        ``whole`` (whether its samples are there), ``ok``, ``failed``, ``pending`` samples,
        ``groups`` that ended well, ``scheduled_ns`` and ``issued_ns`` of the first row,
        ``finished_ns`` (last completion), ``last_due_ns`` and ``last_done_ns`` (schedule, in a
        stream the issue, and completion of the last query); None where there is none;
        ``contradicting`` groups, whose stamps by the engine cannot be true; for each series of the
        scenario ``[n, largest, sum]``; and ``own``, this rank's latencies at some percentiles, ns,
        and early stopping's estimate in a stream, where a rank's alone mean something.
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
        "series": {name: _sums(series(record, name)) for name in kind.series},
        "own": {} if kind.drained else _own(series(record, "latency"), kind),
    }


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
