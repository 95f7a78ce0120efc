"""A cable that takes its time: a program that carries frames between a host and the switch.

    python delay.py HOST_PID SWITCH_PID PORT OUT_US IN_US

It makes a TAP device `eth0` in the network namespace of one process and `PORT` in that of another,
says "ready", and hands each frame over after its delay, in order, until its stdin ends. Kernels
without netem can do no better; the last 200 us of a delay are spun, so that a delay is held to some
ten microseconds while the machine has a processor for it.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from collections import deque
from pathlib import Path

CLONE_NEWNET = 0x40000000
TUNSETIFF, IFF_TAP, IFF_NO_PI = 0x400454CA, 0x0002, 0x1000
SPIN_NS = 200_000
now = time.monotonic_ns


def tap(pid: int, name: str) -> int:
    """Make a TAP device in the network namespace of a process; returns its descriptor."""
    spaces = [Path("/proc", each, "ns/net") for each in (str(pid), "self")]
    with spaces[0].open("rb") as there, spaces[1].open("rb") as here:
        libc = ctypes.CDLL(None, use_errno=True)
        assert libc.setns(there.fileno(), CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
        try:
            made = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
            flags = struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI)
            fcntl.ioctl(made, TUNSETIFF, flags)
        finally:
            assert libc.setns(here.fileno(), CLONE_NEWNET) == 0
    return made


def main(host_pid: int, switch_pid: int, port: str, out_us: int, in_us: int) -> None:
    """Carry frames until stdin ends."""
    host, switch = tap(host_pid, "eth0"), tap(switch_pid, port)
    print("ready", flush=True)
    ways = {host: (switch, out_us * 1000), switch: (host, in_us * 1000)}
    waiting: dict[int, deque[tuple[int, bytes]]] = {host: deque(), switch: deque()}
    while True:
        due = min((queue[0][0] for queue in waiting.values() if queue), default=None)
        limit = 1.0 if due is None else max(0.0, (due - now() - SPIN_NS) / 1e9)
        ready, _, _ = select.select([0, host, switch], [], [], limit)
        if 0 in ready:
            return  # nobody writes to it: it has ended
        for source in ready:
            target, delay_ns = ways[source]
            try:
                while True:
                    waiting[target].append((now() + delay_ns, os.read(source, 65536)))
            except BlockingIOError:
                pass
        for target, queue in waiting.items():
            while queue and queue[0][0] <= now():
                frame = queue.popleft()[1]
                with contextlib.suppress(OSError):  # an end that is not up loses it, as cables do
                    os.write(target, frame)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5]))
