"""Keep what a cluster did in a few launches, and hold later launches against it.

    for i in 1 2 3 4 5; do python -m distbench.offline --name before; done
    python -m distbench.baseline record NAME results/*-before-*
    python -m distbench.baseline check NAME results/*-after-*         launched with --name after

``record`` stores the launches' figures and what describes the hosts in baselines/NAME.json, and
says how far launches of one thing fall apart, and so the smallest difference that this cluster can
resolve. ``check`` compares new launches with them as distbench.compare does, and names what changed
on the hosts: driver, kernel, torch and whatever else each rank recorded. What no process can see
from inside, such as the version of Kubernetes, is given with --note. Needs no torch.

Exit status: 0; 5 on a regression (see distbench.compare); 2 where it cannot be done as asked.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from distbench import files
from distbench.cli import Option, nearest, parse, percent, positionals, read_words, run_command
from distbench.compare import (
    Comparison,
    as_percent,
    check_launches,
    compare,
    headline_of,
    load_result,
    to_text,
)
from distbench.conditions import Difference, check_side, conditions, differences, listed
from distbench.errors import EXIT_OK, EXIT_REGRESSION, UsageError
from distbench.launches import (
    BETTER,
    LEAST,
    MOST_LAUNCHES,
    NOT_RECOMPUTED,
    detectable,
    launches_needed,
    not_recomputed,
    spread,
)
from distbench.run import JUDGED_BY_ALL

SCHEMA_VERSION = 1
SIDES = (1, 2, 3, 5, 10)
"""Launches a side for which the smallest difference is told."""
WANTED = 0.01
"""The difference for which the launches needed are told."""
CLOCK_MOVED = 0.02
"""Two SM clocks that differ by more are told; one step of the clock is 15 MHz, about 1 %."""


def excerpt(result: dict[str, Any]) -> dict[str, Any]:
    """Return of a result what a baseline keeps: figures and conditions, no samples.

    Args:
        result: the content of result.json.
    """
    window = result["window"]
    kept = ("value", "unit", "ci_low", "ci_high", "reason")
    return {
        "scenario": result["scenario"],
        "run_id": result["run_id"],
        "verdict": {
            "status": result["verdict"]["status"],
            "findings": [
                {name: found[name] for name in ("level", "code", "message")}
                for found in result["verdict"]["findings"]
                if found["level"] != "info" or found["code"] == JUDGED_BY_ALL
            ],
        },
        "metrics": {
            name: {field: found[field] for field in kept}
            for name, found in result["metrics"].items()
        },
        "per_rank": [
            {name: row[name] for name in ("rank", "host", "device")} for row in result["per_rank"]
        ],
        "config": result["config"],
        "environment": result["environment"],
        "window": {
            **{name: window[name] for name in ("world_size", "model", "started_utc")},
            "gpus": [
                {"rank": gpu["rank"], "after": _gpu_state(gpu["after"])} for gpu in window["gpus"]
            ],
        },
    }


def _gpu_state(after: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return of a GPU's state after a window what tells a slower GPU; None where it is unknown."""
    if not after or not after.get("available"):
        return None
    return {name: after.get(name) for name in ("sm_clock_hz", "temperature_c", "throttle_reasons")}


def record(path: Path, results: Sequence[dict[str, Any]], notes: dict[str, str]) -> None:
    """Store launches as a baseline.

    Args:
        path: the file; its folder is made where it is absent.
        results: launches of one thing, alike in all conditions and VALID.
        notes: what no process sees from inside, such as {"kubernetes": "1.34.1"}.

    Raises:
        UsageError: the launches are not alike, not VALID or not several different ones, or the
            disk refuses.
    """
    check_launches(results, headline_of(results))
    check_side(results, [conditions(result) for result in results], "baseline")
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    stored = {
        "schema_version": SCHEMA_VERSION,
        "recorded_utc": now,
        "notes": notes,
        "launches": [excerpt(result) for result in results],
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_json(path, stored)
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}") from error


def read(path: Path) -> dict[str, Any]:
    """Read a baseline.

    Raises:
        UsageError: there is none of this name (the nearest is named), or it is damaged or of
            another version.
    """
    if not path.is_file():
        known = sorted(each.stem for each in path.parent.glob("*.json"))
        listed = f"; there are {', '.join(known[:8])}" if known else ""
        raise UsageError(
            f"there is no baseline {path}{nearest(path.stem, known)}{listed}: make it with "
            "`python -m distbench.baseline record`"
        )
    stored = files.read_json(path)
    try:
        version, launches = stored["schema_version"], stored["launches"]
        if version != SCHEMA_VERSION:
            raise UsageError(
                f"{path} has schema version {version}; this distbench reads {SCHEMA_VERSION}: "
                "record it again"
            )
        for launch in launches:
            conditions(launch)
        stored["notes"], stored["recorded_utc"], launches[0]["metrics"]
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"{path} is no baseline, or damaged ({error!r}): record it again"
        ) from error
    assert isinstance(stored, dict)
    return stored


