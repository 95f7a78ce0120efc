"""Run: all that one window recorded, in memory and as a result directory.

    results/<UTC time>-<scenario>-<8 hex>/
        result.json report.txt manifest.sha256
        ranks/00000/  rank.json      written before the window
                      samples.npy    the SampleLog itself
                      tokens.npy     a stamp per token, of token engines; a row a sample
                      after.json     written after it
                      done.json      sha256 of the other files of this rank
        ranks/00001/  ...
        driver/       driver.json, samples.npy, after.json, done.json: of central dispatch
        loadgen/      user.conf and LoadGen's own logs, where it drove

Every figure in ``result.json`` is a function of the rank folders alone (``metrics``, ``verdict``),
which is what ``verify`` recomputes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench import files
from distbench.clock import ClockModel, Exchange
from distbench.errors import DRIVER, DistbenchError, UsageError, where
from distbench.findings import Finding
from distbench.mlperf_files import told
from distbench.samples import read_rows, spread_column

SCHEMA_VERSION = 1
JUDGED_BY_ALL = "judged-by-all"
"""Code of the note that a result cannot be recomputed where it is read."""
Rows = NDArray[np.int64]


@dataclass(frozen=True)
class RankRecord:
    """What one rank left.

    Attributes:
        rank: global rank.
        before: rank.json: options, environment, model, warm-up, first clock exchange.
        after: after.json: start plan, stamps, second exchange, counts; None where it is missing.
        rows: shape (used, columns), int64, as in samples.npy: a group's stamps in its first row;
            None where the file is missing or damaged.
        problem: why something is None, "" otherwise.
        token_ns: shape (used, most tokens), int64, ns, as in tokens.npy; None without one.
        elsewhere: whether its samples stay on that rank, which is another: ``rows`` is None, and
            nothing is lost.
        made: series that were made of this log and others together, by name; see ``joined``.
    """

    rank: int
    before: dict[str, Any]
    after: dict[str, Any] | None
    rows: Rows | None
    problem: str = ""
    elsewhere: bool = False
    token_ns: Rows | None = None
    made: Mapping[str, Rows] = field(default_factory=dict)

    @property
    def host(self) -> str:
        """The rank's hostname."""
        return str(self.before["host"])

    def column(self, name: str) -> Rows:
        """Return one column for every sample, stamps spread over their groups; shape (used,).

        Empty where samples were lost.

        Raises:
            DistbenchError: they stay on another rank.
        """
        self._must_be_here()
        if self.rows is None:
            return np.zeros(0, np.int64)
        return spread_column(self.rows, self.before["columns"], name)

    def first_rows(self, name: str) -> Rows:
        """Return one column for every ended group; shape (groups,). See ``column``."""
        self._must_be_here()
        if self.rows is None or name not in self.before["columns"]:
            return np.zeros(0, np.int64)
        columns = self.before["columns"]
        ended = (self.rows[:, columns.index("count")] > 0) & (
            self.rows[:, columns.index("completed")] >= 0
        )
        return np.asarray(self.rows[ended, columns.index(name)])

    def _must_be_here(self) -> None:
        """Refuse to pass off samples that are on another rank as none at all."""
        if self.elsewhere:
            raise DistbenchError(
                f"the samples of {where(self.rank, self.host)} stay on its disk (--samples shard): "
                "reach them through the pool's gather and order, on all ranks alike"
            )


