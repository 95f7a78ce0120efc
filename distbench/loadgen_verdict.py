"""LoadGen's word on a run: its figures in place of ours, its gates, and what is found in its logs.

Under LoadGen ``throughput*``, ``latency.*``, ``ttft.*`` and ``tpot.*`` are read from
mlperf_log_detail.txt. What the driver's own log gives for the same samples, from the instant at
which LoadGen handed them over, stands beside them under ``dispatch.``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from distbench.errors import DRIVER
from distbench.findings import Finding
from distbench.forbidden import forbidden_found
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
QUERIES = ("result_{}_percentile_per_query_latency_ns", "result_{}_query_latency_ns")
"""Of MultiStream, which judges queries; its keys of samples stand in the log beside them."""
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
    keys = {} if official["mode"] == "accuracy" else told["keys"]
    out = {_renamed(name): value for name, value in ours.items()}
    n = int(ours["throughput"]["n"])
    if run.scenario != "offline":  # which is one query
        n = int(keys.get("result_query_count", n))
    why = MODE if official["mode"] == "accuracy" else told["problem"] or "LoadGen's log has it not"
    named = {"throughput": "", **RATES[run.scenario]}
    if run.scenario == "multistream":
        named["throughput"] = "(from the queries and their time)"
        why = why if official["mode"] == "accuracy" else "LoadGen states no rate of MultiStream"
    for name, key in named.items():
        if name == "throughput" or key in keys:
            unit = UNITS.get(name, "samples/s")
            out[name] = taken(keys, key, unit, n, why, 1.0)
    judged = official["tokens"] and run.scenario == "server"
    known = [x for x, (key, _) in SERIES.items() if judged or key.format("50.00") in keys]
    for name in dict.fromkeys(["latency", *known]):
        queries = run.scenario == "multistream" and name == "latency"
        out |= series(keys, name, n, why, QUERIES if queries else None)
    if run.scenario in ESTIMATES:
        out |= _estimate(keys, run.scenario, n, why, official["tokens"])
    if official["mode"] == "accuracy":
        out["accuracy"] = _accuracy(told)
    return out


def _renamed(name: str) -> str:
    head = name.split(".", maxsplit=1)[0]
    return f"dispatch.{name}" if head in RENAMED else name


def taken(
    keys: Mapping[str, Any], key: str, unit: str, n: int, why: str, by: float
) -> dict[str, Any]:
    """Return a metric that is one key of LoadGen's log."""
    value = keys.get(key)
    known = isinstance(value, int | float) and not isinstance(value, bool)
    definition = f"LoadGen's {key}"
    if not known:
        return metric(None, unit, 0, definition, reason=why)
    return metric(float(value or 0) / by, unit, n, definition, ci_reason=NO_SAMPLES)


def series(
    keys: Mapping[str, Any], name: str, n: int, why: str, named: tuple[str, str] | None = None
) -> dict[str, dict[str, Any]]:
    """Return percentiles, largest and mean of one series, from LoadGen's keys of it."""
    percentile, other = named or SERIES[name]
    names = {label: percentile.format(PERCENTILES[label]) for label in QUANTILES}
    names |= {"max": other.format("max"), "mean": other.format("mean")}
    return {f"{name}.{x}": taken(keys, key, "s", n, why, NS) for x, key in names.items()}


def _estimate(
    keys: Mapping[str, Any], scenario: str, n: int, why: str, tokens: bool
) -> dict[str, dict[str, Any]]:
    """Return early stopping's estimate, where LoadGen has one.

    With token latencies LoadGen estimates TPOT, then TTFT, under one key: what stays is TTFT's
    (loadgen/results.cc). It writes 0 where there are too few queries.
    """
    name, key = ESTIMATES[scenario]
    found = taken(keys, key, "s", n, why, NS)
    if found["value"] == 0:
        found = taken({}, key, "s", n, "LoadGen wrote 0: fewer queries than it needs", NS)
    if not tokens:
        return {name: found}
    reason = "with token latencies LoadGen's estimate is of the time to the first token"
    other = name.replace("latency", "ttft")
    return {name: taken({}, key, "s", n, reason, NS), other: found}


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
    keys, done = told["keys"], run.driver.rows if run.driver is not None else None
    failed = 0
    if run.driver is not None and done is not None:
        failed = int((run.driver.column("completed") < 0).sum())
    errors = len(told["errors"]) + failed
    clean = Gate("errors", errors, 0, "entries", errors == 0)
    if official["mode"] == "accuracy":
        value, least = figures["accuracy"]["value"], float(official["target_accuracy"] or 0.0)
        met = value is not None and value >= least
        return [Gate("accuracy", value or 0.0, least, "1", met), clean]
    if official.get("audit") == "TEST06":  # of 100 queries, which LoadGen can only call INVALID
        return [clean]
    gates = _least_gates(run, official, keys)
    for series, limit_ns in _limits(run, keys).items():
        value = figures[f"{series}.p99"]["value"]
        met = value is not None and value <= limit_ns / NS
        gates.append(Gate(f"{series}.p99", value or 0.0, limit_ns / NS, "s", met))
    planned = _as_planned(run.scenario, official, keys)
    gates.append(Gate("settings", float(planned), 1.0, "1", planned))
    valid = keys.get("result_validity") == "VALID"
    return [*gates, clean, Gate("loadgen-valid", float(valid), 1.0, "1", valid)]


