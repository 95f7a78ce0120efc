"""Recompute every figure of a result directory from its rank folders, and check every hash.

    python -m distbench.verify results/20260101T000000Z-offline-0123abcd

Exit status: 0 good, 1 mismatch, 6 incomplete (a rank or a file is missing), 2 no result directory;
of several the worst, in the order 1, 6, 2. Needs no torch.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from distbench import files
from distbench.cli import run_command
from distbench.environment import code_version
from distbench.errors import EXIT_CRASH, EXIT_INCOMPLETE, EXIT_OK, EXIT_USAGE, UsageError
from distbench.report.text import to_text
from distbench.run import load_run as load_window
from distbench.windows import load_run, window_folders

SHOWN = 40
WORDS = {
    EXIT_OK: "good",
    EXIT_USAGE: "no result directory",
    EXIT_INCOMPLETE: "INCOMPLETE",
    EXIT_CRASH: "MISMATCH",
}
"""What each exit status is called; the worst comes last."""
AGREES = "the run is INCOMPLETE, and its figures agree"


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
    # 1 and 1.0 are one figure, 1 and true are not.
    numbers = isinstance(stored, int | float) and isinstance(computed, int | float)
    truths = isinstance(stored, bool) or isinstance(computed, bool)
    if stored == computed and (type(stored) is type(computed) or (numbers and not truths)):
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
    listed: dict[str, set[str]] = {}
    manifest = folder / "manifest.sha256"
    if manifest.is_file():
        for line in manifest.read_bytes().decode(errors="replace").split("\n")[:-1]:
            digest, _, name = line.partition("  ")
            listed[name] = {digest}
        present = {
            str(p.relative_to(folder))
            for p in folder.rglob("*")
            if p.is_file() and not p.name.startswith(".") and p != manifest
        }
        wrong += [f"{name}: not in manifest.sha256" for name in sorted(present - set(listed))]
    else:
        missing.append("manifest.sha256: missing; `python -m distbench.salvage` makes one")
    for done in sorted([*folder.glob("ranks/*/done.json"), *folder.glob("driver/done.json")]):
        try:
            recorded = dict(files.read_json(done)["files"])
        except (UsageError, LookupError, TypeError, ValueError):
            wrong.append(f"{done.relative_to(folder)}: damaged")
            continue
        for name, digest in recorded.items():
            listed.setdefault(str((done.parent / name).relative_to(folder)), set()).add(str(digest))
    for name, digests in listed.items():
        path = folder / name
        if not path.is_file():
            missing.append(f"{name}: missing")
        elif {files.sha256_file(path)} != digests:
            wrong.append(f"{name}: its SHA-256 is not the one that was recorded")
    return wrong, missing


def check_figures(folder: Path, computed: dict[str, Any]) -> list[str]:
    """Compare result.json and report.txt, where they are, with what the rank folders give.

    Args:
        folder: a result directory.
        computed: from its rank folders.

    Returns:
        One line for each place where they differ; before them, whether another distbench made it.
    """
    wrong = _differing(folder, computed)
    return [*made_by_another(computed), *wrong] if wrong else []


def made_by_another(result: dict[str, Any]) -> list[str]:
    """Say that another distbench made a result than this one, which may compute otherwise."""
    environment = result["environment"]
    recorded = {**environment["ranks"][0], **environment["common"]}
    own = code_version()
    for name, word in (("distbench_version", "distbench"), ("git_commit", "commit")):
        made, here = recorded.get(name), own[name]
        if made and here and made != here:
            return [
                f"made by {word} {made}, this is {here}: see Numbers in CHANGELOG.md, or verify it "
                "with the version that made it"
            ]
    return []


def _differing(folder: Path, computed: dict[str, Any]) -> list[str]:
    wrong: list[str] = []
    if (folder / "result.json").is_file():
        try:
            stored = files.read_json(folder / "result.json")
            wrong += [f"result.json {line}" for line in differences(stored, computed)]
        except UsageError as error:
            wrong.append(str(error))
    report = folder / "report.txt"
    if report.is_file() and report.read_bytes() != to_text(computed).encode():
        wrong.append("report.txt is not the report of what the rank folders give")
    return wrong


def verify(folder: Path) -> tuple[int, list[str]]:
    """Verify one result directory.

    Args:
        folder: a result directory.

    Returns:
        The exit status, and what was found, a line each.

    Raises:
        UsageError: it is no result directory.
    """
    windows = window_folders(folder)
    if windows:
        return _verify_windows(folder, windows)
    if not (folder / "ranks").is_dir():
        raise UsageError(f"{folder} is no result directory: it has no folder ranks/")
    wrong, missing = check_hashes(folder)
    needed = [folder / "result.json", folder / "report.txt"]
    needed += [path.with_name("done.json") for path in folder.glob("driver/after.json")]
    needed += [path.with_name("done.json") for path in sorted(folder.glob("ranks/*/after.json"))]
    for path in needed:  # whatever the manifest lists
        line = f"{path.relative_to(folder)}: missing"
        if not path.exists() and line not in missing:
            missing.append(line)
    # Without a file that was there when the figures were made, they cannot come out the same.
    whole = not any(line.startswith(("ranks/", "driver/")) for line in missing)
    incomplete = False
    try:
        run = load_window(folder)
        computed = run.result()
        incomplete = computed["verdict"]["status"] == "INCOMPLETE"
        missing += [_absent(folder, rank) for rank in run.missing]
        # Samples that stayed on their ranks: the figures rest on folders that are elsewhere.
        whole = whole and not any("; it is on " in line for line in missing)
        missing += [f"ranks/{r.rank:05d}: {r.problem}" for r in run.left if r.problem]
        if whole:
            wrong += check_figures(folder, computed)
    except UsageError as error:
        # A rank that was ended as its window began has left an empty folder.
        empty = not any(folder.glob("ranks/*/rank.json"))
        (wrong if whole and not empty else missing).append(str(error))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        wrong.append(f"the rank folders are damaged and cannot be judged: {error!r}")
    if wrong:
        return EXIT_CRASH, wrong + missing
    if missing or incomplete:
        return EXIT_INCOMPLETE, missing or [AGREES]
    return EXIT_OK, []


def _absent(folder: Path, rank: int) -> str:
    """Say that a rank's folder is not here, and where it is, as far as result.json tells."""
    line = f"ranks/{rank:05d}: missing"
    with contextlib.suppress(UsageError, LookupError, TypeError):
        for row in files.read_json(folder / "result.json")["per_rank"]:
            if row["rank"] == rank:
                return f"{line}; it is on {row['host']}"
    return line


