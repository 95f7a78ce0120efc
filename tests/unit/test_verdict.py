"""Every finding is provoked through a saved directory, just under and just over its limit.

What is compared is what ``python -m distbench.report`` says of that directory, remedy included.
"""

from __future__ import annotations

import ast
import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import asdict
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from distbench import preamble, verdict
from distbench.findings import Finding, status
from distbench.load import Load
from distbench.report import __main__ as report
from distbench.report.text import SAME_FINDINGS
from distbench.run import load_run
from distbench.settings import Settings

from .synthetic import GPU, OFFSET_NS, START_NS, Change, Rank, in_memory, make_run

MS, S = 10**6, 10**9
ROOT = Path(verdict.__file__).parent
REMEDIES = {
    "above-roofline": "whether outputs are cached",
    "accuracy-low": "check the weights and the precision",
    "audit-config": "remove it from the driver's working directory",
    "benchmark-replaced": "leave --model out",
    "bound-missed": "lower --target-qps",
    "bound-undecided": "run longer (--duration)",
    "clock-bound": "measure for longer (--duration)",
    "clock-contradiction": "a virtual machine is paused or moved",
    "collective-unknown": "start no more ranks than cores",
    "collective-wrong": "memory, network and the backend's version",
    "conf-edited": "take these lines out of user.conf",
    "device-note": "give --device",
    "disk-error": "make room on that host's disk",
    "dispatch-differs": "not of one window",
    "driver-incomplete": "see the driver's own output",
    "driver-lost": "see the driver's own output",
    "ecc-off": "turn it on",
    "environments-differ": "measure each alone",
    "fit-poor": "read the table in place of the fit",
    "floor-unknown": "run again",
    "foreign-process": "end it, or wait for it",
    "foreign-unknown": "make NVML usable there",
    "harness-cost": "a model that does some work",
    "headline-unknown": "mend what the sentence names",
    "interference": "stop other work on the host",
    "issue-late": "stop other work on the host",
    "issue-lateness": "leave a processor free",
    "judged-by-all": "copy the folders of the other ranks",
    "launch-bound": "use a larger --batch-size",
    "loadgen-errors": "mend what the first one names",
    "loadgen-log": "see the file that the sentence names",
    "model-raised": "mend the model",
    "nccl-failed": "try NCCL_IB_DISABLE=1",
    "near-floor": "the system's and the harness's together",
    "not-steady": "or a longer --duration",
    "outputs-differ": "mixes up groups or reuses a buffer",
    "outputs-non-finite": "check the weights, and the precision",
    "overloaded": "offer less than what is completed",
    "parity-broken": "mend the way in which it is cut",
    "peak-beyond": "see whether the model does its work",
    "peak-not-found": "loosen --latency-bound",
    "peak-unconfirmed": "give a longer --duration",
    "prefix-caching": "turn prefix caching off",
    "probes-misled": "give a longer --probe",
    "rank-failed": "mend what the sentence names",
    "rank-incomplete": "copy the whole folder from its host",
    "rank-lost": "whether the process was killed",
    "rank-missing": "copy its rank folder from its host",
    "rank-terminated": "what was measured until then is kept",
    "replicas-left-out": "give --shard pp or tp",
    "rules-marginal": "lower the rate a little",
    "rules-too-short": "give --duration",
    "run-shortened": "leave `shortened` out",
    "samples-capped": "give a shorter --duration",
    "samples-failed": "mend the model",
    "samples-few": "give a model with as many samples",
    "samples-missing": "return every group",
    "scaling-contradicts": "the version of distbench that made it",
    "search-contradicts": "the version of distbench that made it",
    "sharding-contradicts": "verify it with the version",
    "shares-by-rate": "leave --shares rate out",
    "slowest-rank": "look at that host's link",
    "stamps-contradict": "let the engine stamp started and finished",
    "start-late": "more ranks than cores",
    "starts-late": "start no more ranks than it has cores",
    "straggler": "that host's clocks, temperature",
    "throttled": "check power limit, cooling",
    "trend": "give a longer --warmup",
    "until-not-reached": "give a longer --duration for each window",
    "warmup-in-window": "give a longer --warmup",
    "window-brief": "measure for longer",
    "window-missing": "salvage the run",
    "window-short": "give a longer --warmup",
}
"""Of every finding that there is, words of its remedy."""


