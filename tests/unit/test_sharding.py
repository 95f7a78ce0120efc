"""One model over ranks: what each rank did in a window, layouts in turn, which one wins."""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats as oracle

from distbench.compare import judged
from distbench.errors import UsageError
from distbench.predict import Link, largest_share, link_of
from distbench.record import write_report
from distbench.report.__main__ import main as report
from distbench.report.tables import to_markdown
from distbench.report.text import to_text
from distbench.run import Run
from distbench.salvage import main as salvage
from distbench.shape import NetConfig
from distbench.sharding import cells_of
from distbench.verify import verify
from distbench.windows import load_run

from .serving import US, queries, served
from .synthetic import RUN_ID, Rank, edit_json, in_memory, make_run, mend_hashes

MS = 1_000_000
SUMS = {
    "prefills": 3,
    "decodes": 7,
    "rows": 25,
    "work_ns": 400 * MS,
    "prefill_ns": 100 * MS,
    "wait_ns": 350 * MS,
    "tell_ns": 0,
    "sent_bytes": 2_000,
    "received_bytes": 3_000,
    "last_ns": 0,
}


def told(rank: int, pp: int = 2, tp: int = 1, **more: Any) -> dict[str, Any]:
    """Return what a rank's rank.json says of its place."""
    return {
        "name": f"pp{pp}" * (pp > 1) + f"tp{tp}" * (tp > 1),
        "pp": pp,
        "tp": tp,
        "replicas": 2 // (pp * tp),
        "stage": rank // tp % pp,
        "part": rank % tp,
        "lanes": 4 if pp > 1 else 1,
        "weights_bytes": 600 + 100 * rank,
        "whole_bytes": 1_000,
        "cache_bytes": 50,
        "parity": {"logit_error": 0.0, "tokens": 10, "tokens_equal": 9},
        **more,
    }


def staged(ranks: list[Rank], **more: Any) -> None:
    """Make a rank-0-alone run of two ranks one of a pipeline: rank 1 follows."""
    for rank, each in enumerate(ranks):
        assert each.after is not None
        each.before["layout"] = told(rank, **more)
        each.before["active_ranks"], each.before["active"] = [0], rank == 0
        each.before["replica"] = 0
        each.after["stage"] = {**SUMS, "work_ns": (400 + 200 * rank) * MS}


def pipelined(**more: Any) -> Run:
    """A window of 1 s in which rank 0 worked for 0.4 s and rank 1 for 0.6 s."""
    return in_memory(groups=(10, 0), change=lambda ranks: staged(ranks, **more))


def named(result: dict[str, Any], table: str) -> list[dict[str, Any]]:
    found = result["tables"][table]
    names = [each["name"] for each in found["columns"]]
    return [dict(zip(names, row, strict=True)) for row in found["rows"]]


def test_what_each_rank_did() -> None:
    result = pipelined().result()
    first, last = named(result, "stages")
    assert [first[name] for name in ("work", "wait", "rest", "busy")] == pytest.approx(
        [0.4, 0.35, 0.25, 0.4]
    )
    assert [last[name] for name in ("work", "wait", "rest", "busy")] == pytest.approx(
        [0.6, 0.35, 0.05, 0.6]
    )
    assert (first["steps"], first["rows"], first["prefill"]) == (10, 2.5, 0.1)
    assert (first["sent"], first["send_rate"], first["weights_share"]) == (2000, 2000.0, 0.6)
    assert result["metrics"]["bubble"]["value"] == pytest.approx(0.5)
    assert result["metrics"]["bubble.ideal"]["value"] == 0.0
    assert result["metrics"]["imbalance"]["value"] == pytest.approx(1.2)
    text = to_text(result)
    assert "bubble 50.0%, of equal stages at best 0.0%; imbalance 1.2" in text
    assert "2 ranks on 2 hosts (node-0, node-1)" in text
    assert to_markdown(result)


