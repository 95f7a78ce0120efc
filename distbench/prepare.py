"""Before a window: what to run, how often, in which order; warm-up, and what the loop itself costs.

Nothing here is timed for a report; it fixes all that the timed loop must not decide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from distbench.clock import Now
from distbench.errors import UsageError
from distbench.samples import SampleLog
from distbench.settings import SAMPLE_LIMIT, Settings
from distbench.sut import Collect, Indices, SystemUnderTest, collector

if TYPE_CHECKING:
    from distbench.record import Folder
    from distbench.run import RankRecord

PLANNED_LIMIT = 50_000_000
"""Samples of one rank that a duration may ask for, a log of 3.2 GB; a number may ask for more."""
KEPT_GROUPS = 256
"""Groups of a rank whose outputs are kept and checked afterwards."""
HEADROOM = 1.1
"""A window planned from the warm-up rate rather lasts a little too long than too short."""
CHUNK_NS, CHUNK_ROWS = 50_000_000, 65_536
"""A stretch of warm-up is at least so long, or has so many samples."""
SHAPES = 64
"""Sizes of groups that are all warmed."""
OPTIONAL = ("started", "finished", "device", "tokens", "first_token")
"""Columns that a log has only where the SUT fills them, as its warm-up shows."""

ALL_COLUMNS = (
    "index",
    "scheduled",
    "issued",
    "started",
    "finished",
    "completed",
    "device",
    "count",
    "tokens",
    "first_token",
)
_AT = {name: place for place, name in enumerate(ALL_COLUMNS)}

Groups = Iterable[tuple[int, Indices]]
"""First row and sample indices of each group, in order."""
Loop = Callable[[SystemUnderTest, SampleLog, Groups, Collect, Now], None]
"""A timed loop over groups that are there at once, such as ``offline.offline_loop``."""


@dataclass(frozen=True)
class Part:
    """One rank's part of a window, fixed before it begins.

    Attributes:
        order: sample index of each row, shape (rows,), int64.
        counts: rows of every rank.
        group: rows of a group at most.
        due_ns: when each row is due since the agreed instant, ns; None: at the instant.
        cut: whether ``SAMPLE_LIMIT`` or ``PLANNED_LIMIT`` cut the number of rows.
        made: how a schedule was drawn; None without one.
        active: ranks that have a part, where not all do.
    """

    order: Indices
    counts: Sequence[int]
    group: int
    due_ns: Indices | None = None
    cut: bool = False
    made: dict[str, Any] | None = None
    active: Sequence[int] | None = None


@dataclass(frozen=True)
class Cue:
    """What a window's loop needs of time.

    Attributes:
        now: the clock.
        begin: waits for the agreed instant; the loop is set up when it calls this.
        wait: waits for an instant on the clock, without work.
        halt: one truth, whether the window is given up; any rank's loop may set it, and the side
            threads carry it to the others.
        start_ns: the agreed instant, on this rank's clock.
    """

    now: Now
    begin: Callable[[], None]
    wait: Callable[[int], Any]
    halt: list[bool]
    start_ns: int = 0


class Central(Protocol):
    """What a window needs of central dispatch, beside its loop; see ``central``."""

    def load(self, sut: SystemUnderTest, order: Indices) -> None:
        """Load samples at the driver's word."""

    def open(self, folder: Folder, before: Mapping[str, Any]) -> None:
        """Let the driver make its log."""

    def record(self, after: dict[str, Any]) -> RankRecord:
        """Return what the driver recorded, on every rank; ``after`` takes its clock."""

    @property
    def lost(self) -> bool:
        """Whether the driver ended early."""

    def floor(self, official: Mapping[str, Any]) -> dict[str, Any] | None:
        """Measure what LoadGen and dispatch cost alone, on rank 0."""

    def cut(self) -> None:
        """Let the driver save what it has, at an early end."""


Drive = Callable[[SystemUnderTest, SampleLog, Part, Collect, Cue], None]


@dataclass(frozen=True)
class Course:
    """How a scenario fills a window.

    Attributes:
        scenario: its name.
        loop: over groups that are there at once: for the warm-up.
        harness: the window's loop where nothing has to be waited for: what it costs is measured.
        drive: the window's own.
        part: makes this rank's part, from (rank, sut, settings, warm-up rates of all ranks).
        columns: what its log has beside the optional ones.
        central: the way to the driver, under central dispatch.
    """

    scenario: str
    loop: Loop
    harness: Loop
    drive: Drive
    part: Callable[[int, SystemUnderTest, Settings, Sequence[float]], Part]
    columns: tuple[str, ...] = ALL_COLUMNS
    central: Central | None = None


