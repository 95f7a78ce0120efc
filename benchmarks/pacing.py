"""Does Server issue what it offers, when it offers it? echo at four rates, on one rank.

    python benchmarks/pacing.py
    python benchmarks/pacing.py --rounds 9 --seconds 4 --json pacing.json

The share delivered is (last - first scheduled) / (last - first issued): below 1 where the loop
falls behind its schedule. The project allows a shortfall of 0.001 where a processor is free for the
loop; where none is, the verdict says so, and its words are counted here. Lateness is issue - ready.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from common import Report, Row, parser

from distbench.load import Load
from distbench.server import run_server
from distbench.sut import Echo
from distbench.world import join

RATES = (50.0, 500.0, 2_000.0, 10_000.0)
SHORT_LIMIT = 0.001


def shortfall(run: Any) -> float:
    """Return 1 - the share delivered, of one rank."""
    record = run.present[0]
    due, issued = record.column("scheduled"), record.column("issued")
    return float(1 - (due[-1] - due[0]) / (issued[-1] - issued[0]))


def main() -> None:
    """Measure and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=5, help="windows at each rate (5)")
    made.add_argument("--seconds", type=float, default=2.0, help="of a window (2)")
    made.add_argument("--folder", default=".", help="where results are made for the time (.)")
    options = made.parse_args()
    report = Report("pacing", vars(options))
    told: dict[float, dict[str, list[float]]] = {
        rate: {name: [] for name in ("short", "p50", "p99", "lateness", "done")} for rate in RATES
    }
    words: dict[str, int] = {}
    with (
        tempfile.TemporaryDirectory(prefix=".pacing-", dir=options.folder) as folder,
        join(device="cpu", backend="gloo") as world,
    ):
        for number in range(options.rounds):
            for rate in RATES:
                run = run_server(
                    Echo(),
                    world,
                    load=Load(rate),
                    duration_s=options.seconds,
                    warmup_s=0,
                    seed=number,
                    output_dir=str(Path(folder)),
                )
                found, own = run.result(), told[rate]
                own["short"].append(shortfall(run))
                for name, metric in (
                    ("p50", "latency.p50"),
                    ("p99", "latency.p99"),
                    ("lateness", "lateness.p50"),
                ):
                    own[name].append(found["metrics"][metric]["value"] * 1e6)
                row = found["per_rank"][0]
                own["done"].append(row["samples"] / (row["samples"] + row["pending"]))
                for finding in found["verdict"]["findings"]:
                    words[finding["code"]] = words.get(finding["code"], 0) + 1
    for rate, own in told.items():
        report.table(
            f"echo at {rate:,.0f} queries/s, {options.seconds:g} s",
            [
                Row("shortfall of the share delivered", own["short"], "", SHORT_LIMIT),
                Row("share completed", own["done"]),
                Row("latency p50", own["p50"], "us"),
                Row("latency p99", own["p99"], "us"),
                Row("lateness p50", own["lateness"], "us"),
            ],
        )
    told_words = ", ".join(f"{code} {count}" for code, count in sorted(words.items())) or "none"
    report.say(f"\nfindings over all windows: {told_words}")
    report.end(options.json)


if __name__ == "__main__":
    main()
