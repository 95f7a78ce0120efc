"""What must be true of the hosts before anything is started on them, asked of all at once.

Each problem is a sentence that names the host, what was found, what is needed and the remedy.
"""

from __future__ import annotations

import itertools
import secrets
import shlex
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from channel import Channel, Lost, Refused

FACTS_S = 10.0
"""For connecting and the first answer; ssh itself gives up connecting after 8 s. With one slow step
all checks end within the 15 s that are promised."""
ASK_S = 8.0
"""For one request that only looks; with ssh's own limit for connecting."""
REACH_S = 4.0
LEAST_FREE_BYTES = 256 << 20
PAIRS_OF = 8
"""Up to so many hosts every pair is tried, above it each one's way to and from the first."""


@dataclass(frozen=True)
class Host:
    """A host that a launch uses.

    Attributes:
        name: as given by the user.
        processes: ranks to start there.
        facts: what its agent said of it.
        shares: whether its output directory is the first host's.
    """

    name: str
    processes: int
    facts: Mapping[str, Any] = field(default_factory=dict)
    shares: bool = False

    @property
    def address(self) -> str:
        """The address at which ssh reached it; of a driver's, that on its way to the ranks."""
        return str(self.facts["address"][0])


def bracketed(address: str) -> str:
    """Return an address as it stands before a port: IPv6 in brackets."""
    return f"[{address}]" if ":" in address else address


def shown(host: Host, env: Mapping[str, str], argv: Sequence[str]) -> str:
    """Return what is started on a host, as it could be typed there."""
    words = [f"{name}={value}" for name, value in env.items()] + [*argv]
    return f"{host.name}: cd {shlex.quote(host.facts['folder'])} && {shlex.join(words)}"


def at_once(
    channels: Sequence[Channel], ask: Callable[[Channel], Any]
) -> tuple[list[Any], list[str]]:
    """Ask something of all hosts at the same time.

    Returns:
        The answers, None where there is none, and what went wrong.
    """

    def safely(channel: Channel) -> tuple[Any, str]:
        try:
            return ask(channel), ""
        except (Lost, Refused) as error:
            return None, str(error)

    with ThreadPoolExecutor(max(1, len(channels))) as pool:
        try:
            told = list(pool.map(safely, channels))
        except KeyboardInterrupt:
            for channel in channels:
                channel.give_up("interrupted")
            raise
    return [found for found, _ in told], [why for _, why in told if why]


def alike(hosts: Sequence[Host], python: str) -> list[str]:
    """Return what is wrong with versions, names and disks of the hosts."""
    problems = []
    for host in hosts:
        found = host.facts["versions"]
        for name in ("torch", "numpy", "distbench"):
            if name not in found:
                problems.append(
                    f"{host.name}: {host.facts['python']} has no {name}: give --python the one of "
                    f"the environment that has it (now {python!r}), or --deploy to make one"
                )
        if host.facts["free_bytes"] < LEAST_FREE_BYTES:
            problems.append(
                f"{host.name}: {host.facts['output']} has {host.facts['free_bytes'] >> 20} MiB "
                f"free, {LEAST_FREE_BYTES >> 20} MiB are needed: make room, or give another "
                "--output-dir"
            )
    for name in ("torch", "numpy", "distbench"):
        every = {host.name: host.facts["versions"].get(name) for host in hosts}
        if None not in every.values() and len(set(every.values())) > 1:
            shown = ", ".join(f"{version} on {host}" for host, version in every.items())
            problems.append(f"{name} differs: {shown}: install one version on all")
    for one, other in itertools.combinations(hosts, 2):
        if one.facts["host"] == other.facts["host"]:
            problems.append(
                f"{one.name} and {other.name} both call themselves {one.facts['host']!r}: name a "
                "host once, and give each a hostname of its own"
            )
    return problems


def shadowed(hosts: Sequence[Host]) -> list[str]:
    """Return where another distbench stands before the one that was deployed."""
    return [
        f"{host.name}: {found} would be run in place of what was deployed: give another --dir, or "
        "no PYTHONPATH"
        for host in hosts
        if (found := host.facts["distbench_at"]) and "/.distbench/" not in found
    ]


