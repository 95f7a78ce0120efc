"""Which device a rank runs on, who else is on it, and what NVML says about it.

Nothing here creates a CUDA context: torch is asked only for its number of devices, and a GPU is
told apart through NVML, by UUID. torch and pynvml are imported where they are used.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import socket
import stat
import tempfile
import warnings
from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distbench.errors import UsageError
from distbench.nvml import nvml_sentence, nvml_text, open_nvml

_CUDA_BUILDS = ((580, 13, "cu130"), (525, 12, "cu126"))
"""Oldest driver, CUDA major version it runs, torch build. Source: NVIDIA, CUDA Compatibility,
table "CUDA Toolkit 11.x, 12.x, and 13.x Driver Version Ranges", 2025."""
_PCI = Path("/sys/bus/pci/devices")
_NVIDIA, _DISPLAY_CLASS = "0x10de", "0x03"
_ABSENT = (9, 12)
"""NVML_ERROR_DRIVER_NOT_LOADED, NVML_ERROR_LIBRARY_NOT_FOUND."""


@dataclass(frozen=True)
class Device:
    """What a rank computes on.

    Attributes:
        type: "cpu" or "cuda".
        index: torch's index of the GPU; 0 on a CPU.
        uuid: NVML's name of the GPU or of its MIG instance; empty on a CPU, or where unknown.
        name: e.g. "NVIDIA A30"; empty on a CPU, or where unknown.
        pci_bus_id: e.g. "00000000:3B:00.0"; empty on a CPU, or where unknown.
        note: what a reader of the verdict must know about the choice; mostly empty.
    """

    type: str
    index: int
    uuid: str
    name: str
    pci_bus_id: str
    note: str


@dataclass(frozen=True)
class _Gpu:
    """A GPU as NVML lists it; empty fields where NVML refuses them."""

    uuid: str
    name: str
    pci_bus_id: str
    instances: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Host:
    """What NVML says about this host; ``problem`` is why it says nothing."""

    gpus: tuple[_Gpu, ...]
    driver: str
    problem: str = ""
    broken: bool = False


def choose_device(requested: str, local_rank: int) -> Device:
    """Choose the device of this rank: its own GPU, or the CPU where there is no GPU.

    A GPU that torch cannot use is an error and never a silent CPU. The index is ``local_rank``, or
    0 where the process sees one GPU.

    Args:
        requested: "auto", "cpu" or "cuda".
        local_rank: torchrun's LOCAL_RANK, from 0.

    Returns:
        The device, with a note where its choice needs a word.

    Raises:
        UsageError: a GPU is there but cannot be used, is missing although asked for, or there are
            fewer GPUs than ranks; names the host, versions and the remedy.
    """
    if requested not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--device {requested} is unknown: use auto, cpu or cuda")
    host = _look()
    if requested == "cpu":
        return Device("cpu", 0, "", "", "", _cpu_note("CPU by --device cpu", host))
    count, complaint = _usable_by_torch()
    if count:
        return _pick(host, count, local_rank)
    if host.gpus:
        raise UsageError(_unusable(host, complaint))
    if host.broken:
        raise UsageError(
            f"{socket.gethostname()}: NVIDIA's driver is installed but does not answer "
            f"({host.problem}): repair it (an updated driver needs a reboot), or pass --device cpu"
        )
    if requested == "cuda":
        detail = host.problem or "NVML lists none"
        raise UsageError(
            f"{socket.gethostname()}: --device cuda, but there is no GPU here ({detail}): run on a "
            f"host with a GPU, give the container one, or pass --device cpu"
        )
    return Device("cpu", 0, "", "", "", _cpu_note("CPU", host))


@contextmanager
def lock_gpu(uuid: str, folder: Path | None = None) -> Iterator[None]:
    """Hold the one lock of a GPU on this host, so that two runs cannot share it unnoticed.

    Processes that see different temporary folders (containers) do not exclude each other; for
    them there is ``foreign_processes``. The file stays: removing it would let two owners in.

    Args:
        uuid: of the GPU; nothing is locked where it is empty.
        folder: of the lock file; the system's temporary folder by default.

    Raises:
        UsageError: another process holds the GPU (host, UUID, pid, remedy), or the file cannot be
            opened.
    """
    if not uuid:
        yield
        return
    safe = re.sub(r"[^A-Za-z0-9-]", "_", uuid)
    path = (folder or Path(tempfile.gettempdir())) / f"distbench-gpu-{safe}.lock"
    here = socket.gethostname()
    with ExitStack() as stack:
        try:
            fd = _open_lock(path)
            stack.callback(os.close, fd)
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UsageError(
                f"{here}: GPU {uuid} is in use by another distbench rank ({_holder(fd)}): wait for "
                f"it or stop it, and start at most one rank per GPU"
            ) from None
        except OSError as error:
            raise UsageError(
                f"{here}: the lock file {path} of GPU {uuid} cannot be used ({error.strerror}): "
                f"remove it, or set TMPDIR to a folder that can be written"
            ) from error
        # Explicitly, since a forked child may still have the file open.
        stack.callback(fcntl.flock, fd, fcntl.LOCK_UN)
        stack.callback(_write_pid, fd, "")
        _write_pid(fd, f"{os.getpid()}\n")
        yield


def foreign_processes(
    snapshot: dict[str, Any], own_pids: Collection[int], context_open: bool = False
) -> list[int]:
    """Return the processes on a GPU that are not this run's.

    Inside a container NVML may list the pids of the host, where this process has another number.
    So where this process has a CUDA context and none of its pids is listed, the listed process
    with the most memory is assumed to be it, and only the others are foreign. The assumption hides
    one foreign process where NVML lists no process of the container at all.

    Args:
        snapshot: by ``nvml_snapshot``.
        own_pids: the run's processes, as this process numbers them.
        context_open: this process holds a CUDA context on that GPU now.

    Returns:
        Pids in rising order. Empty also where the snapshot has no processes to tell: then
        ``snapshot.get("compute_processes")`` is None.
    """
    listed = snapshot.get("compute_processes") or []
    foreign = [process for process in listed if process["pid"] not in own_pids]
    if context_open and foreign and len(foreign) == len(listed):
        foreign.remove(max(foreign, key=lambda process: process["memory_bytes"] or 0))
    return sorted({process["pid"] for process in foreign})


def _look() -> _Host:
    """List the host's GPUs in the order of the PCI bus, without touching CUDA."""
    try:
        with open_nvml() as nvml:
            driver = nvml_text(nvml.nvmlSystemGetDriverVersion())
            gpus = [_gpu(nvml, index) for index in range(nvml.nvmlDeviceGetCount())]
    except Exception as error:
        absent = getattr(error, "value", None) in (None, *_ABSENT)
        return _Host((), "", nvml_sentence(error), broken=not absent)
    if all(gpu.pci_bus_id for gpu in gpus):
        gpus.sort(key=lambda gpu: gpu.pci_bus_id)
    return _Host(tuple(gpus), driver)


