"""The text report: the verdict first, then figures with their bounds, then grounds for trust."""

from __future__ import annotations

from typing import Any

from distbench.report.bounded import bound_lines, gate_lines, peak_lines, search_lines
from distbench.report.central import driver_lines, foot, loadgen_rows, marked, official_words
from distbench.report.fabric import fabric_lines
from distbench.report.scaling import efficiency_lines, scaling_lines
from distbench.report.sharding import layout_lines
from distbench.report.stages import stage_lines
from distbench.report.units import (
    FIRST_RANKS,
    WORST_RANKS,
    counted,
    duration,
    duration_or_dash,
    first_of,
    rounded,
    shown_rows,
    size,
    table,
    whole_or_dash,
    wrapped,
)
from distbench.scenarios import scenario

LATENCIES = ("p50", "p90", "p95", "p97", "p99", "p99.9", "max", "mean")
SAME_FINDINGS = 4
"""Findings of one kind that are shown."""


def to_text(result: dict[str, Any]) -> str:
    """Lay out a result as text, lines of at most about 150 characters.

    Args:
        result: the content of result.json.
    """
    if "collectives" in result["tables"]:
        lines = [_verdict(result), "", *fabric_lines(result)]
    else:
        lines = [_verdict(result), "", *_samples(result), *_ranks(result), ""]
    lines += [*_trust(result), "", *_findings(result)]
    lines += ["command  " + result["window"]["command"], "run      " + result["run_id"]]
    # A sentence of a model may hold what no encoding takes; a report must not be lost to it.
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace").decode()


def _samples(result: dict[str, Any]) -> list[str]:
    """Return what a scenario measured, from headline to gates."""
    lines = [_headline(result), ""]
    lines += [*peak_lines(result), *efficiency_lines(result), *_throughput(result), ""]
    trail = search_lines(result) or scaling_lines(result) or layout_lines(result)
    until = result["windows"] and not trail
    if not trail or "latency.p50" in result["metrics"]:
        lines += [*(_windows(result) if until else _latencies(result)), ""]
    lines += [*bound_lines(result), ""] if result["tables"].get("bounds") else []
    lines += [*stage_lines(result), ""] if result["tables"].get("stages") else []
    lines += [*trail, ""] if trail else []
    return [*lines, *_accuracy(result), "", *gate_lines(result)]


def _verdict(result: dict[str, Any]) -> str:
    verdict = result["verdict"]
    found = [f["message"] for f in verdict["findings"] if f["code"] == "device-note"]
    notes = list(dict.fromkeys(found))
    if len(notes) > 2:
        notes[2:] = [f"and {counted(len(notes) - 2, 'note')} more on devices"]
    rules, word = verdict["rules"], "MLPerf v5.0 gates: not applied"
    if rules["set"] != "none":
        name = rules["set"].replace("mlperf-", "MLPerf ")
        word = f"{name} gates: {rules['result']} ({rules['wording']})"
    return "; ".join([f"MEASUREMENT {verdict['status']}; {word}", *notes])


def _headline(result: dict[str, Any]) -> str:
    window, config = result["window"], result["config"]
    hosts, kind, load = window["hosts"], scenario(result["scenario"]), window["load"]
    parts = [
        "coordinated " * bool(window.get("scaling"))
        + "distributed " * bool(window.get("sharding"))
        + result["scenario"],
        window["model"]["name"],
        f"{counted(window['world_size'], 'rank')} on {counted(len(hosts), 'host')} "
        f"({', '.join(hosts[:4])}{' ...' * (len(hosts) > 4)})",
        f"{'batch size' if kind.drained else 'up to'} {window['group']}"
        + " samples a group" * (not kind.drained),
        f"{window['samples']:,} samples",
        f"seed {config['seed']['value']}",
    ]
    if window.get("official"):
        parts.append(official_words(window["official"]))
    elif load is not None:
        parts.append(
            f"{load['arrival']} at {load['target_qps']:g} queries/s, {load['dispatch']} dispatch, "
            f"waiting at most {duration(load['max_wait_ns'] / 1e9)}"
        )
    elif kind.drained and "shares" in config:
        parts.append(f"shares {config['shares']['value']}")
    return "  ".join(parts)


