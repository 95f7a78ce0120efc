"""The end of every run: check outputs, gather, judge, write."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from distbench.compliance import answer_hash
from distbench.errors import IncompleteError, where
from distbench.pool import Pool, series
from distbench.quantiles import select
from distbench.rank_files import write_driver, write_rank
from distbench.record import Recorder, write_report, write_result
from distbench.run import RankRecord, Run, rank_folder
from distbench.scores import NO_TEXT
from distbench.sut import SystemUnderTest, run_indices
from distbench.verdict import result
from distbench.windows import Windows, windows_result

if TYPE_CHECKING:
    from distbench.world import World

SCORED = "scored in the first window"
RAISED = "the model raised in the window, so what is in flight in it is not known"
TOLERANCE, HALF_TOLERANCE = 1e-3, 2e-2
"""Relative difference of float outputs between batch sizes; the second in bf16 and fp16."""


def accuracy_pass(
    sut: SystemUnderTest,
    world: World,
    batch_size: int,
    raised: bool = False,
    scored: bool = False,
    tell: Callable[[], None] = lambda: None,
) -> tuple[dict[str, Any], dict[int, Any]]:
    """Score this rank's share of the model's held-out samples, untimed.

    Args:
        sut: nothing in flight.
        world: all ranks.
        batch_size: samples a group.
        raised: whether the model raised in the window.
        scored: whether an earlier window of the same command had it.
        tell: called whenever groups have ended.

    Returns:
        The score with its fraction or the reason for none, and the outputs by sample index.
    """
    held_out, score = getattr(sut, "held_out", None), getattr(sut, "score", None)
    if held_out is None or score is None:
        digest = str(getattr(sut, "digest", ""))
        reason = (
            f"the weights are {digest}: performance only"
            if digest.startswith("random")
            else "the model has no held-out samples to score"
        )
        return {"right": 0, "of": 0, "reason": reason}, {}
    if scored or raised:
        return {"right": 0, "of": 0, "reason": SCORED if scored else RAISED}, {}
    mine = np.ascontiguousarray(held_out[world.replica :: world.replicas], np.int64)
    if len(mine) == 0 or not world.leader:
        return {"right": 0, "of": 0, "reason": ""}, {}
    try:
        outputs = run_indices(sut, mine, batch_size, tell)
        right, total = (float(number) for number in score(mine, outputs))
        if not (math.isfinite(right) and math.isfinite(total)):
            raise ValueError(f"score returned {right} of {total}")
    except Exception as error:  # the user's model; what was measured must outlive it
        reason = f"the accuracy pass failed on {where(world.rank, world.host)}: {error!r}"
        return {"right": 0, "of": 0, "reason": reason}, {}
    by_index = dict(zip(mine.tolist(), outputs, strict=True))
    return {"right": right, "of": total, "reason": ""}, by_index


def text_pass(
    sut: SystemUnderTest,
    world: World,
    raised: bool = False,
    scored: bool = False,
    tell: Callable[[], None] = lambda: None,
) -> dict[str, Any]:
    """Let the model tell this replica's part of its held-out text, byte by byte, untimed.

    Args:
        sut: nothing in flight.
        world: all ranks.
        raised: whether the model raised in the window.
        scored: whether an earlier window of the same command had it.
        tell: called whenever a piece of the text is told.

    Returns:
        ``bits`` that the bytes of this part cost by the model's probabilities, how many ``bytes``
        these are, and the ``reason`` for none.
    """
    none, text_bits = {"bits": 0, "bytes": 0}, getattr(sut, "text_bits", None)
    if text_bits is None:
        return {**none, "reason": NO_TEXT}
    if scored or raised:
        return {**none, "reason": SCORED if scored else RAISED}
    if not world.leader:
        return {**none, "reason": ""}
    try:
        bits, count = text_bits(world.replica, world.replicas, tell)
        if not math.isfinite(bits):
            raise ValueError(f"{count} bytes are told in {bits} bits")
    except Exception as error:  # likewise
        reason = f"the text was not told on {where(world.rank, world.host)}: {error!r}"
        return {**none, "reason": reason}
    return {"bits": float(bits), "bytes": int(count), "reason": ""}


def tolerance(sut: SystemUnderTest) -> float:
    """Return by how much float outputs for one sample may differ, by what the SUT computes in."""
    return HALF_TOLERANCE if getattr(sut, "dtype", None) in ("bf16", "fp16") else TOLERANCE


def check_outputs(
    kept: dict[int, Any],
    indices_of: dict[int, Sequence[int]],
    accurate: dict[int, Any],
    within: float = TOLERANCE,
) -> dict[str, int]:
    """Check the outputs that were kept from the window.

    Args:
        kept: outputs by the group's row; None where the group did not end well.
        indices_of: sample indices of each kept group.
        accurate: outputs of the accuracy pass by sample index.
        within: relative difference that is rounding; see ``tolerance``.

    Returns:
        Counts: groups checked, non_finite groups, outputs compared, outputs different.
    """
    counts = {"groups": 0, "non_finite": 0, "compared": 0, "different": 0}
    for row, outputs in kept.items():
        if outputs is None:
            continue
        counts["groups"] += 1
        counts["non_finite"] += not all_finite(outputs)
        for index, output in zip(indices_of[row], outputs, strict=False):
            if index in accurate:
                counts["compared"] += 1
                counts["different"] += not alike(output, accurate[index], within)
    return counts


def hash_answers(
    kept: dict[int, Any],
    indices_of: dict[int, Sequence[int]],
    encode: Callable[[Sequence[Any]], list[bytes]],
) -> list[tuple[int, str]]:
    """Return sample index and hash of each output that was kept from a window of LoadGen's."""
    return [
        (index, answer_hash(answer))
        for row, outputs in kept.items()
        if outputs is not None
        for index, answer in zip(indices_of[row], encode(outputs), strict=True)
    ]


