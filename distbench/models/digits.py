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
from distbench.engines.eager import EagerOnCpu, EagerOnGpu, eager
from distbench.gpus import Device
from distbench.models.digits_net import build_net, read_data
from distbench.models.precision import count_flops, set_precision
from distbench.sut import Indices

TARGET_ACCURACY = 0.98
"""Of the trained network on its held-out samples: cross-validation gave 99.2 % (``train_digits``),
and 360 samples scatter by 0.5 % about that."""


def build(
    device: Device,
    batch_size: int,
    now: Now = now_ns,
    dtype: str = "fp32",
    width: int = 32,
    depth: int = 3,
) -> EagerOnCpu | EagerOnGpu:
    """Make the digits system under test.

    Args:
        device: where to compute.
        batch_size: largest group.
        now: clock for the engine's stamps.
        dtype: "fp32", "tf32", "bf16" or "fp16"; see ``precision``.
        width: channels of the network; 32 is the trained one.
        depth: convolutions of the network; 3 is the trained one.

    Returns:
        A system under test over 1,797 samples; outputs are logits, shape (n, 10), float32.

    Raises:
        UsageError: the embedded files are damaged, width or depth is out of range, or nothing
            computes in this dtype here.
    """
    stored = set_precision(dtype, device)
    data = read_data()
    net, digest = build_net(width, depth)
    samples = torch.from_numpy(data.images)
    net.to(torch.device(device.type, device.index), stored)
    flops = count_flops(net, samples[:1], dtype)
    sut: Any = eager(net, samples, batch_size, now)
    sut.digest, sut.dtype, sut.flops_per_sample = digest, dtype, flops
    if digest.startswith("sha256:"):
        labels = data.labels.astype(np.int64)
        sut.target_accuracy = TARGET_ACCURACY
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
