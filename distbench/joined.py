"""Central dispatch's logs put together: the driver's, which is official, and those of the workers.

A query is in two logs: in the driver's, on the driver's clock, and in that of the rank which served
it, found by its number. Its latency is the driver's alone. What it is made of needs both:

    lateness = (issued - scheduled) on the driver + (issued - ready) on the rank
    queue    = the engine's start, mapped to the driver's clock, - issued on the driver
               - the rank's lateness
    service  = the engine's end - its start, on the rank's clock
    return   = latency - lateness - queue - service

They sum exactly. Queue and return carry the bound of the two clocks, and can be below zero by it.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench.clock import ClockModel
from distbench.errors import DRIVER, where
from distbench.findings import Finding
from distbench.pool import NONE, OWN, facts, of_every_query, series, stamp
from distbench.quantiles import percentiles_ns
from distbench.run import RankRecord, Rows, Run
from distbench.times import RankTimes, possible, rank_times

NS = 1e9


def official(run: Run) -> list[RankRecord]:
    """Return the records whose logs time the samples; the driver's with what was joined to it."""
    return run.present if run.driver is None else [joined(run, run.driver)]


def joined(run: Run, driver: RankRecord) -> RankRecord:
    """Return the driver's record with the series that need the workers' logs too."""
    if driver.rows is None:
        return replace(driver, made=dict.fromkeys(_SERIES, np.zeros(0, np.int64)))
    n = len(driver.rows)
    late, start, service = (np.zeros(n, np.int64) for _ in range(3))
    known, engine = np.zeros(n, np.bool_), np.zeros(n, np.bool_)
    tpot = np.full(n, NONE)
    groups: list[tuple[Rows, Rows, Rows]] = []
    for record in run.present:
        if record.rows is None or "query" not in record.before["columns"]:
            continue
        mine = answered(record, driver)
        number = record.column("query")[mine]
        known[number] = True
        groups.append(_groups(record))
        late[number] = (stamp(record, "issued") - stamp(record, "ready"))[mine]
        every = np.full(len(mine), NONE)
        every[record.column("completed") >= 0] = of_every_query(record, "tpot")
        tpot[number] = every[mine]
        if "started" in record.before["columns"]:
            begun, ended = record.column("started"), record.column("finished")
            true = mine & possible(record.column, begun)
            at = record.column("query")[true]
            here = _on_the_drivers_clock(run, record, driver, begun[true])
            if here is None:  # salvaged without the exchanges: nothing is known of the two parts
                continue
            engine[at], service[at], start[at] = True, (ended - begun)[true], here
    own = {name: driver.column(name) for name in ("scheduled", "issued", "completed")}
    good = own["completed"] >= 0
    latency = own["completed"] - own["scheduled"]
    lateness = own["issued"] - own["scheduled"] + late
    queue = start - own["issued"] - late
    both, whole = good & known, good & engine
    made = {
        "lateness": lateness[both],
        "in_time": (latency - lateness)[good],
        "queue": queue[whole],
        "service": service[whole],
        "return": (latency - lateness - queue - service)[whole],
        # On one clock: a First and a Done that the driver read together have one stamp there.
        "every_tpot": tpot[good],
    }
    ttft = of_every_query(driver, "ttft")
    made["ttft_in_time"] = (ttft - lateness[good])[ttft < NONE]
    none = (np.zeros(0, np.int64),) * 3
    first, took, device = (np.concatenate(part) for part in zip(none, *groups, strict=True))
    order = np.argsort(first, kind="stable")  # as they were dispatched, over all ranks
    made["batch_latency"] = took[order]
    made["device"] = device[order][device[order] > 0]
    return replace(driver, made=made)


_SERIES = ("lateness", "in_time", "queue", "service", "return", "batch_latency", "device")


def answered(record: RankRecord, driver: RankRecord) -> NDArray[np.bool_]:
    """Tell which rows of a rank's log are queries that ended well, here and on the driver."""
    number = record.column("query")
    inside = (number >= 0) & (number < len(driver.column("completed")))
    place = np.where(inside, number, 0)
    ended = driver.column("completed")[place] >= 0
    served = driver.column("served_by")[place] == record.rank
    return np.asarray(inside & ended & served & (record.column("completed") >= 0))


def _groups(record: RankRecord) -> tuple[Rows, Rows, Rows]:
    """Return the first query, the time and the device's time of each group that ended well."""
    took = record.first_rows("completed") - record.first_rows("issued")
    device = record.first_rows("device")
    return record.first_rows("query"), took, device if len(device) else np.zeros_like(took)


def _on_the_drivers_clock(
    run: Run, record: RankRecord, driver: RankRecord, at: Rows
) -> Rows | None:
    """Map stamps of a rank's clock to the driver's; None where one of the two is not known."""
    if record.before["clock"]["domain"] == driver.before["clock"]["domain"]:
        return at
    there, here = run.clock(record), run.clock(driver)
    if there is None or here is None:
        return None
    return to_peer(here, there.many_to_reference_ns(at))


