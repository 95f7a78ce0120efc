"""Files that are either whole or absent: temporary, fsync, rename."""

from __future__ import annotations

import hashlib
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

from distbench.errors import UsageError


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file so that a reader, or a power cut, never sees half of it.

    Args:
        path: the file; its folder exists.
        data: the whole content.

    Raises:
        OSError: the disk is full or the folder cannot be written; an older file is left as it was.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def to_json(value: Any) -> bytes:
    """Encode as JSON, indented, keys in the order given, a newline at the end.

    Raises:
        ValueError: a number is NaN or infinite; those have no place in a record.
    """
    return (json.dumps(value, indent=1, allow_nan=False) + "\n").encode()


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as JSON by ``write_bytes``; see there and ``to_json`` for what it raises."""
    write_bytes(path, to_json(value))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        UsageError: the file is absent, unreadable or not JSON; the sentence names it.
    """
    try:
        return json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path} is not valid JSON: {error}") from error


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not a JSON number")


def sha256(data: bytes | memoryview) -> str:
    """Return the SHA-256 of ``data`` as 64 hex digits."""
    return hashlib.sha256(data).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file as 64 hex digits, read in pieces of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def finite(value: float | int | None) -> float | int | None:
    """Return ``value``, or None where it is NaN or infinite: JSON has no such numbers."""
    return value if value is None or math.isfinite(value) else None


def write_manifest(folder: Path) -> None:
    """Write manifest.sha256, the hash of every file of a result directory, as sha256sum does."""
    paths = sorted(p for p in folder.rglob("*") if p.is_file() and not p.name.startswith("."))
    lines = [
        f"{sha256_file(path)}  {path.relative_to(folder)}\n"
        for path in paths
        if path != folder / "manifest.sha256"
    ]
    write_bytes(folder / "manifest.sha256", "".join(lines).encode())


def manifest_holds(folder: Path) -> bool:
    """Tell whether every file that the manifest lists, result.json among them, is as it was."""
    try:
        lines = (folder / "manifest.sha256").read_text(encoding="utf-8").splitlines()
        listed = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
        return "result.json" in listed and all(
            sha256_file(folder / name) == digest for name, digest in listed.items()
        )
    except (OSError, ValueError):
        return False
