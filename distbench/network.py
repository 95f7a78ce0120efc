"""Which network interface the ranks talk over, found before any process group is made.

Left alone, gloo resolves the hostname, which on a Debian host is 127.0.1.1, and NCCL takes the
first interface that looks usable, which on a Kubernetes node may be a bridge of pods. Here every
node looks up its route to the master address and tells the others, through torchrun's store, which
address it reached; the master's own node takes the interface that owns that address.
"""

from __future__ import annotations

import array
import fcntl
import socket
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from distbench.errors import UsageError

SIOCGIFCONF = 0x8912
_RECORD_BYTES = 40  # sizeof(struct ifreq) on 64-bit Linux
VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")


@dataclass(frozen=True)
class Route:
    """What one node found out about its way to the master.

    Attributes:
        node: number of the node.
        host: hostname.
        space: names the network stack: nodes of equal space share every address.
        local: whether the master address belongs to this node.
        reached: the address the master's name stands for here.
        source: this node's own address on the way there.
    """

    node: int
    host: str
    space: str
    local: bool
    reached: str
    source: str


@dataclass(frozen=True)
class Interface:
    """The interface this rank uses.

    Attributes:
        name: such as "eth0"; "lo" where all ranks are on one host.
        address: this host's address on it.
        origin: where the choice comes from, in words.
    """

    name: str
    address: str
    origin: str


def addresses() -> dict[str, str]:
    """Return this network stack's addresses, each with the name of its interface."""
    found: dict[str, str] = {}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        space = array.array("B", bytes(_RECORD_BYTES * 1024))
        request = bytearray(struct.pack("iP", len(space), space.buffer_info()[0]))
        fcntl.ioctl(probe, SIOCGIFCONF, request)
        used = struct.unpack("iP", request)[0]
    for start in range(0, used, _RECORD_BYTES):
        record = space[start : start + _RECORD_BYTES].tobytes()
        name = record[:16].split(b"\0", 1)[0].decode().split(":")[0]
        found[socket.inet_ntoa(record[20:24])] = name
    try:
        lines = Path("/proc/net/if_inet6").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        digits, _index, _prefix, _scope, _flags, name = line.split()
        found[socket.inet_ntop(socket.AF_INET6, bytes.fromhex(digits))] = name
    return found


def network_space() -> str:
    """Name this process's network stack: the kernel's boot and the network namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{Path('/proc/self/ns/net').stat().st_ino}"
    except OSError:
        return socket.gethostname()


def find_route(node: int, master: str, port: int) -> Route:
    """Look up the way to the master without sending anything.

    Args:
        node: number of this node.
        master: MASTER_ADDR.
        port: MASTER_PORT.

    Raises:
        UsageError: the master's name does not resolve, or no route leads to it.
    """
    host = socket.gethostname()
    try:
        kind = socket.SOCK_DGRAM
        family, _, _, _, target = socket.getaddrinfo(master, port, type=kind)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # a datagram socket: this only picks a route
            source = str(probe.getsockname()[0])
    except OSError as error:
        raise UsageError(
            f"node {node} ({host}) has no way to the master address {master!r}: {error}; give "
            "torchrun an --rdzv-endpoint or --master-addr that every node can reach"
        ) from error
    reached = str(target[0])
    local = is_loopback(reached) or reached in addresses()
    return Route(node, host, network_space(), local, reached, source)


def is_loopback(address: str) -> bool:
    """Tell whether an address never leaves its host."""
    return address.startswith("127.") or address == "::1"


def choose_interface(
    own: Route, routes: Sequence[Route], owners: dict[str, str], asked: str | None
) -> Interface:
    """Choose the interface of this node from what all nodes found.

    Args:
        own: this node's route.
        routes: the routes of all nodes, own included.
        owners: this host's addresses with their interfaces, from ``addresses``.
        asked: GLOO_SOCKET_IFNAME as the user set it, or None.

    Raises:
        UsageError: no interface fits, or several nodes would talk over loopback.
    """
    who = f"node {own.node} ({own.host})"
    remedy = "set GLOO_SOCKET_IFNAME to the interface that joins the nodes"
    if asked:
        mine = [a for a, name in owners.items() if name == asked]
        if not mine:
            raise UsageError(
                f"{who} has no interface {asked!r} with an address, which GLOO_SOCKET_IFNAME names;"
                f" it has {', '.join(sorted(set(owners.values())))}"
            )
        return Interface(asked, mine[0], "GLOO_SOCKET_IFNAME")
    if len({route.space for route in routes}) == 1:
        return Interface("lo", "127.0.0.1", "all ranks share one network stack")
    if own.local:
        reached = [r.reached for r in routes if not r.local]
        if not reached:
            raise UsageError(
                f"every node takes the master address to be itself ({own.host}: {own.reached}): "
                "give torchrun the master's address on the network, not localhost"
            )
        address, origin = reached[0], "the address that the other nodes reached"
    else:
        address, origin = own.source, f"the route to the master at {own.reached}"
    name = owners.get(address)
    if name is None:
        raise UsageError(
            f"{who} owns no interface with the address {address}, {origin}: an address translation "
            f"lies between the nodes; {remedy}"
        )
    if is_loopback(address):
        raise UsageError(f"{who} would reach the other nodes over loopback ({address}); {remedy}")
    return Interface(name, address, origin)


def interface_mtu(interface: str) -> int:
    """Return an interface's MTU in bytes, 0 where it cannot be read."""
    try:
        return int(Path(f"/sys/class/net/{interface}/mtu").read_text())
    except (OSError, ValueError):
        return 0
