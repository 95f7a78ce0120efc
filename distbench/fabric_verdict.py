"""The verdict on a ``collectives`` run: its findings, and everything that stands in result.json."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from distbench import metrics as m
from distbench.checks import facts_found
from distbench.errors import where
from distbench.fabric import COLUMNS, FIT_COLUMNS, LEAST_COST, Row, figures_of, fits, rows_of
from distbench.findings import EFFECT_INVALID, Finding, graded, status, worst_first
from distbench.operations import SPACED, size_text
from distbench.ruling import table
from distbench.run import RankRecord, Run
from distbench.times import RankTimes, makespan
from distbench.trust import clock_found, interference_found

SCENARIO = "collectives"
GOOD_FIT = 0.98
LEFT_OUT = 0.5
"""Share of a cell's repetitions that began late, above which what is left may be a choice."""


def fabric_found(run: Run, rows: Sequence[Row], lines: Sequence[Sequence[Any]]) -> list[Finding]:
    """Return what is found of the operations themselves."""
    hosts = {record.rank: record.host for record in run.left}
    found = [finding for row in rows for finding in _wrong(row, hosts)]
    for row in rows:
        found += _unknown(row) + _late(run, row, hosts) + _clocks(row)
    return found + _slow(rows, hosts) + _bent(lines)


def _wrong(row: Row, hosts: dict[int, str]) -> list[Finding]:
    f = row.figures
    return [
        Finding(
            "invalid",
            "collective-wrong",
            f"{where(rank, hosts[rank])}: {wrong:,} of {f['checked']:,} elements that all ranks "
            f"compared after {f['operation']} of {size_text(f['bytes'])} are not what they must be",
            rank,
            hosts[rank],
            wrong,
            0,
            "see that memory, network and the backend's version are sound on that host and the "
            "ones it talks to; no figure of such an operation means anything",
        )
        for rank, (_, wrong) in row.checks.items()
        if wrong
    ]


def _unknown(row: Row) -> list[Finding]:
    f = row.figures
    if not f["reason"]:
        return []
    return [
        Finding(
            "invalid",
            "collective-unknown",
            f"{f['operation']} of {size_text(f['bytes'])} is unknown: {f['reason']}",
            value=0,
            remedy="stop other work on the hosts, start no more ranks than cores, give a longer "
            "--duration",
        )
    ]


def _clocks(row: Row) -> list[Finding]:
    """Return the finding that blocks are too short for what is known of the ranks' clocks."""
    f = row.figures
    if f["time"] is None:
        return []
    effect = f["clock_bound"] / (f["time"] * f["times"] * f["blocks"])
    level = graded(effect)
    if level is None:
        return []
    return [
        Finding(
            level,
            "clock-bound",
            f"the last completion of {f['operation']} of {size_text(f['bytes'])} is known to "
            f"+-{f['clock_bound'] * 1e6:.3g} us, which is {effect:.1%} of all blocks",
            value=effect,
            limit=EFFECT_INVALID,
            remedy="measure for longer (--duration), or over a network of shorter round trips",
        )
    ]


def _late(run: Run, row: Row, hosts: dict[int, str]) -> list[Finding]:
    """Return the finding that much of a cell was left out, with the rank that was late most."""
    f = row.figures
    rank, left, of = f["late_rank"], f["late"] or 0, row.cells[SPACED].repetitions
    if rank is None or left <= LEFT_OUT * of:
        return []
    return [
        Finding(
            "doubtful",
            "starts-late",
            f"{left} of {of} lone operations, {f['operation']} of {size_text(f['bytes'])}, were "
            f"left out, because a rank began late: {where(rank, hosts.get(rank, '?'))} "
            f"{row.late[run.active.index(rank)]} times",
            rank,
            hosts.get(rank, "?"),
            left / of,
            LEFT_OUT,
            "stop other work on that host, and start no more ranks than it has cores",
        )
    ]


def _slow(rows: Sequence[Row], hosts: dict[int, str]) -> list[Finding]:
    """Return a note on each rank that is the slowest of most operations of which one is."""
    known = [row.figures for row in rows if row.figures["p50"] is not None]
    found = []
    for rank in sorted({each["slowest"] for each in known if each["slowest"] is not None}):
        own = [each for each in known if each["slowest"] == rank]
        if 2 * len(own) <= len(known):
            continue
        share = float(np.median([each["slowest_cost"] / each["p50"] for each in own]))
        found.append(
            Finding(
                "info",
                "slowest-rank",
                f"{where(rank, hosts.get(rank, '?'))} surely ends last in {len(own)} of "
                f"{len(known)} operations and sizes, later than all others by {share:.1%} of the "
                "latency (median of these)",
                rank,
                hosts.get(rank, "?"),
                share,
                LEAST_COST,
                "look at that host's link, its other load and which processor serves the network; "
                "in a broadcast or a tree a leaf ends last by its place",
            )
        )
    return found