def _verify_windows(folder: Path, windows: Sequence[Path]) -> tuple[int, list[str]]:
    """Verify several windows and the result above them."""
    wrong: list[str] = []
    missing: list[str] = []
    for path in windows:
        status, lines = verify(path)
        where = wrong if status == EXIT_CRASH else missing
        where += [f"{path.relative_to(folder)}: {line}" for line in lines]
    above, absent = check_hashes(folder)
    wrong += above
    missing += absent
    missing += [
        f"{name}: missing" for name in ("result.json", "report.txt") if not (folder / name).exists()
    ]
    if not missing and not wrong:
        try:
            computed = load_run(folder).result()
            wrong += check_figures(folder, computed)
            if computed["verdict"]["status"] == "INCOMPLETE":
                missing.append(AGREES)
        except UsageError as error:  # each window is good alone, but they are of different runs
            wrong.append(str(error))
    if wrong:
        return EXIT_CRASH, wrong + missing
    return (EXIT_INCOMPLETE, missing) if missing else (EXIT_OK, [])


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    if not argv or "--help" in argv or "-h" in argv:
        sys.stdout.write((__doc__ or "") + "\n")
        return EXIT_OK if argv else EXIT_USAGE
    worst = EXIT_OK
    for name in argv:
        try:
            status, lines = verify(Path(name))
        except UsageError as error:
            status, lines = EXIT_USAGE, [str(error)]
        sys.stdout.write(f"{name}: {WORDS[status]}\n")
        for line in lines[:SHOWN]:
            sys.stdout.write(f"  {line}\n")
        if len(lines) > SHOWN:
            sys.stdout.write(f"  and {len(lines) - SHOWN} more\n")
        worst = max(worst, status, key=list(WORDS).index)
    return worst


if __name__ == "__main__":
    run_command(main)
