"""Scaling: which windows are taken, efficiency and its interval, where the rest went."""

from __future__ import annotations

import shutil
from dataclasses import asdict, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats as oracle

from distbench.cells import Cell, Plan, cells, sized
from distbench.errors import UsageError
from distbench.record import write_report
from distbench.report.tables import to_markdown
from distbench.report.text import to_text
from distbench.salvage import main as salvage
from distbench.scaling import LOSSES, Reading, efficiency, interval, losses, reading
from distbench.verify import verify
from distbench.windows import load_run

from .serving import US, S, queries, served
from .synthetic import RUN_ID, Change, Rank, edit_json, make_run, mend_hashes
from .test_verdict import reported

PLAN = Plan((1, 2), 2)
MS = 1_000_000


def test_every_rank_is_measured_alone_and_every_other_round_runs_in_reverse() -> None:
    ranks = [cell.ranks for cell in cells(Plan((1, 2, 3), 2))]
    once = [(0,), (1,), (2,), (0, 1), (0, 1, 2)]
    assert ranks == once + once[::-1]
    assert [cell.round for cell in cells(Plan((1, 2, 3), 2))] == [0] * 5 + [1] * 5
    # Without 1 among the sizes the ranks are measured alone all the same.
    assert [cell.ranks for cell in cells(Plan((2,), 2))][:3] == [(0,), (1,), (0, 1)]


@pytest.mark.parametrize(("size", "sizes"), [(2, (1, 2)), (6, (1, 2, 4, 6)), (8, (1, 2, 4, 8))])
def test_by_default_powers_of_two_and_all(size: int, sizes: tuple[int, ...]) -> None:
    assert sized(Plan(), size).sizes == sizes


def test_what_cannot_be_planned_is_refused() -> None:
    with pytest.raises(UsageError, match=r"--world-sizes 3: this run has 2 ranks, so give 1 to 2"):
        sized(Plan((1, 3)), 2)
    with pytest.raises(UsageError, match="one rank scales over nothing"):
        sized(Plan(), 1)
    with pytest.raises(UsageError, match="--world-sizes 1 compares a rank with itself"):
        sized(Plan((1,)), 2)
    for rounds in (0, 1, 3, -2):
        with pytest.raises(UsageError, match="every other one runs in reverse"):
            Plan(rounds=rounds)
    with pytest.raises(UsageError, match="neither weak nor strong"):
        Plan(kind="weka")
    assert sized(Plan((2, 1, 2)), 4).sizes == (1, 2)


@given(st.lists(st.floats(0.5, 2), min_size=2, max_size=9))
def test_the_interval_is_students(values: list[float]) -> None:
    mean, low, high = interval(values)
    assert low is not None and high is not None
    assert mean == pytest.approx(np.mean(values))
    scale = oracle.sem(values)
    if scale > 1e-12:
        ends = oracle.t.interval(0.95, len(values) - 1, np.mean(values), scale)
        assert (low, high) == pytest.approx(ends, rel=1e-9)
    assert interval(values[:1]) == (values[0], None, None)


def one(rank: int, samples: int, ends_s: float, late_s: float) -> Reading:
    """Return a window of one rank."""
    return Reading(
        samples / ends_s, ends_s, {rank: samples}, {rank: 0.0}, {rank: late_s}, None, None
    )


windows = st.lists(
    st.tuples(
        st.integers(1, 1000),  # samples alone
        st.floats(0.5, 2),  # end alone
        st.floats(0, 0.01),  # late alone
        st.integers(1, 1000),  # samples together
        st.floats(0.5, 2),  # end together
        st.floats(0, 0.01),
    ),
    min_size=2,
    max_size=5,
)


def together(ranks: list[tuple[Any, ...]]) -> tuple[Reading, dict[int, Reading]]:
    """Return a window of all ranks, and those of each alone."""
    alone = {r: one(r, row[0], row[1], row[2]) for r, row in enumerate(ranks)}
    span = max(row[4] for row in ranks)
    return (
        Reading(
            sum(row[3] for row in ranks) / span,
            span,
            {r: row[3] for r, row in enumerate(ranks)},
            {r: span - row[4] for r, row in enumerate(ranks)},
            {r: row[5] for r, row in enumerate(ranks)},
            None,
            None,
        ),
        alone,
    )


