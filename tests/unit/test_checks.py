"""Findings on hosts, roofline, accuracy, first issue and length, each at its limit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distbench.checks import ALIKE, GPU_ALIKE, PEAK_OPS
from distbench.pace import BRIEF_NS
from distbench.times import LATE_NS

from .synthetic import Rank
from .test_verdict import about, found, on, only

MS, S = 10**6, 10**9


# Hosts


@pytest.mark.parametrize("name", ALIKE)
def test_hosts_that_differ_are_named_with_their_values(tmp_path: Path, name: str) -> None:
    def change(ranks: list[Rank]) -> None:
        for number, rank in enumerate(ranks):
            rank.before["environment"][name] = f"kind {number // 2}"

    state, finding = only(tmp_path, change, ranks=3)
    assert state == "VALID"
    assert about(finding) == ("doubtful", "environments-differ", None, "")
    assert f"differ in {name}: kind 0 on rank 0, 1; kind 1 on rank 2" in finding.message
    assert "measure each alone" in finding.remedy


@pytest.mark.parametrize("name", GPU_ALIKE)
def test_gpus_that_differ_are_named_too(tmp_path: Path, name: str) -> None:
    def change(ranks: list[Rank]) -> None:
        for number, rank in enumerate(ranks):
            rank.before["environment"]["gpu"] = {name: f"kind {number}"}

    _, finding = only(tmp_path, change)
    assert finding.code == "environments-differ"
    assert f"gpu.{name}: kind 0 on rank 0; kind 1 on rank 1" in finding.message


def test_what_differs_on_every_pair_of_hosts_is_no_finding(tmp_path: Path) -> None:
    def change(ranks: list[Rank]) -> None:
        for number, rank in enumerate(ranks):
            rank.before["environment"] |= {"hostname": f"n{number}", "load_average": [number]}
            rank.before["environment"]["gpu"] = {"name": "A30", "temperature_c": number}

    assert found(tmp_path, change) == ("VALID", [])


# Roofline


def on_gpu(name: str, flops: float) -> Any:
    def change(rank: Rank) -> None:
        rank.before["device"]["name"] = name
        rank.before["model"]["flops_per_sample"] = flops

    return on(1, change)


@pytest.mark.parametrize(
    ("name", "word"),
    [("NVIDIA A30", "A30"), ("NVIDIA A100-SXM4-40GB", "A100"), ("Tesla T4", "T4")],
)
def test_a_figure_above_the_roofline_is_invalid(tmp_path: Path, name: str, word: str) -> None:
    # Rank 1 completes 40 samples in 0.9 s.
    limit = PEAK_OPS[word] * 0.9 / 40
    assert found(tmp_path / "a", on_gpu(name, limit * 0.999))[0] == "VALID"
    state, finding = only(tmp_path / "b", on_gpu(name, limit * 1.001))
    assert state == "INVALID"
    assert about(finding) == ("invalid", "above-roofline", 1, "node-1")
    assert finding.limit == PEAK_OPS[word]
    assert finding.value == pytest.approx(PEAK_OPS[word] * 1.001)
    assert "flops_per_sample" in finding.remedy


def test_an_unknown_gpu_has_no_roofline(tmp_path: Path) -> None:
    assert found(tmp_path, on_gpu("NVIDIA X9000", 1e30)) == ("VALID", [])


# Accuracy


@pytest.mark.parametrize(("target", "status"), [(0.95, "VALID"), (0.9501, "INVALID")])
def test_accuracy_under_its_target(tmp_path: Path, target: float, status: str) -> None:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:  # 9 and 10 of 10 are right
            rank.before["model"]["target_accuracy"] = target

    if status == "VALID":
        assert found(tmp_path, change) == ("VALID", [])
        return
    state, finding = only(tmp_path, change)
    assert (state, *about(finding)) == ("INVALID", "invalid", "accuracy-low", None, "")
    assert (finding.value, finding.limit) == (0.95, target)
    assert "weights" in finding.remedy


# First issue and length


@pytest.mark.parametrize(
    ("late_ns", "level"), [(LATE_NS, None), (LATE_NS + 1, "doubtful"), (51 * MS, "invalid")]
)
def test_a_first_issue_that_was_late(tmp_path: Path, late_ns: int, level: str | None) -> None:
    def change(rank: Rank) -> None:
        rank.log.issued[0] = rank.after["started_ns"] + late_ns
        rank.log.started[0] = rank.log.issued[0]

    if level is None:
        assert found(tmp_path, on(1, change)) == ("VALID", [])
        return
    state, finding = only(tmp_path, on(1, change))
    assert about(finding) == (level, "issue-late", 1, "node-1")
    assert state == {"doubtful": "VALID", "invalid": "INVALID"}[level]
    assert finding.value == late_ns / S
    assert "--duration" in finding.remedy


@pytest.mark.parametrize(("group_ns", "brief"), [(BRIEF_NS, False), (BRIEF_NS - 1, True)])
def test_a_window_of_a_moment_is_doubtful(tmp_path: Path, group_ns: int, brief: bool) -> None:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before["duration_ns"] = None
            rank.before["harness"]["loop_ns"] = [1]
            rank.after["quiet"]["window_ns"] = 10 * S

    state, findings = found(
        tmp_path, change, groups=(1,), group_ns=(group_ns,), bound_ns=(0, 10), late_ns=(0,)
    )
    assert state == "VALID"
    assert ["window-brief"] * brief == [f.code for f in findings]
    if brief:
        assert "--num-samples" in findings[0].remedy
