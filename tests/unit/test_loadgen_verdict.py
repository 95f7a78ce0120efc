"""LoadGen's word on a run whose logs are made up: VALID only with a clean log and clean facts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distbench.official import Official, settled
from distbench.run import Run
from distbench.verdict import result
from tests.unit.dispatched import dispatched

N = 2_000
KEYS = {
    "result_validity": "VALID",
    "result_query_count": N,
    "result_completed_samples_per_sec": 199.5,
    "result_scheduled_samples_per_sec": 200.25,
    "result_min_duration_met": True,
    "result_min_queries_met": True,
    "result_perf_constraints_met": True,
    "early_stopping_met": True,
    "early_stopping_result": " * Run successful.",
    "effective_min_query_count": 100,
    "effective_target_latency_ns": 15_000_000,
    "effective_min_duration_ms": 600_000,
    "effective_target_qps": 200,
    "effective_performance_sample_count": 1797,
    "effective_qsl_rng_seed": 6023615788873153749,
    "effective_sample_index_rng_seed": 15036839855038426416,
    "effective_schedule_rng_seed": 9933818062894767841,
    "result_99.00_percentile_latency_ns": 7_000_000,
    "result_max_latency_ns": 9_000_000,
    "result_mean_latency_ns": 3_000_000,
}


def run(
    keys: dict[str, Any] | None = None, official: dict[str, Any] | None = None, **told: Any
) -> Run:
    """Return a run of LoadGen's over two ranks."""
    made = dispatched(N)
    assert made.driver is not None and made.driver.after is not None
    asked = settled(Official("server", rules="mlperf-v5.0"), 1797, 1797, [900.0])
    asked |= {"network": False, "model": "digits", **(official or {})}
    loadgen = {"keys": KEYS | (keys or {}), "errors": [], "warnings": [], "torn": False}
    loadgen |= {"problem": "", "right": None, "of": None, **told}
    after = made.driver.after | {"loadgen": loadgen, "audit_config": told.get("audit", "")}
    records = []
    for record in made.present:
        record.before["official"] = asked
        record.before["rules"] = "mlperf-v5.0"
        records.append(record)
    driver = replace(made.driver, after=after)
    return replace(made, records=tuple(records), driver=driver)


def rules_and_codes(made: Run) -> tuple[dict[str, Any], set[str]]:
    verdict = result(made)["verdict"]
    return verdict["rules"], {each["code"] for each in verdict["findings"]}


def test_loadgens_figures_and_its_word() -> None:
    found = result(run())
    metrics, rules = found["metrics"], found["verdict"]["rules"]
    assert metrics["throughput"]["value"] == 199.5
    assert metrics["throughput"]["definition"] == "LoadGen's result_completed_samples_per_sec"
    assert metrics["latency.p99"]["value"] == 0.007 and metrics["latency.p99"]["n"] == N
    assert metrics["latency.p50"]["value"] is None
    assert metrics["latency.p50"]["reason"] == "LoadGen's log has it not"
    assert metrics["dispatch.latency.p99"]["value"] is not None
    assert metrics["dispatch.throughput"]["value"] is not None
    assert (rules["result"], rules["source"]) == ("VALID", "loadgen")
    assert rules["wording"] == "MLPerf-style, unverified"
    gates = {gate["name"]: gate for gate in rules["gates"]}
    assert gates["latency.p99"]["value"] == 0.007 and gates["latency.p99"]["limit"] == 0.015
    assert all(gate["passed"] for gate in gates.values())


@pytest.mark.parametrize(
    ("keys", "official", "told", "code"),
    [
        ({"result_validity": "INVALID"}, {}, {}, ""),
        ({}, {}, {"errors": ["error_runtime: tokens"]}, "loadgen-errors"),
        ({}, {}, {"problem": "mlperf_log_detail.txt cannot be read"}, "loadgen-log"),
        ({}, {"edited": ["*.Server.target_latency"]}, {}, "conf-edited"),
        ({"result_99.00_percentile_latency_ns": 15_000_001}, {}, {}, ""),
        ({"effective_min_duration_ms": 600}, {}, {}, ""),
        ({"effective_schedule_rng_seed": 1}, {}, {}, ""),
        ({"effective_target_qps": 201}, {}, {}, ""),
        ({}, {"listed": True, "model": "echo"}, {}, "benchmark-replaced"),
        ({}, {"listed": True, "model": "digits", "samples_wanted": 1798}, {}, "samples-few"),
    ],
)
def test_what_leaves_no_valid(
    keys: dict[str, Any], official: dict[str, Any], told: dict[str, Any], code: str
) -> None:
    rules, codes = rules_and_codes(run(keys, official, **told))
    assert rules["result"] == "INVALID"
    assert codes >= ({code} if code else set())


