"""Several windows of one command: one result above them, made of theirs alone.

    results/<run>/
      result.json       of all windows: throughput with an interval over whole windows
      windows/000/ ...  a full result directory for each, run_id <run>-w000 ...

The unit of the interval is the window: each has its own agreed start, so that what differs from
start to start is in it, which no interval within one window can show.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from distbench.errors import UsageError
from distbench.findings import Finding, status, worst_first
from distbench.metrics import NO_INTERVAL, metric
from distbench.run import JUDGED_BY_ALL, Run
from distbench.run import load_run as load_window
from distbench.scores import of_first
from distbench.steady import Until, until_decision
from distbench.sums import summed, summed_per_rank, total, worst_start

LIFTED = ("incomplete", "invalid", "undecided", "doubtful")
"""Levels of a window's findings that stand in the result above it as well."""
RULED = (None, "VALID", "AUDIT", "SHORTENED", "INVALID")
"""Words of the rules, the worst last."""
NOTED = (JUDGED_BY_ALL, "straggler", "replicas-left-out")
"""Codes of notes that stand there as well; of a straggler, where most windows name it."""
SHOWN = 8
"""Windows that a finding names."""
GAPS = "windows are missing, so those that are left are no sample of them"


@dataclass(frozen=True)
class Windows:
    """The windows of one command: their result, and where their records are.

    A window's samples are not kept: the next window's would come on top of them.

    Attributes:
        folder: the directory above them; None on ranks whose disk has only their own folders.
        judged: the result, where they have just been taken; None: it is made from the folders.
    """

    folder: Path | None
    judged: dict[str, Any] | None = None

    @property
    def runs(self) -> tuple[Run, ...]:
        """Each window's records, in order, read from the disk anew.

        Raises:
            UsageError: this rank's disk does not have them, or none can be read.
        """
        if self.folder is None:
            raise UsageError("the records of all windows are on rank 0's disk: read them there")
        return tuple(run for _, run in _readable(self.folder, {}))

    def result(self) -> dict[str, Any]:
        """Return the judgement on all windows together: the content of the result.json above them.

        Raises:
            UsageError: as ``runs``, or the windows are of different commands.
        """
        if self.judged is not None:
            return self.judged
        assert self.folder is not None
        problems: dict[str, str] = {}
        results = {name: run.result() for name, run in _readable(self.folder, problems)}
        return windows_result(results, problems)

    def report(self) -> str:
        """Judge all windows together and return the text report."""
        from distbench.report.text import to_text  # noqa: PLC0415

        return to_text(self.result())


def window_folders(folder: Path) -> list[Path]:
    """Return the folders of the windows below a result directory; none where it is one window."""
    return sorted(path for path in (folder / "windows").glob("*") if path.is_dir())


def _readable(folder: Path, problems: dict[str, str]) -> Iterator[tuple[str, Run]]:
    """Yield each window's name and records, one at a time; ``problems`` takes what is unreadable.

    Raises:
        UsageError: none can be read.
    """
    paths = window_folders(folder)
    for path in paths:
        try:
            run = load_window(path)
        except UsageError as error:  # a rank may be killed before it has written anything
            problems[path.name] = str(error)
            continue
        yield path.name, run
    if len(problems) == len(paths):
        raise UsageError(f"{folder} holds no readable window: {'; '.join(problems.values())}")


def load_run(folder: Path | str) -> Run | Windows:
    """Read a result directory, of one window or of several; see ``run.load_run``."""
    folder = Path(folder)
    return Windows(folder) if window_folders(folder) else load_window(folder)


