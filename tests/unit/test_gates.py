"""Gates against what LoadGen said of the same latencies, and at their edges by hand."""

import json
from dataclasses import asdict

import numpy as np
import pytest

from distbench.gates import WORDING, offline_gates
from distbench.judged import (
    judge_multi_stream,
    judge_offline,
    judge_server,
    judge_single_stream,
    judge_tokens,
    spread,
    stream_estimate_ns,
    time_per_token_ns,
)
from distbench.rules import Limits
from tests.oracle.loadgen import check_latencies, judged_of
from tests.oracle.record import load_latencies

S = 10**9
RECORDED = load_latencies()


def ns(*values):
    return np.array(values, np.int64)


def gate(judged, name):
    return next(each for each in judged.gates if each.name == name)


# LoadGen


@pytest.mark.parametrize("scenario", ["Server", "SingleStream", "MultiStream", "Offline"])
def test_latencies_that_loadgen_recorded_are_judged_as_it_did(scenario):
    cases = [(case, result) for case, result in RECORDED if case["scenario"] == scenario]
    for case, result in cases:
        check_latencies(case, result)
    assert len(cases) >= 9


def test_the_record_holds_the_edges():
    """The counts around which early stopping changes its mind were met, both ways."""
    servers = {
        (
            result["keys"]["result_query_count"],
            case["settings"]["server_target_latency_percentile"],
            result["keys"]["result_overlatency_query_count"],
        ): result["keys"]["early_stopping_met"]
        for case, result in RECORDED
        if case["scenario"] == "Server" and not case.get("tokens")
    }
    for percentile, edges in ((0.9, {0: 44, 1: 64, 2: 81}), (0.99, {0: 459, 1: 662, 2: 838})):
        for over, least in edges.items():
            assert servers[(least, percentile, over)]
            assert not servers[(least - 1, percentile, over)]
    streams = {
        (case["scenario"], result["keys"]["result_query_count"])
        for case, result in RECORDED
        if result["keys"]["early_stopping_met"]
    }
    assert {("SingleStream", 64), ("MultiStream", 662)} <= streams
    assert not {("SingleStream", 63), ("MultiStream", 661)} & streams
    # Passes one of the two gates on the percentile, and not the other.
    kinds = {
        (keys["result_perf_constraints_met"], keys["early_stopping_met"])
        for keys in (result["keys"] for _, result in RECORDED)
        if "result_perf_constraints_met" in keys
    }
    assert kinds == {(True, True), (True, False), (False, False)}
    words = [result["keys"]["result_validity"] for _, result in RECORDED]
    assert (len(words), words.count("VALID") > 30) == (107, True)


def test_loadgen_calls_a_run_with_errors_valid_or_not_for_other_reasons():
    ((case, result),) = [(c, r) for c, r in RECORDED if c.get("few_tokens")]
    judged = judged_of(case, result)
    assert result["errors"] == gate(judged, "errors").value == 2
    assert judged.spreads["tpot"].min_ns < 0


# Edges by hand


def test_a_latency_at_the_limit_is_in_time():
    held = Limits(0, 1, 0.9, latency_ns=1000)
    at = np.full(44, 1000)
    due = np.arange(44) * 10
    judged = judge_server(due, at, held)
    assert judged.result == "VALID"
    assert gate(judged, "latency.p90").value == 1000 / S
    assert judged.figures["result_overlatency_query_count"] == 0
    at[7] = 1001
    judged = judge_server(due, at, held)
    assert judged.result == "INVALID"
    assert gate(judged, "latency.p90").passed
    assert (gate(judged, "early_stopping").limit, gate(judged, "early_stopping").needed) == (64, 20)


def test_the_last_query_counts_for_the_duration():
    held = Limits(600 * S, 3, 0.5, latency_ns=S)
    due, took = ns(0, 10, 600 * S), ns(1, 1, 1)
    assert gate(judge_server(due, took, held), "min_duration").passed
    found = gate(judge_server(due - ns(0, 0, 1), took, held), "min_duration")
    assert (found.passed, found.needed, found.limit) == (False, None, 600.0)
    # Streams by issue, whatever the last latency; Offline by the last completion.
    stream = Limits(600 * S, 3, 0.5)
    assert gate(judge_single_stream(due, took, stream), "min_duration").passed
    late = judge_single_stream(ns(0, 10, 599 * S), ns(1, 1, 5 * S), stream)
    assert not gate(late, "min_duration").passed
    assert gate(judge_offline(ns(600 * S, 5), stream), "min_duration").passed
    assert not gate(judge_offline(ns(600 * S - 1, 5), stream), "min_duration").passed


def test_the_minimum_count():
    judged = judge_offline(ns(S, 3 * S, 2 * S), Limits(0, 5))
    found = gate(judged, "min_samples")
    assert (found.value, found.limit, found.unit, found.needed) == (3, 5, "samples", 2)
    assert (judged.headline, judged.value, judged.unit) == (
        "result_samples_per_second", 1.0, "samples/s",
    )  # fmt: skip
    assert gate(judge_offline(ns(1, 2), Limits(0, 2)), "min_samples").needed is None


def test_servers_rates_end_with_the_last_query_issued():
    # The last issued is done at 4 s, another one only at 9 s.
    judged = judge_server(ns(0, S, 2 * S), ns(S, 8 * S, 2 * S), Limits(0, 1, 0.9, latency_ns=S))
    assert judged.value == judged.figures["result_completed_samples_per_sec"] == 0.5
    assert judged.figures["result_scheduled_samples_per_sec"] == 1.0
    alone = judge_server(ns(0), ns(S), Limits(0, 1, 0.9, latency_ns=S))
    assert "result_scheduled_samples_per_sec" not in alone.figures
    assert alone.value == 0.0