def all_finite(outputs: Any) -> bool:
    """Tell whether all numbers among the outputs are finite; what is not a number passes."""
    try:
        values = _array(outputs)
    except (TypeError, ValueError, RuntimeError):  # a list that is no array, such as of tensors
        return all(all_finite(each) for each in outputs)
    if values.dtype.kind in "fc":
        return bool(np.isfinite(values).all())
    if values.dtype.kind == "O" and values.ndim:
        return all(all_finite(each) for each in values.flat)
    if isinstance(outputs, dict):
        return all(all_finite(each) for each in outputs.values())
    return True


def _array(value: Any) -> NDArray[Any]:
    """Return an array; numpy has no bfloat16, so a tensor of that type comes as float32."""
    if hasattr(value, "detach"):
        value = value.detach().cpu()
        value = value.float() if "bfloat16" in str(value.dtype) else value
    return np.asarray(value)


def alike(one: Any, other: Any, within: float = TOLERANCE) -> bool:
    """Tell whether two outputs for one sample agree: exactly, or within rounding for floats."""
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(
            alike(one[key], other[key], within) for key in one
        )
    try:
        a, b = _array(one), _array(other)
    except (TypeError, ValueError, RuntimeError):
        return len(one) == len(other) and all(map(alike, one, other, repeat(within)))
    if a.shape != b.shape:
        return False
    if a.dtype.kind == "O" and a.ndim:
        return all(map(alike, a.flat, b.flat, repeat(within)))
    if a.dtype.kind == "f" and b.dtype.kind in "fiu":
        scale = float(np.abs(b[np.isfinite(b)]).max(initial=0.0))
        return bool(np.allclose(a, b, rtol=within, atol=within * scale))
    return bool(np.all(a == b))


def finish(
    world: World,
    recorder: Recorder,
    before: dict[str, Any],
    shard: bool = False,
    driver: RankRecord | None = None,
) -> Run:
    """Save this rank's folder, all-gather, and on rank 0 judge and write the result directory.

    Args:
        world: all ranks; all call it.
        recorder: the window, its ``after`` complete.
        before: this rank's rank.json.
        shard: whether the samples stay on their ranks, and all ranks judge together.
        driver: the driver's record, under central dispatch.

    Returns:
        The run with all ranks' records, on every rank.

    Raises:
        IncompleteError: rank 0's disk refused the result; the samples are on the ranks' disks.
    """
    problem = recorder.after["disk_error"] = recorder.disk_error
    try:
        recorder.save_after()
    except OSError as error:
        problem = f"{recorder.folder.own} could not be written: {error.strerror or error}"
    world.side.meet("gather")
    run = _gathered(world, recorder, before, {**recorder.told(), "disk_error": problem}, shard)
    run = replace(run, driver=driver)
    world.side.meet("gathered")
    if shard:
        run = replace(run, judged=result(run, across_ranks(world, run)))
        world.side.meet("judged")
    failure = ""
    if world.rank == 0:
        failure = _write(recorder.folder.path, run)
    world.side.meet("written")
    if failure:
        raise IncompleteError(failure)
    return run


