"""Weights of the decoder: the trained ones, seeded random ones, and those of one shard alone.

A shard is a stage of a pipeline, a tensor-parallel part of it, or both. Its network is made without
memory, cut, given memory for its own part (``shards.cut``) and filled one parameter at a time: of
random weights no rank ever holds more than its part and one parameter.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distbench.models.arrays import check_arrays, decode_arrays
from distbench.models.tinylm_data import SHA256, WEIGHTS_FILE, pinned
from distbench.models.tinylm_net import TinyLM
from distbench.shape import TRAINED, NetConfig

Whole = Callable[[str, torch.Size], Tensor]
"""Returns a whole parameter by its name, of the given shape."""


def build_net(folder: Path | None = None, dtype: torch.dtype = torch.float32) -> tuple[TinyLM, str]:
    """Build the trained network and say where its weights come from.

    Args:
        folder: where the file of trained weights lies; None is the installed package.
        dtype: of the parameters; the file has them in float16.

    Returns:
        The network, on the CPU, in eval mode; and ``"sha256:<hex>"`` of the file.

    Raises:
        UsageError: the file is missing, unreadable or not the pinned one.
    """
    path, content = pinned(WEIGHTS_FILE, folder)
    return load_net(path, content, TRAINED).to(dtype), f"sha256:{SHA256[WEIGHTS_FILE]}"


def load_net(path: Path, content: bytes, config: NetConfig) -> TinyLM:
    """Build a network from the content of an .npz file.

    Args:
        path: named where the content is refused.
        content: of the file.
        config: its sizes.

    Returns:
        The network, on the CPU, float32, in eval mode.

    Raises:
        UsageError: it is no file of plain arrays, or keys are missing, extra or misshapen.
    """
    net = _empty_net(config)
    arrays = decode_arrays(path, content)
    check_arrays(path, arrays, {name: each.shape for name, each in net.state_dict().items()})
    net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return net.eval()


def random_net(config: NetConfig, seed: int) -> TinyLM:
    """Build a network with seeded random weights; torch's global generators stay as they are.

    Weights are normal with variance 1 / fan-in; what is added to the residual stream is smaller by
    the root of twice the number of layers, so that deep networks stay finite in half precision.

    Args:
        config: its sizes.
        seed: of the weights.

    Returns:
        The network, on the CPU, float32, in train mode.
    """
    net = _empty_net(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            deviation = _deviation(config, name, parameter.shape)
            parameter.normal_(0.0, deviation, generator=generator)
    return net


def _empty_net(config: NetConfig) -> TinyLM:
    # A module made on "meta" draws no random numbers; its memory is then left for the caller.
    with torch.device("meta"):
        net = TinyLM(config)
    return net.to_empty(device="cpu")


def trained(folder: Path | None = None) -> tuple[Whole, str]:
    """Return the trained weights, for ``fill``, and ``"sha256:<hex>"`` of their file.

    Args:
        folder: where the file lies; None is the installed package.

    Raises:
        UsageError: the file is missing, unreadable or not the pinned one.
    """
    path, content = pinned(WEIGHTS_FILE, folder)
    arrays = decode_arrays(path, content)
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in TinyLM().state_dict().items()}
    check_arrays(path, arrays, shapes)
    return lambda name, _: torch.from_numpy(arrays[name]), f"sha256:{SHA256[WEIGHTS_FILE]}"


def random_weights(config: NetConfig, seed: int) -> tuple[Whole, str]:
    """Return seeded random weights, for ``fill``, and what they are called in a result.

    As those of ``random_net``, but each parameter has a stream of its own, by its name: a rank that
    holds some of them need not draw the others.

    Args:
        config: sizes of the whole network.
        seed: of the weights.
    """

    def whole(name: str, shape: torch.Size) -> Tensor:
        value = torch.ones(shape)
        if len(shape) > 1:
            generator = torch.Generator().manual_seed(seed << 32 | zlib.crc32(name.encode()))
            value.normal_(0.0, _deviation(config, name, shape), generator=generator)
        return value

    return whole, f"random({seed})"


def fill(net: TinyLM, whole: Whole) -> TinyLM:
    """Give a network, or a shard of one, its weights; returns it in eval mode.

    Args:
        net: has memory; parameters that are cut over ranks are DTensors in even parts.
        whole: of the network that it is, or of which it is a shard.
    """
    parameter: Any
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            value = whole(name, parameter.shape)
            # A DTensor, told by what only it has: to import its module costs as much as torch.
            if hasattr(parameter, "placements"):
                mesh, (placement,) = parameter.device_mesh, parameter.placements
                if placement.is_shard():
                    value = value.chunk(mesh.size(), placement.dim)[mesh.get_local_rank()]
                parameter.to_local().copy_(value)
            else:
                parameter.copy_(value)
    return net.eval()


def _deviation(config: NetConfig, name: str, shape: torch.Size) -> float:
    """Return the deviation of a random matrix; of what is added to the residual stream less."""
    deviation = 1 / math.sqrt(shape[1])
    if name.endswith(("o.weight", "down.weight")):
        deviation /= math.sqrt(2 * config.layers)
    return deviation
