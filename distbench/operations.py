"""The operations that ``collectives`` measures: sizes, bandwidths, contents, how often each runs.

Sizes and bandwidths are those of nccl-tests (doc/PERFORMANCE.md, and ``GetCollByteCount`` of each
operation, read 2026-11-26), so that a figure can be held against what nccl-tests prints.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from distbench.cli import nearest
from distbench.errors import UsageError
from distbench.student import t_quantile

Ints = NDArray[np.int64]

UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
LARGEST = 1 << 30
"""Bytes: an operation holds up to three buffers of its size on every rank."""
CONFIDENCE = 0.95
STEP = 4
"""Between the sizes of a range."""
ITEM_BYTES = {"fp32": 4, "fp16": 2, "bf16": 2}
EXACT = {"fp32": 1 << 24, "fp16": 1 << 11, "bf16": 1 << 8}
"""Whole numbers up to here are exact in each type, and so is a sum that stays below."""
WIDEST = 1021
"""Largest modulus of the contents: their period is then far below a buffer's size."""
BACK_TO_BACK, SPACED = "back_to_back", "spaced"

LEAST_BLOCKS, MOST_BLOCKS, WARM_PART = 12, 40, 4
"""The first one of so many blocks only warms: after the pause before a cell, a host whose ranks
share processors with the backend's threads takes a hundred ms to find its pace."""
LEAST_SPACED, MOST_SPACED = 10, 200
MOST_TIMES = 20_000
ROOM = 3.0
"""A lone repetition's window over its expected time, so that one that overran is caught up with."""
LATE_NS, LATE_SHARE = 10_000, 0.01
"""A repetition counts only if every rank began within 10 us of the agreed instant, or, where that
is more, within 1 % of the time it is expected to take: a rank that spins over the instant is below
1 us late, one that the scheduler held back hundreds."""


@dataclass(frozen=True)
class Operation:
    """What one operation is.

    Attributes:
        name: torch's, without ``_into_tensor`` and the like.
        size: what its size in bytes counts.
        shared: whether each rank has an n-th of the size in its smaller buffer.
        reduces: whether elements of all ranks are summed.
    """

    name: str
    size: str
    shared: bool = False
    reduces: bool = False

    def factor(self, ranks: int) -> float:
        """Return busbw / algbw for a number of ranks."""
        if self.name == "all_reduce":
            return 2 * (ranks - 1) / ranks
        return (ranks - 1) / ranks if self.shared else 1.0


OPERATIONS = {
    each.name: each
    for each in (
        Operation("all_reduce", "each rank's buffer, summed in place", reduces=True),
        Operation("all_gather", "what each rank has received at the end", shared=True),
        Operation(
            "reduce_scatter", "what each rank puts in; it gets an n-th", shared=True, reduces=True
        ),
        Operation("broadcast", "the buffer of rank 0, the root"),
        Operation(
            "send_recv",
            "what each rank sends to the next one, and at once receives from the one before, in a "
            "ring; both are posted before either is waited for",
        ),
    )
}


@dataclass(frozen=True)
class Asked:
    """What is to be measured, alike on all ranks.

    Attributes:
        operations: names out of ``OPERATIONS``.
        sizes: bytes, ascending.
        dtype: of the elements.
        duration_ns: about how long each operation and size is measured.
        repetitions: of the spaced ones; None: as many as the duration holds.
    """

    operations: tuple[str, ...]
    sizes: tuple[int, ...]
    dtype: str = "fp32"
    duration_ns: int = 400_000_000
    repetitions: int | None = None

    def __post_init__(self) -> None:
        for name in self.operations or ("",):
            if name not in OPERATIONS:
                listed = ", ".join(OPERATIONS)
                raise UsageError(
                    f"operation {name!r} is none of {listed}{nearest(name, [*OPERATIONS])} "
                    "(--operations)"
                )
        if not self.sizes or min(self.sizes) < 1 or max(self.sizes) > LARGEST:
            raise UsageError(f"sizes {list(self.sizes)} are not 1 B to {size_text(LARGEST)}")
        if self.dtype not in ITEM_BYTES:
            listed = ", ".join(ITEM_BYTES)
            raise UsageError(f"dtype {self.dtype!r} is not one of {listed} (--dtype)")
        if self.duration_ns <= 0 or (self.repetitions is not None and self.repetitions < 1):
            raise UsageError("the duration and the number of repetitions must be above zero")


