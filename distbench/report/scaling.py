"""What the text report says of scaling: efficiency, each number of ranks, each rank alone."""

from __future__ import annotations

from typing import Any

from distbench.report.units import duration, rounded, shown_rows, table
from distbench.scaling import LOSSES


def efficiency_lines(result: dict[str, Any]) -> list[str]:
    """Return the line of the efficiency; nothing where none was measured."""
    found = result["metrics"].get("efficiency")
    if found is None:
        return []
    if found["value"] is None:
        return [f"efficiency       unknown: {found['reason']}"]
    known = found["reason"]
    if found["ci_low"] is not None:
        known = f"95 % {found['ci_low']:.4f} to {found['ci_high']:.4f}, {found['ci_method']}"
    return [f"efficiency       {found['value']:.4f}  ({known})", f"  {found['definition']}"]


def scaling_lines(result: dict[str, Any]) -> list[str]:
    """Return the tables of a scaling run; nothing without one."""
    found = result["tables"].get("scaling")
    if found is None:
        return []
    names = [each["name"] for each in found["columns"]]
    rows = [dict(zip(names, row, strict=True)) for row in found["rows"]]
    kind = result["window"]["scaling"]["plan"]["kind"]
    heads = ["scaling", "samples/s", "alone", "efficiency", "95 % from", "to", "speed-up"]
    split = any(row["imbalance"] is not None for row in rows)
    heads += list(LOSSES) if split else ["p99"]
    shown = [heads]
    for row in rows:
        line = [f"{row['ranks']} rank{'s' * (row['ranks'] > 1)}, {kind}"]
        line += [_rate(row["throughput"]), _rate(row["alone"])]
        line += [_share(row[each]) for each in ("efficiency", "ci_low", "ci_high")]
        line.append("?" if row["speedup"] is None else f"{row['speedup']:.3f}")
        parts = [_part(row[each], row[f"{each}_half"]) for each in LOSSES]
        line += parts if split else [duration(row["latency_p99"])]
        shown.append(line)
    lines = table(shown)
    if split:
        lines.append(
            "the parts of the loss sum to 1 - efficiency; +- is half of a 95 % interval, below "
            "zero is a gain"
        )
    return [*lines, "", *_alone(result), "each window has a report of its own under windows/"]


def _alone(result: dict[str, Any]) -> list[str]:
    rows, note = shown_rows(result["tables"]["alone"]["rows"], lambda row: -(row[2] or 0.0))
    shown = [["alone", "host", "samples/s", "95 % from", "to"]]
    for rank, host, rate, low, high, _ in rows:
        shown.append([f"rank {rank}", host, _rate(rate), _rate(low), _rate(high)])
    return [*table(shown), *[f"{note}, by samples/s"] * bool(note)]


def _rate(value: float | None) -> str:
    return "?" if value is None else rounded(value, 5)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _part(value: float | None, half: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.1%}" + (f" +-{half:.1%}" if half is not None else "")
