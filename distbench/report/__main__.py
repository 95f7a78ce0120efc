"""Report a result directory in other formats, recomputed from its rank folders.

    python -m distbench.report DIR --format md
    python -m distbench.report DIR --format text,json,csv,md --output-dir OUT

One format goes to stdout; several go to files report.txt, report.json, report.csv (a row per
metric), report-ranks.csv (a row per rank), report-TABLE.csv (each of the result's tables) and
report.md in --output-dir. To stdout, csv is the metrics. Needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from distbench import files
from distbench.cli import Option, nearest, parse, positionals, read_words, run_command
from distbench.compare import load_result
from distbench.errors import EXIT_OK, UsageError
from distbench.report.tables import metrics_csv, ranks_csv, table_csv, to_markdown
from distbench.report.text import to_text

FORMATS: dict[str, dict[str, Callable[[dict[str, Any]], str]]] = {
    "text": {"report.txt": to_text},
    "json": {"report.json": lambda result: files.to_json(result).decode()},
    "csv": {"report.csv": metrics_csv, "report-ranks.csv": ranks_csv},
    "md": {"report.md": to_markdown},
}
"""Of each format, the files and what writes them; the first is what goes to stdout."""


def read_formats(text: str) -> tuple[str, ...]:
    """Read formats separated by commas.

    Raises:
        UsageError: none is given, or one is unknown.
    """
    words = tuple(dict.fromkeys(read_words(text)))
    for word in words or ("",):
        if word not in FORMATS:
            listed = ", ".join(FORMATS)
            raise UsageError(f"{word!r} is not one of {listed}{nearest(word, [*FORMATS])}")
    return words


OPTIONS = (
    Option("format", "text", read_formats, "text, json, csv, md", "FORMAT[,FORMAT]"),
    Option("output-dir", None, Path, "write files there, in place of stdout", "DIR"),
)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    rest, lists = positionals(argv, OPTIONS)
    given = parse("distbench.report", __doc__ or "", OPTIONS, rest).values
    if len(lists) > 1 or len(lists[0]) != 1:
        raise UsageError("give one result directory; of several, distbench.compare tells more")
    folder: Path | None = given["output_dir"]
    if folder is None and len(given["format"]) > 1:
        raise UsageError(
            f"{len(given['format'])} formats do not go to stdout together: give --output-dir"
        )
    result = load_result(lists[0][0])
    made = {name: write for word in given["format"] for name, write in FORMATS[word].items()}
    if "csv" in given["format"] and folder is not None:
        made |= {f"report-{name}.csv": partial(table_csv, name=name) for name in result["tables"]}
    if folder is None:
        sys.stdout.write(next(iter(made.values()))(result))
        return EXIT_OK
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, write in made.items():
            files.write_bytes(folder / name, write(result).encode())
    except OSError as error:
        raise UsageError(f"{folder} cannot be written: {error.strerror or error}") from error
    sys.stdout.write("".join(f"{folder / name}\n" for name in made))
    return EXIT_OK


if __name__ == "__main__":
    run_command(main)
