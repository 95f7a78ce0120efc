"""One rank's samples: int64 columns in a mapped file that outlives the process.

A row is one sample. A group (what one ``issue`` carries) is a run of consecutive rows, of which the
loop fills the first, at the issue with the number of its rows; ``spread_column`` copies stamps over
the others. The file
is a plain ``.npy`` of shape (capacity, columns), int64, C order: one row of eight columns is one
cache line, so the stores of a group touch one line, and what is finished is one range of the file.
"""

from __future__ import annotations

import ctypes
import errno
import io
import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from distbench.errors import UsageError

PENDING = -1
"""``completed`` of a row that has not ended."""
FAILED = -2
"""``completed`` of a row whose group ended with an error."""

COLUMNS = (
    "index",
    "scheduled",
    "ready",
    "issued",
    "started",
    "finished",
    "completed",
    "device",
    "count",
    "served_by",
    "tokens",
    "first_token",
    "query",
)
"""Every column there is, in file order; a log has those that its scenario fills.

index: sample index. scheduled, ready, issued, started, finished, completed, first_token: ns on this
rank's clock; ready is when the loop could have issued the group. device: device time of the group,
ns. count: rows of the group, in its first row, else 0. served_by: rank. tokens: tokens of the row.
query: its number in the driver's log, under central dispatch.
"""

SPREAD = ("ready", "issued", "started", "finished", "completed", "served_by")
"""Columns whose value in a group's first row holds for every row of the group."""

Array = NDArray[np.int64]
MS_SYNC = 4
PROT_READ_WRITE, MAP_PRIVATE_FIXED = 3, 0x02 | 0x10


class SampleLog:
    """The samples of one rank in one window.

    Each column is an attribute: a view of shape (capacity,), int64, into one mapped array. Columns
    that were not asked for are absent, so that a loop which stores into one fails at its first row.

    Attributes:
        columns: names of the columns, in file order.
        rows: shape (capacity, len(columns)), int64; the mapped array itself.
        ended: one number, the rows of the groups that have ended; another thread may read it.
        idle: one truth, whether the loop waits with nothing in flight; likewise.
        token_ns: shape (capacity, most tokens), int64, ns, a stamp per token of each row, 0 behind
            the last one; None where tokens are not recorded.
        used: one number, the rows that have a sample; under central dispatch they come one by one.
    """

    index: Array
    scheduled: Array
    ready: Array
    issued: Array
    started: Array
    finished: Array
    completed: Array
    device: Array
    count: Array
    tokens: Array
    first_token: Array
    served_by: Array
    query: Array

    def __init__(self, rows: Array, columns: Sequence[str]) -> None:
        self.columns = tuple(columns)
        self.rows = rows
        self.ended, self.idle, self.used = [0], [False], [len(rows)]
        self.token_ns: Array | None = None
        self._files: list[tuple[mmap.mmap, Path]] = []
        for position, name in enumerate(self.columns):
            setattr(self, name, rows[:, position])

    @property
    def capacity(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @classmethod
    def in_memory(cls, capacity: int, columns: Sequence[str]) -> SampleLog:
        """Make a log without a file, for warm-up and for measuring the harness.

        Args:
            capacity: rows.
            columns: names out of ``COLUMNS``.
        """
        rows = np.zeros((capacity, len(columns)), np.int64)
        return cls(rows, columns)._cleared()

    @classmethod
    def create(cls, path: Path, capacity: int, columns: Sequence[str]) -> SampleLog:
        """Make a log whose rows are a file, every block of it allocated and touched.

        A sparse mapped file dies by SIGBUS when the disk fills up; an allocated one cannot.

        Args:
            path: the ``.npy`` to make; must not exist.
            capacity: rows.
            columns: names out of ``COLUMNS``.

        Raises:
            UsageError: the disk has no room, or the file cannot be made; the sentence names the
                size and what to change.
        """
        rows, mapped = _mapped_rows(path, capacity, len(columns))
        log = cls(rows, columns)._cleared()
        log._files.append((mapped, path))
        return log

    def record_tokens(self, path: Path, most: int) -> None:
        """Make room for a stamp per token, in a file of its own, as ``create`` makes the rows.

        Args:
            path: the ``.npy`` to make; must not exist.
            most: tokens of a row at most.

        Raises:
            UsageError: as ``create``.
        """
        self.token_ns, mapped = _mapped_rows(path, self.capacity, most)
        self.token_ns[:] = 0  # touched here, not in the window
        self._files.append((mapped, path))

    def freeze(self) -> None:
        """Keep what the file holds now, while the loop, which nobody can stop, goes on storing.

        Each shared mapping is replaced in place by a private one of the same file: every later
        store goes to a copy of its page in memory. Used when a run ends early, by the side thread.

        Raises:
            OSError: the file cannot be mapped again.
        """
        libc = ctypes.CDLL(None, use_errno=True)
        libc.mmap.restype = ctypes.c_void_p
        for mapped, path in self._files:
            start = np.frombuffer(mapped, np.uint8).ctypes.data
            fd = os.open(path, os.O_RDWR)
            try:
                new = libc.mmap(
                    ctypes.c_void_p(start),
                    ctypes.c_size_t(len(mapped)),
                    PROT_READ_WRITE,
                    MAP_PRIVATE_FIXED,
                    fd,
                    ctypes.c_long(0),
                )
            finally:
                os.close(fd)
            if new != start:
                code = ctypes.get_errno()
                raise OSError(code, os.strerror(code))

    def _cleared(self) -> SampleLog:
        self.rows[:] = 0
        if "completed" in self.columns:
            self.completed[:] = PENDING
        return self

    def cells(self) -> dict[str, memoryview]:
        """Return each column as a memoryview by name: the quickest way to store one element."""
        return {name: memoryview(getattr(self, name)) for name in self.columns}

    def flush(self, first_row: int, last_row: int) -> None:
        """Write finished rows to the disk and wait for it; call from a thread of its own.

        Only rows behind the loop are written: the pages ahead stay dirty and mapped, so the loop
        takes no page fault for them.

        Args:
            first_row: first row to write.
            last_row: one past the last row to write.

        Raises:
            OSError: the disk refused the data.
        """
        if last_row <= first_row or self.capacity == 0:
            return
        width = self.rows.strides[0]
        base = self.rows.ctypes.data
        begin = base + first_row * width
        begin -= begin % mmap.PAGESIZE
        length = base + last_row * width - begin
        libc = ctypes.CDLL(None, use_errno=True)
        # ctypes lets go of the interpreter lock here, which mmap.flush does not in every Python.
        if libc.msync(ctypes.c_void_p(begin), ctypes.c_size_t(length), MS_SYNC) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code))


