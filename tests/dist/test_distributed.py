"""One model over several real ranks: the same answers, the share of each, and no pickled word."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest

from distbench.layout import Layout, ShardPlan, parse_layout
from distbench.verify import verify
from distbench.windows import load_run
from tests.support import run_ranks

pytestmark = pytest.mark.timeout(180)

LLAMA = "llama,layers=8,d=64,heads=8,kv_heads=2,hidden=96,vocabulary=200,prompt=12,output=6"


def spied() -> list[str]:
    """Let every collective of objects be told; torch's own calls of them too."""
    import torch.distributed.distributed_c10d as c10d

    seen: list[str] = []

    def refused(name: str) -> Any:
        def spy(*_args: Any, **_kwargs: Any) -> None:
            seen.append(name)
            raise AssertionError(f"{name} pickles")

        return spy

    for name in ("_object_to_tensor", "_tensor_to_object"):
        assert callable(getattr(c10d, name))  # all collectives of objects go through these two
        setattr(c10d, name, refused(name))
    return seen


def measured(layouts: list[str], model: str, folder: str, **more: Any) -> dict[str, Any]:
    """On each rank: a run of some layouts; returns the result."""
    from distbench import run_distributed

    seen = spied()
    plan = ShardPlan(tuple(parse_layout(each, None, 2) for each in layouts), rounds=2)
    windows = run_distributed(
        model, plan=plan, num_samples=12, warmup_s=0.05, output_dir=folder, **more
    )
    assert seen == []
    return windows.result()


def rows(result: dict[str, Any], name: str) -> list[dict[str, Any]]:
    """Return a table's rows by the names of its columns."""
    found = result["tables"][name]
    names = [each["name"] for each in found["columns"]]
    return [dict(zip(names, row, strict=True)) for row in found["rows"]]


TINYLM = pytest.param("tinylm", marks=pytest.mark.slow)  # half a minute, to score all its texts


@pytest.mark.parametrize("model", [TINYLM, LLAMA])
def test_two_ranks_give_the_answers_of_one(model: str, tmp_path: Path) -> None:
    results = run_ranks(measured, 2, ["pp", "tp", "replicas"], model, str(tmp_path), timeout_s=120)
    assert results[0] == results[1]
    result = results[0]
    told = result["window"]["sharding"]["plan"]["told"]
    pp, tp = (told[name]["parity"] for name in ("pp2", "tp2"))
    assert pp["logit_error"] == 0.0
    assert 0 <= tp["logit_error"] <= 1e-5
    for each in (pp, tp):
        assert each["tokens"] == each["tokens_equal"] > 0
    by_name = {row["layout"]: row for row in rows(result, "layouts")}
    assert [*by_name] == ["pp2", "tp2", "replicas"]
    assert [row["replicas"] for row in by_name.values()] == [1, 1, 2]
    for row in by_name.values():
        assert row["rounds"] == 2
        assert row["throughput"] > 0
        assert row["foreseen"] > 0
    assert by_name["tp2"]["ratio"] > 0
    assert by_name["pp2"]["ratio"] is None
    if model == "tinylm":
        assert all(row["accuracy"] == 1 for row in by_name.values())
    (stage_0, stage_1) = rows(result, "stages")
    assert (stage_0["stage"], stage_1["stage"]) == (0, 1)
    assert stage_0["steps"] == stage_1["steps"] > 0
    for row in (stage_0, stage_1):
        assert row["work"] + row["wait"] + row["rest"] == pytest.approx(
            result["windows"][-1]["makespan_s"], rel=1e-6
        )
    assert verified(tmp_path)


def verified(folder: Path) -> bool:
    """Tell whether the one result there can be recomputed from its files."""
    (path,) = folder.iterdir()
    return verify(path) == (0, [])


@pytest.mark.slow
def test_stages_of_parts_on_four_ranks(tmp_path: Path) -> None:
    result = run_ranks(measured, 4, ["pp2xtp2", "tp2"], LLAMA, str(tmp_path), timeout_s=120)[0]
    told = result["window"]["sharding"]["plan"]["told"]
    both = told["pp2xtp2"]["parity"]
    assert both["logit_error"] <= 1e-5
    assert both["tokens"] == both["tokens_equal"] > 0
    found = rows(result, "stages")
    assert [(row["stage"], row["part"]) for row in found] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    by_name = {row["layout"]: row for row in rows(result, "layouts")}
    assert [row["replicas"] for row in by_name.values()] == [1, 2]
    assert verified(tmp_path)


