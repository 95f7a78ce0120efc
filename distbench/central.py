"""Central dispatch as the ranks see it: the driver started, called, told of windows, and asked.

Rank 0 starts a driver on its own host, or calls one that was started by hand, and tells it what to
do over a link of its own; every leader, rank 0 too, opens a link for queries. The driver's clock is
measured as a rank's is: before, during and after each window.
"""

from __future__ import annotations

import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distbench import pings, wire
from distbench.clock import ClockModel, Exchange, clock_domain, measure_exchange
from distbench.dispatch import COLUMNS, TOKEN_COLUMNS, WORD
from distbench.errors import DRIVER, ClockError, DistbenchError, UsageError
from distbench.frames import LOADED, Channel
from distbench.liveness import EXCHANGE_TRIPS, WINDOW_TRIPS
from distbench.mlperf_files import write_texts
from distbench.null_replica import measure_floor
from distbench.prepare import Cue, Part
from distbench.run import SCHEMA_VERSION, RankRecord, read_record
from distbench.samples import SampleLog
from distbench.spawn import payload_module, start_driver
from distbench.suite import benchmark, encoder
from distbench.sut import Collect, Indices, SystemUnderTest
from distbench.talk import CALL_S, LOAD_S, address_of, hear, read_token, tell
from distbench.wire import Link, LinkClosed, Seat
from distbench.worker import await_word, serve

if TYPE_CHECKING:
    from distbench.record import Folder
    from distbench.settings import Settings
    from distbench.world import World


