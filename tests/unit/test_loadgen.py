"""LoadGen itself in the driver process, told by a scripted rank 0 and served by scripted ranks."""

from __future__ import annotations

import ctypes
import json
import re
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest

from distbench import files, wire
from distbench.clock import clock_domain, now_ns
from distbench.dispatch import COLUMNS, DriverEnded
from distbench.errors import UsageError
from distbench.frames import (
    DONE,
    DONES,
    END,
    FAILED_TOKENS,
    FIRST,
    LEFT,
    LOAD,
    LOADED,
    NAME,
    NAMED,
    QUERIES,
    QUERY,
    RAISED,
    UNLOAD,
    WHOLE,
    Channel,
    ChannelLost,
    packed,
)
from distbench.loadgen import PIECE, Session, check_installed
from distbench.mllog import parse_detail
from distbench.official import Official, settled
from distbench.pool import series
from distbench.run import read_record
from distbench.samples import FAILED, SampleLog
from distbench.spawn import start_driver
from distbench.talk import hear, tell
from distbench.wire import Seat

pytestmark = pytest.mark.timeout(60)

HERE = Path(__file__).resolve().parents[2]
TOTAL = 200
HOSTS = ("jw2", "jw3")


class Ranks:
    """A driver in a process of its own, rank 0's links to it, and both ranks as workers."""

    def __init__(self, stack: ExitStack, out: Path) -> None:
        self.out = out
        self.process, self.address, self.token = start_driver(stack, "127.0.0.1", out)
        self.control = self.call(stack, 0, "control")
        tell(self.control, {"do": "expect", "ranks": 2, "payload": ""})
        self.clock = self.call(stack, 0, "clock")
        self.workers = []
        for rank in (0, 1):
            link = self.call(stack, rank, "worker")
            self.workers.append(Channel(link.connection, str(link.seat)))
            self.workers[rank].name = f"rank {rank}"
        assert hear(self.control) == ({}, [])
        self.words: list[tuple[int, int]] = []
        self.issued: list[list[int]] = [[], []]

    def call(self, stack: ExitStack, rank: int, role: str) -> Any:
        own = Seat(rank, HOSTS[rank], clock_domain(), "", 0)
        link = wire.open_link(self.address, own, self.token, "", 10, "the driver", role)
        stack.callback(link.close)
        link.connection.settimeout(25)
        return link

    def begin(self, scenario: str, mode: str = "performance", **more: Any) -> dict[str, Any]:
        asked = Official(scenario, mode, "echo", "mlperf-v5.0,shortened=200ms", **more)
        official = settled(asked, TOTAL, TOTAL, [2000.0, 2000.0]) | {"network": False}
        return self.start(official)

    def start(self, official: dict[str, Any]) -> dict[str, Any]:
        before = {"schema_version": 1, "scenario": official["scenario"], "turn": 0, "backlog": 9}
        before["official"] = official
        asked = {"do": "window", "folder": ("run",), "columns": [], "before": before}
        tell(self.control, asked, [], [])
        assert hear(self.control)[0] == {}
        at = now_ns() + 20_000_000
        tell(self.control, {"do": "start", "plan": {"reference_ns": at, "local_ns": at}})
        return official

    def serve(
        self,
        answer: Callable[[Channel, int, int], None] | None = None,
        until_s: float = 20.0,
        leaves: bool = True,
    ) -> None:
        """Answer what LoadGen issues until the end, or until the driver has hung up."""
        left, until = 0, time.monotonic() + until_s
        while left < 2 and time.monotonic() < until:
            for rank, worker in enumerate(self.workers):
                for kind, one, other, data in worker.read():
                    if kind == QUERY:
                        self.issued[rank].append(other)
                        (answer or done)(worker, one, other)
                    elif kind == QUERIES:
                        self.issued[rank] += np.frombuffer(data, "<i8").tolist()
                        worker.post(DONES, one, other, packed([b""] * other))
                    elif kind in (LOAD, UNLOAD):
                        self.words.append((kind, one))
                        worker.post(LOADED, one, 0)
                    elif kind == NAME:
                        worker.post(NAMED, 0, 0, f"echo on {HOSTS[rank]}".encode())
                    elif kind == END:
                        left += 1
                        if leaves:
                            worker.post(LEFT, 0, WHOLE)
                worker.flush()
            time.sleep(0.0002)

    def fetched(self) -> tuple[dict[str, Any], Any]:
        assert hear(self.control) == ({}, [])
        tell(self.control, {"do": "fetch"})
        told, (flat, *_texts) = hear(self.control)
        return told, flat.reshape(-1, len(told["before"]["columns"]))

    def ended(self) -> str:
        """Return what rank 0 is told of an early end, once the process is gone."""
        told = hear(self.control)[0]
        assert self.process.wait(10) == 6
        kept = json.loads((self.out / "run" / "driver" / "after.json").read_text())
        assert kept["end"]["sentence"] == told["error"] and kept["end"]["exit_code"] == 6
        assert (self.out / "run" / "loadgen" / "mlperf_log_detail.txt").exists()
        done = json.loads((self.out / "run" / "driver" / "done.json").read_text())["files"]
        for name, digest in done.items():  # LoadGen's thread went on for a moment
            assert files.sha256_file(self.out / "run" / "driver" / name) == digest, name
        return str(told["error"])


