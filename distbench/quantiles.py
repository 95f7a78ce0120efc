"""Percentiles by LoadGen's rule: of one array, and of samples that stay on their ranks.

``select`` finds order statistics of all ranks' samples together, exactly, and moves counts in
place of samples. A histogram from the smallest to the largest says in which bracket each wanted one
lies; then brackets are cut into bins and counted again, until nothing is left to cut. All that
decides what comes next was reduced over the ranks, so all ranks do the same, whatever their own
samples are.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from distbench.histogram import MAX_VALUE, Ints, LogRange, chunks

RULE = "LoadGen's rule: sorted[int(n * p)]"
PASS_WORDS = 8192
"""Words of int64 that a rank sends in one pass at most: 64 KiB."""
RANKS_LIMIT = 64
"""Order statistics in one selection: each then has 128 words of a pass."""
PASSES = 6
"""Passes that no data can exceed if it is below 2**40 (18 min in ns) and 2**31 samples in all.

One pass tells the range. The next leaves brackets of at most 2**32 values, and each of four more
cuts them to 1/256: 128 words, two counts in each. Data up to 2**63 that is made to be hard at some
60 positions at once takes more, at most 12.
"""
LATE = (3, PASSES - 1)
"""After so many passes it is looked at whether cutting alone would end in time."""


def percentiles_ns(latency_ns: NDArray[np.int64], quantiles: Sequence[float]) -> list[int]:
    """Return latencies at quantiles, by LoadGen's rule.

    Each is a latency that was observed: the value at zero-based position ``int(n * p)`` of the
    sorted latencies, the product taken in double precision and cut. Nothing is interpolated. Where
    n * p is whole this is one sample above textbook nearest rank, so it never flatters the system.

    Args:
        latency_ns: shape (n,), int64, ns; any order; unchanged.
        quantiles: each in [0, 1).

    Returns:
        The latencies, ns, in the order of ``quantiles``.

    Raises:
        ValueError: ``latency_ns`` is empty or a quantile is outside [0, 1).

    Example:
        >>> percentiles_ns(np.arange(1, 101), [0.5, 0.99])
        [51, 100]

    Source:
        mlcommons/inference, loadgen/results.cc, lines 36-43 at b66003e.
    """
    if len(latency_ns) == 0:
        raise ValueError("percentiles of no latencies")
    if any(not 0 <= q < 1 for q in quantiles):
        raise ValueError(f"quantiles {list(quantiles)} are not all in [0, 1)")
    places = [int(len(latency_ns) * q) for q in quantiles]
    ordered = np.partition(latency_ns, sorted(set(places)))
    return [int(ordered[place]) for place in places]


@dataclass(frozen=True)
class Selection:
    """Order statistics of the samples of all ranks.

    Attributes:
        values: in the order in which they were asked for; each is a sample of some rank.
        count: samples of all ranks together.
        passes: reductions that it took.
        sent_bytes: what this rank handed to them, the same on each.
    """

    values: tuple[int, ...]
    count: int
    passes: int
    sent_bytes: int


Reduce = Callable[[Ints], Ints]
Step = tuple[Literal["sum", "max"], Ints]
Ranks = Sequence[int] | Callable[[int], Sequence[int]]


def select(samples: Ints, ranks: Ranks, all_sum: Reduce, all_max: Reduce) -> Selection:
    """Find order statistics of the samples of all ranks; every rank calls it.

    Args:
        samples: shape (n,), int64, each 0 .. 2**63 - 1, any order; unchanged. Of this rank: other
            ranks may have more, fewer or none.
        ranks: zero-based positions in the sorted samples of all ranks, at most ``RANKS_LIMIT``; or
            a function that gives them for the number of samples of all ranks, such as
            ``lambda n: [int(n * q) for q in (0.5, 0.99)]``. The same on every rank.
        all_sum: gives every rank the elementwise sum over all ranks; may overwrite what it gets.
        all_max: likewise the maximum.

    Returns:
        The values, the same on every rank.

    Raises:
        ValueError: a sample of any rank is negative, a position does not exist, or there are too
            many; on every rank alike, after the same reductions.
    """
    steps = selection(samples, ranks)
    try:
        how, words = next(steps)
        while True:
            how, words = steps.send(all_sum(words) if how == "sum" else all_max(words))
    except StopIteration as end:
        found: Selection = end.value
        return found


def selection(samples: Ints, ranks: Ranks) -> Generator[Step, Ints, Selection]:
    """Select as ``select`` does, and leave the reductions to the caller.

    Memory: at most one copy of the samples, where all of them are equal to wanted ones or nearly;
    mostly a few percent of it.

    Args:
        samples: as for ``select``.
        ranks: as for ``select``.

    Yields:
        How to reduce ("sum" or "max"), and the words to reduce, shape (at most ``PASS_WORDS``,),
        int64; the caller may overwrite them, and sends the reduction.

    Returns:
        The selection.

    Raises:
        ValueError: as for ``select``.
    """
    told = yield "max", _own_range(samples)
    passes, sent = 1, told.nbytes
    high, low = int(told[0]), -int(told[1])
    total = 0
    if low <= high:
        if low < 0:
            raise ValueError(f"{low} is negative; a selection takes 0 .. 2**63 - 1")
        coarse = LogRange.between(low, high, PASS_WORDS)
        own = coarse.counts(samples)
        told = yield "sum", own.copy()
        passes, sent, total = passes + 1, sent + told.nbytes, int(told.sum())
    wanted = [int(place) for place in (ranks(total) if callable(ranks) else ranks)]
    if not all(0 <= place < total for place in wanted) or len(set(wanted)) > RANKS_LIMIT:
        raise ValueError(
            f"positions {wanted} are not at most {RANKS_LIMIT} positions of {total} samples"
        )
    found: dict[int, int] = {}
    brackets: list[_Bracket] = []
    if wanted:
        whole = _Bracket(low, high, 0, total, tuple(sorted(set(wanted))))
        brackets = _unsettled(whole.narrowed(told, coarse.start_of), found)
        held = coarse.sharing([b.low for b in brackets], samples, own)
        held.sort()
        del own
    del told
    while brackets:
        # Where cutting alone may take too long: ties and gaps end a bracket that is wide.
        late = passes in LATE and _cuts_needed(brackets) > PASSES - passes
        if late or _at_ends(brackets):
            told = yield "max", _own_ends(held, brackets)
            brackets = _unsettled(_tightened(brackets, told, found), found)
        else:
            plans = [bracket.plan(PASS_WORDS // len(brackets)) for bracket in brackets]
            told = yield "sum", np.concatenate([plan.packed(held) for plan in plans])
            brackets = _unsettled(_refined(plans, told), found)
        passes, sent = passes + 1, sent + told.nbytes
        del told
    return Selection(tuple(found[place] for place in wanted), total, passes, sent)


@dataclass(frozen=True)
class _Bracket:
    """Values ``low`` to ``high``, both included, in which wanted positions lie.

    ``below`` samples of all ranks are smaller, ``count`` are inside; ``places`` are the positions.
    """

    low: int
    high: int
    below: int
    count: int
    places: tuple[int, ...]

    def narrowed(self, counts: Ints, start_of: Callable[[int], int]) -> Iterator[_Bracket]:
        """Yield the bins that hold a place, given the samples of all ranks in every bin."""
        reached = self.below + np.cumsum(counts)
        bins = np.searchsorted(reached, self.places, side="right").tolist()
        for number in sorted(set(bins)):
            last = number + 1 == len(counts)
            yield _Bracket(
                low=max(self.low, start_of(number)),
                high=self.high if last else start_of(number + 1) - 1,
                below=int(reached[number] - counts[number]),
                count=int(counts[number]),
                places=tuple(p for p, n in zip(self.places, bins, strict=True) if n == number),
            )

    def bins(self, words: int) -> int:
        """Return in how many bins it is cut if their counts may take so many words.

        Of few samples, more than 16 counts fit in a word: they would cost time and tell little.
        """
        return words * min(16, 63 // self.count.bit_length())

    def plan(self, words: int) -> _Plan:
        """Cut it into bins of one size."""
        span = self.high - self.low + 1
        step = -(-span // self.bins(words))
        return _Plan(self, step, -(-span // step), self.count.bit_length())


@dataclass(frozen=True)
class _Plan:
    """Bins of ``step`` values each, whose counts are packed ``63 // bits`` to a word.

    All ranks together have ``bracket.count`` samples in it, which fits in ``bits``: however the
    counts of the ranks add up, no field of a word runs over into the next.
    """

    bracket: _Bracket
    step: int
    bins: int
    bits: int

    @property
    def words(self) -> int:
        """How many words the counts take."""
        return -(-self.bins // (63 // self.bits))

    @property
    def shifts(self) -> Ints:
        """Where in a word each field begins."""
        return np.arange(63 // self.bits, dtype=np.int64) * self.bits

    def packed(self, held: Ints) -> Ints:
        """Count this rank's samples in the bins, from its sorted candidates."""
        begin = np.searchsorted(held, self.bracket.low)
        inside = held[begin : np.searchsorted(held, self.bracket.high, side="right")]
        if len(inside) < self.bins:  # the faster of the two: to look up the fewer in the more
            counts = np.bincount((inside - self.bracket.low) // self.step, minlength=self.bins)
        else:
            starts = self.bracket.low + np.arange(self.bins, dtype=np.int64) * self.step
            counts = np.diff(np.searchsorted(inside, starts), append=len(inside))
        fields = np.zeros((self.words, 63 // self.bits), np.int64)
        fields.reshape(-1)[: self.bins] = counts
        fields <<= self.shifts
        packed: Ints = fields.sum(axis=1)
        return packed

    def unpacked(self, words: Ints) -> Ints:
        """Take the words apart again, after they were summed over the ranks."""
        fields = (words[:, None] >> self.shifts) & ((1 << self.bits) - 1)
        return fields.reshape(-1)[: self.bins]

    def start_of(self, number: int) -> int:
        """Return the smallest value of a bin."""
        return self.bracket.low + number * self.step


def _own_range(samples: Ints) -> Ints:
    """Return this rank's largest sample, and its smallest, negated; without samples, the least."""
    ends = np.full(2, np.iinfo(np.int64).min)
    for chunk in chunks(samples):
        smallest = max(int(chunk.min()), -MAX_VALUE)  # -2**63 has no opposite
        ends[:] = max(int(ends[0]), int(chunk.max())), max(int(ends[1]), -smallest)
    return ends


def _unsettled(brackets: Iterator[_Bracket], found: dict[int, int]) -> list[_Bracket]:
    """Move what lies in brackets of a single value into ``found``; return the others."""
    left = []
    for bracket in brackets:
        if bracket.low == bracket.high:
            found.update(dict.fromkeys(bracket.places, bracket.low))
        else:
            left.append(bracket)
    return left


def _at_ends(brackets: list[_Bracket]) -> bool:
    """Tell whether only smallest and largest samples of brackets are wanted."""
    return all(p - b.below in (0, b.count - 1) for b in brackets for p in b.places)


def _cuts_needed(brackets: list[_Bracket]) -> int:
    """Return how many passes at most end all brackets, even if each place is in one of its own."""
    words = PASS_WORDS // sum(len(bracket.places) for bracket in brackets)
    needed = 0
    for bracket in brackets:
        span, passes = bracket.high - bracket.low + 1, 0
        while span > 1:
            span, passes = -(-span // bracket.bins(words)), passes + 1
        needed = max(needed, passes)
    return needed


def _refined(plans: list[_Plan], told: Ints) -> Iterator[_Bracket]:
    """Yield the bins that hold a place, of all brackets that were cut."""
    at = 0
    for plan in plans:
        counts = plan.unpacked(told[at : at + plan.words])
        yield from plan.bracket.narrowed(counts, plan.start_of)
        at += plan.words


def _own_ends(held: Ints, brackets: list[_Bracket]) -> Ints:
    """Return this rank's largest sample in each bracket, and its smallest, negated."""
    ends = np.full((2, len(brackets)), np.iinfo(np.int64).min)
    for number, bracket in enumerate(brackets):
        begin = np.searchsorted(held, bracket.low)
        end = np.searchsorted(held, bracket.high, side="right")
        if begin < end:
            ends[:, number] = held[end - 1], -held[begin]
    return ends.reshape(-1)


def _tightened(brackets: list[_Bracket], told: Ints, found: dict[int, int]) -> Iterator[_Bracket]:
    """Yield brackets from their smallest to their largest sample; what lies there is found."""
    largest, smallest = told.reshape(2, -1).tolist()
    for bracket, high, low in zip(brackets, largest, smallest, strict=True):
        ends = {bracket.below: -low, bracket.below + bracket.count - 1: high}
        found.update({place: ends[place] for place in bracket.places if place in ends})
        inside = tuple(place for place in bracket.places if place not in ends)
        if inside:
            yield replace(bracket, low=-low, high=high, places=inside)
