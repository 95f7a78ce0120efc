"""What the launcher runs on each host: its life hangs on the ssh channel that it reads.

``channel.py`` sends this file's text over ssh, to a Python that needs nothing but its standard
library; it is never installed and no argument of the user ever passes a shell. Both sides talk in
frames: a letter, the length in 4 bytes, the payload.

    to the agent     J  a request, JSON: {"id": n, "do": name, ...}     P  nothing, once a second
    from the agent   J  an answer, JSON: {"id": n, ...} or {"id": n, "error": text}
                     P  nothing, for each P that came
                     O  what the command wrote to stdout      E  likewise to stderr
                     F  a piece of a file: the id in 4 bytes, then the bytes

The channel's end, or ``SILENT_S`` seconds in which nothing comes (a cut cable sends no end), ends
the command and every process that descends from it: SIGTERM, ``GRACE_S`` later SIGKILL. Orphans
come to this process (PR_SET_CHILD_SUBREAPER), so a worker in a session of its own is found too.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import select
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

MARK = b"\n\x01distbench agent 1\x01\n"
"""Before the first frame, so that what a login shell prints is told from it."""
SILENT_S, GRACE_S = 15.0, 12.0
KILL_S = 10.0
"""A process that a kernel call holds (a dead disk) is left to the kernel after so long."""
PIECE = 1 << 18
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36
HEAD = struct.Struct(">cI")
TETHERED = f"""
import ctypes, os, sys
ctypes.CDLL(None).prctl({PR_SET_PDEATHSIG}, ctypes.c_ulong({int(signal.SIGTERM)}), 0, 0, 0)
if os.getppid() != int(os.environ.pop("DISTBENCH_AGENT")):
    sys.exit(143)
os.execvp(sys.argv[1], sys.argv[1:])
"""
"""Becomes the command, which gets SIGTERM should this process be killed."""

writing, starting = threading.Lock(), threading.Lock()
command: list[subprocess.Popen[bytes]] = []
"""The one that was started last; None is started once ``closing`` has something in it."""
closing: list[bool] = []
held: list[Any] = []
"""Locks that live as long as this process."""
doors: list[socket.socket] = []


def prctl(option: int, value: int) -> None:
    """Set a property of this process; Linux has had these since 3.4."""
    ctypes.CDLL(None).prctl(option, ctypes.c_ulong(value), 0, 0, 0)


def send(kind: bytes, payload: bytes) -> None:
    """Write a frame to the launcher."""
    data = HEAD.pack(kind, len(payload)) + payload
    with writing:
        while data:
            data = data[os.write(1, data) :]


def answer(number: int, what: dict[str, Any]) -> None:
    """Write a request's answer."""
    send(b"J", json.dumps({"id": number, **what}).encode())


# -- the host ------------------------------------------------------------------------------------


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


