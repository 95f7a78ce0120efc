"""Run -> findings: what a reader must know before believing a figure, and what to change.

A finding about the measurement (skew, clock, harness, interference) invalidates where its effect
exceeds ``EFFECT_INVALID`` of the headline metric, else it is doubtful. A finding of fact (failed,
missing or non-finite output, another process on the GPU) invalidates whatever its size.
"""

from __future__ import annotations

from dataclasses import dataclass

from distbench import metrics as m
from distbench.clock import WANDER_PPM, contradiction_ns
from distbench.metrics import Makespan, RankTimes, harness
from distbench.run import RankRecord, Run

EFFECT_INVALID = 0.05
"""An effect on the headline above this makes the window INVALID: at 5 % two systems that differ by
what a purchase is decided on can no longer be told apart."""
EFFECT_DOUBTFUL = 0.01
"""An effect above this is named: 1 % is the difference that careful comparisons look for."""
LAUNCH_BOUND_BUSY = 0.70
"""A device that computed for less of the window than this waited for its host."""
OUTPUTS_DIFFER = 0.01
"""Share of kept outputs that may differ from the accuracy pass: a batch of another size sums in
another order, which can turn a tie between two classes; a wrong buffer turns most of them."""
WINDOW_SHORT = 0.5
"""A window below this share of --duration: the warm-up rate was not the window's rate."""
STATUS_ORDER = ("VALID", "UNDECIDED", "INVALID", "INCOMPLETE")


@dataclass(frozen=True)
class Finding:
    """Something a reader must know about a run.

    Attributes:
        level: "info", "doubtful", "invalid", or "incomplete" for a rank that was lost.
        code: kebab-case name.
        message: one sentence: host, rank, value, limit.
        rank: whom it is about; None for all.
        host: its host, "" for all.
        value: the measured value, None where there is none.
        limit: what it was held against.
        remedy: what to do.
    """

    level: str
    code: str
    message: str
    rank: int | None = None
    host: str = ""
    value: float | None = None
    limit: float | None = None
    remedy: str = ""


def graded(effect: float) -> str | None:
    """Return the level that an effect on the headline calls for, None below all limits."""
    if effect > EFFECT_INVALID:
        return "invalid"
    return "doubtful" if effect > EFFECT_DOUBTFUL else None


def findings(run: Run, times: list[RankTimes], span: Makespan) -> list[Finding]:
    """Return all findings of a run, worst first."""
    found = [Finding(**note) for record in run.present for note in record.before["findings"]]
    found += _losses(run)
    for record, t in zip(run.present, times, strict=True):
        found += _outputs(record, t)
        found += _device(record)
        found += _interference(record, t)
        found += _clock(run, record)
    found += _timing(run, times, span)
    if span.reason and status(found) == "VALID":
        found.append(
            Finding(
                "invalid",
                "throughput-unknown",
                f"throughput is unknown: {span.reason}",
                remedy="mend what the sentence names, and run again",
            )
        )
    order = ("incomplete", "invalid", "undecided", "doubtful", "info")
    unique = list(dict.fromkeys(found))
    return sorted(unique, key=lambda f: order.index(f.level))


def _losses(run: Run) -> list[Finding]:
    found = []
    ends = [end for record in run.present if (end := (record.after or {}).get("end"))]
    named = {end["rank"] for end in ends}
    for rank in run.missing:
        found.append(
            Finding(
                "incomplete",
                "rank-missing",
                f"nothing of rank {rank} of {run.world_size} is here",
                rank=rank,
                remedy="copy its rank folder from its host beside the others, then run "
                "`python -m distbench.salvage`",
            )
        )
    for record in run.present:
        after = record.after or {}
        end = after.get("end")
        if after.get("disk_error"):
            found.append(
                Finding(
                    "incomplete",
                    "disk-error",
                    f"rank {record.rank} ({record.host}) could not write all its files: "
                    f"{after['disk_error']}",
                    record.rank,
                    record.host,
                    remedy="free space on that host's disk; what was gathered is here",
                )
            )
        if end:
            found.append(
                Finding(
                    "incomplete", f"rank-{end['code']}", end["sentence"], end["rank"], end["host"]
                )
            )
        elif record.problem and record.rank not in named:
            found.append(
                Finding(
                    "incomplete",
                    "rank-incomplete",
                    f"rank {record.rank} ({record.host}) left an incomplete folder: "
                    f"{record.problem}",
                    record.rank,
                    record.host,
                    remedy="copy the whole folder from its host; if it is whole there, the rank "
                    "was killed in its window",
                )
            )
    return found