@given(windows)
def test_the_parts_of_the_loss_are_exactly_what_is_missing(ranks: list[tuple[Any, ...]]) -> None:
    """In each round, whatever the rates of the others, by which imbalance is foreseen."""
    rounds = [together(ranks), together(ranks[::-1])]
    made = losses(rounds)
    assert len(made) == 2
    for parts, (all_, alone) in zip(made, rounds, strict=True):
        assert tuple(parts) == LOSSES
        assert sum(parts.values()) == pytest.approx(1 - efficiency(all_, alone), abs=1e-9)
        assert parts["imbalance"] >= -1e-12


@pytest.mark.parametrize(
    ("ranks", "shares"),
    [
        # Rank 1 takes 1.25 s for what rank 0 does in 1 s, alone and together: rates 100 and 80, and
        # rank 0 waits 0.25 s: 100 * 0.25 / (1.25 * 180).
        ([(100, 1.0, 0, 100, 1.0, 0), (100, 1.25, 0, 100, 1.25, 0)], {"imbalance": (1, 9)}),
        # Alike alone; together both take 1.25 s.
        ([(100, 1.0, 0, 100, 1.25, 0)] * 2, {"interference": (1, 5)}),
        # Rank 1 begins 0.25 s late, and rank 0 waits for it as long.
        (
            [(100, 1.0, 0, 100, 1.0, 0), (100, 1.0, 0, 100, 1.25, 0.25)],
            {"start": (1, 10), "finish": (1, 10)},
        ),
        # As late alone as together: no loss by scaling.
        ([(100, 1.0, 0.25, 100, 1.0, 0.25)] * 2, {}),
        # Half of the work each, and half of what was late alone is taken for its part.
        ([(100, 1.0, 0.1, 50, 0.5, 0.05)] * 2, {}),
        ([(100, 1.0, 0.1, 50, 0.55, 0.1)] * 2, {"start": (1, 11)}),
    ],
)
def test_each_part_by_hand(
    ranks: list[tuple[Any, ...]], shares: dict[str, tuple[int, int]]
) -> None:
    (parts,) = losses([together(ranks)])
    for name, value in parts.items():
        assert value == pytest.approx(float(Fraction(*shares.get(name, (0, 1)))), abs=1e-12), name


def test_imbalance_is_no_matter_of_luck() -> None:
    """Equal ranks of 1 % noise: what the slower of two windows foretells averages out."""
    rng = np.random.default_rng(4)
    rounds = []
    for _ in range(100):
        alone = {r: one(r, 100, 1 + rng.normal(0, 0.01), 0.0) for r in range(8)}
        span = 1.0
        all_ = Reading(
            800 / span,
            span,
            dict.fromkeys(range(8), 100),
            dict.fromkeys(range(8), 0.0),
            dict.fromkeys(range(8), 0.0),
            None,
            None,
        )
        rounds.append((all_, alone))
    assert np.mean([each["imbalance"] for each in losses(rounds)]) < 0.003


def test_queries_by_a_schedule_count_by_the_share_that_completed() -> None:
    """More queries were drawn for the window of both: that is no gain."""
    alone = {r: Reading(100.0, 1.0, {r: 100}, {r: 0}, {r: 0}, 100.0, 1e-3) for r in range(2)}
    kept = Reading(220.0, 1.0, {0: 110, 1: 110}, {0: 0, 1: 0}, {0: 0, 1: 0}, 220.0, 1e-3)
    assert efficiency(kept, alone) == 1.0
    behind = Reading(165.0, 1.0, {0: 110, 1: 55}, {0: 0, 1: 0}, {0: 0, 1: 0}, 220.0, 1e-3)
    assert efficiency(behind, alone) == 0.75


