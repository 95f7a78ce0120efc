"""``--deploy``: the wheel against setuptools' own, and environments out of small wheels."""

from __future__ import annotations

import base64
import fcntl
import hashlib
import inspect
import os
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path
from typing import Any

import deploy
import install
import pytest
from channel import Channel, Refused
from options import parse

from tests.support import REPO

pytestmark = pytest.mark.timeout(120)


def small_wheel(folder: Path, name: str, version: str, body: str, needs: str = "") -> Path:
    """Write a wheel of one module."""
    info = f"{name}-{version}.dist-info"
    told = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
    told += f"Requires-Dist: {needs}\n" if needs else ""
    kind = "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    files = {f"{name}.py": body, f"{info}/METADATA": told, f"{info}/WHEEL": kind}
    record = "".join(f"{each},,\n" for each in (*files, f"{info}/RECORD"))
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for each, text in {**files, f"{info}/RECORD": record}.items():
            archive.writestr(each, text)
    return path


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        assert archive.testzip() is None
        return {name: archive.read(name) for name in archive.namelist()}


def test_the_wheel_is_what_setuptools_makes_of_this_clone(tmp_path: Path) -> None:
    """The same files of the package, byte for byte, and the same requirements; extras left out."""
    tree = tmp_path / "tree"
    skip = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(REPO / "distbench", tree / "distbench", ignore=skip)
    for name in ("setup.py", "setup.cfg", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(REPO / name, tree)
    argv = [sys.executable, "-W", "ignore", "-m", "pip", "wheel", "--quiet", "--no-deps"]
    argv += ["--no-build-isolation", "--wheel-dir", str(tmp_path / "theirs"), str(tree)]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=100)
    assert done.returncode == 0, done.stderr
    (theirs,) = (tmp_path / "theirs").glob("*.whl")
    own = deploy.write_wheel(tmp_path)
    assert own.name == theirs.name
    made, oracle = contents(own), contents(theirs)
    package = {name: data for name, data in oracle.items() if name.startswith("distbench/")}
    assert {name: data for name, data in made.items() if name.startswith("distbench/")} == package
    (info,) = {name.partition("/")[0] for name in made if ".dist-info/" in name}
    told, wanted = (message_from_bytes(each[f"{info}/METADATA"]) for each in (made, oracle))
    for key in ("Name", "Version", "Summary", "Requires-Python"):
        assert told[key] == wanted[key], key
    core = [each for each in wanted.get_all("Requires-Dist", []) if "extra ==" not in each]
    assert sorted(told.get_all("Requires-Dist", [])) == sorted(core)
    assert made[f"{info}/licenses/NOTICE"] == oracle[f"{info}/licenses/NOTICE"]
    rows = [line.rsplit(",", 2) for line in made[f"{info}/RECORD"].decode().splitlines()]
    assert [row[0] for row in rows] == list(made)
    for name, digest, size in rows[:-1]:
        raw = hashlib.sha256(made[name]).digest()
        assert digest == "sha256=" + base64.urlsafe_b64encode(raw).decode().rstrip("=")
        assert int(size) == len(made[name])


def test_the_wheels_bytes_depend_on_sources_and_commit_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither on when and how the files came here nor on what was compiled beside them."""
    monkeypatch.setattr(deploy, "built", lambda: {"git_commit": "c", "git_dirty": False})
    one = deploy.write_wheel(tmp_path).read_bytes()
    tree = tmp_path / "tree"
    shutil.copytree(REPO / "distbench", tree / "distbench")
    for name in ("setup.cfg", "LICENSE", "NOTICE"):
        shutil.copy(REPO / name, tree)
    for number, path in enumerate(sorted((tree / "distbench").rglob("*.py"))):
        os.utime(path, (number * 1e6, number * 1e6))
        path.chmod(0o600 if number % 2 else 0o755)
    monkeypatch.setattr(deploy, "REPOSITORY", tree)
    assert deploy.write_wheel(tmp_path / "tree").read_bytes() == one
    monkeypatch.setattr(deploy, "built", lambda: {"git_commit": "d", "git_dirty": False})
    assert deploy.write_wheel(tmp_path).read_bytes() != one


def test_the_wheel_tells_the_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clone's, and none where there is no git; the record reads it out of the environment."""
    commit = "1" * 40
    monkeypatch.setattr(deploy, "built", lambda: {"git_commit": commit, "git_dirty": True})
    with zipfile.ZipFile(deploy.write_wheel(tmp_path)) as archive:
        archive.extractall(tmp_path / "site")
    program = "import json; from distbench import environment as e;"
    program += "print(json.dumps([e._FIELDS['git_commit'](), e._FIELDS['git_dirty']()]))"
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site")}
    argv = [sys.executable, "-c", program]
    done = subprocess.run(
        argv, cwd=tmp_path, env=env, capture_output=True, text=True, check=False, timeout=60
    )
    assert done.stdout == f'["{commit}", true]\n', done.stderr
    monkeypatch.undo()
    monkeypatch.setattr(deploy, "REPOSITORY", tmp_path)
    assert deploy.built() == {"git_commit": None, "git_dirty": None}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home for what is installed, where wheels are stored as a host stores them."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "0")
    return tmp_path / "home" / ".distbench"


