"""What the agent looks at and does on its host, beside running the command."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import os
import platform
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

PIECE = 1 << 18
TOKEN = "token"  # noqa: S105  the name of a file
held: list[Any] = []
"""Locks that live as long as this process."""
doors: list[socket.socket] = []
hidden: dict[Path, bool] = {}
"""Private folders with a token, and whether the one above was made for it."""


def versions() -> dict[str, str]:
    """Return versions of what a run needs, without importing any of it."""
    found = {"python": platform.python_version()}
    for name in ("torch", "numpy"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    spec = importlib.util.find_spec("distbench")
    if spec is not None and spec.origin:
        text = Path(spec.origin).read_text(encoding="utf-8")
        match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
        found["distbench"] = match.group(1) if match else "unknown"
    return found


def origin() -> str:
    """Return where distbench would be imported from, "" for nowhere."""
    spec = importlib.util.find_spec("distbench")
    return spec.origin or "" if spec else ""


def gpus() -> list[dict[str, str]]:
    """Return the GPUs that nvidia-smi tells of, with the processes on each; none without it."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return []
    told = []
    for query in ("--query-gpu=uuid,name", "--query-compute-apps=gpu_uuid,pid,process_name"):
        argv = [tool, query, "--format=csv,noheader"]
        done = subprocess.run(argv, capture_output=True, text=True, timeout=10, check=False)
        told.append([line.split(", ") for line in done.stdout.splitlines() if ", " in line])
    cards, used = told
    return [
        {
            "uuid": card[0],
            "name": card[1],
            "used_by": ", ".join(f"{row[2]} ({row[1]})" for row in used if row[0] == card[0]),
        }
        for card in cards
    ]


def facts(folder: str, output: str, make: bool) -> dict[str, Any]:
    """Say what this host is, after changing into the folder in which the command will run.

    Args:
        folder: that one.
        output: for results, below it or absolute.
        make: whether to make that; else it is only looked at.
    """
    try:
        os.chdir(Path(folder).expanduser())
    except OSError as error:
        raise OSError(f"--dir {folder}: {error.strerror}: name a folder that is there") from error
    where = Path(output).expanduser().absolute()
    there = where
    if make:
        where.mkdir(parents=True, exist_ok=True)
        with (where / ".launch.lock").open("a") as probe:
            probe.flush()
    else:
        there = next(path for path in (where, *where.parents) if path.is_dir())
        if not os.access(there, os.W_OK):
            raise PermissionError(f"{there} cannot be written: give another --output-dir")
    return {
        "host": socket.gethostname(),
        # By what address this host was reached: no name has to be resolved, and the launcher's
        # way there is the one that is known to work.
        "address": os.environ.get("SSH_CONNECTION", "").split(" ")[2:3],
        "python": sys.executable,
        "folder": str(Path.cwd()),
        "versions": versions(),
        "distbench_at": origin(),
        "gpus": gpus(),
        "output": str(where),
        "free_bytes": shutil.disk_usage(there).free,
        "processors": len(os.sched_getaffinity(0)),
    }


