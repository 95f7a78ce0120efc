"""The sample log: allocated, readable after a kill, and spread as a brute-force twin spreads it."""

import ctypes
import errno
import gc
import mmap
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbench import samples
from distbench.errors import UsageError
from distbench.samples import (
    COLUMNS,
    FAILED,
    PENDING,
    SPREAD,
    SampleLog,
    fail_rest,
    npy_bytes,
    read_rows,
    spread_column,
)

ROOT = Path(__file__).parents[2]
SOME = ("index", "scheduled", "issued", "completed", "count")


def python(code, *argv):
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, argv)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )


def names(folder):
    return sorted(each.name for each in Path(folder).iterdir())


# Making a log


@pytest.mark.parametrize("columns", [SOME, COLUMNS, ("completed",)])
@pytest.mark.parametrize("capacity", [0, 1, 5_000])
def test_a_new_file_is_a_cleared_npy_that_numpy_reads(tmp_path, capacity, columns):
    path = tmp_path / "samples.npy"
    log = SampleLog.create(path, capacity, columns)
    assert log.capacity == capacity
    assert log.columns == columns
    rows = np.load(path, allow_pickle=False)
    assert (rows.shape, rows.dtype) == ((capacity, len(columns)), np.dtype("<i8"))
    assert (rows[:, columns.index("completed")] == PENDING).all()
    others = [place for place, name in enumerate(columns) if name != "completed"]
    assert (rows[:, others] == 0).all()


def test_every_block_of_the_file_is_allocated(tmp_path):
    SampleLog.create(tmp_path / "samples.npy", 100_000, SOME)
    stat = (tmp_path / "samples.npy").stat()
    assert stat.st_size == 128 + 8 * 100_000 * len(SOME)
    assert stat.st_blocks * 512 >= stat.st_size


def test_what_is_stored_is_in_the_file_after_a_flush_and_a_reopening(tmp_path):
    path = tmp_path / "samples.npy"
    log = SampleLog.create(path, 3_000, SOME)
    log.index[:] = np.arange(3_000)
    for row in range(0, 3_000, 10):
        log.issued[row] = 10**18 + row
        log.completed[row] = 10**18 + row + 5
        log.count[row] = 10
    log.flush(0, 3_000)
    rows = read_rows(path, SOME)
    assert rows.tolist() == np.load(path).tolist() == log.rows.tolist()
    assert rows[2_990].tolist() == [2_990, 0, 10**18 + 2_990, 10**18 + 2_995, 10]
    assert path.read_bytes() == npy_bytes(log.rows)


def test_columns_are_views_and_absent_ones_fail_at_the_first_store(tmp_path):
    log = SampleLog.create(tmp_path / "a.npy", 4, SOME)
    for place, name in enumerate(SOME):
        getattr(log, name)[2] = 100 + place
    assert log.rows[2].tolist() == [100, 101, 102, 103, 104]
    with pytest.raises(AttributeError):
        log.started[0] = 1


def test_a_log_in_memory_is_alike(tmp_path):
    one, other = SampleLog.in_memory(7, SOME), SampleLog.create(tmp_path / "a.npy", 7, SOME)
    assert one.rows.tolist() == other.rows.tolist()
    without = SampleLog.in_memory(2, ("index", "count"))
    assert without.rows.tolist() == [[0, 0], [0, 0]]


# Disks that refuse


def open_descriptors():
    return len(names("/proc/self/fd"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG])
