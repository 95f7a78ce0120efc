"""Layouts of one model between hosts whose link is slow: who wins, and was it foreseen?"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from distbench.predict import link_of
from distbench.windows import load_run
from tests.cluster import rig
from tests.support import environment

pytestmark = [
    pytest.mark.timeout(200),
    pytest.mark.skipif(bool(rig.available()), reason=rig.available() or "the rig works"),
]
UNSET = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "MASTER_ADDR")
MODEL = "llama,layers=4,d=512,heads=8,kv_heads=2,hidden=512,prompt=16,output=16,slots=32"
LINK_BITS_PER_S = 100_000_000


def both(hosts: rig.Hosts, outs: tuple[Path, Path], *options: str) -> list[tuple[int, str, str]]:
    """Run the command on both hosts at once; returns (exit status, stdout, stderr) of each."""
    env = {k: v for k, v in environment(OMP_NUM_THREADS="1").items() if k not in UNSET}
    with ExitStack() as stack:
        jobs = []
        for node in (0, 1):
            static = ["--nnodes", "2", "--nproc-per-node", "1", "--node-rank", str(node)]
            master = ["--master-addr", "10.77.0.11", "--master-port", "29507"]
            argv = [sys.executable, "-m", "torch.distributed.run", *static, *master]
            argv += ["-m", "distbench.distributed", "--output-dir", str(outs[node]), *options]
            job = hosts.popen(node, argv, env=env, stdout=-1, stderr=-1, text=True)
            stack.enter_context(job)
            stack.callback(job.kill)
            jobs.append(job)
        deadline = time.monotonic() + 150
        said = [job.communicate(timeout=max(1, deadline - time.monotonic())) for job in jobs]
        return [(job.returncode, *each) for job, each in zip(jobs, said, strict=True)]


@pytest.mark.slow
def test_over_a_slow_link_stages_win_by_what_was_foreseen(tmp_path: Path) -> None:
    outs = tmp_path / "jw2", tmp_path / "jw3"
    with rig.Hosts(2, decoys=False) as hosts:
        for host in (0, 1):
            hosts.limit(host, LINK_BITS_PER_S)
        told = both(
            hosts,
            outs,
            "--model",
            MODEL,
            "--shard",
            "pp,tp",
            "--rounds",
            "2",
            "--num-samples",
            "64",
        )
    assert [code for code, _, _ in told] == [0, 0], told
    (path,) = outs[0].iterdir()
    result = load_run(path).result()
    pp, tp = rows(result)
    assert (pp["layout"], tp["layout"]) == ("pp2", "tp2")
    foreseen = pp["foreseen"] / tp["foreseen"]
    assert tp["ratio"] > 1
    assert foreseen / 2 <= tp["ratio"] <= 2 * foreseen, told[0][1]
    assert "pp2 wins over tp2" in told[0][1]
    assert tp["held_by"] == "all-reduces"
    for links in result["window"]["sharding"]["plan"]["calibration"]["links"].values():
        assert link_of(links["send"], ways=2).bytes_per_s <= 1.1 * LINK_BITS_PER_S / 8


def rows(result: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the layouts by the names of the columns."""
    found = result["tables"]["layouts"]
    names = [each["name"] for each in found["columns"]]
    return [dict(zip(names, row, strict=True)) for row in found["rows"]]
