"""What dispatch costs under LoadGen: runs over two ranks against LoadGen alone, in turn.

    python benchmarks/mlperf.py
    python benchmarks/mlperf.py --rounds 5 --qps 10000 --samples 1000000 --json mlperf.json

LoadGen alone has a system that completes a sample within the issue, in its own process: the floor
of everything that it measures. Beside it stands `distbench.mlperf --benchmark echo` over two ranks
and the driver on loopback, whose ranks compute nothing either. A round takes one run of each. The
driver's two threads, the two ranks and their side threads want four processors of their own: what
other programs took, and the load average, stand at the end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from common import ROOT, Report, Row, parser

ADDED_LIMIT_US = 120.0
OFFLINE_LEAST = 0.8


def alone(folder: str, scenario: str, conf: str) -> None:
    """Run LoadGen with a system that does nothing, in this process."""
    import mlperf_loadgen as lg  # type: ignore[import-not-found]

    from distbench.waiting import set_timer_slack

    set_timer_slack()

    def issue(samples: Any) -> None:
        lg.QuerySamplesComplete([lg.QuerySampleResponse(each.id, 0, 0) for each in samples])

    settings = lg.TestSettings()
    settings.FromConfig("", "echo", scenario, 0)
    settings.FromConfig(conf, "echo", scenario, 1)
    settings.scenario = getattr(lg.TestScenario, scenario)
    settings.mode = lg.TestMode.PerformanceOnly
    log = lg.LogSettings()
    log.enable_trace = False
    log.log_output.outdir = folder
    sut = lg.ConstructSUT(issue, lambda: None)
    library = lg.ConstructQSL(1024, 1024, lambda _: None, lambda _: None)
    lg.StartTestWithLogSettings(sut, library, settings, log, f"{folder}/no-audit.config")


def keys(folder: Path) -> dict[str, Any]:
    """Return LoadGen's figures."""
    from distbench.mllog import read_detail

    return dict(read_detail(folder).keys)


def floor(scenario: str, conf: Path) -> dict[str, Any]:
    """Run LoadGen alone, in a process of its own."""
    from tests.support import environment

    with tempfile.TemporaryDirectory(prefix="mlperf-") as folder:
        argv = [sys.executable, __file__, "--alone", folder, scenario, str(conf)]
        subprocess.run(argv, env=environment(), check=True, timeout=120)
        return keys(Path(folder))


def dispatched(scenario: str, conf: Path, group: int) -> dict[str, Any]:
    """Run distbench.mlperf over two ranks."""
    from tests.support import environment, torchrun_argv

    with tempfile.TemporaryDirectory(prefix="mlperf-") as folder:
        options = ["--scenario", scenario.lower(), "--benchmark", "echo", "--user-conf", str(conf)]
        options += ["--rules", "mlperf-v5.0,shortened=1ms", "--max-batch", str(group)]
        options += ["--device", "cpu", "--warmup", "200ms", "--quiet", "--output-dir", folder]
        argv = [sys.executable, "-m", *torchrun_argv(2, "distbench.mlperf", *options)]
        done = subprocess.run(
            argv, env=environment(), capture_output=True, text=True, check=False, timeout=120
        )
        if done.returncode:
            raise SystemExit(f"{argv} ended with status {done.returncode}: {done.stderr[-2000:]}")
        (made,) = Path(folder).iterdir()
        result = json.loads((made / "result.json").read_text())
        gates = {gate["name"]: gate["passed"] for gate in result["verdict"]["rules"]["gates"]}
        return {**keys(made / "loadgen"), "clean": gates["errors"]}


def server(report: Report, rounds: int, qps: float, seconds: float, folder: Path) -> None:
    """Compare latencies and delivered rates at one rate."""
    conf = folder / "server.conf"
    conf.write_text(
        f"*.Server.target_qps = {qps:g}\n*.Server.min_query_count = {int(qps * seconds)}\n"
        "*.*.min_duration = 1\n"
    )
    under, over = [], []
    for _ in range(rounds):
        under.append(floor("Server", conf))
        over.append(dispatched("Server", conf, 1))
    rows = []
    for name, runs in (("LoadGen alone", under), ("two ranks", over)):
        for label, key, by, unit in (
            ("p50", "result_50.00_percentile_latency_ns", 1e3, "us"),
            ("p99", "result_99.00_percentile_latency_ns", 1e3, "us"),
            ("p99.9", "result_99.90_percentile_latency_ns", 1e3, "us"),
            ("max", "result_max_latency_ns", 1e3, "us"),
            ("completed, of the rate offered", "result_completed_samples_per_sec", qps, ""),
        ):
            rows.append(Row(f"{name}, {label}", [run[key] / by for run in runs], unit))
    at = "result_50.00_percentile_latency_ns"
    added = [(b[at] - a[at]) / 1e3 for a, b in zip(under, over, strict=True)]
    rows.append(Row("added p50", added, "us", limit=ADDED_LIMIT_US))
    report.table(f"Server, {qps:,.0f} queries/s", rows)


def offline(report: Report, rounds: int, samples: int, folder: Path) -> None:
    """Compare the rates of one query of many samples."""
    conf = folder / "offline.conf"
    conf.write_text(
        f"*.Offline.min_query_count = {samples}\n*.Offline.target_qps = 1\n*.*.min_duration = 1\n"
    )
    under, over = [], []
    for _ in range(rounds):
        under.append(floor("Offline", conf)["result_samples_per_second"])
        over.append(dispatched("Offline", conf, 8192)["result_samples_per_second"])
    report.table(
        f"Offline, {samples:,} samples",
        [
            Row("LoadGen alone", under, "samples/s"),
            Row("two ranks", over, "samples/s"),
            Row(
                "LoadGen alone / two ranks",
                [a / b for a, b in zip(under, over, strict=True)],
                limit=1 / OFFLINE_LEAST,
            ),
        ],
    )


def main() -> None:
    """Measure and print."""
    if sys.argv[1:2] == ["--alone"]:
        alone(*sys.argv[2:5])
        return
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=3, help="runs of each kind (3)")
    made.add_argument("--qps", type=float, nargs="+", default=[1000.0, 10000.0], help="rates")
    made.add_argument("--seconds", type=float, default=5.0, help="of each Server run (5)")
    made.add_argument("--samples", type=int, default=1_000_000, help="of an Offline run")
    given = made.parse_args()
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    report = Report("mlperf", vars(given))
    with tempfile.TemporaryDirectory(prefix="mlperf-conf-") as folder:
        for qps in given.qps:
            server(report, given.rounds, qps, given.seconds, Path(folder))
        offline(report, given.rounds, given.samples, Path(folder))
    report.end(given.json)


if __name__ == "__main__":
    main()
