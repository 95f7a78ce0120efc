"""What central dispatch costs a query: the driver's wire against the same queries in process.

    python benchmarks/dispatch.py
    python benchmarks/dispatch.py --rounds 5 --qps 2000 10000 --duration 5s --json dispatch.json

Whole runs of `distbench.server` with `echo`, in turn: static dispatch in one process, which has no
wire and no other process, and central dispatch over two ranks and a driver on loopback. Both time
each query from its schedule. A row is one figure of each run: the share of the rate that was
delivered, (last - first scheduled) / (last - first issued); how late queries were issued; the
latency; and in each round what central dispatch adds to the median latency. The driver, two ranks
and their side threads want three processors of their own: on fewer the figures tell of the
scheduler, and so they do where other programs run: what those took stands beside each run.
`--namespaces` (root) puts the second rank into a network namespace of its own.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from common import ROOT, Report, Row, parser

from distbench.run import RankRecord, load_run

ADDED_LIMIT_S = 120e-6


def environment() -> dict[str, str]:
    """Return what a run starts with."""
    from tests.support import environment as made

    return made()


def options(qps: float, duration: str, out: Path) -> list[str]:
    """Return the options that all runs share."""
    given = ["--model", "echo", "--target-qps", f"{qps:g}", "--duration", duration]
    return [*given, "--device", "cpu", "--warmup", "200ms", "--quiet", "--output-dir", str(out)]


def figures(out: Path) -> dict[str, Any]:
    """Read the one result below a folder, and remove nothing."""
    (folder,) = out.iterdir()
    run = load_run(folder)
    found = run.result()["metrics"]
    told: RankRecord = run.official[0]
    due, issued = told.column("scheduled"), told.column("issued")
    completed = told.column("completed")
    good = completed >= 0
    latency = np.sort((completed - due)[good])
    late = np.sort((issued - due)[good])
    return {
        "share": float((due[-1] - due[0]) / max(issued.max() - issued[0], 1)),
        "completed": float(good.mean()),
        "p50": float(latency[len(latency) // 2]) / 1e9,
        "p99": float(latency[int(len(latency) * 0.99)]) / 1e9,
        "late": float(late[len(late) // 2]) / 1e9,
        "harness": found["lateness.p50"]["value"],
    }


def in_process(qps: float, duration: str) -> dict[str, Any]:
    """Take one run of static dispatch in one process."""
    with tempfile.TemporaryDirectory(prefix="dispatch-") as folder:
        argv = [sys.executable, "-m", "distbench.server", *options(qps, duration, Path(folder))]
        _ended([subprocess.Popen(argv, env=environment(), stdout=-3, cwd=folder)])
        return figures(Path(folder))


def central(qps: float, duration: str) -> dict[str, Any]:
    """Take one run of central dispatch over two ranks on loopback."""
    from tests.support import torchrun_argv

    with tempfile.TemporaryDirectory(prefix="dispatch-") as folder:
        more = [*options(qps, duration, Path(folder)), "--dispatch", "central"]
        argv = [sys.executable, "-m", *torchrun_argv(2, "distbench.server", *more)]
        _ended([subprocess.Popen(argv, env=environment(), stdout=-3, stderr=-3, cwd=folder)])
        return figures(Path(folder))


def across(qps: float, duration: str) -> dict[str, Any]:
    """Take one run of central dispatch over two network namespaces; needs root."""
    from tests.cluster import rig

    with ExitStack() as stack:
        folders = [
            Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="dispatch-")))
            for _ in range(2)
        ]
        hosts = stack.enter_context(rig.Hosts(2, decoys=False))
        jobs = []
        for node in (0, 1):
            place = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)]
            place += ["--master-addr", "10.77.0.11", "--master-port", "29508"]
            argv = [sys.executable, "-m", "torch.distributed.run", *place, "-m", "distbench.server"]
            argv += [*options(qps, duration, folders[node]), "--dispatch", "central"]
            jobs.append(hosts.popen(node, argv, env=environment(), stdout=-3, stderr=-3))
        _ended(jobs)
        return figures(folders[0])


def busy_s() -> float:
    """Return the processor time of all programs since the machine began, s."""
    numbers = Path("/proc/stat").read_text().split("\n")[0].split()[1:9]
    user, nice, system, _idle, _wait, irq, softirq, _steal = map(int, numbers)
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def own_s() -> float:
    """Return the processor time of this process and of those it started that have ended, s."""
    return sum(os.times()[:4])


def _ended(jobs: Sequence[subprocess.Popen[Any]]) -> None:
    for job in jobs:
        if job.wait(300) != 0:
            raise SystemExit(f"a run ended with status {job.returncode}: {job.args}")


def compare(report: Report, rounds: int, qps: float, duration: str, namespaces: bool) -> None:
    """Take runs in turn and tell of them."""
    kinds = {"in process (static, 1 rank)": in_process, "central, 2 ranks": central}
    if namespaces:
        kinds["central, 2 namespaces"] = across
    told: dict[str, list[dict[str, Any]]] = {name: [] for name in kinds}
    for _ in range(rounds):
        for name, take in kinds.items():
            begin, busy, own = time.monotonic(), busy_s(), own_s()
            told[name].append(take(qps, duration))
            others = (busy_s() - busy - (own_s() - own)) / (time.monotonic() - begin)
            told[name][-1]["others"] = max(0.0, others)
    rows = []
    first = next(iter(told.values()))
    for name, runs in told.items():
        rows.append(Row(name, [1e6 * each["p50"] for each in runs], "us", note="latency p50"))
        rows.append(Row("  latency p99", [1e6 * each["p99"] for each in runs], "us"))
        rows.append(
            Row("  issued after schedule, p50", [1e6 * each["late"] for each in runs], "us")
        )
        rows.append(Row("  delivered share", [each["share"] for each in runs]))
        rows.append(Row("  completed share", [each["completed"] for each in runs]))
        rows.append(Row("  processors that other programs took", [r["others"] for r in runs]))
        if runs is not first:
            added = [1e6 * (a["p50"] - b["p50"]) for a, b in zip(runs, first, strict=True)]
            rows.append(Row("  added p50", added, "us", limit=1e6 * ADDED_LIMIT_S))
    report.table(f"{qps:,.0f} queries/s offered, {duration} each", rows)


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=3, help="runs of each kind (3)")
    made.add_argument("--qps", type=float, nargs="+", default=[2000.0, 10000.0], help="rates")
    made.add_argument("--duration", default="5s", help="of each run (5s)")
    made.add_argument("--namespaces", action="store_true", help="also across two namespaces")
    given = made.parse_args()
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    report = Report("dispatch", vars(given))
    for qps in given.qps:
        compare(report, given.rounds, qps, given.duration, given.namespaces)
    report.end(given.json)


if __name__ == "__main__":
    main()
