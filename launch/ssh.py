#!/usr/bin/env python3
"""Run distbench on several hosts over ssh, bring the result here, and leave nothing behind there.

    launch/ssh.py --hosts jw2,jw3 -- -m distbench.offline --duration 5s
    launch/ssh.py --hosts jw2:2,jw3:2 --python '~/distbench/.venv/bin/python' -- -m distbench.server
    launch/ssh.py --hosts jw2,jw3 --repeat 8 --swap -- -m distbench.offline
    launch/ssh.py --hosts jw2,jw3 --deploy -- -m distbench.offline
    launch/ssh.py --hosts jw2,jw3 --loadgen-host jw1 -- -m distbench.mlperf --payload data
    launch/ssh.py --hosts jw2,jw3 --print-env

Needs OpenSSH and Python's standard library: a clone of the repository is enough (numpy as well, to
verify the result here). Before anything is started the hosts are looked at, within 15 s: whether
they can be reached and reach each other, versions, GPUs, disks, the output directory. The first
host is node 0, so rank 0 is there. stdout is rank 0's; every other line goes to stderr behind
``[host rank]``. What still runs on a host ends when this program does, however it ends. On a
--loadgen-host, which has no ranks and need have no torch, the driver runs.

Exit status: the run's own (0; 2 usage; 3 under --strict; 6 incomplete), 4 where a check failed,
1 for anything else that broke, 130 after Ctrl-C.
"""

from __future__ import annotations

import os
import secrets
import shlex
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from channel import Channel, Lost, Refused
from checks import (
    ASK_S,
    FACTS_S,
    Host,
    alike,
    at_once,
    bracketed,
    busy,
    locked,
    reached,
    shadowed,
    sharing,
    shown,
)
from collect import EXIT_STRICT, account, collect, exit_status, names, verified
from deploy import deploy
from driving import Away, driving
from options import ENV_FILE, Options, given, parse
from streams import PREFIX, Streams, say
from swapped import told_apart

EXIT_CHECKS, EXIT_INTERRUPTED = 4, 130
GO_ON = (0, EXIT_STRICT)
"""After these --repeat goes on."""
MEANING = {
    1: "something broke, see above",
    2: "the command cannot be used as asked",
    EXIT_STRICT: "--strict was given and the run is not VALID; torchrun calls that a failure",
    6: "the run is INCOMPLETE",
    EXIT_INTERRUPTED: "interrupted",
}
MOST_SENTENCES = 6
AFTER_S = 25.0
"""The ranks end each other within 20 s; a host that has not ended by then is ended."""


class Unfit(Exception):
    """The hosts cannot be used as they are; each argument is a problem."""


@contextmanager
def connected(options: Options, streams: Streams) -> Iterator[tuple[list[Channel], Away | None]]:
    """Connect to the hosts and to the one that drives; on leaving, whatever runs there is ended."""
    with ExitStack() as stack:
        channels, away = [], None
        for place, host in enumerate(options.hosts):
            take = lambda kind, data, place=place: streams.take(place, kind, data)  # noqa: E731
            channels.append(Channel(host.name, options.python, take))
        every = list(channels)
        if options.loadgen_host:
            last = len(options.hosts)
            away = Away(options, lambda kind, data: streams.take(last, kind, data))
            every.append(away.channel)
        stack.callback(at_once, every, Channel.close)
        yield channels, away


def looked_at(options: Options, channels: Sequence[Channel], away: Away | None) -> list[Host]:
    """Check the hosts; returns those with ranks, with what they said.

    Raises:
        Unfit: there are problems.
    """
    output = given(options.command, "output-dir", "results")
    make = not (options.dry_run or options.print_env)

    def ask(each: Channel) -> dict[str, Any]:
        ranks = each in channels
        folder = options.folder if ranks else options.loadgen_dir
        return each.ask("facts", FACTS_S, folder=folder, output=output, make=make and ranks)

    told, wrong = at_once([*channels, *([away.channel] if away else [])], ask)
    if wrong:
        raise Unfit(*wrong)
    cpu = given(options.command, "device") == "cpu"
    hosts = []
    for host, facts in zip(options.hosts, told, strict=False):  # the last may be the driver's
        if not facts["address"]:
            raise Unfit(f"{host.name}: its ssh server sets no SSH_CONNECTION: no address is known")
        count = host.processes or (1 if cpu else max(1, len(facts["gpus"])))
        hosts.append(replace(host, processes=count, facts=facts))
    problems = alike(hosts, options.python) + busy(hosts, cpu)
    problems += shadowed(hosts) if options.deploy else []
    lacks = away.look(told[-1], hosts) if away else []
    drives = [away.pair] if away and not lacks else []
    problems += lacks
    _, unreached = reached(channels, hosts, options.master_port, drives)
    if problems + unreached:
        raise Unfit(*problems, *unreached)
    if not make:
        return hosts
    shares = sharing(channels, hosts)
    return [replace(host, shares=each) for host, each in zip(hosts, shares, strict=True)]


