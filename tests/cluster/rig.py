"""Several hosts on one Linux machine, for tests of programs that span hosts.

A host is a set of namespaces (network, host name, mounts and, when asked, time) that a keeper
process holds. A command enters them and then turns into the wanted program by `exec`: no parent
stays in between, so process id, signals and exit status are those of the command itself. Hosts
share the machine's files and process ids, but not the network, /etc/hosts, or /sys.

A keeper reads a pipe that only the owner of `Hosts` can write to. When the context ends or the
owner is killed, the keeper kills all that lives in its namespaces and ends; the kernel then drops
the interfaces and mounts. This file is also the program that runs in these processes.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

CLONE_NEWTIME, CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x80, 0x20000, 0x4000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
PR_SET_PDEATHSIG = 1
NAMESPACES = {"time": CLONE_NEWTIME, "uts": CLONE_NEWUTS, "net": CLONE_NEWNET, "mnt": CLONE_NEWNS}
GIGA = 10**9
SWITCH = -1  # in the place of a host's number

# -I and -S: the caller's Python settings do not matter here, and the start is quicker.
_PROGRAM = [sys.executable, "-I", "-S", str(Path(__file__).resolve())]
Environment = Mapping[str, str] | None
_IP = ["ip", "-batch", "-"]
_LIBC = ctypes.CDLL(None, use_errno=True)


def time_namespace_argv(offset_ns: int, argv: list[str]) -> list[str]:
    """Wrap a command so that it runs with shifted clocks.

    CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW and CLOCK_BOOTTIME of the command are those of its
    caller plus exactly `offset_ns`; CLOCK_REALTIME stays. The kernel takes a negative offset
    only while the shifted clock stays positive.

    The command dies when the *thread* that starts it ends, so start it from one that lives on.
    """
    return [*_PROGRAM, "time-namespace", str(offset_ns), "--", *argv]


@functools.cache
def available() -> str:
    """Say in one sentence why the rig cannot work here; empty when it can."""
    if os.geteuid() != 0:
        return "The cluster rig needs root."
    for tool, package in (("ip", "iproute2"), ("nft", "nftables"), ("ethtool", "ethtool")):
        if shutil.which(tool) is None:
            return f"The cluster rig needs `{tool}` (package {package})."
    if not Path("/proc/self/ns/time").exists():
        return "The cluster rig needs a kernel with time namespaces."
    try:
        with Hosts(n=1, time_offsets_ns=[GIGA]) as hosts:
            hosts.drop_larger_than(0, 1400)
    except (OSError, RuntimeError) as error:
        return f"The cluster rig cannot set up a host here: {' '.join(str(error).split())}."
    return ""


class Hosts:
    """A few hosts on one network, 10.77.0.0/24, from `with` to the end of its block.

    Host `i` has the address 10.77.0.(11 + i) on `eth0`.

    Args:
        n: How many hosts.
        decoys: Give each host the interfaces of a node with Calico and Docker, all up and with
            a carrier. None leads anywhere; docker0 has the same address everywhere.
        names: Host names; jw2, jw3, ... by default.
        debian_hosts: Let /etc/hosts name the host itself 127.0.1.1, as Debian's installer does.
            Otherwise it names every host by its real address.
        time_offsets_ns: Shift of the monotonic clocks, one per host.
    """

    def __init__(
        self,
        n: int = 2,
        decoys: bool = True,
        names: Sequence[str] | None = None,
        debian_hosts: bool = True,
        time_offsets_ns: Sequence[int] | None = None,
    ) -> None:
        self.names = [f"jw{i + 2}" for i in range(n)] if names is None else list(names)
        self.time_offsets_ns = [0] * n if time_offsets_ns is None else list(time_offsets_ns)
        if not len(self.names) == len(self.time_offsets_ns) == n:
            raise ValueError(f"{n} hosts need {n} names and {n} time offsets")
        self.decoys, self.debian_hosts = decoys, debian_hosts
        self._keepers: list[subprocess.Popen[str]] = []  # of the switch, then of each host
        self._rules: dict[str, str] = {}
        self._cables: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Hosts:
        try:
            self._keep("", "", "0")
            for i, offset_ns in enumerate(self.time_offsets_ns):
                self._keep(self.names[i], self._hosts_file(i), str(offset_ns))
            self._wire()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        complaints = ""
        for cable in self._cables:
            cable.communicate(timeout=20)
        while self._keepers:  # from the last host to the switch
            keeper = self._keepers.pop()
            try:
                complaints += keeper.communicate("end\n", timeout=20)[0]
            except subprocess.TimeoutExpired:
                keeper.kill()
                complaints += "a keeper hung\n" + keeper.communicate()[0]
        if complaints:
            raise RuntimeError(f"not all of the hosts ended: {complaints}")

    def argv(self, i: int, command: Sequence[str]) -> list[str]:
        """Wrap a command so that it runs on host `i`; `--` and the command come last."""
        return [*_PROGRAM, "enter", str(self._keepers[1 + i].pid), "--", *command]

    def popen(
        self, i: int, command: Sequence[str], env: Environment = None, **kw: Any
    ) -> subprocess.Popen[Any]:
        """Start a command on host `i`; its process is the command. `env` is as in Popen."""
        return subprocess.Popen(self.argv(i, command), env=env, **kw)

    def run(
        self, i: int, command: Sequence[str], timeout: float = 60, env: Environment = None
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on host `i` to its end and keep its output as text."""
        kw: dict[str, Any] = {"stdin": subprocess.DEVNULL, "text": True, "check": False}
        argv = self.argv(i, command)
        return subprocess.run(argv, capture_output=True, timeout=timeout, env=env, **kw)

    def processes(self, i: int) -> list[int]:
        """Process ids of everything that lives on host `i` now, its keeper left out."""
        keeper = self._keepers[1 + i].pid
        return [pid for pid in _members(keeper) if pid != keeper]

    def address(self, i: int) -> str:
        """IPv4 address of host `i` on eth0."""
        return f"10.77.0.{11 + i}"

    def drop_larger_than(self, i: int, size_bytes: int) -> None:
        """Lose, without a word, each IP packet above `size_bytes` from or to host `i`."""
        self._lose(i, f"meta length > {size_bytes} drop")

    def cut(self, i: int) -> None:
        """Lose every packet from and to host `i`; its interface keeps the carrier."""
        self._lose(i, "drop")

    def lose(self, i: int, percent: float) -> None:
        """Lose so many of 100 packets from and to host `i`, each by a draw of its own."""
        self._lose(i, f"numgen random mod 1000 < {round(10 * percent)} drop")

    def limit(self, i: int, bits_per_s: int) -> None:
        """Let no more than so much pass from and to host `i`; for good."""
        shape = f"root tbf rate {bits_per_s}bit burst 16kb latency 400ms"
        for place, device in ((SWITCH, f"port{i}"), (i, "eth0")):
            self._tool(place, ["tc", "qdisc", "add", "dev", device, *shape.split()])

    def unplug(self, i: int) -> None:
        """Take the carrier from eth0 of host `i`."""
        self._tool(SWITCH, _IP, f"link set port{i} down\n")

    def delay(self, i: int, out_us: int, in_us: int) -> None:
        """Let each frame from host `i` take `out_us`, and each one to it `in_us`; once per host.

        Needs /dev/net/tun: this kernel may lack netem, so a program is put into the cable.
        """
        self._tool(SWITCH, _IP, f"link del port{i}\n")
        pids = [str(self._keepers[k].pid) for k in (1 + i, 0)]
        argv = [sys.executable, str(Path(__file__).with_name("delay.py")), *pids, f"port{i}"]
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        cable = subprocess.Popen([*argv, str(out_us), str(in_us)], **pipes)
        self._cables.append(cable)
        if cable.stdout is None or cable.stdout.readline() != "ready\n":
            raise RuntimeError("no TAP device could be made")
        self._tool(SWITCH, _IP, f"link set port{i} master br0 up\n")
        self._tool(i, _IP, f"addr add {self.address(i)}/24 dev eth0\nlink set eth0 up\n")

    def heal(self, i: int) -> None:
        """Undo `drop_larger_than`, `cut`, `lose` and `unplug` on host `i`."""
        self._lose(i, "")
        self._tool(SWITCH, _IP, f"link set port{i} up\n")

    def small_disk(self, i: int, path: str | os.PathLike[str], size_bytes: int) -> None:
        """Mount an empty disk of `size_bytes`, in whole pages, on a directory of host `i`."""
        options = f"size={size_bytes},mode=0755"
        command = ["mount", "-t", "tmpfs", "-o", options, "small-disk", os.fspath(path)]
        self._tool(i, command)

    def _hosts_file(self, i: int) -> str:
        real = [k for k in range(len(self.names)) if k != i or not self.debian_hosts]
        own = f"127.0.1.1 {self.names[i]}\n" if self.debian_hosts else ""
        lines = "".join(f"{self.address(k)} {self.names[k]}\n" for k in real)
        return f"127.0.0.1 localhost\n{own}{lines}"

    def _keep(self, *args: str) -> None:
        # In a session of its own: a Ctrl-C at the owner's terminal is not for the keeper.
        kw: dict[str, Any] = {"stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
        command, pipe = [*_PROGRAM, "keep", *args], subprocess.PIPE
        keeper: subprocess.Popen[str] = subprocess.Popen(command, stdin=pipe, stdout=pipe, **kw)
        self._keepers.append(keeper)
        line = keeper.stdout.readline() if keeper.stdout else ""
        if line != "ready\n":
            raise RuntimeError(line.strip() or "a keeper ended without a word")

    def _wire(self) -> None:
        decoys = ("cali0", "vxlan.calico", "tunl0", "docker0") if self.decoys else ()
        switch = ["link add br0 type bridge forward_delay 0", "link set br0 up"]
        for i in range(len(self.names)):
            pid = self._keepers[1 + i].pid
            switch.append(f"link add port{i} type veth peer name eth0 mtu 1500 netns {pid}")
            switch.append(f"link set port{i} master br0 up")
            for k, decoy in enumerate(decoys):
                switch.append(f"link add decoy{i}.{k} type veth peer name {decoy} netns {pid}")
                switch.append(f"link set decoy{i}.{k} addrgenmode none up")
        self._tool(SWITCH, _IP, "\n".join(switch))
        for i in range(len(self.names)):
            # With these off the interface sends what TCP calls segments, no bundles of them.
            self._tool(i, ["ethtool", "-K", "eth0", "tso", "off", "gso", "off", "gro", "off"])
            host = ["link set lo up", f"addr add {self.address(i)}/24 dev eth0", "link set eth0 up"]
            if decoys:
                host += [
                    "link set cali0 addrgenmode none address ee:ee:ee:ee:ee:ee up",
                    "addr add fe80::ecee:eeff:feee:eeee/64 dev cali0 nodad",
                    f"addr add 10.244.{i + 1}.0/32 dev vxlan.calico",
                    "link set vxlan.calico mtu 1450 up",
                    f"addr add 10.244.{i + 1}.1/32 dev tunl0",
                    "link set tunl0 addrgenmode none mtu 1480 up",
                    "addr add 172.17.0.1/16 brd 172.17.255.255 dev docker0",
                    "link set docker0 up",
                ]
            self._tool(i, _IP, "\n".join(host))

    def _lose(self, i: int, rule: str) -> None:
        # On the switch and not on the host: a rule there would tell the sender by EPERM.
        ports = (f"iifname port{i}", f"oifname port{i}")
        self._rules[self.names[i]] = "".join(f"{port} {rule}\n" for port in ports if rule)
        rules = "type filter hook forward priority 0\n" + "".join(self._rules.values())
        # Adding before deleting makes the first time like all others; nft applies all at once.
        text = "table bridge rig\ndelete table bridge rig\ntable bridge rig {\nchain forward {\n"
        self._tool(SWITCH, ["nft", "-f", "-"], f"{text}{rules}}}\n}}\n")

    def _tool(self, i: int, command: Sequence[str], text: str = "") -> None:
        argv = self.argv(i, command)
        done = subprocess.run(argv, input=text, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")


# What follows runs in processes of its own, see main().


def _system(name: str, *args: object) -> None:
    if getattr(_LIBC, name)(*args) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def _mount(source: str, target: str, kind: str, flags: int = 0) -> None:
    _system("mount", source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), None)


def _join(namespace: Path, kind: int) -> None:
    with namespace.open("rb") as file:
        _system("setns", file.fileno(), kind)


def _shift_clocks(offset_ns: int) -> None:
    _system("unshare", CLONE_NEWTIME)
    offsets = Path("/proc/self/timens_offsets")
    shifted = ""
    for line in offsets.read_text().splitlines():  # of the caller's own time namespace
        clock, seconds, nanoseconds = line.split()
        total = int(seconds) * GIGA + int(nanoseconds) + offset_ns
        shifted += f"{clock} {total // GIGA} {total % GIGA}\n"
    offsets.write_text(shifted)
    # unshare() puts only children into the new namespace; setns() takes this process there.
    _join(Path("/proc/self/ns/time_for_children"), CLONE_NEWTIME)


def _enter(pid: int) -> None:
    where = Path.cwd()
    of_host = Path(f"/proc/{pid}/ns")
    for name, kind in NAMESPACES.items():  # mounts last: they decide what /proc shows
        if (of_host / name).readlink() != Path(f"/proc/self/ns/{name}").readlink():
            _join(of_host / name, kind)
    os.chdir(where)


def _become(command: list[str]) -> None:
    # Python starts with these ignored, and exec would hand that on.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    # Nor may what Python adds to its environment (LC_CTYPE) reach the command.
    given = Path("/proc/self/environ").read_bytes().split(b"\0")
    environment = dict(entry.split(b"=", 1) for entry in given if b"=" in entry)
    os.execvpe(command[0], command, environment)


def _members(pid: int) -> list[int]:
    """Processes in the network namespace of `pid`, itself included; the dead do not count."""
    wanted = Path(f"/proc/{pid}/ns/net").readlink()
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it may end meanwhile
            if (entry / "ns" / "net").readlink() == wanted:
                found.append(int(entry.name))
    return found


def _clear() -> None:
    """Kill all that shares this process's network namespace; more than once, for forks."""
    while others := [pid for pid in _members(os.getpid()) if pid != os.getpid()]:
        for pid in others:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.005)