@pytest.mark.parametrize(("qps", "seconds"), [(10.0, 2), (200.0, 2)])
@pytest.mark.parametrize("ranks", [2, 8])
def test_a_system_that_keeps_up_loses_nothing_however_few_queries_there_are(
    tmp_path: Path, qps: float, seconds: int, ranks: int
) -> None:
    """LoadGen's scheduled rate leaves out one query, which weighs more in a window of few."""

    def read(count: int, replicas: int, name: str) -> Reading:
        gap = round(S / (qps * replicas))
        own = [
            queries(count, gap * replicas, first=gap * rank, served=np.full(count, 10 * US))
            for rank in range(replicas)
        ]
        change = served(own, target_qps=qps * replicas)
        made = make_run(tmp_path / name, ranks=replicas, offset_ns=(0,), change=change)
        return reading(load_run(made).result())

    count = round(qps * seconds)
    alone = {rank: read(count, 1, f"a{rank}") for rank in range(1)}
    alone |= {rank: replace(alone[0], samples={rank: count}) for rank in range(1, ranks)}
    assert efficiency(read(count, ranks, "all"), alone) == pytest.approx(1, abs=2e-3 / count * 20)


def placed(cell: Cell, number: int, plan: Plan) -> Change:
    """Return the change that makes a synthetic run one window of a scaling run."""

    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before |= {
                "run_id": f"{RUN_ID}-w{number:03d}",
                "active": rank.before["rank"] in cell.ranks,
                "active_ranks": list(cell.ranks),
                "window": {
                    "number": number,
                    "planned": len(cells(plan)),
                    "scaling": {"plan": asdict(plan), "cell": asdict(cell)},
                },
            }
            if not rank.before["active"]:
                assert rank.after is not None
                rank.after["started_ns"] = None

    return change


def make_scaling(folder: Path, plan: Plan = PLAN) -> Path:
    """Store a scaling run: ranks take 100 ms for a group alone, 125 ms together."""
    for number, cell in enumerate(cells(plan)):
        groups = [10 if rank in cell.ranks else 0 for rank in range(2)]
        each = (125 if len(cell.ranks) > 1 else 100) * MS
        make_run(
            folder / "windows" / f"{number:03d}",
            groups=groups,
            group_ns=(each, each),
            change=placed(cell, number, plan),
        )
    write_report(folder)
    return folder


def test_a_run_that_is_stored_is_judged_from_its_windows(tmp_path: Path) -> None:
    folder = make_scaling(tmp_path / "r")
    assert verify(folder) == (0, [])
    assert reported(folder) == ("VALID", [])
    result = load_run(folder).result()
    found = result["metrics"]["efficiency"]
    assert found["value"] == pytest.approx(0.8, abs=1e-6)
    assert found["ci_low"] == pytest.approx(0.8, abs=1e-6) and found["n"] == 2
    names = [each["name"] for each in result["tables"]["scaling"]["columns"]]
    first, last = (
        dict(zip(names, row, strict=True)) for row in result["tables"]["scaling"]["rows"]
    )
    assert (first["ranks"], first["efficiency"], first["imbalance"]) == (1, 1.0, None)
    assert last["interference"] == pytest.approx(0.2, abs=1e-4)
    assert sum(last[name] for name in LOSSES) == pytest.approx(1 - last["efficiency"])
    assert last["speedup"] == pytest.approx(1.6)
    alone = result["tables"]["alone"]["rows"]
    assert [row[:2] for row in alone] == [[0, "node-0"], [1, "node-1"]]
    assert alone[0][2] == pytest.approx(40.0)
    assert result["window"]["world_size"] == 2
    assert "efficiency       0.8000  (95 %" in (folder / "report.txt").read_text()
    assert "### Table: scaling" in to_markdown(result)


