#!/usr/bin/env python3
"""Keep results, weights and configuration where they can be had again, each file once.

    launch/ops/backup.py save STORE results/ weights/ distbench.env
    launch/ops/backup.py list STORE
    launch/ops/backup.py verify STORE
    launch/ops/backup.py restore STORE SNAPSHOT TARGET      SNAPSHOT: a name, or latest

STORE is a folder, on another disk or host. Below ``objects/`` lies the content of every file, once,
under its SHA-256; below ``snapshots/`` a JSON file for each ``save``: paths, modes, times, hashes.
A file whose path, size, inode and times are those of the snapshot before is not read again; what is
new is hashed while it is copied, and nothing appears under its name before it is on the disk. A
snapshot is written last, so one that is there is whole. ``verify`` reads every object; ``restore``
checks every hash as it writes, and never into a folder that has something in it.

Not kept: owners, extended attributes, hard links as such, and files that are neither plain nor
links, which are named. Standard library only. Exit status: 0; 1 where something is damaged or was
not kept; 2 where it cannot be done as asked.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import stat
import sys
import tempfile
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, BinaryIO

PIECE = 1 << 20
SCHEMA_VERSION = 1
Entry = dict[str, Any]


class Unusable(Exception):
    """It cannot be done as asked; the text says why."""


def hashed_copy(source: BinaryIO, target: BinaryIO) -> tuple[str, int]:
    """Copy a file; returns its SHA-256 and size in bytes."""
    digest, size = hashlib.sha256(), 0
    while piece := source.read(PIECE):
        digest.update(piece)
        target.write(piece)
        size += len(piece)
    target.flush()
    os.fsync(target.fileno())
    return digest.hexdigest(), size


def sha256(path: Path) -> str:
    """Return a file's SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(PIECE):
            digest.update(piece)
    return digest.hexdigest()