def test_the_ideal_of_a_one_shot_model_is_another() -> None:
    found = pipelined(loop="one-shot").result()["metrics"]["bubble.ideal"]
    assert found["value"] == pytest.approx(1 / 5)
    assert found["definition"].startswith("(p - 1) / (m + p - 1) of m = 4")


def test_parts_have_no_imbalance_of_stages() -> None:
    result = pipelined(pp=1, tp=2).result()
    assert "imbalance" not in result["metrics"]
    assert result["metrics"]["bubble"]["value"] == pytest.approx(0.5)


def test_without_one_ranks_sums_nothing_is_made_up() -> None:
    def change(ranks: list[Rank]) -> None:
        staged(ranks)
        assert ranks[1].after is not None
        del ranks[1].after["stage"]

    result = in_memory(groups=(10, 0), change=change).result()
    assert result["metrics"]["bubble"]["value"] is None
    assert result["metrics"]["bubble"]["reason"] == "a rank left nothing of its steps"
    assert named(result, "stages")[1]["work"] is None
    assert "bubble unknown: a rank left nothing of its steps" in to_text(result)


def test_a_rank_that_follows_is_described_and_watched() -> None:
    def change(ranks: list[Rank]) -> None:
        staged(ranks)
        ranks[1].before["environment"]["python"] = "3.13.0"
        assert ranks[1].after is not None
        quiet = {"involuntary_switches": 9, "run_delay_ns": 200 * MS, "window_ns": 1_000 * MS}
        ranks[1].after["quiet"] = quiet

    result = in_memory(groups=(10, 0), change=change).result()
    (other,) = result["environment"]["followers"]
    assert (other["rank"], other["python"]) == (1, "3.13.0")
    assert len(result["environment"]["ranks"]) == 1
    found = [each for each in result["verdict"]["findings"] if each["code"] == "interference"]
    assert [(each["rank"], each["value"], each["level"]) for each in found] == [(1, 0.2, "invalid")]


def test_a_whole_model_has_no_stages() -> None:
    result = in_memory().result()
    assert "stages" not in result["tables"]
    assert "bubble" not in result["metrics"]


def test_a_rank_that_follows_is_missed(tmp_path: Path) -> None:
    """It has no samples, and the window is worth nothing without it all the same."""
    folder = make_run(tmp_path / RUN_ID, groups=(10, 0), change=staged)
    (folder / "ranks" / "00001").rename(tmp_path / "gone")
    result = load_run(folder).result()
    assert result["verdict"]["status"] == "INCOMPLETE"
    assert next(each["code"] for each in result["verdict"]["findings"]) == "rank-missing"


def test_a_replica_may_do_what_no_single_gpu_can() -> None:
    """40 samples of 1e14 operations in 1 s are 4e15 a second: of two H100 at most 3.958e15."""
    for flops, codes in ((0.98e14, []), (1e14, ["above-roofline"])):

        def change(ranks: list[Rank], flops: float = flops) -> None:
            staged(ranks)
            for each in ranks:
                each.before["device"]["name"] = "NVIDIA H100 80GB HBM3"
                each.before["model"]["flops_per_sample"] = flops

        found = in_memory(groups=(10, 0), change=change).result()["verdict"]["findings"]
        assert [each["code"] for each in found if each["level"] == "invalid"] == codes


def test_a_foreign_process_beside_a_rank_that_follows_is_told() -> None:
    def change(ranks: list[Rank]) -> None:
        staged(ranks)
        ranks[1].before["foreign_before"] = [77]

    found = in_memory(groups=(10, 0), change=change).result()["verdict"]["findings"]
    assert [(each["code"], each["rank"]) for each in found if each["level"] == "invalid"] == [
        ("foreign-process", 1)
    ]


