"""Result directories made from hand-chosen integers, file by file as a real run writes them.

The instant agreed upon is ``START_NS`` on rank 0's clock. Every other rank is on a host of its own
with a clock of its own, ``offset_ns`` ahead of rank 0's and ``drift_ppm`` faster. The default run:

    rank 0, node-0: 10 groups of 4 samples, one every 100 ms: the last ends 1.0 s after the start
    rank 1, node-1: 10 groups of 4 samples, one every  90 ms: the last ends 0.9 s after the start

so 80 samples in a makespan of 1 s: 80 samples/s. Nothing in it calls for a finding.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distbench import files
from distbench.files import write_manifest
from distbench.rank_files import write_done
from distbench.record import write_report
from distbench.run import RankRecord, Run, rank_folder
from distbench.samples import SampleLog

START_NS = 1_000_000_000_000_000
BEFORE_NS, AFTER_NS = START_NS - 1_000_000_000, START_NS + 3_000_000_000
"""When rank 0's clock stood at the two clock exchanges with each other rank."""
OFFSET_NS = 7_000_000_000_123
BOUND_NS = 1_000
COLUMNS = ("index", "scheduled", "issued", "started", "finished", "completed", "count")
RUN_ID = "20260101T000000Z-offline-0123abcd"
GPU = {
    "available": True,
    "sm_clock_hz": 1_440_000_000,
    "temperature_c": 41,
    "throttle_reasons": ["gpu_idle"],
    "memory_total_bytes": 24_000_000_000,
    "compute_processes": [],
}


@dataclass
class Rank:
    """What one rank is about to leave; a test changes it before it is written."""

    before: dict[str, Any]
    after: dict[str, Any] | None
    log: SampleLog

    def row(self, group: int) -> int:
        """Return the first row of a group."""
        return int(np.flatnonzero(self.log.issued > 0)[group])


Change = Callable[[list[Rank]], None]


def make_ranks(
    ranks: int = 2,
    *,
    groups: Sequence[int] = (10, 10),
    group_ns: Sequence[int] = (100_000_000, 90_000_000),
    batch: int = 4,
    tail: Sequence[int] = (0, 0),
    offset_ns: Sequence[int] = (0, OFFSET_NS),
    drift_ppm: Sequence[int] = (0, 0),
    bound_ns: Sequence[int] = (0, BOUND_NS),
    late_ns: Sequence[int] = (5_000, 20_000),
    device_ns: int = 0,
    change: Change | None = None,
) -> list[Rank]:
    """Lay out a run; of each sequence the last item holds for all further ranks.

    Args:
        ranks: how many.
        groups: whole groups of each rank.
        group_ns: one group ends so long after the other, on rank 0's clock.
        batch: samples of a group.
        tail: samples of one more, shorter group; 0 for none.
        offset_ns: each rank's clock minus rank 0's at the start.
        drift_ppm: how much faster than rank 0's it runs.
        bound_ns: bound of each clock exchange.
        late_ns: how long after the agreed instant each loop began.
        device_ns: device time of each group; 0 for a log without that column.
        change: what a test wants otherwise.
    """

    def of(values: Sequence[int], rank: int) -> int:
        return values[min(rank, len(values) - 1)]

    columns = (*COLUMNS[:-1], "device", "count") if device_ns else COLUMNS
    made = []
    for rank in range(ranks):
        offset, drift = of(offset_ns, rank), of(drift_ppm, rank)

        def local(at_ns: int, offset: int = offset, drift: int = drift) -> int:
            return at_ns + offset + (at_ns - START_NS) * drift // 1_000_000

        sizes = [batch] * of(groups, rank) + [of(tail, rank)] * (of(tail, rank) > 0)
        log = SampleLog.in_memory(sum(sizes), columns)
        log.index[:] = np.arange(log.capacity) + rank * log.capacity
        log.scheduled[:] = local(START_NS)
        row, last = 0, START_NS
        for number, size in enumerate(sizes):
            end = START_NS + (number + 1) * of(group_ns, rank)
            log.issued[row] = local(last + (1_000 if number else of(late_ns, rank)))
            log.started[row] = log.issued[row] + 2_000
            log.completed[row] = local(end)
            log.finished[row] = log.completed[row] - 3_000
            log.count[row] = size
            if device_ns:
                log.device[row] = device_ns
            row, last = row + size, end
        exchanges = [
            [at, local(at) - at, of(bound_ns, rank), 2 * of(bound_ns, rank), 100]
            for at in (BEFORE_NS, AFTER_NS)
        ]
        before = _before(rank, ranks, columns, batch, exchanges[:1])
        after = _after(rank, log, local(START_NS), local(START_NS + of(late_ns, rank)), local(last))
        made.append(Rank(before, after, log))
        assert made[0].after is not None
        if rank:
            made[0].after["exchanges"][str(rank)] = exchanges
    if change is not None:
        change(made)
    return made


