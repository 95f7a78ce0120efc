"""LoadGen's word on a run: its figures in place of ours, its gates, and what is found in its logs.

Under LoadGen ``throughput*``, ``latency.*``, ``ttft.*`` and ``tpot.*`` are read from
mlperf_log_detail.txt. What the driver's own log gives for the same samples, from the instant at
which LoadGen handed them over, stands beside them under ``dispatch.``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from distbench.errors import DRIVER
from distbench.findings import Finding
from distbench.gates import WORDING, Gate
from distbench.metrics import NS, QUANTILES, metric
from distbench.run import Run

PERCENTILES = {
    "p50": "50.00",
    "p90": "90.00",
    "p95": "95.00",
    "p97": "97.00",
    "p99": "99.00",
    "p99.9": "99.90",
}
RENAMED = ("throughput", "latency", "ttft", "tpot")
"""Figures of ours that stand beside LoadGen's as ``dispatch.``."""
SERIES = {
    "latency": ("result_{}_percentile_latency_ns", "result_{}_latency_ns"),
    "ttft": (
        "result_first_token_{}_percentile_latency_ns",
        "result_first_token_{}_latency_ns",
    ),
    "tpot": (
        "result_time_per_output_token_{}_percentile_ns",
        "result_time_to_output_token_{}",
    ),
}
"""Keys of percentiles, and of the largest and the mean, by our name of the series."""
RATES = {
    "offline": {
        "throughput": "result_samples_per_second",
        "throughput.tokens": "result_tokens_per_second",
    },
    "server": {
        "throughput": "result_completed_samples_per_sec",
        "throughput.scheduled": "result_scheduled_samples_per_sec",
        "throughput.tokens": "result_completed_tokens_per_second",
    },
    "singlestream": {"throughput": "result_qps_with_loadgen_overhead"},
    "multistream": {},
}
UNITS = {"throughput.tokens": "tokens/s"}
ESTIMATES = {
    "singlestream": ("latency.p90.early_stopping", "early_stopping_latency_ss"),
    "multistream": ("latency.p99.early_stopping", "early_stopping_latency_ms"),
}
NO_SAMPLES = "LoadGen's log has figures and no samples: repeat the run for an interval"
MODE = "accuracy mode times nothing"


def official_of(run: Run) -> dict[str, Any] | None:
    """Return what LoadGen was asked; None of a run that it did not drive."""
    found: dict[str, Any] | None = run.first.before.get("official")
    return found


def told_by(run: Run) -> dict[str, Any]:
    """Return what LoadGen's logs say; see ``mlperf_files.told``."""
    after = (run.driver.after or {}) if run.driver is not None else {}
    none = {"keys": {}, "errors": [], "warnings": [], "problem": "LoadGen did not come to its end"}
    found: dict[str, Any] = after.get("loadgen", none)
    return found


