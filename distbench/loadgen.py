"""MLCommons' LoadGen, unmodified, in the driver process: what it issues goes to every replica.

LoadGen calls ``issue`` on the thread that started it, which sends and never waits; a second thread
reads what the replicas answer and tells LoadGen. A sample goes to the replica with the least
outstanding; Offline's, which all come at once, are dealt out in pieces. LoadGen's logs are the
official word. What stands in the driver's own log beside them: when LoadGen handed a
sample over (``issued``; ``scheduled`` and ``ready`` are the same, for when it was due LoadGen tells
nobody), who served it, and when its completion came.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import signal
import threading
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distbench import files
from distbench.clock import Now
from distbench.compliance import audit_conf
from distbench.dispatch import DriverEnded, Hub, choose
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
    PULSE_NS,
    RAISED,
    UNLOAD,
    WHOLE,
    Frame,
    unpacked,
)
from distbench.official import MODES
from distbench.samples import FAILED, PENDING, SampleLog
from distbench.talk import LOAD_S
from distbench.user_conf import SCENARIOS

PACKAGE = "mlcommons-loadgen"
PIECE = 1 << 16
"""Samples of Offline that go out at once: the replicas begin while the rest is being packed."""
POOL = 1 << 13
SCATTER = 64
"""A query of more samples than this for each replica is dealt out in pieces."""


def check_installed(wanted: str, extra: str) -> None:
    """Refuse a host without the LoadGen of the round.

    Args:
        wanted: version of the round.
        extra: of distbench, which installs it.

    Raises:
        UsageError: it is not installed, or is another version.
    """
    remedy = f"`pip install {PACKAGE}=={wanted}`, or `pip install '.[{extra}]'` in a clone"
    try:
        found = importlib.metadata.version(PACKAGE)
        importlib.import_module("mlperf_loadgen")
    except ImportError as error:
        raise UsageError(f"LoadGen is not installed here ({error}): {remedy}") from error
    if found != wanted:
        raise UsageError(
            f"{PACKAGE} {found} is installed here, and the round has {wanted}, whose sample order "
            f"and logs differ: {remedy}"
        )


class Session:
    """One official run: LoadGen on one thread, the replicas' answers on another.

    Args:
        hub: the links to the replicas.
        log: of the driver, with ``COLUMNS``; its rows are in the order of issue.
        turn: the replica that comes first among equals.
        now: the clock.
        fail: called on the reading thread when the run cannot go on; does not return.
    """

    def __init__(
        self,
        hub: Hub,
        log: SampleLog,
        turn: int,
        now: Now,
        fail: Callable[[Exception], None],
        tokens: bool,
    ) -> None:
        self.lg: Any = importlib.import_module("mlperf_loadgen")
        self.hub, self.log, self.turn, self.now, self.fail = hub, log, turn, now, fail
        self.tokens = tokens
        self.ids = array("Q")
        replicas = len(hub.channels)
        self.sent, self.ended = [0] * replicas, [0] * replicas
        self.left, self.raised, self.over = set[int](), False, False
        self._waited, self._names = threading.Event(), dict[int, str]()
        self._answers, self._cells = 0, log.cells()
        self._pool = [self.lg.QuerySampleResponse(0, 0, 0) for _ in range(POOL)]

    def guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        """Return a callback that raises nothing, which would unwind LoadGen in mid-flight."""

        def safe(*given: Any) -> Any:
            try:
                return call(*given)
            except Exception as error:
                self.fail(error)
                return ""

        return safe

    # -- LoadGen's thread ------------------------------------------------------------------------

    def issue(self, samples: Sequence[Any]) -> None:
        """Send what LoadGen issues; never waits."""
        replicas = len(self.sent)
        row = len(self.ids)
        if row + len(samples) > self.log.capacity:
            self.fail(
                DriverEnded(
                    f"LoadGen issued more than the {self.log.capacity:,} samples that follow from "
                    "its settings: leave the keys that change their number out of user.conf"
                )
            )
        if len(samples) > SCATTER * replicas:
            self._scatter(samples, row)
            return
        stamp, cells, hub = self.now(), self._cells, self.hub
        index, issued, served = cells["index"], cells["issued"], cells["served_by"]
        scheduled, ready, counts = cells["scheduled"], cells["ready"], cells["count"]
        for at, sample in enumerate(samples, row):
            outstanding = [a - b for a, b in zip(self.sent, self.ended, strict=True)]
            place = choose(outstanding, self.turn)
            self.turn = (place + 1) % replicas
            self.sent[place] += 1
            index[at], served[at] = sample.index, place
            scheduled[at] = ready[at] = issued[at] = stamp
            counts[at] = 1  # last: a row that has it is whole
            self.ids.append(sample.id)
            hub.post(place, at, sample.index)
        hub.flush()

    def _scatter(self, samples: Sequence[Any], row: int) -> None:
        """Deal all samples out, in pieces that each replica gets in turn."""
        replicas, count, log = len(self.sent), len(samples), self.log
        rounds = -(-count // (PIECE * replicas))
        size = -(-count // (rounds * replicas))  # all pieces alike: none may wait for one more
        for begin in range(0, count, size):
            piece = samples[begin : begin + size]
            first, end, place = row + begin, row + begin + len(piece), self.turn
            indices = np.array([each.index for each in piece], "<i8")
            log.index[first:end], log.served_by[first:end] = indices, place
            log.scheduled[first:end] = log.ready[first:end] = log.issued[first:end] = self.now()
            log.count[first:end] = 1
            self.ids.extend([each.id for each in piece])
            self.sent[place] += len(piece)
            self.hub.post_many(place, first, indices)
            self.hub.flush()
            self.turn = (place + 1) % replicas

    def flush(self) -> None:
        """Nothing waits here for more."""

    def load(self, indices: Sequence[int]) -> None:
        """Let every replica load samples, and wait until all have."""
        self._word(LOAD, indices)

    def unload(self, indices: Sequence[int]) -> None:
        """Likewise, let samples go."""
        self._word(UNLOAD, indices)

    def name(self) -> str:
        """Ask every replica for its name; LoadGen wants "Network SUT" in it."""
        self._word(NAME, ())
        named = ", ".join(dict.fromkeys(self._names[place] for place in sorted(self._names)))
        return f"Network SUT: distbench on {named}"

    def _word(self, kind: int, indices: Sequence[int]) -> None:
        blob = np.asarray(indices, "<i8").tobytes()
        self._answers = len(self.sent)
        self._waited.clear()
        self.hub.tell(kind, len(indices), blob)
        if not self._waited.wait(LOAD_S):
            self.fail(DriverEnded(f"not all ranks loaded their samples within {LOAD_S:.0f} s"))

    def leave(self) -> None:
        """Tell the replicas that no more queries come, and wait until each has left its loop.

        Raises:
            DriverEnded: one answers what LoadGen no longer waits for.
        """
        self.hub.tell(END, WHOLE, b"")
        while len(self.left) < len(self.sent):
            for place, frames in self.hub.wait(self.now() + PULSE_NS):
                self.take(place, frames)

    # -- the reading thread ----------------------------------------------------------------------

    def read(self) -> None:
        """Take answers until ``over``; any failure ends the run."""
        try:
            while not self.over:
                for place, frames in self.hub.wait(self.now() + PULSE_NS):
                    self.take(place, frames)
        except Exception as error:  # in LoadGen's callbacks nothing may be raised
            self.fail(error)

    def take(self, place: int, frames: Sequence[Frame]) -> None:
        """Note what a replica answered, and tell LoadGen.

        Raises:
            DriverEnded: it speaks of a query that it does not have, or its loop is over.
        """
        stamp, cells = self.now(), self._cells
        completed, served = cells["completed"], cells["served_by"]
        done: list[tuple[int, int, bytes]] = []
        for kind, seq, other, data in frames:
            if kind in (DONE, FIRST):
                has = 0 <= seq < len(self.ids) and served[seq] == place
                if not has or completed[seq] != PENDING:
                    raise self._wrong(place, seq, has)
            if kind == DONE:
                completed[seq] = FAILED if other == FAILED_TOKENS else stamp
                if self.tokens:
                    cells["tokens"][seq] = max(other, 0)
                done.append((seq, other, data))
            elif kind == DONES:
                self._many(place, seq, other, data, stamp)
            elif kind == FIRST:
                self._first(seq, stamp, data)
            elif kind in (LOADED, NAMED):
                self._names[place] = data.decode(errors="replace")
                self._answers -= 1
                if self._answers <= 0:
                    self._waited.set()
            elif kind == LEFT:
                self._gone(place, other)
        if done:
            self.ended[place] += len(done)
            self.log.ended[0] += len(done)
            self._complete(done)

    def _wrong(self, place: int, seq: int, has: bool) -> DriverEnded:
        name = self.hub.channels[place].name
        what = "answered a second time" if has else "which it was not given"
        return DriverEnded(f"{name} answered sample {seq}, {what}: its loop and its link disagree")

    def _gone(self, place: int, code: int) -> None:
        self.left.add(place)
        self.raised |= code == RAISED
        if self.over:
            return
        name = self.hub.channels[place].name
        why = "its model raised" if code == RAISED else "it heard nothing for a while"
        raise DriverEnded(f"{name} left in the middle of LoadGen's run: {why}")

    def _many(self, place: int, first: int, count: int, data: bytes, stamp: int) -> None:
        """Note that neighbouring samples ended together, and tell LoadGen of them at once."""
        log, end = self.log, first + count
        if not (0 <= first < end <= len(self.ids)):
            raise self._wrong(place, first, False)
        if (log.served_by[first:end] != place).any():
            raise self._wrong(place, first, False)
        if (log.completed[first:end] != PENDING).any():
            raise self._wrong(place, first, True)
        log.completed[first:end] = stamp
        self.ended[place] += count
        log.ended[0] += count
        if not data:
            self._empty(self.ids[first:end])
            return
        try:
            answers = unpacked(count, data)
        except ValueError as error:
            raise DriverEnded(f"{self.hub.channels[place].name} sent {error}") from error
        numbers = range(first, end)
        self._complete([(n, 0, each) for n, each in zip(numbers, answers, strict=True)])

    def _empty(self, ids: Sequence[int]) -> None:
        """Tell LoadGen of samples without answers: of Offline there may be a million a second.

        To fill in a response that is there takes half of what making one does.
        """
        pool, complete = self._pool, self.lg.QuerySamplesComplete
        for begin in range(0, len(ids), len(pool)):
            piece = ids[begin : begin + len(pool)]
            for response, each in zip(pool, piece, strict=False):
                response.id = each
            complete(pool if len(piece) == len(pool) else pool[: len(piece)])

    def _first(self, seq: int, stamp: int, token: bytes) -> None:
        if self.tokens:
            self._cells["first_token"][seq] = stamp
            blob = array("B", token)
            where = blob.buffer_info()[0] if token else 0
            response = self.lg.QuerySampleResponse(self.ids[seq], where, len(token))
            self.lg.FirstTokenComplete([response])

    def _complete(self, done: Sequence[tuple[int, int, bytes]]) -> None:
        """Tell LoadGen; it has copied the answers when the call returns."""
        response, ids = self.lg.QuerySampleResponse, self.ids
        if not self.tokens and not any(data for _, _, data in done):
            self._empty([ids[seq] for seq, _, _ in done])
            return
        blob = array("B", b"".join([data for _, _, data in done]))
        at = blob.buffer_info()[0]
        told = []
        for seq, tokens, data in done:
            size = len(data)
            where = at if size else 0
            if self.tokens:
                told.append(response(ids[seq], where, size, max(tokens, 0)))
            else:
                told.append(response(ids[seq], where, size))
            at += size
        self.lg.QuerySamplesComplete(told)


def settings_of(lg: Any, official: dict[str, Any], conf: Path) -> Any:
    """Return LoadGen's settings: its own mlperf.conf, and the user.conf of the run."""
    kind = SCENARIOS[official["scenario"]]
    settings = lg.TestSettings()
    # Where a line is not to its taste LoadGen drops the whole file, and goes on with its defaults.
    if settings.FromConfig("", official["config"], kind, 0):
        raise UsageError("LoadGen cannot read its own mlperf.conf: install its wheel anew")
    if settings.FromConfig(str(conf), official["config"], kind, 1):
        raise UsageError(f"LoadGen does not take {conf}: see its lines, and mend --user-conf")
    settings.scenario = getattr(lg.TestScenario, kind)
    settings.mode = getattr(lg.TestMode, MODES[official["mode"]])
    return settings


