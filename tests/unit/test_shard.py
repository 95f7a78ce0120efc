"""Samples that stay on their ranks: on rank 0's host the result that all ranks made stands."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from distbench import baseline, compare
from distbench.errors import UsageError
from distbench.files import write_manifest
from distbench.record import write_report
from distbench.run import load_run as load_window
from distbench.salvage import main as salvage
from distbench.verify import verify
from distbench.windows import load_run

from .synthetic import RUN_ID, Change, Rank, edit_json, make_run
from .test_verdict import about, reported


def sharded(run_id: str = RUN_ID, change: Change | None = None) -> Change:
    def edit(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before |= {"samples": "shard", "run_id": run_id}
        if change is not None:
            change(ranks)

    return edit


def on_rank_0(folder: Path, change: Change | None = None, ranks: int = 2, **shape: Any) -> Path:
    """Store what rank 0's host has of a run: the result of all ranks, and rank 0's folder."""
    make_run(folder, change=change or sharded(), ranks=ranks, **shape)
    for rank in range(1, ranks):
        (folder / "ranks" / f"{rank:05d}").rename(folder.parent / f"{folder.name}-{rank}")
    write_manifest(folder)
    return folder


def test_report_tells_what_all_ranks_found(tmp_path: Path) -> None:
    folder = on_rank_0(tmp_path / "r", ranks=3)
    stored = json.loads((folder / "result.json").read_bytes())
    state, (finding,) = reported(folder)
    assert state == stored["verdict"]["status"] == "VALID"
    assert about(finding) == ("info", "judged-by-all", None, "")
    assert "those of rank 1 (node-1), rank 2 (node-2) are not here" in finding.message
    result = load_run(folder).result()
    result["verdict"]["findings"] = []
    assert result == stored
    assert "no figure can be recomputed here" in " ".join(load_run(folder).report().split())
    # It is not proven here.
    status, lines = verify(folder)
    assert status == 6
    assert "ranks/00001: missing; it is on node-1" in lines


def test_with_all_folders_everything_is_recomputed_again(tmp_path: Path) -> None:
    folder = on_rank_0(tmp_path / "r")
    before = (folder / "result.json").read_bytes()
    shutil.copytree(tmp_path / "r-1", folder / "ranks" / "00001")
    assert load_window(folder).judged is None
    assert reported(folder) == ("VALID", [])
    assert salvage([str(folder)]) == 0
    assert (folder / "result.json").read_bytes() == before
    assert verify(folder) == (0, [])


DAMAGE: dict[str, Callable[[Path], Any]] = {
    "result": lambda f: edit_json(
        f / "result.json", lambda r: r["metrics"]["throughput"].update(value=1e9)
    ),
    "no result": lambda f: (f / "result.json").unlink(),
    "samples": lambda f: (f / "ranks/00000/samples.npy").write_bytes(b"x"),
    "no manifest": lambda f: (f / "manifest.sha256").unlink(),
    "empty manifest": lambda f: (f / "manifest.sha256").write_bytes(b""),
    "no text": lambda f: (f / "manifest.sha256").write_bytes(b"\xff\xfe"),
    "no rows": lambda f: edit_json(f / "result.json", lambda r: r.update(per_rank=[])),
    "another run": lambda f: edit_json(f / "result.json", lambda r: r.update(run_id="x")),
    "no findings": lambda f: edit_json(f / "result.json", lambda r: r.update(verdict=3)),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_result_that_is_not_as_it_was_written_is_not_believed(tmp_path: Path, name: str) -> None:
    folder = on_rank_0(tmp_path / "r")
    DAMAGE[name](folder)
    if name in ("no rows", "another run", "no findings"):
        write_manifest(folder)
    state, findings = reported(folder)
    assert state == "INCOMPLETE"
    assert "rank-missing" in [finding.code for finding in findings]


def test_samples_that_were_gathered_are_recomputed_or_missing(tmp_path: Path) -> None:
    folder = on_rank_0(tmp_path / "r", sharded(change=lambda ranks: gathered(ranks)))
    assert reported(folder)[0] == "INCOMPLETE"


def gathered(ranks: list[Rank]) -> None:
    for rank in ranks:
        rank.before["samples"] = "gather"


def test_salvage_keeps_the_only_copy_of_the_figures(tmp_path: Path) -> None:
    folder = on_rank_0(tmp_path / "r")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(UsageError, match=r"rests on samples of rank 1 \(node-1\) as well"):
        salvage([str(folder)])
    # Nor does a rank that is lost when all has been written.
    assert "MEASUREMENT VALID" in write_report(folder)
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_launches_are_compared_and_recorded_with_a_note(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [
        str(on_rank_0(tmp_path / f"{n}", sharded(f"{RUN_ID}-{n}"), group_ns=(10**8 + n * 1000,)))
        for n in range(4)
    ]
    assert compare.main([*folders[:2], "--", *folders[2:]]) == 0
    out = capsys.readouterr().out
    assert "no difference" in out and "note: figures of launches whose samples stay on" in out
    kept = ["--folder", str(tmp_path / "kept")]
    assert baseline.main(["record", "x", *folders[:2], *kept]) == 0
    assert "note: figures of launches whose samples stay on their ranks" in capsys.readouterr().out
    assert baseline.main(["check", "x", *folders[2:], *kept]) == 0
    assert "note: figures of launches whose samples stay on their ranks" in capsys.readouterr().out


def test_windows_of_such_a_command_are_judged_by_their_results(tmp_path: Path) -> None:
    folder = tmp_path / "r"
    for number in range(4):
        path = folder / "windows" / f"{number:03d}"
        make_run(path, change=sharded(f"{RUN_ID}-w{number:03d}"))
    write_report(folder)
    stored = json.loads((folder / "result.json").read_bytes())
    for path in folder.glob("windows/*"):
        shutil.rmtree(path / "ranks" / "00001")
        write_manifest(path)
    write_manifest(folder)
    state, (finding,) = reported(folder)
    assert state == stored["verdict"]["status"] == "VALID"
    assert finding.code == "judged-by-all"
    assert finding.message.startswith("window 000 and 3 more: judged by all ranks together")
    assert load_run(folder).result()["metrics"] == stored["metrics"]
    assert verify(folder)[0] == 6
    with pytest.raises(UsageError, match="so it is not replaced"):
        salvage([str(folder)])
    assert json.loads((folder / "result.json").read_bytes()) == stored
