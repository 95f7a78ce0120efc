"""A result as tables: csv for pandas and spreadsheets, Markdown for an issue or a page.

Hostnames, errors of models and the like are written by others: in csv no cell may be taken for a
formula, in Markdown none for markup, HTML or a mention of a person.
"""

from __future__ import annotations

import csv
import io
import json
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

from distbench.errors import where
from distbench.report.text import to_text

FORMULA = ("=", "+", "-", "@", "\t", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""What begins a formula in some spreadsheet, full-width signs included.

Line breaks, which OWASP's "CSV Injection" lists as well, do not get into a cell."""
METRIC_FIELDS = (
    *("value", "unit", "ci_low", "ci_high", "ci_method", "n", "n_eff", "definition", "reason"),
)
RANK_FIELDS = (
    *("rank", "host", "device", "replica", "samples", "failed", "pending", "finish_s", "idle_s"),
)
UNITS = {
    "throughput": "throughput_qps",
    "memory.peak": "memory_peak_bytes",
    "memory.total": "memory_total_bytes",
}
"""Names of a rank's metrics as columns, which have no unit beside them."""
FIRST_RANKS, WORST_RANKS = 60, 4
"""Ranks that a Markdown table shows: the first ones, and those of the others that ended last."""
SECONDS = ((1.0, "s"), (1e3, "ms"), (1e6, "us"), (1e9, "ns"))
BYTES = ((1e-9, "GB"), (1e-6, "MB"), (1e-3, "kB"), (1.0, "B"))


def metrics_csv(result: dict[str, Any]) -> str:
    """Return the metrics as csv: a row each, SI units, all digits, an empty cell for unknown.

    Args:
        result: the content of result.json.
    """
    rows = [
        [name, *(found[field] for field in METRIC_FIELDS)]
        for name, found in result["metrics"].items()
    ]
    return _csv(["name", *METRIC_FIELDS], rows)


def ranks_csv(result: dict[str, Any]) -> str:
    """Return what is known of each rank as csv: a row each, however many there are.

    Args:
        result: the content of result.json.
    """
    rows = _rank_rows(result)
    names = list(dict.fromkeys(name for row in rows for name in row))
    return _csv(names, [[row.get(name) for name in names] for row in rows])


def table_csv(result: dict[str, Any], name: str) -> str:
    """Return one of the result's own tables as csv, such as that of layouts.

    Args:
        result: the content of result.json.
        name: of the table.
    """
    found = result["tables"][name]
    heads = [f"{each['name']} {each['unit']}".strip() for each in found["columns"]]
    return _csv(heads, found["rows"])


def _column(name: str) -> str:
    """Return the column of a rank's metric, its unit in the name."""
    return f"{name}_s" if name.startswith("latency.") else UNITS.get(name, name)


def _rank_rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return every rank's figures by column: its share, its own metrics, its clock and start."""
    clocks = {row["rank"]: row for row in result["clock"]["ranks"]}
    every, late = result["per_rank"], result["start"]["lateness_s"]
    if len(late) != len(every):  # of several windows, from some of which a rank is missing
        late = [None] * len(every)
    rows = []
    for row, late_s in zip(every, late, strict=True):
        clock = clocks.get(row["rank"], {})
        rows.append(
            {
                **{name: row[name] for name in RANK_FIELDS},
                **{_column(name): value for name, value in row["metrics"].items()},
                "start_late_s": late_s,
                **{f"clock_{n}": clock.get(n) for n in ("offset_s", "bound_s", "drift_ppm")},
            }
        )
    return rows


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(head)
    writer.writerows([_cell(value) for value in row] for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    """Return a value for a csv cell; what a spreadsheet would compute gets a quote before it."""
    if not isinstance(value, str):
        return "" if value is None else value
    # csv quotes no lone carriage return, which begins a row to a spreadsheet.
    text = " ".join(value.encode("utf-8", "backslashreplace").decode().splitlines())
    return f"'{text}" if text.lstrip(" ").startswith(FORMULA) else text


def to_markdown(result: dict[str, Any]) -> str:
    """Lay out a result as Markdown for an issue: verdict, findings, metrics, ranks, environment.

    Args:
        result: the content of result.json.
    """
    window = result["window"]
    hosts, more = window["hosts"][:4], len(window["hosts"]) - 4
    lines = [
        f"**{_plain(to_text(result).split(chr(10), 1)[0])}**",
        "",
        f"{'distributed ' * bool(window.get('sharding'))}{_plain(result['scenario'])}, "
        f"model {_plain(window['model']['name'])}, world size "
        f"{window['world_size']} on {', '.join(map(_plain, hosts))}"
        f"{f' and {more} more' if more > 0 else ''}, {window['samples']:,} samples",
        "",
        *_findings(result),
        *_metrics(result),
        *_windows(result),
        *_tables(result),
        *_ranks(result),
        *_environment(result),
        f"Command: {_code(window['command'])}",
        "",
        f"Run: {_code(result['run_id'])}",
    ]
    return ("\n".join(lines) + "\n").encode("utf-8", "backslashreplace").decode()


def _findings(result: dict[str, Any]) -> list[str]:
    lines = ["### Findings", ""]
    for found in result["verdict"]["findings"]:
        remedy = f". Remedy: {_plain(found['remedy'])}" if found["remedy"] else ""
        lines.append(
            f"- **{found['level']}** {_code(found['code'])}: {_plain(found['message'])}{remedy}"
        )
    return [*lines, *["None."] * (len(lines) == 2), ""]


def _metrics(result: dict[str, Any]) -> list[str]:
    rows = []
    reasons: dict[str, int] = {}
    for name, found in result["metrics"].items():
        unit, low, high = found["unit"], found["ci_low"], found["ci_high"]
        none = ""
        if found["value"] is None or low is None:
            none = f"none ({reasons.setdefault(found['reason'], len(reasons) + 1)})"
        value = none if found["value"] is None else _value(found["value"], unit)
        interval = none if low is None else f"{_value(low, unit)} to {_value(high, unit)}"
        counts = ["" if found[n] is None else f"{found[n]:,.6g}" for n in ("n", "n_eff")]
        rows.append([name, value, interval, *counts, found["ci_method"]])
    lines = _table(("metric", "value", "95 % interval", "n", "n_eff", "method"), rows)
    lines += [""] * bool(reasons)
    lines += [f"- ({number}) {_plain(reason)}" for reason, number in reasons.items()]
    return ["### Metrics", "", *lines, ""]


def _windows(result: dict[str, Any]) -> list[str]:
    rows = result["windows"]
    if not rows:
        return []
    names = ("run_id", "status", "samples", "makespan_s", "throughput")
    shown = [
        [_number(row.get(name)) for name in names] for row in rows[: FIRST_RANKS + WORST_RANKS]
    ]
    more = len(rows) - len(shown)
    return ["### Windows", "", *_table(names, shown), *[f"and {more} more"] * (more > 0), ""]


def _tables(result: dict[str, Any]) -> list[str]:
    """Return the result's own tables, such as the trail of a peak search."""
    lines = []
    for name, found in result["tables"].items():
        heads = [
            each["name"] + f" ({each['unit']})" * bool(each["unit"]) for each in found["columns"]
        ]
        rows = [[_number(value) for value in row] for row in found["rows"]]
        lines += [f"### Table: {name}", "", *_table(heads, rows), ""]
    return lines


def _ranks(result: dict[str, Any]) -> list[str]:
    rows = _rank_rows(result)
    names = list(dict.fromkeys(name for row in rows for name in row))
    # What no rank has would only widen the table.
    names = [name for name in names if any(row.get(name) is not None for row in rows)]
    kept, more = rows, len(rows) - FIRST_RANKS - WORST_RANKS
    if more > 0:
        later = sorted(rows[FIRST_RANKS:], key=_end_s)[-WORST_RANKS:]
        kept = rows[:FIRST_RANKS] + sorted(later, key=lambda row: int(row["rank"]))
    lines = _table(names, [[_number(row.get(name)) for name in names] for row in kept])
    if more > 0:
        lines += [
            "",
            f"and {more} more: these are the first {FIRST_RANKS} and, of the others, the "
            f"{WORST_RANKS} that ended last",
        ]
    return ["### Ranks", "", *lines, ""]


def _end_s(row: dict[str, Any]) -> float:
    """Return when a rank ended; one that did not, ended last."""
    return math.inf if row["finish_s"] is None else float(row["finish_s"])


def _environment(result: dict[str, Any]) -> list[str]:
    common, ranks = result["environment"]["common"], result["environment"]["ranks"]
    reasons = common.get("reasons", {})
    rows = [
        [
            name,
            f"unknown: {reasons.get(name, 'see each rank')}" if value is None else _number(value),
        ]
        for name, value in common.items()
        if name != "reasons"
    ]
    lines = ["### Environment", "", "<details><summary>what all ranks have in common</summary>", ""]
    lines += [*_table(("field", "value"), rows), "", "</details>", ""]
    own = [(row, rest) for row, rest in zip(result["per_rank"], ranks, strict=False) if rest]
    shown = own[: FIRST_RANKS + WORST_RANKS]
    for row, rest in shown:
        values = "; ".join(f"{name} {_number(value)}" for name, value in rest.items())
        lines.append(f"- {_plain(where(row['rank'], row['host']))}: {_plain(values)}")
    more = len(own) - len(shown)
    return [*lines, *[f"- and {more} more"] * (more > 0), *[""] * bool(own)]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    lines = [[*map(_plain, row)] for row in (head, *rows)]
    lines.insert(1, ["---"] * len(head))
    return [f"| {' | '.join(line)} |" for line in lines]


def _plain(text: str) -> str:
    """Return a text of which Markdown leaves every character as it is, on one line."""
    text = re.sub(r"([\\|`*\[\]~]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9]))", r"\\\1", text)
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("@", "&#64;")):
        text = text.replace(sign, entity)
    return " ".join(text.split())


def _code(text: str) -> str:
    """Return a text as code; its fence is longer than any run of backticks in it."""
    fence = "`" * (max(map(len, re.findall("`+", text)), default=0) + 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{' '.join(text.split())}{space}{fence}"


def _value(value: float, unit: str) -> str:
    """Format a figure with its unit, six significant digits, times and sizes in one that suits.

    >>> _value(0.0123456789, "s"), _value(21345.678, "samples/s"), _value(0.97, "1")
    ('12.3457 ms', '21,345.7 samples/s', '0.97')
    """
    for factor, name in {"s": SECONDS, "B": BYTES}.get(unit, ()):
        if abs(value) * factor >= 1:
            return f"{value * factor:,.6g} {name}"
    return f"{value:,.6g}" + ("" if unit == "1" else f" {unit}")


def _number(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    # Counts, bytes and seconds: six digits tell a reader enough, csv has them all.
    return f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
