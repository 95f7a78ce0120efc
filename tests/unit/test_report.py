"""The text report: its first line, its sections, and nothing unknown printed as a figure."""

from __future__ import annotations

import re
from dataclasses import asdict
from typing import Any

import pytest

from distbench.findings import Finding
from distbench.report import units
from distbench.report.text import to_text
from distbench.run import Run

from .synthetic import GPU, Change, Rank, in_memory
from .test_salvage import kill_rank_1

CLEAN = """\
MEASUREMENT VALID; MLPerf v5.0 gates: not applied

offline  sleep,per_sample=25ms  2 ranks on 2 hosts (node-0, node-1)  batch size 4  80 samples  \
seed 0  shares even

throughput       72.727 samples/s  (+-4.4e-06 of it by the clocks; one window gives no interval: \
repeat windows or launches)
  steady         not resolvable: run longer, 120 groups a rank while all are busy
makespan         1.100000 s  +-4.80 us

latency      n      p50      p90      p95      p97      p99    p99.9      max     mean
completion  80   600 ms   1.00 s   1.10 s   1.10 s   1.10 s   1.10 s   1.10 s   578 ms
batch       20   110 ms   110 ms   110 ms   110 ms   110 ms   110 ms   110 ms   105 ms
service     20   110 ms   110 ms   110 ms   110 ms   110 ms   110 ms   110 ms   105 ms
device      20  63.0 ms  63.0 ms  63.0 ms  63.0 ms  63.0 ms  63.0 ms  63.0 ms  63.0 ms
batch, service, device p50, p90, p95, p97, p99, p99.9: not resolvable: run longer, 64 values on \
each rank at the least
percentiles by LoadGen's rule, sorted[int(n * p)]; batch latency is completion - issue, with up to \
the engine's depth of groups in flight

accuracy         95.00% (19/20 held-out samples)
bits per byte    1.5025 (400 held-out bytes)
memory peak      160.0 MB, 2.0% of the device's (resident memory of the process)

rank    host  device  samples  share  samples/s  finish    idle  busy
0     node-0     cpu       40  50.0%     40.000  1.00 s  100 ms   63%
1     node-1     cpu       40  50.0%     36.364  1.10 s     0 s   57%

TRUST
  start skew     15.0 us +-4.80 us; late: no rank; attempts: 1
  harness        2.10 us per batch; one clock read 60.0 ns
  interference   involuntary switches by rank: 0, 1
                 waited for a processor: 1.00 ms, 1.00 ms
  clock          rank 1: offset +7000.000000123 s +-4.80 us, drift +0.000 ppm, 2 exchanges

findings
  info  launch-bound: LAUNCH_BOUND: the device of rank 0 (node-0) computed for 63% of the window \
and waited for its host otherwise
      remedy: use a larger --batch-size, or an engine with fewer launches
  info  launch-bound: LAUNCH_BOUND: the device of rank 1 (node-1) computed for 57% of the window \
and waited for its host otherwise
      remedy: use a larger --batch-size, or an engine with fewer launches

command  python -m distbench.offline
run      20260101T000000Z-offline-0123abcd
"""


def report(change: Change | None = None, **shape: Any) -> str:
    return in_memory(change=change, **shape).report()


def line(text: str, start: str) -> str:
    (found,) = [each for each in text.splitlines() if each.strip().startswith(start)]
    return found


def test_a_report_word_for_word() -> None:
    assert report(group_ns=(100_000_000, 110_000_000), device_ns=63_000_000) == CLEAN


def test_the_first_line_of_a_clean_run() -> None:
    lines = report().splitlines()
    assert lines[0] == "MEASUREMENT VALID; MLPerf v5.0 gates: not applied"
    assert "findings: none" in lines


def test_a_late_rank_is_not_taken_for_a_count() -> None:
    assert "; late: rank 0; attempts: 1" in report(late_ns=(200_000, 5_000))
    assert "; late: rank 0, 1; attempts: 1" in report(late_ns=(200_000,))


def test_the_first_line_tells_the_status_and_what_it_ran_on() -> None:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before["device"]["note"] = "no GPU here: on the CPU"
        ranks[0].log.completed[0] = -2

    first, *rest = report(change).splitlines()
    assert first == ("MEASUREMENT INVALID; MLPerf v5.0 gates: not applied; no GPU here: on the CPU")
    # It stands there, so it is not told again.
    assert not any("device-note" in each for each in rest)


def test_every_section_is_there_in_order() -> None:
    starts = [
        "MEASUREMENT", "offline ", "throughput ", "makespan ", "latency ", "completion ", "batch ",
        "service ", "device ", "percentiles by", "accuracy ", "memory peak ", "rank ", "0 ", "1 ",
        "TRUST", "  start skew ", "  harness ", "  interference ", "  clock ", "findings",
        "command ", "run ",
    ]  # fmt: skip
    lines = report(device_ns=80_000_000).splitlines()
    at = [next(i for i, each in enumerate(lines) if each.startswith(start)) for start in starts]
    assert at == sorted(at)


