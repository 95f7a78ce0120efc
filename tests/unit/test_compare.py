"""Comparison of launches: verdicts by hand and in simulation, what is refused, the command."""

from __future__ import annotations

import copy
import math
import shutil
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from distbench import files
from distbench.cli import parse, positionals
from distbench.compare import OPTIONS, Comparison, compare, judged, main, to_text
from distbench.conditions import conditions, covers, differences
from distbench.errors import UsageError
from distbench.record import name_folder

from .synthetic import Rank, edit_json, in_memory, make_run

RESULT = in_memory().result()
Change = Callable[[dict[str, Any]], Any]


def launches(
    values: Sequence[float], side: str = "a", metric: str = "throughput", change: Change = id
) -> list[dict[str, Any]]:
    """Return results of a side, a launch each, in turn with those of another side."""
    made = []
    for number, value in enumerate(values):
        result = copy.deepcopy(RESULT)
        result["run_id"] = f"{side}{number}"
        result["window"]["started_utc"] = f"2026-01-01T00:{number:02d}:00+00:00"
        result["metrics"][metric]["value"] = value
        change(result)
        made.append(result)
    return made


def compared(
    base: Sequence[float], new: Sequence[float], unit: str = "samples/s", threshold: float = 0.01
) -> Comparison:
    return judged("x", unit, tuple(base), tuple(new), threshold)


@pytest.mark.parametrize("name", ["a", "b", "before", "after"])
def test_readme_compares_what_runs_are_called(name: str) -> None:
    world: Any = SimpleNamespace(rank=0, gather_json=lambda value: [value])
    folder = name_folder(world, "results", "offline", name)
    glob = f"results/*-{name}-*"
    assert glob in (Path(__file__).parents[2] / "README.md").read_text()
    assert fnmatch(f"results/{folder.path.name}", glob)
    others = {"a", "b", "before", "after"} - {name}
    assert not any(fnmatch(f"results/{folder.path.name}", f"results/*-{x}-*") for x in others)


# Verdicts

# sd of the logarithms is about 0.001, and the 95 % interval of three a side +-0.0023.
NEAR = (999.0, 1000.0, 1001.0)


@pytest.mark.parametrize(
    ("new", "verdict", "regression"),
    [
        ((1049.0, 1050.0, 1051.0), "faster", False),
        ((949.0, 950.0, 951.0), "slower", True),
        ((1004.0, 1005.0, 1006.0), "no difference", False),
        ((995.0, 996.0, 997.0), "no difference", False),
        ((1009.0, 1010.0, 1011.0), "faster", False),
        # Slower for certain, but by 0.9 %, which is below the threshold.
        ((990.0, 991.0, 992.0), "slower", False),
        ((987.0, 988.0, 989.0), "slower", True),
        ((960.0, 1000.0, 1042.0), "undecided", False),
        ((900.0, 960.0, 1010.0), "undecided", False),
    ],
)
def test_verdicts(new, verdict, regression):
    found = compared(NEAR, new)
    assert (found.verdict, found.regression) == (verdict, regression)
    assert (found.needed is not None) == (verdict == "undecided")


@pytest.mark.parametrize(
    ("unit", "verdict", "regression"),
    [
        ("samples/s", "faster", False),
        ("s", "slower", True),
        ("B", "worse", True),
        ("1", "better", False),
        ("J/sample", "worse", True),
    ],
)
def test_what_more_of_a_metric_means(unit, verdict, regression):
    found = compared(NEAR, (1049.0, 1050.0, 1051.0), unit)
    assert (found.verdict, found.regression) == (verdict, regression)
    assert found.lower_is_better == regression


sides = st.lists(st.floats(500, 2000), min_size=2, max_size=6)