@pytest.mark.parametrize(
    ("model", "layout", "ranks"),
    [
        ("tinylm", "pp2xtp2", 4),
        *(pytest.param("tinylm", each, 2, marks=pytest.mark.slow) for each in ("pp2", "tp2")),
        *(pytest.param(LLAMA, *each, marks=pytest.mark.slow) for each in (("pp2", 2), ("tp2", 2))),
    ],
)
def test_no_rank_holds_more_than_its_share(model: str, layout: str, ranks: int) -> None:
    """At most 1/N of all parameters, and embedding and head, which are one matrix."""
    from distbench.layout import own_weights, stages
    from distbench.models import token_model

    config = token_model(model, 1).config
    held = run_ranks(held_by, ranks, layout, model)
    cut = parse_layout(layout, None, ranks)
    for rank, own in enumerate(held):
        halves = stages(config, cut.pp)[cut.stage(rank)]
        assert own == own_weights(config, *halves, cut.tp)
        assert own <= config.weights / ranks + 2 * config.embedding_weights


def held_by(layout: str, model: str) -> int:
    """On each rank: the parameters that it holds, by counting them."""
    from distbench.models import token_model
    from distbench.models.decoders import build_part
    from distbench.parallel import lay_out
    from distbench.world import join

    with join() as world:
        placed = lay_out(world, parse_layout(layout, None, world.world_size))
        part = build_part(token_model(model, 1), placed, 1)
        return sum(each.numel() for each in part.rank.net.parameters())


def garbled(folder: str) -> dict[str, Any]:
    """On each rank: a pipeline whose last stage decodes from noise, though it reads prompts well."""
    import torch

    from distbench.engines.stage import StageRank

    run = StageRank.run

    def noisy(self: StageRank, head: Any, x: Any) -> Any:
        if self.edges.above is not None and x.shape[1] == 1:
            x = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
        return run(self, head, x)

    StageRank.run = noisy  # type: ignore[method-assign]
    return measured(["pp2"], LLAMA, folder)


def test_decoding_of_noise_breaks_parity(tmp_path: Path) -> None:
    result = run_ranks(garbled, 2, str(tmp_path))[0]
    found = [e for e in result["verdict"]["findings"] if e["code"] == "parity-broken"]
    assert len(found) == 1
    assert result["verdict"]["status"] == "INVALID"


def crowded(folder: str) -> dict[str, Any]:
    """On each rank: devices too small for the whole model."""
    from distbench import cuts

    for name in ("fits_alone", "fits_beside"):
        setattr(cuts, name, lambda *_: False)
    return measured(["pp2", "replicas"], LLAMA, folder)


def test_a_model_that_fits_no_single_device(tmp_path: Path) -> None:
    """A twin of two layers vouches for it, and replicas are left out."""
    result = run_ranks(crowded, 2, str(tmp_path))[0]
    (row,) = rows(result, "layouts")
    assert row["layout"] == "pp2"
    told = result["window"]["sharding"]["plan"]["told"]["pp2"]["parity"]
    assert (told["layers"], told["logit_error"]) == (2, 0.0)
    assert "replicas-left-out" in [each["code"] for each in result["verdict"]["findings"]]


def mixed(folder: str) -> str:
    """On each rank: another dtype, which ranks would hang on if they began to send."""
    from distbench.errors import UsageError

    try:
        measured(["pp2"], LLAMA, folder, dtype="bf16" if os.environ["RANK"] == "1" else "")
    except UsageError as error:
        return str(error)
    return ""


def test_mixed_dtypes_are_refused_before_anything_is_sent(tmp_path: Path) -> None:
    told = run_ranks(mixed, 2, str(tmp_path))
    assert told[0] == told[1]
    assert "the ranks differ in --dtype" in told[0]
    assert '"bf16" on rank 1' in told[0]


def served(folder: str) -> dict[str, Any]:
    """On each rank: a pipeline under Server."""
    from distbench.load import Load

    return measured(["pp2"], LLAMA, folder, load=Load(40.0, "constant", "static", 1, 0, ()))


