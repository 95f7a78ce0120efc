"""The driver on a host without ranks (``--loadgen-host``): looked at, started, ended, for each run.

The ranks are told its address, and the file of its token on rank 0's host. A token is fresh for
each run, crosses the ssh channels, and lies in private folders, which the hosts' agents take away.
The driver writes into the one on its host: rank 0 fetches that, or else it is brought here.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from channel import Channel, Lost, Refused
from checks import ASK_S, Host, bracketed, shown
from collect import copy, names, salvage
from onhost import TOKEN
from options import Options, given
from streams import say

LISTENS = re.compile(rb"driver listens on (\S+)\n")
START_S = 60.0
"""Python and numpy over a slow disk."""
END_S = 10.0
"""A driver ends with its links; it saves its log before."""
ROUND = "mlperf-v5.0"
"""That of distbench.mlperf, where it is told of none."""


class Away:
    """The host that drives, and what a run's driver is known to have done.

    Args:
        options: of the launch.
        show: called with what the driver wrote, as ``Channel`` does.

    Attributes:
        channel: to it.
        host: it; its facts once it has been looked at.
        options: of the launch.
    """

    def __init__(self, options: Options, show: Callable[[bytes, bytes], None]) -> None:
        self.host = Host(options.loadgen_host, 0)
        self.options, self._show = options, show
        self._said, self._hushed = b"", False
        self._number, self._folder, self._spent = 0, "", False
        self.channel = Channel(options.loadgen_host, options.loadgen_python, self._take)

    def _take(self, kind: bytes, data: bytes) -> None:
        if kind == b"O":
            self._said += data
        if not self._hushed:
            self._show(kind, data)

    @property
    def pair(self) -> tuple[Channel, Host]:
        """Its channel, and it."""
        return self.channel, self.host

    def look(self, facts: Mapping[str, Any], hosts: Sequence[Host]) -> list[str]:
        """Check whether a driver can run there; returns what is wrong.

        Args:
            facts: what its agent said of it.
            hosts: those with ranks, and what they said.
        """
        name, options = self.host.name, self.options
        problems = unfit(name, facts, hosts)
        if problems:
            return problems
        argv = [facts["python"], "-m", "distbench.drivable"]
        if "distbench.mlperf" in options.command:
            argv += ["--rules", given(options.command, "rules", ROUND)]
        try:
            found = self.channel.ask("tried", ASK_S + 2, argv=argv, env=options.env, within_s=ASK_S)
            if found["exit"]:
                return [f"{name}: {found['said'].removeprefix('distbench: ')}"]
            way = self.channel.ask("towards", ASK_S, address=hosts[0].address)
        except (Lost, Refused) as error:
            return [str(error)]
        self.host = replace(self.host, facts={**facts, "address": [way["address"]]})
        return []

    def argv(self, run_id: str) -> list[str]:
        """Return the driver's argv in a run."""
        folder = f"{self.host.facts['output']}/.driver-{run_id}"
        return [
            *(self.host.facts["python"], "-m", "distbench.driver"),
            *("--listen", self.host.address, "--token-file", f"{folder}/{TOKEN}"),
            *("--output-dir", folder),
        ]

    def start(self, run_id: str, token: str) -> str:
        """Start a driver; returns where it listens.

        Raises:
            Lost: the channel ended meanwhile.
            Refused: it did not start.
        """
        argv = self.argv(run_id)
        self._folder, self._spent = argv[-1], False
        self._said, self._hushed = b"", False
        self.channel.ask("hide", ASK_S, folder=self._folder, text=token)
        self._number = self.channel.start("run", argv=argv, env=self.options.env)
        until = time.monotonic() + START_S
        while not (found := LISTENS.search(self._said)):
            try:
                code = self.channel.result(self._number, 0.1)["exit"]
            except Lost:
                if self.channel.lost:
                    raise
                if time.monotonic() > until:
                    raise Refused(
                        f"{self.host.name}: the driver did not listen within {START_S:g} s"
                    ) from None
            else:
                raise Refused(
                    f"{self.host.name}: the driver ended with status {code} before it listened: "
                    "its own words stand above"
                )
        return found.group(1).decode("ascii", "replace")

    def end(self) -> None:
        """Let the driver end by itself, which it does with its links; else end it."""
        try:
            within_s = END_S if names(self.channel, self._folder) else 0.0  # else nobody called it
            code = self.channel.result(self._number, within_s)["exit"]
            if code:
                say(f"{self.host.name}: the driver ended with status {code}")
        except (Lost, Refused):
            self._hushed = True  # what it says of being ended is no news
            with contextlib.suppress(Lost, Refused):
                self.channel.ask("stop", 30, grace_s=END_S)

    def bring(self, folders: Sequence[Path]) -> list[str]:
        """Complete results by what the driver alone has; returns what could not be brought.

        Args:
            folders: the results of the run, as they are here.
        """
        place = f"the driver's part stays there in {self._folder}"
        wrong = []
        try:
            for name in sorted(names(self.channel, self._folder)):
                target = next((each for each in folders if each.name == name), None)
                if target is None:
                    wrong.append(
                        f"{self.host.name}: nothing of {name} came from the ranks: {place}"
                    )
                elif not whole(target / "driver") or self._has_more(target):
                    wrong += [f"{why}: {place}" for why in self._merged(target)]
        except (Lost, Refused, OSError) as error:
            wrong.append(f"{error}: {place}")
        self._spent = not wrong
        return wrong

    def _has_more(self, target: Path) -> bool:
        """Whether a log of LoadGen's did not come over: rank 0 leaves out what is too large."""
        tree = self.channel.ask("tree", ASK_S, folder=f"{self._folder}/{target.name}")["files"]
        logs = [path for path, _ in tree if path.startswith("loadgen/")]
        return any(not (target / path).exists() for path in logs)

    def _merged(self, target: Path) -> list[str]:
        with tempfile.TemporaryDirectory(prefix=".launch-", dir=target.parent) as spare:
            part = Path(spare) / target.name
            copy(self.channel, f"{self._folder}/{target.name}", part)
            return salvage([target, part])

    def forget(self) -> None:
        """Take the token away there, and what the driver wrote where nothing needs it any more."""
        with contextlib.suppress(Lost, Refused):
            self.channel.ask("forget", ASK_S, drop=[self._folder] * self._spent)