def _keep(name: str, hosts_file: str, offset_ns: int) -> None:
    """Hold the namespaces of a host, or with no name of the switch, as long as the owner wants."""
    if offset_ns:
        _shift_clocks(offset_ns)
    _system("unshare", CLONE_NEWNET | (CLONE_NEWUTS | CLONE_NEWNS if name else 0))
    if name:
        socket.sethostname(name)
        _mount("none", "/", "none", MS_REC | MS_PRIVATE)
        with tempfile.NamedTemporaryFile("w") as file:  # the mount outlives the name
            file.write(hosts_file)
            file.flush()
            os.fchmod(file.fileno(), 0o644)
            _mount(file.name, "/etc/hosts", "none", MS_BIND)
        groups = os.open("/sys/fs/cgroup", os.O_PATH)  # the new /sys would hide it
        _mount("sysfs", "/sys", "sysfs")  # shows the interfaces of the namespace it is made in
        _mount(f"/proc/self/fd/{groups}", "/sys/fs/cgroup", "none", MS_BIND | MS_REC)
    print("ready", flush=True)
    sys.stdin.readline()  # a line, or nothing when the owner has ended
    _clear()
    os._exit(0)  # without delay: whatever enters after the clearing would stay


def main(args: list[str]) -> str:
    """Run one of the three subcommands; return what went wrong."""
    try:
        match args:
            case ["time-namespace", offset_ns, "--", _, *_]:
                _system("prctl", PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL), 0, 0, 0)
                _shift_clocks(int(offset_ns))
                _become(args[3:])
            case ["enter", pid, "--", _, *_]:
                _enter(int(pid))
                _become(args[3:])
            case ["keep", name, hosts_file, offset_ns]:
                _keep(name, hosts_file, int(offset_ns))
    except OSError as error:
        return f"rig {' '.join(args[:2]).strip()}: {error}"
    return "usage: rig.py time-namespace OFFSET_NS -- COMMAND ..."


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
