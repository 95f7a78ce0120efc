"""Waiting for an instant in quiet: sleep, then a short spin; and what disturbed it meanwhile.

Imports no torch: the process that issues queries (``driver``) waits in the same way as a rank.
"""

from __future__ import annotations

import ctypes
import gc
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from distbench.clock import Now

PR_SET_TIMERSLACK = 29
SPIN_LIMITS_NS = (200_000, 1_000_000)
"""Shorter than 200 us and a sleep oversleeps it; a longer spin than 1 ms uses up the scheduler's
slice before the instant comes."""


def measure_spin_ns(now: Now) -> int:
    """Return how long before an instant a sleep should end: twice the p90 of oversleeping, ns."""
    overslept = []
    for _ in range(20):
        begin = now()
        time.sleep(0.002)
        overslept.append(now() - begin - 2_000_000)
    low, high = SPIN_LIMITS_NS
    return min(max(2 * sorted(overslept)[17], low), high)


def set_timer_slack() -> None:
    """Ask the kernel to wake this thread on time: 1 ns of slack in place of 50 us."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)


def wait_until(instant_ns: int, now: Now, spin_ns: int) -> int:
    """Sleep until shortly before an instant, spin over it, and return the clock after it, ns."""
    while (left := instant_ns - now() - spin_ns) > 0:
        time.sleep(left / 1e9)
    stamp = now()
    while stamp < instant_ns:
        stamp = now()
    return stamp


@contextmanager
def quiet() -> Iterator[None]:
    """Keep Python's garbage collector out of a window.

    What exists is collected and frozen first; everything is restored after.
    """
    enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if enabled:
            gc.enable()


def schedstat_of(thread: int, proc: Path = Path("/proc")) -> tuple[int, int]:
    """Return the same of another thread of this process, by its number in the kernel."""
    own = proc / "self/task" / str(thread)
    try:
        status = (own / "status").read_text()
        switches = int(status.split("nonvoluntary_ctxt_switches:", 1)[1].split(maxsplit=1)[0])
        return switches, int((own / "schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return 0, -1


def schedstat(proc: Path = Path("/proc")) -> tuple[int, int]:
    """Return what the scheduler has done to the calling thread so far.

    Args:
        proc: where the kernel tells of processes.

    Returns:
        Involuntary context switches, and ns spent ready to run without a processor; -1 where the
        kernel does not say.
    """
    switches = resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw
    try:
        return switches, int((proc / "thread-self/schedstat").read_text().split()[1])
    except (OSError, ValueError, IndexError):
        return switches, -1


def disturbed(
    before: tuple[int, int], after: tuple[int, int], ended_ns: int, started_ns: int
) -> dict[str, int]:
    """Return how often this thread was sent off its processor in a window, and how long it waited.

    Args:
        before: from ``schedstat``, at the window's begin.
        after: likewise, at its end.
        ended_ns: when that was.
        started_ns: when it began.
    """
    return {
        "involuntary_switches": after[0] - before[0],
        "run_delay_ns": after[1] - before[1] if before[1] >= 0 else -1,
        "window_ns": ended_ns - started_ns,
    }
