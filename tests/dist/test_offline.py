"""Offline from end to end on gloo ranks: known answers, a quiet window, faults of the model."""

from __future__ import annotations

import builtins
import gc
import inspect
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench.sut import Done, Echo, FromCallable, Sleep
from distbench.verify import verify
from tests.support import run_ranks

pytestmark = pytest.mark.timeout(120)


def _run(out: str, make: Any, **options: Any) -> dict[str, Any]:
    """Run Offline on this rank and return the result with what the SUT itself stamped."""
    from distbench import window
    from distbench.offline import run_offline
    from distbench.world import join

    original = window.window

    def armed_window(loop: Any, sut: Any, *args: Any) -> Any:
        sut.armed = True  # the warm-up is over: what misbehaves may begin to
        return original(loop, sut, *args)

    window.window = armed_window
    with join(device="cpu", timeout_s=30) as world:
        sut = make(world.rank)
        run = run_offline(sut, world, output_dir=out, warmup_s=0.1, **options)
        stamps = getattr(sut, "stamps", [])
        return {"result": run.result(), "stamps": stamps, "folder": str(run.folder or "")}


def _sleep(_rank: int) -> Sleep:
    return Sleep(1_000_000)


def test_sleep_reports_the_throughput_of_its_own_stamps(tmp_path: Path) -> None:
    told = run_ranks(_run_sleep, 2, str(tmp_path), 640)
    result = told[0]["result"]
    assert result == told[1]["result"]
    n = result["metrics"]["throughput"]["n"]
    assert n == 640
    # Own stamps, of the window alone: the last groups of the log, on one clock for both ranks.
    groups = [each["stamps"][-10:] for each in told]
    begin = min(stamps[0][0] for stamps in groups)
    end = max(stamps[-1][1] for stamps in groups)
    own = n / ((end - begin) / 1e9)
    reported = result["metrics"]["throughput"]["value"]
    # The SUT's stamps are inside the loop's; what lies between is the harness and the start.
    lateness = max(result["start"]["lateness_s"])
    slack = 20 * (result["harness"]["cost_per_batch_s"] * 10) + lateness + 0.002
    assert own >= reported
    assert 1 / reported - 1 / own <= slack / n
    assert verify(Path(told[0]["folder"])) == (0, [])


def _run_sleep(out: str, n: int) -> dict[str, Any]:
    return _run(out, _sleep, num_samples=n)


def _run_echo(out: str, n: int, batch: int) -> dict[str, Any]:
    return _run(out, lambda _rank: Echo(), num_samples=n, batch_size=batch)


@pytest.mark.parametrize(("n", "batch"), [(1, 32), (1000, 32), (3, 1), (4096, 64)])
def test_every_sample_is_issued_once_whatever_the_shares(
    tmp_path: Path, n: int, batch: int
) -> None:
    told = run_ranks(_run_echo, min(n, 2), str(tmp_path), n, batch)
    result = told[0]["result"]
    assert result["metrics"]["throughput"]["n"] == n
    assert sum(row["samples"] for row in result["per_rank"]) == n
    assert all(row["pending"] == row["failed"] == 0 for row in result["per_rank"])
    folder = Path(told[0]["folder"])
    index = np.concatenate([np.load(p)[:, 0] for p in sorted(folder.glob("ranks/*/samples.npy"))])
    once = np.random.default_rng(0).permutation(1024)
    np.testing.assert_array_equal(index, once[np.arange(n) % 1024])
    assert verify(folder) == (0, [])


