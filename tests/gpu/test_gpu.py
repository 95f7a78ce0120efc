"""What only a real GPU can show: the engine's answers, its times, NCCL, the lock, a whole run.

The whole runs come first, while this process has no CUDA context that they would find beside them.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from distbench.clock import now_ns
from distbench.engines.eager import EagerOnCpu, EagerOnGpu
from distbench.finish import alike
from distbench.gpus import choose_device, lock_gpu
from distbench.models.digits_net import build_net, read_data
from distbench.models.resnet50 import build as build_resnet50
from distbench.models.resnet50 import load_net
from distbench.offline import offline_loop
from distbench.prepare import ALL_COLUMNS, groups_of
from distbench.samples import SampleLog
from distbench.sut import FOREVER, collector, run_indices
from tests.support import run_module, run_ranks


def _cuda() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that is too old is no error of these tests
        return torch.cuda.is_available()


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _cuda(), reason="no CUDA device"),
    pytest.mark.timeout(300),
]

GPU = torch.device("cuda", 0)
OFFLINE = ("distbench.offline", "--device", "cuda")


def _samples() -> torch.Tensor:
    return torch.from_numpy(read_data().images)


def _on_gpu(batch: int, width: int = 32, depth: int = 3) -> EagerOnGpu:
    net, _ = build_net(width, depth)
    return EagerOnGpu(net.to(GPU), _samples(), batch, GPU)


def test_offline_on_the_gpu_gives_accuracy_and_is_verified(tmp_path: Path) -> None:
    done = run_module(*OFFLINE, "--duration", "1s", "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "result.json").read_bytes())
    # The trained network gets all 360 right on a CPU; TF32 may turn a sample on the edge.
    assert result["metrics"]["accuracy"]["n"] == 360
    assert result["metrics"]["accuracy"]["value"] >= 357 / 360
    assert result["metrics"]["device.p50"]["value"] > 0
    (row,) = result["per_rank"]
    assert 0 < row["metrics"]["device_busy"] <= 1
    assert row["failed"] == row["pending"] == 0
    check = run_module("distbench.verify", str(folder))
    assert (check.returncode, check.stdout) == (0, f"{folder}: good\n")


def test_a_gpu_in_use_is_refused_to_a_second_run(tmp_path: Path) -> None:
    uuid = choose_device("cuda", 0).uuid
    if not uuid:
        pytest.skip("this GPU has no UUID to lock")
    with lock_gpu(uuid):
        done = run_module(*OFFLINE, "--num-samples", "1", "--output-dir", str(tmp_path))
    assert done.returncode == 2
    assert f"GPU {uuid} is in use by another distbench rank" in done.stderr
    assert list(tmp_path.iterdir()) == []


def _gather_over_nccl() -> tuple[str, np.ndarray, np.ndarray, np.ndarray]:
    import torch.distributed as dist

    from distbench.world import join

    rows = np.random.default_rng(0).integers(-(2**63), 2**63 - 1, (100_003, 8), np.int64)
    with join(backend="nccl", device="cuda", timeout_s=60) as world:
        (gathered,) = world.gather_rows(rows)
        # A rank's own rows need not travel: these do go through NCCL.
        moved = torch.from_numpy(rows).to(GPU)
        dist.broadcast(moved, group=world.data, group_src=0)
        return world.backend, rows, gathered, moved.cpu().numpy()


def test_nccl_carries_int64_rows_exactly_at_world_size_1() -> None:
    backend, rows, gathered, moved = run_ranks(_gather_over_nccl, 1, timeout_s=120)[0]
    assert backend == "nccl"
    np.testing.assert_array_equal(gathered, rows)
    np.testing.assert_array_equal(moved, rows)


def test_logits_are_those_of_the_cpu() -> None:
    sut = _on_gpu(batch=128)
    reference = EagerOnCpu(build_net()[0], _samples())
    indices = np.arange(sut.total)[::-1].copy()  # 1,797: the last group is not full
    ours, truth = (run_indices(each, indices, 128) for each in (sut, reference))
    different = [i for i, pair in enumerate(zip(ours, truth, strict=True)) if not alike(*pair)]
    assert different == []


@pytest.mark.parametrize(
    ("dtype", "within"), [("fp32", 1e-3), ("tf32", 2e-2), ("bf16", 2e-2), ("fp16", 2e-2)]
)
def test_resnet50_gives_the_logits_of_the_cpu_in_every_dtype(dtype: str, within: float) -> None:
    device = choose_device("cuda", 0)
    if dtype == "tf32" and torch.cuda.get_device_capability(0) < (8, 0):
        pytest.skip("this GPU has no TF32")
    sut: Any = build_resnet50(device, 4, dtype=dtype, samples=4)
    assert isinstance(sut, EagerOnGpu)
    assert sut.module.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    reference, _ = load_net(torch.device("cpu"))
    # The weights were drawn on the GPU, whose generator is another: those of the GPU for both.
    reference.load_state_dict({k: v.float().cpu() for k, v in sut.module.state_dict().items()})
    indices = np.arange(4)
    ours, truth = (
        np.stack(run_indices(each, indices, 4))
        for each in (sut, EagerOnCpu(reference, sut.samples))
    )
    assert ours.dtype == np.float32
    assert np.abs(ours - truth).max() <= within * np.abs(truth).max()


def test_two_groups_are_in_flight_and_end_in_order() -> None:
    batch = 1024
    sut = _on_gpu(batch, width=256, depth=16)  # 1 TFLOP a group: milliseconds on any GPU
    assert sut.depth == 2
    groups = list(groups_of(np.arange(2 * batch) % sut.total, batch))
    for warm in (False, True):
        for row, indices in groups:
            sut.issue(row, indices)
        ended = [*sut.poll(0)]
        # The first time around the host loads and chooses kernels while the GPU may well end.
        assert not (warm and ended), "issue must not wait for the GPU"
        if warm:
            with pytest.raises(IndexError):
                sut.issue(2 * batch, groups[0][1])
        ended += [done for _ in groups for done in sut.poll(FOREVER)]
        assert [(done.row, done.count) for done in ended] == [(0, batch), (batch, batch)]
        assert sut.poll(FOREVER) == []


@pytest.mark.parametrize(("width", "batch"), [(32, 1), (32, 256), (256, 256)])
def test_device_times_do_not_overlap_and_fit_into_the_time_on_the_host(
    width: int, batch: int
) -> None:
    sut = _on_gpu(batch, width)
    order = np.arange(200 * batch) % sut.total
    errors: list[str] = []
    for _ in range(2):
        log = SampleLog.in_memory(len(order), ALL_COLUMNS)
        begin = now_ns()
        offline_loop(sut, log, groups_of(order, batch), collector(log, {}, errors, now_ns), now_ns)
        wall_ns = now_ns() - begin
    assert errors == []
    device = log.device[::batch]
    assert (device > 0).all()
    assert device.sum() <= wall_ns


def test_outputs_are_on_the_host_and_stay_as_they_were() -> None:
    batch = 64
    sut = _on_gpu(batch)
    reference = EagerOnCpu(build_net()[0], _samples())
    kept: list[tuple[int, Any, Any]] = []
    order = np.random.default_rng(0).integers(0, sut.total, 20 * batch)
    flying = 0
    for row, indices in groups_of(order, batch):
        sut.issue(row, indices)
        flying += 1
        if flying == sut.depth:
            kept += [(d.row, d.outputs, np.array(d.outputs)) for d in sut.poll(FOREVER)]
            flying -= 1
    while flying:
        kept += [(d.row, d.outputs, np.array(d.outputs)) for d in sut.poll(FOREVER)]
        flying -= 1
    truth = run_indices(reference, order, batch)
    assert [row for row, _, _ in kept] == list(range(0, len(order), batch))
    for row, outputs, at_once in kept:
        assert isinstance(outputs, np.ndarray)
        np.testing.assert_array_equal(outputs, at_once)
        assert all(map(alike, outputs, truth[row : row + batch]))
