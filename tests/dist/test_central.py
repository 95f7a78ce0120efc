"""Central dispatch from end to end on gloo ranks: every query once, exact sums, lost drivers."""

from __future__ import annotations

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench.load import Load, schedule
from distbench.rules import parse_rules
from distbench.run import load_run
from distbench.sut import Done, Echo, FromCallable, Sleep
from distbench.verify import verify
from tests.support import environment, run_ranks

pytestmark = pytest.mark.timeout(120)

MS, S = 10**6, 10**9


def _serve(
    out: str, make: Any, qps: float, queries: int, hook: Any = None, **load: Any
) -> dict[str, Any]:
    """Run Server under central dispatch on this rank; tells what is left of it."""
    from distbench import central
    from distbench.server import run_server
    from distbench.world import join

    pids: list[int] = []
    drive = central.Dispatch.drive

    def armed(self: Any, sut: Any, *args: Any) -> None:
        sut.armed = True  # the warm-up is over
        pids.append(0 if self.process is None else self.process.pid)
        if hook is not None:
            hook(self)
        drive(self, sut, *args)

    central.Dispatch.drive = armed  # type: ignore[method-assign]
    with join(device="cpu", timeout_s=30) as world:
        made = Load(qps, dispatch="central", **load)
        run = run_server(
            make(world.rank), world, load=made, num_samples=queries, output_dir=out, warmup_s=0.05
        )
        return {
            "result": run.result(), "folder": str(getattr(run, "folder", None) or ""),
            "driver": pids[0] if pids else 0,
        }  # fmt: skip


def _gone(pid: int) -> bool:
    """Tell whether a process has ended; it is a child of a process that has ended."""
    for _ in range(200):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


def _echo(_rank: int) -> Echo:
    return Echo()


def _sleep(_rank: int) -> Sleep:
    return Sleep(2 * MS)


def _run_echo(out: str, queries: int) -> dict[str, Any]:
    return _serve(out, _echo, 1_000.0, queries)


def _run_sleep(out: str, queries: int) -> dict[str, Any]:
    return _serve(out, _sleep, 1_500.0, queries, max_batch=8, max_wait_ns=3 * MS)


def _logs(folder: Path) -> dict[str, Any]:
    run = load_run(folder)
    assert run.driver is not None
    return {"run": run, "driver": run.driver, "ranks": run.present}


@pytest.mark.parametrize("ranks", [1, 2])
def test_every_query_is_served_once_and_the_driver_is_gone(tmp_path: Path, ranks: int) -> None:
    told = run_ranks(_run_echo, ranks, str(tmp_path), 600)
    assert all(each["result"] == told[0]["result"] for each in told)
    folder = Path(told[0]["folder"])
    result, logs = told[0]["result"], _logs(folder)
    driver = logs["driver"]
    assert result["metrics"]["latency.p99"]["n"] == 600
    assert sum(row["samples"] for row in result["per_rank"]) == 600
    assert (driver.column("completed") > driver.column("issued")).all()
    assert (driver.column("issued") >= driver.column("scheduled")).all()
    numbers = [record.column("query") for record in logs["ranks"]]
    assert sorted(np.concatenate(numbers).tolist()) == list(range(600))
    for record, own in zip(logs["ranks"], numbers, strict=True):
        assert (driver.column("served_by")[own] == record.rank).all()
        assert (driver.column("index")[own] == record.column("index")).all()
        # On one machine both read one clock: what came after is later.
        assert (record.column("scheduled") >= driver.column("issued")[own]).all()
        assert (driver.column("completed")[own] >= record.column("completed")).all()
    assert _gone(told[0]["driver"])
    assert verify(folder) == (0, [])
    assert {path.name for path in (folder / "driver").iterdir()} == {
        "driver.json", "samples.npy", "after.json", "done.json",
    }  # fmt: skip


