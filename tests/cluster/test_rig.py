"""The rig does what its users rely on."""

import contextlib
import errno
import json
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from .rig import Hosts, available, time_namespace_argv

pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(bool(available()), reason=available() or "-"),
]

SHIFTED_CLOCKS = ("CLOCK_MONOTONIC", "CLOCK_MONOTONIC_RAW", "CLOCK_BOOTTIME")
# Python as it comes, and quick to start.
PYTHON = [sys.executable, "-I", "-S", "-u", "-c"]

READ_CLOCK = """
import sys, time
for line in sys.stdin:
    print(time.clock_gettime_ns(getattr(time, line.strip())), flush=True)
"""

# Takes the address to listen on. Answers each connection with the bytes it got before the end.
COUNTING_SERVER = """
import socket, sys
with socket.create_server((sys.argv[1], 5000)) as server:
    print("listening", flush=True)
    while True:
        connection = server.accept()[0]
        with connection:
            size = 0
            while data := connection.recv(65536):
                size += len(data)
            connection.sendall(str(size).encode())
"""

# Takes the address, the bytes to send and how long to wait.
CLIENT = """
import socket, sys
host, size, timeout = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
try:
    with socket.create_connection((host, 5000), timeout) as connection:
        connection.sendall(bytes(size))
        connection.shutdown(socket.SHUT_WR)
        print(connection.recv(100).decode())
except TimeoutError:
    print("stalled")
"""

# On SIGTERM and SIGUSR1 it tells and goes on or ends.
LISTENER = """
import os, signal, sys
signal.signal(signal.SIGUSR1, lambda *_: print("usr1", flush=True))
signal.signal(signal.SIGTERM, lambda *_: (print("term", flush=True), sys.exit(7)))
print(os.getpid(), flush=True)
while True:
    signal.pause()
"""

# Leaves a process that no longer has anything to do with the command that started it.
LEAVE_DAEMON = """
import os, signal
if os.fork() == 0:
    os.setsid()
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    print(os.getpid(), flush=True)
    os.close(0), os.close(1), os.close(2)
    while True:
        signal.pause()
"""

OWNER = """
import json, subprocess, sys
sys.path.insert(0, sys.argv[1])
from rig import Hosts
with Hosts(time_offsets_ns=[0, 5]) as hosts:
    python = [sys.executable, "-I", "-S", "-u", "-c"]
    daemon = int(hosts.run(0, [*python, sys.argv[2]]).stdout)
    command = hosts.popen(1, [*python, sys.argv[3]], stdout=subprocess.PIPE, text=True)
    command.stdout.readline()
    keepers = [keeper.pid for keeper in hosts._keepers]
    print(json.dumps([daemon, command.pid, *keepers]), flush=True)
    sys.stdin.read()
"""


@pytest.fixture(scope="module")
def hosts():
    with Hosts() as hosts:
        yield hosts


@pytest.fixture
def servers(hosts):
    """A counting server on each host, and whole lines afterwards."""
    with contextlib.ExitStack() as stack:
        for i in (0, 1):
            command = [*PYTHON, COUNTING_SERVER, hosts.address(i)]
            server = stack.enter_context(hosts.popen(i, command, stdout=subprocess.PIPE, text=True))
            stack.callback(server.kill)
            assert server.stdout.readline() == "listening\n"
        yield
        hosts.heal(0)


def send(hosts, i, size, timeout=20.0):
    """What a client on host `i` hears from the other host."""
    done = hosts.run(i, [*PYTHON, CLIENT, hosts.address(1 - i), str(size), str(timeout)])
    return done.stdout.strip() or done.stderr


def interfaces(hosts, i):
    shown = json.loads(hosts.run(i, ["ip", "-json", "address"]).stdout)
    return {interface["ifname"]: interface for interface in shown}


def addresses(interface):
    return {f"{a['local']}/{a['prefixlen']}" for a in interface["addr_info"]}


def wait_for_end(pid, timeout=20):
    """Wait for the end of any process, a child or not; its zombie counts as ended."""
    with contextlib.suppress(ProcessLookupError):
        descriptor = os.pidfd_open(pid)
        try:
            ended, _, _ = select.select([descriptor], [], [], timeout)
            assert ended, f"process {pid} lives on"
        finally:
            os.close(descriptor)


