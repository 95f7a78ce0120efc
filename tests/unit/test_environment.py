"""What is recorded of a host, and above all what is not."""

from __future__ import annotations

import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

import distbench
from distbench import environment
from distbench.environment import code_version, describe, memory_peak_bytes, schedstat
from distbench.gpus import Device
from distbench.verdict import common_and_rest

REPO = Path(__file__).resolve().parents[2]
CPU = Device("cpu", 0, "", "", "", "")
GPU = Device("cuda", 1, "GPU-1", "NVIDIA A30", "00000000:3B:00.0", "")


class Backend:
    """Settings of a torch backend; reading ``allow_tf32`` warns, or raises, as torch may."""

    def __init__(self, raises=False):
        self.fp32_precision, self.benchmark, self.deterministic = "ieee", False, True
        self.conv, self.raises = SimpleNamespace(fp32_precision="tf32"), raises

    @property
    def allow_tf32(self):
        warnings.warn("use fp32_precision", UserWarning, stacklevel=2)
        if self.raises:
            raise RuntimeError("mix of the old and the new way")
        return True

    @staticmethod
    def version():
        return 91002


def fake_torch(*, nccl=True, raises=False):
    torch = ModuleType("torch")
    torch.__version__ = "2.13.0+cu126"
    torch.version = SimpleNamespace(cuda="12.6", git_version="abc123")
    torch._C = SimpleNamespace(_nccl_version=0) if nccl else SimpleNamespace()
    torch.cuda = SimpleNamespace(
        nccl=SimpleNamespace(version=lambda: (2, 27, 5)),
        is_initialized=lambda: True,
        max_memory_allocated=lambda index: 100 * index,
        max_memory_reserved=lambda index: 200 * index,
    )
    torch.backends = SimpleNamespace(
        cudnn=Backend(raises), cuda=SimpleNamespace(matmul=Backend(raises))
    )
    torch.get_num_threads = torch.get_num_interop_threads = lambda: 4
    torch.get_float32_matmul_precision = lambda: "highest"
    torch.are_deterministic_algorithms_enabled = lambda: False
    return torch


@pytest.fixture
def torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch())
    return sys.modules["torch"]


def check_shape(described):
    """JSON without NaN; a None has a reason, and a reason has a None."""
    json.dumps(described, allow_nan=False)
    missing = {key for key, value in described.items() if value is None}
    gpu = described["gpu"] or {}
    missing |= {f"gpu.{key}" for key, value in gpu.items() if value is None}
    assert missing == set(described["reasons"])
    assert all(described["reasons"].values())


def test_what_is_described(torch):
    described = describe(CPU)
    check_shape(described)
    assert described["hostname"] == os.uname().nodename
    assert described["kernel"] == os.uname().release
    assert described["python_version"] == platform.python_version()
    assert described["distbench_version"] == distbench.__version__
    assert described["torch_version"] == "2.13.0+cu126"
    assert described["torch_git_version"] == "abc123"
    assert described["torch_cuda_version"] == "12.6"
    assert described["cudnn_version"] == 91002
    assert described["nccl_version"] == "2.27.5"
    assert described["torch_num_threads"] == 4
    assert described["cudnn_conv_fp32_precision"] == "tf32"
    assert described["cudnn_allow_tf32"] is True
    assert len(described["load_average"]) == 3
    assert described["memory_total_bytes"] > described["memory_available_bytes"] > 1 << 20
    assert described["steal_jiffies"] >= 0
    assert described["gpu"] is None
    assert described["reasons"]["gpu"] == "the run is on the CPU"