@pytest.mark.parametrize(
    ("error", "dtype", "level"),
    [
        (1e-3, "fp32", None),
        (1.1e-3, "fp32", "invalid"),
        (1e-2, "bf16", None),
        (0.1, "bf16", "invalid"),
    ],
)
def test_other_answers_than_the_whole_models(error: float, dtype: str, level: str | None) -> None:
    def change(ranks: list[Rank]) -> None:
        staged(ranks, parity={"logit_error": error})
        for each in ranks:
            each.before["model"]["dtype"] = dtype

    found = in_memory(groups=(10, 0), change=change).result()["verdict"]["findings"]
    levels = [each["level"] for each in found if each["code"] == "parity-broken"]
    assert levels == ([level] if level else [])


@pytest.mark.parametrize(("equal", "level"), [(90, None), (70, "invalid")])
def test_other_tokens_than_the_whole_models(equal: int, level: str | None) -> None:
    def change(ranks: list[Rank]) -> None:
        staged(ranks, parity={"logit_error": 0.0, "tokens": 100, "tokens_equal": equal})

    found = in_memory(groups=(10, 0), change=change).result()["verdict"]["findings"]
    levels = [each["level"] for each in found if each["code"] == "parity-broken"]
    assert levels == ([level] if level else [])


# Layouts in turn

SHAPES = ((2, 1), (8, 1), (1, 4))
PLAN: dict[str, Any] = {
    "layouts": ["pp2", "replicas"],
    "rounds": 2,
    "told": {"pp2": told(0), "replicas": told(0, pp=1, parity=None)},
    "calibration": {
        "config": asdict(NetConfig(vocabulary=2, width=8, layers=2, heads=2, kv_heads=2, hidden=8)),
        "item_bytes": 4,
        "prompt": 4.0,
        "output": 10.0,
        "slots": 8,
        # One layer takes 1 ms, and embedding, head and Python another, whatever the shape.
        "layers": {
            layers: [[rows, tokens, [9 * MS, 9 * MS, ms * MS]] for rows, tokens in SHAPES]
            for layers, ms in (("1", 2), ("3", 4))
        },
        # There and back 1 ms, and 2 ms for 1,000 bytes more: 0.5 ms and 2 bytes a us one way.
        "links": {"pp2": {"send": [[0, [MS]], [1_000, [2 * MS]]], "reduce": [[0, [1]], [1, [1]]]}},
    },
    "reduces": {
        "tp2": [
            *([0, "attention", 128, each * MS] for each in (90, 2, 2)),
            *([1, "feed", 128, each * MS] for each in (90, 4, 4)),
        ]
    },
}


def test_every_other_round_runs_in_reverse() -> None:
    assert cells_of({**PLAN, "rounds": 3}) == [
        ("pp2", 0), ("replicas", 0), ("replicas", 1), ("pp2", 1), ("pp2", 2), ("replicas", 2)
    ]  # fmt: skip


def compared(folder: Path) -> Path:
    """Store a run of two layouts: makespans of pp2 1 s and 1.25 s, of the replicas 0.5 s."""
    folder = folder / RUN_ID
    for number, (name, each) in enumerate(cells_of(PLAN)):
        place = {"number": number, "planned": 4, "sharding": {"plan": PLAN}}

        def change(ranks: list[Rank], name: str = name, each: int = each, p: Any = place) -> None:
            if name == "pp2":
                staged(ranks)
            cell = {"layout": name, "round": each}
            for rank in ranks:
                rank.before["run_id"] = f"{RUN_ID}-w{p['number']:03d}"
                rank.before["window"] = {**p, "sharding": {**p["sharding"], "cell": cell}}

        group_ns = 50 * MS
        if name == "pp2":
            group_ns = 125 * MS if each else 100 * MS
        make_run(
            folder / "windows" / f"{number:03d}",
            groups=(10, 0) if name == "pp2" else (10, 10),
            group_ns=(group_ns, group_ns),
            change=change,
        )
    write_report(folder)
    return folder


