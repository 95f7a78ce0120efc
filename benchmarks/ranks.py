"""Known answers about several ranks, over and over: stragglers, efficiency, a shared bottleneck.

    python benchmarks/ranks.py
    python benchmarks/ranks.py --rounds 5 --json ranks.json
    python benchmarks/ranks.py --parts lock,digits

Each round starts torchrun with two ranks of the Sleep SUT, whose answers are known:
- one rank slower by a tenth: it alone must be named, and a tenth lie in the interval of its cost;
- equal ranks: nobody may be named; their scaling efficiency must contain 1 in its interval;
- 1 ms of free work and 4 ms under a lock that both ranks share: efficiency must contain 5/8;
and, fewer times, scaling of the digits model at one thread a rank, whose intervals must overlap.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import ROOT, Report, Row, parser

MODELS = """
import fcntl, time
from distbench.sut import Sleep

class Locked(Sleep):
    def __init__(self, path):
        super().__init__(1_000_000)
        self.file = open(path, "a")

    def poll(self, until_ns):
        done = super().poll(until_ns)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        end = self.now() + 4_000_000 * len(done)
        while (left := end - self.now()) > 0:
            time.sleep(left / 1e9)
        fcntl.flock(self.file, fcntl.LOCK_UN)
        return [each._replace(finished_ns=self.now()) for each in done]

def slower(world):
    return Sleep(1_100_000 if world.rank else 1_000_000)

def locked(world):
    return Locked("lock")
"""
SLEEP = ("--model", "sleep,per_sample=1ms", "--batch-size", "8")


def run(command: str, *options: str) -> dict[str, Any]:
    """Run a command on two ranks in a folder of its own; returns its result."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "known.py").write_text(MODELS)
        argv = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        argv += ["--nproc-per-node", "2", "-m", f"distbench.{command}", "--quiet", *options]
        env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            argv, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=300
        )
        (path,) = Path(folder).glob("results/*/result.json")
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        found: dict[str, Any] = json.loads(path.read_bytes())
        return found


def named(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the stragglers that a result names."""
    return [each for each in result["verdict"]["findings"] if each["code"] == "straggler"]


def stragglers(report: Report, rounds: int) -> None:
    """One rank slower by a tenth, and equal ranks, in turn."""
    right = held = spared = 0
    costs = []
    for _ in range(rounds):
        found = named(run("offline", "--model", "known:slower", *SLEEP[2:], "--duration", "3s"))
        right += [each["rank"] for each in found] == [1]
        if found:
            costs.append(found[0]["value"])
            words = found[0]["message"].partition("(95 % ")[2].partition(")")[0].split("% to ")
            low, high = (float(each.rstrip("%")) / 100 for each in words)
            held += low - 0.0005 <= 0.1 <= high + 0.0005  # as they are printed
        spared += not named(run("offline", *SLEEP, "--duration", "3s"))
    report.table("What a rank that is slower by 0.1 costs", [Row("slower by", costs)])
    report.say(
        f"a slower rank: named alone in {right} of {rounds}, 0.1 within its interval in {held}"
    )
    report.say(f"equal ranks: nobody named in {spared} of {rounds}")


CASES = {
    "sleep": ("two Sleep replicas", 1.0, (*SLEEP, "--duration", "1s")),
    "lock": (
        "1 ms free, 4 ms locked",
        5 / 8,
        ("--model", "known:locked", "--batch-size", "1", "--duration", "1s"),
    ),
}
PARTS = ("stragglers", *CASES, "digits")


def efficiencies(report: Report, rounds: int, parts: Sequence[str]) -> None:
    """Two Sleep replicas, and two that share a lock."""
    rows, lines = [], []
    for name, truth, options in (CASES[part] for part in parts):
        values, held = [], 0
        for _ in range(rounds):
            found = run("coordinated", *options)["metrics"]["efficiency"]
            values.append(found["value"])
            held += found["ci_low"] <= truth <= found["ci_high"]
        rows.append(Row(name, values))
        lines.append(f"{name}: {truth:g} within the interval in {held} of {rounds}")
    if rows:
        report.table("Efficiency of 2 ranks", rows)
    for each in lines:
        report.say(each)


def digits(report: Report, rounds: int) -> None:
    """The same scaling of a real model, again and again."""
    found = [run("coordinated", "--duration", "2s")["metrics"]["efficiency"] for _ in range(rounds)]
    ends = [(each["ci_low"], each["ci_high"]) for each in found]
    pairs = list(itertools.combinations(ends, 2))
    meet = sum(one[0] <= other[1] and other[0] <= one[1] for one, other in pairs)
    shown = ", ".join(f"{low:.3f} to {high:.3f}" for low, high in ends)
    report.say(f"digits on 2 ranks, 1 thread each: {shown}; {meet} of {len(pairs)} pairs overlap")


def main() -> None:
    """Do all rounds and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=20, help="of each known answer (20)")
    made.add_argument("--parts", default=",".join(PARTS), help="which of them, by comma (all)")
    made.add_argument("--again", type=int, default=5, help="runs of the digits model (5)")
    options = made.parse_args()
    report, parts = Report("ranks", vars(options)), options.parts.split(",")
    if wrong := [part for part in parts if part not in PARTS]:
        made.error(f"--parts {wrong[0]}: there are {', '.join(PARTS)}")
    if "stragglers" in parts:
        stragglers(report, options.rounds)
    efficiencies(report, options.rounds, [part for part in CASES if part in parts])
    if "digits" in parts:
        digits(report, options.again)
    report.end(options.json)


if __name__ == "__main__":
    main()
