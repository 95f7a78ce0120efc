"""What the layers of a decoder take on this rank's device, measured without the whole of it.

Networks of one layer and of three are timed; what the three take more is two layers, and what the
one takes beyond its layer is embedding, head and Python. The whole is worked out from these, so a
model that is too large for one device has a figure too.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from statistics import fmean, median

import torch

from distbench.clock import Now, now_ns
from distbench.models.decoders import TORCH_DTYPES, DecoderModel
from distbench.models.tinylm_net import KVCache, TinyLM, new_cache
from distbench.models.tinylm_weights import fill, random_weights
from distbench.predict import Speed

REPEATS = 9


def measure_speed(
    model: DecoderModel, rows: Iterable[int], device: torch.device, now: Now = now_ns
) -> Speed:
    """Measure what the whole model would take on this device.

    Args:
        model: whose layers are timed, with random weights.
        rows: numbers of texts of a decode step.
        device: where.
        now: the clock.
    """
    prompt = round(fmean(map(len, model.prompts)))
    shapes = [*((count, 1) for count in sorted(set(rows))), (1, prompt)]
    short, long = (_times(model, layers, shapes, device, now) for layers in (1, 3))
    taken = []
    for one, three in zip(short, long, strict=True):
        layer = max((three - one) / 2, 0.0)
        taken.append(max(one - layer, 0.0) + model.config.layers * layer)
    steps = dict(zip((count for count, _ in shapes[:-1]), taken, strict=False))
    return Speed(steps, taken[-1])


def _times(
    model: DecoderModel,
    layers: int,
    shapes: list[tuple[int, int]],
    device: torch.device,
    now: Now,
) -> list[float]:
    """Return what a network of so many layers takes for each shape, s: texts and tokens of each."""
    config, dtype = replace(model.config, layers=layers), TORCH_DTYPES[model.dtype]
    with torch.device("meta"):
        net = TinyLM(config).to(dtype)
    fill(net.to_empty(device=device), random_weights(config, 0)[0])
    most = max(count for count, _ in shapes)
    with torch.inference_mode():
        cache = new_cache(config, most, model.length, dtype, device)
        return [_time(net, cache, *shape, device, now) for shape in shapes]


def _time(
    net: TinyLM, cache: KVCache, rows: int, tokens: int, device: torch.device, now: Now
) -> float:
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
        took.append((now() - before) / 1e9)
    return median(took[2:])


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
