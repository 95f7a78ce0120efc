"""A small language model over the bytes of a public-domain text, decoded in slots.

Every sample is one text to be written on: ``--batch-size 1``, and the engine batches by ``slots``.
Accuracy is the share of tokens that are those of the reference, which writes the same texts in
float64 and without any cache. How well the network tells the held-out text at all, in bits per
byte, is read off its probabilities, of each byte from those before it, where it is served whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy

from distbench.clock import Now, now_ns
from distbench.engines.slots import SlotEngine
from distbench.gpus import Device
from distbench.models.decoders import DecoderModel, build_whole
from distbench.models.tinylm_data import (
    SLOT_LENGTH,
    Expected,
    draw_samples,
    read_expected,
    read_text,
    training_bytes,
)
from distbench.models.tinylm_net import TinyLM
from distbench.models.tinylm_weights import trained
from distbench.shape import TRAINED
from distbench.sut import Indices

SLOTS = 8
TARGET_ACCURACY = 0.99
"""At every step of a held-out sample the best byte leads by more than 1e-2 in the logits, which
float32 rounds by some 1e-5: in float32 all tokens agree. A lower precision may turn one of the
closest, and with it what follows."""


def build(
    device: Device,
    now: Now = now_ns,
    slots: int = SLOTS,
    batching: str = "continuous",
    folder: Path | None = None,
) -> SlotEngine:
    """Make the tinylm system under test.

    Args:
        device: where to compute.
        now: clock for the engine's stamps.
        slots: texts that are written together.
        batching: "continuous" or "static".
        folder: where the embedded files lie; None is the installed package.

    Returns:
        A system under test over 1,024 samples; an output is the tokens of one, int64.

    Raises:
        UsageError: the embedded files are damaged, there is no memory for so many slots, or
            ``batching`` is neither.
    """
    model = describe(slots, batching, folder)
    place = torch.device("cuda", device.index) if device.type == "cuda" else torch.device("cpu")
    return build_whole(model, place, now)


def describe(
    slots: int = SLOTS, batching: str = "continuous", folder: Path | None = None
) -> DecoderModel:
    """Return the model, before any of it is in memory; arguments and errors as of ``build``."""
    text = read_text(folder)
    samples = draw_samples(text)
    expected = read_expected(samples, folder)
    whole, digest = trained(folder)
    return DecoderModel(
        TRAINED,
        whole,
        digest,
        samples.prompts,
        samples.output_lengths,
        SLOT_LENGTH,
        slots,
        batching,
        scored={
            "held_out": expected.held_out,
            "score": lambda indices, outputs: count_matching(expected, indices, outputs),
            "target_accuracy": TARGET_ACCURACY,
        },
        text_bits=lambda net, part, parts, tell: text_bits(
            net, text, training_bytes(text), part=part, parts=parts, tell=tell
        ),
    )


def count_matching(expected: Expected, indices: Indices, outputs: Sequence[Any]) -> tuple[int, int]:
    """Count the tokens that are the reference's, place by place.

    Args:
        expected: the reference's.
        indices: shape (n,), int64, of held-out samples.
        outputs: n arrays of tokens.

    Returns:
        How many are the same, and how many the reference has.
    """
    right = total = 0
    for index, output in zip(indices.tolist(), outputs, strict=True):
        wanted = expected.tokens[index]
        total += len(wanted)
        got = np.asarray(output)[: len(wanted)]
        right += int((got == wanted[: len(got)]).sum())
    return right, total


def bits_per_byte(
    net: TinyLM, text: bytes, begin: int, window: int = 256, stride: int = 64
) -> float:
    """Measure how well a network tells each byte of a text from those before it.

    Args:
        net: in eval mode.
        text: ASCII.
        begin: first byte that counts, above 0; those before it only serve as context.
        window: bytes that the network sees at once.
        stride: bytes that count in each window, its last ones.

    Returns:
        Mean of -log2 of the probability given to the byte that came, over ``text[begin:]``.
    """
    bits, count = text_bits(net, text, begin, window, stride)
    return bits / count


def text_bits(
    net: TinyLM,
    text: bytes,
    begin: int,
    window: int = 256,
    stride: int = 64,
    part: int = 0,
    parts: int = 1,
    tell: Callable[[], None] = lambda: None,
) -> tuple[float, int]:
    """Sum up ``bits_per_byte`` over one of several parts, which share the windows out in turn.

    Args:
        net: in eval mode.
        text: ASCII.
        begin: first byte that counts.
        window: bytes that the network sees at once.
        stride: bytes that count in each window.
        part: from 0.
        parts: how many.
        tell: called after each window.

    Returns:
        The sum of -log2 of the probability given to the byte that came, and how many bytes.
    """
    codes = torch.frombuffer(bytearray(text), dtype=torch.uint8).to(net.embedding.weight.device)
    total, count = 0.0, 0
    with torch.inference_mode():
        for first in range(begin + part * stride, len(text), parts * stride):
            end = min(first + stride, len(text))
            seen = codes[max(0, end - window) : end].long()
            logits = net(seen[None, :-1])[0, -(end - first) :].double()
            total += float(cross_entropy(logits, seen[-(end - first) :], reduction="sum"))
            count += end - first
            tell()
    return total / math.log(2), count


def greedy(net: TinyLM, prompt: bytes, count: int) -> tuple[NDArray[np.int64], float]:
    """Write on after a prompt without any cache: the whole text anew for every byte.

    This is the reference that every other way of decoding is held against.

    Args:
        net: in eval mode.
        prompt: ASCII, not empty.
        count: bytes to write.

    Returns:
        The bytes, shape (count,), int64; and the least lead, in the logits, that the best next byte
        had over the second.
    """
    device = net.embedding.weight.device
    text = torch.tensor([list(prompt)], device=device)
    lead = math.inf
    with torch.inference_mode():
        for _ in range(count):
            best = net(text)[0, -1].topk(2)
            lead = min(lead, float(best.values[0] - best.values[1]))
            text = torch.cat((text, best.indices[None, :1]), dim=1)
    return text[0, len(prompt) :].cpu().numpy(), lead