def on(rank: int, change: Callable[[Rank], Any]) -> Change:
    """Change one rank only."""
    return lambda ranks: change(ranks[rank])


def found(folder: Path, change: Change | None = None, **shape: Any) -> tuple[str, list[Any]]:
    """Save a run and return its status and findings, as the command ``report`` tells of them."""
    return reported(make_run(folder / "r", report=False, change=change, **shape))


def reported(run: Path) -> tuple[str, list[Any]]:
    """Return what ``report DIR`` says of a saved run; every finding stands in the text as well."""
    out = run.parent / "told"
    with contextlib.redirect_stdout(io.StringIO()):
        assert report.main([str(run), "--format", "json,text", "--output-dir", str(out)]) == 0
    judged = json.loads((out / "report.json").read_bytes())["verdict"]
    findings = [Finding(**each) for each in judged["findings"]]
    text = " ".join((out / "report.txt").read_text().split())
    for finding in findings:
        same = [f for f in findings if (f.level, f.code) == (finding.level, finding.code)]
        assert REMEDIES[finding.code] in finding.remedy
        if same.index(finding) < SAME_FINDINGS:
            assert " ".join(finding.message.split()) in text
            assert finding.code == "device-note" or finding.remedy in text
    return judged["status"], findings


def only(folder: Path, change: Change | None = None, **shape: Any) -> tuple[str, Finding]:
    """As ``found``, where there is to be exactly one finding."""
    state, findings = found(folder, change, **shape)
    assert [f.code for f in findings] == [findings[0].code]
    return state, findings[0]


def about(finding: Finding) -> tuple[str, str, int | None, str]:
    return finding.level, finding.code, finding.rank, finding.host


def test_a_clean_run_is_valid(tmp_path: Path) -> None:
    assert found(tmp_path) == ("VALID", [])


def test_no_rules_are_claimed(tmp_path: Path) -> None:
    assert in_memory().result()["verdict"]["rules"] == {
        "set": "none", "source": "native", "wording": None, "shortened": False, "result": None,
        "gates": [],
    }  # fmt: skip


# Status


@pytest.mark.parametrize("order", list(permutations(["doubtful", "invalid", "incomplete"])))
def test_the_worst_status_wins(order: tuple[str, ...]) -> None:
    levels = [Finding(level, "x", "x") for level in order]
    assert status(levels) == "INCOMPLETE"
    assert status([f for f in levels if f.level != "incomplete"]) == "INVALID"


def test_incomplete_beats_invalid_beats_undecided_beats_valid() -> None:
    one = [Finding(level, "x", "x") for level in ("info", "doubtful")]
    assert status([]) == status(one) == "VALID"
    one.append(Finding("undecided", "x", "x"))
    assert status(one) == "UNDECIDED"
    one.insert(0, Finding("invalid", "x", "x"))
    assert status(one) == "INVALID"
    one.append(Finding("incomplete", "x", "x"))
    assert status(one) == "INCOMPLETE"


def test_findings_come_worst_first_and_once() -> None:
    levels = ["info", "undecided", "doubtful", "info", "incomplete", "invalid"]

    def change(ranks: list[Rank]) -> None:
        notes = [asdict(Finding(level, f"c{n}", "m")) for n, level in enumerate(levels)]
        ranks[0].before["findings"] = notes
        ranks[1].before["findings"] = notes[:2]

    judged = in_memory(change=change).result()["verdict"]
    assert judged["status"] == "INCOMPLETE"
    assert [f["code"] for f in judged["findings"]] == ["c4", "c5", "c1", "c2", "c0", "c3"]


# Losses