def figures_of(run: Run, ours: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Return the metrics of a run that LoadGen drove: its own, and ours under ``dispatch.``."""
    official, told = official_of(run), told_by(run)
    assert official is not None
    keys = told["keys"]
    out = {_renamed(name): value for name, value in ours.items()}
    n = int(ours["throughput"]["n"])
    why = MODE if official["mode"] == "accuracy" else told["problem"] or "LoadGen's log has it not"
    named = {"throughput": "", **RATES[run.scenario]}
    if run.scenario == "multistream":
        named["throughput"] = "(from the queries and their time)"
        why = why if official["mode"] == "accuracy" else "LoadGen states no rate of MultiStream"
    for name, key in named.items():
        if name == "throughput" or key in keys:
            unit = UNITS.get(name, "samples/s")
            out[name] = _taken(keys, key, unit, n, why, 1.0)
    for name in SERIES if official["tokens"] and run.scenario != "offline" else ("latency",):
        out |= _series(keys, name, n, why)
    if run.scenario in ESTIMATES:
        name, key = ESTIMATES[run.scenario]
        out[name] = _taken(keys, key, "s", n, why, NS)
    if official["mode"] == "accuracy":
        out["accuracy"] = _accuracy(told)
    return out


def _renamed(name: str) -> str:
    head = name.split(".", maxsplit=1)[0]
    return f"dispatch.{name}" if head in RENAMED else name


def _taken(
    keys: Mapping[str, Any], key: str, unit: str, n: int, why: str, by: float
) -> dict[str, Any]:
    """Return a metric that is one key of LoadGen's log."""
    value = keys.get(key)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    definition = f"LoadGen's {key}"
    if not known:
        return metric(None, unit, 0, definition, reason=why)
    return metric(float(value or 0) / by, unit, n, definition, ci_reason=NO_SAMPLES)


def _series(keys: Mapping[str, Any], name: str, n: int, why: str) -> dict[str, dict[str, Any]]:
    percentile, other = SERIES[name]
    names = {label: percentile.format(PERCENTILES[label]) for label in QUANTILES}
    if name == "latency" and names["p50"] not in keys:  # of MultiStream they are of queries
        names = {k: v.replace("_latency_ns", "_per_query_latency_ns") for k, v in names.items()}
    names |= {"max": other.format("max"), "mean": other.format("mean")}
    return {f"{name}.{x}": _taken(keys, key, "s", n, why, NS) for x, key in names.items()}


def _accuracy(told: Mapping[str, Any]) -> dict[str, Any]:
    definition = "right / scored over the answers in LoadGen's mlperf_log_accuracy.json"
    right, of = told.get("right"), told.get("of")
    if right is None or not of:
        return metric(None, "1", 0, definition, reason=told["problem"] or "nothing was scored")
    return metric(right / of, "1", int(of), f"{definition} ({right:g}/{of:g})")


def gates_of(run: Run, figures: Mapping[str, Mapping[str, Any]]) -> list[Gate]:
    """Return LoadGen's conditions as it has them, and that its log has no error."""
    official, told = official_of(run), told_by(run)
    assert official is not None
    keys, gates = told["keys"], []
    if official["mode"] == "accuracy":
        value, limit = figures["accuracy"]["value"], _target(official)
        gates.append(
            Gate("accuracy", value or 0.0, limit, "1", value is not None and value >= limit)
        )
    else:
        last = _last_ns(run, keys)
        if last is not None:
            met = bool(keys.get("result_min_duration_met"))
            gates.append(
                Gate("min_duration", last / NS, official["min_duration_ns"] / NS, "s", met)
            )
        for name in ("result_min_queries_met", "result_perf_constraints_met", "early_stopping_met"):
            if name in keys:
                met = bool(keys[name])
                more = re.search(r"at least (\d+) more", str(keys.get("early_stopping_result", "")))
                needed = int(more[1]) if more and name == "early_stopping_met" else None
                short = name.removeprefix("result_").removesuffix("_met")
                gates.append(Gate(short, float(met), 1.0, "1", met, needed))
        valid = keys.get("result_validity") == "VALID"
        gates.append(Gate("loadgen", float(valid), 1.0, "1", valid))
    errors = len(told["errors"])
    gates.append(Gate("errors", errors, 0, "entries", errors == 0))
    return gates


def _target(official: Mapping[str, Any]) -> float:
    return float(official["target_accuracy"] or 0.0)


def _last_ns(run: Run, keys: Mapping[str, Any]) -> float | None:
    """Return what LoadGen holds against the minimum duration, as far as it prints it."""
    if run.scenario == "offline":
        value = keys.get("result_max_latency_ns")
        return None if value is None else float(value)
    return None


def rules_section(run: Run, gates: Sequence[Gate], found: Sequence[Finding]) -> dict[str, Any]:
    """Return ``verdict.rules`` of result.json: VALID only by LoadGen's word and a clean log.

    Args:
        run: that LoadGen drove.
        gates: from ``gates_of``.
        found: all findings; what breaks the rules or the measurement leaves no VALID.
    """
    official = official_of(run)
    assert official is not None
    broken = any(each.level in ("invalid", "incomplete") for each in found)
    word = "SHORTENED" if official["shortened"] else "VALID"
    passed = bool(gates) and all(gate.passed for gate in gates) and not broken
    return {
        "set": official["round"],
        "source": "loadgen",
        "wording": WORDING,
        "shortened": official["shortened"],
        "result": word if passed else "INVALID",
        "gates": [asdict(gate) for gate in gates],
    }


def loadgen_found(run: Run) -> list[Finding]:
    """Return what LoadGen's logs and settings give to find."""
    official, told = official_of(run), told_by(run)
    if official is None or run.driver is None:
        return []
    host, found = run.driver.host, []
    if told["errors"]:
        found.append(
            Finding(
                "invalid",
                "loadgen-errors",
                f"LoadGen logged {len(told['errors'])} errors and still may say VALID; the first: "
                f"{told['errors'][0]}",
                DRIVER,
                host,
                len(told["errors"]),
                0,
                "mend what the first one names; loadgen/mlperf_log_detail.txt has them all",
            )
        )
    if told["problem"] and not (run.driver.after or {}).get("end"):
        found.append(
            Finding(
                "invalid",
                "loadgen-log",
                f"LoadGen's logs do not tell all: {told['problem']}",
                DRIVER,
                host,
                remedy="see the file that the sentence names, and run again",
            )
        )
    if official["edited"]:
        found.append(
            Finding(
                "invalid",
                "conf-edited",
                f"user.conf sets {', '.join(official['edited'])}, which the rules do not leave to "
                "a submitter",
                value=len(official["edited"]),
                limit=0,
                remedy="take these lines out of user.conf",
            )
        )
    return found
