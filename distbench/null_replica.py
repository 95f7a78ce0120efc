"""A rank's side of a floor run: it serves a model that does nothing; see ``floor``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distbench.clock import Now
from distbench.floor import planned
from distbench.frames import Channel
from distbench.prepare import Cue
from distbench.samples import SampleLog
from distbench.sut import Echo, collector
from distbench.worker import serve

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


def _empty(outputs: Sequence[Any]) -> list[bytes]:
    """Return the answers of what does nothing."""
    return [b""] * len(outputs)