def _gpu(nvml: Any, index: int) -> _Gpu:
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        uuid = nvml_text(nvml.nvmlDeviceGetUUID(handle))
        name = nvml_text(nvml.nvmlDeviceGetName(handle))
        bus = nvml_text(nvml.nvmlDeviceGetPciInfo(handle).busId)
    except nvml.NVMLError:  # fallen off the bus; its place in the order stays
        return _Gpu("", "", "")
    instances = []
    with suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetMigMode(handle)[0]:
            for number in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
                with suppress(nvml.NVMLError):  # not every number is taken
                    instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, number)
                    instances.append(nvml_text(nvml.nvmlDeviceGetUUID(instance)))
    return _Gpu(uuid, name, bus, tuple(instances))


def _usable_by_torch() -> tuple[int, str]:
    """Return how many GPUs torch can use, and the first sentence of its complaint."""
    import torch  # noqa: PLC0415

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        count = int(torch.cuda.device_count()) if torch.cuda.is_available() else 0
    said = " ".join(str(caught[0].message).split()) if caught else ""
    return count, re.split(r"\.\s|\s\(Triggered", said)[0].rstrip(".")


def _pick(host: _Host, count: int, local_rank: int) -> Device:
    """Return the GPU of a local rank, where torch can use ``count`` of them."""
    here = socket.gethostname()
    index = 0 if count == 1 else local_rank
    if index >= count:
        raise UsageError(
            f"{here}: local rank {local_rank} has no GPU of its own, since torch sees {count}: "
            f"start at most {count} ranks on a host (--nproc-per-node {count}), show the process "
            f"more GPUs (CUDA_VISIBLE_DEVICES), or pass --device cpu"
        )
    ids = _visible_ids()
    numbered = not ids or ids[0].isdigit()
    names = sorted({gpu.name for gpu in host.gpus if gpu.name})
    if numbered and len(names) > 1 and os.environ.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        # CUDA puts the fastest first; only GPUs of one kind are taken to stay in bus order.
        raise UsageError(
            f"{here} has GPUs of several kinds ({', '.join(names)}), which CUDA and NVML number "
            f"differently: set CUDA_DEVICE_ORDER=PCI_BUS_ID on every node"
        )
    visible = _visible(host.gpus, ids)
    if len(visible) != count or not visible[index].uuid:
        reason = host.problem or f"NVML lists {len(visible)} of them, torch {count}"
        note = f"GPU {index} cannot be told apart by UUID ({reason}), so no lock guards it"
        return Device("cuda", index, "", "", "", note)
    gpu = visible[index]
    if len(gpu.instances) > 1:
        raise UsageError(
            f"{here}: GPU {gpu.uuid} is divided into {len(gpu.instances)} MIG instances: name one "
            f"of them in CUDA_VISIBLE_DEVICES by its MIG- UUID"
        )
    uuid = gpu.instances[0] if gpu.instances else gpu.uuid
    return Device("cuda", index, uuid, gpu.name, gpu.pci_bus_id, "")


