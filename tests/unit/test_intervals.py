"""Intervals over ranks against the same in one place, the steady rate against what was laid out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench.intervals import GROUPS_LEAST, percentile_intervals, steady_rate
from distbench.metrics import QUANTILES
from distbench.pool import facts, in_one_place, series
from distbench.run import Run
from distbench.stats import quantile_interval
from distbench.steady import rate_interval
from distbench.times import makespan, rank_times

from .synthetic import Rank, in_memory
from .test_verdict import about, found

MS, S = 10**6, 10**9


def paced(durations_ns: list[np.ndarray]) -> Any:
    """Return a change that gives each rank's groups these durations, one after the other."""

    def change(ranks: list[Rank]) -> None:
        for rank, durations in zip(ranks, durations_ns, strict=True):
            assert rank.after is not None
            begin = rank.after["plan"]["local_ns"]
            ends = begin + np.cumsum(durations)
            rows = np.flatnonzero(rank.log.count > 0)
            rank.log.completed[rows] = ends
            rank.log.issued[rows] = np.concatenate(([begin], ends[:-1])) + 1_000
            rank.log.started[rows] = rank.log.issued[rows] + 100
            rank.log.finished[rows] = ends - 100
            rank.after |= {"started_ns": begin, "ended_ns": int(ends[-1])}
            rank.before["duration_ns"] = None

    return change


def run_of(durations_ns: list[np.ndarray], **shape: Any) -> Run:
    groups = tuple(len(each) for each in durations_ns)
    return in_memory(
        ranks=len(groups), groups=groups, late_ns=(0,), change=paced(durations_ns), **shape
    )


def noisy(seed: int, n: int, mean_ns: int = MS) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean_ns, mean_ns / 20, n).astype(np.int64)


@pytest.mark.parametrize("sizes", [(4_000, 3_000), (5_000,), (4_000, 0, 300)])
def test_percentiles_and_intervals_are_those_of_all_samples_in_one_place(
    sizes: tuple[int, ...],
) -> None:
    run = run_of([noisy(i, max(n, 1)) for i, n in enumerate(sizes)])
    if 0 in sizes:  # a rank that completed nothing
        rank = run.present[1]
        assert rank.rows is not None
        rank.rows[:, rank.before["columns"].index("count")] = 0
    pool = in_one_place(run)
    parts = [series(record, "batch_latency") for record in run.present]
    every = np.sort(np.concatenate(parts))
    got = percentile_intervals(
        pool, "batch_latency", [len(p) for p in parts], int(every[-1]), QUANTILES
    )
    for label, q in QUANTILES.items():
        value, interval = got[label]
        assert value == every[int(len(every) * q)]
        assert interval == quantile_interval(parts, q)
    assert got["p50"][1].low is not None
    assert got["p50"][1].low <= got["p50"][0] <= got["p50"][1].high


def test_every_interval_that_is_refused_has_its_reason_and_the_worth_that_refused_it() -> None:
    # Lognormal AR(1): p99 and p99.9 need more independent values than 1,000 are worth.
    rng = np.random.default_rng(5)
    logs = np.zeros(1_000)
    for k in range(1, 1_000):
        logs[k] = 0.8 * logs[k - 1] + 0.6 * rng.standard_normal()
    run = run_of([(MS * np.exp(0.2 * logs)).astype(np.int64)])
    metrics, whole = run.result()["metrics"], run.report().splitlines()
    for name, title in (("batch_latency", "batch"), ("service", "service")):
        at = next(k for k, each in enumerate(whole) if each.startswith(f"{title} "))
        refused = [label for label in QUANTILES if metrics[f"{name}.{label}"]["ci_low"] is None]
        assert refused == ["p95", "p97", "p99", "p99.9"]
        assert whole[at + 1].split()[-4:] == ["-"] * 4  # of max and mean there is none to have
        assert whole[at + 1].count("-") == 4
        (line,) = [k for k, each in enumerate(whole) if title in each and "not resolv" in each]
        told = " ".join(" ".join(whole[line : line + 2]).split())
        assert told.startswith("batch, service p95, p97, p99, p99.9: not resolvable: run longer")
        for label, shown in zip(QUANTILES, whole[at + 3].split()[2:], strict=True):
            found = metrics[f"{name}.{label}"]
            assert f"{found['n_eff']:,.0f}" == shown
            if label in refused:
                words = f"are worth {shown} independent ones, and {label} needs"
                assert words in found["reason"]
                assert words in told or label != refused[0]
        assert "p95 needs 72, the higher ones more" in told


def steady(run: Run) -> Any:
    pool = in_one_place(run)
    times = [rank_times(run, r, facts(r)) for r in run.present]
    return steady_rate(pool, times, makespan(run, times).start_ns)


@pytest.mark.parametrize("drift_ppm", [(0, 0), (0, 40)])
def test_the_steady_rate_begins_when_all_are_warm_and_ends_with_the_first(
    drift_ppm: tuple[int, int],
) -> None:
    # Rank 1's first 50 groups take ten times as long; rank 0 is done after 900 ms.
    slow = np.concatenate([np.full(50, 10 * MS), np.full(1_000, MS)])
    run = run_of([np.full(900, MS), slow], drift_ppm=drift_ppm)
    got = steady(run)
    assert got.cut_s == pytest.approx(0.5, abs=0.006)
    assert got.cut_s + got.length_s == pytest.approx(0.9, abs=1e-4)
    # Two ranks, four samples each 1 ms.
    assert got.rate_qps == pytest.approx(8_000, rel=0.004)
    assert got.samples == pytest.approx(got.rate_qps * got.length_s, abs=1e-6)
    assert got.interval.low <= 8_000 * 1.004 and got.interval.high >= 8_000 * 0.996


