"""What the slot engine's own Python costs beside the network, and what continuous batching gains.

    python benchmarks/slots.py
    python benchmarks/slots.py --rounds 20 --samples 256 --json slots.json

The embedded text model on one thread of the CPU, 8 and 32 slots, all samples there at once.

1. Scheduling: CPU time of the thread in ``issue`` and ``poll`` less that in the decoder's calls,
   divided by the whole. Each call stands between two reads of the thread's CPU time, whose cost is
   measured beside it and taken off. The project allows 2 %.
2. Decode steps of continuous batching, divided by those of static batching: a count, the same in
   every round. The project allows 0.70.
3. Tokens per second of CPU time, continuous divided by static, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from common import Report, Row, interleave, parser, ratios

from distbench.engines.slots import SlotEngine
from distbench.models.tinylm import slot_engine
from distbench.models.tinylm_data import draw_samples, read_text
from distbench.models.tinylm_net import build_net
from distbench.start import quiet
from distbench.sut import FOREVER, Done

SHARE_LIMIT, STEPS_LIMIT = 0.02, 0.70
READS = 10_000
SLOTS = (8, 32)
cpu_ns = time.thread_time_ns


def read_cost_ns() -> float:
    """Return what one read of the thread's CPU time costs in CPU time."""
    before = cpu_ns()
    for _ in range(READS):
        cpu_ns()
    return (cpu_ns() - before) / READS


@dataclass
class Timed:
    """A function, and the CPU time spent in it."""

    function: Callable[..., Any]
    calls: int = 0
    spent_ns: int = 0

    def __call__(self, *argv: Any) -> Any:
        """Call the function."""
        before = cpu_ns()
        told = self.function(*argv)
        self.spent_ns += cpu_ns() - before
        self.calls += 1
        return told


def drive(sut: SlotEngine, order: np.ndarray[Any, Any]) -> int:
    """Issue all samples as Offline does; returns the CPU time in ``issue`` and ``poll``, ns."""
    issue, poll = Timed(sut.issue), Timed(sut.poll)
    flying = row = 0
    while row < len(order) or flying:
        while row < len(order) and flying < sut.depth:
            issue(row, order[row : row + 1])
            row, flying = row + 1, flying + 1
        flying -= sum(isinstance(each, Done) for each in poll(FOREVER))
    cost = read_cost_ns()
    return round(issue.spent_ns + poll.spent_ns - cost * (issue.calls + poll.calls))


def measure(report: Report, rounds: int, samples: int) -> None:
    """Measure both kinds of batching at every number of slots, in turn."""
    text = draw_samples(read_text())
    net, place = build_net()[0], torch.device("cpu")
    order = np.arange(samples, dtype=np.int64)
    tokens = int(text.output_lengths[:samples].sum())
    shares: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {}

    def case(slots: int, batching: str) -> Callable[[], float]:
        name = f"{slots} slots, {batching}"

        def run() -> float:
            sut = slot_engine(net, text, place, slots, batching)
            inner = [Timed(sut.decoder.prefill), Timed(sut.decoder.decode)]
            sut.decoder.prefill, sut.decoder.decode = inner  # type: ignore[method-assign]
            whole = drive(sut, order)
            # Each inner call adds two reads to poll: one falls inside its own bracket, one outside.
            cost = read_cost_ns()
            calls = sum(each.calls for each in inner)
            model = sum(each.spent_ns for each in inner) - cost * calls
            whole -= round(2 * cost * calls)
            shares.setdefault(name, []).append((whole - model) / whole)
            steps.setdefault(name, []).append(sut.steps)
            return tokens / whole * 1e9

        return run

    names = [(slots, batching) for slots in SLOTS for batching in ("continuous", "static")]
    cases = {f"{slots} slots, {batching}": case(slots, batching) for slots, batching in names}
    told = interleave(rounds, **cases)
    report.table(
        "1. Share of the CPU time that is scheduling",
        [Row(name, values, limit=SHARE_LIMIT) for name, values in shares.items()],
    )
    rows, gains = [], []
    for slots in SLOTS:
        both = [f"{slots} slots, {batching}" for batching in ("continuous", "static")]
        rows += [Row(name, steps[name]) for name in both]
        ratio = ratios(steps[both[0]], steps[both[1]])
        rows.append(Row(f"  {slots} slots, continuous / static", ratio, limit=STEPS_LIMIT))
        gains += [Row(name, told[name], "1/s") for name in both]
        gains.append(Row(f"  {slots} slots, continuous / static", ratios(*map(told.get, both))))
    report.table(f"2. Decode steps for {samples} samples", rows)
    report.table(f"3. Tokens per second of CPU time, {tokens:,} tokens", gains)


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=10, help="of each case (10)")
    made.add_argument("--samples", type=int, default=256, help="of the model's 1,024 (256)")
    options = made.parse_args()
    torch.set_num_threads(1)
    report = Report("slots", vars(options))
    with quiet():
        measure(report, options.rounds, options.samples)
    report.end(options.json)


if __name__ == "__main__":
    main()
