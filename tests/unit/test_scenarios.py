"""What is measured in Server and in the streams, through saved runs of known latencies."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench.bounds import parse_bounds
from distbench.compare import compare
from distbench.early_stopping import over_allowed
from distbench.errors import UsageError
from distbench.gates import Gate
from distbench.judged import judge_multi_stream, judge_server, judge_single_stream
from distbench.quantiles import percentiles_ns
from distbench.rules import limits, parse_rules
from distbench.samples import SampleLog
from distbench.scenarios import SCENARIOS, scenario
from distbench.verify import verify

from .serving import MS, US, S, queries, served
from .synthetic import in_memory, make_run
from .test_verdict import about, found, only

QUANTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p97": 0.97, "p99": 0.99, "p99.9": 0.999}
PARTS = ("lateness", "queue", "service", "return")
TEN_MINUTES = 600_001


def spread(n: int, seed: int, low: int = 300 * US, high: int = 700 * US) -> Any:
    return np.random.default_rng(seed).integers(low, high, n)


def metrics(*ranks: Any, scenario: str = "server", **load: Any) -> dict[str, Any]:
    run = in_memory(ranks=len(ranks), change=served(ranks, scenario, **load))
    return dict(run.result()["metrics"])


def test_every_scenario_names_its_headline_and_its_latency() -> None:
    for name, each in SCENARIOS.items():
        assert scenario(name) is each
        assert "latency" in each.series
        assert each.headline == "throughput" or each.percentile > 0
        assert [each.drained, each.stream, each.open_loop].count(True) == 1


def test_a_scenario_of_another_version_is_refused_not_judged_as_one_of_these() -> None:
    with pytest.raises(UsageError, match=r"'servr' is none of .*; did you mean server"):
        scenario("servr")


# Server


def test_the_parts_of_a_latency_sum_to_it_exactly() -> None:
    rng = np.random.default_rng(5)
    wait, late, handed, back = (rng.integers(0, 90 * US, 500) for _ in range(4))
    own = queries(500, wait=wait, late=late, handed=handed, served=spread(500, 1), returned=back)
    other = queries(300, served=spread(300, 2))
    got = metrics(own, other)
    assert got["latency.mean"]["n"] == 800
    whole = sum(round(got[f"{part}.mean"]["value"] * 800 * S) for part in PARTS)
    assert whole == round(got["latency.mean"]["value"] * 800 * S)
    lateness = np.concatenate([late, np.full(300, US)])
    queue = np.concatenate([wait + handed, np.full(300, 2 * US)])
    for name, values in (("lateness", lateness), ("queue", queue)):
        for label, value in zip(
            QUANTILES, percentiles_ns(values, [*QUANTILES.values()]), strict=True
        ):
            assert got[f"{name}.{label}"]["value"] == value / S


def test_a_query_that_came_while_its_group_waited_was_ready_when_it_came() -> None:
    # One group of three: due at 0, 10 and 20 us; the loop was free at 15 us and issued at 25 us.
    at = queries(3, gap_ns=10 * US, wait=0)
    for name, stamp in {"ready": 15, "issued": 25, "started": 26, "finished": 90}.items():
        at[name] = np.array([stamp * US, 0, 0])
    at["completed"], at["count"] = np.array([95 * US, -1, -1]), np.array([3, 0, 0])

    def change(ranks: Any) -> None:
        served([at])(ranks)
        ranks[0].log.completed[1:] = -1

    got = in_memory(ranks=1, change=change).result()["metrics"]
    assert got["latency.max"]["value"] * S == pytest.approx(95 * US)
    assert got["latency.mean"]["value"] * S == pytest.approx(85 * US)
    # ready: 15, 15 and 20 us, so late by 10, 10 and 5 us.
    assert got["lateness.mean"]["value"] * S == pytest.approx(25 * US / 3)
    assert got["queue.mean"]["value"] * S == pytest.approx((15 + 5 + 0) * US / 3 + 1 * US)
    assert got["service.mean"]["value"] * S == pytest.approx(64 * US)
    assert got["return.mean"]["value"] * S == pytest.approx(5 * US)


def test_an_engine_without_stamps_has_no_parts_but_lateness() -> None:
    at = queries(100)
    at["started"] = at["finished"] = np.full(100, -(10**18))

    def change(ranks: Any) -> None:
        served([at])(ranks)
        ranks[0].log.started[:] = ranks[0].log.finished[:] = 0

    got = in_memory(ranks=1, change=change).result()["metrics"]
    assert got["lateness.p50"]["value"] == US / S
    assert not {"queue.p50", "service.p50", "return.p50"} & set(got)


def test_the_rates_are_loadgens() -> None:
    one, two = queries(100, gap_ns=7 * MS), queries(50, gap_ns=11 * MS, served=3 * MS)
    got = metrics(one, two)
    # Rank 0's last query is due last, at 693 ms, and took 406 us.
    assert got["throughput.scheduled"]["value"] == pytest.approx(149 / 0.693)
    assert got["throughput.completed"]["value"] == pytest.approx(149 / 0.693406)
    assert "throughput.steady" not in got


def test_each_rank_tells_of_its_own_latencies() -> None:
    one, two = queries(200, served=spread(200, 1)), queries(100, served=spread(100, 2))
    rows = in_memory(change=served([one, two])).result()["per_rank"]
    for row, at in zip(rows, (one, two), strict=True):
        latency = at["completed"] - at["scheduled"]
        wanted = percentiles_ns(latency, [0.5, 0.9, 0.99])
        assert [row["metrics"][f"latency.{p}"] for p in ("p50", "p90", "p99")] == [
            value / S for value in wanted
        ]


def test_a_clean_server_run_is_valid_and_verified(tmp_path: Path) -> None:
    ranks = [queries(2_000, served=spread(2_000, seed)) for seed in (1, 2)]
    assert found(tmp_path, served(ranks)) == ("VALID", [])
    folder = make_run(tmp_path / "stored", change=served(ranks))
    assert verify(folder) == (0, [])
    text = (folder / "report.txt").read_text()
    assert "poisson at 1000 queries/s, static dispatch" in text
    assert "latency is from the schedule" in text


# The user's bounds


def bound(text: str) -> list[dict[str, Any]]:
    return [asdict(each) for each in parse_bounds(text)]


@pytest.mark.parametrize(
    ("limit", "status", "code"),
    [
        ("800us@p99", "VALID", None),
        ("697us@p90", "VALID", None),
        ("350us@p50", "INVALID", "bound-missed"),
        ("508us@p50", "UNDECIDED", "bound-undecided"),
        ("499us@p50", "UNDECIDED", "bound-undecided"),
        ("ttft=1s@p99", "UNDECIDED", "bound-undecided"),
    ],
)
def test_a_bound_is_kept_missed_or_undecided(
    tmp_path: Path, limit: str, status: str, code: str | None
) -> None:
    # 4,000 latencies spread evenly between 306 and 706 us: p50 about 506 us, +- some 10 us.
    change = served([queries(4_000, served=spread(4_000, 3))], bounds=bound(limit))
    state, findings = found(tmp_path, change, ranks=1)
    assert state == status
    assert [f.code for f in findings] == [code] * (code is not None)
    if code == "bound-missed":
        assert about(findings[0]) == ("invalid", code, None, "")
        assert findings[0].limit == 350e-6


def test_a_bound_on_a_percentile_without_an_interval_is_undecided(tmp_path: Path) -> None:
    change = served([queries(100, gap_ns=20 * MS)], bounds=bound("15ms@p99"))
    state, finding = only(tmp_path, change, ranks=1)
    assert (state, finding.level, finding.code) == ("UNDECIDED", "undecided", "bound-undecided")
    assert "no interval (not resolvable: run longer" in finding.message


def test_the_worst_of_several_bounds_is_the_status(tmp_path: Path) -> None:
    limits_ = bound("15ms@p50,350us@p90")
    change = served([queries(4_000, served=spread(4_000, 3))], bounds=limits_)
    assert only(tmp_path, change, ranks=1)[0] == "INVALID"


# What the harness adds


@pytest.mark.parametrize(
    ("late_us", "level"), [(5, None), (6, "doubtful"), (26, "doubtful"), (27, "invalid")]
)
def test_lateness_is_graded_by_its_share_of_the_judged_latency(
    tmp_path: Path, late_us: int, level: str | None
) -> None:
    # Constant parts: 2 us handed, 500 us served, 3 us back, so 505 us and the lateness.
    change = served([queries(2_000, late=late_us * US, served=500 * US)])
    state, findings = found(tmp_path, change, ranks=1)
    assert [f.code for f in findings] == ["issue-lateness"] * (level is not None)
    assert state == ("INVALID" if level == "invalid" else "VALID")
    if level:
        assert about(findings[0]) == (level, "issue-lateness", None, "")
        assert findings[0].value == pytest.approx(late_us / (505 + late_us))


@pytest.mark.parametrize(
    ("cost_us", "level"), [(5, None), (6, "doubtful"), (25, "doubtful"), (26, "invalid")]
)
def test_the_harness_is_held_against_the_latency(
    tmp_path: Path, cost_us: int, level: str | None
) -> None:
    def change(ranks: Any) -> None:
        served([queries(2_000, served=500 * US)])(ranks)  # 506 us
        ranks[0].before["harness"].update(loop_ns=[cost_us * US * 10], batches=10)

    state, findings = found(tmp_path, change, ranks=1)
    assert [f.code for f in findings] == ["harness-cost"] * (level is not None)
    assert state == ("INVALID" if level == "invalid" else "VALID")
    if level:
        assert "506" not in findings[0].message
        assert findings[0].level == level
        assert findings[0].value == pytest.approx(cost_us / 506)


def test_what_the_user_bounds_is_what_lateness_and_harness_are_held_against(
    tmp_path: Path,
) -> None:
    # p99 is 20 ms, of which 60 us are nothing; of p50, which is bounded, they are half.
    took = np.full(2_000, 50 * US)
    took[::20] = 20 * MS

    def change(ranks: Any) -> None:
        at = queries(2_000, gap_ns=25 * MS, late=60 * US, served=took)
        served([at], bounds=bound("1ms@p50"))(ranks)
        ranks[0].before["harness"].update(loop_ns=[10 * 10 * US], batches=10)

    state, findings = found(tmp_path, change, ranks=1)
    assert state == "INVALID"
    told = {f.code: f for f in findings if f.level == "invalid"}
    assert told["issue-lateness"].value == pytest.approx(60 / 115)
    assert told["issue-lateness"].message.startswith("latency.p50 is 0.115 ms")
    assert told["harness-cost"].value == pytest.approx(10 / 115)


@pytest.mark.parametrize(("late_ms", "level"), [(0.4, "doubtful"), (1.2, "invalid")])
def test_a_late_start_is_held_against_the_queries_that_decide(
    tmp_path: Path, late_ms: float, level: str
) -> None:
    # 2 s of queries: 1 % of them, which p99 leaves beyond, come in 20 ms; 5 % of those in 1 ms.
    at = queries(2_000)
    state, findings = found(tmp_path, served([at]), ranks=1, late_ns=(round(late_ms * MS),))
    (told,) = [f for f in findings if f.code == "start-late"]
    assert (told.level, state) == (level, "INVALID" if level == "invalid" else "VALID")
    assert "of the 0.01 of the queries that decide" in told.message


def test_waiting_for_a_processor_is_held_against_the_work(tmp_path: Path) -> None:
    # A loop that is busy for a fifth of its window, and late by 1 us a query: 2 ms in all.
    def change(ranks: Any, delay_ms: float) -> None:
        served([queries(2_000, served=200 * US)])(ranks)
        ranks[0].after["quiet"]["run_delay_ns"] = round(delay_ms * MS)

    busy_ns = 2_000 * 205 * US
    for delay_ms, level in ((6.0, None), (10.0, "doubtful"), (24.0, "invalid")):
        _, findings = found(
            tmp_path / str(delay_ms), lambda ranks, d=delay_ms: change(ranks, d), ranks=1
        )
        told = [f for f in findings if f.code == "interference"]
        assert [f.level for f in told] == [level] * (level is not None)
        if told:
            assert told[0].value == pytest.approx((delay_ms * MS - 2 * MS) / busy_ns)


def test_no_goodput_is_made_up_for_a_time_that_no_query_has() -> None:
    got = metrics(queries(500), bounds=bound("ttft=500ms@p90"))["goodput"]
    assert (got["value"], got["reason"]) == (None, "no query has a ttft")


def test_an_engine_that_stamps_one_end_alone_has_no_service() -> None:
    def change(ranks: Any) -> None:
        served([queries(300)])(ranks)
        columns = [c for c in ranks[0].log.columns if c != "finished"]
        log = SampleLog.in_memory(300, columns)
        for name in columns:
            getattr(log, name)[:] = getattr(ranks[0].log, name)
        ranks[0].log = log
        ranks[0].before["columns"] = columns

    got = in_memory(ranks=1, change=change).result()
    assert got["verdict"]["status"] == "VALID"
    assert "service.p50" not in got["metrics"]


def test_clocks_do_not_touch_a_latency(tmp_path: Path) -> None:
    # The makespan is known to a tenth of itself; each latency is of one clock.
    ranks = [queries(500), queries(500)]
    change = served(ranks)
    assert found(tmp_path, change, bound_ns=(0, 50 * MS)) == ("VALID", [])


def test_a_window_that_was_given_up_tells_what_is_completed(tmp_path: Path) -> None:
    at = queries(1_000, served=2 * MS, wait=np.arange(1_000) * MS)

    def change(ranks: Any) -> None:
        served([at], target_qps=1000.0, bounds=bound("15ms@p99"))(ranks)
        log, after = ranks[0].log, ranks[0].after
        for name in ("issued", "ready", "started", "finished", "count"):
            getattr(log, name)[400:] = 0
        log.completed[400:] = -1
        after |= {"halted": True, "ended_ns": int(log.completed.max())}

    state, findings = found(tmp_path, change, ranks=1)
    assert state == "INVALID"
    (told,) = [f for f in findings if f.code == "overloaded"]
    assert about(told) == ("invalid", "overloaded", None, "")
    last_s = (399 * 2 * MS + 2 * MS + 6 * US) / S
    assert told.value == pytest.approx(400 / last_s)
    assert told.limit == 1000.0
    assert "600 of 1,000 queries left" in told.message
    assert not {"samples-missing", "trend"} & {f.code for f in findings}
    got = in_memory(ranks=1, change=under("mlperf-v5.0,shortened=100ms", change)).result()
    rules = got["verdict"]["rules"]
    assert (rules["result"], rules["gates"]) == ("INVALID", [])
    for name in ("throughput.scheduled", "throughput.completed"):
        assert got["metrics"][name]["value"] is None
        assert got["metrics"][name]["reason"] == "the window was given up"


# MLPerf's gates


def gates(run: Any) -> list[Gate]:
    return [Gate(**gate) for gate in run.result()["verdict"]["rules"]["gates"]]


def under(rules: str, change: Any) -> Any:
    def both(ranks: Any) -> None:
        change(ranks)
        for rank in ranks:
            rank.before["rules"] = rules

    return both


@pytest.mark.parametrize("over", [0, 3, 40])
@pytest.mark.parametrize("seconds", [0.4, 2.0])
def test_servers_gates_are_those_of_the_latencies(over: int, seconds: float) -> None:
    served_ns = spread(2_000, 7)
    served_ns[:over] = 20 * MS
    served_ns[over : over + 30] = 15 * MS - 6 * US  # at the limit, which is not over it
    gap = round(seconds * S / 1_999)
    one, two = queries(1_200, gap, served=served_ns[:1_200]), queries(800, gap)
    rules = "mlperf-v5.0,shortened=1s"
    change = under(rules, served([one, two], bounds=bound("15ms@p99")))
    run = in_memory(change=change)
    both = [np.concatenate([one[name], two[name]]) for name in ("scheduled", "completed")]
    order = np.argsort(both[0], kind="stable")
    held = limits(parse_rules(rules), "server", latency_ns=15 * MS)
    judged = judge_server(both[0][order], (both[1] - both[0])[order], held)
    assert gates(run) == list(judged.gates)
    assert run.result()["verdict"]["rules"]["result"] == judged.result


def test_a_pass_whose_interval_crosses_the_limit_may_fail_in_a_repeat(tmp_path: Path) -> None:
    # Bursts: early stopping counts the slow ones, the interval knows that they come together.
    served_ns = np.full(20_000, MS)
    for first in range(900, 20_000, 2_000):
        served_ns[first : first + 15] = 16 * MS
    over = int((served_ns > 15 * MS).sum())
    allowed = over_allowed(20_000, 0.99)
    assert allowed is not None and over < allowed
    at = queries(20_000, served=served_ns)
    rules = "mlperf-v5.0,shortened=1s"
    change = under(rules, served([at], bounds=bound("15ms@p99")))
    run = in_memory(ranks=1, change=change)
    figure = run.result()["metrics"]["latency.p99"]
    assert figure["value"] < 0.015 < figure["ci_high"]
    _, findings = found(tmp_path, change, ranks=1)
    assert "rules-marginal" in [f.code for f in findings]


def test_a_stream_is_judged_by_replica_and_the_worst_counts() -> None:
    long, short = (queries(n, gap_ns=900 * US, wait=0) for n in (900, 60))
    rules = "mlperf-v5.0,shortened=500ms"
    run = in_memory(change=under(rules, served([long, short], "singlestream")))
    held = limits(parse_rules(rules), "singlestream")
    alone = [
        judge_single_stream(at["issued"], at["completed"] - at["issued"], held).gates
        for at in (long, short)
    ]
    assert gates(run) == list(alone[1])
    assert run.result()["verdict"]["rules"]["result"] == "INVALID"
    run = in_memory(ranks=1, change=under(rules, served([long], "singlestream")))
    assert gates(run) == list(alone[0])
    assert run.result()["verdict"]["rules"]["result"] == "SHORTENED"


# Streams


def test_single_stream_has_loadgens_estimate_and_says_what_is_pooled() -> None:
    one, two = queries(700, served=spread(700, 1)), queries(500, served=spread(500, 2))
    took = [at["completed"] - at["issued"] for at in (one, two)]
    held = limits(parse_rules("mlperf-v5.0"), "singlestream")
    got = in_memory(change=served([one, two], "singlestream")).result()
    pooled = np.concatenate(took)
    allowed = over_allowed(1_200, 90 * 0.01)
    assert allowed is not None
    found_ = got["metrics"]["latency.p90.early_stopping"]
    assert found_["value"] == np.sort(pooled)[1_200 - allowed] / S
    assert "pooled over 2 replicas, which MLPerf does not do" in found_["definition"]
    for row, at, latency in zip(got["per_rank"], (one, two), took, strict=True):
        alone = judge_single_stream(at["issued"], latency, held).value
        assert row["metrics"]["latency.p90.early_stopping"] == alone
    alone = metrics(one, scenario="singlestream")["latency.p90.early_stopping"]
    assert "pooled" not in alone["definition"]
    few = metrics(queries(63), scenario="singlestream")["latency.p90.early_stopping"]
    assert (few["value"], "64" in few["reason"]) == (None, True)


def test_a_multistream_querys_latency_is_that_of_its_group() -> None:
    # 700 queries of eight samples; the loop stamps the first row of each.
    took = spread(700, 4)
    n = 5_600
    at = {name: np.zeros(n, np.int64) for name in queries(1)}
    first = np.arange(700) * 8
    at["issued"][first] = np.arange(700) * MS
    at["scheduled"] = np.repeat(np.arange(700) * MS, 8)
    at["started"][first], at["finished"][first] = at["issued"][first] + 5, at["issued"][first] + 9
    at["completed"][first] = at["issued"][first] + took
    at["count"] = np.zeros(n, np.int64)
    at["count"][first] = 8

    def change(ranks: Any) -> None:
        served([at], "multistream")(ranks)
        inner = ranks[0].log.count == 0
        ranks[0].log.completed[inner] = -1

    got = in_memory(ranks=1, change=change).result()
    assert got["metrics"]["latency.p99"]["n"] == 700
    assert got["metrics"]["latency.p99"]["value"] == percentiles_ns(took, [0.99])[0] / S
    held = limits(parse_rules("mlperf-v5.0"), "multistream")
    judged = judge_multi_stream(at["issued"][first], np.repeat(took[:, None], 8, 1), held)
    assert got["metrics"]["latency.p99.early_stopping"]["value"] == judged.value
    assert got["window"]["samples"] == n


def launch(seed: int, slower: float = 1.0) -> dict[str, Any]:
    took = (spread(4_000, seed) * slower).astype(np.int64)
    found_ = in_memory(ranks=1, change=served([queries(4_000, served=took)])).result()
    return {**found_, "run_id": f"run-{seed}-{slower}"}


def test_launches_are_compared_by_what_their_scenario_judges() -> None:
    base = [launch(seed) for seed in range(5)]
    new = [launch(seed, 1.2) for seed in range(5, 10)]
    told = compare(base, new)
    assert (told.metric, told.unit, told.lower_is_better) == ("latency.p99", "s", True)
    assert (told.verdict, told.regression) == ("slower", True)
    assert told.ratio == pytest.approx(1.2, rel=0.01)
