"""The driver: the process that issues queries under central dispatch; never imports torch.

    python -m distbench.driver --listen ADDR[:PORT] --token-file FILE [--output-dir DIR]

Rank 0 starts one on its own host by itself. Started by hand, on a host that need have no torch, it
is used by `--dispatch central --driver ADDR:PORT --driver-token FILE`. Rank 0 and every leader call
it and show the token; the schedule of each window comes from rank 0, together with the instant to
begin. One thread issues the queries and notes what completes, on this host's clock, in driver/ of
the result directory. It serves one run and ends with it, or when a link ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

import distbench
from distbench import files, floor, loadgen, pings, wire
from distbench.cli import Option, parse, run_command, whole
from distbench.clock import clock_domain, now_ns
from distbench.dispatch import COLUMNS, DriverEnded, Hub, Ledger, dispatch_loop, settle
from distbench.errors import DRIVER, EXIT_INCOMPLETE, EXIT_OK, DistbenchError, UsageError
from distbench.frames import LOAD, LOADED, UNLOAD, Channel, ChannelLost
from distbench.mlperf_files import EXTRAS, as_numbers, texts_in, told
from distbench.rank_files import write_done
from distbench.samples import SampleLog
from distbench.talk import (
    CALL_S,
    LOAD_S,
    address_of,
    encoder,
    hear,
    read_token,
    take_link,
    tell,
)
from distbench.waiting import (
    disturbed,
    measure_spin_ns,
    quiet,
    schedstat,
    set_timer_slack,
    wait_until,
)
from distbench.wire import Link, LinkClosed, Seat

PR_SET_PDEATHSIG = 1
WORDS = ("check", "expect", "load", "window", "start", "fetch", "floor")
"""What rank 0 may say, beside "bye"; each is a method."""
SPIN_NS = 50_000
"""A driver that spun for as long as a rank does would take a processor from a worker."""


@dataclass
class Window:
    """What one window needs, from its making to its fetching."""

    folder: Path
    before: dict[str, Any]
    log: SampleLog
    order: list[int]
    due_ns: Any
    after: dict[str, Any] = field(default_factory=dict)


class Driver:
    """One run's driver, once rank 0 has called it.

    Args:
        control: link to rank 0, over which it is told what to do.
        server: further links are taken from it, and it is closed then.
        own: this process's seat.
        token: every caller must show it.
        output_dir: where result directories are on this host.
    """

    def __init__(
        self, control: Link, server: socket.socket, own: Seat, token: str, output_dir: Path
    ) -> None:
        self.control, self.server, self.own, self.token = control, server, own, token
        self.output_dir = output_dir
        self.clock: Link | None = None
        self.channels: list[Channel] = []
        self.start_spin_ns = measure_spin_ns(now_ns)
        self.hub: Hub | None = None
        self.encode: Callable[[Sequence[int]], Sequence[bytes]] | None = None
        self.window: Window | None = None
        self._ending = threading.Lock()

    def serve(self) -> None:
        """Do what rank 0 tells until it says that the run is over.

        Raises:
            DistbenchError: a link ended before that.
        """
        words = {name: getattr(self, f"_{name}") for name in WORDS}
        while True:
            self._await_word()
            self.control.connection.settimeout(CALL_S)
            asked, arrays = hear(self.control)
            if asked["do"] == "bye":
                return
            try:
                told, back = words[asked["do"]](asked, arrays)
            except UsageError as error:  # such as a disk without room: rank 0 tells its ranks
                told, back = {"error": str(error)}, []
            tell(self.control, told, *back)

    def _await_word(self) -> None:
        """Wait until rank 0 has something to say; answer pings, and see whether links end."""
        channels = {each.fileno(): each for each in self.channels}
        watched = [self.control.fileno(), *channels]
        if self.clock is not None:
            watched.append(self.clock.fileno())
        while True:
            ready = select.select(watched, (), ())[0]
            if self.control.fileno() in ready:
                return
            for fd in ready:
                if fd in channels:
                    try:
                        channels[fd].read()
                    except ChannelLost:  # it may leave before rank 0 says that the run is over
                        watched.remove(fd)
                elif self.clock is not None and fd == self.clock.fileno():
                    self._pong()

    def _pong(self) -> None:
        """Answer one ping, and do not stay for the next: queries may be due before it comes."""
        assert self.clock is not None
        if not self.clock.whole(pings.PING_BYTES):
            return  # a part of a ping: the loop comes back for the rest
        kind, payload = self.clock.receive()
        if kind == wire.PING:
            pings.answer_ping(self.clock, payload, now_ns)

    def _check(self, asked: dict[str, Any], _arrays: list[Any]) -> Any:
        """Refuse a round whose LoadGen is not here, before anything else is done."""
        loadgen.check_installed(asked["loadgen"], EXTRAS[asked["round"]])
        return {}, []

    def _expect(self, asked: dict[str, Any], _arrays: list[Any]) -> Any:
        """Take the clock's link and one link from every leader; then nobody else is let in."""
        ranks = int(asked["ranks"])
        taken: dict[int, Channel] = {}
        until = time.monotonic() + CALL_S
        while len(taken) < ranks or self.clock is None:
            link = take_link(self.server, self.own, self.token, until)
            if link is None:
                absent = sorted(set(range(ranks)) - set(taken))
                raise UsageError(
                    f"ranks {absent} did not open their link to {self.own} within {CALL_S:.0f} s: "
                    "does a firewall let them connect to it?"
                )
            if link.role == "clock" and self.clock is None:
                self.clock = link
            elif link.role == "worker" and 0 <= link.seat.rank < ranks:
                taken[link.seat.rank] = Channel(link.connection, str(link.seat))
            else:
                link.close()
        self.server.close()
        self.channels = [taken[rank] for rank in sorted(taken)]
        others = [(self.clock.fileno(), self._pong), (self.control.fileno(), self._interrupted)]
        self.hub = Hub(self.channels, others, now_ns, SPIN_NS)
        if asked["payload"]:
            self.encode = encoder(asked["payload"])
        return {}, []

    def _interrupted(self) -> NoReturn:
        """In a window rank 0 says nothing, so its link has ended."""
        raise DriverEnded(f"the link to {self.control.seat} ended in the window")

    def _load(self, asked: dict[str, Any], arrays: list[Any]) -> Any:
        """Let every leader load or unload samples, and wait until all have."""
        (indices,) = arrays
        kind = LOAD if asked["load"] else UNLOAD
        for channel in self.channels:
            channel.post(kind, len(indices), 0, indices.tobytes())
            channel.drain(CALL_S)
        settle(self.channels, LOADED, LOAD_S)
        if self.hub is not None and self.encode is not None:
            listed = indices.tolist() if asked["load"] else []
            self.hub.data = dict(zip(listed, self.encode(listed), strict=True))
        return {}, []

    def _window(self, asked: dict[str, Any], arrays: list[Any]) -> Any:
        """Make a window's folder and log, with the schedule that rank 0 drew."""
        due_ns, order = arrays
        official = asked["before"].get("official")
        if official:
            due_ns = order = np.zeros(official["capacity"], np.int64)
        parts = asked["folder"]
        if not parts or any(
            each in ("", ".", "..") or "/" in each or "\0" in each for each in parts
        ):
            raise UsageError(f"{self.own} makes no folder outside its --output-dir: {parts}")
        folder = self.output_dir.joinpath(*parts) / "driver"
        columns = [*COLUMNS, *asked["columns"]]
        before = asked["before"] | self._described() | {"columns": columns}
        try:
            folder.mkdir(parents=True)
            if official:
                (folder.parent / "loadgen").mkdir()
            log = SampleLog.create(folder / "samples.npy", len(due_ns), columns)
            log.index[:] = order
            log.served_by[:] = -1
            files.write_json(folder / "driver.json", before)
        except OSError as error:
            raise UsageError(
                f"{self.own} cannot write to {folder}: {error.strerror or error}; give another "
                "--output-dir"
            ) from error
        self.window = Window(folder, before, log, order.tolist(), due_ns)
        return {}, []

    def _described(self) -> dict[str, Any]:
        return {
            "rank": DRIVER,
            "host": self.own.host,
            "pid": os.getpid(),
            "spin_ns": SPIN_NS,
            "payload": "index" if self.encode is None else "data",
            "python": platform.python_version(),
            "numpy": np.__version__,
            "distbench": distbench.__version__,
        }

    def _start(self, asked: dict[str, Any], _arrays: list[Any]) -> Any:
        """Run the loop from the agreed instant; whatever happens, what completed is kept."""
        assert self.window is not None and self.hub is not None
        window, after = self.window, self.window.after
        after |= {"plan": asked["plan"], "started_ns": None, "end": None, "errors": []}
        after |= {"used": window.log.capacity, "halted": False, "disk_error": ""}
        run = self._run_loadgen if "official" in window.before else self._run
        try:
            run(window, self.hub, asked["plan"]["local_ns"])
        except (DistbenchError, OSError) as error:
            self._note_end(window, error)
            raise
        finally:
            self._save(window)
        return {}, []

    def _note_end(self, window: Window, error: Exception) -> None:
        window.after["end"] = {
            "code": "failed",
            "rank": DRIVER,
            "host": self.own.host,
            "sentence": f"{self.own} ended early: {error}",
            "exit_code": 6,
        }

    def _save(self, window: Window) -> None:
        if "official" in window.before:
            window.after["used"] = int(np.count_nonzero(window.log.count))
        with contextlib.suppress(OSError):
            window.log.freeze()  # after an early end LoadGen's thread goes on: what is hashed stays
        with contextlib.suppress(OSError):  # the samples are in their file all the same
            files.write_json(window.folder / "after.json", window.after)
            write_done(window.folder)

    def _run_loadgen(self, window: Window, hub: Hub, begin_ns: int) -> None:
        """Let LoadGen drive, from the agreed instant on; its own words are taken from its logs."""
        log, after, official = window.log, window.after, window.before["official"]
        folder = window.folder.parent / "loadgen"
        session = loadgen.Session(
            hub, log, window.before["turn"], now_ns, self._give_up, official["tokens"]
        )
        with quiet():
            first = schedstat()
            after["started_ns"] = wait_until(begin_ns, now_ns, self.start_spin_ns)
            loadgen.run_loadgen(session, official, folder)
            after["ended_ns"] = now_ns()
            last = schedstat()
            session.leave()
        after["raised"] = session.raised
        after["quiet"] = disturbed(first, last, after["ended_ns"], after["started_ns"])
        after["loadgen"] = told(folder, official)
        here = Path.cwd()
        after["audit_config"] = str(here) if (here / "audit.config").exists() else ""

    def _floor(self, asked: dict[str, Any], _arrays: list[Any]) -> Any:
        """Measure what LoadGen and dispatch cost while the replicas do nothing."""
        assert self.hub is not None
        with quiet():
            return floor.run_floor(self.hub, asked["official"], now_ns, self._give_up), []

    def _give_up(self, error: Exception) -> NoReturn:
        """End the process: LoadGen waits for what is outstanding, and nothing can stop it.

        Its logs stay as far as it has written them.
        """
        self._ending.acquire()  # LoadGen's thread and the reading one may both come here: for good
        if self.window is not None:
            self._note_end(self.window, error)
            self._save(self.window)
        with contextlib.suppress(Exception):
            tell(self.control, {"error": f"{self.own} ended early: {error}"})
        os._exit(EXIT_INCOMPLETE)

    def _run(self, window: Window, hub: Hub, begin_ns: int) -> None:
        log, before, after = window.log, window.before, window.after
        log.scheduled[:] = begin_ns + window.due_ns
        log.ready[:] = log.scheduled  # a driver is always free: what it is late, it is late itself
        ledger = Ledger(log, len(self.channels), now_ns)
        with quiet():
            first = schedstat()
            after["started_ns"] = wait_until(begin_ns, now_ns, self.start_spin_ns)
            after["halted"] = dispatch_loop(
                hub, log, window.order, ledger, now_ns, before["turn"], before["backlog"]
            )
            ended = now_ns()
            last = schedstat()
            hub.end(ledger, after["halted"] or ledger.raised)
        after["ended_ns"] = ended
        after["raised"] = ledger.raised
        after["quiet"] = disturbed(first, last, ended, after["started_ns"])

    def _fetch(self, _asked: dict[str, Any], _arrays: list[Any]) -> Any:
        """Hand the last window's record to rank 0."""
        assert self.window is not None
        window, self.window = self.window, None
        rows = window.log.rows[: window.after["used"]]
        texts = []
        if "official" in window.before:
            texts = texts_in(window.folder.parent / "loadgen")
        return {
            "before": window.before,
            "after": window.after,
            "texts": [[name, len(blob)] for name, blob in texts],
        }, [rows.reshape(-1), *(as_numbers(blob) for _, blob in texts)]