@dataclass(frozen=True)
class Warmup:
    """What the warm-up showed.

    Attributes:
        rate_qps: samples/s over its second half.
        slowest_group_ns: longest group, from issue to completion.
        groups: groups it ran.
        columns: optional columns that this SUT fills.
    """

    rate_qps: float
    slowest_group_ns: int
    groups: int
    columns: tuple[str, ...]


def warm_up(
    loop: Loop,
    sut: SystemUnderTest,
    size: int,
    least_ns: int,
    order: Indices,
    now: Now,
    tell: Callable[[], None] = lambda: None,
) -> Warmup:
    """Run groups of one size for ``least_ns`` at least, and drain.

    Args:
        loop: the scenario's.
        sut: loaded.
        size: samples a group; the first group may compile something.
        least_ns: how long at least.
        order: sample indices to draw from.
        now: the clock.
        tell: called whenever groups have ended.

    Raises:
        UsageError: a group failed.
    """
    slowest, groups, samples, chunk = 0, 0, 0, 1
    columns: set[str] = set()
    begin = now()
    timed_ns = 0
    while groups < 2 or now() - begin < least_ns or not timed_ns:
        indices = np.resize(order, size * chunk)
        log, errors = SampleLog.in_memory(len(indices), ALL_COLUMNS), list[str]()
        collect = collector(log, {}, errors, now)
        before = now()
        loop(sut, log, groups_of(indices, size), collect, now)
        took_ns = now() - before
        if errors:
            raise UsageError(f"the model failed in warm-up at batch size {size}: {errors[0]}")
        first = slice(None, None, size)
        columns |= {c for c in OPTIONAL if log.rows[0, _AT[c]] > 0}
        slowest = max(slowest, int((log.completed[first] - log.issued[first]).max()))
        groups += chunk
        tell()
        if groups > 1 and now() - begin >= least_ns // 2:
            timed_ns, samples = timed_ns + took_ns, samples + len(indices)
        # As the window does it, many groups on end: the engine's whole depth is then in use.
        if (took_ns < CHUNK_NS and len(indices) < CHUNK_ROWS) or chunk < 2 * sut.depth:
            chunk *= 2
    for pair in (("started", "finished"), ("tokens", "first_token")):
        if not columns.issuperset(pair):  # one without the other tells nothing
            columns.difference_update(pair)
    return Warmup(samples / max(timed_ns, 1) * 1e9, slowest, groups, tuple(sorted(columns)))


def shapes(settings: Settings, count: int) -> list[int]:
    """Return the sizes of groups, other than the full one, that a window may have.

    Without a load that is the last group's. Queries that come by a schedule make groups of every
    size up to the largest; above ``SHAPES`` the powers of two stand for those between.

    Args:
        settings: of the run.
        count: rows of this rank.
    """
    if settings.load is None:
        rest = count % settings.group
        return [rest] if rest and count > settings.group else []
    most = settings.load.max_batch
    if most <= SHAPES:
        return list(range(1, most))
    return [1 << power for power in range(most.bit_length()) if 1 << power < most]


def share_out(total: int, rank: int, rates: Sequence[float] | None, world_size: int) -> int:
    """Return how many of ``total`` samples a rank gets.

    Args:
        total: samples of all ranks.
        rank: whose share.
        rates: warm-up rates for shares in proportion, None for even ones.
        world_size: number of ranks.
    """
    weights = np.ones(world_size) if rates is None else np.asarray(rates, float)
    edges = np.rint(np.concatenate(([0.0], np.cumsum(weights))) / weights.sum() * total)
    return int(edges[rank + 1] - edges[rank])


