"""What the agent does for ``--deploy``: virtual environments made out of wheels, never changed.

Below ``~/.distbench`` lie ``wheels/<sha256>/``, as they were sent, and two environments for each
deployment: ``deps-...`` with torch and what else is needed, and ``venv-...`` with distbench alone,
which looks into the former. So a changed distbench costs seconds, and nothing that a run may be
using is ever written to again. ``complete`` is written last; without it a folder is made anew. The
names tell this host's Python too: after an update of that they are made anew.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOP = Path("~/.distbench")
TOLD_LINES = 5
LIST = """
import importlib.metadata, json, sys
print(json.dumps([f"Python {sys.version_info[0]}.{sys.version_info[1]}", *sorted({
    f"{each.metadata['Name'].lower()}=={each.version}"
    for each in importlib.metadata.distributions()})]))
"""
ELSEWHERE = ("PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_USER", "PIP_REQUIRE_VIRTUALENV")
running: list[subprocess.Popen[str]] = []
"""Steps that are to be ended with the channel."""


def names(key: str, own: list[str]) -> tuple[str, str]:
    """Return the folders of the two environments on this host.

    Args:
        key: of what they are made of, apart from distbench.
        own: SHA-256 and file name of distbench's wheel.
    """
    version = "".join(map(str, sys.version_info[:2]))
    kind = f"{sys.implementation.name}{version}-{platform.machine()}"
    return f"deps-{key}-{kind}", f"venv-{key}-{own[0][:12]}-{kind}"


def lacking(key: str, own: list[str], wheels: list[list[str]]) -> dict[str, Any]:
    """Say whether the environments are made, and which of the wheels are not here yet.

    Args:
        key: as for ``names``.
        own: likewise.
        wheels: SHA-256 and file name of each.
    """
    top = TOP.expanduser()
    return {
        "made": all((top / each / "complete").exists() for each in names(key, own)),
        "wheels": [sha for sha, file in wheels if not (top / "wheels" / sha / file).exists()],
    }


def make(
    key: str,
    own: list[str],
    wanted: list[str],
    wheels: list[list[str]],
    pip: list[str],
    no_index: bool,
) -> dict[str, Any]:
    """Make both environments unless they are there.

    Args:
        key: as for ``names``.
        own: likewise.
        wanted: requirements of distbench, as pip reads them.
        wheels: SHA-256 and file name of those that pip may take.
        pip: a wheel of pip, likewise, in place of this host's own; empty for none.
        no_index: pip takes nothing but these wheels.

    Returns:
        The Python, below the home, and every package with its version.

    Raises:
        OSError: a step failed; its last lines.
    """
    top = TOP.expanduser()
    top.mkdir(parents=True, exist_ok=True)
    deps, name = names(key, own)
    with (top / "lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # hosts may share their homes
        list(top.iterdir())  # what another host made is looked up anew
        with _new(top / deps, lock.fileno()) as step:
            if step:
                step(_pip(top, pip) + _options(top, deps, wheels, no_index) + wanted)
        with _new(top / name, lock.fileno()) as step:
            if step:
                install = _options(top, name, [own], True)
                step([*_pip(top, pip), *install, "--no-deps", "distbench"])
                (_site(top / name) / "below.pth").write_text(f"{_site(top / deps)}\n")
                _torchrun(top / name / "bin")
        told = _step([str(top / name / "bin/python"), "-I", "-c", LIST], lock.fileno())
    packages = [str(each) for each in json.loads(told)]
    there = {_plain(each.partition("==")[0]) for each in packages}
    absent = [each for each in (*wanted, "distbench") if _plain(each) not in there]
    if absent:
        raise OSError(f"{top / name} has no {absent[0]}, though pip said so: delete {top / deps}")
    return {"python": f"{TOP}/{name}/bin/python", "deps": f"{TOP}/{deps}", "packages": packages}


def _torchrun(folder: Path) -> None:
    """Write the command torchrun: that of the lower environment knows nothing of the upper."""
    script = folder / "torchrun"
    program = "import sys\nfrom torch.distributed.run import main\nsys.exit(main())\n"
    script.write_text(f"#!{folder / 'python'}\n{program}")
    script.chmod(0o755)


def _plain(requirement: str) -> str:
    """Return the name that a requirement begins with, as packages are compared by it."""
    found = re.match(r"[A-Za-z0-9._-]*[A-Za-z0-9]", requirement)
    return re.sub(r"[-_.]+", "-", found.group(0)).lower() if found else requirement


@contextmanager
def _new(place: Path, lock: int) -> Iterator[Any]:
    """Make an empty environment, from `with` to its end; None where there is a whole one.

    Yields a function that runs its Python with the arguments that it is given.
    """
    if (place / "complete").exists():
        yield None
        return
    shutil.rmtree(place, ignore_errors=True)
    try:
        _step([sys.executable, "-m", "venv", "--without-pip", str(place)], lock)
        (place / "tmp").mkdir()
        yield lambda words: _step([str(place / "bin/python"), *words], lock, place / "tmp")
        shutil.rmtree(place / "tmp")
        os.sync()
        (place / "complete").touch()
    finally:
        if not (place / "complete").exists():
            shutil.rmtree(place, ignore_errors=True)


def _pip(top: Path, sent: list[str]) -> list[str]:
    """Return what runs pip: a wheel of it is a program, so that nothing has to be installed.

    The one that was sent comes last where this Python brings its own, which fits it.
    """
    spec = importlib.util.find_spec("ensurepip")  # Debian ships it in a package of its own
    folders = [Path(spec.origin).parent / "_bundled"] if spec and spec.origin else []
    folders += [Path(found)] if (found := sysconfig.get_config_var("WHEEL_PKG_DIR")) else []
    wheels = [wheel for folder in folders for wheel in sorted(folder.glob("pip-*.whl"))]
    wheels += [top / "wheels" / sent[0] / sent[1]] if sent else []
    if not wheels:
        raise OSError(
            f"{sys.executable} has no pip: install Debian's python3-venv there, or put a wheel of "
            "pip into --wheelhouse"
        )
    return [str(wheels[0] / "pip")]


def _options(top: Path, name: str, wheels: list[list[str]], no_index: bool) -> list[str]:
    """Return pip's words before the requirements; lays out the wheels that it may take."""
    links = top / name / "tmp" / "wheels"
    links.mkdir()
    for sha, file in wheels:
        with contextlib.suppress(FileExistsError):
            (links / file).symlink_to(top / "wheels" / sha / file)
    words = ["install", "--disable-pip-version-check", "--no-input", "--find-links", str(links)]
    return [*words, "--no-index", "--isolated"] if no_index else words


