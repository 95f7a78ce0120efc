"""Do all ranks run the same thing, and what does a reader need to repeat it?"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import numpy as np

import distbench
from distbench.environment import describe, memory_peak_bytes
from distbench.files import to_json
from distbench.findings import Finding
from distbench.gpus import foreign_processes
from distbench.nvml import nvml_snapshot
from distbench.prepare import HEADROOM, Part, Warmup
from distbench.rounds import MIN_DURATION_NS
from distbench.rules import parse_rules
from distbench.run import SCHEMA_VERSION
from distbench.settings import Settings
from distbench.sut import SystemUnderTest

if TYPE_CHECKING:
    from collections.abc import Sequence

    from distbench.record import Folder
    from distbench.world import World

FREE_OPTIONS = ("quiet", "output_dir")
"""Options that may differ between ranks: they change nothing that is measured, and each host has
disks of its own."""


def agree_on_run(world: World, sut: SystemUnderTest, settings: Settings) -> None:
    """Compare versions, options and model between all ranks.

    Raises:
        UsageError: they differ; names what, the ranks, both values and the remedy.
    """
    import torch  # noqa: PLC0415

    versions = {
        "distbench's version": distbench.__version__,
        "torch's version": torch.__version__,
        "Python's version": platform.python_version(),
        "numpy's version": np.__version__,
    }
    world.agree("versions", versions, "install the same versions on every node")
    options = {
        f"--{name.replace('_', '-')}": each["value"]
        for name, each in settings.config.items()
        if name not in FREE_OPTIONS
    }
    options |= {
        name: value
        for name, value in asdict(settings).items()
        if name not in ("config", "command", *FREE_OPTIONS) and not settings.config
    }
    world.agree("options", options, "start every node with the same command line")
    model = {
        "the model's weights": digest_of(sut),
        "the model's number of samples": sut.total,
        "what the model computes in": getattr(sut, "dtype", None),
    }
    world.agree("model", model, "give every node the same model files")
    if world.rank == 0 and not settings.quiet:
        for found in rules_too_short(settings):
            sys.stderr.write(f"distbench: {found.message}; {found.remedy}\n")


def digest_of(sut: SystemUnderTest) -> str:
    """Return what the SUT says its weights are, "" where it does not."""
    return str(getattr(sut, "digest", ""))


def describe_rank(
    scenario: str,
    world: World,
    sut: SystemUnderTest,
    settings: Settings,
    folder: Folder,
    warm: Warmup,
    harness: dict[str, Any],
    columns: Sequence[str],
    rates: Sequence[float],
    part: Part,
) -> dict[str, Any]:
    """Return this rank's rank.json: everything known before the window."""
    snapshot = nvml_snapshot(world.device.uuid) if world.device.type == "cuda" else None
    known = [*world.findings, *_planned(settings, rates, part.cut), *rules_too_short(settings)]
    return {
        "schema_version": SCHEMA_VERSION,
        "scenario": scenario,
        "run_id": folder.run_id,
        "started_utc": folder.started_utc,
        "rank": world.rank,
        "world_size": world.world_size,
        "local_rank": world.local_rank,
        "node": world.node,
        "host": world.host,
        "pid": os.getpid(),
        "replica": world.replica,
        "active": part.active is None or world.rank in part.active,
        "active_ranks": list(range(world.world_size)) if part.active is None else list(part.active),
        "device": asdict(world.device),
        "backend": world.backend,
        "interface": None if world.interface is None else asdict(world.interface),
        "columns": list(columns),
        "config": settings.config or plain_config(settings),
        "duration_ns": None if settings.num_samples is not None else settings.duration_ns,
        "group": settings.group,
        "load": None if settings.load is None else asdict(settings.load),
        "schedule": part.made,
        "until": settings.until,
        "rules": settings.rules,
        "command": settings.command,
        "model": _model(sut, settings),
        "warmup": {
            "rate_qps": warm.rate_qps,
            "slowest_group_ns": warm.slowest_group_ns,
            "groups": warm.groups,
        },
        "harness": harness,
        "clock": _first_clock(world),
        "environment": describe(world.device),
        "gpu_before": snapshot,
        "foreign_before": _foreign(snapshot),
        "findings": [asdict(f) for f in known] if world.rank == 0 else [],
        **({"official": part.made["official"]} if part.made and "official" in part.made else {}),
    }