def plan_samples(settings: Settings, rates: Sequence[float]) -> tuple[list[int], bool]:
    """Fix each rank's number of samples before the window.

    Args:
        settings: --num-samples, or --duration times the warm-up rate times 1.1.
        rates: warm-up rate of each rank, samples/s.

    Returns:
        Samples of each rank, and whether ``SAMPLE_LIMIT`` or ``PLANNED_LIMIT`` cut them.

    Raises:
        UsageError: a rank would have none; all ranks raise it alike.
    """
    size, batch = len(rates), settings.batch_size
    uneven = rates if settings.shares == "rate" else None
    if settings.num_samples is not None:
        total = settings.num_samples
        shares = [share_out(total, r, uneven, size) for r in range(size)]
        if min(shares) == 0:
            error = UsageError(
                f"--num-samples {total} leaves rank {shares.index(0)} of {size} without any: give "
                "at least one for each rank"
            )
            error.agreed = True
            raise error
        return shares, False
    seconds = settings.duration_ns / 1e9 * HEADROOM
    own = list(rates) if uneven else [min(rates)] * size
    # Whole batches: the window then uses one shape.
    planned = [max(1, int(np.ceil(rate * seconds / batch))) * batch for rate in own]
    cut = PLANNED_LIMIT / max(planned)
    if settings.samples == "gather":
        cut = min(cut, SAMPLE_LIMIT / sum(planned))
    if cut >= 1:
        return planned, False
    return [max(1, int(n * cut) // batch) * batch for n in planned], True


def stay_on_ranks(settings: Settings, counts: Sequence[int]) -> bool:
    """Tell whether the samples stay where they are, and only figures are exchanged.

    Args:
        settings: --samples, or by default by ``SAMPLE_LIMIT``.
        counts: samples of each rank.
    """
    if len(counts) == 1:
        return False
    return settings.samples == "shard" or (not settings.samples and sum(counts) > SAMPLE_LIMIT)


def groups_of(order: Indices, batch_size: int) -> Iterator[tuple[int, Indices]]:
    """Iterate over (first row, sample indices) of each group; views of ``order``, no copies.

    The rows of an array of two dimensions, because a view that numpy's iteration makes costs half
    of a slice's, and this is part of what a loop costs per batch.
    """
    whole = len(order) - len(order) % batch_size
    groups = zip(range(0, whole, batch_size), order[:whole].reshape(-1, batch_size), strict=True)
    return chain(groups, [(whole, order[whole:])] if whole < len(order) else [])


def groups_after(
    begin: Callable[[], None], order: Indices, batch_size: int
) -> Iterator[tuple[int, Indices]]:
    """Iterate over the groups, of which there is one at least.

    The first one comes after ``begin`` has returned: by then the loop is set up.
    """
    groups = groups_of(order, batch_size)
    first = next(groups)

    def begun() -> Iterator[tuple[int, Indices]]:
        begin()
        yield first

    return chain(begun(), groups)


def closed_part(
    rank: int, sut: SystemUnderTest, settings: Settings, rates: Sequence[float]
) -> Part:
    """Return a rank's part of a window whose samples are there at once, or come one by one.

    Raises:
        UsageError: a rank would have no samples; all ranks raise it alike.
    """
    counts, cut = plan_samples(settings, rates)
    order = sample_order(sut.resident, sum(counts[:rank]), counts[rank], settings.seed)
    return Part(order, counts, settings.group, cut=cut)


def sample_order(total: int, first: int, count: int, seed: int) -> Indices:
    """Return the sample indices of a shard: a seeded permutation of the data, over and over.

    Args:
        total: sample indices are 0 .. total-1.
        first: position of the shard's first sample among those of all ranks.
        count: samples of the shard.
        seed: of the permutation.

    Returns:
        Shape (count,), int64.
    """
    once = np.random.default_rng(seed).permutation(total).astype(np.int64)
    return once[np.arange(first, first + count) % total]


def choose_kept(rows: int, seed: int) -> list[int]:
    """Choose up to ``KEPT_GROUPS`` places, spread over the rows, whose outputs are kept.

    The group that ends at or behind a place is kept: where groups begin is not known before.

    Args:
        rows: of this rank.
        seed: a random one in each of as many equal parts.

    Returns:
        Rows, ascending.
    """
    parts = min(rows, KEPT_GROUPS)
    if not parts:
        return []
    edges = [rows * part // parts for part in range(parts + 1)]
    drawn = np.random.default_rng(seed).random(parts)
    return [
        low + int((high - low) * share)
        for low, high, share in zip(edges[:-1], edges[1:], drawn, strict=True)
    ]
