"""What the benchmarks share: pairing, tables, the conditions of the machine, JSON.

Every row is many measurements that were taken in turn with those it is compared with (A B A B ...),
so that a load which comes and goes meets all alike. A ratio is formed within each round, and the
median of these ratios is what a limit applies to. Nothing is printed that this run did not measure.

Importing this module makes ``distbench`` importable from a plain checkout.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from distbench.files import write_json  # noqa: E402  the line above makes it importable
from distbench.student import t_quantile  # noqa: E402  likewise

NAME_WIDTH = 54
Values = Sequence[float]


@dataclass(frozen=True)
class Row:
    """One line of a table.

    Attributes:
        name: what was measured.
        values: one per round, in order; empty where nothing could be measured.
        unit: of the values; "" for a ratio or a count.
        limit: largest median that the project allows; None where there is no limit.
        note: printed behind the numbers, or in their place where there are no values.
    """

    name: str
    values: Values
    unit: str = ""
    limit: float | None = None
    note: str = ""

    @property
    def held(self) -> bool | None:
        """Whether the median keeps the limit; None without a limit or without values."""
        if self.limit is None or not len(self.values):
            return None
        return median(self.values) <= self.limit


def quantile(values: Values, p: float) -> float:
    """Return an observed value by LoadGen's rule, ``sorted[int(n * p)]``; p in [0, 1)."""
    return sorted(values)[int(len(values) * p)]


def ratios(over: Values, under: Values) -> list[float]:
    """Divide round by round."""
    return [a / b for a, b in zip(over, under, strict=True)]


def mean_ratio(paired: Values, confidence: float) -> tuple[float, float, float]:
    """Return the geometric mean of ratios of several rounds, with its interval.

    Args:
        paired: a ratio per round, above 0, at least two.
        confidence: such as 0.99.

    Returns:
        The mean, and the ends of the interval by Student's t on logarithms.
    """
    logs = [math.log(each) for each in paired]
    middle = fmean(logs)
    half = t_quantile((1 + confidence) / 2, len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return math.exp(middle), math.exp(middle - half), math.exp(middle + half)


def interleave(rounds: int, **cases: Callable[[], float]) -> dict[str, list[float]]:
    """Run all cases in turn, over and over.

    Args:
        rounds: how often each case runs.
        cases: each returns one measurement.

    Returns:
        The measurements of each case, one per round.
    """
    told: dict[str, list[float]] = {name: [] for name in cases}
    for _ in range(rounds):
        for name, case in cases.items():
            told[name].append(case())
    return told


def show(value: float) -> str:
    """Write a number with four digits that count, and no exponent."""
    if value == 0 or abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-3 else f"{value:.2e}"


def load_average() -> list[float]:
    """Return the load average over 1, 5 and 15 minutes."""
    return [round(x, 2) for x in os.getloadavg()]


def processor() -> str:
    """Name the processor; "" where the kernel does not say."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return ""
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "")


class Report:
    """Prints tables as they are measured and keeps the same for a JSON file.

    Args:
        name: of the benchmark.
        options: as given on the command line.
        silent: collect only; for ranks other than 0.
    """

    def __init__(self, name: str, options: Mapping[str, Any], *, silent: bool = False) -> None:
        self.silent = silent
        self.record: dict[str, Any] = {
            "benchmark": name,
            "utc": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "options": {key: _plain(value) for key, value in options.items() if key != "json"},
            "environment": {
                "processors": len(os.sched_getaffinity(0)),
                "processor": processor(),
                "kernel": platform.release(),
                "python": platform.python_version(),
            },
            "load_average": {"begin": load_average()},
            "tables": [],
            "said": [],
        }

    def say(self, text: str) -> None:
        """Print a sentence and keep it."""
        self.record["said"].append(text)
        self._print(text)

    def table(self, title: str, rows: Sequence[Row], quantiles: Mapping[str, float] = {}) -> None:
        """Print a table and keep it with every value.

        Args:
            title: above the table.
            rows: its lines.
            quantiles: further columns, such as {"p99": 0.99}.
        """
        heads = ["n", "median", *quantiles, "min", "max"]
        self._print(f"\n{title:<{NAME_WIDTH}}" + "".join(f"{head:>11}" for head in heads))
        kept = []
        for row in rows:
            kept.append(_row_record(row, quantiles))
            if not len(row.values):
                self._print(f"  {row.name:<{NAME_WIDTH - 2}}{0:>11}  {row.note}".rstrip())
                continue
            numbers = [show(kept[-1][head]) for head in heads]
            line = f"  {row.name:<{NAME_WIDTH - 2}}" + "".join(f"{text:>11}" for text in numbers)
            line += f"  {row.unit}" if row.unit else ""
            if row.limit is not None:
                line += f"  limit {show(row.limit)}: {'held' if row.held else 'MISSED'}"
            self._print(f"{line}  {row.note}".rstrip())
        self.record["tables"].append({"title": title, "rows": kept})

    def end(self, path: str | None = None) -> None:
        """Print the conditions, and write all of it as JSON where a path is given.

        Args:
            path: of the file; it appears whole or not at all.
        """
        for module in ("numpy", "torch"):
            if module in sys.modules:
                self.record["environment"][module] = str(sys.modules[module].__version__)
        self.record["load_average"]["end"] = load_average()
        begin, end = self.record["load_average"].values()
        told = self.record["environment"]
        versions = [f"{k} {told[k]}" for k in ("python", "numpy", "torch") if k in told]
        self._print(
            f"\nload average {begin} before, {end} after, on {told['processors']} processors "
            f"({told['processor'] or 'unknown'}); {', '.join(versions)}"
        )
        if path and not self.silent:
            write_json(Path(path), self.record)

    def missed(self) -> list[str]:
        """Return the names of the rows that missed their limit."""
        rows = [row for table in self.record["tables"] for row in table["rows"]]
        return [row["name"] for row in rows if row["held"] is False]

    def _print(self, text: str) -> None:
        if not self.silent:
            print(text, flush=True)


def _row_record(row: Row, quantiles: Mapping[str, float]) -> dict[str, Any]:
    values = [_plain(value) for value in row.values]
    known = bool(values)
    return {
        "name": row.name,
        "unit": row.unit,
        "n": len(values),
        "median": median(values) if known else None,
        **{name: quantile(values, p) if known else None for name, p in quantiles.items()},
        "min": min(values) if known else None,
        "max": max(values) if known else None,
        "limit": row.limit,
        "held": row.held,
        "note": row.note,
        "values": values,
    }


def _plain(value: Any) -> Any:
    """Return a Python number in place of numpy's, and text in place of a path."""
    if hasattr(value, "item"):
        return value.item()
    return str(value) if isinstance(value, Path) else value


def parser(doc: str | None) -> argparse.ArgumentParser:
    """Return a parser that shows a script's docstring and takes --json."""
    made = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    made.add_argument("--json", metavar="FILE", help="also write what is printed to FILE")
    return made
