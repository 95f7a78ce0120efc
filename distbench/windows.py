"""Several windows of one command: one result above them, made of theirs alone.

    results/<run>/
      result.json       of all windows: throughput with an interval over whole windows
      windows/000/ ...  a full result directory for each

The unit of the interval is the window: each has its own agreed start, so that what differs from
start to start is in it, which no interval within one window can show.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distbench.findings import Finding, status, worst_first
from distbench.metrics import metric
from distbench.run import Run
from distbench.run import load_run as load_window
from distbench.steady import Until, until_decision

LIFTED = ("incomplete", "invalid", "undecided", "doubtful")
"""Levels of a window's findings that stand in the result above it as well."""


@dataclass(frozen=True)
class Windows:
    """The windows of one command, in order.

    Attributes:
        runs: each window's records.
        folder: where they are stored; None while they are only in memory.
    """

    runs: tuple[Run, ...]
    folder: Path | None = None

    def result(self) -> dict[str, Any]:
        """Judge all windows together: the content of the result.json above them."""
        return windows_result([run.result() for run in self.runs])

    def report(self) -> str:
        """Judge all windows together and return the text report."""
        from distbench.report.text import to_text  # noqa: PLC0415

        return to_text(self.result())


def load_run(folder: Path | str) -> Run | Windows:
    """Read a result directory, of one window or of several; see ``run.load_run``."""
    found = sorted(path for path in (Path(folder) / "windows").glob("*") if path.is_dir())
    if not found:
        return load_window(folder)
    return Windows(tuple(load_window(path) for path in found), Path(folder))


def windows_result(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Judge several windows by their results: everything in the result.json above them.

    Args:
        results: of the windows, in order; at least one.

    Returns:
        As ``verdict.result``. Counts are summed; throughput is all samples / all makespans, with
        Student's interval over the windows' rates.
    """
    first, last = results[0], results[-1]
    rates = [each["metrics"]["throughput"]["value"] for each in results]
    reached = until(first["window"]["until"], rates)
    found = _lifted(results) + _undecided(first, reached)
    return {
        **first,
        "run_id": first["run_id"].rpartition("-w")[0],
        "windows": [_line(number, each) for number, each in enumerate(results)],
        "verdict": {
            "status": status(found),
            "rules": _rules(results),
            "findings": [asdict(finding) for finding in found],
        },
        "metrics": _metrics(results, reached),
        "per_rank": _per_rank(results),
        "clock": last["clock"],
        "start": {
            **max((each["start"] for each in results), key=lambda start: start["skew_s"] or 0.0),
            "late_ranks": sorted({r for each in results for r in each["start"]["late_ranks"]}),
        },
        "window": {
            **first["window"],
            "samples": sum(each["window"]["samples"] for each in results),
            "makespan_s": _sum(each["window"]["makespan_s"] for each in results),
            "makespan_bound_s": _sum(each["window"]["makespan_bound_s"] for each in results),
            "gpus": last["window"]["gpus"],
        },
    }


def until(asked: float | None, rates: Sequence[float | None]) -> Until | None:
    """Return what the windows' rates say of ``--until``; None where a rate is unknown.

    The decision is on seconds per sample: windows have equal numbers of samples, so the mean of
    those is all makespans / all samples, of which throughput is the inverse.

    Args:
        asked: half-width relative to throughput; None without --until.
        rates: throughput of each window in order, samples/s; None where it is unknown.
    """
    known = [1 / rate for rate in rates if rate]
    if asked is None or len(known) < len(rates):
        return None
    return until_decision(known, asked)


def _undecided(first: dict[str, Any], reached: Until | None) -> list[Finding]:
    asked = first["window"]["until"]
    if asked is None or reached is None or reached.done:
        return []
    shown = "unknown" if reached.half_width is None else f"+-{reached.half_width:.2%}"
    return [
        Finding(
            "undecided",
            "until-not-reached",
            f"throughput is known to {shown} after {reached.windows} windows, and --until asks for "
            f"+-{asked:.2%}",
            value=reached.half_width,
            limit=asked,
            remedy="give a longer --duration for each window, quiet the hosts, or ask for less"
            + (f": it would take about {reached.need} such windows" if reached.need else ""),
        )
    ]


def _lifted(results: Sequence[dict[str, Any]]) -> list[Finding]:
    """Return the windows' findings, one of each code and rank, told with its windows."""
    seen: dict[tuple[str, str, int | None], list[tuple[int, dict[str, Any]]]] = {}
    for number, each in enumerate(results):
        for found in each["verdict"]["findings"]:
            if found["level"] in LIFTED:
                key = (found["level"], found["code"], found["rank"])
                seen.setdefault(key, []).append((number, found))
    return worst_first(
        [
            Finding(
                **{
                    **same[0][1],
                    "message": f"window {same[0][0]:03d}"
                    + (f" and {len(same) - 1} more: " if len(same) > 1 else ": ")
                    + same[0][1]["message"],
                }
            )
            for same in seen.values()
        ]
    )


def _rules(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the word of the rules on the first window that they refuse, else on the first."""
    every = [each["verdict"]["rules"] for each in results]
    return next((rules for rules in every if rules["result"] != "VALID"), every[0])


def _line(number: int, result: dict[str, Any]) -> dict[str, Any]:
    found = result["metrics"]["throughput"]
    return {
        "path": f"windows/{number:03d}",
        "run_id": result["run_id"],
        "status": result["verdict"]["status"],
        "samples": result["window"]["samples"],
        "makespan_s": result["window"]["makespan_s"],
        "throughput": found["value"],
    }


def _sum(values: Any) -> float | None:
    every = list(values)
    return None if None in every else sum(every)


def _metrics(results: Sequence[dict[str, Any]], reached: Until | None) -> dict[str, Any]:
    """Return throughput over all windows, and of the rest what holds for all of them."""
    done = sum(each["metrics"]["throughput"]["n"] for each in results)
    seconds = _sum(each["window"]["makespan_s"] for each in results)
    unknown = next((r for e in results if (r := e["window"]["makespan_reason"])), "")
    found = metric(
        done / seconds if seconds and not unknown else None,
        "samples/s",
        done,
        f"completed samples of all ranks / makespan, both summed over {len(results)} windows",
        reason=unknown,
    )
    if found["value"] and reached and reached.low and reached.high and reached.low > 0:
        found |= {
            "ci_low": 1 / reached.high,
            "ci_high": 1 / reached.low,
            "ci_method": f"Student's t over {reached.windows} windows",
            "n_eff": reached.windows,
            "reason": "",
        }
    peaks = [each["metrics"]["memory.peak"] for each in results]
    return {
        "throughput": found,
        "accuracy": results[0]["metrics"]["accuracy"],
        "memory.peak": max(peaks, key=lambda peak: peak["value"] or 0.0),
    }


def _per_rank(results: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return each rank's row, counts and times summed over the windows."""
    rows: dict[int, list[dict[str, Any]]] = {}
    for each in results:
        for row in each["per_rank"]:
            rows.setdefault(row["rank"], []).append(row)
    total = sum(row["samples"] for same in rows.values() for row in same)
    made = []
    for _, same in sorted(rows.items()):
        samples, finish = sum(row["samples"] for row in same), _sum(r["finish_s"] for r in same)
        busy = _sum(
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
                "idle_s": _sum(row["idle_s"] for row in same),
                "metrics": {
                    **same[-1]["metrics"],
                    "throughput": samples / finish if finish else None,
                    "share": samples / total if total else None,
                    "device_busy": None if busy is None else busy / len(same),
                },
            }
        )
    return made