def busy(hosts: Sequence[Host], cpu: bool) -> list[str]:
    """Return which GPUs are in use, or are too few."""
    problems = []
    for host in hosts:
        cards = [] if cpu else host.facts["gpus"]
        for number, card in enumerate(cards):
            if card["used_by"]:
                problems.append(
                    f"{host.name}: GPU {number} ({card['name']}) is used by {card['used_by']}: "
                    "end that, or name other hosts"
                )
        if cards and host.processes > len(cards):
            problems.append(
                f"{host.name}: {host.processes} ranks were asked for and it has {len(cards)} GPUs: "
                f"give {host.name}:{len(cards)}, or --device cpu behind the --"
            )
    return problems


def reached(
    channels: Sequence[Channel],
    hosts: Sequence[Host],
    port: int,
    drives: Sequence[tuple[Channel, Host]] = (),
) -> tuple[int, list[str]]:
    """Try whether the hosts reach each other, the first one at the port of the rendezvous.

    Args:
        channels: to the hosts.
        hosts: likewise.
        port: of the rendezvous; 0 for a free one.
        drives: a host without ranks that the others must reach.

    Returns:
        That port, and what went wrong.
    """
    token = secrets.token_hex(16)
    first = channels[0]
    channels = [*channels, *(channel for channel, _ in drives)]
    doors, wrong = at_once(
        channels,
        lambda each: each.ask("listen", ASK_S, token=token, port=port * (each is first)),
    )
    if wrong:
        return 0, [f"{why}: give --master-port another one, or 0 for any" for why in wrong]
    places = range(len(hosts))
    pairs = [
        (i, j)
        for i, j in itertools.permutations(places, 2)
        if len(hosts) <= PAIRS_OF or 0 in (i, j)
    ]
    pairs += [(i, len(hosts)) for i in places if drives]
    hosts = [*hosts, *(host for _, host in drives)]

    def way(pair: tuple[int, int]) -> str:
        start, end = pair
        address, port = hosts[end].address, doors[end]["port"]
        try:
            channels[start].ask(
                "reach", ASK_S, address=address, port=port, token=token, within_s=REACH_S
            )
        except (Lost, Refused) as error:
            return (
                f"{hosts[start].name} does not reach {hosts[end].name} at {address} port {port} "
                f"({str(error).partition(': ')[2]}): open the firewall between them "
                "(launch/ops/firewall.nft shows how), for gloo on any port"
            )
        return ""

    with ThreadPoolExecutor(32) as pool:
        problems = [why for why in pool.map(way, pairs) if why]
    at_once(channels, lambda each: each.ask("hush", ASK_S))
    return doors[0]["port"], problems


def sharing(channels: Sequence[Channel], hosts: Sequence[Host]) -> list[bool]:
    """Return which hosts have the first one's output directory."""
    first, name = channels[0], f".shared-{secrets.token_hex(8)}"
    first.ask("mark", ASK_S, output=hosts[0].facts["output"], name=name)

    def looks(place: int) -> bool:
        output = hosts[place].facts["output"]
        found = channels[place].ask("marked", ASK_S, output=output, names=[name])
        return bool(found["names"])

    try:
        return [False, *(looks(place) for place in range(1, len(hosts)))]
    finally:
        first.ask("unmark", ASK_S, output=hosts[0].facts["output"], name=name)


def locked(channels: Sequence[Channel], hosts: Sequence[Host], who: str) -> list[str]:
    """Hold every host's output directory; returns where another launch holds it."""
    problems = []
    for channel, host in zip(channels, hosts, strict=True):
        if host.shares:
            continue
        output = host.facts["output"]
        by = channel.ask("lock", ASK_S, output=output, who=who)["held_by"]
        if by and by != who:  # hosts that share a folder which is not the first one's
            problems.append(
                f"{host.name}: {output} is in use by {by}: wait for it, or give another "
                "--output-dir behind the --"
            )
    return problems
