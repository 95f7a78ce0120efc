"""Windows of a peak search -> what each of them showed, and the result above them.

    results/<run>/
      result.json       of the window that confirmed the peak, with the trail in tables.search
      windows/000/ ...  a full result directory for each probe and each confirming window

The decisions are made again from what the windows show, and held against what was taken: see
``search``. The status comes from the confirming window, on which the published figures rest, and
from what the search found; probes only say where to look.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from distbench.findings import Finding, status, worst_first
from distbench.metrics import metric
from distbench.ruling import table
from distbench.scores import of_first
from distbench.search import (
    CONFIRM,
    DOUBLINGS,
    FAIL,
    FIRST_SHARE,
    PASS,
    End,
    Plan,
    Step,
    replay,
)
from distbench.tried import Reading, reading
from distbench.windows import absent_found, lifted, line, number

COLUMNS = (
    ("window", "", "folder under windows/"),
    ("kind", "", "probe, or confirm for a window of the full --duration"),
    ("target_qps", "queries/s", "offered over all replicas"),
    ("duration", "s", "how long queries came"),
    ("bound", "", "of those asked for, the one that decided"),
    ("queries", "queries", "that completed"),
    ("over", "queries", "of these, above the bound's limit"),
    ("value", "s", "the bounded percentile"),
    ("outcome", "", "pass, fail or unclear"),
    ("why", "", "what decided"),
)
CAP = FIRST_SHARE * 2**DOUBLINGS
"""The highest rate that is tried, of the warm-up's."""


@dataclass(frozen=True)
class Trail:
    """What the windows of a search say of it.

    Attributes:
        readings: of the windows that are in their places from the first one on, by folder.
        steps: the windows that follow from each other's outcomes, as many.
        follows: the window that is to come next, or where the search ended.
        wrong: what was taken though something else follows, in words; "" for nothing.
    """

    readings: Mapping[str, Reading]
    steps: Sequence[Step]
    follows: Step | End
    wrong: str


def step_of(result: Mapping[str, Any]) -> Step:
    """Return what a window was in its search, as it was recorded when it began."""
    return Step(**result["window"]["search"]["step"])


def followed(results: Mapping[str, dict[str, Any]]) -> Trail:
    """Make the decisions of a search again from what its windows show.

    Args:
        results: of the windows, in order, by the names of their folders.
    """
    first = next(iter(results.values()))
    told = first["window"]["search"]["plan"]
    plan = Plan(**{**told, "quantiles": tuple(told["quantiles"])})
    readings: dict[str, Reading] = {}
    taken: list[Step] = []
    for place, (name, each) in enumerate(results.items()):
        if number(each) != place or name != f"{place:03d}":
            break
        taken.append(step_of(each))
        readings[name] = reading(each, taken[-1].kind)
    outcomes = [each.outcome for each in readings.values()]
    steps, follows = replay(plan, outcomes)
    wrong = ""
    for name, step, wanted in zip(readings, taken, steps, strict=False):
        if step != wanted and not wrong:
            wrong = f"window {name} is a {_told(step)}, and a {_told(wanted)} follows"
    if not wrong and len(steps) < len(taken):
        wrong = f"the search ends after {len(steps)} of {len(taken)} windows"
    return Trail(readings, steps, follows, wrong)


def _told(step: Step) -> str:
    return f"{step.kind} of {step.duration_ns / 1e9:.4g} s at {step.target_qps:g} queries/s"


def searched(
    results: Mapping[str, dict[str, Any]], problems: Mapping[str, str], run_id: str
) -> dict[str, Any]:
    """Judge a peak search by the results of its windows: everything in the result.json above them.

    Args:
        results: of the windows, in order, by the names of their folders; at least one.
        problems: why other folders beside them cannot be read, likewise.
        run_id: of the command.

    Returns:
        As ``verdict.result``, of the last window that confirmed, with ``peak`` and the trail.
    """
    every = list(results.values())
    trail = followed(results)
    rests = _rests(results)
    base = results[rests] if rests else every[-1]
    numbers = [n for each in every if (n := number(each)) is not None]
    more = len(trail.readings) + isinstance(trail.follows, Step)
    planned = max(more, *(n + 1 for n in numbers)) if numbers else more
    absent = absent_found(results, planned, problems)
    found = absent + _found(results, rests, trail)
    cut = any(each["verdict"]["status"] == "INCOMPLETE" for each in every)
    whole = not absent and not trail.wrong and not cut
    return {
        **base,
        "run_id": run_id,
        "windows": [line(name, each) for name, each in results.items()],
        "verdict": {
            "status": status(worst_first(found)),
            "rules": base["verdict"]["rules"],
            "findings": [asdict(each) for each in worst_first(found)],
        },
        "metrics": _metrics(every[0], base if rests else None, trail, whole),
        "per_rank": _per_rank(every[0], base),
        "tables": {**(base["tables"] if rests else {}), "search": _table(results, trail)},
        "window": {
            **base["window"],
            "number": None,
            "planned": planned,
            "search": {**base["window"]["search"], "step": None, "rests": rests},
        },
    }


