"""How a window is filled where a driver issues: central dispatch, and LoadGen's runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from distbench.dispatch import COLUMNS, TOKEN_COLUMNS
from distbench.errors import agreed
from distbench.official import settled
from distbench.offline import offline_loop
from distbench.prepare import Course, Part
from distbench.server import SERVER, draw
from distbench.settings import SAMPLE_LIMIT
from distbench.sut import SystemUnderTest
from distbench.talk import LIMIT_BYTES
from distbench.worker import loaded

if TYPE_CHECKING:
    from distbench.central import Dispatch
    from distbench.settings import Settings

COURSE_COLUMNS = (*SERVER.columns, "query")


def central_course(dispatch: Dispatch) -> Course:
    """Return how Server fills a window under central dispatch."""

    def part(_rank: int, sut: SystemUnderTest, settings: Settings, rates: Sequence[float]) -> Part:
        drawn, replicas = draw(sut, settings, len(rates)), len(rates)
        queries = len(drawn.due_ns)
        if settings.samples == "shard":
            raise agreed(
                "central dispatch brings all samples to rank 0, and --samples shard leaves them on "
                "their ranks: leave it out, or use --dispatch static"
            )
        if queries > SAMPLE_LIMIT:
            raise agreed(
                f"central dispatch brings all samples to rank 0, {SAMPLE_LIMIT:,} at most, and "
                f"{queries:,} are asked for: shorten the window, or use --dispatch static"
            )
        # How many queries a rank will serve is not known: each has room for all.
        each = [-(-queries // replicas)] * replicas
        made = Part(drawn.index, each, settings.group, due_ns=drawn.due_ns, made=drawn.made)
        dispatch.part = made
        return made

    return replace(
        SERVER, harness=loaded, drive=dispatch.drive, part=part, columns=COURSE_COLUMNS,
        central=dispatch,
    )  # fmt: skip


OFFICIAL_LIMIT = LIMIT_BYTES // (8 * len((*COLUMNS, *TOKEN_COLUMNS)))
"""Samples of an official run: the driver hands its log of so many over in one piece."""
STREAM_LIMIT = 100_000_000
"""Of a stream, which uses a part of what may come: no query of one takes less than 20 us."""


def loadgen_course(dispatch: Dispatch, scenario: str) -> Course:
    """Return how LoadGen fills a window, of any scenario; it alone knows order and schedule."""

    def part(_rank: int, sut: SystemUnderTest, settings: Settings, rates: Sequence[float]) -> Part:
        assert settings.official is not None and settings.load is not None
        official = settled(settings.official, sut.total, sut.resident, rates, sut.depth)
        official |= {"network": dispatch.apart, "model": settings.model_name}
        if dispatch.apart and settings.load.payload == "index":
            raise agreed(
                "LoadGen's host has no rank, which is MLPerf's Network division, and there the "
                "samples themselves cross the wire: give --payload data"
            )
        capacity, replicas = official["capacity"], len(rates)
        stream = scenario.endswith("stream")
        limit = STREAM_LIMIT if stream else OFFICIAL_LIMIT
        if capacity > limit:
            raise agreed(
                f"LoadGen may issue {capacity:,} samples in this run, and {limit:,} is "
                "the limit: lower the target_qps, or raise the expected latency"
            )
        digest = hashlib.sha256(json.dumps(official, sort_keys=True).encode()).hexdigest()
        made = {
            "digest": digest,
            "max_wait_ns": settings.load.max_wait_ns,
            "official": official,
        }
        # Which of them a rank will serve is not known: each has room for all.
        order = np.resize(np.arange(sut.resident, dtype=np.int64), capacity)
        each = [-(-capacity // replicas)] * replicas
        dispatch.part = Part(order, each, settings.group, made=made)
        return dispatch.part

    return Course(
        scenario, offline_loop, loaded, dispatch.drive, part, COURSE_COLUMNS, central=dispatch
    )