def _spied(out: str) -> dict[str, Any]:
    """Count what happens on the loop's thread between its first and last stamp."""
    import torch.distributed as dist

    from distbench import offline

    calls: list[str] = []
    armed = [False]
    here = threading.get_ident()

    def spy(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            if armed[0] and threading.get_ident() == here:
                calls.append(name)
            return original(*args, **kwargs)

        setattr(owner, name, wrapper)

    for name in ("all_reduce", "broadcast", "barrier", "all_gather", "send", "recv"):
        spy(dist, name)
    spy(builtins, "print")
    spy(builtins, "open")
    spy(logging.Logger, "handle")
    spy(gc, "collect")
    import tqdm

    spy(tqdm.tqdm, "update")
    spy(threading.Event, "wait")
    original_loop = offline.offline_loop
    blocks = []

    def loop(sut: Any, log: Any, groups: Any, collect: Any, now: Any) -> None:
        kept = inspect.getclosurevars(collect).nonlocals["kept"]
        armed[0] = log.capacity == 64_000 // 2
        before = sys.getallocatedblocks()
        original_loop(sut, log, groups, collect, now)
        if armed[0]:
            blocks.append(sys.getallocatedblocks() - before)
            blocks.append(sum(v is not None for v in kept.values()))
        armed[0] = False

    offline.offline_loop = loop
    told = _run(out, lambda _rank: Echo(), num_samples=64_000, batch_size=8, quiet=False)
    return {"calls": calls, "blocks": blocks, "enabled": gc.isenabled(), **told}


def test_the_window_is_quiet_on_the_loops_thread(tmp_path: Path) -> None:
    for told in run_ranks(_spied, 2, str(tmp_path)):
        assert told["calls"] == []
        allocated, kept = told["blocks"]
        assert kept == 256
        # 4,000 groups; only the outputs kept in reserved slots may stay: two blocks each at most.
        assert allocated <= 3 * kept, allocated
        assert told["enabled"], "the garbage collector must be on again"


class Faulty(Echo):
    """Fails in a way of its own at one group of the window."""

    def __init__(self, way: str, rank: int) -> None:
        super().__init__()
        self.way = way if rank == 1 else ""
        self.armed = False

    def poll(self, until_ns: int) -> list[Done]:
        ended = super().poll(until_ns)
        if len(ended) == 0 or ended[0].row != 64 or not self.way or not self.armed:
            return ended
        done = ended[0]
        if self.way == "error":
            return [done._replace(error="out of memory")]
        if self.way == "short":
            return [done._replace(outputs=done.outputs[:-1])]
        if self.way == "nan":
            return [done._replace(outputs=np.full(done.count, np.nan))]
        raise ValueError("the kernel failed")


def _run_faulty(out: str, way: str) -> dict[str, Any]:
    return _run(out, lambda rank: Faulty(way, rank), num_samples=640)


@pytest.mark.parametrize(
    ("way", "code", "word", "failed"),
    [
        ("error", "samples-failed", "out of memory", 32),
        ("short", "samples-failed", "31 outputs for 32 samples", 32),
        ("nan", "outputs-non-finite", "NaN or infinite", 0),
        ("raise", "samples-failed", "ValueError: the kernel failed", 32),
    ],
)
def test_a_model_that_fails_makes_the_run_invalid(
    tmp_path: Path, way: str, code: str, word: str, failed: int
) -> None:
    told = run_ranks(_run_faulty, 2, str(tmp_path), way)
    result = told[0]["result"]
    assert result["verdict"]["status"] == "INVALID"
    found = {f["code"]: f for f in result["verdict"]["findings"] if f["level"] == "invalid"}
    assert code in found, found
    assert found[code]["rank"] == 1
    assert word in found[code]["message"]
    assert result["per_rank"][1]["failed"] == failed
    assert result["per_rank"][0]["failed"] == 0
    assert result["metrics"]["throughput"]["n"] <= 640 - failed
    if way == "raise":
        assert "samples-missing" in found
        assert result["per_rank"][1]["pending"] == 640 // 2 - 96
    assert verify(Path(told[0]["folder"])) == (0, [])


class Scored(Echo):
    """Has a held-out set; in the window rank 1 gives the answers of another sample."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.held_out = np.arange(0, 1024, 2)
        self.wrong = rank == 1
        self.groups = 0

    def score(self, indices: Any, outputs: Any) -> tuple[int, int]:
        return int((np.asarray(outputs) == indices).sum()), len(indices)

    def poll(self, until_ns: int) -> list[Done]:
        self.groups += 1
        return [
            d._replace(outputs=(d.outputs + self.wrong * (d.row >= 5000)) % 1024)
            for d in super().poll(until_ns)
        ]


def _run_scored(out: str) -> dict[str, Any]:
    return _run(out, Scored, num_samples=64_000)


def test_outputs_of_the_window_are_held_against_the_accuracy_pass(tmp_path: Path) -> None:
    result = run_ranks(_run_scored, 2, str(tmp_path))[0]["result"]
    accuracy = result["metrics"]["accuracy"]
    assert (accuracy["value"], accuracy["n"]) == (1.0, 512)
    assert "(512/512)" in accuracy["definition"]
    found = [f for f in result["verdict"]["findings"] if f["code"] == "outputs-differ"]
    assert [f["rank"] for f in found] == [1]


def _late(out: str) -> dict[str, Any]:
    """Hold rank 1 back by 50 ms at its real start."""
    import os
    import time

    from distbench import start

    original, calls = start.wait_until, []

    def wait_until(instant_ns: int, now: Any, spin_ns: int) -> int:
        calls.append(instant_ns)
        if len(set(calls)) > 1 and os.environ["RANK"] == "1":
            time.sleep(max(0.0, (instant_ns - now()) / 1e9) + 0.05)
        return original(instant_ns, now, spin_ns)

    if os.environ["RANK"] == "1":
        agree = start.agree_start

        def agree_start(*args: Any, **kwargs: Any) -> Any:
            start.wait_until = original
            plan = agree(*args, **kwargs)
            start.wait_until = wait_until
            calls.append(-1)
            return plan

        start.agree_start = agree_start
    return _run(out, _sleep, num_samples=640)


def test_a_rank_that_begins_50_ms_late_is_flagged(tmp_path: Path) -> None:
    result = run_ranks(_late, 2, str(tmp_path))[0]["result"]
    assert result["start"]["late_ranks"] == [1]
    assert 0.05 <= result["start"]["skew_s"] < 0.5
    found = {f["code"]: f for f in result["verdict"]["findings"]}
    assert found["start-late"]["level"] == "invalid"  # 50 ms of 0.4 s is above 5 %


def _by_rate(out: str) -> dict[str, Any]:
    return _run(out, lambda rank: Sleep((1 + 2 * rank) * 500_000), duration_s=0.5, shares="rate")


def test_shares_by_rate_follow_the_warm_up_and_are_labelled(tmp_path: Path) -> None:
    result = run_ranks(_by_rate, 2, str(tmp_path))[0]["result"]
    fast, slow = (row["samples"] for row in result["per_rank"])
    assert 2.0 < fast / slow < 4.0
    assert "shares-by-rate" in {f["code"] for f in result["verdict"]["findings"]}


def _callable(out: str) -> dict[str, Any]:
    import torch

    def double(indices: Any) -> Any:
        return torch.from_numpy(indices) * 2

    return _run(out, lambda _rank: FromCallable(double), num_samples=1000)


def test_a_plain_function_is_measured(tmp_path: Path) -> None:
    told = run_ranks(_callable, 2, str(tmp_path))
    assert told[0]["result"]["metrics"]["throughput"]["n"] == 1000


def _unlike(out: str) -> str:
    import os

    from distbench.errors import UsageError

    try:
        _run(out, lambda _rank: Echo(), num_samples=100, seed=int(os.environ["RANK"]))
    except UsageError as error:
        return str(error)
    return "went on"


def test_options_that_differ_between_ranks_are_refused_and_nothing_is_left(tmp_path: Path) -> None:
    for said in run_ranks(_unlike, 2, str(tmp_path)):
        assert "differ in seed" in said and "1 on rank 1" in said
    assert list(tmp_path.iterdir()) == []


def _warm_up_fails(out: str) -> str:
    from distbench.errors import UsageError

    def broken(indices: Any) -> Any:
        raise KeyError("layer4.weight")

    try:
        _run(out, lambda rank: FromCallable(broken if rank else lambda i: i), num_samples=100)
    except UsageError as error:
        return str(error)
    return "went on"


def test_a_model_that_fails_in_warm_up_stops_all_ranks_with_its_sentence(tmp_path: Path) -> None:
    for said in run_ranks(_warm_up_fails, 2, str(tmp_path)):
        assert said.startswith("rank 1 (") and "layer4.weight" in said
    assert list(tmp_path.iterdir()) == []
