"""What a reader needs to repeat a run: the host, the versions, the settings, the GPU's state.

By allow-list only: of the environment variables just those in ``VARIABLES`` are recorded, so no
secret can get into a record. Whatever cannot be read is None, with its reason: never 0, never a
guess. torch and pynvml are imported where they are used.
"""

from __future__ import annotations

import json
import os
import platform
import socket
import subprocess
import warnings
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import distbench
from distbench import waiting
from distbench.nvml import nvml_snapshot

if TYPE_CHECKING:
    from distbench.gpus import Device

VARIABLES = (
    *("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER", "CUDA_LAUNCH_BLOCKING", "CUDA_MODULE_LOADING"),
    *("CUDA_DEVICE_MAX_CONNECTIONS", "CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
    *("OMP_NUM_THREADS", "OMP_PROC_BIND", "OMP_PLACES", "MKL_NUM_THREADS", "KMP_AFFINITY"),
    *("NCCL_ALGO", "NCCL_BUFFSIZE", "NCCL_CROSS_NIC", "NCCL_DEBUG", "NCCL_IB_DISABLE"),
    *("NCCL_IB_GID_INDEX", "NCCL_IB_HCA", "NCCL_MAX_NCHANNELS", "NCCL_MIN_NCHANNELS"),
    *("NCCL_NET", "NCCL_NET_GDR_LEVEL", "NCCL_NSOCKS_PERTHREAD", "NCCL_NTHREADS"),
    *("NCCL_P2P_DISABLE", "NCCL_P2P_LEVEL", "NCCL_PROTO", "NCCL_SHM_DISABLE"),
    *("NCCL_SOCKET_FAMILY", "NCCL_SOCKET_IFNAME", "NCCL_SOCKET_NTHREADS"),
    *("NCCL_COLLNET_ENABLE", "NCCL_CUMEM_ENABLE", "NCCL_IB_QPS_PER_CONNECTION", "NCCL_IB_SL"),
    *("NCCL_IB_TC", "NCCL_IB_TIMEOUT", "NCCL_LAUNCH_MODE", "NCCL_MAX_CTAS", "NCCL_MIN_CTAS"),
    *("NCCL_NET_GDR_READ", "NCCL_NET_PLUGIN", "NCCL_NVLS_ENABLE", "NCCL_P2P_NET_CHUNKSIZE"),
    *("NCCL_PXN_DISABLE", "NCCL_TUNER_PLUGIN"),
    *("GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME"),
    *("TORCH_NCCL_ASYNC_ERROR_HANDLING", "TORCH_NCCL_AVOID_RECORD_STREAMS"),
    *("TORCH_NCCL_BLOCKING_WAIT", "TORCH_NCCL_CUDA_EVENT_CACHE", "TORCH_NCCL_ENABLE_MONITORING"),
    *("TORCH_NCCL_ENABLE_TIMING", "TORCH_NCCL_HIGH_PRIORITY", "TORCH_NCCL_USE_COMM_NONBLOCKING"),
    *("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_NVML_BASED_CUDA_CHECK"),
    *("TORCH_ALLOW_TF32_CUBLAS_OVERRIDE", "TORCH_CUDNN_V8_API_DISABLED"),
    *("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE"),
)
"""The environment variables that are recorded, where they are set."""

_PROC, _SYS = Path("/proc"), Path("/sys")
_REPOSITORY = Path(__file__).resolve().parent.parent
_GIT_TIMEOUT_S = 5.0
_GPU_FIELDS = (
    *("driver_version", "vbios_version", "power_limit_w", "max_sm_clock_hz", "memory_total_bytes"),
    *("pcie_generation", "pcie_generation_max", "pcie_width", "pcie_width_max"),
    *("ecc_mode", "persistence_mode", "compute_mode", "mig_mode"),
)
"""What ``describe`` takes from ``nvml_snapshot``."""


def describe(device: Device) -> dict[str, Any]:
    """Describe this process, its host, software and GPU. Never raises.

    Args:
        device: that the rank computes on.

    Returns:
        JSON-able. Sizes in bytes, ``steal_jiffies`` since boot, ``load_average`` over 1, 5 and 15
        minutes, ``cpu_affinity`` in the kernel's list format ("0-7,16"). A field that cannot be
        read is None, with its sentence in ``reasons``.
    """
    values: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's advice on settings that are only read here
        for field, read in _FIELDS.items():
            try:
                values[field] = read()
            except _UnknownError as error:
                values[field], reasons[field] = None, str(error)
            except Exception as error:  # a description is never worth a run
                values[field], reasons[field] = None, f"{type(error).__name__}: {error}"[:200]
    values["gpu"], gpu_reasons = _describe_gpu(device)
    return {**values, "reasons": reasons | gpu_reasons}


def schedstat() -> tuple[int, int]:
    """Return what the scheduler has done to the calling thread; see ``waiting.schedstat``."""
    return waiting.schedstat(_PROC)


def memory_peak_bytes(device: Device) -> int | None:
    """Return the most memory that this process has had so far, in bytes; None where unknown.

    On a GPU: what torch's allocator took from the driver, without the CUDA context and what
    libraries allocate themselves. None before torch has allocated anything there, since an engine
    with an allocator of its own leaves torch's count at 0. On a CPU: the peak resident set
    (VmHWM), and not ``ru_maxrss``, which begins at the peak of the process that started this one.
    """
    try:
        if device.type == "cuda":
            import torch  # noqa: PLC0415

            if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
                return None
            allocated = torch.cuda.max_memory_allocated(device.index)
            return max(int(allocated), int(torch.cuda.max_memory_reserved(device.index))) or None
        status = (_PROC / "self/status").read_text()
        return int(status.split("VmHWM:", 1)[1].split(maxsplit=1)[0]) * 1024
    except (OSError, RuntimeError, ValueError, IndexError):
        return None


class _UnknownError(Exception):
    """A field of the description is not known; the message says why."""


def _describe_gpu(device: Device) -> tuple[dict[str, Any] | None, dict[str, str]]:
    """Return the GPU's fields, and the reasons of those that are None."""
    if device.type != "cuda":
        return None, {"gpu": "the run is on the CPU"}
    gpu: dict[str, Any] = {
        "name": device.name or None,
        "uuid": device.uuid or None,
        "pci_bus_id": device.pci_bus_id or None,
    }
    reason = device.note or "NVML does not tell it"
    reasons = {f"gpu.{field}": reason for field, value in gpu.items() if value is None}
    snapshot = nvml_snapshot(device.uuid)
    refused = snapshot.get("reasons", {})
    for field in _GPU_FIELDS:
        gpu[field] = snapshot.get(field)
        if gpu[field] is None:
            reasons[f"gpu.{field}"] = refused.get(field) or snapshot.get("reason", "unknown")
    return gpu, reasons


def _known(value: Any, reason: str) -> Any:
    if value is None or value == "":
        raise _UnknownError(reason)
    return value


def _container() -> dict[str, bool]:
    return {
        "dockerenv": Path("/.dockerenv").exists(),
        "containerenv": Path("/run/.containerenv").exists(),
        "kubernetes": "KUBERNETES_SERVICE_HOST" in os.environ,
    }


def _cpu_model() -> str:
    for line in (_PROC / "cpuinfo").read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    raise _UnknownError("/proc/cpuinfo names no model")


def _cpu_cores() -> int:
    siblings = (_SYS / "devices/system/cpu").glob("cpu[0-9]*/topology/thread_siblings_list")
    return int(_known(len({file.read_text() for file in siblings}) or None, "no topology in /sys"))


def _cpu_sockets() -> int:
    packages = (_SYS / "devices/system/cpu").glob("cpu[0-9]*/topology/physical_package_id")
    found = {text for text in (file.read_text().strip() for file in packages) if text != "-1"}
    return int(_known(len(found) or None, "no topology in /sys"))


def _cpu_max_hz() -> int:
    file = _SYS / "devices/system/cpu/cpu0/cpufreq/cpuinfo_max_freq"
    try:
        return int(file.read_text()) * 1000
    except OSError:
        raise _UnknownError("no cpufreq here, as in most virtual machines") from None


def _cpu_caches() -> str:
    """Return the caches of one processor, e.g. "L1 Data 32K, L2 Unified 512K"."""
    found = []
    for cache in sorted((_SYS / "devices/system/cpu/cpu0/cache").glob("index[0-9]*")):
        level, kind, size = (
            (cache / name).read_text().strip() for name in ("level", "type", "size")
        )
        found.append(f"L{level} {kind} {size}")
    return str(_known(", ".join(found), "no caches in /sys"))


def _affinity() -> str:
    """Return the processors this process may use, e.g. "0-7,16"."""
    spans: list[list[int]] = []
    for cpu in sorted(os.sched_getaffinity(0)):
        if spans and spans[-1][1] == cpu - 1:
            spans[-1][1] = cpu
        else:
            spans.append([cpu, cpu])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in spans)