def _rests(results: Mapping[str, dict[str, Any]]) -> str | None:
    """Return the window that the figures rest on: the last that confirmed, or that was to.

    One that is INVALID for another reason than the bounds gives way to an earlier one that is not:
    a higher rate that was tried besides must not cost a measurement that is done.
    """
    confirms = [name for name, each in results.items() if step_of(each).kind == CONFIRM]
    kept = [name for name in confirms if reading(results[name], CONFIRM).outcome.word == PASS]
    sound = [name for name in kept if results[name]["verdict"]["status"] != "INVALID"]
    return next(reversed(sound or kept or confirms), None)


def _found(results: Mapping[str, dict[str, Any]], rests: str | None, trail: Trail) -> list[Finding]:
    """Return the findings on the search, and of the windows those that its figures rest on."""
    found = _of_search(rests, trail)
    if rests:
        found += lifted({rests: results[rests]})
    others = {name: each for name, each in results.items() if name != rests}
    found += [each for each in lifted(others) if each.level == "incomplete"]
    first = {name: each for name, each in others.items() if number(each) == 0}
    # The accuracy that is published is the first window's.
    return found + [each for each in lifted(first) if each.code == "accuracy-low"]


def _of_search(rests: str | None, trail: Trail) -> list[Finding]:
    """Return the findings on the search itself."""
    if trail.wrong:
        return [
            Finding(
                "invalid",
                "search-contradicts",
                f"{trail.wrong}: these are not the windows of one search",
                remedy="verify it with the version of distbench that made it, or run it again",
            )
        ]
    end = trail.follows
    if isinstance(end, Step):
        return []
    if not end.found:
        return [
            Finding(
                "invalid",
                "peak-not-found",
                f"no rate keeps the bounds: {end.why}",
                remedy="loosen --latency-bound, or let the model be faster: at such a rate hardly "
                "a query waits for another",
            )
        ]
    found = []
    if not end.confirmed:
        last = trail.readings.get(rests or "")
        missed = last is not None and last.outcome.word == FAIL
        found.append(
            Finding(
                "invalid" if missed else "undecided",
                "peak-unconfirmed",
                f"no confirming window kept the bounds with its whole interval ({end.why})",
                remedy="give a longer --duration, which narrows the interval, and a longer --probe",
            )
        )
    if end.capped:
        found.append(_beyond(trail))
    return found


def _beyond(trail: Trail) -> Finding:
    """Return the finding on a search in which the highest rate that it tries keeps the bounds."""
    confirmed = [step.target_qps for step in trail.steps if step.kind == CONFIRM]
    probed, highest = confirmed[0], max(confirmed)
    if highest > probed:
        return Finding(
            "undecided",
            "probes-misled",
            f"no probe above {probed:g} queries/s passed, yet the windows of the whole --duration "
            f"kept the bounds up to {highest:g}, where the search stops: the peak lies beyond",
            value=highest,
            remedy="give a longer --probe, and stop what disturbs the hosts",
        )
    return Finding(
        "undecided",
        "peak-beyond",
        f"no rate failed, up to {highest:g} queries/s, {CAP:g} times what the warm-up did, where "
        "the search stops: the peak lies beyond",
        value=highest,
        remedy="see whether the model does its work, give a stricter --latency-bound, or a rate",
    )


def _metrics(
    first: Mapping[str, Any], base: Mapping[str, Any] | None, trail: Trail, whole: bool
) -> dict[str, Any]:
    """Return the confirming window's metrics, the peak, and what the first window alone has."""
    end, reason = trail.follows, "the search is not whole"
    definition = (
        "highest rate found of which a window of the whole --duration kept every bound with its "
        "whole 95 % interval"
    )
    confirmed = whole and base is not None and isinstance(end, End) and end.confirmed
    if whole and isinstance(end, End):
        reason = "no confirming window kept the bounds" if end.found else "no rate kept the bounds"
    peak = metric(
        base["window"]["load"]["target_qps"] if base is not None and confirmed else None,
        "queries/s",
        base["window"]["samples"] if base is not None else 0,
        definition,
        reason="" if confirmed else f"{reason}: see the trail",
        ci_reason="it is a rate that was offered; the interval is that of what is bounded",
    )
    known: Mapping[str, Any] = {
        "throughput": metric(
            None, "samples/s", 0, "of the window that confirms the peak", reason=peak["reason"]
        )
    }
    memory = dict(first["metrics"]["memory.peak"])
    memory["definition"] += ", to the end of the first window"
    own = {**of_first(first["metrics"]), "memory.peak": memory}
    return {"peak": peak, **(base["metrics"] if base is not None else known), **own}


def _per_rank(first: Mapping[str, Any], base: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the window that the figures rest on, with the first one's memory."""
    held = {row["rank"]: row["metrics"]["memory.peak"] for row in first["per_rank"]}
    return [
        {**row, "metrics": {**row["metrics"], "memory.peak": held.get(row["rank"])}}
        for row in base["per_rank"]
    ]


def _table(results: Mapping[str, dict[str, Any]], trail: Trail) -> dict[str, Any]:
    rows = []
    for name, each in results.items():
        step = step_of(each)
        shows = trail.readings.get(name) or reading(each, step.kind)
        rows.append(
            [
                name,
                step.kind,
                step.target_qps,
                step.duration_ns / 1e9,
                shows.bound,
                shows.queries,
                shows.over,
                shows.value,
                shows.outcome.word,
                shows.why,
            ]
        )
    return table(COLUMNS, rows)
