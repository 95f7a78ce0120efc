"""What the launcher runs on each host: its life hangs on the ssh channel that it reads.

``channel.py`` sends this file's text and those of ``onhost.py`` and ``install.py`` over ssh, to a
Python that needs nothing but its standard library; none is ever installed and no argument of the
user ever passes a shell. Both sides talk in frames: a letter, the length in 4 bytes, the payload.

    to the agent     J  a request, JSON: {"id": n, "do": name, ...}     P  nothing, once a second
                     F  a piece of a file that a "put" told of: its id in 4 bytes, then the bytes
    from the agent   J  an answer, JSON: {"id": n, ...} or {"id": n, "error": text}
                     P  nothing, for each P that came
                     O  what the command wrote to stdout      E  likewise to stderr
                     F  a piece of a file that was asked for, likewise
                     A  the id in 4 bytes: a piece has been written

The channel's end, or ``SILENT_S`` seconds in which nothing comes (a cut cable sends no end), ends
the command and every process that descends from it: SIGTERM, ``GRACE_S`` later SIGKILL. Orphans
come to this process (PR_SET_CHILD_SUBREAPER), so a worker in a session of its own is found too.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import install
import onhost

MARK = b"\n\x01distbench agent 1\x01\n"
"""Before the first frame, so that what a login shell prints is told from it."""
SILENT_S, GRACE_S = 15.0, 12.0
KILL_S = 10.0
"""A process that a kernel call holds (a dead disk) is left to the kernel after so long."""
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
incoming: dict[int, onhost.Incoming] = {}
"""Files on their way, by request."""


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


def handle(asked: dict[str, Any]) -> None:
    """Do what a request asks for and answer it."""
    number, name = asked.pop("id"), asked.pop("do")
    pack = struct.Struct(">I").pack
    actions: dict[str, Callable[..., dict[str, Any]]] = {
        "facts": onhost.facts,
        "lock": onhost.lock,
        "listen": onhost.listen,
        "reach": onhost.reach,
        "hush": onhost.hush,
        "entries": onhost.entries,
        "mark": onhost.mark,
        "marked": onhost.marked,
        "unmark": onhost.unmark,
        "hide": onhost.hide,
        "forget": onhost.forget,
        "tried": onhost.tried,
        "towards": onhost.towards,
        "write": onhost.write,
        "tree": onhost.tree,
        "read": lambda path: onhost.read(path, lambda piece: send(b"F", pack(number) + piece)),
        "lacking": install.lacking,
        "make": install.make,
        "run": run,
        "stop": lambda grace_s: {"killed": clear(grace_s)},
    }
    try:
        answer(number, actions[name](**asked))
    except Exception as error:
        answer(number, failed(error))


def take(payload: bytes) -> None:
    """Write a piece of a file; its request is answered after the last one, or where it fails.

    On the thread that reads the channel, so that nobody sends faster than the disk takes it. A
    launcher that has gone is no error here: the channel's end is what says so.
    """
    number = int.from_bytes(payload[:4], "big")
    file = incoming.get(number)
    if file is None:
        return  # it failed before
    with contextlib.suppress(OSError):
        try:
            if not file.take(payload[4:]):
                send(b"A", payload[:4])
                return
        except OSError as error:
            answer(number, failed(error))
        else:  # a flush may take longer than the launcher waits for an answer to its ping
            threading.Thread(target=finish, args=(number, file), daemon=True).start()
        del incoming[number]


def finish(number: int, file: onhost.Incoming) -> None:
    """Let a file that is here appear, and answer."""
    try:
        file.finish()
        told: dict[str, Any] = {}
    except OSError as error:
        told = failed(error)
    with contextlib.suppress(OSError):
        answer(number, told)


def put(number: int, path: str, size: int, sha256: str) -> None:
    """Begin to take a file."""
    try:
        incoming[number] = onhost.Incoming(path, size, sha256)
    except OSError as error:
        with contextlib.suppress(OSError):
            answer(number, failed(error))


def failed(error: Exception) -> dict[str, Any]:
    """Return the answer to a request that failed."""
    return {"error": f"{type(error).__name__}: {error}"}


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
    try:
        os.write(1, MARK)
        serve()
    finally:
        with starting:
            closing.append(True)
        for step in install.running:
            with contextlib.suppress(OSError):
                step.terminate()
        for file in incoming.values():
            with contextlib.suppress(OSError):
                file.drop()
        clear(GRACE_S)
        with contextlib.suppress(OSError):
            onhost.forget([])
        os._exit(0)


def serve() -> None:
    """Take frames until none comes."""
    while len(head := exactly(HEAD.size)) == HEAD.size:
        kind, length = HEAD.unpack(head)
        payload = exactly(length)
        if len(payload) < length:
            break
        if kind == b"P":
            threading.Thread(target=send, args=(b"P", b""), daemon=True).start()
        elif kind == b"F":
            take(payload)
        elif kind == b"J":
            asked = json.loads(payload)
            if asked["do"] == "put":  # on this thread: its pieces come next
                put(asked["id"], asked["path"], asked["size"], asked["sha256"])
            else:
                threading.Thread(target=handle, args=(asked,), daemon=True).start()