def test_a_full_disk_is_a_sentence_and_leaves_no_file(tmp_path, monkeypatch, code):
    def refuse(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", refuse)
    before = open_descriptors()
    with pytest.raises(UsageError) as caught:
        SampleLog.create(tmp_path / "samples.npy", 1_000_000, SOME)
    told = str(caught.value)
    assert told.startswith(f"{tmp_path} has no room for 1000000 samples (40.0 MB)")
    assert "--output-dir" in told
    assert names(tmp_path) == []
    assert open_descriptors() == before


@pytest.mark.parametrize("step", ["posix_fallocate", "pwrite", "mmap"])
def test_any_other_refusal_names_the_file_and_leaves_none(tmp_path, monkeypatch, step):
    def refuse(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(*((mmap, "mmap") if step == "mmap" else (os, step)), refuse)
    before = open_descriptors()
    with pytest.raises(UsageError, match=r"samples\.npy cannot be allocated: .*Input/output"):
        SampleLog.create(tmp_path / "samples.npy", 10, SOME)
    assert names(tmp_path) == []
    assert open_descriptors() == before


def test_a_real_refusal_of_the_kernel(tmp_path):
    # A limit on the size of files stands in for a full disk: no privilege is needed for it.
    code = """
import resource, sys
from pathlib import Path
from distbench.errors import UsageError
from distbench.samples import SampleLog
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
SampleLog.create(Path(sys.argv[1]) / 'small.npy', 100, ('index', 'completed'))
try:
    SampleLog.create(Path(sys.argv[1]) / 'samples.npy', 100_000, ('index', 'completed'))
except UsageError as error:
    print(error)
"""
    done = python(code, tmp_path)
    assert "has no room for 100000 samples (1.6 MB)" in done.stdout, done
    assert names(tmp_path) == ["small.npy"]


@pytest.mark.parametrize("capacity", [10**15, 10**18, 10**20])
def test_sizes_beyond_any_disk_are_sentences(tmp_path, capacity):
    with pytest.raises(UsageError, match=f"no room for {capacity} samples"):
        SampleLog.create(tmp_path / "samples.npy", capacity, SOME)
    assert names(tmp_path) == []


def test_an_existing_file_is_never_overwritten(tmp_path):
    path = tmp_path / "samples.npy"
    path.write_bytes(b"older samples")
    with pytest.raises(UsageError, match=r"samples\.npy cannot be made: File exists"):
        SampleLog.create(path, 10, SOME)
    assert path.read_bytes() == b"older samples"


def test_an_absent_folder_is_a_sentence(tmp_path):
    with pytest.raises(UsageError, match="cannot be made: No such file"):
        SampleLog.create(tmp_path / "absent" / "samples.npy", 10, SOME)


def test_completed_rows_outlive_a_killed_process(tmp_path):
    code = """
import os, signal, sys
from pathlib import Path
from distbench.samples import SampleLog
log = SampleLog.create(Path(sys.argv[1]), 50_000, ('index', 'completed', 'count'))
for row in range(0, 40_000, 8):
    log.index[row] = row
    log.count[row] = 8
    log.completed[row] = 10**15 + row
os.kill(os.getpid(), signal.SIGKILL)
"""
    path = tmp_path / "samples.npy"
    done = python(code, path)
    assert done.returncode == -signal.SIGKILL, done.stderr
    rows = read_rows(path, ("index", "completed", "count"))
    firsts = np.arange(0, 40_000, 8)
    assert (rows[firsts] == np.stack([firsts, 10**15 + firsts, firsts * 0 + 8], 1)).all()
    assert int((rows[:, 1] != PENDING).sum()) == len(firsts)


# Flushing


class FakeLibc:
    """Keeps what ``msync`` was asked to write, and answers as told."""

    def __init__(self, answer=0):
        self.answer, self.calls = answer, []

    def msync(self, address, length, flags):
        self.calls.append((address.value, length.value, flags))
        ctypes.set_errno(errno.EIO)
        return self.answer


@pytest.fixture
def libc(monkeypatch):
    fake = FakeLibc()
    monkeypatch.setattr(samples.ctypes, "CDLL", lambda *_args, **_kwargs: fake)
    return fake


@pytest.mark.parametrize(
    ("first", "last"), [(0, 1), (0, 10_000), (4_000, 4_001), (9_999, 10_000), (511, 1_024)]
)
def test_a_flush_covers_the_rows_and_no_page_ahead_of_them(tmp_path, libc, first, last):
    log = SampleLog.create(tmp_path / "a.npy", 10_000, SOME)
    log.flush(first, last)
    [(begin, length, flags)] = libc.calls
    base, width = log.rows.ctypes.data, 8 * len(SOME)
    assert begin % mmap.PAGESIZE == 0
    assert base + first * width - mmap.PAGESIZE < begin <= base + first * width
    assert begin + length == base + last * width
    assert flags == 4  # MS_SYNC: it waits for the disk


def test_an_empty_flush_asks_for_nothing(tmp_path, libc):
    log = SampleLog.create(tmp_path / "a.npy", 10, SOME)
    log.flush(5, 5)
    log.flush(7, 3)
    SampleLog.create(tmp_path / "b.npy", 0, SOME).flush(0, 1)
    assert libc.calls == []


def test_a_disk_that_refuses_a_flush_is_an_error(tmp_path, libc):
    log = SampleLog.create(tmp_path / "a.npy", 10, SOME)
    libc.answer = -1
    with pytest.raises(OSError, match="Input/output error") as caught:
        log.flush(0, 10)
    assert caught.value.errno == errno.EIO


def test_a_flush_of_unmapped_memory_is_refused_by_the_kernel(tmp_path):
    code = """
import errno, sys
from pathlib import Path
from types import SimpleNamespace
from distbench.samples import SampleLog
log = SampleLog.create(Path(sys.argv[1]), 10, ('index', 'completed'))
log.flush(0, 10)
log.rows = SimpleNamespace(strides=(16,), ctypes=SimpleNamespace(data=4096))
SampleLog.capacity = 10
try:
    log.flush(0, 10)
except OSError as error:
    print(errno.errorcode[error.errno])
"""
    assert python(code, tmp_path / "a.npy").stdout == "ENOMEM\n"


# Freezing


def test_after_a_freeze_stores_reach_memory_and_not_the_file(tmp_path):
    path = tmp_path / "samples.npy"
    log = SampleLog.create(path, 2_000, SOME)
    log.completed[:1_000] = 5
    before = log.rows.copy()
    address = log.rows.ctypes.data
    log.freeze()
    log.completed[1_000:] = 7
    log.index[:] = 9
    assert log.rows.ctypes.data == address
    assert log.completed.tolist() == [5] * 1_000 + [7] * 1_000
    log.flush(0, 2_000)
    assert (read_rows(path, SOME) == before).all()
    log.freeze()  # a second time changes nothing
    assert (read_rows(path, SOME) == before).all()


def test_rows_stored_before_a_freeze_are_in_the_file_without_a_flush(tmp_path):
    path = tmp_path / "samples.npy"
    log = SampleLog.create(path, 10, SOME)
    log.index[:] = range(10)
    log.freeze()
    assert read_rows(path, SOME)[:, 0].tolist() == list(range(10))


def test_a_log_in_memory_has_nothing_to_freeze(tmp_path):
    log = SampleLog.in_memory(3, SOME)
    log.freeze()
    log.completed[1] = 5
    assert log.completed.tolist() == [PENDING, 5, PENDING]


def test_a_file_that_has_gone_cannot_be_frozen(tmp_path):
    path = tmp_path / "samples.npy"
    log = SampleLog.create(path, 3, SOME)
    path.unlink()
    gc.collect()  # what an earlier test left may close its files at any time
    before = open_descriptors()
    with pytest.raises(OSError, match=r"samples\.npy"):
        log.freeze()
    assert open_descriptors() == before


def test_a_refusal_to_map_the_file_again_is_an_error(tmp_path, monkeypatch):
    class Libc:
        class mmap:
            restype = None

            def __new__(cls, *_):
                ctypes.set_errno(errno.ENOMEM)
                return 2**64 - 1  # MAP_FAILED, as an address

    log = SampleLog.create(tmp_path / "samples.npy", 3, SOME)
    monkeypatch.setattr(samples.ctypes, "CDLL", lambda *_args, **_kwargs: Libc())
    with pytest.raises(OSError, match="Cannot allocate memory"):
        log.freeze()


# Spreading


def spread_by_hand(rows, columns, name):
    """What ``spread_column`` promises, one row after the other."""
    column = [int(row[columns.index(name)]) for row in rows]
    if name not in SPREAD:
        return column
    for first in range(len(rows)):
        count = int(rows[first][columns.index("count")])
        if count > 1 and rows[first][columns.index("completed")] != PENDING:
            for row in range(first + 1, min(first + count, len(rows))):
                column[row] = column[first]
    return column


@st.composite
def logs(draw):
    """Rows of groups of any size, ended, failed or pending, the last one perhaps cut short."""
    columns = tuple(draw(st.permutations(["completed", "count", "issued", "index", "device"])))
    groups = draw(st.lists(st.tuples(st.integers(1, 6), st.sampled_from([0, 1, 2])), max_size=12))
    rows = []
    for size, state in groups:
        for k in range(size):
            values = dict.fromkeys(columns, 0) | {"index": len(rows), "completed": PENDING}
            if k == 0:
                values |= {"issued": draw(st.integers(1, 10**18)), "device": 7}
                if state:
                    values["count"] = size
                    values["completed"] = FAILED if state == 2 else draw(st.integers(0, 10**18))
            rows.append([values[name] for name in columns])
    used = draw(st.integers(0, len(rows)))
    return np.array(rows[:used], np.int64).reshape(used, len(columns)), columns


@settings(max_examples=300)
@given(logs())
def test_spreading_equals_the_brute_force_twin_and_is_idempotent(log):
    rows, columns = log
    before = rows.copy()
    for name in columns:
        spread = spread_column(rows, columns, name)
        assert spread.tolist() == spread_by_hand(rows, columns, name)
        again = rows.copy()
        again[:, columns.index(name)] = spread
        assert spread_column(again, columns, name).tolist() == spread.tolist()
    assert (rows == before).all()


def test_spreading_worked_by_hand():
    columns = ("issued", "completed", "count", "device")
    rows = np.array(
        [
            [10, 50, 3, 9],  # a group of three
            [0, PENDING, 0, 0],
            [0, PENDING, 0, 0],
            [20, FAILED, 2, 0],  # a failed group of two
            [0, PENDING, 0, 0],
            [30, PENDING, 0, 0],  # a group in flight
            [0, PENDING, 0, 0],
            [40, 90, 4, 0],  # a group of four, of which the file has two rows
            [0, PENDING, 0, 0],
        ],
        np.int64,
    )
    assert spread_column(rows, columns, "completed").tolist() == [
        *(50, 50, 50, FAILED, FAILED, PENDING, PENDING, 90, 90)
    ]
    assert spread_column(rows, columns, "issued").tolist() == [10, 10, 10, 20, 20, 30, 0, 40, 40]
    assert spread_column(rows, columns, "device").tolist() == [9, 0, 0, 0, 0, 0, 0, 0, 0]
    assert spread_column(rows, columns, "count").tolist() == [3, 0, 0, 2, 0, 0, 0, 4, 0]


def test_a_spread_column_is_a_copy():
    rows = np.zeros((2, 2), np.int64)
    for name in ("completed", "count"):
        spread_column(rows, ("completed", "count"), name)[:] = 9
    assert (rows == 0).all()


# Reading


def test_a_read_log_can_be_changed_and_the_file_stays(tmp_path):
    path = tmp_path / "samples.npy"
    path.write_bytes(npy_bytes(np.arange(10).reshape(5, 2)))
    rows = read_rows(path, ("index", "completed"))
    rows[:] = 0
    assert np.load(path).tolist() == np.arange(10).reshape(5, 2).tolist()


def test_npy_bytes_of_a_view_is_what_numpy_saves(tmp_path):
    rows = np.arange(60, dtype=np.int64).reshape(10, 6)
    for view in (rows, rows[:4], rows[::2], rows[:0]):
        np.save(tmp_path / "a.npy", np.ascontiguousarray(view))
        assert npy_bytes(view) == (tmp_path / "a.npy").read_bytes()


class Boobytrap:
    def __reduce__(self):
        return os.system, ("touch boobytrap",)


def write_objects(path):
    np.save(path, np.array([[Boobytrap(), 1]], object), allow_pickle=True)


def write_archive(path):
    with path.open("wb") as file:
        np.savez(file, rows=np.zeros((5, 2), np.int64))


@pytest.mark.parametrize(
    "write",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"\x93NUMPY"),
        lambda path: path.write_bytes(b"not an array at all"),
        lambda path: path.write_bytes(pickle.dumps(Boobytrap())),
        lambda path: path.write_bytes(npy_bytes(np.zeros((5, 2), np.int64))[:-1]),
        lambda path: path.write_bytes(npy_bytes(np.zeros((5, 2), np.int64))[:100]),
        lambda path: np.save(path, np.zeros((5, 2), np.int32)),
        lambda path: np.save(path, np.zeros((5, 2), np.uint64)),
        lambda path: np.save(path, np.zeros((5, 2), ">i8")),
        lambda path: np.save(path, np.zeros((5, 2), float)),
        lambda path: np.save(path, np.zeros((5, 3), np.int64)),
        lambda path: np.save(path, np.zeros((2, 5), np.int64)),
        lambda path: np.save(path, np.zeros(10, np.int64)),
        lambda path: np.save(path, np.zeros((1, 5, 2), np.int64)),
        lambda path: path.mkdir(),
        lambda path: None,
        write_objects,
        write_archive,
    ],
)
def test_what_is_no_samples_file_is_refused_by_a_sentence_that_names_it(
    tmp_path, monkeypatch, write
):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "samples.npy"
    write(path)
    with pytest.raises(UsageError, match=r"samples\.npy (cannot be read|holds)"):
        read_rows(path, ("index", "completed"))
    assert not (tmp_path / "boobytrap").exists()


