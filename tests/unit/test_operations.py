"""Sizes, bandwidths, contents and plans of collective operations, against integers by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.errors import UsageError
from distbench.operations import (
    EXACT,
    OPERATIONS,
    Asked,
    Part,
    cells_of,
    contents,
    fit,
    modulus,
    parts,
    period,
    read_sizes,
    size_text,
    summed,
)

MS = 1_000_000


def test_sizes_and_ranges_are_read() -> None:
    assert read_sizes("1MiB,8B") == (8, 1 << 20)
    # 8 * 4^k below 256 MiB = 2^28, which is no such number and is in it all the same.
    assert read_sizes("8B..256MiB") == (*(8 * 4**k for k in range(13)), 1 << 28)
    assert read_sizes("64KiB..64KiB") == (65536,)
    assert read_sizes("64KiB .. 1MiB") == (1 << 16, 1 << 18, 1 << 20)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("8", "give a number with B, KiB, MiB or GiB"),
        ("0B", "is no size"),
        ("8KB", "is no size"),
        ("", "is no size"),
        ("8B..", "is no size"),
        ("1MiB..8B", "run downwards"),
        ("8B..4GiB", "above the largest size, 1 GiB"),
    ],
)
def test_other_sizes_are_refused_in_a_sentence(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        read_sizes(text)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"operations": ("all_redcue",)}, "did you mean all_reduce"),
        ({"operations": ()}, "is none of all_reduce"),
        ({"sizes": ()}, "are not 1 B to 1 GiB"),
        ({"sizes": (0, 8)}, "are not 1 B to 1 GiB"),
        ({"sizes": (2 << 30,)}, "are not 1 B to 1 GiB"),
        ({"dtype": "int3"}, "is not one of fp32, fp16, bf16"),
        ({"repetitions": 0}, "above zero"),
        ({"duration_ns": 0}, "above zero"),
    ],
)
def test_what_cannot_be_asked_for_is_refused(change: dict, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        Asked(**{"operations": ("all_reduce",), "sizes": (8,), **change})


def test_sizes_are_written_in_the_unit_that_divides_them() -> None:
    assert [size_text(n) for n in (8, 1 << 16, 1 << 28, 1000, 1536)] == [
        "8 B", "64 KiB", "256 MiB", "1000 B", "1536 B",
    ]  # fmt: skip


def test_bus_bandwidth_is_that_of_nccl_tests() -> None:
    """Its table for 4 ranks: 2 * 3 / 4, 3 / 4, 3 / 4, 1, 1."""
    assert {name: each.factor(4) for name, each in OPERATIONS.items()} == {
        "all_reduce": 1.5, "all_gather": 0.75, "reduce_scatter": 0.75, "broadcast": 1.0,
        "send_recv": 1.0,
    }  # fmt: skip
    assert OPERATIONS["all_reduce"].factor(2) == 1.0


def test_a_size_is_the_whole_of_what_ranks_share_and_none_is_left_without_an_element() -> None:
    asked = Asked(("all_gather", "broadcast"), (8, 10, 4096))
    assert parts(asked, 4) == [
        Part("all_gather", 16, 1),  # 8 B and 10 B are less than an element for each of 4 ranks
        Part("all_gather", 4096, 256),
        Part("broadcast", 8, 2),
        Part("broadcast", 4096, 1024),
    ]


def test_a_plan_by_hand() -> None:
    """200 ms: 40 blocks of 5 ms, 25 times 200 us; and one lone operation each 600 + 400 us."""
    asked = Asked(("broadcast",), (4096,), duration_ns=400 * MS)
    block, lone = cells_of(Part("broadcast", 4096, 1024), asked, 200_000, 400_000)
    assert (block.times, block.repetitions, block.warm, block.window_ns) == (25, 40, 10, 0)
    assert block.late_ns == 50_000  # 1 % of 5 ms
    assert (lone.times, lone.repetitions, lone.window_ns) == (1, 200, 1_000_000)
    assert lone.late_ns == 10_000  # 1 % of 200 us would be below what a clock can be held to
    slow = cells_of(Part("broadcast", 4096, 1024), asked, 500 * MS, 0)
    assert [(each.times, each.repetitions) for each in slow] == [(1, 12), (1, 10)]
    more = Asked(("broadcast",), (4096,), repetitions=7)
    assert cells_of(Part("broadcast", 4096, 1024), more, 1000, 0)[1].repetitions == 7
    assert cells_of(Part("broadcast", 4096, 1024), more, 0, 0)[0].times > 1


@given(st.sampled_from(sorted(EXACT)), st.integers(2, 1200))
def test_every_sum_is_exact_and_contents_come_again_after_a_period(dtype: str, ranks: int) -> None:
    prime, stride = modulus(dtype, ranks)
    assert prime >= 3 and all(prime % d for d in range(2, prime))
    assert (prime - 1) * -(-ranks // stride) <= EXACT[dtype]
    whole = contents(1, ranks, dtype, 5, 0, 3 * period(dtype, ranks))
    assert (np.diff(whole.reshape(3, -1), axis=0) == 0).all()
    assert (contents(1, ranks, dtype, 5, 3, 5) == whole[3:8]).all()


@pytest.mark.parametrize("dtype", sorted(EXACT))
@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 64])
def test_whatever_goes_wrong_changes_contents(dtype: str, ranks: int) -> None:
    own = [contents(rank, ranks, dtype, 1, 0, 4096) for rank in range(ranks)]
    assert own[0].min() >= 0
    for other in range(1, min(ranks, 3)):
        assert (own[0] != own[other]).mean() > 0.5, "another rank's"
    for salt in (0, 2, 3):
        assert (own[0] != contents(0, ranks, dtype, salt, 0, 4096)).mean() > 0.5, "an earlier one"
    for shift in (1, 4, 256, 1024):
        assert (own[0][shift:] != own[0][:-shift]).mean() > 0.5, "shifted"
    total = summed(ranks, dtype, 1, 0, 4096)
    assert (total == sum(own)).all()
    assert (total != total - own[1]).mean() > 0.5 * (own[1] > 0).mean(), "a rank is lacking"


def test_sums_hold_in_the_type_itself() -> None:
    """numpy adds in float16 as a backend does, one rank after the other."""
    for ranks in (2, 8, 700):
        summand = [contents(r, ranks, "fp16", 3, 0, 2048).astype(np.float16) for r in range(ranks)]
        total = np.zeros(2048, np.float16)
        for each in summand:
            total += each
        assert (total.astype(np.int64) == summed(ranks, "fp16", 3, 0, 2048)).all()


def test_a_line_is_found_exactly() -> None:
    sizes = [1 << 16, 1 << 20, 1 << 24]
    line = fit(sizes, [50e-6 + 2e-10 * size for size in sizes])
    assert line.alpha_s == pytest.approx(50e-6, rel=1e-9)
    assert line.beta_s == pytest.approx(2e-10, rel=1e-9)
    assert (line.r2, line.worst) == (pytest.approx(1, abs=1e-12), pytest.approx(0, abs=1e-9))
    assert line.alpha_half_s < 1e-12


def test_the_fit_is_that_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(7)
    sizes = np.array([1 << 16, 1 << 18, 1 << 20, 1 << 22, 1 << 24])
    times = (80e-6 + 5e-10 * sizes) * (1 + rng.normal(0, 0.05, 5))
    line, oracle = fit(sizes.tolist(), times.tolist()), stats.linregress(sizes, times)
    assert line.alpha_s == pytest.approx(oracle.intercept, rel=1e-9)
    assert line.beta_s == pytest.approx(oracle.slope, rel=1e-9)
    assert line.r2 == pytest.approx(oracle.rvalue**2, rel=1e-9)
    half = stats.t.ppf(0.975, 3) * oracle.intercept_stderr
    assert line.alpha_half_s == pytest.approx(half, rel=1e-9)
    missed = times - oracle.intercept - oracle.slope * sizes
    assert line.worst == pytest.approx(np.abs(missed / times).max(), rel=1e-6)
