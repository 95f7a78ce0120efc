"""The driver on a host of its own, through a stand-in for ssh: looked at, started, ended, gone."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from channel import Channel, Refused
from checks import ASK_S, Host
from driving import Away, driving, unfit
from options import parse

from tests.launch.test_channel import opened, shell
from tests.support import REPO

__all__ = ["shell"]

pytestmark = pytest.mark.timeout(60)

MLPERF = ("-m", "distbench.mlperf", "--payload", "data", "--rules", "mlperf-v5.0,shortened=2s")
VERSIONS = {"numpy": "2", "distbench": "0.1.0"}


def facts(host: str = "jw1", **versions: str) -> dict[str, Any]:
    """Return what an agent says, as far as it is looked at here."""
    return {"host": host, "python": "py", "folder": "/d", "versions": versions}


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (facts(**VERSIONS), []),
        (facts(distbench="0.1.0"), ["jw1: py has no numpy", "`py -m pip install numpy`"]),
        (facts(numpy="2"), ["finds no distbench in /d: give --loadgen-dir"]),
        (facts(numpy="2", distbench="0.2.0"), ["differs: 0.1.0 on jw2, 0.2.0 on jw1: install"]),
        (facts("b", **VERSIONS), ["jw1 calls itself 'b', as jw3 does", "leave --loadgen-host out"]),
    ],
)
def test_what_a_host_lacks_is_told_with_the_remedy(
    found: Mapping[str, Any], words: Sequence[str]
) -> None:
    """Of torch nothing is asked."""
    ranks = [Host("jw2", 1, facts("a", **VERSIONS)), Host("jw3", 1, facts("b", **VERSIONS))]
    said = unfit("jw1", found, ranks)
    assert len(said) == bool(words)
    assert all(word in said[0] for word in words)


@contextmanager
def away_at(folder: Path, python: str = sys.executable) -> Iterator[tuple[Away, list[bytes]]]:
    """Have a host that drives, with its facts; and what it shows."""
    heard: list[bytes] = []
    options = parse(
        [
            *("--hosts", "jw2", "--loadgen-host", "jw1", "--loadgen-dir", str(folder)),
            *("--loadgen-python", python, "--env", f"PYTHONPATH={REPO}", "--", *MLPERF),
        ],
        "",
    )
    made = Away(options, lambda _, data: heard.append(data))
    try:
        yield made, heard
    finally:
        made.channel.close()


def looked_at(away: Away, folder: Path) -> list[str]:
    """Look at the host; this one is that of the ranks too, at 127.0.0.1."""
    told = away.channel.ask("facts", 20, folder=str(folder), output="results", make=False)
    told |= {"host": "jw1", "python": sys.executable}
    ranks = [Host("jw2", 1, {**told, "host": "jw2", "address": ["127.0.0.1"]})]
    return away.look(told, ranks)


def files(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_driver_is_started_for_a_run_and_nothing_stays(shell: Path, tmp_path: Path) -> None:
    ranks = tmp_path / "ranks"
    ranks.mkdir()
    there = tmp_path / "there"
    there.mkdir()
    with away_at(there) as (away, heard), opened() as (first, _):
        assert looked_at(away, there) == []
        assert away.host.address == "127.0.0.1"
        zero = Host("jw2", 1, {"output": str(ranks)})
        with driving(away, first, zero, "20261126-a", dry_run=False) as more:
            driver, address, option, path = more
            assert (driver, option) == ("--driver", "--driver-token")
            assert f"driver listens on {address}\n".encode() in b"".join(heard)
            token = Path(path).read_text()
            assert len(token) == 32
            private = there / "results" / ".driver-20261126-a"
            assert (private / "token").read_text() == token
            for each in (Path(path), private / "token"):
                assert each.stat().st_mode & 0o777 == 0o600
                assert each.parent.stat().st_mode & 0o777 == 0o700
            assert token not in " ".join(away.argv("20261126-a"))
            away.end()  # nobody called it
            assert away.bring([]) == []
        assert b"SIGTERM" not in b"".join(heard), "it was ended on purpose"
        assert files(tmp_path) == ["ranks", "there"]
        with driving(away, first, zero, "20261126-b", dry_run=True) as more:
            assert more[:3] == ["--driver", "127.0.0.1:PORT", "--driver-token"]
        assert files(tmp_path) == ["ranks", "there"]


def test_without_such_a_host_the_command_is_told_nothing() -> None:
    channel: Any = None
    with driving(None, channel, Host("jw2", 1), "a", dry_run=False) as more:
        assert more == []


def test_a_driver_that_does_not_start_is_told_and_leaves_nothing(
    shell: Path, tmp_path: Path
) -> None:
    """Its address is not of this machine: TEST-NET-1, RFC 5737."""
    with away_at(tmp_path) as (away, heard), opened() as (first, _):
        assert looked_at(away, tmp_path) == []
        away.host = Host("jw1", 0, {**away.host.facts, "address": ["192.0.2.1"]})
        zero = Host("jw2", 1, {"output": str(tmp_path / "ranks")})
        with (
            pytest.raises(Refused, match=r"jw1: the driver ended with status 2 before it listened"),
            driving(away, first, zero, "a", dry_run=False),
        ):
            pass
        assert b"192.0.2.1" in b"".join(heard)
    assert files(tmp_path) == []


def test_a_round_whose_loadgen_is_not_there_is_refused(shell: Path, tmp_path: Path) -> None:
    with away_at(tmp_path) as (away, _):
        object.__setattr__(away.options, "command", (*MLPERF[:-1], "mlperf-v5.1"))
        (said,) = looked_at(away, tmp_path)
    assert said.startswith("jw1: mlcommons-loadgen 5.0.13 is installed here, and the round has 5.1")


def test_tokens_go_with_the_agent_and_what_a_driver_wrote_stays(
    shell: Path, tmp_path: Path
) -> None:
    """As where the launcher is killed."""
    with opened() as (channel, _):
        for name in ("a", "b"):
            channel.ask("hide", ASK_S, folder=str(tmp_path / "results" / name), text="x" * 32)
        (tmp_path / "results" / "b" / "samples.npy").touch()
        with pytest.raises(Refused, match="FileExistsError"):
            channel.ask("hide", ASK_S, folder=str(tmp_path / "results" / "a"), text="y" * 32)
    assert files(tmp_path) == ["results", "results/b", "results/b/samples.npy"]


def test_a_folder_is_dropped_with_what_is_in_it_when_asked(shell: Path, tmp_path: Path) -> None:
    with opened() as (channel, _):
        for name in ("a", "b"):
            channel.ask("hide", ASK_S, folder=str(tmp_path / name), text="x" * 32)
            (tmp_path / name / "samples.npy").touch()
        channel.ask("forget", ASK_S, drop=[str(tmp_path / "a"), str(tmp_path)])
        assert files(tmp_path) == ["b", "b/samples.npy"], "tmp_path itself was never hidden"


def test_a_short_command_is_tried_to_its_end(shell: Path) -> None:
    def tried(channel: Channel, text: str) -> dict[str, Any]:
        argv = [sys.executable, "-c", text]
        return channel.ask("tried", 20, argv=argv, env={"WORD": "w"}, within_s=5)

    with opened() as (channel, _):
        assert tried(channel, "pass") == {"exit": 0, "said": ""}
        text = "import os, sys; print('first', file=sys.stderr); sys.exit(os.environ['WORD'])"
        assert tried(channel, text) == {"exit": 1, "said": "w"}
        assert channel.ask("towards", 5, address="127.0.0.1") == {"address": "127.0.0.1"}
