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

from distbench.run import RankRecord, Run
from distbench.samples import FAILED, PENDING

Series = NDArray[np.int64]


@dataclass(frozen=True)
class Pool:
    """How a judgement reaches the samples of all ranks.

    Attributes:
        run: its records.
        gather: takes a function of a record, returns its JSON-able value for each record of
            ``run.present``, in order.
        order: takes a series' name and zero-based positions in the sorted series over all ranks,
            returns the values there.
    """

    run: Run
    gather: Callable[[Callable[[RankRecord], Any]], list[Any]]
    order: Callable[[str, Sequence[int]], list[int]]


def in_one_place(run: Run) -> Pool:
    """Return the pool of a run whose samples are all in its records."""
    ordered: dict[str, Series] = {}

    def order(name: str, places: Sequence[int]) -> list[int]:
        if name not in ordered:
            parts = [series(record, name) for record in run.present]
            ordered[name] = np.sort(np.concatenate(parts))
        return [int(ordered[name][place]) for place in places]

    return Pool(run, lambda fact: [fact(record) for record in run.present], order)


def series(record: RankRecord, name: str) -> Series:
    """Return one rank's series in the order of its samples; int64, ns.

    Args:
        record: of the rank; a record without samples gives an empty series.
        name: "latency" per sample; "batch_latency", "service", "device", "lateness" per group.
    """
    return SERIES[name](record)


def _latency(record: RankRecord) -> Series:
    completed = record.column("completed")
    good = completed >= 0
    return np.asarray(completed[good] - record.column("scheduled")[good])


def _batch_latency(record: RankRecord) -> Series:
    return np.asarray(record.first_rows("completed") - record.first_rows("issued"))


def _service(record: RankRecord) -> Series:
    started, finished, possible = _engine_stamps(record)
    return np.asarray(finished[possible] - started[possible])


def _engine_stamps(record: RankRecord) -> tuple[Series, Series, NDArray[np.bool_]]:
    """Return the engine's stamps of every ended group that has them, and which can be true.

    A group is handed over before the engine starts it, and has ended there before it completes:
    issued <= started <= finished <= completed. Stamps of another clock, or swapped, break that.
    """
    started, finished = record.first_rows("started"), record.first_rows("finished")
    known = (started != 0) & (finished != 0)
    if len(known) == 0:
        return started, finished, known
    issued, completed = (record.first_rows(name)[known] for name in ("issued", "completed"))
    started, finished = started[known], finished[known]
    possible = (issued <= started) & (started <= finished) & (finished <= completed)
    return started, finished, possible


def _device(record: RankRecord) -> Series:
    device = record.first_rows("device")
    return np.asarray(device[device > 0])


SERIES: dict[str, Callable[[RankRecord], Series]] = {
    "latency": _latency,
    "batch_latency": _batch_latency,
    "service": _service,
    "device": _device,
}


def facts(record: RankRecord) -> dict[str, Any]:
    """Return what a judgement needs of one rank's samples, as JSON: counts, stamps, sums.

    Returns:
        ``whole`` (whether its samples are there), ``ok``, ``failed``, ``pending`` samples,
        ``groups`` that ended well, ``scheduled_ns`` and ``issued_ns`` of the first row,
        ``finished_ns`` (last completion); None where there is none; ``contradicting`` groups,
        whose stamps by the engine cannot be true; and for each series ``[n, largest, sum]``.
    """
    completed, scheduled = record.column("completed"), record.column("scheduled")
    good = completed[completed >= 0]
    return {
        "whole": record.rows is not None,
        "ok": len(good),
        "failed": int((completed == FAILED).sum()),
        "pending": int((completed == PENDING).sum()),
        "groups": len(record.first_rows("completed")),
        "scheduled_ns": int(scheduled[0]) if len(scheduled) and scheduled[0] > 0 else None,
        "issued_ns": _first_issue(record),
        "finished_ns": int(good.max()) if len(good) else None,
        "contradicting": int((~_engine_stamps(record)[2]).sum()),
        "series": {name: _sums(series(record, name)) for name in SERIES},
    }


def _first_issue(record: RankRecord) -> int | None:
    if record.rows is None or len(record.first_rows("issued")) == 0:
        return None  # of a rank killed between two stores even the first stamp may be another's
    issued = int(record.rows[0, record.before["columns"].index("issued")])
    return issued if issued > 0 else None


def _sums(values: Series) -> list[int]:
    # Python integers: the sum of 1e7 latencies of hours is past what int64 must promise.
    total = sum(int(part.sum()) for part in np.array_split(values, 64))
    return [len(values), int(values.max()) if len(values) else 0, total]
