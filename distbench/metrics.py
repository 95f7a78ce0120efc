"""Run -> figures: every number of a report, each with its unit, count and definition.

Unknown is None with a reason, never 0. Latencies use one clock alone; what compares two ranks'
clocks carries their bound. docs/method.md tells the formulas at length.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench.files import finite
from distbench.quantiles import RULE, percentiles_ns
from distbench.run import RankRecord, Run
from distbench.samples import FAILED, PENDING

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


@dataclass(frozen=True)
class RankTimes:
    """One rank's window, on its own clock and on rank 0's, ns.

    Attributes:
        rank: global rank.
        scheduled_ns: agreed instant, own clock.
        started_ns: when its loop began, own clock; None when unknown.
        finished_ns: last completion, own clock; None when nothing completed.
        started_ref_ns: ``started_ns`` on rank 0's clock; None without a clock model.
        finished_ref_ns: ``finished_ns`` likewise.
        bound_ns: how wrong the mapping to rank 0's clock can be in the window.
        ok: samples that completed.
        failed: samples that failed.
        pending: samples that never ended.
    """

    rank: int
    scheduled_ns: int | None
    started_ns: int | None
    finished_ns: int | None
    started_ref_ns: int | None
    finished_ref_ns: int | None
    bound_ns: int | None
    ok: int
    failed: int
    pending: int


def rank_times(run: Run, record: RankRecord) -> RankTimes:
    """Reduce one rank's samples to the stamps that are compared between ranks."""
    completed, scheduled = record.column("completed"), record.column("scheduled")
    good = completed[completed >= 0]
    finished = int(good.max()) if len(good) else None
    after = record.after or {}
    instant = after.get("plan", {}).get("local_ns")
    if instant is None:  # a rank that was killed left its log alone
        instant = int(scheduled[0]) if len(scheduled) and scheduled[0] > 0 else None
    started = after.get("started_ns")
    if started is None:
        # A rank that was killed between two stores leaves a completion without its count.
        started = next((int(t) for t in record.first_rows("issued")[:1]), None)
    model = run.clock(record)
    begin = end = bound = None
    if model is not None:
        begin = model.to_reference_ns(started) if started is not None else None
        end = model.to_reference_ns(finished) if finished is not None else None
        known = [t for t in (begin, end) if t is not None]
        bound = max((model.bound_ns(t) for t in known), default=None)
    return RankTimes(
        rank=record.rank,
        scheduled_ns=instant,
        started_ns=started,
        finished_ns=finished,
        started_ref_ns=begin,
        finished_ref_ns=end,
        bound_ns=bound,
        ok=len(good),
        failed=int((completed == FAILED).sum()),
        pending=int((completed == PENDING).sum()),
    )


@dataclass(frozen=True)
class Makespan:
    """From the agreed instant to the last completion of all ranks, on rank 0's clock.

    Attributes:
        value_ns: None where it cannot be known; then ``reason`` says why.
        bound_ns: how wrong it can be.
        start_ns: the agreed instant.
        reason: "" when known.
    """

    value_ns: int | None
    bound_ns: int | None
    start_ns: int | None
    reason: str


def makespan(run: Run, times: list[RankTimes]) -> Makespan:
    """Compute the makespan over all ranks.

    The latest end is at least max(end - bound) and at most max(end + bound); the second is never
    nearer to max(end) than the first, so its distance is the bound.
    """
    absent = run.missing + [r.rank for r in run.present if r.rows is None]
    if absent:
        return Makespan(None, None, None, f"samples of rank {_list(absent)} are missing")
    cut = [r.rank for r in run.present if r.after is None or r.after.get("ended_ns") is None]
    if cut:
        return Makespan(None, None, None, f"the window of rank {_list(cut)} was cut short")
    unclocked = [t.rank for t in times if t.finished_ref_ns is None or t.bound_ns is None]
    if unclocked:
        return Makespan(
            None,
            None,
            None,
            f"rank {_list(unclocked)} completed nothing or its clock was not measured",
        )
    starts = [r.after["plan"]["reference_ns"] for r in run.present if r.after]
    start = starts[0]
    ends = [(t.finished_ref_ns or 0, t.bound_ns or 0) for t in times]
    last = max(end for end, _ in ends)
    if last <= start:
        return Makespan(None, None, None, "the last completion is not after the agreed instant")
    high = max(end + bound for end, bound in ends)
    return Makespan(last - start, high - last, start, "")


