"""The launcher's channel, through a stand-in for ssh that hands its last word to a real shell."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import agent
import channel as channel_module
import pytest
from channel import PIECE, Channel, Lost, Refused, remote_line, ssh_argv
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
        made.ask("facts", 10, folder="~", output="results", make=True)


@pytest.mark.parametrize("name", ["plain", "two words", "é\n'", "$(touch hit)"])
def test_files_are_copied_whole(channel: tuple[Channel, Heard], tmp_path: Path, name: str) -> None:
    data = os.urandom(3 * PIECE + 17)
    (tmp_path / name).write_bytes(data)
    made, _ = channel
    assert made.ask("tree", 10, folder=str(tmp_path))["files"] == [[name, len(data)]]
    digest = made.fetch(str(tmp_path / name), tmp_path.with_suffix(".copy"), len(data), 20)
    assert tmp_path.with_suffix(".copy").read_bytes() == data
    assert digest == hashlib.sha256(data).hexdigest()


def test_more_than_the_host_told_of_is_not_taken(
    channel: tuple[Channel, Heard], tmp_path: Path
) -> None:
    (tmp_path / "long").write_bytes(b"x" * (3 * PIECE))
    made, _ = channel
    with pytest.raises(Refused, match="more came than the host told of"):
        made.fetch(str(tmp_path / "long"), tmp_path / "copy", PIECE, 20)
    assert (tmp_path / "copy").stat().st_size == PIECE
    assert made.ask("tree", 10, folder=str(tmp_path))["files"], "the channel goes on"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_a_disk_that_is_full_here_ends_the_copy_at_once(
    channel: tuple[Channel, Heard], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x" * (3 * PIECE))
    made, _ = channel
    with pytest.raises(Refused, match="cannot be written here: No space left"):
        made.fetch(str(tmp_path / "file"), Path("/dev/full"), 3 * PIECE, 20)
    assert made.ask("tree", 10, folder=str(tmp_path))["files"]


@pytest.mark.parametrize("size", [0, 1, PIECE, 40 * PIECE + 17])
def test_files_are_sent_whole(channel: tuple[Channel, Heard], tmp_path: Path, size: int) -> None:
    """The last of these needs more pieces than may be on their way at once."""
    data = os.urandom(size)
    (tmp_path / "file").write_bytes(data)
    target = tmp_path / "é '$(touch hit)" / "copy"
    made, _ = channel
    made.put(tmp_path / "file", str(target), hashlib.sha256(data).hexdigest(), 20)
    assert target.read_bytes() == data
    assert [*target.parent.iterdir()] == [target]


def test_a_file_that_changed_on_its_way_does_not_appear(
    channel: tuple[Channel, Heard], tmp_path: Path
) -> None:
    (tmp_path / "file").write_bytes(b"x" * 40 * PIECE)
    made, _ = channel
    with pytest.raises(Refused, match="changed on its way"):
        made.put(tmp_path / "file", str(tmp_path / "to" / "copy"), "0" * 64, 20)
    assert [*(tmp_path / "to").iterdir()] == []
    with pytest.raises(Refused, match="FileExistsError"):
        made.put(tmp_path / "file", str(tmp_path / "file" / "copy"), "0" * 64, 20)
    assert made.ask("tree", 10, folder=str(tmp_path))["files"], "the channel goes on"


def test_a_channel_that_ends_amid_a_file_leaves_no_part_of_it(shell: Path, tmp_path: Path) -> None:
    to = tmp_path / "to"
    with opened() as (made, _):
        made.start("put", path=str(to / "copy"), size=100, sha256="0" * 64)
        made.ask("tree", 10, folder=str(tmp_path))  # frames are read in order
        assert len([*to.iterdir()]) == 1
    end = time.monotonic() + 20
    while [*to.iterdir()]:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_host_that_stops_amid_a_file_is_given_up(
    shell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By its silence, though more was sent than anything between takes in, or by Ctrl-C."""
    monkeypatch.setattr(agent, "SILENT_S", 2.0)
    monkeypatch.setattr(channel_module, "MOST_AHEAD", 1000)
    source = tmp_path / "file"
    source.write_bytes(bytes(64 << 20))
    for interrupt in (False, True):
        with opened() as (made, _):
            pid = made._ssh.pid  # the stand-in for ssh has become the agent
            made.ask("tree", 10, folder=str(tmp_path))
            os.kill(pid, signal.SIGSTOP)
            begin = time.monotonic()
            if interrupt:
                threading.Timer(0.5, made.give_up, ["interrupted"]).start()
            with pytest.raises(Lost, match="interrupted" if interrupt else "nothing came from it"):
                made.put(source, str(tmp_path / "to"), "0" * 64, 60)
            assert time.monotonic() - begin < 10
        assert not (tmp_path / "to").exists()


def fake_python(folder: Path, says: str) -> str:
    """Make what passes for Python on a host and says something else than the agent would."""
    path = folder / "python"
    path.write_text(f"#!/bin/sh\nprintf '\\n\\001distbench agent 1\\001\\n{says}'\nexec sleep 60\n")
    path.chmod(0o755)
    return str(path)


@pytest.mark.parametrize("sent", [r"J\377\377\377\377", r"J\0\0\0\003abc", r"J\0\0\0\002{}"])
def test_what_no_agent_sends_ends_the_channel(shell: Path, tmp_path: Path, sent: str) -> None:
    begin = time.monotonic()
    sends = pytest.raises(Lost, match="it sent what no agent sends")
    with opened(fake_python(tmp_path, sent)) as (made, _), sends:
        made.ask("facts", 20, folder="~", output="results", make=True)
    assert time.monotonic() - begin < 10


def test_an_agent_that_falls_silent_is_lost(
    shell: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(agent, "SILENT_S", 1.0)
    silent = pytest.raises(Lost, match="nothing came from it for 1 s")
    with opened(fake_python(tmp_path, "")) as (made, _), silent:
        made.ask("facts", 20, folder="~", output="results", make=True)


ASKED = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("asked", flush=True), sys.exit(3)))
print("up", flush=True)
time.sleep(60)
"""


def test_every_command_of_a_channel_is_asked_to_end_before_it_is_killed(shell: Path) -> None:
    """On a channel of its own: the test above may have lost the one for many requests."""
    with opened() as (made, heard):
        for _ in range(2):
            heard.out[b"O"] = b""
            number = made.start("run", argv=[sys.executable, "-c", ASKED], env={})
            end = time.monotonic() + 20
            while b"up" not in heard.out[b"O"]:
                assert time.monotonic() < end, made.lost
                time.sleep(0.02)
            made.ask("stop", 20, grace_s=10)
            assert made.result(number, 20)["exit"] == 3
            assert heard.out[b"O"].split() == [b"up", b"asked"]


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