@given(sides, sides, st.sampled_from([0.001, 0.01, 0.1, 0.5]))
def test_the_verdict_follows_from_the_interval(base, new, threshold):
    found = compared(base, new, threshold=threshold)
    assert found.low is not None
    assert found.high is not None
    assert found.low <= found.ratio <= found.high
    inside = 1 - threshold <= found.low and found.high <= 1 + threshold
    apart = "faster" if found.low > 1 else "slower" if found.high < 1 else "undecided"
    assert found.verdict == ("no difference" if inside else apart)
    assert found.regression == (found.verdict == "slower" and found.ratio < 1 - threshold)
    # The sides turned round: the same interval upside down.
    back = compared(new, base, threshold=threshold)
    assert back.ratio == pytest.approx(1 / found.ratio)
    assert (back.low, back.high) == pytest.approx((1 / found.high, 1 / found.low))


def test_the_interval_is_scipys():
    base, new = (100.0, 101.0, 103.0, 99.0), (95.0, 96.5, 99.0)
    found = compared(base, new)
    wanted = stats.ttest_ind(np.log(new), np.log(base), equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx(tuple(np.exp(wanted)), rel=1e-9)
    assert found.ratio == pytest.approx(stats.gmean(new) / stats.gmean(base))


def test_one_launch_on_a_side():
    for base, new in [((100.0,), (50.0,)), ((100.0,), NEAR), (NEAR, (100.0,))]:
        found = compared(base, new)
        assert (found.verdict, found.low, found.high, found.df) == ("undecided", None, None, None)
        assert (found.regression, found.needed) == (False, None)
        assert "at least 2 a side are needed, 5 are better" in to_text(found)


def test_launches_without_any_spread():
    assert compared((0.98, 0.98), (0.98, 0.98), "1").verdict == "no difference"
    assert compared((0.98, 0.98), (0.97, 0.97), "1").verdict == "worse"


# In simulation


def share(verdicts, slowdown, trials, seed, n=5, m=5, sd=(0.007, 0.007)):
    """Return how often two sides of launches get one of these verdicts."""
    rng = np.random.default_rng(seed)
    base = rng.normal(0, sd[0], (trials, n))
    new = rng.normal(math.log(1 - slowdown), sd[1], (trials, m))
    pairs = zip(np.exp(base).tolist(), np.exp(new).tolist(), strict=True)
    found = [compared(a, b).verdict for a, b in pairs]
    return sum(verdict in verdicts for verdict in found) / trials


APART = ("faster", "slower")


def test_identical_sides_are_seldom_called_apart():
    # Welch's test of 5 and 5 has a size of 4.4 % (integrated over its degrees of freedom): the
    # share of 3,000 is above 5 % in 1 of 16 seeds, below 3 % in 1 of 10,000.
    assert 0.03 < share(APART, 0.0, 3_000, seed=1) <= 0.05


def test_a_slowdown_of_3_percent_is_found():
    # Missed in about 1 of 10^5.
    assert share(("slower",), 0.03, 1_000, seed=3) >= 0.95


@pytest.mark.slow
def test_identical_sides_are_seldom_called_apart_many_times():
    # A standard error of 0.10 %, so that 5 % is 5 of those above the size.
    assert share(APART, 0.0, 40_000, seed=4) <= 0.05
    assert share(("slower",), 0.03, 10_000, seed=5) >= 0.95


def test_unlike_spreads_and_numbers_keep_the_error_rate():
    # Where Student's pooled variance would fail: few launches of the side that varies more. Welch
    # stays near 5 % (5.9 % here, and Student 35 %, in 400,000 pairs of scipy's): the share of 1,000
    # is above 9 % in 1 of 50,000 seeds.
    assert share(APART, 0.0, 1_000, seed=6, n=10, m=3, sd=(0.005, 0.03)) <= 0.09


def test_no_difference_is_seldom_said_of_a_difference_at_the_threshold():
    # The interval must lie inside +-1 %, so at exactly 1 % that happens in at most 2.5 %.
    assert share(("no difference",), 0.01, 2_000, seed=7, sd=(0.002, 0.002)) <= 0.025 + 0.014


def test_what_is_needed_decides_in_80_percent():
    rng = np.random.default_rng(8)
    for change, decides in ((0.009, APART), (0.001, ("no difference",))):
        # Three launches a side with a mean and an sd exactly so.
        base = np.exp(np.array([-1, 0, 1]) * 0.01)
        found = compared(base, base * math.exp(change))
        assert found.verdict == "undecided"
        assert found.needed is not None
        assert found.needed > 3
        pairs = rng.normal(0, 0.01, (600, 2, found.needed)) + np.array([[0], [change]])
        verdicts = [compared(*np.exp(pair)).verdict for pair in pairs]
        # A standard error of 1.6 %; 6.5 % is 4 of those.
        assert sum(v in decides for v in verdicts) / 600 == pytest.approx(0.8, abs=0.065)


def test_more_launches_than_anyone_runs_are_not_counted():
    found = compared((10.0, 1000.0), (12.0, 900.0))
    assert (found.verdict, found.needed) == ("undecided", None)
    assert "by estimate more than 1,000 launches a side would be needed" in to_text(found)


# What is compared


def test_metrics_are_compared_by_name():
    base = launches((0.0100, 0.0101, 0.0102), "a", "latency.p99")
    new = launches((0.0121, 0.0122, 0.0123), "b", "latency.p99")
    found = compare(base, new, metric="latency.p99")
    assert (found.metric, found.unit, found.verdict) == ("latency.p99", "s", "slower")
    assert found.regression
    assert found.base == (0.0100, 0.0101, 0.0102)
    assert compare(base, new).verdict == "no difference"


def refused(
    base: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], **more: Any
) -> str:  # fmt: skip
    with pytest.raises(UsageError) as caught:
        compare(base, new, **more)
    sentence = str(caught.value)
    assert "\n" not in sentence
    return sentence


