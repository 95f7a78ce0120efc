"""The embedded digits: images, labels and which of them no training step has seen.

Two files lie beside this module, both pinned by SHA-256: ``digits.npz`` with the data and
``digits_w32.npz`` with the trained weights. A file is read once, hashed, and only then decoded, so
a number that distbench prints for this model always belongs to these very bytes. Needs no torch.

The held-out part is a random fifth of the images, the one that scikit-learn's ``train_test_split``
draws with ``random_state=0``. The same 13 people wrote both parts, so the accuracy on it says that
a system computes the right thing, not how it does on new handwriting.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench.models.arrays import decode_arrays, pinned_bytes
from distbench.models.classes import count_right, encoded

__all__ = ["encoded", "read_data", "read_pinned", "samples", "scored"]

DATA_FILE = "digits.npz"
WEIGHTS_FILE = "digits_w32.npz"

SHA256: dict[str, str] = {
    DATA_FILE: "b38c3d3f322c1cc3df21c05fdad501480a2130ebaadb565021824c8704711a9e",
    WEIGHTS_FILE: "64b47b142a34b8535eac8f8d33fa1ce9c7035068a90454a2b18d4af50ac64380",
}
"""The only content either file may have; ``train_digits`` prints the digests to put here."""


@dataclass(frozen=True, eq=False)
class DigitsData:
    """Every image with its label, and the rows on which accuracy may be stated.

    Attributes:
        images: shape (1797, 8, 8), uint8, 0 (paper) to 16 (ink); rows from top to bottom.
        labels: shape (1797,), uint8, the digit 0 to 9.
        held_out: shape (360,), int32, sorted indices into both; the other 1,437 were trained on.
    """

    images: NDArray[np.uint8]
    labels: NDArray[np.uint8]
    held_out: NDArray[np.int32]


def read_data(folder: Path | None = None) -> DigitsData:
    """Read the digits.

    Args:
        folder: where ``digits.npz`` lies; None is the installed package.

    Returns:
        The data, in fresh arrays.

    Raises:
        UsageError: the file is missing, unreadable or not the pinned one.
    """
    held = read_pinned(DATA_FILE, folder)
    return DigitsData(held["images"], held["labels"], held["held_out"])


def read_pinned(name: str, folder: Path | None = None) -> dict[str, NDArray[Any]]:
    """Read one of the two embedded files, refusing any content but the pinned one.

    Args:
        name: ``DATA_FILE`` or ``WEIGHTS_FILE``.
        folder: where the file lies; None is the installed package.

    Returns:
        The arrays by name, with the shapes and dtypes of the file.

    Raises:
        UsageError: the file is missing, unreadable or not the pinned one; the sentence gives the
            file, the digest expected, what was found and the remedy.
    """
    path = (Path(__file__).parent if folder is None else folder) / name
    return decode_arrays(path, pinned_bytes(path, SHA256[name]))


def samples(indices: Sequence[int]) -> list[bytes]:
    """Return the images of some samples, 64 bytes each: what crosses the wire as data.

    Args:
        indices: of the samples.
    """
    images = _data().images
    return [images[index].tobytes() for index in indices]


def scored(answers: Mapping[int, bytes]) -> tuple[int, int]:
    """Count the held-out images that were classified rightly; see ``classes.count_right``."""
    data = _data()
    return count_right(data.labels, data.held_out, answers)


@lru_cache(maxsize=1)
def _data() -> DigitsData:
    return read_data()