def test_no_secret_gets_in(torch, monkeypatch):
    secrets = (
        *(
            "HF_TOKEN",
            "AWS_SECRET_ACCESS_KEY",
            "AWS_ACCESS_KEY_ID",
            "GITHUB_TOKEN",
            "SSH_AUTH_SOCK",
        ),
        *("NCCL_SECRET", "TORCH_NCCL_TOKEN", "CUDA_PASSWORD", "KUBERNETES_SERVICE_HOST"),
    )
    for name in secrets:
        monkeypatch.setenv(name, f"hush-{name}")
    monkeypatch.setenv("NCCL_SOCKET_IFNAME", "eth1")
    described = describe(CPU)
    text = json.dumps(described)
    assert "hush-" not in text
    assert not [name for name in secrets if name in text]
    assert described["variables"]["NCCL_SOCKET_IFNAME"] == "eth1"
    assert described["container"]["kubernetes"] is True
    assert set(described["variables"]) <= set(environment.VARIABLES)


def test_allow_list_names_no_secret():
    names = environment.VARIABLES
    assert len(set(names)) == len(names)
    words = {word for name in names for word in name.split("_")}
    assert not words & {"TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIALS", "FILE", "HOST", "ADDR"}


def test_nothing_readable_is_no_crash(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(environment, "_PROC", tmp_path)
    monkeypatch.setattr(environment, "_SYS", tmp_path)
    monkeypatch.setattr(environment, "_REPOSITORY", tmp_path)
    described = describe(CPU)
    check_shape(described)
    assert described["memory_total_bytes"] is None
    assert described["numa_nodes"] is None
    assert described["torch_version"] is None
    assert "torch" in described["reasons"]["torch_version"]
    assert "git" in described["reasons"]["git_commit"]
    assert schedstat()[1] == -1
    assert memory_peak_bytes(CPU) is None


def test_files_of_the_kernel_are_read(torch, monkeypatch, tmp_path):
    cpu = tmp_path / "devices/system/cpu"
    for number in (0, 1, 2):
        (cpu / f"cpu{number}/cpufreq").mkdir(parents=True)
        (cpu / f"cpu{number}/topology").mkdir()
        siblings = "0,2\n" if number != 1 else "1\n"
        (cpu / f"cpu{number}/topology/thread_siblings_list").write_text(siblings)
        governor = "powersave\n" if number == 1 else "performance\n"
        (cpu / f"cpu{number}/cpufreq/scaling_governor").write_text(governor)
        package = "-1\n" if number == 2 else f"{number}\n"  # what an offline processor may say
        (cpu / f"cpu{number}/topology/physical_package_id").write_text(package)
    (cpu / "cpu0/cpufreq/cpuinfo_max_freq").write_text("3900000\n")
    for number, texts in enumerate((("1", "Data", "32K"), ("3", "Unified", "35M"))):
        (cpu / f"cpu0/cache/index{number}").mkdir(parents=True)
        for name, text in zip(("level", "type", "size"), texts, strict=True):
            (cpu / f"cpu0/cache/index{number}" / name).write_text(f"{text}\n")
    for node in ("node0", "node1", "power"):
        (tmp_path / "devices/system/node" / node).mkdir(parents=True)
    (tmp_path / "fs/cgroup").mkdir(parents=True)
    (tmp_path / "fs/cgroup/cpu.max").write_text("200000 100000\n")
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: Xeon: the CPU\n")
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemFree: 5 kB\nMemAvailable: 60 kB\n")
    (tmp_path / "stat").write_text("cpu  1 2 3 4 5 6 7 88 9 10\ncpu0 1 2 3\n")
    monkeypatch.setattr(environment, "_SYS", tmp_path)
    monkeypatch.setattr(environment, "_PROC", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {2, 0, 1, 5, 7, 8})
    described = describe(CPU)
    check_shape(described)
    assert described["cpu_affinity"] == "0-2,5,7-8"
    assert described["cpu_governor"] == "performance,powersave"
    assert described["cpu_cores"] == 2
    assert described["cpu_sockets"] == 2
    assert described["cpu_max_hz"] == 3_900_000_000
    assert described["cpu_caches"] == "L1 Data 32K, L3 Unified 35M"
    assert described["numa_nodes"] == 2
    assert described["cgroup_cpu_max"] == "200000 100000"
    assert described["cgroup_memory_max"] is None
    assert described["cpu_model"] == "Xeon: the CPU"
    assert described["memory_total_bytes"] == 100 * 1024
    assert described["memory_available_bytes"] == 60 * 1024
    assert described["steal_jiffies"] == 88


def test_torch_without_nccl_and_with_mixed_settings(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", fake_torch(nccl=False, raises=True))
    described = describe(CPU)
    check_shape(described)
    assert described["reasons"]["nccl_version"] == "this torch has no NCCL"
    assert "mix of the old and the new" in described["reasons"]["cuda_matmul_allow_tf32"]


def test_gpu_is_described(torch, monkeypatch):
    snapshot = dict.fromkeys(environment._GPU_FIELDS, 1) | {"available": True}
    snapshot |= {"vbios_version": None, "reasons": {"vbios_version": "NVML refuses it: no"}}
    snapshot |= {"compute_processes": [{"pid": 1, "memory_bytes": 2}]}
    monkeypatch.setattr(environment, "nvml_snapshot", lambda uuid: snapshot)
    described = describe(GPU)
    check_shape(described)
    gpu = described["gpu"]
    assert (gpu["name"], gpu["uuid"], gpu["pci_bus_id"]) == ("NVIDIA A30", "GPU-1", GPU.pci_bus_id)
    assert gpu["driver_version"] == 1
    assert "compute_processes" not in gpu
    assert described["reasons"]["gpu.vbios_version"] == "NVML refuses it: no"


def test_gpu_without_nvml_is_described(torch, monkeypatch):
    away = {"available": False, "reason": "NVML: away"}
    monkeypatch.setattr(environment, "nvml_snapshot", lambda uuid: away)
    described = describe(Device("cuda", 0, "", "", "", "cannot be told apart"))
    check_shape(described)
    assert described["reasons"]["gpu.driver_version"] == "NVML: away"
    assert described["reasons"]["gpu.uuid"] == "cannot be told apart"


# The checkout


def git(folder, *command):
    identity = ("-c", "user.name=n", "-c", "user.email=e@example.org", "-c", "commit.gpgsign=false")
    done = subprocess.run(
        ["git", *identity, *command], cwd=folder, check=True, capture_output=True, text=True
    )
    return done.stdout.strip()


@pytest.fixture
def checkout(torch, monkeypatch, tmp_path):
    if shutil.which("git") is None:
        pytest.skip("needs git")
    folder = (tmp_path / "checkout").resolve()
    (folder / "distbench").mkdir(parents=True)
    (folder / "distbench/a.py").write_text("1")
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-q", "-m", "m")
    monkeypatch.setattr(environment, "_REPOSITORY", folder)
    return folder


def test_clean_checkout(checkout, monkeypatch):
    monkeypatch.setenv("GIT_DIR", "/nonexistent")  # of somebody else's repository
    (checkout / "results").mkdir()
    (checkout / "results/x").write_text("not the package")
    described = describe(CPU)
    monkeypatch.delenv("GIT_DIR")
    assert described["git_commit"] == git(checkout, "rev-parse", "HEAD")
    assert described["git_dirty"] is False
    assert code_version() == {
        "distbench_version": distbench.__version__,
        "git_commit": described["git_commit"],
    }


@pytest.mark.parametrize("file", ["a.py", "new.py"])
def test_dirty_checkout(checkout, file):
    (checkout / "distbench" / file).write_text("2")
    assert describe(CPU)["git_dirty"] is True


def test_folder_inside_somebody_elses_checkout(checkout, monkeypatch):
    inside = checkout / "venv"
    inside.mkdir()
    monkeypatch.setattr(environment, "_REPOSITORY", inside)
    described = describe(CPU)
    assert described["git_commit"] is None and described["git_dirty"] is None
    assert code_version()["git_commit"] is None
    assert "not run from a checkout" in described["reasons"]["git_dirty"]


def test_git_that_is_missing_or_hangs(checkout, monkeypatch):
    def run(command, **options):
        assert isinstance(command, list) and options["timeout"] == 5
        raise subprocess.TimeoutExpired(command, 5)

    monkeypatch.setattr(subprocess, "run", run)
    assert describe(CPU)["reasons"]["git_commit"] == "git did not answer within 5 s"
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setenv("PATH", "/nonexistent")
    assert describe(CPU)["reasons"]["git_commit"] == "git is not installed"


# Comparing


def test_common_is_lifted_and_the_rest_stays():
    first = {
        "os": "x",
        "rank": 0,
        "gpu": {"name": "A30", "uuid": "a"},
        "same": {"k": [1]},
        "only": 1,
    }
    second = {"os": "x", "rank": 1, "gpu": {"name": "A30", "uuid": "b"}, "same": {"k": [1]}}
    assert common_and_rest([first, second]) == (
        {"os": "x", "gpu": {"name": "A30"}, "same": {"k": [1]}},
        [{"rank": 0, "gpu": {"uuid": "a"}, "only": 1}, {"rank": 1, "gpu": {"uuid": "b"}}],
    )


def test_true_is_not_one():
    assert common_and_rest([{"a": 1}, {"a": True}]) == ({}, [{"a": 1}, {"a": True}])


def test_ends_of_the_range():
    assert common_and_rest([]) == ({}, [])
    assert common_and_rest([{"a": 1, "b": {}}]) == ({"a": 1, "b": {}}, [{}])


def overlay(common, rest):
    merged = dict(common)
    for key, value in rest.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = overlay(merged[key], value) if both else value
    return merged


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 2) | st.sampled_from("ab"),
    lambda inner: st.dictionaries(st.sampled_from("xyz"), inner, max_size=3) | st.lists(inner),
    max_leaves=6,
)


