"""Scaling: the same work on 1 .. N ranks of one run -> efficiency, and where the rest went.

    results/<run>/
      result.json       tables.scaling, tables.alone, metrics.efficiency
      windows/000/ ...  a full result directory for each window, of some ranks or of all

A round has a window for each rank alone and one for each number of ranks above one; every other
round runs them in reverse, so that a drift of the hosts cancels. All comparisons are made within a
round, and the interval is over rounds. So efficiency is no quotient of two numbers that were taken
at different times on ranks of which one was never measured alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, stdev
from typing import Any

from distbench.cells import Cell, Plan, cells
from distbench.findings import Finding, status, worst_first
from distbench.metrics import metric
from distbench.ruling import table
from distbench.scenarios import scenario
from distbench.scores import of_first
from distbench.student import t_quantile
from distbench.sums import summed, summed_per_rank, worst_start
from distbench.windows import absent_found, lifted, line, number

CONFIDENCE = 0.95
LOSSES = ("imbalance", "finish", "start", "interference")
COLUMNS = (
    ("ranks", "", "how many, from rank 0 on"),
    ("rounds", "", "in which all windows are known"),
    ("throughput", "samples/s", "of all these ranks, mean over rounds"),
    ("alone", "samples/s", "sum of what each of these ranks does alone, mean over rounds"),
    (
        "efficiency",
        "",
        "throughput / alone within a round, mean over rounds; in Server of the shares "
        "of the offered rates",
    ),
    ("ci_low", "", "of efficiency, 95 %, Student's t over rounds"),
    ("ci_high", "", "likewise"),
    ("speedup", "", "throughput / that of rank 0 alone, likewise"),
    ("imbalance", "", "loss because ranks that are slower alone end last"),
    ("finish", "", "loss because ranks ended apart beyond that"),
    ("start", "", "loss because ranks began late, beyond their lateness alone"),
    ("interference", "", "loss because ranks are slower together than alone"),
    *((f"{name}_half", "", f"half of the 95 % interval of {name}, where known") for name in LOSSES),
    ("latency_p99", "s", "largest over rounds"),
)
ALONE = (
    ("rank", "", ""),
    ("host", "", ""),
    ("throughput", "samples/s", "of this rank while the others rest, mean over rounds"),
    ("ci_low", "samples/s", "95 %, Student's t over rounds"),
    ("ci_high", "samples/s", "likewise"),
    ("latency_p99", "s", "largest over rounds"),
)


@dataclass(frozen=True)
class Reading:
    """What one window says.

    Attributes:
        rate: samples/s of all its ranks; None where it, or what was offered, is unknown.
        makespan_s: of it.
        samples: by rank.
        idle_s: by rank, from its last completion to the last one of all, on rank 0's clock.
        late_s: by rank, from the agreed instant to the start of its loop.
        offered: queries / schedule of the last one, queries/s; None where all are there at once.
        p99_s: latency; None without one.
    """

    rate: float | None
    makespan_s: float | None
    samples: Mapping[int, int]
    idle_s: Mapping[int, float | None]
    late_s: Mapping[int, float | None]
    offered: float | None
    p99_s: float | None


def reading(result: Mapping[str, Any]) -> Reading:
    """Read what scaling needs out of a window's result."""
    rows, late = result["per_rank"], result["start"]["lateness_s"]
    rate, offered = result["metrics"]["throughput"]["value"], None
    if scenario(result["scenario"]).open_loop:
        # LoadGen's rate leaves out one query, of which windows of several ranks have fewer.
        scheduled = result["metrics"].get("throughput.scheduled", {}).get("value")
        queries = sum(row["samples"] + row["failed"] + row["pending"] for row in rows)
        offered = scheduled * queries / (queries - 1) if scheduled and queries > 1 else None
        rate = rate if offered else None
    return Reading(
        rate,
        result["window"]["makespan_s"],
        {row["rank"]: row["samples"] for row in rows},
        {row["rank"]: row["idle_s"] for row in rows},
        {row["rank"]: each for row, each in zip(rows, late, strict=True)},
        offered,
        result["metrics"].get("latency.p99", {}).get("value"),
    )


def interval(values: Sequence[float]) -> tuple[float, float | None, float | None]:
    """Return the mean of independent values, with Student's 95 % interval; None for one alone."""
    mean = fmean(values)
    if len(values) < 2:
        return mean, None, None
    half = t_quantile((1 + CONFIDENCE) / 2, len(values) - 1) * stdev(values)
    half /= math.sqrt(len(values))
    return mean, mean - half, mean + half


def efficiency(together: Reading, alone: Mapping[int, Reading]) -> float:
    """Return what is left of what ranks do alone; all rates are known.

    Of queries that come by a schedule, each window counts by the share of its own schedule that it
    keeps up with: how many queries were drawn is luck, and no property of the ranks.
    """
    rates = sum(each.rate or 0.0 for each in alone.values())
    if together.offered is None:
        return (together.rate or 0.0) / rates
    kept = rates / sum(each.offered or 0.0 for each in alone.values())
    return (together.rate or 0.0) / together.offered / kept


