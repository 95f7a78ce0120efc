"""What a rank writes: its folder before the window, its log in it, the rest after or at the end.

The folder is on the rank's own disk. Whatever happens to the others, a completed sample is in it.
"""

from __future__ import annotations

import contextlib
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distbench import files
from distbench.errors import End, UsageError, where
from distbench.files import write_manifest
from distbench.liveness import IDLE
from distbench.rank_files import write_done
from distbench.run import Run, rank_folder
from distbench.samples import SampleLog
from distbench.windows import load_run

if TYPE_CHECKING:
    from distbench.world import World

OTHERS_S = 2.0
"""How long the reporting rank waits for the other ranks' files at an early end."""
FLUSH_S = 0.5
"""Between two flushes: a power cut then costs no row older than this and two flushes, so none older
than a second where the disk takes less than a quarter of one for a flush."""

STAGE = 0.5
"""Share of the time after which a leader is taken for lost, after which a rank that follows is."""


@dataclass(frozen=True)
class Folder:
    """Where one rank stores one window.

    Attributes:
        run_id: name of the result directory.
        path: the result directory.
        own: this rank's folder in it.
        started_utc: when the name was given, ISO 8601.
    """

    run_id: str
    path: Path
    own: Path
    started_utc: str


def name_folder(world: World, output_dir: str, scenario: str, name: str) -> Folder:
    """Return the folders of a new result directory whose name rank 0 gives; all ranks call it.

    Args:
        world: all ranks.
        output_dir: where result directories go.
        scenario: part of the name.
        name: replaces the scenario in the name where given.
    """
    started = datetime.now(timezone.utc)
    label = "".join(c if c.isalnum() or c in "-_." else "-" for c in name or scenario)
    run_id = f"{started:%Y%m%dT%H%M%SZ}-{label}-{secrets.token_hex(4)}"
    run_id, utc = world.gather_json([run_id, started.isoformat(timespec="seconds")])[0]
    path = Path(output_dir).expanduser().absolute() / run_id
    return Folder(run_id, path, rank_folder(path, world.rank), utc)


def window_folder(parent: Folder, number: int, rank: int) -> Folder:
    """Return the folders of one window of several."""
    path = parent.path / "windows" / f"{number:03d}"
    utc = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return Folder(f"{parent.run_id}-w{number:03d}", path, rank_folder(path, rank), utc)


def open_folder(world: World, folder: Folder) -> None:
    """Make this rank's folder; all ranks call it.

    Raises:
        UsageError: a rank cannot write there; nothing is left behind.
    """
    with _or_nothing(world, folder, "output") as problem:
        try:
            folder.own.mkdir(parents=True)
            files.write_bytes(folder.own / "probe", b"x" * 4096)
            (folder.own / "probe").unlink()
        except OSError as error:
            problem.append(
                UsageError(
                    f"{where(world.rank, world.host)} cannot write to {folder.path.parent}: "
                    f"{error.strerror or error}; give another --output-dir"
                )
            )


@contextmanager
def _or_nothing(world: World, folder: Folder, place: str) -> Iterator[list[UsageError]]:
    """Check a step on all ranks; if one has a problem, remove this rank's folder and raise it.

    Yields:
        A list that takes this rank's problem.
    """
    problems: list[UsageError] = []
    yield problems
    try:
        world.check(place, problems[0] if problems else None)
    except UsageError:
        discard(folder)
        raise


def discard(folder: Folder) -> None:
    """Remove this rank's folder, and the directories above it that are empty then."""
    shutil.rmtree(folder.own, ignore_errors=True)
    above = [folder.own.parent, folder.path]
    if folder.path.parent.name == "windows":
        above += [folder.path.parent, folder.path.parent.parent]
    for path in above:
        with contextlib.suppress(OSError):
            path.rmdir()


def make_log(world: World, folder: Folder, rows: int, columns: Sequence[str]) -> SampleLog:
    """Allocate this rank's log; a disk without room stops all ranks and leaves nothing behind."""
    log = SampleLog.in_memory(0, columns)
    with _or_nothing(world, folder, "samples") as problem:
        try:
            log = SampleLog.create(folder.own / "samples.npy", rows, columns)
        except UsageError as error:
            problem.append(UsageError(f"{where(world.rank, world.host)}: {error}"))
    return log


