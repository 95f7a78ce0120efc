"""What LoadGen and dispatch cost alone: planned, run by LoadGen itself, and what is near it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distbench.floor import planned
from distbench.official import Official, settled
from distbench.report.central import marked
from distbench.report.text import to_text
from distbench.talk import hear, tell
from distbench.verdict import result
from tests.unit.test_loadgen import Ranks, ranks
from tests.unit.test_loadgen_verdict import run

__all__ = ["ranks"]
pytestmark = pytest.mark.timeout(60)

MS = 1_000_000
SHORT = "mlperf-v5.0,shortened=1s"


def plan(scenario: str, rules: str = "mlperf-v5.0", **more: Any) -> dict[str, Any]:
    return settled(Official(scenario, rules=rules, **more), 1000, 1000, [2000.0])


def test_a_hundredth_of_the_run_within_limits() -> None:
    assert planned(plan("singlestream")).duration_ns == 6000 * MS
    assert planned(plan("singlestream", "mlperf-v5.0,shortened=60s")).duration_ns == 600 * MS
    assert planned(plan("singlestream", "mlperf-v5.0,shortened=1s")).duration_ns == 200 * MS
    assert planned(plan("server", SHORT, target_qps=300.0)).qps == 300.0
    assert planned(plan("server", SHORT, target_qps=3.0)).qps == 100.0
    fast = planned(plan("server", SHORT, target_qps=90_000.0))
    assert fast.qps == 10_000.0 and fast.capacity == 4_000 + 2_000
    assert planned(plan("offline")).capacity == 100_000
    assert planned(plan("offline", "mlperf-v5.0,shortened=1s")).capacity == 2_420
    streams = [planned(plan(each)).capacity for each in ("singlestream", "multistream")]
    assert streams[1] == 8 * streams[0] > 8 * 300_000


@pytest.mark.parametrize("scenario", ["offline", "server", "singlestream", "multistream"])
def test_loadgen_alone_after_a_run(ranks: Ranks, scenario: str) -> None:
    """The run before it is untouched, and the same process takes the floor over the same links."""
    official = ranks.begin(scenario)
    ranks.serve()
    ranks.fetched()
    log = ranks.out / "run" / "loadgen" / "mlperf_log_detail.txt"
    before = log.read_bytes()
    tell(ranks.control, {"do": "floor", "official": official})
    ranks.serve()
    told, _ = hear(ranks.control)
    keys = told["keys"]
    assert told["duration_ns"] == 200 * MS
    assert keys["result_query_count"] >= (1 if scenario == "offline" else 100)
    if scenario == "offline":
        assert 1e3 < keys["result_samples_per_second"] < 1e8
    else:
        assert 0 < keys["result_50.00_percentile_latency_ns"] < 1e9
    assert log.read_bytes() == before
    tell(ranks.control, {"do": "bye"})
    assert ranks.process.wait(10) == 0


KEYS = {
    "result_query_count": 500,
    "result_50.00_percentile_latency_ns": 100_000,
    "result_99.00_percentile_latency_ns": 800_000,
    "result_max_latency_ns": 900_000,
}


def beside(floor: dict[str, Any] | None, keys: dict[str, Any] | None = None) -> Any:
    made = run({"result_50.00_percentile_latency_ns": 1_000_000, **(keys or {})})
    assert made.first.after is not None
    if floor is not None:
        made.first.after["floor"] = floor
    return result(made)


def near(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for each in found["verdict"]["findings"] if each["code"].endswith("floor")]


def test_percentiles_near_the_floor_are_marked() -> None:
    """p50 is 1 ms beside 0.1 ms, ten times; p99 is 7 ms beside 0.8 ms, less than ten times."""
    found = beside({"keys": KEYS})
    metrics = found["metrics"]
    assert metrics["floor.latency.p50"]["value"] == 0.0001
    assert metrics["floor.latency.p50"]["n"] == 500
    assert "replicas that do nothing" in metrics["floor.latency.p50"]["definition"]
    assert metrics["floor.latency.p90"]["value"] is None
    (finding,) = near(found)
    assert finding["code"] == "near-floor" and finding["level"] == "doubtful"
    assert finding["message"].startswith("latency.p99: ")
    assert finding["value"] == pytest.approx(8.75) and finding["limit"] == 10
    assert marked(metrics, "latency.p99") == "7.00 ms*"
    assert marked(metrics, "latency.p50") == "1.00 ms"
    text = to_text(found)
    assert "7.00 ms*" in text and "* is less than 10 times" in text
    assert found["verdict"]["rules"]["result"] == "VALID", "LoadGen's word is its own"


def test_a_tail_of_few_queries_is_not_told() -> None:
    metrics = beside({"keys": {**KEYS, "result_query_count": 499}})["metrics"]
    assert metrics["floor.latency.p99"]["value"] is None
    assert metrics["floor.latency.p99"]["reason"] == "499 queries tell no p99"
    assert metrics["floor.latency.p50"]["value"] == 0.0001


def test_a_floor_far_below_marks_nothing() -> None:
    far = {"result_99.00_percentile_latency_ns": 700_000}
    assert near(beside({"keys": {**KEYS, **far}})) == []


def test_a_floor_that_is_not_known() -> None:
    found = beside({"problem": "rank 1 (jw3) left"})
    (finding,) = [each for each in found["verdict"]["findings"] if "floor" in each["code"]]
    assert finding["code"] == "floor-unknown" and "rank 1 (jw3) left" in finding["message"]
    assert found["metrics"]["floor.latency.p99"]["reason"] == "rank 1 (jw3) left"
    none = beside(None)
    assert "floor.latency.p99" not in none["metrics"] and near(none) == []


def test_offline_is_held_by_its_rate(tmp_path: Path) -> None:
    from dataclasses import replace

    made = run({"result_samples_per_second": 5000.0})
    for record in made.records:
        record.before["official"]["scenario"] = record.before["scenario"] = "offline"
    assert made.first.after is not None
    made.first.after["floor"] = {"keys": {"result_samples_per_second": 49_000.0}}
    offline = replace(made, records=made.records)
    from distbench.floor_verdict import floor_figures, floor_found

    figures = {"throughput": {"value": 5000.0}, **floor_figures(offline)}
    (finding,) = floor_found(offline, figures)
    assert finding.message.startswith("throughput: ") and finding.value == pytest.approx(9.8)
    assert floor_found(offline, {**figures, "throughput": {"value": 4000.0}}) == []
