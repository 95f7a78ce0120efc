"""Round trips over a link: the stamps from which two clocks are compared."""

from __future__ import annotations

import struct
from collections.abc import Callable

from distbench import wire
from distbench.clock import Now
from distbench.wire import Link

TRIP_TIMEOUT_S = 0.25
_PING = struct.Struct("<qI")
PING_BYTES = wire.HEADER.size + _PING.size
"""Of a ping's frame."""
_PONG = struct.Struct("<qqq")

Other = Callable[[Link, int, bytes], None]
"""Handles a frame that is no ping: they come between on the same link."""


def exchange_trips(
    link: Link, count: int, now: Now, other: Other
) -> list[tuple[int, int, int, int]]:
    """Make round trips, each sent when the one before is back; the asking side.

    Args:
        link: to the peer, whose thread answers with ``answer_pings``; its clock is ``now``.
        count: round trips.
        now: this side's clock.
        other: handles other frames that arrive meanwhile.

    Returns:
        (t0, t1, t2, t3) of each trip that came back, ns: sent and received here, t1 and t2 there.
        Fewer than ``count`` where an answer took longer than ``TRIP_TIMEOUT_S``.

    Raises:
        LinkClosed: the peer is gone.
    """
    trips = []
    for left in range(count, 0, -1):
        t0 = now()
        link.send(wire.PING, _PING.pack(t0, left - 1))
        back = _await_pong(link, t0, other)
        if back is None:
            break
        trips.append((t0, *back))
    return trips


def _await_pong(link: Link, t0: int, other: Other) -> tuple[int, int, int] | None:
    limit_s = link.connection.gettimeout()
    link.connection.settimeout(TRIP_TIMEOUT_S)
    try:
        while True:
            kind, payload = link.receive()
            if kind != wire.PONG:
                other(link, kind, payload)
                continue
            echoed, t1, t2 = _PONG.unpack(payload)
            if echoed == t0:  # else the late answer to a ping that was given up
                return t1, t2, link.arrived_ns
    except TimeoutError:
        return None
    finally:
        link.connection.settimeout(limit_s)


def answer_ping(link: Link, payload: bytes, now: Now) -> int:
    """Answer one ping; returns how many are to follow.

    Raises:
        LinkClosed: the asking side is gone.
    """
    t0, left = _PING.unpack(payload)
    link.send(wire.PONG, _PONG.pack(t0, link.arrived_ns, now()))
    return int(left)


def answer_pings(link: Link, payload: bytes, now: Now, other: Other) -> None:
    """Answer a ping, and stay for the rest of its series; the answering side.

    Args:
        link: to the asking side.
        payload: of the first ping, the last frame that was received.
        now: this side's clock.
        other: handles another frame that arrives in place of the next ping.

    Raises:
        LinkClosed: the asking side is gone.
    """
    limit_s = link.connection.gettimeout()
    link.connection.settimeout(TRIP_TIMEOUT_S)
    try:
        while True:
            if not answer_ping(link, payload, now):
                return
            kind, payload = link.receive()
            if kind != wire.PING:
                other(link, kind, payload)
                return
    except TimeoutError:
        return  # the series was given up; the next frame is read in the ordinary way
    finally:
        link.connection.settimeout(limit_s)
