"""The launcher's command line."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from channel import NAME
from checks import Host

VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
ENV_FILE = "distbench.env"
OWN = ("--repeat", "--swap", "--hosts", "--env", "--loadgen-host")
"""Options that nothing behind the -- has."""


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
        repeat: how many runs, one after the other.
        swap: whether two hosts exchange their ranks between runs, in the order ABBA.
        dry_run: only show what would be started.
        print_env: only write ``distbench.env``.
        deploy: first make an environment on every host, and use it.
        wheelhouse: local folder of wheels for it, or None.
        no_index: nothing but these wheels is taken.
        loadgen_host: has no ranks, and the driver; "" for none.
        loadgen_python: there.
        loadgen_dir: there, in which the driver runs.
    """

    hosts: tuple[Host, ...]
    python: str
    folder: str
    env: dict[str, str]
    to: Path
    master_port: int
    command: tuple[str, ...]
    repeat: int
    swap: bool
    dry_run: bool
    print_env: bool
    deploy: bool = False
    wheelhouse: Path | None = None
    no_index: bool = False
    loadgen_host: str = ""
    loadgen_python: str = ""
    loadgen_dir: str = ""


def parser(text: str) -> argparse.ArgumentParser:
    """Return the parser of what stands before the ``--``; its --help shows ``text``."""
    made = argparse.ArgumentParser(
        prog="launch/ssh.py",
        usage="%(prog)s --hosts HOST[:GPUS],... [options] -- -m distbench.SCENARIO [its options]",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = made.add_mutually_exclusive_group(required=True)
    where.add_argument("--hosts", metavar="H[:N],...", help="each with how many ranks: its GPUs")
    where.add_argument("--hostfile", metavar="FILE", help="the same, a host a line, # comments")
    made.add_argument("--python", default="python3", help="on the hosts (python3)")
    made.add_argument("--dir", default="~", help="on the hosts, to run in (home)")
    made.add_argument(
        "--loadgen-host", default="", metavar="H", help="without ranks: a driver runs there"
    )
    made.add_argument("--loadgen-python", metavar="PYTHON", help="there (that of --python)")
    made.add_argument("--loadgen-dir", metavar="DIR", help="there, a clone (that of --dir)")
    made.add_argument("--env", action="append", default=[], metavar="NAME=V", help="of the command")
    made.add_argument("--to", type=Path, default=Path("results"), help="local folder (results)")
    made.add_argument("--master-port", type=int, default=0, metavar="PORT", help="0: a free one")
    made.add_argument("--repeat", type=int, default=1, metavar="N", help="runs (1)")
    made.add_argument(
        "--swap",
        action="store_true",
        help="exchange two hosts' ranks: ABBA; needs --repeat 4, 8...",
    )
    made.add_argument("--dry-run", action="store_true", help="check, show the lines, start nothing")
    made.add_argument(
        "--print-env", action="store_true", help=f"write {ENV_FILE} here and on each host"
    )
    made.add_argument(
        "--deploy",
        action="store_true",
        help="make an environment with this clone on every host, and use it",
    )
    made.add_argument("--wheelhouse", type=Path, metavar="DIR", help="wheels to send for it")
    made.add_argument("--no-index", action="store_true", help="take nothing but these wheels")
    return made


def parse(argv: Sequence[str], text: str) -> Options:
    """Read the command line; ends the program with a sentence where it cannot be used.

    Args:
        argv: without the program's name.
        text: shown by --help.
    """
    split = argv.index("--") if "--" in argv else len(argv)
    made = parser(text)
    told = made.parse_args(argv[:split])
    command = tuple(argv[split + 1 :])
    if command and not (command[0] == "-m" or command[0].endswith(".py")):
        made.error(f"behind -- stands -m MODULE or a script.py, not {command[0]!r}")
    misplaced = [word for word in OWN if word in command]
    if misplaced:
        made.error(f"{misplaced[0]} goes before the --: it is the launcher's")
    if told.print_env and (command or told.dry_run):
        made.error("--print-env starts nothing: give neither a command nor --dry-run with it")
    check_deploy(made, told)
    if not command and not told.print_env and not told.deploy:
        made.error("say what to run behind --, such as: -- -m distbench.offline --duration 5s")
    hosts = read_hosts(made, told.hosts, told.hostfile)
    check_loadgen(made, told, command, hosts)
    if told.repeat < 1:
        made.error(f"--repeat {told.repeat}: at least one run")
    if told.swap and (len(hosts) != 2 or told.repeat % 4):
        made.error("--swap takes two hosts and --repeat 4, 8, 12, ...: each order as often")
    return Options(
        hosts=hosts,
        python=told.python,
        folder=told.dir,
        env=read_env(made, told.env),
        to=told.to,
        master_port=told.master_port,
        command=command,
        repeat=told.repeat,
        swap=told.swap,
        dry_run=told.dry_run,
        print_env=told.print_env,
        deploy=told.deploy,
        wheelhouse=told.wheelhouse,
        no_index=told.no_index,
        loadgen_host=told.loadgen_host,
        loadgen_python=told.loadgen_python or told.python,
        loadgen_dir=told.loadgen_dir or told.dir,
    )


def check_deploy(made: argparse.ArgumentParser, told: argparse.Namespace) -> None:
    """Refuse what does not go together."""
    if (told.wheelhouse or told.no_index) and not told.deploy:
        made.error("--wheelhouse and --no-index are for --deploy: give that as well")
    if told.no_index and not told.wheelhouse:
        made.error("--no-index takes nothing but wheels that are sent: give --wheelhouse DIR")
    if told.wheelhouse and not told.wheelhouse.is_dir():
        made.error(f"--wheelhouse {told.wheelhouse}: no such folder")
    if told.deploy and "/.distbench/" in told.python:
        made.error(
            f"--python {told.python} was deployed: with --deploy name the one to make it with, or "
            "leave --deploy out to use it"
        )
    if told.deploy and told.dry_run:
        made.error("--deploy writes to the hosts: without --dry-run")


def check_loadgen(
    made: argparse.ArgumentParser,
    told: argparse.Namespace,
    command: Sequence[str],
    hosts: Sequence[Host],
) -> None:
    """Refuse a driver on a host of its own where the command has no use for it."""
    name = told.loadgen_host
    if not name:
        if told.loadgen_python or told.loadgen_dir:
            made.error("--loadgen-python and --loadgen-dir are of --loadgen-host: give that too")
        return
    if not NAME.fullmatch(name):
        made.error(f"--loadgen-host {name!r} is no HOST, such as jw1")
    if name in {host.name for host in hosts}:
        made.error(
            f"--loadgen-host {name} has ranks: leave the option out, and rank 0 starts the driver "
            "on its own host, or name a host that is not among --hosts"
        )
    module = command[1] if len(command) > 1 else ""
    if module != "distbench.mlperf" and (
        module != "distbench.server" or given(command, "dispatch") != "central"
    ):
        made.error(
            "--loadgen-host is for -m distbench.mlperf and -m distbench.server --dispatch central: "
            "nothing else has a driver"
        )
    if given(command, "driver") or given(command, "driver-token"):
        made.error(
            "--driver behind the -- names a driver that was started by hand, --loadgen-host "
            "starts one: leave out one of the two"
        )
    if module == "distbench.mlperf" and given(command, "payload") != "data":
        made.error(
            "LoadGen on a host without ranks is MLPerf's Network division, where the samples "
            "themselves cross the wire: give --payload data behind the --"
        )


def read_hosts(
    made: argparse.ArgumentParser, words: str | None, path: str | None
) -> tuple[Host, ...]:
    """Read --hosts, or the file that --hostfile names."""
    if words is None:
        try:
            lines = Path(str(path)).read_text(encoding="utf-8").splitlines()
        except OSError as error:
            made.error(f"--hostfile {path}: {error.strerror}")
        words = ",".join(word for line in lines for word in line.partition("#")[0].split())
    hosts = tuple(one_host(made, word) for word in words.split(",") if word)
    if not hosts:
        made.error("no host was named")
    if len({host.name for host in hosts}) < len(hosts):
        made.error("a host is named twice")
    return hosts


def read_env(made: argparse.ArgumentParser, given: Sequence[str]) -> dict[str, str]:
    """Read every --env."""
    env = {}
    for each in given:
        name, equals, value = each.partition("=")
        if not equals or not VARIABLE.fullmatch(name):
            made.error(f"--env takes NAME=VALUE, not {each!r}")
        env[name] = value
    return env


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
