"""Does a model that is cut over ranks still give the answers of the whole one?

Before the windows the leader computes some samples with the whole model, on its own device, in the
same shapes; where that does not fit, both a cut and a whole twin of fewer layers are made.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from distbench.engines.pipeline import PipelineEngine
from distbench.engines.slot_decoder import USABLE, available_bytes
from distbench.engines.stage import Edges, StageRank
from distbench.engines.stopwatch import Stopwatch
from distbench.models.decoders import TORCH_DTYPES, DecoderModel
from distbench.models.tinylm_net import TinyLM, new_cache, slot_bytes
from distbench.models.tinylm_weights import fill, random_weights
from distbench.sut import run_indices

if TYPE_CHECKING:
    from distbench.parallel import Placed
    from distbench.world import World

COMPARED = 8
"""Samples that are compared at most, of each lane."""
FORCED = 4
"""Decode steps of each whose logits are compared."""


def fits_alone(model: DecoderModel, world: World) -> bool:
    """Tell whether every rank of this host could hold the whole model now, weights and caches."""
    dtype = TORCH_DTYPES[model.dtype]
    caches = model.slots * slot_bytes(model.config, model.length, dtype)
    whole = model.config.weights * dtype.itemsize + caches
    place = torch.device(world.device.type, world.device.index)
    if place.type == "cpu":  # whose ranks have one memory together
        place, whole = torch.device("cpu"), whole * world.local_world_size
    return whole < USABLE * available_bytes(place)


def fits_beside(model: DecoderModel, placed: Placed) -> bool:
    """Tell whether the whole model has room beside this rank's own part, which is yet to be made.

    On a host without a GPU all its ranks' parts and whole models come out of one memory.
    """
    config, dtype, layout = model.config, TORCH_DTYPES[model.dtype], placed.layout
    whole = config.weights * dtype.itemsize + model.slots * slot_bytes(config, model.length, dtype)
    needed = whole + whole // layout.degree + config.embedding_weights * dtype.itemsize
    if placed.device.type == "cpu":
        needed *= placed.world.local_world_size
    return needed < USABLE * available_bytes(placed.device)


def twin(model: DecoderModel, stages: int) -> DecoderModel:
    """Return a model of the same widths with as few layers as there are stages, random weights."""
    config = replace(model.config, layers=stages)
    whole, digest = random_weights(config, 0)
    return replace(model, config=config, whole=whole, digest=digest, scored={})


def whole_engine(model: DecoderModel, device: torch.device, lanes: int) -> PipelineEngine:
    """Make the engine of a whole model on this rank alone, with the same lanes.

    Args:
        model: what to compute.
        device: where.
        lanes: micro-batches.
    """
    dtype = TORCH_DTYPES[model.dtype]
    with torch.device("meta"):
        net = TinyLM(model.config).to(dtype)
    fill(net.to_empty(device=device), model.whole)
    cache = new_cache(model.config, model.slots, model.length, dtype, device)
    rank = StageRank(net, cache, lanes, Edges(), device, Stopwatch(device))
    prompts = (model.prompts, model.output_lengths, model.length)
    return PipelineEngine(rank, *prompts, model.batching)


def compare(cut: PipelineEngine, model: DecoderModel, device: torch.device) -> dict[str, Any]:
    """Compare a cut model with the whole one; the leader calls it, and the others follow.

    Logits in every lane, after prompts and at decode steps whose tokens are given to both; and what
    both write by themselves, which after a first other token may differ in all that follow.

    Args:
        cut: the leader's engine, nothing in flight.
        model: what it computes.
        device: of the leader.

    Returns:
        Largest difference of logits / largest logit; tokens that were compared, and how many were
        the same.
    """
    lanes, rows = cut.rank.lanes, min(COMPARED, cut.rank.slots)
    whole = whole_engine(model, device, lanes)
    lengths = [len(prompt) for prompt in model.prompts]
    steps = min(FORCED, model.length - max(lengths), *lengths)
    error = 0.0
    for lane in range(lanes):
        chosen = [model.prompts[(lane * rows + row) % len(model.prompts)] for row in range(rows)]
        forced = [prompt[:steps] for prompt in chosen]
        ours, theirs = (each.logits(lane, chosen, forced) for each in (cut, whole))
        error = max(error, float((ours - theirs).abs().max() / theirs.abs().max()))
    indices = np.arange(min(COMPARED, cut.depth), dtype=np.int64)
    written = [run_indices(each, indices, 1) for each in (cut, whole)]
    same = sum(int((a == b).sum()) for a, b in zip(*written, strict=True))
    return {
        "layers": model.config.layers,
        "logit_error": error,
        "tokens": sum(map(len, written[1])),
        "tokens_equal": same,
    }
