"""The embedded text model's files, and the samples that are cut from its text. Needs no torch.

Three files lie beside this module, each pinned by SHA-256: ``tinylm_text.gz``, the Declaration of
Independence followed by the Constitution of the United States with its amendments, 54,675 bytes of
ASCII; ``tinylm_w64.npz``, the trained weights; ``tinylm_expected.npz``, what the network must write
after some prompts.

The last tenth of the text is held out: no training step and no choice of the recipe has seen it.

A sample is a prompt, 16 to 64 bytes cut from anywhere in the text, and how many bytes are to follow
it, 8 to 128, each drawn uniformly. The network knows no end of a text, so that number is part of
the sample, as a workload's output lengths are.
"""

from __future__ import annotations

import gzip
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench.models.arrays import decode_arrays, pinned_bytes

TEXT_FILE = "tinylm_text.gz"
WEIGHTS_FILE = "tinylm_w64.npz"
EXPECTED_FILE = "tinylm_expected.npz"

SHA256: dict[str, str] = {
    TEXT_FILE: "c860db09ca260300162d82b88a0cd029609237a2cc649167694ce26b0dc33fa5",
    WEIGHTS_FILE: "b5ffae9b2bb14eee0a8fd80e85e17b73b97807d784052a076052f0e004827101",
    EXPECTED_FILE: "37d5c580331a0b16622540c9fdc5b4784afc838d67bf66b05b424a607bace208",
}
"""The only content each file may have; ``train_tinylm`` prints the digests to put here."""

VOCABULARY = 128
SAMPLES = 1024
PROMPT_LIMITS = (16, 64)
OUTPUT_LIMITS = (8, 128)
SLOT_LENGTH = PROMPT_LIMITS[1] + OUTPUT_LIMITS[1]
"""Positions that the longest sample takes."""

Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Samples:
    """Every prompt, and how many bytes are to follow it.

    Attributes:
        prompts: by sample index, each 16 to 64 bytes.
        output_lengths: shape (1024,), int64, 8 to 128.
        starts: shape (1024,), int64, where each prompt begins in the text.
    """

    prompts: tuple[bytes, ...]
    output_lengths: Indices
    starts: Indices


@dataclass(frozen=True, eq=False)
class Expected:
    """What the network must write, as ``train_tinylm`` worked it out.

    Attributes:
        held_out: shape (n,), int64, sorted sample indices: prompts of the held-out text after which
            the best next byte is more than 1e-2 ahead of the second, in the logits, at every step.
        tokens: by sample index, shape (output length,), uint8.
    """

    held_out: Indices
    tokens: dict[int, NDArray[np.uint8]]


def pinned(name: str, folder: Path | None = None) -> tuple[Path, bytes]:
    """Read one of the three embedded files, refusing any content but the pinned one.

    Args:
        name: one of ``SHA256``.
        folder: where the file lies; None is the installed package.

    Returns:
        Its path and its content.

    Raises:
        UsageError: the file is missing, unreadable or not the pinned one.
    """
    path = (Path(__file__).parent if folder is None else folder) / name
    return path, pinned_bytes(path, SHA256[name])


def read_text(folder: Path | None = None) -> bytes:
    """Read the text, ASCII; raises what ``pinned`` does."""
    return gzip.decompress(pinned(TEXT_FILE, folder)[1])


def training_bytes(text: bytes) -> int:
    """Return how many bytes of the text, from its beginning, may be trained on."""
    return len(text) * 9 // 10


def draw_samples(text: bytes) -> Samples:
    """Cut the samples; the same text always gives the same ones.

    Args:
        text: from ``read_text``.
    """
    generator = np.random.RandomState(0)  # numpy keeps its stream for good
    prompt_lengths = generator.randint(PROMPT_LIMITS[0], PROMPT_LIMITS[1] + 1, SAMPLES)
    outputs = generator.randint(OUTPUT_LIMITS[0], OUTPUT_LIMITS[1] + 1, SAMPLES)
    starts = generator.randint(0, len(text) - PROMPT_LIMITS[1] + 1, SAMPLES)
    prompts = (text[a : a + n] for a, n in zip(starts.tolist(), prompt_lengths, strict=True))
    return Samples(tuple(prompts), outputs.astype(np.int64), starts.astype(np.int64))


def read_expected(samples: Samples, folder: Path | None = None) -> Expected:
    """Read what the network must write.

    Args:
        samples: their output lengths divide the file's one row of tokens.
        folder: where the file lies; None is the installed package.

    Raises:
        UsageError: the file is missing, unreadable or not the pinned one.
    """
    arrays = decode_arrays(*pinned(EXPECTED_FILE, folder))
    held_out = arrays["held_out"].astype(np.int64)
    ends = np.cumsum(samples.output_lengths[held_out])
    pieces = np.split(arrays["tokens"], ends[:-1])
    return Expected(held_out, dict(zip(held_out.tolist(), pieces, strict=True)))


def samples(indices: Sequence[int]) -> list[bytes]:
    """Return the prompts of some samples, which is what crosses the wire with ``--payload data``.

    Args:
        indices: of the samples.
    """
    prompts = _prompts()
    return [prompts[index] for index in indices]


@lru_cache(maxsize=1)
def _prompts() -> tuple[bytes, ...]:
    return draw_samples(read_text()).prompts


def encoded(outputs: Sequence[Any]) -> list[bytes]:
    """Return the texts of some outputs: a token is a byte.

    Args:
        outputs: n arrays of tokens.
    """
    return [np.asarray(each).astype(np.uint8).tobytes() for each in outputs]


def scored(answers: Mapping[int, bytes]) -> tuple[int, int]:
    """Count the tokens of held-out samples that are the reference's, place by place.

    Args:
        answers: by sample index.

    Returns:
        How many are the same, and how many the reference has.

    Raises:
        KeyError: a held-out sample has no answer.
    """
    right = total = 0
    for index, wanted in _expected().tokens.items():
        got = np.frombuffer(answers[index], np.uint8)[: len(wanted)]
        right += int((got == wanted[: len(got)]).sum())
        total += len(wanted)
    return right, total


@lru_cache(maxsize=1)
def _expected() -> Expected:
    return read_expected(draw_samples(read_text()))
