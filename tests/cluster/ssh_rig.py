"""Hosts of `rig` with a real sshd and a home of their own each, for tests of the launcher.

jw1 is where the launcher runs, with a Python that has numpy and no torch. Keys only, host keys
pinned in jw1's known_hosts. Homes are empty; what the interpreter needs below the real home stays.
A host's sshd, and so whatever is started over ssh, has process ids of its own and sees nothing of
another host's; what the tests run directly on a host sees all, and so finds what is left over.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster import rig
from tests.support import REPO, environment

SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:" + os.environ.get("PATH", ""))
HOME = Path("~").expanduser()
PYTHON = sys.executable
CONFIG = """\
Host *
  IdentityFile ~/.ssh/id
  IdentitiesOnly yes
"""


def available() -> str:
    """Say in one sentence why these hosts cannot be made here; empty when they can."""
    if shutil.which("mkfs.ext4", path="/usr/sbin:/sbin:" + os.environ.get("PATH", "")) is None:
        return "The launcher's tests need `mkfs.ext4` (package e2fsprogs)."
    if SSHD is None or shutil.which("ssh") is None:
        return "The launcher's tests need `sshd` and `ssh` (package openssh-server)."
    return rig.available()


@dataclass(frozen=True)
class SshHosts:
    """The hosts, by name.

    Attributes:
        hosts: the rig's.
        names: in order.
        folder: the tests' own, which all hosts see.
    """

    hosts: rig.Hosts
    names: tuple[str, ...]
    folder: Path

    def number(self, name: str) -> int:
        """Return a host's number in the rig."""
        return self.names.index(name)

    def run(
        self, name: str, *command: str, timeout: float = 60, **env: str
    ) -> subprocess.CompletedProcess[str]:
        """Run a command in a host's home."""
        return self.hosts.run(
            self.number(name), ["env", f"--chdir={HOME}", *command], timeout, self._env(env)
        )

    def popen(self, name: str, *command: str, **kw: Any) -> subprocess.Popen[Any]:
        """Start a command in a host's home."""
        env = self._env(kw.pop("env", {}))
        argv = ["env", f"--chdir={HOME}", *command]
        return self.hosts.popen(self.number(name), argv, env, **kw)

    def launcher(self, *arguments: str) -> list[str]:
        """Return the argv of the launcher, for jw1: the Python there has numpy and no torch."""
        return [base_python(), str(REPO / "launch/ssh.py"), "--python", PYTHON, *arguments]

    def launch(self, *arguments: str, timeout: float = 100) -> subprocess.CompletedProcess[str]:
        """Run the launcher on jw1."""
        return self.run("jw1", *self.launcher(*arguments), timeout=timeout)

    def working(self, name: str) -> list[int]:
        """Return the processes on a host that are none of sshd's own."""
        found = []
        for pid in self.hosts.processes(self.number(name)):
            try:
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
            except OSError:
                continue
            if b"sshd" not in command and command:
                found.append(pid)
        return found

    def power_cut(self, name: str) -> None:
        """End a host at once: nothing of it says goodbye."""
        self.hosts.unplug(self.number(name))
        self._signal(name, signal.SIGKILL)

    def disk(self, name: str, path: Path, size_bytes: int = 512 << 20) -> None:
        """Mount a file system of a host's own, in a file of the tests' folder, on a directory."""
        image = self.folder / f"{name}.disk"
        with image.open("wb") as file:
            file.truncate(size_bytes)
        tool = ["mkfs.ext4", "-q", "-F", str(image)]
        subprocess.run(tool, check=True, timeout=60, env={"PATH": "/usr/sbin:/sbin:/usr/bin:/bin"})
        done = self.run(name, "mount", "-o", "loop", str(image), str(path))
        assert done.returncode == 0, done.stderr

    def power_cut_with_disk(self, name: str) -> Path:
        """End a host at once; returns a copy of what had reached its disk by then.

        The file behind the loop device has what the file system wrote there, not what the kernel
        still holds in its page cache for the mapped files.
        """
        self.hosts.unplug(self.number(name))
        self.freeze(name)
        disk, copied = self.folder / f"{name}.disk", self.folder / f"{name}.cut"
        subprocess.run(["cp", "--sparse=always", str(disk), str(copied)], check=True, timeout=60)
        self.power_cut(name)
        return copied

    def freeze(self, name: str) -> None:
        """Stop every process of a host."""
        self._signal(name, signal.SIGSTOP)

    def _signal(self, name: str, number: signal.Signals) -> None:
        for pid in self.hosts.processes(self.number(name)):
            with contextlib.suppress(ProcessLookupError):  # it went with sshd's namespace
                os.kill(pid, number)

    def _env(self, more: dict[str, str]) -> dict[str, str]:
        kept = {k: v for k, v in environment().items() if k in ("PATH", "LANG", "LC_ALL")}
        return {**kept, "HOME": str(HOME), "PYTHONPATH": str(self.folder / "jw1-site"), **more}


