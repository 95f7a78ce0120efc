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


def tokens(at: dict[str, Ints], counts: Ints, first_ns: Ints | int, most: int = 16) -> Ints:
    """Make queries those of a token model; adds columns to ``at`` and returns the stamps.

    Args:
        at: from ``queries``.
        counts: tokens of each.
        first_ns: from the schedule to the first token.
        most: tokens of a query at most.

    Returns:
        Shape (n, most), int64, from the agreed instant: the last token is out when the engine ends,
        the others are evenly spread from the first one on.
    """
    n = len(counts)
    at["tokens"], at["first_token"] = counts, at["scheduled"] + first_ns
    stamps = np.zeros((n, most), np.int64)
    for row in range(n):
        made = np.linspace(at["first_token"][row], at["finished"][row], counts[row])
        stamps[row, : counts[row]] = made.astype(np.int64)
    return stamps


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
    columns: tuple[str, ...] = (
        COLUMNS if scenario == "server" else tuple(c for c in COLUMNS if c != "ready")
    )
    without = {"device"} | ({"tokens", "first_token"} - set(at))
    log = SampleLog.in_memory(n, [c for c in columns if c not in without])
    assert rank.after is not None
    instant = rank.after["plan"]["local_ns"]
    for name in log.columns:
        if name in at and name not in ("count", "tokens"):
            getattr(log, name)[:] = at[name] + instant
    log.index[:] = np.arange(n) % 1024
    log.count[:] = at.get("count", np.ones(n, np.int64))
    if "tokens" in at:
        log.tokens[:] = at["tokens"]
    if "stamps" in at:
        log.token_ns = np.where(at["stamps"] > 0, at["stamps"] + instant, 0)
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
    rank.after["quiet"] |= {"window_ns": last - instant, "run_delay_ns": 0}
