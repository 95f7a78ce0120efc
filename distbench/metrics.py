"""Run -> figures: every number of a report, each with its unit, count and definition.

Unknown is None with a reason, never 0. Latencies use one clock alone; what compares two ranks'
clocks carries their bound. docs/method.md tells the formulas at length.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from distbench.bounds import bounds_of
from distbench.early_stopping import least_queries, over_allowed
from distbench.files import finite
from distbench.intervals import Steady, percentile_intervals, steady_rate
from distbench.pool import Pool, within
from distbench.quantiles import RULE
from distbench.run import RankRecord, Run
from distbench.scenarios import Scenario, scenario, series_of
from distbench.scores import ACCURACY, BITS, fraction
from distbench.stats import Interval
from distbench.times import LATE_NS, Makespan, RankTimes, since_start_ns

NS = 1e9
QUANTILES = {
    "p50": 0.5,
    "p90": 0.9,
    "p95": 0.95,
    "p97": 0.97,
    "p99": 0.99,
    "p99.9": 0.999,
}
ONE_WINDOW = "one window gives no interval: repeat windows or launches"
NO_INTERVAL = "no interval is computed for it by this version"


def metric(
    value: float | None,
    unit: str,
    n: int,
    definition: str,
    *,
    reason: str = "",
    ci_reason: str = NO_INTERVAL,
) -> dict[str, Any]:
    """Return one metric as it stands in result.json; ``reason`` says why a field is None."""
    return {
        "value": finite(value),
        "unit": unit,
        "ci_low": None,
        "ci_high": None,
        "ci_method": "",
        "n": n,
        "n_eff": None,
        "definition": definition,
        "reason": reason or ci_reason,
    }


def metrics(pool: Pool, times: list[RankTimes], span: Makespan) -> dict[str, dict[str, Any]]:
    """Return all metrics of a window by name; which ones there are is its scenario's."""
    run, kind = pool.run, scenario(pool.run.scenario)
    done = sum(t.ok for t in times)
    lost = span.reason or ("no sample completed" if done == 0 else "")
    seconds = None if span.value_ns is None else span.value_ns / NS
    out: dict[str, dict[str, Any]] = {}
    out["throughput"] = metric(
        done / seconds if seconds and not lost else None,
        "samples/s",
        done,
        "completed samples of all ranks / makespan on rank 0's clock",
        reason=lost,
        ci_reason=ONE_WINDOW,
    )
    if kind.open_loop:
        out |= _arrivals(run, times, lost)
    else:
        out["throughput.steady"] = _steady(steady_rate(pool, times, span.start_ns))
    out |= _tokens(pool, times, seconds, lost)
    official = "official" in run.first.before
    for name, definition in series_of(kind, run.driver is not None, official).items():
        out |= _latencies(pool, times, name, definition)
    if kind.stream:
        out |= _estimate(pool, times, kind)
    out["accuracy"] = accuracy(run)
    out["bits_per_byte"] = metric(unit="bits/byte", **fraction(run, "text", BITS))
    out["memory.peak"] = _memory(run)
    return out


def _tokens(
    pool: Pool, times: list[RankTimes], seconds: float | None, lost: str
) -> dict[str, dict[str, Any]]:
    """Return the rate of tokens, and that of the queries which keep the user's bounds."""
    out, counted = {}, [t.tokens for t in times if t.tokens is not None]
    known = seconds is not None and not lost
    if counted:
        out["throughput.tokens"] = metric(
            sum(counted) / seconds if known and seconds else None,
            "tokens/s",
            sum(counted),
            "output tokens of completed samples of all ranks / makespan on rank 0's clock",
            reason=lost,
            ci_reason=ONE_WINDOW,
        )
    bounds = bounds_of(pool.run.first.before)
    if bounds:
        good = sum(pool.gather(partial(within, bounds=bounds)))
        absent = [b.series for b in bounds if not sum(t.series[b.series][0] for t in times)]
        lost = lost or (f"no query has a {absent[0]}" if absent else "")
        known = known and not lost
        shown = ", ".join(f"{each.series} {each.limit_ns / NS:.6g} s" for each in bounds)
        out["goodput"] = metric(
            good / seconds if known and seconds else None,
            "samples/s",
            good,
            f"completed queries that keep every bound themselves ({shown}) / makespan",
            reason=lost,
            ci_reason=ONE_WINDOW,
        )
    return out