def base_python() -> str:
    """Return a Python that has the standard library alone."""
    return str(Path(sys.base_prefix) / "bin" / f"python3.{sys.version_info.minor}")


@contextmanager
def ssh_hosts(
    folder: Path,
    names: Sequence[str] = ("jw1", "jw2", "jw3"),
    time_offsets_ns: Sequence[int] | None = None,
) -> Iterator[SshHosts]:
    """Make hosts, from `with` to the end of its block.

    Args:
        folder: empty; keys and logs go there.
        names: of the hosts.
        time_offsets_ns: shift of their monotonic clocks.
    """
    _only_numpy(folder / "jw1-site")
    _keys(folder, names)
    servers = list[subprocess.Popen[Any]]()
    with ExitStack() as stack:
        stack.callback(lambda: [server.wait(10) for server in servers])  # the rig has ended them
        hosts = stack.enter_context(
            rig.Hosts(len(names), decoys=True, names=names, time_offsets_ns=time_offsets_ns)
        )
        made = SshHosts(hosts, tuple(names), folder)
        for name in names:
            _home(made, name)
            servers.append(_serve(made, name))
        yield made


def _only_numpy(site: Path) -> None:
    import numpy

    site.mkdir()
    source = Path(numpy.__file__).parent
    for path in (source, source.with_name("numpy.libs")):
        if path.exists():
            (site / path.name).symlink_to(path)


def _keys(folder: Path, names: Sequence[str]) -> None:
    known = ""
    for name in ("id", *names):
        argv = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", name, "-f", folder / name]
        subprocess.run(argv, check=True, timeout=20)
    for i, name in enumerate(names):
        known += f"{name},10.77.0.{11 + i} {(folder / f'{name}.pub').read_text()}"
    (folder / "known_hosts").write_text(known)
    (folder / "config").write_text(CONFIG)


def _home(made: SshHosts, name: str) -> None:
    """Give a host an empty home, with what the interpreter needs of the real one."""
    number, lines = made.number(name), ["set -e", "mount -t tmpfs -o mode=755 run /run"]
    lines.append("mkdir /run/sshd")
    kept = {Path(sys.base_prefix), Path(sys.prefix), REPO}
    kept = {path for path in kept if path.is_relative_to(HOME)}
    for i, path in enumerate(kept):
        lines += [f"mkdir /run/kept{i}", f"mount --bind '{path}' /run/kept{i}"]
    lines.append(f"mount -t tmpfs -o mode=700,size=4g home '{HOME}'")
    for i, path in enumerate(kept):
        lines += [f"mkdir -p '{path}'", f"mount --move /run/kept{i} '{path}'"]
    ssh = HOME / ".ssh"
    lines += [f"mkdir -m 700 '{ssh}'"]
    lines += [f"cp '{made.folder / each}' '{ssh}'" for each in ("id", "known_hosts", "config")]
    lines += ["mount --make-rshared /"]  # what is mounted later shows under sshd too
    done = made.hosts.run(number, ["sh", "-c", "\n".join(lines)])
    assert done.returncode == 0, done.stderr


def _serve(made: SshHosts, name: str) -> subprocess.Popen[Any]:
    """Start a host's sshd and wait until it listens."""
    number, folder = made.number(name), made.folder
    address = made.hosts.address(number)
    config = folder / f"{name}.sshd"
    config.write_text(
        f"HostKey {folder / name}\nPidFile none\nUsePAM no\n"
        f"AuthorizedKeysFile {folder / 'id.pub'}\nStrictModes no\nPasswordAuthentication no\n"
        "KbdInteractiveAuthentication no\nPermitRootLogin prohibit-password\nMaxStartups 50\n"
    )
    with (folder / f"{name}.log").open("ab") as log:
        argv = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
        argv += ["--propagation", "slave", str(SSHD), "-D", "-e", "-f", str(config)]
        server = made.hosts.popen(number, argv, stderr=log)
    deadline = time.monotonic() + 10
    while made.hosts.run(number, ["bash", "-c", f"exec 3<>/dev/tcp/{address}/22"]).returncode:
        assert time.monotonic() < deadline, (folder / f"{name}.log").read_text()
        time.sleep(0.02)
    return server