def test_no_line_is_too_long() -> None:
    def change(ranks: list[Rank]) -> None:
        notes = [asdict(Finding("doubtful", "wordy", "word " * 100, remedy="word " * 80))]
        ranks[0].before["findings"] = notes
        for rank in ranks:
            assert rank.after is not None
            rank.before["gpu_before"] = rank.after["gpu_after"] = {
                **GPU, "throttle_reasons": ["sw_power_cap", "sw_thermal_slowdown"],
            }  # fmt: skip
            rank.after["quiet"].update(run_delay_ns=60_000_000)
            rank.after["outputs"].update(non_finite=3, compared=100, different=50)
            rank.after["foreign_after"] = [1234567, 1234568]
            rank.before["harness"]["loop_ns"] = [40_000_000_000]

    whole = report(change, late_ns=(60_000_000, 200_000), bound_ns=(0, 40_000_000))
    for each in whole.splitlines():
        assert len(each) <= 160, each
        assert each == each.rstrip()
    assert whole.count("word ") + whole.count("word\n") == 180
    assert "NaN" not in whole.replace("NaN or infinite", "")


def test_a_long_path_is_not_cut() -> None:
    path = "/" + "/".join(f"folder-{n}" for n in range(30))

    def change(ranks: list[Rank]) -> None:
        ranks[0].before["findings"] = [asdict(Finding("info", "x", f"see {path} there"))]

    assert path in report(change)


# What is not known


def test_an_unknown_throughput_has_its_reason_and_no_makespan() -> None:
    whole = report(lambda ranks: setattr(ranks[1], "after", None))
    assert whole.startswith("MEASUREMENT INCOMPLETE; ")
    assert line(whole, "throughput") == (
        "throughput       unknown: the window of rank 1 was cut short"
    )
    assert "makespan" not in whole
    assert line(whole, "0 ").split()[-2:] == ["?", "-"]
    assert line(whole, "?: unknown, for") == "?: unknown, for the window of rank 1 was cut short"
    assert line(whole, "interference").endswith("0, ?")
    assert line(whole, "waited").endswith("1.00 ms, ?")
    assert "?: unknown, the rank or its kernel did not record it" in whole


def test_what_completed_nothing_is_unknown_and_not_zero() -> None:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.log.completed[:] = -1
            rank.log.count[:] = 0

    whole = report(change)
    assert line(whole, "latency") == "latency          unknown: nothing completed"
    assert line(whole, "0 ").split() == ["0", "node-0", "cpu", "0", "?", "?", "?", "?", "-"]
    assert line(whole, "throughput").startswith("throughput       unknown: rank 0, 1 completed")


def test_a_rank_with_a_share_of_nothing() -> None:
    def change(ranks: list[Rank]) -> None:
        ranks[1].log.completed[:] = -2

    assert line(report(change), "1 ").split() == [
        "1", "node-1", "cpu", "0", "0.0%", "?", "?", "?", "-",
    ]  # fmt: skip


def test_an_unknown_start() -> None:
    run = in_memory(ranks=3)
    whole = Run(3, (run.records[0], None, run.records[2])).report()
    assert line(whole, "start skew").startswith("  start skew     unknown: 1 rank left nothing; ")
    whole = report(lambda ranks: (ranks[0].after or {})["exchanges"].update({"1": []}))
    assert "unknown: a rank's loop did not begin, or its clock was not measured" in whole
    assert line(whole, "clock") == (
        "  clock          rank 1: offset unknown: nothing was exchanged with it, or its loop did "
        "not begin, drift unknown, 0 exchanges"
    )


def test_a_killed_rank() -> None:
    whole = report(kill_rank_1)
    assert line(whole, "clock").endswith("drift unknown, 1 exchanges")
    assert line(whole, "accuracy") == "accuracy         none: a rank left no score"


def test_unknown_accuracy_and_memory() -> None:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            assert rank.after is not None
            rank.after["score"] = {"right": 0, "of": 0, "reason": "performance only"}
            rank.after["memory_peak_bytes"] = None

    whole = report(change)
    assert line(whole, "accuracy") == "accuracy         none: performance only"
    assert line(whole, "memory peak") == "memory peak      unknown: not recorded"


def test_memory_without_a_total_has_no_share() -> None:
    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before["environment"].clear()
            assert rank.after is not None
            rank.after["memory_peak_bytes"] *= 10

    assert line(report(change), "memory peak") == (
        "memory peak      1.60 GB (resident memory of the process)"
    )


def test_ranks_of_one_host_read_one_clock() -> None:
    def change(ranks: list[Rank]) -> None:
        ranks[1].before["clock"] = dict(ranks[0].before["clock"])

    whole = report(change, offset_ns=(0,))
    assert line(whole, "clock") == "  clock          all ranks read one clock"


# GPUs


def gpus(before: Any, after: Any) -> str:
    def change(ranks: list[Rank]) -> None:
        ranks[1].before["gpu_before"] = before
        assert ranks[1].after is not None
        ranks[1].after["gpu_after"] = after

    found = [each for each in report(change).splitlines() if each.startswith("  GPU ")]
    return "\n".join(each.removeprefix("  GPU            rank 1 ") for each in found)


