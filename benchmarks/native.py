"""The same system under distbench's own loops and under LoadGen: is it the same measurement?

    python benchmarks/native.py
    python benchmarks/native.py --rounds 10 --models sleep,per_sample=5ms --json native.json

Every run is two ranks under torchrun on this host. Server is `distbench.server --dispatch central`
against `distbench.mlperf`: on both sides one driver process issues to the replica with the least
outstanding, a query at a time, with the round's seeds: the same samples by the same schedule, and
that they are as many is checked. Offline is `distbench.offline`, whose ranks need nobody, against
LoadGen's one query, which its driver deals out: the same samples in number, in groups of 32.

A round takes the two runs of a model next to each other, and the two of `echo`, which computes
nothing, at the same rate or of the same number of samples: the dispatch floor of each side. Which
side goes first changes with every round. Each side's own floor, of the same round, is taken off:

    p50 of Server          latency.p50 of the model - latency.p50 of echo
    throughput of Server   (queries - 1) / (completion of the one scheduled last - p50 of echo)
    throughput of Offline  samples / (makespan of the model - makespan of echo)

Both sides count a latency from the schedule to the completion message, on the driver's clock, and
a percentile is sorted[int(n p)] on both. A ratio is that of LoadGen's figure to the native one of
the same round. The interval that has a limit is that of the mean over rounds, of logarithms, 99 %,
by Student's t: it must contain 1, and the row says how far 1 lies outside. Of Server's throughput,
where the schedule is fixed, that tells little of the system: its p50 does. It is as wide as the
machine is noisy: what other programs took of its processors stands beside the runs, which want four
of their own.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from common import Report, Row, mean_ratio, parser, ratios
from dispatch import busy_s, environment, own_s

CONFIDENCE = 0.99
GROUP = 32
RANKS = 2
SCENARIOS = ("server", "offline")
FLOOR = "echo"
BOUND = "15ms@p99"
"""Server's limit, which no figure here depends on; LoadGen's of echo."""
Take = Callable[[], dict[str, float]]


def run(command: str, *options: str) -> dict[str, float]:
    """Take one run over two ranks in a folder of its own.

    Returns:
        ``samples``; ``throughput``, 1/s; ``p50``, s; ``others``, processors that other programs
        took meanwhile.
    """
    from tests.support import torchrun_argv

    with tempfile.TemporaryDirectory(prefix="native-") as folder:
        more = (*options, "--device", "cpu", "--warmup", "200ms", "--quiet", "--output-dir", folder)
        argv = [sys.executable, "-m", *torchrun_argv(RANKS, f"distbench.{command}", *more)]
        begin, busy, own = time.monotonic(), busy_s(), own_s()
        done = subprocess.run(
            argv, env=environment(), capture_output=True, text=True, check=False, timeout=300
        )
        others = (busy_s() - busy - (own_s() - own)) / (time.monotonic() - begin)
        if done.returncode:
            raise SystemExit(f"{argv} ended with status {done.returncode}: {done.stderr[-2000:]}")
        (path,) = Path(folder).glob("*/result.json")
        result = json.loads(path.read_bytes())
    found = result["metrics"]
    # Under LoadGen `throughput` is its headline; of a native Server run that one has this name.
    rate = "throughput.completed" if "throughput.completed" in found else "throughput"
    return {
        "samples": result["window"]["samples"],
        "throughput": found[rate]["value"],
        "p50": found["latency.p50"]["value"],
        "others": max(0.0, others),
    }


def server(model: str, qps: float, seconds: float) -> dict[str, Take]:
    """Return how a model's Server runs are taken, by side."""
    both = ("--model", model, "--target-qps", f"{qps:g}")
    both += ("--rules", f"mlperf-v5.0,shortened={seconds:g}s")
    native = ("--dispatch", "central", "--duration", f"{seconds:g}s", "--latency-bound", BOUND)
    loadgen = ("--scenario", "server", "--benchmark", FLOOR)
    return {
        "native": lambda: run("server", *both, *native),
        "loadgen": lambda: run("mlperf", *both, *loadgen),
    }


def offline(model: str, samples: int, folder: str) -> dict[str, Take]:
    """Return how a model's Offline runs are taken, by side."""
    conf = Path(folder) / f"{samples}.conf"
    conf.write_text(f"*.Offline.min_query_count = {samples}\n*.Offline.target_qps = 1\n")
    native = ("--batch-size", str(GROUP), "--num-samples", str(samples))
    loadgen = ("--scenario", "offline", "--benchmark", FLOOR, "--user-conf", str(conf))
    loadgen += ("--max-batch", str(GROUP), "--rules", "mlperf-v5.0,shortened=1us")
    return {
        "native": lambda: run("offline", "--model", model, *native),
        "loadgen": lambda: run("mlperf", "--model", model, *loadgen),
    }


def in_turn(rounds: int, cases: Sequence[dict[str, Take]]) -> list[dict[str, list[Any]]]:
    """Take all cases in every round, each case's two sides one after the other.

    Args:
        rounds: how many.
        cases: by side; the first side goes first in rounds 0, 2, ...

    Returns:
        The runs of each case by side, one per round.
    """
    told: list[dict[str, list[Any]]] = [{side: [] for side in case} for case in cases]
    for number in range(rounds):
        for case, runs in zip(cases, told, strict=True):
            for side in list(case)[:: -1 if number % 2 else 1]:
                runs[side].append(case[side]())
            counts = {runs[side][-1]["samples"] for side in case}
            if len(counts) > 1:
                raise SystemExit(f"the two sides had {sorted(counts)} samples: not the same load")
    return told