def _governor() -> str:
    cpus, found = _SYS / "devices/system/cpu", set()
    for cpu in os.sched_getaffinity(0):
        with suppress(OSError):
            found.add((cpus / f"cpu{cpu}/cpufreq/scaling_governor").read_text().strip())
    return str(_known(",".join(sorted(found)), "no cpufreq here, as in most virtual machines"))


def _numa_nodes() -> int:
    found = len(list((_SYS / "devices/system/node").glob("node[0-9]*")))
    return int(_known(found or None, "the kernel shows no NUMA nodes"))


def _cgroup(file: str) -> str:
    try:
        return (_SYS / "fs/cgroup" / file).read_text().strip()
    except OSError:
        raise _UnknownError("no cgroup v2 limit is to be seen from here") from None


def _memory(key: str) -> int:
    for line in (_PROC / "meminfo").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise _UnknownError(f"/proc/meminfo has no {key}")


def _steal_jiffies() -> int:
    return int((_PROC / "stat").read_text().split("\n", 1)[0].split()[8])


def _torch() -> Any:
    import torch  # noqa: PLC0415

    return torch


def _nccl_version() -> str:
    torch = _torch()
    if not hasattr(torch._C, "_nccl_version"):
        raise _UnknownError("this torch has no NCCL")
    return ".".join(map(str, torch.cuda.nccl.version()))


