"""What a sample costs under distbench's Offline loop, and what it costs under MLCommons' LoadGen.

    pip install '.[mlperf]' && python benchmarks/versus_loadgen.py
    python benchmarks/versus_loadgen.py --rounds 31 --json versus.json

Both run in this process on one thread, in turn; a figure is the processor time of the whole process
(all threads, user and system) divided by the samples, so that another program on the machine counts
as little as can be.

1. Nothing to do. LoadGen is driven through its Python binding as its users do it: the issue
   callback gets all samples and completes them, one by one, by 32, or in one call, and does nothing
   else, not even look at the indices: LoadGen at its best. distbench drives ``echo`` in groups of 1
   and of 32, its default. LoadGen counts from before its test starts to after its logs are closed,
   so distbench's counterpart is more than its loop: the sample order, a log in a file, the loop and
   the percentiles of all latencies. The project allows a third of LoadGen's time in groups of 32.
   Groups of 1 have no limit: two clock reads, one group handed over and one ``Done`` are more than
   a third of LoadGen's time in Python, whatever the loop does. A whole run of distbench is there
   too, with intervals, findings, hashes and files: the difference of two runs of unlike length, so
   that what happens once a run falls out.
2. The digits network through the same engine. Here the model is nearly all of the time, and the
   interval of the median ratio says which difference could be seen at all.
3. Server over a system that does nothing, both by LoadGen's own Poisson schedule: the latencies
   from the schedule to the completion, and distbench's lateness. LoadGen sleeps until a query is
   due; distbench sleeps and then spins, which takes a processor. The project allows a p50 of 25 us
   and a lateness of 10 us. LoadGen answers in its issue callback.

Tracing is off in LoadGen, and Python's cycle collector is off on both sides.
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from common import Report, Row, interleave, parser, ratios

from distbench.clock import now_ns
from distbench.offline import offline_loop, run_offline
from distbench.prepare import ALL_COLUMNS, groups_of, sample_order
from distbench.quantiles import percentiles_ns
from distbench.samples import SampleLog, spread_column
from distbench.start import quiet
from distbench.stats import order_ranks
from distbench.sut import FOREVER, Echo, SystemUnderTest, collector

CPU_LIMIT = 1 / 3
PERCENTILES = (0.5, 0.9, 0.95, 0.97, 0.99, 0.999)
SERVER_S = 2.0
WHOLE = (20_000, 120_000)
"""Samples of the two whole runs whose difference is taken."""


def cpu_per_sample(block: Callable[[], Any], samples: int) -> Callable[[], float]:
    """Return a function that runs a block and gives the process's processor time, ns a sample."""

    def timed() -> float:
        begin = time.process_time_ns()
        block()
        return (time.process_time_ns() - begin) / samples

    return timed


def under_loadgen(
    answer: Callable[[Sequence[Any]], None], total: int, samples: int, folder: Path
) -> None:
    """Let LoadGen take one Offline test; ``answer`` completes all samples that it is handed."""
    import mlperf_loadgen as lg

    settings = lg.TestSettings()
    settings.scenario, settings.mode = lg.TestScenario.Offline, lg.TestMode.PerformanceOnly
    settings.min_duration_ms, settings.offline_expected_qps = 0, 1
    settings.min_query_count = samples
    take_test(lg, settings, answer, total, folder)


def take_test(
    lg: Any, settings: Any, answer: Callable[[Sequence[Any]], None], total: int, folder: Path
) -> None:
    """Run one test of LoadGen; ends the benchmark where its log tells of errors."""

    def nothing(_indices: Sequence[int]) -> None:
        """All samples are resident."""

    log = lg.LogSettings()
    log.enable_trace, log.log_output.outdir = False, str(folder)
    driven = lg.ConstructSUT(answer, lambda: None)
    library = lg.ConstructQSL(total, total, nothing, nothing)
    # No file of that name: an audit.config in the current folder would override the settings.
    lg.StartTestWithLogSettings(driven, library, settings, log, str(folder / "none.config"))
    lg.DestroyQSL(library)
    lg.DestroySUT(driven)
    told = (folder / "mlperf_log_summary.txt").read_text()
    if "No errors encountered" not in told:
        raise SystemExit(f"LoadGen told of errors:\n{told}")


def in_groups(size: int) -> Callable[[Sequence[Any]], None]:
    """Return an answer that only completes, ``size`` samples a call; 0: all in one call."""
    from mlperf_loadgen import QuerySampleResponse, QuerySamplesComplete

    def answer(queried: Sequence[Any]) -> None:
        names = [each.id for each in queried]  # a slice of what LoadGen hands over is dear
        step = size or len(names)
        for row in range(0, len(names), step):
            part = names[row : row + step]
            QuerySamplesComplete([QuerySampleResponse(name, 0, 0) for name in part])

    return answer