def _arrivals(run: Run, times: list[RankTimes], lost: str) -> dict[str, dict[str, Any]]:
    """Return Server's rates by schedule and by completion, as LoadGen has them.

    Both leave out the first query, which is due at the start.
    """
    queries = sum(t.ok + t.failed + t.pending for t in times)
    if any((record.after or {}).get("halted") for record in run.present):
        lost = lost or "the window was given up"
    last = max(times, key=since_start_ns, default=None)
    lost = lost or "nothing of its ranks is here" * (last is None)
    done_ns = None
    if last is not None and last.last_done_ns is not None and last.scheduled_ns is not None:
        done_ns = last.last_done_ns - last.scheduled_ns
    rates = {
        "throughput.scheduled": (
            None if last is None else since_start_ns(last),
            "(queries - 1) / schedule of the last one",
        ),
        "throughput.completed": (
            done_ns,
            "(queries - 1) / completion of the query that was scheduled last, on "
            f"{'its rank' if run.driver is None else 'the driver'}'s clock",
        ),
    }
    unknown = lost or "there was one query alone, or the last one did not complete"
    return {
        name: metric(
            (queries - 1) / (took_ns / NS) if took_ns and not lost and queries > 1 else None,
            "samples/s",
            queries,
            definition,
            reason="" if took_ns and not lost and queries > 1 else unknown,
            ci_reason=ONE_WINDOW,
        )
        for name, (took_ns, definition) in rates.items()
    }


def _estimate(pool: Pool, times: list[RankTimes], kind: Scenario) -> dict[str, dict[str, Any]]:
    """Return early stopping's estimate of a stream's percentile: MLPerf's headline.

    LoadGen knows one stream. Over several replicas their latencies are pooled, and the definition
    says that this is no figure of MLPerf's.
    """
    n = sum(t.series["latency"][0] for t in times)
    allowed = over_allowed(n, kind.percentile)
    name, definition = f"{kind.headline}.early_stopping", "early stopping's estimate by LoadGen"
    if len(times) > 1:
        definition += f"; pooled over {len(times)} replicas, which MLPerf does not do"
    if not allowed:
        least = least_queries(kind.percentile, 1)
        reason = f"fewer than the {least} queries that early stopping needs"
        return {name: metric(None, "s", n, definition, reason=reason)}
    (value_ns,) = pool.order("latency", [n - allowed])
    return {name: metric(value_ns / NS, "s", n, definition)}


def _steady(found: Steady) -> dict[str, Any]:
    definition = (
        "completed samples of all ranks / time, from when the last rank is warm to when the first "
        "has finished"
    )
    made = metric(found.rate_qps, "samples/s", found.samples, definition, reason=found.reason)
    if found.interval is not None:
        made["definition"] += f" ({found.cut_s:.3f} s after the start, for {found.length_s:.3f} s)"
        made |= {
            "ci_low": found.interval.low,
            "ci_high": found.interval.high,
            "n_eff": found.interval.n_eff,
            "reason": found.interval.reason,
        }
    if found.interval is not None and found.bootstrap is not None:
        low, high = found.bootstrap
        made["ci_method"] = (
            f"{found.interval.method}; by block bootstrap of the same slots {low:.6g} to {high:.6g}"
        )
    return made


DRAINED = (
    "all samples are scheduled at one instant, so these are places in one drained queue, not draws "
    "from a steady one: repeat windows or launches"
)