def _git(*command: str) -> str:
    """Run git on the folder that distbench lies in, and return its output."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", *command],
            cwd=_REPOSITORY,
            env={**clean, "LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=_GIT_TIMEOUT_S,
            check=False,
        )
    except FileNotFoundError:
        raise _UnknownError("git is not installed") from None
    except subprocess.TimeoutExpired:
        raise _UnknownError(f"git did not answer within {_GIT_TIMEOUT_S:g} s") from None
    if done.returncode:
        raise _UnknownError("distbench does not lie in a git checkout that git can read")
    return done.stdout.strip()


def _built() -> dict[str, Any] | None:
    """Return what the launcher wrote into the wheel of which this is; None for any other."""
    info = _REPOSITORY / f"distbench-{distbench.__version__}.dist-info" / "built.json"
    try:
        found = json.loads(info.read_bytes())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _git_commit() -> str:
    built = _built()
    if built is not None:
        return str(_known(built.get("git_commit"), "it was deployed from no git checkout"))
    if Path(_git("rev-parse", "--show-toplevel")) != _REPOSITORY:
        raise _UnknownError("distbench is installed, not run from a checkout of its own")
    return _git("rev-parse", "--verify", "HEAD")


def code_version() -> dict[str, str | None]:
    """Return which distbench this is: its version, and its commit if it comes from a checkout."""
    commit = None
    with suppress(_UnknownError):
        commit = _git_commit()
    return {"distbench_version": distbench.__version__, "git_commit": commit}


def _git_dirty() -> bool:
    """Tell whether the package differs from the commit, files that git does not know included."""
    _git_commit()
    built = _built()
    if built is not None:
        return bool(built.get("git_dirty"))
    return bool(_git("status", "--porcelain", "--", "distbench"))


_FIELDS: dict[str, Callable[[], Any]] = {
    "hostname": socket.gethostname,
    "os": lambda: platform.freedesktop_os_release()["PRETTY_NAME"],
    "kernel": platform.release,
    "machine": platform.machine,
    "container": _container,
    "cpu_model": _cpu_model,
    "cpu_cores": _cpu_cores,
    "cpu_threads": os.cpu_count,
    "cpu_sockets": _cpu_sockets,
    "cpu_max_hz": _cpu_max_hz,
    "cpu_caches": _cpu_caches,
    "cpu_affinity": _affinity,
    "cpu_governor": _governor,
    "cgroup_cpu_max": lambda: _cgroup("cpu.max"),
    "cgroup_memory_max": lambda: _cgroup("memory.max"),
    "numa_nodes": _numa_nodes,
    "memory_total_bytes": lambda: _memory("MemTotal"),
    "memory_available_bytes": lambda: _memory("MemAvailable"),
    "load_average": lambda: list(os.getloadavg()),
    "steal_jiffies": _steal_jiffies,
    "python_version": platform.python_version,
    "numpy_version": lambda: version("numpy"),
    "distbench_version": lambda: distbench.__version__,
    "git_commit": _git_commit,
    "git_dirty": _git_dirty,
    "torch_version": lambda: str(_torch().__version__),
    "torch_git_version": lambda: _known(_torch().version.git_version, "torch does not tell it"),
    "torch_cuda_version": lambda: _known(_torch().version.cuda, "a build of torch without CUDA"),
    "cudnn_version": lambda: _known(_torch().backends.cudnn.version(), "this torch has no cuDNN"),
    "nccl_version": _nccl_version,
    "torch_num_threads": lambda: _torch().get_num_threads(),
    "torch_num_interop_threads": lambda: _torch().get_num_interop_threads(),
    "float32_matmul_precision": lambda: _torch().get_float32_matmul_precision(),
    "cuda_matmul_fp32_precision": lambda: _torch().backends.cuda.matmul.fp32_precision,
    "cudnn_conv_fp32_precision": lambda: _torch().backends.cudnn.conv.fp32_precision,
    "cuda_matmul_allow_tf32": lambda: _torch().backends.cuda.matmul.allow_tf32,
    "cudnn_allow_tf32": lambda: _torch().backends.cudnn.allow_tf32,
    "cudnn_benchmark": lambda: _torch().backends.cudnn.benchmark,
    "cudnn_deterministic": lambda: _torch().backends.cudnn.deterministic,
    "deterministic_algorithms": lambda: _torch().are_deterministic_algorithms_enabled(),
    "variables": lambda: {name: os.environ[name] for name in VARIABLES if name in os.environ},
}
