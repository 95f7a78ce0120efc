"""Links over loopback: the handshake, strays, paths that lose large packets, frames in pieces."""

import contextlib
import json
import socket
import struct
import threading
import time
from dataclasses import asdict

import pytest

from distbench import network, wire
from distbench.errors import UsageError
from distbench.wire import HEADER, Link, LinkClosed, Seat

pytestmark = pytest.mark.timeout(30)

TOKEN = "0123456789abcdef0123456789abcdef"
LOCAL = "127.0.0.1"
ZERO = Seat(0, "jw2", "boot-a/1", "enp1s0", 9000)
ONE = Seat(1, "jw3", "boot-b/1", "enp2s0", 1500)
TWO = Seat(2, "jw4", "boot-c/1", "enp3s0", 1500)
SEATS = (ZERO, ONE, TWO)


@pytest.fixture
def server():
    with wire.listen(LOCAL, 4) as listening:
        yield listening


@pytest.fixture
def short(monkeypatch):
    """An echo that is lost is noticed after 1 s."""
    monkeypatch.setattr(wire, "ECHO_TIMEOUT_S", 1.0)


def call(server, seat, token=TOKEN, timeout_s=10.0):
    return wire.open_link(server.getsockname(), seat, token, LOCAL, timeout_s)


def connect(server):
    """A bare connection, as a stranger makes it."""
    return socket.create_connection(server.getsockname(), 10)


def say(connection, data):
    """Send what there is to say and no more; the other end may have hung up over it already."""
    with contextlib.suppress(OSError):
        connection.sendall(data)
        connection.shutdown(socket.SHUT_WR)


def frame(kind, payload=b""):
    return HEADER.pack(kind, len(payload)) + payload


def hello(seat, token=TOKEN):
    fields = seat if isinstance(seat, dict) else asdict(seat)
    return frame(wire.HELLO, json.dumps({"token": token, "seat": fields}).encode())


def close(*links):
    for link in links:
        link.close()


# The handshake


def test_both_ends_learn_who_is_there_and_frames_go_both_ways(server, pool):
    accepting = pool.submit(wire.accept_links, server, ZERO, 2, TOKEN, 10)
    there = call(server, ONE)
    links = accepting.result(10)
    here = links[1]
    assert list(links) == [1]
    assert (here.seat, there.seat) == (ONE, ZERO)
    for link in (here, there):
        assert link.connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    here.send(wire.ROSTER, b"from zero")
    there.send(wire.HEART)
    assert there.receive() == (wire.ROSTER, b"from zero")
    assert here.receive() == (wire.HEART, b"")
    close(here, there)


def test_links_are_in_order_of_rank_whoever_calls_first(server, pool):
    accepting = pool.submit(wire.accept_links, server, ZERO, 3, TOKEN, 10)
    late = call(server, TWO)
    early = call(server, ONE)
    links = accepting.result(10)
    assert [link.seat for link in links.values()] == [ONE, TWO]
    assert list(links) == [1, 2]
    close(early, late, *links.values())


def test_a_caller_uses_the_interface_that_it_was_given(server, pool):
    accepting = pool.submit(wire.accept_links, server, ZERO, 2, TOKEN, 10)
    there = wire.open_link(server.getsockname(), ONE, TOKEN, "127.0.0.9", 10)
    here = accepting.result(10)[1]
    assert here.connection.getpeername()[0] == "127.0.0.9"
    close(here, there)


