"""Run -> findings of fact: who or what is missing, failed, wrong, or not as it was thought."""

from __future__ import annotations

from distbench import metrics as m
from distbench.findings import Finding
from distbench.layout import Layout
from distbench.run import RankRecord, Run
from distbench.times import RankTimes

ALIKE = (
    *("os", "kernel", "cpu_model", "cpu_threads", "cpu_governor", "numa_nodes"),
    *("cgroup_cpu_max", "git_commit", "torch_num_threads", "cudnn_version", "nccl_version"),
    *("float32_matmul_precision", "cuda_matmul_fp32_precision", "cudnn_conv_fp32_precision"),
)
GPU_ALIKE = (
    *("name", "driver_version", "vbios_version", "power_limit_w", "max_sm_clock_hz"),
    *("ecc_mode", "mig_mode", "compute_mode"),
)
"""What makes one rank's host another kind of host than the next one's: the slower kind sets the
makespan, so a figure of both describes neither."""
PEAK_OPS = {
    "A30": 330e12,
    "A100": 624e12,
    "A10": 250e12,
    "H100": 1979e12,
    "H200": 1979e12,
    "L4": 242e12,
    "L40S": 733e12,
    "T4": 130e12,
}
"""Dense operations/s of a GPU in its fastest precision (INT8 or FP8), by the word in its name: what
no model can pass whatever its precision. Source: NVIDIA's datasheet of each, without sparsity."""
END_REMEDIES = {
    "lost": "see on that host whether the process was killed (dmesg tells of memory), the host "
    "went down or the network was cut; then run again",
    "failed": "mend what the sentence names, and run again",
    "terminated": "run again; what was measured until then is kept here",
}
"""What to do about a rank that ended early, by how it ended."""
PARITY, PARITY_HALF = 1e-3, 2e-2
"""Difference of logits / largest logit that is rounding; the second in bf16 and fp16."""
OTHER_TOKENS = 0.2
"""Share of other tokens in fp32 that rounding may cause: one tie changes all that follows it."""
OUTPUTS_DIFFER = 0.01
"""Share of kept outputs that may differ from the accuracy pass: a batch of another size sums in
another order, which can turn a tie between two classes; a wrong buffer turns most of them."""


def facts_found(run: Run, times: list[RankTimes]) -> list[Finding]:
    """Return all findings of fact of a run, in order of rank."""
    found = _losses(run)
    for record, t in zip(run.present, times, strict=True):
        found += _outputs(record, t)
        found += _stamps(record, t)
        found += _roofline(record, t)
    for record in run.workers:
        found += _device(record) + _parity(record)
    return found + _environments(run) + _accuracy(run)


