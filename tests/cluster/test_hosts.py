"""Real runs across hosts made of namespaces: interfaces, MTU faults, clocks of their own, disks."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from distbench.run import load_run
from tests.cluster import rig
from tests.support import environment, run_module

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(bool(rig.available()), reason=rig.available() or "the rig works"),
]

SLEEP = ("--model", "sleep,per_sample=1ms", "--batch-size", "8", "--warmup", "200ms")
UNSET = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR")


def _argv(node: int, out: Path | str, *options: str) -> list[str]:
    static = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)]
    master = ["--master-addr", "10.77.0.11", "--master-port", "29507"]
    run = [sys.executable, "-m", "torch.distributed.run", *static, *master]
    return [*run, "-m", "distbench.offline", "--output-dir", str(out), *options]


def _env() -> dict[str, str]:
    return {k: v for k, v in environment().items() if k not in UNSET}


def _both(
    hosts: rig.Hosts, outs: tuple[Path | str, Path | str], *options: str, timeout_s: float = 90
) -> list[tuple[int, str, str]]:
    """Run the command on both hosts at once; returns (exit status, stdout, stderr) of each."""
    with _started(hosts, outs, *options) as jobs:
        deadline = time.monotonic() + timeout_s
        said = [job.communicate(timeout=max(1, deadline - time.monotonic())) for job in jobs]
        return [(job.returncode, *each) for job, each in zip(jobs, said, strict=True)]


@contextmanager
def _started(
    hosts: rig.Hosts, outs: tuple[Path | str, Path | str], *options: str
) -> Iterator[list[subprocess.Popen[str]]]:
    """Start the command on both hosts; whatever is left of it is killed at the end."""
    with ExitStack() as stack:
        jobs = []
        for node in (0, 1):
            argv = _argv(node, outs[node], *options)
            job = hosts.popen(node, argv, env=_env(), stdout=-1, stderr=-1, text=True)
            stack.enter_context(job)
            stack.callback(job.kill)
            jobs.append(job)
        yield jobs


@pytest.fixture
def outs(tmp_path: Path) -> tuple[Path, Path]:
    """Two folders, one a host: nothing is shared."""
    return tmp_path / "jw2", tmp_path / "jw3"


@pytest.fixture
def hosts() -> Iterator[rig.Hosts]:
    with rig.Hosts(2, decoys=True, debian_hosts=True) as made:
        yield made


def _only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_two_hosts_with_decoys_and_debians_hosts_line_need_no_variable(
    hosts: rig.Hosts, outs: tuple[Path, Path]
) -> None:
    (code, out, err), (code_1, out_1, err_1) = _both(hosts, outs, *SLEEP, "--duration", "1s")
    assert (code, code_1) == (0, 0), err + err_1
    assert out.count("MEASUREMENT") == 1 and out_1 == ""
    assert "2 ranks on 2 hosts (jw2, jw3)" in out
    path = _only(outs[0])
    run = load_run(path)
    faces = [record.before["interface"] for record in run.present]
    assert [f["name"] for f in faces] == ["eth0", "eth0"]
    assert [f["address"] for f in faces] == ["10.77.0.11", "10.77.0.12"]
    assert [row["host"] for row in run.result()["per_rank"]] == ["jw2", "jw3"]
    assert run_module("distbench.verify", str(path)).returncode == 0
    # The other host keeps its own folder, and rank 0 has a true copy of it.
    own = _only(outs[1])
    assert own.name == path.name
    for name in ("rank.json", "samples.npy", "after.json", "done.json"):
        there, here = (f / "ranks/00001" / name for f in (own, path))
        assert there.read_bytes() == here.read_bytes(), name


@pytest.mark.slow
def test_lost_large_packets_are_refused_within_15_s_naming_the_mtu(
    hosts: rig.Hosts, outs: tuple[Path, Path]
) -> None:
    hosts.drop_larger_than(1, 1400)
    begin = time.monotonic()
    told = _both(hosts, outs, *SLEEP, "--duration", "1s", timeout_s=60)
    took = time.monotonic() - begin
    for code, _, err in told:
        assert code != 0
        block = err[err.index("Root Cause") :]
        assert "the MTU is 1500 on" in block and "and 1500 on" in block, block
    assert took < 15 + 10, took  # torchrun itself starts and ends in up to 10 s on two cores
    stamps = [float(s) for _, _, err in told for s in re.findall(r"after ([\d.]+) s", err)]
    assert not stamps or max(stamps) < 15
    assert not any(folder.exists() for folder in outs), "nothing may be written"


def test_clocks_of_their_own_are_measured_within_the_bound(outs: tuple[Path, Path]) -> None:
    offset_ns = 7_000_123_456
    with rig.Hosts(2, decoys=False, time_offsets_ns=(0, offset_ns)) as hosts:
        told = _both(hosts, outs, *SLEEP, "--duration", "2s")
    assert [code for code, _, _ in told] == [0, 0], told
    result = load_run(_only(outs[0])).result()
    zero, one = result["clock"]["ranks"]
    assert zero["domain"] != one["domain"]
    assert abs(one["offset_s"] * 1e9 - offset_ns) <= one["bound_s"] * 1e9 + 1
    assert 0 < one["bound_s"] < 0.001
    assert one["exchanges"] >= 2
    skew, bound = result["start"]["skew_s"], result["start"]["bound_s"]
    zero_start, one_start = (r.after["started_ns"] for r in load_run(_only(outs[0])).present)
    truth = abs(one_start - offset_ns - zero_start) / 1e9
    assert abs(skew - truth) <= bound + 2e-9


@pytest.mark.parametrize("host", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_a_disk_too_small_is_refused_and_leaves_nothing(
    hosts: rig.Hosts, tmp_path: Path, host: int
) -> None:
    outs = (tmp_path / "jw2", tmp_path / "jw3")
    for out in outs:
        out.mkdir()
    hosts.small_disk(host, outs[host], 1 << 20)
    options = ("--model", "echo", "--num-samples", "100000", "--warmup", "10ms")
    told = _both(hosts, outs, *options)
    for code, _, err in told:
        assert code != 0
        block = err[err.index("Root Cause") :]
        assert f"rank {host} (jw{host + 2})" in block, block
        assert "has no room for 50000 samples" in block
        assert "--output-dir" in block
    for node, out in enumerate(outs):
        listed = hosts.run(node, ["ls", "-A", str(out)])
        assert listed.stdout == "", "nothing may be left half-written"


COUNT = """
import glob, json, sys
import numpy as np
for name in glob.glob(sys.argv[1] + '/*/ranks/*/samples.npy'):
    columns = json.load(open(name.replace('samples.npy', 'rank.json')))['columns']
    rows = np.load(name, mmap_mode='r')
    done = rows[:, columns.index('completed')] >= 0
    print(len(rows), rows[done, columns.index('count')].sum())
