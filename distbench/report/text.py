"""The text report: the verdict first, then figures with their bounds, then grounds for trust."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

LATENCIES = ("p50", "p90", "p95", "p97", "p99", "p99.9", "max", "mean")


def to_text(result: dict[str, Any]) -> str:
    """Lay out a result as text, lines of at most about 110 characters.

    Args:
        result: the content of result.json.
    """
    lines = [_verdict(result), "", _headline(result), ""]
    lines += [*_throughput(result), "", *_latencies(result), "", *_accuracy(result), ""]
    lines += [*_ranks(result), "", *_trust(result), "", *_findings(result)]
    lines += ["command  " + result["window"]["command"], "run      " + result["run_id"]]
    return "\n".join(lines) + "\n"


def _verdict(result: dict[str, Any]) -> str:
    verdict = result["verdict"]
    notes = [f["message"] for f in verdict["findings"] if f["code"] == "device-note"]
    line = f"MEASUREMENT {verdict['status']}; MLPerf v5.0 gates: not applied"
    return "; ".join([line, *dict.fromkeys(notes)])


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
    return [
        f"throughput       {_sig(found['value'], 5)} samples/s  (clock bound +-{bound:.2g} of it; "
        f"no interval: {found['reason']})",
        f"makespan         {window['makespan_s']:.6f} s  +-{_time(window['makespan_bound_s'])}",
    ]


def _latencies(result: dict[str, Any]) -> list[str]:
    names = {
        "latency": "completion",
        "batch_latency": "batch",
        "service": "service",
        "device": "device",
    }
    known = result["metrics"]
    rows = [["latency", "n", *LATENCIES]]
    for name, title in names.items():
        if f"{name}.p50" in known:
            n = known[f"{name}.p50"]["n"]
            values = [_time(known[f"{name}.{label}"]["value"]) for label in LATENCIES]
            rows.append([title, f"{n:,}", *values])
    if len(rows) == 1:
        return ["latency          unknown: nothing completed"]
    return [
        *_table(rows),
        "percentiles by LoadGen's rule, sorted[int(n * p)]; batch latency is "
        "completion - issue, with up to the engine's depth of groups in flight",
    ]


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
    for row in result["per_rank"]:
        more = row["metrics"]
        rows.append(
            [
                str(row["rank"]),
                row["host"],
                row["device"],
                f"{row['samples']:,}",
                "-" if more["share"] is None else f"{more['share']:.1%}",
                "-" if more["throughput"] is None else _sig(more["throughput"], 5),
                _time(row["finish_s"]),
                _time(row["idle_s"]),
                "-" if more["device_busy"] is None else f"{more['device_busy']:.0%}",
            ]
        )
    return _table(rows)


def _trust(result: dict[str, Any]) -> list[str]:
    start, cost = result["start"], result["harness"]
    late = ", ".join(str(r) for r in start["late_ranks"]) or "none"
    switches = ", ".join("?" if s is None else str(s) for s in cost["involuntary_switches"][:16])
    delays = ", ".join(_time(s) for s in cost["run_delay_s"][:16])
    lines = [
        "TRUST",
        f"  start skew     {_time(start['skew_s'])} +-{_time(start['bound_s'])}; "
        f"late ranks: {late}; attempts: {start['attempts']}",
        f"  harness        {_time(cost['cost_per_batch_s'])} per batch; one clock read "
        f"{_time(cost['clock_read_s'])}",
        f"  interference   involuntary switches by rank: {switches}; waited for a processor: "
        f"{delays}",
    ]
    for row in result["clock"]["ranks"][:64]:
        drift = "-" if row["drift_ppm"] is None else f"{row['drift_ppm']:+.3f} ppm"
        if row["exchanges"] or row["offset_s"] is None:
            offset = "unknown" if row["offset_s"] is None else f"{row['offset_s']:+.9f} s"
            lines.append(
                f"  clock          rank {row['rank']}: offset {offset} +-{_time(row['bound_s'])}, drift {drift}, {row['exchanges']} exchanges"
            )
    if len({row["domain"] for row in result["clock"]["ranks"]}) == 1:
        lines.append("  clock          all ranks read one clock")
    return lines + _gpus(result)


def _gpus(result: dict[str, Any]) -> list[str]:
    lines = []
    for gpu in result["window"]["gpus"]:
        for when in ("before", "after"):
            state = gpu[when]
            if state and state.get("available", True) and "sm_clock_hz" in state:
                clock, heat = state["sm_clock_hz"], state["temperature_c"]
                lines.append(
                    f"  GPU            rank {gpu['rank']} {when}: SM clock "
                    f"{'?' if clock is None else format(clock / 1e6, '.0f')} MHz, "
                    f"{'?' if heat is None else heat} C, throttle reasons: "
                    f"{', '.join(state['throttle_reasons'] or []) or 'none'}"
                )
    return lines


def _findings(result: dict[str, Any]) -> list[str]:
    found = [f for f in result["verdict"]["findings"] if f["code"] != "device-note"]
    lines = ["findings: none"] if not found else ["findings"]
    for finding in found:
        lines.append(f"  {finding['level']}  {finding['code']}: {finding['message']}")
        if finding["remedy"]:
            lines.append(f"      remedy: {finding['remedy']}")
    return [*lines, ""]


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
