"""Choosing, locking and reading GPUs, through stand-ins of torch and pynvml: no GPU is needed."""

from __future__ import annotations

import dataclasses
import errno
import inspect
import json
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest

from distbench import gpus, nvml
from distbench.errors import UsageError
from distbench.gpus import Device, choose_device, foreign_processes, lock_gpu
from distbench.nvml import nvml_snapshot

REPO = Path(__file__).resolve().parents[2]
CPU = Device("cpu", 0, "", "", "", "")
OLD_DRIVER = (
    "CUDA initialization: The NVIDIA driver on your system is too old (found version 11040). "
    "Please update your GPU driver by downloading a new version. (Triggered internally at x.cpp:1.)"
)


TEXTS = {3: "Not Supported", 9: "Driver Not Loaded", 12: "NVML Shared Library Not Found"}


class NVMLError(Exception):
    """As pynvml's: a number, and its text."""

    def __init__(self, value):
        super().__init__(TEXTS.get(value, f"code {value}"))
        self.value = value


@dataclasses.dataclass
class FakeGpu:
    uuid: str
    bus: str
    name: str = "NVIDIA A30"
    bits: int = 0
    mig: tuple[str, ...] = ()
    processes: tuple[tuple[int, int | None], ...] = ()


class FakeNvml(ModuleType):
    """Answers as pynvml does for the given GPUs.

    ``refuse`` names functions that the driver lacks or denies.
    """

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    def __init__(self, *listed, driver="535.183.01", init=0, refuse=()):
        super().__init__("pynvml")
        self.listed, self.driver, self.init, self.opened = listed, driver, init, 0
        for name in refuse:
            setattr(self, name, self._deny)

    def _deny(self, *args):
        raise NVMLError(3)

    def nvmlInit(self):
        if self.init:
            raise NVMLError(self.init)
        self.opened += 1

    def nvmlShutdown(self):
        self.opened -= 1

    def nvmlSystemGetDriverVersion(self):
        return self.driver.encode()  # as old versions of pynvml do

    def nvmlDeviceGetCount(self):
        return len(self.listed)

    def nvmlDeviceGetHandleByIndex(self, index):
        return self.listed[index]

    def nvmlDeviceGetHandleByUUID(self, uuid):
        for gpu in self.listed:
            if gpu.uuid == uuid:
                return gpu
            if uuid in gpu.mig:
                return SimpleNamespace(uuid=uuid, board=gpu, processes=())
        raise NVMLError(6)

    def nvmlDeviceGetDeviceHandleFromMigDeviceHandle(self, instance):
        return instance.board

    def nvmlDeviceGetUUID(self, handle):
        return handle.uuid

    def nvmlDeviceGetName(self, handle):
        return handle.name

    def nvmlDeviceGetPciInfo(self, handle):
        return SimpleNamespace(busId=handle.bus.encode())

    def nvmlDeviceGetMigMode(self, handle):
        return [int(bool(handle.mig)), 0]

    def nvmlDeviceGetMaxMigDeviceCount(self, handle):
        return 4

    def nvmlDeviceGetMigDeviceHandleByIndex(self, handle, index):
        if index >= len(handle.mig):
            raise NVMLError(6)
        return SimpleNamespace(uuid=handle.mig[index])

    def nvmlDeviceGetVbiosVersion(self, handle):
        return "92.00"

    def nvmlDeviceGetClockInfo(self, handle, kind):
        return {1: 1440, 2: 1215}[kind]

    def nvmlDeviceGetMaxClockInfo(self, handle, kind):
        return {1: 1440, 2: 1215}[kind]

    def nvmlDeviceGetTemperatureV(self, handle, sensor):
        return 41

    def nvmlDeviceGetTemperature(self, handle, sensor):
        return 42

    def nvmlDeviceGetPowerUsage(self, handle):
        return 30_500

    def nvmlDeviceGetEnforcedPowerLimit(self, handle):
        return 165_000

    def nvmlDeviceGetUtilizationRates(self, handle):
        return SimpleNamespace(gpu=7, memory=0)

    def nvmlDeviceGetCurrentClocksEventReasons(self, handle):
        return handle.bits

    def nvmlDeviceGetCurrPcieLinkGeneration(self, handle):
        return 1

    def nvmlDeviceGetMaxPcieLinkGeneration(self, handle):
        return 4

    def nvmlDeviceGetCurrPcieLinkWidth(self, handle):
        return 8

    def nvmlDeviceGetMaxPcieLinkWidth(self, handle):
        return 16

    def nvmlDeviceGetEccMode(self, handle):
        return [1, 0]

    def nvmlDeviceGetPersistenceMode(self, handle):
        return 0

    def nvmlDeviceGetComputeMode(self, handle):
        return 3

    def nvmlDeviceGetMemoryInfo(self, handle):
        return SimpleNamespace(used=5 << 20, total=24 << 30, free=0)

    def nvmlDeviceGetComputeRunningProcesses(self, handle):
        return [SimpleNamespace(pid=p, usedGpuMemory=m) for p, m in handle.processes]


