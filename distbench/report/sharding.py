"""What the text report says of layouts of one model: each one's figures, and which one wins."""

from __future__ import annotations

from typing import Any

from distbench.report.units import duration, rounded, size, table


def layout_lines(result: dict[str, Any]) -> list[str]:
    """Return the table of the layouts; nothing without one."""
    found = result["tables"].get("layouts")
    if found is None:
        return []
    names = [each["name"] for each in found["columns"]]
    rows = [dict(zip(names, row, strict=True)) for row in found["rows"]]
    opened = any(row["latency_p99"] is not None for row in rows)
    shown = [["layouts", "replicas", *(OPEN if opened else DRAINED).values()]]
    shown[0] += ["tpot p50", "p99", "bubble", "held", "weights", "logits off", "same tokens"]
    for row in rows:
        shown.append(
            [
                row["layout"],
                str(row["replicas"]),
                *(_figure(name, row[name]) for name in (OPEN if opened else DRAINED)),
                *(_figure(name, row[name]) for name in ("tpot_p50", "tpot_p99")),
                *(_share(row[name]) for name in ("bubble",)),
                "?" if row["held"] is None else size(row["held"]),
                _share(row["weights_share"]),
                "-" if row["logit_error"] is None else f"{row['logit_error']:.1e}",
                _share(row["same_tokens"]),
            ]
        )
    return [
        *table(_told(shown)),
        *_winner(rows, opened),
        *_reduces(result),
        "each window has a report of its own under windows/",
    ]


DRAINED = {
    "throughput": "samples/s",
    "ci_low": "95 % from",
    "ci_high": "to",
    "tokens": "tokens/s",
    "foreseen": "foreseen/s",
}
OPEN = {
    "throughput": "samples/s",
    "latency_p50": "latency p50",
    "latency_p99": "p99",
    "ttft_p50": "ttft p50",
}
"""Columns of Offline, and of Server."""


def _told(rows: list[list[str]]) -> list[list[str]]:
    """Leave out columns of which nothing is known on any row."""
    kept = [place for place in range(len(rows[0])) if any(r[place] != "-" for r in rows[1:])]
    return [[row[place] for place in kept] for row in rows]


def _figure(name: str, value: float | None) -> str:
    if value is None:
        return "-"
    times = name.startswith(("latency", "ttft", "tpot"))
    return duration(value) if times else rounded(value, 5)


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _reduces(result: dict[str, Any]) -> list[str]:
    """Return a line for each layout with all-reduces and each size: what one takes."""
    told: dict[tuple[str, int], list[tuple[float, int, str]]] = {}
    for layout, layer, kind, size_bytes, _, time_s in result["tables"]["all_reduces"]["rows"]:
        told.setdefault((layout, size_bytes), []).append((time_s, layer, kind))
    lines = []
    for (layout, size_bytes), every in told.items():
        mean, (most, layer, kind) = sum(row[0] for row in every) / len(every), max(every)
        lines.append(
            f"  {layout}: an all-reduce of {size_bytes:,} B takes {duration(mean)}, the longest "
            f"{duration(most)} after the {kind} of layer {layer}, timed apart from the windows"
        )
    return lines


def _winner(rows: list[dict[str, Any]], opened: bool) -> list[str]:
    """Say how the first layout fares against the others, and what holds each of them.

    Args:
        rows: of the layouts.
        opened: whether they are compared by a latency, of which less is more.
    """
    first, lines = rows[0], []
    what = "p99 of latency" if opened else "throughput"
    for row in rows[1:]:
        if row["ratio"] is None or row["ratio_low"] is None:
            lines.append(f"{first['layout']} against {row['layout']}: unknown")
            continue
        low, high = row["ratio_low"], row["ratio_high"]
        word = "is not told apart from"
        if not low <= 1 <= high:
            word = "wins over" if (low > 1) != opened else "loses to"
        expected = ""
        if first["foreseen"] and row["foreseen"]:
            expected = f", foreseen {first['foreseen'] / row['foreseen']:.4g}"
        lines.append(
            f"{first['layout']} {word} {row['layout']}: {row['ratio']:.4g} times its {what} "
            f"(95 % {low:.4g} to {high:.4g}{expected})"
            + "; more --rounds may tell"
            * (low <= 1 <= high)
        )
    lines += [
        f"  {row['layout']} is foreseen to be held by {row['held_by']}"
        for row in rows
        if row["held_by"]
    ]
    return lines
