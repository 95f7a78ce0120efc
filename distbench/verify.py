"""Recompute every figure of a result directory from its rank folders, and check every hash.

    python -m distbench.verify results/20260101T000000Z-offline-0123abcd

Exit status: 0 good, 1 mismatch, 6 incomplete (a rank or a file is missing). Needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distbench import files
from distbench.cli import run_command
from distbench.errors import EXIT_CRASH, EXIT_INCOMPLETE, EXIT_OK, UsageError
from distbench.report.text import to_text
from distbench.run import load_run

SHOWN = 40


def differences(stored: Any, computed: Any, place: str = "") -> list[str]:
    """Compare two JSON values.

    Args:
        stored: from result.json.
        computed: from the rank folders.
        place: path of both, for the message.

    Returns:
        One line for each place where they differ.
    """
    if isinstance(stored, dict) and isinstance(computed, dict):
        lines = []
        for key in dict.fromkeys([*stored, *computed]):
            where = f"{place}.{key}" if place else str(key)
            if key not in stored or key not in computed:
                lines.append(
                    f"{where}: only in {'result.json' if key in stored else 'the folders'}"
                )
            else:
                lines += differences(stored[key], computed[key], where)
        return lines
    if isinstance(stored, list) and isinstance(computed, list) and len(stored) == len(computed):
        return [
            line
            for i, (a, b) in enumerate(zip(stored, computed, strict=True))
            for line in differences(a, b, f"{place}[{i}]")
        ]
    if type(stored) is type(computed) and stored == computed:
        return []
    if isinstance(stored, int | float) and isinstance(computed, int | float) and stored == computed:
        return []
    return [f"{place}: result.json says {stored!r}, the rank folders give {computed!r}"]


def check_hashes(folder: Path) -> tuple[list[str], list[str]]:
    """Check manifest.sha256 and each rank's done.json.

    Args:
        folder: a result directory.

    Returns:
        What differs, and what is missing, a line each.
    """
    wrong: list[str] = []
    missing: list[str] = []
    listed = _listed(folder)
    for name, digest in listed.items():
        path = folder / name
        if not path.is_file():
            missing.append(f"{name}: missing")
        elif files.sha256_file(path) != digest:
            wrong.append(f"{name}: its SHA-256 is not the one that was recorded")
    present = {
        str(p.relative_to(folder))
        for p in folder.rglob("*")
        if p.is_file() and not p.name.startswith(".") and p.name != "manifest.sha256"
    }
    wrong += [f"{name}: not in manifest.sha256" for name in sorted(present - set(listed))]
    return wrong, missing


def _listed(folder: Path) -> dict[str, str]:
    """Return every recorded hash by path; the rank folders' own records come on top."""
    listed: dict[str, str] = {}
    try:
        lines = (folder / "manifest.sha256").read_text().splitlines()
    except OSError as error:
        raise UsageError(
            f"{folder}/manifest.sha256 cannot be read ({error.strerror}): give a result directory; "
            "for rank folders without one use `python -m distbench.salvage`"
        ) from error
    for line in lines:
        digest, _, name = line.partition("  ")
        listed[name] = digest
    for done in sorted(folder.glob("ranks/*/done.json")):
        for name, digest in files.read_json(done)["files"].items():
            listed.setdefault(str((done.parent / name).relative_to(folder)), digest)
    return listed


def verify(folder: Path) -> tuple[int, list[str]]:
    """Verify one result directory.

    Args:
        folder: a result directory.

    Returns:
        The exit status, and what was found, a line each.

    Raises:
        UsageError: it is no result directory.
    """
    wrong, missing = check_hashes(folder)
    try:
        stored = files.read_json(folder / "result.json")
        run = load_run(folder)
        computed = run.result()
        wrong += [f"result.json {line}" for line in differences(stored, computed)]
        if (folder / "report.txt").read_text() != to_text(stored):
            wrong.append("report.txt is not the report of result.json")
        missing += [f"ranks/{rank:05d}: missing" for rank in run.missing]
        missing += [f"ranks/{r.rank:05d}: {r.problem}" for r in run.present if r.problem]
        incomplete = computed["verdict"]["status"] == "INCOMPLETE"
    except UsageError as error:
        wrong.append(str(error))
        incomplete = False
    except OSError as error:
        missing.append(f"report.txt: {error.strerror}")
        incomplete = False
    if wrong:
        return EXIT_CRASH, wrong + missing
    if missing or incomplete:
        return EXIT_INCOMPLETE, missing or ["the run is INCOMPLETE, and its figures agree"]
    return EXIT_OK, []


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    if not argv or "--help" in argv or "-h" in argv:
        sys.stdout.write((__doc__ or "") + "\n")
        return EXIT_OK if argv else 2
    worst = EXIT_OK
    for name in argv:
        status, lines = verify(Path(name))
        word = {EXIT_OK: "good", EXIT_CRASH: "MISMATCH", EXIT_INCOMPLETE: "INCOMPLETE"}[status]
        sys.stdout.write(f"{name}: {word}\n")
        for line in lines[:SHOWN]:
            sys.stdout.write(f"  {line}\n")
        if len(lines) > SHOWN:
            sys.stdout.write(f"  and {len(lines) - SHOWN} more\n")
        worst = worst if status == EXIT_OK or worst == EXIT_CRASH else status
    return worst


if __name__ == "__main__":
    run_command(main)