def test_the_state_of_a_gpu_before_and_after() -> None:
    hot = {**GPU, "temperature_c": 77, "throttle_reasons": ["hw_slowdown", "sw_power_cap"]}
    assert gpus({**GPU, "throttle_reasons": []}, hot).splitlines() == [
        "before: SM clock 1440 MHz, temperature 41 C, throttle reasons: none",
        "after: SM clock 1440 MHz, temperature 77 C, throttle reasons: hw_slowdown, sw_power_cap",
    ]


def test_the_state_of_a_gpu_that_nvml_does_not_tell() -> None:
    gone = {"available": False, "reason": "the driver does not answer"}
    assert gpus(gone, None) == "before: state unknown: the driver does not answer"
    mute = {
        "available": True,
        "sm_clock_hz": None,
        "temperature_c": None,
        "throttle_reasons": None,
        "reasons": {"sm_clock_hz": "not supported", "throttle_reasons": "no permission"},
    }
    assert gpus(None, mute) == (
        "after: SM clock unknown: not supported, temperature unknown: not recorded, "
        "throttle reasons: unknown: no permission"
    )


# Many ranks


def test_a_thousand_ranks_make_a_report_that_can_be_read() -> None:
    def change(ranks: list[Rank]) -> None:
        for number, rank in enumerate(ranks):
            assert rank.after is not None
            rank.before["device"]["note"] = f"note {number}"
            rank.before["gpu_before"] = dict(GPU)
            rank.after["quiet"]["run_delay_ns"] = 20_000_000
        for number in (40, 300, 301, 999):
            row = ranks[number].row(2)
            ranks[number].log.completed[row] += number * 1_000

    whole = report(change, ranks=1000, groups=(3,), group_ns=(300_000_000,), late_ns=(200_000,))
    lines = whole.splitlines()
    assert len(lines) < 120
    assert max(len(each) for each in lines) <= 160
    assert lines[0].endswith("; note 0; note 1; and 998 notes more on devices")
    table = lines[lines.index(line(whole, "rank ")) + 1 :][:21]
    shown = [int(each.split()[0]) for each in table[:20]]
    assert shown == [*range(16), 40, 300, 301, 999]
    left_out = "980 ranks left out (result.json has all): these are the first 16 and the worst 4"
    assert table[20] == f"{left_out}, by finish"
    clocks = [each for each in lines if each.startswith("  clock ")]
    assert len(clocks) == 21
    assert clocks[20].endswith("worst 4, by bound")
    assert sum(each.startswith("  GPU ") for each in lines) == 21
    late = ", ".join(str(rank) for rank in range(16))
    assert f"late: rank {late} and 984 more; attempts: 1" in " ".join(whole.split())
    assert sum(each.startswith("  doubtful  interference: rank") for each in lines) == 4
    assert "  doubtful  interference: 996 more in result.json" in lines


@pytest.mark.parametrize(("ranks", "left"), [(20, 0), (21, 1)])
def test_only_more_than_twenty_ranks_are_too_many(ranks: int, left: int) -> None:
    whole = report(ranks=ranks)
    assert len(re.findall(r"^\d+ +node-", whole, re.MULTILINE)) == 20
    assert ("1 rank left out" in whole) == bool(left)


def test_a_rank_whose_end_is_unknown_is_among_the_worst() -> None:
    def change(ranks: list[Rank]) -> None:
        ranks[22].log.completed[:] = -1

    rows = re.findall(r"^(\d+) +node-", report(change, ranks=30), re.MULTILINE)
    assert "22" in rows


@pytest.mark.parametrize(("count", "told"), [(4, 4), (5, 4)])
def test_four_findings_of_a_kind_are_enough(count: int, told: int) -> None:
    def change(ranks: list[Rank]) -> None:
        notes = [asdict(Finding("info", "same", f"number {n}")) for n in range(count)]
        ranks[0].before["findings"] = notes

    whole = report(change)
    assert whole.count("info  same: number") == told
    assert ("info  same: 1 more in result.json" in whole) == (count > told)


# Numbers as text


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (None, "?"),
        (0.0, "0 s"),
        (12.345, "12.3 s"),
        (1.0, "1.00 s"),
        (0.9994, "999 ms"),
        (0.0123, "12.3 ms"),
        (4.2e-6, "4.20 us"),
        (-4.2e-6, "-4.20 us"),
        (123e-9, "123 ns"),
        (4e-10, "0.400 ns"),
        (4321.0, "4,321 s"),
    ],
)
def test_times_have_a_unit_that_suits_them(seconds: float | None, shown: str) -> None:
    assert units.duration(seconds) == shown


def test_other_numbers() -> None:
    assert units.rounded(21345.678, 5) == "21,346"
    assert units.rounded(0.0123456, 3) == "0.0123"
    assert units.rounded(0.0, 3) == "0.0"
    assert units.size(123_400_000) == "123.4 MB"
    assert units.size(1_600_000_000) == "1.60 GB"
    assert units.counted(1, "rank") == "1 rank"
    assert units.counted(2, "rank") == "2 ranks"


def test_a_report_is_a_function_of_the_result_alone() -> None:
    run = in_memory()
    assert to_text(run.result()) == run.report()