def test_a_launch_that_is_not_valid():
    def spoil(result: dict[str, Any]) -> None:
        finding = {"level": "invalid", "code": "x", "message": "rank 1 (jw3) ran on the CPU"}
        mild = {"level": "doubtful", "code": "y", "message": "mild"}
        result["verdict"] |= {"status": "INVALID", "findings": [mild, finding]}

    good, bad = launches(NEAR), launches((1000.0,), "b", change=spoil)
    assert refused(good, bad) == (
        "launch b0 is INVALID: rank 1 (jw3) ran on the CPU; leave it out, or repeat it"
    )
    assert "b0" in refused(bad, good)
    for status in ("UNDECIDED", "INCOMPLETE"):
        other = launches((1.0,), "c", change=lambda r, s=status: r["verdict"].update(status=s))
        assert refused(good, other).startswith(f"launch c0 is {status};")


def test_a_launch_that_is_given_twice():
    one = launches(NEAR)
    assert refused(one, one).startswith("launch a0 is given twice")
    assert refused([*one, one[2]], launches(NEAR, "b")).startswith("launch a2 is given twice")


def test_windows_of_one_launch_are_no_launches():
    windows = launches(NEAR)
    for number, result in enumerate(windows):
        result["run_id"] = f"a-w{number:03d}"
    assert refused(windows, launches(NEAR, "b")) == (
        "launch a is given twice, which would count it twice: give it once, and of its windows the "
        "directory above them"
    )
    # One window of each launch is one of each.
    assert compare(windows[:1], launches(NEAR, "b")).verdict == "undecided"


def test_metrics_that_cannot_be_compared():
    one, two = launches(NEAR), launches(NEAR, "b")
    assert refused(one, two, metric="latency.p9") == (
        "launch a0 has no metric 'latency.p9'; did you mean latency.p99?"
    )
    two[1]["metrics"]["throughput"] |= {"value": None, "reason": "it is not here"}
    assert refused(one, two) == "throughput of launch b1 is unknown: it is not here"
    two[1]["metrics"]["throughput"] |= {"value": 0.0}
    assert refused(one, two).startswith("throughput of launch b1 is 0.0: only values above 0")
    assert "a side has no launch" in refused([], two)


def environment(name: str, value: Any, rank: int | None = None) -> Change:
    """Return a change of one field of the environment, of one rank or of all."""

    def change(result: dict[str, Any]) -> None:
        part = result["environment"]
        if rank is None:
            part["common"][name] = value
            return
        for number, own in enumerate(part["ranks"]):
            own[name] = value if number == rank else part["common"].get(name)
        part["common"].pop(name, None)

    return change