def test_the_slots_hold_what_was_completed_in_them() -> None:
    run = run_of([noisy(3, 1_000), noisy(4, 1_100)])
    got = steady(run)
    zero, one = (np.cumsum(noisy(seed, n)) for seed, n in ((3, 1_000), (4, 1_100)))
    end = min(zero[-1], one[-1])
    begin = round(got.cut_s * S)
    edges = [begin + (end - begin) * k // 30 for k in range(31)]
    slots = np.histogram(zero, edges)[0] * 4 + np.histogram(one, edges)[0] * 4
    assert got.interval == rate_interval(slots, (end - begin) / S / 30)


def test_a_group_that_completes_where_slots_meet_counts_once() -> None:
    # 900 groups of 1 ms in 30 slots of 30 ms: each of these has 30, the last one its own end.
    got = steady(run_of([np.full(900, MS), np.full(900, MS)]))
    assert got.samples == 2 * 900 * 4
    assert got.interval.low == got.interval.high == got.rate_qps == 8_000
    assert got.bootstrap == pytest.approx((8_000, 8_000))


@pytest.mark.parametrize(("n", "cut"), [(200, 40), (1_000, 100), (3_000, 300)])
@pytest.mark.parametrize("alone", [True, False])
def test_the_steady_rate_has_no_bias(alone: bool, n: int, cut: int) -> None:
    # After a cut the stretch begins with a completion and ends with one: k groups in k intervals.
    errors, held = [], []
    for seed in range(12):
        rng = np.random.default_rng(seed)
        slow = np.where(np.arange(n) < cut, 2, 1) * (10 * MS) * (1 + 2e-3 * rng.standard_normal(n))
        ranks = [slow.astype(np.int64)]
        if not alone:
            ranks.append((10 * MS * (1 + 2e-3 * rng.standard_normal(n + cut))).astype(np.int64))
        got = steady(run_of(ranks, drift_ppm=(0, 40)))
        truth = 400 * len(ranks)
        errors.append(got.rate_qps / truth - 1)
        held.append(got.interval.low <= truth <= got.interval.high)
    # One group too many is 1 / (n - cut): 6, 1 and 0.4 in 1,000. Noise leaves 2e-3 / sqrt(12 n) of
    # error; of the rank that does not begin the stretch half a group either way, and 40 ppm.
    assert abs(np.mean(errors)) < (1e-4 if alone else 0.3 / (n - cut))
    assert sum(held) >= 11


def test_the_bootstrap_stands_beside_the_interval() -> None:
    run = run_of([noisy(3, 1_000)])
    found, got = run.result()["metrics"]["throughput.steady"], steady(run)
    low, high = got.bootstrap
    assert found["ci_method"].startswith("95% Student's t over batch means, within this run; ")
    assert found["ci_method"].endswith(f"block bootstrap of the same slots {low:.6g} to {high:.6g}")
    assert found["ci_low"] < low < found["value"] < high < found["ci_high"]
    assert run.result() == run.result()


def test_a_rank_that_never_settles_gives_no_steady_rate() -> None:
    ramp = np.linspace(10 * MS, MS, 1_000).astype(np.int64)
    got = steady(run_of([ramp, np.full(3_000, 2 * MS)]))
    assert got.rate_qps is None
    assert "rank 0" in got.reason


def test_few_groups_give_no_steady_rate_and_say_how_many_are_needed() -> None:
    got = steady(run_of([np.full(GROUPS_LEAST - 1, MS)]))
    assert got.rate_qps is None
    assert f"{GROUPS_LEAST} groups a rank" in got.reason
    assert steady(run_of([np.full(GROUPS_LEAST, MS)])).rate_qps is not None


def test_throughput_does_not_know_of_the_cut() -> None:
    slow = np.concatenate([np.full(50, 10 * MS), np.full(1_000, MS)])
    metrics = run_of([slow]).result()["metrics"]
    assert metrics["throughput"]["value"] == 4 * 1_050 / 1.5
    assert metrics["throughput.steady"]["value"] == pytest.approx(4_000, rel=0.01)
    assert "0.5" in metrics["throughput.steady"]["definition"]


@pytest.mark.parametrize(
    ("rise", "level"), [(0.0, None), (0.012, None), (0.08, "doubtful"), (0.25, "invalid")]
)
def test_a_window_that_drifts_is_found(tmp_path: Path, rise: float, level: str | None) -> None:
    base = noisy(7, 3_000)
    drifting = (base * np.linspace(1, 1 + rise * 1.5, 3_000)).astype(np.int64)
    durations = [noisy(8, 3_000), drifting]
    shape = {"groups": (3_000, 3_000), "late_ns": (0,), "change": paced(durations)}
    if level is None:
        assert [f.code for f in found(tmp_path, **shape)[1] if f.code == "trend"] == []
        return
    state, findings = found(tmp_path, **shape)
    (finding,) = [f for f in findings if f.code == "trend"]
    assert about(finding) == (level, "trend", 1, "node-1")
    assert state == {"doubtful": "VALID", "invalid": "INVALID"}[level]
    assert "longer in the last third" in finding.message
    assert "--warmup" in finding.remedy
