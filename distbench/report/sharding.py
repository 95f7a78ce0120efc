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
    heads = ("layouts", "replicas", "samples/s", "95 % from", "to", "tokens/s", "foreseen")
    shown = [[*heads, "tpot p50", "p99", "bubble", "memory peak", "weights", "logits off"]]
    for row in rows:
        shown.append(
            [
                row["layout"],
                str(row["replicas"]),
                *(_rate(row[name]) for name in RATES),
                *("-" if row[name] is None else duration(row[name]) for name in TIMES),
                "-" if row["bubble"] is None else f"{row['bubble']:.1%}",
                "?" if row["memory_peak"] is None else size(row["memory_peak"]),
                "-" if row["weights_share"] is None else f"{row['weights_share']:.1%}",
                "-" if row["logit_error"] is None else f"{row['logit_error']:.1e}",
            ]
        )
    return [
        *table(shown),
        *_winner(rows),
        *_reduces(result),
        "each window has a report of its own under windows/",
    ]


def _reduces(result: dict[str, Any]) -> list[str]:
    """Return a line for each layout with all-reduces: what one takes, and the longest of them."""
    told: dict[str, list[tuple[float, int, str]]] = {}
    for layout, layer, kind, _, _, time_s in result["tables"]["all_reduces"]["rows"]:
        told.setdefault(layout, []).append((time_s, layer, kind))
    lines = []
    for layout, every in told.items():
        mean, (most, layer, kind) = sum(row[0] for row in every) / len(every), max(every)
        lines.append(
            f"  {layout}: an all-reduce takes {duration(mean)}, the longest {duration(most)} after "
            f"the {kind} of layer {layer}, timed apart from the windows"
        )
    return lines


RATES = ("throughput", "ci_low", "ci_high", "tokens", "foreseen")
TIMES = ("tpot_p50", "tpot_p99")


def _rate(value: float | None) -> str:
    return "-" if value is None else rounded(value, 5)


def _winner(rows: list[dict[str, Any]]) -> list[str]:
    """Say how the first layout fares against the others, and what holds each of them."""
    first, lines = rows[0], []
    for row in rows[1:]:
        if row["ratio"] is None:
            lines.append(f"{first['layout']} against {row['layout']}: unknown")
            continue
        known = "no interval of one round"
        word = "and"
        if row["ratio_low"] is not None:
            known = f"95 % {row['ratio_low']:.4g} to {row['ratio_high']:.4g}"
            word = "wins over" if row["ratio_low"] > 1 else "loses to"
            if row["ratio_low"] <= 1 <= row["ratio_high"]:
                word = "is not told apart from"
        expected = ""
        if first["foreseen"] and row["foreseen"]:
            expected = f", foreseen {first['foreseen'] / row['foreseen']:.4g}"
        lines.append(
            f"{first['layout']} {word} {row['layout']}: {row['ratio']:.4g} times its throughput "
            f"({known}{expected})"
        )
    lines += [
        f"  {row['layout']} is foreseen to be held by {row['held_by']}"
        for row in rows
        if row["held_by"]
    ]
    return lines
