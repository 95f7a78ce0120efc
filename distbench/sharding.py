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
from statistics import fmean, median
from typing import Any

from distbench.findings import Finding, status, worst_first
from distbench.layout import Layout
from distbench.metrics import metric
from distbench.predict import foresee_all
from distbench.ruling import table
from distbench.scaling import interval
from distbench.scenarios import scenario
from distbench.scores import of_first
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
    ("latency_p50", "s", "mean over rounds; of an open loop alone"),
    ("latency_p99", "s", "likewise"),
    (
        "ratio",
        "",
        "throughput, of an open loop latency.p99, of the first layout / of this one within a "
        "round, geometric mean",
    ),
    ("ratio_low", "", "95 %, Student's t over rounds, of logarithms"),
    ("ratio_high", "", "likewise"),
    ("foreseen", "samples/s", "at full load, by shape, layers and links; not of an open loop"),
    ("held_by", "", "what it is foreseen to be held by"),
    ("ttft_p50", "s", "mean over rounds; of an open loop alone"),
    ("tpot_p50", "s", "mean over rounds"),
    ("tpot_p99", "s", "largest over rounds"),
    ("bubble", "", "mean over rounds"),
    ("held", "B", "weights, keys and values of the rank with the most"),
    ("weights_share", "", "of the rank with the most, of the whole model's"),
    ("accuracy", "", ""),
    ("logit_error", "", "against the whole model, largest difference / largest logit"),
    ("same_tokens", "", "of those that the whole model writes, the share that is written as well"),
)

