"""What LoadGen is asked: conf, counts, and the runs that cannot last, refused before it starts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distbench.errors import UsageError
from distbench.official import Official, settled

SHORT = "mlperf-v5.0,shortened=5s"


def lines(plan: dict[str, Any]) -> list[str]:
    return [each for each in plan["conf"].splitlines() if not each.startswith("#")]


def test_a_benchmark_of_ours_brings_its_limits() -> None:
    plan = settled(Official("server", rules=SHORT), 1797, 1797, [900.0, 1100.0])
    assert lines(plan) == [
        "digits.Server.min_duration = 5000",
        "digits.Server.target_latency = 15",
        "digits.Server.target_qps = 200",
    ]
    assert (plan["capacity"], plan["min_duration_ns"]) == (992, 5_000_000_000)
    assert plan["shortened"] and not plan["listed"] and not plan["edited"]


def test_a_token_model_brings_limits_on_tokens() -> None:
    plan = settled(Official("server", name="tinylm"), 1024, 1024, [100.0])
    assert plan["tokens"] and not plan["shortened"]
    asked = [each.split(".")[2] for each in lines(plan)]
    assert asked == [
        "use_token_latencies = 1", "ttft_latency = 500", "tpot_latency = 50", "target_qps = 200",
    ]  # fmt: skip
    fast = Official("server", name="tinylm", rules="mlperf-v5.0,interactive")
    asked = lines(settled(fast, 1024, 1024, [100.0]))
    assert "tinylm-interactive.Server.ttft_latency = 200" in asked


def test_a_benchmark_of_the_list_gets_nothing_but_a_rate() -> None:
    plan = settled(Official("server", name="resnet50", target_qps=50.5), 1024, 1024, [100.0])
    assert lines(plan) == ["resnet50.Server.target_qps = 50.5"]
    assert plan["listed"] and plan["resident"] == 1024
    whole = settled(Official("offline", name="resnet50"), 1024, 1024, [100.0])
    assert whole["capacity"] == int(1.1 * 600 * 110)
    few = settled(Official("offline", name="resnet50", rules=SHORT), 256, 256, [1.0])
    assert few["resident"] == 256


def test_a_server_run_that_nobody_would_wait_for_is_refused() -> None:
    """300,000 queries/s for 2 s are 600,000: at 1,000 a second ten minutes that nobody can stop."""
    fast = Official("server", rules="mlperf-v5.0,shortened=2s", target_qps=300_000.0)
    with pytest.raises(UsageError, match=r"busy for \d+ s.*give --target-qps 1000 or less"):
        settled(fast, 1797, 1797, [1000.0])
    assert settled(fast, 1797, 1797, [100_000.0])["capacity"] > 500_000
    every = Official("server", "accuracy", rules="mlperf-v5.0,shortened=2s", target_qps=300_000.0)
    assert settled(every, 1797, 1797, [1000.0])["capacity"] == 1797
    unscored = "TEST01 compares answers with those of accuracy mode"
    with pytest.raises(UsageError, match=unscored):
        Official("offline", "compliance", "resnet50", audit="TEST01")


def test_the_users_conf_stands_first_and_is_not_repeated() -> None:
    text = "*.Server.target_qps = 77\n*.Server.min_query_count = 300"
    plan = settled(Official("server", user_conf=text, rules=SHORT), 1797, 1797, [900.0])
    assert plan["conf"].startswith(text + "\n")
    assert plan["target_qps"] == 77.0
    assert "target_qps = 200" not in plan["conf"]
    assert plan["capacity"] >= 300
    assert plan["edited"] == []


@pytest.mark.parametrize(
    ("line", "edited"),
    [
        ("*.*.min_duration = 600000", False),
        ("*.*.min_duration = 599999", True),
        ("*.Server.min_query_count = 100", False),
        ("*.Server.min_query_count = 99", True),
        ("*.Server.target_latency = 99", True),
        ("*.*.sample_concatenate_permutation = 1", True),
        ("*.Offline.min_duration = 1", False),
        ("tinylm.Server.min_duration = 1", False),
    ],
)
def test_what_the_rules_do_not_leave_to_a_submitter(line: str, edited: bool) -> None:
    plan = settled(Official("server", user_conf=line), 1797, 1797, [900.0])
    assert bool(plan["edited"]) == edited


def test_a_rate_at_which_loadgen_would_end_too_soon() -> None:
    with pytest.raises(UsageError) as caught:
        settled(Official("offline", target_qps=100.0), 1797, 1797, [4000.0, 4000.0])
    told = str(caught.value)
    assert "66,000 samples" in told and "8.25 s" in told and "600 s" in told
    assert "--target-qps 8400 or more" in told and caught.value.agreed
    right = settled(Official("offline", target_qps=8400.0), 1797, 1797, [4000.0, 4000.0])
    assert right["capacity"] >= 8000 * 600
    # At the accuracy of one pass over the data nothing has to last.
    slow = Official("offline", "accuracy", target_qps=100.0)
    assert settled(slow, 1797, 1797, [4000.0])["capacity"] == 1797


def test_an_expected_latency_at_which_loadgen_would_run_out_of_queries() -> None:
    conf = "*.SingleStream.target_latency = 10"
    with pytest.raises(UsageError, match=r"give target_latency 0\.54 or less"):
        settled(Official("singlestream", user_conf=conf), 1797, 1797, [2000.0, 2000.0])
    # With many in flight in the warm-up, one alone takes longer than the rate tells.
    settled(Official("singlestream", user_conf=conf), 1797, 1797, [800.0], depth=8)
    plan = settled(Official("multistream"), 1797, 1797, [2000.0])
    assert plan["expected_latency_ns"] == 2_020_000
    assert plan["capacity"] % 8 == 0 and plan["capacity"] > 600 * 2000
    # The eight samples of a query are spread, so that on 8 ranks it takes as long as one sample.
    spread = settled(Official("multistream"), 1797, 1797, [2000.0] * 8)
    assert spread["expected_latency_ns"] == 270_000


@pytest.mark.parametrize(("scenario", "issued"), [("multistream", 1800), ("server", 1797)])
def test_accuracy_issues_every_sample_and_multistream_whole_queries(
    scenario: str, issued: int
) -> None:
    assert settled(Official(scenario, "accuracy"), 1797, 1797, [900.0])["capacity"] == issued


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"name": "digist"}, "benchmark 'digist'.*did you mean digits"),
        ({"rules": "none"}, "give --rules mlperf-v5.0"),
        ({"rules": "mlperf-v5.2"}, "mlperf-v5.2"),
        ({"rules": "mlperf-v5.0,interactive"}, "no interactive variant"),
        ({"mode": "accuracy", "name": "resnet50"}, "no accuracy mode: its images are noise"),
        ({"scenario": "singlestream", "target_qps": 5.0}, "SingleStream has no rate"),
        ({"user_conf": "*.Server.target_qps = 3", "target_qps": 5.0}, "both give a rate"),
    ],
)
def test_what_cannot_be_asked_together(given: dict[str, Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        Official(**{"scenario": "server", **given})


def test_the_plan_is_plain_numbers_and_words() -> None:
    import json

    plan = settled(Official("offline"), 1797, 1797, [float(np.float64(900.0))])
    assert json.loads(json.dumps(plan)) == plan