def _outputs(record: RankRecord, t: RankTimes) -> list[Finding]:
    who = f"rank {t.rank} ({record.host})"
    after = record.after or {}
    found = []
    if t.failed:
        errors = after.get("errors") or ["no message was kept"]
        found.append(
            _fact(
                record,
                "samples-failed",
                f"{who} failed on {t.failed} samples: {errors[0]}",
                t.failed,
                "mend the model; its log has the rest",
            )
        )
    if t.pending and record.rows is not None and not after.get("end") and after:
        found.append(
            _fact(
                record,
                "samples-missing",
                f"{who} never completed {t.pending} samples",
                t.pending,
                "the engine must return every group that it was issued",
            )
        )
    kept = after.get("outputs")
    if kept and kept["non_finite"]:
        found.append(
            _fact(
                record,
                "outputs-non-finite",
                f"{who} gave NaN or infinite outputs in {kept['non_finite']} of "
                f"{kept['groups']} kept groups",
                kept["non_finite"],
                "check the weights, and the precision they are computed in",
            )
        )
    if kept and kept["compared"]:
        share = kept["different"] / kept["compared"]
        if share > OUTPUTS_DIFFER:
            found.append(
                Finding(
                    "invalid",
                    "outputs-differ",
                    f"{who}: {kept['different']} of {kept['compared']} outputs kept from the "
                    "window differ from the accuracy pass",
                    t.rank,
                    record.host,
                    share,
                    OUTPUTS_DIFFER,
                    "the engine mixes up groups or reuses a buffer too early",
                )
            )
    return found


def _fact(record: RankRecord, code: str, message: str, value: float, remedy: str) -> Finding:
    return Finding("invalid", code, message, record.rank, record.host, value, 0, remedy)


def _device(record: RankRecord) -> list[Finding]:
    who = f"rank {record.rank} ({record.host})"
    found = []
    if record.before["device"]["note"]:
        found.append(
            Finding(
                "info", "device-note", record.before["device"]["note"], record.rank, record.host
            )
        )
    foreign = record.before.get("foreign_before", []) + (record.after or {}).get(
        "foreign_after", []
    )
    if foreign:
        pids = ", ".join(str(pid) for pid in sorted(set(foreign)))
        found.append(
            _fact(
                record,
                "foreign-process",
                f"{who}: process {pids} also used the GPU",
                len(set(foreign)),
                "end it, or wait for it, and run again",
            )
        )
    after = (record.after or {}).get("gpu_after") or {}
    for when, state in (("before", record.before.get("gpu_before")), ("after", after)):
        if state and state.get("compute_processes") is None:
            reasons = state.get("reasons", {})
            why = state.get("reason") or reasons.get("compute_processes", "NVML does not tell")
            found.append(
                Finding(
                    "doubtful",
                    "foreign-unknown",
                    f"{who}: who else used the GPU {when} the window is not known: {why}",
                    record.rank,
                    record.host,
                    remedy="make NVML usable there (driver, nvidia-ml-py), or see to it by hand "
                    "that nothing else runs on the GPU",
                )
            )
    idle = {"gpu_idle", "none", "applications_clocks_setting"}
    reasons = [r for r in after.get("throttle_reasons") or [] if r not in idle]
    if reasons:
        found.append(
            Finding(
                "doubtful",
                "throttled",
                f"{who}: the GPU held its clock back at the end: {', '.join(reasons)}",
                record.rank,
                record.host,
                remedy="check power limit, cooling and "
                "application clocks (nvidia-smi -q -d PERFORMANCE)",
            )
        )
    return found


def _clock(run: Run, record: RankRecord) -> list[Finding]:
    """Return the finding that a clock did what the bounds assume it does not."""
    if record.before["clock"]["leader"] != record.rank or record.rank == 0:
        return []
    excess_ns = contradiction_ns(run.exchanges(record))
    if excess_ns <= 0:
        return []
    return [
        Finding(
            "invalid",
            "clock-contradiction",
            f"rank {record.rank} ({record.host}): exchanges with its clock contradict each other "
            f"by {excess_ns / 1e3:.1f} us beyond their bounds, so a clock was stepped or its rate "
            f"moved by more than {WANDER_PPM:g} ppm, and no bound of this run holds",
            record.rank,
            record.host,
            excess_ns / 1e9,
            0,
            "run again; if it comes back, see whether a virtual machine is paused or moved, or "
            "something sets the clock",
        )
    ]


