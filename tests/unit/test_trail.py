"""A saved peak search: made again from its windows, and nothing of it goes missing unnoticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench import files
from distbench.bounds import Bound, parse_bounds
from distbench.errors import UsageError
from distbench.load import Load
from distbench.record import write_report
from distbench.report.tables import to_markdown
from distbench.run import load_run as load_window
from distbench.salvage import main as salvage
from distbench.search import CONFIRM, PROBE, Plan, Step, search
from distbench.settings import Settings
from distbench.tried import plan_of, reading
from distbench.verify import verify
from distbench.windows import Windows, load_run

from .serving import MS, US, S, queries, served
from .synthetic import RUN_ID, Change, Rank, edit_json, make_run, mend_hashes
from .test_verdict import reported

BOUND = Bound("latency", "p99", MS)
PLAN = Plan(500.0, S // 10, S, (0.99,), 2)
Shares = Callable[[Step], float]


def capacity(qps: float) -> Shares:
    """Return the share of slow queries by window: 5 % above the capacity, none below it."""
    return lambda step: 0.05 if step.target_qps > qps else 0.0


def window(step: Step, number: int, share: float, change: Change | None = None) -> Change:
    """Return the change that makes a synthetic run one window of a search."""
    rng = np.random.default_rng(number)
    count = max(8, round(step.duration_ns / S * step.target_qps / 2))

    def latencies() -> Any:
        slow = rng.random(count) < share
        return np.where(slow, 2 * MS, rng.integers(300 * US, 700 * US, count))

    ranks = [queries(count, round(2 * S / step.target_qps), served=latencies()) for _ in range(2)]
    fill = served(ranks, target_qps=step.target_qps, bounds=[asdict(BOUND)])

    def make(made: list[Rank]) -> None:
        fill(made)
        for rank in made:
            rank.before |= {
                "run_id": f"{RUN_ID}-w{number:03d}",
                "duration_ns": step.duration_ns,
                "window": {
                    "number": number,
                    "planned": number + 1,
                    "search": {"plan": asdict(PLAN), "step": asdict(step)},
                },
            }
        if change is not None:
            change(made)

    return make


def make_search(folder: Path, shares: Shares) -> list[Step]:
    """Store a whole search of a system; returns its windows."""
    going, steps = search(PLAN), list[Step]()
    step = next(going)
    while True:
        number = len(steps)
        steps.append(step)
        own = folder / "windows" / f"{number:03d}"
        make_run(own, change=window(step, number, shares(step)))
        try:
            step = going.send(reading(load_window(own).result(), step.kind).outcome)
        except StopIteration:
            break
    write_report(folder)
    return steps


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Step]]:
    """Store the search of a system of 3,000 queries/s once for all tests."""
    folder = tmp_path_factory.mktemp("made") / "r"
    return folder, make_search(folder, capacity(3_000.0))


@pytest.fixture
def steps(made: tuple[Path, list[Step]], tmp_path: Path) -> list[Step]:
    """Give a test a copy of that search, at r, and return its windows."""
    shutil.copytree(made[0], tmp_path / "r")
    return made[1]


def told(folder: Path) -> tuple[str, list[str]]:
    state, findings = reported(folder)
    return state, [finding.code for finding in findings]


def test_the_result_is_the_confirming_windows_with_the_peak_and_the_trail(
    tmp_path: Path, steps: list[Step]
) -> None:
    folder = tmp_path / "r"
    assert told(folder) == ("VALID", [])
    assert verify(folder) == (0, [])
    several = load_run(folder)
    assert isinstance(several, Windows)
    result = several.result()
    # The window behind it tried a higher rate, in vain.
    peak, last = result["metrics"]["peak"], len(steps) - 2
    assert [step.kind for step in steps[last:]] == [CONFIRM, CONFIRM]
    assert 2_910.0 < peak["value"] <= 3_000.0
    assert (peak["unit"], peak["ci_low"], peak["value"]) == (
        "queries/s",
        None,
        steps[last].target_qps,
    )
    assert "the interval is that of what is bounded" in peak["reason"]
    confirming = load_window(folder / "windows" / f"{last:03d}").result()
    for name, each in confirming["metrics"].items():
        if name not in ("accuracy", "memory.peak"):
            assert result["metrics"][name] == each, name
    # What only the first window has.
    first = load_window(folder / "windows" / "000").result()["metrics"]
    for name in ("accuracy", "bits_per_byte"):
        assert result["metrics"][name] == first[name]
    assert result["metrics"]["memory.peak"]["value"] == first["memory.peak"]["value"]
    assert result["run_id"] == RUN_ID
    assert (result["window"]["planned"], len(result["windows"])) == (len(steps), len(steps))
    assert result["window"]["search"]["rests"] == f"{last:03d}"
    trail = result["tables"]["search"]
    assert [row[0] for row in trail["rows"]] == [f"{n:03d}" for n in range(len(steps))]
    assert [Step(row[1], row[2], round(row[3] * S)) for row in trail["rows"]] == steps
    assert [row[8] for row in trail["rows"]][:4] == ["pass", "pass", "pass", "fail"]
    assert all(column["definition"] for column in trail["columns"])
    text = several.report()
    assert f"kept the bounds in window {last:03d}, on which all figures below rest" in text
    assert "bound            latency.p99 at most 1.00 ms: 0 of " in text
    assert "early stopping passes" in text and "more above the limit than by chance" in text
    assert "### Table: search" in to_markdown(result)
    lines = text.splitlines()
    assert max(len(line) for line in lines if "latency.p99" in line) <= 150


def test_findings_on_a_probe_do_not_make_the_status(tmp_path: Path, steps: list[Step]) -> None:
    def disturbed(ranks: list[Rank]) -> None:
        assert ranks[0].after is not None
        ranks[0].after["quiet"]["run_delay_ns"] = ranks[0].after["quiet"]["window_ns"] // 2

    for number, state in ((2, ("VALID", [])), (len(steps) - 2, ("INVALID", ["interference"]))):
        shutil.rmtree(tmp_path / "r" / "windows" / f"{number:03d}")
        change = window(steps[number], number, 0.0, disturbed)
        make_run(tmp_path / "r" / "windows" / f"{number:03d}", change=change)
        assert told(tmp_path / "r") == state


def test_wrong_answers_count_wherever_they_were_found(tmp_path: Path, steps: list[Step]) -> None:
    def wrong(ranks: list[Rank]) -> None:
        for rank in ranks:
            assert rank.after is not None
            rank.before["model"]["target_accuracy"] = 0.99

    shutil.rmtree(tmp_path / "r" / "windows" / "000")
    make_run(tmp_path / "r" / "windows" / "000", change=window(steps[0], 0, 0.0, wrong))
    assert told(tmp_path / "r") == ("INVALID", ["accuracy-low"])


def test_no_rate_keeps_the_bound(tmp_path: Path) -> None:
    steps = make_search(tmp_path / "r", lambda _step: 0.5)
    assert {step.kind for step in steps} == {PROBE}
    state, (finding,) = reported(tmp_path / "r")
    assert (state, finding.code) == ("INVALID", "peak-not-found")
    assert "queries/s failed" in finding.message
    result = load_run(tmp_path / "r").result()
    assert result["metrics"]["peak"]["value"] is result["metrics"]["throughput"]["value"] is None
    assert result["metrics"]["peak"]["reason"] == "no rate kept the bounds: see the trail"
    scored = ["accuracy", "bits_per_byte"]
    assert sorted(result["metrics"]) == [*scored, "memory.peak", "peak", "throughput"]
    assert "nothing completed" not in load_run(tmp_path / "r").report()
    assert "peak             unknown: no rate kept the bounds" in load_run(tmp_path / "r").report()
    assert verify(tmp_path / "r") == (0, [])


@pytest.mark.parametrize(("share", "state"), [(0.05, "INVALID"), (0.01, "UNDECIDED")])
def test_no_window_confirms(tmp_path: Path, share: float, state: str) -> None:
    sure = capacity(3_000.0)
    make_search(tmp_path / "r", lambda step: share if step.kind == CONFIRM else sure(step))
    status, findings = reported(tmp_path / "r")
    assert status == state
    assert {finding.code for finding in findings} == {
        "peak-unconfirmed", "bound-missed" if state == "INVALID" else "bound-undecided",
    }  # fmt: skip
    result = load_run(tmp_path / "r").result()
    assert result["metrics"]["peak"]["value"] is None
    # The figures are the last confirming window's all the same.
    assert result["metrics"]["latency.p99"]["value"] is not None


def test_a_system_that_never_fails_is_undecided(tmp_path: Path) -> None:
    steps = make_search(tmp_path / "r", lambda _step: 0.0)
    state, (finding,) = reported(tmp_path / "r")
    assert (state, finding.code) == ("UNDECIDED", "peak-beyond")
    assert "up to 32000 queries/s, 16 times what the warm-up did" in finding.message
    assert load_run(tmp_path / "r").result()["metrics"]["peak"]["value"] == 32_000.0
    assert steps[-1] == Step(CONFIRM, 32_000.0, S)


@pytest.mark.parametrize(
    ("probe", "confirm", "state", "codes"),
    [
        (0.0, 0.05, "INVALID", {"peak-unconfirmed", "bound-missed"}),
        (0.0094, 0.0, "UNDECIDED", {"peak-beyond"}),  # kept, but never beyond doubt
    ],
)
def test_a_search_that_meets_no_failing_probe_is_judged(
    tmp_path: Path, probe: float, confirm: float, state: str, codes: set[str]
) -> None:
    at_most = {PROBE: probe, CONFIRM: confirm}
    # The probes of the highest rate, and every confirming window.
    own = lambda s: at_most[s.kind] if s.kind == CONFIRM or s.target_qps > 30_000 else 0.0  # noqa: E731
    make_search(tmp_path / "r", own)
    status, findings = reported(tmp_path / "r")
    assert (status, {each.code for each in findings}) == (state, codes)
    assert verify(tmp_path / "r") == (0, [])


def test_a_higher_rate_that_was_disturbed_does_not_cost_the_confirmed_one(tmp_path: Path) -> None:
    """Two windows confirm; the second, an extra, was not left alone."""

    def disturbed(ranks: list[Rank]) -> None:
        assert ranks[0].after is not None
        ranks[0].after["quiet"]["run_delay_ns"] = ranks[0].after["quiet"]["window_ns"] // 2

    limits = {PROBE: 1_000.0, CONFIRM: 1_030.0}
    steps = make_search(tmp_path / "r", lambda step: capacity(limits[step.kind])(step))
    first, raised, last = steps[-3:]
    assert {step.kind for step in (first, raised, last)} == {CONFIRM}
    number = len(steps) - 2
    own = tmp_path / "r" / "windows" / f"{number:03d}"
    shutil.rmtree(own)
    make_run(own, change=window(raised, number, 0.0, disturbed))
    assert told(tmp_path / "r") == ("VALID", [])
    result = load_run(tmp_path / "r").result()
    assert result["window"]["search"]["rests"] == f"{number - 1:03d}"
    assert result["metrics"]["peak"]["value"] == first.target_qps


def test_probes_that_failed_by_chance_and_windows_that_keep_the_bound_are_told(
    tmp_path: Path,
) -> None:
    """Every probe above 1,000 queries/s meets a pause; no window of the full length does."""
    sure = capacity(1_000.0)
    steps = make_search(tmp_path / "r", lambda step: sure(step) if step.kind == PROBE else 0.0)
    state, (finding,) = reported(tmp_path / "r")
    assert (state, finding.code) == ("UNDECIDED", "probes-misled")
    assert "no probe above 1000 queries/s passed, yet the windows" in finding.message
    assert f"kept the bounds up to {steps[-1].target_qps:g}, where" in finding.message
    assert finding.value == steps[-1].target_qps == 1_220.0
    assert verify(tmp_path / "r") == (0, [])


@pytest.mark.parametrize(
    ("lost", "status"), [([-1], "INCOMPLETE"), ([4], "INCOMPLETE"), ([-2, -1], "INCOMPLETE")]
)
def test_a_window_that_was_taken_away_is_missed(
    tmp_path: Path, steps: list[Step], lost: list[int], status: str
) -> None:
    names = [f"{n % len(steps):03d}" for n in lost]
    for name in names:
        shutil.rmtree(tmp_path / "r" / "windows" / name)
    assert verify(tmp_path / "r")[0] == 6
    assert salvage([str(tmp_path / "r")]) == 6
    assert verify(tmp_path / "r") == (6, ["the run is INCOMPLETE, and its figures agree"])
    state, findings = reported(tmp_path / "r")
    assert (state, findings[0].code) == (status, "window-missing")
    assert names[0] in findings[0].message
    assert load_run(tmp_path / "r").result()["metrics"]["peak"]["value"] is None


def test_a_search_that_was_killed_between_two_windows_is_incomplete(
    tmp_path: Path, steps: list[Step]
) -> None:
    for name in ("result.json", "report.txt", "manifest.sha256"):
        (tmp_path / "r" / name).unlink()
    for number in range(5, len(steps)):
        shutil.rmtree(tmp_path / "r" / "windows" / f"{number:03d}")
    assert salvage([str(tmp_path / "r")]) == 6
    state, (finding,) = reported(tmp_path / "r")
    assert (state, finding.code) == ("INCOMPLETE", "window-missing")
    assert "window 005 of 6 planned ones is not here" in finding.message


def test_a_rank_that_is_lost_in_a_probe_ends_the_search(tmp_path: Path, steps: list[Step]) -> None:
    for number in range(4, len(steps)):
        shutil.rmtree(tmp_path / "r" / "windows" / f"{number:03d}")

    def end(ranks: list[Rank]) -> None:
        for rank in ranks:
            assert rank.after is not None
            rank.after["end"] = {
                "code": "lost", "rank": 1, "host": "node-1", "sentence": "x", "exit_code": 6,
            }  # fmt: skip

    change = window(steps[4], 4, 0.05, end)
    make_run(tmp_path / "r" / "windows" / "004", change=change)
    assert told(tmp_path / "r") == ("INCOMPLETE", ["rank-lost"])


def test_windows_that_do_not_follow_from_each_other_are_found(
    tmp_path: Path, steps: list[Step]
) -> None:
    folder = tmp_path / "r"
    for path in (folder / "windows" / "004").glob("ranks/*/rank.json"):
        edit_json(path, lambda before: before["window"]["search"]["step"].update(target_qps=9.0))
    mend_hashes(folder / "windows" / "004")
    assert verify(folder)[0] == 1
    assert salvage([str(folder)]) == 0
    state, findings = reported(folder)
    assert (state, findings[0].code) == ("INVALID", "search-contradicts")
    assert "window 004 is a probe of" in findings[0].message
    assert f"at {steps[4].target_qps:g} queries/s follows" in findings[0].message
    assert load_run(folder).result()["metrics"]["peak"]["value"] is None


def test_outcomes_that_were_altered_are_found(tmp_path: Path, steps: list[Step]) -> None:
    """Samples of a probe that had failed are replaced by those of one that passed."""
    folder = tmp_path / "r"
    bad = next(n for n, step in enumerate(steps) if step.target_qps > 3_000.0)
    shutil.rmtree(folder / "windows" / f"{bad:03d}")
    make_run(folder / "windows" / f"{bad:03d}", change=window(steps[bad], bad, 0.0))
    assert verify(folder)[0] == 1
    write_report(folder)
    assert "search-contradicts" in told(folder)[1]


def test_a_window_beyond_the_end_is_found(tmp_path: Path, steps: list[Step]) -> None:
    folder = tmp_path / "r"
    number = len(steps)
    own = folder / "windows" / f"{number:03d}"
    make_run(own, change=window(steps[-1], number, 0.0))
    assert told(folder) == ("INVALID", ["search-contradicts"])
    (finding,) = files.read_json(write(folder))["verdict"]["findings"]
    assert f"the search ends after {number} of {number + 1} windows" in finding["message"]


def write(folder: Path) -> Path:
    write_report(folder)
    return folder / "result.json"


def test_of_several_bounds_the_worst_decides() -> None:
    rows = [
        ["latency.p50", 0.001, 1000, 0, 400],
        ["latency.p99", 0.001, 1000, 50, 2],
    ]
    result = {
        "verdict": {"findings": []},
        "window": {"load": {"bounds": [asdict(each) for each in parse_bounds("1ms@p50,1ms@p99")]}},
        "tables": {"bounds": {"rows": rows}},
        "metrics": {"latency.p50": {"value": 0.0005}, "latency.p99": {"value": 0.002}},
    }
    found = reading(result, PROBE)
    assert (found.outcome.word, found.outcome.kept) == ("fail", False)
    assert (found.bound, found.queries, found.over, found.value) == ("latency.p99", 1000, 50, 0.002)
    rows[1][3] = 0
    found = reading(result, PROBE)
    assert (found.outcome.word, found.outcome.kept) == ("pass", True)
    result["verdict"]["findings"] = [{"code": "overloaded"}]
    found = reading(result, PROBE)
    assert (found.outcome.word, found.why) == ("fail", "given up: the queue grew without end")


def test_the_plan_begins_at_a_quarter_of_the_warm_up() -> None:
    settings = Settings(load=Load.auto("15ms@p99,1s@p50", probe_s=1.0), duration_ns=10 * S)
    plan = plan_of(settings, [1_000.0, 3_000.26])
    assert plan == Plan(1_000.0, S, 10 * S, (0.99, 0.5), 2, S)
    with pytest.raises(
        UsageError, match=r"begin at 0.1 queries/s, .* 10 s, .*: give --probe 16"
    ) as e:
        plan_of(settings, [0.4])
    assert e.value.agreed


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda: Load(0.0, probe_ns=S), "give one, such as --latency-bound"),
        (lambda: Load.auto("15ms@p99", arrival="trace:x"), "a trace has its own rate"),
        (lambda: Load(5.0, probe_ns=S, bounds=parse_bounds("1s@p99")), "either a rate"),
        (lambda: Load.auto("15ms@p99", dispatch="central"), "leave out --dispatch central"),
        (lambda: Load.auto("15ms@p99", probe_s=0.0), "is not above 0"),
        (lambda: Load.auto("15ms@p99", probe_s=-1.0), "is not above 0"),
        (lambda: Settings(load=Load.auto("3s@p99"), duration_ns=S), "--probe 3s .* --duration 30s"),
        (lambda: Settings(load=Load.auto("15ms@p99"), duration_ns=149 * MS), "not seen to be"),
        (lambda: Settings(load=Load.auto("15ms@p99"), num_samples=9), "in place of --num-samples"),
    ],
)
def test_a_search_that_cannot_be_made_is_refused(make: Callable[[], Any], told: str) -> None:
    with pytest.raises(UsageError, match=told):
        make()