def stored(home: Path, *wheels: Path) -> list[list[str]]:
    """Put wheels where ``Channel.put`` puts them."""
    rows = [deploy.hashed(each).named for each in wheels]
    for (sha, name), path in zip(rows, wheels, strict=True):
        (home / "wheels" / sha).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, home / "wheels" / sha / name)
    return rows


def packages(told: dict[str, Any]) -> list[str]:
    return [each for each in told["packages"] if not each.startswith("Python ")]


def test_an_environment_is_made_once_of_the_wheels_that_were_sent(
    home: Path, tmp_path: Path
) -> None:
    house = tmp_path / "house"
    needed = small_wheel(house, "needed", "1.5", "value = 5\n")
    below = small_wheel(house, "Lower_one", "2.0", "import needed\n", "needed>=1.0")
    own = stored(home, small_wheel(house, "distbench", "0.1", "import Lower_one as l\n", "x>=9"))[0]
    deps = stored(home, needed, below)
    made = ("k", own, ["lower-one>=1"], deps, [], True)
    told = install.make(*made)
    assert packages(told) == ["distbench==0.1", "lower_one==2.0", "needed==1.5"]
    assert told["packages"][0] == f"Python {sys.version_info[0]}.{sys.version_info[1]}"
    python = Path(told["python"]).expanduser()
    argv = [python, "-I", "-c", "import distbench; print(distbench.l.needed.value)"]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "5\n"
    assert install.lacking("k", own, deps) == {"made": True, "wheels": []}
    whole = [Path(told[each]).expanduser() for each in ("python", "deps")]
    whole = [whole[0].parent.parent / "complete", whole[1] / "complete"]
    before = [each.stat().st_mtime_ns for each in whole]
    assert install.make(*made) == told
    assert [each.stat().st_mtime_ns for each in whole] == before
    # One that was left half made is made anew, and one whose lower half was deleted.
    whole[0].unlink()
    next(whole[0].parent.glob("lib/python3*/site-packages/distbench.py")).write_text("broken")
    assert not install.lacking("k", own, deps)["made"]
    install.make(*made)
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "5\n"
    shutil.rmtree(whole[1].parent)
    assert not install.lacking("k", own, deps)["made"]
    install.make(*made)
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "5\n"


