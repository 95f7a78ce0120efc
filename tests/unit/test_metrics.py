"""Figures against integers worked by hand; see synthetic.py for the run they are of.

The clock bound of rank 1, with exchanges 1 s before the start and 3 s after it, 1,000 ns each: the
two bounds, rounded up (1,001), plus 2 ppm of the way to the nearer exchange, plus 2 for rounding.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbench import files
from distbench import metrics as m
from distbench.pool import facts
from distbench.run import Run
from distbench.scores import of_first
from distbench.times import Makespan, RankTimes, makespan, rank_times

from .synthetic import GPU, OFFSET_NS, START_NS, in_memory, leaves

MS = 1_000_000
KEYS = ["value", "unit", "ci_low", "ci_high", "ci_method", "n", "n_eff", "definition", "reason"]


def figures(run: Run) -> dict[str, Any]:
    return run.result()["metrics"]


def spans(run: Run) -> tuple[list[RankTimes], Makespan]:
    times = [rank_times(run, record, facts(record)) for record in run.present]
    return times, makespan(run, times)


# Throughput and makespan


def test_throughput_is_all_samples_over_the_makespan() -> None:
    run = in_memory()
    found = figures(run)["throughput"]
    assert (found["value"], found["unit"], found["n"]) == (80.0, "samples/s", 80)
    assert "repeat windows or launches" in found["reason"]
    window = run.result()["window"]
    assert (window["samples"], window["makespan_s"], window["makespan_reason"]) == (80, 1.0, "")


def test_the_last_rank_ends_the_makespan_on_the_clock_of_rank_0() -> None:
    run = in_memory(group_ns=(100 * MS, 110 * MS))
    _, span = spans(run)
    # Its last completion is 1.9 s before the second exchange: 1001 + 3800 + 2.
    assert (span.value_ns, span.bound_ns, span.start_ns) == (1_100 * MS, 4_803, START_NS)
    assert figures(run)["throughput"]["value"] == 80 / 1.1
    window = run.result()["window"]
    assert (window["makespan_s"], window["makespan_bound_s"]) == (1.1, 4_803e-9)


def test_a_clock_that_runs_fast_does_not_lengthen_the_makespan() -> None:
    run = in_memory(group_ns=(100 * MS, 110 * MS), drift_ppm=(0, 10))
    _, span = spans(run)
    assert span.value_ns == 1_100 * MS
    row = run.result()["clock"]["ranks"][1]
    assert (row["drift_ppm"], row["offset_s"]) == (pytest.approx(10.0), OFFSET_NS / 1e9)
    # A latency uses the rank's own clock alone, which counted 11 us more.
    assert figures(run)["latency.max"]["value"] == (1_100 * MS + 11_000) / 1e9


@pytest.mark.parametrize(
    ("later_ns", "bound_ns"),
    # Rank 1 ends 2 s, less some ns, from the nearer exchange: 1001 + 3999 + 2 = 5002. Where it
    # ended before rank 0, what is left of its bound reaches past rank 0's end.
    [(300, 5_002), (-300, 4_702), (-6_000, 0)],
)
def test_the_bound_of_the_makespan(later_ns: int, bound_ns: int) -> None:
    run = in_memory(group_ns=(100 * MS, 100 * MS + later_ns // 10))
    _, span = spans(run)
    assert (span.value_ns, span.bound_ns) == (1_000 * MS + max(0, later_ns), bound_ns)


def test_of_two_last_ranks_the_one_that_is_known_less_well_gives_the_bound() -> None:
    # Either could be last, and the later of the two at most 9 us after what was read.
    run = in_memory(
        ranks=3,
        groups=(5, 10, 10),
        group_ns=(100 * MS,),
        offset_ns=(0, 5, -7),
        bound_ns=(0, 1_000, 5_000),
    )
    times, span = spans(run)
    assert [t.bound_ns for t in times] == [0, 1_001 + 4_000 + 2, 5_001 + 4_000 + 2]
    assert (span.value_ns, span.bound_ns) == (1_000 * MS, 9_003)


def test_one_rank_alone_has_no_bound() -> None:
    run = in_memory(ranks=1)
    _, span = spans(run)
    assert (span.value_ns, span.bound_ns) == (1_000 * MS, 0)
    assert run.result()["clock"] == {
        "ranks": [
            {
                "rank": 0,
                "domain": "boot-0/1",
                "offset_s": 0.0,
                "bound_s": 0.0,
                "drift_ppm": None,
                "exchanges": 0,
            }
        ],
        "driver": None,
    }


@settings(max_examples=50, deadline=None, derandomize=True)
@given(st.integers(-9 * 10**14, 10**15), st.integers(-50, 50))
def test_no_figure_depends_on_what_a_clock_shows(offset_ns: int, drift_ppm: int) -> None:
    one = in_memory(group_ns=(100 * MS, 110 * MS)).result()
    other = in_memory(
        group_ns=(100 * MS, 110 * MS), offset_ns=(0, offset_ns), drift_ppm=(0, drift_ppm)
    ).result()
    # The drift is rounded to whole ns at each stamp.
    assert other["metrics"]["throughput"]["value"] == pytest.approx(80 / 1.1, rel=2e-9)
    assert other["start"]["skew_s"] == pytest.approx(15e-6, abs=2.1e-9)
    assert other["per_rank"][0] == {**one["per_rank"][0], "idle_s": pytest.approx(0.1, abs=2e-9)}
    assert other["verdict"] == one["verdict"]
    offset_s = other["clock"]["ranks"][1]["offset_s"]
    assert offset_s * 1e9 == pytest.approx(offset_ns, rel=1e-12, abs=1)


# Why there is no throughput


def test_a_rank_that_left_nothing() -> None:
    run = in_memory(ranks=12)
    run = Run(12, tuple(None if r else record for r, record in enumerate(run.records)))
    found = figures(run)["throughput"]
    assert (found["value"], found["n"]) == (None, 40)
    assert found["reason"] == "samples of rank 1, 2, 3, 4, 5, 6, 7, 8 and others are missing"
    run = Run(9, tuple(None if r else record for r, record in enumerate(run.records[:9])))
    assert figures(run)["throughput"]["reason"] == (
        "samples of rank 1, 2, 3, 4, 5, 6, 7, 8 are missing"
    )


def test_a_rank_whose_window_was_cut_short() -> None:
    def killed(ranks):
        ranks[1].after = None

    end = {"code": "lost", "rank": 1, "host": "node-1", "sentence": "gone", "exit_code": 6}

    def ended(ranks):
        ranks[0].after["end"] = end
        del ranks[0].after["ended_ns"]

    def ended_after_its_window(ranks):
        ranks[0].after["end"] = end

    assert figures(in_memory(change=killed))["throughput"]["reason"] == (
        "the window of rank 1 was cut short"
    )
    found = figures(in_memory(change=ended))["throughput"]
    assert (found["value"], found["reason"]) == (None, "the window of rank 0 was cut short")
    # What was lost in the accuracy pass or in the gathering does not unmake the window.
    late = in_memory(change=ended_after_its_window)
    assert figures(late)["throughput"]["value"] == figures(in_memory())["throughput"]["value"] > 0
    assert late.result()["verdict"]["status"] == "INCOMPLETE"


def test_a_rank_that_completed_nothing() -> None:
    def change(ranks):
        ranks[1].log.completed[:] = -1
        ranks[1].log.count[:] = 0

    run = in_memory(change=change)
    assert figures(run)["throughput"]["reason"] == (
        "rank 1 completed nothing or its clock was not measured"
    )
    assert figures(run)["throughput"]["value"] is None
    row = run.result()["per_rank"][1]
    assert (row["samples"], row["pending"], row["finish_s"], row["idle_s"]) == (0, 40, None, None)
    assert row["metrics"]["throughput"] is None
    assert row["metrics"]["share"] == 0


def test_nobody_completed_anything() -> None:
    def change(ranks):
        for rank in ranks:
            rank.log.completed[:] = -1

    result = in_memory(change=change).result()
    assert result["metrics"]["throughput"]["reason"].startswith("rank 0, 1 completed nothing")
    assert not [name for name in result["metrics"] if name.startswith(("latency", "batch"))]
    assert [row["metrics"]["share"] for row in result["per_rank"]] == [None, None]


def test_a_rank_whose_clock_was_never_measured() -> None:
    def change(ranks):
        ranks[0].after["exchanges"]["1"] = []

    result = in_memory(change=change).result()
    assert result["metrics"]["throughput"]["value"] is None
    row = result["clock"]["ranks"][1]
    assert [row[k] for k in ("offset_s", "bound_s", "drift_ppm", "exchanges")] == [
        None, None, None, 0,
    ]  # fmt: skip
    assert (result["start"]["skew_s"], result["start"]["bound_s"]) == (None, None)
    assert result["per_rank"][1]["finish_s"] == 0.9
    assert result["per_rank"][1]["idle_s"] is None


@pytest.mark.parametrize("end", [START_NS, START_NS - 5])
def test_stamps_that_contradict_each_other_give_no_throughput(end: int) -> None:
    def change(ranks):
        ranks[0].log.completed[:] = end

    found = figures(in_memory(ranks=1, change=change))["throughput"]
    assert (found["value"], found["reason"]) == (
        None, "the last completion is not after the agreed instant",
    )  # fmt: skip


# Ranks


def test_the_row_of_each_rank() -> None:
    first, second = in_memory(groups=(10, 5), device_ns=63 * MS).result()["per_rank"]
    assert first == {
        "rank": 0,
        "host": "node-0",
        "device": "cpu",
        "replica": 0,
        "samples": 40,
        "failed": 0,
        "pending": 0,
        "finish_s": 1.0,
        "idle_s": 0.0,
        "metrics": {
            "throughput": 40.0,
            "share": 40 / 60,
            "device_busy": 0.63,
            "memory.peak": 100_000_000,
            "memory.total": 8_000_000_000,
        },
    }
    assert (second["samples"], second["finish_s"], second["idle_s"]) == (20, 0.45, 0.55)
    assert second["metrics"]["throughput"] == 20 / 0.45
    assert second["metrics"]["share"] == 20 / 60
    assert second["metrics"]["device_busy"] == pytest.approx(0.7, rel=1e-12)


def test_failed_and_pending_samples_are_told_apart() -> None:
    def change(ranks):
        log = ranks[0].log
        log.completed[ranks[0].row(2)] = -2
        for group in (8, 9):
            log.completed[ranks[0].row(group)] = -1
            log.count[ranks[0].row(group)] = 0

    run = in_memory(change=change)
    row = run.result()["per_rank"][0]
    assert (row["samples"], row["failed"], row["pending"]) == (28, 4, 8)
    assert (row["finish_s"], row["metrics"]["throughput"]) == (0.8, 28 / 0.8)
    # Rank 1 is last now, at 0.9 s.
    assert figures(run)["throughput"]["value"] == 68 / 0.9
    assert figures(run)["latency.p50"]["n"] == 68
    assert figures(run)["batch_latency.p50"]["n"] == 17


def test_a_gpu_has_its_name_and_memory() -> None:
    def change(ranks):
        for rank in ranks:
            rank.before["device"].update(type="cuda", name="NVIDIA A30")
            rank.before["gpu_before"] = dict(GPU)
        ranks[1].before["gpu_before"] = {"available": False, "reason": "no driver"}

    result = in_memory(change=change).result()
    assert [row["device"] for row in result["per_rank"]] == ["NVIDIA A30", "NVIDIA A30"]
    assert [row["metrics"]["memory.total"] for row in result["per_rank"]] == [24_000_000_000, None]
    assert result["metrics"]["memory.peak"]["definition"].endswith("allocated by torch")


# Start


def test_the_start_is_compared_on_the_clock_of_rank_0() -> None:
    start = in_memory().result()["start"]
    assert start["skew_s"] == 15e-6
    # Of rank 1's two stamps the completion is known less well, 1.9 s after the first exchange.
    assert start["bound_s"] == 4_803e-9
    assert start["lateness_s"] == [5e-6, 20e-6]
    assert (start["late_ranks"], start["attempts"], start["late_limit_s"]) == ([], 1, 100e-6)


def test_two_stamps_carry_the_sum_of_the_two_largest_bounds() -> None:
    start = in_memory(ranks=3, late_ns=(7_000, 5_000, 90_000), bound_ns=(0, 1_000, 2_000)).result()[
        "start"
    ]
    assert start["skew_s"] == 85e-6
    assert start["bound_s"] == (4_803 + 5_803) / 1e9


def test_late_begins_above_100_us() -> None:
    result = in_memory(ranks=3, late_ns=(100_000, 100_001, 5_000)).result()
    assert result["start"]["late_ranks"] == [1]


def test_a_run_that_ended_before_its_start_was_agreed() -> None:
    def change(ranks):
        for rank in ranks:
            for name in ("plan", "quiet", "exchanges", "outputs", "score", "memory_peak_bytes"):
                del rank.after[name]
            rank.log.rows[:] = 0
            rank.log.completed[:] = -1
            rank.after["started_ns"] = None
            rank.after["end"] = {
                "code": "lost", "rank": 1, "host": "node-1", "sentence": "gone", "exit_code": 6
            }  # fmt: skip

    result = in_memory(change=change).result()
    assert result["verdict"]["status"] == "INCOMPLETE"
    assert result["start"] == {
        "skew_s": None,
        "bound_s": None,
        "late_ranks": [],
        "late_limit_s": 100e-6,
        "lateness_s": [None, None],
        "attempts": None,
    }
    assert [row["offset_s"] for row in result["clock"]["ranks"]] == [None, None]


def test_without_its_own_stamp_a_rank_began_when_it_first_issued() -> None:
    def change(ranks):
        ranks[1].after["started_ns"] = None

    times, _ = spans(in_memory(change=change))
    assert times[1].started_ns == START_NS + OFFSET_NS + 20_000


def test_a_rank_killed_between_two_stores_can_still_be_judged() -> None:
    def change(ranks):
        ranks[0].after = None
        ranks[0].log.completed[1:] = -1
        ranks[0].log.count[:] = 0

    times, _ = spans(in_memory(ranks=1, change=change))
    assert (times[0].started_ns, times[0].ok, times[0].pending) == (None, 1, 39)


# Latencies


def test_percentiles_are_observed_latencies_by_loadgens_rule() -> None:
    run = in_memory(ranks=1, groups=(1000,), batch=1, group_ns=(10_000,), late_ns=(500,))
    found = figures(run)
    # Sample k ends k * 10 us after the start; zero-based place int(1000 p) of the sorted ones.
    expected = {"p50": 501, "p90": 901, "p95": 951, "p97": 971, "p99": 991, "p99.9": 1000}
    for name, place in expected.items():
        assert found[f"latency.{name}"]["value"] == place * 10_000 / 1e9, name
        assert "sorted[int(n * p)]" in found[f"latency.{name}"]["definition"]
    assert found["latency.max"]["value"] == 0.01
    assert found["latency.mean"]["value"] == 5_005_000 / 1e9
    # Every group is issued 1 us after the one before it ended, the first 0.5 us after the start.
    assert found["batch_latency.p50"]["value"] == 9_000 / 1e9
    assert found["batch_latency.p99.9"]["value"] == found["batch_latency.max"]["value"] == 9.5e-6
    assert found["batch_latency.mean"]["value"] == 9_000.5 / 1e9
    # The engine's own stamps are 2 us and 3 us inside.
    assert found["service.p50"]["value"] == 4_000 / 1e9
    assert found["service.max"]["value"] == 4_500 / 1e9
    assert {found[f"{name}.p50"]["n"] for name in ("latency", "batch_latency", "service")} == {1000}
    assert "device.p50" not in found


def test_latency_counts_samples_and_batch_latency_groups() -> None:
    found = figures(in_memory(tail=(3, 1)))
    assert found["latency.p99"]["n"] == 84
    assert found["batch_latency.p99"]["n"] == 22


def test_device_time_is_that_of_the_groups_that_have_one() -> None:
    def change(ranks):
        ranks[0].log.device[ranks[0].row(0)] = 0
        ranks[0].log.device[ranks[0].row(1)] = 30 * MS

    found = figures(in_memory(device_ns=20 * MS, change=change))
    assert (found["device.p50"]["value"], found["device.p50"]["n"]) == (0.02, 19)
    assert found["device.max"]["value"] == 0.03
    assert found["device.mean"]["value"] == 390 * MS / 19 / 1e9


def test_an_engine_without_stamps_has_no_service_time() -> None:
    def change(ranks):
        for rank in ranks:
            rank.log.started[:] = 0
            rank.log.finished[:] = 0

    assert "service.p50" not in figures(in_memory(change=change))


def test_the_mean_of_long_latencies_does_not_overflow() -> None:
    hour = 3_600 * 10**9
    run = in_memory(ranks=1, groups=(3000,), batch=1, group_ns=(hour,))
    assert figures(run)["latency.mean"]["value"] == 3001 * hour / 2 / 1e9


# Accuracy and memory


def test_accuracy_is_summed_then_divided() -> None:
    def change(ranks):
        ranks[1].after["score"] = {"right": 1.0, "of": 1.0, "reason": ""}

    found = figures(in_memory(change=change))["accuracy"]
    assert (found["value"], found["n"], found["unit"]) == (10 / 11, 11, "1")
    assert found["definition"].endswith("untimed (10/11)")


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (None, "a rank left no score"),
        ({"right": 0, "of": 0, "reason": "performance only"}, "performance only"),
        ({"right": 0, "of": 0, "reason": ""}, "nothing was scored"),
    ],
)
def test_no_accuracy_has_a_reason(score: Any, reason: str) -> None:
    def change(ranks):
        ranks[0].after["score"] = {"right": 0, "of": 0, "reason": ""}
        ranks[1].after["score"] = score

    found = figures(in_memory(change=change))["accuracy"]
    assert (found["value"], found["n"], found["reason"]) == (None, 0, reason)


def test_bits_per_byte_are_summed_then_divided() -> None:
    def change(ranks):
        ranks[1].after["text"] = {"bits": 1.5, "bytes": 1, "reason": ""}

    found = figures(in_memory(change=change))["bits_per_byte"]
    assert (found["value"], found["n"], found["unit"]) == (301.5 / 201, 201, "bits/byte")
    assert found["definition"].endswith("untimed (301.5/201)")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (None, "a rank left no score"),
        ({"bits": 0, "bytes": 0, "reason": "none"}, "none"),
        ({"bits": 0, "bytes": 0, "reason": ""}, "nothing was scored"),
    ],
)
def test_no_bits_per_byte_have_a_reason(text: Any, reason: str) -> None:
    def change(ranks):
        ranks[0].after["text"] = {"bits": 0, "bytes": 0, "reason": ""}
        ranks[1].after["text"] = text

    found = figures(in_memory(change=change))["bits_per_byte"]
    assert (found["value"], found["n"], found["reason"]) == (None, 0, reason)


def test_what_only_the_first_window_scores_stands_above_several() -> None:
    found = figures(in_memory())
    scored = {"accuracy": found["accuracy"], "bits_per_byte": found["bits_per_byte"]}
    assert of_first(found) == scored
    del found["bits_per_byte"]  # judged by a version that had it not
    assert of_first(found) == {"accuracy": scored["accuracy"]}


def test_memory_is_the_largest_rank_s() -> None:
    found = figures(in_memory())["memory.peak"]
    assert (found["value"], found["unit"], found["n"]) == (160_000_000, "B", 2)
    assert found["definition"] == "largest over ranks: resident memory of the process"


def test_memory_that_was_not_recorded_is_unknown() -> None:
    def change(ranks):
        for rank in ranks:
            rank.after["memory_peak_bytes"] = None
            del rank.before["environment"]["memory_total_bytes"]

    result = in_memory(change=change).result()
    found = result["metrics"]["memory.peak"]
    assert (found["value"], found["n"], found["reason"]) == (None, 0, "not recorded")
    assert result["per_rank"][0]["metrics"]["memory.total"] is None


def test_what_is_not_finite_is_unknown() -> None:
    assert m.metric(float("nan"), "s", 1, "x")["value"] is None
    assert m.metric(float("-inf"), "s", 1, "x")["value"] is None


# Every metric, whatever the run


def nothing(ranks):
    for rank in ranks:
        rank.log.completed[:] = -1


def one_lost(ranks):
    ranks[1].after = None


def unclocked(ranks):
    ranks[0].after["exchanges"]["1"] = []


def no_scores(ranks):
    for rank in ranks:
        rank.after.update(score=None, memory_peak_bytes=None, quiet=None)


def unscheduled(ranks):
    for rank in ranks:
        rank.log.scheduled[:] = 0


CHANGES = [None, nothing, one_lost, unclocked, no_scores, unscheduled]


@pytest.mark.parametrize("change", CHANGES, ids=lambda c: c.__name__ if c else "clean")
def test_every_metric_has_all_that_the_schema_asks_for(change: Any) -> None:
    result = in_memory(change=change, device_ns=MS).result()
    text = files.to_json(result)  # refuses NaN and Infinity
    assert json.loads(text) == result
    for name, each in result["metrics"].items():
        assert list(each) == KEYS, name
        assert each["unit"], name
        assert each["definition"], name
        assert isinstance(each["n"], int), name
        # Something is null in each of them: there are no intervals yet.
        assert each["reason"], name
    for place, value in leaves(result):
        assert value is None or isinstance(value, str | int | float | bool), place
    assert {"throughput", "accuracy", "memory.peak"} <= set(result["metrics"])


def test_the_names_of_the_metrics() -> None:
    labels = ("p50", "p90", "p95", "p97", "p99", "p99.9", "max", "mean")
    latencies = [
        f"{name}.{label}"
        for name in ("latency", "batch_latency", "service", "device")
        for label in labels
    ]
    assert list(figures(in_memory(device_ns=5))) == [
        "throughput", "throughput.steady", *latencies, "accuracy", "bits_per_byte",
        "memory.peak",
    ]  # fmt: skip


# A twin that counts sample by sample


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.data())
def test_a_brute_force_twin_gives_the_same_figures(data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, 3))
    whole = st.integers(1, 6)
    groups = data.draw(st.lists(whole, min_size=ranks, max_size=ranks))
    batch = data.draw(st.integers(1, 5))
    tail = data.draw(st.lists(st.integers(0, batch - 1), min_size=ranks, max_size=ranks))
    step = st.integers(10_000, 10**9)
    group_ns = data.draw(st.lists(step, min_size=ranks, max_size=ranks))
    offsets = [0, *data.draw(st.lists(st.integers(-9 * 10**14, 10**15), min_size=2, max_size=2))]
    ends: list[list[int | None]] = []

    def change(made):
        for rank, each in enumerate(made):
            sizes = [batch] * groups[rank] + [tail[rank]] * (tail[rank] > 0)
            samples: list[int | None] = []
            for number, size in enumerate(sizes):
                # The first group of each rank ends well, so that there is a makespan.
                fate = data.draw(st.sampled_from(["ok", "ok", "failed", "pending"]))
                row, good = number * batch, fate == "ok" or number == 0
                if not good:
                    each.log.completed[row] = -2 if fate == "failed" else -1
                    each.log.count[row] = size if fate == "failed" else 0
                samples += [(number + 1) * group_ns[rank] if good else None] * size
            ends.append(samples)

    run = in_memory(
        ranks=ranks,
        groups=groups,
        batch=batch,
        tail=tail,
        group_ns=group_ns,
        offset_ns=offsets[:ranks],
        late_ns=(1_000,),
        change=change,
    )
    found, rows = figures(run), run.result()["per_rank"]
    good = sorted(e for samples in ends for e in samples if e is not None)
    last = max(good)
    assert found["throughput"]["value"] == len(good) / (last / 1e9)
    for label, p in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99), ("p99.9", 0.999)):
        assert found[f"latency.{label}"]["value"] == good[int(len(good) * p)] / 1e9
    assert found["latency.mean"]["value"] == sum(good) / len(good) / 1e9
    for row, samples in zip(rows, ends, strict=True):
        own = [e for e in samples if e is not None]
        assert row["samples"] == len(own)
        assert row["failed"] + row["pending"] == len(samples) - len(own)
        assert row["metrics"]["share"] == len(own) / len(good)
        assert row["idle_s"] == (last - max(own)) / 1e9


def test_service_of_stamps_that_cannot_be_true_is_unknown_and_not_negative() -> None:
    def swap(ranks):
        for rank in ranks:
            started = rank.log.started.copy()
            rank.log.started[:] = rank.log.finished
            rank.log.finished[:] = started

    run = in_memory(change=swap)
    result = run.result()
    figures = {n: m for n, m in result["metrics"].items() if n.startswith("service.")}
    assert sorted(figures) == sorted(
        f"service.{x}" for x in ("p50", "p90", "p95", "p97", "p99", "p99.9", "max", "mean")
    )
    for found in figures.values():
        assert (found["value"], found["n"]) == (None, 0)
        assert found["reason"] == "the engine's stamps contradict in all 20 groups that have them"
    assert result["verdict"]["status"] == "INVALID"
    assert result["metrics"]["batch_latency.p50"]["value"] > 0
    (line,) = [each for each in run.report().splitlines() if each.startswith("service")]
    assert line.split()[2] == "?"