def with_gpus(
    name: str = "NVIDIA A30", driver: str = "570.1", shift: int = 0, link: int = 4
) -> Change:
    def change(result: dict[str, Any]) -> None:
        for number, row in enumerate(result["per_rank"]):
            row["device"] = name
            result["environment"]["ranks"][number]["gpu"] = {
                "uuid": f"GPU-{number + shift}", "pcie_generation": link,
                "pci_bus_id": f"{number + shift}",
            }  # fmt: skip
        result["environment"]["common"]["gpu"] = {"name": name, "driver_version": driver}

    return change


def option(name: str, value: str) -> Change:
    return lambda result: result["config"].update({name: {"value": value, "origin": "x"}})


def both(*changes: Change) -> Change:
    return lambda result: [change(result) for change in changes]


UNLIKE = [
    (option("batch_size", "64"), "batch_size", "batch_size (4 and 64)"),
    (option("engine", "compile"), "engine", "engine (unset and compile)"),
    (lambda r: r.update(scenario="server"), "scenario", "scenario (offline and server)"),
    (
        lambda r: r["window"]["model"].update(digest="sha256:1"),
        "model",
        "model.digest (unset and sha256:1)",
    ),
    (
        lambda r: r["window"]["model"].update(dtype="fp16"),
        "dtype",
        "model.dtype (unset and fp16)",
    ),
    (
        environment("cudnn_allow_tf32", True),
        "dtype",
        "cudnn_allow_tf32 (unknown and true)",
    ),
    (environment("python", "3.12.1"), "python", "python (3.11.9 and 3.12.1)"),
    (environment("torch_version", "2.13"), "torch", "torch_version (unknown and 2.13)"),
    (environment("nccl_version", "2.27"), "torch", "nccl_version (unknown and 2.27)"),
    (
        environment("kernel", "6.1", rank=1),
        "kernel",
        "kernel of rank 1 (node-1) (unknown and 6.1)",
    ),
    (
        environment("memory_total_bytes", 16_000_000_000),
        "memory_total_bytes",
        "memory_total_bytes (8000000000 and 16000000000)",
    ),
    (environment("variables", {"NCCL_ALGO": "Ring"}), "variables", "variables.NCCL_ALGO"),
    (environment("git_dirty", True), "code", "git_dirty (unknown and true)"),
    (environment("cpu_cores", 1.0), "cpu_cores", "cpu_cores (unknown and 1.0)"),
    (
        lambda r: [row.update(device="NVIDIA A30") for row in r["per_rank"]],
        "device",
        "device.name (cpu and NVIDIA A30)",
    ),
]


@pytest.mark.parametrize(("change", "word", "shown"), UNLIKE, ids=[each[1] for each in UNLIKE])
def test_unlike_launches_are_refused_unless_it_is_what_is_tested(change, word, shown):
    base, new = launches(NEAR), launches(NEAR, "b", change=change)
    sentence = refused(base, new)
    assert sentence.startswith(f"base and new differ in {shown}")
    assert "compare like with like, or say that this is what you test with --across " in sentence
    found = compare(base, new, across=[word])
    assert found.verdict == "no difference"
    assert [d.name for d in found.tested] == [d.name for d in found.tested if covers(word, d.name)]
    assert "under test  " in to_text(found)
    # What the sentence says to give is taken.
    compare(base, new, across=sentence.rsplit("--across ", 1)[1].split(","))
    # It is refused within a side, whatever is under test.
    mixed = [*launches(NEAR[:2], "c"), *launches(NEAR[:1], "d", change=change)]
    for sides, name in (((mixed, base), "base"), ((base, mixed), "new side")):
        assert refused(*sides, across=[word]).startswith(
            f"launches of the {name} are unlike: c0 and d0 differ in {shown}"
        )


HARMLESS = {
    "load": environment("load_average", [9, 9, 9]),
    "free memory": environment("memory_available_bytes", 1),
    "steal": environment("steal_jiffies", 77, rank=1),
    "another kernel's share of the memory": environment("memory_total_bytes", 8_050_000_000),
    "reasons": environment("reasons", {"gpu": "none"}),
    "where results go": option("output_dir", "elsewhere"),
    "a label": option("name", "mine"),
    "progress": option("quiet", "yes"),
    "waiting": option("timeout", "9s"),
    "where a value came from": option("batch_size", "4"),
    "samples": lambda r: r["window"].update(samples=7),
}


