"""``--deploy``: the wheel against setuptools' own, and environments out of small wheels."""

from __future__ import annotations

import base64
import hashlib
import shutil
import subprocess
import sys
import zipfile
from email import message_from_bytes
from pathlib import Path

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


def test_the_wheels_bytes_depend_on_the_sources_alone(tmp_path: Path) -> None:
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    one, other = (deploy.write_wheel(folder).read_bytes() for folder in folders)
    assert one == other


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


@pytest.mark.parametrize(
    "own_pip",
    [
        pytest.param(True, id="pip sent"),
        pytest.param(False, id="ensurepip", marks=pytest.mark.slow),
    ],
)
def test_an_environment_is_made_once_of_the_wheels_that_were_sent(
    home: Path, tmp_path: Path, own_pip: bool
) -> None:
    house = tmp_path / "house"
    needed = small_wheel(house, "needed", "1.5", "value = 5\n")
    below = small_wheel(house, "lower", "2.0", "import needed\n", "needed>=1.0")
    top = small_wheel(house, "upper", "0.1", "import lower\n", "absent>=9")
    pip = [deploy.pip_wheel([])] if own_pip else []
    assert all(each is not None for each in pip), "this Python has no ensurepip"
    tools = stored(home, *(each for each in pip if each))
    tool = tools[0] if tools else []
    deps = [*stored(home, needed, below), *tools]
    install.make("deps-1", ["lower"], deps, tool, True, "")
    told = install.make("venv-1", ["upper"], [*stored(home, top), *tools], tool, True, "deps-1")
    ours = [
        each for each in told["packages"] if each.partition("==")[0] not in ("pip", "setuptools")
    ]
    version = f"Python {sys.version_info.major}.{sys.version_info.minor}"
    assert ours == [version, "lower==2.0", "needed==1.5", "upper==0.1"]
    argv = [told["python"], "-c", "import upper; print(upper.lower.needed.value)"]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "5\n"
    assert install.lacking("venv-1", deps) == {"made": True, "wheels": []}
    before = (home / "venv-1" / "complete").stat().st_mtime_ns
    assert install.make("venv-1", ["upper"], [], tool, True, "deps-1") == told
    assert (home / "venv-1" / "complete").stat().st_mtime_ns == before
    # One that was left half made is made anew.
    (home / "venv-1" / "complete").unlink()
    next((home / "venv-1").glob("lib/python3*/site-packages/upper.py")).write_text("broken")
    install.make("venv-1", ["upper"], [*stored(home, top), *tools], tool, True, "deps-1")
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout == "5\n"


def test_what_pip_says_is_told_and_nothing_counts_as_made(home: Path, tmp_path: Path) -> None:
    wheels = stored(home, small_wheel(tmp_path / "house", "lower", "2.0", "", "needed>=1.0"))
    pip = deploy.pip_wheel([])
    assert pip is not None
    tool = stored(home, pip)[0]
    with pytest.raises(OSError, match="No matching distribution found for needed"):
        install.make("deps-1", ["lower"], [*wheels, tool], tool, True, "")
    assert not install.lacking("deps-1", wheels)["made"]
    missing = [["0" * 64, "other-1.0-py3-none-any.whl"]]
    assert install.lacking("deps-1", [*wheels, *missing])["wheels"] == ["0" * 64]


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
        return {"python": "/home/x/bin/python", "packages": self.packages}


def test_hosts_that_got_different_packages_are_refused() -> None:
    channels = [FakeChannel("jw2", ["a==1", "b==2"]), FakeChannel("jw3", ["a==1", "b==3"])]
    _, wrong = deploy.deploy(channels, "python3", None, False)
    assert len(wrong) == 1 and "jw3 and jw2 got different packages (b==2, b==3)" in wrong[0]


def test_a_host_on_which_pip_fails_is_named() -> None:
    channels = [FakeChannel("jw2", ["a==1"]), FakeChannel("jw3", [], "no torch")]
    _, wrong = deploy.deploy(channels, "python3", None, False)
    assert len(wrong) == 1 and "--deploy: jw3: no torch: wheels must fit" in wrong[0]


def test_the_environment_is_named_by_what_is_in_it(tmp_path: Path) -> None:
    house = tmp_path / "house"
    small_wheel(house, "lower", "2.0", "")

    def name(python: str, wheelhouse: Path | None) -> tuple[str, object]:
        channel = FakeChannel("jw2", ["a==1"])
        path, wrong = deploy.deploy([channel], python, wheelhouse, wheelhouse is not None)
        assert not wrong
        return path, channel.asked[1][1]["name"]

    first, deps = name("python3", house)
    assert name("python3", house) == (first, deps)
    assert first.startswith("~/.distbench/venv-") and first.endswith("/bin/python")
    others = [name("python3.12", house), name("python3", None)]
    small_wheel(house, "lower", "2.0", "changed = 1\n")
    others.append(name("python3", house))
    assert len({first, *(path for path, _ in others)}) == 4
    assert len({deps, *(each for _, each in others)}) == 4


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["--wheelhouse", "."], "are for --deploy"),
        (["--deploy", "--no-index"], "give --wheelhouse DIR"),
        (["--deploy", "--wheelhouse", "/nowhere"], "no such folder"),
        (["--deploy", "--dry-run"], "without --dry-run"),
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
