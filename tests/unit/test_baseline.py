"""Baselines: what is stored, what it says of a cluster, and what check names afterwards."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from distbench import files
from distbench.baseline import (
    SIDES,
    check,
    check_text,
    excerpt,
    main,
    read,
    read_notes,
    record,
    record_text,
)
from distbench.compare import compare, to_text
from distbench.conditions import conditions
from distbench.errors import UsageError
from distbench.launches import detectable, launches_needed

from .synthetic import GPU, Rank, edit_json, make_run
from .test_compare import NEAR, both, environment, launches, option, with_gpus

SLOW, OTHER_SLOW = (949.0, 950.0, 951.0), (947.0, 950.0, 953.0)
Change = Callable[[dict[str, Any]], Any]


def baseline(folder: Path, change: Change = id, notes: dict[str, str] | None = None) -> Any:
    record(folder / "x.json", launches(NEAR, change=change), notes or {})
    return read(folder / "x.json")


# What is stored


def test_an_excerpt_is_compared_like_the_result():
    base, new = launches(NEAR), launches(SLOW, "b", change=environment("kernel", "6.1", rank=1))
    kept = [[excerpt(result) for result in side] for side in (base, new)]
    # As it comes back from a file.
    kept = json.loads(files.to_json(kept))
    assert compare(*kept, across=["kernel"]) == compare(base, new, across=["kernel"])
    assert [conditions(e) for e in kept[1]] == [conditions(result) for result in new]
    assert compare(*kept, across=["kernel"], metric="latency.p99").verdict == "no difference"


def test_an_excerpt_holds_no_samples_and_little_else():
    result = launches(NEAR)[0]
    result["harness"] = result["start"] = result["clock"] = "large"
    assert "large" not in json.dumps(excerpt(result))
    assert len(files.to_json(excerpt(result))) < 12_000


def test_a_stored_baseline(tmp_path):
    path = tmp_path / "deep" / "er" / "x.json"
    record(path, launches(NEAR), {"kubernetes": "1.34"})
    stored = read(path)
    assert [*stored] == ["schema_version", "recorded_utc", "notes", "launches"]
    assert (stored["schema_version"], stored["notes"]) == (1, {"kubernetes": "1.34"})
    assert [each["run_id"] for each in stored["launches"]] == ["a0", "a1", "a2"]
    values = [each["metrics"]["throughput"]["value"] for each in stored["launches"]]
    assert values == list(NEAR)
    assert [each.name for each in path.parent.iterdir()] == ["x.json"]


def test_what_is_no_baseline_is_not_recorded(tmp_path):
    path = tmp_path / "x.json"
    one = launches(NEAR)
    bad = launches((1.0,), "b", change=lambda r: r["verdict"].update(status="INVALID"))
    unlike = launches((1.0,), "b", change=option("batch_size", "9"))
    for wrong, sentence in (
        ([*one, *bad], "launch b0 is INVALID"),
        ([*one, one[0]], "a0 is given twice"),
        ([*one, *unlike], r"launches of the baseline are unlike: a0 and b0 differ in batch_size"),
    ):
        with pytest.raises(UsageError, match=sentence):
            record(path, wrong, {})
        assert not path.exists()


def test_a_disk_that_refuses(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match=r"x\.json cannot be written: "):
        record(tmp_path / "file" / "x.json", launches(NEAR), {})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda s: s.update(schema_version=2), "schema version 2; this distbench reads 1"),
        (lambda s: s.pop("launches"), r"damaged \(KeyError\('launches'\)\): record it again"),
        (lambda s: s.update(launches=[]), "damaged"),
        (lambda s: s.pop("notes"), "damaged"),
        (lambda s: s.pop("recorded_utc"), "damaged"),
        (lambda s: s["launches"][1].pop("environment"), "damaged"),
        (lambda s: s["launches"][1]["environment"]["ranks"].pop(), "damaged"),
    ],
)
def test_a_damaged_baseline(tmp_path, change, sentence):
    baseline(tmp_path)
    edit_json(tmp_path / "x.json", change)
    with pytest.raises(UsageError, match=sentence):
        read(tmp_path / "x.json")


def test_a_baseline_that_is_not_there(tmp_path):
    with pytest.raises(UsageError, match=r"no baseline .*x\.json: make it"):
        read(tmp_path / "x.json")
    baseline(tmp_path)
    with pytest.raises(UsageError, match=r"did you mean x\?; there are x: make it with"):
        read(tmp_path / "xx.json")
    (tmp_path / "y.json").write_text("[]")
    with pytest.raises(UsageError, match="is no baseline, or damaged"):
        read(tmp_path / "y.json")


# What it says of a cluster


def test_what_can_be_resolved_is_told():
    values = np.exp(np.array([-2, -1, 0, 1, 2]) * 0.007 / math.sqrt(2.5))  # an sd of 0.7 %
    made = launches((1000 * values).tolist())
    for each in made:
        each["metrics"]["throughput.steady"] = {
            "value": None,
            "ci_low": None,
            "reason": "too short",
        }
    text = record_text("jw", made, "throughput")
    first, mean, between, within, _, cells, needed, *_ = text.splitlines()
    assert first == (
        "baseline jw: 5 launches of offline sleep,per_sample=25ms, world size 2, on node-0, node-1"
    )
    assert mean == "  throughput  1,000 samples/s (geometric mean; 991.185 to 1,008.89)"
    low, high = 0.7 * np.sqrt(4 / stats.chi2.ppf([0.975, 0.025], 4))
    assert between == (f"  between launches  sd 0.7 % (95 % interval {low:.3g} % to {high:.3g} %)")
    assert within == "  within a launch   unknown: too short"
    told = {int(k): cell for k, cell in (part.split(": ") for part in cells.split("   ") if part)}
    assert [*told] == list(SIDES)
    assert told.pop(1) == "none"
    for k, cell in told.items():
        assert cell == f"{100 * math.expm1(detectable(0.007, k)):.3g} %"
    assert needed == f"  launches a side for 1 %: {launches_needed(0.007, math.log(1.01))}"


def test_a_steady_interval_is_told():
    z = stats.norm.ppf(0.975)
    steady = {"value": 1000.0, "unit": "samples/s", "ci_low": 1000 - 3 * z, "ci_high": 1000 + 3 * z}
    made = launches(NEAR, change=lambda r: r["metrics"].update({"throughput.steady": steady}))
    assert "  within a launch   standard error 0.3 % (median)\n" in record_text(
        "x", made, "throughput"
    )


def test_one_launch_resolves_nothing():
    text = record_text("x", launches((1000.0,)), "throughput")
    assert "between launches  unknown: a single launch has no variance; record at least 2" in text
    assert "resolve" not in text


def test_a_restless_cluster():
    text = record_text("x", launches((500.0, 1000.0, 2000.0)), "throughput")
    assert "  launches a side for 1 %: more than 1,000\n" in text


# Check


def test_a_regression_after_a_new_driver(tmp_path):
    stored = baseline(tmp_path, with_gpus())
    new = launches(SLOW, "b", change=with_gpus(driver="580.2"))
    found, besides = check(stored, new, {})
    assert (found.verdict, found.regression, besides) == ("slower", True, ())
    text = check_text("jw", stored, new, found, besides)
    lines = text.splitlines()
    assert lines[0].startswith("throughput: slower by 5 % (")
    assert lines[1] == f"  baseline jw, recorded {stored['recorded_utc']}"
    assert "  changed  gpu.driver_version: 570.1 -> 580.2" in lines
    assert "nothing that is recorded" not in text
    assert "give such with --note kubernetes=1.34.1" in text


COMPONENTS = {
    "kernel": "6.1.0-31-amd64", "os": "Debian 13", "torch_version": "2.13.0+cu130",
    "torch_cuda_version": "13.0", "nccl_version": "2.27.7", "cpu_governor": "powersave",
    "container": {"dockerenv": True}, "cpu_model": "another", "numpy_version": "2.4.6",
    "gpu": {"vbios_version": "92.00.A0", "power_limit_w": 120.0, "max_sm_clock_hz": 1_200_000_000},
    "variables": {"NCCL_ALGO": "Ring"}, "git_commit": "1234", "cgroup_cpu_max": "100000 100000",
}  # fmt: skip


@pytest.mark.parametrize("name", COMPONENTS)
@pytest.mark.parametrize("rank", [None, 1])
def test_each_component_that_changed_is_named(tmp_path, name, rank):
    stored = baseline(tmp_path)
    new = launches(OTHER_SLOW, "b", change=environment(name, COMPONENTS[name], rank))
    found, besides = check(stored, new, {})
    wanted = COMPONENTS[name]
    names = [f"{name}.{part}" for part in wanted] if isinstance(wanted, dict) else [name]
    assert [d.name for d in found.tested] == names
    assert {d.ranks for d in found.tested} == {() if rank is None else ("rank 1 (node-1)",)}
    assert (found.regression, besides) == (True, ())
    text = check_text("x", stored, new, found, besides)
    for each in names:
        assert (
            f"  changed  {each}{'' if rank is None else ' of rank 1 (node-1)'}: unknown -> " in text
        )


def test_other_hosts_and_several_changes(tmp_path):
    stored = baseline(tmp_path)

    def moved(result: dict[str, Any]) -> None:
        result["per_rank"][0]["host"] = "node-9"

    new = launches(NEAR, "b", change=both(moved, environment("kernel", "6.2")))
    found, _ = check(stored, new, {})
    assert [d.name for d in found.tested] == ["hosts", "kernel"]
    assert not found.regression


def test_nothing_changed(tmp_path):
    stored = baseline(tmp_path)
    new = launches(NEAR, "b", change=environment("load_average", [1, 2, 3]))
    found, besides = check(stored, new, {})
    assert (found.verdict, found.tested, besides) == ("no difference", (), ())
    assert "  nothing that is recorded of the hosts changed\n" in check_text(
        "x", stored, new, found, besides
    )


def test_what_no_rank_knows_is_told(tmp_path):
    unknown = both(environment("cpu_governor", None), environment("kernel", None, rank=1))
    stored = baseline(tmp_path, unknown)
    new = launches(NEAR, "b", change=unknown)
    new[0]["environment"]["ranks"][0]["kernel"] = stored["launches"][0]["environment"]["ranks"][0][
        "kernel"
    ] = "6.1"
    for each in (*new[1:], *stored["launches"][1:]):
        each["environment"]["ranks"][0]["kernel"] = "6.1"
    found, besides = check(stored, new, {})
    # The kernel is unknown on one rank alone.
    assert "  unknown on every rank, so not compared: cpu_governor\n" in check_text(
        "x", stored, new, found, besides
    )


def test_notes_are_held_against_notes(tmp_path):
    stored = baseline(tmp_path, notes={"kubernetes": "1.33", "bios": "2", "switch": "a"})
    found, besides = check(
        stored, launches(NEAR, "b"), {"kubernetes": "1.34", "switch": "a", "cni": "calico 3.30"}
    )
    assert [(d.name, d.base, d.new) for d in besides] == [
        ("kubernetes", "1.33", "1.34"),
        ("bios", "2", "not given"),
        ("cni", "not given", "calico 3.30"),
    ]
    text = check_text("x", stored, launches(NEAR, "b"), found, besides)
    assert "  changed  kubernetes: 1.33 -> 1.34\n" in text
    assert "--note" not in text
    assert "nothing that is recorded" not in text


def clocks(*megahertz: int | None) -> Change:
    def change(result: dict[str, Any]) -> None:
        with_gpus()(result)
        for gpu, clock in zip(result["window"]["gpus"], megahertz, strict=True):
            gpu["after"] = {**GPU, "sm_clock_hz": clock and clock * 10**6}

    return change


def test_clocks_that_gpus_had_after_their_windows(tmp_path):
    stored = baseline(tmp_path, clocks(1440, 1440))
    # The highest of a side counts: one launch may have been seen when it was idle again.
    new = launches(NEAR, "b", change=clocks(1425, 1200))
    new[2]["window"]["gpus"][0]["after"]["sm_clock_hz"] = 210 * 10**6
    _, besides = check(stored, new, {})
    assert [(d.title, d.base, d.new) for d in besides] == [
        ("SM clock after the window of rank 1 (node-1)", "1440 MHz", "1200 MHz")
    ]
    # 1425 is one step of 15 MHz down; what is unknown is not held against anything.
    for change in (clocks(1425, None), clocks(None, 1440), with_gpus()):
        assert check(stored, launches(NEAR, "c", change=change), {})[1] == ()
    (one,) = check(stored, launches(NEAR, "d", change=clocks(1440, 1410)), {})[1]
    assert one.new == "1410 MHz"
    unavailable = copy.deepcopy(new)
    for each in unavailable:
        for gpu in each["window"]["gpus"]:
            gpu["after"] = {"available": False, "reason": "x"}
    assert check(stored, unavailable, {})[1] == ()


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (option("batch_size", "9"), "batch_size (4 and 9)"),
        (lambda r: r["window"]["model"].update(digest="sha256:1"), "model.digest (unset and sha"),
        (lambda r: r.update(scenario="server"), "scenario (offline and server)"),
    ],
)
def test_another_thing_is_not_held_against_it(tmp_path, change, shown):
    stored = baseline(tmp_path)
    with pytest.raises(UsageError) as caught:
        check(stored, launches(NEAR, "b", change=change), {})
    assert f"did not run what the baseline's ran: {shown}" in str(caught.value)
    assert "--across" not in str(caught.value)


def test_new_launches_must_be_alike_and_valid(tmp_path):
    stored = baseline(tmp_path)
    mixed = [*launches(NEAR[:1], "b"), *launches(NEAR, "c", change=environment("kernel", "6.1"))]
    with pytest.raises(UsageError, match="launches of the new side are unlike: b0 and c0 differ"):
        check(stored, mixed, {})
    with pytest.raises(UsageError, match="a0 is given twice"):
        check(stored, launches(NEAR, "a"), {})
    bad = launches(NEAR, "b", change=lambda r: r["verdict"].update(status="INCOMPLETE"))
    bad[0]["environment"]["ranks"] = []  # of a rank that left nothing
    with pytest.raises(UsageError, match="b0 is INCOMPLETE"):
        check(stored, bad, {})


def test_other_metrics_and_thresholds(tmp_path):
    stored = baseline(tmp_path)
    slower = launches((0.0111, 0.0112, 0.0113), "b", "latency.p99")
    found, _ = check(stored, slower, {}, metric="latency.p99")
    assert (found.metric, found.unit) == ("latency.p99", "s")
    found, _ = check(stored, launches(SLOW, "c"), {}, threshold=0.06)
    assert (found.verdict, found.regression) == ("no difference", False)
    assert "above 6 %" in to_text(found)


def test_notes_on_a_command_line():
    assert read_notes("a=1, b = x=y ,") == {"a": "1", "b": "x=y"}
    assert read_notes("") == {}
    for wrong in ("a", "a=", "=1"):
        with pytest.raises(UsageError, match=f"'{wrong}' is no note: write NAME=VALUE"):
            read_notes(wrong)


# The command


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("runs")

    def side(name: str, group_ns: Sequence[int], kernel: str) -> list[str]:
        made = []
        for number, each_ns in enumerate(group_ns):

            def change(ranks: list[Rank], run_id: str = f"{name}{number}") -> None:
                for rank in ranks:
                    rank.before["run_id"] = run_id
                    rank.before["environment"]["kernel"] = kernel

            made.append(
                str(make_run(folder / f"{name}{number}", group_ns=(each_ns,), change=change))
            )
        return made

    return {
        "old": side("old", (99_900_000, 100_000_000, 100_100_000), "6.1"),
        "slow": side("slow", (104_900_000, 105_000_000, 105_100_000), "6.2"),
        "same": side("same", (99_800_000, 100_000_000, 100_200_000), "6.1"),
    }


def test_the_command(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["record", "jw", *runs["old"], "--note", "kubernetes=1.33"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("baseline jw: 3 launches of offline")
    assert out.endswith("stored  baselines/jw.json\n")
    assert main(["check", "jw", *runs["slow"], "--note=kubernetes=1.34"]) == 5
    out = capsys.readouterr().out
    assert out.startswith("throughput: slower by 4.76 % (")
    assert "  changed  kernel: 6.1 -> 6.2\n  changed  kubernetes: 1.33 -> 1.34\n" in out.replace(
        "  note: the model gives no digest, so that equal weights are not proven\n", ""
    )
    assert main(["check", "jw", *runs["slow"], "--threshold", "6%"]) == 0
    assert main(["check", "jw", *runs["same"]]) == 0
    assert "throughput: no difference above 1 %" in capsys.readouterr().out
    assert main(["check", "--metric", "latency.max", "jw", *runs["slow"]]) == 5


def test_a_baseline_is_replaced_only_when_asked(runs, tmp_path, capsys):
    place = ["--folder", str(tmp_path)]
    assert main(["record", "jw", *runs["old"], *place]) == 0
    with pytest.raises(UsageError, match=r"jw\.json exists: give another name, or --replace"):
        main(["record", "jw", *runs["same"], *place])
    assert read(tmp_path / "jw.json")["launches"][0]["run_id"] == "old0"
    assert main(["record", "jw", *runs["same"], *place, "--replace"]) == 0
    assert read(tmp_path / "jw.json")["launches"][0]["run_id"] == "same0"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["record"],
        ["record", "x"],
        ["check", "x"],
        ["show", "x", "d"],
        ["check", "x", "--", "d"],
    ],
)
def test_words_that_are_missing(argv):
    with pytest.raises(UsageError, match="give record or check, the baseline's name and result"):
        main(argv)


@pytest.mark.parametrize("name", ["../x", "a/b", "", ".x", "a b", "x\n"])
def test_names_that_are_no_file_names(name):
    with pytest.raises(UsageError, match="is no name for a file"):
        main(["record", name, "dir"])
