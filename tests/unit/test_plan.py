"""Plans against integers of the spec and of MLPerf's rules, worked by hand."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest

from distbench.arrivals import single_stream_queries
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
    problem, undecided = made.problems
    assert undecided.startswith("UNDECIDED by construction: the interval of p99")
    assert "needs 368" in undecided and "--num-queries 368 or more, which takes 736 s" in undecided
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


def test_single_stream_with_equal_issue_is_planned_for_twice_the_speed() -> None:
    # LoadGen's own count: arrivals.single_stream_queries, held against it in tests/oracle.
    made = planned("singlestream", 1.0, model="3d-unet")
    assert made.queries == 1_204 == single_stream_queries(100, 600 * S, S, 43)
    assert made.wall_s == 1_204.0
    assert planned("singlestream", 1e10, model="3d-unet").queries % 43 == 0
    assert planned("singlestream", 1.0).queries == 600
    assert planned("multistream", 1.0, model="3d-unet").queries == 688


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


def test_streams_have_no_limit_to_be_over() -> None:
    for scenario in ("singlestream", "multistream"):
        for queries in (50, 63, 64, 1_000, 5_000):
            made = planned(scenario, 10.0, queries=queries)
            assert not any("limit" in line for line in made.lines)
            assert not any("UNDECIDED" in each for each in made.problems)
    (line,) = [x for x in planned("singlestream", 10.0, queries=64).lines if "early" in x]
    assert "estimate of p90 leaves out the 0 longest of 64 latencies" in line
    (line,) = [x for x in planned("singlestream", 10.0, queries=63).lines if "early" in x]
    assert "63 queries are too few for an estimate of p90" in line


def test_the_judged_percentile_without_an_interval_is_undecided_by_construction() -> None:
    def undecided(queries: int, rules: str = "none", **more: Any) -> bool:
        made = plan("server", 1.0, parse_rules(rules), queries=queries, **more)
        return any(each.startswith("UNDECIDED by construction") for each in made.problems)

    assert undecided(367, latency_ns=S) and not undecided(368, latency_ns=S)
    assert not undecided(367), "nothing judges it"
    assert undecided(367, "mlperf-v5.0", model="resnet50")


def test_offline_counts_samples(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--target-qps", "100", "--num-samples", "700"]) == 0
    out = capsys.readouterr().out
    assert "samples          700 in 7 s" in out and "queries" not in out


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
            "give --latency\n",
        ),
        (["--target-qps", "1e308"], "give as --target-qps the rate of a short run"),
        (["--target-qps", "1e308", "--scenario", "server"], "more than anything could issue"),
        (["--target-qps", "1e-300"], "would take more than three years"),
        (["--target-qps", "1e-320", "--num-samples", "5"], "would take more than three years"),
        (["--target-qps", "1", "--num-queries", "5"], "offline counts samples, give --num-samples"),
        (
            ["--target-qps", "1", "--scenario", "server", "--num-samples", "5"],
            "server counts queries, give --num-queries",
        ),
        (
            ["--target-qps", "1", "--rules", "mlperf-v5.0", "--model", "digits"],
            "it has resnet50, retinanet, 3d-unet, gptj, llama2-70b, llama3_1-405b, mixtral-8x7b, "
            "dlrm-v2, stable-diffusion-xl, rgat, bert: leave the model out for another",
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
