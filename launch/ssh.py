#!/usr/bin/env python3
"""Run distbench on several hosts over ssh, bring the result here, and leave nothing behind there.

    launch/ssh.py --hosts jw2,jw3 -- -m distbench.offline --duration 5s
    launch/ssh.py --hosts jw2:2,jw3:2 --python '~/distbench/.venv/bin/python' -- -m distbench.server
    launch/ssh.py --hosts jw2,jw3 --print-env

Needs OpenSSH and Python's standard library: a clone of the repository is enough (numpy as well, to
verify the result here). Before anything is started the hosts are looked at, within 15 s: whether
they can be reached and reach each other, versions, GPUs, disks, the output directory. The first
host is node 0, so rank 0 is there. stdout is rank 0's; every other line goes to stderr behind
``[host]``. What still runs on a host ends when this program does, however it ends.

Exit status: the run's own (0; 2 usage; 3 under --strict; 6 incomplete), 4 where a check failed,
1 for anything else that broke, 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import os
import re
import secrets
import shlex
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from channel import NAME, Channel, Lost, Refused
from checks import LIMIT_S, Host, alike, at_once, busy, locked, reached, sharing
from collect import account, collect, exit_status, names, verified

EXIT_USAGE, EXIT_CHECKS, EXIT_INTERRUPTED = 2, 4, 130
AFTER_S = 25.0
"""The ranks end each other within 20 s; a host that has not ended by then is ended."""
VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
ENV_FILE = "distbench.env"


@dataclass(frozen=True)
class Options:
    """What was asked for.

    Attributes:
        hosts: in order; the first is node 0. 0 processes stand for one a GPU.
        python: on the hosts.
        folder: on the hosts, in which the command runs.
        env: of the command, beside the hosts' own.
        to: local folder for results.
        master_port: of the rendezvous; 0 for a free one.
        command: for torchrun, from ``-m`` on.
        dry_run: only show what would be started.
        print_env: only write ``distbench.env``.
    """

    hosts: tuple[Host, ...]
    python: str
    folder: str
    env: dict[str, str]
    to: Path
    master_port: int
    command: tuple[str, ...]
    dry_run: bool
    print_env: bool


def parse(argv: Sequence[str]) -> Options:
    """Read the command line; ends the program with a sentence where it cannot be used."""
    split = argv.index("--") if "--" in argv else len(argv)
    made = argparse.ArgumentParser(
        prog="launch/ssh.py",
        usage="%(prog)s --hosts HOST[:GPUS],... [options] -- -m distbench.SCENARIO [its options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = made.add_mutually_exclusive_group(required=True)
    where.add_argument("--hosts", metavar="H[:N],...", help="each with how many ranks: its GPUs")
    where.add_argument("--hostfile", metavar="FILE", help="the same, a host a line, # comments")
    made.add_argument("--python", default="python3", help="on the hosts (python3)")
    made.add_argument("--dir", default="~", help="on the hosts, to run in (home)")
    made.add_argument("--env", action="append", default=[], metavar="NAME=V", help="of the command")
    made.add_argument("--to", type=Path, default=Path("results"), help="local folder (results)")
    made.add_argument("--master-port", type=int, default=0, metavar="PORT", help="0: a free one")
    made.add_argument("--dry-run", action="store_true", help="check, show the lines, start nothing")
    made.add_argument(
        "--print-env", action="store_true", help=f"write {ENV_FILE} here and on each host"
    )
    told = made.parse_args(argv[:split])
    command = tuple(argv[split + 1 :])
    if not command and not told.print_env:
        made.error("say what to run behind --, such as: -- -m distbench.offline --duration 5s")
    text = told.hosts
    if text is None:
        try:
            lines = Path(told.hostfile).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            made.error(f"--hostfile {told.hostfile}: {error.strerror}")
        text = ",".join(word for line in lines for word in line.partition("#")[0].split())
    hosts = [one_host(made, word) for word in text.split(",") if word]
    if not hosts:
        made.error("no host was named")
    if len({host.name for host in hosts}) < len(hosts):
        made.error("a host is named twice")
    env = {}
    for each in told.env:
        name, equals, value = each.partition("=")
        if not equals or not VARIABLE.fullmatch(name):
            made.error(f"--env takes NAME=VALUE, not {each!r}")
        env[name] = value
    return Options(
        tuple(hosts),
        told.python,
        told.dir,
        env,
        told.to,
        told.master_port,
        command,
        told.dry_run,
        told.print_env,
    )


def one_host(made: argparse.ArgumentParser, word: str) -> Host:
    """Read HOST or HOST:RANKS."""
    name, colon, count = word.partition(":")
    if not NAME.fullmatch(name) or (colon and not (count.isdecimal() and int(count))):
        made.error(f"{word!r} is no HOST or HOST:RANKS, such as jw2 or jw2:4")
    return Host(name, int(count) if colon else 0)


def given(command: Sequence[str], option: str, default: str = "") -> str:
    """Return the value of an option of the command, as distbench reads it: the last one counts."""
    spelt, value = {f"--{option}", f"--{option.replace('-', '_')}"}, default
    for place, word in enumerate(command):
        name, equals, behind = word.partition("=")
        if name in spelt:
            value = behind if equals else "".join(command[place + 1 : place + 2])
    return value


# -- output --------------------------------------------------------------------------------------


class Streams:
    """Puts the hosts' lines where they belong, whole lines only.

    Attributes:
        exit_told: the first exit status of a rank that torchrun told of; 0 for none.
    """

    def __init__(self, hosts: Sequence[Host]) -> None:
        self.exit_told = 0
        self._hosts = [host.name for host in hosts]
        self._lock = threading.Lock()
        self._rest: dict[tuple[int, bytes], bytes] = {}

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
        if kind == b"O" and place == 0:
            sys.stdout.buffer.write(line + b"\n")
            sys.stdout.buffer.flush()
            return
        found = re.search(rb"exitcode\s*:\s*(\d+)", line)
        if found and not self.exit_told:
            self.exit_told = int(found.group(1))
        sys.stderr.buffer.write(b"[%s] %s\n" % (self._hosts[place].encode(), line))
        sys.stderr.buffer.flush()


def say(text: str) -> None:
    """Write a line about the launch itself."""
    sys.stderr.write(f"launch: {text}\n")
    sys.stderr.flush()


# -- one launch ----------------------------------------------------------------------------------


class Unfit(Exception):
    """The hosts cannot be used as they are; each argument is a problem."""


@contextmanager
def connected(options: Options, streams: Streams) -> Iterator[list[Channel]]:
    """Connect to all hosts; on leaving, whatever runs there is ended."""
    with ExitStack() as stack:
        channels = []
        for place, host in enumerate(options.hosts):
            take = lambda kind, data, place=place: streams.take(place, kind, data)  # noqa: E731
            channels.append(Channel(host.name, options.python, take))
        stack.callback(at_once, channels, Channel.close)
        yield channels


def looked_at(options: Options, channels: Sequence[Channel]) -> tuple[list[Host], int]:
    """Check the hosts; returns them with what they said, and the port of the rendezvous.

    Raises:
        Unfit: there are problems.
    """
    output = given(options.command, "output-dir", "results")
    told, wrong = at_once(
        channels,
        lambda each: each.ask("facts", LIMIT_S, folder=options.folder, output=output),
    )
    if wrong:
        raise Unfit(*wrong)
    cpu = given(options.command, "device") == "cpu"
    hosts = []
    for host, facts in zip(options.hosts, told, strict=True):
        if not facts["address"]:
            raise Unfit(
                f"{host.name}: its ssh server sets no SSH_CONNECTION, so no address is known"
            )
        count = host.processes or (1 if cpu else max(1, len(facts["gpus"])))
        hosts.append(replace(host, processes=count, facts=facts))
    problems = alike(hosts, options.python) + busy(hosts, cpu)
    port, unreached = reached(channels, hosts, options.master_port)
    if problems + unreached:
        raise Unfit(*problems, *unreached)
    shares = sharing(channels, hosts)
    return [replace(host, shares=each) for host, each in zip(hosts, shares, strict=True)], port


def lines(options: Options, hosts: Sequence[Host], port: int, run_id: str) -> list[list[str]]:
    """Return torchrun's argv on each host.

    Static rendezvous, so that rank 0 is on the first host; no restarts, because a run that was
    restarted is another run, and its ranks may wait for each other for ever.
    """
    return [
        [
            *(host.facts["python"], "-m", "torch.distributed.run"),
            *("--nnodes", str(len(hosts)), "--nproc-per-node", str(host.processes)),
            *("--node-rank", str(node), "--rdzv-id", run_id, "--max-restarts", "0"),
            *("--master-addr", hosts[0].address, "--master-port", str(port)),
            *options.command,
        ]
        for node, host in enumerate(hosts)
    ]


def run(
    channels: Sequence[Channel], hosts: Sequence[Host], argvs: Sequence[list[str]], options: Options
) -> dict[str, int]:
    """Run the command on all hosts to its end; returns torchrun's exit status by host.

    When one host has ended with an error, or is lost, the others have ``AFTER_S`` to end as well.
    """
    asked = [
        channel.start("run", argv=argv, env=options.env)
        for channel, argv in zip(channels, argvs, strict=True)
    ]
    codes: dict[str, int] = {}
    ends_at = float("inf")
    while len(codes) < len(hosts):
        for channel, host, number in zip(channels, hosts, asked, strict=True):
            if host.name in codes:
                continue
            try:
                codes[host.name] = int(channel.result(number, 0.1)["exit"])
            except (Lost, Refused) as error:
                if channel.lost or isinstance(error, Refused):
                    say(f"{error}")
                    codes[host.name] = 1
            if codes.get(host.name):
                ends_at = min(ends_at, time.monotonic() + AFTER_S)
        if time.monotonic() > ends_at:
            late = [host.name for host in hosts if host.name not in codes]
            say(f"{', '.join(late)} did not end within {AFTER_S:g} s of the others and is stopped")
            stop(channels)
            ends_at = float("inf")
    return codes


def stop(channels: Sequence[Channel]) -> None:
    """End the command on all hosts that are there."""
    at_once([each for each in channels if not each.lost], lambda c: c.ask("stop", 30, grace_s=12))


def launch(options: Options, channels: Sequence[Channel], streams: Streams) -> int:
    """Check, run, collect; returns the exit status."""
    hosts, port = looked_at(options, channels)
    if options.print_env:
        return write_env(channels, hosts, port)
    run_id = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    argvs = lines(options, hosts, port, run_id)
    if not options.dry_run:
        held = locked(channels, hosts, f"launch {run_id} from {os.uname().nodename}")
        if held:
            raise Unfit(*held)
    for host, argv in zip(hosts, argvs, strict=True):
        words = [f"{name}={value}" for name, value in options.env.items()] + argv
        say(f"{host.name}: cd {shlex.quote(host.facts['folder'])} && {shlex.join(words)}")
    if options.dry_run:
        return 0
    before = [names(channels[node], host.facts["output"]) for node, host in enumerate(hosts)]
    interrupted = False
    try:
        codes = run(channels, hosts, argvs, options)
    except KeyboardInterrupt:
        say("interrupted: what runs on the hosts is ended")
        stop(channels)
        codes, interrupted = {host.name: 1 for host in hosts}, True
    streams.end()
    folders, wrong = collect(channels, hosts, before, options.to)
    for sentence in wrong:
        say(sentence)
    for folder in folders:
        say(f"{hosts[0].name}:{hosts[0].facts['output']}/{folder.name} -> {folder}")
        say(f"{folder.name}: {verified(folder)}")
        for sentence in account(folder):
            say(sentence)
    if not folders:
        say("nothing was recorded: what each host said stands above, behind its name")
    status = exit_status(folders, codes, "--strict" in options.command, streams.exit_told)
    return EXIT_INTERRUPTED if interrupted else status or int(bool(wrong))


def write_env(channels: Sequence[Channel], hosts: Sequence[Host], port: int) -> int:
    """Write what the bare torchrun needs, here and in the folder of each host.

    torchrun takes a host for the endpoint's only if its own name resolves to that address, which on
    Debian it does not (127.0.1.1): so each host is told whether it is, and its own address.
    """
    every = {
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"{hosts[0].address}:{port}",
        "PET_RDZV_ID": f"distbench-{secrets.token_hex(4)}",
        "PET_MAX_RESTARTS": "0",
    }
    text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in every.items())
    text += 'case "$(uname -n)" in\n'
    for node, host in enumerate(hosts):
        conf = f"is_host={'false' if node else 'true'}"
        name, address = shlex.quote(host.facts["host"]), shlex.quote(host.address)
        text += f"{name}) export PET_RDZV_CONF={conf} PET_LOCAL_ADDR={address} ;;\n"
    text += "esac\n"
    Path(ENV_FILE).write_text(text, encoding="utf-8")
    told, wrong = at_once(
        channels, lambda each: each.ask("write", LIMIT_S, name=ENV_FILE, text=text)
    )
    for host, found in zip(hosts, told, strict=True):
        if found:
            say(f"{host.name}: {found['path']}")
    for sentence in wrong:
        say(sentence)
    say(f"on each host: . ./{ENV_FILE}; torchrun --nnodes {len(hosts)} -m distbench.offline")
    return int(bool(wrong))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGINT))
    streams = Streams(options.hosts)
    try:
        with connected(options, streams) as channels:
            return launch(options, channels, streams)
    except Unfit as problems:
        for sentence in problems.args:
            say(sentence)
        return EXIT_CHECKS
    except (Lost, Refused) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
