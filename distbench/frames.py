"""Messages of central dispatch: small fixed frames over a socket that never makes its owner wait.

A frame is a kind, how many bytes of data follow it, and two integers:

    QUERY  seq, index     to a worker: serve this query; with ``--payload data`` its sample follows
    DONE   seq, tokens    from a worker: it has ended, with so many tokens; -1: it failed
    FIRST  seq, stamp     from a worker: its first token is out, when on the worker's clock; under
                          LoadGen the token itself follows
    PULSE  0, 0           the other end lives; sent each second
    END    code, 0        to a worker: no more queries come; HALTED: drop those not issued
    LEFT   queries, code  from a worker: its loop is over; RAISED: its system under test raised
    LOAD, UNLOAD   n, 0   to a worker, with n sample indices as data; untimed
    LOADED n, 0           from a worker: done

and where LoadGen drives, whose samples come in one piece and whose log holds the answers:

    QUERIES  seq, n       to a worker: serve n queries from this number on; their indices follow
    DONE                  as above, with the answer as data
    DONES    seq, n       from a worker: n queries from this number on have ended; either nothing
                          follows, or the length of each answer, then the answers
    NAME     0, 0         to a worker: what serves there?
    NAMED    0, 0         from a worker: its name follows

What is posted together is sent together, and all that has come is read at once. Nothing is
unpickled.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import time
from collections.abc import Sequence

from distbench.errors import DistbenchError

FRAME = struct.Struct("<IIqq")
QUERY, DONE, FIRST, PULSE, END, LEFT, LOAD, UNLOAD, LOADED, QUERIES, DONES, NAME, NAMED = range(
    1, 14
)
WHOLE, HALTED, LOST, RAISED = range(4)
"""Codes of END and LEFT; LOST is never sent: it is what the end of a link reads as."""
FAILED_TOKENS = -1
PULSE_NS, SILENCE_S = 1_000_000_000, 5.0
"""Without a word for ``SILENCE_S`` the other end is taken for lost."""
READ_BYTES = 1 << 18
DATA_LIMIT_BYTES = 64 << 20
UNSENT_LIMIT_BYTES = 256 << 20
"""What may wait for an end that does not read; then its link is taken for broken."""
USER_TIMEOUT_MS = 10_000
WAIT_S = 1
_LIMIT = struct.pack("ll", WAIT_S, 0)  # struct timeval

Frame = tuple[int, int, int, bytes]
"""Kind, the two integers, and the data."""


def packed(answers: Sequence[bytes]) -> bytes:
    """Return what follows DONES: nothing where all answers are empty."""
    if not any(answers):
        return b""
    lengths = struct.pack(f"<{len(answers)}I", *map(len, answers))
    return lengths + b"".join(answers)


def unpacked(count: int, data: bytes) -> list[bytes]:
    """Return the answers that follow DONES.

    Raises:
        ValueError: it is not what ``packed`` makes of so many.
    """
    if not data:
        return [b""] * count
    if len(data) < 4 * count:
        raise ValueError(f"{len(data)} bytes hold no {count} answers")
    found, at = [], 4 * count
    for length in struct.unpack_from(f"<{count}I", data):
        found.append(data[at : at + length])
        at += length
    if at != len(data):
        raise ValueError(f"{len(data)} bytes hold answers of {at}")
    return found


class ChannelLost(DistbenchError):
    """The other end is gone, silent, or says what is no frame."""


class Channel:
    """One end of a link that carries queries and completions.

    Attributes:
        name: of the other end, for messages.
        heard: when something last arrived, on ``time.monotonic``.
    """

    def __init__(self, connection: socket.socket, name: str) -> None:
        # Blocking, with a limit, for ``await_frames``: one system call waits and reads. All else
        # says MSG_DONTWAIT.
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _LIMIT)
        with contextlib.suppress(OSError):  # a socket pair of a test is no TCP
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        self.connection, self.name = connection, name
        self.heard = time.monotonic()
        self._unsent = bytearray()
        self._space = bytearray(READ_BYTES)
        self._view = memoryview(self._space)
        self._filled = 0

    def fileno(self) -> int:
        """Return the socket's descriptor."""
        return self.connection.fileno()

    def post(self, kind: int, one: int, other: int, data: bytes = b"") -> None:
        """Add a frame to what ``flush`` sends."""
        self._unsent += FRAME.pack(kind, len(data), one, other)
        if data:
            self._unsent += data

    def flush(self) -> bool:
        """Send what was posted, as far as the other end takes it now; tells whether all went.

        Raises:
            ChannelLost: the other end is gone, or has not read for too long.
        """
        unsent = self._unsent
        if not unsent:
            return True
        try:
            sent = self.connection.send(unsent, socket.MSG_DONTWAIT)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            raise ChannelLost(f"the link to {self.name} broke: {error}") from error
        if sent == len(unsent):
            unsent.clear()
            return True
        del unsent[:sent]
        if len(unsent) > UNSENT_LIMIT_BYTES:
            raise ChannelLost(f"{self.name} does not read: {len(unsent)} bytes wait for it")
        return False

    def drain(self, within_s: float) -> None:
        """Send all that was posted, waiting for the other end to take it.

        Raises:
            ChannelLost: it is gone, or did not take all in time.
        """
        until = time.monotonic() + within_s
        while not self.flush():
            left = until - time.monotonic()
            if left <= 0 or not select.select([], [self.connection], [], left)[1]:
                raise ChannelLost(f"{self.name} did not read for {within_s:.0f} s")

    def await_frames(self, within_s: float = WAIT_S) -> list[Frame]:
        """Wait for frames, and return them; what was posted before and not taken goes meanwhile.

        Args:
            within_s: for so long at most; none is an empty list.

        Raises:
            ChannelLost: as ``read`` and ``flush``.
        """
        if self.flush() and within_s == WAIT_S:
            return self.read(0)  # one system call, in which the other end's word comes soonest
        writing = [self.connection] if self._unsent else []
        readable, writable, _ = select.select([self.connection], writing, [], within_s)
        if writable:
            self.flush()
        return self.read() if readable else []

    def read(self, flags: int = socket.MSG_DONTWAIT) -> list[Frame]:
        """Return the frames that have arrived since the last call; none is an empty list.

        Args:
            flags: of the system call; 0 waits.

        Raises:
            ChannelLost: the other end is gone, or what it sent is no frame.
        """
        try:
            size = self.connection.recv_into(self._view[self._filled :], 0, flags)
        except BlockingIOError:
            return []
        except OSError as error:
            raise ChannelLost(f"the link to {self.name} broke: {error}") from error
        if size == 0:
            raise ChannelLost(f"the link to {self.name} ended")
        self.heard = time.monotonic()
        return self._frames(self._filled + size)

    def _frames(self, end: int) -> list[Frame]:
        """Take the whole frames out of the first ``end`` bytes of what was read."""
        at, space, found = 0, self._space, []
        while end - at >= FRAME.size:
            kind, size, one, other = FRAME.unpack_from(space, at)
            if not QUERY <= kind <= NAMED or size > DATA_LIMIT_BYTES:
                raise ChannelLost(f"{self.name} sent what is no frame")
            begin = at + FRAME.size
            if end - begin < size:
                if FRAME.size + size > len(space):
                    self._grow(2 * size, end)
                break
            found.append((kind, one, other, bytes(space[begin : begin + size]) if size else b""))
            at = begin + size
        self._filled = end - at
        if at and self._filled:
            self._space[: self._filled] = self._space[at:end]
        return found

    def _grow(self, size: int, end: int) -> None:
        """Make room for a frame that is larger than what is read at once."""
        larger = bytearray(size)
        larger[:end] = self._space[:end]
        self._space, self._view = larger, memoryview(larger)

    def silent(self, now: float) -> bool:
        """Tell whether nothing was heard for ``SILENCE_S``; ``now`` is of ``time.monotonic``."""
        return now - self.heard > SILENCE_S

    def close(self) -> None:
        """Close the connection; safe to call twice."""
        self.connection.close()