@pytest.mark.parametrize("change", HARMLESS.values(), ids=HARMLESS)
def test_what_changes_by_itself_is_no_difference(change):
    assert compare(launches(NEAR), launches(NEAR, "b", change=change)).tested == ()


def test_all_that_differs_is_named():
    change = both(*(option(f"option_{n}", "1") for n in range(6)))
    sentence = refused(launches(NEAR), launches(NEAR, "b", change=change))
    assert "option_3 (unset and 1) and in option_4, option_5: compare" in sentence
    assert sentence.endswith("--across " + ",".join(f"option_{n}" for n in range(6)))
    # One word of two is not enough.
    left = launches(NEAR, "b", change=both(option("a", "1"), option("b", "1")))
    assert refused(launches(NEAR), left, across=["a"]).startswith("base and new differ in b (")


def test_a_word_that_names_nothing():
    one, two = launches(NEAR), launches(NEAR, "b")
    assert refused(one, two, across=["batchsize"]) == (
        "'batchsize' is no condition of these launches; did you mean batch_size?"
    )
    # A word that names what is alike is no error: the reader is told.
    found = compare(one, two, across=["batch_size"])
    assert "batch_size is under test, and the same on both sides" in found.notes


# Hosts and ranks


def turned(result: dict[str, Any]) -> None:
    """Number the two hosts the other way round, as a rendezvous may."""
    for row, host in zip(result["per_rank"], ("node-1", "node-0"), strict=True):
        row["host"] = host
    result["environment"]["ranks"].reverse()


def test_hosts_may_be_numbered_otherwise():
    kernel = environment("kernel", "6.1", rank=1)
    base = launches(NEAR, change=kernel)
    assert compare(base, launches(NEAR, "b", change=both(kernel, turned))).tested == ()
    # What differs is told of the host, with the rank that it has in the new launch.
    moved = launches(NEAR, "b", change=both(environment("kernel", "6.2", rank=1), turned))
    assert refused(base, moved).startswith(
        "base and new differ in kernel of rank 0 (node-1) (6.1 and 6.2): "
    )


def elsewhere(result: dict[str, Any]) -> None:
    result["per_rank"][1]["host"] = "node-7"


def test_other_hosts_are_a_difference():
    new = launches(NEAR, "b", change=elsewhere)
    assert refused(launches(NEAR), new).startswith(
        "base and new differ in hosts (node-1 and node-7)"
    )
    found = compare(launches(NEAR), new, across=["hosts"])
    assert [(d.name, d.base, d.new) for d in found.tested] == [("hosts", "node-1", "node-7")]


def test_pods_have_new_names_each_time():
    pods = environment("container", {"kubernetes": True})
    new = launches(NEAR, "b", change=both(pods, elsewhere))
    assert compare(launches(NEAR, change=pods), new).tested == ()


def test_gpus_are_told_apart_by_their_uuid():
    base = launches(NEAR, change=with_gpus())
    # An idle link, another name of the host: the same GPUs.
    same = launches(NEAR, "b", change=both(with_gpus(link=1), elsewhere))
    assert compare(base, same).tested == ()
    other = launches(NEAR, "b", change=with_gpus(shift=1))
    assert "hosts (node-0 GPU-0 and node-1 GPU-2)" in refused(base, other)
    assert [d.name for d in compare(base, other, across=["hosts"]).tested] == ["hosts"]
    newer = launches(NEAR, "b", change=with_gpus(driver="580.2"))
    assert "gpu.driver_version (570.1 and 580.2)" in refused(base, newer)
    for word in ("driver", "gpu", "gpu.driver_version"):
        assert [d.new for d in compare(base, newer, across=[word]).tested] == ["580.2"]