A = FakeGpu("GPU-aaaa1111-0000", "00000000:3B:00.0")
B = FakeGpu("GPU-bbbb2222-0000", "00000000:5E:00.0")


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Return a function that makes this host one with the given torch and NVML."""
    monkeypatch.setattr(gpus, "_PCI", tmp_path / "pci")
    for name in ("CUDA_VISIBLE_DEVICES", "CUDA_DEVICE_ORDER"):
        monkeypatch.delenv(name, raising=False)

    def make(nvml, count=0, *, cuda="12.6", complaint=""):
        def is_available():
            if complaint:
                warnings.warn(complaint, UserWarning, stacklevel=2)
            return count > 0

        # It has nothing that could create a CUDA context: asking for more is an AttributeError.
        torch = ModuleType("torch")
        torch.__version__ = f"2.13.0+{'cu126' if cuda else 'cpu'}"
        torch.version = SimpleNamespace(cuda=cuda)
        torch.cuda = SimpleNamespace(is_available=is_available, device_count=lambda: count)
        monkeypatch.setitem(sys.modules, "torch", torch)
        monkeypatch.setitem(sys.modules, "pynvml", nvml)
        return nvml

    return make


def no_nvml(code=12):
    return FakeNvml(init=code)


def refusal(requested="auto", local_rank=0):
    with pytest.raises(UsageError) as caught:
        choose_device(requested, local_rank)
    sentence = str(caught.value)
    assert os.uname().nodename in sentence
    assert "\n" not in sentence
    return sentence


# Choosing


def test_no_gpu_means_cpu_without_a_note(machine):
    machine(no_nvml())
    assert choose_device("auto", 3) == CPU


def test_no_gpu_is_refused_where_cuda_is_asked_for(machine):
    machine(no_nvml())
    assert "NVML Shared Library Not Found" in refusal("cuda")
    machine(FakeNvml())
    assert "NVML lists none" in refusal("cuda")


def test_pynvml_missing_means_cpu(machine):
    machine(None)  # None in sys.modules makes the import fail
    assert choose_device("auto", 0) == CPU


def test_unknown_device_is_refused(machine):
    with pytest.raises(UsageError, match="--device tpu is unknown"):
        choose_device("tpu", 0)


def test_cpu_by_request_says_what_is_left_unused(machine, monkeypatch):
    machine(FakeNvml(A, driver="470.57"))
    monkeypatch.setitem(sys.modules, "torch", None)  # not even asked
    expected = "CPU by --device cpu, although the host has 1 NVIDIA GPU (driver 470.57)"
    assert choose_device("cpu", 0) == dataclasses.replace(CPU, note=expected)
    machine(no_nvml())
    assert choose_device("cpu", 0) == CPU


def test_gpu_on_the_bus_without_a_driver_is_noted(machine, tmp_path):
    for slot, vendor, kind in (("0", "0x10de", "0x030200"), ("1", "0x1002", "0x030000")):
        folder = tmp_path / "pci" / slot
        folder.mkdir(parents=True)
        (folder / "vendor").write_text(f"{vendor}\n")
        (folder / "class").write_text(f"{kind}\n")
    machine(no_nvml(9))
    expected = "CPU, although the host has 1 NVIDIA GPU (NVML: Driver Not Loaded)"
    assert choose_device("auto", 0).note == expected


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_driver_that_does_not_answer_is_never_a_silent_cpu(machine, requested):
    machine(no_nvml(18))
    sentence = refusal(requested)
    assert "does not answer" in sentence and "--device cpu" in sentence


@pytest.mark.parametrize("requested", ["auto", "cuda"])
@pytest.mark.parametrize(
    ("driver", "cuda", "named", "remedy"),
    [
        ("470.57", "12.6", "built for CUDA 12.6", "update the driver to 525 or newer"),
        ("535.183.01", "13.0", "built for CUDA 13.0", "CUDA 12.x builds (cu126)"),
        ("580.65.06", None, "a CPU-only build", "CUDA 13.x builds (cu130)"),
        ("579.99", None, "a CPU-only build", "CUDA 12.x builds (cu126)"),
        ("524.99", None, "a CPU-only build", "update the driver to 525 or newer"),
        ("580.65.06", "12.6", "built for CUDA 12.6", "the build suits the driver"),
    ],
)
def test_gpu_that_torch_cannot_use(machine, requested, driver, cuda, named, remedy):
    machine(FakeNvml(A, B, driver=driver), cuda=cuda)
    sentence = refusal(requested)
    for part in ("2 NVIDIA GPUs", f"driver {driver}", named, remedy, "or pass --device cpu"):
        assert part in sentence


def test_complaint_of_torch_goes_into_the_sentence_and_nowhere_else(machine):
    machine(FakeNvml(A, driver="470.57"), complaint=OLD_DRIVER)
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        sentence = refusal()
    assert not leaked
    assert "(CUDA initialization: The NVIDIA driver on your system is too old" in sentence
    assert "(found version 11040))" in sentence
    assert "Please" not in sentence and "Triggered" not in sentence


@pytest.mark.parametrize("hidden", ["", "-1", "7", "0,0", "GPU-cccc"])
def test_gpus_hidden_by_the_user_are_named_so(machine, monkeypatch, hidden):
    machine(FakeNvml(A, B))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert "CUDA_VISIBLE_DEVICES hides every GPU" in refusal()


@pytest.mark.parametrize("requested", ["auto", "cuda"])
def test_index_is_the_local_rank(machine, monkeypatch, requested):
    nvml = machine(FakeNvml(B, A), 2)  # NVML out of order: the bus decides
    monkeypatch.setenv("RANK", "7")
    assert choose_device(requested, 0) == Device("cuda", 0, A.uuid, A.name, A.bus, "")
    assert choose_device(requested, 1) == Device("cuda", 1, B.uuid, B.name, B.bus, "")
    assert nvml.opened == 0


def test_one_visible_gpu_has_index_0_for_every_local_rank(machine, monkeypatch):
    machine(FakeNvml(A, B), 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert choose_device("auto", 1) == Device("cuda", 0, B.uuid, B.name, B.bus, "")


def test_more_ranks_than_gpus(machine):
    machine(FakeNvml(A, B), 2)
    sentence = refusal(local_rank=2)
    for part in ("local rank 2", "torch sees 2", "--nproc-per-node 2", "--device cpu"):
        assert part in sentence


@pytest.mark.parametrize(
    ("visible", "uuids"),
    [
        ("1,0", [B, A]),
        ("0, 01", [A, B]),
        ("1,-1,0", [B]),
        ("1,9,0", [B]),
        ("1gpu,0", [B, A]),
        (B.uuid, [B]),
        ("GPU-bbbb,GPU-aaaa", [B, A]),
        ("GPU-bbbb,0", [B]),
    ],
)
def test_visible_devices_are_mapped_to_uuids(machine, monkeypatch, visible, uuids):
    machine(FakeNvml(A, B), len(uuids))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    chosen = [choose_device("auto", rank).uuid for rank in range(len(uuids))]
    assert chosen == [gpu.uuid for gpu in uuids]


def test_gpus_of_several_kinds_need_a_stated_order(machine, monkeypatch):
    small = dataclasses.replace(A, name="NVIDIA T400")
    machine(FakeNvml(small, B), 2)
    assert "CUDA_DEVICE_ORDER=PCI_BUS_ID" in refusal()
    monkeypatch.setenv("CUDA_DEVICE_ORDER", "PCI_BUS_ID")
    assert choose_device("auto", 1).uuid == B.uuid
    monkeypatch.delenv("CUDA_DEVICE_ORDER")
    machine(FakeNvml(small, B), 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", B.uuid)
    assert choose_device("auto", 0).uuid == B.uuid


def test_gpu_that_cannot_be_told_apart_is_noted(machine):
    machine(no_nvml(), 1)
    device = choose_device("auto", 0)
    assert (device.type, device.index, device.uuid) == ("cuda", 0, "")
    assert "no lock guards it" in device.note and "Library Not Found" in device.note
    machine(FakeNvml(A, B), 3)  # they disagree, so neither numbering is trusted
    assert "NVML lists 2 of them, torch 3" in choose_device("auto", 1).note


def test_gpu_fallen_off_the_bus_keeps_its_place(machine):
    class Lost(FakeNvml):
        def nvmlDeviceGetHandleByIndex(self, index):
            if index == 0:
                raise NVMLError(15)
            return super().nvmlDeviceGetHandleByIndex(index)

    machine(Lost(A, B), 2)
    assert choose_device("auto", 0).uuid == ""
    assert choose_device("auto", 1).uuid == B.uuid


def test_mig_instances(machine, monkeypatch):
    whole = dataclasses.replace(A, mig=("MIG-1111", "MIG-2222"))
    machine(FakeNvml(whole), 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-2222")
    assert choose_device("auto", 0) == Device("cuda", 0, "MIG-2222", A.name, A.bus, "")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "2 MIG instances" in refusal()
    machine(FakeNvml(dataclasses.replace(A, mig=("MIG-1111",))), 1)
    assert choose_device("auto", 0).uuid == "MIG-1111"


# Locking

HOLDER = """
import sys
from pathlib import Path
from distbench.gpus import lock_gpu
with lock_gpu(sys.argv[1], Path(sys.argv[2])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Return a process that holds GPU-1 in tmp_path until its input ends."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, "GPU-1", str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.communicate()


def test_two_processes_cannot_hold_one_gpu(holder, tmp_path):
    with pytest.raises(UsageError) as caught, lock_gpu("GPU-1", tmp_path):
        pass
    for part in (os.uname().nodename, "GPU-1", f"pid {holder.pid}", "wait for it or stop it"):
        assert part in str(caught.value)
    with lock_gpu("GPU-2", tmp_path):
        pass
    holder.communicate("")
    with lock_gpu("GPU-1", tmp_path):
        pass


def test_lock_of_a_killed_process_is_free(holder, tmp_path):
    holder.kill()
    holder.wait()
    file = tmp_path / "distbench-gpu-GPU-1.lock"
    assert file.read_text() == f"{holder.pid}\n"
    with lock_gpu("GPU-1", tmp_path):
        assert file.read_text() == f"{os.getpid()}\n"


def test_lock_is_released_on_an_error_and_its_file_stays(tmp_path):
    with pytest.raises(KeyError), lock_gpu("GPU-1", tmp_path):
        raise KeyError
    (file,) = tmp_path.iterdir()
    assert file.read_text() == ""
    assert file.stat().st_mode & 0o777 == 0o666
    with (
        lock_gpu("GPU-1", tmp_path),
        pytest.raises(UsageError, match=f"pid {os.getpid()}"),
        lock_gpu("GPU-1", tmp_path),
    ):
        pass


def test_holder_that_left_no_pid(tmp_path):
    with lock_gpu("GPU-1", tmp_path):
        (tmp_path / "distbench-gpu-GPU-1.lock").write_text("")
        with pytest.raises(UsageError, match="its pid is not known"), lock_gpu("GPU-1", tmp_path):
            pass


FORKED = """
import os, sys
from pathlib import Path
from distbench.gpus import lock_gpu
folder = Path(sys.argv[1])
ours, theirs = os.pipe()
with lock_gpu("GPU-1", folder):
    child = os.fork()
    if child == 0:
        os.close(theirs)
        os.read(ours, 1)
        os._exit(0)
with lock_gpu("GPU-1", folder):
    print("held again")
os.close(theirs)
os.waitpid(child, 0)
"""


def test_lock_is_free_although_a_child_has_the_file_open(tmp_path):
    # In a process of its own: pytest may have threads, which a fork does not survive.
    command = [sys.executable, "-c", FORKED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=REPO, timeout=60)
    assert done.stdout == "held again\n", done.stderr


def test_no_uuid_no_lock(tmp_path):
    with lock_gpu("", tmp_path), lock_gpu("", tmp_path):
        pass
    assert not list(tmp_path.iterdir())


def test_odd_uuid_stays_in_the_folder(tmp_path):
    with lock_gpu("MIG-GPU-1/../2", tmp_path):
        assert [f.name for f in tmp_path.iterdir()] == ["distbench-gpu-MIG-GPU-1____2.lock"]


@pytest.mark.parametrize("kind", ["link", "folder", "pipe"])
def test_what_is_not_a_file_is_refused_and_left_alone(tmp_path, kind):
    path, victim = tmp_path / "distbench-gpu-GPU-1.lock", tmp_path / "victim"
    victim.write_text("precious")
    if kind == "link":
        path.symlink_to(victim)
    elif kind == "folder":
        path.mkdir()
    else:
        os.mkfifo(path)
    with pytest.raises(UsageError, match="cannot be used"), lock_gpu("GPU-1", tmp_path):
        pass
    assert victim.read_text() == "precious"


def test_folder_that_is_missing_is_refused(tmp_path):
    with pytest.raises(UsageError, match="TMPDIR"), lock_gpu("GPU-1", tmp_path / "absent"):
        pass


def test_file_system_without_locks_is_refused(tmp_path, monkeypatch):
    def flock(fd, operation):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(gpus.fcntl, "flock", flock)
    with pytest.raises(UsageError, match="No locks available"), lock_gpu("GPU-1", tmp_path):
        pass


# Reading


def test_snapshot_has_units_and_no_invented_values(machine):
    gpu = dataclasses.replace(A, processes=((11, 3 << 20), (12, None)))
    nvml = machine(FakeNvml(gpu))
    state = nvml_snapshot(A.uuid)
    assert state == json.loads(json.dumps(state))
    assert nvml.opened == 0
    assert state == {
        "available": True,
        "driver_version": "535.183.01",
        "vbios_version": "92.00",
        "sm_clock_hz": 1_440_000_000,
        "memory_clock_hz": 1_215_000_000,
        "max_sm_clock_hz": 1_440_000_000,
        "temperature_c": 41,
        "power_w": 30.5,
        "power_limit_w": 165.0,
        "utilization_gpu_percent": 7,
        "utilization_memory_percent": 0,
        "throttle_reasons": [],
        "pcie_generation": 1,
        "pcie_generation_max": 4,
        "pcie_width": 8,
        "pcie_width_max": 16,
        "ecc_mode": True,
        "persistence_mode": False,
        "compute_mode": "exclusive_process",
        "mig_mode": False,
        "memory_used_bytes": 5 << 20,
        "memory_total_bytes": 24 << 30,
        "compute_processes": [
            {"pid": 11, "memory_bytes": 3 << 20},
            {"pid": 12, "memory_bytes": None},
        ],
        "reasons": {"compute_processes.memory_bytes": "NVML does not tell the memory of a process"},
    }


def test_refused_fields_are_null_with_a_reason(machine):
    refused = ("EccMode", "PowerUsage", "ComputeRunningProcesses", "UtilizationRates")
    machine(FakeNvml(A, refuse=[f"nvmlDeviceGet{name}" for name in refused]))
    state = nvml_snapshot(A.uuid)
    fields = ("ecc_mode", "power_w", "compute_processes", "utilization_gpu_percent")
    for field in (*fields, "utilization_memory_percent"):
        assert state[field] is None
        assert state["reasons"].pop(field) == "NVML refuses it: Not Supported"
    assert not state["reasons"]
    assert state["sm_clock_hz"] == 1_440_000_000
    assert foreign_processes(state, [1], context_open=True) == []


@pytest.mark.parametrize(
    ("bits", "names"),
    [
        (0x1, ["gpu_idle"]),
        (0x2 | 0x4, ["applications_clocks_setting", "sw_power_cap"]),
        (0x8 | 0x40 | 0x80, ["hw_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"]),
        (0x10 | 0x20 | 0x100, ["sync_boost", "sw_thermal_slowdown", "display_clock_setting"]),
        (0x200 | 0x400, ["board_limit", "reliability"]),
        (0x20 | 0x8000, ["sw_thermal_slowdown", "unknown_0x8000"]),
    ],
)
@pytest.mark.parametrize("api", ["new", "old driver", "old pynvml"])
def test_throttle_reasons_of_both_generations(machine, bits, names, api):
    event = "nvmlDeviceGetCurrentClocksEventReasons"
    nvml = FakeNvml(dataclasses.replace(A, bits=bits), refuse=[event] if api != "new" else [])
    if api != "new":
        nvml.nvmlDeviceGetCurrentClocksThrottleReasons = lambda handle: handle.bits
    if api == "old pynvml":
        # A module that never had the new name.
        nvml.__class__ = type("Old", (FakeNvml,), {"__getattribute__": _without(event)})
    machine(nvml)
    state = nvml_snapshot(A.uuid)
    assert state["throttle_reasons"] == names
    assert "throttle_reasons" not in state["reasons"]


def _without(missing):
    def getattribute(self, name):
        if name == missing:
            raise AttributeError(name)
        return ModuleType.__getattribute__(self, name)

    return getattribute


def test_old_driver_has_other_names_for_the_same(machine):
    names = ("nvmlDeviceGetTemperatureV", "nvmlDeviceGetComputeRunningProcesses")
    nvml = FakeNvml(A, refuse=names)
    nvml.nvmlDeviceGetComputeRunningProcesses_v2 = lambda handle: [
        SimpleNamespace(pid=5, usedGpuMemory=1)
    ]
    machine(nvml)
    state = nvml_snapshot(A.uuid)
    assert state["temperature_c"] == 42
    assert state["compute_processes"] == [{"pid": 5, "memory_bytes": 1}]


def test_snapshot_of_a_mig_instance_reads_the_board_too(machine):
    machine(FakeNvml(dataclasses.replace(A, mig=("MIG-1",), bits=4, processes=((9, 1),))))
    state = nvml_snapshot("MIG-1")
    assert state["mig_mode"] is True and state["throttle_reasons"] == ["sw_power_cap"]
    assert state["compute_processes"] == []  # the instance's own, and not the board's


def test_snapshot_without_nvml(machine):
    machine(no_nvml())
    expected = {"available": False, "reason": "NVML: NVML Shared Library Not Found"}
    assert nvml_snapshot(A.uuid) == expected
    machine(None)
    assert "not installed" in nvml_snapshot(A.uuid)["reason"]
    nvml = machine(FakeNvml(A))
    assert nvml_snapshot("GPU-unknown") == {"available": False, "reason": "NVML: code 6"}
    assert nvml.opened == 0
    assert "UUID" in nvml_snapshot("")["reason"]
    assert foreign_processes(nvml_snapshot(""), [1], context_open=True) == []


def seen(*processes):
    return {"compute_processes": [{"pid": pid, "memory_bytes": m} for pid, m in processes]}


@pytest.mark.parametrize(
    ("processes", "context_open", "foreign"),
    [
        ([], True, []),
        ([(100, 5)], True, []),
        ([(100, 5), (9, 7), (8, 1)], True, [8, 9]),  # ours is there, so all others are foreign
        ([(9, 7)], False, [9]),
        ([(9, 7)], True, []),  # a container: the only one must be ours
        ([(7, 1), (9, 7), (8, None)], True, [7, 8]),  # a container: the largest is taken as ours
        ([(7, 1), (9, 7)], False, [7, 9]),
        ([(7, None), (9, None)], True, [9]),
    ],
)
def test_foreign_processes(processes, context_open, foreign):
    snapshot = seen(*processes)
    before = json.dumps(snapshot)
    assert foreign_processes(snapshot, [100, 101], context_open=context_open) == foreign
    assert json.dumps(snapshot) == before


def test_context_is_not_assumed_open():
    assert foreign_processes(seen((9, 7)), {100}) == [9]


# The real modules


def test_every_nvml_name_is_in_the_real_module():
    pynvml = pytest.importorskip("pynvml")
    source = inspect.getsource(gpus) + inspect.getsource(nvml)
    used = set(re.findall(r"\bnvml[A-Z]\w+|(?<=n\.)NVML_\w+", source)) - {
        "nvmlClocksEventReason",
        "nvmlClocksThrottleReason",
    }
    assert len(used) > 25
    assert not {name for name in used if not hasattr(pynvml, name)}
    for bit, name in nvml._REASONS.items():
        camel = "".join(part.capitalize() for part in name.split("_"))
        assert getattr(pynvml, f"nvmlClocksThrottleReason{camel}") == bit
    assert gpus._ABSENT == (
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
    )
    for mode, name in nvml._COMPUTE_MODES.items():
        assert getattr(pynvml, f"NVML_COMPUTEMODE_{name.upper()}") == mode


def test_importing_costs_nothing():
    code = (
        "import sys, distbench.gpus, distbench.environment\n"
        "print([name for name in ('torch', 'pynvml', 'numpy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPO)
    assert done.stdout == "[]\n", done.stderr
