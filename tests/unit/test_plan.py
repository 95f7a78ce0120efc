"""Plans against integers of the spec and of MLPerf's rules, worked by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from distbench.plan import Plan, main, plan
from distbench.rules import parse_rules

S = 10**9


def planned(scenario: str, rate_qps: float, rules: str = "mlperf-v5.0", **more: Any) -> Plan:
    if scenario == "server" and "model" not in more:
        more["latency_ns"] = S
    return plan(scenario, rate_qps, parse_rules(rules), **more)


def test_server_at_half_a_query_a_second_needs_918_s() -> None:
    made = planned("server", 0.5)
    assert (made.queries, made.wall_s, made.budget) == (300, 600.0, None)
    (problem,) = made.problems
    assert "needs 459 queries" in problem and "300 are planned" in problem
    assert "--num-queries 459, which takes 918 s" in problem
    enough = planned("server", 0.5, queries=459)
    assert (enough.problems, enough.budget) == ((), 0)
    assert planned("server", 0.5, queries=458).problems != ()


def test_equal_issue_pads_to_the_data() -> None:
    made = planned("server", 0.5, "mlperf-v5.1", model="llama3_1-8b")
    assert made.queries == 13_368
    assert made.wall_s / 3600 == pytest.approx(7.4, abs=0.05)
    assert planned("server", 2.0, "mlperf-v5.1", model="llama3_1-8b").wall_s == 6_684.0


def test_offline_plans_a_tenth_more_than_its_duration() -> None:
    made = planned("offline", 1_000)
    assert (made.queries, made.wall_s, made.problems) == (660_000, 660.0, ())
    slow = planned("offline", 10)  # the least number of samples counts
    assert (slow.queries, slow.wall_s) == (24_576, 2_457.6)


def test_what_the_rules_would_refuse_is_told_before() -> None:
    short = planned("offline", 2_000, duration_ns=60 * S)
    assert any("66 s, and the rules ask for 600 s" in each for each in short.problems)
    few = planned("offline", 1.0, queries=1_000)
    assert any("ask for 24,576" in each for each in few.problems)
    assert any("never VALID" in each for each in planned("offline", 1e5, SHORT).problems)
    stream = planned("singlestream", 1.0, SHORT, queries=63)
    assert any("64 queries at the least" in each for each in stream.problems)
    assert not any("at the least" in p for p in planned("singlestream", 1.0, queries=64).problems)
    multi = planned("multistream", 10.0, queries=661)
    assert any("662 queries at the least" in each for each in multi.problems)


SHORT = "mlperf-v5.0,shortened=5s"


def test_the_budget_is_early_stoppings_and_not_the_percentiles() -> None:
    made = planned("server", 100.0, queries=10_833)
    assert made.budget == 84
    assert any("84 of 10,833" in line and "would allow 108" in line for line in made.lines)


def test_percentiles_that_cannot_be_resolved_are_named() -> None:
    lines = planned("server", 1.0, "none", queries=367).lines
    assert any("not resolvable with 367: p99, p99.9" in line for line in lines)
    lines = planned("server", 1.0, "none", queries=368).lines
    assert any("not resolvable with 368: p99.9" in line for line in lines)


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--scenario", "server", "--target-qps", "0.5", "--rules", "mlperf-v5.0"]
    assert main([*argv, "--latency", "10s"]) == 0
    assert "INVALID by construction" in capsys.readouterr().out
    assert main([*argv, "--latency", "10s", "--strict"]) == 3
    assert main(["--target-qps", "100"]) == 0
    assert "nothing stands in its way" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "word"),
    [
        ([], "--target-qps is needed"),
        (["--target-qps", "0"], "not a number above 0"),
        (["--target-qps", "1", "--scenario", "servre"], "did you mean server?"),
        (
            ["--target-qps", "1", "--scenario", "server", "--rules", "mlperf-v5.0"],
            "no Server limit",
        ),
    ],
)
def test_what_cannot_be_planned_is_a_sentence(argv: list[str], word: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "distbench.plan", *argv],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("distbench: ") and word in done.stderr
