"""ResNet-50 v1.5: a load that fills a GPU, on images of noise.

The images are random bytes, so no accuracy is stated for this model, whatever its weights are. They
cross to the GPU as bytes, 150,528 of them each, and are normalised there.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distbench.clock import Now, now_ns
from distbench.engines.eager import EagerOnCpu, EagerOnGpu, eager
from distbench.errors import UsageError
from distbench.gpus import Device
from distbench.models.precision import count_flops, set_precision
from distbench.models.resnet50_net import ResNet50, empty_net, fill_randomly
from distbench.models.weights import load_strictly, read_weights

SHAPE = (3, 224, 224)
SAMPLES = 256
"""Images by default: 38.5 MB."""
SEED = 0


def build(
    device: Device,
    batch_size: int,
    now: Now = now_ns,
    dtype: str = "fp32",
    weights: str = "",
    samples: int = SAMPLES,
    layout: str = "channels_last",
) -> EagerOnCpu | EagerOnGpu:
    """Make the ResNet-50 system under test.

    Args:
        device: where to compute.
        batch_size: largest group.
        now: clock for the engine's stamps.
        dtype: "fp32", "tf32", "bf16" or "fp16"; see ``precision``.
        weights: a file with the weights by torchvision's names; "" for random ones.
        samples: images, 150,528 bytes each, in host memory.
        layout: "channels_last" or "contiguous", of weights and activations.

    Returns:
        A system under test over ``samples`` images; outputs are logits, shape (n, 1000), float32.

    Raises:
        UsageError: the weights cannot be used, the images do not fit into the host's memory, or
            nothing computes in this dtype here.
    """
    stored = set_precision(dtype, device)
    images = _images(samples)
    net, digest = load_net(torch.device(device.type, device.index), weights)
    wanted = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    net.to(dtype=stored)
    net.to(memory_format=wanted)  # type: ignore[call-overload]  # torch's stub lacks it
    flops = count_flops(net, images[:1], dtype)
    sut: Any = eager(net, images, batch_size, now)
    sut.digest, sut.dtype, sut.flops_per_sample = digest, dtype, flops
    return sut  # type: ignore[no-any-return]


def load_net(device: torch.device, weights: str = "", seed: int = SEED) -> tuple[ResNet50, str]:
    """Build the network for inference and say where its weights come from.

    Args:
        device: where its memory is.
        weights: the file; "" for random weights.
        seed: of the random weights.

    Returns:
        The network, float32, in eval mode; and its provenance, ``"sha256:<hex>"`` of the file or
        ``"random(seed=<seed>)"``.

    Raises:
        UsageError: the file cannot be read, or its weights are not those of this model.
    """
    if not weights:
        net = empty_net(device)
        fill_randomly(net, seed)
        return net, f"random(seed={seed})"
    path = Path(weights)
    tensors, digest = read_weights(path)
    net = empty_net(device)
    load_strictly(net, tensors, path)
    return net, digest


def _images(count: int) -> torch.Tensor:
    """Make the images, shape (count, 3, 224, 224), uint8, alike on all ranks.

    Raises:
        UsageError: they are larger than the host's memory.
    """
    wanted_bytes = count * int(np.prod(SHAPE))
    memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if wanted_bytes > memory_bytes:
        raise UsageError(
            f"model resnet50, samples: {count} images take {wanted_bytes / 1e9:.1f} GB, and this "
            f"host has {memory_bytes / 1e9:.1f} GB of memory"
        )
    noise = np.random.default_rng(SEED).integers(0, 256, (count, *SHAPE), dtype=np.uint8)
    return torch.from_numpy(noise)