def test_other_world_sizes_on_some_of_the_hosts():
    small = launches(NEAR, "b")
    for number, result in enumerate(small):
        result |= in_memory(ranks=1).result() | {"run_id": f"b{number}"}
        result["metrics"]["throughput"]["value"] = NEAR[number]
    assert refused(launches(NEAR), small).startswith(
        "base and new differ in world_size (2 and 1): "
    )
    assert compare(launches(NEAR), small, across=["world_size"]).verdict == "no difference"


def test_two_ranks_of_one_host_are_two():
    def one_host(result: dict[str, Any]) -> None:
        result["per_rank"][1]["host"] = "node-0"

    (a,), (b,) = launches((1.0,), change=one_host), launches((1.0,), "b")
    assert [(d.name, d.base, d.new) for d in differences(conditions(a), conditions(b))] == [
        ("hosts", "node-0", "node-1")
    ]


def test_a_driver_is_another_where_its_host_is_and_not_where_its_port_is():
    def driven(address: str, token: str) -> Change:
        def change(result: dict[str, Any]) -> None:
            for name, value in (("driver", address), ("driver_token", token)):
                result["config"][name] = {"value": value, "origin": "command line"}

        return change

    (a,) = launches((1.0,), change=driven("10.0.0.1:40001", "t1"))
    (b,) = launches((1.0,), "b", change=driven("10.0.0.1:40002", "t2"))
    (c,) = launches((1.0,), "c", change=driven("10.0.0.2:40001", "t1"))
    (d,) = launches((1.0,), "d", change=driven("", ""))
    assert differences(conditions(a), conditions(b)) == []
    for other, shown in ((c, "10.0.0.2"), (d, "unset")):
        (found,) = differences(conditions(a), conditions(other))
        assert (found.name, found.base, found.new) == ("driver", "10.0.0.1", shown)


def test_ranks_of_one_host_are_paired_in_order():
    def one_host(result: dict[str, Any]) -> None:
        for row, own in zip(result["per_rank"], result["environment"]["ranks"], strict=True):
            row["host"], own["cpu_affinity"] = "node-0", str(row["rank"])

    (a,), (b,) = launches((1.0,), change=one_host), launches((1.0,), "b", change=one_host)
    assert differences(conditions(a), conditions(b)) == []


def test_many_ranks_are_named_in_part():
    def wide(host: str) -> Change:
        def change(result: dict[str, Any]) -> None:
            rows = [{**result["per_rank"][0], "rank": n, "host": f"n{n}"} for n in range(9)]
            result["per_rank"] = rows
            result["environment"] = {
                "common": {}, "ranks": [{"kernel": host if n > 1 else "1"} for n in range(9)]
            }  # fmt: skip

        return change

    (a,), (b,) = launches((1.0,), change=wide("1")), launches((1.0,), "b", change=wide("2"))
    (found,) = differences(conditions(a), conditions(b))
    assert found.title == (
        "kernel of rank 2 (n2), rank 3 (n3), rank 4 (n4), rank 5 (n5) and 3 more"
    )


# Notes and text


def test_notes():
    base, new = launches(NEAR), launches(NEAR, "b")
    notes = compare(base, new).notes
    assert notes == ("the model gives no digest, so that equal weights are not proven",)
    for result in [*base, *new]:
        result["window"]["model"]["digest"] = "sha256:1"
    assert compare(base, new).notes == ()
    for number, result in enumerate(new):
        result["window"]["started_utc"] = f"2026-01-02T00:0{number}:00+00:00"
    for notes in (compare(base, new).notes, compare(new, base).notes):
        assert [note.split(",")[0] for note in notes] == [
            "all launches of one side ran before those of the other"
        ]
    new[0]["window"]["started_utc"] = base[1]["window"]["started_utc"]
    assert compare(base, new).notes == ()
    new[0]["verdict"]["findings"] = [{"level": "doubtful", "code": "start-late", "message": ""}]
    new[1]["verdict"]["findings"] = [{"level": "info", "code": "quiet", "message": ""}]
    assert compare(base, new).notes == ("1 of 6 launches have doubtful findings: start-late",)
    for result in [*base, *new]:
        environment("git_dirty", True)(result)
    assert "distbench had changes that its commit does not name" in compare(base, new).notes


