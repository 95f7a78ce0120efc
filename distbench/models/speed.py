"""What the layers of a decoder take on this rank's device, timed without the whole of it.

Networks of one layer and of three are timed; ``predict.speed_of`` works the whole out of these, so
a model that is too large for one device has a figure too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from distbench.clock import Now, now_ns
from distbench.models.decoders import TORCH_DTYPES, DecoderModel
from distbench.models.tinylm_net import KVCache, TinyLM, new_cache
from distbench.models.tinylm_weights import fill, random_weights

REPEATS = 15


def time_layers(
    model: DecoderModel, rows: Iterable[int], device: torch.device, now: Now = now_ns
) -> dict[str, list[list[Any]]]:
    """Time decode steps and the reading of a prompt, with random weights.

    Args:
        model: whose layers are timed.
        rows: numbers of texts of a decode step.
        device: where.
        now: the clock.

    Returns:
        By the number of layers, of each shape: texts, tokens of each, ns of each repeat.
    """
    prompt = max(2, round(fmean(map(len, model.prompts))))
    shapes = [*((count, 1) for count in sorted(set(rows))), (1, prompt)]
    return {str(layers): _times(model, layers, shapes, device, now) for layers in (1, 3)}


def _times(
    model: DecoderModel,
    layers: int,
    shapes: list[tuple[int, int]],
    device: torch.device,
    now: Now,
) -> list[list[Any]]:
    config, dtype = replace(model.config, layers=layers), TORCH_DTYPES[model.dtype]
    with torch.device("meta"):
        net = TinyLM(config).to(dtype)
    fill(net.to_empty(device=device), random_weights(config, 0)[0])
    most = max(count for count, _ in shapes)
    with torch.inference_mode():
        cache = new_cache(config, most, model.length, dtype, device)
        return [[*shape, _time(net, cache, *shape, device, now)] for shape in shapes]


def _time(
    net: TinyLM, cache: KVCache, rows: int, tokens: int, device: torch.device, now: Now
) -> list[int]:
    x = torch.zeros(rows, tokens, dtype=torch.int64, device=device)
    # A decode step half way through: what it reads of the cache grows with the text.
    first = 0 if tokens > 1 else cache.length // 2
    positions = torch.arange(first, first + tokens, device=device).expand(rows, tokens)
    took = []
    for _ in range(REPEATS):
        _finish(device)
        before = now()
        net(x, cache, positions, None, first + tokens)[:, -1].argmax(dim=-1)
        _finish(device)
        took.append(now() - before)
    return took


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
