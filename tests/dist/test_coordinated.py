"""Scaling on gloo ranks: known efficiencies, ranks that rest, all windows on the disk."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench.load import Load
from distbench.cells import Plan
from distbench.sut import Done, Sleep
from distbench.verify import verify
from distbench.windows import load_run
from tests.support import run_ranks

pytestmark = pytest.mark.timeout(120)
SLOW = pytest.mark.slow
MS = 1_000_000


class Locked(Sleep):
    """Sleeps by itself, and then while it holds what all ranks of the host share."""

    def __init__(self, alone_ns: int, locked_ns: int, path: Path) -> None:
        super().__init__(alone_ns)
        self.locked_ns, self.file = locked_ns, path.open("a")

    def poll(self, until_ns: int) -> list[Done]:
        done = super().poll(until_ns)
        fcntl.flock(self.file, fcntl.LOCK_EX)
        end = self.now() + self.locked_ns * len(done)
        while (left := end - self.now()) > 0:
            time.sleep(left / 1e9)
        fcntl.flock(self.file, fcntl.LOCK_UN)
        return [each._replace(finished_ns=self.now()) for each in done]


def _scaled(out: str, make: Any, plan: Plan, **options: Any) -> tuple[dict[str, Any], str]:
    from distbench.coordinated import run_coordinated
    from distbench.world import join

    with join(device="cpu", timeout_s=30) as world:
        sut = make(world.rank)
        windows = run_coordinated(sut, world, plan=plan, output_dir=out, warmup_s=0.1, **options)
        return windows.result(), str(windows.folder or "")


def _uneven(out: str) -> tuple[dict[str, Any], str]:
    make = lambda rank: Sleep(5 * MS // 4 if rank else MS)  # noqa: E731
    return _scaled(out, make, Plan((1, 2), 2), batch_size=8, duration_s=0.4)


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    told = result["tables"]["scaling"]
    names = [each["name"] for each in told["columns"]]
    return [dict(zip(names, row, strict=True)) for row in told["rows"]]


def test_a_slower_rank_costs_what_its_own_rate_foretells(tmp_path: Path) -> None:
    """Rates 1 and 0.8, equal shares: efficiency 2 / (1.25 * 1.8) = 8/9, all of it imbalance."""
    told = run_ranks(_uneven, 2, str(tmp_path))
    (result, folder), (other, _) = told
    assert result == other
    assert verify(Path(folder)) == (0, [])
    last = rows(result)[-1]
    assert last["efficiency"] == pytest.approx(8 / 9, abs=0.03)
    assert last["imbalance"] == pytest.approx(1 / 9, abs=0.02)
    assert abs(last["finish"] + last["start"] + last["interference"]) < 0.03
    fast, slow = (row[2] for row in result["tables"]["alone"]["rows"])
    assert slow / fast == pytest.approx(0.8, abs=0.03)
    # A rank alone: the other has no sample, and the same number of its own as beside it.
    windows = [load_run(Path(folder) / each["path"]).result() for each in result["windows"]]
    assert [[row["rank"] for row in each["per_rank"]] for each in windows] == [
        [0], [1], [0, 1], [0, 1], [1], [0],
    ]  # fmt: skip
    counts = {row["samples"] for each in windows for row in each["per_rank"]}
    assert len(counts) == 1, counts


def _locked(out: str, path: str) -> tuple[dict[str, Any], str]:
    make = lambda _rank: Locked(MS, 4 * MS, Path(path))  # noqa: E731
    return _scaled(out, make, Plan((1, 2), 4), batch_size=1, duration_s=1.0)


@SLOW
def test_a_shared_bottleneck_costs_what_it_must(tmp_path: Path) -> None:
    """1 ms free and 4 ms under a lock: alone 5 ms, together 8 ms for two: efficiency 5/8."""
    (result, _), _ = run_ranks(_locked, 2, str(tmp_path), str(tmp_path / "lock"))
    last = rows(result)[-1]
    assert last["efficiency"] == pytest.approx(5 / 8, abs=0.04)
    assert last["interference"] == pytest.approx(3 / 8, abs=0.04)


def _strong(out: str) -> tuple[dict[str, Any], str]:
    return _scaled(
        out, lambda _rank: Sleep(MS), Plan((1, 2), 2, "strong"), batch_size=8, duration_s=0.8
    )


@SLOW
def test_strong_scaling_shares_the_work_out(tmp_path: Path) -> None:
    (result, folder), _ = run_ranks(_strong, 2, str(tmp_path))
    windows = [load_run(Path(folder) / each["path"]).result() for each in result["windows"]]
    totals = {each["window"]["samples"] for each in windows}
    assert len(totals) <= 2 and max(totals) - min(totals) <= 8, "whole groups on each rank"
    assert rows(result)[-1]["efficiency"] == pytest.approx(1, abs=0.05)
    assert rows(result)[-1]["speedup"] == pytest.approx(2, abs=0.1)


def _served(out: str) -> tuple[dict[str, Any], str]:
    load = Load(150.0)
    return _scaled(out, lambda _rank: Sleep(MS), Plan((1, 2), 2), load=load, duration_s=1.0)


@SLOW
def test_server_offers_each_rank_the_same_rate(tmp_path: Path) -> None:
    (result, folder), _ = run_ranks(_served, 2, str(tmp_path))
    windows = [load_run(Path(folder) / each["path"]).result() for each in result["windows"]]
    offered = [each["window"]["load"]["target_qps"] for each in windows]
    assert offered == [150.0, 150.0, 300.0, 300.0, 150.0, 150.0]
    last = rows(result)[-1]
    assert last["efficiency"] == pytest.approx(1, abs=0.05)
    assert last["imbalance"] is None and last["latency_p99"] > 1e-3
    assert verify(Path(folder)) == (0, [])


def _too_many(out: str) -> str:
    from distbench.errors import UsageError

    with pytest.raises(UsageError) as caught:
        _scaled(out, lambda _rank: Sleep(MS), Plan((1, 3)))
    return str(caught.value)


def test_more_ranks_than_there_are_is_refused_on_all(tmp_path: Path) -> None:
    told = run_ranks(_too_many, 2, str(tmp_path))
    assert all("--world-sizes 3: this run has 2 ranks, so give 1 to 2" in each for each in told)
    assert [*tmp_path.iterdir()] == []


class Scored(Sleep):
    """Has held-out samples, so that outputs of a window are held against those of the pass."""

    held_out = np.arange(64)

    def __init__(self, rank: int) -> None:
        super().__init__(MS // 10, total=64)
        self.rank, self.armed = rank, False

    def score(self, indices: Any, outputs: Any) -> tuple[int, int]:
        self.armed = True  # the first window is over
        return sum(int(a == b) for a, b in zip(indices, outputs, strict=True)), len(indices)

    def poll(self, until_ns: int) -> list[Done]:
        wrong = self.armed and self.rank == 2
        done = super().poll(until_ns)
        return [each._replace(outputs=each.outputs + 1) if wrong else each for each in done]


def _three(out: str) -> tuple[dict[str, Any], str]:
    return _scaled(out, Scored, Plan((1, 2, 3), 2), batch_size=8, duration_s=0.2)


@SLOW
def test_outputs_of_ranks_that_rested_first_are_checked_as_well(tmp_path: Path) -> None:
    """Sizes 1, 2, 3: rank 2 answers wrongly from the second window on, rank 0 is scored first."""
    (result, folder), *_ = run_ranks(_three, 3, str(tmp_path))
    codes = {each["code"]: each["rank"] for each in result["verdict"]["findings"]}
    assert codes.get("outputs-differ") == 2, codes
    assert result["verdict"]["status"] == "INVALID"
    assert [row["ranks"] for row in rows(result)] == [1, 2, 3]
    assert result["metrics"]["memory.peak"]["n"] == 3
    assert result["metrics"]["accuracy"]["value"] is not None
    assert verify(Path(folder)) == (0, [])
    windows = [load_run(Path(folder) / each["path"]).result() for each in result["windows"]]
    assert [len(each["per_rank"]) for each in windows] == [1, 1, 1, 2, 3, 3, 2, 1, 1, 1]