def test_a_shortened_run_is_never_valid() -> None:
    made = run(
        {"effective_min_duration_ms": 5_000},
        {"shortened": True, "min_duration_ns": 5_000_000_000},
    )
    rules, codes = rules_and_codes(made)
    assert rules["result"] == "SHORTENED" and "run-shortened" in codes
    told = [f for f in result(made)["verdict"]["findings"] if f["code"] == "run-shortened"]
    assert [(f["level"], f["value"], f["limit"]) for f in told] == [("info", 5.0, 600.0)]
    assert "run-shortened" not in rules_and_codes(run())[1]


def test_early_stopping_says_how_many_more() -> None:
    text = " * Run unsuccessful.  * Would need to run at least 359 more queries"
    keys = {"early_stopping_met": False, "early_stopping_result": text, "result_validity": "X"}
    gates = {gate["name"]: gate for gate in rules_and_codes(run(keys))[0]["gates"]}
    assert gates["early_stopping"]["needed"] == 359
    assert gates["early_stopping"]["limit"] == N + 359


def test_estimates_of_streams() -> None:
    from distbench.loadgen_verdict import _estimate

    keys = {"early_stopping_latency_ss": 7_910_000}
    plain = _estimate(keys, "singlestream", 9, "", False)
    assert plain["latency.p90.early_stopping"]["value"] == 0.00791
    token = _estimate(keys, "singlestream", 9, "", True)
    assert token["latency.p90.early_stopping"]["value"] is None
    assert token["ttft.p90.early_stopping"]["value"] == 0.00791
    none = _estimate({"early_stopping_latency_ms": 0}, "multistream", 9, "", False)
    assert none["latency.p99.early_stopping"]["value"] is None
    assert "LoadGen wrote 0" in none["latency.p99.early_stopping"]["reason"]


def test_an_audit_config_beside_the_driver_is_told() -> None:
    rules, codes = rules_and_codes(run(audit="/home/user"))
    assert "audit-config" in codes and rules["result"] == "VALID"


@pytest.mark.parametrize(
    ("field", "value", "code"), [("ecc", False, "ecc-off"), ("prefix", True, "prefix-caching")]
)
def test_what_the_rules_forbid_of_a_rank(field: str, value: bool, code: str) -> None:
    made = run()
    before = made.present[1].before
    if field == "ecc":
        before["gpu_before"] = (before.get("gpu_before") or {}) | {"ecc_mode": value}
    else:
        before["model"] = before["model"] | {"prefix_caching": value}
    rules, codes = rules_and_codes(made)
    assert code in codes and rules["result"] == "INVALID"


def test_a_sample_that_failed_is_an_error_whatever_loadgen_says() -> None:
    made = run()
    assert made.driver is not None and made.driver.rows is not None
    column = made.driver.before["columns"].index("completed")
    made.driver.rows[7, column] = -2
    rules, _ = rules_and_codes(made)
    assert rules["result"] == "INVALID"
    assert next(g for g in rules["gates"] if g["name"] == "errors")["value"] == 1


def test_accuracy_mode_counts_and_times_nothing() -> None:
    official = {"mode": "accuracy"}
    found = result(run({}, official, right=359.0, of=360.0))
    assert found["metrics"]["accuracy"]["value"] == 359 / 360
    assert found["metrics"]["latency.p99"]["reason"] == "accuracy mode times nothing"
    assert found["verdict"]["rules"]["result"] == "VALID"
    low = result(run({}, official, right=340.0, of=360.0))["verdict"]["rules"]
    assert low["result"] == "INVALID"
    none = result(run({}, official))
    assert none["metrics"]["accuracy"]["value"] is None
    assert none["verdict"]["rules"]["result"] == "INVALID"


