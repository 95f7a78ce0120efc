"""Real commands as a user types them: torchrun and plain python, good input and bad."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from tests.support import environment, run_module, torchrun, torchrun_argv

pytestmark = pytest.mark.timeout(150)

OFFLINE = "distbench.offline"


def _only(folder: Path) -> Path:
    (path,) = folder.iterdir()
    return path


def test_no_arguments_one_rank(tmp_path: Path) -> None:
    done = run_module(OFFLINE, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    first = done.stdout.splitlines()[0]
    assert re.fullmatch(r"MEASUREMENT (VALID|INVALID); MLPerf v5.0 gates: not applied", first), (
        first
    )
    path = _only(tmp_path / "results")
    result = json.loads((path / "result.json").read_bytes())
    assert result["metrics"]["accuracy"]["value"] >= 357 / 360
    assert result["metrics"]["accuracy"]["n"] == 360
    assert result["metrics"]["throughput"]["value"] > 0
    assert result["config"]["duration"] == {"value": "5s", "origin": "default"}
    assert 2.5 < result["window"]["makespan_s"] < 15
    assert (path / "report.txt").read_text() in done.stdout
    check = run_module("distbench.verify", str(path))
    assert (check.returncode, check.stdout) == (0, f"{path}: good\n")


def test_two_ranks_by_torchrun_give_one_report(tmp_path: Path) -> None:
    done = torchrun(2, OFFLINE, "--duration", "1s", "--output_dir", str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("MEASUREMENT") == 1
    result = json.loads((_only(tmp_path) / "result.json").read_bytes())
    assert [row["rank"] for row in result["per_rank"]] == [0, 1]
    assert result["metrics"]["accuracy"]["n"] == 360
    assert result["config"]["output_dir"]["origin"] == "command line"
    assert run_module("distbench.verify", str(_only(tmp_path))).returncode == 0


def test_random_weights_get_no_accuracy(tmp_path: Path) -> None:
    argv = ["--model", "digits,width=8", "--num-samples", "64", "--warmup", "10ms"]
    done = run_module(OFFLINE, *argv, "--output-dir", str(tmp_path))
    assert done.returncode == 0, done.stderr
    accuracy = json.loads((_only(tmp_path) / "result.json").read_bytes())["metrics"]["accuracy"]
    assert accuracy["value"] is None
    assert "random" in accuracy["reason"]
    assert "accuracy         none: the weights are random" in done.stdout


def test_the_users_own_factory_in_the_current_folder(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "def build(world):\n"
        "    return lambda indices: [int(i) * world.world_size for i in indices]\n"
    )
    argv = ["--model", "mine:build", "--num-samples", "100", "--batch-size", "7"]
    done = torchrun(2, OFFLINE, *argv, "--warmup", "10ms", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "100 samples" in done.stdout


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["--batch-size", "0"], ["--batch-size", "'0'", "at least 1"]),
        (["--duration", "60"], ["--duration", "'60'", "no unit", "60s"]),
        (["--model", "digit"], ["no model 'digit'", "did you mean digits?"]),
        (["--model", "digits,widht=3"], ["takes no 'widht=3'", "width"]),
        (["--model", "digits,width=5000"], ["width", "5000", "1024"]),
        (["--model", "nowhere:build"], ["nowhere:build", "ModuleNotFoundError"]),
        (["--modle", "digits"], ["--modle", "did you mean --model?"]),
        (["--device", "gpu"], ["--device", "'gpu'", "cpu"]),
        (["--device", "cuda"], ["cuda"]),
        (["--backend", "nccl", "--device", "cpu"], ["--backend nccl needs a GPU"]),
        (["--output-dir", "/proc/nowhere"], ["/proc/nowhere", "--output-dir"]),
        (["--num-samples", "20000000", "--samples", "gather"], ["20000000", "10000000"]),
        (["--until", "1"], ["--until", "'1'", "1%"]),
        (["--rules", "mlperf-5.0"], ["mlperf-5.0", "did you mean mlperf-v5.0?"]),
    ],
)
def test_bad_input_is_one_sentence_and_exit_2(
    tmp_path: Path, argv: list[str], words: list[str]
) -> None:
    done = run_module(OFFLINE, *argv, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    sentence = [line for line in done.stderr.splitlines() if line.startswith("distbench: ")]
    assert len(sentence) == 1, done.stderr
    for word in words:
        assert word in sentence[0], sentence[0]
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == [], "nothing may be left half-written"


def test_under_torchrun_the_sentence_stands_in_the_root_cause_block(tmp_path: Path) -> None:
    done = torchrun(2, OFFLINE, "--batch-size", "0", cwd=tmp_path)
    assert done.returncode == 1
    block = done.stderr[done.stderr.index("Root Cause") :]
    assert "--batch-size: '0' is not a whole number of at least 1" in block
    assert "exitcode  : 2" in block


def test_an_unwritable_folder_on_one_rank_is_named_with_its_rank(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os\n"
        "def build(world):\n"
        "    if world.rank == 1:\n"
        "        os.chdir('/proc')\n"
        "    return lambda indices: list(indices)\n"
    )
    argv = ["--model", "mine:build", "--num-samples", "64", "--warmup", "10ms"]
    done = torchrun(2, OFFLINE, *argv, cwd=tmp_path)
    block = done.stderr[done.stderr.index("Root Cause") :]
    assert re.search(r"rank 1 \(.*\) cannot write to \/proc\/results", block)
    assert not (tmp_path / "results").exists() or not list((tmp_path / "results").iterdir())


def test_the_package_itself_names_the_modules(tmp_path: Path) -> None:
    listed = run_module("distbench")
    assert listed.returncode == 0
    assert "python -m distbench.offline" in listed.stdout
    done = run_module("distbench", "offline", "--duration", "1s", cwd=tmp_path)
    assert done.returncode == 2
    assert "`python -m distbench.offline`" in done.stderr


def test_help_lists_the_options() -> None:
    done = run_module(OFFLINE, "--help")
    assert done.returncode == 0
    for word in ("--model", "--duration", "--num-samples", "(default: 5s)"):
        assert word in done.stdout


def test_strict_gives_3_for_a_run_that_is_not_valid(tmp_path: Path) -> None:
    # A model that does nothing leaves nothing but the harness to measure.
    argv = ["--model", "echo", "--batch-size", "1", "--num-samples", "50000", "--strict"]
    done = run_module(OFFLINE, *argv, "--warmup", "10ms", "--output-dir", str(tmp_path))
    assert done.returncode == 3, done.stdout
    assert "harness-cost" in done.stdout


def _heed_sigint() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@contextmanager
def _job(n: int, folder: Path, *argv: str) -> Iterator[subprocess.Popen[str]]:
    """Start the command on ``n`` ranks by torchrun, or without it for 0; ends with the test."""
    command = torchrun_argv(n, OFFLINE) if n else [OFFLINE]
    with subprocess.Popen(
        [sys.executable, "-m", *command, *argv, "--output-dir", str(folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        # A shell starts what runs in its background with SIGINT ignored, and children inherit that.
        preexec_fn=_heed_sigint,
    ) as job:
        try:
            yield job
        finally:
            job.kill()


def _await_rows(folder: Path, ranks: int, rows: int) -> list[int]:
    """Wait until every rank has completed so many rows; returns their process ids."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        paths = sorted(folder.glob("*/ranks/*/rank.json"))
        done = [_completed(p.parent) for p in paths]
        if len(paths) == ranks and min(done) >= rows:
            return [json.loads(p.read_bytes())["pid"] for p in paths]
        time.sleep(0.05)
    raise AssertionError("the window did not begin")


def _completed(path: Path) -> int:
    columns = json.loads((path / "rank.json").read_bytes())["columns"]
    rows = np.load(path / "samples.npy", mmap_mode="r")
    done = rows[:, columns.index("completed")] >= 0
    return int(rows[done, columns.index("count")].sum())


SLOW = ("--model", "sleep,per_sample=1ms", "--batch-size", "8", "--duration", "60s")


@pytest.mark.parametrize(
    "victims", [[1], *(pytest.param(each, marks=pytest.mark.slow) for each in ([0], [0, 1]))]
)
def test_sigkill_in_the_window_loses_no_completed_sample(
    tmp_path: Path, victims: list[int]
) -> None:
    with _job(2, tmp_path, *SLOW) as job:
        pids = _await_rows(tmp_path, 2, 200)
        before = [_completed(p) for p in sorted(tmp_path.glob("*/ranks/*"))]
        killed = time.monotonic()
        for rank in victims:
            os.kill(pids[rank], signal.SIGKILL)
        out, err = job.communicate(timeout=40)
        took = time.monotonic() - killed
    assert job.returncode == 1
    assert took < 20, f"survivors took {took:.1f} s"
    path = _only(tmp_path)
    after = [_completed(p) for p in sorted(path.glob("ranks/*"))]
    assert all(a >= b >= 200 for a, b in zip(after, before, strict=True))
    if len(victims) == 1:
        assert "MEASUREMENT INCOMPLETE" in out
        assert f"rank {victims[0]} (" in err
    salvage = run_module("distbench.salvage", str(path))
    assert salvage.returncode == 6, salvage.stderr
    assert salvage.stdout.startswith("MEASUREMENT INCOMPLETE")
    result = json.loads((path / "result.json").read_bytes())
    assert [row["samples"] for row in result["per_rank"]] == after
    named = {f["rank"] for f in result["verdict"]["findings"] if f["level"] == "incomplete"}
    assert named >= set(victims)
    assert result["metrics"]["throughput"]["value"] is None
    assert result["metrics"]["throughput"]["reason"]
    assert run_module("distbench.verify", str(path)).returncode == 6


def test_sigterm_leaves_an_incomplete_report(tmp_path: Path) -> None:
    with _job(1, tmp_path, *SLOW) as job:
        (pid,) = _await_rows(tmp_path, 1, 100)
        os.kill(pid, signal.SIGTERM)
        out, err = job.communicate(timeout=40)
    assert "MEASUREMENT INCOMPLETE" in out
    assert "SIGTERM" in err
    assert run_module("distbench.verify", str(_only(tmp_path))).returncode == 6


def test_a_frozen_rank_is_lost_after_silence(tmp_path: Path) -> None:
    with _job(2, tmp_path, *SLOW) as job:
        pids = _await_rows(tmp_path, 2, 100)
        os.kill(pids[1], signal.SIGSTOP)
        begin = time.monotonic()
        while _exists(pids[0]) and time.monotonic() - begin < 30:
            time.sleep(0.1)
        took = time.monotonic() - begin
        os.kill(pids[1], signal.SIGKILL)
        out, err = job.communicate(timeout=60)
    assert took < 20
    assert "nothing was heard from it" in err
    assert "MEASUREMENT INCOMPLETE" in out


def _exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_ctrl_c_leaves_an_incomplete_report_and_130(tmp_path: Path) -> None:
    with _job(0, tmp_path, *SLOW) as job:
        _await_rows(tmp_path, 1, 100)
        job.send_signal(signal.SIGINT)
        out, _ = job.communicate(timeout=30)
    assert job.returncode == 130
    assert "MEASUREMENT INCOMPLETE" in out


def test_sigterm_to_every_rank_at_once_leaves_one_report(tmp_path: Path) -> None:
    with _job(2, tmp_path, *SLOW) as job:
        for pid in _await_rows(tmp_path, 2, 100):
            os.kill(pid, signal.SIGTERM)
        out, _ = job.communicate(timeout=40)
    assert "MEASUREMENT INCOMPLETE" in out
    assert json.loads((_only(tmp_path) / "result.json").read_bytes())["verdict"]["status"] == (
        "INCOMPLETE"
    )
    assert run_module("distbench.verify", str(_only(tmp_path))).returncode == 6


def test_a_closed_stderr_does_not_keep_a_run_from_its_end(tmp_path: Path) -> None:
    """Progress goes to stderr every 10 s; whoever read it is gone by then."""
    argv = [sys.executable, "-m", OFFLINE, "--model", "sleep,per_sample=1ms", "--duration", "11s"]
    with subprocess.Popen(
        [*argv, "--output-dir", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
    ) as job:
        assert job.stderr is not None and job.stdout is not None
        job.stderr.close()
        try:
            out = job.stdout.read()
            job.wait(timeout=60)
        finally:
            job.kill()
    assert job.returncode == 0
    assert out.startswith("MEASUREMENT")


def test_a_duration_that_the_rules_refuse_is_told_before_the_run(tmp_path: Path) -> None:
    argv = ["--duration", "200ms", "--warmup", "100ms", "--device", "cpu", "--rules", "mlperf-v5.1"]
    done = run_module("distbench.offline", *argv, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.startswith("distbench: a window of --duration 0.2s cannot last the 600 s ")
    assert "give --duration 600s, or --rules mlperf-v5.1,shortened=0.2s" in done.stderr
    assert "info  rules-too-short: a window of" in done.stdout
    assert "MLPerf v5.1 gates: INVALID" in done.stdout.splitlines()[0]
    quiet = run_module("distbench.offline", *argv, "--quiet", cwd=tmp_path)
    assert "cannot last" not in quiet.stderr and "rules-too-short" in quiet.stdout