def done(worker: Channel, seq: int, _index: int) -> None:
    worker.post(DONE, seq, 0)


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Ranks]:
    monkeypatch.syspath_prepend(str(HERE))
    with ExitStack() as stack:
        yield Ranks(stack, tmp_path)


SCENARIOS = ("offline", "server", "singlestream", "multistream")


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_sample_once_and_loadgen_says_valid_or_why(ranks: Ranks, scenario: str) -> None:
    conf = "" if scenario != "server" else "*.Server.target_latency = 1000"
    official = ranks.begin(scenario, user_conf=conf)
    ranks.serve()
    told, rows = ranks.fetched()
    columns, after = told["before"]["columns"], told["after"]
    at = {name: rows[:, columns.index(name)] for name in columns}
    keys = after["loadgen"]["keys"]
    assert after["loadgen"]["errors"] == [] and after["loadgen"]["problem"] == ""
    count = {"offline": 1, "server": len(rows), "singlestream": len(rows)}
    assert keys["result_query_count"] == count.get(scenario, len(rows) // 8)
    assert sorted(at["index"].tolist()) == sorted(ranks.issued[0] + ranks.issued[1])
    assert min(map(len, ranks.issued)) > 0, "both ranks were served"
    assert (at["completed"] > at["issued"]).all() and (at["scheduled"] == at["issued"]).all()
    for rank in (0, 1):
        assert at["index"][at["served_by"] == rank].tolist() == ranks.issued[rank]
    # LoadGen pads MultiStream's set, so that its last query has 8 neighbours too.
    size = TOTAL + 7 * (scenario == "multistream")
    assert ranks.words == [(LOAD, size), (LOAD, size), (UNLOAD, size), (UNLOAD, size)]
    assert len(rows) <= official["capacity"]
    if scenario in ("offline", "server"):
        assert len(rows) == official["capacity"]
    text = (ranks.out / "run" / "loadgen" / "mlperf_log_detail.txt").read_text()
    assert parse_detail(text).keys["result_validity"] == keys["result_validity"]
    assert keys["effective_min_duration_ms"] == 200
    assert keys["effective_performance_sample_count"] == official["resident"]
    if official["target_qps"] is not None:
        assert keys["effective_target_qps"] == pytest.approx(official["target_qps"], rel=1e-5)
    if scenario in ("offline", "multistream"):
        counts = list(map(len, ranks.issued))
        assert max(counts) - min(counts) <= 1 + 0.001 * sum(counts), "nobody waits for the other"


def test_answers_are_in_loadgens_accuracy_log(ranks: Ranks) -> None:
    asked = Official("server", "performance", "echo", "mlperf-v5.0,shortened=200ms")
    official = settled(asked, TOTAL, TOTAL, [2000.0]) | {"mode": "accuracy", "capacity": TOTAL}
    ranks.start(official | {"benchmark": "digits"})
    ranks.serve(lambda worker, seq, index: worker.post(DONE, seq, 0, bytes([index, 7])))
    told, rows = ranks.fetched()
    entries = json.loads((ranks.out / "run/loadgen/mlperf_log_accuracy.json").read_text())
    assert {each["qsl_idx"]: each["data"] for each in entries} == {
        index: f"{index:02X}07" for index in range(TOTAL)
    }
    assert len(rows) == TOTAL
    # These are no answers of digits, whose samples are others: told, and not taken for 0 right.
    assert told["after"]["loadgen"]["right"] is None
    assert (
        "no answer for sample" in told["after"]["loadgen"]["problem"]
        or "answered with" in (told["after"]["loadgen"]["problem"])
    )


def test_multistream_fills_up_its_last_query_in_accuracy_mode(ranks: Ranks) -> None:
    asked = Official("multistream", "accuracy", "digits", "mlperf-v5.0,shortened=200ms")
    official = settled(asked, 1797, 1797, [2000.0]) | {"network": False}
    ranks.start(official)
    ranks.serve(lambda worker, seq, index: worker.post(DONE, seq, 0, bytes(8)))
    told, rows = ranks.fetched()
    assert len(rows) == official["capacity"] == 1800
    assert told["after"]["loadgen"]["of"] == 360 > told["after"]["loadgen"]["right"] > 0


def test_a_conf_that_loadgen_drops_is_no_run(ranks: Ranks) -> None:
    asked = Official("server", name="echo")
    official = settled(asked, TOTAL, TOTAL, [2000.0]) | {"network": False}
    ranks.start(official | {"conf": "*.Server.target_qps = 3 # three\n"})
    told = hear(ranks.control)[0]
    assert "LoadGen does not take" in told["error"]
    assert ranks.issued == [[], []]


def test_a_send_that_fails_inside_loadgens_callback_is_told_and_not_raised() -> None:
    """The reading thread need not be the first to see that a rank is gone."""
    told: list[Exception] = []

    class Gone:
        channels = (None, None)
        data: Mapping[int, bytes] = MappingProxyType({})

        def post(self, *_: Any) -> None:
            raise ChannelLost("the link to rank 1 (jw3) broke")

    log = SampleLog.in_memory(4, COLUMNS)
    session = Session(Gone(), log, 0, now_ns, told.append, tokens=False)  # type: ignore[arg-type]
    sample = type("Sample", (), {"id": 1, "index": 0})()
    session.guarded(session.issue)([sample])
    assert [str(each) for each in told] == ["the link to rank 1 (jw3) broke"]


def assert_issued(log: SampleLog, count: int) -> None:
    """A row is whole once it is issued: nothing may come after, where a rank is lost."""
    assert np.count_nonzero(log.count) == count and (log.count[:count] == 1).all()
    assert (log.issued[:count] > 0).all() and not log.issued[count:].any()
    for other in (log.scheduled, log.ready):
        assert (other[:count] == log.issued[:count]).all()


@pytest.mark.parametrize("count", [129, 1_000, 196_608, 524_289])
def test_offlines_samples_are_dealt_out_evenly(count: int) -> None:
    got = [0, 0]

    class Taking:
        channels = (None, None)
        data: Mapping[int, bytes] = MappingProxyType({})

        def post_many(self, place: int, _seq: int, indices: Any) -> None:
            got[place] += len(indices)

        def flush(self) -> None:
            pass

    log = SampleLog.in_memory(count, COLUMNS)
    session = Session(Taking(), log, 0, now_ns, print, tokens=False)  # type: ignore[arg-type]
    sample = type("Sample", (), {"id": 1, "index": 0})()
    session.issue([sample] * count)
    assert sum(got) == count and max(got) - min(got) <= -(-count // (2 * PIECE))
    assert_issued(log, count)


def test_a_sample_that_failed_is_completed_for_loadgen_and_kept_as_failed(ranks: Ranks) -> None:
    ranks.begin("server")
    ranks.serve(lambda worker, seq, _i: worker.post(DONE, seq, FAILED_TOKENS if seq == 3 else 0))
    told, rows = ranks.fetched()
    completed = rows[:, told["before"]["columns"].index("completed")]
    assert (completed == FAILED).nonzero()[0].tolist() == [3]


def test_a_network_sut_is_named_by_every_rank(ranks: Ranks) -> None:
    asked = Official("server", rules="mlperf-v5.0,shortened=200ms", name="echo")
    ranks.start(settled(asked, TOTAL, TOTAL, [2000.0]) | {"network": True})
    ranks.serve()
    told, _ = ranks.fetched()
    name = told["after"]["loadgen"]["keys"]["sut_name"]
    assert name == "Network SUT: distbench on echo on jw2, echo on jw3"


def twice(worker: Channel, seq: int, index: int) -> None:
    done(worker, seq, index)
    if seq == 11:
        done(worker, seq, index)


def unknown(worker: Channel, seq: int, index: int) -> None:
    done(worker, seq + 10**6 if seq == 11 else seq, index)


def raises(worker: Channel, seq: int, index: int) -> None:
    if seq == 11:
        worker.post(LEFT, 0, RAISED)
    else:
        done(worker, seq, index)


def dies(worker: Channel, seq: int, index: int) -> None:
    if seq >= 10 and worker.name == "rank 1":
        worker.connection.shutdown(2)
    else:
        done(worker, seq, index)


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (twice, r"rank [01] \(jw[23]\) answered sample 11, answered a second time"),
        (unknown, r"rank [01] \(jw[23]\) answered sample 1000011, which it was not given"),
        (raises, r"rank [01] \(jw[23]\) left in the middle of LoadGen's run: its model raised"),
        (dies, r"the link to rank 1 \(jw3\) (ended|broke)"),
    ],
)
def test_a_rank_that_does_harm_ends_the_run_by_name(ranks: Ranks, harm: Any, told: str) -> None:
    ranks.begin("server")
    begun = time.monotonic()
    try:
        ranks.serve(harm, 10)
    except Exception as error:  # the driver has hung up, as it should
        assert "link" in str(error)
    sentence = ranks.ended()
    assert re.search(told, sentence), sentence
    assert time.monotonic() - begun < 20