def _throughput(result: dict[str, Any]) -> list[str]:
    found, window = result["metrics"]["throughput"], result["window"]
    if found["value"] is None:
        return [f"throughput       unknown: {found['reason']}"]
    span = window["makespan_s"]
    bound = window["makespan_bound_s"] / span if span else 0.0
    clocks = f"+-{bound:.2g} of it by the clocks" if bound else "on one clock"
    known = found["reason"]
    if found["ci_low"] is not None:
        half = (found["ci_high"] - found["ci_low"]) / 2 / found["value"]
        known = (
            f"95 % interval {rounded(found['ci_low'], 5)} to {rounded(found['ci_high'], 5)}, "
            f"+-{half:.2%}, by {found['ci_method']}"
        )
    return [
        f"throughput       {rounded(found['value'], 5)} samples/s{_of_layout(result)}  "
        f"({clocks}; {known})",
        *_steady(result),
        *_rates(result),
        "makespan         "
        + (f"{span:.6f} s  +-{duration(window['makespan_bound_s'])}" if span else "unknown")
        + ", all its windows together" * bool(_of_layout(result)),
    ]


def _of_layout(result: dict[str, Any]) -> str:
    """Say which layout the figures of a run of several are of, "" of all others."""
    told = result["window"].get("sharding")
    return f" of {told['plan']['layouts'][0]}" if told and told["cell"] is None else ""


def _rates(result: dict[str, Any]) -> list[str]:
    """Return Server's rates, and a stream's estimate: what LoadGen would print."""
    lines = []
    shown = ("throughput.scheduled", "throughput.completed", "throughput.tokens", "goodput")
    for name in (*shown, "floor.throughput"):
        found = result["metrics"].get(name)
        if found is not None:
            known = f"unknown: {found['reason']}"
            if found["value"] is not None:
                unit = found["unit"].replace("samples", "queries" if name in shown else "samples")
                known = f"{rounded(found['value'], 5)} {unit}, {found['definition']}"
            label = name.removeprefix("throughput.").removesuffix(".throughput")
            lines += wrapped(f"  {label:<15}{known}", 17)
    headline = scenario(result["scenario"]).headline
    found = result["metrics"].get(f"{headline}.early_stopping")
    if found is not None:
        known = found["reason"] if found["value"] is None else duration(found["value"])
        label = headline.rpartition(".")[2] + " estimate"
        lines.append(f"{label:<17}{known}  ({found['definition']})")
    return lines


def _steady(result: dict[str, Any]) -> list[str]:
    found = result["metrics"].get("throughput.steady")
    if found is None:
        return []
    if found["value"] is None:
        return [f"  steady         {found['reason']}"]
    known = found["reason"]
    if found["ci_low"] is not None:
        half = (found["ci_high"] - found["ci_low"]) / 2 / found["value"]
        known = (
            f"95 % {rounded(found['ci_low'], 5)} to {rounded(found['ci_high'], 5)}, +-{half:.2%}, "
            f"within this window; effective n {found['n_eff']:.0f}"
        )
    return [f"  steady         {rounded(found['value'], 5)} samples/s  ({known})"]


def _windows(result: dict[str, Any]) -> list[str]:
    """Return the table of the windows, the first ones and the slowest of the others."""
    rows = [["window", "samples/s", "samples", "makespan", "status"]]
    shown = result["windows"]
    left_out = len(shown) - FIRST_RANKS - WORST_RANKS
    if left_out > 0:
        slowest = sorted(shown[FIRST_RANKS:], key=lambda each: each["throughput"] or 0.0)
        slowest = sorted(slowest[:WORST_RANKS], key=lambda each: str(each["path"]))
        shown = shown[:FIRST_RANKS] + slowest
    for each in shown:
        rate = "?" if each["throughput"] is None else rounded(each["throughput"], 5)
        took = duration(each["makespan_s"])
        rows.append([each["path"], rate, f"{each['samples']:,}", took, each["status"]])
    note = f"{counted(left_out, 'window')} left out: these are the first and the slowest"
    return [*table(rows), *[note] * (left_out > 0), "latencies stand in each window's own report"]


