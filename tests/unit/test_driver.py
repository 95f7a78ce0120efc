"""The driver process told what to do by a scripted rank 0; no torch, no ranks."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench import pings, wire
from distbench.clock import clock_domain, measure_exchange, now_ns
from distbench.dispatch import COLUMNS
from distbench.driver import main
from distbench.errors import DRIVER, UsageError
from distbench.frames import DONE, END, HALTED, LEFT, LOAD, LOADED, QUERY, UNLOAD, WHOLE, Channel
from distbench.run import read_record
from distbench.spawn import payload_module, start_driver
from distbench.talk import LIMIT_BYTES, TELL, address_of, hear, read_token, tell
from distbench.wire import Seat

pytestmark = pytest.mark.timeout(60)

HERE = Path(__file__).resolve().parents[2]
OWN = Seat(0, "jw2", clock_domain(), "", 0)


class Rank0:
    """A driver in a process of its own, and both of this test's links to it."""

    def __init__(self, stack: ExitStack, out: Path) -> None:
        self.process, self.address, self.token = start_driver(stack, "127.0.0.1", out)
        self.control = self.call("control")
        stack.callback(self.control.close)
        tell(self.control, {"do": "expect", "ranks": 1, "payload": ""})
        self.clock = self.call("clock")
        stack.callback(self.clock.close)
        link = self.call("worker")
        stack.callback(link.close)
        self.worker = Channel(link.connection, str(link.seat))
        assert hear(self.control) == ({}, [])

    def call(self, role: str) -> Any:
        link = wire.open_link(self.address, OWN, self.token, "", 10, "the driver", role)
        link.connection.settimeout(20)
        return link

    def window(self, due: Any, folder: tuple[str, ...] = ("run",), backlog: int = 99) -> Any:
        before = {"schema_version": 1, "scenario": "server", "turn": 0, "backlog": backlog}
        asked = {"do": "window", "folder": folder, "columns": [], "before": before}
        tell(self.control, asked, np.asarray(due), np.arange(len(due)) + 50)
        return hear(self.control)[0]

    def start(self, ahead_ns: int = 30_000_000) -> int:
        begin = now_ns() + ahead_ns
        tell(self.control, {"do": "start", "plan": {"reference_ns": begin, "local_ns": begin}})
        return begin

    def served(self, answer: bool = True) -> list[Any]:
        """Answer queries until the end."""
        seen: list[Any] = []
        until = time.monotonic() + 20
        while time.monotonic() < until:
            for kind, one, other, _ in self.worker.read():
                if kind == QUERY:
                    seen.append((one, other))
                    if answer:
                        self.worker.post(DONE, one, 0)
                elif kind == END:
                    seen.append(("end", one))
                    self.worker.post(LEFT, 0, WHOLE)
                    self.worker.drain(5)
                    return seen
            self.worker.flush()
            time.sleep(0.0005)
        raise AssertionError("no end came")


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ExitStack]:
    monkeypatch.syspath_prepend(str(HERE))
    with ExitStack() as made:
        yield made


def test_windows_one_after_the_other_and_the_end(stack: ExitStack, tmp_path: Path) -> None:
    rank = Rank0(stack, tmp_path)
    for number in range(2):
        due = np.arange(40) * 500_000
        assert rank.window(due, ("run", "windows", f"{number:03d}")) == {}
        begin = rank.start()
        seen = rank.served()
        assert seen == [*((k, k + 50) for k in range(40)), ("end", WHOLE)]
        assert hear(rank.control) == ({}, [])
        tell(rank.control, {"do": "fetch"})
        told, (flat,) = hear(rank.control)
        folder = tmp_path / "run" / "windows" / f"{number:03d}" / "driver"
        record = read_record(folder, "driver.json")
        assert record.problem == ""
        assert (record.before, record.after) == (told["before"], told["after"])
        np.testing.assert_array_equal(record.rows, flat.reshape(-1, len(COLUMNS)))  # type: ignore[arg-type]
        assert (record.column("scheduled") - begin).tolist() == due.tolist()
        assert (record.column("completed") > record.column("issued")).all()
        assert record.before["pid"] == rank.process.pid != os.getpid()
        assert record.after is not None and not record.after["halted"]
        assert record.after["started_ns"] >= begin
    tell(rank.control, {"do": "bye"})
    assert rank.process.wait(10) == 0