def lines(
    options: Options, hosts: Sequence[Host], port: int, run_id: str, more: Sequence[str]
) -> list[list[str]]:
    """Return torchrun's argv on each host; ``more`` comes behind the command.

    Static rendezvous, so that rank 0 is on the first host; no restarts, because a run that was
    restarted is another run, and its ranks may wait for each other for ever. The stderr of several
    ranks on a host goes through torchrun's files, so that each line can be told by its rank.
    """
    return [
        [
            *(host.facts["python"], "-m", "torch.distributed.run"),
            *("--nnodes", str(len(hosts)), "--nproc-per-node", str(host.processes)),
            *("--node-rank", str(node), "--rdzv-id", run_id, "--max-restarts", "0"),
            *("--master-addr", hosts[0].address, "--master-port", str(port)),
            *(("--tee", "2") if host.processes > 1 else ()),
            *options.command,
            *more,
        ]
        for node, host in enumerate(hosts)
    ]


def run(
    channels: Sequence[Channel],
    hosts: Sequence[Host],
    argvs: Sequence[list[str]],
    env: dict[str, str],
) -> dict[str, int]:
    """Run the command on all hosts to its end; returns torchrun's exit status by host.

    When one host has ended with an error, or is lost, the others have ``AFTER_S`` to end as well.
    """
    asked = [
        channel.start("run", argv=argv, env=env)
        for channel, argv in zip(channels, argvs, strict=True)
    ]
    codes: dict[str, int] = {}
    ends_at, stopped = float("inf"), False
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
            if stopped:
                say(f"{', '.join(late)} did not answer and counts as lost")
                codes |= dict.fromkeys(late, 1)
                break
            say(f"{', '.join(late)} did not end within {AFTER_S:g} s of the others and is stopped")
            stop(channels)
            stopped, ends_at = True, time.monotonic() + AFTER_S
    return codes


def stop(channels: Sequence[Channel]) -> None:
    """End the command on all hosts that are there."""
    at_once([each for each in channels if not each.lost], lambda c: c.ask("stop", 30, grace_s=12))


def launch(
    options: Options, channels: Sequence[Channel], away: Away | None, streams: Streams
) -> int:
    """Check, then run and collect as often as asked; returns the exit status."""
    hosts = looked_at(options, channels, away)
    if options.print_env:
        return write_env(options, channels, hosts)
    if not options.dry_run:
        since = f"{datetime.now(timezone.utc):%H:%M:%S} UTC"
        who = f"a launch of {since} from {os.uname().nodename} ({secrets.token_hex(4)})"
        held = locked(channels, hosts, who)
        if held:
            raise Unfit(*held)
    worst, results = 0, list[Path]()
    for number in range(options.repeat):
        order = range(len(hosts))
        if options.swap and number % 4 in (1, 2):
            order = order[::-1]
        nodes = hosts
        if options.swap:  # of two hosts, the second may share the first one's folder
            shares = (False, hosts[-1].shares)
            nodes = [replace(hosts[i], shares=shares[node]) for node, i in enumerate(order)]
        streams.seat(order, [host.processes for host in nodes])
        status, folders = one_run(options, [channels[i] for i in order], nodes, away, streams)
        results += folders
        worst = worst or status
        if status not in GO_ON:
            return status
    if options.swap and not options.dry_run:
        for sentence in told_apart(results, [host.facts["host"] for host in hosts]):
            say(sentence)
    return worst


def one_run(
    options: Options,
    channels: Sequence[Channel],
    hosts: Sequence[Host],
    away: Away | None,
    streams: Streams,
) -> tuple[int, list[Path]]:
    """Run once and collect; returns the exit status and the local result directories."""
    drives = [away.pair] if away else []
    port, unreached = reached(channels, hosts, options.master_port, drives)
    if unreached:
        raise Unfit(*unreached)
    run_id = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}"
    env = {**(PREFIX if any(host.processes > 1 for host in hosts) else {}), **options.env}
    with driving(away, channels[0], hosts[0], run_id, options.dry_run) as more:
        argvs = lines(options, hosts, port, run_id, more)
        for host, argv in zip(hosts, argvs, strict=True):
            say(shown(host, env, argv))
        if options.dry_run:
            return 0, []
        return ran(options, channels, hosts, away, streams, argvs, env)


