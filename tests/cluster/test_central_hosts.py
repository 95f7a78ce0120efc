"""Central dispatch across hosts made of namespaces, each with a clock of its own."""

from __future__ import annotations

import secrets
import subprocess
import sys
import time
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import pytest

from distbench.joined import official
from distbench.run import load_run
from tests.cluster import rig
from tests.support import environment, run_module

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(bool(rig.available()), reason=rig.available() or "the rig works"),
]

UNSET = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR")
SLEEP = ("--model", "sleep,per_sample=1ms", "--warmup", "100ms", "--target-qps", "400")
OFFSETS_NS = (0, 7_000_123_456, -3_000_000_000)
PARTS = ("lateness", "queue", "service", "return")


def _env() -> dict[str, str]:
    return {k: v for k, v in environment().items() if k not in UNSET}


def _argv(node: int, out: Path, *options: str) -> list[str]:
    static = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)]
    master = ["--master-addr", "10.77.0.11", "--master-port", "29509"]
    run = [sys.executable, "-m", "torch.distributed.run", *static, *master]
    run += ["-m", "distbench.server", "--dispatch", "central", "--output-dir", str(out)]
    return [*run, *options]


def _start(
    hosts: rig.Hosts, stack: ExitStack, outs: tuple[Path, Path], *options: str
) -> list[subprocess.Popen[str]]:
    jobs = []
    for node in (0, 1):
        argv = _argv(node, outs[node], *options)
        job = hosts.popen(node, argv, env=_env(), stdout=-1, stderr=-1, text=True)
        stack.enter_context(job)
        stack.callback(job.kill)
        jobs.append(job)
    return jobs


def _only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def _end(jobs: list[subprocess.Popen[str]], timeout_s: float = 90) -> list[str]:
    deadline = time.monotonic() + timeout_s
    said = [job.communicate(timeout=max(1, deadline - time.monotonic())) for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    return [out for out, _ in said]


@pytest.fixture
def outs(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders, one a host: nothing is shared."""
    return tmp_path / "jw2", tmp_path / "jw3"


def _check(path: Path, queries: int) -> dict[str, float]:
    """Check the books of a run, and return what is known of the driver's clock."""
    run = load_run(path)
    (driver,) = official(run)
    assert (driver.column("completed") >= 0).sum() == queries == len(driver.column("index"))
    numbers = np.concatenate([record.column("query") for record in run.present])
    assert sorted(numbers.tolist()) == list(range(queries))
    assert all(len(record.column("query")) > queries // 5 for record in run.present)
    made, latency = driver.made, driver.column("completed") - driver.column("scheduled")
    np.testing.assert_array_equal(sum(made[name] for name in PARTS), latency)
    section = run.result()["clock"]["driver"]
    # By so much, and by no more, what meets two clocks can be below zero.
    least = min(int(made[name].min()) for name in ("queue", "return"))
    assert least >= -1e9 * section["parts_bound_s"]
    assert (made["service"] >= 1_000_000).all()
    assert run_module("distbench.verify", str(path)).returncode == 0
    return dict(section)


@pytest.mark.slow
def test_a_driver_beside_rank_0_and_a_rank_with_a_clock_of_its_own(
    outs: tuple[Path, Path],
) -> None:
    with rig.Hosts(2, time_offsets_ns=OFFSETS_NS[:2]) as hosts, ExitStack() as stack:
        jobs = _start(hosts, stack, outs, *SLEEP, "--num-samples", "600")
        out = _end(jobs)[0]
        assert [hosts.processes(node) for node in (0, 1)] == [[], []], "the driver is gone"
    assert "latencies are on its clock" in out
    section = _check(_only(outs[0]), 600)
    assert section["offset_s"] == 0.0
    assert 0 < section["parts_bound_s"] < 0.005


def test_a_driver_on_a_host_of_its_own(outs: tuple[Path, Path], tmp_path: Path) -> None:
    """Started by hand on jw1, whose clock is another again; rank 0 brings its log home."""
    token, there = tmp_path / "token", tmp_path / "jw1"
    token.write_text(secrets.token_hex(16))
    names = ["jw2", "jw3", "jw1"]
    with rig.Hosts(3, names=names, time_offsets_ns=OFFSETS_NS) as hosts, ExitStack() as stack:
        listen = f"{hosts.address(2)}:29600"
        argv = [sys.executable, "-m", "distbench.driver", "--listen", listen]
        argv += ["--token-file", str(token), "--output-dir", str(there)]
        driver = hosts.popen(2, argv, env=_env(), stdout=-1, stderr=-1, text=True)
        stack.enter_context(driver)
        stack.callback(driver.kill)
        assert driver.stdout.readline() == f"distbench: driver listens on {listen}\n"  # type: ignore[union-attr]
        more = ("--driver", listen, "--driver-token", str(token))
        jobs = _start(hosts, stack, outs, *SLEEP, "--num-samples", "600", *more)
        out = _end(jobs)[0]
        assert driver.wait(20) == 0
    assert "driver         jw1, process" in out
    path = _only(outs[0])
    section = _check(path, 600)
    assert abs(section["offset_s"] * 1e9 - OFFSETS_NS[2]) <= section["bound_s"] * 1e9 + 1
    assert section["exchanges"] >= 2
    own = _only(there)
    assert own.name == path.name
    copies = [(each / "driver" / "samples.npy").read_bytes() for each in (own, path)]
    assert copies[0] == copies[1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [1, 2])
def test_a_cut_cable_ends_all_and_what_completed_is_kept(
    outs: tuple[Path, Path], tmp_path: Path, victim: int
) -> None:
    """The cable of a rank, or of a driver on a host of its own."""
    token, there = tmp_path / "token", tmp_path / "jw1"
    token.write_text(secrets.token_hex(16))
    with rig.Hosts(3, names=["jw2", "jw3", "jw1"]) as hosts, ExitStack() as stack:
        listen = f"{hosts.address(2)}:29600"
        argv = [sys.executable, "-m", "distbench.driver", "--listen", listen]
        argv += ["--token-file", str(token), "--output-dir", str(there)]
        driver = hosts.popen(2, argv, env=_env(), stdout=-1, stderr=-1, text=True)
        stack.enter_context(driver)
        stack.callback(driver.kill)
        assert driver.stdout.readline()  # type: ignore[union-attr]
        more = ("--driver", listen, "--driver-token", str(token))
        jobs = _start(hosts, stack, outs, *SLEEP, "--duration", "60s", *more)
        deadline = time.monotonic() + 60
        while not list(there.glob("*/driver/driver.json")):
            assert time.monotonic() < deadline, "the window did not begin"
            time.sleep(0.1)
        time.sleep(2.0)
        hosts.cut(victim)
        begin = time.monotonic()
        out = jobs[0].communicate(timeout=60)[0]
        driver.wait(30)
        assert time.monotonic() - begin < 45
        for job in jobs:
            job.communicate(timeout=30)
    assert "MEASUREMENT INCOMPLETE" in out, out
    (log,) = there.glob("*/driver/samples.npy")
    done = (np.load(log)[:, 4] >= 0).sum()
    assert done > 100
    if victim == 2:
        assert "the driver (jw1) was lost: " in " ".join(out.split())