@pytest.mark.slow
def test_nothing_but_the_wheels_is_taken_whatever_the_host_is_set_to(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent, other = tmp_path / "sent", tmp_path / "other"
    small_wheel(other, "lower", "3.0", "")
    own, deps = stored(
        home, small_wheel(sent, "distbench", "0.1", ""), small_wheel(sent, "lower", "2.0", "")
    )
    monkeypatch.setenv("PIP_FIND_LINKS", str(other))
    monkeypatch.setenv("PIP_TARGET", str(tmp_path / "elsewhere"))
    told = install.make("k", own, ["lower"], [deps], [], True)
    assert packages(told) == ["distbench==0.1", "lower==2.0"]


def test_what_pip_says_is_told_and_nothing_is_left(home: Path, tmp_path: Path) -> None:
    wheels = stored(home, small_wheel(tmp_path / "house", "lower", "2.0", "", "needed>=1.0"))
    with pytest.raises(OSError, match="No matching distribution found for needed"):
        install.make("k", wheels[0], ["lower"], wheels, [], True)
    assert not install.lacking("k", wheels[0], wheels)["made"]
    missing = [["0" * 64, "other-1.0-py3-none-any.whl"]]
    assert install.lacking("k", wheels[0], [*wheels, *missing])["wheels"] == ["0" * 64]
    assert sorted(path.name for path in home.iterdir()) == ["lock", "wheels"]


@pytest.mark.slow
def test_an_environment_that_lacks_what_pip_was_asked_for_is_no_environment(
    home: Path, tmp_path: Path
) -> None:
    """Such as one that another tool has changed."""
    house = tmp_path / "house"
    own, deps = stored(
        home, small_wheel(house, "distbench", "0.1", ""), small_wheel(house, "lower", "2.0", "")
    )
    told = install.make("k", own, ["lower"], [deps], [], True)
    (site,) = Path(told["deps"]).expanduser().glob("lib/python3*/site-packages")
    shutil.rmtree(site / "lower-2.0.dist-info")
    with pytest.raises(OSError, match="has no lower, though pip said so: delete "):
        install.make("k", own, ["lower"], [deps], [], True)


def test_pip_comes_from_the_hosts_python_or_else_from_the_wheels(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = install._pip(home, ["0" * 64, "pip-1-py3-none-any.whl"])
    assert "ensurepip" in own[0] or "python-wheels" in own[0]
    monkeypatch.setattr(install.importlib.util, "find_spec", lambda _name: None)
    monkeypatch.setattr(install.sysconfig, "get_config_var", lambda _name: None)
    sent = install._pip(home, ["0" * 64, "pip-1-py3-none-any.whl"])
    assert sent == [str(home / "wheels" / ("0" * 64) / "pip-1-py3-none-any.whl" / "pip")]
    with pytest.raises(OSError, match="has no pip: install Debian's python3-venv there, or put"):
        install._pip(home, [])


def test_the_folders_tell_the_hosts_python(monkeypatch: pytest.MonkeyPatch) -> None:
    before = install.names("k", ["f" * 64, "x"])
    monkeypatch.setattr(install.sys, "version_info", (3, 99, 0))
    assert set(install.names("k", ["f" * 64, "x"])).isdisjoint(before)


def test_the_lock_outlives_an_agent_that_is_killed(home: Path) -> None:
    """What a step still writes must not meet the next launch."""
    home.mkdir(parents=True)
    holder = (home / "lock").open("a")
    fcntl.flock(holder, fcntl.LOCK_EX)
    argv = [
        sys.executable,
        "-I",
        "-S",
        "-c",
        "import sys; print('up', flush=True); sys.stdin.read()",
    ]
    # As ``_step`` starts it, but with a stdin to end it by.
    child = subprocess.Popen(argv, stdin=-1, stdout=-1, text=True, pass_fds=[holder.fileno()])
    assert child.stdout is not None and child.stdout.readline() == "up\n"
    holder.close()
    with (home / "lock").open("a") as other:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        child.communicate("", timeout=20)
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    assert "pass_fds=[lock]" in inspect.getsource(install._step)


class FakeChannel(Channel):
    """Answers like a host, without one."""

    def __init__(self, host: str, packages: list[str], error: str = "") -> None:
        self.host, self.packages, self.error = host, packages, error
        self.asked: list[tuple[str, dict[str, object]]] = []

    def ask(self, do: str, timeout_s: float, **what: object) -> dict[str, object]:
        self.asked.append((do, what))
        if do == "lacking":
            return {"made": False, "wheels": []}
        if self.error:
            raise Refused(f"{self.host}: {self.error}")
        return {"python": "~/x/bin/python", "deps": "~/deps", "packages": self.packages}


def test_hosts_that_got_different_packages_are_refused() -> None:
    channels = [FakeChannel("jw2", ["a==1", "b==2"]), FakeChannel("jw3", ["a==1", "b==3"])]
    _, wrong = deploy.deploy(channels, "python3", None, False)
    assert len(wrong) == 1 and "jw3 and jw2 have different packages (b==2, b==3)" in wrong[0]
    assert "delete ~/deps there and ~/deps here" in wrong[0]


def test_a_host_on_which_pip_fails_is_named() -> None:
    channels = [FakeChannel("jw2", ["a==1"]), FakeChannel("jw3", [], "no torch")]
    _, wrong = deploy.deploy(channels, "python3", None, False)
    assert len(wrong) == 1 and "--deploy: jw3: no torch: wheels must fit" in wrong[0]


def test_the_environment_is_named_by_what_is_in_it(tmp_path: Path) -> None:
    house = tmp_path / "house"
    small_wheel(house, "lower", "2.0", "")

    def key(python: str, wheelhouse: Path | None) -> object:
        channel = FakeChannel("jw2", ["a==1"])
        path, wrong = deploy.deploy([channel], python, wheelhouse, wheelhouse is not None)
        assert (path, wrong) == ("~/x/bin/python", [])
        return channel.asked[1][1]["key"]

    first = key("python3", house)
    assert key("python3", house) == first
    others = [key("python3.12", house), key("python3", None)]
    small_wheel(house, "lower", "2.0", "changed = 1\n")
    others.append(key("python3", house))
    assert len({first, *others}) == 4


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--wheelhouse", "."], "are for --deploy"),
        (["--deploy", "--no-index"], "give --wheelhouse DIR"),
        (["--deploy", "--wheelhouse", "/nowhere"], "no such folder"),
        (["--deploy", "--dry-run"], "without --dry-run"),
        (["--deploy", "--python", "~/.distbench/venv-x/bin/python"], "name the one to make it"),
    ],
)
def test_options_that_do_not_go_together_are_refused(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        parse(["--hosts", "jw2", *words, "--", "-m", "distbench.offline"], "")
    assert why in capsys.readouterr().err


def test_an_empty_wheelhouse_is_refused(tmp_path: Path) -> None:
    _, wrong = deploy.deploy([FakeChannel("jw2", [])], "python3", tmp_path, True)
    assert wrong == [f"--wheelhouse {tmp_path}: there is no wheel in it"]
