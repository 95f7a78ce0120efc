"""Runs of LoadGen's in result directories, their logs made up, for submission trees."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from distbench.models.digits_data import read_data
from distbench.official import Official, settled
from distbench.run import RankRecord
from distbench.suite import BENCHMARKS

from .dispatched import dispatched, store
from .synthetic import GPU as GPU_STATE

N = 60
TOTAL = {"digits": 1797, "resnet50": 1024}
ENVIRONMENT = {
    "os": "Debian GNU/Linux 12",
    "kernel": "6.1.0",
    "cpu_model": "Xeon Gold 6248R",
    "cpu_sockets": 2,
    "cpu_cores": 48,
    "cpu_max_hz": 4_000_000_000,
    "cpu_caches": "L1 Data 32K, L2 Unified 1024K",
    "memory_total_bytes": 1536 << 30,
    "python_version": "3.11.9",
    "numpy_version": "2.4.6",
    "distbench_version": "0.1.0",
    "git_commit": "ab" * 20,
    "git_dirty": False,
    "torch_version": "2.13.0+cu126",
    "torch_cuda_version": "12.6",
    "cudnn_version": 91002,
    "nccl_version": "2.27.5",
    "gpu": None,
}
GPU = {
    "name": "NVIDIA A30",
    "memory_total_bytes": 24 << 30,
    "max_sm_clock_hz": 1_440_000_000,
    "pcie_generation_max": 4,
    "pcie_width_max": 16,
    "driver_version": "550.54.15",
}


def entry(key: str, value: Any, error: bool = False) -> str:
    marks = {"is_error": error, "is_warning": False}
    return ":::MLLOG " + json.dumps({"key": key, "value": value, "metadata": marks}) + "\n"


def keys_of(official: Mapping[str, Any]) -> dict[str, Any]:
    """Return the detail log of a run that LoadGen calls VALID."""
    seeds, offline = official["seeds"], official["scenario"] == "offline"
    keys = {
        "effective_scenario": "Offline" if offline else "Server",
        "result_validity": "VALID",
        "result_query_count": 1 if offline else N,
        "result_samples_per_second": 1000.0,
        "result_completed_samples_per_sec": 199.5,
        "result_min_duration_met": True,
        "result_min_queries_met": True,
        "early_stopping_met": True,
        "effective_min_query_count": 1,
        "effective_samples_per_query": 24_576,
        "effective_target_latency_ns": 15_000_000,
        "effective_min_duration_ms": official["min_duration_ns"] // 1_000_000,
        "effective_target_qps": official["target_qps"],
        "effective_performance_sample_count": official["resident"],
        "result_99.00_percentile_latency_ns": 7_000_000,
        "result_max_latency_ns": official["min_duration_ns"] + 1,
    }
    return keys | {f"effective_{name}_rng_seed": seed for name, seed in seeds.items()}


def answers() -> str:
    """Return LoadGen's log of answers to all digits, all of them right; about 120 kB."""
    lines = [
        f'{{ "seq_id" : {k}, "qsl_idx" : {k}, "data" : "{int(label):02x}{"00" * 7}" }}'
        for k, label in enumerate(read_data().labels)
    ]
    return "[\n" + ",\n".join(lines) + "\n]\n"


def stored(
    folder: Path,
    scenario: str = "offline",
    mode: str = "performance",
    *,
    benchmark: str = "digits",
    rules: str = "mlperf-v5.0,shortened=2s",
    gpus: int = 0,
    asked: Mapping[str, Any] = {},
    keys: Mapping[str, Any] = {},
    environment: Mapping[str, Any] = {},
    model: Mapping[str, Any] = {},
    errors: tuple[str, ...] = (),
    index: int | None = None,
) -> Path:
    """Store a run over two hosts.

    Args:
        folder: the result directory, whose name is the run's.
        scenario: "offline" or "server".
        mode: "performance", "accuracy" or "compliance".
        benchmark: "digits" or "resnet50".
        rules: as ``--rules`` takes them.
        gpus: 1, where each rank computes on one.
        asked: what is otherwise in the plan.
        keys: what is otherwise in LoadGen's detail log.
        environment: what is otherwise in the ranks' environment.
        model: what is otherwise in rank.json's model.
        errors: of LoadGen's.
        index: sample that is issued alone; None: one after the other.
    """
    bench = BENCHMARKS[benchmark]
    plain = "performance" if mode == "compliance" else mode
    official = settled(
        Official(scenario, plain, benchmark, rules), TOTAL[benchmark], TOTAL[benchmark], [900.0]
    )
    official |= {"network": False, "model": bench.model, "mode": mode, **asked}
    made = dispatched(N)
    assert made.driver is not None and made.driver.after is not None
    records = [
        _rank(each, folder.name, official, gpus, environment, model) for each in made.present
    ]
    before = made.driver.before | {"run_id": folder.name, "scenario": scenario, "replicas": 2}
    before |= {"distbench": "0.1.0", "python": "3.11.9"}
    after = made.driver.after | {"loadgen": {}}
    logs = folder / "loadgen"
    logs.mkdir(parents=True)
    (logs / "user.conf").write_text(official["conf"])
    (logs / "mlperf_log_summary.txt").write_text(f"summary of {folder.name}\n")
    detail = [entry(key, value) for key, value in (keys_of(official) | dict(keys)).items()]
    detail += [entry("error_runtime", text, error=True) for text in errors]
    (logs / "mlperf_log_detail.txt").write_text("".join(detail))
    (logs / "mlperf_log_accuracy.json").write_text(answers() if mode != "performance" else "[\n]\n")
    if index is not None:
        assert made.driver.rows is not None
        made.driver.rows[:, before["columns"].index("index")] = index
    driver = replace(made.driver, before=before, after=after)
    return store(folder, replace(made, records=tuple(records), driver=driver))


def _rank(
    record: RankRecord,
    run_id: str,
    official: dict[str, Any],
    gpus: int,
    environment: Mapping[str, Any],
    model: Mapping[str, Any],
) -> RankRecord:
    own = ENVIRONMENT | {"hostname": record.host, **environment}
    device = {"type": "cpu", "index": 0, "uuid": "", "name": "", "pci_bus_id": "", "note": ""}
    if gpus:
        own["gpu"] = GPU | {"uuid": f"GPU-{record.rank}"}
        device |= {"type": "cuda", "uuid": f"GPU-{record.rank}", "name": "NVIDIA A30"}
    before = record.before | {
        "run_id": run_id,
        "scenario": official["scenario"],
        "official": official,
        "rules": official["round"],
        "environment": own,
        "device": device,
        "gpu_before": GPU_STATE if gpus else None,
        "command": f"torchrun --nnodes 2 --nproc-per-node 1 -m distbench.mlperf --name {run_id}",
        "model": {"name": official["model"], "digest": "sha256:abcd", "dtype": "fp32", **model}
        | {"total": official["total"], "depth": 1},
    }
    return replace(record, before=before)