def _gathered(
    world: World, recorder: Recorder, before: dict[str, Any], after: dict[str, Any], shard: bool
) -> Run:
    """All-gather what the ranks recorded; of sharded samples each rank has its own."""
    told = world.gather_json([before, after])
    own = recorder.log.rows[: after["used"]]
    rows: list[Any] = [None] * world.world_size
    tokens: list[Any] = [None] * world.world_size
    stamps = recorder.log.token_ns
    own_stamps = None if stamps is None else stamps[: after["used"]]
    rows[world.rank], tokens[world.rank], here = own, own_stamps, range(world.world_size)
    if shard:
        here = range(world.rank, world.rank + 1)
    else:
        rows = list(world.gather_rows(own))
        if own_stamps is not None:
            tokens = list(world.gather_rows(own_stamps))
    return Run(
        world.world_size,
        tuple(
            RankRecord(
                rank,
                told[rank][0],
                told[rank][1],
                each,
                elsewhere=rank not in here,
                token_ns=tokens[rank],
            )
            for rank, each in enumerate(rows)
        ),
        recorder.folder.path if world.rank == 0 else None,
    )


def write_windows(world: World, folder: Path, results: dict[str, dict[str, Any]]) -> Windows:
    """Judge several windows and write the result above them on rank 0's disk; all ranks call it.

    Args:
        world: all ranks.
        folder: the directory above the windows.
        results: of the windows by the names of their folders; rank 0's alone are looked at.

    Returns:
        The windows, with their result on every rank.

    Raises:
        IncompleteError: the disk refused it; the windows' own results are written.
    """
    failure, judged = "", dict[str, Any]()
    if world.rank == 0:
        judged = windows_result(results)
        try:
            write_result(folder, judged)
        except OSError as error:
            failure = (
                f"rank 0 ({world.host}) could not write {folder}: {error.strerror or error}; each "
                "window under it is whole: free space, then run "
                f"`python -m distbench.salvage {folder}`"
            )
    # Made before ranks meet: an answer may run on the thread that keeps the heartbeats.
    told = json.dumps(judged).encode()
    told = world.side.meet("windows written", b"", lambda _: told)
    if failure:
        raise IncompleteError(failure)
    return Windows(folder if world.rank == 0 else None, json.loads(told))


def across_ranks(world: World, run: Run) -> Pool:
    """Return the pool of a run whose samples stay on their ranks; every use is a collective.

    Args:
        world: all ranks; all make the same calls in the same order.
        run: its records; this rank's alone has rows.
    """
    own = run.records[world.rank]
    assert own is not None

    def order(name: str, places: Sequence[int]) -> list[int]:
        world.side.meet(f"select:{name}")
        found = select(
            series(own, name),
            places,
            lambda values: world.reduce(values, "sum"),
            lambda values: world.reduce(values, "max"),
        )
        return list(found.values)

    return Pool(run, lambda fact: world.gather_json(fact(own)), order)


def _write(path: Path, run: Run) -> str:
    """Complete the result directory on rank 0's disk; returns what went wrong, "" for nothing."""
    records = run.left
    try:
        if run.judged is not None:
            write_result(path, run.judged)
            return ""
        for record in records:
            own = rank_folder(path, record.rank)
            # The name of the directory is unique, so a folder that is here came over a shared disk.
            if not (own / "done.json").exists():
                write_rank(own, record)
        if run.driver is not None:
            write_driver(path, run.driver)
        write_report(path)
    except OSError as error:
        return (
            f"rank 0 ({records[0].host}) could not complete {path}: {error.strerror or error}; "
            "each rank's samples are in its own folder: free space, then run `python -m "
            f"distbench.salvage {path}`. What was measured:\n{run.report()}"
        )
    return ""