def _visible_ids() -> list[str] | None:
    """Read CUDA_VISIBLE_DEVICES as CUDA does: up to the first odd entry, nothing if one repeats.

    Returns:
        Numbers, or UUIDs and beginnings of UUIDs; None where the variable is not set.
    """
    value = os.environ.get("CUDA_VISIBLE_DEVICES")
    if value is None:
        return None
    kind = next((kind for kind in ("GPU-", "MIG-") if value.startswith(kind)), "")
    ids: list[str] = []
    for entry in value.split(","):
        found = re.match(rf"{kind}\S*" if kind else r"\+?0*(\d+)", entry.strip())
        if not found:
            break
        ids.append(found[0] if kind else found[1])
    return ids if len(set(ids)) == len(ids) else []


def _visible(gpus: tuple[_Gpu, ...], ids: list[str] | None) -> list[_Gpu]:
    """Return the GPUs that CUDA shows this process, in torch's order."""
    if ids is None:
        return list(gpus)
    shown: list[_Gpu] = []
    for each in ids:
        if each.startswith("MIG-"):
            board = next((gpu for gpu in gpus if each in gpu.instances), _Gpu("", "", ""))
            found = [_Gpu(each, board.name, board.pci_bus_id)]
        elif each.startswith("GPU-"):
            found = [gpu for gpu in gpus if gpu.uuid.startswith(each)]
        else:
            found = list(gpus[int(each) : int(each) + 1])
        if len(found) != 1:
            break
        shown += found
    return shown


def _unusable(host: _Host, complaint: str) -> str:
    """Return the sentence for GPUs that NVML lists and torch cannot use: why, and what to do."""
    import torch  # noqa: PLC0415

    cuda = torch.version.cuda
    made = f"built for CUDA {cuda}" if cuda else "a CPU-only build"
    major = int(found[0]) if (found := re.match(r"\d+", host.driver)) else 0
    runs, tag = next((build[1:] for build in _CUDA_BUILDS if major >= build[0]), (0, ""))
    ids = _visible_ids()
    if cuda and ids is not None and not _visible(host.gpus, ids):
        remedy = "CUDA_VISIBLE_DEVICES hides every GPU, so unset it"
    elif not runs:
        remedy = f"update the driver to {_CUDA_BUILDS[-1][0]} or newer"
    elif not cuda or int(cuda.split(".")[0]) > runs:
        remedy = f"install a torch build that matches the driver: CUDA {runs}.x builds ({tag})"
    else:
        remedy = "the build suits the driver, so check that nvidia-smi and libcuda.so work here"
    return (
        f"{socket.gethostname()} has {_gpus(len(host.gpus))} (driver {host.driver}) that torch "
        f"{torch.__version__} ({made}) cannot use{complaint and f' ({complaint})'}: "
        f"{remedy}, or pass --device cpu"
    )


def _gpus(count: int) -> str:
    return f"{count} NVIDIA GPU{'' if count == 1 else 's'}"


def _cpu_note(choice: str, host: _Host) -> str:
    """Return what to say of a CPU run on a host that has GPUs; empty where it has none."""
    if host.gpus:
        return f"{choice}, although the host has {_gpus(len(host.gpus))} (driver {host.driver})"
    count = 0
    for folder in _PCI.glob("*"):
        with suppress(OSError):
            maker = (folder / "vendor").read_text().strip()
            kind = (folder / "class").read_text()
            count += maker == _NVIDIA and kind.startswith(_DISPLAY_CLASS)
    problem = host.problem or "NVML lists none"
    return f"{choice}, although the host has {_gpus(count)} ({problem})" if count else ""


def _open_lock(path: Path) -> int:
    """Open the lock file, making it if absent; not through a link, and nothing but a file."""
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC
    try:
        fd = os.open(path, flags)  # without O_CREAT, which Linux denies for another user's file
    except FileNotFoundError:
        with suppress(FileExistsError):
            fd = os.open(path, flags | os.O_CREAT | os.O_EXCL, 0o666)
            with suppress(OSError):  # the umask keeps other users out, as they will be told
                os.fchmod(fd, 0o666)
            return fd
        fd = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise OSError(errno.EINVAL, "not a regular file")
    return fd


def _write_pid(fd: int, text: str) -> None:
    with suppress(OSError):  # on a full disk the lock holds without the pid
        os.ftruncate(fd, 0)
        os.pwrite(fd, text.encode(), 0)


def _holder(fd: int) -> str:
    with suppress(OSError, ValueError):
        return f"pid {int(os.pread(fd, 32, 0))}"
    return "its pid is not known"
