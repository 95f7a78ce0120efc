"""Writing the folder of a rank, or of the driver, from what was gathered; and its done.json."""

from __future__ import annotations

from pathlib import Path

from distbench import files
from distbench.run import RankRecord
from distbench.samples import npy_bytes


def write_rank(path: Path, record: RankRecord, name: str = "rank.json") -> None:
    """Write another rank's folder from what was gathered; its done.json proves the copy.

    Args:
        path: the rank's folder; made here.
        record: complete, and with the ``done`` document under ``after["done"]`` removed already.
        name: of the file that was written before the window.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    path.mkdir(parents=True, exist_ok=True)
    files.write_json(path / name, record.before)
    if record.rows is not None:
        files.write_bytes(path / "samples.npy", npy_bytes(record.rows))
    if record.token_ns is not None:
        files.write_bytes(path / "tokens.npy", npy_bytes(record.token_ns))
    if record.after is not None:
        files.write_json(path / "after.json", record.after)
    write_done(path)


def write_driver(folder: Path, record: RankRecord) -> None:
    """Write driver/ of a result directory, unless the driver itself has, over a shared disk.

    Raises:
        OSError: the disk is full or the folder cannot be written.
    """
    own = folder / "driver"
    if not (own / "done.json").exists():
        write_rank(own, record, "driver.json")


def write_done(path: Path) -> dict[str, str]:
    """Write done.json: the SHA-256 of every other file of a rank's folder; returns them by name."""
    names = sorted(p.name for p in path.iterdir() if p.is_file() and not p.name.startswith("."))
    hashes = {name: files.sha256_file(path / name) for name in names if name != "done.json"}
    files.write_json(path / "done.json", {"files": hashes})
    return hashes
