"""What an official run did that the datacenter rules do not have: too short, ECC off, a cache."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distbench.errors import where
from distbench.findings import Finding
from distbench.run import RankRecord, Run

OFFICIAL_S = 600.0
"""Least duration of every scenario, by mlperf.conf of v5.0 and v5.1."""


def forbidden_found(run: Run, official: Mapping[str, Any]) -> list[Finding]:
    """Return what is not by the rules, C and R.

    Args:
        run: that LoadGen drove.
        official: from ``official.settled``.
    """
    found = []
    if official["shortened"]:
        found.append(
            Finding(
                "info",
                "run-shortened",
                f"the run was asked to last {official['min_duration_ns'] / 1e9:g} s, and the rules "
                f"ask for {OFFICIAL_S:g} s",
                value=official["min_duration_ns"] / 1e9,
                limit=OFFICIAL_S,
                remedy="leave `shortened` out of --rules for a run of the whole length",
            )
        )
    model = str(official.get("model", "")).partition(",")[0]
    if official["listed"] and model != official["benchmark"]:
        found.append(
            Finding(
                "invalid",
                "benchmark-replaced",
                f"{official['benchmark']} of MLPerf's list was served by "
                f"{model or 'another model'}",
                remedy="leave --model out, or give it that model with other options",
            )
        )
    if official["listed"] and official["resident"] < official["samples_wanted"]:
        found.append(
            Finding(
                "invalid",
                "samples-few",
                f"{official['benchmark']} has {official['samples_wanted']:,} samples loaded by the "
                f"rules, and this run {official['resident']:,}",
                value=official["resident"],
                limit=official["samples_wanted"],
                remedy="give a model with as many samples, such as --model "
                f"{official['benchmark']},samples={official['samples_wanted']}",
            )
        )
    for record in run.workers:
        found += _of_rank(record)
    return found


def _of_rank(record: RankRecord) -> list[Finding]:
    """Return what of one rank the rules forbid."""
    found = []
    state = record.before.get("gpu_before") or {}
    if state.get("ecc_mode") is False:
        found.append(
            Finding(
                "invalid",
                "ecc-off",
                f"{where(record.rank, record.host)}: ECC is off, and the datacenter rules ask "
                "for it",
                record.rank,
                record.host,
                remedy="turn it on (nvidia-smi -e 1, then a reboot), and run again",
            )
        )
    if record.before["model"].get("prefix_caching"):
        found.append(
            Finding(
                "invalid",
                "prefix-caching",
                f"{where(record.rank, record.host)}: the engine keeps prefixes of earlier "
                "queries, which the rules forbid",
                record.rank,
                record.host,
                remedy="turn prefix caching off in the engine",
            )
        )
    return found
