"""Server runs under central dispatch laid out from hand-chosen integers, on top of ``synthetic``.

Query k is due k ms after the agreed instant and served by rank k % ranks. The driver issues it 10
us later; its rank reads it at 30 us and issues it at 35 us; the engine has it from 37 us to 437
us; it completes there at 440 us, and its message is with the driver at 500 us. The driver is on a
host of its own, whose clock is ``DRIVER_OFFSET_NS`` ahead.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from distbench.courses import COURSE_COLUMNS
from distbench.dispatch import COLUMNS
from distbench.errors import DRIVER
from distbench.rank_files import write_driver, write_rank
from distbench.record import write_report
from distbench.run import RankRecord, Run, rank_folder
from distbench.samples import SampleLog

from .synthetic import AFTER_NS, BEFORE_NS, BOUND_NS, START_NS, make_ranks

US, MS = 10**3, 10**6
DRIVER_OFFSET_NS = 3_000_000_000_005
PARTS = {
    "scheduled": 0, "issued": 10, "read": 30, "handed": 35, "started": 37, "finished": 437,
    "ended": 440, "completed": 500,
}  # fmt: skip
"""When each thing happens to a query after it was due, us."""


def driver_record(n: int, ranks: int, bound_ns: int = BOUND_NS) -> RankRecord:
    """Return the driver's record of ``n`` queries."""
    log = SampleLog.in_memory(n, COLUMNS)
    due = START_NS + DRIVER_OFFSET_NS + np.arange(n) * MS
    log.index[:] = np.arange(n) % 1024
    log.scheduled[:] = log.ready[:] = due
    log.issued[:] = due + PARTS["issued"] * US
    log.completed[:] = due + PARTS["completed"] * US
    log.count[:] = 1
    log.served_by[:] = np.arange(n) % ranks
    begin = START_NS + DRIVER_OFFSET_NS
    before = {
        "schema_version": 1,
        "scenario": "server",
        "run_id": make_ranks(1)[0].before["run_id"],
        "rank": DRIVER,
        "host": "control",
        "pid": 4711,
        "columns": list(COLUMNS),
        "clock": {
            "domain": "boot-driver/1",
            "leader": DRIVER,
            "exchanges": [[BEFORE_NS, DRIVER_OFFSET_NS, bound_ns, 2 * bound_ns, 100]],
        },
        "rule": "least outstanding",
        "payload": "index",
        "findings": [],
    }
    after = {
        "used": n,
        "plan": {"reference_ns": START_NS, "local_ns": begin},
        "started_ns": begin + 700,
        "ended_ns": int(log.completed.max()) + US,
        "halted": False,
        "end": None,
        "errors": [],
        "disk_error": "",
        "quiet": {"involuntary_switches": 0, "run_delay_ns": 0, "window_ns": n * MS},
    }
    return RankRecord(DRIVER, before, after, log.rows)


def dispatched(n: int = 2_000, ranks: int = 2, bound_ns: int = BOUND_NS, **shape: Any) -> Run:
    """Return the run of all logs.

    Args:
        n: queries.
        ranks: how many serve.
        bound_ns: of the exchanges with the driver.
        shape: as ``make_ranks``.
    """
    driver = driver_record(n, ranks, bound_ns)
    made = make_ranks(ranks, **shape)
    assert made[0].after is not None
    made[0].after["exchanges"][str(DRIVER)] = [
        [at, DRIVER_OFFSET_NS, bound_ns, 2 * bound_ns, 100] for at in (BEFORE_NS, AFTER_NS)
    ]
    records = []
    for rank, each in enumerate(made):
        assert each.after is not None
        number = np.arange(rank, n, ranks)
        log = SampleLog.in_memory(len(number), [c for c in COURSE_COLUMNS if c != "device"])
        due = each.after["plan"]["local_ns"] + number * MS
        log.index[:], log.query[:], log.count[:] = number % 1024, number, 1
        log.scheduled[:] = log.ready[:] = due + PARTS["read"] * US
        log.issued[:] = due + PARTS["handed"] * US
        log.started[:] = due + PARTS["started"] * US
        log.finished[:] = due + PARTS["finished"] * US
        log.completed[:] = due + PARTS["ended"] * US
        last = int(log.completed.max())
        each.after |= {"used": len(number), "ended_ns": last}
        each.after["quiet"]["window_ns"] = n * MS
        each.before |= {
            "scenario": "server",
            "columns": list(log.columns),
            "group": 1,
            "load": {
                "target_qps": 1000.0, "arrival": "poisson", "dispatch": "central", "max_batch": 1,
                "max_wait_ns": 0, "bounds": [],
            },
            "schedule": {"queries": n, "backlog": 2000},
        }  # fmt: skip
        records.append(RankRecord(rank, each.before, each.after, log.rows))
    return Run(ranks, tuple(records), driver=driver)


def store(folder: Path, run: Run) -> Path:
    """Write a run as rank 0 does."""
    for record in run.present:
        write_rank(rank_folder(folder, record.rank), record)
    if run.driver is not None:
        write_driver(folder, run.driver)
    write_report(folder)
    return folder