def _model(sut: SystemUnderTest, settings: Settings) -> dict[str, Any]:
    """Return what the SUT tells of the model."""
    return {
        "name": settings.model_name or type(sut).__name__,
        "digest": digest_of(sut),
        "dtype": getattr(sut, "dtype", None),
        "total": sut.total,
        "depth": sut.depth,
        "flops_per_sample": getattr(sut, "flops_per_sample", None),
        "target_accuracy": getattr(sut, "target_accuracy", None),
        "prefix_caching": getattr(sut, "prefix_caching", None),
    }


def _first_clock(world: World) -> dict[str, Any]:
    """Return this rank's clock as measured before the window; all ranks call it, rank 0 tells."""
    side = world.side
    told = side.meet(
        "first:exchanges",
        b"",
        lambda _: to_json({str(r): exchanges_of(world, r) for r in side.leaders()}),
    )
    leader = side.leader_of(world.rank)
    return {
        "domain": side.seats[world.rank].domain,
        "leader": leader,
        "exchanges": json.loads(told).get(str(leader), []),
    }


def exchanges_of(world: World, leader: int) -> list[list[int]]:
    """On rank 0: return what was measured with one domain's leader, as lists of integers."""
    return [
        [e.at_ns, e.offset_ns, e.bound_ns, e.round_trip_ns, e.trips]
        for e in world.side.exchanges.get(leader, [])
    ]


def describe_after(world: World) -> dict[str, Any]:
    """Return what is read after the window: all exchanges (rank 0), memory, the GPU's state."""
    snapshot = nvml_snapshot(world.device.uuid) if world.device.type == "cuda" else None
    leaders = world.side.leaders() if world.rank == 0 else []
    return {
        "exchanges": {str(leader): exchanges_of(world, leader) for leader in leaders},
        "memory_peak_bytes": memory_peak_bytes(world.device),
        "gpu_after": snapshot,
        "foreign_after": _foreign(snapshot),
    }


def _foreign(snapshot: dict[str, Any] | None) -> list[int]:
    """Return the processes on this rank's GPU that are not this one."""
    if snapshot is None:
        return []
    return foreign_processes(snapshot, [os.getpid()], context_open=True)


def _planned(settings: Settings, rates: Sequence[float], cut: bool) -> list[Finding]:
    found = []
    if cut:
        found.append(
            Finding(
                "info",
                "samples-capped",
                "the number of samples was cut to what is gathered or logged at once, so the "
                "window is shorter than --duration asks for",
                remedy="give a shorter --duration, or --num-samples",
            )
        )
    if settings.shares == "rate":
        shown = ", ".join(f"{rate:.5g}" for rate in rates[:16])
        found.append(
            Finding(
                "info",
                "shares-by-rate",
                f"shares are in proportion to the warm-up rates ({shown} samples/s), so throughput "
                "is that of a balanced load, not of even shards",
                remedy="leave --shares rate out for the throughput of even shards",
            )
        )
    return found


def rules_too_short(settings: Settings) -> list[Finding]:
    """Return the finding that a window of --duration cannot last as long as the rules ask for."""
    rules = parse_rules(settings.rules)
    # A schedule is made as long as the rules ask for.
    if rules.round is None or settings.num_samples is not None or settings.load is not None:
        return []
    least_s = (rules.shortened_ns or MIN_DURATION_NS) / 1e9
    asked_s = settings.duration_ns / 1e9
    if asked_s * HEADROOM >= least_s:
        return []
    return [
        Finding(
            "info",
            "rules-too-short",
            f"a window of --duration {asked_s:g}s cannot last the {least_s:g} s that {rules.name} "
            "asks for, so its gates will say INVALID",
            value=asked_s,
            limit=least_s,
            remedy=f"give --duration {least_s:g}s, or --rules {settings.rules.split(',')[0]},"
            f"shortened={asked_s:g}s to try things out",
        )
    ]


def plain_config(settings: Settings) -> dict[str, Any]:
    """Return the ``config`` section of a run that was started from a script."""
    skipped = ("config", "command", "model_name", "dtype")
    return {
        name: {"value": value, "origin": "script"}
        for name, value in asdict(settings).items()
        if name not in skipped
    }
