"""MLPerf's gates through a saved run: the word, the gates, and a pass that a repeat may not get."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from distbench.gates import Gate
from distbench.record import write_report
from distbench.report.text import to_text
from distbench.ruling import marginal
from distbench.run import load_run

from .synthetic import Rank, in_memory, make_run

S = 10**9


def under(rules: str, total: int = 1024, **shape: Any) -> dict[str, Any]:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before["rules"] = rules
            rank.before["model"]["total"] = total

    return dict(in_memory(change=change, **shape).result()["verdict"]["rules"])


LONG = {"groups": (601, 500), "group_ns": (S,), "batch": 64}


def test_a_run_of_ten_minutes_with_samples_enough_is_valid() -> None:
    found = under("mlperf-v5.0", total=30_000, **LONG)
    assert (found["set"], found["source"], found["result"]) == ("mlperf-v5.0", "native", "VALID")
    assert found["wording"] == "MLPerf-style, unverified"
    assert {g["name"]: (g["value"], g["limit"], g["passed"]) for g in found["gates"]} == {
        "min_duration": (601.0, 600.0, True),
        "min_samples": (1101 * 64, 24_576, True),
        "errors": (0, 0, True),
    }


def test_too_short_and_too_few_are_invalid_with_what_is_missing() -> None:
    found = under("mlperf-v5.0")
    assert found["result"] == "INVALID"
    gates = {g["name"]: g for g in found["gates"]}
    assert not gates["min_duration"]["passed"]
    # 80 samples of data with 1,024: all of the data at the least.
    assert (gates["min_samples"]["limit"], gates["min_samples"]["needed"]) == (1024, 944)


def test_a_shortened_run_is_never_valid() -> None:
    found = under("mlperf-v5.0,shortened=100ms", total=80)
    assert all(gate["passed"] for gate in found["gates"])
    assert (found["result"], found["shortened"]) == ("SHORTENED", True)


def test_a_failed_sample_is_an_error() -> None:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before["rules"] = "mlperf-v5.0"
        row = ranks[1].row(3)
        ranks[1].log.completed[row : row + 64] = -2

    run = in_memory(change=change, **LONG)
    gates = {g["name"]: g for g in run.result()["verdict"]["rules"]["gates"]}
    assert (gates["errors"]["value"], gates["errors"]["passed"]) == (64, False)
    assert run.result()["verdict"]["rules"]["result"] == "INVALID"


def test_an_unknown_makespan_is_invalid_without_gates() -> None:
    def change(ranks: list[Rank]) -> None:
        ranks[0].before["rules"] = ranks[1].before["rules"] = "mlperf-v5.0"
        ranks[1].after = None

    found = in_memory(change=change).result()["verdict"]["rules"]
    assert (found["result"], found["gates"]) == ("INVALID", [])


def test_the_first_line_and_the_gates_stand_in_the_report(tmp_path: Path) -> None:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before["rules"] = "mlperf-v5.0"

    text = write_report(make_run(tmp_path / "r", report=False, change=change))
    assert text.splitlines()[0] == (
        "MEASUREMENT VALID; MLPerf v5.0 gates: INVALID (MLPerf-style, unverified)"
    )
    assert "gate             min_duration: 1 s, needs 600 s or more: FAILED" in text
    assert "80 samples, needs 1,024 samples or more: FAILED; 944 more are needed" in text
    assert "gate             errors: 0 samples, at most 0 samples: passed" in text
    stored = json.loads((tmp_path / "r" / "result.json").read_bytes())
    assert stored == load_run(tmp_path / "r").result()


@pytest.mark.parametrize("name", ["v5.0", "v5.1"])
def test_the_first_line_names_the_round_that_applies(name: str) -> None:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before["rules"] = f"mlperf-{name}"

    first = in_memory(change=change).report().splitlines()[0]
    assert first.startswith(f"MEASUREMENT VALID; MLPerf {name} gates: INVALID (")


def test_a_gate_says_which_way_it_goes_and_in_which_unit() -> None:
    result = in_memory().result()
    result["verdict"]["rules"]["gates"] = [
        asdict(Gate("latency.p99", 0.0143, 0.015, "s", True)),
        asdict(Gate("early_stopping", 300, 459, "queries", False, 159)),
        asdict(Gate("ttft.p99", 2.1, 2.0, "s", False)),
    ]
    gates = [line[17:] for line in to_text(result).splitlines() if line.startswith("gate ")]
    assert gates == [
        "latency.p99: 14.3 ms, at most 15 ms: passed",
        "early_stopping: 300 queries, needs 459 queries or more: FAILED; 159 more are needed",
        "ttft.p99: 2.1 s, at most 2 s: FAILED",
    ]


@pytest.mark.parametrize(
    ("high_s", "passed", "told"),
    [(0.0149, True, False), (0.0151, True, True), (0.0151, False, False), (None, True, False)],
)
def test_a_pass_whose_interval_crosses_the_limit_is_doubtful(
    high_s: float | None, passed: bool, told: bool
) -> None:
    gate = Gate("latency.p99", 0.0145, 0.015, "s", passed)
    other = Gate("early_stopping", 1000, 459, "queries", True)
    found = marginal([gate, other], {"latency.p99": {"ci_high": high_s}})
    assert [f.code for f in found] == ["rules-marginal"] * told
    if told:
        assert found[0].level == "doubtful"
        assert "a repeat may fail" in found[0].message
        assert "0.0151" in found[0].message
        assert "run longer" in found[0].remedy
