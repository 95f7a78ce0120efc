"""The launcher's channel, through a stand-in for ssh that hands its last word to a real shell."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import agent
import pytest
from channel import Channel, Lost, Refused, remote_line, ssh_argv
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

pytestmark = pytest.mark.timeout(120)

# Whatever a process can be given: no NUL, and no half of a surrogate pair.
WORDS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
NASTY = [
    "$(touch hit)",
    "`touch hit`",
    "; touch hit",
    "a'b\"c",
    "two\nlines",
    "*",
    "~",
    "!!",
    "é ü",
]
TELL = "import json,os,sys;print(json.dumps([sys.argv[1:],os.environ.get('WORD')]))"


@pytest.fixture(scope="module")
def shell(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Put a stand-in for ssh first in PATH; every channel then ends in a shell on this machine."""
    folder = tmp_path_factory.mktemp("bin")
    ssh = folder / "ssh"
    ssh.write_text(
        "#!/bin/sh\nfor last; do :; done\n"
        'echo "welcome to $HOST"; SSH_CONNECTION="10.0.0.1 1 10.0.0.2 22"; export SSH_CONNECTION\n'
        f'cd "{folder}"; exec /bin/sh -c "$last"\n'
    )
    ssh.chmod(0o755)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
        yield folder


class Heard:
    """Keeps what the command wrote."""

    def __init__(self) -> None:
        self.out: dict[bytes, bytes] = {b"O": b"", b"E": b""}

    def __call__(self, kind: bytes, data: bytes) -> None:
        self.out[kind] += data


@contextmanager
def opened(python: str = sys.executable) -> Iterator[tuple[Channel, Heard]]:
    heard = Heard()
    made = Channel("jw2", python, heard)
    try:
        yield made, heard
    finally:
        made.close()


@pytest.fixture(scope="module")
def channel(shell: Path) -> Iterator[tuple[Channel, Heard]]:
    """One channel for many requests."""
    with opened() as made:
        yield made


@given(words=st.lists(WORDS | st.sampled_from(NASTY), max_size=4), value=WORDS)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_arguments_and_environment_arrive_unchanged(
    channel: tuple[Channel, Heard], shell: Path, words: list[str], value: str
) -> None:
    made, heard = channel
    heard.out[b"O"] = b""
    argv = [sys.executable, "-c", TELL, *words]
    assert made.ask("run", 20, argv=argv, env={"WORD": value})["exit"] == 0
    assert json.loads(heard.out[b"O"]) == [words, value]
    assert not (shell / "hit").exists()


@pytest.mark.parametrize("name", [*NASTY[:5], "a b", "-x", "é$HOME"])
def test_the_path_of_python_arrives_unchanged(shell: Path, tmp_path: Path, name: str) -> None:
    folder = tmp_path / name.replace("/", "")
    folder.mkdir()
    (folder / "python").symlink_to(Path(sys.executable).resolve())
    with opened(str(folder / "python")) as (made, _):
        assert made.ask("tree", 10, folder=str(folder)) == {"files": []}  # it is a link
        assert not (shell / "hit").exists()


def test_a_leading_tilde_is_the_hosts_home_and_nothing_else_is_expanded() -> None:
    assert remote_line("~/v/bin/python").startswith('exec "$HOME"/v/bin/python -c ')
    assert remote_line("~root/$x").startswith("exec '~root/$x' -c ")
    # What the shell sees beside it is fixed, and has neither quote nor line feed inside its quotes.
    assert remote_line("p").count("'") == 2 and "\n" not in remote_line("p")


@pytest.mark.parametrize("host", ["-oProxyCommand=x", "a b", "", "a;b", "$(x)", "a\n", "jw2/"])
def test_what_is_no_name_of_a_host_never_reaches_ssh(host: str) -> None:
    with pytest.raises(ValueError, match="is no name of a host"):
        ssh_argv(host, "python3")


def test_host_keys_are_strict_and_nobody_is_asked() -> None:
    argv = ssh_argv("bench@jw2", "python3")
    assert "-oStrictHostKeyChecking=yes" in argv and "-oBatchMode=yes" in argv
    assert argv[argv.index("--") + 1 :] == ["bench@jw2", remote_line("python3")]


def test_what_fails_on_the_host_is_told_with_its_name(channel: tuple[Channel, Heard]) -> None:
    made, _ = channel
    with pytest.raises(Refused, match=r"^jw2: FileNotFoundError: .*/nowhere"):
        made.ask("read", 10, path="/nowhere")
    with pytest.raises(Refused, match=r"^jw2: KeyError: 'conquer'"):
        made.ask("conquer", 10)


def test_a_python_that_is_not_there_loses_the_channel_with_the_shells_words(shell: Path) -> None:
    with opened("/no/such/python") as (made, _), pytest.raises(Lost, match=r"jw2: .*not found"):
        made.ask("facts", 10, folder="~", output="results")


@pytest.mark.parametrize("name", ["plain", "two words", "é\n'", "$(touch hit)"])
def test_files_are_copied_whole(channel: tuple[Channel, Heard], tmp_path: Path, name: str) -> None:
    data = os.urandom(3 * agent.PIECE + 17)
    (tmp_path / name).write_bytes(data)
    made, _ = channel
    assert made.ask("tree", 10, folder=str(tmp_path))["files"] == [[name, len(data)]]
    digest = made.fetch(str(tmp_path / name), tmp_path.with_suffix(".copy"), 20)
    assert tmp_path.with_suffix(".copy").read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


STUBBORN = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
child = subprocess.Popen([sys.executable, "-c", "import signal,time;"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN);time.sleep(100)"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(100)
"""


def test_the_channels_end_ends_processes_that_ignore_sigterm(
    shell: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """One in a session of its own, too, whose parent has gone by then."""
    quick = tmp_path / "agent.py"
    text = Path(agent.__file__).read_text(encoding="utf-8")
    quick.write_text(text.replace("GRACE_S = 15.0, 12.0", "GRACE_S = 15.0, 0.5"))
    assert quick.read_text() != text
    monkeypatch.setattr(agent, "__file__", str(quick))
    with opened() as (made, heard):
        made.start("run", argv=[sys.executable, "-c", STUBBORN], env={})
        end = time.monotonic() + 20
        while b"\n" not in heard.out[b"O"]:
            assert time.monotonic() < end
            time.sleep(0.02)
        pids = [int(word) for word in heard.out[b"O"].split()]
        assert all(alive(pid) for pid in pids)
    end = time.monotonic() + 20
    while any(alive(pid) for pid in pids):
        assert time.monotonic() < end, pids
        time.sleep(0.02)