def to_peer(model: ClockModel, reference_ns: Rows) -> Rows:
    """Map many instants of the reference clock to a peer's; within 1 ns of ``to_peer_ns``."""
    if not model.exchanges:
        return reference_ns
    first = model.exchanges[0]
    times = np.array([e.at_ns - first.at_ns for e in model.exchanges], np.float64)
    extra = np.array([e.offset_ns - first.offset_ns for e in model.exchanges], np.float64)
    step = np.interp((reference_ns - first.at_ns).astype(np.float64), times, extra)
    return np.asarray(reference_ns + first.offset_ns + np.rint(step).astype(np.int64))


def worker_times(run: Run) -> list[RankTimes]:
    """Return each rank's times by its own log, its latencies by the driver's."""
    times = []
    for record in run.present:
        t, mine = rank_times(run, record, facts(record)), _latencies(run, record.rank)
        sums = (len(mine), int(mine.max(initial=0)), int(mine.sum()))
        times.append(replace(t, own=_own(mine), series={**t.series, "latency": sums}))
    return times


def _latencies(run: Run, rank: int) -> Rows:
    """Return the driver's latencies of the queries that one rank served."""
    driver = run.driver
    if driver is None or driver.rows is None:
        return np.zeros(0, np.int64)
    good = driver.column("completed") >= 0
    return np.asarray(series(driver, "latency")[driver.column("served_by")[good] == rank])


def _own(mine: Rows) -> dict[str, int]:
    if len(mine) == 0:
        return {}
    found = percentiles_ns(mine, list(OWN.values()))
    return {f"latency.{label}": value for label, value in zip(OWN, found, strict=True)}


def driver_section(run: Run, times: list[RankTimes]) -> dict[str, Any] | None:
    """Return ``clock.driver`` of result.json: the official clock; None without a driver."""
    driver = run.driver
    if driver is None:
        return None
    (t,) = times
    model = run.clock(driver)
    at = (driver.after or {}).get("plan", {}).get("reference_ns")
    started = (driver.after or {}).get("started_ns")
    late = None if started is None or t.scheduled_ns is None else started - t.scheduled_ns
    return {
        "host": driver.host,
        "pid": driver.before.get("pid"),
        "domain": driver.before["clock"]["domain"],
        "rule": driver.before.get("rule"),
        "payload": driver.before.get("payload"),
        "offset_s": None if model is None or at is None else model.offset_ns(at) / NS,
        "bound_s": None if t.bound_ns is None else t.bound_ns / NS,
        "parts_bound_s": _parts_bound_s(run, driver, t),
        "exchanges": 0 if model is None else len(model.exchanges),
        "late_s": None if late is None else late / NS,
    }


def _parts_bound_s(run: Run, driver: RankRecord, times: RankTimes) -> float | None:
    """Return how far queue and return can be wrong by the clocks, anywhere in the window, s.

    Returns:
        0 where the ranks read the driver's clock; None where a clock is not known.
    """
    there = [
        r for r in run.present if r.before["clock"]["domain"] != driver.before["clock"]["domain"]
    ]
    if not there:
        return 0.0
    models = [run.clock(record) for record in (driver, *there)]
    begin = (driver.after or {}).get("plan", {}).get("reference_ns")
    if begin is None or None in models:
        return None
    known = [model for model in models if model is not None]
    end = begin if times.finished_ref_ns is None else max(begin, times.finished_ref_ns)
    # Between two exchanges a bound is widest half way, nearly; where the next begins, it jumps.
    at = [begin, end]
    for model in known:
        stamps = [each.at_ns for each in model.exchanges]
        at += stamps + [(a + b) // 2 for a, b in pairwise(stamps)]
    inside = [each for each in at if begin <= each <= end]
    first, *others = known
    return max(first.bound_ns(x) + other.bound_ns(x) for x in inside for other in others) / NS


def driver_found(run: Run) -> list[Finding]:
    """Return the findings of fact on the driver: lost, or at odds with the ranks' logs."""
    driver = run.driver
    if driver is None:
        return []
    end = (driver.after or {}).get("end")
    remedy = "see the driver's own output, and whether its host or the network failed; run again"
    if end:
        text = str(end["sentence"])
        return [
            Finding("incomplete", "driver-lost", text, None, driver.host, remedy=remedy),
        ]
    if driver.problem:
        text = f"{where(DRIVER, driver.host)} left an incomplete record: {driver.problem}"
        return [Finding("incomplete", "driver-incomplete", text, None, driver.host, remedy=remedy)]
    return _at_odds(run, driver)


def _at_odds(run: Run, driver: RankRecord) -> list[Finding]:
    """Return the finding that queries which completed for the driver did not for their rank."""
    whole = not run.missing and all(r.rows is not None and r.after for r in run.present)
    if not whole:
        return []
    there = sum(int(answered(record, driver).sum()) for record in run.present)
    numbers = np.concatenate([record.column("query") for record in run.present])
    twice = len(numbers) - len(np.unique(numbers))
    here = int((driver.column("completed") >= 0).sum())
    if here == there and not twice:
        return []
    return [
        Finding(
            "invalid",
            "dispatch-differs",
            f"{here:,} queries completed for the driver and {there:,} of them for the ranks that "
            f"served them, {twice:,} came twice",
            value=here - there,
            limit=0,
            remedy="a rank's log and the driver's are not of one window, or a file was changed",
        )
    ]