@dataclass(frozen=True)
class Run:
    """All that one window recorded.

    Attributes:
        world_size: ranks that took part.
        records: one per rank in order; None where a rank left nothing.
        folder: where it is stored; None while it is only in memory.
        judged: the result, where all ranks made it of samples that stay on them and it cannot be
            made here.
        driver: the driver's record, under central dispatch: the official log.
    """

    world_size: int
    records: tuple[RankRecord | None, ...]
    folder: Path | None = None
    judged: dict[str, Any] | None = None
    driver: RankRecord | None = None

    @property
    def first(self) -> RankRecord:
        """The record of the lowest rank that left one."""
        return next(r for r in self.records if r is not None)

    @property
    def active(self) -> list[int]:
        """The ranks that had a part in this window: all of them, unless it was of some alone."""
        every = list(range(self.world_size))
        return [int(rank) for rank in self.first.before.get("active_ranks", every)]

    @property
    def left(self) -> list[RankRecord]:
        """The records there are, those of ranks without a part in this window too."""
        return [r for r in self.records if r is not None]

    @property
    def present(self) -> list[RankRecord]:
        """The records there are of the active ranks."""
        active = set(self.active)
        return [r for r in self.left if r.rank in active]

    @property
    def official(self) -> list[RankRecord]:
        """The records whose logs time the samples: the driver's where there is one."""
        return self.present if self.driver is None else [self.driver]

    @property
    def working(self) -> list[int]:
        """The active ranks, and those that follow one of them as parts of its replica."""
        return self.active if self.layout is None else list(range(self.world_size))

    @property
    def layout(self) -> dict[str, Any] | None:
        """How the model was cut over ranks; None where each active rank had a whole one."""
        return self.first.before.get("layout")

    @property
    def workers(self) -> list[RankRecord]:
        """The records there are of the working ranks."""
        working = set(self.working)
        return [r for r in self.left if r.rank in working]

    @property
    def missing(self) -> list[int]:
        """Working ranks that left nothing."""
        return [rank for rank in self.working if self.records[rank] is None]

    @property
    def scenario(self) -> str:
        """Name of the scenario."""
        return str(self.first.before["scenario"])

    def clock(self, record: RankRecord) -> ClockModel | None:
        """Return a rank's clock against rank 0's; None where no exchange with it is left.

        All exchanges come from rank 0's after.json; without that file, from the rank's own
        rank.json, which has those made before the window.
        """
        if record.before["clock"]["leader"] == 0:
            return ClockModel()
        made = self.exchanges(record)
        return ClockModel.fit(made) if made else None

    def exchanges(self, record: RankRecord) -> list[Exchange]:
        """Return every exchange made with the clock that a rank reads; see ``clock``."""
        own = record.before["clock"]
        zero = self.records[0]
        after = zero.after if zero is not None else None
        kept = (after or {}).get("exchanges", {}).get(str(own["leader"]), own["exchanges"])
        return [Exchange(*numbers) for numbers in kept]

    def result(self) -> dict[str, Any]:
        """Judge the run: the content of result.json."""
        from distbench.verdict import result  # noqa: PLC0415  verdict builds on Run

        return result(self) if self.judged is None else self.judged

    def report(self) -> str:
        """Judge the run and return the text report."""
        from distbench.report.text import to_text  # noqa: PLC0415

        return to_text(self.result())


def rank_folder(folder: Path, rank: int) -> Path:
    """Return the folder of one rank."""
    return folder / "ranks" / f"{rank:05d}"


def load_run(folder: Path | str) -> Run:
    """Read a result directory.

    A folder that is damaged or lacks files gives a record that says so; judging the run then says
    INCOMPLETE.

    Args:
        folder: a result directory.

    Raises:
        UsageError: there is no readable rank folder in it at all.
    """
    folder = Path(folder)
    found = {int(path.name): path for path in _rank_folders(folder)}
    records: dict[int, RankRecord] = {}
    problems: list[str] = []
    for rank, path in sorted(found.items()):
        try:
            records[rank] = read_record(path)
        except UsageError as error:
            problems.append(str(error))
            continue
        _check_place(path, rank, records[rank])
    if not records:
        raise UsageError(
            f"{folder} holds no readable rank folder (ranks/00000 and so on"
            f"{'; ' + problems[0] if problems else ''}): give a result directory of distbench"
        )
    sizes = {int(record.before["world_size"]) for record in records.values()}
    runs = {record.before["run_id"] for record in records.values()}
    if len(sizes) > 1 or len(runs) > 1:
        raise UsageError(
            f"{folder} mixes rank folders of different runs: {', '.join(sorted(runs))}"
        )
    size = sizes.pop()
    every = tuple(records.get(rank) for rank in range(size))
    run = Run(size, every, folder, driver=_read_driver(folder, next(iter(records.values()))))
    return replace(run, judged=_judged_by_all(run, folder))