@pytest.mark.parametrize(
    "said",
    [
        hello(ONE, "f" * 32),
        hello(ONE, TOKEN[:-1]),
        hello(ONE, "t\u00f6ken"),
        hello(ONE, None),
        hello(asdict(ONE) | {"rank": 0}),
        hello(asdict(ONE) | {"rank": 2}),
        hello(asdict(ONE) | {"rank": -1}),
        hello(asdict(ONE) | {"rank": "one"}),
        hello(asdict(ONE) | {"mtu": None}),
        hello({"rank": 1}),
        frame(wire.HELLO, json.dumps({"token": TOKEN}).encode()),
        frame(wire.HELLO, json.dumps({"token": TOKEN, "seat": [1, 2]}).encode()),
        frame(wire.HELLO, json.dumps([TOKEN]).encode()),
        frame(wire.HELLO, b"\xff\xfe"),
        frame(wire.HELLO, b"["),
        frame(wire.HELLO, b"[" * 4000),
        frame(wire.PING, hello(ONE)[HEADER.size :]),
        frame(wire.HELLO, hello(ONE)[HEADER.size :].ljust(4097)),
        HEADER.pack(wire.HELLO, 2**32 - 1),
        b"GET / HTTP/1.1\r\nHost: jw2\r\n\r\n",
        b"\x00",
        b"",
    ],
)
def test_a_stray_is_dropped_and_told_and_the_real_rank_is_still_accepted(
    server, pool, said, capsys, monkeypatch
):
    monkeypatch.setattr(wire, "_told", set())
    accepting = pool.submit(wire.accept_links, server, ZERO, 2, TOKEN, 10)
    with connect(server) as stray:
        say(stray, said)
        there = call(server, ONE)
        here = accepting.result(10)[1]
        assert here.seat == ONE
        # Nothing but a closed connection, or rank 0's seat where the token was right, comes back.
        told = b""
        try:
            while piece := stray.recv(4096):
                told += piece
        except ConnectionResetError:
            pass
        assert told in (b"", frame(wire.HELLO, json.dumps(asdict(ZERO)).encode()))
        if TOKEN.encode() not in said:
            assert told == b""
            line = "distbench: rank 0 (jw2) hung up on 127.0.0.1: it showed no token of ours\n"
            assert capsys.readouterr().err == line
    close(here, there)


def test_a_stray_that_comes_again_is_told_once(server, pool, capsys, monkeypatch):
    monkeypatch.setattr(wire, "_told", set())
    accepting = pool.submit(wire.accept_links, server, ZERO, 2, TOKEN, 10)
    for _ in range(5):
        with connect(server) as stray:
            say(stray, b"GET / HTTP/1.1\r\n\r\n")
            with contextlib.suppress(ConnectionResetError):
                assert stray.recv(1) == b""
    there = call(server, ONE)
    close(accepting.result(10)[1], there)
    assert capsys.readouterr().err.count("hung up on") == 1


def test_a_stray_that_says_nothing_holds_nobody_up_for_good(server, pool, short):
    # Rank 0 waits for the stray as long as a caller may take, and the real rank for its turn.
    with connect(server), connect(server):
        accepting = pool.submit(wire.accept_links, server, ZERO, 2, TOKEN, 10)
        there = call(server, ONE)
        here = accepting.result(10)[1]
        assert here.seat == ONE
        close(here, there)


def test_ranks_that_never_call_are_named(server, pool):
    accepting = pool.submit(wire.accept_links, server, ZERO, 4, TOKEN, 1.5)
    there = call(server, TWO)
    with pytest.raises(UsageError) as caught:
        accepting.result(10)
    assert str(caught.value).startswith("ranks [1, 3] did not open their link to rank 0 (jw2)")
    assert "firewall" in str(caught.value)
    # The rank that did call learns of it.
    with pytest.raises(LinkClosed):
        there.receive()
    close(there)


def test_nobody_there_to_call():
    with socket.socket() as bound:  # bound and not listening: nobody else can take the port
        bound.bind((LOCAL, 0))
        with pytest.raises(UsageError) as caught:
            wire.open_link(bound.getsockname(), ONE, TOKEN, LOCAL, 5)
    told = str(caught.value)
    assert told.startswith(f"rank 1 (jw3) cannot reach rank 0 at {LOCAL} port ")
    assert "refused" in told
    assert "firewall" in told


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\x00",
        frame(wire.HELLO, b"no json"),
        frame(wire.HELLO, b"[]"),
        frame(wire.HELLO, b'{"rank": 0}'),
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_something_else_answers_at_the_address_of_rank_0(server, pool, answer):
    calling = pool.submit(call, server, ONE)
    for _ in range(1 if answer else wire.CALLS):  # who only hangs up may have lost the first packet
        connection, _ = server.accept()
        with connection:
            say(connection, answer)
            connection.settimeout(5)
            connection.recv(4096)
    with pytest.raises(UsageError, match=r"rank 1 \(jw3\) reached rank 0 at .*, which hung up"):
        calling.result(10)


