"""loadgen/ of a result directory: LoadGen's own logs, untouched, and what is read from them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from distbench import files
from distbench.errors import UsageError
from distbench.mllog import DETAIL, read_answers, read_detail
from distbench.rounds import V5_0, V5_1
from distbench.samples import Array
from distbench.suite import benchmark, scored

EXTRAS = {V5_0.name: "mlperf", V5_1.name: "mlperf-v51"}
"""Extra of distbench that installs a round's LoadGen."""
SENT_LIMIT_BYTES = 1 << 30
"""Of one of LoadGen's logs, that a driver on another host sends."""


def texts_in(folder: Path) -> list[tuple[str, bytes]]:
    """Return the files of a folder, by name, as far as they are of a size to be sent.

    Raises:
        UsageError: one cannot be read.
    """
    found = []
    for path in sorted(folder.iterdir()):
        try:
            if path.is_file() and path.stat().st_size <= SENT_LIMIT_BYTES:
                found.append((path.name, path.read_bytes()))
        except OSError as error:
            raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    return found


def as_numbers(blob: bytes) -> Array:
    """Return bytes as int64, as they cross a link, filled up with zeros."""
    return np.frombuffer(blob + bytes(-len(blob) % 8), "<i8").astype(np.int64)


def write_texts(folder: Path, named: Sequence[tuple[str, int]], arrays: Sequence[Any]) -> None:
    """Write what ``as_numbers`` made, unless the driver itself has, over a shared disk.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for (name, size), numbers in zip(named, arrays, strict=True):
        path = folder / Path(name).name
        if not path.exists():
            files.write_bytes(path, np.asarray(numbers, "<i8").tobytes()[:size])


def told(folder: Path, official: dict[str, Any]) -> dict[str, Any]:
    """Return what LoadGen's logs say, JSON-able.

    Args:
        folder: loadgen/ of a result directory.
        official: from ``official.settled``.

    Returns:
        ``keys``, ``errors``, ``warnings`` of the detail log, ``torn``; ``problem``, "" or why
        something is not known; ``right`` and ``of`` of accuracy mode, else None.
    """
    found: dict[str, Any] = {"keys": {}, "errors": [], "warnings": [], "torn": False}
    found |= {"problem": "", "right": None, "of": None}
    try:
        detail = read_detail(folder)
        plain = (str, int, float, bool)  # the loaded set and the sources' hashes stay in the log
        found["keys"] = {k: v for k, v in detail.keys.items() if isinstance(v, plain)}
        found |= {"errors": list(detail.errors), "warnings": list(detail.warnings)}
        found["torn"] = detail.torn
        if detail.torn:
            found["problem"] = f"{folder / DETAIL} has an entry that cannot be read"
        if official["mode"] == "accuracy":
            answers = read_answers(folder)
            found["right"], found["of"] = scored(benchmark(official["benchmark"]), answers)
    except UsageError as error:
        found["problem"] = str(error)
    return found