def _site(place: Path) -> Path:
    (found,) = place.glob("lib/python3*/site-packages")
    return found


def _step(argv: list[str], lock: int, scratch: Path | None = None) -> str:
    """Run a program to its end; returns what it wrote.

    It holds the lock as well: should this process be killed, nobody else writes where it does.
    """
    kept = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    kept = {name: value for name, value in kept.items() if name not in ELSEWHERE}
    kept |= {"TMPDIR": str(scratch)} if scratch else {}
    # Else pip takes wheels, and versions, of the host's own choice too.
    kept |= {"PIP_CONFIG_FILE": os.devnull} if "--isolated" in argv else {}
    null, pipe, same = subprocess.DEVNULL, subprocess.PIPE, subprocess.STDOUT
    child = subprocess.Popen(
        argv, stdin=null, stdout=pipe, stderr=same, text=True, env=kept, pass_fds=[lock]
    )
    running.append(child)
    text, _ = child.communicate()
    running.remove(child)
    if child.returncode:
        said = [line.strip() for line in text.splitlines() if line.strip()]
        # pip's errors come first, hints of what might be tried last.
        first = next((i for i, line in enumerate(said) if line.startswith("ERROR")), -TOLD_LINES)
        told = " ".join(said[first:][:TOLD_LINES])
        raise OSError(told or f"{argv[0]} ended with {child.returncode}")
    return text