@pytest.mark.parametrize("folder", [("..", "x"), ("/etc",), ("a/b",), ("", "x"), (".",), ()])
def test_no_folder_is_made_outside_its_own(
    stack: ExitStack, tmp_path: Path, folder: tuple[str, ...]
) -> None:
    rank = Rank0(stack, tmp_path / "out")
    told = rank.window(np.arange(4), folder)
    assert "makes no folder outside its --output-dir" in told["error"]
    assert [each.name for each in tmp_path.rglob("*")] == []


def test_a_part_of_a_ping_does_not_stop_the_loop(stack: ExitStack, tmp_path: Path) -> None:
    rank = Rank0(stack, tmp_path)
    due = np.arange(100) * 2_000_000
    rank.window(due)
    rank.start()
    rank.clock.connection.sendall(wire.HEADER.pack(wire.PING, 12)[:3])
    seen = rank.served()
    assert len(seen) == 101
    hear(rank.control)
    record = read_record(tmp_path / "run" / "driver", "driver.json")
    late = record.column("issued") - record.column("scheduled")
    assert np.median(late) < 1e9  # a driver that waited for the rest would be 5 s late
    rank.clock.connection.sendall(wire.HEADER.pack(wire.PING, 12)[3:] + bytes(12))
    assert rank.clock.receive()[0] == wire.PONG


def test_what_is_too_long_is_not_taken() -> None:
    one, other = socket.socketpair()
    here, there = wire.Link(one, OWN), wire.Link(other, OWN)
    there.send(TELL, json.dumps({"sizes": [LIMIT_BYTES + 1]}).encode())
    with pytest.raises(wire.LinkClosed, match="is the limit"):
        hear(here)
    here.close()
    there.close()


def test_its_clock_is_measured_between_windows_and_in_them(
    stack: ExitStack, tmp_path: Path
) -> None:
    rank = Rank0(stack, tmp_path)

    def exchanged() -> Any:
        trips = pings.exchange_trips(rank.clock, 20, now_ns, lambda *_: None)
        assert len(trips) == 20
        return measure_exchange(trips)

    made = [exchanged()]
    rank.window(np.arange(2) * 400_000_000)
    rank.start()
    time.sleep(0.1)
    made.append(exchanged())
    rank.served()
    hear(rank.control)
    made.append(exchanged())
    assert all(abs(each.offset_ns) <= each.bound_ns for each in made)  # one clock


def test_samples_are_loaded_and_let_go(stack: ExitStack, tmp_path: Path) -> None:
    rank = Rank0(stack, tmp_path)
    for load, kind in ((True, LOAD), (False, UNLOAD)):
        tell(rank.control, {"do": "load", "load": load}, np.array([3, 1, 2]))
        got: list[Any] = []
        while not got:
            got = rank.worker.read()
        assert got[0][:2] == (kind, 3)
        assert np.frombuffer(got[0][3], "<i8").tolist() == [3, 1, 2]
        rank.worker.post(LOADED, 3, 0)
        rank.worker.drain(5)
        assert hear(rank.control) == ({}, [])


def test_a_worker_that_answers_nothing_gives_the_window_up(
    stack: ExitStack, tmp_path: Path
) -> None:
    rank = Rank0(stack, tmp_path)
    rank.window(np.arange(200) * 10_000, backlog=70)
    rank.start()
    seen = rank.served(answer=False)
    assert seen[-1] == ("end", HALTED)
    assert len(seen) == 71
    hear(rank.control)
    record = read_record(tmp_path / "run" / "driver", "driver.json")
    assert record.after is not None and record.after["halted"]


@pytest.mark.parametrize("what", ["control", "clock", "worker", "term"])
def test_whatever_link_ends_so_does_the_driver_and_keeps_what_completed(
    stack: ExitStack, tmp_path: Path, what: str
) -> None:
    rank = Rank0(stack, tmp_path)
    rank.window([0, 1_000_000, 30_000_000_000])
    rank.start()
    got: list[Any] = []
    while len([each for each in got if each[0] == QUERY]) < 2:
        got += rank.worker.read()
    rank.worker.post(DONE, 0, 0)
    rank.worker.post(DONE, 1, 0)
    rank.worker.drain(5)
    time.sleep(0.1)
    if what == "term":
        rank.process.send_signal(signal.SIGTERM)
    else:
        getattr(rank, what).close()
    assert rank.process.wait(10) == 1
    record = read_record(tmp_path / "run" / "driver", "driver.json")
    assert record.problem == ""
    assert (record.column("completed") >= 0).tolist() == [True, True, False]
    assert record.after is not None
    end = record.after["end"]
    assert (end["code"], end["rank"]) == ("failed", DRIVER)
    assert end["sentence"].startswith(f"the driver ({socket.gethostname()}) ended early: ")