def _list(ranks: list[int]) -> str:
    shown = ", ".join(str(r) for r in sorted(set(ranks))[:8])
    return shown + (" and others" if len(set(ranks)) > 8 else "")


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


def metrics(run: Run, times: list[RankTimes], span: Makespan) -> dict[str, dict[str, Any]]:
    """Return all metrics of an Offline window by name."""
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
    _latencies(out, "latency", _all(run, _latency), "completion - agreed instant, per sample")
    _latencies(out, "batch_latency", _all(run, _batch_latency), "completion - issue, per group")
    _latencies(out, "service", _all(run, _service), "engine's end - engine's start, per group")
    _latencies(out, "device", _all(run, _device), "device time between two events, per group")
    out["accuracy"] = _accuracy(run)
    out["memory.peak"] = _memory(run)
    return out


def _all(run: Run, pick: Any) -> NDArray[np.int64]:
    parts = [pick(record) for record in run.present if record.rows is not None]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def _latency(record: RankRecord) -> NDArray[np.int64]:
    completed = record.column("completed")
    good = completed >= 0
    return np.asarray(completed[good] - record.column("scheduled")[good])


def _batch_latency(record: RankRecord) -> NDArray[np.int64]:
    return np.asarray(record.first_rows("completed") - record.first_rows("issued"))


def _service(record: RankRecord) -> NDArray[np.int64]:
    started, finished = record.first_rows("started"), record.first_rows("finished")
    known = (started > 0) & (finished > 0)
    return np.asarray(finished[known] - started[known])


def _device(record: RankRecord) -> NDArray[np.int64]:
    device = record.first_rows("device")
    return np.asarray(device[device > 0])


def _latencies(
    out: dict[str, dict[str, Any]], name: str, values: NDArray[np.int64], definition: str
) -> None:
    """Add the percentiles, maximum and mean of one latency; nothing where there is none."""
    if len(values) == 0:
        return
    found = percentiles_ns(values, list(QUANTILES.values()))
    for label, value in zip(QUANTILES, found, strict=True):
        out[f"{name}.{label}"] = metric(value / NS, "s", len(values), f"{definition}; {RULE}")
    out[f"{name}.max"] = metric(int(values.max()) / NS, "s", len(values), f"{definition}; largest")
    # Python integers: the sum of 1e7 latencies of hours is past what int64 must promise.
    mean = sum(int(part.sum()) for part in np.array_split(values, 64)) / len(values)
    out[f"{name}.mean"] = metric(mean / NS, "s", len(values), f"{definition}; arithmetic mean")


def _accuracy(run: Run) -> dict[str, Any]:
    definition = "right / scored over the model's held-out samples, untimed"
    scores = [s for r in run.present if (s := (r.after or {}).get("score")) is not None]
    if len(scores) < run.world_size:
        return metric(None, "1", 0, definition, reason="a rank left no score")
    reasons = [s["reason"] for s in scores if s["reason"]]
    if reasons:
        return metric(None, "1", 0, definition, reason=reasons[0])
    right, scored = sum(s["right"] for s in scores), sum(s["of"] for s in scores)
    value = right / scored if scored else None
    shown = f"{definition} ({right:g}/{scored:g})"
    return metric(value, "1", int(scored), shown, reason="" if scored else "nothing was scored")


def _memory(run: Run) -> dict[str, Any]:
    peaks = [(r.after or {}).get("memory_peak_bytes") for r in run.present]
    known = [p for p in peaks if p is not None]
    on_gpu = any(r.before["device"]["type"] == "cuda" for r in run.present)
    what = "device memory allocated by torch" if on_gpu else "resident memory of the process"
    if not known:
        return metric(None, "B", 0, f"largest over ranks: {what}", reason="not recorded")
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
        device_ns = int(_device(record).sum())
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
                    "memory.peak": (record.after or {}).get("memory_peak_bytes"),
                    "memory.total": memory_total(record),
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
    complete = len(starts) == run.world_size
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


LATE_NS = 100_000
"""A loop that begins later than this after the agreed instant was not on time.

A rank that spins over the instant is under 1 us late; one that the scheduler held back is late by a
slice, hundreds of us or more.
"""


def harness(run: Run) -> dict[str, Any]:
    """Return what the harness cost, from the raw timings that each rank recorded before its window.

    The cost per batch is the smallest block of a loop over a SUT that does nothing, per batch:
    what disturbs a block only ever makes it longer.
    """
    costs, clocks, switches, delays = [], [], [], []
    for record in run.present:
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