def test_rank_0_that_never_answers(server, pool):
    calling = pool.submit(call, server, ONE, timeout_s=0.3)
    connection, _ = server.accept()
    with connection, pytest.raises(UsageError, match="which hung up: timed out"):
        calling.result(10)


def test_an_address_that_is_not_of_this_host_cannot_be_listened_on():
    with pytest.raises(UsageError, match=r"rank 0 cannot listen on 192\.0\.2\.1: .*interface's"):
        wire.listen("192.0.2.1", 1)


def test_listening_on_ipv6():
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    try:
        with wire.listen("::1", 1) as listening:
            assert listening.family == socket.AF_INET6
    except UsageError as error:
        assert "rank 0 cannot listen on ::1" in str(error)  # a host without IPv6 says so


# Paths that lose packets


def receive(connection, size):
    data = b""
    while len(data) < size:
        piece = connection.recv(size - len(data))
        assert piece, "closed"
        data += piece
    return data


def receive_frame(connection):
    kind, size = HEADER.unpack(receive(connection, HEADER.size))
    return kind, receive(connection, size)


def echo_back(connection, sizes):
    """Answer the hello of a caller, then echo frames of these sizes and no other."""
    assert receive_frame(connection)[0] == wire.HELLO
    connection.sendall(frame(wire.HELLO, json.dumps(asdict(ZERO)).encode()))
    for size in sizes:
        kind, payload = receive_frame(connection)
        assert (kind, len(payload)) == (wire.ECHO, size)
        connection.sendall(frame(kind, payload))


def check_large_packets_sentence(told, own, peer):
    assert told.startswith(f"1 MiB between {own} and {peer} did not come back within 1 s")
    assert "although 64 bytes did" in told
    assert f"the MTU is {own.mtu} on {own.host} {own.interface}" in told
    assert f"and {peer.mtu} on {peer.host} {peer.interface}" in told
    assert f"ip link set dev {own.interface} mtu" in told


def test_a_caller_whose_large_echo_is_lost_names_both_mtus(server, pool, short):
    calling = pool.submit(call, server, ONE)
    connection, _ = server.accept()
    with connection:
        echo_back(connection, [64])
        with pytest.raises(UsageError) as caught:
            calling.result(10)
    check_large_packets_sentence(str(caught.value), own=ONE, peer=ZERO)


def test_rank_0_whose_large_echo_is_lost_names_both_mtus(server, pool, short):
    accepting = pool.submit(wire.accept_links, server, ZERO, 2, TOKEN, 10)
    with connect(server) as connection:
        connection.sendall(hello(ONE))
        assert receive_frame(connection)[0] == wire.HELLO
        connection.sendall(frame(wire.ECHO, bytes(64)))
        assert receive_frame(connection) == (wire.ECHO, bytes(64))
        connection.sendall(frame(wire.ECHO, bytes(1 << 20))[: 1 << 19])
        with pytest.raises(UsageError) as caught:
            accepting.result(10)
    check_large_packets_sentence(str(caught.value), own=ZERO, peer=ONE)


def test_a_small_echo_that_is_lost(server, pool, short):
    calling = pool.submit(call, server, ONE)
    connection, _ = server.accept()
    with connection:
        echo_back(connection, [])
        with pytest.raises(UsageError) as caught:
            calling.result(10)
    assert str(caught.value) == (
        "rank 1 (jw3) and rank 0 (jw2) are connected, but 64 bytes did not come back within 1 s"
    )


def test_an_echo_of_another_length_is_no_echo(server, pool):
    calling = pool.submit(call, server, ONE)
    connection, _ = server.accept()
    with connection:
        echo_back(connection, [])
        receive_frame(connection)
        connection.sendall(frame(wire.ECHO, bytes(63)))
        with pytest.raises(UsageError, match="64 bytes did not come back") as caught:
            calling.result(10)
    assert "echoed 63 of 64 bytes" in str(caught.value.__cause__)


