"""launch/ops/firewall.nft on hosts: peers pass, others do not, foreign tables stay as they were."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.cluster import rig
from tests.support import REPO

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(bool(rig.available()), reason=rig.available() or "the rig works"),
]

NODES = "nodes={ 10.77.0.11, 10.77.0.12 }"
FOREIGN = """
table ip nat {
    chain post {
        type nat hook postrouting priority 100
        masquerade
    }
}
table inet filter {
    chain input {
        type filter hook input priority 0
        tcp dport 81 drop
    }
}
"""


@pytest.fixture
def hosts() -> Iterator[rig.Hosts]:
    """Two nodes and a stranger."""
    with rig.Hosts(3, names=("jw2", "jw3", "stranger")) as made:
        yield made


def load(hosts: rig.Hosts, nodes: str = NODES) -> None:
    path = str(REPO / "launch/ops/firewall.nft")
    done = hosts.run(0, ["nft", "-D", 'iface="eth0"', "-D", nodes, "-f", path])
    assert done.returncode == 0, done.stderr


def listing(hosts: rig.Hosts, *table: str) -> str:
    done = hosts.run(0, ["nft", "list", *(("table", *table) if table else ("ruleset",))])
    assert done.returncode == 0, done.stderr
    return done.stdout


def reaches(hosts: rig.Hosts, i: int, port: int, address: str = "10.77.0.11") -> bool:
    """Say whether host ``i`` can connect to a port of the first host."""
    listen = (
        "import socket,sys\n"
        f"s=socket.create_server(('', {port})); print('ready', flush=True); s.settimeout(3)\n"
        "s.accept()"
    )
    with hosts.popen(0, ["python3", "-c", listen], stdout=-1, stderr=-3, text=True) as server:
        assert server.stdout.readline() == "ready\n"
        connect = f"import socket; socket.create_connection(({address!r}, {port}), 0.5)"
        done = hosts.run(i, ["python3", "-c", connect])
        server.kill()
    return done.returncode == 0


def test_nodes_reach_each_other_and_a_stranger_only_what_is_not_distbenchs(
    hosts: rig.Hosts,
) -> None:
    assert reaches(hosts, 2, 40001), "without it, anybody does"
    load(hosts)
    assert reaches(hosts, 1, 40002)
    assert not reaches(hosts, 2, 40003)
    assert reaches(hosts, 2, 22), "ssh stays as it was"
    assert reaches(hosts, 0, 40004, "127.0.0.1"), "a host reaches itself"
    assert "counter packets 0" not in listing(hosts, "inet", "distbench")
    assert hosts.run(0, ["nft", "delete", "table", "inet", "distbench"]).returncode == 0
    assert reaches(hosts, 2, 40005)


def test_tables_of_others_survive_loading_loading_again_and_deleting(hosts: rig.Hosts) -> None:
    done = hosts.run(0, ["sh", "-c", f"nft -f - <<'END'\n{FOREIGN}END"])
    assert done.returncode == 0, done.stderr
    before = listing(hosts)
    load(hosts)
    again = listing(hosts)
    load(hosts)
    assert listing(hosts) == again, "the second time replaces the first"
    assert again.replace(listing(hosts, "inet", "distbench"), "") == before
    load(hosts, "nodes={ 10.77.0.13 }")
    assert "10.77.0.13" in listing(hosts, "inet", "distbench")
    assert "10.77.0.12" not in listing(hosts, "inet", "distbench")
    hosts.run(0, ["nft", "delete", "table", "inet", "distbench"])
    assert listing(hosts) == before