def test_server_gives_first_tokens(tmp_path: Path) -> None:
    result = run_ranks(served, 2, str(tmp_path))[0]
    (row,) = rows(result, "layouts")
    assert row["ttft_p50"] > 0
    assert row["tpot_p50"] > 0
    assert result["scenario"] == "server"


def harmed(folder: str, harm: str) -> None:
    """On each rank: a pipeline whose last stage comes to harm in the first window."""
    from distbench.engines.stage import StageRank

    run = StageRank.run

    def harmful(self: StageRank, head: Any, x: Any) -> Any:
        if self.edges.above is not None and self.watch.start_ns and self.watch.decodes > 5:
            if harm == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if harm == "raises":
                raise RuntimeError("no more")
            self.net.forward = lambda *_: threading.Event().wait()  # as a kernel that never ends
        return run(self, head, x)

    StageRank.run = harmful  # type: ignore[method-assign]
    slowly = LLAMA.replace("output=6", "output=60")
    # A stage has half of it: at looks a second apart the first to be seen, from some 6 s on.
    measured(["pp2"], slowly, folder, timeout_s=8.0)


@pytest.mark.parametrize(
    ("harm", "code", "words"),
    [
        ("killed", "rank-lost", "was lost"),
        ("raises", "rank-failed", "no more"),
        pytest.param("hangs", "rank-lost", "was lost", marks=pytest.mark.slow),
    ],
)
def test_a_stage_that_comes_to_harm_is_named(
    harm: str, code: str, words: str, tmp_path: Path
) -> None:
    """INCOMPLETE within seconds, the stage's rank alone named, and no rank left waiting."""
    run_ranks(harmed, 2, str(tmp_path), harm, allow_exit=(0, 1), timeout_s=60)
    (path,) = tmp_path.iterdir()
    result = load_run(path / "windows" / "000").result()
    assert result["verdict"]["status"] == "INCOMPLETE"
    found = [each for each in result["verdict"]["findings"] if each["level"] == "incomplete"]
    assert [(each["code"], each["rank"]) for each in found] == [(code, 1)] * len(found)
    assert words in found[0]["message"]
    assert found[0]["message"].endswith("; it was stage 1 of replica 0")


def bubbles(folder: str, counts: list[int]) -> list[tuple[float, float]]:
    """On each rank: what stages that sleep rest, and would rest at best, by micro-batches."""
    from distbench import join, run_distributed

    seen, found = spied(), []
    with join(timeout_s=30) as world:
        for count in counts:
            windows = run_distributed(
                "sleep,per_sample=10ms",
                world,
                plan=ShardPlan((Layout(pp=2),), count, 2),
                batch_size=count * 4,
                num_samples=160,
                warmup_s=0.05,
                output_dir=folder,
            )
            metrics = windows.result()["metrics"]
            found.append((metrics["bubble"]["value"], metrics["bubble.ideal"]["value"]))
    assert seen == []
    return found


@pytest.mark.parametrize(
    "counts",
    [[2], pytest.param([1, 2, 3, 4, 5, 6, 7, 8], marks=pytest.mark.slow)],
    ids=["two", "one to eight"],
)
def test_a_pipeline_rests_as_long_as_it_must(counts: list[int], tmp_path: Path) -> None:
    """Sleep stages, within 10 points of (p - 1) / (m + p - 1)."""
    found = run_ranks(bubbles, 2, str(tmp_path), counts, timeout_s=150)[0]
    for count, (value, ideal) in zip(counts, found, strict=True):
        assert ideal == pytest.approx(1 / (count + 1))
        assert ideal - 0.01 < value < ideal + 0.1, count


def test_digits_in_stages(tmp_path: Path) -> None:
    result = run_ranks(staged_digits, 2, str(tmp_path))[0]
    assert result["window"]["sharding"]["plan"]["told"]["pp2"]["parity"] == {"logit_error": 0.0}
    assert result["metrics"]["accuracy"]["value"] == 1.0  # 360 of 360, as the whole one
    assert verified(tmp_path)


def staged_digits(folder: str) -> dict[str, Any]:
    """On each rank: digits as two stages."""
    return measured(["pp2"], "digits", folder)