def _judged_by_all(run: Run, folder: Path) -> dict[str, Any] | None:
    """Return the result that all ranks made of samples that stay on them, with a note of that.

    None where nothing is missing, so that it can be made again, and where result.json does not rest
    on every rank or a file is not as the manifest has it.
    """
    if not run.missing or run.first.before.get("samples") != "shard":
        return None
    try:
        result = files.read_json(folder / "result.json")
        hosts = {int(row["rank"]): str(row["host"]) for row in result["per_rank"]}
        told = result["verdict"]["findings"]
        same = result["run_id"] == run.first.before["run_id"]
    except (UsageError, LookupError, TypeError, ValueError):
        return None
    if not same or sorted(hosts) != list(range(run.world_size)) or not files.manifest_holds(folder):
        return None
    absent = [where(rank, hosts[rank]) for rank in run.missing]
    shown = ", ".join(absent[:8]) + (f" and {len(absent) - 8} more" if len(absent) > 8 else "")
    note = Finding(
        "info",
        "judged-by-all",
        f"judged by all ranks together, whose samples stay on their disks: those of {shown} are "
        "not here, so that no figure can be recomputed here",
        remedy="to recompute it, copy the folders of the other ranks beside those that are here",
    )
    return {**result, "verdict": {**result["verdict"], "findings": [*told, asdict(note)]}}


def _check_place(path: Path, rank: int, record: RankRecord) -> None:
    """Refuse a folder that was copied to a wrong name: its samples would count twice."""
    size = int(record.before["world_size"])
    if record.rank != rank or rank >= size:
        raise UsageError(
            f"{path} holds rank {record.rank} of {size}: give it the name {record.rank:05d}, or "
            "remove it"
        )


def _rank_folders(folder: Path) -> list[Path]:
    try:
        return [p for p in (folder / "ranks").iterdir() if p.name.isdecimal() and p.is_dir()]
    except OSError as error:
        raise UsageError(
            f"{folder} is no result directory: {error.strerror or error} (ranks/ inside it)"
        ) from error


def _read_driver(folder: Path, first: RankRecord) -> RankRecord | None:
    """Read the driver's folder; what is damaged or missing gives a record that says so."""
    load = first.before.get("load") or {}
    if load.get("dispatch") != "central":
        return None
    try:
        record = read_record(folder / "driver", "driver.json")
    except UsageError as error:
        return no_driver(first.before, str(error))
    official, after = first.before.get("official"), record.after
    if official is None or after is None or "loadgen" not in after:
        return record
    return replace(record, after={**after, "loadgen": told(folder / "loadgen", official)})


def no_driver(before: Mapping[str, Any], problem: str) -> RankRecord:
    """Return the record of a driver that left nothing.

    Args:
        before: rank.json of a rank.
        problem: what is known of it.
    """
    clock = {"domain": "", "leader": DRIVER, "exchanges": []}
    made = {"scenario": before["scenario"], "host": "?", "columns": [], "clock": clock}
    return RankRecord(DRIVER, {**made, "rank": DRIVER}, None, None, problem)


def read_record(path: Path, name: str = "rank.json") -> RankRecord:
    """Read one rank's folder, or the driver's.

    Args:
        path: the folder.
        name: of the file that was written before the window.

    Raises:
        UsageError: that file is missing or damaged, so nothing else can be understood.
    """
    before = files.read_json(path / name)
    try:
        rank, columns, version = int(before["rank"]), before["columns"], before["schema_version"]
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"{path / name} lacks {error}") from error
    if version != SCHEMA_VERSION:
        raise UsageError(
            f"{path / name} has schema version {version}; this distbench reads "
            f"{SCHEMA_VERSION}: use the version that wrote it"
        )
    after: dict[str, Any] | None = None
    rows = token_ns = None
    problem = ""
    try:
        after = files.read_json(path / "after.json")
    except UsageError as error:
        problem = str(error)
    try:
        rows = read_rows(path / "samples.npy", columns)
        used = int(after["used"]) if after is not None else came(rows, before)
        rows = rows[:used]
        token_ns = _read_tokens(path, before, rows)
    except UsageError as error:
        problem = str(error)
    return RankRecord(rank, before, after, rows, problem, token_ns=token_ns)


def _read_tokens(path: Path, before: dict[str, Any], rows: Rows) -> Rows | None:
    most = before.get("most_tokens")
    if most is None:
        return None
    return read_rows(path / "tokens.npy", [str(n) for n in range(most)])[: len(rows)]


def came(rows: Rows, before: Mapping[str, Any]) -> int:
    """Return how many rows of a rank or a driver that was killed have a sample.

    Under central dispatch those whose query came; of a driver that LoadGen's samples came from,
    those that it issued.
    """
    columns = list(before["columns"])
    if "query" in columns:
        return int((rows[:, columns.index("query")] >= 0).sum())
    if "official" in before:
        return int((rows[:, columns.index("count")] > 0).sum())
    return len(rows)
