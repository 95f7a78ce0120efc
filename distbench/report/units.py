"""How the text report writes numbers, times, sizes, tables and long lines."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Sequence
from typing import Any

FIRST_RANKS, WORST_RANKS = 16, 4
"""Ranks that a table shows: the first ones, and the worst of the others; result.json has all."""


def wrapped(line: str, indent: int = 8) -> list[str]:
    """Break a sentence into lines; words are never cut, so that a path can be copied."""
    return textwrap.wrap(
        line, 150, subsequent_indent=" " * indent, break_long_words=False, break_on_hyphens=False
    )


def counted(n: int, noun: str) -> str:
    """Write a number with its noun."""
    return f"{n} {noun}" + ("" if n == 1 else "s")


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Align columns: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def rounded(value: float, digits: int) -> str:
    """Format with so many significant digits and thousands separators.

    >>> rounded(21345.678, 5), rounded(0.0123456, 3)
    ('21,346', '0.0123')
    """
    if value == 0 or not math.isfinite(value):
        return str(value)
    decimals = max(0, digits - 1 - math.floor(math.log10(abs(value))))
    return f"{value:,.{decimals}f}"


def duration(seconds: float | None) -> str:
    """Format a time with a unit that suits it.

    >>> duration(0.0000042), duration(0.0123), duration(5.0), duration(None)
    ('4.20 us', '12.3 ms', '5.00 s', '?')
    """
    if seconds is None:
        return "?"
    if seconds == 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us"), (1e9, "ns")):
        if abs(seconds) * factor >= 1 or unit == "ns":
            return f"{rounded(seconds * factor, 3)} {unit}"
    return str(seconds)


def size(count: float) -> str:
    """Format a size.

    >>> size(123_400_000), size(54_300), size(9_000)
    ('123.4 MB', '54.3 kB', '9.0 kB')
    """
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{count / 1e3:.1f} kB"


def duration_or_dash(seconds: float | None) -> str:
    """Format a time; a dash for none."""
    return "-" if seconds is None else duration(seconds)


def whole_or_dash(n: float | None) -> str:
    """Format a count; a dash for none."""
    return "-" if n is None else f"{n:,.0f}"


def first_of(texts: Sequence[str]) -> str:
    """Join the first few texts, and say how many more there are."""
    more = len(texts) - FIRST_RANKS
    return ", ".join(texts[:FIRST_RANKS]) + (f" and {more} more" if more > 0 else "")


def shown_rows(rows: list[Any], badness: Callable[[Any], float | None]) -> tuple[list[Any], str]:
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
        f"{counted(left_out, 'rank')} left out (result.json has all): these are the first "
        f"{FIRST_RANKS} and the worst {WORST_RANKS}"
    )