def test_the_schedule_is_the_one_of_static_dispatch(tmp_path: Path) -> None:
    folder = Path(run_ranks(_run_echo, 2, str(tmp_path), 300)[0]["folder"])
    driver = _logs(folder)["driver"]
    drawn = schedule(
        Load(1_000.0), parse_rules("none"), duration_ns=5 * S, num_queries=300, seed=0,
        model="", total=1024, resident=1024, replicas=2,
    )  # fmt: skip
    begin = driver.after["plan"]["local_ns"]
    assert (driver.column("scheduled") - begin).tolist() == drawn.due_ns.tolist()
    assert driver.column("index").tolist() == drawn.index.tolist()


def test_batches_form_and_the_parts_of_a_latency_sum_exactly(tmp_path: Path) -> None:
    told = run_ranks(_run_sleep, 2, str(tmp_path), 900)
    folder = Path(told[0]["folder"])
    run = load_run(folder)
    from distbench.joined import official

    (driver,) = official(run)
    made = driver.made
    latency = driver.column("completed") - driver.column("scheduled")
    parts = sum(made[name] for name in ("lateness", "queue", "service", "return"))
    assert len(latency) == 900
    np.testing.assert_array_equal(parts, latency)
    assert all((made[name] >= 0).all() for name in ("lateness", "queue", "service", "return"))
    sizes = np.concatenate([record.first_rows("count") for record in run.present])
    assert sizes.sum() == 900
    assert sizes.max() <= 8
    assert (sizes > 1).any()  # 1,500 queries/s at 2 ms each need groups
    assert (made["service"] >= 2 * MS).all()
    assert verify(folder) == (0, [])


# What ends a run early


def _kill_soon(dispatch: Any) -> None:
    if dispatch.process is not None:
        threading.Timer(0.6, dispatch.process.kill).start()


def _killed(out: str) -> dict[str, Any]:
    return _serve(out, _echo, 300.0, 6_000, _kill_soon)


def test_a_driver_that_is_killed_is_named_and_its_samples_are_kept(tmp_path: Path) -> None:
    begin = time.monotonic()
    told = run_ranks(_killed, 2, str(tmp_path))
    assert time.monotonic() - begin < 30
    result = told[0]["result"]
    assert result["verdict"]["status"] == "INCOMPLETE"
    (found,) = [f for f in result["verdict"]["findings"] if f["level"] == "incomplete"]
    assert found["code"] == "driver-lost"
    host = socket.gethostname()
    assert found["message"].startswith(f"the driver ({host}) was lost: the link to the driver")
    assert "exit status was -9" in found["message"]
    folder = Path(told[0]["folder"])
    logs = _logs(folder)
    done = (logs["driver"].column("completed") >= 0).sum()
    assert 50 < done < 1_000
    assert result["metrics"]["latency.p50"]["n"] == done
    assert verify(folder)[0] == 6
    assert _gone(told[0]["driver"])


def _die(dispatch: Any) -> None:
    if dispatch.world.rank == 1:
        threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGKILL)).start()


def _pid_file(dispatch: Any, path: str) -> None:
    if dispatch.process is not None:
        Path(path).write_text(str(dispatch.process.pid))
    _die(dispatch)


def _dying(out: str, path: str) -> dict[str, Any]:
    return _serve(out, _echo, 300.0, 9_000, lambda dispatch: _pid_file(dispatch, path))


