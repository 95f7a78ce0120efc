"""One ssh connection to one host, with ``agent.py`` at its other end.

OpenSSH is called by argv, so the user's ssh_config, agent and jump hosts apply. Host keys must be
known (StrictHostKeyChecking) and nobody is asked for a password (BatchMode). The remote shell sees
one fixed line and the quoted path of Python; whatever a user gives beside it travels as JSON.
"""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import agent
import install
import onhost

SSH_OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": "8",
    "ServerAliveInterval": "2",
    "ServerAliveCountMax": "3",
    "ForwardX11": "no",
    "ForwardAgent": "no",
    "ClearAllForwardings": "yes",
    # A shared connection is another process's: it knows nothing of the limits above.
    "ControlMaster": "no",
    "ControlPath": "none",
}
BOOT = (
    "import os,functools;n=int(os.read(0,8));"
    'exec(functools.reduce(lambda s,_:s+os.read(0,n-len(s)) if len(s)<n else s,range(n),b""))'
)
"""Runs the agent's text, whose length comes first; without quotes or marks that a shell reads."""
LOAD = """
import sys, types
for name, text in MODULES:
    module = types.ModuleType(name)
    sys.modules[name] = module
    exec(compile(text, name + ".py", "exec"), module.__dict__)
sys.modules["agent"].main()
"""
"""Makes modules of the texts; none is written to the host's disk."""
NAME = re.compile(r"[A-Za-z0-9_]([A-Za-z0-9_.@-]*[A-Za-z0-9_])?")
"""Of a host, or an alias out of ssh_config, perhaps with USER@; never an option."""
PING_S = 1.0
PIECE = 1 << 18
MOST_AHEAD = 4
"""Pieces of a file that were sent and not acknowledged: less than ssh takes in by itself, so that
no write waits for a host that has stopped."""
MOST_BYTES = 64 << 20
"""Of a frame; the agent's longest, a list of a result's files, is far below it."""
CLOSE_S = 2.0
"""Where nothing was started there is nothing to end."""


class Lost(Exception):
    """The channel to a host ended; the text says why, naming the host."""


class Refused(Exception):
    """The agent could not do what it was asked; the text is its error."""


def agent_text() -> bytes:
    """Return the program that runs on the host: the agent and the modules that it imports."""
    modules = [
        (each.__name__, Path(str(each.__file__)).read_text(encoding="utf-8"))
        for each in (onhost, install, agent)
    ]
    return f"MODULES = {modules!r}\n{LOAD}".encode()


def remote_line(python: str) -> str:
    """Return the command line for the remote shell; a leading ``~/`` is that host's home."""
    home = '"$HOME"/' if python.startswith("~/") else ""
    return f"exec {home}{shlex.quote(python[2:] if home else python)} -c {shlex.quote(BOOT)}"


def ssh_argv(host: str, python: str) -> list[str]:
    """Return the argv that starts the agent on a host.

    Raises:
        ValueError: it is no name of a host.
    """
    if not NAME.fullmatch(host):
        raise ValueError(f"{host!r} is no name of a host")
    options = [f"-o{name}={value}" for name, value in SSH_OPTIONS.items()]
    return ["ssh", "-T", *options, "--", host, remote_line(python)]


