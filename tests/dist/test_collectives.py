"""Collectives on gloo ranks: figures, results that are checked, refusals, ranks that are lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distbench.operations import OPERATIONS, Part
from distbench.samples import SampleLog
from distbench.verify import verify
from tests.support import environment, run_ranks
from tests.unit.fabrics import table

pytestmark = pytest.mark.timeout(120)
SLOW = pytest.mark.slow
SIZES = (8, 1 << 16)


def _measured(out: str, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """Measure on this rank; what would pickle, or warns, raises."""
    import torch.distributed as dist

    from distbench.collectives import run_collectives
    from distbench.world import join

    def never(*_arguments: Any) -> Any:
        raise AssertionError("an object was to be pickled")

    dist.distributed_c10d._object_to_tensor = never
    dist.distributed_c10d._tensor_to_object = never
    warnings.simplefilter("error")
    with join(device="cpu", timeout_s=30) as world:
        run = run_collectives(world, output_dir=out, **options)
        return run.result(), str(run.folder or "")


def test_every_operation_is_right_and_its_figures_come_from_the_files(tmp_path: Path) -> None:
    options = {"sizes": SIZES, "duration_s": 0.04, "repetitions": 12}
    told = run_ranks(_measured, 2, str(tmp_path), options)
    (result, folder), (other, _) = told
    assert result == other
    assert verify(Path(folder)) == (0, [])
    rows = table(result)
    assert [(row["operation"], row["bytes"]) for row in rows] == [
        (name, size) for name in OPERATIONS for size in SIZES
    ]
    for row in rows:
        assert row["wrong"] == 0 and row["checked"] > 0
        assert row["repetitions"] + row["late"] == 12
        assert 9 <= row["blocks"] <= 30
        if row["time"] is not None:
            assert 1e-6 < row["time"] < 1
            factor = OPERATIONS[row["operation"]].factor(2)
            assert row["busbw"] == pytest.approx(factor * row["bytes"] / row["time"])
    codes = {each["code"] for each in result["verdict"]["findings"]}
    assert not codes & {"collective-wrong", "samples-missing", "samples-failed"}
    told = result["window"]["transport"]
    assert [each["backend"] for each in told] == ["gloo", "gloo"] and told[0]["interface"]


def _wrong(out: str) -> tuple[dict[str, Any], str]:
    import torch.distributed as dist

    true = dist.all_reduce

    def injected(tensor: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        done = true(tensor, *arguments, **options)
        if dist.get_rank() == 1 and tensor.dtype == torch.float32 and len(tensor) == 256:
            tensor[17] += 1
        return done

    dist.all_reduce = injected
    options = {"operations": ["all_reduce"], "sizes": [8, 1024], "duration_s": 0.02}
    return _measured(out, options | {"repetitions": 10})


def test_a_wrong_reduction_on_one_rank_is_caught(tmp_path: Path) -> None:
    (result, folder), _ = run_ranks(_wrong, 2, str(tmp_path))
    assert [row["wrong"] for row in table(result)] == [0, 1]
    found = [each for each in result["verdict"]["findings"] if each["code"] == "collective-wrong"]
    assert [(each["level"], each["rank"], each["value"]) for each in found] == [("invalid", 1, 1)]
    assert result["verdict"]["status"] == "INVALID"
    assert verify(Path(folder)) == (0, [])


def _two_clocks(out: str) -> tuple[dict[str, Any], str]:
    from distbench import seating
    from distbench.clock import SkewedClock, now_ns
    from distbench.collectives import run_collectives
    from distbench.world import join

    clock = now_ns
    if os.environ["RANK"] == "1":
        clock = SkewedClock(now_ns, 7_000_000_000, 50.0, now_ns())  # type: ignore[assignment]
        seating.clock_domain = lambda: "another/1"
    with join(device="cpu", timeout_s=30, now=clock) as world:
        run = run_collectives(
            world, operations=["all_reduce"], sizes=[1 << 16], duration_s=0.1, output_dir=out
        )
        return run.result(), str(run.folder or "")


def test_ranks_with_clocks_of_their_own_begin_together(tmp_path: Path) -> None:
    """Rank 1's clock is 7 s ahead and 50 ppm fast: nothing of that is in a figure."""
    (result, folder), _ = run_ranks(_two_clocks, 2, str(tmp_path))
    (row,) = table(result)
    assert row["wrong"] == 0 and row["repetitions"] + row["late"] >= 10
    assert 0 < row["clock_bound"] < 1e-3
    for name in ("time", "p50"):
        assert row[name] is None or 1e-6 < row[name] < 1
    assert verify(Path(folder)) == (0, [])