def run_loadgen(session: Session, official: dict[str, Any], folder: Path) -> None:
    """Run LoadGen once, on this thread; its logs go to a folder.

    Args:
        session: its other end.
        official: from ``official.settled``.
        folder: exists; gets user.conf, the audit's audit.config, and LoadGen's logs.
    """
    conf = folder / "user.conf"
    files.write_bytes(conf, official["conf"].encode())
    if official["audit"]:
        files.write_bytes(folder / "audit.config", audit_conf(official["audit"]).encode())
    start_test(session, settings_of(session.lg, official, conf), official, folder)


def start_test(session: Session, settings: Any, official: Mapping[str, Any], folder: Path) -> None:
    """Start LoadGen on this thread, the main one, and wait for its end.

    Args:
        session: its other end.
        settings: LoadGen's TestSettings.
        official: from ``official.settled``.
        folder: exists; gets LoadGen's logs, and may have an audit.config.
    """
    lg, log = session.lg, session.lg.LogSettings()
    log.enable_trace = False
    log.log_output.outdir = str(folder)
    log.log_output.copy_summary_to_stdout = False
    total, resident = official["total"], official["resident"]
    load, unload, issue = map(session.guarded, (session.load, session.unload, session.issue))
    library = lg.ConstructQSL(total, resident, load, unload)
    network = bool(official.get("network"))
    if network:
        sut = lg.ConstructQDL(issue, session.flush, session.guarded(session.name))
    else:
        sut = lg.ConstructSUT(issue, session.flush)
    reading = threading.Thread(target=session.read, name="answers", daemon=True)
    reading.start()
    # Nothing may be raised into LoadGen, which calls back from C++: a signal ends the process.
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        # Of no audit a path that is not there: LoadGen looks in the working directory for one.
        lg.StartTestWithLogSettings(sut, library, settings, log, str(folder / "audit.config"))
    finally:
        signal.signal(signal.SIGTERM, before)
        session.over = True
        session.hub.wake()
        reading.join()
        (lg.DestroyQDL if network else lg.DestroySUT)(sut)
        lg.DestroyQSL(library)
