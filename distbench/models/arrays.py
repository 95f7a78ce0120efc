"""Files of arrays that models ship or are given: pinned, complete, never unpickled; no torch."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from distbench.errors import UsageError
from distbench.files import sha256

NAMED = 5
"""Keys that a refusal lists; the rest are counted."""


def pinned_bytes(path: Path, expected: str) -> bytes:
    """Read an embedded file, refusing any content but the pinned one.

    Args:
        path: the file.
        expected: its SHA-256, 64 hex digits.

    Returns:
        The content.

    Raises:
        UsageError: the file is missing, unreadable or not the pinned one; the sentence gives the
            file, the digest expected, what was found and the remedy.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _refusal(path, expected, error.strerror or str(error)) from error
    found = sha256(content)
    if found != expected:
        raise _refusal(path, expected, f"sha256 {found}")
    return content


def _refusal(path: Path, expected: str, found: str) -> UsageError:
    return UsageError(
        f"{path} is not the file that distbench ships: expected sha256 {expected}, "
        f"found {found}; reinstall distbench"
    )


def decode_arrays(path: Path, content: bytes) -> dict[str, NDArray[Any]]:
    """Decode the content of an .npz file.

    Args:
        path: named where it is refused.
        content: of the file.

    Returns:
        The arrays by name.

    Raises:
        UsageError: it is no .npz file, it is damaged, or it holds what only pickle could read.
    """
    try:
        loaded = np.load(io.BytesIO(content), allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            raise ValueError("it is one array, without a name")
        with loaded as arrays:
            return dict(arrays)
    except Exception as error:  # zip, zlib, tokenizer: whatever damage makes numpy stumble over
        raise UsageError(
            f"{path} is no .npz file of plain arrays, and nothing is unpickled here: {error}; "
            "give a file that numpy.savez wrote"
        ) from error


def check_arrays(
    path: Path, arrays: Mapping[str, NDArray[Any]], shapes: Mapping[str, Sequence[int]]
) -> None:
    """Refuse arrays that are not exactly those that a network has, as finite floats.

    Args:
        path: where they come from; named where they are refused.
        arrays: by name.
        shapes: that they must have, by name.

    Raises:
        UsageError: keys are missing, extra, misshapen or not finite floats; they are named.
    """
    common = [name for name in shapes if name in arrays]
    wrong = {
        "without": [name for name in shapes if name not in arrays],
        "with unknown": [name for name in arrays if name not in shapes],
        "with misshapen": [
            f"{name} {arrays[name].shape} in place of {tuple(shapes[name])}"
            for name in common
            if arrays[name].shape != tuple(shapes[name])
        ],
        "with not finite floats in": [name for name in common if not _finite(arrays[name])],
    }
    told = [f"{what} {_listed(names)}" for what, names in wrong.items() if names]
    if told:
        raise UsageError(
            f"{path} does not hold the weights of this network: it comes {', '.join(told)}; "
            "give the file that belongs to it"
        )


def _finite(array: NDArray[Any]) -> bool:
    return array.dtype.kind == "f" and bool(np.isfinite(array).all())


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