def lock(output: str, who: str) -> dict[str, Any]:
    """Hold the output directory for this launch; says who holds it where that fails."""
    file = (Path(output) / ".launch.lock").open("r+", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return {"held_by": file.read().strip() or "another launch"}
    file.truncate(0)
    file.write(who)
    file.flush()
    held.append(file)
    return {"held_by": ""}


def listen(token: str, port: int) -> dict[str, Any]:
    """Listen on a port, 0 for a free one, and send the token to whoever connects."""
    if socket.has_dualstack_ipv6():
        door = socket.create_server(("::", port), family=socket.AF_INET6, dualstack_ipv6=True)
    else:
        door = socket.create_server(("", port))
    doors.append(door)

    def serve() -> None:
        with contextlib.suppress(OSError):
            while True:
                peer, _ = door.accept()
                with peer, contextlib.suppress(OSError):
                    peer.sendall(token.encode())

    threading.Thread(target=serve, daemon=True).start()
    return {"port": door.getsockname()[1]}


def reach(address: str, port: int, token: str, within_s: float) -> dict[str, Any]:
    """Connect to another host's listener."""
    with socket.create_connection((address, port), within_s) as link:
        said = b""
        while piece := link.recv(256):
            said += piece
    if said.decode("ascii", "replace") != token:
        raise OSError("something else listens there")
    return {}


def hush() -> dict[str, Any]:
    """Close the listeners: the command will listen there."""
    while doors:
        door = doors.pop()
        with contextlib.suppress(OSError):
            door.shutdown(socket.SHUT_RDWR)  # close alone does not end an accept
        door.close()
    return {}


def entries(output: str) -> dict[str, Any]:
    """Return the names in the output directory."""
    return {"names": sorted(path.name for path in Path(output).iterdir() if path.is_dir())}


def mark(output: str, name: str) -> dict[str, Any]:
    """Leave an empty file in the output directory, by which others see that they share it."""
    (Path(output) / name).touch()
    return {}


def marked(output: str, names: list[str]) -> dict[str, Any]:
    """Return which of these files are in the output directory."""
    return {"names": [name for name in names if (Path(output) / name).exists()]}


def write(name: str, text: str) -> dict[str, Any]:
    """Write a small file into the folder in which the command runs; it appears whole."""
    part = Path(f".{name}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    part.rename(name)
    return {"path": str(Path(name).absolute())}


def hide(folder: str, text: str) -> dict[str, Any]:
    """Make a private folder with a token in it, which goes at the latest when this process does."""
    path = Path(folder)
    made = not path.parent.exists()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(mode=0o700)
    hidden[path] = made
    descriptor = os.open(path / TOKEN, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w", encoding="ascii") as file:
        file.write(text)
    return {}


def forget(drop: list[str]) -> dict[str, Any]:
    """Take every token away, and its folder if nothing else is in it.

    Args:
        drop: of these folders whatever is in them.
    """
    for path, made in hidden.items():
        with contextlib.suppress(OSError):
            (path / TOKEN).unlink(missing_ok=True)
            if str(path) in drop:
                shutil.rmtree(path)
            else:
                path.rmdir()
            if made:
                path.parent.rmdir()
    hidden.clear()
    return {}


def tried(argv: list[str], env: dict[str, str], within_s: float) -> dict[str, Any]:
    """Run something short to its end; returns its exit status and the last line that it said."""
    done = subprocess.run(
        argv,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=within_s,
        check=False,
        env={**os.environ, **env},
    )
    return {"exit": done.returncode, "said": "".join(done.stderr.strip().splitlines()[-1:])}


def towards(address: str) -> dict[str, Any]:
    """Return this host's address on the way to another; nothing is sent there."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect((address, 9))
        return {"address": probe.getsockname()[0]}


def unmark(output: str, name: str) -> dict[str, Any]:
    """Take the file away again."""
    (Path(output) / name).unlink(missing_ok=True)
    return {}


def tree(folder: str) -> dict[str, Any]:
    """Return the plain files below a folder: path, size in bytes."""
    top = Path(folder)
    files = [path for path in sorted(top.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {"files": [[str(path.relative_to(top)), path.stat().st_size] for path in files]}


def read(path: str, give: Callable[[bytes], None]) -> dict[str, Any]:
    """Give a file in pieces; returns its SHA-256 as it was read."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            give(piece)
    return {"sha256": digest.hexdigest()}


class Incoming:
    """A file that comes in pieces; it appears whole, with the hash that was told, or not at all.

    Args:
        path: where; a leading ``~`` is this host's home. Folders are made.
        size: in bytes.
        sha256: of all of it.
    """

    def __init__(self, path: str, size: int, sha256: str) -> None:
        self._path = Path(path).expanduser()
        self._left, self._sha256, self._digest = size, sha256, hashlib.sha256()
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, part = tempfile.mkstemp(prefix=f".{self._path.name}.", dir=self._path.parent)
        self._part, self._file = Path(part), os.fdopen(descriptor, "wb", buffering=0)

    def take(self, piece: bytes) -> bool:
        """Write a piece; returns whether it was the last one.

        Raises:
            OSError: it cannot be written, or is not what was told.
        """
        try:
            self._digest.update(piece)
            self._left -= len(piece)
            while piece:
                piece = piece[self._file.write(piece) :]
            if self._left > 0:
                return False
            if self._left or self._digest.hexdigest() != self._sha256:
                raise OSError(f"{self._path} changed on its way")
        except OSError:
            self.drop()
            raise
        return True

    def finish(self) -> None:
        """Let it appear, once it is on the disk.

        Raises:
            OSError: the disk refused it.
        """
        try:
            os.fsync(self._file.fileno())
            self._file.close()
            self._part.rename(self._path)
        except OSError:
            self.drop()
            raise

    def drop(self) -> None:
        """Take away what came so far."""
        self._file.close()
        self._part.unlink(missing_ok=True)