def test_layouts_are_compared_within_a_round(tmp_path: Path) -> None:
    """pp2 does 40 and 32 samples/s, the replicas 160: ratios 1/4 and 1/5."""
    folder = compared(tmp_path)
    result = load_run(folder).result()
    pp, replicas = named(result, "layouts")
    assert (pp["layout"], pp["throughput"], pp["ratio"]) == ("pp2", pytest.approx(36), None)
    assert (replicas["throughput"], replicas["rounds"]) == (pytest.approx(160), 2)
    logs = np.log([1 / 4, 1 / 5])
    assert replicas["ratio"] == pytest.approx((1 / 20) ** 0.5)
    ends = np.exp(oracle.t.interval(0.95, 1, logs.mean(), oracle.sem(logs)))
    assert (replicas["ratio_low"], replicas["ratio_high"]) == pytest.approx(ends)
    # A step and a prompt take 3 ms each; a step of two texts is 64 bytes, 0.532 ms of the link.
    assert replicas["foreseen"] == pytest.approx(2 / (10 * 0.003 / 8 + 0.003))
    share = largest_share(NetConfig(**PLAN["calibration"]["config"]), 2)
    bounds = [share * (10 * 0.003 / 2 + 0.003), 14 * 32 / 2e6, 10 * (0.003 + 2 * 0.000532) / 8]
    assert pp["foreseen"] == pytest.approx(1 / max(bounds))
    assert (pp["held_by"], replicas["held_by"]) == ("the slowest stage's computing", "computing")
    assert (pp["held"], pp["weights_share"], pp["same_tokens"]) == (750, 0.7, 0.9)
    assert pp["bubble"] == pytest.approx((0.5 + 1 - 0.5 / 1.25) / 2)
    found = result["metrics"]["ratio.replicas"]
    assert (found["value"], found["ci_low"]) == (replicas["ratio"], replicas["ratio_low"])
    assert result["metrics"]["throughput"]["value"] == pytest.approx(36)
    assert result["window"]["samples"] == 80
    assert verify(folder) == (0, [])
    text = to_text(result)
    assert "pp2 loses to replicas: 0.2236 times its throughput" in text
    assert "pp2 is foreseen to be held by the slowest stage's computing" in text
    assert "tp2: an all-reduce of 128 B takes 3.00 ms, the longest 4.00 ms after the feed" in text


def test_a_missing_window_leaves_no_figure(tmp_path: Path) -> None:
    folder = compared(tmp_path)
    (folder / "windows" / "002").rename(tmp_path / "gone")
    result = load_run(folder).result()
    assert result["verdict"]["status"] == "INCOMPLETE"
    assert result["metrics"]["throughput"]["value"] is None
    assert result["metrics"]["ratio.replicas"]["reason"].startswith("windows are missing")


def test_a_window_in_anothers_place_is_no_measurement(tmp_path: Path) -> None:
    folder = compared(tmp_path)
    for rank in range(2):
        path = folder / "windows" / "001" / "ranks" / f"{rank:05d}" / "rank.json"
        edit_json(path, lambda before: before["window"]["sharding"]["cell"].update(round=1))
    mend_hashes(folder / "windows" / "001")
    result = load_run(folder).result()
    assert result["verdict"]["status"] == "INVALID"
    assert "sharding-contradicts" in [each["code"] for each in result["verdict"]["findings"]]


def test_no_rate_of_a_link_is_made_of_noise() -> None:
    """A larger message that takes no longer, beyond what both scatter, tells a latency alone."""
    slow, fast = [9, 9, 100, 110, 120], [9, 9, 90, 105, 115]
    assert link_of([(8, slow), (1_000, fast)]) == Link(110e-9, math.inf)
    assert link_of([(8, fast), (1_000, slow)]) == Link(110e-9, math.inf)
    assert link_of([(0, [1, 1, 1_000]), (500, [1, 1, 2_000])]) == Link(1e-6, 5e8)
    assert link_of([(0, [1, 1, 1_000]), (500, [1, 1, 2_000])], ways=2) == Link(5e-7, 1e9)