# Frames


@pytest.fixture
def ends():
    """A link to rank 1, and the bare socket at its other end."""
    here, there = socket.socketpair()
    here.settimeout(0.05)
    there.settimeout(10)
    with here, there:
        yield Link(here, ONE), there


@pytest.mark.parametrize("cut", [1, 4, 5, 6, 20])
def test_a_frame_in_pieces_around_a_timeout_is_not_lost(ends, cut):
    link, there = ends
    whole = frame(wire.ARRIVED, b"fifteen letters") + frame(wire.HEART, b"next")
    heard = link.heard_ns
    there.sendall(whole[:cut])
    for _ in range(2):
        if cut < HEADER.size + 15:
            with pytest.raises(TimeoutError):
                link.receive()
            assert link.heard_ns == heard
    there.sendall(whole[cut:])
    assert link.receive() == (wire.ARRIVED, b"fifteen letters")
    assert link.heard_ns > heard
    assert link.receive() == (wire.HEART, b"next")
    with pytest.raises(TimeoutError):
        link.receive()


def test_a_frame_above_the_limit_is_refused_before_it_is_read(ends):
    link, there = ends
    there.sendall(frame(wire.HELLO, b"x" * 100))
    with pytest.raises(LinkClosed, match=r"rank 1 \(jw3\) sent a frame of 100 bytes; 99 is"):
        link.receive(99)
    assert link.receive(100) == (wire.HELLO, b"x" * 100)
    there.sendall(HEADER.pack(wire.ROSTER, (64 << 20) + 1))
    with pytest.raises(LinkClosed, match="67108864 is the limit"):
        link.receive()


def test_the_end_of_a_link_and_half_a_frame_before_it(ends):
    link, there = ends
    there.sendall(frame(wire.HEART, b"12345678")[:7])
    there.close()
    with pytest.raises(LinkClosed, match=r"rank 1 \(jw3\) closed its link"):
        link.receive()
    with pytest.raises(LinkClosed, match=r"the link to rank 1 \(jw3\) broke"):
        link.send(wire.HEART, bytes(1 << 20))


def test_a_connection_that_is_reset(server):
    with connect(server) as there:
        connection, _ = server.accept()
        link = Link(connection, ONE)
        connection.settimeout(10)
        there.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    with pytest.raises(LinkClosed, match=r"the link to rank 1 \(jw3\) broke: .*reset"):
        link.receive()
    link.close()
    link.close()


def test_a_peer_that_does_not_read_breaks_the_link_after_the_timeout(ends):
    link, _ = ends
    with pytest.raises(LinkClosed, match="timed out"):
        link.send(wire.ROSTER, bytes(8 << 20))


def test_frames_of_several_threads_are_not_mixed(ends, pool):
    link, there = ends
    link.connection.settimeout(10)
    start = threading.Barrier(4)

    def send(letter):
        start.wait()
        for count in range(50):
            link.send(wire.HEART, bytes([letter]) * (5_000 + count))

    sending = [pool.submit(send, letter) for letter in b"abcd"]
    seen = []
    for _ in range(200):
        kind, payload = receive_frame(there)
        assert kind == wire.HEART
        assert len(set(payload)) == 1
        seen.append((payload[0], len(payload)))
    for each in sending:
        each.result(10)
    for letter in b"abcd":  # each thread's own frames are in order
        assert [n for who, n in seen if who == letter] == list(range(5_000, 5_050))


def test_a_link_is_heard_on_the_clock_of_its_watch(ends):
    link, there = ends
    before = time.monotonic_ns()
    there.sendall(frame(wire.HEART))
    link.receive()
    assert before <= link.heard_ns <= time.monotonic_ns()
    assert link.fileno() == link.connection.fileno()