def test_an_answer_after_the_end(ranks: Ranks) -> None:
    """It comes when LoadGen has all: nobody waits for it, and the run is not taken for good."""
    ranks.begin("server")
    ranks.serve(leaves=False)
    ranks.workers[0].post(DONE, 5, 0)
    ranks.workers[0].drain(5)
    assert ranks.process.wait(20) != 0
    kept = json.loads((ranks.out / "run" / "driver" / "after.json").read_text())
    assert "rank 0 (jw2) answered sample 5, " in kept["end"]["sentence"]


def test_a_rank_that_hangs_ends_with_rank_0s_link(ranks: Ranks) -> None:
    """Ranks are watched by each other; rank 0 then ends its link, and LoadGen's process is gone."""
    ranks.begin("server")
    ranks.serve(lambda *_: None, 1.0)
    ranks.control.close()
    assert ranks.process.wait(10) == 6
    kept = json.loads((ranks.out / "run" / "driver" / "after.json").read_text())
    assert "ended in the window" in kept["end"]["sentence"]
    rows = np.load(ranks.out / "run" / "driver" / "samples.npy", mmap_mode="r")
    assert 0 < kept["used"] == np.count_nonzero(rows[:, COLUMNS.index("count")])


def test_a_driver_that_is_terminated_leaves_what_it_has(ranks: Ranks) -> None:
    asked = Official("server", name="echo")
    ranks.start(settled(asked, TOTAL, TOTAL, [2000.0]) | {"network": False})
    ranks.serve(until_s=1.0)
    ranks.process.terminate()
    assert ranks.process.wait(10) == -signal.SIGTERM
    left = read_record(ranks.out / "run" / "driver", "driver.json")
    assert left.after is None and left.rows is not None
    assert len(left.rows) > 100 and (left.column("issued") > 0).all()
    assert len(series(left, "latency")) == (left.column("completed") >= 0).sum() > 50
    assert (ranks.out / "run" / "loadgen" / "mlperf_log_detail.txt").stat().st_size


