"""Starting a driver on this host, and what it is told of a model."""

from __future__ import annotations

import os
import secrets
import select
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from distbench.errors import UsageError
from distbench.talk import address_of

START_S = 60.0
"""How long a driver may take to start: Python and numpy over a slow disk."""
END_S = 10.0
"""How long it may take to end after its links."""
PAYLOADS = {
    "tinylm": "distbench.models.tinylm_data",
    "digits": "distbench.models.digits_data",
}
"""Modules that encode a model's samples as bytes, and import no torch."""


def start_driver(
    stack: ExitStack, address: str, output_dir: Path
) -> tuple[subprocess.Popen[bytes], tuple[str, int], str]:
    """Start a driver on this host; it ends when its links do, or this process does.

    Args:
        stack: ends it.
        address: of this host, on which it listens.
        output_dir: where result directories go.

    Returns:
        The process, where it listens, and its token.

    Raises:
        UsageError: it did not start.
    """
    token = secrets.token_hex(16)
    handle, name = tempfile.mkstemp(prefix="distbench-driver-")  # mode 0600
    with os.fdopen(handle, "w") as file:
        file.write(token)
    command = [sys.executable, "-m", "distbench.driver", "--token-file", name]
    command += ["--listen", address, "--parent", str(os.getpid()), "--output-dir", str(output_dir)]
    try:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(each for each in sys.path if each)},
            start_new_session=True,  # a Ctrl-C is for the ranks; it ends with them
        )
        stack.callback(_reap, process)
        out = process.stdout
        assert out is not None
        ready = select.select([out], [], [], START_S)[0]
        line = out.readline().decode() if ready else ""
    finally:
        Path(name).unlink()
    if "listens on" not in line:
        raise UsageError(
            f"the driver did not start within {START_S:.0f} s: its own words stand above"
        )
    return process, address_of(line.split()[-1]), token


def _reap(process: subprocess.Popen[bytes]) -> None:
    """Let a driver end by itself, which it does with its links; else end it."""
    try:
        process.wait(END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdout is not None:
        process.stdout.close()


def payload_module(model: str) -> str:
    """Return the module that encodes a model's samples.

    Raises:
        UsageError: the model has none.
    """
    name = model.partition(",")[0]
    if name not in PAYLOADS:
        raise UsageError(
            "--payload data needs a model whose samples can be encoded as bytes, and "
            f"{name or 'this one'} has no such function; there is one for "
            f"{', '.join(PAYLOADS)}, or use --payload index"
        )
    return PAYLOADS[name]