REDUCES = (
    ("layout", "", ""),
    ("layer", "", "of the model, from 0"),
    ("follows", "", "what is reduced: attention's or the feed-forward part's output"),
    ("size", "B", ""),
    ("calls", "", "apart from any window: each is timed alone, and on a GPU stops it"),
    ("time", "s", "median, by the first part's clock; waiting for a slower part is in it"),
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
    absent, found = bool(found), worst_first(found + lifted(results))
    first = list(rounds[plan["layouts"][0]].values()) or every
    expected = {} if _open(first[0]) else _foreseen(plan, first[-1]["window"]["world_size"])
    rows = [_row(name, rounds, plan, expected) for name in plan["layouts"]]
    whole = not absent and all(row[3] == plan["rounds"] for row in rows)
    reduced = [[name, *row] for name, each in plan["reduces"].items() for row in _reduced(each)]
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


def _open(result: Mapping[str, Any]) -> bool:
    """Tell whether queries came by a schedule: then all layouts that keep up serve as many."""
    return scenario(result["scenario"]).open_loop


def _foreseen(plan: Mapping[str, Any], world_size: int) -> dict[str, tuple[float, str]]:
    told = plan["told"]
    layouts = {
        name: (Layout(told[name]["pp"], told[name]["tp"]), told[name]["lanes"])
        for name in plan["layouts"]
    }
    return foresee_all(plan["calibration"], layouts, world_size)


def _reduced(calls: Sequence[Sequence[Any]]) -> list[list[Any]]:
    """Return each layer's row, by size, without the first call of each, which is cold."""
    times: dict[tuple[int, str, int], list[int]] = {}
    for layer, kind, size, took_ns in calls:
        times.setdefault((layer, kind, size), []).append(took_ns)
    return [
        [*key, len(every), median(every[1:] or every) / 1e9] for key, every in sorted(times.items())
    ]


def _value(result: Mapping[str, Any], name: str) -> float | None:
    found: float | None = result["metrics"].get(name, {}).get("value")
    return found


def _row(
    name: str,
    rounds: Mapping[str, Mapping[int, dict[str, Any]]],
    plan: Mapping[str, Any],
    expected: Mapping[str, tuple[float, str]],
) -> list[Any]:
    """Return one layout's row."""
    own, base, leads = rounds[name], rounds[plan["layouts"][0]], name == plan["layouts"][0]
    own = {n: each for n, each in own.items() if each["verdict"]["status"] != "INCOMPLETE"}
    known = {n: rate for n, each in own.items() if (rate := _value(each, "throughput"))}
    mean = interval(list(known.values())) if known else (None, None, None)
    ratio: tuple[float | None, ...] = (None, None, None)
    if not leads:
        ratio = _ratio(base, own)
    sample: dict[str, Any] = next(iter(own.values()), {"scenario": "offline", "metrics": {}})
    told = plan["told"][name]
    parity, stages = told.get("parity") or {}, [row for each in own.values() for row in _held(each)]
    shares = [share for _, share in stages if share is not None]
    opened = _open(sample)
    foreseen, held_by = expected.get(name, (None, None))
    tokens = parity.get("tokens")
    return [
        name,
        told["replicas"],
        told["lanes"],
        len(known),
        *mean,
        _mean(own, "throughput.tokens"),
        _mean(own, "latency.p50") if opened else None,
        _mean(own, "latency.p99") if opened else None,
        *ratio,
        foreseen,
        held_by,
        _mean(own, "ttft.p50"),
        _mean(own, "tpot.p50"),
        max(_values(own, "tpot.p99"), default=None),
        _mean(own, "bubble"),
        max((held for held, _ in stages), default=None),
        max(shares, default=None),
        _value(sample, "accuracy"),
        parity.get("logit_error"),
        parity["tokens_equal"] / tokens if tokens else None,
    ]


def _ratio(
    base: Mapping[int, dict[str, Any]], own: Mapping[int, dict[str, Any]]
) -> tuple[float | None, ...]:
    """Return the ratio of the headlines within rounds, with its interval.

    Of logarithms, so that the ratio the other way round has the inverse of all three.
    """
    logs = []
    for n, each in base.items():
        headline = "latency.p99" if _open(each) else "throughput"
        one, other = _value(each, headline), _value(own.get(n, {"metrics": {}}), headline)
        if one and other:
            logs.append(math.log(one / other))
    if not logs:
        return None, None, None
    return tuple(None if each is None else math.exp(each) for each in interval(logs))


def _held(result: Mapping[str, Any]) -> list[tuple[int, float | None]]:
    """Return what each rank holds of the model: bytes, and its share of the weights."""
    found = result["tables"].get("stages")
    if found is None:
        return []
    names = [each["name"] for each in found["columns"]]
    rows = [dict(zip(names, row, strict=True)) for row in found["rows"]]
    return [(row["weights"] + row["cache"], row["weights_share"]) for row in rows]


def _values(own: Mapping[int, dict[str, Any]], name: str) -> list[float]:
    return [value for each in own.values() if (value := _value(each, name)) is not None]


def _mean(own: Mapping[int, dict[str, Any]], name: str) -> float | None:
    values = _values(own, name)
    return fmean(values) if values else None


def _metrics(
    first: Sequence[dict[str, Any]], rows: Sequence[Sequence[Any]], whole: bool
) -> dict[str, Any]:
    """Return the first layout's figures over all its windows, and its headline over the others'."""
    named = [dict(zip((n for n, _, _ in COLUMNS), row, strict=True)) for row in rows]
    own, reason = named[0], "" if whole else "windows are missing, or what is known of some is not"
    samples, rounds = sum(each["window"]["samples"] for each in first), own["rounds"]
    over = f"of {own['layout']}, mean over {rounds} windows"
    ends = (own["ci_low"], own["ci_high"])
    out = {
        "throughput": _over_rounds(
            own["throughput"], ends, "samples/s", samples, rounds, over, reason
        )
    }
    headline = "throughput"
    if _open(first[0]):
        headline = "latency.p99"
        values = [value for each in first if (value := _value(each, headline)) is not None]
        mean, low, high = interval(values) if values else (None, None, None)
        out[headline] = _over_rounds(mean, (low, high), "s", samples, rounds, over, reason)
    for other in named[1:]:
        told = f"{headline} of {own['layout']} / of {other['layout']}, within a round"
        ends, count = (other["ratio_low"], other["ratio_high"]), other["rounds"]
        # By the unit others know which way is better: of "1" more is, without one less.
        unit = "1" if headline == "throughput" else ""
        out[f"ratio.{other['layout']}"] = _over_rounds(
            other["ratio"], ends, unit, count, count, told, reason
        )
    out |= _work(first, over, reason)
    peaks = [each["metrics"]["memory.peak"] for each in first]
    return {
        **out,
        **of_first(first[0]["metrics"]),
        "memory.peak": max(peaks, key=lambda peak: peak["value"] or 0),
    }


def _work(first: Sequence[dict[str, Any]], over: str, reason: str) -> dict[str, Any]:
    """Return bubble and imbalance of the first layout over its windows."""
    out, last = {}, first[-1]["metrics"]
    for name in ("bubble", "imbalance"):
        if name in last:
            values = [value for each in first if (value := _value(each, name)) is not None]
            mean, low, high = interval(values) if values else (None, None, None)
            told = f"{last[name]['definition']}; {over}"
            steps = sum(each["metrics"].get(name, last[name])["n"] for each in first)
            out[name] = _over_rounds(mean, (low, high), "", steps, len(values), told, reason)
    return out | ({"bubble.ideal": last["bubble.ideal"]} if "bubble.ideal" in last else {})


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
