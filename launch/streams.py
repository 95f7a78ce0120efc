"""What the hosts write, and what the launcher says itself."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
from collections.abc import Sequence

from checks import Host

OWN = re.compile(
    rb"^distbench: (?!rank \d+ completed|driver listens)(.+)|(No module named (?:'[^']*'|[\w.]+))"
)
"""Not its lines of progress, nor where a driver listens."""
OF_RANK = re.compile(rb"\[r(\d+)\]:")
PREFIX = {"TORCHELASTIC_LOG_LINE_PREFIX_TEMPLATE": "[r${rank}]:"}
"""What torchrun shall put before the stderr of each of several ranks, for ``OF_RANK`` to read."""


class Streams:
    """Puts the hosts' lines where they belong, whole lines only.

    Attributes:
        first: whose stdout is shown as it is: the place of the host that has rank 0.
        exit_told: the first exit status of a rank that torchrun told of; 0 for none.
        sentences: distbench's own, and what Python says of a module that is not there, each once,
            behind the host that said it first: torchrun repeats them among its traces.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.first = 0
        self.exit_told = 0
        self.sentences: dict[str, str] = {}
        self._hosts = [host.name for host in hosts]
        self._labels = list(self._hosts)
        self._lock = threading.Lock()
        self._rest: dict[tuple[int, bytes], bytes] = {}

    def seat(self, order: Sequence[int], counts: Sequence[int]) -> None:
        """Take in which ranks the hosts have in the next run.

        Args:
            order: places of the hosts, by node.
            counts: their ranks, by node.
        """
        self.first, first_rank = order[0], 0
        self.exit_told, self.sentences = 0, {}
        for place, count in zip(order, counts, strict=True):
            one = f" r{first_rank}" if count == 1 else ""
            self._labels[place] = self._hosts[place] + one
            first_rank += count

    def take(self, place: int, kind: bytes, data: bytes) -> None:
        """Take output of a host: ``O`` or ``E``."""
        with self._lock:
            *lines, rest = (self._rest.get((place, kind), b"") + data).split(b"\n")
            self._rest[place, kind] = rest
            for line in lines:
                self._put(place, kind, line)

    def end(self) -> None:
        """Show what came without a last line feed."""
        with self._lock:
            for (place, kind), rest in self._rest.items():
                if rest:
                    self._put(place, kind, rest)
            self._rest.clear()

    def _put(self, place: int, kind: bytes, line: bytes) -> None:
        if kind == b"O" and place == self.first:
            try:
                sys.stdout.buffer.write(line + b"\n")
                sys.stdout.buffer.flush()
            except OSError:  # whoever read it has gone: the run has not
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return
        behind = OF_RANK.match(line)
        rank = int(behind.group(1)) if behind else None
        line = line[behind.end() :] if behind else line
        found = re.fullmatch(rb"\s*exitcode\s*:\s*(\d+) \(pid: \d+\)\s*", line)
        if found and not self.exit_told:
            self.exit_told = int(found.group(1))
        said = OWN.search(line)
        if said:
            text = (said.group(1) or said.group(2)).decode("utf-8", "replace").strip()
            self.sentences.setdefault(text, self._hosts[place])
        label = self._labels[place] if rank is None else f"{self._hosts[place]} r{rank}"
        with contextlib.suppress(OSError):
            sys.stderr.buffer.write(b"[%s] %s\n" % (label.encode(), line))
            sys.stderr.buffer.flush()


def say(text: str) -> None:
    """Write a line about the launch itself."""
    with contextlib.suppress(OSError):
        sys.stderr.write(f"launch: {text}\n")
        sys.stderr.flush()
