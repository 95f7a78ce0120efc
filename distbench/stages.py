"""A model over several ranks -> what each of them did in a window, and how long they rested.

Every rank sums up its steps as it goes (``engines.stopwatch``) and leaves the sums in after.json,
under ``stage``: work, from the first of its layers to the last; waiting, for what these work on.
What is left of the makespan is the rest: the harness, Python between the two, and before the first
and behind the last step.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

from distbench.layout import Layout, bubble, bubble_of_loop
from distbench.metrics import metric
from distbench.ruling import table
from distbench.run import RankRecord, Run
from distbench.times import Makespan

NS = 1e9
ALONE = "one window gives no interval: repeat windows or launches"
COLUMNS = (
    ("rank", "", ""),
    ("host", "", ""),
    ("replica", "", ""),
    ("stage", "", "of the pipeline, from 0"),
    ("part", "", "tensor-parallel part of the stage, from 0"),
    ("steps", "", "that it computed: prefills and decodes of a micro-batch"),
    ("rows", "", "texts of a step, mean"),
    ("work", "s", "from its first layer to its last, all-reduces of its part included, all steps"),
    ("prefill", "s", "of it, in prefills"),
    ("wait", "s", "for a step or, of the leader, for the tokens of one"),
    ("rest", "s", "makespan - work - wait"),
    ("busy", "", "work / makespan"),
    ("sent", "B", "steps, activations and tokens; all-reduces are not in it"),
    ("send_rate", "B/s", "sent / makespan"),
    ("weights", "B", "parameters that it holds"),
    ("weights_share", "", "of the whole model's"),
    ("cache", "B", "keys and values that it holds"),
    (
        "memory_peak",
        "B",
        "of the process, or on a GPU of torch's allocator, since it began: all layouts of the run "
        "and the whole model of the parity check are in it",
    ),
)


def stage_section(run: Run, span: Makespan) -> tuple[dict[str, Any], dict[str, Any]]:
    """Judge what the ranks of a cut model did.

    Args:
        run: of one window.
        span: of it.

    Returns:
        Metrics and tables by name; nothing of both where no model was cut.
    """
    told = run.layout
    if told is None:
        return {}, {}
    makespan_s = None if span.value_ns is None else span.value_ns / NS
    rows = [_row(record, makespan_s) for record in run.workers]
    return _metrics(run, told, rows, span), {"stages": table(COLUMNS, rows)}


def _row(record: RankRecord, makespan_s: float | None) -> list[Any]:
    placed, after = record.before["layout"], record.after or {}
    sums = after.get("stage")
    head = [record.rank, record.host, record.before["replica"], placed["stage"], placed["part"]]
    whole = placed["whole_bytes"]
    share = placed["weights_bytes"] / whole if whole else None
    memory = [placed["weights_bytes"], share, placed["cache_bytes"], after.get("memory_peak_bytes")]
    if sums is None:
        return [*head, *[None] * 9, *memory]
    steps = sums["prefills"] + sums["decodes"]
    work, prefill, wait = (sums[f"{name}_ns"] / NS for name in ("work", "prefill", "wait"))
    rest = busy = rate = None
    if makespan_s:
        rest, busy = makespan_s - work - wait, work / makespan_s
        rate = sums["sent_bytes"] / makespan_s
    rows = sums["rows"] / steps if steps else None
    return [
        *head, steps, rows, work, prefill, wait, rest, busy, sums["sent_bytes"], rate, *memory
    ]  # fmt: skip


def _metrics(
    run: Run, told: dict[str, Any], rows: Sequence[Sequence[Any]], span: Makespan
) -> dict[str, Any]:
    """Return bubble and imbalance, over all replicas."""
    named = [dict(zip((name for name, _, _ in COLUMNS), row, strict=True)) for row in rows]
    layout, ranks = Layout(told["pp"], told["tp"]), run.world_size
    ideal, formula = bubble_of_loop(layout.pp, told["lanes"]), "max(0, 1 - m/p)"
    if told.get("loop") == "one-shot":
        ideal, formula = bubble(layout.pp, told["lanes"]), "(p - 1) / (m + p - 1)"
    reason = span.reason
    if len(rows) < ranks or any(each["work"] is None for each in named):
        reason = reason or "a rank left nothing of its steps"
    busy = [each["busy"] for each in named if each["busy"] is not None]
    known = not reason and len(busy) == ranks
    steps = sum(each["steps"] or 0 for each in named)
    out = {
        "bubble": metric(
            1 - fmean(busy) if known else None,
            "",
            steps,
            "1 - work of all ranks / (ranks x makespan)",
            reason=reason,
            ci_reason=ALONE,
        ),
        "bubble.ideal": metric(
            ideal,
            "",
            steps,
            f"{formula} of m = {told['lanes']} micro-batches and p = {layout.pp} equal stages",
            ci_reason="a property of the layout",
        ),
    }
    if layout.pp > 1:
        work: dict[int, list[float]] = {}
        for each in named:
            work.setdefault(each["stage"], []).append(each["work"] or 0.0)
        means = [fmean(values) for values in work.values()]
        even = fmean(means)
        out["imbalance"] = metric(
            max(means) / even if known and even else None,
            "",
            steps,
            "work of the stage with the most / mean of all stages",
            reason=reason or "no stage worked" * (not even),
            ci_reason=ALONE,
        )
    return out