def test_a_frame_is_stamped_when_its_first_bytes_are_there(ends):
    link, there = ends
    reading = iter(range(100, 200))
    link.clock = lambda: next(reading)
    there.sendall(frame(wire.PING, b"first"))
    link.receive()
    assert link.arrived_ns == 100
    # A frame in pieces: the stamp is that of the first piece, whenever the last one comes.
    whole = frame(wire.PING, b"second")
    there.sendall(whole[:3])
    for _ in range(2):
        with pytest.raises(TimeoutError):
            link.receive()
    assert link.arrived_ns == 101
    there.sendall(whole[3:] + frame(wire.PING, b"third"))
    assert link.receive() == (wire.PING, b"second")
    assert link.arrived_ns == 101
    link.receive()
    assert link.arrived_ns == 102


# Seats


def test_a_seat_comes_back_from_json():
    for seat in SEATS:
        assert wire.read_seat(json.loads(json.dumps(asdict(seat)))) == seat
    assert str(ONE) == "rank 1 (jw3)"


@pytest.mark.parametrize("name", ["rank", "host", "domain", "interface", "mtu"])
def test_a_seat_that_lacks_a_field_is_no_seat(name):
    fields = asdict(ONE)
    del fields[name]
    with pytest.raises(ValueError, match=f"not a seat: '{name}'"):
        wire.read_seat(fields)


def test_the_mtu_of_an_interface():
    _, name = socket.if_nameindex()[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        import fcntl

        asked = fcntl.ioctl(probe, 0x8921, name.encode().ljust(32, b"\0"))  # SIOCGIFMTU
    assert network.interface_mtu(name) == struct.unpack_from("i", asked, 16)[0]
    assert network.interface_mtu("no-such-interface") == 0
    assert network.interface_mtu("") == 0


def test_a_stray_that_drips_bytes_is_cut_off(server, pool, monkeypatch):
    """A byte now and then must not make each wait begin anew."""
    monkeypatch.setattr(wire, "HELLO_TIMEOUT_S", 0.3)
    accepting = pool.submit(wire.accept_links, server, ZERO, 2, TOKEN, 10)
    with connect(server) as stray:
        stop = threading.Event()

        def drip():
            with contextlib.suppress(OSError):
                while not stop.wait(0.1):
                    stray.send(b"\0")

        dripping = pool.submit(drip)
        begin = time.monotonic()
        there = call(server, ONE, timeout_s=5)
        here = accepting.result(5)[1]
        assert time.monotonic() - begin < 2
        stop.set()
        dripping.result(5)
        close(here, there)


def test_a_rank_taken_for_a_stray_calls_again(server, pool, monkeypatch):
    """Its first packet was lost twice on the way: what rank 0 hung up on was a rank of ours."""
    accepting = pool.submit(wire.accept_links, server, ZERO, 2, TOKEN, 10)
    real, late = wire._greeted, [1, 2]
    monkeypatch.setattr(
        wire, "_greeted", lambda *call: late.pop() and None if late else real(*call)
    )
    there = call(server, ONE, timeout_s=5)
    close(accepting.result(5)[1], there)
    assert not late


def test_a_rank_that_is_hung_up_on_for_good_says_so(server, pool, monkeypatch):
    accepting = pool.submit(wire.accept_links, server, ZERO, 2, TOKEN, 1)
    calls = []
    monkeypatch.setattr(wire, "_greeted", lambda *call: calls.append(call))
    with pytest.raises(UsageError, match="which hung up"):
        call(server, ONE, timeout_s=5)
    with pytest.raises(UsageError, match="did not open their link"):
        accepting.result(5)
    assert len(calls) == wire.CALLS


def test_strays_without_end_do_not_outlast_the_limit(server, pool, monkeypatch):
    monkeypatch.setattr(wire, "HELLO_TIMEOUT_S", 0.2)
    accepting = pool.submit(wire.accept_links, server, ZERO, 2, TOKEN, 0.5)
    strays = [connect(server) for _ in range(12)]
    begin = time.monotonic()
    with pytest.raises(UsageError, match="did not open their link"):
        accepting.result(5)
    assert time.monotonic() - begin < 2
    close(*strays)
