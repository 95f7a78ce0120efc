"""LoadGen on a host without ranks and without torch: MLPerf's Network division, and lost ranks."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from distbench.mllog import read_detail
from distbench.run import load_run
from distbench.verify import verify
from tests.cluster import rig
from tests.cluster.test_central_hosts import _end, _env, _only

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(200),
    pytest.mark.skipif(bool(rig.available()), reason=rig.available() or "the rig works"),
]

NO_TORCH = "import sys; sys.modules['torch'] = None; sys.argv[0] = 'driver'; "
DRIVER = NO_TORCH + "from distbench.cli import run_command; from distbench.driver import main; "
DRIVER += "run_command(main)"
"""As `python -m distbench.driver` where torch is not installed: importing it raises."""


def started(
    hosts: rig.Hosts, stack: ExitStack, tmp_path: Path, *options: str
) -> tuple[subprocess.Popen[str], list[subprocess.Popen[str]]]:
    """Start the driver on jw1, and the command on jw2 and jw3."""
    token = tmp_path / "token"
    token.write_text(secrets.token_hex(16))
    listen = f"{hosts.address(2)}:29600"
    argv = [sys.executable, "-c", DRIVER, "--listen", listen, "--token-file", str(token)]
    argv += ["--output-dir", str(tmp_path / "jw1")]
    driver = hosts.popen(2, argv, env=_env(), stdout=-1, stderr=-1, text=True)
    stack.enter_context(driver)
    stack.callback(driver.kill)
    assert "driver listens on" in driver.stdout.readline()  # type: ignore[union-attr]
    jobs = []
    for node in (0, 1):
        static = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)]
        run = [sys.executable, "-m", "torch.distributed.run", *static]
        run += ["--master-addr", "10.77.0.11", "--master-port", "29511", "-m", "distbench.mlperf"]
        run += ["--driver", listen, "--driver-token", str(token), "--warmup", "100ms", "--quiet"]
        run += ["--output-dir", str(tmp_path / ("jw2", "jw3")[node]), *options]
        job = hosts.popen(node, run, env=_env(), stdout=-1, stderr=-1, text=True)
        stack.enter_context(job)
        stack.callback(job.kill)
        jobs.append(job)
    return driver, jobs


def hosts_made() -> rig.Hosts:
    return rig.Hosts(3, names=["jw2", "jw3", "jw1"], time_offsets_ns=(0, 7_000_123_456, -3 * 10**9))


@pytest.mark.parametrize("mode", ["performance", "accuracy"])
def test_loadgen_on_jw1_drives_jw2_and_jw3(tmp_path: Path, mode: str) -> None:
    options = [
        "--benchmark",
        "tinylm",
        "--scenario",
        "server",
        "--target-qps",
        "30",
        "--mode",
        mode,
    ]
    options += ["--rules", "mlperf-v5.0,shortened=2s", "--payload", "data"]
    with hosts_made() as hosts, ExitStack() as stack:
        driver, jobs = started(hosts, stack, tmp_path, *options)
        out = _end(jobs, 150)[0]
        assert driver.wait(20) == 0, driver.communicate()
    assert "Network SUT" in out.splitlines()[2], out
    path, there = _only(tmp_path / "jw2"), _only(tmp_path / "jw1")
    for each in (path, there):
        keys = read_detail(each / "loadgen").keys
        assert keys["sut_name"] == ("Network SUT: distbench on tinylm on jw2, tinylm on jw3")
    names = sorted(each.name for each in (there / "loadgen").iterdir())
    assert names == sorted(each.name for each in (path / "loadgen").iterdir())
    for name in names:
        copies = [(each / "loadgen" / name).read_bytes() for each in (there, path)]
        assert copies[0] == copies[1], name
    result = load_run(path).result()
    assert result["window"]["official"]["network"]
    assert result["clock"]["driver"]["payload"] == "data"
    assert {row["host"] for row in result["per_rank"]} == {"jw2", "jw3"}
    assert all(row["samples"] for row in result["per_rank"])
    assert result["metrics"]["accuracy"]["value"] == 1.0
    code, lines = verify(path)
    assert code == 0, lines


def test_indices_do_not_cross_a_network(tmp_path: Path) -> None:
    with hosts_made() as hosts, ExitStack() as stack:
        driver, jobs = started(hosts, stack, tmp_path, "--rules", "mlperf-v5.0,shortened=1s")
        said = [job.communicate(timeout=90) for job in jobs]
        driver.wait(30)
    assert all(job.returncode for job in jobs)
    assert all("give --payload data" in err for _, err in said), said


def _rank_on(hosts: rig.Hosts, node: int) -> int:
    """Return the process of the rank on a host: torchrun's own is another."""
    found = []
    for pid in hosts.processes(node):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        if b"distbench.mlperf" in words and b"torch.distributed.run" not in words:
            found.append(pid)
    (pid,) = found
    return pid


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_that_dies_or_hangs_ends_loadgen_too(tmp_path: Path, how: int) -> None:
    options = ["--benchmark", "digits", "--scenario", "server", "--payload", "data"]
    with hosts_made() as hosts, ExitStack() as stack:
        driver, jobs = started(hosts, stack, tmp_path, *options)
        deadline = time.monotonic() + 90
        log = "*/loadgen/mlperf_log_detail.txt"
        while not list((tmp_path / "jw1").glob(log)):
            assert time.monotonic() < deadline, [job.poll() for job in jobs]
            time.sleep(0.1)
        time.sleep(3.0)
        rank = _rank_on(hosts, 1)
        begin = time.monotonic()
        os.kill(rank, how)
        out, err = jobs[0].communicate(timeout=60)
        driver.wait(30)
        took_s = time.monotonic() - begin
        os.kill(rank, signal.SIGKILL) if how == signal.SIGSTOP else None
    path = _only(tmp_path / "jw2")
    result: dict[str, Any] = load_run(path).result()
    assert took_s < 20 + 10, "and torchrun's own way to its end"
    assert result["verdict"]["status"] == "INCOMPLETE"
    assert result["verdict"]["rules"]["result"] == "INVALID"
    told = " ".join(each["message"] for each in result["verdict"]["findings"]) + out + err
    assert "rank 1 (jw3)" in told, told
    assert (_only(tmp_path / "jw1") / "loadgen" / "mlperf_log_detail.txt").stat().st_size
