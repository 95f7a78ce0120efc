"""What the text report says of collectives: a line per operation and size, the fits, the way."""

from __future__ import annotations

from typing import Any

from distbench.operations import size_text
from distbench.report.units import counted, duration, rounded, table, wrapped
from distbench.transports import kinds

HEADS = ("operation", "size", "time", "+-", "algbw", "busbw", "blocks")
SPACED_HEADS = ("p50", "p90", "p99", "max", "starts", "wrong", "slowest")


def fabric_lines(result: dict[str, Any]) -> list[str]:
    """Return what stands between verdict and trust in the report of a ``collectives`` run.

    Args:
        result: the content of result.json.
    """
    window, config = result["window"], result["config"]
    hosts = window["hosts"]
    first = [
        "collectives",
        str(window["transport"][0]["backend"]),
        f"{counted(window['world_size'], 'rank')} on {counted(len(hosts), 'host')} "
        f"({', '.join(hosts[:4])}{' ...' * (len(hosts) > 4)})",
        str(config["dtype"]["value"]),
        f"{window['samples']:,} repetitions on all ranks",
    ]
    lines = ["  ".join(first), *_ways(window["transport"]), ""]
    return [*lines, *_operations(result), "", *_fits(result), ""]


def _rows(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    found = result["tables"][name]
    names = [each["name"] for each in found["columns"]]
    return [dict(zip(names, row, strict=True)) for row in found["rows"]]


def _operations(result: dict[str, Any]) -> list[str]:
    shown: list[list[str]] = [[*HEADS, *SPACED_HEADS]]
    rows = _rows(result, "collectives")
    before = ""
    for row in rows:
        name = row["operation"]
        half = "-"
        if row["time_low"] is not None:
            half = f"{(row['time_high'] - row['time_low']) / 2 / row['time']:.1%}"
        line = [name if name != before else "", size_text(row["bytes"]), duration(row["time"])]
        line += [half, _rate(row["algbw"]), _rate(row["busbw"])]
        line.append("?" if row["blocks"] is None else str(row["blocks"]))
        line += [duration(row[each]) if row[each] is not None else "-" for each in SPACED_HEADS[:4]]
        line.append(_of(row["repetitions"], row["late"]))
        line.append("?" if row["wrong"] is None else f"{row['wrong']:,}")
        named = "-"
        if row["slowest"] is not None:
            named = f"rank {row['slowest']} +{row['slowest_cost'] / row['p50']:.1%}"
        shown.append([*line, named])
        before = name
    notes = (
        "time is of an operation back to back, from one last completion on any rank to the next, "
        "mean over blocks, +- half of a 95 % interval; algbw and busbw as nccl-tests has them; p50 "
        "to max are of single operations, each from an agreed instant of its own; n of m: the "
        "others began late on a rank and are left out; slowest: a rank that surely ends last, and "
        "by how much of p50 it is behind all others"
    )
    lines = table(shown) + wrapped(notes, 0)
    bounds = [row["clock_bound"] for row in rows if row["clock_bound"]]
    if bounds:
        lines.append(f"clocks of several hosts: a completion is known to +-{duration(max(bounds))}")
    for reason in dict.fromkeys(row["reason"] for row in rows if row["reason"]):
        lines += wrapped(f"?: {reason}")
    return lines


def _of(counted_in: int | None, left_out: int | None) -> str:
    if counted_in is None or left_out is None:
        return "?"
    return f"{counted_in} of {counted_in + left_out}" if left_out else str(counted_in)


def _rate(value: float | None) -> str:
    if value is None:
        return "?"
    for factor, unit in ((1e-9, "GB/s"), (1e-6, "MB/s"), (1e-3, "kB/s")):
        if value * factor >= 1:
            return f"{rounded(value * factor, 3)} {unit}"
    return f"{rounded(value, 3)} B/s"


def _fits(result: dict[str, Any]) -> list[str]:
    rows = [
        ["time = alpha + size / bandwidth", "sizes", "alpha", "+-", "bandwidth", "R^2", "off by"]
    ]
    reasons = []
    for row in _rows(result, "fit"):
        if row["reason"]:
            reasons += wrapped(f"{row['operation']}: no fit: {row['reason']}")
        if row["r2"] is not None:
            alpha = duration(abs(row["alpha"]))
            line = [row["operation"], str(row["sizes"]), "-" * (row["alpha"] < 0) + alpha]
            line.append(duration((row["alpha_high"] - row["alpha_low"]) / 2))
            rows.append([*line, _rate(row["bandwidth"]), f"{row['r2']:.4f}", f"{row['worst']:.0%}"])
    return [*(table(rows) if len(rows) > 1 else []), *reasons]


def _ways(told: list[dict[str, Any]]) -> list[str]:
    """Return by which way the data goes, a line for ranks alike."""
    alike: dict[str, list[int]] = {}
    for each in told:
        found = each["nccl"]
        if found is None:
            text = f"{each['reason']}, interface {each['interface']}, address {each['address']}"
        elif found["ways"]:
            version = found["version"] or "of unknown version"
            text = f"NCCL {version}: via {', '.join(kinds(found['ways']))}"
            text += f", interfaces {found['interfaces']}" * bool(found["interfaces"])
        else:
            text = f"unknown: {each['reason']}"
        alike.setdefault(text, []).append(each["rank"])
    lines = []
    for text, ranks in list(alike.items())[:4]:
        shown = ", ".join(map(str, ranks[:8])) + f" and {len(ranks) - 8} more" * (len(ranks) > 8)
        lines += wrapped(f"transport        rank {shown}: {text}", 17)
    return lines