def windows_result(
    results: Mapping[str, dict[str, Any]], problems: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Judge several windows by their results: everything in the result.json above them.

    Args:
        results: of the windows, in order, by the names of their folders; at least one.
        problems: why other folders beside them cannot be read, likewise.

    Returns:
        As ``verdict.result``. Counts are summed; throughput is all samples / all makespans, with
        Student's interval over the windows' rates, where no window is missing.

    Raises:
        UsageError: the windows are of different commands.
    """
    every = list(results.values())
    first, last = every[0], every[-1]
    launches = list(dict.fromkeys(_launch(each) for each in every))
    if len(launches) > 1:
        raise UsageError(f"windows of different runs are mixed here: {', '.join(launches)}")
    if first["window"].get("search"):
        from distbench.trail import searched  # noqa: PLC0415  it builds on this module

        return searched(results, problems or {}, launches[0])
    if first["window"].get("scaling"):
        from distbench.scaling import scaled  # noqa: PLC0415  likewise

        return scaled(results, problems or {}, launches[0])
    if first["window"].get("sharding"):
        from distbench.sharding import sharded  # noqa: PLC0415  likewise

        return sharded(results, problems or {}, launches[0])
    rates = [each["metrics"]["throughput"]["value"] for each in every]
    reached = until(first["window"]["until"], rates)
    planned = _planned(every, reached)
    absent = absent_found(results, planned, problems or {})
    whole = None if absent else reached
    found = worst_first(absent + lifted(results) + _undecided(first, whole))
    return {
        **first,
        "run_id": launches[0],
        "windows": [line(name, each) for name, each in results.items()],
        "verdict": {
            "status": status(found),
            "rules": _rules(results),
            "findings": [asdict(finding) for finding in found],
        },
        "metrics": _metrics(every, whole, bool(absent)),
        "per_rank": summed_per_rank(every),
        "clock": last["clock"],
        "start": worst_start(every),
        "window": {
            **first["window"],
            "number": None,
            "planned": planned,
            **summed(every),
            "gpus": last["window"]["gpus"],
        },
    }


def _launch(result: dict[str, Any]) -> str:
    return re.sub(r"-w\d+$", "", result["run_id"])


def number(result: dict[str, Any]) -> int | None:
    """Return a window's number in its command, as its run_id has it."""
    found = re.search(r"-w(\d+)$", result["run_id"])
    return int(found.group(1)) if found else None


def _planned(results: Sequence[dict[str, Any]], reached: Until | None) -> int:
    """Return how many windows the command was to have, as far as it had decided.

    Each window recorded how many were wanted when it began. Whether those were all follows from the
    windows themselves: after the last of them the command decided by the same rates.
    """
    told = max(each["window"].get("planned") or 0 for each in results)
    numbers = [number(each) for each in results]
    whole = numbers == list(range(len(results))) and len(results) >= told
    wanted = reached.wanted if reached is not None and whole else 0
    return max(told, wanted, *(n + 1 for n in numbers if n is not None))


def absent_found(
    results: Mapping[str, dict[str, Any]], planned: int, problems: Mapping[str, str]
) -> list[Finding]:
    """Return the findings that the windows here are not all of the command's, each in its place.

    Args:
        results: of the windows here, by the names of their folders.
        planned: how many there were to be.
        problems: why other folders cannot be read.
    """
    numbers = {name: number(each) for name, each in results.items()}
    moved = [
        f"{name} holds {results[name]['run_id']}"
        for name, n in numbers.items()
        if n is None or name != f"{n:03d}"
    ]
    found = []
    if moved:
        found.append(
            Finding(
                "incomplete",
                "window-missing",
                f"windows are not in their places: windows/{_some(moved)}",
                value=len(moved),
                limit=0,
                remedy="give each folder the number at the end of its run_id again, take away what "
                "is no window of this run, and salvage the run",
            )
        )
    here = {n for n in numbers.values() if n is not None}
    # One in which the command ended early was the last one.
    over = list(results.values())[-1]["verdict"]["status"] == "INCOMPLETE"
    wanted = max(here, default=-1) + 1 if over else planned
    gone = [f"{n:03d}" for n in range(wanted) if n not in here]
    if gone:
        why = next((f" ({problems[name]})" for name in gone if name in problems), "")
        found.append(
            Finding(
                "incomplete",
                "window-missing",
                f"window {_some(gone)} of {planned} planned ones is not here{why}: those that are "
                "left may be a choice",
                value=len(gone),
                limit=0,
                remedy="copy the folder back from rank 0's host and salvage the run; where the "
                "command was ended between two windows, run it again",
            )
        )
    return found


def _some(names: Sequence[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


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
    if asked is None or reached is None or reached.done or reached.wanted > reached.windows:
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


def lifted(results: Mapping[str, dict[str, Any]]) -> list[Finding]:
    """Return the windows' findings, one of each code and rank, told with its windows."""
    seen: dict[tuple[str, str, int | None], list[tuple[str, dict[str, Any]]]] = {}
    for name, each in results.items():
        for found in each["verdict"]["findings"]:
            if found["level"] in LIFTED or found["code"] in NOTED:
                key = (found["level"], found["code"], found["rank"])
                seen.setdefault(key, []).append((name, found))
    # Of many windows one may name a rank by chance.
    several = sum(len(each["per_rank"]) > 1 for each in results.values())
    return [
        Finding(
            **{
                **same[0][1],
                "message": f"window {same[0][0]}"
                + (f" and {len(same) - 1} more: " if len(same) > 1 else ": ")
                + same[0][1]["message"],
            }
        )
        for same in seen.values()
        if same[0][1]["code"] != "straggler" or 2 * len(same) > several
    ]


def _rules(results: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the worst word of the rules on a window, with the name of the first that it is on."""
    every = {name: each["verdict"]["rules"] for name, each in results.items()}
    worst = max(every, key=lambda name: RULED.index(every[name]["result"]))
    return {**every[worst], "window": worst}


def line(name: str, result: dict[str, Any]) -> dict[str, Any]:
    """Return one window's row in ``windows``."""
    found = result["metrics"]["throughput"]
    return {
        "path": f"windows/{name}",
        "run_id": result["run_id"],
        "status": result["verdict"]["status"],
        "samples": result["window"]["samples"],
        "makespan_s": result["window"]["makespan_s"],
        "throughput": found["value"],
        "planned": result["window"].get("planned"),
    }


def _metrics(
    results: Sequence[dict[str, Any]], reached: Until | None, gaps: bool
) -> dict[str, Any]:
    """Return throughput over all windows, and of the rest what holds for all of them."""
    done = sum(each["metrics"]["throughput"]["n"] for each in results)
    seconds = total(each["window"]["makespan_s"] for each in results)
    unknown = next((r for e in results if (r := e["window"]["makespan_reason"])), "")
    found = metric(
        done / seconds if seconds and not unknown else None,
        "samples/s",
        done,
        f"completed samples of all ranks / makespan, both summed over {len(results)} windows",
        reason=unknown,
        ci_reason=GAPS if gaps else NO_INTERVAL,
    )
    if found["value"] and reached and reached.low and reached.high and reached.low > 0:
        found |= {
            "ci_low": 1 / reached.high,
            "ci_high": 1 / reached.low,
            "ci_method": f"Student's t over {reached.windows} windows",
            "n_eff": reached.windows,
            "reason": "",
        }
    # The first window's: a later peak holds what the harness itself took in between.
    peak = dict(results[0]["metrics"]["memory.peak"])
    peak["definition"] += ", to the end of the first window"
    return {
        "throughput": found,
        **of_first(results[0]["metrics"]),
        "memory.peak": peak,
    }