def _interference(record: RankRecord, t: RankTimes) -> list[Finding]:
    quiet = (record.after or {}).get("quiet")
    if not quiet or quiet["run_delay_ns"] < 0 or not quiet["window_ns"]:
        return []
    effect = quiet["run_delay_ns"] / quiet["window_ns"]
    level = graded(effect)
    if level is None:
        return []
    return [
        Finding(
            level,
            "interference",
            f"rank {t.rank} ({record.host}): the loop was ready to run but waited for a "
            f"processor for {effect:.1%} of its window "
            f"({quiet['involuntary_switches']} involuntary switches)",
            t.rank,
            record.host,
            effect,
            EFFECT_INVALID,
            "stop other work on the host, or start fewer ranks or threads than it has cores",
        )
    ]


def _timing(run: Run, times: list[RankTimes], span: Makespan) -> list[Finding]:
    found: list[Finding] = []
    if not span.value_ns:
        return found
    start = m.start_section(run, times)
    if start["late_ranks"]:
        worst = max(x for x in start["lateness_s"] if x is not None)
        effect = worst * m.NS / span.value_ns
        who = ", ".join(str(r) for r in start["late_ranks"][:8])
        found.append(
            Finding(
                "invalid" if effect > EFFECT_INVALID else "doubtful",
                "start-late",
                f"rank {who} began up to {worst * 1e3:.3f} ms after the agreed instant "
                f"({effect:.2%} of the window, after {start['attempts']} attempts)",
                start["late_ranks"][0],
                "",
                worst,
                m.LATE_NS / m.NS,
                "stop other work on the host; with more ranks than cores use fewer ranks",
            )
        )
    effect = (span.bound_ns or 0) / span.value_ns
    level = graded(effect)
    if level:
        found.append(
            Finding(
                level,
                "clock-bound",
                f"the makespan is known to +-{(span.bound_ns or 0) / 1e3:.1f} us only "
                f"({effect:.2%} of it)",
                value=effect,
                limit=EFFECT_INVALID,
                remedy="measure for longer (--duration), or mend the network's latency",
            )
        )
    batches = max((len(r.first_rows("completed")) for r in run.present), default=0)
    effect = harness(run)["cost_per_batch_s"] * m.NS * batches / span.value_ns
    level = graded(effect)
    if level:
        found.append(
            Finding(
                level,
                "harness-cost",
                f"the loop over a SUT that does nothing takes {effect:.1%} of this window's time "
                f"({batches} batches on the busiest rank)",
                value=effect,
                limit=EFFECT_INVALID,
                remedy="use a larger --batch-size, or a model that does some work",
            )
        )
    return found + _window(run, span) + _launch_bound(run, times, span)


def _window(run: Run, span: Makespan) -> list[Finding]:
    asked = run.first.before.get("duration_ns")
    if not asked or not span.value_ns or span.value_ns >= WINDOW_SHORT * asked:
        return []
    return [
        Finding(
            "doubtful",
            "window-short",
            f"the window lasted {span.value_ns / 1e9:.2f} s of the {asked / 1e9:g} s asked "
            "for: the warm-up was slower than the window",
            value=span.value_ns / asked,
            limit=WINDOW_SHORT,
            remedy="give a longer --warmup, or --num-samples",
        )
    ]


def _launch_bound(run: Run, times: list[RankTimes], span: Makespan) -> list[Finding]:
    found = []
    for row in m.per_rank(run, times, span):
        busy = row["metrics"]["device_busy"]
        if busy is not None and busy < LAUNCH_BOUND_BUSY:
            found.append(
                Finding(
                    "info",
                    "launch-bound",
                    f"LAUNCH_BOUND: the device of rank {row['rank']} ({row['host']}) computed "
                    f"for {busy:.0%} of the window and waited for its host otherwise",
                    row["rank"],
                    row["host"],
                    busy,
                    LAUNCH_BOUND_BUSY,
                    "use a larger --batch-size, or an engine with fewer launches",
                )
            )
    return found


def status(found: list[Finding]) -> str:
    """Return the worst status that the findings call for."""
    called = {"invalid": "INVALID", "incomplete": "INCOMPLETE", "undecided": "UNDECIDED"}
    worst = max((STATUS_ORDER.index(called.get(f.level, "VALID")) for f in found), default=0)
    return STATUS_ORDER[worst]