def _bent(lines: Sequence[Sequence[Any]]) -> list[Finding]:
    return [
        Finding(
            "info",
            "fit-poor",
            f"the time of {name} is no line in its size: R^2 {r2:.4f} over {sizes} sizes, the line "
            f"is off by up to {worst:.0%}",
            value=r2,
            limit=GOOD_FIT,
            remedy="read the table in place of the fit; where it should be a line, quiet the hosts "
            "and give a longer --duration",
        )
        for name, sizes, _, _, _, _, r2, worst, _ in lines
        if r2 is not None and r2 < GOOD_FIT
    ]


# The result


def rank_times(run: Run, record: RankRecord) -> RankTimes:
    """Return when a rank began and ended, as ``times.rank_times`` does of samples."""
    rows, columns = record.rows, record.before["columns"]
    rows = np.zeros((0, len(columns)), np.int64) if rows is None else rows
    scheduled, issued, completed = (
        rows[:, columns.index(name)] for name in ("scheduled", "issued", "completed")
    )
    ended = completed >= 0
    instant, first = (int(each[0]) if ended.any() else None for each in (scheduled, issued))
    last = int(completed[ended].max()) if ended.any() else None
    model = run.clock(record)
    known = [each for each in (first, last) if each is not None]
    begin, end = (
        None if model is None or each is None else model.to_reference_ns(each)
        for each in (first, last)
    )
    bound = None
    if model is not None:
        bound = max((model.bound_ns(model.to_reference_ns(each)) for each in known), default=None)
    return RankTimes(
        rank=record.rank,
        scheduled_ns=instant,
        started_ns=first,
        finished_ns=last,
        started_ref_ns=begin,
        finished_ref_ns=end,
        bound_ns=bound,
        ok=int(ended.sum()),
        failed=0,
        pending=int((~ended).sum()),
        whole=record.rows is not None,
        issued_ns=first,
    )


def _per_rank(run: Run, times: Sequence[RankTimes], rows: Sequence[Row]) -> list[dict[str, Any]]:
    out = []
    for place, (record, t) in enumerate(zip(run.present, times, strict=True)):
        own = None
        if t.finished_ns is not None and t.scheduled_ns is not None:
            own = (t.finished_ns - t.scheduled_ns) / m.NS
        named = sum(row.figures["slowest"] == t.rank for row in rows)
        whole = len(run.present) == len(run.active)
        out.append(
            {
                "rank": t.rank,
                "host": record.host,
                "device": record.before["device"]["name"] or record.before["device"]["type"],
                "replica": record.before["replica"],
                "samples": t.ok,
                "failed": t.failed,
                "pending": t.pending,
                "finish_s": own,
                "idle_s": None,
                "metrics": {
                    "late": sum(row.late[place] for row in rows) if whole else None,
                    "slowest": named,
                    "memory.peak": m.memory_peak(record),
                    "memory.total": m.memory_total(record),
                },
            }
        )
    return out


def collectives_result(run: Run) -> dict[str, Any]:
    """Judge a run of ``collectives``: everything that stands in result.json, from its records."""
    from distbench.verdict import common_and_rest, window_section  # noqa: PLC0415  builds on this

    times = [rank_times(run, record) for record in run.present]
    span = makespan(run, times)
    rows = rows_of(run)
    lines = fits(rows)
    found = [Finding(**note) for record in run.left for note in record.before["findings"]]
    found += facts_found(run, times)
    for record in run.left:
        found += clock_found(run, record) + interference_found(record)
    found += fabric_found(run, rows, lines) if status(found) != "INCOMPLETE" else []
    found = worst_first(found)
    common, rest = common_and_rest([record.before["environment"] for record in run.present])
    first = run.first.before
    names = [name for name, _, _ in COLUMNS]
    return {
        "schema_version": first["schema_version"],
        "scenario": run.scenario,
        "run_id": first["run_id"],
        "windows": [],
        "verdict": {
            "status": status(found),
            "rules": {
                "set": "none",
                "source": "native",
                "wording": None,
                "shortened": False,
                "result": None,
                "gates": [],
            },
            "findings": [asdict(finding) for finding in found],
        },
        "metrics": figures_of(rows, lines),
        "per_rank": _per_rank(run, times, rows),
        "clock": m.clock_section(run, times, span),
        "start": m.start_section(run, times),
        "config": first["config"],
        "environment": {"common": common, "ranks": rest},
        "harness": m.harness(run),
        "tables": {
            "collectives": table(COLUMNS, [[row.figures[name] for name in names] for row in rows]),
            "fit": table(FIT_COLUMNS, lines),
        },
        "window": window_section(run, times, span)
        | {"transport": [record.before["transport"] for record in run.left]},
    }