def size_bytes(text: str) -> int:
    """Read a size such as "8B", "64KiB" or "256MiB"; returns bytes.

    Raises:
        UsageError: no number, another unit, or zero.

    Example:
        >>> size_bytes("64KiB")
        65536
    """
    match = re.fullmatch(r"(\d+)\s*([A-Za-z]*)", text.strip())
    unit = match.group(2) if match else ""
    if not match or unit not in UNITS or int(match.group(1)) == 0:
        raise UsageError(f"{text!r} is no size: give a number with B, KiB, MiB or GiB, as 64KiB")
    return int(match.group(1)) * UNITS[unit]


def read_sizes(text: str) -> tuple[int, ...]:
    """Read sizes separated by commas, and ranges in steps of ``STEP`` that include both ends.

    Raises:
        UsageError: one cannot be read, or a range runs downwards.

    Example:
        >>> read_sizes("8B,1KiB..100KiB")
        (8, 1024, 4096, 16384, 65536, 102400)
    """
    found: set[int] = set()
    for part in text.split(","):
        first, dots, last = part.partition("..")
        low = high = size_bytes(first)
        if dots:
            high = size_bytes(last)
        if high < low:
            raise UsageError(
                f"the sizes {part.strip()!r} run downwards: give the smaller one first"
            )
        if high > LARGEST:
            raise UsageError(f"{part.strip()!r} is above the largest size, {size_text(LARGEST)}")
        found.add(high)
        while low < high:
            found.add(low)
            low *= STEP
    return tuple(sorted(found))


def size_text(count: int) -> str:
    """Write a size in the largest unit that divides it.

    Example:
        >>> size_text(65536), size_text(1000)
        ('64 KiB', '1000 B')
    """
    unit = max((each for each in UNITS if count % UNITS[each] == 0), key=lambda each: UNITS[each])
    return f"{count // UNITS[unit]} {unit}"


@dataclass(frozen=True)
class Part:
    """One operation at one size.

    Attributes:
        operation: its name.
        bytes: its size, as nccl-tests counts it.
        elements: of a rank's smaller buffer.
    """

    operation: str
    bytes: int
    elements: int