def facts(folder: str, output: str) -> dict[str, Any]:
    """Say what this host is, after changing into the folder in which the command will run."""
    try:
        os.chdir(Path(folder).expanduser())
    except OSError as error:
        raise OSError(f"--dir {folder}: {error.strerror}: name a folder that is there") from error
    where = Path(output).expanduser().absolute()
    where.mkdir(parents=True, exist_ok=True)
    with (where / ".launch.lock").open("a") as probe:
        probe.flush()
    return {
        "host": socket.gethostname(),
        # By what address this host was reached: no name has to be resolved, and the launcher's
        # way there is the one that is known to work.
        "address": os.environ.get("SSH_CONNECTION", "").split(" ")[2:3],
        "python": sys.executable,
        "folder": str(Path.cwd()),
        "versions": versions(),
        "gpus": gpus(),
        "output": str(where),
        "free_bytes": shutil.disk_usage(where).free,
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


# -- files ---------------------------------------------------------------------------------------


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


def unmark(output: str, name: str) -> dict[str, Any]:
    """Take the file away again."""
    (Path(output) / name).unlink(missing_ok=True)
    return {}


def tree(folder: str) -> dict[str, Any]:
    """Return the plain files below a folder: path, size in bytes."""
    top = Path(folder)
    files = [path for path in sorted(top.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {"files": [[str(path.relative_to(top)), path.stat().st_size] for path in files]}


def read(number: int, path: str) -> dict[str, Any]:
    """Send a file in pieces; returns its SHA-256 as it was read."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
            send(b"F", struct.pack(">I", number) + piece)
    return {"sha256": digest.hexdigest()}


# -- the command ---------------------------------------------------------------------------------


def run(argv: list[str], env: dict[str, str]) -> dict[str, Any]:
    """Run a command to its end, its output sent as it comes; returns its exit status."""
    with starting:
        if closing:
            raise OSError("the channel has ended")
        child = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", TETHERED, *argv],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **env, "DISTBENCH_AGENT": str(os.getpid())},
            start_new_session=True,
        )
        command[:] = [child]
    pumps = [
        threading.Thread(target=pump, args=(kind, pipe), daemon=True)
        for kind, pipe in ((b"O", child.stdout), (b"E", child.stderr))
    ]
    for each in pumps:
        each.start()
    code = child.wait()
    for each in pumps:
        each.join(2)  # a worker that is left behind may hold the pipe open
    left = clear(0)
    return {"exit": code if code >= 0 else 128 - code, "left": left}


def pump(kind: bytes, pipe: Any) -> None:
    """Send what comes out of a pipe."""
    with contextlib.suppress(OSError):
        while piece := os.read(pipe.fileno(), 1 << 16):
            send(kind, piece)


def descendants() -> list[int]:
    """Return the processes below this one, the dead left out."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = (entry / "stat").read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                parents[int(entry.name)] = int(parent)
    found, front = list[int](), {os.getpid()}
    while front:
        front = {pid for pid, parent in parents.items() if parent in front}
        found += front
    return found


def clear(grace_s: float) -> int:
    """End all processes below this one; returns how many had to be killed."""
    if command and command[0].poll() is None:
        with contextlib.suppress(ProcessLookupError):
            command[0].terminate()
    end = time.monotonic() + grace_s
    while descendants() and time.monotonic() < end:
        time.sleep(0.05)
    killed, end = set[int](), time.monotonic() + KILL_S
    while (left := descendants()) and time.monotonic() < end:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        killed.update(left)
        time.sleep(0.02)
    return len(killed)


# -- requests ------------------------------------------------------------------------------------


def handle(asked: dict[str, Any]) -> None:
    """Do what a request asks for and answer it."""
    number, name = asked.pop("id"), asked.pop("do")
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "facts": facts,
        "lock": lock,
        "listen": listen,
        "reach": reach,
        "hush": hush,
        "entries": entries,
        "mark": mark,
        "marked": marked,
        "unmark": unmark,
        "write": write,
        "tree": tree,
        "read": lambda path: read(number, path),
        "run": run,
        "stop": lambda grace_s: {"killed": clear(grace_s)},
    }
    try:
        answer(number, actions[name](**asked))
    except Exception as error:
        answer(number, {"error": f"{type(error).__name__}: {error}"})


def exactly(count: int) -> bytes:
    """Read so many bytes from the launcher; fewer at the channel's end, or after silence."""
    data = b""
    while len(data) < count:
        ready, _, _ = select.select([0], [], [], SILENT_S)
        piece = os.read(0, count - len(data)) if ready else b""
        if not piece:
            break
        data += piece
    return data


def main() -> None:
    """Serve requests until the channel ends, then leave nothing behind."""
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(number, lambda *_: None)  # unlike SIG_IGN this is not handed on by exec
    os.write(1, MARK)
    while len(head := exactly(HEAD.size)) == HEAD.size:
        kind, length = HEAD.unpack(head)
        payload = exactly(length)
        if len(payload) < length:
            break
        if kind == b"P":
            threading.Thread(target=send, args=(b"P", b""), daemon=True).start()
        elif kind == b"J":
            threading.Thread(target=handle, args=(json.loads(payload),), daemon=True).start()
    with starting:
        closing.append(True)
    clear(GRACE_S)
    os._exit(0)


if __name__ == "__main__":
    main()
