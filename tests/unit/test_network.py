"""Which interface the ranks talk over, for networks that are described and not built."""

import ctypes
import errno
import fcntl
import socket
import struct
from pathlib import Path

import pytest

from distbench import network
from distbench.errors import UsageError
from distbench.network import Interface, Route, choose_interface

# A host of a Kubernetes cluster on a Debian-like system: the decoys come first.
DECOYS = {
    "127.0.0.1": "lo",
    "127.0.1.1": "lo",
    "172.17.0.1": "docker0",
    "192.168.196.0": "vxlan.calico",
    "::1": "lo",
}
ONE = {**DECOYS, "192.168.0.21": "enp1s0", "10.0.0.1": "enp65s0"}
TWO = {**DECOYS, "192.168.0.22": "enp1s0", "10.0.0.2": "enp65s0"}


def route(node, reached, source, *, local=False, space=None):
    return Route(node, f"jw{node + 2}", space or f"stack-{node}", local, reached, source)


def test_two_nodes_take_the_network_of_the_master_address():
    master = route(0, "10.0.0.1", "10.0.0.1", local=True)
    other = route(1, "10.0.0.1", "10.0.0.2")
    for routes in ([master, other], [other, master]):
        found = choose_interface(master, routes, ONE, None)
        assert (found.name, found.address) == ("enp65s0", "10.0.0.1")
        assert found.origin == "the address that the other nodes reached"
        found = choose_interface(other, routes, TWO, None)
        assert (found.name, found.address) == ("enp65s0", "10.0.0.2")
        assert found.origin == "the route to the master at 10.0.0.1"


def test_a_master_whose_name_is_loopback_at_home():
    # /etc/hosts of Debian gives a host its own name as 127.0.1.1; the others resolve it rightly.
    master = route(0, "127.0.1.1", "127.0.0.1", local=True)
    other = route(1, "192.168.0.21", "192.168.0.22")
    assert choose_interface(master, [master, other], ONE, None).name == "enp1s0"
    assert choose_interface(other, [master, other], TWO, None).name == "enp1s0"


def test_ranks_of_one_network_stack_take_loopback():
    routes = [route(k, "10.0.0.1", "10.0.0.1", local=True, space="same") for k in range(2)]
    for own in routes:
        found = choose_interface(own, routes, ONE, None)
        assert found == Interface("lo", "127.0.0.1", "all ranks share one network stack")


def test_one_node_alone_takes_loopback():
    own = route(0, "127.0.0.1", "127.0.0.1", local=True)
    assert choose_interface(own, [own], ONE, None).name == "lo"


def test_nodes_that_all_take_themselves_for_the_master():
    routes = [route(k, "127.0.0.1", "127.0.0.1", local=True) for k in range(2)]
    for own in routes:
        with pytest.raises(UsageError, match=f"itself \\({own.host}: 127.0.0.1\\).*not localhost"):
            choose_interface(own, routes, ONE, None)


def test_an_interface_that_was_asked_for_wins():
    master = route(0, "10.0.0.1", "10.0.0.1", local=True)
    other = route(1, "10.0.0.1", "10.0.0.2")
    found = choose_interface(other, [master, other], TWO, "enp1s0")
    assert found == Interface("enp1s0", "192.168.0.22", "GLOO_SOCKET_IFNAME")


def test_an_interface_that_was_asked_for_and_is_not_there():
    own = route(1, "10.0.0.1", "10.0.0.2")
    with pytest.raises(UsageError) as caught:
        choose_interface(own, [own], {"127.0.0.1": "lo", "10.0.0.2": "enp65s0"}, "eth0")
    told = str(caught.value)
    assert told.startswith("node 1 (jw3) has no interface 'eth0'")
    assert told.endswith("it has enp65s0, lo")


def test_an_empty_wish_is_no_wish():
    own = route(0, "127.0.0.1", "127.0.0.1", local=True)
    assert choose_interface(own, [own], ONE, "").origin == "all ranks share one network stack"


def test_an_address_translation_between_the_nodes():
    # The other node reached a public address which the master's own host does not have.
    master = route(0, "10.0.0.1", "10.0.0.1", local=True)
    other = route(1, "203.0.113.9", "198.51.100.7")
    with pytest.raises(UsageError, match=r"node 0 \(jw2\) owns no .* 203\.0\.113\.9, .*transl"):
        choose_interface(master, [master, other], ONE, None)
    with pytest.raises(UsageError, match=r"198\.51\.100\.7, the route to .*GLOO_SOCKET_IFNAME"):
        choose_interface(other, [master, other], TWO, None)


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "::1"])
def test_loopback_is_refused_for_several_nodes(address):
    master = route(0, "10.0.0.1", "10.0.0.1", local=True)
    tunnel = route(1, "10.0.0.1", address)
    with pytest.raises(UsageError, match=rf"node 1 \(jw3\) would reach .* \({address}\)"):
        choose_interface(tunnel, [master, tunnel], TWO, None)


