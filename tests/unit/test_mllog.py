"""LoadGen's logs, read as they are: line breaks in messages, inf, torn ends, damaged answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from distbench import mlperf_files
from distbench.errors import UsageError
from distbench.mllog import parse_detail, read_answers, read_detail
from distbench.mlperf_files import as_numbers, told, write_texts


def entry(key: str, value: Any, error: bool = False, warning: bool = False) -> str:
    marks = {"is_error": error, "is_warning": warning, "file": "x.cc", "line_no": 1}
    return ":::MLLOG " + json.dumps({"key": key, "value": value, "metadata": marks}) + "\n"


def test_keys_errors_and_warnings() -> None:
    text = entry("a", 1) + entry("b", True) + entry("error_x", "it broke", error=True)
    text += "what is no entry\n" + entry("a", 2) + entry("w", "careful", warning=True)
    found = parse_detail(text)
    assert found.keys == {"a": 2, "b": True, "error_x": "it broke", "w": "careful"}
    assert found.errors == ("error_x: it broke",) and found.warnings == ("w: careful",)
    assert not found.torn


def test_a_line_break_in_a_message_and_what_is_no_json() -> None:
    broken = entry("m", "one two").replace("one two", "one\ntwo")
    found = parse_detail(broken + entry("q", 0.5).replace("0.5", "inf") + entry("n", 1))
    assert found.keys == {"m": "one\ntwo", "q": "inf", "n": 1} and not found.torn


def test_a_torn_end() -> None:
    found = parse_detail(entry("a", 1) + entry("b", 2)[:30])
    assert found.keys == {"a": 1} and found.torn


def test_no_log(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        read_detail(tmp_path)
    found = told(tmp_path, {"mode": "performance"})
    assert found["keys"] == {} and "mlperf_log_detail.txt cannot be read" in found["problem"]


def answers(folder: Path, *entries: dict[str, Any]) -> dict[int, bytes]:
    (folder / "mlperf_log_accuracy.json").write_text(json.dumps(entries))
    return read_answers(folder)


def test_answers_by_sample(tmp_path: Path) -> None:
    one, two = {"seq_id": 0, "qsl_idx": 5, "data": "0A00"}, {"qsl_idx": 3, "data": ""}
    assert answers(tmp_path, one, two, one) == {5: b"\x0a\x00", 3: b""}
    with pytest.raises(UsageError, match="two different answers to sample 5"):
        answers(tmp_path, one, {"qsl_idx": 5, "data": "0B00"})
    for wrong in ({"qsl_idx": 5}, {"qsl_idx": "x", "data": ""}, {"qsl_idx": 1, "data": "zz"}):
        with pytest.raises(UsageError, match="is damaged"):
            answers(tmp_path, wrong)


def test_logs_cross_a_link_as_numbers(tmp_path: Path) -> None:
    blobs = [b"", b"a", b"12345678", bytes(range(256)) * 3 + b"x"]
    named = [(f"log{k}", len(blob)) for k, blob in enumerate(blobs)]
    write_texts(tmp_path / "loadgen", named, [as_numbers(blob) for blob in blobs])
    for (name, _), blob in zip(named, blobs, strict=True):
        assert (tmp_path / "loadgen" / name).read_bytes() == blob
    # What the driver wrote itself, over a shared disk, stays; and no name leads out of the folder.
    write_texts(tmp_path / "loadgen", [("log1", 3), ("../out", 1)], [as_numbers(b"new")] * 2)
    assert (tmp_path / "loadgen" / "log1").read_bytes() == b"a"
    assert not (tmp_path / "out").exists()


def test_the_files_that_a_driver_sends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "b.txt").write_bytes(b"b")
    (tmp_path / "a.txt").write_bytes(b"long")
    (tmp_path / "folder").mkdir()
    assert mlperf_files.texts_in(tmp_path) == [("a.txt", b"long"), ("b.txt", b"b")]
    monkeypatch.setattr(mlperf_files, "SENT_LIMIT_BYTES", 3)
    assert mlperf_files.texts_in(tmp_path) == [("b.txt", b"b")]
    (tmp_path / "b.txt").unlink()
    (tmp_path / "b.txt").symlink_to(tmp_path / "folder")
    assert mlperf_files.texts_in(tmp_path) == []


def test_a_torn_log_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "mlperf_log_detail.txt").write_text(entry("a", 1) + entry("b", 2)[:20])
    found = told(tmp_path, {"mode": "performance"})
    assert found["keys"] == {"a": 1} and "cannot be read" in found["problem"]
