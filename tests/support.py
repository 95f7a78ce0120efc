"""Run a function on several gloo ranks: fresh processes in a third of a second each.

``forkserver`` with torch preloaded: spawning costs 20 s a test (each child imports torch), and
forking a parent that has used OpenMP threads hangs.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
TIMEOUT_S = 60.0

_context = mp.get_context("forkserver")
_context.set_forkserver_preload(["torch", "torch.distributed", "numpy"])


def free_port() -> int:
    """Return a TCP port on loopback that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_ranks(
    fn: Callable[..., Any],
    n: int,
    *args: Any,
    timeout_s: float = TIMEOUT_S,
    env: Mapping[str, str] | None = None,
    allow_exit: Sequence[int] = (),
) -> list[Any]:
    """Call ``fn(*args)`` in ``n`` processes with torchrun's environment; returns what they return.

    Args:
        fn: a module-level function.
        n: ranks.
        args: passed to each.
        timeout_s: after it every rank is killed and the test fails.
        env: more environment.
        allow_exit: ranks that may end without a result; theirs is their exit code.

    Raises:
        AssertionError: a rank raised (with its traceback), died or did not end in time.
    """
    port = free_port()
    pipes, processes = [], []
    for rank in range(n):
        ours, theirs = _context.Pipe(duplex=False)
        place = {
            "RANK": str(rank),
            "WORLD_SIZE": str(n),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(n),
            "GROUP_RANK": "0",
            "GROUP_WORLD_SIZE": "1",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
            **(env or {}),
        }
        process = _context.Process(target=_rank, args=(fn, args, place, theirs), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    try:
        return _collect(pipes, processes, timeout_s, allow_exit)
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()
            process.join(5)


def _collect(
    pipes: list[Connection], processes: list[Any], timeout_s: float, allow_exit: Sequence[int]
) -> list[Any]:
    results: list[Any] = [None] * len(pipes)
    waiting = dict(zip(pipes, range(len(pipes)), strict=True))
    failures = []
    deadline = time.monotonic() + timeout_s
    while waiting:
        ready = wait(list(waiting), max(0.0, deadline - time.monotonic()))
        if not ready:
            failures.append(f"ranks {sorted(waiting.values())} did not end within {timeout_s} s")
            break
        for pipe in ready:
            rank = waiting.pop(pipe)  # type: ignore[call-overload]
            try:
                ok, value = pipe.recv()  # type: ignore[union-attr]
            except EOFError:
                processes[rank].join(10)
                ok, value = rank in allow_exit, processes[rank].exitcode
                if not ok:
                    value = f"exit code {value} without a result"
            results[rank] = value
            if not ok:
                failures.append(f"rank {rank}: {value}")
    assert not failures, "\n".join(failures)
    return results


def _rank(fn: Callable[..., Any], args: tuple[Any, ...], env: dict[str, str], pipe: Any) -> None:
    os.environ.update(env)
    import torch

    torch.set_num_threads(1)
    try:
        value = (True, fn(*args))
    except BaseException:
        value = (False, traceback.format_exc())
    pipe.send(value)
    pipe.close()


def run_module(
    *argv: str, timeout_s: float = 120.0, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python -m ...`` as a user would, with the repository importable."""
    return subprocess.run(
        [sys.executable, "-m", *argv],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        cwd=cwd,
        env=environment(**env),
        check=False,
    )


def torchrun(
    n: int, *argv: str, timeout_s: float = 120.0, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``torchrun --standalone --nproc-per-node n -m ...`` as a user would."""
    return run_module(*torchrun_argv(n, *argv), timeout_s=timeout_s, cwd=cwd, **env)


def torchrun_argv(n: int, *argv: str) -> list[str]:
    """Return what follows ``python -m`` to run torchrun on this host."""
    return [
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(n),
        "-m",
        *argv,
    ]


def environment(**env: str) -> dict[str, str]:
    """Return an environment for a child process: the repository importable, one thread a rank."""
    path = os.pathsep.join(p for p in (str(REPO), os.environ.get("PYTHONPATH", "")) if p)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