def test_tokens_by_hand():
    held = Limits(0, 1, 0.5, ttft_ns=100, tpot_ns=10)
    latency, first, tokens = ns(205, 300, 210), ns(100, 90, 101), ns(11, 22, 12)
    assert time_per_token_ns(latency, first, tokens).tolist() == [10, 10, 9]
    # Cut towards 0 on both sides, and a divisor of -1 where there are too few tokens.
    some = time_per_token_ns(ns(10, 25, 25, 25, 9), ns(17, 10, 10, 10, 10), ns(5, 1, 0, -3, 1))
    assert some.tolist() == [-1, -15, -15, -15, 1]
    judged = judge_tokens(ns(0, 1, 2), latency, first, tokens, held)
    assert judged.value == pytest.approx(45 / 212e-9)
    assert gate(judged, "ttft.p50").passed
    assert gate(judged, "tpot.p50").passed
    # Seven queries, as 0.5**7 < 0.01, if none is late; of the first tokens one is: at 101.
    assert gate(judged, "early_stopping.tpot").limit == 7
    assert gate(judged, "early_stopping.ttft").limit == 11
    bad = judge_tokens(ns(0, 1, 2), latency, ns(100, -1, 101), ns(11, 22, 1), held)
    assert gate(bad, "errors").value == 2
    # Offline: samples of fewer than two tokens have none.
    offline = judge_offline(ns(S, 2 * S), Limits(0, 1), tokens=ns(30, 1))
    assert (offline.headline, offline.value) == ("result_tokens_per_second", 15.0)
    assert (offline.result, gate(offline, "errors").value) == ("INVALID", 1)


def test_multistream_waits_for_the_last_sample():
    latency = np.tile(np.arange(1, 9), (662, 1)) * 1000
    latency[:, 3] = 9000 + np.arange(662)
    judged = judge_multi_stream(np.arange(662), latency, Limits(0, 662, 0.99))
    assert judged.result == "VALID"
    # One slow query may be among 662: none is discarded.
    assert judged.figures == {"early_stopping_latency_ms": 9661}
    assert (judged.headline, judged.value) == ("early_stopping_latency_ms", 9661 / S)
    assert judged.spreads["query_latency"].min_ns == 9000
    assert judged.spreads["latency"].min_ns == 1000
    with pytest.raises(ValueError, match="of shape"):
        judge_multi_stream(np.arange(662), latency[:, :7], Limits())


def test_an_estimate_discards_what_it_may():
    assert stream_estimate_ns(np.arange(63), 0.9) is None
    assert stream_estimate_ns(np.arange(64)[::-1].copy(), 0.9) == 63
    assert stream_estimate_ns(np.arange(80), 0.9) == 79
    assert stream_estimate_ns(np.arange(81), 0.9) == 79
    few = judge_single_stream(np.arange(63), np.arange(63) + 1, Limits(0, 1, 0.9))
    assert (few.value, gate(few, "early_stopping").needed) == (None, 1)
    assert "early_stopping_latency_ss" not in few.figures


@pytest.mark.parametrize("errors", [0, 1])
def test_errors_and_shortened_runs_are_never_valid(errors):
    judged = [
        judge_offline(ns(1, 2), Limits(0, 1), errors),
        judge_server(ns(0, 1), ns(1, 1), Limits(0, 1, 0.001, latency_ns=5), errors),
        judge_tokens(
            ns(0, 1), ns(9, 9), ns(1, 1), ns(2, 2), Limits(0, 1, 0.001, None, 5, 9), errors
        ),
        judge_single_stream(ns(0, 1), ns(1, 1), Limits(0, 1, 0.001), errors),
        judge_multi_stream(ns(0, 1), np.ones((2, 8), np.int64), Limits(0, 1, 0.001), errors),
    ]
    assert {each.result for each in judged} == {"INVALID" if errors else "VALID"}
    for result in ("SHORTENED", "INVALID"):
        held = Limits(0 if result == "SHORTENED" else 9, 1, shortened=True)
        assert judge_offline(ns(1, 2), held).result == result


def test_what_is_missing_is_refused():
    with pytest.raises(ValueError, match="needs a latency limit"):
        judge_server(ns(0), ns(1), Limits())
    with pytest.raises(ValueError, match="limits on TTFT and TPOT"):
        judge_tokens(ns(0), ns(1), ns(1), ns(5), Limits(ttft_ns=1))
    with pytest.raises(ValueError, match="no latencies"):
        judge_offline(ns(), Limits())


def test_a_spread_by_hand():
    found = spread(ns(5, 1, 4, 2, 4))
    assert (found.count, found.min_ns, found.max_ns, found.mean_ns) == (5, 1, 5, 3)
    assert found.quantiles_ns == {
        "p50": 4, "p90": 5, "p95": 5, "p97": 5, "p99": 5, "p99.9": 5,
    }  # fmt: skip


def test_a_gate_is_as_result_json_has_it():
    judged = judge_offline(ns(5 * S, 6 * S), Limits(5 * S, 3, shortened=True))
    found = [asdict(each) for each in judged.gates]
    assert found[:2] == [
        {"name": "min_duration", "value": 6.0, "limit": 5.0, "unit": "s", "passed": True,
         "needed": None},
        {"name": "min_samples", "value": 2, "limit": 3, "unit": "samples", "passed": False,
         "needed": 1},
    ]  # fmt: skip
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert WORDING == "MLPerf-style, unverified"
    # Another way to the same gates, for samples that are elsewhere.
    assert list(judged.gates) == offline_gates(6 * S, 2, 0, Limits(5 * S, 3))
    # No time, no rate.
    assert judge_offline(ns(0, 0), Limits(0, 1)).value is None