def rows_of(name: str, values: dict[str, list[float]], unit: str, judged: bool) -> list[Row]:
    """Return a figure of both sides and its ratio; judged: with the interval that must hold 1."""
    rows = [Row(f"{name}, {side}", each, unit) for side, each in values.items()]
    paired = ratios(values["loadgen"], values["native"])
    rows.append(Row("  LoadGen / native", paired))
    if judged and len(paired) > 1:
        mean, low, high = mean_ratio(paired, CONFIDENCE)
        told = f"{mean:.4f}, {CONFIDENCE:.0%} {low:.4f} to {high:.4f}"
        outside = max(0.0, low - 1, 1 - high)
        rows.append(Row("  1 is outside of the mean's interval by", [outside], limit=0, note=told))
    return rows


def others_of(runs: dict[str, list[Any]]) -> Row:
    """Return what other programs took of the processors while a model's runs were taken."""
    taken = [each["others"] for side in runs.values() for each in side]
    return Row("processors that other programs took", taken)


def of(runs: dict[str, list[Any]], figure: Callable[[Any], float]) -> dict[str, list[float]]:
    """Return a figure of every run, by side."""
    return {side: [figure(each) for each in taken] for side, taken in runs.items()}


def less(
    runs: dict[str, list[float]], floors: dict[str, list[float]], name: str
) -> dict[str, list[float]]:
    """Take each side's floor off, round by round.

    Raises:
        SystemExit: a floor is no smaller than what stands on it.
    """
    left = {
        side: [a - b for a, b in zip(values, floors[side], strict=True)]
        for side, values in runs.items()
    }
    if min(map(min, left.values())) <= 0:
        raise SystemExit(f"{name}: a run was shorter than its floor: give a longer model")
    return left


def rates(count: int, took: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return so many samples by the time that they took, by side."""
    return {side: [count / each for each in values] for side, values in took.items()}


def compare_server(
    report: Report, rounds: int, models: Sequence[str], qps: float, seconds: float
) -> None:
    """Compare Server runs at one rate."""
    told = in_turn(rounds, [server(model, qps, seconds) for model in (FLOOR, *models)])
    floors = of(told[0], lambda run: run["p50"])
    rows = [*rows_of("p50", floors, "s", judged=False), others_of(told[0])]
    report.table(f"Server, {FLOOR}: the dispatch floor, {qps:g} queries/s, {seconds:g} s", rows)
    for model, runs in zip(models, told[1:], strict=True):
        count, raw = int(runs["native"][0]["samples"]), of(runs, lambda run: run["p50"])
        rows = rows_of("throughput", of(runs, lambda run: run["throughput"]), "1/s", judged=False)
        took = less(of(runs, lambda run: (run["samples"] - 1) / run["throughput"]), floors, model)
        rows += rows_of("throughput without floor", rates(count - 1, took), "1/s", judged=True)
        rows += rows_of("p50", raw, "s", judged=False)
        rows += rows_of("p50 without floor", less(raw, floors, model), "s", judged=True)
        report.table(f"Server, {model}: {count:,} queries each", [*rows, others_of(runs)])


def compare_offline(report: Report, rounds: int, models: Sequence[str], seconds: float) -> None:
    """Compare Offline runs of a number of samples that takes about so long."""
    for model in models:
        options = ("--model", model, "--batch-size", str(GROUP), "--duration", f"{seconds:g}s")
        dealt = GROUP * RANKS
        samples = max(1, round(run("offline", *options)["throughput"] * seconds / dealt)) * dealt
        with tempfile.TemporaryDirectory(prefix="native-conf-") as folder:
            cases = [offline(each, samples, folder) for each in (FLOOR, model)]
            floor, runs = in_turn(rounds, cases)
        took, floors = (
            of(each, lambda run: run["samples"] / run["throughput"]) for each in (runs, floor)
        )
        left = rates(samples, less(took, floors, model))
        raw = of(runs, lambda run: run["throughput"])
        rows = [Row(f"makespan of {FLOOR}, {side}", each, "s") for side, each in floors.items()]
        rows += rows_of("throughput", raw, "1/s", judged=False)
        rows += rows_of("throughput without floor", left, "1/s", judged=True)
        report.table(f"Offline, {model}: {samples:,} samples each", [*rows, others_of(runs)])


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=10, help="of each comparison (10)")
    made.add_argument(
        "--models", nargs="+", default=["sleep,per_sample=5ms", "digits,width=256"], help="systems"
    )
    made.add_argument("--scenarios", nargs="+", default=SCENARIOS, choices=SCENARIOS, help="both")
    made.add_argument("--qps", type=float, default=100.0, help="of Server (100)")
    made.add_argument("--seconds", type=float, default=5.0, help="of each run, about (5)")
    given = made.parse_args()
    report = Report("native", vars(given))
    if "server" in given.scenarios:
        compare_server(report, given.rounds, given.models, given.qps, given.seconds)
    if "offline" in given.scenarios:
        compare_offline(report, given.rounds, given.models, given.seconds)
    report.end(given.json)


if __name__ == "__main__":
    main()