def make_tokens(world: World, folder: Folder, log: SampleLog, most: int | None) -> None:
    """Allocate the stamps of this rank's tokens, where there are any; as ``make_log``."""
    with _or_nothing(world, folder, "tokens") as problem:
        try:
            if most is not None:
                log.record_tokens(folder.own / "tokens.npy", most)
        except UsageError as error:
            problem.append(UsageError(f"{where(world.rank, world.host)}: {error}"))


def write_before(world: World, folder: Folder, before: dict[str, Any]) -> None:
    """Write rank.json; a disk without room stops all ranks, leaving nothing."""
    with _or_nothing(world, folder, "rank.json") as problem:
        try:
            files.write_json(folder.own / "rank.json", before)
        except OSError as error:
            problem.append(
                UsageError(
                    f"{where(world.rank, world.host)} cannot write to {folder.own}: "
                    f"{error.strerror}; free space there or give another --output-dir"
                )
            )


@contextmanager
def watched(world: World, limit_s: float) -> Iterator[Callable[[], None]]:
    """Outside a window, let a rank on which nothing ends for ``limit_s`` be taken for lost.

    Args:
        world: all ranks; each watches its own part.
        limit_s: the limit, s.

    Yields:
        What to call whenever a piece of the work has ended.
    """
    ended, before = [0], world.side.progress

    def tell() -> None:
        ended[0] += 1

    world.side.progress = lambda: (ended[0], limit_s)
    try:
        yield tell
    finally:
        world.side.progress = before


class Recorder:
    """Keeps a window's log safe while the loop runs, and saves it if the run ends early.

    Attributes:
        folder: where.
        log: the samples; rows behind the loop are flushed every ``FLUSH_S``.
        after: what is known so far of after.json.
        flying: whether the window is on.
        stall_s: how long the count may stand still in the window.
        saved: whether the whole window is on the disk; an early end then changes nothing of it.
        show: called with the ended rows once a second, for progress.
        stage: what a rank that follows is at, in the window; None on others.
    """

    def __init__(self, world: World, folder: Folder, log: SampleLog) -> None:
        self.world, self.folder, self.log = world, folder, log
        self.after: dict[str, Any] = {
            "rank": world.rank,
            "used": log.capacity,
            "started_ns": None,
            "end": None,
            "disk_error": "",
        }
        self.flying = self.saved = self._over = False
        self.stall_s = float("inf")
        self.show: Callable[[int], None] = lambda _rows: None
        self.before_judging: Callable[[], None] = lambda: None  # at an early end
        self.stage: Any = None
        self.disk_error = ""
        self._flushed = 0
        self._wanted = threading.Event()
        self._saving = threading.RLock()
        self._closing = False
        # fdatasync can take seconds on a busy disk, and the side thread must not miss a heartbeat.
        self._flusher = threading.Thread(target=self._flush, name="distbench-flush", daemon=True)

    def watch(self, stall_s: float) -> None:
        """Let the side thread report progress, flush and, at an early end, save."""
        side = self.world.side
        self.stall_s = stall_s
        side.progress = self._progress
        side.on_tick = self._tick
        self._tell = side.on_end
        side.on_end = self.save_end
        self._flusher.start()

    def release(self) -> None:
        """Stop flushing; the side thread goes on without this window."""
        side = self.world.side
        side.progress = lambda: IDLE
        side.on_tick = lambda: None
        side.on_end = self._tell
        self._closing = True
        self._wanted.set()
        self._flusher.join(timeout=5)

    def _progress(self) -> tuple[int, float]:
        if self.stage is not None:
            # Sooner than the leader, which waits for it: the one that stands still is to be named.
            return self.stage.steps, STAGE * self.stall_s if self.stage.computing else float("inf")
        busy = self.flying and not self.log.idle[0]
        return self.log.ended[0], self.stall_s if busy else float("inf")

    def _tick(self) -> None:
        if self.flying:
            self._wanted.set()
            self.show(self.log.ended[0])

    def _flush(self) -> None:
        while not self._closing:
            self._wanted.wait(FLUSH_S)
            self._wanted.clear()
            ended = self.log.ended[0]
            try:
                self.log.flush(self._flushed, ended)
            except OSError as error:
                self.disk_error = f"samples.npy was not flushed: {error.strerror}"
                return
            self._flushed = ended

    def told(self) -> dict[str, Any]:
        """Return what after.json says, as of now."""
        return {**self.after, "used": self.log.used[0]}

    def save_after(self) -> None:
        """Write after.json and done.json.

        Raises:
            OSError: the disk is full; the samples are safe in their allocated file.
        """
        with self._saving:
            # A copy: the loop's thread may add to it while the side thread writes.
            files.write_json(self.folder.own / "after.json", self.told())
            write_done(self.folder.own)
            self.saved = self.after["end"] is None

    def save_end(self, end: End) -> None:
        """Save what there is, and report INCOMPLETE; called by the side thread, or on the way out.

        Every survivor saves its own folder; the lowest one also judges what it can see.
        """
        # Held for good: from here on the process only ends, and nothing may save over this.
        self._saving.acquire()
        if self._over or (self.saved and end.rank == self.world.rank):
            self._tell(end)
            return
        self._over = True
        try:
            if not self.saved:
                self.after["end"] = asdict(end)
                self.log.flush(0, self.log.ended[0])
                self.log.freeze()
                self.save_after()
            # A rank that was terminated or failed still lives to save; one that was lost does not.
            gone = end.rank if end.code == "lost" else -1
            others = [r for r in range(self.world.world_size) if r != gone]
            self.before_judging()
            if self.world.rank == min(others, default=0):
                self._await_others()
                path = self.folder.path
                report = write_report(path)
                if path.parent.name == "windows":
                    path = path.parent.parent
                    report = write_report(path)
                sys.stdout.write(f"{report}results  {path}\n")
        except Exception as error:  # whatever it is, the process ends and says so
            with contextlib.suppress(OSError, ValueError):
                sys.stderr.write(
                    f"distbench: {where(self.world.rank, self.world.host)} could not write to "
                    f"{self.folder.own}: {error}; its samples are in samples.npy\n"
                )
        self._tell(end)

    def _await_others(self) -> None:
        # Also for a rank that was lost: one that only stands still saves what it has, and ends.
        deadline = time.monotonic() + OTHERS_S
        others = [
            path
            for path in self.folder.own.parent.iterdir()
            if path.name.isdigit() and int(path.name) != self.world.rank
        ]
        driver = self.folder.path / "driver"
        others += [driver] * driver.exists()
        while time.monotonic() < deadline:
            if all((path / "done.json").exists() for path in others):
                return
            time.sleep(0.05)


