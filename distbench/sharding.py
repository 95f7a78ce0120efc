"""One model under several layouts, in turn -> what each of them does, and which one wins.

    results/<run>/
      result.json       tables.layouts, tables.stages of the first layout, metrics
      windows/000/ ...  a full result directory for each window

A round has a window of each layout, and every other round runs them in reverse, so that a drift of
the hosts cancels. Layouts are compared within a round, and intervals are over rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import fmean
from typing import Any

from distbench.findings import Finding, status, worst_first
from distbench.metrics import metric
from distbench.ruling import table
from distbench.scaling import interval
from distbench.sums import summed, summed_per_rank, worst_start
from distbench.windows import absent_found, lifted, line, number

COLUMNS = (
    ("layout", "", "pp: stages of a pipeline, tp: tensor-parallel parts, or whole replicas"),
    ("replicas", "", "copies of the model"),
    ("micro_batches", "", "of a replica, in flight"),
    ("rounds", "", "in which its throughput is known"),
    ("throughput", "samples/s", "of all replicas, mean over rounds"),
    ("ci_low", "samples/s", "95 %, Student's t over rounds"),
    ("ci_high", "samples/s", "likewise"),
    ("tokens", "tokens/s", "likewise, mean"),
    (
        "ratio",
        "",
        "throughput of the first layout / of this one within a round, geometric mean",
    ),
    ("ratio_low", "", "95 %, Student's t over rounds, of logarithms"),
    ("ratio_high", "", "likewise"),
    ("foreseen", "samples/s", "by the model's shape, what its layers take and the links give"),
    ("held_by", "", "what it is foreseen to be held by"),
    ("ttft_p50", "s", "mean over rounds; of an open loop alone"),
    ("tpot_p50", "s", "mean over rounds"),
    ("tpot_p99", "s", "largest over rounds"),
    ("bubble", "", "mean over rounds"),
    ("memory_peak", "B", "of the rank with the most; of a host's process all layouts together"),
    ("weights_share", "", "of the rank with the most, of the whole model's"),
    ("accuracy", "", ""),
    ("logit_error", "", "against the whole model, largest difference / largest logit"),
)

REDUCES = (
    ("layout", "", ""),
    ("layer", "", "of the model, from 0"),
    ("follows", "", "what is reduced: attention's or the feed-forward part's output"),
    ("calls", "", "apart from any window: each is timed alone, and on a GPU stops it"),
    ("size", "B", "mean"),
    ("time", "s", "mean, by the first part's clock; waiting for a slower part is in it"),
)


def sharded(
    results: Mapping[str, dict[str, Any]], problems: Mapping[str, str], run_id: str
) -> dict[str, Any]:
    """Judge the windows of all layouts: everything in the result.json above them.

    Args:
        results: of the windows, in order, by the names of their folders; at least one.
        problems: why other folders beside them cannot be read, likewise.
        run_id: of the command.

    Returns:
        As ``verdict.result``, with the table; samples, makespan, ranks' and stages' rows are of the
        first layout's windows, start is the worst of these, clocks are the last one's.
    """
    every = list(results.values())
    plan = every[0]["window"]["sharding"]["plan"]
    planned = cells_of(plan)
    rounds: dict[str, dict[int, dict[str, Any]]] = {name: {} for name in plan["layouts"]}
    for each in every:
        told = each["window"]["sharding"]["cell"]
        rounds[told["layout"]][told["round"]] = each
    found = absent_found(results, len(planned), problems) + _contradictions(results, planned)
    whole = not found
    found = worst_first(found + lifted(results))
    first = list(rounds[plan["layouts"][0]].values()) or every
    rows = [_row(name, rounds, plan) for name in plan["layouts"]]
    reduced = [[name, *row] for name, each in plan["reduces"].items() for row in each]
    return {
        **first[-1],
        "run_id": run_id,
        "windows": [line(name, each) for name, each in results.items()],
        "verdict": {
            "status": status(found),
            "rules": first[-1]["verdict"]["rules"],
            "findings": [asdict(each) for each in found],
        },
        "metrics": _metrics(first, rows, whole),
        "per_rank": summed_per_rank(first),
        "start": worst_start(first),
        "tables": {
            "layouts": table(COLUMNS, rows),
            **first[-1]["tables"],
            "all_reduces": table(REDUCES, reduced),
        },
        "window": {
            **first[-1]["window"],
            "number": None,
            "planned": len(planned),
            "sharding": {"plan": plan, "cell": None},
            **summed(first),
        },
    }


def cells_of(plan: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return (layout, round) of each window, in the order in which they are taken."""
    names = list(plan["layouts"])
    return [
        (name, each)
        for each in range(plan["rounds"])
        for name in (names if each % 2 == 0 else names[::-1])
    ]


