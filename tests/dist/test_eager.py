"""The eager engine: on the CPU for real, on a GPU through a fake that records what is asked of it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from distbench.engines.eager import EagerOnCpu, EagerOnGpu
from distbench.sut import FOREVER

SAMPLES = torch.arange(100, dtype=torch.uint8).reshape(100, 1)


class Double(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.float() * 2


def test_cpu_engine_computes_in_poll_and_stamps_itself() -> None:
    ticks = iter(range(100, 200))
    sut = EagerOnCpu(Double().eval(), SAMPLES, now=lambda: next(ticks))
    assert sut.poll(FOREVER) == []
    sut.issue(7, np.array([3, 99, 3]))
    (done,) = sut.poll(FOREVER)
    assert (done.row, done.count, done.error) == (7, 3, "")
    assert (done.started_ns, done.finished_ns) == (100, 101)
    np.testing.assert_array_equal(done.outputs, [[6], [198], [6]])
    assert done.outputs.dtype == np.float32
    assert (sut.total, sut.resident, sut.depth) == (100, 100, 1)


class FakeCuda:
    """Streams and events that only write down what they are asked, in order."""

    def __init__(self) -> None:
        self.log: list[Any] = []
        self.ready: set[str] = set()
        fake = self

        class Stream:
            names = iter(("copy", "compute"))

            def __init__(self, device: Any) -> None:
                self.name = next(Stream.names)

            def wait_event(self, event: Any) -> None:
                fake.log.append(("wait", self.name, event.name))

        class Event:
            made = 0

            def __init__(self, enable_timing: bool = False) -> None:
                self.name = f"{'timed' if enable_timing else 'plain'}{Event.made}"
                Event.made += 1

            def record(self, stream: Any) -> None:
                fake.log.append(("record", stream.name, self.name))

            def synchronize(self) -> None:
                fake.log.append(("synchronize", self.name))

            def query(self) -> bool:
                return self.name in fake.ready

            def elapsed_time(self, other: Any) -> float:
                fake.log.append(("elapsed", self.name, other.name))
                return 1.25

        self.Stream, self.Event = Stream, Event
        self.current: list[str] = ["outer"]

    def current_stream(self) -> str:
        return self.current[-1]

    def set_stream(self, stream: Any) -> None:
        self.current[-1] = stream if isinstance(stream, str) else stream.name

    def stream(self, stream: Any) -> Any:
        fake = self

        class Context:
            def __enter__(self) -> None:
                fake.current.append(stream.name)

            def __exit__(self, *_: Any) -> None:
                fake.current.pop()

        return Context()

    def synchronize(self, device: Any = None) -> None:
        self.log.append(("device synchronize",))


class Watched(Double):
    def __init__(self, fake: FakeCuda) -> None:
        super().__init__()
        self.fake = fake

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.fake.log.append(("forward", self.fake.current[-1], len(x)))
        return super().forward(x)


def _gpu() -> tuple[EagerOnGpu, FakeCuda]:
    fake = FakeCuda()
    sut = EagerOnGpu(Watched(fake), SAMPLES, 4, torch.device("cpu"), cuda=fake, pin=False)
    fake.log.clear()
    return sut, fake


def test_gpu_issue_launches_in_order_on_two_streams_and_waits_for_nothing() -> None:
    sut, fake = _gpu()
    sut.issue(0, np.array([1, 2, 3]))
    assert fake.log == [
        ("record", "copy", "plain1"),
        ("wait", "compute", "plain1"),
        ("record", "compute", "timed0"),
        ("forward", "compute", 3),
        ("record", "compute", "timed2"),
    ]
    assert fake.current == ["outer"], "the caller's stream is the current one again"


def test_a_module_that_raises_leaves_the_callers_stream_current() -> None:
    sut, fake = _gpu()
    sut.module = lambda _: 1 / 0  # type: ignore[assignment,return-value]
    with pytest.raises(ZeroDivisionError):
        sut.issue(0, np.array([1]))
    assert fake.current == ["outer"]


def test_gpu_poll_waits_for_the_oldest_groups_last_event_alone() -> None:
    sut, fake = _gpu()
    sut.issue(0, np.array([1, 2, 3]))
    sut.issue(4, np.array([4, 5, 6, 7]))
    fake.log.clear()
    (done,) = sut.poll(FOREVER)
    assert fake.log == [("synchronize", "timed2"), ("elapsed", "timed0", "timed2")]
    assert (done.row, done.count, done.device_ns) == (0, 3, 1_250_000)
    np.testing.assert_array_equal(done.outputs, [[2], [4], [6]])


def test_gpu_outputs_outlive_the_reuse_of_their_slot() -> None:
    sut, _ = _gpu()
    kept = []
    for row in range(0, 40, 4):
        sut.issue(row, np.arange(row, row + 4))
        if row >= 4:
            kept += sut.poll(FOREVER)
    kept += sut.poll(FOREVER)
    got = np.concatenate([done.outputs for done in kept]).ravel()
    np.testing.assert_array_equal(got, np.arange(40) * 2)
    assert [done.row for done in kept] == list(range(0, 40, 4))


def test_gpu_accepts_depth_groups_and_no_more() -> None:
    sut, _ = _gpu()
    for row in range(sut.depth):
        sut.issue(row, np.array([row]))
    with pytest.raises(IndexError):
        sut.issue(9, np.array([9]))


def test_gpu_poll_returns_at_its_limit_while_the_event_is_pending() -> None:
    sut, fake = _gpu()
    sut.issue(0, np.array([1]))
    assert sut.poll(0) == []
    fake.ready.add("timed2")
    (done,) = sut.poll(0)
    assert done.row == 0


def test_gpu_close_waits_for_what_is_in_flight() -> None:
    sut, fake = _gpu()
    sut.issue(0, np.array([1]))
    sut.close()
    assert ("synchronize", "timed2") in fake.log
    assert sut.poll(FOREVER) == []
