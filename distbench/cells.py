"""Which windows a scaling run has: each rank alone, and several together, round by round."""

from __future__ import annotations

from dataclasses import dataclass

from distbench.errors import UsageError

KINDS = ("weak", "strong")


@dataclass(frozen=True)
class Plan:
    """What is compared.

    Attributes:
        sizes: numbers of ranks, ascending; empty: 1, 2, 4 ... and all.
        rounds: how often, an even number.
        kind: "weak", the same work for each rank, or "strong", the same work in all.
    """

    sizes: tuple[int, ...] = ()
    rounds: int = 6
    kind: str = "weak"

    def __post_init__(self) -> None:
        if self.rounds < 2 or self.rounds % 2:
            raise UsageError(
                f"{self.rounds} rounds are not 2, 4, 6 ...: every other one runs in reverse "
                "(--rounds)"
            )
        if self.kind not in KINDS:
            raise UsageError(f"scaling {self.kind!r} is neither weak nor strong (--scaling)")


@dataclass(frozen=True)
class Cell:
    """One window's place in the plan.

    Attributes:
        ranks: that have a part in it.
        round: from 0.
    """

    ranks: tuple[int, ...]
    round: int


def sized(plan: Plan, world_size: int) -> Plan:
    """Return the plan for so many ranks.

    Raises:
        UsageError: a size is not among them.
    """
    powers = {1 << power for power in range(world_size.bit_length())} | {1, world_size}
    sizes = plan.sizes or tuple(sorted(each for each in powers if each <= world_size))
    if world_size < 2:
        raise UsageError(
            "one rank scales over nothing: start two or more (torchrun --nproc-per-node, --nnodes)"
        )
    wrong = [each for each in sizes if not 1 <= each <= world_size]
    if wrong:
        raise UsageError(
            f"--world-sizes {wrong[0]}: this run has {world_size} ranks, so give 1 to {world_size}"
        )
    if max(sizes) < 2:
        raise UsageError("--world-sizes 1 compares a rank with itself: give a larger one as well")
    return Plan(tuple(sorted(set(sizes))), plan.rounds, plan.kind)


def cells(plan: Plan) -> list[Cell]:
    """Return the windows in the order in which they are taken."""
    alone = [(rank,) for rank in range(max(plan.sizes))]
    once = alone + [tuple(range(size)) for size in plan.sizes if size > 1]
    return [
        Cell(ranks, each)
        for each in range(plan.rounds)
        for ranks in (once if each % 2 == 0 else once[::-1])
    ]
