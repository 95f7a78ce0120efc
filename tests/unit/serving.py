"""Server and stream runs laid out from hand-chosen integers, on top of ``synthetic``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench.samples import SampleLog
from distbench.server import COLUMNS

from .synthetic import Change, Rank

US, MS, S = 10**3, 10**6, 10**9
Ints = NDArray[np.int64]


def queries(n: int, gap_ns: int = MS, **parts: Any) -> dict[str, Ints]:
    """Lay out queries that are due one after the other; times from the agreed instant, ns.

    Args:
        n: how many, each a group of its own.
        gap_ns: between their schedules.
        parts: ``wait``, ``late``, ``handed``, ``served`` and ``returned``, ns, one for all or an
            array: what each latency is made of, in this order.
    """

    def part(name: str, default: int) -> Ints:
        return np.broadcast_to(np.asarray(parts.get(name, default), np.int64), (n,))

    at = {"scheduled": np.arange(n, dtype=np.int64) * gap_ns}
    at["ready"] = at["scheduled"] + part("wait", 0)
    at["issued"] = at["ready"] + part("late", 1 * US)
    at["started"] = at["issued"] + part("handed", 2 * US)
    at["finished"] = at["started"] + part("served", 400 * US)
    at["completed"] = at["finished"] + part("returned", 3 * US)
    return at


def served(ranks: Sequence[Mapping[str, Ints]], scenario: str = "server", **load: Any) -> Change:
    """Return the change that makes a synthetic run one of these queries, a rank each.

    Args:
        ranks: of each, ``queries``; ``count`` where groups are not of one query.
        scenario: "server", or a stream, whose schedule is its issue.
        load: options of the load that differ from 1,000 queries/s.
    """

    def change(made: list[Rank]) -> None:
        for rank, at in zip(made, ranks, strict=True):
            _serve(rank, at, scenario, load, sum(len(each["scheduled"]) for each in ranks))

    return change


def _serve(
    rank: Rank, at: Mapping[str, Ints], scenario: str, load: Mapping[str, Any], queries: int
) -> None:
    n = len(at["scheduled"])
    columns = COLUMNS if scenario == "server" else tuple(c for c in COLUMNS if c != "ready")
    log = SampleLog.in_memory(n, [c for c in columns if c != "device"])
    assert rank.after is not None
    instant = rank.after["plan"]["local_ns"]
    for name in log.columns:
        if name in at and name != "count":
            getattr(log, name)[:] = at[name] + instant
    log.index[:] = np.arange(n) % 1024
    log.count[:] = at.get("count", np.ones(n, np.int64))
    rank.log = log
    rank.before |= {
        "scenario": scenario,
        "columns": list(log.columns),
        "group": int(log.count.max()),
        "load": None,
        "schedule": None,
    }
    if scenario == "server":
        rank.before["load"] = {
            "target_qps": 1000.0, "arrival": "poisson", "dispatch": "static", "max_batch": 1,
            "max_wait_ns": 0, "bounds": [], **load,
        }  # fmt: skip
        rank.before["schedule"] = {"queries": queries, "backlog": 2000}
    last = int(log.completed.max())
    rank.after |= {"used": n, "ended_ns": last}
    rank.after["quiet"]["window_ns"] = last - instant
