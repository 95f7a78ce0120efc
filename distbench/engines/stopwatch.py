"""What a stage's time went to: computing, waiting for what it computes on, and the rest.

On a CPU the host's clock tells all of it. On a GPU the host is ahead of the device, so that its
clock says nothing of either: events on the compute stream do, a pair around the wait and one around
the work.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import torch

from distbench.clock import Now, now_ns
from distbench.waiting import schedstat_of

BEHIND = 1024
"""Steps whose events are read at the latest; by then a device is through with them."""


class Stopwatch:
    """Sums over the steps of one rank since ``open``.

    Args:
        device: that computes.
        now: the clock.

    Attributes:
        steps: computed.
        computing: whether a step is being computed, as far as the host knows.
        sent_bytes: that were sent.
        thread: that computes, by its number in the kernel; None: the one that runs the loop.
    """

    thread: int | None = None

    def __init__(self, device: torch.device, now: Now = now_ns) -> None:
        self.now, self.cuda = now, device.type == "cuda"
        self.steps, self.computing = 0, False
        self.open(0)

    def open(self, start_ns: int) -> None:
        """Begin anew.

        Args:
            start_ns: when the window begins: a wait counts from there on.
        """
        self.start_ns = start_ns
        self._stat = (0, -1) if self.thread is None else schedstat_of(self.thread)
        self.prefills = self.decodes = self.rows = 0
        self.work_ns = self.prefill_ns = self.wait_ns = self.tell_ns = 0
        self.sent_bytes = self.received_bytes = 0
        self.last_ns = 0
        self._since = 0
        self._events: deque[tuple[Any, ...]] = deque()
        self._wait: Any = None

    def begin_wait(self) -> None:
        """The rank has nothing to do until something comes."""
        self._since = self.now()
        if self.cuda:
            self._wait = _event()

    def end_wait(self, received_bytes: int) -> None:
        """It has come, or on a GPU the stream waits until it has."""
        self.received_bytes += received_bytes
        if not self.cuda:
            self.wait_ns += max(0, self.now() - max(self._since, self.start_ns))

    def begin_work(self, prefill: bool, rows: int) -> None:
        """A step begins to be computed."""
        self._prefill, self.computing = prefill, True
        self.rows += rows
        self._since = self.now()
        if self.cuda:
            self._begin = _event()

    def end_work(self) -> None:
        """Its layers have been computed, or on a GPU launched."""
        end = self.now()
        took = end - self._since
        if self.cuda:
            self._events.append((self._prefill, self._wait, self._begin, _event()))
            self._wait = None
            while len(self._events) > BEHIND:
                self._harvest()
        else:
            self.work_ns += took
            self.prefill_ns += took * self._prefill
        self.prefills += self._prefill
        self.decodes += not self._prefill
        self.last_ns = end
        self.steps += 1
        self.computing = False

    def told(self) -> None:
        """The tokens of the last step are on the host and were sent."""
        end, self.computing = self.now(), False
        self.tell_ns += end - self.last_ns
        self.last_ns = end

    def read(self) -> dict[str, int]:
        """Return the sums, ns, bytes and counts; on a GPU it must be through with its work."""
        while self._events:
            self._harvest()
        return {
            "prefills": self.prefills,
            "decodes": self.decodes,
            "rows": self.rows,
            "work_ns": self.work_ns,
            "prefill_ns": self.prefill_ns,
            "wait_ns": self.wait_ns,
            "tell_ns": self.tell_ns,
            "sent_bytes": self.sent_bytes,
            "received_bytes": self.received_bytes,
            "last_ns": self.last_ns,
        }

    def quiet(self) -> dict[str, int]:
        """Return what the scheduler did to the computing thread since ``open``, and how long."""
        assert self.thread is not None, "the loop's own thread is measured by the window"
        (switches, delay_ns), (before, delay_before_ns) = schedstat_of(self.thread), self._stat
        known = min(delay_ns, delay_before_ns) >= 0
        return {
            "involuntary_switches": switches - before,
            "run_delay_ns": delay_ns - delay_before_ns if known else -1,
            "window_ns": self.now() - self.start_ns,
        }

    def _harvest(self) -> None:
        prefill, wait, begin, end = self._events.popleft()
        end.synchronize()
        took = round(begin.elapsed_time(end) * 1e6)
        self.work_ns += took
        self.prefill_ns += took * prefill
        if wait is not None:
            self.wait_ns += round(wait.elapsed_time(begin) * 1e6)


def _event() -> Any:
    event: Any = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event
