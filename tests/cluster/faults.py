"""Harm in the middle of a two-host run, and what is seen of it afterwards.

Used by the tests, once each, and by benchmarks/faults.py, over and over. Every run is of the Sleep
SUT on jw2 (rank 0) and jw3 (rank 1), started by the launcher on jw1.
"""

from __future__ import annotations

import base64
import io
import json
import os
import random
import shlex
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.cluster.ssh_rig import HOME, SshHosts, base_python
from tests.support import REPO

COMMON = ("--hosts", "jw2,jw3", "--env", f"PYTHONPATH={REPO}")
OFFLINE = ("--", "-m", "distbench.offline")
SLEEP = ("--model", "sleep,per_sample=1ms", "--batch-size", "8", "--warmup", "200ms")
RANKS = {"jw2": 0, "jw3": 1}
END_S = 45.0
"""Longer than any fault may take to its end: 6 s until it is noticed, 20 s, and the fetching."""
IMAGE = "cut"
"""Where jw1 mounts what had reached a disk."""

FAULTY = """
import os, resource, time
from distbench.sut import Sleep

class Faulty(Sleep):
    def poll(self, until_ns):
        if os.path.exists("harm"):
            with open("harm") as file:
                kind = file.read()
            if kind == "hang":
                time.sleep(600)
            if kind == "memory":
                taken = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
                resource.setrlimit(resource.RLIMIT_AS, (taken + (256 << 20),) * 2)
                kept = []
                while True:
                    kept.append(bytearray(16 << 20))
        return super().poll(until_ns)

def make(world):
    return Faulty(1_000_000)
"""
MODEL = ("--model", "faulty:make", "--batch-size", "8", "--warmup", "200ms")


@dataclass(frozen=True)
class Fault:
    """One kind of harm.

    Attributes:
        harm: does it; given the hosts and the launcher's process.
        culprit: the host whose rank fails.
        gone: whether that host can no longer be reached.
        options: of the command.
        status: of the result.
        code: the launcher's exit status.
    """

    harm: Callable[[SshHosts, subprocess.Popen[str]], object]
    culprit: str = "jw3"
    gone: bool = False
    options: tuple[str, ...] = (*SLEEP, "--duration", "60s")
    status: str = "INCOMPLETE"
    code: int = 6


@dataclass(frozen=True)
class Seen:
    """What became of a run.

    Attributes:
        took_s: from the harm to the launcher's end; where it was killed, to the last process.
        code: its exit status.
        status: of the result.
        named: ranks that its findings blame, the first one first.
        left: processes on the hosts that can be reached.
        lost: completed samples in logs on disks that can be reached, and not in the result.
        oldest_lost_s: age at the cut of the oldest completed row that had not reached the disk.
        said: by the launcher.
    """

    took_s: float
    code: int
    status: str
    named: list[int]
    left: int
    lost: int
    oldest_lost_s: float
    said: str


def signal_worker(number: signal.Signals) -> Callable[[SshHosts, object], None]:
    """Return harm: a signal to jw3's rank."""
    return lambda hosts, _: os.kill(worker(hosts, "jw3"), number)


def to_model(kind: str) -> Callable[[SshHosts, object], object]:
    """Return harm that jw3's model does itself."""
    return lambda hosts, _: hosts.run(
        "jw3", "sh", "-c", f"printf {kind} >harm.part; mv harm.part harm"
    )


def power_cut(hosts: SshHosts, _: object) -> None:
    """Cut jw3's power; what had reached its disk is then mounted on jw1.

    At any phase of the flushes, and when there have been some.
    """
    time.sleep(1 + random.random())
    image = hosts.power_cut_with_disk("jw3")
    done = hosts.run(
        "jw1", "sh", "-c", f"mkdir {IMAGE}; mount -o loop {shlex.quote(str(image))} {IMAGE}"
    )
    assert done.returncode == 0, done.stderr


