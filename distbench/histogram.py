"""Log-linear histograms of int64: a fixed relative error, merged by adding.

An octave of values (2**e up to 2**(e + 1)) is cut into 2**sub_bits equal buckets, so that a
bucket is never wider than 2**-sub_bits of the values in it. That is how a float64 is written, and
so the top of its bits is the number of the bucket.

Source: the idea is that of HdrHistogram (hdrhistogram.org, "fixed relative precision").
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

SUB_BITS = 10
"""Of a LogHistogram: the middle of a bucket is within 2**-11 of every value in it."""
MOST_SUB_BITS = 42
CHUNK = 65_536
"""Values that are looked at together: temporaries of half a MiB each, which stay in the cache."""
MAX_VALUE = 2**63 - 1
_MANTISSA, _ONE = 52, 1023
"""Of a float64: bits of the mantissa, and the exponent field of 1.0."""


def bucket_count(sub_bits: int) -> int:
    """Return how many buckets there are: one for 0, and 63 octaves."""
    return (63 << sub_bits) + 1


def buckets(values: Ints, sub_bits: int, first: int = 0) -> Ints:
    """Return the bucket of each value: 0 for 0, then rising with the value.

    Args:
        values: shape (n,), int64, none negative.
        sub_bits: an octave has 2**sub_bits buckets; at most ``MOST_SUB_BITS``.
        first: number of the bucket to count from, below which there is no value.

    Returns:
        Shape (n,), int64, each below ``bucket_count(sub_bits) - first``.
    """
    if values.max(initial=0) >= 1 << (_MANTISSA + 1):
        # A float64 holds 53 bits: without the last ten of 63 nothing is rounded into the bucket
        # above, and a value so large is in a bucket of at least 2**11.
        values = np.where(values >> (_MANTISSA + 1), values & -1024, values)
    bits = values.astype(np.float64).view(np.int64)
    bits >>= _MANTISSA - sub_bits
    bits -= (_ONE << sub_bits) - 1 + first
    # As a float64, 0 is 1023 octaves below 1.
    return bits if first else np.maximum(bits, 0, out=bits)


def bucket_start(number: int, sub_bits: int) -> int:
    """Return the smallest value of a bucket.

    Where an octave has fewer whole numbers than buckets, some buckets are empty: they start where
    the next one does.

    Args:
        number: 0 .. bucket_count(sub_bits); the last is that of 2**63.
        sub_bits: as in ``buckets``.
    """
    if number == 0:
        return 0
    octave, part = divmod(number - 1, 1 << sub_bits)
    return -(-((1 << sub_bits) + part << octave) >> sub_bits)


def chunks(values: Ints) -> Iterator[Ints]:
    """Yield the values in pieces of at most ``CHUNK``, without copying."""
    for begin in range(0, len(values), CHUNK):
        yield values[begin : begin + CHUNK]


@dataclass(eq=False)
class LogHistogram:
    """How many values lie in each log-linear bucket; 504 KiB whatever was added.

    Counts are whole numbers: adding values and merging give the same bits in any order. Values
    below 2048 have a bucket each.

    Attributes:
        counts: shape (64513,), int64; ``bucket_start`` says what each stands for.
    """

    counts: Ints = field(default_factory=lambda: np.zeros(bucket_count(SUB_BITS), np.int64))

    def add(self, values: Ints) -> None:
        """Count values.

        Args:
            values: shape (n,), int64, each 0 .. 2**63 - 1; unchanged.

        Raises:
            ValueError: a value is negative; nothing was added.
        """
        if values.min(initial=0) < 0:
            raise ValueError(f"{values.min()} is negative; a histogram takes 0 .. 2**63 - 1")
        for chunk in chunks(values):
            found = np.bincount(buckets(chunk, SUB_BITS))
            self.counts[: len(found)] += found

    def merged(self, other: LogHistogram) -> LogHistogram:
        """Return a histogram of the values of both."""
        return LogHistogram(self.counts + other.counts)

    @property
    def total(self) -> int:
        """How many values were added."""
        return int(self.counts.sum())

    def value_at(self, k: int) -> int:
        """Return the value at zero-based position ``k`` of the sorted values, within 2**-11 of it.

        Args:
            k: 0 .. total - 1; LoadGen's rank of a quantile q is ``int(total * q)``.

        Returns:
            The middle of the bucket that holds it; the value itself below 2048.

        Raises:
            ValueError: there is no such position.
        """
        reached = np.cumsum(self.counts)
        if not 0 <= k < reached[-1]:
            raise ValueError(f"position {k} is not one of {reached[-1]} values")
        number = int(np.searchsorted(reached, k, side="right"))
        low, end = bucket_start(number, SUB_BITS), bucket_start(number + 1, SUB_BITS)
        return low + (end - low) // 2


@dataclass(frozen=True)
class LogRange:
    """Log-linear buckets over a range of values: ``size`` of them, from number ``first`` on.

    Log-linear, since latencies may reach over decades, and most of them lie close together.
    """

    sub_bits: int
    first: int
    size: int

    @staticmethod
    def between(low: int, high: int, most: int) -> LogRange:
        """Return the finest buckets for values from ``low`` to ``high``.

        Args:
            low: the smallest value, not negative.
            high: the largest.
            most: how many buckets there may be; at least 64.
        """
        for sub_bits in range(MOST_SUB_BITS, -1, -1):
            first, last = buckets(np.array([low, high]), sub_bits).tolist()
            if last - first < most:
                break
        return LogRange(sub_bits, first, last - first + 1)

    def start_of(self, number: int) -> int:
        """Return the smallest value of a bucket; 0 is the first one's number."""
        return bucket_start(self.first + number, self.sub_bits)

    def numbers(self, values: Ints) -> Ints:
        """Return the bucket of each value, all of which lie in the range."""
        return buckets(values, self.sub_bits, self.first)

    def counts(self, samples: Ints) -> Ints:
        """Count samples in each bucket; shape (size,), int64."""
        counts = np.zeros(self.size, np.int64)
        for chunk in chunks(samples):
            found = np.bincount(self.numbers(chunk))
            counts[: len(found)] += found
        return counts

    def sharing(self, values: Sequence[int], samples: Ints, counts: Ints) -> Ints:
        """Return the samples that share a bucket with one of the values, in a new array.

        Args:
            values: any, in the range.
            samples: shape (n,), int64.
            counts: of these samples, as ``counts`` gives them.
        """
        wanted = np.zeros(self.size, bool)
        wanted[self.numbers(np.array(values, np.int64))] = True
        found, at = np.empty(int(counts[wanted].sum()), np.int64), 0
        for chunk in chunks(samples if len(found) else samples[:0]):
            taken = chunk[np.flatnonzero(wanted.take(self.numbers(chunk)))]
            found[at : at + len(taken)] = taken
            at += len(taken)
        return found