class Dispatch:
    """The way from the ranks to one driver, for all windows of a run.

    Attributes:
        world: all ranks.
        settings: of the run.
        channel: this rank's link for queries.
        part: of this rank in the window at hand; rank 0's has the whole schedule.
        control: on rank 0, the link over which the driver is told what to do.
        clock: on rank 0, the link over which its clock is measured.
        process: on rank 0, the driver, where it was started here.
        exchanges: on rank 0, what was measured with the driver's clock.
        problem: why this rank lost the driver in a window; "" where it did not.
        apart: whether the driver's host has no rank: LoadGen then drives over a network.
        lost: whether the driver ended early; alike on all ranks.
    """

    def __init__(self, world: World, settings: Settings) -> None:
        self.world, self.settings = world, settings
        self.channel: Channel | None = None
        self.part: Part | None = None
        self.control: Link | None = None
        self.clock: Link | None = None
        self.process: subprocess.Popen[bytes] | None = None
        self.exchanges: list[Exchange] = []
        self.problem, self.lost = "", False
        self._payload = ""
        self.apart = False
        self._folder: Path | None = None
        self._before: dict[str, Any] = {}
        self._plan: dict[str, int] = {}

    # -- before the first window -----------------------------------------------------------------

    def connect(self, stack: ExitStack) -> None:
        """Start or call the driver, and open every rank's link to it; all ranks call this.

        Raises:
            UsageError: it cannot be started or reached, from any rank; all ranks raise it.
        """
        world, told = self.world, ["", 0, ""]
        problem: DistbenchError | None = None
        load = self.settings.load
        if world.rank == 0:
            try:
                # First of all: a driver that was called has served.
                if load is not None and load.payload == "data":
                    self._payload = payload_module(self.settings.model_name)
                told = self._begin(stack)
            except (DistbenchError, TimeoutError) as error:
                problem = UsageError(str(error))
        host, port, token = world.gather_json(told)[0]
        if host:
            try:
                link = self._call((host, port), token, "worker")
                stack.callback(link.close)
                self.channel = Channel(link.connection, str(link.seat))
                if self.control is not None:
                    self.answered("open all links", CALL_S)
            except DistbenchError as error:
                problem = error
        world.check("driver", problem)
        hosts = [seat.host for seat in world.side.seats]
        away = self.control is not None and self.control.seat.host not in hosts
        self.apart = any(world.gather_json(away))
        self.measure(EXCHANGE_TRIPS)

    def _begin(self, stack: ExitStack) -> list[Any]:
        """On rank 0: have a driver, and open the links for control and clock."""
        load = self.settings.load
        assert load is not None
        if load.driver:
            address, token = address_of(load.driver), read_token(load.driver_token)
        else:
            face = self.world.interface
            here = "127.0.0.1" if face is None else face.address
            self.process, address, token = start_driver(stack, here, self._output())
        self.control = self._call(address, token, "control")
        stack.callback(self.control.close)
        official = self.settings.official
        if official is not None and official.round is not None:
            round_ = official.round
            tell(self.control, {"do": "check", "loadgen": round_.loadgen, "round": round_.name})
            self.answered("check its LoadGen", CALL_S)
        asked = {"do": "expect", "ranks": self.world.world_size, "payload": self._payload}
        tell(self.control, asked)
        self.clock = self._call(address, token, "clock")
        self.clock.clock = self.world.now
        stack.callback(self.clock.close)
        return [*address, token]

    def _output(self) -> Path:
        return Path(self.settings.output_dir).expanduser().absolute()

    def _call(self, address: tuple[str, int], token: str, role: str) -> Link:
        world = self.world
        own = Seat(world.rank, world.host, clock_domain(), "", 0)
        link = wire.open_link(address, own, token, "", CALL_S, "the driver", role)
        link.connection.settimeout(wire.ECHO_TIMEOUT_S)
        return link

    def load(self, sut: SystemUnderTest, order: Indices) -> None:
        """Load samples at the driver's word; every leader acknowledges."""
        self._loading(sut, order, True)

    def unload(self, sut: SystemUnderTest, order: Indices) -> None:
        """Likewise, let samples go."""
        self._loading(sut, order, False)

    def _loading(self, sut: SystemUnderTest, order: Indices, load: bool) -> None:
        if self.control is not None:
            tell(self.control, {"do": "load", "load": load}, order)
        channel = self.channel
        assert channel is not None
        indices = np.frombuffer(await_word(channel, LOAD_S), "<i8").astype(np.int64)
        try:
            (sut.load if load else sut.unload)(indices)
        finally:  # a model that raises is told of by its rank; the driver need not wait for it
            channel.post(LOADED, len(indices), 0)
            channel.drain(CALL_S)
        self.answered("load the samples", LOAD_S)

    def answered(self, what: str, within_s: float) -> tuple[dict[str, Any], list[Any]]:
        """On rank 0: hear the driver's answer; its problem is raised here."""
        if self.control is None:
            return {}, []
        self.control.connection.settimeout(within_s + 10)
        try:
            told, arrays = hear(self.control)
        except (LinkClosed, TimeoutError) as error:
            raise UsageError(f"the driver did not {what}: {error}{self._status()}") from error
        if "error" in told:
            raise UsageError(told["error"])
        return told, arrays

    def _status(self) -> str:
        """Say how the driver ended, where that can be known here."""
        if self.process is None:
            return ""
        with suppress(subprocess.TimeoutExpired):
            return f" (its exit status was {self.process.wait(2)})"
        return ""

    # -- clocks ----------------------------------------------------------------------------------

    def measure(self, trips: int) -> None:
        """On rank 0: exchange stamps with the driver, unless a rank has the same clock."""
        if self.clock is None or self._leader() != DRIVER:
            return
        with suppress(LinkClosed, ClockError):  # the end of the driver shows elsewhere
            made = pings.exchange_trips(self.clock, trips, self.world.now, lambda *_: None)
            if made:
                self.exchanges.append(measure_exchange(made))

    def _leader(self) -> int:
        """Return the first rank that reads the driver's clock; the driver where none does."""
        assert self.clock is not None
        seats = self.world.side.seats
        domain = self.clock.seat.domain
        return next((seat.rank for seat in seats if seat.domain == domain), DRIVER)

    def _model(self) -> ClockModel:
        leader = self._leader()
        if leader != DRIVER:
            return self.world.side.model(leader)
        if not self.exchanges:
            raise ClockError("the driver's clock is not known: no ping came back from it")
        return ClockModel.fit(self.exchanges)

    def _clock(self) -> dict[str, Any]:
        """Return the driver's clock as a record has it."""
        assert self.clock is not None
        kept = [
            [e.at_ns, e.offset_ns, e.bound_ns, e.round_trip_ns, e.trips] for e in self.exchanges
        ]
        return {"domain": self.clock.seat.domain, "leader": self._leader(), "exchanges": kept}

    # -- a window --------------------------------------------------------------------------------

    def open(self, folder: Folder, before: Mapping[str, Any]) -> None:
        """Let the driver make its log, with the schedule; all ranks call this.

        Raises:
            UsageError: its disk has no room; all ranks raise it.
        """
        problem: DistbenchError | None = None
        part = self.part
        if self.control is not None and part is not None:
            parts = folder.path.relative_to(self._output()).parts
            self._folder = folder.path / "driver"
            made = before["schedule"]
            self._before = {
                "schema_version": SCHEMA_VERSION,
                "scenario": before["scenario"],
                "run_id": folder.run_id,
                "rank": DRIVER,
                "host": self.control.seat.host,
                "columns": list(COLUMNS),
                "clock": self._clock(),
                "load": before["load"],
                "schedule": made,
                "rule": WORD,
                "replicas": self.world.world_size,
                "turn": self.settings.seed % self.world.world_size,
                "backlog": made["backlog"],
                "findings": [],
            } | {name: before[name] for name in ("official",) if name in before}
            more = [name for name in TOKEN_COLUMNS if name in before["columns"]]
            self._before["columns"] += more
            asked = {"do": "window", "folder": parts, "before": self._before, "columns": more}
            try:
                if before.get("official", {}).get("tokens") and not more:
                    raise UsageError(
                        f"{before['official']['benchmark']} is judged by its tokens, and "
                        f"{self.settings.model_name} stamps none: give a model that does"
                    )
                # Of LoadGen's order and schedule nothing is told before.
                arrays = ([], []) if part.due_ns is None else (part.due_ns, part.order)
                tell(self.control, asked, *arrays)
                self.answered("make its log", CALL_S)
            except DistbenchError as error:
                problem = error
        self.world.check("driver's log", problem)

    def drive(
        self, sut: SystemUnderTest, log: SampleLog, part: Part, collect: Collect, cue: Cue
    ) -> None:
        """Run a window: rank 0 tells the driver when to begin, and all ranks serve."""
        assert self.channel is not None and part.made is not None
        side = self.world.side
        tick = side.on_tick
        if self.control is not None:
            local_ns = self._model().to_peer_ns(cue.start_ns)
            self._plan = {"reference_ns": cue.start_ns, "local_ns": local_ns}
            with suppress(LinkClosed):  # serving shows it in a moment
                tell(self.control, {"do": "start", "plan": self._plan})

            def measured() -> None:
                tick()
                self.measure(WINDOW_TRIPS)

            side.on_tick = measured
        try:
            wait_ns, encode = part.made["max_wait_ns"], None
            if "official" in part.made:
                encode = encoder(benchmark(part.made["official"]["benchmark"]))
            name = f"{self.settings.model_name} on {self.world.host}"
            self.problem = serve(
                sut, log, self.channel, collect, cue, part.group, wait_ns, encode, name
            )
        finally:
            side.on_tick = tick

    def record(self, after: dict[str, Any]) -> RankRecord:
        """Return what the driver recorded, on every rank; all ranks call this after a window.

        Args:
            after: this rank's after.json; rank 0's takes the exchanges with the driver's clock.
        """
        world = self.world
        found = RankRecord(DRIVER, {}, None, None)
        problem = next((each for each in world.gather_json(self.problem) if each), "")
        if self.control is not None:
            self.measure(EXCHANGE_TRIPS)
            found = self._left(problem) if problem else self._fetched(self.control)
            if self._leader() == DRIVER:
                after["exchanges"][str(DRIVER)] = self._clock()["exchanges"]
        told = [found.before, found.after, found.problem, found.rows is not None]
        before, ended, problem, here = world.gather_json(told)[0]
        self.lost = bool((ended or {}).get("end"))
        rows = np.zeros((0, len(before["columns"])), np.int64) if found.rows is None else found.rows
        rows = world.gather_rows(np.ascontiguousarray(rows))[0]
        return RankRecord(DRIVER, before, ended, rows if here else None, problem)

    def floor(self, official: Mapping[str, Any]) -> dict[str, Any] | None:
        """Measure what LoadGen and dispatch cost alone; see ``null_replica``."""
        assert self.part is not None
        return measure_floor(self, official, self.part.group)

    def _fetched(self, control: Link) -> RankRecord:
        """On rank 0: ask the driver for its record; of one that died, read what it left here."""
        try:
            self.answered("end the window", CALL_S)
            tell(control, {"do": "fetch"})
            told, (flat, *texts) = self.answered("hand over its log", LOAD_S)
            if texts and self._folder is not None:
                write_texts(self._folder.parent / "loadgen", told["texts"], texts)
        except (DistbenchError, OSError) as error:
            return self._left(str(error))
        rows = flat.reshape(-1, len(told["before"]["columns"]))
        return RankRecord(DRIVER, told["before"], told["after"], rows)

    def _left(self, problem: str) -> RankRecord:
        """Return what a driver that was lost left on this host, and say in its name what it was."""
        assert self._folder is not None and self.control is not None
        seat = self.control.seat
        sentence = f"{seat} was lost: {problem}{self._status()}"
        end = {"code": "lost", "rank": DRIVER, "host": seat.host, "sentence": sentence}
        after = {"plan": self._plan, "started_ns": None, "end": {**end, "exit_code": 6}}
        try:
            left = read_record(self._folder, "driver.json")
        except UsageError as error:
            return RankRecord(DRIVER, self._before, after, None, str(error))
        used = 0 if left.rows is None else len(left.rows)
        return replace(left, after=left.after or {**after, "used": used})

    def cut(self) -> None:
        """On rank 0, at an early end: end the link, and the driver saves what it has at once."""
        if self.control is not None:
            with suppress(OSError):
                self.control.connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """On rank 0: tell the driver that the run is over."""
        if self.control is not None:
            with suppress(LinkClosed):
                tell(self.control, {"do": "bye"})


@contextmanager
def open_dispatch(world: World, settings: Settings) -> Iterator[Dispatch]:
    """Have a driver for the windows of a run; all ranks enter and leave together.

    Raises:
        UsageError: it cannot be had, or cannot be used as asked; all ranks raise it.
    """
    with ExitStack() as stack:
        made = Dispatch(world, settings)
        made.connect(stack)
        try:
            yield made
        finally:
            made.close()