def write_report(path: Path) -> str:
    """Judge a result directory from its rank folders and write result.json, report.txt, manifest.

    A result that all ranks made together, and that cannot be made again here, is left as it is.

    Args:
        path: the result directory, of one window or of several.

    Returns:
        The text report.

    Raises:
        UsageError: no rank folder is readable.
        OSError: the disk is full.
    """
    run = load_run(path)
    if isinstance(run, Run) and run.judged is not None:
        return run.report()
    return write_result(path, run.result())


def write_result(path: Path, result: dict[str, Any]) -> str:
    """Write result.json, report.txt and the manifest; returns the text report.

    Raises:
        OSError: the disk is full.
    """
    from distbench.report.text import to_text  # noqa: PLC0415

    files.write_json(path / "result.json", result)
    text = to_text(result)
    files.write_bytes(path / "report.txt", text.encode())
    write_manifest(path)
    return text


def progress_line(total: int, quiet: bool) -> Any:
    """Return a function that shows ended rows on stderr: tqdm on a terminal, else a line each 10 s.

    Args:
        total: rows of this rank.
        quiet: show nothing.
    """
    if quiet:
        return lambda _rows: None
    if sys.stderr.isatty():
        from tqdm import tqdm  # noqa: PLC0415

        bar = tqdm(total=total, unit="sample", leave=False, mininterval=0.9)
        return lambda rows: bar.update(rows - bar.n)
    last = [time.monotonic()]

    def line(rows: int) -> None:
        if time.monotonic() - last[0] >= 10:
            last[0] = time.monotonic()
            sys.stderr.write(f"distbench: rank 0 completed {rows:,} of {total:,} samples\n")

    return line