def test_rank_missing(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", ranks=3, report=False)
    (folder / "ranks" / "00002" / "rank.json").unlink()
    judged = load_run(folder).result()["verdict"]
    assert judged["status"] == "INCOMPLETE"
    assert judged["findings"] == [
        {
            "level": "incomplete",
            "code": "rank-missing",
            "message": "nothing of rank 2 of 3 is here",
            "rank": 2,
            "host": "",
            "value": None,
            "limit": None,
            "remedy": "copy its rank folder from its host beside the others, then run "
            "`python -m distbench.salvage`",
        }
    ]


def end_of(code: str) -> Change:
    def change(ranks: list[Rank]) -> None:
        ranks[1].after = None
        for rank in ranks[::2]:
            assert rank.after is not None
            rank.after["end"] = {
                "code": code,
                "rank": 1,
                "host": "node-1",
                "sentence": "rank 1 (node-1) went away: see there",
                "exit_code": 6,
            }

    return change


@pytest.mark.parametrize("code", ["lost", "failed", "terminated"])
def test_an_early_end_is_told_once(tmp_path: Path, code: str) -> None:
    # Two survivors tell of one rank, whose own folder is incomplete.
    state, finding = only(tmp_path, end_of(code), ranks=3)
    assert state == "INCOMPLETE"
    assert about(finding) == ("incomplete", f"rank-{code}", 1, "node-1")
    assert finding.message == "rank 1 (node-1) went away: see there"


def test_rank_incomplete(tmp_path: Path) -> None:
    state, finding = only(tmp_path, on(1, lambda rank: setattr(rank, "after", None)))
    assert state == "INCOMPLETE"
    assert about(finding) == ("incomplete", "rank-incomplete", 1, "node-1")
    assert finding.message.startswith("rank 1 (node-1) left an incomplete folder: ")
    assert "after.json cannot be read" in finding.message
    assert finding.remedy.startswith("copy the whole folder from its host")


def test_disk_error(tmp_path: Path) -> None:
    said = "samples.npy was not flushed: Input/output error"
    change = on(1, lambda rank: (rank.after or {}).update(disk_error=said))
    state, finding = only(tmp_path, change)
    assert state == "INCOMPLETE"
    assert about(finding) == ("incomplete", "disk-error", 1, "node-1")
    assert finding.message == f"rank 1 (node-1) could not write all its files: {said}"
    assert "make room" in finding.remedy


# Outputs


def fail_group(rank: Rank) -> None:
    assert rank.after is not None
    rank.log.completed[rank.row(4)] = -2
    rank.after["errors"] = ["ValueError: no such digit", "another"]


def test_samples_failed(tmp_path: Path) -> None:
    state, finding = only(tmp_path, on(1, fail_group))
    assert state == "INVALID"
    assert about(finding) == ("invalid", "samples-failed", 1, "node-1")
    assert finding.message == "rank 1 (node-1) failed on 4 samples: ValueError: no such digit"
    assert (finding.value, finding.limit) == (4, 0)
    assert "mend the model" in finding.remedy


def test_model_raised(tmp_path: Path) -> None:
    # Whatever had completed: the last group's exception leaves nothing in flight.
    change = on(
        1, lambda rank: (rank.after or {}).update(raised=True, errors=["TypeError: no len"])
    )
    state, finding = only(tmp_path, change)
    assert state == "INVALID"
    assert about(finding) == ("invalid", "model-raised", 1, "node-1")
    assert finding.message == "rank 1 (node-1) ended its window by an exception: TypeError: no len"


def test_samples_that_failed_without_a_word(tmp_path: Path) -> None:
    def change(rank: Rank) -> None:
        fail_group(rank)
        assert rank.after is not None
        rank.after["errors"] = []

    assert only(tmp_path, on(0, change))[1].message.endswith("4 samples: no message was kept")


def drop_group(rank: Rank) -> None:
    row = rank.row(9)
    rank.log.completed[row] = -1
    rank.log.count[row] = 0


def test_samples_missing(tmp_path: Path) -> None:
    state, finding = only(tmp_path, on(1, drop_group))
    assert state == "INVALID"
    assert about(finding) == ("invalid", "samples-missing", 1, "node-1")
    assert finding.message == "rank 1 (node-1) never completed 4 samples"
    assert (finding.value, finding.limit) == (4, 0)
    assert "return every group" in finding.remedy


def test_pending_samples_of_a_run_that_ended_early_are_no_fault_of_the_engine(
    tmp_path: Path,
) -> None:
    def change(ranks: list[Rank]) -> None:
        end_of("lost")(ranks)
        for rank in ranks:
            drop_group(rank)

    assert only(tmp_path, change)[1].code == "rank-lost"


def kept(rank: Rank, **counts: int) -> None:
    assert rank.after is not None
    rank.after["outputs"].update(counts)


def test_outputs_non_finite(tmp_path: Path) -> None:
    state, finding = only(tmp_path, on(1, lambda rank: kept(rank, non_finite=1)))
    assert state == "INVALID"
    assert about(finding) == ("invalid", "outputs-non-finite", 1, "node-1")
    assert "NaN or infinite outputs in 1 of 10 kept groups" in finding.message
    assert (finding.value, finding.limit) == (1, 0)
    assert "precision" in finding.remedy


def test_outputs_differ(tmp_path: Path) -> None:
    one = on(1, lambda rank: kept(rank, compared=200, different=2))
    assert found(tmp_path / "under", one) == ("VALID", [])
    state, finding = only(
        tmp_path / "over", on(1, lambda rank: kept(rank, compared=199, different=2))
    )
    assert state == "INVALID"
    assert about(finding) == ("invalid", "outputs-differ", 1, "node-1")
    assert "2 of 199 outputs kept from the window differ from the accuracy pass" in finding.message
    assert (finding.value, finding.limit) == (2 / 199, 0.01)
    assert "mixes up groups or reuses a buffer" in finding.remedy


@pytest.mark.parametrize(
    ("column", "stamp", "wrong"),
    [
        ("started", lambda log, row: log.issued[row], False),
        ("started", lambda log, row: log.issued[row] - 1, True),
        ("started", lambda log, row: log.finished[row], False),
        ("started", lambda log, row: log.finished[row] + 1, True),
        ("finished", lambda log, row: log.started[row], False),
        ("finished", lambda log, row: log.started[row] - 1, True),
        ("finished", lambda log, row: log.completed[row], False),
        ("finished", lambda log, row: log.completed[row] + 1, True),
        ("started", lambda _log, _row: -5, True),
        ("started", lambda _log, _row: 0, False),  # unknown
    ],
)
def test_stamps_contradict(tmp_path: Path, column: str, stamp: Any, wrong: bool) -> None:
    def change(rank: Rank) -> None:
        row = rank.row(3)
        getattr(rank.log, column)[row] = stamp(rank.log, row)

    if not wrong:
        assert found(tmp_path, on(1, change)) == ("VALID", [])
        return
    state, finding = only(tmp_path, on(1, change))
    assert state == "INVALID"
    assert about(finding) == ("invalid", "stamps-contradict", 1, "node-1")
    assert "stamps of 1 of 10 groups contradict" in finding.message
    assert (finding.value, finding.limit) == (1, 0)
    assert load_run(tmp_path / "r").result()["metrics"]["service.p50"]["n"] == 19


# Device


def test_device_note(tmp_path: Path) -> None:
    note = "the GPU of node-1 is too old for torch, so the CPU was used"
    state, finding = only(tmp_path, on(1, lambda rank: rank.before["device"].update(note=note)))
    assert state == "VALID"
    assert about(finding) == ("info", "device-note", 1, "node-1")
    assert finding.message == note


def test_foreign_process(tmp_path: Path) -> None:
    def change(rank: Rank) -> None:
        assert rank.after is not None
        rank.before["foreign_before"] = [4711]
        rank.after["foreign_after"] = [812, 4711]

    state, finding = only(tmp_path, on(1, change))
    assert state == "INVALID"
    assert about(finding) == ("invalid", "foreign-process", 1, "node-1")
    assert finding.message == "rank 1 (node-1): process 812, 4711 also used the GPU"
    assert (finding.value, finding.limit) == (2, 0)
    assert "wait for it" in finding.remedy


@pytest.mark.parametrize("when", ["before", "after"])
def test_unknown_processes_on_the_gpu_are_doubtful(tmp_path: Path, when: str) -> None:
    def change(rank: Rank) -> None:
        known, hidden = {**GPU, "compute_processes": []}, {**GPU, "compute_processes": None}
        hidden["reasons"] = {"compute_processes": "NVML refuses it: no permission"}
        rank.before["gpu_before"] = hidden if when == "before" else known
        assert rank.after is not None
        rank.after["gpu_after"] = hidden if when == "after" else known

    status_, finding = only(tmp_path, on(1, change))
    assert status_ == "VALID"
    assert about(finding) == ("doubtful", "foreign-unknown", 1, "node-1")
    assert f"{when} the window is not known: NVML refuses it: no permission" in finding.message
    assert "nothing else runs on the GPU" in finding.remedy


def test_a_foreign_process_at_either_end_is_enough(tmp_path: Path) -> None:
    early = on(0, lambda rank: rank.before.update(foreign_before=[5]))
    assert only(tmp_path / "a", early)[1].code == "foreign-process"
    late = on(0, lambda rank: (rank.after or {}).update(foreign_after=[5]))
    assert only(tmp_path / "b", late)[1].code == "foreign-process"


def throttle(*reasons: str) -> Change:
    return on(
        1, lambda rank: (rank.after or {}).update(gpu_after={**GPU, "throttle_reasons": reasons})
    )


def test_throttled(tmp_path: Path) -> None:
    harmless = throttle("gpu_idle", "none", "applications_clocks_setting")
    assert found(tmp_path / "under", harmless) == ("VALID", [])
    state, finding = only(tmp_path / "over", throttle("gpu_idle", "sw_power_cap", "hw_slowdown"))
    assert state == "VALID"
    assert about(finding) == ("doubtful", "throttled", 1, "node-1")
    assert finding.message.endswith("at the end: sw_power_cap, hw_slowdown")
    assert "cooling" in finding.remedy
    blind = {"available": False, "reason": "-"}
    unknown = on(1, lambda rank: (rank.after or {}).update(gpu_after=blind))
    state, findings = found(tmp_path / "unknown", unknown)
    assert (state, [f.code for f in findings]) == ("VALID", ["foreign-unknown"])


# Effects on the headline: none up to 1 %, doubtful up to 5 %, then invalid

GRADES = [
    (10_000_000, None),
    (10_000_001, "doubtful"),
    (50_000_000, "doubtful"),
    (50_000_001, "invalid"),
]
STATUS = {None: "VALID", "doubtful": "VALID", "invalid": "INVALID"}


@pytest.mark.parametrize(("delay_ns", "level"), GRADES)
def test_interference(tmp_path: Path, delay_ns: int, level: str | None) -> None:
    change = on(1, lambda rank: (rank.after or {})["quiet"].update(run_delay_ns=delay_ns))
    if level is None:
        assert found(tmp_path, change) == ("VALID", [])
        return
    state, finding = only(tmp_path, change)
    assert state == STATUS[level]
    assert about(finding) == (level, "interference", 1, "node-1")
    assert f"for a processor for {delay_ns / S:.1%} of its window" in finding.message
    assert "(1 involuntary switches)" in finding.message
    assert (finding.value, finding.limit) == (delay_ns / S, 0.05)
    assert "fewer ranks or threads" in finding.remedy


@pytest.mark.parametrize("quiet", [{"run_delay_ns": -1}, {"window_ns": 0, "run_delay_ns": S}])
def test_interference_that_the_kernel_does_not_tell(tmp_path: Path, quiet: dict[str, int]) -> None:
    change = on(1, lambda rank: (rank.after or {})["quiet"].update(quiet))
    assert found(tmp_path, change) == ("VALID", [])


@pytest.mark.parametrize(("bound_ns", "level"), GRADES)
def test_clock_bound(tmp_path: Path, bound_ns: int, level: str | None) -> None:
    def change(ranks: list[Rank]) -> None:
        # Exchanges at the very stamps that are mapped, so that their bound is the bound.
        assert ranks[0].after is not None
        ranks[0].after["exchanges"]["1"] = [
            [at, OFFSET_NS, bound_ns, 2 * bound_ns, 100]
            for at in (START_NS + 20_000, START_NS + 1_000 * MS)
        ]

    shape = {"group_ns": (90 * MS, 100 * MS)}
    if level is None:
        assert found(tmp_path, change, **shape) == ("VALID", [])
        return
    state, finding = only(tmp_path, change, **shape)
    assert state == STATUS[level]
    assert about(finding) == (level, "clock-bound", None, "")
    assert finding.message.startswith(f"the makespan is known to +-{bound_ns / 1e3:.1f} us only")
    assert (finding.value, finding.limit) == (bound_ns / S, 0.05)
    assert "--duration" in finding.remedy


@pytest.mark.parametrize(("step_ns", "found_it"), [(0, False), (1, True)])
def test_clock_contradiction(tmp_path: Path, step_ns: int, found_it: bool) -> None:
    def change(ranks: list[Rank]) -> None:
        # Half a second apart two clocks may drift by 0.5 s x 100 ppm (RATE_LIMIT_PPM) and 1 ns.
        (before, after) = ranks[0].after["exchanges"]["1"]
        middle = [[START_NS + k * S // 2, OFFSET_NS, 1_000, 2_000, 100] for k in (0, 1, 2)]
        middle[1][1] += 50_001 + 2_000 + step_ns
        middle[2][1] = middle[1][1]
        ranks[0].after["exchanges"]["1"] = [before, *middle, after]

    state, findings = found(tmp_path, change)
    told = [f for f in findings if f.code == "clock-contradiction"]
    assert len(told) == found_it
    if found_it:
        assert state == "INVALID"
        assert about(told[0]) == ("invalid", "clock-contradiction", 1, "node-1")
        assert told[0].value > 0


@pytest.mark.parametrize(("cost_ns", "level"), GRADES)
def test_harness_cost(tmp_path: Path, cost_ns: int, level: str | None) -> None:
    def change(ranks: list[Rank]) -> None:
        # 10 batches on the busiest rank; the best of three blocks counts, and the worst rank.
        ranks[0].before["harness"].update(loop_ns=[9 * cost_ns, cost_ns, 2 * cost_ns], batches=10)

    if level is None:
        assert found(tmp_path, change, groups=(10, 5)) == ("VALID", [])
        return
    state, finding = only(tmp_path, change, groups=(10, 5))
    assert state == STATUS[level]
    assert about(finding) == (level, "harness-cost", None, "")
    assert (
        f"takes {cost_ns / S:.1%} of this window's time (10 batches on the busiest"
        in finding.message
    )
    assert finding.value == pytest.approx(cost_ns / S, rel=1e-12)
    assert finding.limit == 0.05
    assert "--batch-size" in finding.remedy


@pytest.mark.parametrize(
    ("late_ns", "level"),
    [(100_000, None), (100_001, "doubtful"), (50_000_000, "doubtful"), (50_000_001, "invalid")],
)
def test_start_late(tmp_path: Path, late_ns: int, level: str | None) -> None:
    if level is None:
        assert found(tmp_path, late_ns=(5_000, late_ns)) == ("VALID", [])
        return
    state, finding = only(tmp_path, late_ns=(5_000, late_ns))
    assert state == STATUS[level]
    assert about(finding) == (level, "start-late", 1, "")
    assert finding.message == (
        f"rank 1 began up to {late_ns / 1e6:.3f} ms after the agreed instant "
        f"({late_ns / S:.2%} of the window, after 1 attempts)"
    )
    assert (finding.value, finding.limit) == (late_ns / S, 100e-6)
    assert "more ranks than cores" in finding.remedy


def test_start_late_names_eight_ranks_and_the_latest_one(tmp_path: Path) -> None:
    late = [200_000 + rank for rank in range(9)]
    _, finding = only(tmp_path, ranks=9, late_ns=late)
    assert finding.message.startswith("rank 0, 1, 2, 3, 4, 5, 6, 7 began up to 0.200 ms")
    assert (finding.rank, finding.value) == (0, 200_008 / S)


@pytest.mark.parametrize(("asked_ns", "short"), [(2 * S, False), (2 * S + 1, True)])
def test_window_short(tmp_path: Path, asked_ns: int, short: bool) -> None:
    change = on(0, lambda rank: rank.before.update(duration_ns=asked_ns))
    if not short:
        assert found(tmp_path, change) == ("VALID", [])
        return
    state, finding = only(tmp_path, change)
    assert state == "VALID"
    assert about(finding) == ("doubtful", "window-short", None, "")
    assert "the window lasted 1.00 s of the 2 s asked for" in finding.message
    assert (finding.value, finding.limit) == (S / asked_ns, 0.5)
    assert "--warmup" in finding.remedy


def test_a_number_of_samples_has_no_duration_to_miss(tmp_path: Path) -> None:
    assert found(tmp_path, on(0, lambda rank: rank.before.update(duration_ns=None))) == (
        "VALID", [],
    )  # fmt: skip


@pytest.mark.parametrize(("device_ns", "bound"), [(70 * MS, False), (69_999_999, True)])
def test_launch_bound(tmp_path: Path, device_ns: int, bound: bool) -> None:
    if not bound:
        assert found(tmp_path, device_ns=device_ns) == ("VALID", [])
        return
    # Rank 1 needed 0.9 s for the same, so its device was busy for 78 % of it.
    state, finding = only(tmp_path, device_ns=device_ns)
    assert state == "VALID"
    assert about(finding) == ("info", "launch-bound", 0, "node-0")
    assert "LAUNCH_BOUND: the device of rank 0 (node-0) computed for 70% of" in finding.message
    assert finding.value == pytest.approx(0.69999999, rel=1e-12)
    assert finding.limit == 0.7
    assert "--batch-size" in finding.remedy


def test_headline_unknown(tmp_path: Path) -> None:
    change = on(0, lambda rank: (rank.after or {})["exchanges"].update({"1": []}))
    state, finding = only(tmp_path, change)
    assert state == "INVALID"
    assert about(finding) == ("invalid", "headline-unknown", None, "")
    assert finding.message == (
        "throughput is unknown: rank 1 completed nothing or its clock was not measured"
    )
    assert "run again" in finding.remedy


def test_what_explains_itself_is_not_told_twice(tmp_path: Path) -> None:
    def change(rank: Rank) -> None:
        rank.log.completed[:] = -1
        rank.log.count[:] = 0

    assert only(tmp_path, on(1, change))[1].code == "samples-missing"


# Preamble


def planned(folder: Path, rates: list[float], cut: bool, **settings: Any) -> tuple[str, Finding]:
    notes = preamble._planned(Settings(**settings), rates, cut)
    return only(
        folder, on(0, lambda rank: rank.before.update(findings=[asdict(note) for note in notes]))
    )


def test_samples_capped(tmp_path: Path) -> None:
    state, finding = planned(tmp_path, [1.0], True)
    assert state == "VALID"
    assert about(finding) == ("info", "samples-capped", None, "")
    assert "cut to what is gathered or logged at once" in finding.message
    assert "shorter --duration" in finding.remedy


def test_shares_by_rate(tmp_path: Path) -> None:
    state, finding = planned(tmp_path, [1234.56, 7.0] + [1.0] * 20, False, shares="rate")
    assert state == "VALID"
    assert about(finding) == ("info", "shares-by-rate", None, "")
    assert "(1234.6, 7, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1 samples/s)" in finding.message
    assert "not of even shards" in finding.message


@pytest.mark.parametrize(
    ("settings", "short"),
    [
        ({"rules": "none"}, False),
        ({"rules": "mlperf-v5.0"}, True),
        ({"rules": "mlperf-v5.1", "duration_ns": 540 * S}, True),  # lasts 594 s
        ({"rules": "mlperf-v5.0", "duration_ns": 550 * S}, False),
        (
            {"rules": "mlperf-v5.0", "duration_ns": 550 * S, "load": Load(5.0)},
            False,
        ),  # and is extended
        ({"rules": "mlperf-v5.0", "duration_ns": 600 * S, "load": Load(5.0)}, False),
        ({"rules": "mlperf-v5.0", "load": Load(5.0, "trace:x")}, False),
        ({"rules": "mlperf-v5.0", "num_samples": 5}, False),  # who knows how long it takes
        ({"rules": "mlperf-v5.0,shortened=5s"}, False),
        ({"rules": "mlperf-v5.0,shortened=6s"}, True),
    ],
)
def test_rules_too_short(tmp_path: Path, settings: dict[str, Any], short: bool) -> None:
    notes = preamble.rules_too_short(Settings(**settings))
    assert bool(notes) == short
    if not short:
        return
    change = on(0, lambda rank: rank.before.update(findings=[asdict(note) for note in notes]))
    state, finding = only(tmp_path, change)
    assert state == "VALID"
    assert about(finding) == ("info", "rules-too-short", None, "")
    least = 6 if "shortened" in settings["rules"] else 600
    asked = settings.get("duration_ns", 5 * S) / S
    assert (finding.value, finding.limit) == (asked, least)
    assert f"give --duration {least}s" in finding.remedy


def test_no_notes_on_even_shares() -> None:
    assert preamble._planned(Settings(), [1.0, 2.0], False) == []


# Nothing is left out above


ENDS = {"rank-lost", "rank-failed", "rank-terminated"}


def codes_in(path: Path) -> set[str]:
    """Return the codes of all findings that a module can make, from its source."""
    codes = set()
    for call in ast.walk(ast.parse(path.read_text())):
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Name):
            continue
        if call.func.id not in ("Finding", "_fact") or len(call.args) < 2:
            continue
        code = call.args[1]
        if isinstance(code, ast.JoinedStr):
            assert ast.dump(code) == ast.dump(ast.parse("f'rank-{end[\"code\"]}'").body[0].value)
            codes |= ENDS
        elif isinstance(code, ast.Constant):
            codes.add(code.value)
        else:
            assert ast.unparse(code) == "code"  # in _fact itself
    return codes


def test_every_code_is_known_here_and_provoked() -> None:
    made = set().union(*(codes_in(path) for path in ROOT.rglob("*.py")))
    assert made == set(REMEDIES)
    tests = Path(__file__).resolve().parents[1]
    texts = [path.read_text() for path in tests.rglob("test_*.py")]
    for code in made:
        # Once above, and in a test; the ends of a rank are one test with three values.
        name = code.removeprefix("rank-") if code in ENDS else code
        assert sum(text.count(f'"{name}"') for text in texts) > (code not in ENDS), code


# The other sections


def test_what_all_ranks_share_is_lifted(tmp_path: Path) -> None:
    environment = in_memory().result()["environment"]
    assert environment == {
        "common": {"python": "3.11.9", "memory_total_bytes": 8_000_000_000},
        "ranks": [{"hostname": "node-0"}, {"hostname": "node-1"}],
    }
    assert verdict.common_and_rest([{"a": 1, "b": 2}, {"a": 1}]) == ({"a": 1}, [{"b": 2}, {}])
    assert verdict.common_and_rest([{"a": 1}]) == ({"a": 1}, [{}])


def test_the_cost_of_the_harness_is_the_worst_ranks_best_block() -> None:
    def change(ranks: list[Rank]) -> None:
        assert ranks[1].after is not None
        ranks[1].after["quiet"]["run_delay_ns"] = -1

    assert in_memory(ranks=3, change=change).result()["harness"] == {
        "cost_per_batch_s": 850_000 / 400 / S,
        "clock_read_s": 28_000 / 400 / S,
        "involuntary_switches": [0, 1, 2],
        "run_delay_s": [1e-3, None, 1e-3],
    }


def test_a_rank_without_its_end_did_not_tell_its_interruptions() -> None:
    harness = in_memory(change=on(1, lambda rank: setattr(rank, "after", None))).result()["harness"]
    assert harness["involuntary_switches"] == [0, None]
    assert harness["run_delay_s"] == [1e-3, None]


def test_the_result_has_the_sections_of_the_schema_in_order() -> None:
    result = in_memory().result()
    assert list(result) == [
        "schema_version", "scenario", "run_id", "windows", "verdict", "metrics", "per_rank",
        "clock", "start", "config", "environment", "harness", "tables", "window",
    ]  # fmt: skip
    assert (result["schema_version"], result["scenario"], result["windows"]) == (1, "offline", [])
    assert result["window"]["hosts"] == ["node-0", "node-1"]
    assert result["window"]["gpus"][1] == {"rank": 1, "before": None, "after": None}
