"""The same environment on every host: a wheel of this clone, and the wheels that it needs.

The wheel is written here with the standard library, because a control node may have neither pip nor
setuptools; a test compares it with what setuptools writes. Its bytes depend on sources and commit
alone, so that its hash, with those of the other wheels, names the environment: it is made once.
"""

from __future__ import annotations

import base64
import configparser
import hashlib
import io
import json
import os
import re
import subprocess
import sysconfig
import tempfile
import time
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from channel import Channel, Refused
from checks import ASK_S, at_once
from collect import REPOSITORY, sha256
from streams import say

INSTALL_S = 900.0
STALL_S = 60.0
"""A host that takes nothing of a file for so long is lost."""
REMEDY = "wheels must fit that host's Python and processor, an index must be in its reach"
STAMP = (1980, 1, 1, 0, 0, 0)
"""Of every file in the wheel: the earliest that a zip archive can tell."""


@dataclass(frozen=True)
class Wheel:
    """A wheel on its way.

    Attributes:
        sha: SHA-256, in hexadecimal.
        path: here.
    """

    sha: str
    path: Path

    @property
    def named(self) -> list[str]:
        """Its hash and file name, as a host is told of it."""
        return [self.sha, self.path.name]


def metadata() -> tuple[str, str, list[str]]:
    """Return this clone's version, METADATA and requirements.

    The keys are those of the core metadata specifications (packaging.python.org, read 2026-11-26);
    extras are left out, since nothing asks for them on a host.
    """
    told = configparser.ConfigParser()
    told.read(REPOSITORY / "setup.cfg", encoding="utf-8")
    text = (REPOSITORY / "distbench/__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"', text, re.MULTILINE)
    version = match.group(1) if match else "0"
    wanted = told["options"]["install_requires"].split()
    lines = [
        "Metadata-Version: 2.1",
        "Name: distbench",
        f"Version: {version}",
        f"Summary: {told['metadata']['description']}",
        f"Requires-Python: {told['options']['python_requires']}",
        *(f"Requires-Dist: {each}" for each in wanted),
    ]
    return version, "\n".join(lines) + "\n", wanted


def built() -> dict[str, str | bool | None]:
    """Return the commit of this clone and whether the package differs from it, for the record."""
    told: list[str | None] = []
    for words in (["rev-parse", "--verify", "HEAD"], ["status", "--porcelain", "--", "distbench"]):
        argv = ["git", "--no-optional-locks", "-C", str(REPOSITORY), *words]
        try:
            done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=20)
            told.append(done.stdout.strip() if done.returncode == 0 else None)
        except (OSError, subprocess.TimeoutExpired):
            told.append(None)
    commit, changes = told
    return {"git_commit": commit, "git_dirty": None if changes is None else bool(changes)}


def write_wheel(folder: Path) -> Path:
    """Write the wheel of this clone into a folder; returns its path.

    Source: Binary distribution format, packaging.python.org, read 2026-11-26.
    """
    version, told, _ = metadata()
    info = f"distbench-{version}.dist-info"
    files = {
        str(path.relative_to(REPOSITORY)): path.read_bytes()
        for path in sorted((REPOSITORY / "distbench").rglob("*"))
        if path.is_file() and "__pycache__" not in path.parts
    }
    for name in ("LICENSE", "NOTICE"):
        files[f"{info}/licenses/{name}"] = (REPOSITORY / name).read_bytes()
    files[f"{info}/METADATA"] = told.encode()
    files[f"{info}/built.json"] = json.dumps(built(), sort_keys=True).encode()
    wheel = "Wheel-Version: 1.0\nGenerator: distbench\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files[f"{info}/WHEEL"] = wheel.encode()
    record = io.StringIO()
    for name, data in files.items():
        digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        record.write(f"{name},sha256={digest},{len(data)}\n")
    record.write(f"{info}/RECORD,,\n")
    files[f"{info}/RECORD"] = record.getvalue().encode()
    target = folder / f"distbench-{version}-py3-none-any.whl"
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, STAMP)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.external_attr = 0o100644 << 16
            archive.writestr(entry, data)
    return target