def _before(
    rank: int, ranks: int, columns: Sequence[str], batch: int, exchanges: list[list[int]]
) -> dict[str, Any]:
    config = {"batch_size": str(batch), "duration": "1s", "seed": "0", "shares": "even"}
    return {
        "schema_version": 1,
        "scenario": "offline",
        "run_id": RUN_ID,
        "started_utc": "2026-01-01T00:00:00+00:00",
        "rank": rank,
        "world_size": ranks,
        "local_rank": 0,
        "node": rank,
        "host": f"node-{rank}",
        "replica": rank,
        "active": True,
        "device": {
            "type": "cpu",
            "index": 0,
            "uuid": "",
            "name": "",
            "pci_bus_id": "",
            "note": "",
        },
        "backend": "gloo",
        "interface": {"name": "eth0", "address": f"192.0.2.{rank + 1}", "origin": "route"},
        "columns": list(columns),
        "config": {name: {"value": text, "origin": "default"} for name, text in config.items()},
        "duration_ns": 1_000_000_000,
        "group": batch,
        "load": None,
        "command": "python -m distbench.offline",
        "model": {"name": "sleep,per_sample=25ms", "digest": "", "total": 1024, "depth": 1},
        "warmup": {"rate_qps": 40.0, "slowest_group_ns": 100_000_000, "groups": 10},
        "harness": {
            "loop_ns": [900_000, 800_000 + rank * 40_000, 850_000],
            "clock_ns": [40_000, 20_000 + rank * 4_000],
            "batches": 400,
            "reads": 400,
        },
        "clock": {
            "domain": f"boot-{rank}/1",
            "leader": rank,
            "exchanges": exchanges if rank else [],
        },
        "environment": {
            "hostname": f"node-{rank}",
            "python": "3.11.9",
            "memory_total_bytes": 8_000_000_000,
        },
        "gpu_before": None,
        "foreign_before": [],
        "findings": [],
    }


def _after(rank: int, log: SampleLog, plan: int, started: int, ended: int) -> dict[str, Any]:
    return {
        "rank": rank,
        "used": log.capacity,
        "started_ns": started,
        "end": None,
        "disk_error": "",
        "plan": {
            "reference_ns": START_NS,
            "local_ns": plan,
            "attempts": 1,
            "rehearsals_ns": [150],
            "margin_ns": 50_000_000,
        },
        "ended_ns": ended,
        "errors": [],
        "quiet": {
            "involuntary_switches": rank,
            "run_delay_ns": 1_000_000,
            "window_ns": 1_000_000_000,
        },
        "outputs": {"groups": 10, "non_finite": 0, "compared": 0, "different": 0},
        "score": {"right": 9.0 + rank % 2, "of": 10.0, "reason": ""},
        "text": {"bits": 300.0 + rank % 2, "bytes": 200, "reason": ""},
        "exchanges": {},
        "memory_peak_bytes": 100_000_000 + rank % 2 * 60_000_000,
        "gpu_after": None,
        "foreign_after": [],
    }


def in_memory(**shape: Any) -> Run:
    """Return the run that ``make_run`` would store."""
    ranks = make_ranks(**shape)
    records = [
        RankRecord(
            rank,
            each.before,
            each.after,
            each.log.rows[: each.after["used"]] if each.after else each.log.rows,
            "" if each.after else "after.json cannot be read",
            token_ns=each.log.token_ns,
        )
        for rank, each in enumerate(ranks)
    ]
    return Run(len(records), tuple(records))


def make_run(folder: Path, *, report: bool = True, **shape: Any) -> Path:
    """Store a run: every rank its own folder, then what rank 0 adds.

    Args:
        folder: the result directory; made here.
        report: whether rank 0 came to judge it.
        shape: as ``make_ranks``.
    """
    for rank, each in enumerate(make_ranks(**shape)):
        own = rank_folder(folder, rank)
        own.mkdir(parents=True)
        files.write_json(own / "rank.json", each.before)
        stored = SampleLog.create(own / "samples.npy", each.log.capacity, each.log.columns)
        stored.rows[:] = each.log.rows
        stored.flush(0, stored.capacity)
        if each.log.token_ns is not None:
            most = each.log.token_ns.shape[1]
            stored.record_tokens(own / "tokens.npy", most)
            assert stored.token_ns is not None
            stored.token_ns[:] = each.log.token_ns
            edit_json(own / "rank.json", lambda before, n=most: before.update(most_tokens=n))
        if each.after is not None:
            files.write_json(own / "after.json", each.after)
            write_done(own)
    if report:
        write_report(folder)
    return folder


def mend_hashes(folder: Path) -> None:
    """Make every recorded hash agree with the files again, as one who edits a figure might."""
    for done in folder.glob("ranks/*/done.json"):
        write_done(done.parent)
    write_manifest(folder)


def edit_json(path: Path, change: Callable[[Any], None]) -> None:
    """Change one JSON file in place."""
    value = json.loads(path.read_bytes())
    change(value)
    path.write_bytes(files.to_json(value))


def leaves(value: Any, place: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Yield the path and value of everything in a JSON value that is no object and no list."""
    items: Any = ()
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list):
        items = enumerate(value)
    else:
        yield place, value
    for key, each in items:
        yield from leaves(each, (*place, key))


def put(value: Any, place: Sequence[str | int], new: Any) -> None:
    """Replace what stands at a path of ``leaves``."""
    for key in place[:-1]:
        value = value[key]
    value[place[-1]] = new