def through(sut: SystemUnderTest, size: int) -> Callable[[Sequence[Any]], None]:
    """Return an answer that computes in a system under test, ``size`` samples a group."""
    from mlperf_loadgen import QuerySampleResponse, QuerySamplesComplete

    def answer(queried: Sequence[Any]) -> None:
        names = [each.id for each in queried]
        indices = np.array([each.index for each in queried], np.int64)
        for row in range(0, len(names), size):
            part = names[row : row + size]
            sut.issue(row, indices[row : row + size])
            for _ in sut.poll(FOREVER):
                QuerySamplesComplete([QuerySampleResponse(name, 0, 0) for name in part])

    return answer


def under_distbench(sut: SystemUnderTest, batch: int, samples: int, folder: Path) -> None:
    """Drive a system as one rank's window does, from the sample order to the percentiles."""
    path = folder / "samples.npy"
    path.unlink(missing_ok=True)
    log = SampleLog.create(path, samples, ALL_COLUMNS)
    log.index[:] = order = sample_order(sut.total, 0, samples, 0)
    log.scheduled[:] = now_ns()
    errors: list[str] = []
    offline_loop(sut, log, groups_of(order, batch), collector(log, {}, errors, now_ns), now_ns)
    latencies = spread_column(log.rows, log.columns, "completed") - log.scheduled
    found = percentiles_ns(latencies, PERCENTILES)
    if errors or min(found) <= 0:
        raise SystemExit(f"distbench's loop told of errors: {errors or found}")


def whole_run(world: Any, samples: int, batch: int, folder: Path) -> None:
    """Take one whole run of Echo, judged and written."""
    run_offline(
        Echo(), world, batch_size=batch, num_samples=samples, warmup_s=0, output_dir=str(folder)
    )


def nothing_to_do(report: Report, rounds: int, samples: int, folder: Path) -> None:
    """Compare both over a system that does nothing."""
    from distbench.world import join

    def loadgen(size: int) -> Callable[[], float]:
        answer = in_groups(size)
        return cpu_per_sample(lambda: under_loadgen(answer, 1024, samples, folder), samples)

    def ours(batch: int) -> Callable[[], float]:
        return cpu_per_sample(lambda: under_distbench(Echo(), batch, samples, folder), samples)

    with join(device="cpu", backend="gloo") as world:

        def whole() -> float:
            took = []
            for number in WHOLE:
                begin = time.process_time_ns()
                whole_run(world, number, 1, folder)
                took.append(time.process_time_ns() - begin)
            return (took[1] - took[0]) / (WHOLE[1] - WHOLE[0])

        cases = {
            "loadgen_1": loadgen(1),
            "ours_1": ours(1),
            "loadgen_32": loadgen(32),
            "ours_32": ours(32),
            "loadgen_all": loadgen(0),
        }
        with quiet():
            interleave(1, **cases)
            told = interleave(rounds, **cases)
        whole()
        told |= interleave(rounds, whole=whole)
    report.table(
        f"1. Nothing to do: processor time a sample, {samples:,} samples",
        [
            Row("LoadGen, completed one by one", told["loadgen_1"], "ns"),
            Row("distbench, groups of 1", told["ours_1"], "ns"),
            Row("LoadGen, completed by 32", told["loadgen_32"], "ns"),
            Row("distbench, groups of 32", told["ours_32"], "ns"),
            Row("LoadGen, completed in one call", told["loadgen_all"], "ns"),
            Row("a whole run of distbench, groups of 1, by difference", told["whole"], "ns"),
        ],
    )
    by_32, at_best = told["loadgen_32"], told["loadgen_all"]
    report.table(
        "   ratio distbench / LoadGen in the same round",
        [
            Row("groups of 32 / by 32", ratios(told["ours_32"], by_32), "", CPU_LIMIT),
            Row("groups of 32 / in one call", ratios(told["ours_32"], at_best), "", CPU_LIMIT),
            Row("groups of 1 / one by one", ratios(told["ours_1"], told["loadgen_1"])),
        ],
    )


