"""launch/ops/backup.py: what was saved comes back, and damage is noticed."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import REPO

pytestmark = pytest.mark.timeout(60)


def backup(*arguments: object) -> subprocess.CompletedProcess[str]:
    argv = [sys.executable, str(REPO / "launch/ops/backup.py"), *map(str, arguments)]
    return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)


def shown(folder: Path) -> dict[str, tuple[object, ...]]:
    """Return everything below a folder that a backup promises to bring back."""
    found: dict[str, tuple[object, ...]] = {}
    for path in sorted(folder.rglob("*")):
        told = path.lstat()
        content: object = str(path.readlink()) if path.is_symlink() else ""
        if path.is_file() and not path.is_symlink():
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        times = () if path.is_symlink() else (told.st_mode, told.st_mtime_ns)
        found[str(path.relative_to(folder))] = (content, *times)
    return found


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Results, a weights file, a link, an empty folder, odd names and modes."""
    made = tmp_path / "here"
    ranks = made / "results/20260101-offline/ranks/00000"
    ranks.mkdir(parents=True)
    (ranks / "samples.npy").write_bytes(os.urandom(3_000_000))
    (ranks / "copy.npy").write_bytes((ranks / "samples.npy").read_bytes())
    (made / "results/é\n *'\"").write_text("odd")
    (made / "results/none").mkdir()
    (made / "results/latest").symlink_to("20260101-offline")
    (made / "results/gone").symlink_to("/nowhere")
    (made / "weights.bin").write_bytes(b"\0" * 10)
    (made / "weights.bin").chmod(0o600)
    (made / "results/none").chmod(0o500)
    return made


def test_what_was_saved_comes_back_to_the_byte(tree: Path, tmp_path: Path) -> None:
    store, back = tmp_path / "store", tmp_path / "back"
    done = backup("save", store, tree / "results", tree / "weights.bin")
    assert done.returncode == 0, done.stderr
    assert backup("verify", store).stdout == "3 contents, 0 damaged or missing\n"
    assert backup("restore", store, "latest", back).returncode == 0
    assert shown(back) == shown(tree)
    objects = [path for path in (store / "objects").rglob("*") if path.is_file()]
    assert len(objects) == 3, "two files of one content are kept once"


def test_a_second_save_reads_what_changed_and_keeps_both_states(tree: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    backup("save", store, tree / "results")
    first = shown(tree)
    (tree / "results/new").write_text("x")
    # Were it read again, the changed object would be noticed as another content.
    (kept,) = [p for p in (store / "objects").rglob("*") if p.is_file() and p.stat().st_size > 10]
    kept.chmod(0o644)
    done = backup("save", store, tree / "results")
    assert "1 new or changed files" in done.stdout
    old, new = (line.partition(":")[0] for line in backup("list", store).stdout.splitlines())
    assert backup("restore", store, old, tmp_path / "old").returncode == 0
    assert backup("restore", store, new, tmp_path / "new").returncode == 0
    wanted = {name: each for name, each in first.items() if name.startswith("results/")}
    assert {n: e for n, e in shown(tmp_path / "old").items() if "/" in n} == wanted
    assert (tmp_path / "new/results/new").read_text() == "x"


def test_a_file_that_changed_without_its_time_or_size_is_seen(tree: Path, tmp_path: Path) -> None:
    store, path = tmp_path / "store", tree / "weights.bin"
    backup("save", store, path)
    told = path.stat()
    path.write_bytes(b"\1" * 10)
    os.utime(path, ns=(told.st_atime_ns, told.st_mtime_ns))
    backup("save", store, path)
    backup("restore", store, "latest", tmp_path / "back")
    assert (tmp_path / "back/weights.bin").read_bytes() == b"\1" * 10


def test_damage_is_named_and_never_restored(tree: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    backup("save", store, tree / "weights.bin", tree / "results")
    digest = hashlib.sha256((tree / "weights.bin").read_bytes()).hexdigest()
    kept = store / "objects" / digest[:2] / digest[2:]
    kept.chmod(0o644)
    kept.write_bytes(b"\0" * 9 + b"\1")
    done = backup("verify", store)
    assert done.returncode == 1 and "weights.bin: its content is damaged" in done.stdout
    done = backup("restore", store, "latest", tmp_path / "back")
    assert done.returncode == 1 and "weights.bin: its content is damaged" in done.stderr
    assert not (tmp_path / "back/weights.bin").exists()
    assert (tmp_path / "back/results/none").is_dir()
    kept.unlink()
    assert "weights.bin: its content is missing" in backup("verify", store).stdout
    # The next save has the content, and mends the store.
    assert backup("save", store, tree / "weights.bin").returncode == 0
    assert backup("verify", store).returncode == 0


def test_what_cannot_be_kept_is_named_and_the_rest_is_kept(tree: Path, tmp_path: Path) -> None:
    os.mkfifo(tree / "results/pipe")
    done = backup("save", tmp_path / "store", tree / "results")
    assert done.returncode == 1
    assert "results/pipe is neither a file, a folder nor a link: not kept" in done.stderr
    assert backup("restore", tmp_path / "store", "latest", tmp_path / "back").returncode == 0
    assert (tmp_path / "back/results/20260101-offline/ranks/00000/samples.npy").exists()


def test_bad_requests_touch_nothing(tree: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    for arguments, word in (
        (("list", store), "is no store"),
        (("restore", store, "latest", tmp_path / "back"), "is no store"),
        (("save", store, tree / "nowhere"), "is not there"),
        (("save", store, tree / "results", tmp_path / "other/results"), "have one name"),
    ):
        done = backup(*arguments)
        assert done.returncode == 2 and word in done.stderr, (arguments, done.stderr)
    backup("save", store, tree / "weights.bin")
    done = backup("restore", store, "latest", tree)
    assert done.returncode == 2 and "has something in it" in done.stderr
    done = backup("restore", store, "2020", tmp_path / "back")
    assert done.returncode == 2 and "has no snapshot '2020'" in done.stderr
    (path,) = (store / "snapshots").glob("*.json")
    path.write_text(path.read_text().replace('"weights.bin"', '"../weights.bin"'))
    done = backup("restore", store, "latest", tmp_path / "back")
    assert done.returncode == 2 and "lies outside" in done.stderr