OPTIONS = (
    Option("listen", "127.0.0.1", str, "where ranks call: an address, with :PORT or any", "ADDR"),
    Option("token-file", None, str, "a file that holds what callers must show", "FILE"),
    Option("output-dir", "results", str, "where result directories are on this host", "DIR"),
    Option("parent", "0", whole, "end with this process; 0: none", "PID"),
)


def _end_with(parent: int) -> None:
    """Let the kernel end this process when the one that started it has ended."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        raise DriverEnded("the process that started this driver has ended")


def _terminated(_number: int, _frame: Any) -> NoReturn:
    raise DriverEnded("terminated (SIGTERM)")


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    values = parse("distbench.driver", __doc__ or "", OPTIONS, argv).values
    if values["token_file"] is None:
        raise UsageError("a driver needs a token that its callers must show: give --token-file")
    token = read_token(values["token_file"])
    signal.signal(signal.SIGTERM, _terminated)
    if values["parent"]:
        _end_with(values["parent"])
    host, port = address_of(values["listen"])
    own = Seat(DRIVER, socket.gethostname(), clock_domain(), "", 0)
    set_timer_slack()
    with wire.listen(host, 64, port, str(own)) as server:
        named = f"[{host}]" if ":" in host else host
        sys.stdout.write(f"distbench: driver listens on {named}:{server.getsockname()[1]}\n")
        sys.stdout.flush()
        until = time.monotonic() + (CALL_S if values["parent"] else 10**9)
        control = take_link(server, own, token, until)
        if control is None or control.role != "control":
            raise DriverEnded("rank 0 did not call")
        try:
            Driver(control, server, own, token, Path(values["output_dir"]).absolute()).serve()
        except (ChannelLost, LinkClosed, TimeoutError) as error:
            raise DriverEnded(str(error)) from error
    return EXIT_OK


if __name__ == "__main__":
    run_command(main)
