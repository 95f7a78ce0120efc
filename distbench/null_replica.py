"""The ranks' side of a floor run: they serve a model that does nothing; see ``floor``."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from distbench.clock import Now
from distbench.errors import DistbenchError
from distbench.floor import planned
from distbench.frames import Channel
from distbench.prepare import Cue
from distbench.samples import SampleLog
from distbench.sut import Echo, collector
from distbench.talk import tell
from distbench.wire import LinkClosed
from distbench.worker import serve

if TYPE_CHECKING:
    from distbench.central import Dispatch

LIMIT_S = 15.0
"""A floor run that lasts so much longer than planned is given up."""
COLUMNS = ("index", "scheduled", "ready", "issued", "completed", "count", "query")


def serve_nothing(channel: Channel, official: Mapping[str, Any], group: int, now: Now) -> str:
    """Serve until the driver ends it.

    Args:
        channel: to the driver.
        official: from ``official.settled``.
        group: samples of a group at most, as in the official run.
        now: the clock.

    Returns:
        Why the driver was lost; "" where it was not.
    """
    log = SampleLog.in_memory(planned(official).capacity, COLUMNS)
    cue = Cue(now, lambda: None, lambda _until: None, [False])
    collect = collector(log, {}, [], now)
    return serve(
        Echo(official["total"]), log, channel, collect, cue, group, 0, _empty, "what does nothing"
    )


def measure_floor(
    dispatch: Dispatch, official: Mapping[str, Any], group: int
) -> dict[str, Any] | None:
    """Have LoadGen drive what does nothing; returns what it logged of it, on rank 0.

    All ranks call this, when what the official run left is on their disks. A driver that is lost or
    hangs now leaves a floor that is not known, and no more.

    Args:
        dispatch: the way to the driver; it is lost behind a floor that is not known.
        official: from ``official.settled``.
        group: samples of a group at most.
    """
    assert dispatch.channel is not None
    timer = threading.Timer(planned(official).duration_ns / 1e9 + LIMIT_S, dispatch.cut)
    timer.daemon = True
    if dispatch.control is not None:
        timer.start()  # the driver ends when its link to rank 0 does, and all links with it
        with suppress(LinkClosed):
            tell(dispatch.control, {"do": "floor", "official": official})
    problem, told = "", None
    try:
        problem = serve_nothing(dispatch.channel, official, group, dispatch.world.now)
        if dispatch.control is not None and not problem:
            told, _ = dispatch.answered("measure its floor", LIMIT_S)
            problem = told.get("problem", "")
    except DistbenchError as error:
        problem = str(error)
    timer.cancel()
    problems = dispatch.world.gather_json([problem, bool(problem) and told is None])
    dispatch.lost = any(lost for _, lost in problems)
    if dispatch.lost:
        dispatch.cut()
    problem = next((each for each, _ in problems if each), "")
    if dispatch.control is None:
        return None
    return {"problem": problem} if problem else told


def _empty(outputs: Sequence[Any]) -> list[bytes]:
    """Return the answers of what does nothing."""
    return [b""] * len(outputs)