# NCCL's own words


@pytest.mark.parametrize("told", [True, False])
def test_the_way_is_read_from_what_nccl_logs_in_a_child(
    told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distbench import probe
    from distbench.network import Interface

    asked: dict[str, str] = {}

    def child(_world: Any, backend: str, more: dict[str, str]) -> str:
        asked.update(more)
        assert backend == "nccl"
        if told:
            line = "h:1:9 [0] NCCL INFO Channel 00/0 : 0[0] -> 1[0] [send] via NET/Socket/0\n"
            Path(more["NCCL_DEBUG_FILE"]).write_text(line)
        return "" if told else "rank 0 (h), exit status 1: NCCL WARN broken"

    monkeypatch.setattr(probe, "probe_collectives", child)
    world = Fake(0)
    world.backend, world.interface = "nccl", Interface("eth0", "192.0.2.1", "")  # type: ignore[attr-defined]
    found = probe.transport(world)  # type: ignore[arg-type]
    assert asked["NCCL_DEBUG"] == "INFO"
    assert (found["backend"], found["interface"], found["address"]) == ("nccl", "eth0", "192.0.2.1")
    ways = [{"source": 0, "target": 1, "via": "NET/Socket/0", "channels": 1}]
    assert found["nccl"]["ways"] == (ways if told else [])
    assert found["reason"] == (
        "" if told else "NCCL's log names no way: rank 0 (h), exit status 1: NCCL WARN broken"
    )


# The check itself, without other ranks


class Fake:
    """A world of two ranks of which this is one."""

    world_size, backend, data = 2, "gloo", None

    def __init__(self, rank: int) -> None:
        self.rank = rank


def exact(name: str, elements: int, dtype: str, rank: int, salt: int) -> torch.Tensor:
    """Return what an operation of two ranks must leave on one, worked out element by element."""
    from distbench.operations import contents

    whole = elements * (2 if OPERATIONS[name].shared else 1)
    own = [contents(each, 2, dtype, salt, 0, whole) for each in range(2)]
    left = {
        "all_reduce": own[0] + own[1],
        "all_gather": np.concatenate([each[:elements] for each in own]),
        "reduce_scatter": (own[0] + own[1])[rank * elements : (rank + 1) * elements],
        "broadcast": own[0],
        "send_recv": own[1 - rank],
    }
    return torch.from_numpy(left[name])


@pytest.mark.parametrize("dtype", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", list(OPERATIONS))
def test_each_wrong_element_counts_and_no_right_one(
    name: str, rank: int, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from distbench import tensors

    made: list[torch.Tensor] = []
    monkeypatch.setattr(
        tensors, "_bound", lambda _name, _send, recv, _world: lambda: made.append(recv)
    )
    call = tensors.build(Part(name, 0, 40_001), dtype, Fake(rank))  # type: ignore[arg-type]
    call.fill(3)
    call.run()
    recv = made[0]
    if name != "broadcast" or rank:
        checked, wrong = call.check(3, 1)
        assert checked == len(recv) and wrong > 0.4 * checked, "what was there before"
    recv.copy_(exact(name, 40_001, dtype, rank, 3))
    assert call.check(3, 1) == (len(recv), 0)
    recv[0], recv[-1], recv[20_000] = -5, float("nan"), -7
    assert call.check(3, 1)[1] == 3
    recv.copy_(exact(name, 40_001, dtype, rank, 4))
    assert call.check(3, 1)[1] > 0.4 * len(recv), "another cell's"
    recv.copy_(exact(name, 40_001, dtype, rank, 3).roll(1))
    assert call.check(3, 1)[1] > 0.4 * len(recv), "shifted"
    call.reset()
    if name == "all_reduce":
        assert call.check(3, 2) == (0, 0), "summed twice in place, it is in no exact range"


def test_no_memory_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    from distbench import tensors
    from distbench.errors import UsageError

    def none(*_arguments: Any, **_options: Any) -> Any:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp] you tried to allocate 4 bytes\nand so")

    monkeypatch.setattr(tensors.torch, "zeros", none)
    with pytest.raises(UsageError, match=r"no memory for all_reduce of 8 B on cpu: give smaller"):
        tensors.build(Part("all_reduce", 8, 2), "fp32", Fake(0))  # type: ignore[arg-type]


# The loop


class Cuda:
    """Stands for torch.cuda: events take the clock when they are waited for."""

    def __init__(self, clock: Clock) -> None:
        self.clock = clock

    def Event(self, enable_timing: bool) -> Event:  # noqa: N802  torch's name
        return Event(self.clock, enable_timing)


class Event:
    def __init__(self, clock: Clock, timed: bool) -> None:
        self.clock, self.timed, self.at = clock, timed, -1

    def record(self) -> None:
        self.at = max(self.clock.device, self.clock.host)

    def synchronize(self) -> None:
        self.clock.host = max(self.clock.host, self.at)

    def elapsed_time(self, other: Event) -> float:
        assert self.timed and other.timed
        return (other.at - self.at) / 1e6


class Clock:
    """A host and a device: a call costs the host 1 us, the device 100 us behind those before."""

    def __init__(self) -> None:
        self.host, self.device, self.events = 0, 0, list[str]()

    def now(self) -> int:
        return self.host

    def wait(self, at: int) -> None:
        self.events.append("wait")
        self.host = max(self.host, at)

    def run(self) -> None:
        self.events.append("run")
        self.device = max(self.device, self.host) + 100_000
        self.host += 1_000

    def reset(self) -> None:
        self.events.append("reset")


@pytest.mark.parametrize("timed", [True, False])
@pytest.mark.parametrize("blocks", [1, 2])
def test_on_a_gpu_a_block_ends_when_its_stream_does(timed: bool, blocks: int) -> None:
    """Three launches of 1 us from 1 ms on: the device ends 300 us after, and so does the block.

    The second one follows it at once, or waits for its own instant.
    """
    from distbench.collectives import timed_loop
    from distbench.fabric_window import COLUMNS
    from distbench.tensors import Call, CudaMarks

    clock = Clock()
    log = SampleLog.in_memory(2, COLUMNS)
    log.scheduled[:] = [1_000_000, 2_000_000]
    call = Call(clock.run, clock.reset, lambda _salt: None, lambda _salt, _runs: (0, 0))
    marks = CudaMarks(Cuda(clock), timed=timed)
    timed_loop(log, range(2), call, blocks, 3, marks, clock.wait, clock.now)
    second = 2_000_000 if blocks == 1 else 1_300_000
    assert log.issued.tolist() == [1_000_000, second]
    assert log.completed.tolist() == [1_300_000, second + 300_000]
    assert log.device.tolist() == [300_000 * timed] * 2
    runs = ["run"] * 3
    wanted = ["reset", "wait", *runs, *(["reset", "wait"] if blocks == 1 else []), *runs]
    assert clock.events == wanted
    assert log.ended == [2]


# Refusals and losses


def _refused(out: str, by_rank: list[dict[str, Any]]) -> str:
    from distbench.errors import UsageError
    from distbench.world import join

    with pytest.raises(UsageError) as caught, join(device="cpu", timeout_s=30) as world:
        from distbench.collectives import run_collectives

        run_collectives(world, output_dir=out, **by_rank[world.rank])
    return str(caught.value)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"dtype": "fp16"}, "the ranks differ in --dtype (options)"),
        pytest.param({"sizes": [8, 16]}, "the ranks differ in --sizes (options)", marks=SLOW),
        pytest.param(
            {"operations": ["broadcast"]}, "the ranks differ in --operations (options)", marks=SLOW
        ),
    ],
)
def test_ranks_that_are_asked_for_different_things_are_refused(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    same = {"operations": ["all_reduce"], "sizes": [8]}
    told = run_ranks(_refused, 2, str(tmp_path), [same, same | change])
    assert all(words in each for each in told), told
    assert [*tmp_path.iterdir()] == []


def test_one_rank_is_refused(tmp_path: Path) -> None:
    (told,) = run_ranks(_refused, 1, str(tmp_path), [{}])
    assert "one rank has nobody to talk to: start two or more" in told
    assert [*tmp_path.iterdir()] == []


def test_help_names_the_options_without_torch() -> None:
    code = "import sys; from distbench.collectives import main\ntry: main(['--help'])\n"
    code += "finally: assert 'torch' not in sys.modules"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True, text=True, env=environment(), timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for name in ("--operations", "--sizes", "--dtype", "--repetitions", "256 MiB"):
        assert name in done.stdout


def _killed(out: str) -> None:
    """Rank 1 dies in the third cell of its window, while rank 0 waits for it in a broadcast."""
    from distbench import fabric_window

    true, begun = fabric_window.timed_loop, [0]

    def timed_loop(log: SampleLog, *arguments: Any) -> None:
        begun[0] += bool(log._files) and os.environ["RANK"] == "1"
        if begun[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        true(log, *arguments)

    fabric_window.timed_loop = timed_loop
    _measured(out, {"operations": ["broadcast"], "sizes": [8, 1024], "duration_s": 0.2})


def test_a_rank_killed_in_the_window_is_named_and_the_others_samples_stay(tmp_path: Path) -> None:
    told = run_ranks(_killed, 2, str(tmp_path), allow_exit=(0, 1))
    assert told == [6, -signal.SIGKILL]
    (folder,) = tmp_path.iterdir()
    text = (folder / "report.txt").read_text()
    assert text.startswith("MEASUREMENT INCOMPLETE")
    assert "rank 1 (" in text and "was lost" in text
    rows = np.load(folder / "ranks" / "00000" / "samples.npy")
    assert ((rows[:, 3] > 0) == (rows[:, 0] < 2)).all(), "both cells of 8 B, and no other"
    assert verify(folder)[0] == 6


def _full(out: str) -> str:
    from distbench.errors import UsageError

    real = os.posix_fallocate

    def refused(fd: int, offset: int, length: int) -> None:
        if os.environ["RANK"] == "1":
            raise OSError(28, "No space left on device")
        real(fd, offset, length)

    os.posix_fallocate = refused
    with pytest.raises(UsageError) as caught:
        _measured(out, {"operations": ["broadcast"], "sizes": [8], "duration_s": 0.02})
    return str(caught.value)


def test_a_full_disk_on_one_rank_stops_all_before_the_window(tmp_path: Path) -> None:
    told = run_ranks(_full, 2, str(tmp_path))
    assert told[0] == told[1] and "has no room for" in told[0] and "rank 1 (" in told[0]
    assert [*tmp_path.iterdir()] == []


# For the record


def _fitted(out: str) -> tuple[dict[str, Any], str]:
    sizes = [1 << power for power in range(16, 25, 2)]
    return _measured(out, {"operations": ["all_reduce"], "sizes": sizes, "duration_s": 1.0})


@SLOW
def test_times_above_64_kib_are_a_line(tmp_path: Path) -> None:
    (result, _), _ = run_ranks(_fitted, 2, str(tmp_path))
    (row,) = table(result, "fit")
    assert row["sizes"] == 5 and row["r2"] > 0.98, row


def _three(out: str) -> tuple[dict[str, Any], str]:
    return _measured(out, {"sizes": [100, 4096], "duration_s": 0.05, "repetitions": 10})


@SLOW
def test_three_ranks_and_a_size_that_no_rank_divides(tmp_path: Path) -> None:
    (result, folder), *_ = run_ranks(_three, 3, str(tmp_path))
    assert all(row["wrong"] == 0 and row["checked"] for row in table(result))
    assert [row["bytes"] for row in table(result)][:4] == [100, 4096, 96, 4092]
    assert verify(Path(folder)) == (0, [])
