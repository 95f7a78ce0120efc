"""What the text report says of the user's bounds, and of the search for the peak under them."""

from __future__ import annotations

from typing import Any

from distbench.report.units import duration, rounded, table


def peak_lines(result: dict[str, Any]) -> list[str]:
    """Return the line of the peak that was searched for; nothing without a search."""
    found = result["metrics"].get("peak")
    if found is None:
        return []
    if found["value"] is None:
        return [f"peak             unknown: {found['reason']}"]
    window = result["window"]["search"]["rests"]
    return [
        f"peak             {rounded(found['value'], 4)} queries/s kept the bounds in window "
        f"{window}, on which all figures below rest"
    ]


def bound_lines(result: dict[str, Any]) -> list[str]:
    """Return a line for each bound, with how many queries were above it; nothing without bounds."""
    lines = []
    for name, limit, queries, over, allowed in _rows(result, "bounds"):
        most = "too few queries for early stopping"
        if allowed is not None:
            most = f"early stopping allows {allowed:,}"
        lines.append(
            f"bound            {name} at most {duration(limit)}: {over:,} of {queries:,} queries "
            f"above it, {most}"
        )
    return lines


def search_lines(result: dict[str, Any]) -> list[str]:
    """Return the trail of a search, a line for each of its windows; nothing without one."""
    found = _rows(result, "search")
    if not found:
        return []
    rows = [["window", "", "queries/s", "for", "bound", "queries", "above", "value", "outcome"]]
    for window, kind, rate, seconds, bound, queries, over, value, outcome, _ in found:
        rows.append(
            [
                window,
                kind,
                rounded(rate, 4),
                duration(seconds),
                bound,
                f"{queries:,}",
                f"{over:,}",
                duration(value),
                outcome,
            ]
        )
    head, *body = table(rows)
    shown = [f"{line}  {row[-1]}" for line, row in zip(body, found, strict=True)]
    return [head, *shown, "each window has a report of its own under windows/"]


def _rows(result: dict[str, Any], name: str) -> list[list[Any]]:
    return list(result["tables"].get(name, {}).get("rows", []))


FLAGS = {
    "min_duration_met": "min_duration, as LoadGen says",
    "settings": "LoadGen ran with the round's seeds and the planned settings",
    "loadgen-valid": "LoadGen's own word, VALID",
}
"""Gates that are a yes or a no."""


def gate_lines(result: dict[str, Any]) -> list[str]:
    """Return the gates of the rules, a line each; nothing without rules."""
    rules, lines = result["verdict"]["rules"], []
    for gate in rules["gates"]:
        word = "passed" if gate["passed"] else "FAILED"
        more = f"; {gate['needed']:,} more are needed" if gate["needed"] else ""
        factor, unit = (
            (1e3, "ms") if gate["unit"] == "s" and gate["limit"] < 1 else (1, gate["unit"])
        )
        if gate["name"] in FLAGS:
            lines.append(f"gate             {FLAGS[gate['name']]}: {word}")
            continue
        unit = "" if unit == "1" else f" {unit}"
        value, limit = (f"{gate[each] * factor:,.10g}{unit}" for each in ("value", "limit"))
        least = gate["name"].startswith(("min_", "early_stopping", "accuracy"))
        wanted = f"needs {limit} or more" if least else f"at most {limit}"
        lines.append(f"gate             {gate['name']}: {value}, {wanted}: {word}{more}")
    if lines and "window" in rules:
        lines.insert(0, f"gates of window {rules['window']}, which of all windows fares worst")
    return [*lines, ""] if lines else []
