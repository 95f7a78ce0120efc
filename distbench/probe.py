"""Does a backend work between these hosts? Tried in child processes, where a hang costs nothing."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distbench import wire
from distbench.errors import where
from distbench.transports import read_nccl_log

if TYPE_CHECKING:
    from distbench.world import World

PROBE_TIMEOUT_S = 30.0


def probe_collectives(
    world: World,
    backend: str,
    timeout_s: float = PROBE_TIMEOUT_S,
    device: str = "",
    more: Mapping[str, str] | None = None,
) -> str:
    """Try a backend in child processes, where a hang or a crash costs nothing.

    Each rank starts one child; together they join and all-reduce 1 MiB. All ranks must call this.

    Args:
        world: with its control group; its side thread keeps watch meanwhile.
        backend: "nccl", or "gloo" in tests.
        timeout_s: how long the children may take.
        device: torch device string for the tensor; this rank's GPU when empty.
        more: environment of this rank's child, over its own.

    Returns:
        "" if this rank's child succeeded, else its last lines.
    """
    address = world.interface.address if world.interface else "127.0.0.1"
    port = 0
    if world.rank == 0:
        with wire.listen(address, 1) as free:
            port = int(free.getsockname()[1])
    address, port = world.gather_json([address, port])[0]
    keep = {k: v for k, v in os.environ.items() if not k.startswith(("TORCHELASTIC_", "PET_"))}
    place = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
    place |= {"RANK": str(world.rank), "WORLD_SIZE": str(world.world_size)}
    target = device or f"cuda:{world.device.index}"
    command = [
        sys.executable,
        "-c",
        "from distbench.world import probe_child; probe_child()",
        backend,
        target,
    ]
    try:
        done = subprocess.run(
            command,
            env={**keep, "NCCL_DEBUG": "WARN", **place, **(more or {})},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            timeout=timeout_s,
            check=False,
        )
        output, status = done.stdout, f"exit status {done.returncode}"
        if done.returncode == 0:
            return ""
    except subprocess.TimeoutExpired as expired:
        output, status = expired.stdout or b"", f"no end within {timeout_s:.0f} s"
    lines = [line for line in output.decode(errors="replace").splitlines() if line.strip()]
    told = [line for line in lines if "NCCL" in line] or lines
    return f"{where(world.rank, world.host)}, {status}: " + " | ".join(told[-4:])


def transport(world: World) -> dict[str, Any]:
    """Return by which way this rank's data goes to the others; all ranks must call this.

    NCCL names its choice in its own log alone, so children with the same environment join and
    all-reduce once, and write that log to a file.

    Args:
        world: all ranks.

    Returns:
        JSON-able: ``rank``, ``backend``; ``interface`` and ``address`` of distbench's own links,
        which gloo uses as well; ``nccl`` as ``transports.read_nccl_log`` has it, or None with the
        ``reason``.
    """
    own = world.interface
    told: dict[str, Any] = {"rank": world.rank, "backend": world.backend}
    told |= {"interface": own.name if own else None, "address": own.address if own else None}
    if world.backend != "nccl":
        return {**told, "nccl": None, "reason": "the operations ran over gloo: TCP"}
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "nccl.log"
        asked = {"NCCL_DEBUG": "INFO", "NCCL_DEBUG_FILE": str(log)}
        asked["NCCL_DEBUG_SUBSYS"] = "INIT,ENV,NET,P2P,SHM"
        failure = probe_collectives(world, "nccl", more=asked)
        text = log.read_text(errors="replace") if log.exists() else ""
    found = read_nccl_log(text)
    reason = "" if found["ways"] else f"NCCL's log names no way: {failure or 'it has no such line'}"
    return {**told, "nccl": found, "reason": reason}