def test_a_driver_that_ended_early_gives_no_figure_of_loadgens(tmp_path: Path) -> None:
    made = run()
    assert made.driver is not None and made.driver.after is not None
    after = {key: value for key, value in made.driver.after.items() if key != "loadgen"}
    after["end"] = {"code": "failed", "rank": -1, "host": "jw1", "sentence": "rank 1 was lost"}
    found = result(replace(made, driver=replace(made.driver, after=after)))
    assert found["verdict"]["status"] == "INCOMPLETE"
    assert found["verdict"]["rules"]["result"] == "INVALID"
    assert found["metrics"]["latency.p99"]["value"] is None


@pytest.mark.parametrize("network", [False, True])
@pytest.mark.parametrize("mode", ["performance", "accuracy"])
def test_the_report_says_who_drove(mode: str, network: bool) -> None:
    from distbench.report.text import to_text

    text = to_text(result(run({}, {"mode": mode, "network": network}, right=360.0, of=360.0)))
    assert f"LoadGen 5.0.13 in {mode} mode, target_qps 200" in text
    assert ("Network SUT" in text) == network
    assert ("LoadGen" in text and "as LoadGen says: passed" in text) or mode == "accuracy"
    if mode == "performance":
        assert "dispatch is from when it handed the sample over" in " ".join(text.split())
        assert "gate             LoadGen's own word, VALID: passed" in text


@pytest.mark.parametrize(
    ("scenario", "tokens", "keys", "names"),
    [
        ("offline", True, {"result_tokens_per_second": 9.0}, ["throughput.tokens"]),
        ("offline", False, {"result_99.00_percentile_latency_ns": 5}, ["latency.p99"]),
        (
            "singlestream",
            True,
            {"result_first_token_50.00_percentile_latency_ns": 7},
            ["ttft.p50", "ttft.p90.early_stopping"],
        ),
        (
            "multistream",
            False,
            {"result_99.00_percentile_per_query_latency_ns": 5},
            ["latency.p99", "latency.p99.early_stopping"],
        ),
        ("server", True, {"result_first_token_99.00_percentile_latency_ns": 5}, ["ttft.p99"]),
    ],
)
def test_the_keys_of_every_scenario(
    scenario: str, tokens: bool, keys: dict[str, Any], names: list[str]
) -> None:
    from distbench.loadgen_verdict import figures_of, gates_of
    from distbench.metrics import metric

    more = {"early_stopping_latency_ss": 5, "early_stopping_latency_ms": 5, "result_query_count": 3}
    more |= {"requested_use_token_latencies": tokens, "requested_server_ttft_latency": 100}
    made = run(keys | more, {"scenario": scenario, "tokens": tokens})
    for record in made.present:
        record.before["scenario"] = scenario
    ours = {name: metric(1.0, "s", 8, "") for name in ("throughput", "latency.p99", "ttft.p99")}
    found = figures_of(made, ours)
    assert all(found[name]["value"] is not None for name in names), found
    assert {"dispatch.throughput", "dispatch.latency.p99", "dispatch.ttft.p99"} <= found.keys()
    gates = [gate.name for gate in gates_of(made, found)]
    assert ("ttft.p99" in gates) == (scenario == "server" and tokens)
    assert "latency.p99" not in gates
    assert "loadgen-valid" in gates and "errors" in gates


def test_offlines_duration_is_its_longest_latency() -> None:
    from distbench.loadgen_verdict import figures_of, gates_of
    from distbench.metrics import metric

    made = run({"result_max_latency_ns": 601 * 10**9}, {"scenario": "offline"})
    for record in made.present:
        record.before["scenario"] = "offline"
    found = figures_of(made, {"throughput": metric(1.0, "s", 8, "")})
    gate = next(g for g in gates_of(made, found) if g.name == "min_duration")
    assert (gate.value, gate.limit, gate.passed) == (601.0, 600.0, True)
    assert "early_stopping" not in [g.name for g in gates_of(made, found)]
