"""Make a report from whatever rank folders are left.

    python -m distbench.salvage DIR...

DIR is a result directory, or copies of one brought from several hosts: the folders of ranks, and of
a driver with LoadGen's logs, that the first lacks, or has only in part, are copied into it. Then
result.json, report.txt and manifest.sha256 are written there. If all folders are whole, so is the
report. A result that rests on ranks which are not here is never replaced (exit 2). Needs no torch.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from distbench import files
from distbench.cli import run_command
from distbench.errors import EXIT_INCOMPLETE, EXIT_OK, EXIT_USAGE, UsageError, where
from distbench.record import write_report
from distbench.run import load_run as load_window
from distbench.run import read_record
from distbench.windows import load_run, window_folders


def merge(folders: Sequence[Path]) -> Path:
    """Copy into the first directory the rank folders that it lacks, and judge its windows.

    Args:
        folders: result directories of one run, from several hosts.

    Returns:
        The first directory.

    Raises:
        UsageError: a directory is no result directory, a folder is of another run, or a result is
            here that rests on more ranks than are here now.
    """
    windows = []
    for name in sorted({path.name for each in folders for path in window_folders(each)}):
        if not any(any((each / "windows" / name).glob("ranks/*/rank.json")) for each in folders):
            continue  # its ranks were ended before they wrote anything; the report names it
        (folders[0] / "windows" / name).mkdir(parents=True, exist_ok=True)
        windows.append(_merge_window([each / "windows" / name for each in folders]))
    for path in windows or [_merge_window(folders)]:
        _spare(path)
    for path in windows:
        write_report(path)
    return folders[0]


def _spare(folder: Path) -> None:
    """Refuse to replace a result by one of fewer ranks: it may be all that is left of them.

    Raises:
        UsageError: result.json rests on ranks that are not here.
    """
    try:
        result = files.read_json(folder / "result.json")
        hosts = {int(row["rank"]): str(row["host"]) for row in result["per_rank"]}
        # Of a model that is cut over ranks, those that follow a leader have no row of samples.
        stages = result["tables"].get("stages", {"rows": []})
        hosts |= {int(row[0]): str(row[1]) for row in stages["rows"]}
    except (UsageError, LookupError, TypeError, ValueError):
        return  # there is none, or nothing can be read from it
    gone = [where(rank, hosts[rank]) for rank in load_window(folder).missing if rank in hosts]
    if gone:
        more = f" and {len(gone) - 4} more" if len(gone) > 4 else ""
        raise UsageError(
            f"{folder / 'result.json'} rests on samples of {', '.join(gone[:4])}{more} as well, "
            "which are not here, so it is not replaced: copy their folders beside those that are "
            "here, or move result.json away"
        )


def _merge_window(folders: Sequence[Path]) -> Path:
    target = folders[0]
    holds = target
    if target.parent.name == "windows":  # made here, if that host did not come so far
        holds = next((each for each in folders if any(each.glob("ranks/*/rank.json"))), target)
    run_id = load_window(holds).first.before["run_id"]
    for other in folders[1:]:
        if not other.exists() and other.parent.name == "windows":
            continue  # that host did not come so far
        if not any((other / each).is_dir() for each in ("ranks", "driver")):
            raise UsageError(f"{other} is no result directory: it has no folder ranks/ or driver/")
        paths = [*sorted((other / "ranks").glob("[0-9]*")), *other.glob("driver")]
        for path in paths:
            own = target / path.relative_to(other)
            if own.exists() and _worth(path) <= _worth(own):
                continue
            try:
                name = "driver.json" if path.name == "driver" else "rank.json"
                found = read_record(path, name).before["run_id"]
            except UsageError as error:  # the other ranks are worth a report all the same
                sys.stderr.write(f"distbench: {path} is left out: {error}\n")
                continue
            if found != run_id:
                raise UsageError(f"{path} is of run {found}, {target} of {run_id}: do not mix them")
            part = own.with_name(f".{own.name}.part")
            shutil.copytree(path, part, dirs_exist_ok=True)
            if own.exists():  # such as rank 0's note on a driver that it lost
                shutil.rmtree(own)
            part.rename(own)
        _bring_logs(other / "loadgen", target / "loadgen")
    return target


def _bring_logs(source: Path, target: Path) -> None:
    """Copy those of LoadGen's logs that are not here; a driver's folder may have come without."""
    for path in sorted(source.glob("*")):
        if path.is_file() and not (target / path.name).exists():
            target.mkdir(exist_ok=True)
            shutil.copy2(path, target / path.name)


def _worth(folder: Path) -> int:
    """Rank copies of a folder: with samples before without, and then whole before torn.

    What rank 0 could not finish to write for another rank has no done.json.
    """
    return 2 * (folder / "samples.npy").exists() + (folder / "done.json").exists()


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    if not argv or "--help" in argv or "-h" in argv:
        sys.stdout.write((__doc__ or "") + "\n")
        return EXIT_OK if argv else EXIT_USAGE
    target = Path(argv[0])
    try:
        sys.stdout.write(write_report(merge([Path(name) for name in argv])))
    except OSError as error:
        raise UsageError(f"{target} cannot be written: {error.strerror or error}") from error
    sys.stdout.write(f"results  {target}\n")
    status = load_run(target).result()["verdict"]["status"]
    return EXIT_INCOMPLETE if status == "INCOMPLETE" else EXIT_OK


if __name__ == "__main__":
    run_command(main)
