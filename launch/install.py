"""What the agent does for ``--deploy``: virtual environments made out of wheels, never changed.

Below ``~/.distbench`` lie ``wheels/<sha256>/``, as they were sent, and two environments for each
deployment: ``deps-<key>`` with torch and what else is needed, and ``venv-<key>`` with distbench
alone, which looks into the former. So a changed distbench costs seconds, and nothing that a run may
be using is ever written to again. ``complete`` is written last; without it a folder is made anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TOP = Path("~/.distbench")
TOLD_LINES = 5


def lacking(name: str, wheels: list[list[str]]) -> dict[str, Any]:
    """Say whether an environment is made, and which of the wheels are not here yet.

    Args:
        name: of the environment.
        wheels: SHA-256 and file name of each.
    """
    top = TOP.expanduser()
    return {
        "made": (top / name / "complete").exists(),
        "wheels": [sha for sha, file in wheels if not (top / "wheels" / sha / file).exists()],
    }


def make(
    name: str,
    wanted: list[str],
    wheels: list[list[str]],
    pip: list[str],
    no_index: bool,
    below: str,
) -> dict[str, Any]:
    """Make an environment unless it is there.

    Args:
        name: of the environment.
        wanted: requirements, as pip reads them.
        wheels: SHA-256 and file name of those that pip may take.
        pip: of these, pip's own; empty: ensurepip's is taken.
        no_index: pip takes nothing but these.
        below: the environment into which this one looks; then nothing but ``wanted`` is put here.

    Returns:
        Its Python, and every package with its version.

    Raises:
        OSError: a step failed; its last lines.
    """
    top = TOP.expanduser()
    top.mkdir(parents=True, exist_ok=True)
    place = top / name
    python = place / "bin" / "python"
    with (top / "lock").open("a") as lock, tempfile.TemporaryDirectory() as links:
        fcntl.flock(lock, fcntl.LOCK_EX)  # hosts may share their homes
        if not (place / "complete").exists():
            shutil.rmtree(place, ignore_errors=True)
            for sha, file in wheels:
                with contextlib.suppress(FileExistsError):
                    (Path(links) / file).symlink_to(top / "wheels" / sha / file)
            _step([sys.executable, "-m", "venv", *(["--without-pip"] if pip else []), str(place)])
            tool = [str(Path(links) / pip[1] / "pip")] if pip else ["-m", "pip"]
            options = ["--disable-pip-version-check", "--no-input", "--find-links", links]
            options += ["--no-index"] * no_index + ["--no-deps"] * bool(below)
            _step([str(python), *tool, "install", *options, *wanted])
            if below:
                (_site(place) / "below.pth").write_text(f"{_site(top / below)}\n")
            os.sync()
            (place / "complete").touch()
    sites = [str(_site(top / each)) for each in (name, below) if each]
    found = {
        f"{each.metadata['Name'].lower()}=={each.version}"
        for each in importlib.metadata.distributions(path=sites)
    }
    found.add(f"Python {sys.version_info.major}.{sys.version_info.minor}")
    return {"python": str(python), "packages": sorted(found)}


def _site(place: Path) -> Path:
    (found,) = place.glob("lib/python3*/site-packages")
    return found


def _step(argv: list[str]) -> None:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    null, pipe, same = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    done = subprocess.run(
        argv, stdin=null, stdout=pipe, stderr=same, text=True, check=False, env=kept
    )
    if done.returncode:
        said = [line.strip() for line in done.stdout.splitlines() if line.strip()]
        # pip's errors come first, hints of what might be tried last.
        first = next((i for i, line in enumerate(said) if line.startswith("ERROR")), -TOLD_LINES)
        told = " ".join(said[first:][:TOLD_LINES])
        raise OSError(told or f"{argv[0]} ended with {done.returncode}")
