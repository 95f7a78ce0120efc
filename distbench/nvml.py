"""What NVML says about a GPU: state, limits, and who computes on it. pynvml is imported on use."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

_REASONS = {
    0x001: "gpu_idle",
    0x002: "applications_clocks_setting",
    0x004: "sw_power_cap",
    0x008: "hw_slowdown",
    0x010: "sync_boost",
    0x020: "sw_thermal_slowdown",
    0x040: "hw_thermal_slowdown",
    0x080: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
"""NVML's bits of nvmlClocksEventReason*, of old nvmlClocksThrottleReason*: the same bits."""
_REASONS_NAMES = (
    "nvmlDeviceGetCurrentClocksEventReasons",
    "nvmlDeviceGetCurrentClocksThrottleReasons",
)
_TEMPERATURE_NAMES = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetTemperature")
_PROCESSES_NAMES = (
    "nvmlDeviceGetComputeRunningProcesses",
    "nvmlDeviceGetComputeRunningProcesses_v2",
)
"""Newest name first: which one works depends on the driver as well as on pynvml."""
_COMPUTE_MODES = {0: "default", 1: "exclusive_thread", 2: "prohibited", 3: "exclusive_process"}


def nvml_snapshot(uuid: str) -> dict[str, Any]:
    """Read a GPU's state from NVML.

    Clocks in Hz, temperature in degrees C, power in W, memory in bytes, utilization in percent of
    NVML's last sampling period, PCIe width in lanes. Of a MIG instance, all but the memory and the
    processes is its whole board's. Memory in use includes what the driver reserves.

    Args:
        uuid: of a GPU or MIG instance.

    Returns:
        JSON-able; ``available`` False with a ``reason`` where NVML cannot be asked. A field that
        NVML refuses is None, with its sentence in ``reasons``.
    """
    if not uuid:
        return {"available": False, "reason": "the UUID of the GPU is not known"}
    try:
        with open_nvml() as nvml:
            handle = nvml.nvmlDeviceGetHandleByUUID(uuid)
            board = handle
            if uuid.startswith("MIG-"):
                board = nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle)
            state: dict[str, Any] = {"available": True}
            reasons: dict[str, str] = {}
            for fields, subject in ((_BOARD_FIELDS, board), (_OWN_FIELDS, handle)):
                for field, read in fields.items():
                    try:
                        state[field] = read(nvml, subject)
                    except Exception as error:  # a run never ends because a reading failed
                        state[field] = None
                        reasons[field] = f"NVML refuses it: {error}"
    except Exception as error:
        return {"available": False, "reason": nvml_sentence(error)}
    if any(process["memory_bytes"] is None for process in state["compute_processes"] or ()):
        reasons["compute_processes.memory_bytes"] = "NVML does not tell the memory of a process"
    return {**state, "reasons": reasons}


@contextmanager
def open_nvml() -> Iterator[Any]:
    """Open NVML; yields the module ``pynvml``. Raises ImportError or its NVMLError."""
    import pynvml  # noqa: PLC0415

    pynvml.nvmlInit()
    try:
        yield pynvml
    finally:
        with suppress(pynvml.NVMLError):
            pynvml.nvmlShutdown()


def nvml_sentence(error: Exception) -> str:
    """Say why NVML cannot be used."""
    if isinstance(error, ImportError):
        return "the module pynvml (nvidia-ml-py) is not installed"
    return f"NVML: {error}"


def nvml_text(value: Any) -> str:
    """Return a text of NVML, which old versions of pynvml give as bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def _first(names: Sequence[str], nvml: Any, handle: Any, *args: Any) -> Any:
    """Call the first of one function's names that both pynvml and the driver know."""
    known = [name for name in names if hasattr(nvml, name)] or names
    for name in known[:-1]:
        with suppress(Exception):
            return getattr(nvml, name)(handle, *args)
    return getattr(nvml, known[-1])(handle, *args)


def _throttle_reasons(nvml: Any, board: Any) -> list[str]:
    bits = _first(_REASONS_NAMES, nvml, board)
    known = [name for bit, name in _REASONS.items() if bits & bit]
    rest = bits & ~sum(_REASONS)
    return [*known, f"unknown_{rest:#x}"] if rest else known


def _processes(nvml: Any, handle: Any) -> list[dict[str, Any]]:
    listed = _first(_PROCESSES_NAMES, nvml, handle)
    return [{"pid": each.pid, "memory_bytes": each.usedGpuMemory} for each in listed]


_Read = Callable[[Any, Any], Any]
_BOARD_FIELDS: dict[str, _Read] = {
    "driver_version": lambda n, _: nvml_text(n.nvmlSystemGetDriverVersion()),
    "vbios_version": lambda n, b: nvml_text(n.nvmlDeviceGetVbiosVersion(b)),
    "sm_clock_hz": lambda n, b: n.nvmlDeviceGetClockInfo(b, n.NVML_CLOCK_SM) * 1_000_000,
    "memory_clock_hz": lambda n, b: n.nvmlDeviceGetClockInfo(b, n.NVML_CLOCK_MEM) * 1_000_000,
    "max_sm_clock_hz": lambda n, b: n.nvmlDeviceGetMaxClockInfo(b, n.NVML_CLOCK_SM) * 1_000_000,
    "temperature_c": lambda n, b: _first(_TEMPERATURE_NAMES, n, b, n.NVML_TEMPERATURE_GPU),
    "power_w": lambda n, b: n.nvmlDeviceGetPowerUsage(b) / 1000,
    "power_limit_w": lambda n, b: n.nvmlDeviceGetEnforcedPowerLimit(b) / 1000,
    "utilization_gpu_percent": lambda n, b: n.nvmlDeviceGetUtilizationRates(b).gpu,
    "utilization_memory_percent": lambda n, b: n.nvmlDeviceGetUtilizationRates(b).memory,
    "throttle_reasons": _throttle_reasons,
    "pcie_generation": lambda n, b: n.nvmlDeviceGetCurrPcieLinkGeneration(b),
    "pcie_generation_max": lambda n, b: n.nvmlDeviceGetMaxPcieLinkGeneration(b),
    "pcie_width": lambda n, b: n.nvmlDeviceGetCurrPcieLinkWidth(b),
    "pcie_width_max": lambda n, b: n.nvmlDeviceGetMaxPcieLinkWidth(b),
    "ecc_mode": lambda n, b: bool(n.nvmlDeviceGetEccMode(b)[0]),
    "persistence_mode": lambda n, b: bool(n.nvmlDeviceGetPersistenceMode(b)),
    "compute_mode": lambda n, b: _COMPUTE_MODES[n.nvmlDeviceGetComputeMode(b)],
    "mig_mode": lambda n, b: bool(n.nvmlDeviceGetMigMode(b)[0]),
}
"""Read of the whole board, each with pynvml and its handle."""
_OWN_FIELDS: dict[str, _Read] = {
    "memory_used_bytes": lambda n, h: n.nvmlDeviceGetMemoryInfo(h).used,
    "memory_total_bytes": lambda n, h: n.nvmlDeviceGetMemoryInfo(h).total,
    "compute_processes": _processes,
}
"""Read of the GPU or MIG instance that the rank uses."""