def settle(part: Path, path: Path) -> None:
    """Give a file that is on the disk its name, durably."""
    part.rename(path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def object_path(store: Path, digest: str) -> Path:
    """Return where a content lies."""
    return store / "objects" / digest[:2] / digest[2:]


def keep(store: Path, path: Path) -> tuple[str, int]:
    """Put a file's content into the store; returns its SHA-256 and size."""
    (store / "objects").mkdir(exist_ok=True)
    fd, name = tempfile.mkstemp(prefix=".part-", dir=store / "objects")
    part = Path(name)
    try:
        with path.open("rb") as source, os.fdopen(fd, "wb") as target:
            digest, size = hashed_copy(source, target)
        kept = object_path(store, digest)
        if not kept.exists():
            kept.parent.mkdir(exist_ok=True)
            part.chmod(0o444)
            settle(part, kept)
    finally:
        part.unlink(missing_ok=True)
    return digest, size


def snapshots(store: Path) -> list[Path]:
    """Return the snapshots, the oldest first.

    Raises:
        Unusable: it is no store.
    """
    if not (store / "snapshots").is_dir():
        raise Unusable(f"{store} is no store: it has no snapshots/")
    return sorted((store / "snapshots").glob("*.json"))


def load(path: Path) -> Entry:
    """Read a snapshot.

    Raises:
        Unusable: it cannot be read.
    """
    try:
        found = json.loads(path.read_bytes())
        entries = found["entries"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Unusable(f"{path} is no snapshot: {error}") from error
    return {"schema_version": found["schema_version"], "entries": entries}


def below(roots: Sequence[Path]) -> Iterator[tuple[str, Path]]:
    """Yield what is to be kept: its path in the snapshot, and where it is.

    Raises:
        Unusable: something is not there, or two have one name.
    """
    names = [root.absolute().name for root in roots]
    if len(set(names)) < len(names):
        raise Unusable(f"two of {', '.join(map(str, roots))} have one name: save them apart")
    for name, root in zip(names, roots, strict=True):
        if not root.exists():
            raise Unusable(f"{root} is not there")
        yield name, root
        if root.is_dir():
            for path in sorted(root.rglob("*")):
                yield f"{name}/{path.relative_to(root)}", path


def entry(store: Path, path: Path, before: Entry | None) -> Entry | None:
    """Keep one file, folder or link; None for anything else."""
    told = path.lstat()
    made: Entry = {"mode": stat.S_IMODE(told.st_mode), "mtime_ns": told.st_mtime_ns}
    if stat.S_ISDIR(told.st_mode):
        return {**made, "kind": "folder"}
    if stat.S_ISLNK(told.st_mode):
        return {**made, "kind": "link", "target": str(path.readlink())}
    if not stat.S_ISREG(told.st_mode):
        return None
    same = {"ctime_ns": told.st_ctime_ns, "inode": told.st_ino, "size": told.st_size}
    known = before or {}
    unchanged = all(known.get(key) == value for key, value in {**made, **same}.items())
    if unchanged and object_path(store, known["sha256"]).exists():
        return known
    digest, size = keep(store, path)
    # A file that grew meanwhile: its size is that of what was kept, so it is read again next time.
    return {**made, **same, "size": size, "kind": "file", "sha256": digest}


def save(store: Path, roots: Sequence[Path]) -> int:
    """Make a snapshot; returns the exit status."""
    (store / "snapshots").mkdir(parents=True, exist_ok=True)
    earlier = snapshots(store)
    before = load(earlier[-1])["entries"] if earlier else {}
    entries: dict[str, Entry] = {}
    wrong = []
    for name, path in below(roots):
        try:
            made = entry(store, path, before.get(name))
        except OSError as error:
            wrong.append(f"{path}: {error.strerror}: not kept")
            continue
        if made is None:
            wrong.append(f"{path} is neither a file, a folder nor a link: not kept")
        else:
            entries[name] = made
    new = sum(e.get("sha256") != before.get(n, {}).get("sha256") for n, e in entries.items())
    name = f"{datetime.now(timezone.utc):%Y%m%dT%H%M%S.%fZ}"
    fd, part = tempfile.mkstemp(prefix=".part-", dir=store / "snapshots")
    with os.fdopen(fd, "w") as file:
        json.dump({"schema_version": SCHEMA_VERSION, "entries": entries}, file)
        file.flush()
        os.fsync(file.fileno())
    settle(Path(part), store / "snapshots" / f"{name}.json")
    print(f"{name}: {len(entries)} entries, {new} new or changed files")
    for sentence in wrong:
        print(sentence, file=sys.stderr)
    return int(bool(wrong))


def verify(store: Path) -> int:
    """Read every object of every snapshot; returns the exit status."""
    wanted: dict[str, str] = {}
    for path in snapshots(store):
        for name, each in load(path)["entries"].items():
            if each["kind"] == "file":
                wanted.setdefault(each["sha256"], f"{path.stem}: {name}")
    damaged = 0
    for digest, where in wanted.items():
        path = object_path(store, digest)
        found = "missing"
        if path.is_file():
            found = sha256(path)
        if found != digest:
            damaged += 1
            print(f"{where}: its content is {'damaged' if found != 'missing' else found}")
    print(f"{len(wanted)} contents, {damaged} damaged or missing")
    return int(bool(damaged))


def restore(store: Path, snapshot: str, target: Path) -> int:
    """Write a snapshot's files below a new folder; returns the exit status."""
    known = {path.stem: path for path in snapshots(store)}
    name = max(known, default="") if snapshot == "latest" else snapshot
    if name not in known:
        raise Unusable(f"{store} has no snapshot {snapshot!r}: `list` shows them")
    if target.exists() and any(target.iterdir()):
        raise Unusable(f"{target} has something in it: name a new folder")
    entries = load(known[name])["entries"]
    for path in entries:
        if Path(path).is_absolute() or ".." in Path(path).parts:
            raise Unusable(f"{known[name]} names {path!r}, which lies outside: it is not restored")
    target.mkdir(parents=True, exist_ok=True)
    damaged = 0
    for path, each in entries.items():
        place = target / path
        if each["kind"] == "folder":
            place.mkdir(parents=True, exist_ok=True)
        elif each["kind"] == "link":
            place.parent.mkdir(parents=True, exist_ok=True)
            place.symlink_to(each["target"])
        else:
            place.parent.mkdir(parents=True, exist_ok=True)
            damaged += not _written(object_path(store, each["sha256"]), place, each)
    for path, each in reversed(entries.items()):  # a folder after what is in it
        if each["kind"] != "link" and (target / path).exists():
            (target / path).chmod(each["mode"])
            os.utime(target / path, ns=(each["mtime_ns"], each["mtime_ns"]))
    print(f"{name}: {len(entries)} entries in {target}, {damaged} damaged or missing")
    return int(bool(damaged))


def _written(source: Path, place: Path, each: Entry) -> bool:
    """Write one file, unless its content is not what it was."""
    try:
        with source.open("rb") as read, place.open("xb") as written:
            digest, _ = hashed_copy(read, written)
    except FileNotFoundError:
        digest = ""
    if digest != each["sha256"]:
        place.unlink(missing_ok=True)
        print(f"{place}: its content is damaged or missing in the store", file=sys.stderr)
        return False
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status."""
    made = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts = made.add_subparsers(dest="action", required=True)
    for name, words in (("save", ["paths"]), ("list", []), ("verify", []), ("restore", ["to"])):
        part = parts.add_parser(name)
        part.add_argument("store", type=Path)
        if "paths" in words:
            part.add_argument("paths", type=Path, nargs="+")
        if "to" in words:
            part.add_argument("snapshot")
            part.add_argument("target", type=Path)
    told = made.parse_args(argv)
    try:
        if told.action == "save":
            return save(told.store, told.paths)
        if told.action == "verify":
            return verify(told.store)
        if told.action == "restore":
            return restore(told.store, told.snapshot, told.target)
        for path in snapshots(told.store):
            print(f"{path.stem}: {len(load(path)['entries'])} entries")
    except (Unusable, OSError) as error:
        print(f"backup: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
