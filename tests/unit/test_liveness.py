"""Side threads of two or three ranks in one process, joined by socket pairs.

A rank that ends does not end this process: ``os._exit`` is a stand-in that notes the status and
stops the thread that called it.
"""

import contextlib
import json
import os
import queue
import signal
import socket
import struct
import threading
import time
from types import SimpleNamespace

import pytest

from distbench import liveness, pings, wire
from distbench.clock import ClockModel, Exchange, SkewedClock, now_ns
from distbench.errors import ClockError, DistbenchError, UsageError
from distbench.liveness import End, SideThread
from distbench.wire import HEADER, Link, Seat

pytestmark = pytest.mark.timeout(30)

WAIT_S = 20.0
"""Longer than anything here takes; nothing waits that long unless it fails."""
TICK_S = 0.03


def seat(rank, domain=None):
    return Seat(rank, f"host-{rank}", domain or "clock-0", "eth0", 1500)


def until(condition):
    """Wait for what another thread is about to do."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.001)


class Ranks:
    """Side threads with links between them, as ``join`` makes them, and bare sockets as peers."""

    def __init__(self):
        self.sides, self.sockets = [], []
        self.ends = queue.Queue()  # (rank, End) of each on_end
        self.exits = queue.Queue()  # (rank or None for another thread, status) of each os._exit

    def pair(self):
        pair = socket.socketpair()
        self.sockets += pair
        for each in pair:
            each.settimeout(WAIT_S)
        return pair

    def side(self, seats, rank, links, now=now_ns):
        made = SideThread(seats, rank, links, now)
        made.on_end = lambda end: self.ends.put((rank, end))
        made._thread = threading.Thread(
            target=self.run, args=(made,), name=f"side-{rank}", daemon=True
        )
        self.sides.append(made)
        return made

    @staticmethod
    def run(side):
        with contextlib.suppress(SystemExit):
            side._run()

    def star(self, size, domains=None, clocks=None, start=True):
        """``size`` ranks, each linked to rank 0."""
        domains = domains or ["clock-0"] * size
        clocks = clocks or [now_ns] * size
        seats = [seat(rank, domains[rank]) for rank in range(size)]
        here, sides = {}, []
        for rank in range(1, size):
            ours, theirs = self.pair()
            here[rank] = Link(ours, seats[rank])
            sides.append(self.side(seats, rank, {0: Link(theirs, seats[0])}, clocks[rank]))
        sides.insert(0, self.side(seats, 0, here, clocks[0]))
        if start:
            for side in sides:
                side.start()
        return sides

    def with_a_bare_peer(self, rank=0, peer=1, domain=None, start=True, now=now_ns):
        """One rank of two, and the socket that its peer would hold."""
        ours, theirs = self.pair()
        seats = [seat(0), seat(1, domain)]
        side = self.side(seats, rank, {peer: Link(ours, seats[peer])}, now)
        if start:
            side.start()
        return side, Link(theirs, seats[rank])

    def leave(self, status):
        thread = threading.current_thread()
        rank = int(thread.name[5:]) if thread.name.startswith("side-") else None
        self.exits.put((rank, status))
        if not isinstance(thread, threading.Timer):
            raise SystemExit(status)

    def ended(self, count=1):
        """The ends of ``count`` ranks, and that each process left with the status of its end."""
        ends = dict(self.ends.get(timeout=WAIT_S) for _ in range(count))
        left = dict(self.exits.get(timeout=WAIT_S) for _ in range(count))
        assert left == {rank: end.exit_code for rank, end in ends.items()}
        return ends

    def close(self):
        for side in reversed(self.sides):
            if side._thread.ident is None:
                side._thread = threading.Thread(target=lambda: None)
                side._thread.start()
            side.stop()
            assert not side._thread.is_alive()
        for each in self.sockets:
            each.close()


@pytest.fixture
def ranks(monkeypatch):
    monkeypatch.setattr(liveness, "TICK_S", TICK_S)
    monkeypatch.setattr(pings, "TRIP_TIMEOUT_S", 5.0)  # a busy machine is no lost ping
    made = Ranks()
    monkeypatch.setattr(liveness, "os", SimpleNamespace(_exit=made.leave))
    yield made
    made.close()
    assert made.ends.empty()


IDLE = float("inf")


def heart(count, limit_s, halted=0):
    return struct.pack("<qdq", count, limit_s, halted)


# Giving a window up


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_window_that_one_loop_gives_up_is_given_up_by_all(ranks, first):
    sides = ranks.star(3)
    halts = [side.open_window() for side in sides]
    assert halts == [[False]] * 3
    halts[first][0] = True
    until(lambda: halts == [[True]] * 3)
    # The next window begins afresh, and heartbeats of the one before do not reach it.
    halts = [side.open_window() for side in sides]
    assert halts == [[False]] * 3


def test_news_of_another_window_changes_nothing(ranks):
    side, peer = ranks.with_a_bare_peer()
    side.open_window()
    halt = side.open_window()
    for number in (1, 3, 0):
        peer.send(wire.HEART, heart(1, IDLE, number))
    peer.send(wire.HEART, heart(99, IDLE))
    until(lambda: side._counts.get(1, (0,))[0] == 99)
    assert halt == [False]
    peer.send(wire.HEART, heart(99, IDLE, 2))
    until(lambda: halt == [True])


def test_no_news_comes_before_the_first_window(ranks):
    side, peer = ranks.with_a_bare_peer()
    peer.send(wire.HEART, heart(5, IDLE, 0))
    until(lambda: side._counts.get(1, (0,))[0] == 5)
    assert side.halt == [False]


# Meeting


def test_all_ranks_meet_and_hear_the_answer_to_all_payloads(ranks, pool):
    sides = ranks.star(3)

    def answer(payloads):
        return b"+".join(payloads)

    meetings = [
        pool.submit(side.meet, "place", f"from {side.rank}".encode(), answer) for side in sides
    ]
    assert [each.result(WAIT_S) for each in meetings] == [b"from 0+from 1+from 2"] * 3


def test_a_meeting_waits_for_the_last_rank_whoever_it_is(ranks, pool):
    sides = ranks.star(3)
    for late in (0, 1, 2):
        name = f"late-{late}-\u00e4"
        meetings = [
            pool.submit(side.meet, name, bytes([side.rank]), b"".join)
            for side in sides
            if side.rank != late
        ]
        until(lambda name=name: len(sides[0]._arrived.get(name, ())) == 2)
        assert not any(each.done() for each in meetings)
        assert sides[late].meet(name, bytes([late]), b"".join) == b"\0\1\2"
        assert [each.result(WAIT_S) for each in meetings] == [b"\0\1\2"] * 2


def test_a_meeting_without_an_answer_gives_nothing(ranks, pool):
    sides = ranks.star(2)
    meetings = [pool.submit(side.meet, "plain", b"ignored") for side in sides]
    assert [each.result(WAIT_S) for each in meetings] == [b"", b""]


def test_meetings_that_overlap_are_told_apart(ranks, pool):
    sides = ranks.star(2)
    # Rank 1 is at the second place before rank 0 has come to the first.
    ahead = [pool.submit(sides[1].meet, name, name.encode()) for name in ("a", "b")]
    until(lambda: len(sides[0]._arrived) == 2)
    assert sides[0].meet("b", b"", lambda all_: b"told b:" + all_[1]) == b"told b:b"
    assert sides[0].meet("a", b"", lambda all_: b"told a:" + all_[1]) == b"told a:a"
    assert [each.result(WAIT_S) for each in ahead] == [b"told a:a", b"told b:b"]


def test_one_rank_alone_meets_itself(ranks):
    side = ranks.side([seat(0)], 0, {})
    side.start()
    assert side.meet("alone", b"me", lambda all_: all_[0] * 2) == b"meme"


def test_a_long_meeting_outlasts_the_limit_of_silence(ranks, pool, monkeypatch):
    monkeypatch.setattr(liveness, "SILENCE_S", 1.5)
    sides = ranks.star(2)
    ticks = queue.Queue()
    sides[0].on_tick = lambda: ticks.put(time.monotonic())
    waiting = pool.submit(sides[1].meet, "later")
    first = ticks.get(timeout=WAIT_S)
    while ticks.get(timeout=WAIT_S) < first + 2.0:
        assert not waiting.done()
    assert sides[0].meet("later") == b""
    assert waiting.result(WAIT_S) == b""


# Clocks


def test_clocks_are_measured_within_their_bound(ranks):
    begin = now_ns()
    truth = SkewedClock(now_ns, 7_000_123_456, 50.0, begin)
    sides = ranks.star(2, ["clock-0", "clock-1"], [now_ns, truth])
    sides[0].exchange_clocks()
    sides[0].exchange_clocks()
    model = sides[0].model(1)
    made = sides[0].exchanges[1]
    assert sum(exchange.trips == liveness.EXCHANGE_TRIPS for exchange in made) == 2
    for exchange in made:
        assert begin < exchange.at_ns < now_ns()
        assert abs(exchange.offset_ns - truth.offset_at(exchange.at_ns)) <= exchange.bound_ns
        assert 0 < exchange.bound_ns < 50_000_000
    for at in range(made[0].at_ns - 10**9, made[-1].at_ns + 10**9, 10**8):
        assert abs(model.offset_ns(at) - truth.offset_at(at)) <= model.bound_ns(at)


def test_each_tick_measures_every_other_domain_once(ranks):
    sides = ranks.star(4, ["clock-0", "clock-1", "clock-0", "clock-1"])
    sides[0].exchange_clocks()
    until(lambda: len(sides[0].exchanges[1]) >= 3)
    assert set(sides[0].exchanges) == {1}
    counts = {exchange.trips for exchange in sides[0].exchanges[1]}
    assert counts <= {liveness.EXCHANGE_TRIPS, liveness.WINDOW_TRIPS, 2, 1}
    assert [side.exchanges for side in sides[1:]] == [{}, {}, {}]


def test_leaders_are_the_first_ranks_of_the_other_domains(ranks):
    domains = ["a", "b", "a", "c", "b", "c"]
    side = ranks.side([seat(k, domain) for k, domain in enumerate(domains)], 0, {})
    of_b, of_c = Exchange(5, 100, 1, 2, 1), Exchange(6, 200, 1, 2, 1)
    side.exchanges = {1: [of_b], 3: [of_c]}
    assert side.leaders() == [1, 3]
    assert [side.leader_of(rank) for rank in range(6)] == [0, 1, 0, 3, 1, 3]
    assert side.model(0) == side.model(2) == ClockModel()
    assert side.model(4) == side.model(1) == ClockModel((of_b,))
    assert side.model(3) == side.model(5) == ClockModel((of_c,))


def test_a_clock_that_never_answers_is_an_error_and_not_offset_0(ranks, monkeypatch):
    monkeypatch.setattr(pings, "TRIP_TIMEOUT_S", TICK_S)
    side, _ = ranks.with_a_bare_peer(domain="clock-1")
    with pytest.raises(ClockError, match=r"clock of rank 1 \(host-1\) is not known: no ping"):
        side.exchange_clocks()
    with pytest.raises(ClockError, match="is not known"):
        side.model(1)


def test_a_clock_that_steps_ends_the_run(ranks, pool, monkeypatch):
    monkeypatch.setattr(liveness, "TICK_S", WAIT_S)
    jump = []

    def stepping():
        jump.append(0)
        return now_ns() + (10**9 if len(jump) > 60 else 0)

    side, *_ = ranks.star(2, ["clock-0", "clock-1"], [now_ns, stepping], start=False)
    for each in ranks.sides:
        each.start()
    exchanging = pool.submit(side.exchange_clocks)
    ends = ranks.ended(2)
    with side._lock:  # what waits for the exchange would have ended with its process
        side._requests = 0
        side._news.notify_all()
    assert isinstance(exchanging.exception(WAIT_S), ClockError)
    for end in ends.values():
        assert (end.code, end.rank, end.exit_code) == ("failed", 1, 1)
        assert "contradict each other" in end.sentence


def answer_pings(link, replies):
    """Answer pings as told: each reply takes t0 and sends what it likes."""
    for reply in replies:
        kind, payload = link.receive()
        while kind != wire.PING:
            kind, payload = link.receive()
        reply(struct.unpack("<qI", payload)[0])


def test_late_pongs_and_other_frames_do_not_disturb_an_exchange(ranks, pool, monkeypatch):
    monkeypatch.setattr(liveness, "EXCHANGE_TRIPS", 3)
    monkeypatch.setattr(liveness, "TICK_S", WAIT_S)
    side, peer = ranks.with_a_bare_peer(domain="clock-1")

    def pong(t0, shift_ns):
        t1 = now_ns() + shift_ns
        peer.send(wire.PONG, struct.pack("<qqq", t0, t1, now_ns() + shift_ns))

    def reply(t0):
        pong(t0 - 1, 10**12)  # the answer to a ping that was given up: 1000 s off
        peer.send(wire.HEART, heart(41, True))
        pong(t0, 5_000)

    answering = pool.submit(answer_pings, peer, [reply] * 3)
    side.exchange_clocks()
    answering.result(WAIT_S)
    [exchange] = side.exchanges[1]
    assert exchange.trips == 3
    assert abs(exchange.offset_ns - 5_000) <= exchange.bound_ns
    assert side._counts[1][:2] == (41, True)


def test_pings_that_come_back_are_kept_when_a_later_one_is_lost(ranks, pool, monkeypatch):
    monkeypatch.setattr(pings, "TRIP_TIMEOUT_S", 1.0)
    monkeypatch.setattr(liveness, "TICK_S", WAIT_S)
    side, peer = ranks.with_a_bare_peer(domain="clock-1")

    def pong(t0):
        peer.send(wire.PONG, struct.pack("<qqq", t0, now_ns(), now_ns()))

    answering = pool.submit(answer_pings, peer, [pong, pong, lambda _t0: None])
    side.exchange_clocks()
    answering.result(WAIT_S)
    [exchange] = side.exchanges[1]
    assert exchange.trips == 2


def test_a_link_that_ends_during_an_exchange_is_a_lost_rank(ranks, pool):
    side, peer = ranks.with_a_bare_peer(domain="clock-1")
    exchanging = pool.submit(side.exchange_clocks)
    assert peer.receive()[0] in (wire.PING, wire.HEART)
    peer.close()
    end = ranks.ended()[0]
    assert (end.code, end.rank) == ("lost", 1)
    with side._lock:
        side._requests = 0
        side._news.notify_all()
    assert isinstance(exchanging.exception(WAIT_S), ClockError)


def test_a_series_of_pings_is_answered_and_may_be_broken_off(ranks):
    _, peer = ranks.with_a_bare_peer(rank=1, peer=0)

    def next_pong():
        while (got := peer.receive())[0] != wire.PONG:
            assert got[0] == wire.HEART
        return struct.unpack("<qqq", got[1])

    def ping(t0, left):
        peer.send(wire.PING, struct.pack("<qI", t0, left))

    for t0, left in ((5, 2), (6, 1), (7, 0), (8, 99)):
        before = now_ns()
        ping(t0, left)
        echoed, t1, t2 = next_pong()
        assert echoed == t0
        assert before <= t1 <= t2 <= now_ns()
    # 99 more were announced: something else comes, and is taken as well.
    peer.send(wire.PASSED, b"\x01\x00xtold")
    until(lambda: ranks.sides[0]._passed == {"x": b"told"})


def test_a_series_of_pings_that_stops_does_not_hold_the_side_thread(ranks, monkeypatch):
    monkeypatch.setattr(pings, "TRIP_TIMEOUT_S", TICK_S)
    side, peer = ranks.with_a_bare_peer(rank=1, peer=0)
    ticks = queue.Queue()
    side.on_tick = lambda: ticks.put(None)
    peer.send(wire.PING, struct.pack("<qI", 1, 50))
    for _ in range(3):
        ticks.get(timeout=WAIT_S)
    assert side.links[0].connection.gettimeout() == liveness.SILENCE_S
    # A frame that had begun when the wait was given up is put together all the same.
    whole = HEADER.pack(wire.PASSED, 7) + b"\x01\x00ytold"
    peer.send(wire.PING, struct.pack("<qI", 2, 50))
    peer.connection.sendall(whole[:6])
    for _ in range(3):
        ticks.get(timeout=WAIT_S)
    peer.connection.sendall(whole[6:])
    until(lambda: side._passed == {"y": b"told"})


# Losses


def test_the_end_of_a_link_is_a_lost_rank(ranks):
    _, peer = ranks.with_a_bare_peer()
    peer.close()
    end = ranks.ended()[0]
    assert (end.code, end.rank, end.host, end.exit_code) == ("lost", 1, "host-1", 6)
    assert end.sentence.startswith("rank 1 (host-1) was lost: its link ended (")
    assert "distbench.salvage" in end.sentence


def test_the_end_of_rank_0_is_noticed_by_the_others(ranks):
    _, peer = ranks.with_a_bare_peer(rank=1, peer=0)
    peer.close()
    end = ranks.ended()[1]
    assert (end.code, end.rank, end.host) == ("lost", 0, "host-0")


def test_something_that_is_no_frame_is_the_end_of_a_link(ranks):
    _, peer = ranks.with_a_bare_peer()
    peer.connection.sendall(HEADER.pack(wire.HEART, 2**31))
    assert "sent a frame of 2147483648 bytes" in ranks.ended()[0].sentence


def test_silence_is_a_lost_rank(ranks, monkeypatch):
    monkeypatch.setattr(liveness, "SILENCE_S", 5 * TICK_S)
    ranks.with_a_bare_peer()
    end = ranks.ended()[0]
    assert (end.code, end.rank) == ("lost", 1)
    assert end.sentence.startswith("rank 1 (host-1) was lost: nothing was heard from it for 0.")


def test_a_loss_is_passed_on_by_rank_0(ranks):
    zero, _one, two = ranks.star(3)
    until(lambda: set(zero._counts) == {0, 1, 2})
    # Rank 2 dies: its socket goes, and nothing it would say is sent.
    two._stop = True
    two._wake()
    two._thread.join(WAIT_S)
    two.links[0].close()
    ends = ranks.ended(2)
    assert set(ends) == {0, 1}
    assert ends[0] == ends[1]
    assert (ends[0].code, ends[0].rank, ends[0].exit_code) == ("lost", 2, 6)


def test_a_rank_that_said_goodbye_is_not_lost(ranks):
    side, peer = ranks.with_a_bare_peer()
    peer.send(wire.HEART, heart(7, TICK_S))
    peer.send(wire.BYE)
    peer.close()
    until(lambda: 1 in side._leaving)
    ticks = queue.Queue()
    side.on_tick = lambda: ticks.put(None)
    side.links[1].heard_ns = 0
    for _ in range(4):
        ticks.get(timeout=WAIT_S)
    assert ranks.exits.empty()


@pytest.mark.parametrize("silent_for_s", [4.9, 5.1])
def test_five_seconds_of_silence_is_the_limit(ranks, monkeypatch, silent_for_s):
    monkeypatch.setattr(liveness, "TICK_S", 1.0)
    side, _ = ranks.with_a_bare_peer(start=False)
    side.links[1].heard_ns = time.monotonic_ns() - int(silent_for_s * 1e9)
    side._last_tick = time.monotonic() - 1.0
    if silent_for_s < 5:
        side._tick()
    else:
        with pytest.raises(SystemExit):
            side._tick()
        assert ranks.ends.get_nowait()[1].rank == 1


def test_a_process_that_did_not_run_blames_nobody(ranks, monkeypatch):
    monkeypatch.setattr(liveness, "TICK_S", 1.0)
    side, _ = ranks.with_a_bare_peer(start=False)
    side.links[1].heard_ns = time.monotonic_ns() - 60 * 10**9
    side._last_tick = time.monotonic() - 60
    side._tick()
    assert time.monotonic_ns() - side.links[1].heard_ns < 10**9


# Stalls


def test_a_count_that_stands_still_with_work_in_flight_is_a_stall(ranks):
    side = ranks.side([seat(0)], 0, {})
    side.progress = lambda: (5, 3 * TICK_S)
    side.start()
    end = ranks.ended()[0]
    assert (end.code, end.rank, end.exit_code) == ("lost", 0, 6)
    assert "with work in flight its count stood at 5 for 0 s, the limit being 0 s" in end.sentence
    assert "--timeout" in end.sentence


@pytest.mark.parametrize("kind", ["moving", "nothing in flight"])
def test_what_is_no_stall(ranks, kind):
    side = ranks.side([seat(0)], 0, {})
    counts = iter(range(10**6))
    limit_s = TICK_S / 10 if kind == "moving" else IDLE
    side.progress = lambda: (next(counts) if kind == "moving" else 5, limit_s)
    ticks = queue.Queue()
    side.on_tick = lambda: ticks.put(None)
    side.start()
    for _ in range(5):
        ticks.get(timeout=WAIT_S)
    assert ranks.exits.empty()


def test_rank_0_sees_the_stall_of_another_rank_and_tells_the_rest(ranks):
    zero, one, two = ranks.star(3, start=False)
    one.progress = lambda: (3, 3 * TICK_S)
    one._watch = lambda: None
    for side in (zero, one, two):
        side.start()
    # Rank 1 does not watch itself here and is not told: it may be stuck for good.
    ends = ranks.ended(2)
    assert set(ends) == {0, 2}
    for end in ends.values():
        assert (end.code, end.rank, end.host) == ("lost", 1, "host-1")
        assert "stood at 3 for" in end.sentence
    # It hears that rank 0 has gone from its link.
    zero.links[1].close()
    assert ranks.ended(1)[1].rank == 0


def test_other_ranks_do_not_judge_the_stall_of_rank_0(ranks):
    side, peer = ranks.with_a_bare_peer(rank=1, peer=0)
    peer.send(wire.HEART, heart(9, TICK_S / 10))
    until(lambda: 0 in side._counts)
    ticks = queue.Queue()
    side.on_tick = lambda: ticks.put(None)
    for _ in range(4):
        peer.send(wire.HEART, heart(9, TICK_S / 10))
        ticks.get(timeout=WAIT_S)
    assert ranks.exits.empty()


def test_a_heartbeat_carries_what_the_loop_has_done(ranks):
    side, peer = ranks.with_a_bare_peer(rank=1, peer=0)
    assert peer.receive() == (wire.HEART, heart(0, IDLE))
    side.progress = lambda: (2**40, 12.5)
    while (got := peer.receive()) == (wire.HEART, heart(0, IDLE)):
        pass
    assert got == (wire.HEART, heart(2**40, 12.5))


# Failures


@pytest.mark.parametrize(
    ("error", "sentence", "status"),
    [
        (UsageError("rank 1 has no disk"), "rank 1 has no disk", 2),
        (DistbenchError("x"), "x", 1),
        (ValueError("a bug"), "rank 1 (host-1) failed: ValueError('a bug')", 1),
        (KeyboardInterrupt(), "rank 1 (host-1) failed: KeyboardInterrupt()", 1),
    ],
)
def test_an_error_of_one_rank_is_the_sentence_of_all_others(ranks, error, sentence, status):
    _zero, one, _two = ranks.star(3)
    one.fail(error)
    ends = ranks.ended(2)
    assert set(ends) == {0, 2}
    for end in ends.values():
        assert end == End("failed", 1, "host-1", sentence, status)


def test_an_error_of_rank_0_is_told_to_all(ranks):
    zero, *_ = ranks.star(3)
    zero.fail(UsageError("nothing to do"))
    ends = ranks.ended(2)
    assert set(ends) == {1, 2}
    assert {end.sentence for end in ends.values()} == {"nothing to do"}


def test_saving_happens_once_and_before_the_exit(ranks):
    side, peer = ranks.with_a_bare_peer()
    order = []

    def save(end):
        order.append((end.sentence, ranks.exits.empty()))

    side.on_end = save
    told = {"code": "failed", "rank": 1, "host": "host-1", "exit_code": 2}
    peer.send(wire.FAILED, json.dumps(told | {"sentence": "first"}).encode())
    peer.send(wire.FAILED, json.dumps(told | {"sentence": "second"}).encode())
    assert ranks.exits.get(timeout=WAIT_S) == (0, 2)
    side._end(End("lost", 1, "host-1", "third", 6))  # returns: there is nothing left to do
    assert order == [("first", True)]


def test_a_save_that_fails_does_not_keep_the_process(ranks):
    side, peer = ranks.with_a_bare_peer()

    def save(_end):
        raise OSError("the disk is gone")

    side.on_end = save
    peer.close()
    assert ranks.exits.get(timeout=WAIT_S) == (0, 6)


def test_a_save_that_hangs_is_cut_short(ranks, monkeypatch, capfd):
    monkeypatch.setattr(liveness, "END_S", 0.05)
    side, peer = ranks.with_a_bare_peer()
    release = threading.Event()
    side.on_end = lambda _end: release.wait(WAIT_S)
    peer.close()
    assert ranks.exits.get(timeout=WAIT_S) == (None, 6)  # from the watchdog's thread
    assert not release.is_set()
    assert "was lost" in (said := capfd.readouterr().err) and "given up" in said
    release.set()
    assert ranks.exits.get(timeout=WAIT_S) == (0, 6)


def test_an_error_in_the_side_thread_ends_its_rank_and_is_told(ranks, capfd):
    zero, _one, _two = ranks.star(3)

    def broken():
        raise RuntimeError("a bug in a callback")

    zero.on_tick = broken
    ends = ranks.ended(3)
    for end in ends.values():
        assert end == End(
            "failed", 0, "host-0", "rank 0 (host-0) failed: RuntimeError('a bug in a callback')", 1
        )
    assert "in broken" in capfd.readouterr().err  # the traceback


def test_an_error_after_the_end_was_asked_for_is_not_told(ranks, capfd):
    side, peer = ranks.with_a_bare_peer(start=False)

    def closed():
        side._stop = True
        raise ValueError("operation on a closed selector")

    side.on_tick = closed
    side._run()
    assert ranks.exits.empty()
    assert peer.receive()[0] == wire.HEART
    peer.connection.settimeout(0)
    with pytest.raises(BlockingIOError):
        peer.connection.recv(1)
    assert capfd.readouterr().err == ""


def test_an_answer_that_fails_on_rank_0_does_not_leave_the_others_waiting(ranks, pool, capfd):
    zero, one = ranks.star(2)

    def answer(_payloads):
        raise UsageError("the payloads differ")

    meeting = pool.submit(zero.meet, "m", b"", answer)
    until(lambda: "m" in zero._answers)
    waiting = pool.submit(one.meet, "m")
    ends = ranks.ended(2)
    assert {end.sentence for end in ends.values()} == {"the payloads differ"}
    assert {end.exit_code for end in ends.values()} == {2}
    for side in (zero, one):
        with side._lock:
            side._passed["m"] = b""
            side._news.notify_all()
    meeting.result(WAIT_S)
    waiting.result(WAIT_S)


# Signals


@contextlib.contextmanager
def signals_to(side):
    before = signal.signal(signal.SIGTERM, lambda _number, _frame: None)
    old = signal.set_wakeup_fd(side.wake_on_signals(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(old)
        signal.signal(signal.SIGTERM, before)


def test_sigterm_ends_the_run_and_is_told(ranks, monkeypatch):
    monkeypatch.setattr(liveness, "TICK_S", WAIT_S)  # the signal itself wakes the thread
    _zero, one = ranks.star(2)
    with signals_to(one):
        os.kill(os.getpid(), signal.SIGTERM)
        ends = ranks.ended(2)
    assert ends[0] == ends[1]
    assert (ends[1].code, ends[1].rank, ends[1].exit_code) == ("terminated", 1, 6)
    assert ends[1].sentence.startswith("rank 1 (host-1) was terminated (SIGTERM)")


def test_other_signals_do_not_end_the_run(ranks):
    side, peer = ranks.with_a_bare_peer()
    os.write(side.wake_on_signals(), bytes([signal.SIGCHLD, signal.SIGINT, 0]))
    peer.send(wire.HEART, heart(1, False))
    until(lambda: 1 in side._counts)
    assert ranks.exits.empty()


def test_a_launcher_that_ends_all_for_one_lost_rank_does_not_hide_it(ranks):
    side, peer = ranks.with_a_bare_peer(start=False)
    os.write(side.wake_on_signals(), bytes([signal.SIGTERM]))
    peer.close()
    side.start()
    end = ranks.ended()[0]
    assert (end.code, end.rank) == ("lost", 1)


def test_what_a_rank_last_said_comes_before_its_terminating(ranks):
    side, peer = ranks.with_a_bare_peer(start=False)
    told = {"code": "failed", "rank": 1, "host": "host-1", "sentence": "why", "exit_code": 2}
    peer.send(wire.FAILED, json.dumps(told).encode())
    with pytest.raises(SystemExit):
        side._terminated()
    assert ranks.ends.get_nowait() == (0, End(**told))


def test_waking_a_thread_that_has_enough_to_wake_for(ranks):
    side, _ = ranks.with_a_bare_peer(start=False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(side.wake_on_signals(), bytes(1024))
    side._wake()
    # What a signal handler wrote is still read, and read to the end.
    taken = 0
    with contextlib.suppress(BlockingIOError):
        while piece := side._wake_read.recv(1 << 16):
            taken += len(piece)
    assert taken >= 1024


# Teardown


def test_ranks_that_stop_say_goodbye_and_none_is_lost(ranks):
    zero, one, two = ranks.star(3)
    two.stop()
    until(lambda: zero._leaving == {2})
    one.stop()
    zero.stop()
    assert ranks.exits.empty()
    assert not any(side._thread.is_alive() for side in (zero, one, two))
    for side in (zero, one, two):
        assert all(link.fileno() == -1 for link in side.links.values())
        assert side._wake_read.fileno() == side._wake_write.fileno() == -1
    ranks.sides.clear()


def test_a_loss_during_a_stop_is_none(ranks):
    side, peer = ranks.with_a_bare_peer(start=False)
    side._stop = True
    peer.close()
    side._read(side.links[1])
    side._closed(side.links[1], "again")
    assert ranks.exits.empty()


def test_sending_to_a_rank_that_has_gone_leaves_it_to_the_reader(ranks):
    side, peer = ranks.with_a_bare_peer(rank=1, peer=0, start=False)
    peer.close()
    side._send(side.links[0], wire.ARRIVED, b"\x01\x00m")
    assert side._wake_read.recv(10) == b"\0"
    side._send(side.links[0], wire.BYE, ignore=True)
    with pytest.raises(BlockingIOError):
        side._wake_read.recv(10)
    side.start()
    assert ranks.ended()[1].rank == 0