def _as_planned(scenario: str, official: Mapping[str, Any], keys: Mapping[str, Any]) -> bool:
    """Tell whether LoadGen ran with the seeds, the duration and the counts that were planned."""
    seeds = official["seeds"]
    wanted = {
        "effective_qsl_rng_seed": seeds["qsl"],
        "effective_sample_index_rng_seed": seeds["sample_index"],
        "effective_schedule_rng_seed": seeds["schedule"],
        "effective_min_duration_ms": official["min_duration_ns"] // 1_000_000,
        "effective_performance_sample_count": official["resident"],
    }
    if scenario in ("server", "offline"):
        wanted["effective_target_qps"] = float(official["target_qps"])
    return all(_same(keys.get(key), value) for key, value in wanted.items())


def _same(found: Any, wanted: float) -> bool:
    if isinstance(wanted, int):
        return bool(found == wanted)
    return isinstance(found, int | float) and math.isclose(found, wanted, rel_tol=1e-5)


def _least_gates(run: Run, official: Mapping[str, Any], keys: Mapping[str, Any]) -> list[Gate]:
    """Return the gates that ask for a least time or number, whose own word LoadGen logs."""
    gates = []
    last_ns = keys.get("result_max_latency_ns") if run.scenario == "offline" else None
    if last_ns is not None:
        met = bool(keys.get("result_min_duration_met"))
        gates.append(Gate("min_duration", last_ns / NS, official["min_duration_ns"] / NS, "s", met))
    elif "result_min_duration_met" in keys:  # of the last issue, which it does not print
        met = bool(keys["result_min_duration_met"])
        gates.append(Gate("min_duration_met", float(met), 1.0, "1", met))
    queries = int(keys.get("result_query_count", 0))
    if "result_min_queries_met" in keys:
        met, least = bool(keys["result_min_queries_met"]), keys.get("effective_min_query_count", 0)
        gates.append(Gate("min_queries", queries, float(least), "queries", met))
    if "early_stopping_met" in keys and run.scenario != "offline":
        met, more = bool(keys["early_stopping_met"]), _more(keys)
        limit = queries + (more or 0)
        gates.append(Gate("early_stopping", queries, limit, "queries", met, more))
    return gates


def _more(keys: Mapping[str, Any]) -> int | None:
    """Return how many more queries early stopping asks for; None if it does not say."""
    texts = [str(value) for key, value in keys.items() if key.startswith("early_stopping")]
    found = [int(n) for text in texts for n in re.findall(r"at least (\d+) more", text)]
    return max(found, default=None)


def _limits(run: Run, keys: Mapping[str, Any]) -> dict[str, float]:
    """Return LoadGen's limits on p99 as it has them, ns, by series; only Server has any."""
    if run.scenario != "server":
        return {}
    if keys.get("requested_use_token_latencies"):
        named = {"ttft": "requested_server_ttft_latency", "tpot": "requested_server_tpot_latency"}
        return {series: float(keys[key]) for series, key in named.items() if key in keys}
    limit = keys.get("effective_target_latency_ns")
    return {} if limit is None else {"latency": float(limit)}


def rules_section(run: Run, gates: Sequence[Gate], facts: Sequence[Finding]) -> dict[str, Any]:
    """Return ``verdict.rules`` of result.json: VALID only by LoadGen's word and a clean log.

    A run of an audit is never VALID: in its place AUDIT stands.

    Args:
        run: that LoadGen drove.
        gates: from ``gates_of``.
        facts: findings of fact, no invalid one of which leaves VALID. What is found of the
            measurement is ``verdict.status``'s: LoadGen's latencies are what a user would see.
    """
    official = official_of(run)
    assert official is not None
    broken = any(each.level in ("invalid", "incomplete") for each in facts)
    audit = official.get("audit", "")
    word = "SHORTENED" if official["shortened"] else "AUDIT" if audit else "VALID"
    passed = bool(gates) and all(gate.passed for gate in gates) and not broken
    return {
        "set": official["round"],
        "source": "loadgen",
        "wording": WORDING,
        **({"audit": audit} if audit else {}),
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
    here = (run.driver.after or {}).get("audit_config")
    if here:
        found.append(
            Finding(
                "doubtful",
                "audit-config",
                f"an audit.config lies in {here}, where LoadGen looks "
                "for one: it was passed over here, and would override the settings of other runs",
                DRIVER,
                host,
                remedy="remove it from the driver's working directory",
            )
        )
    found += forbidden_found(run, official)
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