def test_a_host_without_the_rounds_loadgen() -> None:
    check_installed("5.0.13", "mlperf")
    with pytest.raises(UsageError, match=r"5\.0\.13 is installed.*mlcommons-loadgen==5\.1\.2"):
        check_installed("5.1.2", "mlperf-v51")


class Told:
    """LoadGen's functions, which keep what they are told."""

    def __init__(self) -> None:
        self.firsts: list[int] = []
        self.tokens: list[bytes] = []
        self.done: list[tuple[int, int]] = []

    class QuerySampleResponse:
        def __init__(self, sample: int, at: int, size: int, tokens: int = -1) -> None:
            self.id, self.at, self.size, self.tokens = sample, at, size, tokens

    def FirstTokenComplete(self, responses: Any) -> None:
        self.firsts += [each.id for each in responses]
        self.tokens += [ctypes.string_at(each.at, each.size) for each in responses]

    def QuerySamplesComplete(self, responses: Any) -> None:
        self.done += [(each.id, each.tokens) for each in responses]


def in_process(tokens: bool, count: int = 6) -> tuple[Session, Told, list[Exception]]:
    class Quiet:
        channels = (type("Link", (), {"name": "rank 0 (jw2)"})(),)
        data: Mapping[int, bytes] = MappingProxyType({})

        def post(self, *_: Any) -> None:
            pass

        def flush(self) -> None:
            pass

        def tell(self, *_: Any) -> None:
            pass

    failed: list[Exception] = []
    columns = (*COLUMNS, "tokens", "first_token") if tokens else COLUMNS
    log = SampleLog.in_memory(count, columns)
    session = Session(Quiet(), log, 0, now_ns, failed.append, tokens)  # type: ignore[arg-type]
    session.lg = told = Told()
    session._pool = [told.QuerySampleResponse(0, 0, 0) for _ in range(2)]
    samples = [type("Sample", (), {"id": 100 + k, "index": k})() for k in range(count)]
    session.issue(samples)
    return session, told, failed


