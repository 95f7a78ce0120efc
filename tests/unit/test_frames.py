"""Frames of central dispatch over a socket pair: pieces, floods, ends, and what is no frame."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections.abc import Iterator

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbench import frames

from distbench.frames import packed, unpacked  # isort: skip
from distbench.frames import DONE, FRAME, NAMED, PULSE, QUERY, READ_BYTES, Channel, ChannelLost

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    here, there = socket.socketpair()
    with here, there:
        yield Channel(here, "rank 1 (jw3)"), there


def test_what_is_posted_is_sent_at_once_and_read_at_once() -> None:
    here, there = (Channel(each, "the other end") for each in socket.socketpair())
    here.post(QUERY, 5, 77)
    assert there.read() == []
    here.post(QUERY, 6, -1, b"sample")
    here.post(PULSE, 0, 0)
    assert here.flush()
    assert there.read() == [(QUERY, 5, 77, b""), (QUERY, 6, -1, b"sample"), (PULSE, 0, 0, b"")]
    assert there.read() == []
    here.close()
    there.close()


integers = st.integers(-(2**63), 2**63 - 1)
told = st.tuples(st.integers(QUERY, NAMED), integers, integers, st.binary(max_size=90))


@settings(max_examples=100, deadline=None)
@given(st.lists(told, min_size=1, max_size=8), st.data())
def test_frames_survive_any_cut(
    sent: list[tuple[int, int, int, bytes]], data: st.DataObject
) -> None:
    one, there = socket.socketpair()
    with one, there:
        assert cut(Channel(one, "x"), there, sent, data) == sent


def cut(
    here: Channel,
    there: socket.socket,
    sent: list[tuple[int, int, int, bytes]],
    data: st.DataObject,
) -> list[frames.Frame]:
    """Send frames in pieces, and return what was read in between."""
    raw = b"".join(FRAME.pack(k, len(d), a, b) + d for k, a, b, d in sent)
    got: list[frames.Frame] = []
    at = 0
    while at < len(raw):
        step = data.draw(st.integers(1, 60))
        there.sendall(raw[at : at + step])
        got += here.read()
        at += step
    return got


def test_a_frame_larger_than_what_is_read_at_once(ends: tuple[Channel, socket.socket]) -> None:
    here, there = ends
    data = bytes(range(256)) * (READ_BYTES // 128)
    sender = Channel(there, "y")
    sender.post(DONE, 1, 2)
    sender.post(QUERY, 3, 4, data)
    sender.post(DONE, 5, 6)
    thread = threading.Thread(target=sender.drain, args=(20,))
    thread.start()
    got = []
    until = time.monotonic() + 20
    while len(got) < 3 and time.monotonic() < until:
        got += here.read()
    thread.join(20)
    assert got == [(DONE, 1, 2, b""), (QUERY, 3, 4, data), (DONE, 5, 6, b"")]


@pytest.mark.parametrize(
    "said",
    [
        b"GET / HTTP/1.1\r\nHost: jw2\r\n\r\n",
        FRAME.pack(0, 0, 1, 2),
        FRAME.pack(NAMED + 1, 0, 1, 2),
        FRAME.pack(QUERY, frames.DATA_LIMIT_BYTES + 1, 1, 2),
    ],
)
def test_what_is_no_frame_is_refused(ends: tuple[Channel, socket.socket], said: bytes) -> None:
    here, there = ends
    there.sendall(said)
    with pytest.raises(ChannelLost, match=r"rank 1 \(jw3\) sent what is no frame"):
        here.read()


def test_the_end_of_the_other_end(ends: tuple[Channel, socket.socket]) -> None:
    here, there = ends
    there.sendall(FRAME.pack(DONE, 0, 1, 2)[:7])
    assert here.read() == []
    there.close()
    with pytest.raises(ChannelLost, match=r"the link to rank 1 \(jw3\) ended"):
        here.read()
    here.post(DONE, 1, 2)
    with pytest.raises(ChannelLost, match=r"the link to rank 1 \(jw3\) broke"):
        here.flush()


def test_a_connection_that_is_reset() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        there = socket.create_connection(server.getsockname())
        connection, _ = server.accept()
    here = Channel(connection, "rank 1 (jw3)")
    there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    there.close()
    with pytest.raises(ChannelLost, match="reset"):
        here.read()
    here.close()
    here.close()


def test_an_end_that_does_not_read_never_makes_the_other_wait(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    here, there = ends
    monkeypatch.setattr(frames, "UNSENT_LIMIT_BYTES", 4 << 20)
    here.post(QUERY, 1, 2, bytes(1 << 20))
    begin = time.monotonic()
    assert not here.flush()
    assert time.monotonic() - begin < 5
    with pytest.raises(ChannelLost, match="did not read for 0 s"):
        here.drain(0.05)
    # What waits goes out once it reads, in order and whole.
    other = Channel(there, "z")
    got = []
    for _ in range(10_000):
        got += other.read()
        if here.flush() and got:
            break
    assert [(kind, one, len(data)) for kind, one, _, data in got] == [(QUERY, 1, 1 << 20)]
    here.post(QUERY, 1, 2, bytes(8 << 20))
    with pytest.raises(ChannelLost, match="does not read"):
        here.flush()


def test_what_an_end_did_not_take_goes_while_its_writer_waits(
    ends: tuple[Channel, socket.socket],
) -> None:
    """The last answers of a million: nothing more is posted, and nobody flushes again."""
    here, there = ends
    other = Channel(there, "z")
    here.post(QUERY, 1, 2, bytes(4 << 20))
    assert not here.flush()
    got = []
    for _ in range(2_000):
        got += other.read()
        if got:
            break
        assert here.await_frames(0.01) == []
    assert [(one, len(data)) for _, one, _, data in got] == [(1, 4 << 20)]
    other.post(QUERY, 7, 0)
    other.flush()
    assert here.await_frames() == [(QUERY, 7, 0, b"")]


def test_silence_is_noticed(ends: tuple[Channel, socket.socket]) -> None:
    here, there = ends
    now = here.heard
    assert not here.silent(now + 4.9)
    assert here.silent(now + 5.1)
    there.sendall(FRAME.pack(PULSE, 0, 0, 0))
    time.sleep(0.001)  # the clock's step
    assert here.read() == [(PULSE, 0, 0, b"")]
    assert here.heard > now


@given(st.lists(st.binary(max_size=9), max_size=20))
def test_answers_come_out_as_they_went_in(answers: list[bytes]) -> None:
    data = packed(answers)
    assert unpacked(len(answers), data) == answers
    assert data or not any(answers)


@pytest.mark.parametrize("data", [b"abc", b"\x05\0\0\0abcd", b"\x01\0\0\0abcd"])
def test_answers_that_do_not_add_up(data: bytes) -> None:
    with pytest.raises(ValueError, match="bytes hold"):
        unpacked(1, data)