def pip_wheel(wheels: Sequence[Path]) -> Path | None:
    """Return a wheel of pip: of the wheelhouse, or the one this Python's ensurepip has; or None.

    With it a host needs no ensurepip, which Debian ships in a package of its own.
    """
    bundled = [Path(os.__file__).parent / "ensurepip" / "_bundled"]
    packaged = sysconfig.get_config_var("WHEEL_PKG_DIR")
    bundled += [Path(packaged)] if packaged else []
    found = [each for each in wheels if each.name.startswith("pip-")]
    found += [each for folder in bundled for each in sorted(folder.glob("pip-*.whl"))]
    return found[0] if found else None


def deploy(
    channels: Sequence[Channel], python: str, wheelhouse: Path | None, no_index: bool
) -> tuple[str, list[str]]:
    """Make the environment on every host.

    Args:
        channels: to the hosts, through the Python that the environment shall have.
        python: that one, as it was asked for.
        wheelhouse: a folder of wheels to send, which pip may take beside what its index has.
        no_index: nothing but these wheels is taken.

    Returns:
        The environment's Python, with ``~`` for each host's home, and what went wrong.
    """
    given = sorted(wheelhouse.glob("*.whl")) if wheelhouse else []
    if no_index and not given:
        return "", [f"--wheelhouse {wheelhouse}: there is no wheel in it"]
    _, _, wanted = metadata()
    with tempfile.TemporaryDirectory() as folder:
        own = hashed(write_wheel(Path(folder)))
        tool = pip_wheel(given)
        pip = [hashed(tool)] if tool else []
        wheels = [hashed(each) for each in given]
        told = repr((python, sorted(each.sha for each in wheels), wanted, no_index)).encode()
        key = {"key": hashlib.sha256(told).hexdigest()[:16], "own": own.named}

        def one(channel: Channel) -> dict[str, Any]:
            begin = time.monotonic()
            every = [*wheels, *pip, own]
            lacked = channel.ask("lacking", ASK_S, wheels=named(*every), **key)
            if not lacked["made"]:
                send(channel, [each for each in every if each.sha in lacked["wheels"]])
            take: dict[str, Any] = {"wanted": wanted, "wheels": named(*wheels, *pip)}
            take |= {"pip": pip[0].named if pip else [], "no_index": no_index}
            try:
                made = channel.ask("make", INSTALL_S, **take, **key)
            except Refused as error:
                raise Refused(f"{error}: {REMEDY}") from error
            say(f"{channel.host}: {made['python']} after {time.monotonic() - begin:.0f} s")
            return made

        made, wrong = at_once(channels, one)
    wrong = [f"--deploy: {each}" for each in wrong] or unlike(channels, made)
    return "" if wrong else str(made[0]["python"]), wrong


def named(*wheels: Wheel) -> list[list[str]]:
    """Return the hash and file name of each."""
    return [each.named for each in wheels]


def hashed(path: Path) -> Wheel:
    """Return a wheel with its hash."""
    return Wheel(sha256(path), path)


def send(channel: Channel, wheels: Sequence[Wheel]) -> None:
    """Send wheels to a host; raises as ``Channel.put`` does."""
    begin = time.monotonic()
    try:
        for each in wheels:
            target = f"~/.distbench/wheels/{each.sha}/{each.path.name}"
            channel.put(each.path, target, each.sha, STALL_S)
    except OSError as error:
        raise Refused(f"{channel.host}: {error}") from error
    sent = sum(each.path.stat().st_size for each in wheels)
    took = time.monotonic() - begin
    say(f"{channel.host}: {len(wheels)} wheels sent, {sent / 1e6:.0f} MB in {took:.0f} s")


def unlike(channels: Sequence[Channel], made: Sequence[dict[str, Any]]) -> list[str]:
    """Return in what the hosts' packages differ from the first host's: an index changes."""
    problems = []
    for channel, each in zip(channels[1:], made[1:], strict=True):
        differ = sorted(set(each["packages"]) ^ set(made[0]["packages"]))
        if differ:
            problems.append(
                f"--deploy: {channel.host} and {channels[0].host} have different packages "
                f"({', '.join(differ[:6])}): delete {each['deps']} there and "
                f"{made[0]['deps']} here, and deploy again, or give a --wheelhouse"
            )
    return problems
