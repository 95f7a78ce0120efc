"""salvage: what is left of a run becomes an INCOMPLETE report that names what is missing."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from distbench import files
from distbench.errors import UsageError
from distbench.run import load_run
from distbench.salvage import main, merge
from distbench.verify import verify

from .synthetic import Rank, edit_json, make_run

SENTENCE = "rank 1 (node-1) was lost: its link ended; see that rank's own output"


def kill_rank_1(ranks: list[Rank]) -> None:
    """Rank 1 is killed after 3 of its groups; rank 0 hears of it after 5 of its own."""
    for rank, ended in zip(ranks, (5, 3), strict=True):
        first = ended * 4
        for name in ("started", "finished", "count"):
            getattr(rank.log, name)[first:] = 0
        rank.log.issued[first + 1 :] = 0
        rank.log.completed[first:] = -1
    ranks[1].after = None
    after = ranks[0].after
    assert after is not None
    for name in ("ended_ns", "errors", "quiet", "outputs", "score", "exchanges", "gpu_after"):
        del after[name]
    after["started_ns"] = None
    after["end"] = {
        "code": "lost", "rank": 1, "host": "node-1", "sentence": SENTENCE, "exit_code": 6,
    }  # fmt: skip


def stored(folder: Path) -> dict[str, Any]:
    result = files.read_json(folder / "result.json")
    assert isinstance(result, dict)
    assert (folder / "report.txt").read_text() == load_run(folder).report()
    return result


def codes(result: dict[str, Any]) -> list[tuple[str, int | None]]:
    return [(f["code"], f["rank"]) for f in result["verdict"]["findings"]]


def test_a_killed_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_run(tmp_path / "r", report=False, change=kill_rank_1)
    assert main([str(folder)]) == 6
    out = capsys.readouterr().out
    assert out.startswith("MEASUREMENT INCOMPLETE; ")
    assert out.endswith(f"results  {folder}\n")
    assert SENTENCE in out
    result = stored(folder)
    assert codes(result) == [("rank-lost", 1)]
    throughput = result["metrics"]["throughput"]
    assert (throughput["value"], throughput["n"]) == (None, 32)
    assert throughput["reason"] == "the window of rank 0, 1 was cut short"
    assert "throughput       unknown: the window of rank 0, 1 was cut short" in out
    rows = [(row["samples"], row["pending"], row["finish_s"]) for row in result["per_rank"]]
    assert rows == [(20, 20, 0.5), (12, 28, 0.27)]
    # Without a second exchange the clock of rank 1 rests on the first one.
    assert result["clock"]["ranks"][1]["exchanges"] == 1
    assert result["start"]["skew_s"] == 15e-6
    assert verify(folder)[0] == 6


def test_a_killed_rank_that_nobody_told_of(tmp_path: Path) -> None:
    folder = make_run(
        tmp_path / "r", report=False, change=lambda ranks: setattr(ranks[1], "after", None)
    )
    assert main([str(folder)]) == 6
    result = stored(folder)
    assert codes(result) == [("rank-incomplete", 1)]
    assert result["metrics"]["throughput"]["reason"] == "the window of rank 1 was cut short"
    assert [row["samples"] for row in result["per_rank"]] == [40, 40]
    status, lines = verify(folder)
    assert status == 6
    assert "after.json cannot be read" in lines[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_a_missing_folder(tmp_path: Path, rank: int) -> None:
    folder = make_run(tmp_path / "r", report=False)
    shutil.rmtree(folder / "ranks" / f"{rank:05d}")
    assert main([str(folder)]) == 6
    result = stored(folder)
    assert result["verdict"]["status"] == "INCOMPLETE"
    assert codes(result) == [("rank-missing", rank)]
    throughput = result["metrics"]["throughput"]
    assert (throughput["value"], throughput["n"]) == (None, 40)
    assert throughput["reason"] == f"samples of rank {rank} are missing"
    (row,) = result["per_rank"]
    assert (row["rank"], row["samples"], row["idle_s"]) == (1 - rank, 40, None)
    # The other rank's own figures stand: they need no clock but its own.
    assert row["finish_s"] == (0.9 if rank == 0 else 1.0)
    assert result["metrics"]["latency.max"]["value"] == row["finish_s"]
    assert verify(folder) == (6, [f"ranks/{rank:05d}: missing"])


def test_samples_that_cannot_be_read(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    samples = folder / "ranks" / "00001" / "samples.npy"
    samples.write_bytes(samples.read_bytes()[:500])
    assert main([str(folder)]) == 6
    result = stored(folder)
    assert codes(result) == [("rank-incomplete", 1)]
    assert result["metrics"]["throughput"]["reason"] == "samples of rank 1 are missing"
    assert [row["samples"] for row in result["per_rank"]] == [40, 0]
    # The recorded hash still tells that the file is not what the rank left.
    assert verify(folder)[0] == 1


def test_a_run_that_ended_before_its_start_was_agreed(tmp_path: Path) -> None:
    def change(ranks: list[Rank]) -> None:
        kill_rank_1(ranks)
        assert ranks[0].after is not None
        del ranks[0].after["plan"]
        for rank in ranks:
            rank.log.rows[:] = 0
            rank.log.completed[:] = -1

    folder = make_run(tmp_path / "r", report=False, change=change)
    assert main([str(folder)]) == 6
    assert codes(stored(folder)) == [("rank-lost", 1)]
    report = (folder / "report.txt").read_text()
    assert "start skew     unknown: a rank's loop did not begin" in report
    assert "attempts: unknown" in report
    assert verify(folder)[0] == 6


# Copies from several hosts


def split(folder: Path) -> tuple[Path, Path]:
    """Give each host the rank folder that it has on its own disk."""
    whole = make_run(folder / "whole")
    hosts = []
    for rank in (0, 1):
        host = folder / f"host-{rank}"
        shutil.copytree(whole / "ranks" / f"{rank:05d}", host / "ranks" / f"{rank:05d}")
        hosts.append(host)
    return hosts[0], hosts[1]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_copies_from_two_hosts_make_the_whole_run(tmp_path: Path, order: tuple[int, int]) -> None:
    hosts = split(tmp_path)
    target, other = hosts[order[0]], hosts[order[1]]
    assert main([str(target), str(other)]) == 0
    assert stored(target) == stored(tmp_path / "whole")
    assert verify(target) == (0, [])
    for path in (tmp_path / "whole").rglob("*.*"):
        assert (target / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes()
    assert sorted(p.name for p in (other / "ranks").iterdir()) == [f"0000{order[1]}"]


def test_salvage_of_a_whole_run_changes_nothing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    assert main([str(folder)]) == 0
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before


def test_a_folder_that_is_there_is_not_replaced(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    other = shutil.copytree(folder, tmp_path / "other")
    edit_json(other / "ranks" / "00001" / "rank.json", lambda before: before.update(host="x"))
    merge([folder, other])
    assert load_run(folder).present[1].host == "node-1"


def test_a_half_written_folder_gives_way_to_a_whole_one(tmp_path: Path) -> None:
    # Rank 0's disk was full while it wrote what it had gathered from rank 1.
    folder = make_run(tmp_path / "r")
    other = shutil.copytree(folder, tmp_path / "other")
    for name in ("after.json", "done.json"):
        (folder / "ranks" / "00001" / name).unlink()
    assert main([str(folder)]) == 6
    assert main([str(folder), str(other)]) == 0
    assert verify(folder) == (0, [])


def test_a_result_of_more_ranks_than_are_here_is_not_replaced(tmp_path: Path) -> None:
    # Of a run whose samples stay on their ranks it is the only copy of the figures.
    folder = make_run(tmp_path / "r", ranks=7)
    other = shutil.copytree(folder, tmp_path / "other")
    for rank in range(1, 7):
        shutil.rmtree(folder / "ranks" / f"{rank:05d}")
    before = {path: path.read_bytes() for path in folder.rglob("*.*")}
    with pytest.raises(
        UsageError, match=r"rests on samples of rank 1 \(node-1\), .* and 2 more as"
    ):
        main([str(folder)])
    assert {path: path.read_bytes() for path in folder.rglob("*.*")} == before
    assert main([str(folder), str(other)]) == 0
    assert verify(folder) == (0, [])
    shutil.rmtree(folder / "ranks" / "00001")
    (folder / "result.json").write_bytes(b"{}")
    assert main([str(folder)]) == 6


def test_two_halves_stay_as_they_are(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r")
    other = shutil.copytree(folder, tmp_path / "other")
    (folder / "ranks" / "00001" / "done.json").unlink()
    (other / "ranks" / "00001" / "done.json").unlink()
    (other / "ranks" / "00001" / "after.json").unlink()
    merge([folder, other])
    assert (folder / "ranks" / "00001" / "after.json").exists()


def test_two_runs_are_not_mixed(tmp_path: Path) -> None:
    target, other = split(tmp_path)
    edit_json(
        other / "ranks" / "00001" / "rank.json",
        lambda before: before.update(run_id="20260101T000000Z-offline-99999999"),
    )
    with pytest.raises(UsageError, match=r"is of run .*99999999, .*0123abcd: do not mix them"):
        main([str(target), str(other)])
    assert sorted(p.name for p in target.iterdir()) == ["ranks"]
    assert sorted(p.name for p in (target / "ranks").iterdir()) == ["00000"]


def test_a_folder_that_cannot_be_read_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Killed before it had written rank.json.
    target, other = split(tmp_path)
    (other / "ranks" / "00001" / "rank.json").unlink()
    assert main([str(target), str(other)]) == 6
    assert "00001 is left out: " in capsys.readouterr().err
    assert codes(stored(target)) == [("rank-missing", 1)]


def test_a_mistyped_directory_is_refused(tmp_path: Path) -> None:
    target, other = split(tmp_path)
    with pytest.raises(UsageError, match="nowhere is no result directory"):
        main([str(target), str(tmp_path / "nowhere")])
    with pytest.raises(UsageError, match="nowhere is no result directory"):
        main([str(tmp_path / "nowhere"), str(other)])


def test_a_directory_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(_path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    folder = make_run(tmp_path / "r")
    monkeypatch.setattr(files, "write_bytes", full)
    with pytest.raises(UsageError, match=r"r cannot be written: No space left on device"):
        main([str(folder)])


def test_help_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["-h"]) == 0
    assert main([]) == 2
    assert capsys.readouterr().out.count("python -m distbench.salvage DIR...") == 2
