"""What the text report says of a model over several ranks: each rank's work, waits and links."""

from __future__ import annotations

from typing import Any

from distbench.report.units import duration, rounded, shown_rows, size, table


def stage_lines(result: dict[str, Any]) -> list[str]:
    """Return the table of the ranks; nothing where no model was cut."""
    found = result["tables"].get("stages")
    if found is None:
        return []
    names = [each["name"] for each in found["columns"]]
    rows, note = shown_rows(found["rows"], lambda row: -(row[names.index("busy")] or 0.0))
    shown = [
        [*("stages", "host", "replica", "stage", "part", "steps", "rows", "work", "wait", "rest"),
         *("busy", "sent", "weights", "cache", "memory peak")]
    ]  # fmt: skip
    for each in rows:
        row = dict(zip(names, each, strict=True))
        shown.append(
            [
                f"rank {row['rank']}",
                row["host"],
                str(row["replica"]),
                str(row["stage"]),
                str(row["part"]),
                "?" if row["steps"] is None else f"{row['steps']:,}",
                "-" if row["rows"] is None else f"{row['rows']:.3g}",
                *("?" if row[name] is None else duration(row[name]) for name in TIMES),
                "?" if row["busy"] is None else f"{row['busy']:.1%}",
                "?" if row["send_rate"] is None else f"{size(row['send_rate'])}/s",
                size(row["weights"])
                + (f" ({row['weights_share']:.1%})" if row["weights_share"] else ""),
                size(row["cache"]),
                "?" if row["memory_peak"] is None else size(row["memory_peak"]),
            ]
        )
    title = list[str]()
    told = result["window"].get("sharding")
    if told and told["cell"] is None:
        title = [f"the last window of {told['plan']['layouts'][0]}; bubble over all of its windows"]
    return [*title, *table(shown), *[note] * bool(note), *_figures(result["metrics"])]


TIMES = ("work", "wait", "rest")


def _figures(metrics: dict[str, Any]) -> list[str]:
    bubble, ideal, imbalance = (metrics.get(n) for n in ("bubble", "bubble.ideal", "imbalance"))
    if bubble is None or ideal is None:
        return []
    if bubble["value"] is None:
        return [f"bubble unknown: {bubble['reason']}"]
    line = f"bubble {bubble['value']:.1%}, of equal stages at best {ideal['value']:.1%}"
    if imbalance is not None and imbalance["value"] is not None:
        line += f"; imbalance {rounded(imbalance['value'], 4)}"
    return [line]
