"""`--loadgen-host jw1`: the launcher on jw1 starts the driver there, for jw2 and jw3."""

from __future__ import annotations

import json
import os
import re
import signal
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from subprocess import Popen
from typing import Any

import pytest

from distbench.conditions import conditions, differences
from tests.cluster.faults import COMMON, END_S, ended, file, left, result
from tests.cluster.ssh_rig import HOME, SshHosts, available, base_python, ssh_hosts
from tests.support import REPO

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(available()), reason=available() or "the hosts work"),
]

PYTHON = HOME / "driver" / "bin" / "python"
"""On jw1, in an environment with numpy and LoadGen alone."""
NETWORK = ("--payload", "data", "--warmup", "200ms")
MLPERF = ("--", "-m", "distbench.mlperf", "--scenario", "server", *NETWORK)
DIGITS = (*MLPERF, "--benchmark", "digits", "--target-qps", "50")
SHORT = ("--rules", "mlperf-v5.0,shortened=2s")
ONE_THREAD = ("--env", "OMP_NUM_THREADS=1")
"""Both hosts have the same two processors."""
ON_JW1 = (
    *ONE_THREAD,
    "--loadgen-host",
    "jw1",
    "--loadgen-python",
    str(PYTHON),
    "--loadgen-dir",
    "~/clone",
)


def environment(hosts: SshHosts, *wanted: str) -> None:
    """Make a virtual environment on jw1 that has some of this one's packages, and no torch."""
    here = Path(sysconfig.get_path("platlib"))
    hosts.run("jw1", "rm", "-rf", str(PYTHON.parent.parent))
    done = hosts.run("jw1", base_python(), "-m", "venv", "--without-pip", str(PYTHON.parent.parent))
    assert done.returncode == 0, done.stderr
    told = "import sysconfig; print(sysconfig.get_path('platlib'))"
    there = hosts.run("jw1", str(PYTHON), "-c", told).stdout.strip()
    for path in (each for name in wanted for each in here.glob(f"{name}*")):
        assert hosts.run("jw1", "ln", "-s", str(path), there).returncode == 0
    assert hosts.run("jw1", str(PYTHON), "-c", "import torch").returncode == 1
    clone = f"mkdir -p clone && ln -sfn {REPO}/distbench clone/distbench"
    assert hosts.run("jw1", "sh", "-c", clone).returncode == 0


ALL = ("numpy", "mlcommons_loadgen", "mlperf_loadgen")


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHosts]:
    """Three hosts that no test harms."""
    with ssh_hosts(tmp_path_factory.mktemp("hosts")) as made:
        environment(made, *ALL)
        yield made
        assert leftovers(made) == ""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[SshHosts]:
    """Three hosts for one test, a clock of its own each."""
    with ssh_hosts(tmp_path, time_offsets_ns=(0, 7_000_123_456, 3 * 10**9)) as made:
        environment(made, *ALL)
        yield made


def leftovers(hosts: SshHosts) -> str:
    """Return the files of a driver or a token that are anywhere in the homes."""
    look = "find . -name '.token-*' -o -name '.driver-*' -o -name token -o -name '*.part'"
    return "".join(hosts.run(name, "sh", "-c", look).stdout for name in hosts.names)


def clean(hosts: SshHosts) -> None:
    for name in hosts.names:
        hosts.run(name, "rm", "-rf", "results")


def started(hosts: SshHosts, *arguments: str) -> Popen[str]:
    argv = hosts.launcher(*COMMON, *ON_JW1, *arguments)
    job: Popen[str] = hosts.popen("jw1", *argv, stdout=-1, stderr=-1, text=True)
    return job


def wait_for(job: Popen[str], what: Any, within_s: float = 90) -> Any:
    end = time.monotonic() + within_s
    while not (found := what()):
        assert job.poll() is None, job.communicate()
        assert time.monotonic() < end
        time.sleep(0.1)
    return found


