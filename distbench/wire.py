"""TCP links between rank 0 and every other rank: opened, guarded, proven, and framed.

A link carries small frames: clock pings, heartbeats, meetings. It is opened on the interface that
the ranks talk over, with TCP_NODELAY, and answers to a per-run random token. The token stops strays
(another run, a port scanner); it does not stop an attacker who can read the network, and nothing
that arrives is ever executed or unpickled: frames are integers, bytes and JSON.

At opening 64 bytes and then 1 MiB go both ways, so that a path which loses large packets (an MTU
fault) shows here, in seconds and with both MTUs named, and not as a hang in a later gather.
"""

from __future__ import annotations

import contextlib
import hmac
import json
import socket
import struct
import sys
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from distbench.clock import Now, now_ns
from distbench.errors import DistbenchError, UsageError, where

HEADER = struct.Struct("<BI")
SMALL_ECHO_BYTES = 64
LARGE_ECHO_BYTES = 1 << 20
ECHO_TIMEOUT_S = 5.0
"""1 MiB both ways takes 1.7 s at 10 Mbit/s; a path that needs longer cannot carry a gather."""
FRAME_LIMIT_BYTES = 64 << 20
HELLO_TIMEOUT_S = 2.0
"""A rank says who it is with its first packet; strays are greeted one after the other."""
CALLS = 3
"""After a lost SYN Linux sends a lost first packet again after 3 s: a rank taken for a stray."""
HELLO_LIMIT_BYTES = 4096
"""What is read from a caller before it has shown the token."""
_told: set[str] = set()

HELLO, ROSTER, ECHO, PING, PONG, HEART, ARRIVED, PASSED, LOST, FAILED, BYE = range(11)


@dataclass(frozen=True)
class Seat:
    """What every rank tells the others about itself when the links open.

    Attributes:
        rank: global rank.
        host: hostname.
        domain: name of its clock, from ``clock.clock_domain``.
        interface: network interface, "" where unknown.
        mtu: of that interface, bytes; 0 where unknown.
    """

    rank: int
    host: str
    domain: str
    interface: str
    mtu: int

    def __str__(self) -> str:
        return where(self.rank, self.host)


class LinkClosed(DistbenchError):
    """The other end of a link is gone, or sent something that is no frame."""