def ran(
    options: Options,
    channels: Sequence[Channel],
    hosts: Sequence[Host],
    away: Away | None,
    streams: Streams,
    argvs: Sequence[list[str]],
    env: dict[str, str],
) -> tuple[int, list[Path]]:
    """Run the command, end what is left of it, collect and tell; returns as ``one_run`` does."""
    before = [names(channels[node], host.facts["output"]) for node, host in enumerate(hosts)]
    cut = False
    try:
        codes = run(channels, hosts, argvs, env)
    except KeyboardInterrupt:
        say("interrupted: what runs on the hosts is ended")
        stop(channels)
        codes, cut = {host.name: 1 for host in hosts}, True
    if away:
        away.end()
    streams.end()
    folders, wrong = collect(channels, hosts, before, options.to)
    wrong += away.bring(folders) if away else []
    for sentence in wrong:
        say(sentence)
    for folder in folders:
        say(f"{hosts[0].name}:{hosts[0].facts['output']}/{folder.name} -> {folder}")
        say(f"{folder.name}: {verified(folder)}")
        for sentence in account(folder):
            say(sentence)
    status = exit_status(folders, codes, streams.exit_told)
    status = EXIT_INTERRUPTED if cut else status or int(bool(wrong))
    if status:
        for sentence, by in list(streams.sentences.items())[:MOST_SENTENCES]:
            say(f"{by} said: {sentence}")
        kept = "" if folders else "; nothing was recorded"
        say(f"exit status {status}: {MEANING.get(status, 'it broke')}{kept}")
    return status, folders


def write_env(options: Options, channels: Sequence[Channel], hosts: Sequence[Host]) -> int:
    """Write what the bare torchrun needs, here and in the folder of each host.

    torchrun takes a host for the endpoint's only if its own name resolves to that address, which on
    Debian it does not (127.0.1.1): so each host is told whether it is, and its own address.
    """
    port, _ = reached(channels, hosts, options.master_port)
    every = {
        "PET_RDZV_BACKEND": "c10d",
        "PET_RDZV_ENDPOINT": f"{bracketed(hosts[0].address)}:{port}",
        "PET_RDZV_ID": f"distbench-{secrets.token_hex(4)}",
        "PET_MAX_RESTARTS": "0",
        **options.env,
    }
    text = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in every.items())
    text += 'case "$(uname -n)" in\n'
    for node, host in enumerate(hosts):
        conf = f"is_host={'false' if node else 'true'}"
        name, address = shlex.quote(host.facts["host"]), shlex.quote(host.address)
        text += f"{name}) export PET_RDZV_CONF={conf} PET_LOCAL_ADDR={address}"
        text += f" PET_NPROC_PER_NODE={host.processes} ;;\n"
    text += "esac\n"
    Path(ENV_FILE).write_text(text, encoding="utf-8")
    told, wrong = at_once(channels, lambda each: each.ask("write", ASK_S, name=ENV_FILE, text=text))
    for host, found in zip(hosts, told, strict=True):
        if found:
            say(f"{host.name}: {found['path']}")
    for sentence in wrong:
        say(sentence)
    say(
        f"on each host: . ./{ENV_FILE}; torchrun --nnodes {len(hosts)} -m distbench.offline "
        f"(torchrun is {hosts[0].facts['python']} -m torch.distributed.run)"
    )
    return int(bool(wrong))


def interrupted(*_: object) -> None:
    """Take a signal for Ctrl-C."""
    raise KeyboardInterrupt


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    options = parse(sys.argv[1:] if argv is None else argv, __doc__)
    # SIGINT as well: a shell's background job inherits it ignored. Of SIGHUP `nohup` wants that.
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, interrupted)
    driver = [Host(f"{options.loadgen_host} driver", 0)] if options.loadgen_host else []
    streams = Streams([*options.hosts, *driver])
    try:
        try:
            options.to.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Unfit(f"--to {options.to}: {error.strerror}: name another folder") from error
        if options.deploy:
            with connected(options, streams) as (channels, _):
                python, wrong = deploy(
                    channels, options.python, options.wheelhouse, options.no_index
                )
            if wrong:
                raise Unfit(*wrong)
            say(f"until this clone changes, without --deploy: --python '{python}'")
            options = replace(options, python=python)
        if not options.command and not options.print_env:
            return 0
        with connected(options, streams) as (channels, away):
            return launch(options, channels, away, streams)
    except Unfit as problems:
        for sentence in problems.args:
            say(sentence)
        return EXIT_CHECKS
    except (Lost, Refused, OSError) as error:
        say(str(error))
        return 1
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


if __name__ == "__main__":
    sys.exit(main())