def test_first_tokens_and_numbers_of_tokens_are_told() -> None:
    session, told, failed = in_process(tokens=True)
    session.take(0, [(FIRST, 2, 5, b"t"), (DONE, 2, 7, b"text"), (DONE, 3, FAILED_TOKENS, b"")])
    assert (
        told.firsts == [102]
        and told.tokens == [b"t"]
        and told.done == [(102, 7), (103, 0)]
        and not failed
    )
    assert session.log.tokens[2] == 7 and session.log.first_token[2] > 0
    assert session.log.completed[3] == FAILED
    with pytest.raises(DriverEnded, match="answered sample 2, answered a second time"):
        session.take(0, [(FIRST, 2, 5, b"")])


def test_neighbours_that_ended_together() -> None:
    session, told, _ = in_process(tokens=False)
    session.take(0, [(DONES, 0, 3, b"")])
    session.take(0, [(DONES, 3, 2, packed([b"a", b""]))])
    assert [each for each, _ in told.done] == [100, 101, 102, 103, 104]
    assert_issued(session.log, 6)
    assert session.ended == [5]
    for first, count, said in ((4, 1, "a second time"), (5, 2, "not given"), (-1, 2, "not given")):
        with pytest.raises(DriverEnded, match=said):
            session.take(0, [(DONES, first, count, b"")])
    with pytest.raises(DriverEnded, match="bytes hold no 1 answers"):
        session.take(0, [(DONES, 5, 1, b"xy")])
    session.log.served_by[5] = 1
    with pytest.raises(DriverEnded, match="not given"):
        session.take(0, [(DONES, 5, 1, b"")])


def test_more_samples_than_planned_and_a_rank_that_leaves() -> None:
    session, _, failed = in_process(tokens=False)
    session.issue([])
    session.guarded(session.issue)([type("Sample", (), {"id": 9, "index": 0})()])
    assert "more than the 6 samples" in str(failed[0])
    with pytest.raises(DriverEnded, match="heard nothing for a while"):
        session.take(0, [(LEFT, 0, WHOLE, b"")])
    session.over = True
    session.take(0, [(LEFT, 0, RAISED, b"")])
    assert session.raised and session.left == {0}
