"""``--deploy`` on hosts that have Python and nothing else, out of wheels that are sent over ssh."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.ssh_rig import HOME, SshHosts, available, base_python, ssh_hosts
from tests.support import REPO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(available()), reason=available() or "the hosts work"),
]

FIRST_S, SECOND_S = 300, 60
SLEEP = ("--model", "sleep,per_sample=1ms", "--batch-size", "8", "--duration", "5s")


@pytest.fixture(scope="module")
def wheelhouse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheels that distbench needs, as a user would fetch them for hosts without an index."""
    folder = tmp_path_factory.mktemp("wheels")
    argv = [sys.executable, "-W", "ignore", "-m", "pip", "download", "--quiet", "--dest", folder]
    argv += ["--only-binary", ":all:", "--constraint", REPO / "constraints.txt"]
    argv += ["torch", "numpy", "tqdm", "nvidia-ml-py"]
    done = subprocess.run(argv, capture_output=True, text=True, check=False, timeout=600)
    if done.returncode:
        pytest.skip(f"no wheels without an index: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[SshHosts]:
    with ssh_hosts(tmp_path) as made:
        yield made


def test_hosts_with_python_alone_give_a_number(hosts: SshHosts, wheelhouse: Path) -> None:
    """The first one within five minutes, the second, in the environment that is there, in one."""
    base = base_python()
    assert hosts.run("jw2", base, "-c", "import torch").returncode == 1
    deploy = ("--deploy", "--wheelhouse", str(wheelhouse), "--no-index")
    command = ("--", "-m", "distbench.offline", *SLEEP)
    argv = (base, str(REPO / "launch/ssh.py"), "--python", base, "--hosts", "jw2,jw3")
    said = list[str]()
    for limit_s in (FIRST_S, SECOND_S):
        done = hosts.run("jw1", *argv, *deploy, *command, timeout=limit_s)
        assert done.returncode == 0, done.stderr
        assert "2 ranks on 2 hosts (jw2, jw3)" in done.stdout
        assert done.stderr.count(": good\n") == 1
        said.append(done.stderr)
    assert said[0].count("wheels sent") == 2 and "wheels sent" not in said[1]
    # As the launcher says, the environment serves without --deploy, in the printed file too.
    (line,) = (each for each in said[1].splitlines() if "until this clone changes" in each)
    python = line.partition("--python '")[2].rstrip("'")
    assert python.startswith("~/.distbench/venv-")
    found = hosts.run("jw2", "sh", "-c", "cat results/*/result.json | head -c 300000").stdout
    first, _ = json.JSONDecoder().raw_decode(found)
    assert first["verdict"]["status"] == "VALID", first["verdict"]
    torchrun = python.replace("~", str(HOME)).replace("/bin/python", "/bin/torchrun")
    alone = ("--standalone", "--nproc-per-node", "1", "-m", "distbench.offline", *SLEEP)
    assert hosts.run("jw2", torchrun, *alone).stdout.startswith("MEASUREMENT VALID")
    argv = (base, str(REPO / "launch/ssh.py"), "--python", python, "--hosts", "jw2,jw3")
    done = hosts.run("jw1", *argv, "--dry-run", *command)
    assert done.returncode == 0, done.stderr
    assert f"{HOME}/.distbench/venv-" in done.stderr


def test_hosts_with_an_index_of_their_own_need_no_wheelhouse(
    hosts: SshHosts, tmp_path: Path, wheelhouse: Path
) -> None:
    """The index is a folder that jw1 serves, which the hosts' own pip configuration names."""
    for wheel in wheelhouse.glob("*.whl"):
        project = tmp_path / "index" / wheel.name.partition("-")[0].lower().replace("_", "-")
        project.mkdir(parents=True, exist_ok=True)
        (project / wheel.name).symlink_to(wheel)
    base = base_python()
    serve = (base, "-m", "http.server", "--directory", str(tmp_path / "index"), "8000")
    server = hosts.popen("jw1", *serve, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    told = "[global]\nindex-url = http://10.77.0.11:8000/\ntrusted-host = 10.77.0.11\n"
    for name in ("jw2", "jw3"):
        hosts.run(name, "sh", "-c", f"mkdir -p .config/pip; printf '{told}' >.config/pip/pip.conf")
    argv = (base, str(REPO / "launch/ssh.py"), "--python", base, "--hosts", "jw2,jw3", "--deploy")
    try:
        done = hosts.run("jw1", *argv, timeout=FIRST_S)
    finally:
        server.kill()
        server.wait(10)
    assert done.returncode == 0, done.stderr
    assert "2 wheels sent" in done.stderr, "pip and distbench"
    (line,) = (each for each in done.stderr.splitlines() if "until this clone changes" in each)
    python = line.partition("--python '")[2].rstrip("'").replace("~", str(HOME))
    told = "import torch, distbench; print(torch.__version__)"
    versions = {hosts.run(name, python, "-c", told).stdout for name in ("jw2", "jw3")}
    assert len(versions) == 1 and versions != {""}, versions


def test_a_wheelhouse_that_lacks_something_is_refused_with_pips_own_words(
    hosts: SshHosts, tmp_path: Path, wheelhouse: Path
) -> None:
    poor = tmp_path / "poor"
    poor.mkdir()
    for each in wheelhouse.glob("[!t]*.whl"):
        (poor / each.name).symlink_to(each)
    base = base_python()
    argv = (base, str(REPO / "launch/ssh.py"), "--python", base, "--hosts", "jw2,jw3", "--deploy")
    done = hosts.run("jw1", *argv, "--wheelhouse", str(poor), "--no-index", timeout=100)
    assert done.returncode == 4, done.stderr
    for name in ("jw2", "jw3"):
        assert f"launch: --deploy: {name}: OSError: " in done.stderr
    assert "satisfies the requirement torch" in done.stderr


def test_a_disk_without_room_for_the_wheels_is_told(hosts: SshHosts, wheelhouse: Path) -> None:
    hosts.run("jw3", "mkdir", ".distbench")
    hosts.hosts.small_disk(hosts.number("jw3"), HOME / ".distbench", 16 << 20)
    base = base_python()
    argv = (base, str(REPO / "launch/ssh.py"), "--python", base, "--hosts", "jw3", "--deploy")
    done = hosts.run("jw1", *argv, "--wheelhouse", str(wheelhouse), "--no-index", timeout=100)
    assert done.returncode == 4, done.stderr
    assert "launch: --deploy: jw3: OSError: [Errno 28] No space left on device" in done.stderr
    assert hosts.run("jw3", "sh", "-c", "ls -A .distbench/wheels/*/.*.whl.*").stdout == ""
