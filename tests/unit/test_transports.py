"""NCCL's own words on its choice, from logs of several of its versions."""

from __future__ import annotations

from distbench.transports import kinds, read_nccl_log

SOCKET = """\
jw2:211:211 [0] NCCL INFO Bootstrap : Using eth0:10.0.0.2<0>
jw2:211:211 [0] NCCL INFO cudaDriverVersion 12040
NCCL version 2.21.5+cuda12.4
jw2:211:240 [0] NCCL INFO NET/IB : No device found.
jw2:211:240 [0] NCCL INFO NET/Socket : Using [0]eth0:10.0.0.2<0> [1]eth1:10.1.0.2<0>
jw2:211:240 [0] NCCL INFO Using non-device net plugin version 0
jw2:211:240 [0] NCCL INFO Using network Socket
jw2:211:240 [0] NCCL INFO Channel 00/02 :    0   1
jw2:211:240 [0] NCCL INFO Channel 01/02 :    0   1
jw2:211:251 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/Socket/0
jw2:211:251 [0] NCCL INFO Channel 01/0 : 1[0] -> 0[0] [receive] via NET/Socket/0
jw2:211:251 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0
jw2:211:251 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[0] [send] via NET/Socket/1
jw2:211:251 [0] NCCL INFO Connected all rings
"""
OLD = """\
h:1:9 [0] NCCL INFO NCCL version 2.8.3+cuda11.0
h:1:9 [0] NCCL INFO Using network IB
h:1:9 [0] NCCL INFO Channel 00 : 0[1e000] -> 1[1d000] via P2P/IPC
h:1:9 [0] NCCL INFO Channel 00 : 11[1e000] -> 0[1e000] [receive] via NET/IB/0/GDRDMA
"""
NEW = """\
h:1:9 [0] NCCL INFO NCCL version 2.28.9+cuda13.0
h:1:9 [0] NCCL INFO Initialized NET plugin Socket
h:1:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
h:1:9 [0] NCCL INFO Channel 01/0 : 0[0] -> 1[1] via P2P/CUMEM/read
h:1:9 [0] NCCL INFO Channel 32 : 1[c3000] -> 0[3000] via SHM/direct/direct comm 0x5575 nRanks 02
"""


def test_sockets_with_their_interfaces() -> None:
    assert read_nccl_log(SOCKET) == {
        "version": "2.21.5",
        "network": "Socket",
        "interfaces": "[0]eth0:10.0.0.2<0> [1]eth1:10.1.0.2<0>",
        "ways": [
            {"source": 0, "target": 1, "via": "NET/Socket/0", "channels": 1},
            {"source": 0, "target": 1, "via": "NET/Socket/1", "channels": 1},
            {"source": 1, "target": 0, "via": "NET/Socket/0", "channels": 2},
        ],
    }
    assert kinds(read_nccl_log(SOCKET)["ways"]) == ["NET/Socket"]


def test_older_and_newer_words() -> None:
    old, new = read_nccl_log(OLD), read_nccl_log(NEW)
    assert (old["version"], old["network"], old["interfaces"]) == ("2.8.3", "IB", None)
    assert [way["via"] for way in old["ways"]] == ["P2P/IPC", "NET/IB/0/GDRDMA"]
    assert (new["version"], new["network"]) == ("2.28.9", "Socket")
    assert new["ways"] == [
        {"source": 0, "target": 1, "via": "P2P/CUMEM/read", "channels": 2},
        {"source": 1, "target": 0, "via": "SHM/direct/direct", "channels": 1},
    ]
    assert kinds(old["ways"] + new["ways"]) == ["NET/IB", "P2P/CUMEM", "P2P/IPC", "SHM/direct"]


def test_a_log_without_a_choice_has_none() -> None:
    assert read_nccl_log("") == {"version": None, "network": None, "interfaces": None, "ways": []}
    assert read_nccl_log("Channel 00/0 : via\nNCCL INFO Channel 00/02 : 0 1\n")["ways"] == []