def test_loadgen_on_jw1_drives_jw2_and_jw3(own: SshHosts) -> None:
    """And its token, in a private file while it runs, is written nowhere else."""
    job = started(own, *DIGITS, *SHORT)
    look = "cd results/.token-* 2>/dev/null && stat -c %a . token && cat token"
    seen = wait_for(job, lambda: own.run("jw2", "sh", "-c", look).stdout).split()
    assert seen[:2] == ["700", "600"]
    assert len(seen[2]) == 32
    assert own.run("jw1", "sh", "-c", "cat clone/results/.driver-*/token").stdout == seen[2]
    asked = [
        Path(f"/proc/{pid}/cmdline").read_bytes()
        for name in own.names
        for pid in own.hosts.processes(own.number(name))
    ]
    assert any(b"distbench.driver" in each for each in asked)
    assert not any(seen[2].encode() in each for each in asked)
    out, err = job.communicate(timeout=150)
    assert job.returncode == 0, err
    assert "Network SUT" in out.splitlines()[2], out
    assert "[jw1 driver] distbench: driver listens on 10.77.0.11:" in err
    path, found = result(own)
    official = found["window"]["official"]
    assert official["network"]
    assert {row["host"] for row in found["per_rank"]} == {"jw2", "jw3"}
    assert all(row["samples"] for row in found["per_rank"])
    assert found["clock"]["driver"]["host"] == "jw1"
    summary = file(own, "jw1", f"{path}/loadgen/mlperf_log_summary.txt").decode()
    assert "Network SUT: distbench on digits on jw2, digits on jw3" in summary
    assert f"{HOME}/{path}: good" in err
    assert left(own, *own.names) == {}
    assert leftovers(own) == ""
    for name in own.names:  # 1 is grep's word for nothing
        assert own.run(name, "grep", "-rF", seen[2], str(HOME)).returncode == 1
    assert seen[2] not in out + err


def process(hosts: SshHosts, name: str, module: bytes) -> int:
    """Return the only process on a host that runs a module of distbench by itself."""
    found = []
    for pid in hosts.working(name):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if module in words and b"torch.distributed.run" not in words:
            found.append(pid)
    (pid,) = found
    return pid


def in_the_window(hosts: SshHosts, *command: str) -> Popen[str]:
    """Start a run of ten minutes; returns when LoadGen has been issuing for some seconds."""
    job = started(hosts, *(command or DIGITS))
    log = "clone/results/.driver-*/*/loadgen/mlperf_log_detail.txt"
    wait_for(job, lambda: hosts.run("jw1", "sh", "-c", f"ls {log} 2>/dev/null").stdout)
    time.sleep(4.0)
    return job


def gone(hosts: SshHosts, name: str, module: bytes, within_s: float = 20.0) -> None:
    """Wait until no process with that module is on a host."""
    end = time.monotonic() + within_s
    while any(module in Path(f"/proc/{pid}/cmdline").read_bytes() for pid in hosts.working(name)):
        assert time.monotonic() < end, module
        time.sleep(0.1)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_loadgen_and_the_logs_are_here(
    own: SshHosts, how: signal.Signals
) -> None:
    """Within 20 s the run is over; a process that stands still the launcher then ends as well."""
    job = in_the_window(own)
    rank = process(own, "jw3", b"distbench.mlperf")
    begin = time.monotonic()
    os.kill(rank, how)
    gone(own, "jw1", b"distbench.driver")
    loadgen_s = time.monotonic() - begin
    gone(own, "jw2", b"distbench.mlperf", 20 - loadgen_s)
    rank_0_s = time.monotonic() - begin
    code, said = ended(job, 60)
    took_s = time.monotonic() - begin
    print(f"LoadGen {loadgen_s:.1f} s, rank 0 {rank_0_s:.1f} s, launcher {took_s:.1f} s after it")
    assert code == 6, said
    path, found = result(own)
    assert found["verdict"]["status"] == "INCOMPLETE"
    assert found["verdict"]["rules"]["result"] == "INVALID"
    assert 1 in [each["rank"] for each in found["verdict"]["findings"]]
    assert "rank 1 (jw3) was lost" in said
    assert "incomplete: the driver (jw1) ended early" in said
    assert file(own, "jw1", f"{path}/loadgen/mlperf_log_detail.txt")
    assert found["metrics"]["dispatch.throughput"]["n"] > 50, "of the driver's own log"
    assert left(own, *own.names) == {}
    assert leftovers(own) == ""


