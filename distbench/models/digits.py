"""The embedded default: handwritten digits and a small trained network.

Accuracy is printed for the trained network alone; wider or deeper ones have random weights and
serve as heavier load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from distbench.clock import Now, now_ns
from distbench.engines.eager import EagerOnCpu, EagerOnGpu
from distbench.gpus import Device
from distbench.models.digits_net import build_net, read_data
from distbench.sut import Indices


def build(
    device: Device, batch_size: int, now: Now = now_ns, width: int = 32, depth: int = 3
) -> EagerOnCpu | EagerOnGpu:
    """Make the digits system under test.

    Args:
        device: where to compute.
        batch_size: largest group.
        now: clock for the engine's stamps.
        width: channels of the network; 32 is the trained one.
        depth: convolutions of the network; 3 is the trained one.

    Returns:
        A system under test over 1,797 samples; outputs are logits, shape (n, 10), float32.

    Raises:
        UsageError: the embedded files are damaged, or width or depth is out of range.
    """
    data = read_data()
    net, digest = build_net(width, depth)
    samples = torch.from_numpy(data.images)
    sut: Any
    if device.type == "cuda":
        gpu = torch.device("cuda", device.index)
        sut = EagerOnGpu(net.to(gpu), samples, batch_size, gpu)
    else:
        sut = EagerOnCpu(net, samples, now)
    sut.digest = digest
    if digest.startswith("sha256:"):
        labels = data.labels.astype(np.int64)
        sut.held_out = data.held_out.astype(np.int64)
        sut.score = lambda indices, outputs: count_right(labels, indices, outputs)
    return sut  # type: ignore[no-any-return]


def count_right(labels: Indices, indices: Indices, outputs: Sequence[Any]) -> tuple[int, int]:
    """Count the outputs whose largest logit is the label.

    Args:
        labels: shape (total,), int64.
        indices: shape (n,), int64.
        outputs: n rows of 10 logits.

    Returns:
        How many are right, and n.
    """
    guesses = np.asarray(outputs).argmax(axis=1)
    return int((guesses == labels[indices]).sum()), len(indices)