def test_a_driver_ends_with_the_process_that_started_it(tmp_path: Path) -> None:
    program = (
        "import sys, time; from contextlib import ExitStack; from pathlib import Path\n"
        "from distbench.spawn import start_driver\n"
        "with ExitStack() as stack:\n"
        "    print(start_driver(stack, '127.0.0.1', Path(sys.argv[1]))[0].pid, flush=True)\n"
        "    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)], stdout=subprocess.PIPE, text=True, cwd=HERE
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.communicate()
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return
        if state == "Z":
            return
        time.sleep(0.05)
    raise AssertionError("it lives on")


def test_a_window_that_cannot_be_made_is_told_in_a_sentence(
    stack: ExitStack, tmp_path: Path
) -> None:
    rank = Rank0(stack, tmp_path)
    (tmp_path / "run").write_text("a file where a folder should be")
    told = rank.window([0, 1])
    assert "cannot write to" in told["error"]
    assert "give another --output-dir" in told["error"]
    tell(rank.control, {"do": "bye"})
    assert rank.process.wait(10) == 0


def test_callers_without_the_token_are_dropped(stack: ExitStack, tmp_path: Path) -> None:
    process, address, token = start_driver(stack, "127.0.0.1", tmp_path)
    hello = {"token": "f" * 32, "seat": asdict(OWN), "role": "control"}
    for said in (json.dumps(hello).encode(), b"[", b"{}"):
        with socket.create_connection(address, 5) as stray:
            stray.sendall(wire.HEADER.pack(wire.HELLO, len(said)) + said)
            assert stray.recv(4096) == b""
    with pytest.raises(UsageError, match="reached the driver"):
        wire.open_link(address, OWN, "f" * 32, "", 5, "the driver", "control")
    link = wire.open_link(address, OWN, token, "", 5, "the driver", "control")
    tell(link, {"do": "bye"})
    assert process.wait(10) == 0
    link.close()


def test_the_token_file_is_gone_and_the_token_is_in_no_command(
    stack: ExitStack, tmp_path: Path
) -> None:
    process, _, token = start_driver(stack, "127.0.0.1", tmp_path)
    line = Path(f"/proc/{process.pid}/cmdline").read_text().split("\0")
    assert token not in " ".join(line)
    assert not Path(line[line.index("--token-file") + 1]).exists()
    environment = Path(f"/proc/{process.pid}/environ").read_text()
    assert token not in environment
    process.terminate()
    assert process.wait(10) == 1


# Command line


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ("10.0.0.2:29600", ("10.0.0.2", 29600)),
        ("jw1", ("jw1", 0)),
        ("::1", ("::1", 0)),
        ("[::1]:77", ("::1", 77)),
    ],
)
def test_addresses(text: str, address: tuple[str, int]) -> None:
    assert address_of(text) == address


@pytest.mark.parametrize("text", ["jw1:port", "jw1:", "jw1:99999", "jw1:-1"])
def test_addresses_without_a_port(text: str) -> None:
    with pytest.raises(UsageError, match="write ADDR:PORT"):
        address_of(text)


def test_tokens(tmp_path: Path) -> None:
    path = tmp_path / "token"
    with pytest.raises(UsageError, match="cannot be read"):
        read_token(str(path))
    path.write_text("short\n")
    with pytest.raises(UsageError, match="fewer than 16 characters"):
        read_token(str(path))
    path.write_text(secrets.token_hex(8) + "\n")
    assert len(read_token(str(path))) == 16


def test_a_driver_without_a_token_file_is_refused() -> None:
    with pytest.raises(UsageError, match="give --token-file"):
        main([])


def test_models_whose_samples_can_be_encoded() -> None:
    assert payload_module("tinylm,slots=4") == "distbench.models.tinylm_data"
    with pytest.raises(UsageError, match="echo has no such function"):
        payload_module("echo")


def test_a_driver_imports_no_torch() -> None:
    program = (
        "import sys, distbench.driver, distbench.models.tinylm_data\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], cwd=HERE, check=False).returncode == 0
