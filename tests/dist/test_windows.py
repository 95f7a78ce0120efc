"""Several windows of one command, and samples that stay on their ranks, on gloo ranks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from distbench.clock import now_ns
from distbench.sut import Done, Echo, Sleep
from distbench.verify import verify
from distbench.windows import Windows, load_run
from tests.support import run_ranks

pytestmark = pytest.mark.timeout(120)


def _until(out: str, rel: float) -> dict[str, Any]:
    from distbench.offline import run_offline
    from distbench.world import join

    with join(device="cpu", timeout_s=30) as world:
        several = run_offline(
            Sleep(500_000), world, output_dir=out, warmup_s=0.05, num_samples=320, until=rel
        )
        assert isinstance(several, Windows)
        return {"result": several.result(), "folder": str(several.folder or "")}


def test_windows_are_repeated_until_the_interval_is_narrow(tmp_path: Path) -> None:
    told = run_ranks(_until, 2, str(tmp_path), 0.2)
    result = told[0]["result"]
    assert told[1]["result"] == result
    found = result["metrics"]["throughput"]
    # A sleep of 0.5 ms a sample on each of two ranks, and what a sleep takes longer.
    assert 2_000 < found["value"] < 4_000
    assert found["ci_low"] < found["value"] < found["ci_high"]
    assert (found["ci_high"] - found["ci_low"]) / 2 / found["value"] <= 0.21
    assert found["n_eff"] == len(result["windows"]) >= 4
    assert found["n"] == 320 * len(result["windows"])
    folder = Path(told[0]["folder"])
    assert verify(folder) == (0, [])
    assert json.loads((folder / "result.json").read_bytes()) == result
    instants = [run.present[0].after["plan"]["reference_ns"] for run in load_run(folder).runs]
    assert instants == sorted(set(instants)), "each window has a start of its own"
    places = [run.first.before["window"] for run in load_run(folder).runs]
    assert [place["number"] for place in places] == list(range(len(instants)))
    assert [place["planned"] for place in places] == sorted(place["planned"] for place in places)
    assert places[-1]["planned"] == len(instants) == result["window"]["planned"]
    shutil.rmtree(folder / "windows" / "001")
    assert load_run(folder).result()["verdict"]["status"] == "INCOMPLETE"


def test_an_interval_that_stays_wide_is_undecided(tmp_path: Path) -> None:
    told = run_ranks(_wide, 1, str(tmp_path))
    result = told[0]["result"]
    assert len(result["windows"]) == 8
    (finding,) = [f for f in result["verdict"]["findings"] if f["code"] == "until-not-reached"]
    assert finding["level"] == "undecided"
    assert "after 8 windows" in finding["message"] and "longer --duration" in finding["remedy"]
    assert result["verdict"]["status"] in ("UNDECIDED", "INVALID")


def _wide(out: str) -> dict[str, Any]:
    from functools import partial

    from distbench import windows

    windows.until_decision = partial(windows.until_decision, most=8)
    return _until(out, 1e-9)


def _sharded(out: str, samples: str, sut: Any = None) -> dict[str, Any]:
    from distbench.offline import run_offline
    from distbench.world import join

    with join(device="cpu", timeout_s=30) as world:
        # Each rank has a disk of its own.
        own = f"{out}/{world.rank}"
        run = run_offline(
            sut or Echo(), world, output_dir=own, warmup_s=0.05, num_samples=6_400, samples=samples
        )
        return {"result": run.result(), "folder": str(run.folder or "")}


def test_samples_that_stay_on_their_ranks_give_the_same_figures(tmp_path: Path) -> None:
    told = run_ranks(_sharded, 2, str(tmp_path), "shard")
    result = told[0]["result"]
    assert told[1]["result"] == result
    folder = Path(told[0]["folder"])
    assert json.loads((folder / "result.json").read_bytes()) == result
    assert [path.name for path in sorted((folder / "ranks").iterdir())] == ["00000"]
    status, lines = verify(folder)
    host = result["per_rank"][1]["host"]
    assert status == 6
    assert f"ranks/00001: missing; it is on {host}" in lines
    judged = load_run(folder).result()
    assert judged["metrics"] == result["metrics"]
    assert [f["code"] for f in judged["verdict"]["findings"]][-1] == "judged-by-all"
    # Brought together, the folders give every figure again, to the last digit.
    (other,) = (tmp_path / "1").glob("*/ranks/00001")
    shutil.copytree(other, folder / "ranks" / "00001")
    computed = load_run(folder).result()
    assert computed == result
    assert result["metrics"]["latency.p99"]["n"] == 6_400


def test_gathered_samples_are_all_with_rank_0(tmp_path: Path) -> None:
    told = run_ranks(_sharded, 2, str(tmp_path), "gather")
    folder = Path(told[0]["folder"])
    assert verify(folder) == (0, [])
    assert len(list((folder / "ranks").iterdir())) == 2


class Swapped(Echo):
    """Gives every third group its engine's stamps the wrong way round."""

    groups = 0

    def poll(self, until_ns: int) -> list[Done]:
        done = super().poll(until_ns)
        ends = [now_ns(), now_ns() + 1]
        Swapped.groups += 1
        ends = ends[::-1] if Swapped.groups % 3 == 0 else [now_ns(), now_ns()]
        return [each._replace(started_ns=ends[0], finished_ns=ends[1]) for each in done]


def _swapped(out: str, samples: str) -> dict[str, Any]:
    return _sharded(out, samples, Swapped())


def test_stamps_that_cannot_be_true_are_told_wherever_the_samples_are(tmp_path: Path) -> None:
    told = run_ranks(_swapped, 2, str(tmp_path), "shard")
    result = told[0]["result"]
    codes = [(f["code"], f["rank"]) for f in result["verdict"]["findings"]]
    assert {("stamps-contradict", 0), ("stamps-contradict", 1)} <= set(codes)
    assert result["verdict"]["status"] == "INVALID"
    assert result["metrics"]["service.p50"]["value"] >= 0
    folder = Path(told[0]["folder"])
    (other,) = (tmp_path / "1").glob("*/ranks/00001")
    shutil.copytree(other, folder / "ranks" / "00001")
    assert load_run(folder).result() == result