def in_seconds(interval: Interval) -> dict[str, Any]:
    """Return the fields of a metric that an interval of ns fills."""
    return {
        "ci_low": None if interval.low is None else interval.low / NS,
        "ci_high": None if interval.high is None else interval.high / NS,
        "ci_method": interval.method if interval.low is not None else "",
        "n_eff": interval.n_eff,
        "reason": interval.reason,
    }


def _latencies(
    pool: Pool, times: list[RankTimes], name: str, definition: str
) -> dict[str, dict[str, Any]]:
    """Return the percentiles, maximum and mean of one series; nothing where there is none."""
    sums = [t.series[name] for t in times]
    n = sum(each[0] for each in sums)
    if n == 0:
        wrong = sum(t.contradicting for t in times) if name == "service" else 0
        reason = f"the engine's stamps contradict in all {wrong} groups that have them"
        labels = (*QUANTILES, "max", "mean") if wrong else ()
        return {f"{name}.{x}": metric(None, "s", 0, definition, reason=reason) for x in labels}
    most, total = max(each[1] for each in sums), sum(each[2] for each in sums)
    found = percentile_intervals(pool, name, [each[0] for each in sums], most, QUANTILES)
    out = {}
    for label, (value, interval) in found.items():
        out[f"{name}.{label}"] = metric(value / NS, "s", n, f"{definition}; {RULE}")
        if name == "latency" and scenario(pool.run.scenario).drained:
            out[f"{name}.{label}"]["reason"] = DRAINED
        else:
            out[f"{name}.{label}"] |= in_seconds(interval)
    out[f"{name}.max"] = metric(most / NS, "s", n, f"{definition}; largest")
    out[f"{name}.mean"] = metric(total / n / NS, "s", n, f"{definition}; arithmetic mean")
    return out


def accuracy(run: Run) -> dict[str, Any]:
    """Return the accuracy metric: the ranks' scores, summed, then divided."""
    return metric(unit="1", **fraction(run, "score", ACCURACY))


LATER_WINDOW = (
    "the peak since the process began holds what gathering and judging earlier windows took: see "
    "the first window"
)


def memory_peak(record: RankRecord) -> int | None:
    """Return a rank's peak of memory in bytes; None where it is unknown or not the model's own."""
    if (record.before.get("window") or {}).get("number", 0) > 0:
        return None
    peak = (record.after or {}).get("memory_peak_bytes")
    return None if peak is None else int(peak)


def _memory(run: Run) -> dict[str, Any]:
    later = (run.first.before.get("window") or {}).get("number", 0) > 0
    known = [peak for r in run.left if (peak := memory_peak(r)) is not None]
    on_gpu = any(r.before["device"]["type"] == "cuda" for r in run.left)
    what = "device memory allocated by torch" if on_gpu else "resident memory of the process"
    if not known:
        reason = LATER_WINDOW if later else "not recorded"
        return metric(None, "B", 0, f"largest over ranks: {what}", reason=reason)
    return metric(max(known), "B", len(known), f"largest over ranks: {what}")


def per_rank(run: Run, times: list[RankTimes], span: Makespan) -> list[dict[str, Any]]:
    """Return the row of each rank there is: share, rate, finish, idle tail, device."""
    total = sum(t.ok for t in times)
    last_ns = max((t.finished_ref_ns for t in times if t.finished_ref_ns is not None), default=0)
    rows = []
    for record, t in zip(run.present, times, strict=True):
        own = None
        if t.finished_ns is not None and t.scheduled_ns is not None:
            own = (t.finished_ns - t.scheduled_ns) / NS
        idle = None
        if t.finished_ref_ns is not None and span.value_ns is not None:
            idle = (last_ns - t.finished_ref_ns) / NS
        device_ns = t.series["device"][2]
        rows.append(
            {
                "rank": t.rank,
                "host": record.host,
                "device": record.before["device"]["name"] or record.before["device"]["type"],
                "replica": record.before["replica"],
                "samples": t.ok,
                "failed": t.failed,
                "pending": t.pending,
                "finish_s": own,
                "idle_s": idle,
                "metrics": {
                    "throughput": t.ok / own if own else None,
                    "share": t.ok / total if total else None,
                    "device_busy": device_ns / NS / own if own and device_ns else None,
                    "memory.peak": memory_peak(record),
                    "memory.total": memory_total(record),
                    **{name: value_ns / NS for name, value_ns in t.own.items()},
                },
            }
        )
    return rows