def digits(report: Report, rounds: int, folder: Path) -> None:
    """Compare both over the digits network on one thread."""
    import torch

    from distbench.gpus import Device
    from distbench.models.digits import build

    torch.set_num_threads(1)
    rows = []
    for batch, samples in ((1, 1_000), (32, 8_192)):
        sut = build(Device("cpu", 0, "", "", "", ""), batch)
        cases = {
            "loadgen": lambda s=sut, b=batch, n=samples: under_loadgen(
                through(s, b), s.total, n, folder
            ),
            "ours": lambda s=sut, b=batch, n=samples: under_distbench(s, b, n, folder),
        }
        timed = {name: cpu_per_sample(block, samples) for name, block in cases.items()}
        with quiet():
            interleave(1, **timed)
            told = interleave(rounds, **timed)
        paired = ratios(told["ours"], told["loadgen"])
        rows += [
            Row(f"LoadGen, groups of {batch}", [ns / 1e3 for ns in told["loadgen"]], "us"),
            Row(f"distbench, groups of {batch}", [ns / 1e3 for ns in told["ours"]], "us"),
            Row("  ratio distbench / LoadGen", paired, note=interval(paired)),
        ]
    report.table("2. digits: processor time a sample", rows)


def server(report: Report, rounds: int, qps: float, folder: Path) -> None:
    """Compare the latencies of a Server window of a system that answers at once."""
    from distbench.load import Load
    from distbench.server import run_server
    from distbench.world import join

    said: dict[str, list[float]] = {name: [] for name in ("p50", "p99", "lateness")}
    theirs: dict[str, list[float]] = {name: [] for name in ("p50", "p99")}
    with join(device="cpu", backend="gloo") as world:
        for number in range(rounds):
            run = run_server(
                Echo(),
                world,
                load=Load(qps),
                duration_s=SERVER_S,
                warmup_s=0,
                seed=number,
                output_dir=str(folder),
            )
            found = run.result()["metrics"]
            for name, metric in (
                ("p50", "latency.p50"),
                ("p99", "latency.p99"),
                ("lateness", "lateness.p50"),
            ):
                said[name].append(found[metric]["value"] * 1e6)
            told = loadgen_server(qps, number, folder)
            for name, values in theirs.items():
                values.append(told[name])
    report.table(
        f"3. Server, nothing to do, {qps:,.0f} queries/s for {SERVER_S:g} s",
        [
            Row("distbench: latency p50", said["p50"], "us", 25),
            Row("  lateness p50", said["lateness"], "us", 10),
            Row("  latency p99", said["p99"], "us"),
            Row("LoadGen: latency p50", theirs["p50"], "us"),
            Row("  latency p99", theirs["p99"], "us"),
            Row("ratio of p50, distbench / LoadGen", ratios(said["p50"], theirs["p50"])),
        ],
    )


def loadgen_server(qps: float, seed: int, folder: Path) -> dict[str, float]:
    """Let LoadGen take one Server test; returns its percentiles in us."""
    import mlperf_loadgen as lg

    settings = lg.TestSettings()
    settings.scenario, settings.mode = lg.TestScenario.Server, lg.TestMode.PerformanceOnly
    settings.server_target_qps, settings.server_target_latency_ns = qps, 10**9
    settings.min_duration_ms, settings.min_query_count = round(1e3 * SERVER_S), 1
    settings.schedule_rng_seed = seed
    take_test(lg, settings, in_groups(0), 1024, folder)
    text = (folder / "mlperf_log_summary.txt").read_text()
    found = {
        name: re.search(rf"^{label}0? percentile latency \(ns\)\s*: (\d+)", text, re.M)
        for name, label in (("p50", r"50\.0"), ("p99", r"99\.0"))
    }
    return {name: int(match[1]) / 1e3 for name, match in found.items() if match}


def interval(values: Sequence[float]) -> str:
    """Say in which interval the median lies: order statistics of independent rounds."""
    ranks = order_ranks(len(values), 0.5, 0.95)
    if ranks is None:
        return "too few rounds for an interval"
    low, high = (sorted(values)[rank] for rank in ranks)
    word = "no difference can be seen" if low <= 1 <= high else "a difference"
    return f"95 % {low:.3f} to {high:.3f}: {word}"


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=15, help="of each case (15)")
    made.add_argument("--samples", type=int, default=100_000, help="of a test that does nothing")
    made.add_argument("--qps", type=float, default=2_000, help="of the Server test (2000)")
    made.add_argument("--folder", default=".", help="where logs are made (.)")
    options = made.parse_args()
    try:
        wheel = version("mlcommons-loadgen")
    except ModuleNotFoundError:
        sys.exit("mlcommons-loadgen is not installed: pip install '.[mlperf]'")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    report = Report("versus_loadgen", vars(options))
    report.say(f"mlcommons-loadgen {wheel}, one rank")
    with tempfile.TemporaryDirectory(prefix=".versus-", dir=options.folder) as folder:
        nothing_to_do(report, options.rounds, options.samples, Path(folder))
        digits(report, options.rounds, Path(folder))
        server(report, max(2, options.rounds // 3), options.qps, Path(folder))
    report.end(options.json)


if __name__ == "__main__":
    main()