@pytest.mark.parametrize(
    ("address", "wanted"),
    [("127.0.0.1", True), ("127.8.9.1", True), ("::1", True), ("128.0.0.1", False), ("::", False)],
)
def test_is_loopback(address, wanted):
    assert network.is_loopback(address) is wanted


# What this host has


def test_addresses_finds_loopback_and_only_interfaces_of_this_host():
    found = network.addresses()
    assert found["127.0.0.1"] == "lo"
    assert set(found.values()) <= {name for _, name in socket.if_nameindex()}


def ifconf(*records):
    """A SIOCGIFCONF that answers with these (interface, address) pairs."""

    def ioctl(_fd, request, buffer):
        assert request == 0x8912
        room, address = struct.unpack("iP", buffer)
        packed = b"".join(
            name.encode().ljust(16, b"\0")
            + struct.pack("HH", socket.AF_INET, 0)
            + socket.inet_aton(ip)
            + bytes(16)
            for name, ip in records
        )
        assert len(packed) <= room
        ctypes.memmove(address, packed, len(packed))
        buffer[:] = struct.pack("iP", len(packed), address)
        return 0

    return ioctl


def test_addresses_reads_aliases_and_ipv6(monkeypatch):
    monkeypatch.setattr(fcntl, "ioctl", ifconf(("lo", "127.0.0.1"), ("eth0:1", "10.1.2.3")))
    lines = (
        "00000000000000000000000000000001 01 80 10 80       lo\n"
        "fe8000000000000042010afffe840002 02 40 20 80     eth0\n"
    )
    monkeypatch.setattr(Path, "read_text", lambda _path: lines)
    assert network.addresses() == {
        "127.0.0.1": "lo",
        "10.1.2.3": "eth0",
        "::1": "lo",
        "fe80::4201:aff:fe84:2": "eth0",
    }


def test_addresses_without_ipv6(monkeypatch):
    def absent(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    found = network.addresses()
    assert found["127.0.0.1"] == "lo"
    assert not [address for address in found if ":" in address]


def test_a_network_space_is_this_boot_and_this_namespace(monkeypatch):
    boot, space = network.network_space().split("/")
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert space == str(Path("/proc/self/ns/net").stat().st_ino)

    def absent(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", absent)
    assert network.network_space() == socket.gethostname()


def test_the_route_to_this_host_itself():
    found = network.find_route(3, "127.0.0.1", 29500)
    assert found == Route(
        3, socket.gethostname(), network.network_space(), True, "127.0.0.1", "127.0.0.1"
    )


class Probe:
    """A datagram socket on a host that has a route to 192.0.2.9 and no other."""

    def __init__(self, family, kind):
        assert (family, kind) == (socket.AF_INET, socket.SOCK_DGRAM)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        pass

    def connect(self, target):
        if target != ("192.0.2.9", 29500):
            raise OSError(errno.ENETUNREACH, "Network is unreachable")

    def getsockname(self):
        return ("192.0.2.1", 54321)


def resolve(address):
    def getaddrinfo(host, port, **_kwargs):
        return [(socket.AF_INET, socket.SOCK_DGRAM, 17, "", (address, port))]

    return getaddrinfo


def test_the_route_to_another_host(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", resolve("192.0.2.9"))
    monkeypatch.setattr(socket, "socket", Probe)
    monkeypatch.setattr(network, "addresses", lambda: {"127.0.0.1": "lo", "192.0.2.1": "eth0"})
    found = network.find_route(1, "jw2", 29500)
    assert (found.local, found.reached, found.source) == (False, "192.0.2.9", "192.0.2.1")
    monkeypatch.setattr(network, "addresses", lambda: {"192.0.2.9": "eth0"})
    assert network.find_route(1, "jw2", 29500).local


def test_no_route_to_the_master(monkeypatch):
    monkeypatch.setattr(socket, "getaddrinfo", resolve("198.51.100.1"))
    monkeypatch.setattr(socket, "socket", Probe)
    with pytest.raises(UsageError, match=r"node 2 .*'jw2': .*unreachable; .*--rdzv-endpoint"):
        network.find_route(2, "jw2", 29500)


def test_a_master_name_that_does_not_resolve(monkeypatch):
    def unknown(*_args, **_kwargs):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(UsageError, match=r"no way to the master address 'jw9': .*not known"):
        network.find_route(0, "jw9", 29500)
