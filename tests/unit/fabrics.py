"""Runs of ``collectives`` made from hand-chosen integers, stored as ``synthetic`` stores others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from distbench.operations import BACK_TO_BACK, SPACED, Cell
from distbench.samples import SampleLog

from .synthetic import OFFSET_NS, START_NS, Change, Rank

COLUMNS = ("index", "scheduled", "issued", "completed", "device", "count")
WINDOW_NS = 1_000_000
Times = Callable[[int, int, int], int]
"""Of a rank, a cell and a repetition, ns."""


def pair(
    operation: str, size: int, *, times: int = 10, blocks: int = 4, spaced: int = 20
) -> list[Cell]:
    """Return both cells of an operation at a size; one block more warms, 10 us late is on time."""
    more = (WINDOW_NS, 0, 10_000, 100_000)
    return [
        Cell(operation, size, size // 4, BACK_TO_BACK, times, blocks + 1, 1, 0, *more[1:]),
        Cell(operation, size, size // 4, SPACED, 1, spaced, 0, *more),
    ]


def fabric(
    cells: Sequence[Cell],
    took_ns: Times,
    *,
    late_ns: Times = lambda _rank, _cell, _rep: 100,
    wrong: dict[tuple[int, int], int] | None = None,
    device_ns: int = 0,
    change: Change = lambda _ranks: None,
) -> Change:
    """Return what turns a synthetic run into one of ``collectives``.

    Args:
        cells: its plan.
        took_ns: from the agreed instant, or the block before, to the completion.
        late_ns: from the agreed instant to the issue; of a block that is the first.
        wrong: elements, by (rank, cell).
        device_ns: of every block; 0 for none.
        change: what a test wants otherwise.
    """

    def made(ranks: list[Rank]) -> None:
        for rank, each in enumerate(ranks):
            _make(rank, each)
        change(ranks)

    def _make(rank: int, each: Rank) -> None:
        offset = OFFSET_NS if rank else 0
        log = SampleLog.in_memory(sum(cell.repetitions for cell in cells), COLUMNS)
        row = 0
        for number, cell in enumerate(cells):
            last = START_NS + offset + number * 50_000_000
            for rep in range(cell.repetitions):
                at = START_NS + offset + number * 50_000_000 + rep * cell.window_ns
                first = cell.mode == SPACED or rep == 0
                begin = at if first else last
                log.index[row], log.scheduled[row], log.count[row] = number, at, 1
                log.issued[row] = begin + (late_ns(rank, number, rep) if first else 0)
                log.completed[row] = last = begin + took_ns(rank, number, rep)
                log.device[row] = device_ns
                row += 1
        each.log = log
        each.before |= {
            "scenario": "collectives",
            "columns": list(COLUMNS),
            "cells": [asdict(cell) for cell in cells],
            "transport": way(rank),
            "config": {"dtype": {"value": "fp32", "origin": "default"}},
        }
        each.before["model"] = {"name": "collectives", "digest": "", "dtype": "fp32"}
        assert each.after is not None
        each.after |= {
            "used": len(log.rows),
            "checks": [
                [number, cell.elements, (wrong or {}).get((rank, number), 0)]
                for number, cell in enumerate(cells)
            ],
        }

    return made


def way(rank: int) -> dict[str, Any]:
    """Return what a rank on gloo tells of its way."""
    told = {"rank": rank, "backend": "gloo", "interface": "eth0", "nccl": None}
    return {**told, "address": f"192.0.2.{rank + 1}", "reason": "the operations ran over gloo: TCP"}


def table(result: dict[str, Any], name: str = "collectives") -> list[dict[str, Any]]:
    """Return a table of a result as dicts."""
    names = [each["name"] for each in result["tables"][name]["columns"]]
    return [dict(zip(names, row, strict=True)) for row in result["tables"][name]["rows"]]


def noise(seed: int, spread_ns: int) -> Times:
    """Return reproducible integers from -spread to spread."""
    drawn = np.random.default_rng(seed).integers(-spread_ns, spread_ns + 1, (8, 64, 256))
    return lambda rank, cell, rep: int(drawn[rank, cell, rep])