def test_a_window_of_some_ranks_is_theirs_alone(tmp_path: Path) -> None:
    """A rank that rests is neither missing nor idle nor late, and takes no part in any figure."""
    folder = make_scaling(tmp_path / "r")
    result = load_run(folder / "windows" / "001").result()
    assert result["verdict"]["status"] == "VALID", result["verdict"]
    assert [row["rank"] for row in result["per_rank"]] == [1]
    assert result["window"]["world_size"] == 1 and result["window"]["hosts"] == ["node-1"]
    assert result["metrics"]["throughput"]["value"] == pytest.approx(40.0, abs=1e-3)
    assert result["start"]["skew_s"] == 0 and len(result["start"]["lateness_s"]) == 1
    # Its clock is that of the other ranks all the same.
    assert result["clock"]["ranks"][0]["exchanges"] == 2
    # Without its folder nothing of the window is lost but what says so of the disk.
    shutil.rmtree(folder / "windows" / "000" / "ranks" / "00001")
    again = load_run(folder / "windows" / "000").result()
    assert again["verdict"]["status"] == "VALID"
    # That of a rank with a part is.
    shutil.rmtree(folder / "windows" / "001" / "ranks" / "00001")
    again = load_run(folder / "windows" / "001").result()
    assert again["verdict"]["status"] == "INCOMPLETE"


def test_a_window_that_is_gone_leaves_no_efficiency(tmp_path: Path) -> None:
    folder = make_scaling(tmp_path / "r")
    shutil.rmtree(folder / "windows" / "002")
    assert salvage([str(folder)]) == 6
    result = load_run(folder).result()
    assert result["verdict"]["status"] == "INCOMPLETE"
    found = result["metrics"]["efficiency"]
    assert found["value"] is None and "windows are missing" in found["reason"]
    # The rounds that are whole stand in the table.
    assert result["tables"]["scaling"]["rows"][-1][1] == 1
    assert "efficiency       unknown: windows are missing" in (folder / "report.txt").read_text()


def test_windows_that_change_places_are_found_out(tmp_path: Path) -> None:
    folder = make_scaling(tmp_path / "r")
    for rank in ("00000", "00001"):
        path = folder / "windows" / "001" / "ranks" / rank / "rank.json"
        edit_json(path, lambda told: told["window"]["scaling"]["cell"].update(round=1))
        mend_hashes(path.parent)
    state, found = reported(folder)
    assert state == "INVALID"
    assert "scaling-contradicts" in {finding.code for finding in found}


@pytest.mark.parametrize("scenario", ["offline", "server"])
def test_a_window_whose_only_rank_is_gone_is_told_and_ends_nothing(
    tmp_path: Path, scenario: str
) -> None:
    folder = make_scaling(tmp_path / "r")
    if scenario == "server":
        cell = cells(PLAN)[1]
        fill = served([queries(1, 10), queries(64, 10_000_000)])

        def change(ranks: list[Rank]) -> None:
            fill(ranks)
            placed(cell, 1, PLAN)(ranks)

        shutil.rmtree(folder / "windows" / "001")
        make_run(folder / "windows" / "001", change=change)
        folder = folder / "windows" / "001"
    else:
        folder = folder / "windows" / "001"
    assert load_run(folder).result()["metrics"]["throughput"]["value"] > 0
    shutil.rmtree(folder / "ranks" / "00001")
    result = load_run(folder).result()
    assert result["verdict"]["status"] == "INCOMPLETE"
    assert result["metrics"]["throughput"]["value"] is None
    assert "INCOMPLETE" in to_text(result)


def test_a_round_without_a_known_throughput_leaves_no_efficiency(tmp_path: Path) -> None:
    """Such as where every group of a rank failed; what is known stands in the table."""
    folder = make_scaling(tmp_path / "r")

    def fail(told: Any) -> None:
        told["ended_ns"] = None

    edit_json(folder / "windows" / "002" / "ranks" / "00001" / "after.json", fail)
    result = load_run(folder).result()
    assert result["metrics"]["efficiency"]["value"] is None
    assert result["metrics"]["throughput"]["value"] is None
    assert result["tables"]["scaling"]["rows"][-1][1] == 1
    assert "efficiency       unknown" in to_text(result)