def _losses(run: Run) -> list[Finding]:
    found = []
    ends = [end for record in run.left if (end := (record.after or {}).get("end"))]
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
    for record in run.left:
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
                    remedy="make room on that host's disk and leave its output directory in place; "
                    "what was gathered is here",
                )
            )
        if end:
            found.append(
                Finding(
                    "incomplete",
                    f"rank-{end['code']}",
                    end["sentence"] + _place(run, end["rank"]),
                    end["rank"],
                    end["host"],
                    remedy=END_REMEDIES.get(end["code"], END_REMEDIES["failed"]),
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


def _place(run: Run, rank: int) -> str:
    """Say which part of a model that is cut over ranks was on one of them, "" without."""
    told = run.layout
    if told is None or rank < 0:
        return ""
    layout = Layout(told["pp"], told["tp"])
    part = f", part {layout.part(rank)}" if layout.tp > 1 else ""
    return f"; it was stage {layout.stage(rank)}{part} of replica {rank // layout.degree}"


def _raised(record: RankRecord) -> list[Finding]:
    """Return the finding that a window ended by an exception, whatever had completed by then."""
    after = record.after or {}
    if not after.get("raised"):
        return []
    errors = after.get("errors") or ["no message was kept"]
    return [
        _fact(
            record,
            "model-raised",
            f"rank {record.rank} ({record.host}) ended its window by an exception: {errors[0]}",
            1,
            "mend the model; what completed before is here",
        )
    ]


def _outputs(record: RankRecord, t: RankTimes) -> list[Finding]:
    who = f"rank {t.rank} ({record.host})"
    after = record.after or {}
    found = []
    found += _raised(record)
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
    if t.pending and t.whole and not after.get("end") and after and not after.get("halted"):
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


def _stamps(record: RankRecord, t: RankTimes) -> list[Finding]:
    """Return the finding that an engine's own stamps cannot be true."""
    if t.contradicting == 0:
        return []
    return [
        _fact(
            record,
            "stamps-contradict",
            f"rank {t.rank} ({record.host}): the engine's stamps of {t.contradicting} of "
            f"{t.groups} groups contradict: not issued <= started <= finished <= completed, or the "
            "same of its tokens; they are left out of the figures",
            t.contradicting,
            "let the engine stamp started and finished, in this order, with distbench.clock.now_ns",
        )
    ]


def _fact(record: RankRecord, code: str, message: str, value: float, remedy: str) -> Finding:
    return Finding("invalid", code, message, record.rank, record.host, value, 0, remedy)


def _device(record: RankRecord) -> list[Finding]:
    who = f"rank {record.rank} ({record.host})"
    found = []
    if record.before["device"]["note"]:
        found.append(
            Finding(
                "info",
                "device-note",
                record.before["device"]["note"],
                record.rank,
                record.host,
                remedy="where this is not what was wanted, give --device, or see that torch and "
                "NVML find the GPU",
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


def _parity(record: RankRecord) -> list[Finding]:
    """Return the finding that a model which was cut over ranks gives other answers."""
    layout = record.before.get("layout") or {}
    parity = layout.get("parity") or {}
    error, tokens = parity.get("logit_error"), parity.get("tokens", 0)
    half = record.before["model"].get("dtype") in ("bf16", "fp16")
    limit = PARITY_HALF if half else PARITY
    if error is None or layout["stage"] or layout["part"]:
        return []
    other = 1 - parity["tokens_equal"] / tokens if tokens and not half else 0.0
    if error <= limit and other <= OTHER_TOKENS:
        return []
    return [
        Finding(
            "invalid",
            "parity-broken",
            f"rank {record.rank} ({record.host}): the model as {layout['name']} is off the whole "
            f"model by {error:.2g} of its largest logit, and wrote {other:.1%} other tokens",
            record.rank,
            record.host,
            error,
            limit,
            "mend the way in which it is cut: speed at other answers is no speed",
        )
    ]


def _roofline(record: RankRecord, t: RankTimes) -> list[Finding]:
    """Return the finding that a GPU computed more than it physically can."""
    per_sample = record.before["model"].get("flops_per_sample")
    words = record.before["device"]["name"].replace("-", " ").split()
    peak = next((PEAK_OPS[word] for word in words if word in PEAK_OPS), None)
    layout = record.before.get("layout")
    if peak and layout:  # its samples are the work of a whole replica
        peak *= layout["pp"] * layout["tp"]
    if not per_sample or not peak or t.finished_ns is None or t.scheduled_ns is None:
        return []
    reached = t.ok * per_sample * 1e9 / max(t.finished_ns - t.scheduled_ns, 1)
    if reached <= peak:
        return []
    return [
        Finding(
            "invalid",
            "above-roofline",
            f"rank {t.rank} ({record.host}) would have computed {reached:.3g} operations/s, and "
            f"its {record.before['device']['name']} has at most {peak:.3g}: the work was not done",
            t.rank,
            record.host,
            reached,
            peak,
            "see whether outputs are cached or the model is skipped, and whether the model's "
            "flops_per_sample is right",
        )
    ]


def _environments(run: Run) -> list[Finding]:
    """Return the findings that the ranks' hosts are not of one kind, one for each difference."""
    seen: dict[str, dict[str, list[str]]] = {}
    for record in run.workers:
        described = record.before["environment"]
        gpu = described.get("gpu") or {}
        values = {name: described[name] for name in ALIKE if name in described}
        values |= {f"gpu.{name}": gpu[name] for name in GPU_ALIKE if name in gpu}
        for name, value in values.items():
            seen.setdefault(name, {}).setdefault(str(value), []).append(str(record.rank))
    return [
        Finding(
            "doubtful",
            "environments-differ",
            f"the ranks' hosts differ in {name}: "
            + "; ".join(f"{v} on rank {', '.join(r[:4])}" for v, r in list(by_value.items())[:4]),
            remedy="make the hosts alike, or measure each alone: figures of both describe neither",
        )
        for name, by_value in seen.items()
        if len(by_value) > 1
    ]


def _accuracy(run: Run) -> list[Finding]:
    """Return the finding that the model's answers are worse than it must give."""
    target = run.first.before["model"].get("target_accuracy")
    found = m.accuracy(run)
    if target is None or found["value"] is None or found["value"] >= target:
        return []
    return [
        Finding(
            "invalid",
            "accuracy-low",
            f"accuracy is {found['value']:.4f} where this model must reach {target:.4f}",
            value=found["value"],
            limit=target,
            remedy="check the weights and the precision: speed at wrong answers is no speed",
        )
    ]
