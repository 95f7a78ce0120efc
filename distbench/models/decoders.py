"""Token models of the Llama kind, whole on one rank or as a shard of several.

``tinylm`` has trained weights and tokens that it must write; ``llama,layers=..,d=..`` is a random
network of any size: load, with nothing to say about its text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from distbench.clock import Now, now_ns
from distbench.engines.pipeline import Follower, PipelineEngine
from distbench.engines.slot_decoder import SlotDecoder, check_memory
from distbench.engines.slots import SlotEngine
from distbench.engines.stage import StageRank
from distbench.engines.stopwatch import Stopwatch
from distbench.layout import check_shape, own_part, stages
from distbench.models.tinylm_data import SLOT_LENGTH, Samples
from distbench.models.tinylm_net import TinyLM, new_cache, slot_bytes
from distbench.models.tinylm_weights import Whole, fill, random_weights
from distbench.shape import OUTPUT, PROMPT, SLOTS, NetConfig, llama_config

if TYPE_CHECKING:
    from distbench.parallel import Placed

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
SAMPLES = 1024
SEED = 0


@dataclass(frozen=True)
class DecoderModel:
    """A decoder and what it is to write, before any of it is in memory.

    Attributes:
        config: its sizes.
        whole: its weights.
        digest: what they are called in a result.
        prompts: by sample index.
        output_lengths: tokens to write after each, shape (total,), int64.
        length: positions of a slot.
        slots: texts that a replica writes together.
        batching: "continuous" or "static".
        dtype: "fp32", "bf16" or "fp16".
        scored: ``held_out``, ``score`` and ``target_accuracy`` of a system under test, where known.
        text_bits: as that of a system under test, of a whole network, its first argument.
    """

    config: NetConfig
    whole: Whole
    digest: str
    prompts: Sequence[bytes]
    output_lengths: NDArray[np.int64]
    length: int
    slots: int = SLOTS
    batching: str = "continuous"
    dtype: str = "fp32"
    scored: Mapping[str, Any] = field(default_factory=dict)
    text_bits: Callable[..., tuple[float, int]] | None = None

    @property
    def flops_per_sample(self) -> int:
        """Operations of a mean sample in the matrices alone, so rather too few."""
        tokens = sum(map(len, self.prompts)) + int((self.output_lengths - 1).sum())
        return 2 * self.config.matrix_weights * tokens // len(self.prompts)


def llama(values: Mapping[str, Any], dtype: str = "fp32") -> DecoderModel:
    """Return a random decoder by its sizes.

    Args:
        values: layers, d (width), heads, kv_heads, hidden, vocabulary; prompt and output (tokens of
            each sample), slots, batching.
        dtype: of the weights.

    Raises:
        UsageError: the sizes do not fit together.
    """
    config = llama_config(values)
    prompt, output = values.get("prompt", PROMPT), values.get("output", OUTPUT)
    drawn = np.random.default_rng(SEED).integers(
        0, min(256, config.vocabulary), (SAMPLES, prompt), np.uint8
    )
    whole, digest = random_weights(config, SEED)
    return DecoderModel(
        config,
        whole,
        digest,
        tuple(row.tobytes() for row in drawn),
        np.full(SAMPLES, output, np.int64),
        prompt + output,
        values.get("slots", SLOTS),
        values.get("batching", "continuous"),
        dtype,
    )


def build_whole(model: DecoderModel, place: torch.device, now: Now = now_ns) -> SlotEngine:
    """Make the system under test of a model that is whole on this rank.

    Args:
        model: what to compute.
        place: where.
        now: clock for the engine's stamps.

    Raises:
        UsageError: there is no memory for so many slots, or its batching is none.
    """
    with torch.device("meta"):
        net = TinyLM(model.config).to(TORCH_DTYPES[model.dtype])
    fill(net.to_empty(device=place), model.whole)
    sut: Any = slot_engine(net, model, place, model.slots, model.batching, now, model.length)
    _describe(sut, model)
    if model.text_bits is not None:
        sut.text_bits = partial(model.text_bits, net)
    return sut  # type: ignore[no-any-return]


def slot_engine(
    net: TinyLM,
    samples: Samples | DecoderModel,
    place: torch.device,
    slots: int = SLOTS,
    batching: str = "continuous",
    now: Now = now_ns,
    length: int = SLOT_LENGTH,
) -> SlotEngine:
    """Put a whole network, whatever its weights and dtype, behind the engine.

    Args:
        net: in eval mode.
        samples: their prompts, and how much to write after each.
        place: the network's device.
        slots: texts that are written together.
        batching: "continuous" or "static".
        now: clock for the engine's stamps.
        length: positions of a slot.

    Raises:
        UsageError: there is no memory for so many slots, or ``batching`` is neither.
    """
    dtype = net.embedding.weight.dtype
    check_memory(slots, slot_bytes(net.config, length, dtype), place)
    cache = new_cache(net.config, slots, length, dtype, place)
    decoder = SlotDecoder(net, cache, net.config.vocabulary, place)
    return SlotEngine(decoder, samples.prompts, samples.output_lengths, batching, now)


def build_part(
    model: DecoderModel, placed: Placed, lanes: int, now: Now = now_ns
) -> PipelineEngine | Follower:
    """Make this rank's part of a model; all ranks of a replica call it.

    Args:
        model: what to compute.
        placed: where this rank is in its replica.
        lanes: micro-batches in flight, which divide the slots.
        now: clock for the engine's stamps.

    Returns:
        On the leader the engine, on the others what follows it.

    Raises:
        UsageError: the layout does not divide the model, or there is no memory.
    """
    from distbench.shards import cut, watch_reduces  # noqa: PLC0415  only where a model is cut

    layout, config = placed.layout, model.config
    check_shape(layout, config, lanes, model.slots)
    halves = stages(config, layout.pp)[placed.stage]
    dtype = TORCH_DTYPES[model.dtype]
    own = own_part(config, *halves, layout.tp)
    check_memory(model.slots, slot_bytes(own, model.length, dtype), placed.device)
    net = cut(config, placed, halves, model.whole, dtype)
    cache = new_cache(own, model.slots, model.length, dtype, placed.device)
    watch = Stopwatch(placed.device, now)
    watch_reduces(net, watch)
    rank = StageRank(net, cache, lanes, placed.edges, placed.device, watch)
    most = int(model.output_lengths.max())
    sut: Any = Follower(rank, len(model.prompts), model.slots, most)
    if placed.world.leader:
        prompts = (model.prompts, model.output_lengths, model.length)
        sut = PipelineEngine(rank, *prompts, model.batching, now)
    sut.layout = {
        **placed.told(),
        "lanes": lanes,
        "halves": list(halves),
        "weights_bytes": sum(each.numel() * each.element_size() for each in net.parameters()),
        "whole_bytes": config.weights * dtype.itemsize,
        "cache_bytes": model.slots * slot_bytes(own, model.length, dtype),
    }
    _describe(sut, model)
    return sut  # type: ignore[no-any-return]


def _describe(sut: Any, model: DecoderModel) -> None:
    """Say of a system under test what it computes; the parts of one model say the same."""
    sut.digest, sut.dtype = model.digest, model.dtype
    sut.flops_per_sample = model.flops_per_sample
    for name, value in model.scored.items():
        setattr(sut, name, value)
