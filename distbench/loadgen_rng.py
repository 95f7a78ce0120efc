"""LoadGen's random streams, bit for bit: which samples it issues, and in which order.

LoadGen draws from ``std::mt19937`` through the C++ standard library's distributions. The standard
fixes the generator, not the distributions, so the order of samples depends on the library that a
LoadGen was built with; a record therefore names the variant:

- ``libstdcxx-lemire``: libstdc++ of GCC 11 and later (Lemire, "Fast random integer generation in
  an interval", ACM TOMACS 29, 2019). LoadGen's wheels from 6.0 on.
- ``libstdcxx-reject``: libstdc++ up to GCC 10: division into equal buckets. LoadGen's 5.0 wheels.

Times of arrival (``arrivals.py``) are the same in both.

Source:
    the order of draws: mlcommons/inference, loadgen/loadgen.cc, ``GenerateQueries`` and
    ``GenerateLoadableSets``, in mlcommons-loadgen 5.0.13 and 6.0.17; the distributions: libstdc++,
    bits/uniform_int_dist.h, bits/stl_algo.h, bits/random.tcc.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from distbench.errors import UsageError

Order = NDArray[np.int64]

LEMIRE, REJECT = "libstdcxx-lemire", "libstdcxx-reject"
VARIANTS = (LEMIRE, REJECT)
WHOLE, CAPPED = "whole", "capped"
SUBSETS = (WHOLE, CAPPED)
"""How the resident samples are chosen: out of all (LoadGen 5.x), or the first ones (6.x)."""

_RANGE = 1 << 32
_LAST = _RANGE - 1
_LEAST_BLOCK = 1024


class Stream:
    """One ``std::mt19937`` and what LoadGen draws from it.

    Args:
        seed: a 64-bit seed of a round; the engine takes it modulo 2**32.
        variant: one of ``VARIANTS``.

    Raises:
        UsageError: the variant is unknown.

    Source:
        the engine and its seeding: ISO C++17, [rand.eng.mers] 29.6.3.2.
    """

    def __init__(self, seed: int, variant: str = LEMIRE) -> None:
        if variant not in VARIANTS:
            raise UsageError(f"random variant {variant!r} is not one of {', '.join(VARIANTS)}")
        key = np.empty(624, np.uint32)
        word = seed % _RANGE
        for i in range(624):
            key[i] = word
            word = (1812433253 * (word ^ (word >> 30)) + i + 1) % _RANGE
        self.variant = variant
        self._engine = np.random.MT19937()
        self._engine.state = {"bit_generator": "MT19937", "state": {"key": key, "pos": 624}}
        self._ahead: list[int] = []

    def raw(self, count: int) -> NDArray[np.uint64]:
        """Draw ``count`` outputs of the engine: shape (count,), uint64, each below 2**32."""
        held = np.array(self._ahead[::-1][:count], np.uint64)
        del self._ahead[len(self._ahead) - len(held) :]
        fresh = np.asarray(self._engine.random_raw(count - len(held)), np.uint64)
        return np.concatenate((held, fresh))

    def _next(self) -> int:
        if not self._ahead:
            self._ahead = self.raw(_LEAST_BLOCK)[::-1].tolist()
        return self._ahead.pop()

    def below(self, bound: int) -> int:
        """Draw one integer from 0 .. bound-1; ``bound`` is in 1 .. 2**32-1."""
        if self.variant == REJECT:
            width = _LAST // bound
            while (drawn := self._next()) >= bound * width:
                pass
            return drawn // width
        product = self._next() * bound
        if product & _LAST < bound:
            # The division is only made where it can matter: that is the point of the method.
            least = (_RANGE - bound) % bound
            while product & _LAST < least:
                product = self._next() * bound
        return product >> 32

    def many_below(self, bound: int, count: int) -> Order:
        """Draw ``count`` integers from 0 .. bound-1, as ``count`` calls of ``below`` would.

        Returns:
            Shape (count,), int64.
        """
        parts, wanted = [np.empty(0, np.int64)], count
        while wanted > 0:
            # Never more than are wanted: what follows in the stream belongs to the next draw.
            drawn = self.raw(wanted)
            if self.variant == REJECT:
                width = _LAST // bound
                kept = drawn[drawn < bound * width] // np.uint64(width)
            else:
                product = drawn * np.uint64(bound)
                least = (_RANGE - bound) % bound
                kept = product[(product & np.uint64(_LAST)) >= least] >> np.uint64(32)
            parts.append(kept.astype(np.int64))
            wanted -= len(kept)
        return np.concatenate(parts)

    def shuffle(self, items: list[int]) -> None:
        """Shuffle a list in place as ``std::shuffle`` does.

        While the square of the length fits into 32 bits, one draw gives the places of two swaps.
        """
        size = len(items)
        if size == 0:
            return
        below = self.below
        if _LAST // size < size:
            for i in range(1, size):
                j = below(i + 1)
                items[i], items[j] = items[j], items[i]
            return
        i = 1
        if size % 2 == 0:
            j = below(2)
            items[1], items[j] = items[j], items[1]
            i = 2
        while i < size:
            j, k = divmod(below((i + 1) * (i + 2)), i + 2)
            items[i], items[j] = items[j], items[i]
            items[i + 1], items[k] = items[k], items[i + 1]
            i += 2

    def exponential(self, count: int, rate: float) -> NDArray[np.float64]:
        """Draw from the exponential distribution.

        Args:
            count: how many.
            rate: its rate, 1/s; above 0.

        Returns:
            Shape (count,), float64, s.
        """
        drawn = self.raw(2 * count).astype(np.float64)
        unit = (drawn[0::2] + drawn[1::2] * 2.0**32) / 2.0**64
        left = 1.0 - np.minimum(unit, np.nextafter(1.0, 0.0))
        # The C library's logarithm, which LoadGen calls: numpy's own may differ in the last bit.
        return np.array([-math.log(x) for x in left.tolist()], np.float64) / rate


def loadable_set(
    total: int, resident: int, qsl_seed: int, variant: str = LEMIRE, subset: str = WHOLE
) -> Order:
    """Return the samples that LoadGen loads for a performance run, in its order.

    Args:
        total: samples of the dataset: indices are 0 .. total-1.
        resident: how many fit in memory at once (``performance_sample_count``).
        qsl_seed: ``qsl_rng_seed`` of the round.
        variant: one of ``VARIANTS``.
        subset: one of ``SUBSETS``: LoadGen 5.x shuffles all and takes the first ``resident``
            ("whole"), 6.x shuffles only the indices below ``resident`` ("capped").

    Returns:
        Shape (min(total, resident),), int64.

    Raises:
        UsageError: no samples, or an unknown variant or subset.
    """
    if subset not in SUBSETS:
        raise UsageError(f"subset {subset!r} is not one of {', '.join(SUBSETS)}")
    if total < 1 or resident < 1:
        raise UsageError(f"{resident} of {total} samples are none: at least 1 must be loaded")
    items = list(range(total if subset == WHOLE else min(total, resident)))
    Stream(qsl_seed, variant).shuffle(items)
    return np.array(items[:resident], np.int64)


def sample_order(
    loaded: Order,
    queries: int,
    least: int,
    seed: int,
    variant: str = LEMIRE,
    equal_issue: bool = False,
) -> Order:
    """Return which samples LoadGen's Server and SingleStream queries carry, in order of issue.

    Args:
        loaded: from ``loadable_set``.
        queries: how many to return.
        least: LoadGen's minimum query count, not padded; it fixes how many draws come first, and
            with equal issue also after how many queries the order repeats. In SingleStream with
            equal issue that is ``arrivals.single_stream_queries``.
        seed: ``sample_index_rng_seed`` of the round.
        variant: one of ``VARIANTS``.
        equal_issue: every sample as often as any other (``sample_concatenate_permutation``).

    Returns:
        Shape (queries,), int64, sample indices.

    Raises:
        UsageError: equal issue with a ``least`` of 0, for which LoadGen has no order.
    """
    stream, permutations = _begin(seed, variant, len(loaded), 1, least, len(loaded))
    if not equal_issue:
        return loaded[stream.many_below(len(loaded), queries)]
    if queries > 0 and len(permutations) == 0:
        raise UsageError("equal issue needs a minimum query count of at least 1")
    return loaded[np.resize(permutations, queries)]


def multistream_order(
    loaded: Order,
    queries: int,
    least: int,
    seed: int,
    variant: str = LEMIRE,
    samples_per_query: int = 8,
) -> Order:
    """Return which samples LoadGen's MultiStream queries carry: neighbours in the loaded set.

    LoadGen appends the set's first samples to it so that each sample can begin a query. Equal issue
    changes only how many queries there are.

    Args:
        loaded: from ``loadable_set``.
        queries: how many to return.
        least: LoadGen's minimum query count, not padded.
        seed: ``sample_index_rng_seed`` of the round.
        variant: one of ``VARIANTS``.
        samples_per_query: samples that are issued together.

    Returns:
        Shape (queries, samples_per_query), int64, sample indices.
    """
    stride = samples_per_query
    padded = len(loaded) + stride - 1
    stream, _ = _begin(seed, variant, len(loaded), stride, least, padded)
    first = stream.many_below(len(loaded), queries)
    places: Order = (first[:, None] + np.arange(stride)) % len(loaded)
    return loaded[places]


def offline_order(
    loaded: Order, samples: int, seed: int, variant: str = LEMIRE, equal_issue: bool = False
) -> Order:
    """Return which samples LoadGen's one Offline query carries.

    Args:
        loaded: from ``loadable_set``.
        samples: how many; with equal issue a multiple of the set (``arrivals.offline_samples``).
        seed: ``sample_index_rng_seed`` of the round.
        variant: one of ``VARIANTS``.
        equal_issue: each repetition of the set is shuffled.

    Returns:
        Shape (samples,), int64, sample indices.

    Raises:
        UsageError: equal issue, and ``samples`` is not a multiple of the set.
    """
    if not equal_issue:
        return np.resize(loaded, samples)
    if samples % len(loaded):
        raise UsageError(
            f"{samples} samples are not a multiple of the {len(loaded)} in the set, which equal "
            "issue needs"
        )
    stream, _ = _begin(seed, variant, len(loaded), 1, 1, len(loaded))
    parts = [loaded.tolist() for _ in range(samples // len(loaded))]
    for part in parts:
        stream.shuffle(part)
    return np.array(parts, np.int64).reshape(-1)


def _begin(
    seed: int, variant: str, size: int, stride: int, least: int, permuted: int
) -> tuple[Stream, Order]:
    """Make the draws that LoadGen makes before the first query, used or not.

    Returns:
        The stream after them, and the concatenated permutations for equal issue.
    """
    stream = Stream(seed, variant)
    # For runs that issue each sample once.
    stream.shuffle(list(range(0, size, stride)))
    items, parts = list(range(permuted)), [np.empty(0, np.int64)]
    for _ in range(0, least, permuted):
        # Each permutation starts from the one before.
        stream.shuffle(items)
        parts.append(np.array(items, np.int64))
    return stream, np.concatenate(parts)