def test_a_rank_that_is_killed_ends_all_and_the_driver_with_it(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "pid"
    told = run_ranks(_dying, 2, str(out), str(path), allow_exit=(0, 1))
    assert told == [6, -9]
    (folder,) = out.iterdir()
    assert _gone(int(path.read_text()))
    result = json.loads((folder / "result.json").read_text())
    assert result["verdict"]["status"] == "INCOMPLETE"
    found = [f for f in result["verdict"]["findings"] if f["level"] == "incomplete"]
    assert "rank-lost" in {f["code"] for f in found}
    run = load_run(folder)
    assert run.driver is not None
    assert (run.driver.column("completed") >= 0).sum() > 50
    assert run.driver.after is not None and run.driver.after["end"]
    assert verify(folder)[0] == 6


class Faulty(Echo):
    """Raises at its 20th group of the window."""

    armed = False
    groups = 0

    def poll(self, until_ns: int) -> list[Done]:
        self.groups += self.armed
        if self.groups == 20:
            raise RuntimeError("out of tiles")
        return super().poll(until_ns)


def _faulty(rank: int) -> Any:
    return Faulty() if rank == 1 else Echo()


def _raising(out: str) -> dict[str, Any]:
    return _serve(out, _faulty, 500.0, 3_000)


def test_a_system_that_raises_ends_the_window_as_invalid(tmp_path: Path) -> None:
    told = run_ranks(_raising, 2, str(tmp_path))
    result = told[0]["result"]
    assert result["verdict"]["status"] == "INVALID"
    (failed,) = [f for f in result["verdict"]["findings"] if f["code"] == "samples-failed"]
    assert "RuntimeError: out of tiles" in failed["message"]
    assert failed["rank"] == 1
    folder = Path(told[0]["folder"])
    done = (_logs(folder)["driver"].column("completed") >= 0).sum()
    assert 20 <= done < 200
    assert verify(folder) == (0, [])
    assert _gone(told[0]["driver"])


def _slow(_rank: int) -> Sleep:
    return Sleep(20 * MS)


def _overloaded(out: str) -> dict[str, Any]:
    return _serve(out, _slow, 1_000.0, 20_000)


def test_too_much_outstanding_gives_the_window_up(tmp_path: Path) -> None:
    told = run_ranks(_overloaded, 2, str(tmp_path))
    result = told[0]["result"]
    assert result["verdict"]["status"] == "INVALID"
    (found,) = [f for f in result["verdict"]["findings"] if f["code"] == "overloaded"]
    assert "more than 1000 were outstanding at every replica" in found["message"]
    assert 40 < found["value"] < 110  # two ranks of 50 queries/s
    folder = Path(told[0]["folder"])
    assert all(record.after["halted"] for record in _logs(folder)["ranks"])
    assert verify(folder) == (0, [])


# Drivers started by hand


@contextmanager
def _by_hand(out: Path, token: str) -> Iterator[tuple[Any, str, Path]]:
    path = out.parent / "token"
    path.write_text(token + "\n")
    argv = [sys.executable, "-m", "distbench.driver", "--token-file", str(path)]
    argv += ["--output-dir", str(out)]
    process = subprocess.Popen(
        argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().split()[-1], path
    finally:
        with suppress(OSError):
            process.kill()
        process.communicate()


def _with(out: str, address: str, token: str) -> dict[str, Any]:
    return _serve(out, _echo, 500.0, 200, driver=address, driver_token=token)


def test_a_driver_started_by_hand_on_another_disk_serves_one_run(tmp_path: Path) -> None:
    there = tmp_path / "there" / "results"
    there.parent.mkdir()
    with _by_hand(there, secrets.token_hex(16)) as (process, address, token):
        # Strays: one that hangs up, one that says something else, one that says nothing.
        host, port = address.split(":")
        with socket.create_connection((host, int(port)), 5):
            pass
        with (
            socket.create_connection((host, int(port)), 5) as stray,
            socket.create_connection((host, int(port)), 5),
        ):
            stray.sendall(b"GET / HTTP/1.1\r\n\r\n")
            told = run_ranks(_with, 2, str(tmp_path / "here"), address, str(token))
        assert process.wait(20) == 0
    assert told[0]["result"]["metrics"]["latency.p50"]["n"] == 200
    folder = Path(told[0]["folder"])
    assert verify(folder) == (0, [])
    # Rank 0 has a true copy of what the driver keeps.
    (own,) = there.iterdir()
    assert own.name == folder.name
    for name in ("driver.json", "samples.npy", "after.json", "done.json"):
        copies = [(each / "driver" / name).read_bytes() for each in (own, folder)]
        assert copies[0] == copies[1], name


def _refused(out: str, address: str, token: str) -> str:
    from distbench.errors import UsageError

    try:
        _with(out, address, token)
    except UsageError as error:
        return str(error)
    return "nothing was refused"


def test_a_wrong_token_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    out, wrong = tmp_path / "out", tmp_path / "wrong"
    wrong.write_text("0" * 32)
    with _by_hand(out, secrets.token_hex(16)) as (process, address, _):
        told = run_ranks(_refused, 2, str(out), address, str(wrong))
        assert process.poll() is None, "it waits for one that knows the token"
    assert told[0] == told[1]
    assert "rank 0" in told[0] and "reached the driver" in told[0]
    assert not out.exists()


def test_nobody_at_the_address_of_a_driver(tmp_path: Path) -> None:
    token = tmp_path / "token"
    token.write_text("0" * 32)
    with socket.socket() as bound:  # bound and not listening: nobody else can take the port
        bound.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{bound.getsockname()[1]}"
        told = run_ranks(_refused, 2, str(tmp_path / "out"), address, str(token))
    assert all("rank 0" in each and "cannot reach the driver" in each for each in told)


# Payloads


class Reads(FromCallable):
    """Checks that the data of a query is what its index stands for."""

    def __init__(self, samples: Sequence[bytes]) -> None:
        super().__init__(lambda indices: indices)
        self.samples, self.seen = samples, 0

    def issue(self, row: int, indices: Any, data: Sequence[bytes] | None = None) -> None:
        if data is not None:
            assert list(data) == [self.samples[index] for index in indices]
            self.seen += len(data)
        super().issue(row, indices)


def _with_data(out: str) -> tuple[int, dict[str, Any]]:
    from distbench import central
    from distbench.models.tinylm_data import samples

    central.payload_module = lambda _name: "distbench.models.tinylm_data"  # type: ignore[assignment]
    sut = Reads(samples(range(1024)))
    told = _serve(out, lambda _rank: sut, 500.0, 300, payload="data", max_batch=4)
    return sut.seen, told


def test_samples_cross_the_wire_as_the_model_encodes_them(tmp_path: Path) -> None:
    told = run_ranks(_with_data, 2, str(tmp_path))
    assert sum(seen for seen, _ in told) == 300
    folder = Path(told[0][1]["folder"])
    assert _logs(folder)["driver"].before["payload"] == "data"
    assert verify(folder) == (0, [])


def _no_data(out: str) -> str:
    from distbench.errors import UsageError

    try:
        _serve(out, _echo, 500.0, 300, payload="data")
    except UsageError as error:
        return str(error)
    return "nothing was refused"


def test_a_model_without_encoded_samples_is_refused(tmp_path: Path) -> None:
    for told in run_ranks(_no_data, 2, str(tmp_path / "out")):
        assert "--payload data needs a model whose samples can be encoded" in told
        assert "use --payload index" in told
    assert not (tmp_path / "out").exists()


# Loading crosses the wire


class Loads(Echo):
    """Notes what it was told to load and to let go."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[Any] = []

    def load(self, indices: Any) -> None:
        self.told.append(("load", indices.tolist()))

    def unload(self, indices: Any) -> None:
        self.told.append(("unload", indices.tolist()))


def _loading(out: str) -> list[Any]:
    sut = Loads()
    _serve(out, lambda _rank: sut, 500.0, 50)
    return sut.told


def test_samples_are_loaded_and_let_go_at_the_drivers_word(tmp_path: Path) -> None:
    every = list(range(1024))
    for told in run_ranks(_loading, 2, str(tmp_path)):
        assert told == [("load", every), ("unload", every)]