def _mapped_rows(path: Path, rows: int, columns: int) -> tuple[Array, mmap.mmap]:
    """Map a new ``.npy`` file of int64 zeros, every block of it allocated."""
    header = _npy_header(rows, columns)
    size = len(header) + 8 * rows * columns
    try:
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    except OSError as error:
        raise UsageError(f"{path} cannot be made: {error.strerror}") from error
    try:
        os.posix_fallocate(fd, 0, size)
        os.pwrite(fd, header, 0)
        mapped = mmap.mmap(fd, size)
    except (OSError, OverflowError) as error:
        path.unlink(missing_ok=True)
        if getattr(error, "errno", errno.EFBIG) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise UsageError(
                f"{path.parent} has no room for {rows} samples ({size / 1e6:.1f} MB): "
                "free space there, choose another --output-dir or fewer samples "
                "(--num-samples, --duration)"
            ) from error
        raise UsageError(f"{path} cannot be allocated: {error}") from error
    finally:
        os.close(fd)
    return np.frombuffer(mapped, np.int64, offset=len(header)).reshape(rows, columns), mapped


def fail_rest(log: SampleLog) -> None:
    """Mark the groups in flight as failed after an exception out of the SUT."""
    log.completed[(log.count > 0) & (log.completed == PENDING)] = FAILED


def spread_column(rows: Array, columns: Sequence[str], name: str) -> Array:
    """Return one column for every sample, a group's stamp copied from its first row to the rest.

    ``index``, ``scheduled``, ``tokens`` and ``first_token`` belong to each sample and are returned
    as they stand; ``count`` and ``device`` belong to the group and stay in its first row.

    Args:
        rows: shape (n, len(columns)), int64; not changed.
        columns: names of the columns; ``count`` and ``completed`` among them.
        name: the column to return.

    Returns:
        Shape (n,), int64, a copy.
    """
    column: Array = rows[:, list(columns).index(name)].copy()
    if name not in SPREAD:
        return column
    count = rows[:, list(columns).index("count")]
    ended = rows[:, list(columns).index("completed")] != PENDING
    firsts = np.flatnonzero(ended & (count > 1))
    lengths = np.minimum(count[firsts], len(rows) - firsts)
    sources = np.repeat(firsts, lengths)
    targets = sources + np.arange(len(sources)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    column[targets] = column[sources]
    return column


def _npy_header(rows: int, columns: int) -> bytes:
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        buffer, {"descr": "<i8", "fortran_order": False, "shape": (rows, columns)}
    )
    return buffer.getvalue()


def npy_bytes(rows: Array) -> bytes:
    """Return the ``.npy`` file of ``rows``, byte for byte as ``SampleLog.create`` lays it out."""
    return _npy_header(*rows.shape) + np.ascontiguousarray(rows, "<i8").tobytes()


def read_rows(path: Path, columns: Sequence[str]) -> Array:
    """Read a rank's samples.

    Args:
        path: a ``samples.npy``.
        columns: the columns it should have.

    Returns:
        Shape (n, len(columns)), int64; mapped copy-on-write, so the file is never changed.

    Raises:
        UsageError: the file is absent, cut short, or not of that shape.
    """
    try:
        rows = np.lib.format.open_memmap(path, mode="c")  # never unpickles
    except Exception as error:  # a damaged header raises a dozen kinds out of numpy
        raise UsageError(f"{path} cannot be read: {error}") from error
    if rows.dtype != np.dtype("<i8") or rows.ndim != 2 or rows.shape[1] != len(columns):
        raise UsageError(
            f"{path} holds {rows.dtype} of shape {rows.shape}, not int64 rows of {len(columns)} "
            "columns: it is not the samples file that this folder's rank.json describes"
        )
    return np.asarray(rows)
