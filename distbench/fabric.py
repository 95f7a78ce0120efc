"""What a ``collectives`` run says: bandwidth, latency, correctness, the slowest rank of each cell.

A lone operation begins at an instant that all ranks agreed on and ends when the last rank has
completed, on rank 0's clock. It counts if every rank began on time: others are counted apart and
left out. A block begins when the last rank has completed the one before; the first ones only warm.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench import metrics as m
from distbench.operations import BACK_TO_BACK, CONFIDENCE, OPERATIONS, Cell, fit, size_text
from distbench.quantiles import percentiles_ns
from distbench.run import RankRecord, Run
from distbench.samples import PENDING
from distbench.steady import memory
from distbench.student import t_quantile

FIT_FROM = 64 << 10
"""Bytes: below, protocols and buffers change from size to size, and a time is no line in it."""
LEAST_FIT = 3
LEAST_P99 = 100
LEAST_NAMED = 10
"""Repetitions below which no rank is called the slowest."""
ERROR, LEAST_COST = 0.01, 0.01
"""A rank is called the slowest of a cell if it surely (chance of 1 % in all, over its ranks) delays
the end by 1 % of the latency; ranks that pass for alike differ by less."""
ONE_RUN = "the interval is that over blocks of one run; launches differ by more"

COLUMNS = (
    ("operation", "", ""),
    ("bytes", "B", "as nccl-tests counts: see docs/method.md"),
    ("times", "", "operations of a block, back to back between two stamps"),
    ("blocks", "", "that follow each other, without those before them that only warm"),
    ("time", "s", "of an operation back to back: (last completion of a block on any rank - that of "
     "the block before) / times, mean over blocks"),
    ("time_low", "s", "95 %, Student's t over blocks, grown by their memory"),
    ("time_high", "s", "likewise"),
    ("time_median", "s", "the same, median over blocks, which a stalled block does not move"),
    ("algbw", "B/s", "bytes / time"),
    ("busbw", "B/s", "algbw * factor of the operation: what a rank's link must carry"),
    ("device_time", "s", "of an operation, by the event pair around a block, slowest rank, mean"),
    ("repetitions", "", "of single operations from agreed instants that began on time everywhere"),
    ("late", "", "left out: a rank began late"),
    ("overran", "", "of repetitions, ended after the next one's instant; they count"),
    ("p50", "s", "last completion on any rank - agreed instant, by LoadGen's percentile"),
    ("p90", "s", "likewise"),
    ("p99", "s", f"likewise, from {LEAST_P99} repetitions on"),
    ("max", "s", "likewise"),
    ("slowest", "", "rank that surely delays the end; none where that may be luck"),
    ("slowest_last", "", "share of repetitions in which it was the last"),
    ("slowest_cost", "s", "its completion - the last one of the others, mean over repetitions"),
    ("late_rank", "", "rank that began lone operations late most often"),
    ("checked", "", "elements compared with what they must be, all ranks"),
    ("wrong", "", "of these, that are something else"),
    ("clock_bound", "s", "by which a rank's completion may be wrong against rank 0's clock"),
    ("reason", "", "why a figure is unknown"),
)  # fmt: skip
FIT_COLUMNS = (
    ("operation", "", ""),
    ("sizes", "", f"from {size_text(FIT_FROM)} on"),
    ("alpha", "s", "of time_median = alpha + beta * bytes, by least squares"),
    ("alpha_low", "s", "95 %, Student's t, if the errors of the line are noise"),
    ("alpha_high", "s", "likewise"),
    ("bandwidth", "B/s", "1 / beta"),
    ("r2", "", "1 - squared errors / squared distances from the mean"),
    ("worst", "", "largest error of the line at any of these sizes, relative to the time"),
    ("reason", "", "why it is unknown"),
)


@dataclass(frozen=True)
class Seen:
    """A cell's repetitions, as all ranks recorded them.

    Attributes:
        late_ns: shape (ranks, repetitions): issued - scheduled, each on its rank's own clock; 0 of
            blocks, which follow each other.
        end_ns: likewise: completed - agreed instant, both on rank 0's clock.
        device_ns: likewise; 0 where it is not known.
        valid: shape (repetitions,): whether all ranks began on time, of a block whether it counts.
        bound_ns: how wrong ``end_ns`` may be.
    """

    late_ns: NDArray[np.int64]
    end_ns: NDArray[np.int64]
    device_ns: NDArray[np.int64]
    valid: NDArray[np.bool_]
    bound_ns: int

    @property
    def latency_ns(self) -> NDArray[np.int64]:
        """From the agreed instant to the last completion, of those that count."""
        return np.asarray(self.end_ns.max(axis=0)[self.valid])


def cells_in(run: Run) -> list[Cell]:
    """Return the cells of a run, in the order of their numbers."""
    return [Cell(**each) for each in run.first.before["cells"]]


def seen(run: Run, number: int, cell: Cell) -> Seen | str:
    """Return what all ranks recorded of a cell, or why that is not known.

    Args:
        run: of this command.
        number: of the cell.
        cell: itself.
    """
    if run.missing or any(record.rows is None for record in run.present):
        return "a rank's samples are missing"
    columns = run.first.before["columns"]
    at = {name: columns.index(name) for name in columns}
    own = [record.rows[record.rows[:, at["index"]] == number] for record in run.present]  # type: ignore[index]
    if any(len(rows) != cell.repetitions for rows in own):
        return "a rank's log lacks repetitions"
    if any((rows[:, at["completed"]] == PENDING).any() for rows in own):
        return "not every rank came to its end"
    models = [run.clock(record) for record in run.present]
    if any(model is None for model in models):
        return "a rank's clock was not measured"
    instant = own[0][:, at["scheduled"]]
    ends, bound_ns = [], 0
    for model, rows in zip(models, own, strict=True):
        assert model is not None
        ends.append(model.many_to_reference_ns(rows[:, at["completed"]]) - instant)
        bound_ns = max(bound_ns, model.bound_ns(int(instant[0])), model.bound_ns(int(instant[-1])))
    late = np.stack([rows[:, at["issued"]] - rows[:, at["scheduled"]] for rows in own])
    if cell.mode == BACK_TO_BACK:
        late[:] = 0
    device = np.stack([rows[:, at["device"]] for rows in own])
    valid = (late <= cell.late_ns).all(axis=0) & (np.arange(cell.repetitions) >= cell.warm)
    return Seen(late, np.stack(ends), device, np.asarray(valid), bound_ns)


def back_to_back(found: Seen, cell: Cell, ranks: int) -> dict[str, Any]:
    """Return the figures of the blocks of a cell."""
    # All from one instant: what the last rank took for each is the step from end to end.
    steps = np.diff(found.end_ns.max(axis=0), prepend=0)[found.valid]
    each = steps / cell.times / m.NS
    n = len(each)
    out: dict[str, Any] = {"blocks": n}
    mean = float(each.mean())
    bandwidth = cell.bytes / mean
    out |= {"time": mean, "time_median": float(np.median(each)), "algbw": bandwidth}
    out["busbw"] = bandwidth * OPERATIONS[cell.operation].factor(ranks)
    if n > 1:
        error = float(each.std(ddof=1)) * math.sqrt((memory(each, 1) if each.std() else 1) / n)
        half = t_quantile((1 + CONFIDENCE) / 2, n - 1) * error
        out |= {"time_low": max(mean - half, 0.0), "time_high": mean + half}
    device = found.device_ns[:, found.valid]
    if (device > 0).all():
        out["device_time"] = float(device.max(axis=0).mean()) / cell.times / m.NS
    return out


def spaced(found: Seen, cell: Cell) -> dict[str, Any]:
    """Return the figures of the spaced repetitions of a cell; empty where none counts."""
    latency = found.latency_ns
    n = len(latency)
    out: dict[str, Any] = {"repetitions": n, "late": cell.repetitions - n}
    out["overran"] = int((latency > cell.window_ns).sum())
    if n == 0:
        return out
    wanted = {"p50": 0.5, "p90": 0.9} | ({"p99": 0.99} if n >= LEAST_P99 else {})
    values = percentiles_ns(latency, list(wanted.values()))
    out |= {name: value / m.NS for name, value in zip(wanted, values, strict=True)}
    return out | {"max": int(latency.max()) / m.NS}


@dataclass(frozen=True)
class Slowest:
    """The rank that delays the end of an operation.

    Attributes:
        place: of the rank among the active ones.
        last: share of the repetitions in which it was the last.
        cost_ns: its completion - the last one of the others, mean.
    """

    place: int
    last: float
    cost_ns: float


def slowest(found: Seen) -> Slowest | None:
    """Return the rank that surely delays the end of a cell's operations; None where none does.

    Without it an operation would end earlier by its completion - the last one of the others, which
    is below zero where another one is last. The mean of that, less what chance, memory and the
    clocks may make of it, must be above ``LEAST_COST`` of the median latency.
    """
    end = found.end_ns[:, found.valid].astype(np.float64)
    ranks, n = end.shape
    if n < LEAST_NAMED or ranks < 2:
        return None
    order = np.sort(end, axis=0)
    last = end == order[-1]
    cost = end - np.where(last, order[-2], order[-1])
    place = int(cost.mean(axis=1).argmax())
    own = cost[place]
    error = float(own.std(ddof=1)) * math.sqrt(memory(own, 1) / n) if own.std() > 0 else 0.0
    sure = float(own.mean()) - t_quantile(1 - ERROR / ranks / 2, n - 1) * error
    if sure - 2 * found.bound_ns <= LEAST_COST * float(np.median(order[-1])):
        return None
    return Slowest(place, float(last[place].mean()), float(own.mean()))


@dataclass(frozen=True)
class Row:
    """One operation at one size, judged.

    Attributes:
        figures: by column of ``tables.collectives``.
        cells: its cells, by mode.
        late: how often each active rank began late.
        checks: elements compared, and wrong ones among them, by rank.
    """

    figures: dict[str, Any]
    cells: dict[str, Cell]
    late: list[int]
    checks: dict[int, tuple[int, int]]


def rows_of(run: Run) -> list[Row]:
    """Judge every operation at every size."""
    every = list(enumerate(cells_in(run)))
    pairs: dict[tuple[str, int], list[tuple[int, Cell]]] = {}
    for number, cell in every:
        pairs.setdefault((cell.operation, cell.bytes), []).append((number, cell))
    return [_row(run, pair) for pair in pairs.values()]


def _row(run: Run, pair: list[tuple[int, Cell]]) -> Row:
    first, ranks = pair[0][1], len(run.active)
    figures: dict[str, Any] = dict.fromkeys(name for name, _, _ in COLUMNS)
    figures |= {"operation": first.operation, "bytes": first.bytes, "reason": ""}
    late = np.zeros(len(run.active), np.int64)
    bound_ns = None
    for number, cell in pair:
        if cell.mode == BACK_TO_BACK:
            figures["times"] = cell.times
        found = seen(run, number, cell)
        if isinstance(found, str):
            figures["reason"] = found
            continue
        late += (found.late_ns > cell.late_ns).sum(axis=1)
        bound_ns = max(bound_ns or 0, found.bound_ns)
        if cell.mode == BACK_TO_BACK:
            figures |= back_to_back(found, cell, ranks)
        else:
            figures |= spaced(found, cell)
            figures |= _named(run, found)
        if not found.valid.any():
            figures["reason"] = "no repetition began on time on every rank"
    if late.max(initial=0) > 0:
        figures["late_rank"] = run.active[int(late.argmax())]
    figures["clock_bound"] = None if bound_ns is None else bound_ns / m.NS
    checks = {
        record.rank: _checks(record, [number for number, _ in pair]) for record in run.present
    }
    figures["checked"] = sum(checked for checked, _ in checks.values())
    wrong = sum(each for _, each in checks.values())
    unchecked = [str(rank) for rank, (checked, _) in checks.items() if not checked]
    if unchecked:
        figures["reason"] = figures["reason"] or f"rank {', '.join(unchecked)} compared nothing"
    figures["wrong"] = None if unchecked and not wrong else wrong
    return Row(figures, {cell.mode: cell for _, cell in pair}, late.tolist(), checks)


def _named(run: Run, found: Seen) -> dict[str, Any]:
    named = slowest(found)
    if named is None:
        return {}
    return {
        "slowest": run.active[named.place],
        "slowest_last": named.last,
        "slowest_cost": named.cost_ns / m.NS,
    }


def _checks(record: RankRecord, numbers: Sequence[int]) -> tuple[int, int]:
    """Return how many elements one rank compared in these cells, and how many were wrong."""
    made = [each for each in (record.after or {}).get("checks", []) if each[0] in numbers]
    return sum(each[1] for each in made), sum(each[2] for each in made)


def fits(rows: Sequence[Row]) -> list[list[Any]]:
    """Return the fit of every operation: a row of ``tables.fit`` each."""
    found = []
    for name in dict.fromkeys(row.figures["operation"] for row in rows):
        own = [row.figures for row in rows if row.figures["operation"] == name]
        known = [each for each in own if each["bytes"] >= FIT_FROM and each["time"]]
        if len(known) < LEAST_FIT:
            reason = (
                f"{len(known)} sizes of {size_text(FIT_FROM)} or more are known, and a line that "
                f"can be wrong takes {LEAST_FIT}"
            )
            found.append([name, len(known), *[None] * 6, reason])
            continue
        times = [each["time_median"] for each in known]
        line = fit([each["bytes"] for each in known], times)
        alpha, half, beta = line.alpha_s, line.alpha_half_s, line.beta_s
        reason = "" if beta > 0 else "larger sizes took no longer, so there is no bandwidth"
        bandwidth = 1 / beta if beta > 0 else None
        ends = [alpha, alpha - half, alpha + half]
        found.append([name, len(known), *ends, bandwidth, line.r2, line.worst, reason])
    return found


def figures_of(rows: Sequence[Row], lines: Sequence[Sequence[Any]]) -> dict[str, dict[str, Any]]:
    """Return the metrics: of each operation its busbw, latency and fit."""
    out: dict[str, dict[str, Any]] = {}
    for name, sizes, alpha, low, high, bandwidth, r2, _, reason in lines:
        own = [row.figures for row in rows if row.figures["operation"] == name]
        large, small = own[-1], own[0]
        n = large["blocks"] or 0
        shown = f"back to back at {size_text(large['bytes'])}, factor as nccl-tests"
        unknown = large["reason"] or "one block gives no interval"
        made = m.metric(large["busbw"], "B/s", n, f"busbw {shown}", reason=unknown)
        if large["time_low"]:
            scale = large["busbw"] * large["time"]
            made |= {
                "ci_low": scale / large["time_high"],
                "ci_high": scale / large["time_low"],
                "ci_method": f"Student's t over {n} blocks; {ONE_RUN}",
                "n_eff": n,
                "reason": "",
            }
        out[f"{name}.busbw"] = made
        text = f"median from agreed starts at {size_text(small['bytes'])}"
        n, unknown = small["repetitions"] or 0, small["reason"]
        out[f"{name}.latency"] = m.metric(small["p50"], "s", n, text, reason=unknown)
        text = f"of time = alpha + beta * bytes over {sizes} sizes from {size_text(FIT_FROM)} on"
        out[f"{name}.alpha"] = m.metric(alpha, "s", sizes, f"alpha {text}", reason=reason)
        if alpha is not None:
            known = f"Student's t over {sizes} sizes"
            out[f"{name}.alpha"] |= {
                "ci_low": low,
                "ci_high": high,
                "ci_method": known,
                "reason": "",
            }
        out[f"{name}.bandwidth"] = m.metric(
            bandwidth, "B/s", sizes, f"1 / beta {text}", reason=reason
        )
        out[f"{name}.r2"] = m.metric(r2, "1", sizes, f"R^2 {text}", reason=reason)
    return out