def whole(folder: Path) -> bool:
    """Whether a driver's folder is more than rank 0's note that it was lost."""
    return (folder / "done.json").exists() and (folder / "samples.npy").exists()


def unfit(name: str, facts: Mapping[str, Any], hosts: Sequence[Host]) -> list[str]:
    """Return what a host lacks to drive, as far as its facts tell.

    Args:
        name: of it.
        facts: what its agent said.
        hosts: those with ranks.
    """
    found, python = facts["versions"], facts["python"]
    if "numpy" not in found:
        return [
            f"{name}: {python} has no numpy, which a driver needs: `{python} -m pip install "
            "numpy`, or give --loadgen-python the one of an environment that has it"
        ]
    if "distbench" not in found:
        return [
            f"{name}: {python} finds no distbench in {facts['folder']}: give --loadgen-dir the "
            "folder of a clone there"
        ]
    problems = []
    first = hosts[0].facts["versions"].get("distbench")
    if first is not None and found["distbench"] != first:
        problems.append(
            f"distbench differs: {first} on {hosts[0].name}, {found['distbench']} on {name}: "
            "install one version on all"
        )
    for host in hosts:
        if host.facts["host"] == facts["host"]:
            problems.append(
                f"{name} calls itself {facts['host']!r}, as {host.name} does, which has ranks: "
                "leave --loadgen-host out, and rank 0 starts the driver on its own host"
            )
    return problems


@contextmanager
def driving(
    away: Away | None, channel: Channel, host: Host, run_id: str, dry_run: bool
) -> Iterator[list[str]]:
    """Have a driver for one run; yields what the ranks' command is told of it.

    Args:
        away: the host that drives; None for none, and nothing is told.
        channel: to rank 0's host, which gets the token too.
        host: that one.
        run_id: names the folders.
        dry_run: show it and start nothing.

    Raises:
        Lost: a channel ended meanwhile.
        Refused: the driver did not start.
    """
    if away is None:
        yield []
        return
    folder = f"{host.facts['output']}/.token-{run_id}"
    say(shown(away.host, away.options.env, away.argv(run_id)))
    if dry_run:
        address = f"{bracketed(away.host.address)}:PORT"
        yield ["--driver", address, "--driver-token", f"{folder}/{TOKEN}"]
        return
    token = secrets.token_hex(16)
    try:
        channel.ask("hide", ASK_S, folder=folder, text=token)
        address = away.start(run_id, token)
        yield ["--driver", address, "--driver-token", f"{folder}/{TOKEN}"]
    finally:
        away.forget()
        with contextlib.suppress(Lost, Refused):
            channel.ask("forget", ASK_S, drop=[])
