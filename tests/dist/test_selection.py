"""Selection over gloo ranks: exact, and every rank ends alike whatever its own samples are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from distbench.quantiles import Selection, select
from tests.support import run_ranks

pytestmark = pytest.mark.timeout(90)

QUANTILES = (0.0, 0.5, 0.9, 0.99, 0.999)


def _positions(n: int) -> list[int]:
    return [int(n * q) for q in QUANTILES]


def _shard(kind: str, rank: int) -> np.ndarray:
    rng = np.random.default_rng(rank)
    if kind == "unequal":
        return rng.lognormal(17, 0.4, (20_000, 0, 3)[rank]).astype(np.int64)
    if kind == "up to 2**62":
        return rng.integers(0, 2**62, 1000 * rank, endpoint=True)
    if kind == "all equal":
        return np.full(500, 2**61 + 1)
    if kind == "one sample":
        return np.arange(7, 7 + (rank == 2))
    if kind == "one negative":
        return np.array([5, -3] if rank == 1 else [4] * rank)
    return np.zeros(0, np.int64)


def _select(kind: str, positions: Any) -> tuple[Selection | str, int]:
    from distbench.world import join

    calls = 0
    with join(device="cpu", timeout_s=30) as world:

        def reduced(words: np.ndarray, how: str) -> np.ndarray:
            nonlocal calls
            calls += 1
            return world.reduce(words, how)

        try:
            told: Selection | str = select(
                _shard(kind, world.rank),
                positions,
                lambda words: reduced(words, "sum"),
                lambda words: reduced(words, "max"),
            )
        except ValueError as error:
            told = str(error)
        # A collective that some rank did not enter would shift this one.
        assert world.reduce(np.array([world.rank]), "sum").tolist() == [3]
    return told, calls


@pytest.mark.parametrize("kind", ["unequal", "up to 2**62", "all equal", "one sample"])
def test_every_rank_has_the_values_of_a_sort_of_all_samples(kind: str) -> None:
    together = np.sort(np.concatenate([_shard(kind, rank) for rank in range(3)]))
    results = run_ranks(_select, 3, kind, _positions)
    assert results == [results[0]] * 3
    told, calls = results[0]
    assert list(told.values) == together[_positions(len(together))].tolist()
    assert (told.count, told.passes) == (len(together), calls)


@pytest.mark.parametrize(
    ("kind", "positions", "words"),
    [
        ("no samples", [0], "positions [0] are not at most 64 positions of 0 samples"),
        ("unequal", [3, 20_003], "positions of 20003 samples"),
        ("one negative", [0], "-3 is negative"),
    ],
)
def test_what_cannot_be_selected_ends_every_rank_after_the_same_passes(
    kind: str, positions: list[int], words: str
) -> None:
    results = run_ranks(_select, 3, kind, positions)
    assert results == [results[0]] * 3
    assert words in results[0][0]