WORKER_KILLED, LAUNCHER_KILLED, POWER_CUT = "worker killed", "launcher killed", "power cut"
DISK_FULL, FOLDER_GONE = "disk full", "output directory gone"
SHORT = (*SLEEP, "--duration", "8s")
FAULTS = {
    WORKER_KILLED: Fault(signal_worker(signal.SIGKILL)),
    "host frozen": Fault(lambda hosts, _: hosts.freeze("jw3"), gone=True),
    "cable pulled": Fault(lambda hosts, _: hosts.hosts.unplug(hosts.number("jw3")), gone=True),
    "packets dropped": Fault(lambda hosts, _: hosts.hosts.cut(hosts.number("jw3")), gone=True),
    POWER_CUT: Fault(power_cut, gone=True),
    "power cut at rank 0": Fault(lambda hosts, _: hosts.power_cut("jw2"), "jw2", gone=True),
    LAUNCHER_KILLED: Fault(lambda _, job: job.kill(), code=-9),
    DISK_FULL: Fault(
        lambda hosts, _: hosts.run("jw3", "sh", "-c", "head -c 1G /dev/zero >results/fill"),
        options=SHORT,
    ),
    FOLDER_GONE: Fault(
        lambda hosts, _: hosts.run("jw3", "sh", "-c", "rm -rf results/2*"), options=SHORT
    ),
    "SIGTERM": Fault(signal_worker(signal.SIGTERM)),
    "hanging model": Fault(
        to_model("hang"), options=(*MODEL, "--duration", "60s", "--timeout", "3s")
    ),
    # An exception out of a model is its rank's end and INVALID; the others' windows go on.
    "model out of memory": Fault(
        to_model("memory"), options=(*MODEL, "--duration", "8s"), status="INVALID", code=0
    ),
}


def prepared(hosts: SshHosts, name: str) -> None:
    """Make ready what a fault needs before the run."""
    for host in RANKS:
        hosts.run(host, "sh", "-c", f"cat >faulty.py <<'END'{FAULTY}END")
    if name in (POWER_CUT, DISK_FULL):
        hosts.run("jw3", "mkdir", "results")
        hosts.disk("jw3", HOME / "results")


def once(hosts: SshHosts, name: str) -> Seen:
    """Start a run, do harm in its window, and wait; returns what was seen."""
    fault = FAULTS[name]
    prepared(hosts, name)
    job = started(hosts, *fault.options)
    begin = time.monotonic()
    fault.harm(hosts, job)
    code, said = ended(job, END_S)
    reached = [host for host in RANKS if not (fault.gone and host == fault.culprit)]
    remaining = left(hosts, *reached, "jw1")
    took_s = time.monotonic() - begin
    if name == LAUNCHER_KILLED:
        salvaged(hosts)
    path, found = result(hosts)
    blamed = [f for f in found["verdict"]["findings"] if f["level"] in ("incomplete", "invalid")]
    rows = {row["rank"]: row["samples"] or 0 for row in found["per_rank"]}
    disks = [host for host in reached if (name, host) != (FOLDER_GONE, "jw3")]
    return Seen(
        took_s=took_s,
        code=code,
        status=found["verdict"]["status"],
        named=list(dict.fromkeys(f["rank"] for f in blamed if f["rank"] is not None)),
        left=sum(map(len, remaining.values())),
        lost=sum(max(0, completed(hosts, host, path) - rows.get(RANKS[host], 0)) for host in disks),
        oldest_lost_s=oldest_lost_s(hosts, path) if name == POWER_CUT else 0.0,
        said=said,
    )


def salvaged(hosts: SshHosts) -> None:
    """Do what is left to a user whose launcher was killed: copy the hosts' parts, merge them."""
    (path,) = hosts.run("jw2", "sh", "-c", "ls -d results/2*").stdout.split()
    spare = hosts.folder / "of-jw3"
    for name, target in (("jw2", hosts.folder / "of-jw2"), ("jw3", spare)):
        assert hosts.run(name, "cp", "-r", path, str(target)).returncode == 0
    hosts.run("jw1", "sh", "-c", f"mkdir -p results; cp -r {hosts.folder}/of-jw2 {path}")
    argv = (base_python(), "-m", "distbench.salvage", path, str(spare))
    site = f"{REPO}:{hosts.folder / 'jw1-site'}"
    done = hosts.run("jw1", *argv, PYTHONPATH=site)
    assert done.returncode == 6, done.stderr


def log(hosts: SshHosts, host: str, rank: int, path: str) -> dict[str, np.ndarray]:
    """Read a rank's samples out of a result directory on a host, by column."""
    folder = f"{path}/ranks/{rank:05d}"
    rows = np.load(io.BytesIO(file(hosts, host, f"{folder}/samples.npy")))
    names = json.loads(file(hosts, host, f"{folder}/rank.json"))["columns"]
    return {name: rows[:, place] for place, name in enumerate(names)}


def completed(hosts: SshHosts, host: str, path: str) -> int:
    """Count the completed samples in a host's own log of its rank."""
    told = log(hosts, host, RANKS[host], path)
    return int(told["count"][told["completed"] > 0].sum())


