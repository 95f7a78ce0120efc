"""Harm in the middle of a window, once each: what is kept, who is named, nothing stays behind."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.faults import (
    COMMON,
    DISK_FULL,
    FAULTS,
    FOLDER_GONE,
    LAUNCHER_KILLED,
    OFFLINE,
    POWER_CUT,
    RANKS,
    SLEEP,
    WORKER_KILLED,
    ended,
    left,
    once,
    result,
    started,
)
from tests.cluster.ssh_rig import HOME, SshHosts, available, ssh_hosts

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(available()), reason=available() or "the hosts work"),
]

SLOW = pytest.mark.slow
"""Not of the plain run, which has ten minutes; `.ci/run` has a step for these."""
PLAIN = (WORKER_KILLED,)


@pytest.fixture
def own(tmp_path: Path) -> Iterator[SshHosts]:
    """Three hosts for one test."""
    with ssh_hosts(tmp_path) as made:
        yield made


@pytest.mark.parametrize(
    "name", [pytest.param(each, marks=[] if each in PLAIN else SLOW) for each in FAULTS]
)
def test_a_fault_has_its_defined_end(own: SshHosts, name: str) -> None:
    if name in (POWER_CUT, DISK_FULL) and not Path("/dev/loop-control").exists():
        pytest.skip("no /dev/loop-control: no disk of a host's own")
    fault = FAULTS[name]
    seen = once(own, name)
    assert (seen.code, seen.status) == (fault.code, fault.status), seen.said
    if name != LAUNCHER_KILLED:  # there no rank failed
        assert seen.named == [RANKS[fault.culprit]], seen.said
    assert seen.left == 0
    assert seen.lost == 0
    rows = {row["rank"]: row["samples"] or 0 for row in result(own)[1]["per_rank"]}
    there = [rank for host, rank in RANKS.items() if not (fault.gone and host == fault.culprit)]
    assert all(rows[rank] > 500 for rank in there), rows
    assert seen.oldest_lost_s < 1, "of a power cut"
    if name == DISK_FULL:
        assert "rank 1 (jw3) could not write all its files" in seen.said
        assert "No space left" in seen.said
    if name == FOLDER_GONE:
        assert "No such file or directory" in seen.said


@SLOW
def test_a_disk_without_room_is_refused(own: SshHosts) -> None:
    own.run("jw3", "mkdir", "results")
    own.hosts.small_disk(own.number("jw3"), HOME / "results", 64 << 20)
    done = own.launch(*COMMON, *OFFLINE, *SLEEP)
    assert done.returncode == 4
    assert f"jw3: {HOME}/results has 64 MiB free, 256 MiB are needed" in done.stderr


@SLOW
def test_a_host_whose_agent_is_stopped_is_lost_and_the_result_is_kept(own: SshHosts) -> None:
    job = started(own, *SLEEP, "--duration", "6s")
    (agent,) = (
        pid
        for pid in own.working("jw3")
        if b"functools.reduce" in Path(f"/proc/{pid}/cmdline").read_bytes()
    )
    os.kill(agent, signal.SIGSTOP)
    code, said = ended(job, 60)
    os.kill(agent, signal.SIGKILL)
    assert "nothing came from it for 15 s" in said
    assert code == 1, said
    assert result(own)[1]["verdict"]["status"] != "INCOMPLETE", "the ranks knew nothing of it"


@SLOW
def test_a_shared_folder_is_collected_through_another_host_when_the_first_is_gone(
    own: SshHosts, tmp_path: Path
) -> None:
    shared = tmp_path / "shared"  # all hosts see the tests' own folder
    options = (*SLEEP, "--duration", "60s", "--output-dir", str(shared))
    job = own.popen(
        "jw1",
        *own.launcher(*COMMON, *OFFLINE, *options),
        stdout=-1,
        stderr=-1,
        text=True,
    )
    end = time.monotonic() + 60
    while len([*shared.glob("2*/ranks/*/rank.json")]) < 2:
        assert time.monotonic() < end
        time.sleep(0.1)
    time.sleep(2.5)
    own.power_cut("jw2")
    code, said = ended(job, 45)
    assert code == 6, said
    _, found = result(own)
    assert found["verdict"]["status"] == "INCOMPLETE"
    assert sum(row["samples"] or 0 for row in found["per_rank"]) > 500


@SLOW
def test_ctrl_c_ends_the_run_and_brings_what_there_is(own: SshHosts) -> None:
    job = started(own)
    job.send_signal(signal.SIGINT)
    code, said = ended(job, 40)
    assert code == 130, said
    assert left(own, *own.names) == {}
    _, found = result(own)
    assert found["verdict"]["status"] == "INCOMPLETE"
