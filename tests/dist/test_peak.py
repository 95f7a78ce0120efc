"""A peak search on gloo ranks: every window in its place, the decision one for all ranks."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from distbench.bounds import parse_bounds
from distbench.errors import UsageError
from distbench.load import Load
from distbench.salvage import main as salvage
from distbench.search import CONFIRM, PROBE, Step
from distbench.sut import Sleep
from distbench.verify import verify
from distbench.windows import Windows, load_run
from tests.support import run_ranks

pytestmark = pytest.mark.timeout(120)

MS, S = 10**6, 10**9


def _searched(out: str, bounds: str) -> dict[str, Any]:
    from distbench.server import run_server
    from distbench.world import join

    with join(device="cpu", timeout_s=30) as world:
        several = run_server(
            Sleep(2 * MS),
            world,
            load=Load.auto(bounds, probe_s=0.03),
            output_dir=out,
            warmup_s=0.05,
            duration_s=0.3,
            seed=5,
        )
        assert isinstance(several, Windows)
        return {"result": several.result(), "folder": str(several.folder or "")}


@pytest.mark.slow
def test_two_ranks_search_as_one(tmp_path: Path) -> None:
    told = run_ranks(_searched, 2, str(tmp_path), "20ms@p50")
    result = told[0]["result"]
    assert told[1]["result"] == result, "rank 0 judges, all ranks have it"
    folder = Path(told[0]["folder"])
    assert verify(folder) == (0, [])
    assert json.loads((folder / "result.json").read_bytes()) == result
    runs = load_run(folder).runs
    places = [run.first.before["window"] for run in runs]
    assert [place["number"] for place in places] == list(range(len(runs)))
    steps = [Step(**place["search"]["step"]) for place in places]
    assert steps[0].kind == PROBE and steps[-1].kind == CONFIRM
    assert [row[1] for row in result["tables"]["search"]["rows"]] == [s.kind for s in steps]
    instants = [run.first.after["plan"]["reference_ns"] for run in runs if run.first.after]
    assert instants == sorted(set(instants)), "each window has a start of its own"
    for number, (run, step) in enumerate(zip(runs, steps, strict=True)):
        for record in run.present:
            assert record.before["load"]["target_qps"] == step.target_qps
            assert record.before["duration_ns"] == step.duration_ns
            # No window repeats another's luck.
            assert record.before["schedule"]["seed"] == 5 + number
            assert record.before["window"] == places[number]
            assert record.before["config"]["load"]["value"]["probe_ns"] == 30 * MS
    assert steps[-1].duration_ns == 300 * MS
    shutil.rmtree(folder / "windows" / "001")
    assert load_run(folder).result()["verdict"]["status"] == "INCOMPLETE"


def test_a_bound_below_the_service_time_is_kept_at_no_rate(tmp_path: Path) -> None:
    result = run_ranks(_searched, 2, str(tmp_path), "1ms@p50")[0]["result"]
    assert result["verdict"]["status"] == "INVALID"
    assert [f["code"] for f in result["verdict"]["findings"]] == ["peak-not-found"]
    assert result["metrics"]["peak"]["value"] is None
    assert all(row[1] == PROBE for row in result["tables"]["search"]["rows"])


def _sharded(out: str) -> dict[str, Any]:
    from distbench.server import run_server
    from distbench.world import join

    with join(device="cpu", timeout_s=30) as world:
        load = Load(2_000.0, bounds=parse_bounds("3ms@p50,500us@p90"))
        # Each rank has a disk of its own.
        run = run_server(
            Sleep(MS),
            world,
            load=load,
            output_dir=f"{out}/{world.rank}",
            warmup_s=0.05,
            num_samples=600,
            samples="shard",
        )
        return {"result": run.result(), "folder": str(getattr(run, "folder", "") or "")}


def test_what_was_above_a_bound_is_counted_wherever_the_samples_are(tmp_path: Path) -> None:
    told = run_ranks(_sharded, 2, str(tmp_path))
    result = told[0]["result"]
    assert told[1]["result"] == result
    first, second = result["tables"]["bounds"]["rows"]
    assert (first[0], first[2], second[2]) == ("latency.p50", 600, 600)
    assert second[3] == 600, "no query is done before its service is"
    folder = Path(told[0]["folder"])
    (other,) = (tmp_path / "1").glob("*/ranks/00001")
    shutil.copytree(other, folder / "ranks" / "00001")
    assert load_run(folder).result() == result


def _refused(out: str) -> str:
    from distbench.server import run_server
    from distbench.world import join

    with join(device="cpu", timeout_s=30) as world, pytest.raises(UsageError) as caught:
        run_server(
            Sleep(20 * MS),
            world,
            load=Load.auto("1ms@p50", probe_s=0.001),
            output_dir=out,
            warmup_s=0.05,
        )
    return str(caught.value)


def test_a_probe_that_cannot_tell_anything_is_refused_on_all_ranks(tmp_path: Path) -> None:
    # It would begin at about 25 queries/s.
    told = run_ranks(_refused, 2, str(tmp_path))
    assert told[0] == told[1]
    assert "the longest probe, 0.01 s, has too few to judge: give --probe" in told[0]
    assert list(tmp_path.iterdir()) == []


class Dying(Sleep):
    """Takes its process with it where it is told to."""

    dying = False

    def poll(self, until_ns: int) -> list[Any]:
        if self.dying:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().poll(until_ns)


def _killed(out: str, within: bool) -> None:
    from distbench import peak
    from distbench.server import run_server
    from distbench.world import join

    sut, original = Dying(2 * MS), peak.one_window

    def then_die(prepared: Any, world: Any, folder: Any, turn: Any) -> Any:
        if turn.number == 2 and world.rank == 1:
            if not within:
                os.kill(os.getpid(), signal.SIGKILL)
            sut.dying = True
        return original(prepared, world, folder, turn)

    peak.one_window = then_die
    with join(device="cpu", timeout_s=30) as world:
        load = Load.auto("20ms@p90", probe_s=0.05)
        run_server(sut, world, load=load, output_dir=out, warmup_s=0.05, duration_s=0.3)


@pytest.mark.parametrize("within", [False, True])
def test_a_search_that_is_killed_is_incomplete(tmp_path: Path, within: bool) -> None:
    run_ranks(_killed, 2, str(tmp_path), within, allow_exit=(0, 1))
    (folder,) = tmp_path.iterdir()
    assert (folder / "result.json").exists() == within
    if not within:  # no window was open whose rank could have told
        salvage([str(folder)])
    assert verify(folder)[0] == 6
    result = load_run(folder).result()
    assert result["verdict"]["status"] == "INCOMPLETE"
    codes = {f["code"] for f in result["verdict"]["findings"]}
    assert codes == {"rank-lost"} if within else {"window-missing"}
    assert result["metrics"]["peak"]["value"] is None
    assert [row[0] for row in result["tables"]["search"]["rows"]][:2] == ["000", "001"]