def test_a_driver_that_is_killed_ends_the_run_and_its_log_is_here(own: SshHosts) -> None:
    job = in_the_window(own)
    os.kill(process(own, "jw1", b"distbench.driver"), signal.SIGKILL)
    code, said = ended(job, END_S)
    assert code == 6, said
    path, found = result(own)
    assert "launch: jw1: the driver ended with status 137" in said
    assert "incomplete: the driver (jw1) " in said
    assert found["verdict"]["status"] == "INCOMPLETE"
    assert found["metrics"]["dispatch.throughput"]["n"] > 50
    assert file(own, "jw1", f"{path}/loadgen/mlperf_log_detail.txt")
    assert left(own, *own.names) == {}
    assert leftovers(own) == ""


def test_a_launcher_that_is_killed_leaves_no_process_no_token_and_the_drivers_log(
    own: SshHosts,
) -> None:
    job = in_the_window(own)
    job.kill()
    job.communicate()
    assert left(own, *own.names, within_s=30) == {}
    found = leftovers(own).split()
    assert len(found) == 1 and found[0].startswith("./clone/results/.driver-")
    assert own.run("jw1", "sh", "-c", f"ls {found[0]}/*/driver/samples.npy").returncode == 0


def test_ctrl_c_ends_the_driver_too(own: SshHosts) -> None:
    job = in_the_window(own)
    job.send_signal(signal.SIGINT)
    code, said = ended(job, END_S)
    assert code == 130, said
    path, found = result(own)
    assert found["verdict"]["status"] == "INCOMPLETE"
    assert file(own, "jw1", f"{path}/loadgen/mlperf_log_detail.txt")
    assert left(own, *own.names) == {}
    assert leftovers(own) == ""


def test_central_dispatch_of_server_twice(hosts: SshHosts) -> None:
    """Each run has its own driver; they are launches of one kind, whatever port was free."""
    load = ("--model", "sleep,per_sample=1ms", "--target-qps", "100", "--duration", "2s")
    command = ("--", "-m", "distbench.server", "--dispatch", "central", "--warmup", "200ms", *load)
    done = hosts.launch(*COMMON, *ON_JW1, "--repeat", "2", *command)
    try:
        assert done.returncode == 0, done.stderr
        ports = re.findall(r"driver listens on 10.77.0.11:(\d+)", done.stderr)
        assert len(set(ports)) == 2
        assert done.stdout.count("driver         jw1, process") == 2
        paths = hosts.run("jw1", "sh", "-c", "ls -d results/2*").stdout.split()
        one, other = (
            conditions(json.loads(file(hosts, "jw1", f"{path}/result.json"))) for path in paths
        )
        assert one.run["driver"] == "10.77.0.11"
        differ = {each.name for each in differences(one, other)}
        assert not differ & {"driver", "driver_token"}
        assert left(hosts, *hosts.names) == {}
        assert leftovers(hosts) == ""
    finally:
        clean(hosts)


def test_what_would_be_started_is_shown_and_no_token_is_made(hosts: SshHosts) -> None:
    done = hosts.launch(*COMMON, *ON_JW1, "--dry-run", *DIGITS)
    assert done.returncode == 0, done.stderr
    driver, *ranks = (line for line in done.stderr.splitlines() if " cd " in line)
    where = f"{HOME}/clone/results/.driver-"
    assert driver.startswith(f"launch: jw1: cd {HOME}/clone && PYTHONPATH={REPO} OMP_NUM_")
    assert f"{PYTHON} -m distbench.driver --listen 10.77.0.11 --token-file {where}" in driver
    assert len(ranks) == 2
    for line in ranks:
        assert f"--driver 10.77.0.11:PORT --driver-token {HOME}/results/.token-" in line
    assert leftovers(hosts) == ""
    assert hosts.run("jw1", "ls", "clone").stdout == "distbench\n"