def machine():
    """What a rig could leave on the machine itself."""
    named = Path("/run/netns")
    return (
        json.loads(subprocess.check_output(["ip", "-json", "link"])),
        json.loads(subprocess.check_output(["ip", "-json", "route"])),
        sorted(named.iterdir()) if named.exists() else [],
        sorted(line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines()),
        os.uname().nodename,
        Path("/etc/hosts").read_text(),
    )


def test_available_says_what_is_missing(monkeypatch):
    assert available() == ""
    monkeypatch.setenv("PATH", "")
    assert available.__wrapped__() == "The cluster rig needs `ip` (package iproute2)."
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert available.__wrapped__() == "The cluster rig needs root."


# Time


def bracket(process, clock, own_clock, trips=200):
    """Bounds of the difference between a clock of the process and one of ours."""
    low, high = -(2**70), 2**70
    for _ in range(trips):
        before = time.clock_gettime_ns(own_clock)
        process.stdin.write(f"{clock}\n")
        process.stdin.flush()
        there = int(process.stdout.readline())
        after = time.clock_gettime_ns(own_clock)
        low, high = max(low, there - after), min(high, there - before)
    return low, high


@contextlib.contextmanager
def clock_reader(argv):
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True, bufsize=1) as process:
        yield process
        process.stdin.close()


@pytest.mark.parametrize("offset_ns", [7_000_123_456_789, -1_234_567_891, 1, 0])
def test_time_namespace_shifts_clocks_exactly(offset_ns):
    with clock_reader(time_namespace_argv(offset_ns, [*PYTHON, READ_CLOCK])) as process:
        for clock in SHIFTED_CLOCKS:
            low, high = bracket(process, clock, getattr(time, clock))
            assert low <= offset_ns <= high
            assert high - low < 2_000_000
        low, high = bracket(process, "CLOCK_REALTIME", time.CLOCK_REALTIME)
        assert low <= 0 <= high
        # The bracket is some microseconds wide. What the kernel adds is known to the nanosecond.
        lines = Path(f"/proc/{process.pid}/timens_offsets").read_text().splitlines()
        shown = {name: int(s) * 10**9 + int(ns) for name, s, ns in map(str.split, lines)}
        assert shown == {"monotonic": offset_ns, "boottime": offset_ns}