Round = tuple[Reading, Mapping[int, Reading]]
"""The window of several ranks, and of each of them alone, by rank."""


def losses(rounds: Sequence[Round]) -> list[dict[str, float]]:
    """Say where each round's efficiency went; the four parts are exactly 1 - efficiency.

    All are shares of what the ranks could have done alone in the window's makespan M, sum of
    rate_r M. Of rank r, which did n_r and ended e_r after the agreed instant, that is lost in time
    M - n_r / rate_r = (M - e_r) + (late_r - late alone) + the rest, weighted by rate_r.

    Args:
        rounds: of one number of ranks; their rates are known.

    Returns:
        By name, of each round in which all times are known.
    """
    ranks = list(rounds[0][1]) if rounds else []
    # What a rank does alone, over all rounds: the largest of single windows would be luck.
    means = {rank: fmean(alone[rank].rate or 0.0 for _, alone in rounds) for rank in ranks}
    made = [_losses(together, alone, means) for together, alone in rounds]
    return [each for each in made if each is not None]


def _losses(
    together: Reading, alone: Mapping[int, Reading], means: Mapping[int, float]
) -> dict[str, float] | None:
    span, parts = together.makespan_s, dict.fromkeys(LOSSES, 0.0)
    if not span:
        return None
    foreseen = {rank: together.samples.get(rank, 0) / rate for rank, rate in means.items()}
    capacity = span * sum(each.rate or 0.0 for each in alone.values())
    for rank, own in alone.items():
        idle, late = together.idle_s.get(rank), together.late_s.get(rank)
        before, did = own.late_s.get(rank), own.samples.get(rank, 0)
        if idle is None or late is None or before is None or not own.rate or not did:
            return None
        # Of what this work would take alone, its part of the lateness there.
        takes, share = together.samples.get(rank, 0) / own.rate, together.samples.get(rank, 0) / did
        waits = max(foreseen.values()) - foreseen[rank]
        weight = own.rate / capacity
        parts["imbalance"] += weight * waits
        parts["finish"] += weight * (idle - waits)
        parts["start"] += weight * (late - share * before)
        parts["interference"] += weight * (span - idle - late - (takes - share * before))
    return parts


def scaled(
    results: Mapping[str, dict[str, Any]], problems: Mapping[str, str], run_id: str
) -> dict[str, Any]:
    """Judge the windows of a scaling run: everything in the result.json above them.

    Args:
        results: of the windows, in order, by the names of their folders; at least one.
        problems: why other folders beside them cannot be read, likewise.
        run_id: of the command.

    Returns:
        As ``verdict.result``, with the tables; samples, makespan and ranks' rows are of the windows
        of the most ranks together, start is the worst of these, clocks are the last one's.
    """
    every = list(results.values())
    told = every[0]["window"]["scaling"]["plan"]
    plan = Plan(tuple(told["sizes"]), told["rounds"], told["kind"])
    planned = cells(plan)
    read = {cell_of(each): reading(each) for each in every}
    drained = scenario(every[0]["scenario"]).drained
    rows = [_row(size, plan, read, drained) for size in plan.sizes]
    found = absent_found(results, len(planned), problems) + _contradictions(results, planned)
    whole = not found and rows[-1][1] == plan.rounds
    found = worst_first(found + lifted(results))
    largest = [each for each in every if len(cell_of(each).ranks) == max(plan.sizes)] or every[-1:]
    base = largest[-1]
    return {
        **base,
        "run_id": run_id,
        "windows": [line(name, each) for name, each in results.items()],
        "verdict": {
            "status": status(found),
            "rules": base["verdict"]["rules"],
            "findings": [asdict(each) for each in found],
        },
        "metrics": _metrics(every[0], plan, read, rows[-1], whole),
        "per_rank": summed_per_rank(largest),
        "start": worst_start(largest),
        "tables": {
            "scaling": table(COLUMNS, rows),
            "alone": table(ALONE, _alone(plan, read, every)),
        },
        "window": {
            **base["window"],
            "number": None,
            "planned": len(planned),
            "scaling": {"plan": told, "cell": None},
            **summed(largest),
        },
    }


def cell_of(result: Mapping[str, Any]) -> Cell:
    """Return a window's place, as it was recorded when it began."""
    told = result["window"]["scaling"]["cell"]
    return Cell(tuple(told["ranks"]), told["round"])


def _contradictions(
    results: Mapping[str, dict[str, Any]], planned: Sequence[Cell]
) -> list[Finding]:
    """Return the finding that a window is not what the plan has in its place."""
    for name, each in results.items():
        place = number(each)
        if place is None or place >= len(planned) or cell_of(each) != planned[place]:
            return [
                Finding(
                    "invalid",
                    "scaling-contradicts",
                    f"window {name} is of ranks {list(cell_of(each).ranks)} in round "
                    f"{cell_of(each).round}, which the plan does not have in its place",
                    remedy="verify it with the version of distbench that made it, or run it again",
                )
            ]
    return []