def oldest_lost_s(hosts: SshHosts, path: str) -> float:
    """Compare jw3's rows with those that had reached its disk when its power was cut."""
    live = log(hosts, "jw3", 1, path)["completed"]
    on_disk = log(hosts, "jw1", 1, f"{IMAGE}/{Path(path).name}")["completed"]
    lost = live[(live > 0) & (on_disk <= 0)]
    assert np.array_equal(on_disk[on_disk > 0], live[on_disk > 0])
    return float(live.max() - lost.min()) / 1e9 if len(lost) else 0.0


def file(hosts: SshHosts, name: str, path: str) -> bytes:
    """Read a file in a host's home."""
    done = hosts.run(name, "base64", "-w0", path)
    assert done.returncode == 0, done.stderr
    return base64.b64decode(done.stdout)


def result(hosts: SshHosts, name: str = "jw1") -> tuple[str, dict[str, Any]]:
    """Return the path and the result.json of the only run in a host's home."""
    (path,) = hosts.run(name, "sh", "-c", "ls -d results/2*").stdout.split()
    return path, json.loads(file(hosts, name, f"{path}/result.json"))


def left(hosts: SshHosts, *names: str, within_s: float = 20.0) -> dict[str, list[int]]:
    """Wait until nothing is left on these hosts; returns what is."""
    end = time.monotonic() + within_s
    while True:
        found = {name: hosts.working(name) for name in names}
        if not any(found.values()) or time.monotonic() > end:
            return {name: pids for name, pids in found.items() if pids}
        time.sleep(0.1)


def started(hosts: SshHosts, *options: str) -> subprocess.Popen[str]:
    """Start a long run on jw2 and jw3; returns when its window is running."""
    argv = hosts.launcher(*COMMON, *OFFLINE, *(options or (*SLEEP, "--duration", "60s")))
    job = hosts.popen("jw1", *argv, stdout=-1, stderr=-1, text=True)
    end = time.monotonic() + 60
    for name, rank in RANKS.items():
        look = f"ls results/*/ranks/{rank:05d}/rank.json 2>/dev/null"
        while not hosts.run(name, "sh", "-c", look).stdout:
            assert job.poll() is None, job.communicate()
            assert time.monotonic() < end
            time.sleep(0.1)
    time.sleep(2.5)  # the agreed instant is at most a second or two away; then completed rows exist
    return job


def worker(hosts: SshHosts, name: str) -> int:
    """Return the process of a host's rank."""
    found = []
    for pid in hosts.working(name):
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
        if b"distbench.offline" in command and b"torch.distributed.run" not in command:
            found.append(pid)
    (pid,) = found
    return pid


def ended(job: subprocess.Popen[str], within_s: float) -> tuple[int, str]:
    """Wait for the launcher's end; returns its exit status and what it said."""
    begin = time.monotonic()
    try:
        _, said = job.communicate(timeout=within_s + 30)
    finally:
        job.kill()
    assert time.monotonic() - begin < within_s, said
    return job.returncode, said


SLOW_PLACE = """
import os, socket
from distbench.sut import Sleep

def make(world):
    place = os.environ["SLOW"]
    slow = place == socket.gethostname() or place == f"rank {world.rank}"
    return Sleep(1_100_000 if slow else 1_000_000)
"""


def swapped(hosts: SshHosts, place: str) -> subprocess.CompletedProcess[str]:
    """Run jw2 and jw3 in the order ABBA, with a slower host ("jw3") or role ("rank 0")."""
    for name in RANKS:
        hosts.run(name, "sh", "-c", f"cat >slow_place.py <<'END'{SLOW_PLACE}END")
    options = ("--model", "slow_place:make", "--batch-size", "8", "--duration", "2s")
    asked = ("--env", f"SLOW={place}", "--repeat", "4", "--swap")
    return hosts.launch(*COMMON, *asked, *OFFLINE, *options, timeout=150)


def blamed(said: str) -> str:
    """Return what the launcher's last two lines blame: "host", "role", both, or "" for neither.

    The right way round: the first host is told to be faster than jw3, and rank 0 to be slower.
    """
    host, role = (line.partition(": ")[2] for line in said.splitlines()[-2:])
    found = [("host", host, "% faster"), ("role", role, "% slower")]
    return " and ".join(
        name if way in text else f"{name} the wrong way round"
        for name, text, way in found
        if "no difference told" not in text
    )