def check(
    stored: dict[str, Any],
    results: Sequence[dict[str, Any]],
    notes: dict[str, str],
    *,
    metric: str = "",
    threshold: float = 0.01,
) -> tuple[Comparison, tuple[Difference, ...]]:
    """Compare new launches with a baseline.

    Args:
        stored: from ``read``.
        results: the new launches.
        notes: as ``record``'s, as they are now.
        metric: what to compare; "" is what their scenario judges.
        threshold: a change up to this is none, as a fraction.

    Returns:
        The comparison, whose ``tested`` are the recorded conditions of hosts that changed, and
        what changed besides: notes, and clocks that GPUs had after their windows.

    Raises:
        UsageError: as ``compare``; or the new launches ran something else than the baseline's.
    """
    base, new = stored["launches"], [excerpt(result) for result in results]
    metric = metric or headline_of(new)
    check_launches([*base, *new], metric)
    changed = differences(conditions(base[0]), conditions(new[0]))
    unlike = [d for d in changed if not d.of_hosts]
    if unlike:
        raise UsageError(
            f"the launches did not run what the baseline's ran: {listed(unlike)}; repeat them with "
            "the baseline's options, or record a baseline of their own"
        )
    across = [d.name for d in changed]
    found = compare(base, new, metric=metric, threshold=threshold, across=across)
    given = [
        Difference(name, stored["notes"].get(name, "not given"), notes.get(name, "not given"))
        for name in dict.fromkeys([*stored["notes"], *notes])
        if stored["notes"].get(name) != notes.get(name)
    ]
    return found, (*given, *_clocks_moved(base, new))


def _clocks_moved(
    base: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]]
) -> list[Difference]:
    """Return the GPUs whose highest SM clock after a window is another than it was."""
    old, now = _clocks(base), _clocks(new)
    return [
        Difference("SM clock after the window", _mhz(old[uuid][0]), _mhz(clock), (label,))
        for uuid, (clock, label) in now.items()
        if uuid in old and abs(clock - old[uuid][0]) > CLOCK_MOVED * old[uuid][0]
    ]


def _clocks(launches: Sequence[dict[str, Any]]) -> dict[str, tuple[float, str]]:
    """Return each GPU's highest SM clock in Hz after a window, and its rank's label, by UUID."""
    highest: dict[str, tuple[float, str]] = {}
    for launch in launches:
        ranks = conditions(launch).ranks
        for rank, gpu in zip(ranks, launch["window"]["gpus"], strict=True):
            clock = (gpu["after"] or {}).get("sm_clock_hz")
            if clock:
                before = highest.get(rank.identity, (0.0, ""))
                highest[rank.identity] = max(before, (clock, rank.label))
    return highest


def _mhz(hertz: float) -> str:
    return f"{hertz / 1e6:.0f} MHz"


def record_text(name: str, launches: Sequence[dict[str, Any]], metric: str) -> str:
    """Say what launches tell of a cluster: how far they fall apart, and what that resolves."""
    found, first = spread(launches, metric), launches[0]
    unit, window = first["metrics"][metric]["unit"], first["window"]
    values = [launch["metrics"][metric]["value"] for launch in launches]
    hosts = sorted({row["host"] for row in first["per_rank"]})
    shown = ", ".join(hosts[:4]) + (" ..." if len(hosts) > 4 else "")
    lines = [
        f"baseline {name}: {found.launches} launch{'es' * (found.launches > 1)} of "
        f"{first['scenario']} {window['model']['name']}, world size {window['world_size']}, on "
        f"{shown}",
        f"  {metric}  {found.mean:,.6g} {unit} (geometric mean; {min(values):,.6g} to "
        f"{max(values):,.6g})",
    ]
    if found.between is None or found.low is None or found.high is None:
        lines.append(
            f"  between launches  unknown: a single launch has no variance; record at least "
            f"{LEAST}, better {BETTER}"
        )
    else:
        lines.append(
            f"  between launches  sd {as_percent(found.between)} (95 % interval "
            f"{as_percent(found.low)} to {as_percent(found.high)})"
        )
    if found.within is None:
        lines.append(f"  within a launch   unknown: {found.reason}")
    else:
        lines.append(f"  within a launch   standard error {as_percent(found.within)} (median)")
    lines += _resolved(found.between)
    if any(not_recomputed(launch) for launch in launches):
        lines.append(f"  note: {NOT_RECOMPUTED}")
    return "\n".join(lines) + "\n"