GOOD = npy_bytes(np.arange(16, dtype=np.int64).reshape(8, 2))
printable = st.sampled_from(list(b"0123456789(){}',<>|=ifOuc: -LTrue\\\n"))


@settings(max_examples=600)
@given(
    st.dictionaries(st.integers(0, 127), st.integers(0, 255) | printable, min_size=1, max_size=5)
)
@pytest.mark.filterwarnings("ignore:Reading `.npy`")
def test_a_damaged_header_is_never_more_than_a_sentence(tmp_path_factory, damage):
    path = tmp_path_factory.getbasetemp() / "damaged.npy"
    data = bytearray(GOOD)
    for place, value in damage.items():
        data[place] = value
    path.write_bytes(data)
    try:
        rows = read_rows(path, ("index", "completed"))
    except UsageError as error:
        assert "damaged.npy" in str(error)
    else:
        assert rows.dtype == np.int64
        assert rows.shape[1] == 2
        assert rows.nbytes <= len(data)


@pytest.mark.parametrize(
    "header",
    [
        "{'descr': '<08', 'fortran_order': False, 'shape': (8, 2), }",
        "{'descr': '<i8', 'fortran_order': F\x0else, 'shape': (8, 2\\, }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (8,-2), }",
        "{'descr': '<i8', b'fortran_order': False, 'shape': (8, 2), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (4611686018427387904, 2), }",
        "{'descr': '<i8', 'fortran_order': False, 'shape': (1208925819614629174706176, 2), }",
    ],
)
def test_headers_that_numpy_answers_with_odd_errors(tmp_path, header):
    path = tmp_path / "samples.npy"
    padded = header.ljust(117).encode() + b"\n"
    path.write_bytes(GOOD[:8] + len(padded).to_bytes(2, "little") + padded + bytes(128))
    with pytest.raises(UsageError, match=r"samples\.npy"):
        read_rows(path, ("index", "completed"))


def test_what_was_in_flight_fails_and_nothing_else():
    log = SampleLog.in_memory(10, ("issued", "completed", "count"))
    log.count[[0, 2, 5]], log.completed[0] = (2, 3, 4), 7
    fail_rest(log)
    assert log.completed.tolist() == [7, PENDING, FAILED, *[PENDING] * 2, FAILED, *[PENDING] * 4]