def _latencies(result: dict[str, Any]) -> list[str]:
    kind, known = scenario(result["scenario"]), result["metrics"]
    names = {name: name.removesuffix("_latency") for name in kind.series}
    if kind.drained:
        names["latency"] = "completion"
    if result["window"].get("official"):
        names = loadgen_rows(names)
    rows = [["latency", "n", *LATENCIES]]
    refused: dict[str, list[str]] = {}
    for name, title in names.items():
        if f"{name}.p50" not in known:
            continue
        found = [known[f"{name}.{label}"] for label in LATENCIES]
        values = [marked(known, f"{name}.{label}") for label in LATENCIES]
        rows.append([title, f"{found[0]['n']:,}", *values])
        if any(each["ci_low"] is not None for each in found):
            for end, field in (("from", "ci_low"), ("to", "ci_high")):
                ends = (duration_or_dash(each[field]) for each in found[:-2])
                rows.append([f"  95 % {end}", "", *ends, "", ""])  # max and mean have none
        if any(each["n_eff"] is not None for each in found):
            worth = (whole_or_dash(each["n_eff"]) for each in found[:-2])
            rows.append(["  effective n", "", *worth, "", ""])
        none = {
            label: each["reason"]
            for label, each in zip(LATENCIES, found, strict=True)
            if each["reason"].startswith("not resolvable")
        }
        if none:
            why = f"{', '.join(none)}: {next(iter(none.values()))}"
            why += ", the higher ones more" * (len(set(none.values())) > 1)
            refused.setdefault(why, []).append(title)
    if len(rows) == 1:
        return ["latency          unknown: nothing completed"]
    return [
        *table(rows),
        *(
            line
            for reason, titles in refused.items()
            for line in wrapped(f"{', '.join(titles)} {reason}")
        ),
        *wrapped(foot(result)),
    ]


def _accuracy(result: dict[str, Any]) -> list[str]:
    accuracy, memory = result["metrics"]["accuracy"], result["metrics"]["memory.peak"]
    lines = []
    if accuracy["value"] is None:
        lines.append(f"accuracy         none: {accuracy['reason']}")
    else:
        fraction = accuracy["definition"].rsplit("(", 1)[1].rstrip(")")
        lines.append(f"accuracy         {accuracy['value']:.2%} ({fraction} held-out samples)")
    text = result["metrics"].get("bits_per_byte", {"value": None})
    if text["value"] is not None:  # of few models; result.json has the reason of the others
        lines.append(f"bits per byte    {text['value']:.4f} ({text['n']:,} held-out bytes)")
    if memory["value"] is None:
        lines.append(f"memory peak      unknown: {memory['reason']}")
    else:
        shares = [
            row["metrics"]["memory.peak"] / row["metrics"]["memory.total"]
            for row in result["per_rank"]
            if row["metrics"]["memory.peak"] and row["metrics"]["memory.total"]
        ]
        share = f", {max(shares):.1%} of the device's" if shares else ""
        lines.append(
            f"memory peak      {size(memory['value'])}{share} "
            f"({memory['definition'].split(': ', 1)[1]})"
        )
    return lines


def _ranks(result: dict[str, Any]) -> list[str]:
    drained = scenario(result["scenario"]).drained
    heads = ["rank", "host", "device", "samples", "share", "samples/s", "finish"]
    heads += ["idle", "busy"] if drained else ["p50", "p90", "p99"]
    rows = [heads]
    shown, note = shown_rows(result["per_rank"], lambda row: row["finish_s"])
    for row in shown:
        more = row["metrics"]
        rows.append(
            [
                str(row["rank"]),
                row["host"],
                row["device"],
                f"{row['samples']:,}",
                "?" if more["share"] is None else f"{more['share']:.1%}",
                "?" if more["throughput"] is None else rounded(more["throughput"], 5),
                duration(row["finish_s"]),
            ]
        )
        busy = "-" if more["device_busy"] is None else f"{more['device_busy']:.0%}"
        own = [duration(more.get(f"latency.{label}")) for label in ("p50", "p90", "p99")]
        rows[-1] += [duration(row["idle_s"]), busy] if drained else own
    lines = table(rows) + [f"{note}, by finish"] * bool(note)
    if result["tables"].get("stages"):
        lines.append(
            "of a model over several ranks the leader of each replica, which has its samples"
        )
    if any("?" in row for row in rows):
        why = result["window"]["makespan_reason"] or "a rank completed nothing"
        lines.append(f"?: unknown, for {why}")
    return lines


