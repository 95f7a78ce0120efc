"""What the benchmarks share; and, asked for with -m slow, that each of them runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support import REPO, environment

BENCHMARKS = REPO / "benchmarks"


@pytest.fixture
def common(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import common

    return common


def test_a_ratio_is_formed_within_each_round(common: Any) -> None:
    assert common.ratios([2, 30, 8], [1, 10, 2]) == [2, 3, 4]
    with pytest.raises(ValueError, match="zip"):
        common.ratios([1], [1, 2])


def test_the_interval_of_a_mean_ratio_is_students_on_logarithms(common: Any) -> None:
    # Of two values 50 % of Student's t lie within 1 standard error: here the factor 2 about 4.
    assert common.mean_ratio([2, 8], 0.5) == pytest.approx((4, 2, 8))
    mean, low, high = common.mean_ratio([1.1, 0.9, 1.0, 1.05], 0.99)
    inverse = common.mean_ratio([1 / 1.1, 1 / 0.9, 1.0, 1 / 1.05], 0.99)
    assert inverse == pytest.approx((1 / mean, 1 / high, 1 / low))


def test_sides_go_first_in_turn_and_only_equal_loads_are_compared(common: Any) -> None:
    import native

    calls: list[str] = []

    def take(name: str, samples: int) -> Any:
        return lambda: calls.append(name) or {"samples": samples}

    same = {"native": take("N", 5), "loadgen": take("L", 5)}
    (told,) = native.in_turn(3, [same])
    assert "".join(calls) == "NLLNNL" and len(told["native"]) == len(told["loadgen"]) == 3
    with pytest.raises(SystemExit, match=r"\[5, 6\] samples"):
        native.in_turn(1, [{"native": take("N", 5), "loadgen": take("L", 6)}])


def test_floors_are_each_sides_own_and_one_must_be_within_the_interval(common: Any) -> None:
    import native

    floors = {"native": [1.0, 2.0], "loadgen": [3.0, 3.0]}
    left = native.less({"native": [5.0, 6.0], "loadgen": [7.0, 7.0]}, floors, "sleep")
    assert left == {"native": [4.0, 4.0], "loadgen": [4.0, 4.0]}
    with pytest.raises(SystemExit, match="shorter than its floor"):
        native.less(floors, floors, "sleep")
    assert native.rows_of("p50", left, "s", judged=True)[-1].held is True
    apart = {"native": [4.0, 4.0], "loadgen": [4.4, 4.4000001]}
    last = native.rows_of("p50", apart, "s", judged=True)[-1]
    assert last.held is False and last.values[0] == pytest.approx(0.1, abs=1e-4)


def test_cases_run_in_turn(common: Any) -> None:
    calls: list[str] = []

    def case(name: str) -> Any:
        return lambda: calls.append(name) or float(len(calls))

    told = common.interleave(3, a=case("A"), b=case("B"))
    assert calls == ["A", "B"] * 3
    assert told == {"a": [1, 3, 5], "b": [2, 4, 6]}


def test_a_limit_is_held_by_the_median(common: Any) -> None:
    assert common.Row("x", [1, 2, 90], limit=2).held is True
    assert common.Row("x", [1, 3, 3], limit=2).held is False
    assert common.Row("x", [1]).held is None
    assert common.Row("x", [], limit=2).held is None


def test_quantiles_are_those_of_loadgen(common: Any) -> None:
    values = list(range(100, 0, -1))
    assert common.quantile(values, 0.9) == 91
    assert common.quantile(values, 0.99) == 100
    assert common.quantile([7], 0.99) == 7


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.00012345, "1.23e-04"),
        (0.012345, "0.01235"),
        (19.27, "19.27"),
        (12345.6, "12,346"),
    ],
)
def test_numbers_are_short(common: Any, value: float, text: str) -> None:
    assert common.show(value) == text


def test_the_file_holds_what_was_printed_and_every_value(
    common: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "told.json"
    report = common.Report("mine", {"rounds": 3, "folder": tmp_path, "json": str(path)})
    report.say("a sentence")
    rows = [
        common.Row("fast", [3.0, 1.0, 2.0], "ns", limit=1),
        common.Row("never", [], note="not measurable"),
    ]
    report.table("A table", rows, {"p90": 0.9})
    report.end(str(path))
    printed = capsys.readouterr().out
    for text in (
        "a sentence",
        "A table",
        "p90",
        "limit 1: MISSED",
        "not measurable",
        "load average",
    ):
        assert text in printed
    told = json.loads(path.read_bytes())
    assert told["options"] == {"rounds": 3, "folder": str(tmp_path)}
    (table,) = told["tables"]
    fast, never = table["rows"]
    assert (fast["median"], fast["min"], fast["max"], fast["p90"]) == (2, 1, 3, 3)
    assert fast["values"] == [3, 1, 2]
    assert (fast["held"], never["held"], never["median"]) == (False, None, None)
    assert set(told["load_average"]) == {"begin", "end"}
    assert [p.name for p in tmp_path.iterdir()] == ["told.json"]


def test_a_rank_that_is_silent_prints_and_writes_nothing(
    common: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = common.Report("mine", {}, silent=True)
    report.table("A table", [common.Row("x", [1])])
    report.end(str(tmp_path / "told.json"))
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def _gpu_script(tmp_path: Path, says: str) -> subprocess.CompletedProcess[str]:
    """Run gpu.sh with a stand-in for Python that answers the question about CUDA."""
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{says}\n")
    python.chmod(0o755)
    return subprocess.run(
        ["bash", str(BENCHMARKS / "gpu.sh"), "--seconds", "1"],
        env={**environment(), "PYTHON": str(python)},
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=30,
        check=False,
    )


def _results() -> list[Path]:
    return sorted((BENCHMARKS / "results").glob("*"))


def test_without_a_gpu_nothing_is_measured_and_nothing_is_written(tmp_path: Path) -> None:
    before = _results()
    done = _gpu_script(tmp_path, "echo none")
    assert (done.returncode, done.stdout) == (0, "no GPU here: nothing was measured\n")
    assert _results() == before


def test_with_a_gpu_everything_is_handed_to_the_measuring_script(tmp_path: Path) -> None:
    done = _gpu_script(tmp_path, 'if [ "$1" = -c ]; then echo cuda; else echo "$PWD: $*"; fi')
    assert (done.returncode, done.stdout) == (0, f"{REPO}: benchmarks/gpu.py --seconds 1\n")


def test_a_python_that_fails_is_no_missing_gpu(tmp_path: Path) -> None:
    done = _gpu_script(tmp_path, "exit 3")
    assert done.returncode == 3
    assert done.stdout == ""


NATIVE = ("native.py", "--rounds", "1", "--seconds", "1", "--models", "sleep", "--scenarios")
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("overhead.py", "--rounds", "3"), "divided by one clock read"),
        (("slots.py", "--rounds", "2", "--samples", "64"), "Share of the time that is scheduling"),
        ((*TORCHRUN, "start_skew.py", "--rounds", "3"), "flagged 10 of 10"),
        ((*TORCHRUN, "gather.py", "--samples", "1000", "--rounds", "2"), "1,000 rows, 1 column"),
        ((*TORCHRUN, "selection.py", "--samples", "1000", "--rounds", "2"), "2 x 1,000 samples"),
        (("selection.py", "--simulate", "50"), "every value exact"),
        ((*TORCHRUN, "exchange.py", "--rounds", "3"), "the bound held in 3 of 3 exchanges"),
        ((*TORCHRUN, "collectives.py", "--rounds", "1", "--sizes", "64KiB"), "R^2 of time"),
        (("pacing.py", "--rounds", "2", "--seconds", "0.2"), "echo at 10,000 queries/s"),
        (("peak.py", "--duration", "2s", "--probe", "100ms"), "digits, 2 ranks: time"),
        (("versus_loadgen.py", "--rounds", "2", "--samples", "500"), "groups of 32 / by 32"),
        ((*NATIVE, "server"), "p50 without floor"),
        ((*NATIVE, "offline"), "throughput without floor"),
    ],
    ids=lambda value: next((v for v in value if v.endswith(".py")), "") if value else "",
)
def test_a_benchmark_runs_from_a_plain_checkout(
    tmp_path: Path, argv: tuple[str, ...], words: str
) -> None:
    if {"versus_loadgen.py", "native.py"} & set(argv):
        pytest.importorskip("mlperf_loadgen", reason="LoadGen comes with the extra [mlperf]")
    path = tmp_path / "told.json"
    script = [str(BENCHMARKS / each) if each.endswith(".py") else each for each in argv]
    env = environment()
    del env["PYTHONPATH"]
    done = subprocess.run(
        [sys.executable, *script, "--json", str(path)],
        env=env,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert words in done.stdout
    assert "load average" in done.stdout
    assert json.loads(path.read_bytes())["tables"]
