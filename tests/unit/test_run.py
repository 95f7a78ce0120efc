"""Runs as result directories: what is written is what is read, and what is damaged says so."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from distbench import files
from distbench.clock import ClockModel
from distbench.errors import DistbenchError, UsageError
from distbench.rank_files import write_rank
from distbench.run import RankRecord, load_run, rank_folder, read_record

from .synthetic import BEFORE_NS, OFFSET_NS, RUN_ID, START_NS, edit_json, in_memory, make_run


def test_a_stored_run_is_read_back_as_it_was(tmp_path: Path) -> None:
    run = load_run(make_run(tmp_path / "r"))
    twin = in_memory()
    assert (run.world_size, run.missing, run.scenario, run.folder) == (
        2,
        [],
        "offline",
        tmp_path / "r",
    )
    for record, other in zip(run.present, twin.present, strict=True):
        assert (record.before, record.after) == (other.before, other.after)
        assert record.rows is not None
        assert other.rows is not None
        assert np.array_equal(record.rows, other.rows)
        assert (record.problem, record.host) == ("", f"node-{record.rank}")
    assert run.result() == twin.result() == files.read_json(tmp_path / "r" / "result.json")
    assert run.report() == (tmp_path / "r" / "report.txt").read_text()


def test_a_path_may_be_text(tmp_path: Path) -> None:
    make_run(tmp_path / "r", report=False)
    assert load_run(str(tmp_path / "r")).world_size == 2


def test_columns_are_spread_over_their_groups() -> None:
    record = in_memory(groups=(2,), batch=3, tail=(2,), group_ns=(100,)).present[0]
    ends = [START_NS + 100] * 3 + [START_NS + 200] * 3 + [START_NS + 300] * 2
    assert record.column("completed").tolist() == ends
    assert record.column("scheduled").tolist() == [START_NS] * 8
    assert record.column("count").tolist() == [3, 0, 0, 3, 0, 0, 2, 0]
    assert record.first_rows("completed").tolist() == ends[0::3]
    assert record.first_rows("count").tolist() == [3, 3, 2]


def test_a_column_that_the_log_does_not_have_is_empty() -> None:
    assert len(in_memory().present[0].first_rows("device")) == 0
    assert len(in_memory(device_ns=7).present[0].first_rows("device")) == 10


def test_no_rows_no_columns() -> None:
    record = RankRecord(0, in_memory().present[0].before, None, None, "gone")
    assert len(record.column("completed")) == len(record.first_rows("completed")) == 0


def test_samples_of_another_rank_are_not_passed_off_as_none() -> None:
    record = replace(in_memory().present[1], rows=None, elsewhere=True)
    for use in (record.column, record.first_rows):
        with pytest.raises(
            DistbenchError, match=r"samples of rank 1 \(node-1\) stay on its disk.*pool"
        ):
            use("completed")
    # What was lost is empty.
    assert len(replace(record, elsewhere=False).column("completed")) == 0


def test_only_ended_groups_count() -> None:
    run = in_memory(change=lambda ranks: ranks[0].log.completed.__setitem__(ranks[0].row(3), -2))
    assert len(run.present[0].first_rows("issued")) == 9


# Clocks


def test_the_clock_of_rank_0_is_the_reference() -> None:
    run = in_memory()
    assert run.clock(run.present[0]) == ClockModel()


def test_the_clock_comes_from_all_exchanges_of_rank_0() -> None:
    run = in_memory(drift_ppm=(0, 10))
    model = run.clock(run.present[1])
    assert model is not None
    # 10 us/s: 10 us behind at the exchange 1 s before the start, 30 us ahead 3 s after it.
    assert [e.offset_ns for e in model.exchanges] == [OFFSET_NS - 10_000, OFFSET_NS + 30_000]
    assert model.offset_ns(START_NS) == OFFSET_NS


def test_without_rank_0_the_clock_comes_from_the_first_exchange() -> None:
    def change(ranks):
        ranks[0].after = None

    for run in (in_memory(change=change), in_memory()):
        if run.present[0].after:
            run = type(run)(2, (None, run.records[1]))
        model = run.clock(run.present[-1])
        assert model is not None
        assert [e.at_ns for e in model.exchanges] == [BEFORE_NS]


def test_a_rank_that_was_never_exchanged_with_has_no_clock() -> None:
    def change(ranks):
        ranks[0].after["exchanges"]["1"] = []

    run = in_memory(change=change)
    assert run.clock(run.present[1]) is None


def test_ranks_of_one_domain_share_their_leaders_clock() -> None:
    def change(ranks):
        ranks[2].before["clock"] = dict(ranks[1].before["clock"])

    run = in_memory(ranks=3, change=change)
    assert run.clock(run.present[2]) == run.clock(run.present[1])


# Files


def test_done_json_has_the_hash_of_every_file_of_a_rank(tmp_path: Path) -> None:
    own = rank_folder(make_run(tmp_path / "r", report=False), 1)
    assert own == tmp_path / "r" / "ranks" / "00001"
    recorded = files.read_json(own / "done.json")["files"]
    assert sorted(recorded) == ["after.json", "rank.json", "samples.npy"]
    for name, digest in recorded.items():
        assert digest == hashlib.sha256((own / name).read_bytes()).hexdigest()


def test_a_gathered_copy_is_the_rank_folder_byte_for_byte(tmp_path: Path) -> None:
    own = rank_folder(make_run(tmp_path / "r", report=False, device_ns=5), 1)
    write_rank(tmp_path / "copy", in_memory(device_ns=5).present[1])
    for path in own.iterdir():
        assert (tmp_path / "copy" / path.name).read_bytes() == path.read_bytes(), path.name


def test_a_copy_has_only_what_was_left(tmp_path: Path) -> None:
    write_rank(tmp_path / "copy", RankRecord(0, in_memory().present[0].before, None, None, "gone"))
    assert sorted(p.name for p in (tmp_path / "copy").iterdir()) == ["done.json", "rank.json"]


def test_the_manifest_is_what_sha256sum_checks(tmp_path: Path) -> None:
    make_run(tmp_path / "r")
    listed = dict(
        reversed(line.split("  "))
        for line in (tmp_path / "r" / "manifest.sha256").read_text().splitlines()
    )
    names = [
        f"ranks/0000{r}/{n}"
        for r in (0, 1)
        for n in ("after.json", "done.json", "rank.json", "samples.npy")
    ]
    assert list(listed) == [*names, "report.txt", "result.json"]
    for name, digest in listed.items():
        assert digest == hashlib.sha256((tmp_path / "r" / name).read_bytes()).hexdigest()


# Damage


def test_what_is_no_result_directory(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"nowhere is no result directory: .*ranks/ inside it"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "ranks").mkdir()
    with pytest.raises(UsageError, match="holds no readable rank folder"):
        load_run(tmp_path)


def test_no_rank_json_can_be_read(tmp_path: Path) -> None:
    make_run(tmp_path / "r", ranks=1, report=False)
    (tmp_path / "r" / "ranks" / "00000" / "rank.json").write_bytes(b"{")
    with pytest.raises(UsageError, match=r"rank.json is not valid JSON.*give a result directory"):
        load_run(tmp_path / "r")


def test_a_damaged_rank_json_is_a_missing_rank(tmp_path: Path) -> None:
    make_run(tmp_path / "r", report=False)
    (tmp_path / "r" / "ranks" / "00001" / "rank.json").unlink()
    run = load_run(tmp_path / "r")
    assert (run.missing, len(run.present), run.first.rank) == ([1], 1, 0)


def test_what_is_no_rank_folder_is_passed_over(tmp_path: Path) -> None:
    make_run(tmp_path / "r", report=False)
    (tmp_path / "r" / "ranks" / "notes").mkdir()
    (tmp_path / "r" / "ranks" / "²").mkdir()
    (tmp_path / "r" / "ranks" / "00002").write_text("a file")
    assert load_run(tmp_path / "r").world_size == 2


@pytest.mark.parametrize("name", ["rank", "columns", "schema_version"])
def test_rank_json_must_say_what_it_is(tmp_path: Path, name: str) -> None:
    own = rank_folder(make_run(tmp_path / "r", report=False), 0)
    edit_json(own / "rank.json", lambda before: before.pop(name))
    with pytest.raises(UsageError, match=f"rank.json lacks '{name}'"):
        read_record(own)


def test_another_schema_is_refused(tmp_path: Path) -> None:
    own = rank_folder(make_run(tmp_path / "r", report=False), 0)
    edit_json(own / "rank.json", lambda before: before.update(schema_version=2))
    with pytest.raises(UsageError, match=r"schema version 2; this distbench reads 1: use the vers"):
        read_record(own)


def test_without_after_json_every_row_is_kept(tmp_path: Path) -> None:
    own = rank_folder(make_run(tmp_path / "r", report=False), 0)
    (own / "after.json").unlink()
    record = read_record(own)
    assert record.after is None
    assert record.rows is not None
    assert len(record.rows) == 40
    assert "after.json cannot be read: No such file" in record.problem


def test_after_json_says_how_many_rows_were_used(tmp_path: Path) -> None:
    def change(ranks):
        ranks[0].after["used"] = 12

    record = read_record(rank_folder(make_run(tmp_path / "r", change=change, report=False), 0))
    assert record.rows is not None
    assert len(record.rows) == 12


@pytest.mark.parametrize("keep", [0, 60, 128, -8, -1])
def test_samples_that_were_cut_short_are_a_problem(tmp_path: Path, keep: int) -> None:
    own = rank_folder(make_run(tmp_path / "r", report=False), 1)
    samples = own / "samples.npy"
    samples.write_bytes(samples.read_bytes()[:keep])
    record = read_record(own)
    assert record.rows is None
    assert f"{samples} cannot be read" in record.problem


def test_samples_with_other_columns_are_a_problem(tmp_path: Path) -> None:
    own = rank_folder(make_run(tmp_path / "r", report=False), 1)
    edit_json(own / "rank.json", lambda before: before["columns"].pop())
    assert "not int64 rows of 6 columns" in read_record(own).problem


@pytest.mark.parametrize(
    ("name", "value"), [("run_id", "20260101T000000Z-offline-99999999"), ("world_size", 3)]
)
def test_two_runs_are_not_mixed(tmp_path: Path, name: str, value: object) -> None:
    make_run(tmp_path / "r", report=False)
    edit_json(
        tmp_path / "r" / "ranks" / "00001" / "rank.json",
        lambda before: before.update({name: value}),
    )
    with pytest.raises(UsageError, match=f"mixes rank folders of different runs: {RUN_ID}"):
        load_run(tmp_path / "r")


def test_one_rank_is_never_counted_twice(tmp_path: Path) -> None:
    make_run(tmp_path / "r", report=False)
    ranks = tmp_path / "r" / "ranks"
    shutil.rmtree(ranks / "00001")
    shutil.copytree(ranks / "00000", ranks / "00001")
    with pytest.raises(UsageError, match=r"00001 holds rank 0 of 2: give it the name 00000, or re"):
        load_run(tmp_path / "r")


def test_no_rank_is_beyond_the_world(tmp_path: Path) -> None:
    make_run(tmp_path / "r", report=False)
    ranks = tmp_path / "r" / "ranks"
    shutil.copytree(ranks / "00001", ranks / "00002")
    edit_json(ranks / "00002" / "rank.json", lambda before: before.update(rank=2))
    with pytest.raises(UsageError, match="00002 holds rank 2 of 2"):
        load_run(tmp_path / "r")


def test_json_has_no_nan_in_either_direction(tmp_path: Path) -> None:
    own = rank_folder(make_run(tmp_path / "r", report=False), 1)
    text = (own / "after.json").read_text()
    (own / "after.json").write_text(text.replace("1000000,", "NaN,", 1))
    assert "NaN is not a JSON number" in read_record(own).problem
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "x.json", {"rate": float("inf")})
    assert json.loads(text)["quiet"]["run_delay_ns"] == 1_000_000
