"""Counts and times of several windows together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def total(values: Iterable[float | None]) -> float | None:
    """Return the sum; None where one is unknown."""
    every = list(values)
    known = [value for value in every if value is not None]
    return sum(known) if len(known) == len(every) else None


def summed(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return samples and makespan of windows together, as the ``window`` section has them."""
    windows = [each["window"] for each in results]
    return {
        "samples": sum(each["samples"] for each in windows),
        "makespan_s": total(each["makespan_s"] for each in windows),
        "makespan_bound_s": total(each["makespan_bound_s"] for each in windows),
    }


def summed_per_rank(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each rank's row, counts and times summed over the windows."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for each in results:
        for row in each["per_rank"]:
            rows.setdefault(row["rank"], []).append(row)
    all_samples = sum(row["samples"] for same in rows.values() for row in same)
    made = []
    for _, same in sorted(rows.items()):
        samples, finish = sum(row["samples"] for row in same), total(r["finish_s"] for r in same)
        busy = total(
            None if r["metrics"]["device_busy"] is None else r["metrics"]["device_busy"]
            for r in same
        )
        made.append(
            {
                **same[-1],
                "samples": samples,
                "failed": sum(row["failed"] for row in same),
                "pending": sum(row["pending"] for row in same),
                "finish_s": finish,
                "idle_s": total(row["idle_s"] for row in same),
                "metrics": {
                    **same[-1]["metrics"],
                    "throughput": samples / finish if finish else None,
                    "share": samples / all_samples if all_samples else None,
                    "device_busy": None if busy is None else busy / len(same),
                    "memory.peak": same[0]["metrics"]["memory.peak"],
                },
            }
        )
    return made


def worst_start(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the start of the window whose ranks began farthest apart, with all late ranks."""
    starts = [each["start"] for each in results]
    late = sorted({rank for each in starts for rank in each["late_ranks"]})
    return {**max(starts, key=lambda start: start["skew_s"] or 0.0), "late_ranks": late}
