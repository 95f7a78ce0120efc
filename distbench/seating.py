"""Taking one's place: what torchrun says of this rank, the interface, the links to rank 0."""

from __future__ import annotations

import json
import os
import secrets
import socket
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

from distbench import network, wire
from distbench.clock import clock_domain
from distbench.errors import UsageError

MAX_DOMAINS = 64


@dataclass(frozen=True)
class Place:
    """What torchrun says about this process; one rank alone without it."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    node: int = 0
    nodes: int = 1
    alone: bool = True


def read_place() -> Place:
    """Read torchrun's environment; one rank alone where there is none.

    Raises:
        UsageError: it is there in part only.
    """
    if "RANK" not in os.environ:
        return Place()
    names = {"rank": "RANK", "world_size": "WORLD_SIZE", "local_rank": "LOCAL_RANK"}
    try:
        numbers = {key: int(os.environ[name]) for key, name in names.items()}
        rank, size = numbers["rank"], numbers["world_size"]
        node = int(os.environ.get("GROUP_RANK", rank))
        nodes = int(os.environ.get("GROUP_WORLD_SIZE", size))
        local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    except (KeyError, ValueError) as error:
        raise UsageError(
            f"RANK is set but the rest of torchrun's environment is not usable ({error}): start "
            "with torchrun, or unset RANK to run one rank alone"
        ) from error
    return Place(rank, size, numbers["local_rank"], local, node, nodes, alone=False)


def open_links(
    stack: ExitStack, place: Place, store: Any, timeout_s: float
) -> tuple[network.Interface | None, dict[int, wire.Link], list[wire.Seat]]:
    """Find the interface, open this rank's links, and learn every rank's seat.

    Args:
        stack: takes back the environment variables that were set.
        place: of this rank.
        store: torchrun's key-value store; None for one rank alone.
        timeout_s: how long the ranks may take to find each other.

    Returns:
        The interface, the link to each rank (to rank 0 alone elsewhere), the seat of every rank.

    Raises:
        UsageError: ranks are missing, the network does not carry them, or there are more than
            ``MAX_DOMAINS`` clocks.
    """
    host = socket.gethostname()
    if place.alone:
        return None, {}, [wire.Seat(0, host, clock_domain(), "", 0)]
    interface = _find_interface(stack, store, place)
    own = wire.Seat(
        place.rank, host, clock_domain(), interface.name, network.interface_mtu(interface.name)
    )
    if place.rank == 0:
        token = secrets.token_hex(16)
        with wire.listen(interface.address, place.world_size) as server:
            store.set("distbench/links", json.dumps([*server.getsockname()[:2], token]))
            links = wire.accept_links(server, own, place.world_size, token, timeout_s)
        seats = [own, *(link.seat for link in links.values())]
        roster = json.dumps([asdict(seat) for seat in seats]).encode()
        for link in links.values():
            link.send(wire.ROSTER, roster)
    else:
        address, port, token = json.loads(store.get("distbench/links"))
        link = wire.open_link((address, port), own, token, interface.address, timeout_s)
        link.connection.settimeout(timeout_s)
        try:
            _, roster = link.receive()
        except (TimeoutError, wire.LinkClosed) as error:
            raise UsageError(f"{own} lost rank 0 while the other ranks joined: {error}") from error
        seats = [wire.read_seat(fields) for fields in json.loads(roster)]
        links = {0: link}
    domains = len({seat.domain for seat in seats})
    if domains > MAX_DOMAINS:
        raise UsageError(
            f"the ranks have {domains} different clocks; this version synchronizes at most "
            f"{MAX_DOMAINS}: use fewer hosts"
        )
    return interface, links, seats


def _find_interface(stack: ExitStack, store: Any, place: Place) -> network.Interface:
    """Choose this node's interface, and tell gloo and NCCL where the user has not."""
    master, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    own = network.find_route(place.node, master, port)
    store.set(f"distbench/route/{place.node}", json.dumps(asdict(own)))
    routes = []
    for node in range(place.nodes):
        try:
            routes.append(network.Route(**json.loads(store.get(f"distbench/route/{node}"))))
        except RuntimeError as error:
            raise UsageError(f"node {node} did not join torchrun's store: {error}") from error
    asked = os.environ.get("GLOO_SOCKET_IFNAME")
    found = network.choose_interface(own, routes, network.addresses(), asked)
    for name, value in zip(network.VARIABLES, (found.name, f"={found.name}"), strict=True):
        if name not in os.environ:
            os.environ[name] = value
            stack.callback(os.environ.pop, name, None)
    return found