def memory_total(record: RankRecord) -> int | None:
    """Return the memory of the rank's device in bytes, None where it is unknown."""
    if record.before["device"]["type"] == "cuda":
        total = record.before.get("gpu_before", {}).get("memory_total_bytes")
    else:
        total = record.before["environment"].get("memory_total_bytes")
    return None if total is None else int(total)


def clock_section(run: Run, times: list[RankTimes], span: Makespan) -> dict[str, Any]:
    """Return the ``clock`` section: each rank's clock against rank 0's at the agreed instant."""
    rows = []
    for record, t in zip(run.present, times, strict=True):
        model = run.clock(record)
        at = span.start_ns if span.start_ns is not None else t.started_ref_ns
        known = model is not None and at is not None
        rows.append(
            {
                "rank": t.rank,
                "domain": record.before["clock"]["domain"],
                "offset_s": model.offset_ns(at) / NS if known else None,  # type: ignore[union-attr,arg-type]
                "bound_s": None if t.bound_ns is None else t.bound_ns / NS,
                "drift_ppm": None if model is None else model.drift_ppm,
                "exchanges": 0 if model is None else len(model.exchanges),
            }
        )
    return {"ranks": rows, "driver": None}


def start_section(run: Run, times: list[RankTimes]) -> dict[str, Any]:
    """Return the ``start`` section: how far apart the loops began, with its bound.

    skew = latest - earliest start on rank 0's clock. Two stamps of different ranks carry the sum of
    their bounds, so the truth is within the sum of the two largest bounds.
    """
    starts = [t.started_ref_ns for t in times if t.started_ref_ns is not None]
    bounds = sorted((t.bound_ns for t in times if t.bound_ns is not None), reverse=True)
    # A run that ended before the start was agreed has no plan.
    plans = [r.after["plan"] for r in run.present if r.after and "plan" in r.after]
    late = [
        t.rank
        for t in times
        if t.started_ns is not None
        and t.scheduled_ns is not None
        and t.started_ns - t.scheduled_ns > LATE_NS
    ]
    complete = len(starts) == len(run.active)
    return {
        "skew_s": (max(starts) - min(starts)) / NS if complete else None,
        "bound_s": sum(bounds[:2]) / NS if complete else None,
        "late_ranks": late,
        "late_limit_s": LATE_NS / NS,
        "lateness_s": [
            (t.started_ns - t.scheduled_ns) / NS
            if t.started_ns is not None and t.scheduled_ns is not None
            else None
            for t in times
        ],
        "attempts": plans[0]["attempts"] if plans else None,
    }


def harness(run: Run) -> dict[str, Any]:
    """Return what the harness cost, from the raw timings that each rank recorded before its window.

    The cost per batch is the smallest block of a loop over a SUT that does nothing, per batch:
    what disturbs a block only ever makes it longer.
    """
    costs, clocks, switches, delays = [], [], [], []
    for record in run.present or run.left:  # of a window of one rank, nothing of it may be here
        raw = record.before["harness"]
        costs.append(min(raw["loop_ns"]) / raw["batches"])
        clocks.append(min(raw["clock_ns"]) / raw["reads"])
        quiet = (record.after or {}).get("quiet")
        switches.append(None if quiet is None else quiet["involuntary_switches"])
        delays.append(None if quiet is None else quiet["run_delay_ns"])
    return {
        "cost_per_batch_s": max(costs) / 1e9,
        "clock_read_s": max(clocks) / 1e9,
        "involuntary_switches": switches,
        "run_delay_s": [None if d is None or d < 0 else d / 1e9 for d in delays],
    }
