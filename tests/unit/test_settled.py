"""Windows that slow down, warm up or never settle, as the command ``report`` tells of them.

Every rank's groups take 1 ms with noise of 1 %, times what a test lays over them.
"""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from .test_intervals import MS, paced
from .test_verdict import about, found

N = 600
AT = np.arange(N) / N
Shape = np.ndarray


def told(folder: Path, *shapes: Shape, seed: int = 1) -> tuple[str, dict[str, tuple]]:
    """Return the status and, by code, level, rank, host, value and message of what is found."""
    rng = np.random.default_rng(seed)
    durations = [
        (MS * shape * (1 + 0.01 * rng.standard_normal(len(shape)))).astype(np.int64)
        for shape in shapes
    ]
    groups = tuple(len(shape) for shape in shapes)
    state, findings = found(
        folder, ranks=len(groups), groups=groups, late_ns=(0,), change=paced(durations)
    )
    # Ranks of different speeds are given here, and told by another finding.
    findings = [each for each in findings if each.code != "straggler"]
    assert len({f.code for f in findings}) == len(findings)  # one of each
    return state, {f.code: f for f in findings}


@pytest.mark.parametrize(
    ("factor", "level"), [(1.05, None), (1.25, "doubtful"), (1.45, "doubtful"), (1.6, "invalid")]
)
def test_a_warm_up_in_the_window(tmp_path: Path, factor: float, level: str | None) -> None:
    # A tenth that takes f times as long: the rate is 1 / (0.9 + 0.1 f) of what it is afterwards.
    state, findings = told(tmp_path, np.where(AT < 0.1, factor, 1), np.ones(N))
    assert list(findings) == ["warmup-in-window"] * (level is not None)
    if level is None:
        return
    finding = findings["warmup-in-window"]
    assert about(finding) == (level, "warmup-in-window", 0, "node-0")
    effect = 1 - 1 / (0.9 + 0.1 * factor)
    assert finding.value == pytest.approx(effect, abs=0.002)
    assert finding.limit == 0.05
    assert f"{finding.value:.1%} fewer samples/s completed than from then on" in finding.message
    (after_s,) = re.findall(r"became steady (\S+) s after the start", finding.message)
    assert float(after_s) == pytest.approx(0.06 * factor, rel=0.1)
    assert state == {"doubtful": "VALID", "invalid": "INVALID"}[level]


@pytest.mark.parametrize(
    ("factor", "level"), [(1.04, None), (1.15, "doubtful"), (1.4, "invalid"), (0.8, "doubtful")]
)
def test_a_rank_that_never_settles(tmp_path: Path, factor: float, level: str | None) -> None:
    # A fifth in the middle: first and last third are alike, so that there is no trend.
    state, findings = told(tmp_path, np.ones(N), np.where(abs(AT - 0.5) < 0.1, factor, 1))
    assert list(findings) == ["not-steady"] * (level is not None)
    if level is None:
        return
    finding = findings["not-steady"]
    assert about(finding) == (level, "not-steady", 1, "node-1")
    assert finding.value == pytest.approx(abs(1 - 1 / (0.8 + 0.2 * factor)), abs=0.003)
    word = "fewer" if factor > 1 else "more"
    assert f"{finding.value:.1%} {word} samples/s completed than in" in finding.message
    (last_s,) = re.findall(r"in its last (\S+) s", finding.message)
    assert float(last_s) == pytest.approx(0.24, rel=0.05)
    assert state == {"doubtful": "VALID", "invalid": "INVALID"}[level]


@pytest.mark.parametrize("place", [0.2, 1 / 3, 0.5, 2 / 3, 0.8])
@pytest.mark.parametrize("factor", [1.3, 2.0])
def test_a_rank_that_throttles_is_invalid(tmp_path: Path, factor: float, place: float) -> None:
    state, findings = told(tmp_path, np.where(place > AT, 1, factor))
    assert state == "INVALID"
    assert findings["trend"].level == "invalid"
    assert findings["trend"].value == pytest.approx((factor - 1) / 2, abs=0.02)
    assert "longer in the last third" in findings["trend"].message
    assert set(findings) <= {"trend", "not-steady", "warmup-in-window"}
    if place < 0.5:
        finding = findings["warmup-in-window"]
        assert finding.value == pytest.approx(factor / (place + (1 - place) * factor) - 1, abs=0.01)
        assert "more samples/s completed than from then on" in finding.message
    if place == 2 / 3:
        finding = findings["not-steady"]
        assert finding.value == pytest.approx(factor / (2 / 3 + factor / 3) - 1, abs=0.01)
        assert "more samples/s completed than in its last" in finding.message


def test_the_evidence_stands_beside_a_trend(tmp_path: Path) -> None:
    # Halfway: to the test of a straight line what is left of a step looks like memory.
    _, findings = told(tmp_path, np.where(AT < 0.5, 1, 1.3))
    assert "standard errors apart" in findings["trend"].message
    _, findings = told(tmp_path / "line", 1 + 0.1 * AT)
    assert "first (p " in findings["trend"].message


@pytest.mark.parametrize("seed", range(5))
def test_ranks_that_finish_earlier_are_steady(tmp_path: Path, seed: int) -> None:
    # Shares of 2 to 1, speeds of 3 to 1: the makespan is the last rank's alone.
    assert told(tmp_path, np.ones(N), np.full(2 * N, 1.5), np.full(N // 2, 0.5), seed=seed) == (
        "VALID",
        {},
    )


@pytest.mark.parametrize("kind", ["spikes", "noise", "memory", "constant"])
@pytest.mark.parametrize("n", [130, 300, 2000])
def test_steady_ranks_have_no_finding(tmp_path: Path, n: int, kind: str) -> None:
    rng = np.random.default_rng(n)
    shapes = []
    for _ in range(4):
        shape = np.ones(n)
        if kind == "noise":
            shape = np.exp(0.1 * rng.standard_normal(n))
        elif kind == "spikes":
            shape[rng.random(n) < 0.02] = 4
        elif kind == "memory":
            for k in range(1, n):
                shape[k] = 1 + 0.8 * (shape[k - 1] - 1) + 0.02 * rng.standard_normal()
        shapes.append(shape)
    # A chance of 1 in 200 a rank at the most: 1 in 5 that one of these 48 has any.
    assert told(tmp_path, *shapes, seed=n) == ("VALID", {})


def test_few_groups_tell_nothing(tmp_path: Path) -> None:
    assert told(tmp_path, np.where(np.arange(119) < 60, 1, 2.0))[1].keys() <= {"trend"}
