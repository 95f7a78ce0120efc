"""What the harness itself costs: a scenario's loop over a system under test that does nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from distbench.clock import Now
from distbench.prepare import ALL_COLUMNS, Loop
from distbench.samples import PENDING, SampleLog
from distbench.sut import Done, Indices, collector

HARNESS_BATCHES, HARNESS_BLOCKS = 400, 15


class _Nothing:
    """A SUT that does nothing; what a loop over it takes is the harness's own."""

    def __init__(self, depth: int) -> None:
        self.total = self.resident = 1
        self.depth = depth
        self._rows: list[Done] = []

    def load(self, indices: Indices) -> None: ...
    def unload(self, indices: Indices) -> None: ...
    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        self._rows.append(Done(row, len(indices), indices))

    def poll(self, until_ns: int) -> Sequence[Done]:
        ended, self._rows = self._rows, []
        return ended

    def close(self) -> None: ...


def measure_harness(
    loop: Loop, depth: int, batch_size: int, now: Now, columns: Sequence[str] = ALL_COLUMNS
) -> dict[str, Any]:
    """Time the loop over a SUT that does nothing, in blocks that alternate with bare clock reads.

    Args:
        loop: the scenario's.
        depth: of the SUT that will be measured.
        batch_size: rows of a group.
        now: the clock.
        columns: of the log.

    Returns:
        Raw block times in ns (``loop_ns``, ``clock_ns``) with ``batches`` and ``reads`` a block.
    """
    # One row a group, whatever its size: a larger log would only show as the run's memory.
    log = SampleLog.in_memory(HARNESS_BATCHES, columns)
    indices = np.arange(batch_size)
    loops, clocks = [], []
    for _ in range(HARNESS_BLOCKS):
        log.completed[:] = PENDING
        begin = now()
        groups = ((row, indices[:batch_size]) for row in range(HARNESS_BATCHES))
        loop(_Nothing(depth), log, groups, collector(log, {}, [], now), now)
        loops.append(now() - begin)
        begin = now()
        for _ in range(HARNESS_BATCHES):
            now()
        clocks.append(now() - begin)
    return {
        "loop_ns": loops,
        "clock_ns": clocks,
        "batches": HARNESS_BATCHES,
        "reads": HARNESS_BATCHES,
    }