@given(st.lists(st.dictionaries(st.sampled_from("pqr"), VALUES, max_size=3), max_size=4))
def test_laid_over_each_other_they_give_the_description_again(descriptions):
    common, rest = common_and_rest(descriptions)
    again = [overlay(common, its) for its in rest]
    assert json.dumps(again, sort_keys=True) == json.dumps(descriptions, sort_keys=True)


# Counters


def test_schedstat_is_of_this_thread():
    switches, delay_ns = schedstat()
    assert 0 <= switches <= resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw
    assert delay_ns >= -1
    again = schedstat()
    assert again[0] >= switches and again[1] >= delay_ns


def test_schedstat_takes_the_second_field(monkeypatch, tmp_path):
    (tmp_path / "thread-self").mkdir()
    (tmp_path / "thread-self/schedstat").write_text("123456 789 42\n")
    monkeypatch.setattr(environment, "_PROC", tmp_path)
    assert schedstat()[1] == 789


def test_memory_peak_of_a_cpu_run_is_this_process_and_not_its_parent():
    ballast = bytearray(256 << 20)
    ballast[::4096] = b"x" * len(ballast[::4096])  # resident
    code = (
        "from distbench.environment import memory_peak_bytes\n"
        "from distbench.gpus import Device\n"
        "cpu = Device('cpu', 0, '', '', '', '')\n"
        "before = memory_peak_bytes(cpu)\n"
        "ballast = bytearray(b'x') * (64 << 20)\n"
        "del ballast\n"
        "print(before, memory_peak_bytes(cpu))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    before, after = map(int, done.stdout.split())
    assert 1 << 20 < before < 128 << 20
    assert after - before > 48 << 20
    assert memory_peak_bytes(CPU) > 256 << 20


def test_memory_peak_of_a_gpu_run(torch):
    assert memory_peak_bytes(GPU) == 200
    torch.cuda.max_memory_allocated = torch.cuda.max_memory_reserved = lambda index: 0
    assert memory_peak_bytes(GPU) is None  # an engine with an allocator of its own
    torch.cuda.is_initialized = lambda: False
    assert memory_peak_bytes(GPU) is None


def test_memory_peak_is_in_bytes(monkeypatch, tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "self/status").write_text("VmPeak:\t 999 kB\nVmHWM:\t    7 kB\nVmRSS:\t 5 kB\n")
    monkeypatch.setattr(environment, "_PROC", tmp_path)
    assert memory_peak_bytes(CPU) == 7 * 1024
