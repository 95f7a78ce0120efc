"""After a run: bring each host's part of the result here, check it, and say what it was.

Files are copied into a folder beside their place and renamed when every hash agrees, so a result
that is here is whole. The judgement is that of ``result.json``; nothing is judged here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from channel import Channel, Lost, Refused
from checks import ASK_S, Host

REPOSITORY = Path(__file__).resolve().parent.parent
FETCH_S = 600.0
RUN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
"""What a run's directory may be called here, whatever a host says it is called there."""
BAD, MOST_TOLD = ("incomplete", "invalid"), 6
EXIT_OK, EXIT_CRASH, EXIT_STRICT, EXIT_INCOMPLETE = 0, 1, 3, 6


def names(channel: Channel, output: str) -> set[str]:
    """Return the runs in a host's output directory."""
    found = channel.ask("entries", ASK_S, output=output)["names"]
    return {name for name in found if RUN.fullmatch(name)}


def copy(channel: Channel, source: str, target: Path) -> None:
    """Copy a folder from a host, whole or not at all.

    Raises:
        Lost: the channel ended.
        Refused: the host cannot read it, or a file changed on its way.
        FileExistsError: the target is there; results are never overwritten.
    """
    if target.exists():
        raise FileExistsError(f"{target} is there already: move it away, or give another --to")
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        for name, size in channel.ask("tree", FETCH_S, folder=source)["files"]:
            path = part / name
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise Refused(f"{channel.host}: {name!r} lies outside {source}")
            path.parent.mkdir(parents=True, exist_ok=True)
            told = channel.fetch(f"{source}/{name}", path, size, FETCH_S)
            if told != sha256(path) or path.stat().st_size != size:
                raise Refused(f"{channel.host}: {source}/{name} changed while it was copied")
        part.chmod(0o755)
        part.rename(target)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def sha256(path: Path) -> str:
    """Return a file's SHA-256, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def collect(
    channels: Sequence[Channel],
    hosts: Sequence[Host],
    before: Sequence[set[str]],
    to: Path,
) -> tuple[list[Path], list[str]]:
    """Copy the runs that appeared on the hosts.

    The first host has all ranks' folders where the run ended well. Where it has not, or is gone,
    the others' folders are merged into its copy, or make up a result without it.

    Args:
        channels: to the hosts; of some of them lost, perhaps.
        hosts: likewise.
        before: names in each output directory before the run.
        to: local folder; it is there.

    Returns:
        The local result directories, and what could not be brought here.
    """
    copies: dict[str, list[Path]] = {}
    wrong = []
    spare = Path(tempfile.mkdtemp(prefix=".launch-", dir=to))
    try:
        for place, (channel, host, known) in enumerate(zip(channels, hosts, before, strict=True)):
            if channel.lost:
                wrong.append(f"{channel.lost}: its part stays there")
                continue
            if host.shares and any(_whole(to / name) for name in copies):
                continue
            try:
                for name in sorted(names(channel, host.facts["output"]) - known):
                    whole = place and _whole(to / name)
                    if not whole:
                        target = to / name if name not in copies else spare / str(place) / name
                        copy(channel, f"{host.facts['output']}/{name}", target)
                        copies.setdefault(name, []).append(target)
            except (Lost, Refused, OSError) as error:
                wrong.append(str(error))
        for name, found in copies.items():
            if not _whole(to / name):
                wrong += salvage(found)
    finally:
        shutil.rmtree(spare, ignore_errors=True)
    return [to / name for name in copies], wrong


def _whole(folder: Path) -> bool:
    """Whether a copy has a result that no rank is missing from."""
    told = result_of(folder)
    codes = {found["code"] for found in told.get("verdict", {}).get("findings", [])}
    return bool(told) and not codes & {"rank-missing", "rank-incomplete"}


def salvage(copies: Sequence[Path]) -> list[str]:
    """Merge the copies of a result into the first one; returns what went wrong."""
    if importlib.util.find_spec("numpy") is None:
        return [f"{copies[0]}: to merge it, `python -m distbench.salvage` needs numpy here"]
    argv = [sys.executable, "-m", "distbench.salvage", *(str(each.absolute()) for each in copies)]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    good = done.returncode in (EXIT_OK, EXIT_INCOMPLETE)
    return [] if good else [done.stderr.strip() or f"salvage ended with {done.returncode}"]


def result_of(folder: Path) -> dict[str, dict[str, list[dict[str, str]]]]:
    """Return a run's result.json; empty where there is none."""
    try:
        found = json.loads((folder / "result.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def account(folder: Path) -> list[str]:
    """Return why a run is not whole or not valid, worst first, in the words of its findings."""
    verdict = result_of(folder).get("verdict", {})
    told = [each for each in verdict.get("findings", []) if each["level"] in BAD]
    told.sort(key=lambda each: (BAD.index(each["level"]), each["code"] != "rank-lost"))
    return [f"{each['level']}: {each['message']}: {each['remedy']}" for each in told[:MOST_TOLD]]


def verified(folder: Path) -> str:
    """Verify a result with this clone; returns what was found, in words."""
    if importlib.util.find_spec("numpy") is None:
        return "every file has the hash that its host read; `verify` needs numpy here"
    argv = [sys.executable, "-m", "distbench.verify", str(folder.absolute())]
    done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    return said[-1].strip() if said else f"verify ended with {done.returncode}"


def exit_status(folders: Sequence[Path], codes: Mapping[str, int], usage: int) -> int:
    """Return a launch's exit status: the run's, from result.json, since torchrun only says 1.

    Args:
        folders: the results.
        codes: torchrun's exit status by host.
        usage: a rank's own exit status, as torchrun told it; 0 where it told none.
    """
    states = [str(result_of(folder).get("verdict", {}).get("status", "")) for folder in folders]
    if "INCOMPLETE" in states:
        return EXIT_INCOMPLETE
    return (usage or EXIT_CRASH) if any(codes.values()) else EXIT_OK