def test_time_namespace_goes_almost_to_zero_and_not_below():
    up = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
    show = [*PYTHON, "import time; print(time.monotonic_ns())"]
    near = subprocess.check_output(time_namespace_argv(-up, show))
    assert 0 < int(near) < 30 * 10**9
    below = time_namespace_argv(-up - 100 * 10**9, show)
    done = subprocess.run(below, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert os.strerror(errno.ERANGE) in done.stderr
    assert done.stdout == ""


def test_time_namespace_in_a_time_namespace_adds_up():
    inner = time_namespace_argv(-500_000_000, [*PYTHON, READ_CLOCK])
    with clock_reader(time_namespace_argv(3_000_000_001, inner)) as process:
        low, high = bracket(process, "CLOCK_MONOTONIC_RAW", time.CLOCK_MONOTONIC_RAW)
        assert low <= 2_500_000_001 <= high
        text = Path(f"/proc/{process.pid}/timens_offsets").read_text()
        assert text.split() == ["monotonic", "2", "500000001", "boottime", "2", "500000001"]


def test_time_namespace_passes_status_signals_and_environment():
    def run(code, **kw):
        argv = time_namespace_argv(10**9, [*PYTHON, code])
        return subprocess.run(argv, capture_output=True, text=True, check=False, **kw)

    assert run("raise SystemExit(9)").returncode == 9
    assert run("import os; os.abort()").returncode == -signal.SIGABRT
    show = time_namespace_argv(0, ["/usr/bin/env"])
    assert subprocess.check_output(show, env={"A": "b=c", "LC_ALL": "C"}) == b"A=b=c\nLC_ALL=C\n"
    argv = time_namespace_argv(10**9, [*PYTHON, LISTENER])
    with subprocess.Popen(argv, stdout=subprocess.PIPE, text=True) as process:
        assert int(process.stdout.readline()) == process.pid
        process.terminate()
        assert process.stdout.readline() == "term\n"
        assert process.wait() == 7


def test_time_namespace_dies_with_its_parent():
    argv = time_namespace_argv(10**9, [*PYTHON, LISTENER])
    start = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    with subprocess.Popen([*PYTHON, start, *argv], stdout=subprocess.PIPE, text=True) as parent:
        child = int(parent.stdout.readline())
        assert Path(f"/proc/{child}").exists()
        parent.kill()
        wait_for_end(child)  # raises when it lives on


def test_hosts_have_clocks_of_their_own():
    offsets = [0, -3_000_000_007]
    with Hosts(decoys=False, time_offsets_ns=offsets) as hosts:
        for i, offset_ns in enumerate(offsets):
            with clock_reader(hosts.argv(i, [*PYTHON, READ_CLOCK])) as process:
                for clock in SHIFTED_CLOCKS:
                    low, high = bracket(process, clock, getattr(time, clock))
                    assert low <= offset_ns <= high
                    assert high - low < 2_000_000


# What a host looks like


def test_each_host_has_its_own_name_and_network(hosts):
    for i, name in enumerate(("jw2", "jw3")):
        assert hosts.run(i, ["hostname"]).stdout == f"{name}\n"
        shown = interfaces(hosts, i)
        assert set(shown) == {"lo", "eth0", "cali0", "vxlan.calico", "tunl0", "docker0"}
        assert all({"UP", "LOWER_UP"} <= set(interface["flags"]) for interface in shown.values())
        assert shown["eth0"]["mtu"] == 1500
        assert hosts.address(i) == f"10.77.0.{11 + i}"
        of_eth0 = [a for a in shown["eth0"]["addr_info"] if a["family"] == "inet"]
        assert [(a["local"], a["prefixlen"]) for a in of_eth0] == [(hosts.address(i), 24)]
        assert "127.0.0.1/8" in addresses(shown["lo"])
        assert addresses(shown["cali0"]) == {"fe80::ecee:eeff:feee:eeee/64"}
        assert f"10.244.{i + 1}.0/32" in addresses(shown["vxlan.calico"])
        assert addresses(shown["tunl0"]) == {f"10.244.{i + 1}.1/32"}
        assert "172.17.0.1/16" in addresses(shown["docker0"])
        assert "default" not in hosts.run(i, ["ip", "route"]).stdout
        in_sys = hosts.run(i, ["ls", "/sys/class/net"]).stdout.split()
        assert set(in_sys) == set(shown)


def test_debian_hosts_file(hosts):
    text = hosts.run(0, ["cat", "/etc/hosts"]).stdout
    assert text == "127.0.0.1 localhost\n127.0.1.1 jw2\n10.77.0.12 jw3\n"
    assert hosts.run(0, ["getent", "ahostsv4", "jw2"]).stdout.split()[0] == "127.0.1.1"
    assert hosts.run(1, ["getent", "ahostsv4", "jw2"]).stdout.split()[0] == "10.77.0.11"


def test_plain_hosts():
    with Hosts(n=3, decoys=False, names=("a", "b", "c"), debian_hosts=False) as hosts:
        for i in range(3):
            text = hosts.run(i, ["cat", "/etc/hosts"]).stdout
            assert text == "127.0.0.1 localhost\n10.77.0.11 a\n10.77.0.12 b\n10.77.0.13 c\n"
            assert set(interfaces(hosts, i)) == {"lo", "eth0"}
        with pytest.raises(IndexError):
            hosts.cut(3)
        with pytest.raises(IndexError):
            hosts.run(3, ["true"])


@pytest.mark.parametrize("wrong", [{"names": ["a"]}, {"time_offsets_ns": [1, 2, 3]}])
def test_hosts_want_one_name_and_offset_each(wrong):
    with pytest.raises(ValueError, match="2 hosts"):
        Hosts(n=2, **wrong)


def test_failed_start_leaves_nothing_and_says_why():
    before = machine()
    below_zero = -time.clock_gettime_ns(time.CLOCK_BOOTTIME) - 10**12
    hosts = Hosts(time_offsets_ns=[0, below_zero])
    with pytest.raises(RuntimeError, match=os.strerror(errno.ERANGE)):
        hosts.__enter__()
    assert machine() == before


# Network


def test_hosts_reach_each_other(hosts, servers):
    assert send(hosts, 0, 1 << 20) == "1048576"
    assert send(hosts, 1, 1 << 20) == "1048576"
    # The decoys lead nowhere: what host 0 has there does not answer host 1.
    other = "import socket; socket.create_connection(('10.244.1.1', 5000), 5)"
    assert "unreachable" in hosts.run(1, [*PYTHON, other]).stderr


@pytest.mark.parametrize("client", [0, 1], ids=["from-the-host", "to-the-host"])
def test_large_packets_are_lost(hosts, servers, client):
    hosts.drop_larger_than(0, 1400)
    assert send(hosts, client, 64) == "64"
    assert send(hosts, client, 1 << 20, timeout=2) == "stalled"
    hosts.heal(0)
    assert send(hosts, client, 1 << 20) == "1048576"


@pytest.mark.parametrize("client", [0, 1], ids=["from-the-host", "to-the-host"])
def test_packets_are_real_segments(hosts, servers, client):
    # With segmentation offload, packets of up to 64 KiB would pass here and be lost.
    hosts.drop_larger_than(0, 1500)
    assert send(hosts, client, 1 << 20) == "1048576"
    hosts.drop_larger_than(0, 1499)
    assert send(hosts, client, 1 << 20, timeout=2) == "stalled"


def carrier(hosts, i):
    return hosts.run(i, ["cat", "/sys/class/net/eth0/carrier"]).stdout.strip()


def test_cut_keeps_the_carrier_and_heals(hosts, servers):
    hosts.cut(0)
    assert send(hosts, 0, 64, timeout=1) == "stalled"
    assert send(hosts, 1, 64, timeout=1) == "stalled"
    assert carrier(hosts, 0) == "1"
    hosts.heal(0)
    assert send(hosts, 0, 64) == "64"
    assert send(hosts, 1, 64) == "64"


# Takes the address; sends numbered datagrams to it.
SENDER = """
import socket, sys
with socket.socket(type=socket.SOCK_DGRAM) as door:
    for number in range(1000):
        door.sendto(number.to_bytes(2, "big"), (sys.argv[1], 5000))
"""

# Takes the address to listen on; tells how many arrived before a pause of a second.
COUNTER = """
import socket, sys
with socket.socket(type=socket.SOCK_DGRAM) as door:
    door.bind((sys.argv[1], 5000))
    door.setsockopt(socket.SOL_SOCKET, 33, 8 << 20)  # SO_RCVBUFFORCE: none is lost here
    door.settimeout(10)
    print("listening", flush=True)
    count = 0
    try:
        while door.recv(100):
            count += 1
            door.settimeout(1)
    except TimeoutError:
        print(count)
"""


@pytest.mark.parametrize("percent", [0, 20])
def test_so_many_packets_are_lost(hosts, percent):
    command = [*PYTHON, COUNTER, hosts.address(0)]
    with hosts.popen(0, command, stdout=subprocess.PIPE, text=True) as counter:
        assert counter.stdout.readline() == "listening\n"
        hosts.lose(0, percent)
        try:
            hosts.run(1, [*PYTHON, SENDER, hosts.address(0)])
            arrived = int(counter.stdout.readline())
        finally:
            hosts.heal(0)
    expected = 1000 * (1 - percent / 100)
    # 20 in 100: a standard deviation of 12.6, so once in 1e6 runs by chance.
    assert abs(arrived - expected) <= (62 if percent else 0)


def test_no_more_passes_than_the_limit(servers):
    """On hosts of its own: a limit is for good."""
    size, bits_per_s, burst = 400_000, 4_000_000, 16_384
    with Hosts(decoys=False) as slow:
        slow.limit(0, bits_per_s)
        command = [*PYTHON, COUNTING_SERVER, slow.address(1)]
        with slow.popen(1, command, stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout.readline() == "listening\n"
            begin = time.monotonic()
            assert send(slow, 0, size) == str(size)
            assert time.monotonic() - begin >= (size - 2 * burst) * 8 / bits_per_s
            server.kill()


def test_unplug_takes_the_carrier_and_heals(hosts, servers):
    hosts.unplug(0)
    assert carrier(hosts, 0) == "0"
    assert carrier(hosts, 1) == "1"
    assert send(hosts, 1, 64, timeout=1) == "stalled"
    hosts.heal(0)
    assert carrier(hosts, 0) == "1"
    assert send(hosts, 1, 64) == "64"


def test_sender_hears_nothing_of_a_loss(hosts):
    hosts.cut(0)
    code = "import socket, sys; socket.socket(type=2).sendto(b'x', (sys.argv[1], 9))"
    done = hosts.run(0, [*PYTHON, code, hosts.address(1)])
    hosts.heal(0)
    assert (done.returncode, done.stderr) == (0, "")


# Commands


def test_signals_reach_the_command(hosts):
    command = [*PYTHON, LISTENER]
    with hosts.popen(0, command, stdout=subprocess.PIPE, text=True) as process:
        assert int(process.stdout.readline()) == process.pid
        assert process.pid in hosts.processes(0)
        assert process.pid not in hosts.processes(1)
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "usr1\n"
        process.send_signal(signal.SIGSTOP)
        _, status = os.waitpid(process.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status)
        process.send_signal(signal.SIGCONT)
        process.terminate()
        assert process.stdout.readline() == "term\n"
        assert process.wait() == 7
    with hosts.popen(1, command, stdout=subprocess.PIPE, text=True) as process:
        process.stdout.readline()
        process.kill()
        assert process.wait() == -signal.SIGKILL
    assert hosts.processes(0) == hosts.processes(1) == []


def test_run_gives_output_status_and_environment(hosts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = hosts.run(1, ["sh", "-c", 'pwd; echo "$A"; echo error >&2; exit 5'], env={"A": "a  b"})
    assert (done.returncode, done.stderr) == (5, "error\n")
    assert done.stdout == f"{tmp_path}\na  b\n"
    assert hosts.run(1, ["/usr/bin/env"], env={"A": "b"}).stdout == "A=b\n"
    with pytest.raises(subprocess.TimeoutExpired):
        hosts.run(1, [*PYTHON, LISTENER], timeout=1)
    assert "no-such-program" in hosts.run(1, ["no-such-program"]).args
    assert hosts.run(1, ["no-such-program"]).returncode == 1


def test_small_disk_fills_up_on_one_host_only(hosts, tmp_path):
    hosts.small_disk(0, tmp_path, 1 << 20)
    fill = "import sys; open(sys.argv[1], 'wb').write(bytes(2 << 20))"
    done = hosts.run(0, [*PYTHON, fill, str(tmp_path / "file")])
    assert os.strerror(errno.ENOSPC) in done.stderr
    assert hosts.run(1, [*PYTHON, fill, str(tmp_path / "file")]).returncode == 0
    assert (tmp_path / "file").stat().st_size == 2 << 20


# The end


def test_nothing_is_left_after_the_end():
    before = machine()
    with Hosts(time_offsets_ns=[10**9, 0]) as hosts:
        during = machine()
        daemon = int(hosts.run(0, [*PYTHON, LEAVE_DAEMON]).stdout)
        assert hosts.processes(0) == [daemon]
        command = hosts.popen(1, [*PYTHON, LISTENER], stdout=subprocess.PIPE, text=True)
        assert int(command.stdout.readline()) == command.pid
        keepers = [keeper.pid for keeper in hosts._keepers]
    for pid in (daemon, *keepers):
        wait_for_end(pid, timeout=0)
    assert command.wait(timeout=0) == -signal.SIGKILL
    command.stdout.close()
    assert during == before
    assert machine() == before


def test_nothing_is_left_after_the_owner_is_killed():
    before = machine()
    pipe = subprocess.PIPE
    argv = [*PYTHON, OWNER, str(Path(__file__).parent), LEAVE_DAEMON, LISTENER]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, text=True) as owner:
        pids = json.loads(owner.stdout.readline())
        assert len(pids) == 5
        for pid in pids:
            os.kill(pid, 0)
        owner.kill()
    for pid in pids:
        wait_for_end(pid)
    assert machine() == before
