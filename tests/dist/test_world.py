"""Joining, checking, agreeing and gathering on gloo ranks."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench.errors import UsageError
from tests.support import run_ranks

pytestmark = pytest.mark.timeout(90)


def _join(**options: Any) -> Any:
    from distbench.world import join

    return join(device="cpu", timeout_s=30, **options)


def _places() -> tuple[int, int, str, str | None, str | None]:
    with _join() as world:
        names = os.environ.get("GLOO_SOCKET_IFNAME"), os.environ.get("NCCL_SOCKET_IFNAME")
        place = (world.rank, world.world_size, world.backend, *names)
    assert "GLOO_SOCKET_IFNAME" not in os.environ, "join must give the environment back"
    return place


def test_join_gives_each_rank_its_place_and_the_loopback_interface() -> None:
    assert run_ranks(_places, 3) == [(r, 3, "gloo", "lo", "=lo") for r in range(3)]


def _alone() -> tuple[int, int, list[Any], list[np.ndarray]]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    with _join() as world:
        world.check("nothing")
        world.agree("things", {"a": 1}, "never")
        rows = np.arange(6).reshape(3, 2)
        return world.rank, world.world_size, world.gather_json("x"), world.gather_rows(rows)


def test_without_torchrun_a_process_is_one_rank_alone() -> None:
    rank, size, values, rows = run_ranks(_alone, 1)[0]
    assert (rank, size, values) == (0, 1, ["x"])
    np.testing.assert_array_equal(rows[0], [[0, 1], [2, 3], [4, 5]])


def _gather(sizes: list[int], piece: int) -> list[np.ndarray]:
    from distbench import world as module

    module.PIECE_ELEMENTS = piece
    with _join() as world:
        rng = np.random.default_rng(world.rank)
        rows = rng.integers(-(2**62), 2**62, (sizes[world.rank], 3))
        return world.gather_rows(rows)


@pytest.mark.parametrize("sizes", [[5, 5, 5], [0, 7, 1000], [0, 0, 0], [1, 0, 0]])
def test_gather_rows_is_exact_for_unequal_and_empty_shards(sizes: list[int]) -> None:
    results = run_ranks(_gather, 3, sizes, 700)  # pieces smaller than a shard, not a multiple of 3
    for rows in results:
        for rank, part in enumerate(rows):
            truth = np.random.default_rng(rank).integers(-(2**62), 2**62, (sizes[rank], 3))
            np.testing.assert_array_equal(part, truth)


def _gather_json() -> list[Any]:
    with _join() as world:
        return world.gather_json({"rank": world.rank, "text": "é" * (world.rank * 1000)})


def test_gather_json_carries_values_of_unequal_length() -> None:
    truth = [{"rank": r, "text": "é" * (r * 1000)} for r in range(3)]
    assert run_ranks(_gather_json, 3) == [truth] * 3


def _check(bad: int) -> str:
    with _join() as world:
        world.check("fine")
        try:
            problem = UsageError("the disk is full; free space") if world.rank == bad else None
            world.check("here", problem)
        except UsageError as error:
            return f"{error.exit_code} {error}"
    return "went on"


def test_check_stops_every_rank_with_the_sentence_of_the_one_that_has_a_problem() -> None:
    for said in run_ranks(_check, 3, 2):
        assert said.startswith("2 rank 2 (")
        assert said.endswith("): the disk is full; free space")


def _agree() -> str:
    with _join() as world:
        world.agree("same", {"x": [1, 2]}, "never needed")
        try:
            world.agree("options", {"--seed": 7 if world.rank == 1 else 0}, "use one command line")
        except UsageError as error:
            return str(error)
    return "went on"


def test_agree_names_the_value_the_ranks_and_the_remedy() -> None:
    for said in run_ranks(_agree, 3):
        assert "differ in --seed" in said
        assert "7 on rank 1 (" in said
        assert "0 on rank 0 (" in said and "rank 2 (" in said
        assert said.endswith("use one command line")


def _no_pickle() -> int:
    """Count what is pickled or unpickled from joining to leaving."""
    calls = []
    for name in ("dumps", "loads", "dump", "load"):
        original = getattr(pickle, name)
        setattr(pickle, name, lambda *a, _o=original, **k: (calls.append(_o), _o(*a, **k))[1])
    with _join() as world:
        world.agree("same", {"x": 1}, "")
        world.gather_rows(np.ones((4, 2), np.int64))
        world.check("end")
    return len(calls)


def test_nothing_is_pickled_between_ranks() -> None:
    assert run_ranks(_no_pickle, 2) == [0, 0]


def _probe(target: str) -> str:
    from distbench.world import probe_collectives

    with _join() as world:
        return probe_collectives(world, "gloo", timeout_s=40, device=target)


def test_the_probe_of_a_backend_succeeds_in_child_processes() -> None:
    assert run_ranks(_probe, 2, "cpu") == ["", ""]


def test_the_probe_of_a_backend_that_fails_gives_the_last_lines() -> None:
    for said in run_ranks(_probe, 2, "cuda:0"):
        assert "exit status 1" in said
        assert "rank " in said


def _nccl_falls_back(required: bool) -> Any:
    from dataclasses import replace
    from datetime import timedelta

    from distbench import world as module

    module.probe_collectives = lambda world, backend: f"rank {world.rank}: NCCL WARN broken"
    with _join() as world:
        world = replace(world, device=replace(world.device, type="cuda"))
        try:
            after = module._with_nccl(world, timedelta(seconds=20), required=required)
        except UsageError as error:
            return str(error)
        return after.backend, [f.code for f in after.findings], after.findings[0].message


def test_a_run_goes_on_over_gloo_with_a_finding_when_nccl_fails() -> None:
    for backend, codes, message in run_ranks(_nccl_falls_back, 2, False):
        assert (backend, codes) == ("gloo", ["nccl-failed"])
        assert "NCCL WARN broken" in message and "NCCL_IB_DISABLE=1" in message


def test_backend_nccl_by_request_is_refused_when_nccl_fails() -> None:
    for said in run_ranks(_nccl_falls_back, 2, True):
        assert "NCCL WARN broken" in said and "NCCL_IB_DISABLE=1" in said


def _nccl_on_cpu() -> str:
    try:
        with _join(backend="nccl"):
            return "went on"
    except UsageError as error:
        return str(error)


def test_backend_nccl_without_a_gpu_is_refused() -> None:
    for said in run_ranks(_nccl_on_cpu, 2):
        assert "--backend nccl needs a GPU" in said


def _mixed_devices() -> str:
    from distbench import world as module
    from distbench.gpus import Device

    kind = "cuda" if os.environ["RANK"] == "1" else "cpu"
    module.choose_device = lambda _asked, local: Device(kind, local, "", kind, "", "")
    try:
        with _join():
            return "went on"
    except UsageError as error:
        return str(error)


def test_ranks_with_different_device_types_are_refused() -> None:
    for said in run_ranks(_mixed_devices, 2):
        assert "differ in device" in said and '"cuda" on rank 1' in said


def _leave_in_error(said: str) -> str:
    import sys
    from pathlib import Path

    sys.stderr = Path(said).with_suffix("." + os.environ["RANK"]).open("w")
    try:
        with _join() as world:
            if world.rank == 1:
                raise UsageError("rank 1 cannot read its weights; copy them")
            world.side.meet("never")
    except UsageError as error:
        return str(error)
    return "went on"


def test_an_error_of_one_rank_ends_the_others_with_its_sentence(tmp_path: Path) -> None:
    sentence = "rank 1 cannot read its weights; copy them"
    told = run_ranks(_leave_in_error, 2, str(tmp_path / "stderr.x"), allow_exit=[0])
    assert told == [UsageError.exit_code, sentence]
    assert (tmp_path / "stderr.0").read_text() == f"distbench: {sentence}\n"
