"""Outputs of a classifier as LoadGen logs them: the class of the largest logit, int64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

CLASS_BYTES = 8


def encoded(outputs: Sequence[Any]) -> list[bytes]:
    """Return the class of each output, 8 bytes, little-endian.

    Args:
        outputs: n rows of logits.
    """
    blob = np.asarray(outputs).argmax(axis=1).astype("<i8").tobytes()
    return [blob[at : at + CLASS_BYTES] for at in range(0, len(blob), CLASS_BYTES)]


def count_right(
    labels: NDArray[Any], held_out: NDArray[Any], answers: Mapping[int, bytes]
) -> tuple[int, int]:
    """Count the held-out samples whose logged class is the label.

    Args:
        labels: shape (total,).
        held_out: sample indices that are scored.
        answers: by sample index.

    Returns:
        How many are right, and how many there are.

    Raises:
        KeyError: one has no answer.
        ValueError: an answer is no class.
    """
    right = 0
    for index in held_out.tolist():
        answer = answers[index]
        if len(answer) != CLASS_BYTES:
            raise ValueError(f"sample {index} was answered with {len(answer)} bytes, not 8")
        right += int.from_bytes(answer, "little", signed=True) == int(labels[index])
    return right, len(held_out)