def _trust(result: dict[str, Any]) -> list[str]:
    start, cost = result["start"], result["harness"]
    late = (
        f"rank {first_of(list(map(str, start['late_ranks'])))}"
        if start["late_ranks"]
        else "no rank"
    )
    switches = first_of(["?" if s is None else str(s) for s in cost["involuntary_switches"]])
    delays = first_of([duration(s) for s in cost["run_delay_s"]])
    skew = f"{duration(start['skew_s'])} +-{duration(start['bound_s'])}"
    if start["skew_s"] is None:
        skew = f"unknown: {_unstarted(result)}"
    elif start["skew_s"] < start["bound_s"]:
        skew += " (below what the clocks resolve)"
    attempts = "unknown" if start["attempts"] is None else start["attempts"]
    lines = [
        "TRUST",
        *wrapped(f"  start skew     {skew}; late: {late}; attempts: {attempts}", 17),
        f"  harness        {duration(cost['cost_per_batch_s'])} per batch; one clock read "
        f"{duration(cost['clock_read_s'])}",
        *wrapped(f"  interference   involuntary switches by rank: {switches}", 17),
        *wrapped(f"                 waited for a processor: {delays}", 17),
    ]
    if None in cost["involuntary_switches"] or None in cost["run_delay_s"]:
        lines.append("                 ?: unknown, the rank or its kernel did not record it")
    return lines + _clocks(result) + _gpus(result)


def _unstarted(result: dict[str, Any]) -> str:
    """Say why the starts of the ranks cannot be compared."""
    missing = result["window"]["world_size"] - len(result["per_rank"])
    if missing:
        return f"{counted(missing, 'rank')} left nothing"
    return "a rank's loop did not begin, or its clock was not measured"


def _clocks(result: dict[str, Any]) -> list[str]:
    ranks = result["clock"]["ranks"]
    others = [row for row in ranks if row["exchanges"] or row["offset_s"] is None]
    shown, note = shown_rows(others, lambda row: row["bound_s"])
    lines = []
    for row in shown:
        offset = "unknown: nothing was exchanged with it, or its loop did not begin"
        if row["offset_s"] is not None:
            offset = f"{row['offset_s']:+.9f} s +-{duration(row['bound_s'])}"
        drift = "unknown" if row["drift_ppm"] is None else f"{row['drift_ppm']:+.3f} ppm"
        lines.append(
            f"  clock          rank {row['rank']}: offset {offset}, drift {drift}, "
            f"{row['exchanges']} exchanges"
        )
    if note:
        lines.append(f"  clock          {note}, by bound")
    driver = result["clock"].get("driver")
    if driver is not None:
        lines += driver_lines(driver)
    if len({row["domain"] for row in ranks}) == 1:
        lines.append("  clock          all ranks read one clock")
    return lines


def _gpus(result: dict[str, Any]) -> list[str]:
    gpus = [gpu for gpu in result["window"]["gpus"] if gpu["before"] or gpu["after"]]
    finish = {row["rank"]: row["finish_s"] for row in result["per_rank"]}
    shown, note = shown_rows(gpus, lambda gpu: finish[gpu["rank"]])
    lines = [
        f"  GPU            rank {gpu['rank']} {when}: {_gpu_state(gpu[when])}"
        for gpu in shown
        for when in ("before", "after")
        if gpu[when]
    ]
    return lines + [f"  GPU            {note}, by finish"] * bool(note)


def _gpu_state(state: dict[str, Any]) -> str:
    if not state["available"]:
        return f"state unknown: {state['reason']}"
    clock, heat, held = state["sm_clock_hz"], state["temperature_c"], state["throttle_reasons"]
    reasons = state.get("reasons", {})
    return ", ".join(
        f"{name} unknown: {reasons.get(field, 'not recorded')}"
        if value is None
        else f"{name} {text}"
        for name, field, value, text in (
            ("SM clock", "sm_clock_hz", clock, f"{(clock or 0) / 1e6:.0f} MHz"),
            ("temperature", "temperature_c", heat, f"{heat} C"),
            ("throttle reasons:", "throttle_reasons", held, ", ".join(held or []) or "none"),
        )
    )


def _findings(result: dict[str, Any]) -> list[str]:
    found = [f for f in result["verdict"]["findings"] if f["code"] != "device-note"]
    lines = ["findings: none"] if not found else ["findings"]
    kinds: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for finding in found:
        kinds.setdefault((finding["level"], finding["code"]), []).append(finding)
    for (level, code), same in kinds.items():
        for finding in same[:SAME_FINDINGS]:
            lines += wrapped(f"  {level}  {code}: {finding['message']}")
            if finding["remedy"]:
                lines += wrapped(f"      remedy: {finding['remedy']}")
        if len(same) > SAME_FINDINGS:
            lines.append(f"  {level}  {code}: {len(same) - SAME_FINDINGS} more in result.json")
    return [*lines, ""]
