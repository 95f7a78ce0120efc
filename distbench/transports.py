"""What NCCL says of itself: its version, the network and the way it chose to each rank.

NCCL names these in its own log alone (NCCL_DEBUG=INFO), a line for each channel and direction:

    host:42:57 [0] NCCL INFO Channel 00/0 : 1[0] -> 0[0] [receive] via NET/Socket/0
    host:42:57 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM/read
    host:42:57 [0] NCCL INFO Channel 00 : 0[3000] -> 1[4000] via SHM/direct/direct

Source: NCCL's src/transport/net.cc, p2p.cc and shm.cc, and logs of 2.4 to 2.31, read 2026-11-26.
"""

from __future__ import annotations

import re
from typing import Any

_CHANNEL = re.compile(r"NCCL INFO Channel \d+(?:/\d+)? : (\d+)\S* -> (\d+)\S* (.*)")
_VERSION = re.compile(r"NCCL version (\d+\.\d+\.\d+)")
_NETWORK = re.compile(r"NCCL INFO Using network (\S+)")
_NETWORK_NEW = re.compile(r"NCCL INFO Initialized NET plugin (\S+)")
_INTERFACES = re.compile(r"NCCL INFO NET/(\S+) ?: Using ((?:\[\d+\]\S+ ?)+)")


def read_nccl_log(text: str) -> dict[str, Any]:
    """Read what one rank's NCCL log says of the ways it chose.

    Args:
        text: of the log, of one process.

    Returns:
        ``version``; ``network`` such as "Socket" or "IB"; ``interfaces`` that it uses, as NCCL
        writes them; and ``ways``, each with ``source`` and ``target`` rank, ``via`` (such as
        "NET/Socket/0") and its number of ``channels``. None, or no ways, where the log has none.
    """
    ways: dict[tuple[int, int, str], int] = {}
    for source, target, rest in _CHANNEL.findall(text):
        _, found, via = rest.partition("via ")
        if found:
            key = (int(source), int(target), via.split(" comm ")[0].strip())
            ways[key] = ways.get(key, 0) + 1
    used = _INTERFACES.search(text)
    network = _NETWORK.search(text) or _NETWORK_NEW.search(text)
    version = _VERSION.search(text)
    return {
        "version": version.group(1) if version else None,
        "network": network.group(1) if network else None,
        "interfaces": used.group(2).strip() if used else None,
        "ways": [
            {"source": source, "target": target, "via": via, "channels": channels}
            for (source, target, via), channels in sorted(ways.items())
        ],
    }


def kinds(ways: list[dict[str, Any]]) -> list[str]:
    """Return the kinds of ways, such as "NET/Socket", in order of their names.

    Example:
        >>> kinds([{"via": "NET/Socket/0"}, {"via": "P2P/CUMEM/read"}, {"via": "NET/Socket/1"}])
        ['NET/Socket', 'P2P/CUMEM']
    """
    return sorted({"/".join(re.split(r"[/(]", way["via"])[:2]) for way in ways})
