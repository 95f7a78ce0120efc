"""Files are whole or absent, and JSON holds nothing that JSON has not."""

import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench import files
from distbench.errors import UsageError


def names(folder):
    return sorted(each.name for each in Path(folder).iterdir())


def test_write_bytes_writes_and_replaces(tmp_path):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old and longer")
    files.write_bytes(path, b"new")
    assert path.read_bytes() == b"new"
    assert names(tmp_path) == ["a.bin"]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_full_disk_leaves_the_older_file_and_no_temporary(tmp_path, monkeypatch, step):
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"old")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*((os, "fsync") if step == "fsync" else (Path, "replace")), full)
    with pytest.raises(OSError, match="No space left"):
        files.write_bytes(path, b"new")
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == ["a.bin"]


def test_the_content_is_on_disk_before_the_name_and_the_name_before_the_return(
    tmp_path, monkeypatch
):
    done = []
    fsync, replace = os.fsync, Path.replace

    def sync(fd):
        done.append(("fsync", str(Path(f"/proc/self/fd/{fd}").readlink()), path.exists()))
        fsync(fd)

    def rename(source, target):
        assert Path(source).read_bytes() == b"data"
        done.append(("rename", str(source), str(target)))
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", rename)
    path = tmp_path / "a.bin"
    files.write_bytes(path, b"data")
    temporary = done[0][1]
    assert done == [
        ("fsync", temporary, False),
        ("rename", temporary, str(path)),
        ("fsync", str(tmp_path), True),
    ]
    assert Path(temporary).parent == tmp_path
    assert Path(temporary).name.startswith(".")  # which hashes and listings leave out


def test_no_descriptor_stays_open(tmp_path):
    before = len(names("/proc/self/fd"))
    for _ in range(3):
        files.write_bytes(tmp_path / "a", b"x")
        with pytest.raises(OSError, match="absent"):
            files.write_bytes(tmp_path / "absent" / "a", b"x")
    assert len(names("/proc/self/fd")) == before


def test_to_json_keeps_order_and_ends_with_a_newline():
    assert files.to_json({"b": 1, "a": [True, None]}) == (
        b'{\n "b": 1,\n "a": [\n  true,\n  null\n ]\n}\n'
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_no_number_that_json_has_not_is_written_or_read(tmp_path, value):
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.to_json({"a": [value]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", value)
    assert names(tmp_path) == []
    (tmp_path / "b.json").write_text(json.dumps([value]))
    with pytest.raises(UsageError, match=r"b\.json is not valid JSON: .* is not a JSON number"):
        files.read_json(tmp_path / "b.json")


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@given(value=json_values)
def test_json_comes_back_as_it_was_written(tmp_path_factory, value):
    path = tmp_path_factory.getbasetemp() / "round.json"
    files.write_json(path, value)
    assert files.read_json(path) == value


@pytest.mark.parametrize(
    "content", [b"", b"{", b'{"a": 1,}', b"\xff\xfe", b"[1] 2", b"[" * 200_000]
)
def test_damaged_json_is_a_sentence_that_names_the_file(tmp_path, content):
    path = tmp_path / "rank.json"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=r"rank\.json is not valid JSON"):
        files.read_json(path)


def test_a_file_that_cannot_be_read_is_a_sentence_that_names_it(tmp_path):
    with pytest.raises(UsageError, match=r"no\.json cannot be read: No such file"):
        files.read_json(tmp_path / "no.json")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        files.read_json(tmp_path)


def test_sha256_of_the_standard_example():
    # FIPS 180-2, appendix B.1.
    wanted = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert files.sha256(b"abc") == wanted
    assert files.sha256(memoryview(b"abc")) == wanted


@pytest.mark.parametrize("size", [0, 1, (1 << 20) - 1, 1 << 20, (1 << 20) + 1, 3 << 20])
def test_sha256_file_takes_the_whole_file(tmp_path, size):
    data = bytes(range(251)) * (size // 251 + 1)
    path = tmp_path / "x"
    path.write_bytes(data[:size])
    assert files.sha256_file(path) == hashlib.sha256(data[:size]).hexdigest()


def test_finite_turns_what_json_has_not_into_none():
    assert files.finite(1.5) == 1.5
    assert files.finite(0) == 0
    assert files.finite(None) is None
    for value in (float("nan"), float("inf"), -float("inf")):
        assert files.finite(value) is None