SLOWER = """\
throughput: slower by 5 % (4.78 % to 5.22 %)
  base  1,000 samples/s  geometric mean of 3 launches, sd 0.1 %
  new   950 samples/s  geometric mean of 3 launches, sd 0.105 %
  new / base  0.95 (0.94779 to 0.95222), 95 % interval by Welch's t on logarithms, 3.99 degrees of \
freedom
  under test  batch_size: 4 -> 64
  note: the model gives no digest, so that equal weights are not proven
"""


def test_a_text_word_for_word():
    new = launches((949.0, 950.0, 951.0), "b", change=option("batch_size", "64"))
    assert to_text(compare(launches(NEAR), new, across=["batch_size"])) == SLOWER


def test_the_other_sentences():
    first = to_text(compared(NEAR, (1001.0, 1002.0, 1003.0))).split("\n", 1)[0]
    assert first == "x: no difference above 1 % (change +0.2 %, interval -0.0267 % to +0.427 %)"
    found = compared((990.0, 1000.0, 1010.0), (970.0, 1000.0, 1020.0, 990.0))
    assert to_text(found).split("\n", 1)[0] == (
        f"x: undecided (change -0.513 %, interval -3.63 % to +2.7 %; neither all on one side of 0 "
        f"nor inside +-1 %): by estimate about {found.needed} launches a side would decide, "
        f"{found.needed - 3} more of base and {found.needed - 4} more of new"
    )
    assert "x: worse by 5 % (" in to_text(compared(NEAR, (1049.0, 1050.0, 1051.0), "B"))


# The command


def stored(folder: Path, run_id: str, group_ns: int, **config: str) -> str:
    """Store a launch of 80 samples in ten times ``group_ns``."""

    def change(ranks: list[Rank]) -> None:
        for rank in ranks:
            rank.before["run_id"] = run_id
            rank.before["config"] |= {
                name: {"value": value, "origin": "command line"} for name, value in config.items()
            }

    make_run(folder / run_id, group_ns=(group_ns, 90_000_000), change=change)
    return str(folder / run_id)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("runs")
    ns = 100_000_000

    def side(name: str, *percent: float, **config: str) -> list[str]:
        return [
            stored(folder, f"{name}{n}", round(ns * (1 + p / 100)), **config)
            for n, p in enumerate(percent)
        ]

    return {
        "base": side("base", -0.1, 0, 0.1),
        "slow": side("slow", 4.9, 5, 5.1),
        "fast": side("fast", -5.1, -5, -4.9),
        "wide": side("wide", -4, 0, 4),
        "batch": side("batch", 4.9, 5, 5.1, batch_size="8"),
    }


def command(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str]:
    status = main(argv)
    return status, capsys.readouterr().out


@pytest.mark.parametrize(
    ("side", "status", "first"),
    [
        ("slow", 5, "throughput: slower by 4.76 % ("),
        ("fast", 0, "throughput: faster by 5.26 % ("),
        ("wide", 0, "throughput: undecided (change "),
    ],
)
def test_the_command(runs, capsys, side, status, first):
    found, out = command(capsys, *runs["base"], "--", *runs[side])
    assert found == status
    assert out.startswith(first)


def test_options_stand_anywhere(runs, capsys):
    base, slow = runs["base"], runs["slow"]
    wide = command(capsys, "--threshold", "6%", *base, "--", *slow)
    assert wide == command(capsys, *base, "--", "--threshold=6%", *slow)
    assert wide == command(capsys, *base, "--", *slow, "--threshold", "6%")
    # 4.76 % is then no difference.
    assert wide[0] == 0
    assert wide[1].startswith("throughput: no difference above 6 % (")
    status, out = command(capsys, *base, "--metric", "latency.max", "--", *slow)
    assert (status, out.startswith("latency.max: slower by 5 % (")) == (5, True)


def test_across_on_the_command_line(runs, capsys):
    with pytest.raises(UsageError, match=r"differ in batch_size \(4 and 8\)"):
        main([*runs["base"], "--", *runs["batch"]])
    status, out = command(
        capsys, *runs["base"], "--", *runs["batch"], "--across", "seed,batch_size"
    )
    assert status == 5
    assert "  under test  batch_size: 4 -> 8\n" in out