def _rounds(size: int, plan: Plan, read: Mapping[Cell, Reading]) -> list[Round]:
    """Return each round in which all windows are known."""
    ranks, made = tuple(range(size)), list[Round]()
    for each in range(plan.rounds):
        together = read.get(Cell(ranks, each))
        alone = {rank: found for rank in ranks if (found := read.get(Cell((rank,), each)))}
        rates = [found.rate for found in alone.values() if found.rate]
        if together is not None and together.rate and len(rates) == size:
            made.append((together, alone))
    return made


def _row(size: int, plan: Plan, read: Mapping[Cell, Reading], drained: bool) -> list[Any]:
    """Return one size's row of the table."""
    rounds = _rounds(size, plan, read)
    if not rounds:
        return [size, 0, *[None] * (len(COLUMNS) - 2)]
    sums = [sum(each.rate or 0.0 for each in alone.values()) for _, alone in rounds]
    rates = [together.rate or 0.0 for together, _ in rounds]
    left = interval([efficiency(together, alone) for together, alone in rounds])
    first = [alone[0].rate or 1.0 for _, alone in rounds]
    speedup = fmean(rate / one for rate, one in zip(rates, first, strict=True))
    parts = losses(rounds) if drained and size > 1 else []
    shares: list[float | None] = [None] * (2 * len(LOSSES))
    if parts:
        found = [interval([each[name] for each in parts]) for name in LOSSES]
        shares = [mean for mean, _, _ in found]
        # What is foreseen rests on all rounds together: its spread over rounds is no error of it.
        halves = [None if high is None else high - mean for mean, _, high in found]
        shares += [None, None, *halves[2:]]
    p99 = [together.p99_s for together, _ in rounds if together.p99_s is not None]
    row = [size, len(rounds), fmean(rates), fmean(sums), *left, speedup]
    return [*row, *shares, max(p99, default=None)]


def _alone(
    plan: Plan, read: Mapping[Cell, Reading], every: Sequence[Mapping[str, Any]]
) -> list[list[Any]]:
    """Return each rank's row: what it does while the others rest."""
    hosts = {row["rank"]: row["host"] for each in every for row in each["per_rank"]}
    rows = []
    for rank in range(max(plan.sizes)):
        windows = [read.get(Cell((rank,), each)) for each in range(plan.rounds)]
        rates = [each.rate for each in windows if each is not None and each.rate]
        mean, low, high = interval(rates) if rates else (None, None, None)
        if not scenario(every[0]["scenario"]).drained:
            low = high = None  # how many queries a round drew is luck
        p99 = [e.p99_s for e in windows if e is not None and e.p99_s is not None]
        rows.append([rank, hosts.get(rank, "?"), mean, low, high, max(p99, default=None)])
    return rows


def _metrics(
    first: Mapping[str, Any],
    plan: Plan,
    read: Mapping[Cell, Reading],
    last: Sequence[Any],
    whole: bool,
) -> dict[str, Any]:
    """Return efficiency and throughput of the most ranks, and what the first window alone has."""
    named = {name: value for (name, _, _), value in zip(COLUMNS, last, strict=True)}
    size, rounds = named["ranks"], named["rounds"]
    reason = "" if whole else "windows are missing, or the throughput of some is unknown"
    what, base = "throughput", "sum of what each does"
    if not scenario(first["scenario"]).drained:
        what, base = "completed share of the offered rate", "that of each"
    left = metric(
        named["efficiency"] if not reason else None,
        "1",
        rounds,
        f"{what} of {size} ranks / {base} alone, within a round; {plan.kind} scaling",
        reason=reason,
    )
    rates = [together.rate or 0.0 for together, _ in _rounds(size, plan, read)]
    mean, low, high = interval(rates) if rates else (None, None, None)
    if not scenario(first["scenario"]).drained:
        low = high = None  # how many queries a round drew is luck
    throughput = metric(
        mean if not reason else None,
        "samples/s",
        sum(sum(together.samples.values()) for together, _ in _rounds(size, plan, read)),
        f"of {size} ranks, mean over {rounds} windows",
        reason=reason,
    )
    method = f"Student's t over {rounds} rounds"
    for found, ends in (
        (left, (named["ci_low"], named["ci_high"])),
        (throughput, (low, high)),
    ):
        if not reason and None not in ends:
            found |= {"ci_low": ends[0], "ci_high": ends[1], "ci_method": method}
            found |= {"n_eff": rounds, "reason": ""}
    peak = dict(first["metrics"]["memory.peak"])
    peak["definition"] += ", to the end of the first window"
    own = {**of_first(first["metrics"]), "memory.peak": peak}
    return {"efficiency": left, "throughput": throughput, **own}
