"""verify: whatever was changed after the run is named, even where every hash was made to fit."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench import files
from distbench.errors import UsageError
from distbench.files import write_manifest
from distbench.verify import SHOWN, differences, main, verify

from .synthetic import edit_json, leaves, make_run, mend_hashes, put

RAW = [f"ranks/0000{rank}/{name}" for rank in (0, 1) for name in ("rank.json", "after.json")]
HASH = "its SHA-256 is not the one that was recorded"
HEADER = 128


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hundreds of directories are hashed anew here; none has to survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _fd: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return make_run(tmp_path / "r", device_ns=63_000_000)


def named(lines: list[str], *words: str) -> bool:
    return any(all(word in line for word in words) for line in lines)


def test_a_good_directory_is_good(folder: Path) -> None:
    assert verify(folder) == (0, [])


def test_a_clean_incomplete_run_agrees_but_is_incomplete(tmp_path: Path) -> None:
    def change(ranks: Any) -> None:
        for rank in ranks:
            rank.after["end"] = {
                "code": "terminated", "rank": 0, "host": "node-0", "sentence": "x", "exit_code": 6,
            }  # fmt: skip

    assert verify(make_run(tmp_path / "r", change=change)) == (
        6, ["the run is INCOMPLETE, and its figures agree"],
    )  # fmt: skip


# Samples


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    "place", [0, 6, 7, 8, 11, 20, 30, 66, 100, 127, 128, 135, 136, 168, 500, 1000, -8, -1]
)
def test_one_changed_byte_of_the_samples_is_named(folder: Path, rank: int, place: int) -> None:
    path = folder / "ranks" / f"{rank:05d}" / "samples.npy"
    data = bytearray(path.read_bytes())
    data[place] ^= 0x04
    path.write_bytes(data)
    status, lines = verify(folder)
    assert status == 1
    assert lines[0] == f"ranks/{rank:05d}/samples.npy: {HASH}"


def test_no_damaged_header_ends_in_a_traceback(folder: Path) -> None:
    path = folder / "ranks" / "00001" / "samples.npy"
    good = path.read_bytes()
    bits = random.Random(5)
    for place in range(HEADER):
        data = bytearray(good)
        data[place] ^= 1 << bits.randrange(8)
        path.write_bytes(data)
        status, lines = verify(folder)
        assert status == 1, place
        assert named(lines, "ranks/00001/samples.npy", HASH), place


@pytest.mark.parametrize("keep", [0, 10, 128, 200, -1])
def test_samples_that_were_cut_short_are_named(folder: Path, keep: int) -> None:
    path = folder / "ranks" / "00001" / "samples.npy"
    path.write_bytes(path.read_bytes()[:keep])
    status, lines = verify(folder)
    assert status == 1
    assert named(lines, "ranks/00001/samples.npy", HASH)
    assert named(lines, "ranks/00001: ", "samples.npy cannot be read")


@pytest.mark.parametrize(
    ("column", "figure"),
    [
        ("completed", "metrics.throughput.value"),
        ("scheduled", "metrics.latency.mean.value"),
        ("issued", "metrics.batch_latency.mean.value"),
        ("started", "metrics.service.mean.value"),
        ("finished", "metrics.service.mean.value"),
        ("device", "metrics.device.mean.value"),
        ("count", "per_rank[0].samples"),
    ],
)
def test_edited_samples_with_mended_hashes_give_other_figures(
    folder: Path, column: str, figure: str
) -> None:
    own = folder / "ranks" / "00000"
    columns = files.read_json(own / "rank.json")["columns"]
    rows = np.load(own / "samples.npy")
    last = np.flatnonzero(rows[:, columns.index("issued")])[-1]
    rows[last, columns.index(column)] -= 1 if column == "count" else 50_000_000
    np.save(own / "samples.npy", rows)
    mend_hashes(folder)
    status, lines = verify(folder)
    assert status == 1
    assert named(lines, f"result.json {figure}: result.json says", "the rank folders give")
    assert not named(lines, HASH)


# Figures


def named_as(place: tuple[Any, ...]) -> str:
    """Return the name that verify gives to a path of ``leaves``."""
    return "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in place)[1:]


def test_every_single_number_of_result_json_is_recomputed(folder: Path) -> None:
    path = folder / "result.json"
    good = path.read_bytes()
    numbers = [
        (place, value)
        for place, value in leaves(json.loads(good))
        if isinstance(value, int | float)  # a truth too
    ]
    assert len(numbers) > 120
    escaped = []
    for place, value in numbers:
        result = json.loads(good)
        put(result, place, value * 1.01 if value not in (0, False) else value + 1)
        path.write_bytes(files.to_json(result))
        mend_hashes(folder)
        status, lines = verify(folder)
        line = f"result.json {named_as(place)}: result.json says "
        if status != 1 or len(lines) != 1 or not lines[0].startswith(line):
            escaped.append((place, status, lines))
    assert escaped == []


def test_every_word_and_every_unknown_of_result_json_is_recomputed(folder: Path) -> None:
    good = (folder / "result.json").read_bytes()
    others = [leaf for leaf in leaves(json.loads(good)) if not isinstance(leaf[1], int | float)]
    assert len(others) > 200
    for place, value in others:
        result = json.loads(good)
        put(result, place, 0 if value is None else value + "x")
        lines = differences(result, json.loads(good))
        assert len(lines) == 1
        assert lines[0].startswith(f"{named_as(place)}: result.json says ")


def test_an_edited_result_is_named_by_its_hash_too(folder: Path) -> None:
    edit_json(folder / "result.json", lambda r: r["verdict"].update(status="INVALID"))
    assert verify(folder) == (
        1,
        [
            f"result.json: {HASH}",
            "result.json verdict.status: result.json says 'INVALID', the rank folders give 'VALID'",
        ],
    )


@pytest.mark.parametrize(
    ("change", "line"),
    [
        (
            lambda r: r["metrics"].pop("accuracy"),
            "result.json metrics.accuracy: only in the folders",
        ),
        (lambda r: r.update(extra=1), "result.json extra: only in result.json"),
        (lambda r: r["per_rank"].pop(), "result.json per_rank: result.json says [{'rank': 0"),
        (lambda r: r.update(clock=3), "result.json clock: result.json says 3, the rank folders"),
        (
            lambda r: r["verdict"]["rules"].update(shortened=0),
            "result.json verdict.rules.shortened: result.json says 0, the rank folders give False",
        ),
    ],
)
def test_what_was_added_or_taken_away_is_named(
    folder: Path, change: Callable[[Any], Any], line: str
) -> None:
    edit_json(folder / "result.json", change)
    mend_hashes(folder)
    status, lines = verify(folder)
    assert (status, len(lines)) == (1, 1)
    assert lines[0].startswith(line)


def test_how_a_number_is_written_makes_no_difference() -> None:
    assert differences({"a": [1, 2.0]}, {"a": [1.0, 2]}) == []
    assert differences(None, None) == []
    assert differences({"a": True}, {"a": 1}) != []
    assert differences("1", 1) == [": result.json says '1', the rank folders give 1"]


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'{"a": NaN}', b"\xff"])
def test_a_result_that_is_not_json_is_named(folder: Path, content: bytes) -> None:
    (folder / "result.json").write_bytes(content)
    status, lines = verify(folder)
    assert status == 1
    assert named(lines, f"result.json: {HASH}")
    assert named(lines[1:], "result.json")


@pytest.mark.parametrize("content", [None, b"MEASUREMENT VALID\n", b"\xff\xfe"])
def test_an_edited_report_is_named(folder: Path, content: bytes | None) -> None:
    text = (folder / "report.txt").read_text()
    (folder / "report.txt").write_bytes(
        text.replace("VALID", "PERFECT").encode() if content is None else content
    )
    mend_hashes(folder)
    assert verify(folder) == (1, ["report.txt is not the report of what the rank folders give"])


# Records


@pytest.mark.parametrize("name", RAW)
def test_an_edited_record_is_named(folder: Path, name: str) -> None:
    edit_json(folder / name, lambda record: record.update(note="harmless"))
    assert verify(folder) == (1, [f"{name}: {HASH}"])


@pytest.mark.parametrize(
    ("name", "place", "value", "figure"),
    [
        (RAW[1], ("plan", "reference_ns"), 999_000_000_000_000, "metrics.throughput.value"),
        (RAW[1], ("exchanges", "1", 1, 1), 7_000_001_000_000, "clock.ranks[1].drift_ppm"),
        (RAW[3], ("score", "right"), 9.0, "metrics.accuracy.value"),
        (RAW[3], ("text", "bits"), 299.0, "metrics.bits_per_byte.value"),
        (RAW[3], ("quiet", "run_delay_ns"), 0, "harness.run_delay_s[1]"),
        (RAW[2], ("harness", "loop_ns", 1), 1, "harness.cost_per_batch_s"),
        (RAW[2], ("host",), "node-9", "per_rank[1].host"),
        (RAW[0], ("duration_ns",), 9 * 10**9, "verdict.findings"),
    ],
)
def test_an_edited_record_with_mended_hashes_gives_other_figures(
    folder: Path, name: str, place: tuple[Any, ...], value: Any, figure: str
) -> None:
    edit_json(folder / name, lambda record: put(record, place, value))
    mend_hashes(folder)
    status, lines = verify(folder)
    assert status == 1
    assert named(lines, f"result.json {figure}: ")
    assert not named(lines, HASH)


def test_whatever_is_taken_out_of_a_record_is_named(folder: Path) -> None:
    keys = [
        (name, place)
        for name in RAW
        for place, _ in leaves(files.read_json(folder / name))
        if isinstance(place[-1], str)
    ]
    for name, place in keys:
        good = (folder / name).read_bytes()

        def drop(record: Any, place: tuple[Any, ...] = place) -> None:
            for key in place[:-1]:
                record = record[key]
            del record[place[-1]]

        edit_json(folder / name, drop)
        status, lines = verify(folder)
        assert status == 1, place
        assert lines[0] == f"{name}: {HASH}", place
        (folder / name).write_bytes(good)
    assert verify(folder) == (0, [])


def test_folders_that_cannot_be_judged_say_so_though_the_hashes_fit(folder: Path) -> None:
    edit_json(folder / RAW[3], lambda after: after.pop("quiet"))
    edit_json(folder / RAW[3], lambda after: after["outputs"].pop("non_finite"))
    mend_hashes(folder)
    assert verify(folder) == (
        1, ["the rank folders are damaged and cannot be judged: KeyError('non_finite')"],
    )  # fmt: skip


# Files that come and go


def test_a_missing_rank_folder_is_incomplete_not_wrong(folder: Path) -> None:
    shutil.rmtree(folder / "ranks" / "00001")
    status, lines = verify(folder)
    assert status == 6
    for name in ("rank.json", "after.json", "samples.npy", "done.json"):
        assert f"ranks/00001/{name}: missing" in lines
    assert "ranks/00001: missing; it is on node-1" in lines


def test_all_rank_folders_are_missing(folder: Path) -> None:
    for rank in ("00000", "00001"):
        shutil.rmtree(folder / "ranks" / rank)
    status, lines = verify(folder)
    assert status == 6
    assert named(lines, "holds no readable rank folder")


@pytest.mark.parametrize(
    "name", [*RAW, "ranks/00001/samples.npy", "ranks/00000/done.json", "result.json", "report.txt"]
)
def test_a_missing_file_is_incomplete(folder: Path, name: str) -> None:
    (folder / name).unlink()
    status, lines = verify(folder)
    assert status == 6
    assert f"{name}: missing" in lines


def test_a_missing_file_excuses_no_other_damage(folder: Path) -> None:
    (folder / "report.txt").unlink()
    edit_json(folder / "result.json", lambda r: r["metrics"]["throughput"].update(value=81.0))
    status, lines = verify(folder)
    assert status == 1
    assert named(lines, "metrics.throughput.value: result.json says 81.0")
    assert "report.txt: missing" in lines


def test_no_result_though_the_hashes_fit(folder: Path) -> None:
    (folder / "ranks" / "00001" / "rank.json").write_bytes(b"{}")
    (folder / "ranks" / "00000" / "rank.json").write_bytes(b"{}")
    mend_hashes(folder)
    status, lines = verify(folder)
    assert status == 1
    assert named(lines, "rank.json lacks 'rank'")


@pytest.mark.parametrize("name", ["notes.txt", "ranks/00001/extra.npy", "ranks/00002/rank.json"])
def test_a_stray_file_is_named(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text("{}")
    status, lines = verify(folder)
    assert status == 1
    assert f"{name}: not in manifest.sha256" in lines


def test_a_missing_manifest_is_incomplete(folder: Path) -> None:
    (folder / "manifest.sha256").unlink()
    assert verify(folder) == (
        6, ["manifest.sha256: missing; `python -m distbench.salvage` makes one"],
    )  # fmt: skip


@pytest.mark.parametrize("name", ["ranks/00001/samples.npy", "result.json"])
def test_a_line_that_was_taken_out_of_the_manifest_is_named(folder: Path, name: str) -> None:
    manifest = folder / "manifest.sha256"
    lines = [
        line for line in manifest.read_text().splitlines(True) if not line.endswith(name + "\n")
    ]
    manifest.write_text("".join(lines))
    assert verify(folder) == (1, [f"{name}: not in manifest.sha256"])


def test_one_changed_byte_of_the_manifest_never_passes(folder: Path) -> None:
    manifest = folder / "manifest.sha256"
    good = manifest.read_bytes()
    bits = random.Random(7)
    for place in range(0, len(good), 3):
        data = bytearray(good)
        data[place] ^= 1 << bits.randrange(8)
        manifest.write_bytes(data)
        assert verify(folder)[0] in (1, 6), place


def test_done_json_is_held_against_the_files_though_the_manifest_fits(folder: Path) -> None:
    name = "ranks/00001/done.json"
    edit_json(folder / name, lambda done: done["files"].update({"samples.npy": "0" * 64}))
    write_manifest(folder)
    assert verify(folder) == (1, [f"ranks/00001/samples.npy: {HASH}"])


@pytest.mark.parametrize("content", [b"{}", b"[]", b'{"files": 3}', b"{"])
def test_a_damaged_done_json_is_named(folder: Path, content: bytes) -> None:
    name = "ranks/00001/done.json"
    (folder / name).write_bytes(content)
    assert verify(folder) == (1, [f"{name}: damaged", f"{name}: {HASH}"])


def test_what_is_no_result_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no result directory"):
        verify(tmp_path / "nowhere")
    with pytest.raises(UsageError, match="no result directory"):
        verify(tmp_path)


# The command


def test_the_command_names_what_is_wrong(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(folder)]) == 0
    assert capsys.readouterr().out == f"{folder}: good\n"
    edit_json(folder / "result.json", lambda r: r.update(run_id="x"))
    assert main([str(folder)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{folder}: MISMATCH"
    assert out[1] == f"  result.json: {HASH}"


def test_the_command_takes_several_and_tells_the_worst(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cut = shutil.copytree(folder, tmp_path / "cut")
    shutil.rmtree(cut / "ranks" / "00001")
    bad = shutil.copytree(folder, tmp_path / "bad")
    (bad / "report.txt").write_text("")
    assert main([str(folder), str(cut)]) == 6
    assert f"{cut}: INCOMPLETE\n" in capsys.readouterr().out
    assert main([str(bad), str(cut), str(folder)]) == 1
    assert main([str(cut), str(bad), str(folder)]) == 1


def test_what_is_no_result_directory_stops_nothing(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    notes, bad = tmp_path / "notes", shutil.copytree(folder, tmp_path / "bad")
    notes.mkdir()
    (bad / "report.txt").write_text("")
    cut = shutil.copytree(folder, tmp_path / "cut")
    (cut / "report.txt").unlink()
    assert main([str(notes), str(bad), str(folder)]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"{notes}: no result directory"
    assert lines[1].startswith(f"  {notes} is no result directory: ")
    assert lines[2] == f"{bad}: MISMATCH" and lines[-1] == f"{folder}: good"
    assert main([str(folder), str(notes), str(folder)]) == 2
    assert main([str(cut), str(notes)]) == main([str(notes), str(cut)]) == 6
    assert main([str(bad), str(notes)]) == 1


@pytest.mark.parametrize(
    ("recorded", "line"),
    [
        ({}, None),
        ({"distbench_version": "9.0"}, None),
        ({"distbench_version": "0.0.7"}, "made by distbench 0.0.7, this is 9.0: see Numbers in "),
        ({"distbench_version": "9.0", "git_commit": "b" * 40}, f"made by commit {'b' * 40}, this"),
        ({"distbench_version": "9.0", "git_commit": "a" * 40}, None),
        ({"distbench_version": "9.0", "git_commit": None}, None),
    ],
)
def test_a_mismatch_of_another_version_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recorded: dict[str, Any], line: str | None
) -> None:
    own = {"distbench_version": "9.0", "git_commit": "a" * 40}
    monkeypatch.setattr("distbench.verify.code_version", lambda: own)

    def change(ranks: Any) -> None:
        for rank in ranks:
            rank.before["environment"] |= recorded

    folder = make_run(tmp_path / "r", change=change)
    assert verify(folder) == (0, [])
    edit_json(folder / "result.json", lambda r: r["metrics"]["throughput"].update(value=81.0))
    write_manifest(folder)
    status, lines = verify(folder)
    assert status == 1
    assert lines[0].startswith(line or "result.json metrics.throughput.value: ")
    assert len(lines) == (2 if line else 1)


def test_the_command_does_not_flood(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(SHOWN + 3):
        (folder / f"stray-{number:02d}").touch()
    assert main([str(folder)]) == 1
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 42
    assert out[40] == "  stray-39: not in manifest.sha256"
    assert out[41] == "  and 3 more"


def test_help_and_no_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    assert main([]) == 2
    assert capsys.readouterr().out.count("python -m distbench.verify results/") == 2


@pytest.mark.parametrize("name", ["result.json", "report.txt", "ranks/00001/done.json"])
def test_a_file_that_is_gone_from_folder_and_manifest_is_missing(tmp_path: Path, name: str) -> None:
    folder = make_run(tmp_path / "r")
    (folder / name).unlink()
    manifest = folder / "manifest.sha256"
    lines = [
        line for line in manifest.read_text().splitlines(True) if not line.endswith(f"  {name}\n")
    ]
    manifest.write_text("".join(lines))
    status, said = verify(folder)
    assert status in (1, 6)
    assert f"{name}: missing" in said