def parts(asked: Asked, ranks: int) -> list[Part]:
    """Return what is measured, in order; every rank has an element at least, so a size may grow.

    Args:
        asked: by the user.
        ranks: how many.
    """
    found = []
    for name in dict.fromkeys(asked.operations):
        item = ITEM_BYTES[asked.dtype] * (ranks if OPERATIONS[name].shared else 1)
        for elements in dict.fromkeys(max(1, size // item) for size in asked.sizes):
            found.append(Part(name, elements * item, elements))
    return found


@dataclass(frozen=True)
class Cell:
    """One operation at one size in one mode, fixed before the window.

    Attributes:
        operation: its name.
        bytes: its size.
        elements: of a rank's smaller buffer.
        mode: ``BACK_TO_BACK`` or ``SPACED``.
        times: operations of a repetition, one after the other between its two stamps.
        repetitions: blocks, of which each follows the one before, or lone operations, each from an
            agreed instant of its own.
        warm: of the blocks the first ones, which do not count.
        window_ns: from one such instant to the next; 0 where blocks have one instant.
        settle_ns: what a rank needs before it can begin at an instant.
        late_ns: a repetition counts if no rank began later than this after the instant.
        expected_ns: of one operation, by what the slowest rank showed before.
    """

    operation: str
    bytes: int
    elements: int
    mode: str
    times: int
    repetitions: int
    warm: int
    window_ns: int
    settle_ns: int
    late_ns: int
    expected_ns: int


def cells_of(part: Part, asked: Asked, expected_ns: int, between_ns: int) -> list[Cell]:
    """Return the cells of an operation at a size: how often it runs in each mode, how far apart.

    Args:
        part: the operation and its size.
        asked: by the user.
        expected_ns: of one operation, agreed by all ranks.
        between_ns: what a rank needs between two repetitions, agreed likewise.
    """
    half_ns, expected_ns = asked.duration_ns / 2, max(expected_ns, 1)
    blocks = min(max(int(half_ns / expected_ns), LEAST_BLOCKS), MOST_BLOCKS)
    times = min(max(int(half_ns / blocks / expected_ns), 1), MOST_TIMES)
    window_ns = int(ROOM * expected_ns) + between_ns
    spaced = asked.repetitions or min(max(int(half_ns / window_ns), LEAST_SPACED), MOST_SPACED)
    block_ns = times * expected_ns
    return [
        Cell(
            part.operation,
            part.bytes,
            part.elements,
            BACK_TO_BACK,
            times,
            blocks,
            blocks // WARM_PART,
            0,
            between_ns,
            late_limit_ns(block_ns),
            expected_ns,
        ),
        Cell(
            part.operation,
            part.bytes,
            part.elements,
            SPACED,
            1,
            spaced,
            0,
            window_ns,
            between_ns,
            late_limit_ns(expected_ns),
            expected_ns,
        ),
    ]


def late_limit_ns(expected_ns: int) -> int:
    """Return by how much a rank may be late for a repetition that takes so long."""
    return max(LATE_NS, int(LATE_SHARE * expected_ns))


# Contents


def modulus(dtype: str, ranks: int) -> tuple[int, int]:
    """Return how large contents may be so that their sum is exact, and how many ranks lie between.

    Args:
        dtype: of the elements.
        ranks: how many.

    Returns:
        A prime, below which all contents lie, so that a shift by a power of two changes them; and
        the stride: of so many neighbouring ranks one alone has something other than 0.
    """
    most = EXACT[dtype]
    stride = math.ceil(2 * ranks / most)
    summed = math.ceil(ranks / stride)
    return _prime_up_to(max(3, min(WIDEST, most // summed + 1))), stride


def _prime_up_to(most: int) -> int:
    return next(n for n in range(most, 1, -1) if all(n % d for d in range(2, math.isqrt(n) + 1)))


def period(dtype: str, ranks: int) -> int:
    """Return after how many elements contents come again."""
    prime, stride = modulus(dtype, ranks)
    return math.lcm(prime, stride)


def contents(rank: int, ranks: int, dtype: str, salt: int, first: int, count: int) -> Ints:
    """Return what a rank puts in: it depends on the rank, on the element and on the salt.

    A wrong rank's, a shifted or an earlier buffer, and a sum that lacks a rank or has it twice,
    then differ in most elements.

    Args:
        rank: whose.
        ranks: how many.
        dtype: of the elements.
        salt: a number of the use, so that what an earlier one left is not taken for right.
        first: number of the first element.
        count: elements.

    Returns:
        Shape (count,), int64, from 0 to the modulus - 1.
    """
    prime, stride = modulus(dtype, ranks)
    place = np.arange(first, first + count, dtype=np.int64)
    # Neither factor is a multiple of the prime, whichever it is.
    values = (place + (prime // 3 + 1) * rank + prime // 2 * salt) % prime
    return np.where(place % stride == rank % stride, values, 0)


def summed(ranks: int, dtype: str, salt: int, first: int, count: int) -> Ints:
    """Return the sum of all ranks' contents; see ``contents``."""
    total: Ints = np.zeros(count, np.int64)
    for rank in range(ranks):
        total += contents(rank, ranks, dtype, salt, first, count)
    return total


@dataclass(frozen=True)
class Line:
    """A line through times.

    Attributes:
        alpha_s: time = alpha + beta * size, s.
        alpha_half_s: half of alpha's 95 % interval, s.
        beta_s: s per byte.
        r2: 1 - the squared errors / the squared distances from the mean.
        worst: the largest error of the line, relative to the time.
    """

    alpha_s: float
    alpha_half_s: float
    beta_s: float
    r2: float
    worst: float


def fit(sizes: Sequence[int], times_s: Sequence[float]) -> Line:
    """Fit time = alpha + beta * size by least squares.

    Args:
        sizes: bytes, three different ones at the least.
        times_s: of one operation at each, s.
    """
    size, time = np.asarray(sizes, np.float64), np.asarray(times_s, np.float64)
    middle = float(size.mean())
    spread = float(((size - middle) ** 2).sum())
    beta = float(((size - middle) * (time - time.mean())).sum()) / spread
    alpha = float(time.mean()) - beta * middle
    missed = time - alpha - beta * size
    squares, free = float((missed**2).sum()), len(size) - 2
    error = math.sqrt(squares / free * (1 / len(size) + middle**2 / spread))
    total = float(((time - time.mean()) ** 2).sum())
    return Line(
        alpha,
        t_quantile((1 + CONFIDENCE) / 2, free) * error,
        beta,
        1 - squares / total if total > 0 else 1.0,
        float(np.abs(missed / time).max()),
    )