def test_figures_are_recomputed(runs, capsys, tmp_path):
    told = command(capsys, *runs["base"], "--", *runs["slow"])
    copied = [str(shutil.copytree(path, tmp_path / Path(path).name)) for path in runs["slow"]]
    for path in copied:
        edit_json(
            Path(path) / "result.json", lambda r: r["metrics"]["throughput"].update(value=1e6)
        )
    assert command(capsys, *runs["base"], "--", *copied) == told
    (Path(copied[0]) / "result.json").unlink()
    assert command(capsys, *runs["base"], "--", *copied) == told


@pytest.mark.parametrize(
    "argv",
    [[], ["a"], ["a", "b"], ["--", "b"], ["a", "--"], ["a", "--", "b", "--", "c"]],
)
def test_both_sides_must_be_there(argv):
    with pytest.raises(UsageError, match=r"BASE\.\.\. -- NEW\.\.\."):
        main(argv)


def test_folders_that_cannot_be_compared(runs, tmp_path):
    with pytest.raises(UsageError, match="no result directory"):
        main([str(tmp_path), "--", *runs["base"]])
    broken = shutil.copytree(runs["base"][0], tmp_path / "broken")
    edit_json(broken / "ranks/00000/rank.json", lambda rank: rank.pop("harness"))
    with pytest.raises(
        UsageError, match=r"is damaged and cannot be judged \(KeyError\('harness'\)"
    ):
        main([str(broken), "--", *runs["base"]])


def test_the_same_launch_in_two_folders(runs, tmp_path):
    copied = str(shutil.copytree(runs["base"][0], tmp_path / "copy"))
    with pytest.raises(UsageError, match="launch base0 is given twice"):
        main([*runs["base"], "--", copied])


def test_a_launch_of_several_windows(runs, tmp_path, capsys):
    def window(launch: int, number: int, group_ns: int) -> None:
        def change(ranks: list[Rank]) -> None:
            for rank in ranks:
                rank.before["run_id"] = f"new{launch}-w{number:03d}"

        folder = tmp_path / f"new{launch}" / "windows" / f"{number:03d}"
        make_run(folder, group_ns=(group_ns, 90_000_000), change=change)

    for launch, group_ns in enumerate((104_900_000, 105_000_000, 105_100_000)):
        window(launch, 0, group_ns - 3_000_000)
        window(launch, 1, group_ns + 3_000_000)
    sides = [*runs["base"], "--", *(str(tmp_path / f"new{n}") for n in range(3))]
    # All samples of both windows over both makespans: as if each took the mean of the two.
    assert command(capsys, *sides) == command(capsys, *runs["base"], "--", *runs["slow"])


def test_wrong_options(runs):
    sides = [*runs["base"], "--", *runs["slow"]]
    with pytest.raises(UsageError, match=r"--threshhold.*did you mean --threshold\?"):
        main([*sides, "--threshhold", "1%"])
    with pytest.raises(UsageError, match="--threshold: "):
        main([*sides, "--threshold", "1"])
    with pytest.raises(UsageError, match="expected one argument"):
        main([*sides, "--metric"])


def test_words_that_belong_to_no_option():
    argv = ["a", "--metric", "x", "b", "--", "--across=y", "c", "--thres_hold", "--threshold", "1%"]
    rest, lists = positionals(argv, OPTIONS)
    assert rest == ["--metric", "x", "--across=y", "--thres_hold", "--threshold", "1%"]
    assert lists == [["a", "b"], ["c"]]
    assert positionals(["--metric"], OPTIONS) == (["--metric"], [[]])
    parsed = parse("x", "", OPTIONS, ["--metric", "x"]).values
    assert parsed == {"metric": "x", "threshold": 0.01, "across": ()}


def test_the_results_of_this_test_are_what_distbench_writes(runs):
    """What ``launches`` changes by hand must be where a stored result has it."""
    result = files.read_json(Path(runs["base"][0]) / "result.json")
    assert set(result) == set(RESULT)
    assert set(result["window"]) == set(RESULT["window"])
