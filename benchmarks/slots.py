"""What the slot engine's own Python costs beside the network, and what continuous batching gains.

    python benchmarks/slots.py
    python benchmarks/slots.py --rounds 20 --samples 256 --json slots.json

The embedded text model on one thread of the CPU, 8 and 32 slots, all samples there at once.

1. Scheduling: time in ``issue`` and ``poll`` less that in the decoder's calls, as a share of the
   whole. Each kind of call counts with its median, times how often it came: a call that was
   interrupted would count the time of others. The project allows 2 %.
2. Decode steps of continuous batching, divided by those of static batching: a count, the same in
   every round. The project allows 0.70.
3. Tokens per second of CPU time, continuous divided by static, in turn.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np
import torch
from common import Report, Row, interleave, parser, ratios

from distbench.clock import now_ns
from distbench.engines.slots import SlotEngine
from distbench.models.decoders import slot_engine
from distbench.models.tinylm_data import draw_samples, read_text
from distbench.models.tinylm_weights import build_net
from distbench.start import quiet
from distbench.sut import FOREVER, Done

SHARE_LIMIT, STEPS_LIMIT = 0.02, 0.70
SLOTS, KINDS = (8, 32), ("continuous", "static")


class Timed:
    """A function, and how long each of its calls took, ns."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.took: list[int] = []

    def __call__(self, *argv: Any) -> Any:
        """Call the function."""
        before = now_ns()
        told = self.function(*argv)
        self.took.append(now_ns() - before)
        return told


def drive(sut: SlotEngine, order: np.ndarray[Any, Any]) -> tuple[list[int], list[tuple[str, int]]]:
    """Issue all samples as Offline does; time every call.

    Returns:
        How long each ``issue`` took, and for each ``poll`` its kind and how long it took, ns.
    """
    issue, polls = Timed(sut.issue), []
    flying = row = 0
    while row < len(order) or flying:
        while row < len(order) and flying < sut.depth:
            issue(row, order[row : row + 1])
            row, flying = row + 1, flying + 1
        prefills, before = sut.prefills, now_ns()
        told = sut.poll(FOREVER)
        took = now_ns() - before
        ended = sum(isinstance(each, Done) for each in told)
        kind = "prefill" if sut.prefills > prefills else "last" if ended else "step"
        polls.append((kind, took))
        flying -= ended
    return issue.took, polls


def scheduling(issued: list[int], polls: list[tuple[str, int]], called: list[int]) -> float:
    """Return the share of the time that is scheduling; every poll is one call of the decoder."""
    own, network = len(issued) * median(issued), 0.0
    for kind in ("prefill", "last", "step"):
        pairs = [(a, b) for (name, a), b in zip(polls, called, strict=True) if name == kind]
        own += len(pairs) * median(outer - inner for outer, inner in pairs)
        network += len(pairs) * median(inner for _, inner in pairs)
    return own / (own + network)


def measure(report: Report, rounds: int, samples: int) -> None:
    """Measure both kinds of batching at every number of slots, in turn."""
    text = draw_samples(read_text())
    net, place = build_net()[0], torch.device("cpu")
    order = np.arange(samples, dtype=np.int64)
    tokens = int(text.output_lengths[:samples].sum())
    shares: dict[str, list[float]] = {}
    steps: dict[str, list[float]] = {}

    def case(name: str, slots: int, batching: str) -> Callable[[], float]:
        def run() -> float:
            sut = slot_engine(net, text, place, slots, batching)
            decoder: Any = sut.decoder
            prefill, decode = Timed(decoder.prefill), Timed(decoder.decode)
            prefill.took = decode.took  # in the order of the calls
            decoder.prefill, decoder.decode = prefill, decode
            before = time.thread_time_ns()
            issued, polls = drive(sut, order)
            spent = time.thread_time_ns() - before
            shares.setdefault(name, []).append(scheduling(issued, polls, decode.took))
            steps.setdefault(name, []).append(sut.steps)
            return tokens / spent * 1e9

        return run

    names = {f"{slots} slots, {kind}": (slots, kind) for slots in SLOTS for kind in KINDS}
    told = interleave(rounds, **{name: case(name, *which) for name, which in names.items()})
    report.table(
        "1. Share of the time that is scheduling",
        [Row(name, values, limit=SHARE_LIMIT) for name, values in shares.items()],
    )
    counts, gains = [], []
    for slots in SLOTS:
        both = [f"{slots} slots, {kind}" for kind in KINDS]
        ratio = f"  {slots} slots, continuous / static"
        counts += [Row(name, steps[name]) for name in both]
        counts.append(Row(ratio, ratios(*(steps[name] for name in both)), limit=STEPS_LIMIT))
        gains += [Row(name, told[name], "1/s") for name in both]
        gains.append(Row(ratio, ratios(*(told[name] for name in both))))
    report.table(f"2. Decode steps for {samples} samples", counts)
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