class Link:
    """One TCP connection to one rank; any thread may send, one thread receives.

    Attributes:
        seat: who is at the other end.
        heard_ns: when the last frame arrived, on CLOCK_MONOTONIC; set by the receiving thread.
        role: what a caller said it calls for; "" for a rank's own link.
        clock: the clock that ``arrived_ns`` is read from.
        arrived_ns: when the first bytes of the last frame were there, before any work on them:
            what Python does with a frame must not widen a clock's bound.
    """

    def __init__(self, connection: socket.socket, seat: Seat) -> None:
        self.connection = connection
        self.seat = seat
        self.heard_ns = time.monotonic_ns()
        self.role = ""
        self.clock: Now = now_ns
        self.arrived_ns = 0
        self._sending = threading.Lock()
        self._unread = bytearray()

    def fileno(self) -> int:
        """Return the socket's descriptor, for a selector."""
        return self.connection.fileno()

    def send(self, kind: int, payload: bytes = b"") -> None:
        """Send one frame.

        Raises:
            LinkClosed: the other end is gone or has not read for the socket's timeout.
        """
        try:
            with self._sending:
                self.connection.sendall(HEADER.pack(kind, len(payload)) + payload)
        except OSError as error:
            raise LinkClosed(f"the link to {self.seat} broke: {error}") from error

    def receive(
        self, limit_bytes: int = FRAME_LIMIT_BYTES, within_s: float | None = None
    ) -> tuple[int, bytes]:
        """Receive one frame; waits for the socket's timeout at most, after each byte anew.

        Args:
            limit_bytes: longest payload.
            within_s: how long the whole frame may take, for a caller that is not trusted yet.

        Returns:
            The kind and the payload.

        Raises:
            TimeoutError: nothing, or only a part, arrived in time.
            LinkClosed: the other end is gone, or the frame is longer than ``limit_bytes``.
        """
        until = None if within_s is None else time.monotonic() + within_s
        self._fill(HEADER.size, until)
        kind, size = HEADER.unpack_from(self._unread)
        if size > limit_bytes:
            raise LinkClosed(
                f"{self.seat} sent a frame of {size} bytes; {limit_bytes} is the limit"
            )
        self._fill(HEADER.size + size, until)
        payload = bytes(self._unread[HEADER.size : HEADER.size + size])
        del self._unread[: HEADER.size + size]
        self.heard_ns = time.monotonic_ns()
        return kind, payload

    def whole(self, size: int) -> bool:
        """Tell, without waiting, whether so many bytes are here, or the other end is gone."""
        try:
            wanted = size - len(self._unread)
            seen = self.connection.recv(wanted, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            return len(seen) in (0, wanted)
        except BlockingIOError:
            return False
        except OSError:
            return True  # receiving says what it is

    def _fill(self, size: int, until: float | None) -> None:
        """Read until ``size`` bytes wait; what came before a timeout is kept for the next call."""
        while len(self._unread) < size:
            try:
                if until is not None:
                    self.connection.settimeout(max(0.001, until - time.monotonic()))
                piece = self.connection.recv(min(size - len(self._unread), 1 << 20))
            except TimeoutError:
                raise
            except OSError as error:
                raise LinkClosed(f"the link to {self.seat} broke: {error}") from error
            if piece and not self._unread:
                self.arrived_ns = self.clock()
            if not piece:
                raise LinkClosed(f"{self.seat} closed its link")
            self._unread += piece

    def close(self) -> None:
        """Close the connection; safe to call twice."""
        self.connection.close()


def listen(address: str, backlog: int, port: int = 0, who: str = "rank 0") -> socket.socket:
    """Open the socket on which rank 0, or a driver, takes the ranks' links.

    Args:
        address: this host's address on the interface that the ranks talk over.
        backlog: how many may call at once.
        port: 0 for any that is free.
        who: listens, for messages.

    Raises:
        UsageError: the address cannot be bound.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.socket(family, socket.SOCK_STREAM)
    try:
        server.bind((address, port))
        server.listen(max(backlog, 16))
    except OSError as error:
        server.close()
        raise UsageError(
            f"{who} cannot listen on {address}: {error.strerror}; check the interface's address"
        ) from error
    return server


def accept_links(
    server: socket.socket, own: Seat, world_size: int, token: str, timeout_s: float
) -> dict[int, Link]:
    """Take one proven link from each other rank; rank 0's half of ``open_link``.

    Args:
        server: from ``listen``; stays open.
        own: rank 0's seat.
        world_size: number of ranks, rank 0 included.
        token: the run's token.
        timeout_s: how long all ranks together may take.

    Returns:
        The link of each rank 1 .. world_size-1.

    Raises:
        UsageError: ranks did not call in time, or a path loses large packets.
    """
    links: dict[int, Link] = {}
    deadline = time.monotonic() + timeout_s
    while len(links) < world_size - 1:
        left = deadline - time.monotonic()
        server.settimeout(max(0.01, left))
        try:
            if left <= 0:  # strays may call without end
                raise TimeoutError
            connection, _ = server.accept()
        except TimeoutError:
            absent = sorted(set(range(1, world_size)) - set(links))
            for opened in links.values():
                opened.close()
            raise UsageError(
                f"ranks {absent} did not open their link to {own} within {timeout_s:.0f} s: "
                "is every node started, and does a firewall let them connect to it?"
            ) from None
        caller = greet(connection, own, token)
        if caller is None or caller.role or not 0 < caller.seat.rank < world_size:
            connection.close()  # a stray: another run, a scanner
            continue
        links[caller.seat.rank] = caller
        echo(caller, own, answers=True)
    return dict(sorted(links.items()))


def open_link(
    address: tuple[str, int],
    own: Seat,
    token: str,
    source: str,
    timeout_s: float,
    to: str = "rank 0",
    role: str = "",
) -> Link:
    """Open and prove this rank's link to rank 0, or to a driver.

    Args:
        address: where it listens.
        own: this rank's seat.
        token: the run's token, or the driver's.
        source: this host's address on the interface to use; "" leaves that to the kernel.
        timeout_s: how long the connection may take.
        to: whom it calls, for messages.
        role: what for; "" for a rank's own link.

    Raises:
        UsageError: the other end cannot be reached, or the path loses large packets.
    """
    for call in range(1, CALLS + 1):
        link = _connected(address, own, source, timeout_s, to, role)
        try:
            hello = {"token": token, "seat": asdict(own), "role": role}
            link.send(HELLO, json.dumps(hello).encode())
            _, answer = link.receive(HELLO_LIMIT_BYTES)
            link.seat = read_seat(json.loads(answer))
            break
        except (TimeoutError, LinkClosed, ValueError) as error:
            link.close()
            if call == CALLS or link.arrived_ns or isinstance(error, TimeoutError):
                why = "it has another token, or serves another run (--driver-token)"
                raise UsageError(
                    f"{own} reached {to} at {address[0]}, which hung up: {why if role else error}"
                ) from error
    link.connection.settimeout(ECHO_TIMEOUT_S)
    echo(link, own, answers=False)
    return link


def _connected(
    address: tuple[str, int], own: Seat, source: str, timeout_s: float, to: str, role: str
) -> Link:
    try:
        connection = socket.create_connection(address, timeout_s, (source, 0))
    except OSError as error:
        remedy = "a firewall between the nodes must let them connect to each other on any port"
        if role and isinstance(error, ConnectionRefusedError):
            remedy = f"start {to} before the ranks; it serves one run, and is started anew for each"
        raise UsageError(
            f"{own} cannot reach {to} at {address[0]} port {address[1]} from {source or 'here'}: "
            f"{error}; {remedy}"
        ) from error
    link = Link(_tuned(connection), Seat(0, address[0], "", "", 0))
    connection.settimeout(timeout_s)  # rank 0 greets one caller after the other, strays included
    return link


def _tuned(connection: socket.socket) -> socket.socket:
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connection.settimeout(ECHO_TIMEOUT_S)
    return connection


def greet(connection: socket.socket, own: Seat, token: str) -> Link | None:
    """Return the caller's link, with its role, if it shows the token, else None, which is told.

    Each address is told of once: a port scanner may call without end.
    """
    link = _greeted(connection, own, token)
    if link is None:
        _tell_stray(connection, own)
    return link


def _tell_stray(connection: socket.socket, own: Seat) -> None:
    with contextlib.suppress(OSError, ValueError):  # whoever reset the connection has no address
        caller = str(connection.getpeername()[0])
        if caller not in _told:
            _told.add(caller)
            sys.stderr.write(f"distbench: {own} hung up on {caller}: it showed no token of ours\n")


def _greeted(connection: socket.socket, own: Seat, token: str) -> Link | None:
    link = Link(_tuned(connection), Seat(-1, "?", "", "", 0))
    try:
        kind, payload = link.receive(HELLO_LIMIT_BYTES, HELLO_TIMEOUT_S)
        connection.settimeout(ECHO_TIMEOUT_S)
        hello = json.loads(payload) if kind == HELLO else {}
        if not hmac.compare_digest(str(hello.get("token")), token):
            return None
        link.seat, link.role = read_seat(hello["seat"]), str(hello.get("role", ""))
        link.send(HELLO, json.dumps(asdict(own)).encode())
    except (TimeoutError, LinkClosed):
        return None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None  # not what a rank of ours says
    return link


def echo(link: Link, own: Seat, *, answers: bool) -> None:
    """Send 64 bytes and then 1 MiB both ways; raises UsageError where they do not come back."""
    for size in (SMALL_ECHO_BYTES, LARGE_ECHO_BYTES):
        try:
            if not answers:
                link.send(ECHO, bytes(size))
            _, echoed = link.receive(LARGE_ECHO_BYTES)
            if len(echoed) != size:
                raise LinkClosed(f"{link.seat} echoed {len(echoed)} of {size} bytes")
            if answers:
                link.send(ECHO, echoed)
        except (TimeoutError, LinkClosed) as error:
            small = size == SMALL_ECHO_BYTES
            link.close()
            raise UsageError(_echo_sentence(link.seat, own, small)) from error


def _echo_sentence(peer: Seat, own: Seat, small: bool) -> str:
    if small:
        return (
            f"{own} and {peer} are connected, but 64 bytes did not come back within "
            f"{ECHO_TIMEOUT_S:.0f} s"
        )
    return (
        f"1 MiB between {own} and {peer} did not come back within {ECHO_TIMEOUT_S:.0f} s although "
        f"64 bytes did, so large packets are lost on the way: the MTU is {own.mtu} on "
        f"{own.host} {own.interface} and {peer.mtu} on {peer.host} {peer.interface}; set both to "
        "what the path carries (for example `ip link set dev "
        f"{own.interface or 'eth0'} mtu 1400`), or mend the switch or tunnel between them"
    )


def read_seat(fields: dict[str, Any]) -> Seat:
    """Read a ``Seat`` that a peer sent.

    Raises:
        ValueError: a field is missing or of the wrong kind.
    """
    try:
        return Seat(
            rank=int(fields["rank"]),
            host=str(fields["host"]),
            domain=str(fields["domain"]),
            interface=str(fields["interface"]),
            mtu=int(fields["mtu"]),
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"not a seat: {error}") from error