def _contradictions(
    results: Mapping[str, dict[str, Any]], planned: Sequence[tuple[str, int]]
) -> list[Finding]:
    """Return the finding that a window is not what the plan has in its place."""
    for name, each in results.items():
        place, told = number(each), each["window"]["sharding"]["cell"]
        if place is None or place >= len(planned) or tuple(told.values()) != planned[place]:
            return [
                Finding(
                    "invalid",
                    "sharding-contradicts",
                    f"window {name} is of {told['layout']} in round {told['round']}, which the "
                    "plan does not have in its place",
                    remedy="verify it with the version of distbench that made it, or run it again",
                )
            ]
    return []


def _value(result: Mapping[str, Any], name: str) -> float | None:
    found: float | None = result["metrics"].get(name, {}).get("value")
    return found


def _row(
    name: str, rounds: Mapping[str, Mapping[int, dict[str, Any]]], plan: Mapping[str, Any]
) -> list[Any]:
    """Return one layout's row."""
    own, base = rounds[name], rounds[plan["layouts"][0]]
    foreseen = plan["foreseen"].get(name) or {}
    known = {n: rate for n, each in own.items() if (rate := _value(each, "throughput"))}
    ratios = [
        rate / known[n]
        for n, each in base.items()
        if n in known and (rate := _value(each, "throughput"))
    ]
    mean = interval(list(known.values())) if known else (None, None, None)
    ratio: tuple[float | None, ...] = (None, None, None)
    if ratios and own is not base:
        # Of logarithms, so that the ratio the other way round has the inverse of all three.
        logs = interval([math.log(each) for each in ratios])
        ratio = tuple(None if each is None else math.exp(each) for each in logs)
    stages = [_stages(each) for each in own.values()]
    most = {key: [row[key] for rows in stages for row in rows] for key in ("memory", "share")}
    sample: dict[str, Any] = next(iter(own.values()), {"metrics": {}})
    told = plan["told"].get(name) or {}
    return [
        name,
        told.get("replicas"),
        told.get("lanes"),
        len(known),
        *mean,
        _mean(own, "throughput.tokens"),
        *ratio,
        foreseen.get("rate"),
        foreseen.get("held_by"),
        _mean(own, "ttft.p50"),
        _mean(own, "tpot.p50"),
        max(_values(own, "tpot.p99"), default=None),
        _mean(own, "bubble"),
        max((each for each in most["memory"] if each is not None), default=None),
        max((each for each in most["share"] if each is not None), default=None),
        _value(sample, "accuracy"),
        (told.get("parity") or {}).get("logit_error"),
    ]


def _stages(result: Mapping[str, Any]) -> list[dict[str, Any]]:
    found = result["tables"].get("stages")
    if found is None:
        return []
    names = [each["name"] for each in found["columns"]]
    memory, share = names.index("memory_peak"), names.index("weights_share")
    return [{"memory": row[memory], "share": row[share]} for row in found["rows"]]


def _values(own: Mapping[int, dict[str, Any]], name: str) -> list[float]:
    return [value for each in own.values() if (value := _value(each, name)) is not None]


def _mean(own: Mapping[int, dict[str, Any]], name: str) -> float | None:
    values = _values(own, name)
    return fmean(values) if values else None


def _metrics(
    first: Sequence[dict[str, Any]], rows: Sequence[Sequence[Any]], whole: bool
) -> dict[str, Any]:
    """Return the first layout's figures over all its windows, and its lead over the next one."""
    named = [dict(zip((n for n, _, _ in COLUMNS), row, strict=True)) for row in rows]
    own, reason = named[0], "" if whole else "windows are missing"
    samples = sum(each["window"]["samples"] for each in first)
    out = {
        "throughput": _over_rounds(
            own["throughput"], (own["ci_low"], own["ci_high"]), "samples/s", samples, own["rounds"],
            f"of {own['layout']}, mean over {own['rounds']} windows", reason,
        )
    }  # fmt: skip
    for other in named[1:]:
        out[f"ratio.{other['layout']}"] = _over_rounds(
            other["ratio"], (other["ratio_low"], other["ratio_high"]), "", other["rounds"],
            other["rounds"],
            f"throughput of {own['layout']} / of {other['layout']}, within a round", reason,
        )  # fmt: skip
    last = first[-1]["metrics"]
    kept = ("bubble", "bubble.ideal", "imbalance")
    peak = dict(first[0]["metrics"]["memory.peak"])
    return {
        **out,
        **{name: last[name] for name in kept if name in last},
        "accuracy": first[0]["metrics"]["accuracy"],
        "memory.peak": peak,
    }


def _over_rounds(
    value: float | None,
    ends: tuple[float | None, float | None],
    unit: str,
    n: int,
    rounds: int,
    definition: str,
    reason: str,
) -> dict[str, Any]:
    found = metric(None if reason else value, unit, n, definition, reason=reason)
    if not reason and None not in ends:
        found |= {"ci_low": ends[0], "ci_high": ends[1], "n_eff": rounds, "reason": ""}
        found["ci_method"] = f"Student's t over {rounds} rounds"
    return found
