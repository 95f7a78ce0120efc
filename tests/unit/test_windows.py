"""Several windows of one command: none can go missing, move or be mixed in without a word."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from distbench import files
from distbench.errors import UsageError
from distbench.files import write_manifest
from distbench.record import write_report
from distbench.run import rank_folder
from distbench.salvage import main as salvage
from distbench.verify import verify
from distbench.windows import Windows, load_run, windows_result

from .synthetic import RUN_ID, Change, Rank, edit_json, make_run
from .test_verdict import reported

MS = 1_000_000
# One window's groups, ns: the first four do not tell throughput to within 1 %, all eight do.
UNEVEN = [100_000_000, 100_100_000, 102_000_000, 100_200_000, *[100_050_000] * 4]
EVEN = [100_000_000, 100_100_000, 100_200_000, 100_050_000]


def make_windows(
    folder: Path,
    group_ns: Sequence[int] = EVEN,
    rel: float | None = 0.03,
    change: Change | None = None,
    report: bool = True,
    run_id: str = RUN_ID,
) -> Path:
    """Store a command of several windows, of one length of group each."""

    def placed(number: int) -> Change:
        def place(ranks: list[Rank]) -> None:
            for rank in ranks:
                rank.before |= {
                    "run_id": f"{run_id}-w{number:03d}",
                    "until": rel,
                    "window": {"number": number, "planned": 4 if number < 4 else 8},
                }
            if change is not None:
                change(ranks)

        return place

    for number, each in enumerate(group_ns):
        make_run(folder / "windows" / f"{number:03d}", group_ns=(each, each), change=placed(number))
    if report:
        write_report(folder)
    return folder


def told(folder: Path) -> tuple[str, list[tuple[str, float | None]]]:
    """Return the status and the findings by code and value, as the command report tells them."""
    state, findings = reported(folder)
    return state, [(finding.code, finding.value) for finding in findings]


def test_all_windows_make_a_valid_result(tmp_path: Path) -> None:
    folder = make_windows(tmp_path / "r")
    assert told(folder) == ("VALID", [])
    assert verify(folder) == (0, [])
    result = load_run(folder).result()
    assert [row["path"] for row in result["windows"]] == [f"windows/00{n}" for n in range(4)]
    assert [row["run_id"][-4:] for row in result["windows"]] == ["w000", "w001", "w002", "w003"]
    assert (result["run_id"], result["window"]["planned"]) == (RUN_ID, 4)
    window = load_run(folder / "windows" / "002").result()["window"]
    assert (window["number"], window["planned"]) == (2, 4)
    found = result["metrics"]["throughput"]
    assert found["ci_low"] < found["value"] < found["ci_high"]


@pytest.mark.parametrize(
    ("lost", "named", "planned"),
    [
        ([2], "window 002 of 8 planned", 8),
        ([2, 6], "window 002, 006 of 8 planned", 8),
        ([7], "window 007 of 8 planned", 8),  # a cut tail: 4 to 6 know of 8
        ([4, 5, 6, 7], "window 004, 005, 006, 007 of 8 planned", 8),  # 0 to 3 called for more
        ([0, 1, 2, 3], "window 000, 001, 002, 003 of 8 planned", 8),
        ([1, 2, 3, 4, 5, 6, 7], "window 001, 002, 003 of 4 planned", 4),
    ],
)
def test_windows_that_were_taken_away_are_missed_whatever_is_salvaged(
    tmp_path: Path, lost: list[int], named: str, planned: int
) -> None:
    folder = make_windows(tmp_path / "r", UNEVEN, rel=0.01)
    assert told(folder) == ("VALID", [])
    for number in lost:
        shutil.rmtree(folder / "windows" / f"{number:03d}")
    assert verify(folder)[0] == 6
    assert salvage([str(folder)]) == 6
    assert verify(folder) == (6, ["the run is INCOMPLETE, and its figures agree"])
    count = sum(number < planned for number in lost)
    assert told(folder) == ("INCOMPLETE", [("window-missing", count)])
    result = files.read_json(folder / "result.json")
    (finding,) = result["verdict"]["findings"]
    assert named in finding["message"]
    left = [number for number in range(8) if number not in lost]
    assert [row["path"] for row in result["windows"]] == [f"windows/{n:03d}" for n in left]
    assert result["window"]["planned"] == planned
    # An interval over what is left would be one of a choice.
    assert result["metrics"]["throughput"]["ci_low"] is None
    assert "windows are missing" in result["metrics"]["throughput"]["reason"]


def test_a_command_that_was_ended_between_two_windows_is_incomplete(tmp_path: Path) -> None:
    # After the first look it wanted more, and nothing is left of the fifth window.
    folder = make_windows(tmp_path / "r", UNEVEN[:4], rel=0.01, report=False)
    assert salvage([str(folder)]) == 6
    assert told(folder) == ("INCOMPLETE", [("window-missing", 4)])
    # Of another the ranks had but made their folders.
    rank_folder(folder / "windows" / "004", 0).mkdir(parents=True)
    assert salvage([str(folder)]) == 6
    state, (finding,) = reported(folder)
    assert state == "INCOMPLETE"
    assert "holds no readable rank folder" in finding.message


def test_a_command_that_was_ended_before_it_wrote_its_result_is_whole(tmp_path: Path) -> None:
    folder = make_windows(tmp_path / "r", UNEVEN, rel=0.01, report=False)
    assert salvage([str(folder)]) == 0
    assert told(folder) == ("VALID", [])


def test_the_window_in_which_a_command_ended_early_is_its_last(tmp_path: Path) -> None:
    def end(ranks: list[Rank]) -> None:
        for rank in ranks:
            assert rank.after is not None
            rank.after["end"] = {
                "code": "terminated", "rank": 1, "host": "node-1", "sentence": "x", "exit_code": 6,
            }  # fmt: skip

    folder = make_windows(tmp_path / "r", EVEN[:2])
    make_windows(tmp_path / "last", EVEN[:3], change=end)
    (tmp_path / "last" / "windows" / "002").rename(folder / "windows" / "002")
    assert told(folder) == ("INCOMPLETE", [("rank-terminated", None)])
    shutil.rmtree(folder / "windows" / "001")
    assert ("window-missing", 1) in told(folder)[1]


def test_a_folder_with_another_number_than_its_window_is_named(tmp_path: Path) -> None:
    folder = make_windows(tmp_path / "r")
    windows = folder / "windows"
    (windows / "003").rename(windows / "best")
    state, (finding,) = reported(folder)
    assert (state, finding.code, finding.value) == ("INCOMPLETE", "window-missing", 1)
    assert f"windows/best holds {RUN_ID}-w003" in finding.message
    (windows / "best").rename(windows / "003")
    assert told(folder) == ("VALID", [])
    # A good window cannot stand for another one.
    shutil.rmtree(windows / "002")
    shutil.copytree(windows / "000", windows / "002")
    assert told(folder) == ("INCOMPLETE", [("window-missing", 1)] * 2)


def test_windows_of_two_commands_are_not_mixed(tmp_path: Path) -> None:
    folder = make_windows(tmp_path / "r")
    other = make_windows(tmp_path / "o", run_id="20260102T000000Z-offline-99999999")
    shutil.rmtree(folder / "windows" / "001")
    shutil.copytree(other / "windows" / "001", folder / "windows" / "001")
    with pytest.raises(UsageError, match=r"windows of different runs are mixed here: .*0123abcd, "):
        load_run(folder).result()
    write_manifest(folder)
    status, lines = verify(folder)
    assert status == 1
    assert any("windows of different runs are mixed here" in line for line in lines)


def test_memory_is_the_first_windows_and_not_what_the_harness_gathered(tmp_path: Path) -> None:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            assert rank.after is not None
            rank.after["memory_peak_bytes"] += rank.before["window"]["number"] * 300_000_000

    folder = make_windows(tmp_path / "r", change=change)
    result = load_run(folder).result()
    peak = result["metrics"]["memory.peak"]
    assert peak["value"] == 160_000_000
    assert peak["definition"].endswith("of the process, to the end of the first window")
    ranks = [row["metrics"]["memory.peak"] for row in result["per_rank"]]
    assert ranks == [100_000_000, 160_000_000]
    assert "memory peak      160.0 MB, 2.0% of the device's" in load_run(folder).report()
    last = load_run(folder / "windows" / "003")
    peak = last.result()["metrics"]["memory.peak"]
    assert peak["value"] is None and "see the first window" in peak["reason"]
    assert [row["metrics"]["memory.peak"] for row in last.result()["per_rank"]] == [None, None]
    assert "memory peak      unknown: the peak since the process began" in last.report()


@pytest.mark.parametrize(
    ("rules", "slowest", "word", "window"),
    [
        ("none", 0, None, "000"),
        ("mlperf-v5.0,shortened=990ms", 0, "SHORTENED", "000"),
        ("mlperf-v5.0,shortened=1100ms", 2, "INVALID", "000"),
        # Ten groups of 100 ms last 1 s.
        ("mlperf-v5.0,shortened=1001ms", 2, "INVALID", "000"),
        ("mlperf-v5.0,shortened=999ms", 2, "INVALID", "002"),
    ],
)
def test_the_worst_word_of_the_rules_counts(
    tmp_path: Path, rules: str, slowest: int, word: str | None, window: str
) -> None:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before["rules"] = rules
            rank.before["model"]["total"] = 64

    group_ns = list(EVEN)
    if slowest:
        group_ns[slowest] = 99_000_000
    folder = make_windows(tmp_path / "r", group_ns, change=change)
    found = load_run(folder).result()["verdict"]["rules"]
    assert (found["result"], found["window"]) == (word, window)
    text = load_run(folder).report()
    assert (f"gates of window {window}, which of all windows" in text) == (word is not None)
    if word == "INVALID":
        assert not all(gate["passed"] for gate in found["gates"])
        assert text.startswith("MEASUREMENT VALID; MLPerf v5.0 gates: INVALID")


def test_no_window_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "windows" / "000" / "ranks").mkdir(parents=True)
    several = load_run(tmp_path)
    assert isinstance(several, Windows)
    for use in (several.result, lambda: several.runs):
        with pytest.raises(UsageError, match=r"no readable window: .*no readable rank folder"):
            use()


def test_a_rank_without_the_records_says_where_they_are() -> None:
    with pytest.raises(UsageError, match="on rank 0's disk"):
        Windows(None, {}).runs  # noqa: B018


def test_what_is_told_of_more_windows_than_a_line_holds(tmp_path: Path) -> None:
    folder = make_windows(tmp_path / "r", UNEVEN, rel=0.01)
    results = {path.name: load_run(path).result() for path in (folder / "windows").iterdir()}
    last: dict[str, Any] = results["007"]
    last["run_id"] = f"{RUN_ID}-w020"
    (finding,) = windows_result({"020": last})["verdict"]["findings"]
    assert "000, 001, 002, 003, 004, 005, 006, 007 and 12 more" in finding["message"]


def test_records_of_a_version_without_planned_windows_show_gaps_all_the_same(
    tmp_path: Path,
) -> None:
    folder = make_windows(tmp_path / "r")
    for path in folder.glob("windows/*/ranks/*/rank.json"):
        edit_json(path, lambda before: before.pop("window"))
    assert told(folder) == ("VALID", [])
    shutil.rmtree(folder / "windows" / "001")
    assert told(folder)[0] == "INCOMPLETE"
