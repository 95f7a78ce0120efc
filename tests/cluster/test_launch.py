"""The launcher on hosts with a real sshd: two-host runs, refusals; nothing stays behind."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cluster.faults import COMMON, SLEEP, blamed, file, left, result, swapped
from tests.cluster.ssh_rig import HOME, PYTHON, SshHosts, available, ssh_hosts
from tests.support import REPO

pytestmark = [
    pytest.mark.timeout(240),
    pytest.mark.skipif(bool(available()), reason=available() or "the hosts work"),
]

SLOW = pytest.mark.slow
"""Not of the plain run, which has ten minutes; `.ci/run` has a step for these."""

HOURS_NS = 3600 * 10**9
OFFLINE = ("--", "-m", "distbench.offline", *SLEEP)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SshHosts]:
    """Three hosts that no test harms, monotonic clocks apart by hours."""
    offsets = (0, 5 * HOURS_NS, 9 * HOURS_NS)
    with ssh_hosts(tmp_path_factory.mktemp("hosts"), time_offsets_ns=offsets) as made:
        yield made


@pytest.fixture
def own(tmp_path: Path) -> Iterator[SshHosts]:
    """Three hosts for one test."""
    with ssh_hosts(tmp_path) as made:
        yield made


def clean(hosts: SshHosts, name: str) -> None:
    hosts.run(name, "rm", "-rf", "results")


@pytest.mark.parametrize("scenario", ["offline", pytest.param("server", marks=SLOW)])
def test_two_hosts_give_one_report_and_the_result_is_here(hosts: SshHosts, scenario: str) -> None:
    options = SLEEP if scenario == "offline" else (*SLEEP[:2], *SLEEP[4:], "--target-qps", "100")
    done = hosts.launch(*COMMON, "--", "-m", f"distbench.{scenario}", *options, "--duration", "3s")
    try:
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("MEASUREMENT") == 1
        assert "2 ranks on 2 hosts (jw2, jw3)" in done.stdout
        path, found = result(hosts)
        assert [row["host"] for row in found["per_rank"]] == ["jw2", "jw3"]
        zero, one = found["clock"]["ranks"]
        assert zero["domain"] != one["domain"]
        assert one["offset_s"] == pytest.approx(4 * 3600, abs=1e-3)
        assert f"launch: jw2:{HOME}/{path} -> {path}" in done.stderr
        assert f"{HOME}/{path}: good" in done.stderr
        # The same bytes as on the host of rank 0.
        for name in ("result.json", "ranks/00001/samples.npy", "manifest.sha256"):
            assert file(hosts, "jw1", f"{path}/{name}") == file(hosts, "jw2", f"{path}/{name}")
        assert left(hosts, *hosts.names) == {}
    finally:
        for name in hosts.names:
            clean(hosts, name)


@SLOW
def test_lines_of_several_ranks_on_a_host_are_told_apart(hosts: SshHosts) -> None:
    """Also those of ranks that fail: torchrun keeps them in files and must lose none."""
    module = "import sys, os; print('rank', os.environ['RANK'], file=sys.stderr); "
    module += "print('out', os.environ['RANK']) if os.environ['RANK'] == '0' else None; sys.exit(9)"
    for name in ("jw2", "jw3"):
        hosts.run(name, "sh", "-c", f"printf '%s' \"{module}\" >told.py")
    done = hosts.launch("--hosts", "jw2:2,jw3:2", *COMMON[2:], "--", "-m", "told")
    assert done.returncode == 9, done.stderr
    assert done.stdout == "out 0\n"
    lines = done.stderr.splitlines()
    for name, rank in (("jw2", 0), ("jw2", 1), ("jw3", 2), ("jw3", 3)):
        assert lines.count(f"[{name} r{rank}] rank {rank}") == 1, done.stderr


@SLOW
def test_whoever_reads_the_report_may_leave(hosts: SshHosts) -> None:
    """A closed pipe behind stdout neither ends the run nor holds the launcher."""
    line = " ".join(map(shlex.quote, hosts.launcher(*COMMON, *OFFLINE, "--duration", "1s")))
    done = hosts.run("jw1", "bash", "-c", f"{line} | true; exit ${{PIPESTATUS[0]}}", timeout=60)
    try:
        assert done.returncode == 0, done.stderr
        assert result(hosts)[1]["verdict"]["status"]
    finally:
        for name in hosts.names:
            clean(hosts, name)


@SLOW
def test_a_background_job_of_a_shell_ends_at_sigterm(hosts: SshHosts) -> None:
    line = " ".join(map(shlex.quote, hosts.launcher(*COMMON, *OFFLINE, "--duration", "60s")))
    script = f"{line} & p=$!; sleep 6; kill -TERM $p; wait $p; echo ended $?"
    done = hosts.run("jw1", "sh", "-c", script, timeout=60)
    try:
        assert done.stdout.endswith("ended 130\n"), (done.stdout[-300:], done.stderr[-2000:])
        assert left(hosts, *hosts.names) == {}
    finally:
        for name in hosts.names:
            clean(hosts, name)


def test_what_would_be_started_is_shown_and_nothing_is(hosts: SshHosts) -> None:
    done = hosts.launch(*COMMON, "--env", "A=b c", "--dry-run", *OFFLINE)
    assert done.returncode == 0, done.stderr
    shown = [line for line in done.stderr.splitlines() if "torch.distributed.run" in line]
    assert [line.split()[1] for line in shown] == ["jw2:", "jw3:"]
    for node, line in enumerate(shown):
        assert f"cd {HOME} && PYTHONPATH={REPO} 'A=b c' {PYTHON} -m torch.distributed.run" in line
        assert f"--nnodes 2 --nproc-per-node 1 --node-rank {node} --rdzv-id 2" in line
        assert "--max-restarts 0 --master-addr 10.77.0.12 --master-port" in line
        assert "-m distbench.offline --model sleep,per_sample=1ms" in line
    assert hosts.run("jw2", "ls", "results").stdout == ""


@SLOW
@pytest.mark.parametrize("place", ["jw3", "rank 0"])
def test_swapped_runs_tell_a_slow_host_from_a_slow_role(hosts: SshHosts, place: str) -> None:
    """A tenth more per sample, on a host or in a role; which order each run has is seen as well."""
    done = swapped(hosts, place)
    try:
        assert done.returncode == 0, done.stderr
        firsts = [line.split()[1] for line in done.stderr.splitlines() if "--node-rank 0" in line]
        assert firsts == ["jw2:", "jw3:", "jw3:", "jw2:"]
        assert blamed(done.stderr) == {"jw3": "host", "rank 0": "role"}[place], done.stderr[-600:]
        assert done.stdout.count("MEASUREMENT") == 4
        assert hosts.run("jw1", "sh", "-c", "ls -d results/2* | wc -l").stdout.strip() == "4"
    finally:
        for name in hosts.names:
            clean(hosts, name)


@SLOW
def test_the_last_lines_say_what_was_wrong_and_what_the_exit_status_means(hosts: SshHosts) -> None:
    def launched(*command: str) -> tuple[int, list[str]]:
        done = hosts.launch(*COMMON, "--", *command)
        lines = [each for each in done.stderr.splitlines() if each.startswith("launch: ")]
        return done.returncode, lines[2:]

    code, lines = launched("-m", "distbench.offline", "--duratoin", "5s")
    assert code == 2
    assert any("said: " in each and "did you mean --duration?" in each for each in lines), lines
    assert lines[-1] == (
        "launch: exit status 2: the command cannot be used as asked; nothing was recorded"
    )
    code, lines = launched("-m", "distbench.ofline")
    assert code == 1 and any("No module named" in each for each in lines), lines
    late = ("--duration", "300ms", "--model", "sleep,per_sample=100ms", "--batch-size", "1")
    code, lines = launched("-m", "distbench.offline", *late, "--latency", "1")
    assert code == 2, lines
    for name in hosts.names:
        clean(hosts, name)


@SLOW
def test_the_bare_command_works_with_the_printed_environment(hosts: SshHosts) -> None:
    done = hosts.launch("--hosts", "jw2:2,jw3", *COMMON[2:], "--print-env")
    assert done.returncode == 0, done.stderr
    assert "torchrun --nnodes 2 -m distbench.offline" in done.stderr
    torchrun = Path(PYTHON).parent / "torchrun"
    line = f". ./distbench.env; exec {torchrun} --nnodes 2 -m distbench.offline --duration 1s"
    jobs = [
        hosts.popen(
            name, "sh", "-c", line, env={"PYTHONPATH": str(REPO)}, stdout=-1, stderr=-1, text=True
        )
        for name in ("jw2", "jw3")
    ]
    try:
        told = [job.communicate(timeout=90) for job in jobs]
    finally:
        for job in jobs:
            job.kill()
    assert [job.returncode for job in jobs] == [0, 0], told
    assert sum(out.count("MEASUREMENT") for out, _ in told) == 1
    assert sum("3 ranks on 2 hosts" in out for out, _ in told) == 1
    for name in ("jw2", "jw3"):
        clean(hosts, name)


# Refusals, each within 15 s and with its remedy


def refused(hosts: SshHosts, *arguments: str) -> str:
    """Launch; returns what was said of why nothing was started."""
    begin = time.monotonic()
    done = hosts.launch(*arguments)
    took = time.monotonic() - begin
    assert done.returncode == 4, (done.returncode, done.stderr)
    assert took < 15, took
    assert done.stdout == ""
    assert "torch.distributed.run" not in done.stderr
    return done.stderr


def test_an_unknown_host_key_is_refused(hosts: SshHosts) -> None:
    hosts.run("jw1", "sh", "-c", "sed -i.kept '/^jw3/d' .ssh/known_hosts")
    try:
        said = refused(hosts, *COMMON, *OFFLINE)
    finally:
        hosts.run("jw1", "mv", ".ssh/known_hosts.kept", ".ssh/known_hosts")
    assert "jw3: " in said and "Host key verification failed" in said


@SLOW
def test_a_missing_host_is_named(own: SshHosts) -> None:
    own.power_cut("jw3")
    said = refused(own, *COMMON, *OFFLINE)
    assert "launch: jw3: " in said and "port 22" in said
    assert "launch: jw2" not in said


@SLOW
def test_a_blocked_port_is_named_with_both_hosts(own: SshHosts) -> None:
    match = "ip saddr 10.77.0.13 tcp dport 1024-65535 ct state new"
    rules = "add table inet t\nadd chain inet t c { type filter hook input priority 0; }\n"
    rules += f"add rule inet t c {match} drop\n"
    done = own.run("jw2", "sh", "-c", f"nft -f - <<'END'\n{rules}END")
    assert done.returncode == 0, done.stderr
    said = refused(own, *COMMON, *OFFLINE)
    assert "jw3 does not reach jw2 at 10.77.0.12 port" in said
    assert "open the firewall between them" in said
    assert "jw2 does not reach jw3" not in said


@SLOW
def test_versions_that_differ_are_refused(hosts: SshHosts, tmp_path: Path) -> None:
    fake = tmp_path / "torch-1.0.dist-info"
    fake.mkdir()
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: torch\nVersion: 1.0\n")
    wrapper = HOME / "python-of-this-host"
    for name, path in (("jw2", str(REPO)), ("jw3", f"{tmp_path}:{REPO}")):
        script = f'#!/bin/sh\nPYTHONPATH={path} exec {PYTHON} "$@"\n'
        hosts.run(name, "sh", "-c", f"printf '%s' '{script}' >{wrapper}; chmod +x {wrapper}")
    said = refused(hosts, *COMMON, "--python", str(wrapper), *OFFLINE)
    assert "torch differs: " in said and "1.0 on jw3" in said and "install one version" in said


@SLOW
def test_a_python_without_torch_is_refused_naming_the_remedy(hosts: SshHosts) -> None:
    said = refused(hosts, *COMMON, "--python", "/usr/bin/env", *OFFLINE)
    assert "jw2: " in said and "jw3: " in said
    base = hosts.launcher()[0]
    said = refused(hosts, *COMMON, "--python", base, *OFFLINE)
    assert f"jw2: {base} has no torch: give --python" in said


SMI = """#!/bin/sh
case "$1" in
--query-gpu*) printf 'GPU-a, NVIDIA A30\\nGPU-b, NVIDIA A30\\n' ;;
*) printf '%s' "$USED" ;;
esac
"""


@SLOW
def test_gpus_are_counted_and_one_in_use_is_refused(hosts: SshHosts) -> None:
    """Through a stand-in for nvidia-smi: there is no GPU here."""
    wrapper = HOME / "python-of-this-host"
    for name, used in (("jw2", ""), ("jw3", "GPU-b, 123, python")):
        hosts.run(name, "sh", "-c", f"mkdir -p smi; cat >smi/nvidia-smi <<'END'\n{SMI}END")
        script = f"USED='{used}' PATH={HOME}/smi:$PATH exec {PYTHON} \"$@\""
        hosts.run(name, "sh", "-c", f"cat >{wrapper} <<'END'\n#!/bin/sh\n{script}\nEND")
        hosts.run(name, "chmod", "+x", str(wrapper), "smi/nvidia-smi")
    python = ("--python", str(wrapper))
    said = refused(hosts, *COMMON, *python, *OFFLINE)
    assert "launch: jw3: GPU 1 (NVIDIA A30) is used by python (123): end that" in said
    assert "jw2: GPU" not in said
    several = ("--hosts", "jw2:3", "--env", f"PYTHONPATH={REPO}")
    said = refused(hosts, *several, *python, *OFFLINE)
    assert "jw2: 3 ranks were asked for and it has 2 GPUs: give jw2:2" in said
    one = ("--hosts", "jw2", "--env", f"PYTHONPATH={REPO}", "--dry-run")
    done = hosts.launch(*one, *python, *OFFLINE)
    assert done.returncode == 0 and "--nproc-per-node 2 " in done.stderr
    done = hosts.launch(*one, *python, *OFFLINE, "--device", "cpu")
    assert done.returncode == 0 and "--nproc-per-node 1 " in done.stderr


@SLOW
def test_another_launch_in_the_output_directory_is_refused(hosts: SshHosts) -> None:
    first = hosts.popen(
        "jw1", *hosts.launcher(*COMMON, *OFFLINE, "--duration", "30s"), stdout=-1, stderr=-1
    )
    try:
        lock = "results/.launch.lock"
        end = time.monotonic() + 20
        while not hosts.run("jw2", "sh", "-c", f"cat {lock} 2>/dev/null").stdout:
            assert time.monotonic() < end
            time.sleep(0.05)
        said = refused(hosts, *COMMON, *OFFLINE)
        assert f"jw2: {HOME}/results is in use by a launch of " in said and " from jw1" in said
        assert "another --output-dir" in said
    finally:
        first.send_signal(signal.SIGTERM)
        first.communicate(timeout=60)
    assert first.returncode == 130
    assert left(hosts, *hosts.names) == {}
    for name in hosts.names:
        clean(hosts, name)


@SLOW
def test_a_host_that_never_answers_is_refused_in_time(hosts: SshHosts) -> None:
    wrapper = HOME / "python-of-this-host"
    for name, script in (("jw2", f'exec {PYTHON} "$@"'), ("jw3", "exec sleep 60")):
        hosts.run(name, "sh", "-c", f"printf '#!/bin/sh\n{script}\n' >{wrapper}")
        hosts.run(name, "chmod", "+x", str(wrapper))
    said = refused(hosts, *COMMON, "--python", str(wrapper), *OFFLINE)
    assert "launch: jw3: no answer within 10 s" in said and "launch: jw2: no answer" not in said
