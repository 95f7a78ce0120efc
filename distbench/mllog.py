"""LoadGen's logs, read: mlperf_log_detail.txt and mlperf_log_accuracy.json.

Each entry of the detail log is ``:::MLLOG`` and JSON. A message may hold a line break, the last
entry of a process that was ended may be torn, and a division by 0 is written as inf or nan, which
is no JSON.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distbench.errors import UsageError

DETAIL, SUMMARY, ACCURACY = (
    "mlperf_log_detail.txt",
    "mlperf_log_summary.txt",
    "mlperf_log_accuracy.json",
)
PREFIX = ":::MLLOG "
_NO_JSON = re.compile(r'"value": (-?(?:inf|nan)),')

_DECODER = json.JSONDecoder(strict=False)


@dataclass(frozen=True)
class Detail:
    """What a detail log says.

    Attributes:
        keys: value of each key; of a key that came twice, the last.
        errors: messages of entries that LoadGen marked as errors, in order.
        warnings: likewise.
        torn: whether the log ends within an entry.
    """

    keys: Mapping[str, Any]
    errors: tuple[str, ...]
    warnings: tuple[str, ...]
    torn: bool


def parse_detail(text: str) -> Detail:
    """Read the text of a detail log; what is no entry is passed over."""
    keys: dict[str, Any] = {}
    told: dict[str, list[str]] = {"is_error": [], "is_warning": []}
    torn = False
    for piece in text.split(PREFIX)[1:]:
        try:
            entry, _ = _DECODER.raw_decode(_NO_JSON.sub(r'"value": "\1",', piece))
            key, value, marks = entry["key"], entry["value"], entry["metadata"]
        except (ValueError, KeyError, TypeError):
            torn = True
            continue
        keys[key] = value
        for mark, messages in told.items():
            if marks.get(mark):
                messages.append(f"{key}: {value}")
    return Detail(keys, tuple(told["is_error"]), tuple(told["is_warning"]), torn)


def read_detail(folder: Path) -> Detail:
    """Read the detail log in a folder.

    Raises:
        UsageError: it cannot be read.
    """
    path = folder / DETAIL
    try:
        return parse_detail(path.read_text(encoding="utf-8", errors="replace"))
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error


@dataclass(frozen=True)
class Entry:
    """One logged answer.

    Attributes:
        index: of the sample.
        data: the answer.
        first: the first token, as it was told when it came; b"" where none was.
        tokens: how many tokens the answer was said to have; None where it was not said.
    """

    index: int
    data: bytes
    first: bytes = b""
    tokens: int | None = None


def read_answers(folder: Path) -> dict[int, bytes]:
    """Read what LoadGen logged of the answers, by sample index.

    Raises:
        UsageError: the log cannot be read, is damaged, or has two answers to one sample.
    """
    found: dict[int, bytes] = {}
    for each in read_entries(folder):
        if found.setdefault(each.index, each.data) != each.data:
            raise UsageError(
                f"{folder / ACCURACY} has two different answers to sample {each.index}"
            )
    return found


def read_entries(folder: Path) -> list[Entry]:
    """Read what LoadGen logged of the answers, in its order.

    Raises:
        UsageError: the log cannot be read, or is damaged.
    """
    path = folder / ACCURACY
    try:
        return [
            Entry(
                int(each["qsl_idx"]),
                bytes.fromhex(each["data"]),
                bytes.fromhex(each.get("token_data", "")),
                int(each["token_count"]) if "token_count" in each else None,
            )
            for each in json.loads(path.read_text(encoding="utf-8"))
        ]
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {error}") from error
