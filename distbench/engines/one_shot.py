"""A one-shot model as stages of a pipeline: a group goes through once, as micro-batches.

torch.distributed.pipelining moves the micro-batches; what is ours is the way in and back: the
leader tells every other stage that a group comes, and the last stage sends its outputs back to it.
Shapes are fixed before the first group, so that nothing about them has to be sent: a group that is
not full is filled up with zeros.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from threading import get_native_id
from typing import Any

import torch
from torch import Tensor, nn

from distbench.clock import Now, now_ns
from distbench.engines.stage import STOP, Edges
from distbench.engines.stopwatch import Stopwatch
from distbench.sut import Done, First, Indices

RUN = 1


class Timed(nn.Module):
    """A stage whose work a stopwatch sums up; what is between two steps is waiting.

    Args:
        module: the stage.
        watch: of this rank.
    """

    def __init__(self, module: nn.Module, watch: Stopwatch) -> None:
        super().__init__()
        self.module, self.watch = module, watch

    def forward(self, x: Tensor) -> Tensor:
        """Compute one micro-batch."""
        self.watch.end_wait(x.numel() * x.element_size())
        self.watch.begin_work(prefill=False, rows=len(x))
        out: Tensor = self.module(x)
        self.watch.end_work()
        self.watch.begin_wait()
        return out


@dataclass
class OneShotRank:
    """What one rank does of each group.

    Attributes:
        schedule: torch's, over a ``Timed`` stage; None where one rank has the whole model.
        whole: the model of a rank that has all of it, else None.
        edges: of this rank.
        device: that computes.
        outputs: of a full group, shape (batch, ...), float32, in host memory.
        watch: what its time went to.
    """

    schedule: Any
    whole: nn.Module | None
    edges: Edges
    device: torch.device
    outputs: Tensor
    watch: Stopwatch

    def run(self, x: Tensor | None) -> Tensor | None:
        """Take part in one group.

        Args:
            x: of the leader, a full group on the device; None on other ranks.

        Returns:
            Of the last stage, the outputs on the device; else None.
        """
        if self.whole is not None:
            out: Tensor = self.whole(x)
            return out
        self.watch.begin_wait()
        found: Tensor | None = self.schedule.eval() if x is None else self.schedule.eval(x)
        self.watch.end_wait(0)
        return found

    def follow(self) -> None:
        """Compute whatever comes, until the leader's ``close``."""
        above, back = self.edges.above, self.edges.back
        assert above is not None, "the leader follows nobody"
        posted: Any = None
        head = torch.zeros(1, dtype=torch.int64)
        self.watch.thread = get_native_id()
        with torch.inference_mode():
            while True:
                above.head.begin(head).wait()
                kind = int(head)
                self.tell(kind)
                if kind == STOP:
                    return
                out = self.run(None)
                if back is not None and out is not None:
                    if posted is not None:
                        posted.wait()  # the leader has it: it has begun another group since
                    result = out.float().cpu()
                    self.watch.sent_bytes += result.numel() * 4
                    posted = back.post(result)

    def tell(self, kind: int) -> None:
        """Tell the next stage what comes."""
        for edge in self.edges.below:
            edge.head.post(torch.full((1,), kind, dtype=torch.int64)).wait()


class OneShotEngine:
    """The leader's side behind the protocol of a system under test; computes in ``poll``.

    Args:
        rank: what the leader itself computes.
        samples: shape (total, ...), on the host.
        batch_size: of a full group.
        now: clock for the stamps.
    """

    depth = 1

    def __init__(
        self, rank: OneShotRank, samples: Tensor, batch_size: int, now: Now = now_ns
    ) -> None:
        self.rank, self.watch, self.now = rank, rank.watch, now
        self.samples, self.batch_size = samples, batch_size
        self.total = self.resident = len(samples)
        self._queue: deque[tuple[int, Indices]] = deque()
        self._closed = False

    def load(self, indices: Indices) -> None:
        """All samples are resident already."""

    def unload(self, indices: Indices) -> None:
        """Samples stay resident."""

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        """Enqueue a group."""
        self._queue.append((row, indices))

    def poll(self, until_ns: int) -> Sequence[Done | First]:
        """Compute the oldest group; outputs are a float32 array, shape (n, ...)."""
        if not self._queue:
            return ()
        row, indices = self._queue.popleft()
        started = self.now()
        outputs = self.compute(self.samples.index_select(0, torch.from_numpy(indices)))
        return [Done(row, len(indices), outputs.numpy(), "", started, self.now())]

    def compute(self, samples: Tensor) -> Tensor:
        """Compute a group; returns its outputs, float32, in host memory.

        Args:
            samples: shape (n, ...), n at most the batch size.
        """
        with torch.inference_mode():
            x = torch.zeros((self.batch_size, *samples.shape[1:]), dtype=samples.dtype)
            x[: len(samples)] = samples
            self.rank.tell(RUN)
            out = self.rank.run(x.to(self.rank.device))
            if self.rank.edges.back is not None:
                out = self.rank.outputs
                self.watch.begin_wait()
                self.rank.edges.back.begin(out).wait()
                self.watch.end_wait(out.numel() * 4)
            assert out is not None
            return out[: len(samples)].float().cpu().clone()

    def close(self) -> None:
        """Drop what was not computed, and let the other ranks leave ``follow``."""
        self._queue.clear()
        if not self._closed:
            self._closed = True
            self.rank.tell(STOP)
