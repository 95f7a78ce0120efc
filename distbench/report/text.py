"""The text report: the verdict first, then figures with their bounds, then grounds for trust."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

LATENCIES = ("p50", "p90", "p95", "p97", "p99", "p99.9", "max", "mean")
FIRST_RANKS, WORST_RANKS = 16, 4
"""Ranks that a table shows: the first ones, and the worst of the others; result.json has all."""
SAME_FINDINGS = 4
"""Findings of one kind that are shown."""


def to_text(result: dict[str, Any]) -> str:
    """Lay out a result as text, lines of at most about 150 characters.

    Args:
        result: the content of result.json.
    """
    lines = [_verdict(result), "", _headline(result), ""]
    lines += [*_throughput(result), ""]
    lines += [*(_windows(result) if result["windows"] else _latencies(result)), ""]
    lines += [*_accuracy(result), "", *_gates(result)]
    lines += [*_ranks(result), "", *_trust(result), "", *_findings(result)]
    lines += ["command  " + result["window"]["command"], "run      " + result["run_id"]]
    # A sentence of a model may hold what no encoding takes; a report must not be lost to it.
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace").decode()


def _verdict(result: dict[str, Any]) -> str:
    verdict = result["verdict"]
    found = [f["message"] for f in verdict["findings"] if f["code"] == "device-note"]
    notes = list(dict.fromkeys(found))
    if len(notes) > 2:
        notes[2:] = [f"and {_count(len(notes) - 2, 'note')} more on devices"]
    rules, word = verdict["rules"], "MLPerf v5.0 gates: not applied"
    if rules["set"] != "none":
        name = rules["set"].replace("mlperf-", "MLPerf ")
        word = f"{name} gates: {rules['result']} ({rules['wording']})"
    return "; ".join([f"MEASUREMENT {verdict['status']}; {word}", *notes])


def _gates(result: dict[str, Any]) -> list[str]:
    """Return the gates of the rules, a line each; nothing without rules."""
    lines = []
    for gate in result["verdict"]["rules"]["gates"]:
        word = "passed" if gate["passed"] else "FAILED"
        more = f"; {gate['needed']:,} more are needed" if gate["needed"] else ""
        value, limit = f"{gate['value']:,.10g}", f"{gate['limit']:,.10g}"
        lines.append(
            f"gate             {gate['name']}: {value} {gate['unit']}, limit {limit}: {word}{more}"
        )
    return [*lines, ""] if lines else []


def _headline(result: dict[str, Any]) -> str:
    window, config = result["window"], result["config"]
    hosts = window["hosts"]
    ranks, batch = window["world_size"], config["batch_size"]["value"]
    return (
        f"{result['scenario']}  {window['model']['name']}  {_count(ranks, 'rank')} on "
        f"{_count(len(hosts), 'host')} ({', '.join(hosts[:4])}{' ...' if len(hosts) > 4 else ''})  "
        f"batch size {batch}  {window['samples']:,} samples  seed {config['seed']['value']}  "
        f"shares {config['shares']['value']}"
    )


def _throughput(result: dict[str, Any]) -> list[str]:
    found, window = result["metrics"]["throughput"], result["window"]
    if found["value"] is None:
        return [f"throughput       unknown: {found['reason']}"]
    bound = window["makespan_bound_s"] / window["makespan_s"]
    clocks = f"+-{bound:.2g} of it by the clocks" if bound else "on one clock"
    known = found["reason"]
    if found["ci_low"] is not None:
        half = (found["ci_high"] - found["ci_low"]) / 2 / found["value"]
        known = (
            f"95 % interval {_sig(found['ci_low'], 5)} to {_sig(found['ci_high'], 5)}, "
            f"+-{half:.2%}, by {found['ci_method']}"
        )
    return [
        f"throughput       {_sig(found['value'], 5)} samples/s  ({clocks}; {known})",
        *_steady(result),
        f"makespan         {window['makespan_s']:.6f} s  +-{_time(window['makespan_bound_s'])}",
    ]


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
            f"95 % {_sig(found['ci_low'], 5)} to {_sig(found['ci_high'], 5)}, +-{half:.2%}, "
            f"within this window; effective n {found['n_eff']:.0f}"
        )
    return [f"  steady         {_sig(found['value'], 5)} samples/s  ({known})"]


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
        rate = "?" if each["throughput"] is None else _sig(each["throughput"], 5)
        took = _time(each["makespan_s"])
        rows.append([each["path"], rate, f"{each['samples']:,}", took, each["status"]])
    note = f"{_count(left_out, 'window')} left out: these are the first and the slowest"
    return [*_table(rows), *[note] * (left_out > 0), "latencies stand in each window's own report"]


def _latencies(result: dict[str, Any]) -> list[str]:
    names = {
        "latency": "completion",
        "batch_latency": "batch",
        "service": "service",
        "device": "device",
    }
    known = result["metrics"]
    rows = [["latency", "n", *LATENCIES]]
    refused: dict[str, list[str]] = {}
    for name, title in names.items():
        if f"{name}.p50" not in known:
            continue
        found = [known[f"{name}.{label}"] for label in LATENCIES]
        rows.append([title, f"{found[0]['n']:,}", *(_time(each["value"]) for each in found)])
        if any(each["ci_low"] is not None for each in found):
            for end, field in (("from", "ci_low"), ("to", "ci_high")):
                rows.append([f"  95 % {end}", "", *(_end(each[field]) for each in found)])
        if any(each["n_eff"] is not None for each in found):
            rows.append(["  effective n", "", *(_count_or_dash(each["n_eff"]) for each in found)])
        for label, each in zip(LATENCIES, found, strict=True):
            if each["reason"].startswith("not resolvable"):
                refused.setdefault(f"{label}: {each['reason']}", []).append(title)
                break  # a higher percentile needs more still
    if len(rows) == 1:
        return ["latency          unknown: nothing completed"]
    return [
        *_table(rows),
        *(
            line
            for reason, titles in refused.items()
            for line in _wrapped(f"{', '.join(titles)} {reason}")
        ),
        "percentiles by LoadGen's rule, sorted[int(n * p)]; batch latency is "
        "completion - issue, with up to the engine's depth of groups in flight",
    ]


def _end(seconds: float | None) -> str:
    return "-" if seconds is None else _time(seconds)


def _count_or_dash(n: float | None) -> str:
    return "-" if n is None else f"{n:,.0f}"


def _accuracy(result: dict[str, Any]) -> list[str]:
    accuracy, memory = result["metrics"]["accuracy"], result["metrics"]["memory.peak"]
    lines = []
    if accuracy["value"] is None:
        lines.append(f"accuracy         none: {accuracy['reason']}")
    else:
        fraction = accuracy["definition"].rsplit("(", 1)[1].rstrip(")")
        lines.append(f"accuracy         {accuracy['value']:.2%} ({fraction} held-out samples)")
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
            f"memory peak      {_bytes(memory['value'])}{share} "
            f"({memory['definition'].split(': ', 1)[1]})"
        )
    return lines


def _ranks(result: dict[str, Any]) -> list[str]:
    rows = [["rank", "host", "device", "samples", "share", "samples/s", "finish", "idle", "busy"]]
    shown, note = _shown(result["per_rank"], lambda row: row["finish_s"])
    for row in shown:
        more = row["metrics"]
        rows.append(
            [
                str(row["rank"]),
                row["host"],
                row["device"],
                f"{row['samples']:,}",
                "?" if more["share"] is None else f"{more['share']:.1%}",
                "?" if more["throughput"] is None else _sig(more["throughput"], 5),
                _time(row["finish_s"]),
                _time(row["idle_s"]),
                "-" if more["device_busy"] is None else f"{more['device_busy']:.0%}",
            ]
        )
    lines = _table(rows) + [f"{note}, by finish"] * bool(note)
    if any("?" in row for row in rows):
        why = result["window"]["makespan_reason"] or "a rank completed nothing"
        lines.append(f"?: unknown, for {why}")
    return lines


def _shown(rows: list[Any], badness: Callable[[Any], float | None]) -> tuple[list[Any], str]:
    """Return the rows of the first and the worst ranks, and what to say about the others.

    A rank whose badness is unknown is among the worst.
    """
    if len(rows) <= FIRST_RANKS + WORST_RANKS:
        return rows, ""

    def key(row: Any) -> float:
        value = badness(row)
        return math.inf if value is None else value

    worst = sorted(rows[FIRST_RANKS:], key=key, reverse=True)[:WORST_RANKS]
    left_out = len(rows) - FIRST_RANKS - WORST_RANKS
    return rows[:FIRST_RANKS] + sorted(worst, key=lambda row: int(row["rank"])), (
        f"{_count(left_out, 'rank')} left out (result.json has all): these are the first "
        f"{FIRST_RANKS} and the worst {WORST_RANKS}"
    )


def _first(texts: Sequence[str]) -> str:
    """Join the first few texts, and say how many more there are."""
    more = len(texts) - FIRST_RANKS
    return ", ".join(texts[:FIRST_RANKS]) + (f" and {more} more" if more > 0 else "")


def _trust(result: dict[str, Any]) -> list[str]:
    start, cost = result["start"], result["harness"]
    late = _first([str(rank) for rank in start["late_ranks"]]) or "none"
    switches = _first(["?" if s is None else str(s) for s in cost["involuntary_switches"]])
    delays = _first([_time(s) for s in cost["run_delay_s"]])
    skew = f"{_time(start['skew_s'])} +-{_time(start['bound_s'])}"
    if start["skew_s"] is None:
        skew = f"unknown: {_unstarted(result)}"
    attempts = "unknown" if start["attempts"] is None else start["attempts"]
    lines = [
        "TRUST",
        *_wrapped(f"  start skew     {skew}; late ranks: {late}; attempts: {attempts}", 17),
        f"  harness        {_time(cost['cost_per_batch_s'])} per batch; one clock read "
        f"{_time(cost['clock_read_s'])}",
        *_wrapped(f"  interference   involuntary switches by rank: {switches}", 17),
        *_wrapped(f"                 waited for a processor: {delays}", 17),
    ]
    if None in cost["involuntary_switches"] or None in cost["run_delay_s"]:
        lines.append("                 ?: unknown, the rank or its kernel did not record it")
    return lines + _clocks(result) + _gpus(result)


def _unstarted(result: dict[str, Any]) -> str:
    """Say why the starts of the ranks cannot be compared."""
    missing = result["window"]["world_size"] - len(result["per_rank"])
    if missing:
        return f"{_count(missing, 'rank')} left nothing"
    return "a rank's loop did not begin, or its clock was not measured"


def _clocks(result: dict[str, Any]) -> list[str]:
    ranks = result["clock"]["ranks"]
    others = [row for row in ranks if row["exchanges"] or row["offset_s"] is None]
    shown, note = _shown(others, lambda row: row["bound_s"])
    lines = []
    for row in shown:
        offset = "unknown: nothing was exchanged with it, or its loop did not begin"
        if row["offset_s"] is not None:
            offset = f"{row['offset_s']:+.9f} s +-{_time(row['bound_s'])}"
        drift = "unknown" if row["drift_ppm"] is None else f"{row['drift_ppm']:+.3f} ppm"
        lines.append(
            f"  clock          rank {row['rank']}: offset {offset}, drift {drift}, "
            f"{row['exchanges']} exchanges"
        )
    if note:
        lines.append(f"  clock          {note}, by bound")
    if len({row["domain"] for row in ranks}) == 1:
        lines.append("  clock          all ranks read one clock")
    return lines


def _gpus(result: dict[str, Any]) -> list[str]:
    gpus = [gpu for gpu in result["window"]["gpus"] if gpu["before"] or gpu["after"]]
    finish = {row["rank"]: row["finish_s"] for row in result["per_rank"]}
    shown, note = _shown(gpus, lambda gpu: finish[gpu["rank"]])
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
            lines += _wrapped(f"  {level}  {code}: {finding['message']}")
            if finding["remedy"]:
                lines += _wrapped(f"      remedy: {finding['remedy']}")
        if len(same) > SAME_FINDINGS:
            lines.append(f"  {level}  {code}: {len(same) - SAME_FINDINGS} more in result.json")
    return [*lines, ""]


def _wrapped(line: str, indent: int = 8) -> list[str]:
    """Break a sentence into lines; words are never cut, so that a path can be copied."""
    return textwrap.wrap(
        line, 150, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" + ("" if n == 1 else "s")


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def _sig(value: float, digits: int) -> str:
    """Format with so many significant digits and thousands separators.

    >>> _sig(21345.678, 5), _sig(0.0123456, 3)
    ('21,346', '0.0123')
    """
    if value == 0 or not math.isfinite(value):
        return str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def _time(seconds: float | None) -> str:
    """Format a time with a unit that suits it.

    >>> _time(0.0000042), _time(0.0123), _time(5.0), _time(None)
    ('4.20 us', '12.3 ms', '5.00 s', '?')
    """
    if seconds is None:
        return "?"
    if seconds == 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us"), (1e9, "ns")):
        if abs(seconds) * factor >= 1 or unit == "ns":
            return f"{_sig(seconds * factor, 3)} {unit}"
    return str(seconds)


def _bytes(count: float) -> str:
    """Format a size.

    >>> _bytes(123_400_000)
    '123.4 MB'
    """
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"