def _resolved(between: float | None) -> list[str]:
    """Say which differences can be resolved with such a spread; nothing without one."""
    if between is None:
        return []
    cells = [
        f"{k}: " + ("none" if k < LEAST else as_percent(math.expm1(detectable(between, k))))
        for k in SIDES
    ]
    needed = launches_needed(between, math.log1p(WANTED))
    number = f"more than {MOST_LAUNCHES:,}" if needed is None else f"{needed:,}"
    return [
        "  smallest difference that two sides resolve, by launches a side:",
        "    " + "   ".join(cells),
        f"  launches a side for {as_percent(WANTED)}: {number}",
        "  found in 80 % of cases by Welch's t on logarithms at 5 %: (t(0.975, 2k-2) + "
        "t(0.8, 2k-2)) sd sqrt(2/k) from k = 7 on, the exact factor below; the sd is itself an "
        "estimate, see its interval",
    ]


def check_text(
    name: str,
    stored: dict[str, Any],
    results: Sequence[dict[str, Any]],
    found: Comparison,
    besides: Sequence[Difference],
) -> str:
    """Lay out what ``check`` found: the verdict first, then what changed."""
    lines = to_text(found, "changed").splitlines()
    lines.insert(1, f"  baseline {name}, recorded {stored['recorded_utc']}")
    changed = [f"  changed  {d.title}: {d.base} -> {d.new}" for d in besides]
    if not changed and not found.tested:
        changed = ["  nothing that is recorded of the hosts changed"]
    ranks = conditions(results[0]).ranks
    unknown = [
        field
        for field in dict.fromkeys(field for rank in ranks for field in rank.values)
        if all(rank.values.get(field) is None for rank in ranks)
    ]
    if unknown:
        changed.append(f"  unknown on every rank, so not compared: {', '.join(unknown)}")
    if not stored["notes"]:
        changed.append(
            "  not recorded, since no process sees it: the version of Kubernetes, firmware of the "
            "board and of switches; give such with --note kubernetes=1.34.1 to record and check"
        )
    return "\n".join(lines + changed) + "\n"


def read_notes(text: str) -> dict[str, str]:
    """Read notes such as "kubernetes=1.34.1,bios=2.1".

    Raises:
        UsageError: a part has no name or no value.
    """
    pairs = [part.partition("=") for part in read_words(text)]
    wrong = ["".join(pair) for pair in pairs if not pair[0].strip() or not pair[2].strip()]
    if wrong:
        raise UsageError(f"{wrong[0]!r} is no note: write NAME=VALUE, such as kubernetes=1.34.1")
    return {name.strip(): value.strip() for name, _, value in pairs}


OPTIONS = (
    Option("folder", "baselines", Path, "where baselines are kept", "DIR"),
    Option("metric", None, str, "a name in metrics (default: what the scenario judges)", "NAME"),
    Option("threshold", "1%", percent, "a change up to this is none", "PERCENT"),
    Option("note", "", read_notes, "what no process sees", "NAME=VALUE[,...]"),
    Option("replace", None, None, "let record replace a baseline of this name"),
)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    rest, lists = positionals(argv, OPTIONS)
    given = parse("distbench.baseline", __doc__ or "", OPTIONS, rest).values
    words = lists[0]
    if len(lists) > 1 or len(words) < 3 or words[0] not in ("record", "check"):
        raise UsageError("give record or check, the baseline's name and result directories")
    name, folders, metric = words[1], words[2:], given["metric"] or ""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", name):
        raise UsageError(f"{name!r} is no name for a file: use letters, digits, - _ and .")
    path = given["folder"] / f"{name}.json"
    if words[0] == "record":
        if path.exists() and not given["replace"]:
            raise UsageError(f"{path} exists: give another name, or --replace")
        results = [load_result(folder) for folder in folders]
        metric = metric or headline_of(results)
        check_launches(results, metric)
        record(path, results, given["note"])
        sys.stdout.write(record_text(name, results, metric) + f"stored  {path}\n")
        return EXIT_OK
    stored = read(path)
    results = [load_result(folder) for folder in folders]
    found, besides = check(
        stored, results, given["note"], metric=metric, threshold=given["threshold"]
    )
    sys.stdout.write(check_text(name, stored, results, found, besides))
    return EXIT_REGRESSION if found.regression else EXIT_OK


if __name__ == "__main__":
    run_command(main)
