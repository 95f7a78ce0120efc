"""How long a peak search takes, and how near to the truth it comes where the truth is known.

    python benchmarks/peak.py
    python benchmarks/peak.py --duration 600s --json peak.json

Two searches by the command itself. ``digits`` on two ranks with probes of 0.5 s: it must end by
itself within two minutes. ``sleep`` on one rank is an M/D/1 queue, of which the analytic peak
follows from the mean service that the confirming window measured; a sleep ends late now and then,
so that the truth is a little lower. The window that confirms decides how near the peak can be told:
see docs/method.md.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

from common import ROOT, Report, Row, parser

LIMIT_S = 120.0
LIMIT_MS, SLEEP_MS = 20.0, 4.0


def searched(ranks: int, probe: str, *argv: str) -> tuple[float, dict[str, Any]]:
    """Run a search; returns how long it took, s, and its result."""
    with tempfile.TemporaryDirectory() as out:
        start = ["torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "-m"]
        command = [sys.executable, "-m", *(start if ranks > 1 else []), "distbench.server"]
        command += ["--target-qps", "auto", "--probe", probe, "--device", "cpu", "--quiet"]
        begin = time.monotonic()
        subprocess.run(
            [*command, *argv, "--output-dir", out], cwd=ROOT, check=True, stdout=subprocess.DEVNULL
        )
        took_s = time.monotonic() - begin
        (path,) = Path(out).glob("*/result.json")
        return took_s, json.loads(path.read_bytes())


def waits_below(load: float, services: float) -> float:
    """Return P(wait <= services) in M/D/1; Erlang's formula, see tests/unit/test_search.py."""
    with localcontext() as context:
        context.prec = 60
        rate, at, total = Decimal(load), Decimal(services), Decimal(0)
        for k in range(math.floor(services) + 1):
            x = rate * (k - at)
            total += x**k / math.factorial(k) * (-x).exp() if k else (-x).exp()
        return float((1 - rate) * total)


def peak_qps(service_s: float, limit_s: float) -> float:
    """Return the highest rate at which 90 % of the latencies are within the limit."""
    low, high = 0.0, 0.9999
    for _ in range(40):
        middle = (low + high) / 2
        kept = waits_below(middle, limit_s / service_s - 1) >= 0.9
        low, high = (middle, high) if kept else (low, middle)
    return low / service_s


def rows(name: str, took_s: float, result: dict[str, Any]) -> list[Row]:
    """Return what is told of any search."""
    found = result["metrics"]["peak"]["value"]
    note = f"{result['verdict']['status']}, {len(result['windows'])} windows"
    lack = "" if found is not None else result["metrics"]["peak"]["reason"]
    return [
        Row(f"{name}: time", [took_s], "s", note=note),
        Row(f"{name}: peak", [] if found is None else [found], "queries/s", note=lack),
    ]


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--duration", default="60s", help="of what confirms the sleep's peak (60s)")
    made.add_argument("--probe", default="500ms", help="of both searches (500ms)")
    options = made.parse_args()
    report = Report("peak", vars(options))
    took_s, result = searched(2, options.probe, "--model", "digits", "--latency-bound", "15ms@p99")
    first, second = rows("digits, 2 ranks", took_s, result)
    held = Row(first.name, first.values, "s", LIMIT_S, first.note)
    report.table(f"Peak search, --probe {options.probe} --latency-bound 15ms@p99", [held, second])
    took_s, result = searched(
        1,
        options.probe,
        *("--model", f"sleep,per_sample={SLEEP_MS:g}ms"),
        *("--latency-bound", f"{LIMIT_MS:g}ms@p90", "--duration", options.duration),
    )
    lines = rows(f"sleep {SLEEP_MS:g} ms, 1 rank", took_s, result)
    peak = result["metrics"]["peak"]["value"]
    if peak is not None:
        service_s = result["metrics"]["service.mean"]["value"]
        truth = peak_qps(service_s, LIMIT_MS / 1e3)
        lines.append(Row("M/D/1 with its mean service: peak", [truth], "queries/s"))
        lines.append(Row("found / analytic", [peak / truth]))
    report.table(f"Peak search, --latency-bound {LIMIT_MS:g}ms@p90 on an M/D/1 queue", lines)
    report.end(options.json)


if __name__ == "__main__":
    main()