def test_under_a_schedule_layouts_are_compared_by_latency(tmp_path: Path) -> None:
    """Both serve what is offered; p99 of pp2 is half of the replicas'."""
    folder = tmp_path / RUN_ID
    for number, (name, each) in enumerate(cells_of(PLAN)):
        cell = {"layout": name, "round": each}
        place = {"number": number, "planned": 4, "sharding": {"plan": PLAN, "cell": cell}}
        serve = served([queries(300, served=(400 if name == "pp2" else 804) * US, late=0)])

        def change(ranks: list[Rank], place: Any = place, serve: Any = serve) -> None:
            serve(ranks)
            ranks[0].before["run_id"] = f"{RUN_ID}-w{place['number']:03d}"
            ranks[0].before["window"] = place

        make_run(folder / "windows" / f"{number:03d}", ranks=1, change=change)
    write_report(folder)
    result = load_run(folder).result()
    pp, replicas = named(result, "layouts")
    assert (pp["latency_p99"], replicas["latency_p99"]) == pytest.approx((405e-6, 809e-6))
    assert replicas["ratio"] == pytest.approx(405 / 809)
    assert (pp["foreseen"], pp["held_by"]) == (None, None)
    assert result["metrics"]["latency.p99"]["value"] == pytest.approx(405e-6)
    assert result["metrics"]["ratio.replicas"]["definition"].startswith("latency.p99 of pp2 / of")
    assert "pp2 wins over replicas: 0.5006 times its p99 of latency" in to_text(result)


def test_tables_go_to_csv(tmp_path: Path) -> None:
    folder = compared(tmp_path)
    assert report([str(folder), "--format", "csv", "--output-dir", str(tmp_path / "out")]) == 0
    lines = (tmp_path / "out" / "report-layouts.csv").read_text().splitlines()
    assert lines[0].startswith("layout,replicas,micro_batches,rounds,throughput samples/s,")
    assert [line.split(",")[0] for line in lines[1:]] == ["pp2", "replicas"]


def test_salvage_spares_a_result_that_rests_on_a_rank_that_follows(tmp_path: Path) -> None:
    folder = make_run(tmp_path / RUN_ID, groups=(10, 0), change=staged)
    before = (folder / "result.json").read_bytes()
    (folder / "ranks" / "00001").rename(tmp_path / "gone")
    with pytest.raises(UsageError, match=r"rests on samples of rank 1 \(node-1\) as well"):
        salvage([str(folder)])
    assert (folder / "result.json").read_bytes() == before


def test_a_window_without_one_rank_is_judged_and_counts_for_nothing(tmp_path: Path) -> None:
    """Its samples are all here, for the leader has them, and it may not have been whole."""
    folder = compared(tmp_path)
    (folder / "windows" / "003" / "ranks" / "00001").rename(tmp_path / "gone")
    for path in (folder / "result.json", folder / "windows" / "003" / "result.json"):
        path.unlink()
    write_report(folder)
    result = load_run(folder).result()
    assert result["verdict"]["status"] == "INCOMPLETE"
    assert named(result, "layouts")[0]["rounds"] == 1
    assert result["metrics"]["throughput"]["value"] is None
    assert "makespan" in to_text(result) or "unknown" in to_text(result)


@pytest.mark.parametrize(
    ("unit", "verdict"), [("1", "better"), ("", "worse")], ids=["Offline", "Server"]
)
def test_a_larger_ratio_is_better_of_throughputs_and_worse_of_latencies(
    unit: str, verdict: str
) -> None:
    found = judged("ratio.replicas", unit, (0.1, 0.101, 0.102), (0.2, 0.201, 0.199), 0.01)
    assert found.verdict == verdict