"""

FILL = """
import os, sys, time
folder = sys.argv[1]
while not any('rank.json' in files for _, _, files in os.walk(folder)):
    time.sleep(0.05)
with open(os.path.join(folder, 'filler'), 'wb', buffering=0) as file:
    try:
        while True:
            file.write(bytes(1 << 16))
    except OSError:
        pass
    try:
        while True:
            file.write(b'x')
    except OSError:
        pass
print('full')
"""


@pytest.mark.slow
@pytest.mark.parametrize("host", [0, 1])
def test_a_disk_that_fills_up_in_the_window_loses_no_sample(
    hosts: rig.Hosts, tmp_path: Path, host: int
) -> None:
    outs = (tmp_path / "jw2", tmp_path / "jw3")
    for out in outs:
        out.mkdir()
    hosts.small_disk(host, outs[host], 4 << 20)
    filler = hosts.popen(host, [sys.executable, "-c", FILL, str(outs[host])], env=_env(), stdout=-1)
    with filler:
        told = _both(hosts, outs, *SLEEP, "--duration", "3s")
        assert filler.communicate(timeout=30)[0].strip() == b"full"
    codes = [code for code, _, _ in told]
    text = " ".join("".join(out + err for _, out, err in told).split())
    assert "SIGBUS" not in text and -7 not in codes
    assert "No space left on device" in text, text
    assert f"jw{host + 2}" in text
    if host == 0:
        assert codes[0] != 0
        assert "MEASUREMENT" in text
    else:
        assert "MEASUREMENT INCOMPLETE" in told[0][1] or "rank 1 (jw3)" in told[0][1], text
    # Every sample is in the rank's own file, whatever else could not be written.
    listed = hosts.run(host, [sys.executable, "-c", COUNT, str(outs[host])], env=_env())
    for line in listed.stdout.splitlines():
        rows, done = line.split()
        assert rows == done
    assert listed.stdout.strip()


def test_a_cut_cable_loses_the_rank_and_both_end(hosts: rig.Hosts, tmp_path: Path) -> None:
    outs = (tmp_path / "jw2", tmp_path / "jw3")
    with _started(hosts, outs, *SLEEP, "--duration", "60s") as jobs:
        _await_window(outs)
        hosts.cut(1)
        begin = time.monotonic()
        pids = [_pid(out) for out in outs]
        while any(_alive(pid) for pid in pids):
            assert time.monotonic() - begin < 20, "survivors must end within 20 s"
            time.sleep(0.1)
        out = jobs[0].communicate(timeout=60)[0]
        jobs[1].communicate(timeout=60)
    assert "MEASUREMENT INCOMPLETE" in out
    assert "rank 1 (jw3) was lost: nothing was heard from it" in out
    merged = run_module("distbench.salvage", str(_only(outs[0])), str(_only(outs[1])))
    assert merged.returncode == 6
    rows = [row["samples"] for row in load_run(_only(outs[0])).result()["per_rank"]]
    assert len(rows) == 2 and min(rows) > 0


def _await_window(outs: tuple[Path, Path]) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        if all(list(out.glob("*/ranks/*/rank.json")) for out in outs):
            time.sleep(2.0)  # the window has begun by then; its length is 60 s
            return
        time.sleep(0.1)
    raise AssertionError("the window did not begin")


def _pid(out: Path) -> int:
    (path,) = out.glob("*/ranks/*/rank.json")
    found: dict[str, Any] = json.loads(path.read_bytes())
    return int(found["pid"])


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/dev/net/tun").exists(), reason="no /dev/net/tun: no delay")
@pytest.mark.slow
@pytest.mark.parametrize(("out_us", "in_us"), [(1000, 1000), (2000, 500)])
def test_a_slow_way_widens_the_clocks_bound_and_never_breaks_it(
    outs: tuple[Path, Path], out_us: int, in_us: int
) -> None:
    """1 ms each way: bound at most 1.3 ms. 2 ms and 0.5 ms: an error of 0.75 ms that is in it."""
    offset_ns = 3_000_000_000
    with rig.Hosts(2, decoys=False, time_offsets_ns=(0, offset_ns)) as hosts:
        hosts.delay(1, out_us, in_us)
        told = _both(hosts, outs, *SLEEP, "--duration", "2s")
    assert [code for code, _, _ in told] == [0, 0], told
    path = _only(outs[0])
    result = load_run(path).result()
    one = result["clock"]["ranks"][1]
    error, bound = abs(one["offset_s"] - offset_ns / 1e9), one["bound_s"]
    assert error <= bound
    assert (out_us + in_us) / 2e6 * 0.99 <= bound <= (out_us + in_us) / 2e6 + 0.3e-3
    if out_us != in_us:
        assert error >= 0.5e-3, "half the difference of the ways, which nobody can see"
    skew = result["start"]["skew_s"]
    assert skew < bound
    assert "below what the clocks resolve" in " ".join(told[0][1].split())


@pytest.mark.slow
def test_lost_packets_cost_time_and_neither_a_sample_nor_the_bound(outs: tuple[Path, Path]) -> None:
    """Of 100 packets 5 are lost, at 20 Mbit/s: TCP sends again, and late pings widen no bound."""
    offset_ns = 3_000_000_000
    with rig.Hosts(2, decoys=False, time_offsets_ns=(0, offset_ns)) as hosts:
        hosts.lose(1, 5)
        hosts.limit(1, 20_000_000)
        told = _both(hosts, outs, *SLEEP, "--duration", "2s")
    assert [code for code, _, _ in told] == [0, 0], told
    result = load_run(_only(outs[0])).result()
    one = result["clock"]["ranks"][1]
    assert abs(one["offset_s"] - offset_ns / 1e9) <= one["bound_s"] < 1e-3
    assert sum(row["samples"] for row in result["per_rank"]) == result["metrics"]["throughput"]["n"]
