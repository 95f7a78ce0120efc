"""Stragglers: laps by hand, intervals that hold, equal ranks that nobody names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench import laps as module
from distbench.laps import LAPS, Lag, lags, laps
from distbench.run import load_run
from distbench.times import RankTimes

from .serving import MS, US, queries, served
from .synthetic import make_run
from .test_verdict import reported

S = 10**9


def times(rank: int, took_ns: Any, samples: int = 8, ends: bool = True) -> RankTimes:
    """Return a rank whose laps of equal samples took so long."""
    took = np.asarray(took_ns, np.int64)
    told = {
        "samples": [samples] * len(took),
        "took_ns": took.tolist(),
        "ends_ns": np.cumsum(took).tolist() if ends else None,
    }
    none = (None,) * 6
    return RankTimes(rank, *none, samples * len(took), 0, 0, laps=told)


def only(ranks: list[RankTimes]) -> Lag:
    (found,) = (each for each in lags(ranks) if each is not None)
    return found


def test_laps_by_hand(tmp_path: Path) -> None:
    """40 groups of 4 in 20 laps: two groups of 100 ms each, from the first issue 5 us late."""
    folder = make_run(tmp_path / "r", groups=(40, 40), group_ns=(100 * MS, 110 * MS))
    zero, one = (laps(record) for record in load_run(folder).present)
    assert zero is not None and one is not None
    assert zero["samples"] == [8] * 20
    assert zero["took_ns"] == [200 * MS - 5 * US] + [200 * MS] * 19
    assert zero["ends_ns"] == [200 * MS * (n + 1) for n in range(20)]
    assert one["took_ns"][1:] == [220 * MS] * 19


def test_there_are_at_most_64_laps_of_all_groups_and_at_least_8(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", groups=(1000, 15), group_ns=(MS, MS), tail=(3, 0))
    many, few = (laps(record) for record in load_run(folder).present)
    assert many is not None and few is None
    assert len(many["samples"]) == LAPS and sum(many["samples"]) == 4003
    assert sum(many["took_ns"]) == 1001 * MS - 5 * US


def test_queries_by_a_schedule_count_by_the_engines_time(tmp_path: Path) -> None:
    """Waiting for the next query is no time that a rank takes."""
    ranks = [queries(64, 10 * MS, served=np.full(64, each)) for each in (MS, 2 * MS)]
    folder = make_run(tmp_path / "r", change=served(ranks))
    zero, one = (laps(record) for record in load_run(folder).present)
    assert zero is not None and one is not None and zero["ends_ns"] is None
    assert sum(one["took_ns"]) == pytest.approx(2 * sum(zero["took_ns"]), rel=0.02)
    (found,) = (
        f for f in load_run(folder).result()["verdict"]["findings"] if f["code"] == "straggler"
    )
    assert found["rank"] == 1 and "laps" not in found["message"]


def test_under_a_schedule_only_single_stamped_queries_tell_a_pace(tmp_path: Path) -> None:
    """Batches and overlap depend on the load, and time without stamps holds the waiting."""

    def laps_of(name: str, **change: Any) -> list[Any]:
        def altered(ranks: list[Any]) -> None:
            served([queries(64, 10 * MS, served=np.full(64, MS))] * 2)(ranks)
            for column, shift in change.items():
                getattr(ranks[1].log, column)[5:7] += shift

        folder = make_run(tmp_path / name, change=altered)
        result = load_run(folder).result()
        assert not [f for f in result["verdict"]["findings"] if f["code"] == "straggler"]
        return [laps(record) for record in load_run(folder).present]

    assert all(laps_of("plain"))
    zero, one = laps_of("unstamped", started=-(10**18))
    assert zero is not None and one is None
    zero, one = laps_of("overlapping", started=-1, finished=11 * MS, completed=11 * MS)
    assert zero is not None and one is None


def test_an_engine_that_takes_no_time_is_held_against_nobody() -> None:
    assert lags([times(0, [0] * 9), times(1, [1] * 9), times(2, [2] * 9)])[2] is not None
    assert lags([times(0, [0] * 9), times(1, [1] * 9)]) == [None, None]


def test_a_rank_whose_groups_fail_is_no_straggler_by_that(tmp_path: Path) -> None:
    def fail(ranks: list[Any]) -> None:
        row = ranks[1].row(3)
        ranks[1].log.completed[row] = -2

    folder = make_run(tmp_path / "r", groups=(40, 40), change=fail)
    zero, one = (laps(record) for record in load_run(folder).present)
    assert zero is not None and one is None


def test_laps_of_other_sizes_are_not_compared_one_by_one() -> None:
    found = only([times(0, np.full(16, 100)), times(1, np.full(32, 60))])
    assert found.last is None and found.slower > 0


def test_a_slower_rank_is_named_with_what_it_costs(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", groups=(40, 40), group_ns=(100 * MS, 110 * MS))
    state, found = reported(folder)
    assert state == "VALID"
    (finding,) = (each for each in found if each.code == "straggler")
    assert (finding.level, finding.rank, finding.host) == ("info", 1, "node-1")
    assert finding.value == pytest.approx(0.1, abs=1e-4)
    assert "rank 1 (node-1) takes 10.0% (95 % 10.0% to 10.0%) longer per sample" in finding.message
    assert "than rank 0 (node-0), the fastest" in finding.message
    assert "the last of all after 100% of its laps, and ended 0.4 s later" in finding.message
    assert "that host's clocks, temperature" in finding.remedy


def test_each_is_held_against_the_fastest_not_against_the_middle() -> None:
    ranks = [times(r, np.full(16, took)) for r, took in enumerate((120, 100, 110))]
    found = lags(ranks)
    assert found[1] is None
    assert [each.fastest for each in found if each] == [1, 1]
    assert [each.slower for each in found if each] == pytest.approx([0.2, 0.1])
    assert [each.last for each in found if each] == [1.0, 0.0]
    assert [each.later_s for each in found if each] == pytest.approx([16 * 20e-9, 16 * 10e-9])


def test_one_rank_alone_and_ranks_without_laps_are_held_against_nobody() -> None:
    assert lags([times(0, [1] * 9)]) == [None]
    few = RankTimes(1, *(None,) * 6, 0, 0, 0)
    assert lags([times(0, [1] * 9), few]) == [None, None]


def noise(rng: np.random.Generator, memory: float) -> np.ndarray:
    """Return 64 laps of 1 ms, 2 % of spread, each like the one before."""
    steps = rng.normal(0, 20_000, 96)
    for place in range(1, 96):
        steps[place] += memory * steps[place - 1]
    return 1_000_000 + steps[32:]


@pytest.mark.parametrize(("memory", "least"), [(0.0, 0.93), (0.5, 0.9)])
def test_the_interval_holds_the_truth_and_equal_ranks_are_seldom_named(
    memory: float, least: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 pairs; without the threshold, which only ever makes naming rarer."""
    monkeypatch.setattr(module, "LEAST_SLOWER", 0.0)
    rng = np.random.default_rng(5)
    held = named = 0
    for _ in range(1000):
        equal = only([times(r, noise(rng, memory)) for r in range(2)])
        named += equal.named
        slower = lags([times(0, noise(rng, memory)), times(1, 1.1 * noise(rng, memory))])[1]
        assert slower is not None and slower.named
        held += slower.low <= 0.1 <= slower.high
    assert held >= 1000 * least
    # One of a hundred; 2.3 is where a chance of 0.01 is passed once in a thousand such tests.
    assert named <= (23 if memory == 0 else 40)


def test_many_equal_ranks_name_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of sixteen is chosen by what was measured; that is allowed for."""
    monkeypatch.setattr(module, "LEAST_SLOWER", 0.0)
    rng = np.random.default_rng(6)
    wrong = 0
    for _ in range(200):
        found = lags([times(r, noise(rng, 0.0)) for r in range(16)])
        wrong += any(each is not None and each.named for each in found)
    assert wrong <= 8


def test_what_is_hardly_slower_is_not_named() -> None:
    nearly = only([times(0, np.full(64, 1000)), times(1, np.full(64, 1009))])
    assert not nearly.named and nearly.low == pytest.approx(0.009)
    assert only([times(0, np.full(64, 1000)), times(1, np.full(64, 1011))]).named