def refused(hosts: SshHosts, *arguments: str) -> str:
    """Launch; returns why nothing was started."""
    begin = time.monotonic()
    done = hosts.launch(*COMMON, *arguments)
    assert done.returncode == 4, (done.returncode, done.stderr)
    assert time.monotonic() - begin < 15
    assert "torch.distributed.run" not in done.stderr and "listens on" not in done.stderr
    return done.stderr


def test_a_host_that_cannot_drive_is_refused_with_the_remedy(hosts: SshHosts) -> None:
    where = ON_JW1[:-2]
    try:
        said = refused(hosts, *ON_JW1, *DIGITS, "--rules", "mlperf-v5.1")
        assert "jw1: mlcommons-loadgen 5.0.13 is installed here, and the round has 5.1.2" in said
        assert "`pip install mlcommons-loadgen==5.1.2`" in said
        said = refused(hosts, *where, "--loadgen-dir", "~", *DIGITS)
        assert f"jw1: {PYTHON} finds no distbench in {HOME}: give --loadgen-dir" in said
        hosts.run("jw1", "sh", "-c", "mkdir -p old/distbench; cd old/distbench; "
                  "echo '__version__ = \"0.0.1\"' >__init__.py")  # fmt: skip
        said = refused(hosts, *where, "--loadgen-dir", "~/old", *DIGITS)
        assert "distbench differs: 0.1.0 on jw2, 0.0.1 on jw1: install one version" in said
        environment(hosts, "numpy")
        said = refused(hosts, *ON_JW1, *DIGITS)
        assert "jw1: LoadGen is not installed here" in said
        assert "`pip install mlcommons-loadgen==5.0.13`" in said
        environment(hosts, "mlcommons_loadgen")
        said = refused(hosts, *ON_JW1, *DIGITS)
        assert f"jw1: {PYTHON} has no numpy, which a driver needs: " in said
        said = refused(hosts, "--loadgen-host", "10.77.0.13", *DIGITS)
        assert "10.77.0.13 calls itself 'jw3', as jw3 does, which has ranks: leave" in said
        said = refused(hosts, "--loadgen-host", "jw9", *DIGITS)
        assert "launch: jw9: " in said
    finally:
        environment(hosts, *ALL)


def test_a_driver_that_the_ranks_do_not_reach_is_refused(own: SshHosts) -> None:
    match = "ip saddr 10.77.0.13 tcp dport 1024-65535 ct state new"
    rules = "add table inet t\nadd chain inet t c { type filter hook input priority 0; }\n"
    rules += f"add rule inet t c {match} drop\n"
    done = own.run("jw1", "sh", "-c", f"nft -f - <<'END'\n{rules}END")
    assert done.returncode == 0, done.stderr
    said = refused(own, *ON_JW1, *DIGITS)
    assert "jw3 does not reach jw1 at 10.77.0.11 port" in said
    assert "jw2 does not reach jw1" not in said


def test_a_command_that_the_ranks_refuse_ends_the_driver_at_once(hosts: SshHosts) -> None:
    begin = time.monotonic()
    done = hosts.launch(*COMMON, *ON_JW1, *DIGITS, "--taget-qps", "10")
    assert done.returncode == 2, done.stderr
    assert time.monotonic() - begin < 30
    assert "did you mean --target-qps?" in done.stderr
    assert "jw1 driver said" not in done.stderr and "SIGTERM" not in done.stderr
    assert left(hosts, *hosts.names) == {}
    assert leftovers(hosts) == ""
