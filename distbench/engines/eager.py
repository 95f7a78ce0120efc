"""torch eager mode: on a CPU group by group, on a GPU two groups deep through pinned memory.

On a GPU a group passes through one of ``depth`` slots: gathered into pinned host memory, copied by
a copy stream, computed on a compute stream between two timed events, copied back to pinned memory.
The first event follows the wait for the copy, so the device times of successive groups do not
overlap. The first event fires when the stream reaches it: where the host launches kernels more
slowly than the device runs them, the gaps between them count as device time too. Nothing in
``issue`` waits; ``poll`` waits for the oldest slot's last event and for nothing else.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from distbench.clock import Now, now_ns
from distbench.sut import FOREVER, Done, Indices

GPU_DEPTH = 2
POLL_SLEEP_S = 20e-6


@dataclass
class _Slot:
    """One place in flight on a GPU; every tensor holds ``batch_size`` samples."""

    pinned_in: torch.Tensor
    device_in: torch.Tensor
    pinned_out: torch.Tensor
    begin: Any
    copied: Any
    end: Any


class EagerOnCpu:
    """A torch module on the CPU; computes in ``poll``.

    Args:
        module: maps samples (n, ...) to outputs (n, ...); in eval mode.
        samples: shape (total, ...), any dtype, on the host: materialised once, untimed.
        now: clock for the engine's stamps.
    """

    depth = 1

    def __init__(self, module: torch.nn.Module, samples: torch.Tensor, now: Now = now_ns) -> None:
        self.module = module
        self.samples = samples
        self.now = now
        self.total = self.resident = len(samples)
        self._queue: deque[tuple[int, Indices, Sequence[bytes] | None]] = deque()

    def load(self, indices: Indices) -> None:
        """All samples are resident already."""

    def unload(self, indices: Indices) -> None:
        """Samples stay resident."""

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        """Enqueue a group: of samples that are here, or of those that came as data."""
        self._queue.append((row, indices, data))

    def poll(self, until_ns: int) -> list[Done]:
        """Compute the oldest group; outputs are a float32 array, shape (n, ...)."""
        if not self._queue:
            return []
        row, indices, data = self._queue.popleft()
        started = self.now()
        with torch.inference_mode():
            if data is None:
                chosen = self.samples.index_select(0, torch.from_numpy(indices))
            else:
                chosen = decoded(data, self.samples)
            outputs = self.module(chosen).numpy()
        return [Done(row, len(indices), outputs, "", started, self.now())]

    def close(self) -> None:
        """Drop what was not computed."""
        self._queue.clear()


class EagerOnGpu:
    """A torch module on a GPU, ``depth`` groups in flight.

    Args:
        module: on ``device``, in eval mode; maps samples (n, ...) to float32 outputs (n, ...).
        samples: shape (total, ...), on the host, in the smallest dtype (uint8 travels at a quarter
            of float32's cost; the module normalises on the device).
        batch_size: largest group.
        device: the GPU.
        cuda: the module to take streams and events from; tests pass a fake.
        pin: whether to pin host memory; tests without a GPU cannot.
        now: the clock that ``until_ns`` is on.

    Raises:
        torch.OutOfMemoryError: the slots do not fit.
    """

    depth = GPU_DEPTH

    def __init__(
        self,
        module: torch.nn.Module,
        samples: torch.Tensor,
        batch_size: int,
        device: torch.device,
        cuda: Any = torch.cuda,
        pin: bool = True,
        now: Now = now_ns,
    ) -> None:
        self.module = module
        self.samples = samples
        self.cuda = cuda
        self.now = now
        self.total = self.resident = len(samples)
        self._copying = cuda.Stream(device)
        self._computing = cuda.Stream(device)
        self._flying: deque[tuple[int, int, _Slot]] = deque()
        shape = (batch_size, *samples.shape[1:])
        cuda.synchronize(device)  # the weights are there before another stream reads them
        with torch.inference_mode(), cuda.stream(self._computing):
            probe = module(torch.zeros((1, *shape[1:]), dtype=samples.dtype, device=device))
        self._free = deque(
            _Slot(
                pinned_in=torch.empty(shape, dtype=samples.dtype, pin_memory=pin),
                device_in=torch.empty(shape, dtype=samples.dtype, device=device),
                pinned_out=torch.empty(
                    (batch_size, *probe.shape[1:]), dtype=probe.dtype, pin_memory=pin
                ),
                begin=cuda.Event(enable_timing=True),
                copied=cuda.Event(),
                end=cuda.Event(enable_timing=True),
            )
            for _ in range(self.depth)
        )

    def load(self, indices: Indices) -> None:
        """All samples are resident in host memory already."""

    def unload(self, indices: Indices) -> None:
        """Samples stay resident."""

    def issue(self, row: int, indices: Indices, data: Sequence[bytes] | None = None) -> None:
        """Launch a group: host gather, copy in, compute, copy out; returns at once.

        A slot is reused only after ``poll`` has waited for its last event, so no buffer is written
        while an earlier group still reads it.
        """
        slot, n = self._free.popleft(), len(indices)
        pinned, on_device = slot.pinned_in[:n], slot.device_in[:n]
        if data is None:
            torch.index_select(self.samples, 0, torch.from_numpy(indices), out=pinned)
        else:
            pinned.copy_(decoded(data, self.samples))
        # Not ``with cuda.stream(...)``: twice that took the host 20 us a group, this takes it 3.
        outer = self.cuda.current_stream()
        try:
            with torch.inference_mode():
                self.cuda.set_stream(self._copying)
                on_device.copy_(pinned, non_blocking=True)
                slot.copied.record(self._copying)
                self.cuda.set_stream(self._computing)
                self._computing.wait_event(slot.copied)
                slot.begin.record(self._computing)
                slot.pinned_out[:n].copy_(self.module(on_device), non_blocking=True)
                slot.end.record(self._computing)
        finally:
            self.cuda.set_stream(outer)
        self._flying.append((row, n, slot))

    def poll(self, until_ns: int) -> list[Done]:
        """Wait for the oldest group; its device time is that between its two events."""
        if not self._flying:
            return []
        row, n, slot = self._flying[0]
        if until_ns >= FOREVER:
            slot.end.synchronize()
        else:
            while not slot.end.query():
                if self.now() >= until_ns:
                    return []
                time.sleep(POLL_SLEEP_S)
        self._flying.popleft()
        outputs = np.array(slot.pinned_out[:n].numpy())
        device_ns = round(slot.begin.elapsed_time(slot.end) * 1e6)
        self._free.append(slot)
        return [Done(row, n, outputs, device_ns=device_ns)]

    def close(self) -> None:
        """Wait for what is in flight, then forget it."""
        while self._flying:
            self.poll(FOREVER)


def decoded(data: Sequence[bytes], like: torch.Tensor) -> torch.Tensor:
    """Return samples that came as bytes.

    Args:
        data: of each sample, in the order and type of its numbers in ``like``.
        like: samples of the same kind, shape (total, ...).

    Raises:
        ValueError: a sample has not as many bytes as those.
    """
    size = like[0].numel() * like.element_size()
    wrong = next((len(each) for each in data if len(each) != size), None)
    if wrong is not None:
        raise ValueError(f"a sample came as {wrong} bytes, and one of this model has {size}")
    return torch.frombuffer(bytearray(b"".join(data)), dtype=like.dtype).view(-1, *like.shape[1:])


def eager(
    module: torch.nn.Module, samples: torch.Tensor, batch_size: int, now: Now = now_ns
) -> EagerOnCpu | EagerOnGpu:
    """Return the engine for the device that a module's parameters are on.

    Args:
        module: as the engines take it.
        samples: likewise.
        batch_size: largest group.
        now: clock for stamps and limits.
    """
    device = next(module.parameters()).device
    if device.type == "cuda":
        return EagerOnGpu(module, samples, batch_size, device, now=now)
    return EagerOnCpu(module, samples, now)