class Channel:
    """A connection to a host's agent.

    Args:
        host: as ssh takes it.
        python: on that host.
        on_output: called with (kind, bytes) of the command's output, on a thread of its own.

    Attributes:
        host: as given.
        lost: why the channel ended, or "".
    """

    def __init__(self, host: str, python: str, on_output: Callable[[bytes, bytes], None]) -> None:
        self.host = host
        self.lost = ""
        self._on_output = on_output
        self._writing = threading.Lock()
        self._changed = threading.Condition()
        self._answers: dict[int, dict[str, Any]] = {}
        self._files: dict[int, tuple[BinaryIO, int]] = {}
        self._taken: dict[int, int] = {}
        self._number = 0
        self._said: list[str] = []
        self._ran = False
        self._heard = time.monotonic()
        self._ssh = subprocess.Popen(
            ssh_argv(host, python),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C at the terminal is for the launcher alone
        )
        text = agent_text()
        self._threads = [
            threading.Thread(target=target, daemon=True)
            for target in (self._listen, self._hear_errors, self._ping, self._watch)
        ]
        for thread in self._threads:
            thread.start()
        with contextlib.suppress(OSError):
            self._write(b"%08d" % len(text) + text)

    def ask(self, do: str, timeout_s: float, **what: Any) -> dict[str, Any]:
        """Ask the agent for something and return its answer.

        Args:
            do: name of the request; see ``agent.handle``.
            timeout_s: the channel counts as lost after it.
            what: arguments of the request.

        Raises:
            Lost: the channel ended, or no answer came.
            Refused: the agent could not do it.
        """
        return self.result(self.start(do, **what), timeout_s)

    def start(self, do: str, **what: Any) -> int:
        """Send a request; returns its number, for ``result``."""
        with self._changed:
            self._number += 1
            number = self._number
        self._ran = self._ran or do == "run"
        self._request(number, do, what)
        return number

    def result(self, number: int, timeout_s: float) -> dict[str, Any]:
        """Return the answer to a request; raises as ``ask`` does."""
        with self._changed:
            self._changed.wait_for(lambda: self._answered(number), timeout_s)
            found = self._answers.pop(number, None)
        if found is None:
            raise Lost(self.lost or f"{self.host}: no answer within {timeout_s:g} s")
        if "error" in found:
            raise Refused(f"{self.host}: {found['error']}")
        return found

    def fetch(self, path: str, target: Path, size: int, timeout_s: float) -> str:
        """Copy a file from the host; returns the SHA-256 that the host read.

        Args:
            path: there.
            target: here.
            size: in bytes, as the host told it; more is not taken.
            timeout_s: as for ``ask``.

        Raises:
            Lost: the channel ended meanwhile, or it took longer.
            Refused: the host cannot read it.
            OSError: it cannot be written here.
        """
        with target.open("wb", buffering=0) as file:
            with self._changed:
                self._number += 1
                number = self._number
                self._files[number] = file, size
            try:
                self._request(number, "read", {"path": path})
                return str(self.result(number, timeout_s)["sha256"])
            finally:
                with self._changed:
                    self._files.pop(number)

    def put(self, source: Path, target: str, sha256: str, timeout_s: float) -> None:
        """Copy a file to the host, where it appears whole or not at all.

        Args:
            source: here.
            target: there; a leading ``~`` is that host's home. Folders are made.
            sha256: of the file.
            timeout_s: without a piece that was taken.

        Raises:
            Lost: the channel ended meanwhile, or the host took nothing for so long.
            Refused: the host cannot write it, or it changed on its way.
            OSError: it cannot be read here.
        """
        with source.open("rb") as file:
            size = source.stat().st_size
            number = self.start("put", path=target, size=size, sha256=sha256)
            sent, piece = 0, file.read(PIECE)
            while True:
                payload = struct.pack(">I", number) + piece
                with contextlib.suppress(OSError):  # then the channel is lost, as is told below
                    self._write(agent.HEAD.pack(b"F", len(payload)) + payload)
                sent, piece = sent + 1, file.read(PIECE)
                if not piece:
                    break
                if not self._wait_taken(number, sent - MOST_AHEAD, timeout_s):
                    raise Lost(f"{self.host}: it took nothing of {source} for {timeout_s:g} s")
                if self._answered(number):
                    break
        try:
            self.result(number, timeout_s)
        finally:
            with self._changed:
                self._taken.pop(number, None)

    def give_up(self, why: str) -> None:
        """Let every request that waits end with ``Lost``, a write that waits too."""
        with self._changed:
            self.lost = self.lost or f"{self.host}: {why}"
            self._changed.notify_all()
        self._ssh.kill()

    def close(self) -> None:
        """End the channel; the agent then ends what still runs on its host."""
        with self._writing, contextlib.suppress(OSError):
            if self._ssh.stdin is not None:
                self._ssh.stdin.close()
        try:
            self._ssh.wait(agent.GRACE_S + 5 if self._ran else CLOSE_S)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()
        for thread in self._threads:
            thread.join(5)

    def _answered(self, number: int) -> bool:
        return number in self._answers or bool(self.lost)

    def _wait_taken(self, number: int, pieces: int, timeout_s: float) -> bool:
        def enough() -> bool:
            return self._answered(number) or self._taken.get(number, 0) >= pieces

        with self._changed:
            return self._changed.wait_for(enough, timeout_s)

    def _request(self, number: int, do: str, what: dict[str, Any]) -> None:
        payload = json.dumps({"id": number, "do": do, **what}).encode()
        with contextlib.suppress(OSError):  # then the channel is lost, which ``result`` says
            self._write(agent.HEAD.pack(b"J", len(payload)) + payload)

    def _write(self, data: bytes) -> None:
        with self._writing:
            if self._ssh.stdin is None or self._ssh.stdin.closed:
                raise BrokenPipeError
            self._ssh.stdin.write(data)
            self._ssh.stdin.flush()

    def _ping(self) -> None:
        with contextlib.suppress(OSError):
            while not self.lost:
                time.sleep(PING_S)
                self._write(agent.HEAD.pack(b"P", 0))

    def _watch(self) -> None:
        """Notice silence; apart from ``_ping``, which may wait for a write."""
        while not self.lost:
            time.sleep(PING_S)
            if time.monotonic() - self._heard > agent.SILENT_S:
                self.give_up(f"nothing came from it for {agent.SILENT_S:g} s")

    def _hear_errors(self) -> None:
        assert self._ssh.stderr is not None
        with self._ssh.stderr as pipe:
            for line in pipe:
                text = line.decode("utf-8", "replace").strip()
                self._said = [*self._said[-9:], text] if text else self._said

    def _listen(self) -> None:
        assert self._ssh.stdout is not None
        read, why = self._ssh.stdout.read, ""
        try:
            before = b""
            while not before.endswith(agent.MARK):
                piece = read(1)
                if not piece or len(before) > 1 << 16:
                    break
                before += piece
            else:
                while len(head := read(agent.HEAD.size)) == agent.HEAD.size:
                    self._heard = time.monotonic()
                    kind, length = agent.HEAD.unpack(head)
                    if length > MOST_BYTES:
                        raise ValueError(f"a frame of {length} bytes")
                    self._take(kind, read(length))
        except (OSError, ValueError, LookupError, TypeError) as error:
            why = f"it sent what no agent sends, or it could not be taken here: {error}"
        finally:
            if why:
                self._ssh.kill()
            self._ssh.stdout.close()
            code = self._ssh.wait()
            time.sleep(0.05)  # what ssh said last is being read
            self.give_up(why or "; ".join(self._said[-2:]) or f"ssh ended with status {code}")

    def _take(self, kind: bytes, payload: bytes) -> None:
        if kind == b"F":
            (number,) = struct.unpack(">I", payload[:4])
            with self._changed:
                file, left = self._files.get(number, (None, 0))
            if file is None:
                return
            problem = "more came than the host told of" if len(payload) - 4 > left else ""
            try:
                if not problem:
                    file.write(payload[4:])
                    self._files[number] = file, left - len(payload) + 4
            except OSError as error:
                problem = f"cannot be written here: {error.strerror}"
            if problem:
                with self._changed:
                    self._files[number] = file, -1
                    # The first one counts: of a disk that is full all later pieces are too long.
                    self._answers.setdefault(number, {"error": problem})
                    self._changed.notify_all()
        elif kind == b"J":
            found = json.loads(payload)
            with self._changed:
                # The first answer counts: that of a copy which failed here stays.
                self._answers.setdefault(int(found.pop("id")), found)
                self._changed.notify_all()
        elif kind == b"A":
            (number,) = struct.unpack(">I", payload)
            with self._changed:
                self._taken[number] = self._taken.get(number, 0) + 1
                self._changed.notify_all()
        elif kind in (b"O", b"E"):
            self._on_output(kind, payload)
