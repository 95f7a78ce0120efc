"""Two ranks whose clocks differ by a known constant: the kernel's time namespaces."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.cluster import rig
from tests.support import REPO, environment, free_port

pytestmark = [
    pytest.mark.timeout(150),
    pytest.mark.skipif(bool(rig.available()), reason=rig.available() or "the rig works"),
]

OFFSET_NS = 7_000_123_456
EXCHANGES = 200

RANK = """
import json, os, sys
import torch, torch.distributed as dist
from distbench.clock import measure_exchange, now_ns
from distbench.liveness import EXCHANGE_TRIPS
from distbench.start import agree_start, wait_until
from distbench.world import join

def gloo_exchange(rank):
    there, back, trips = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64), []
    for _ in range(EXCHANGE_TRIPS):
        if rank == 0:
            t0 = now_ns()
            dist.send(there, 1)
            dist.recv(back, 1)
            trips.append((t0, int(back[0]), int(back[1]), now_ns()))
        else:
            dist.recv(there, 0)
            t1 = now_ns()
            back[0] = t1
            back[1] = now_ns()
            dist.send(back, 0)
    return measure_exchange(trips) if rank == 0 else None

with join(device="cpu", timeout_s=60) as world:
    gloo, told = [], {}
    for i in range(int(sys.argv[1])):
        world.side.meet(f"a{i}")
        if world.rank == 0:
            world.side.exchange_clocks()
        world.side.meet(f"b{i}")
        if i % 10 == 0:
            gloo.append(gloo_exchange(world.rank))
    plan = agree_start(world, "s", 200_000)
    started = wait_until(plan.local_ns, world.now, 200_000)
    told = {"domain": world.side.seats[world.rank].domain, "started": started}
    if world.rank == 0:
        kept = [e for e in world.side.exchanges[1] if e.trips == EXCHANGE_TRIPS]
        told["socket"] = [[e.offset_ns, e.bound_ns] for e in kept]
        told["gloo"] = [[e.offset_ns, e.bound_ns] for e in gloo]
        model = world.side.model(1)
        told["model"] = [model.offset_ns(plan.reference_ns), model.bound_ns(plan.reference_ns)]
    world.side.meet("end")
print(json.dumps(told))
"""


def _start(rank: int, port: int, argv: list[str]) -> subprocess.Popen[str]:
    place = {
        "RANK": str(rank),
        "WORLD_SIZE": "2",
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": str(rank),
        "GROUP_WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    return subprocess.Popen(
        argv,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**place),
        cwd=REPO,
    )


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Two ranks on one network stack, rank 1 in a time namespace; what each printed."""
    script: Path = tmp_path_factory.mktemp("clocks") / "rank.py"
    script.write_text(RANK)
    argv, port = [sys.executable, str(script), str(EXCHANGES)], free_port()
    with (
        _start(0, port, argv) as zero,
        _start(1, port, rig.time_namespace_argv(OFFSET_NS, argv)) as one,
    ):
        try:
            said = [job.communicate(timeout=120) for job in (zero, one)]
        finally:
            zero.kill()
            one.kill()
    assert (zero.returncode, one.returncode) == (0, 0), said
    return [json.loads(out.splitlines()[-1]) for out, _ in said]


def test_every_exchange_holds_the_true_offset(told: list[dict[str, Any]]) -> None:
    zero, one = told
    assert zero["domain"] != one["domain"]
    assert len(zero["socket"]) >= EXCHANGES
    for offset, bound in zero["socket"] + zero["gloo"]:
        assert abs(offset - OFFSET_NS) <= bound


def test_both_ways_made_as_many_exchanges_as_they_were_to(told: list[dict[str, Any]]) -> None:
    """How much narrower the socket's bound is, benchmarks/exchange.py shows, with its limit."""
    zero, _ = told
    assert len(zero["gloo"]) == EXCHANGES // 10
    assert min(bound for _, bound in zero["socket"] + zero["gloo"]) > 0


def test_the_start_skew_is_true_within_its_bound(told: list[dict[str, Any]]) -> None:
    offset, bound = told[0]["model"]
    shown = told[1]["started"] - offset - told[0]["started"]
    truth = told[1]["started"] - OFFSET_NS - told[0]["started"]
    assert abs(shown - truth) <= bound
