"""What ``--benchmark NAME`` stands for: model, samples and outputs as bytes, score, and limits.

A benchmark is added by a line in ``BENCHMARKS`` and a codec: a module of ``distbench.models`` that
imports without torch, for the driver and the judge need it on hosts that have none. Its functions:

    samples(indices) -> list[bytes]    what crosses the wire as data; may be absent
    encoded(outputs) -> list[bytes]    what LoadGen gets of a group's outputs, for its log
    scored(answers) -> (right, of)     of a dict from sample index to such bytes; may be absent

``digits`` and ``tinylm`` are no benchmarks of MLPerf's: their limits are distbench's own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from distbench.cli import nearest
from distbench.errors import UsageError
from distbench.rounds import MS, Tokens


@dataclass(frozen=True)
class Benchmark:
    """One name of ``--benchmark``.

    Attributes:
        name: it, which is also the model's in mlperf.conf where that knows it.
        model: as ``--model`` takes it.
        codec: module of its functions; "" for a stand-in, whose answers are empty.
        metric: what is scored, and of what; "" where nothing is.
        target: score that accuracy mode must reach; None where nothing is scored.
        latency_ns: Server's limit on the p99, where MLPerf has none for it.
        tokens: or Server's limits on TTFT and TPOT.
        interactive: limits of its interactive variant.
        dtype: numpy's name of a token's type in an answer; "" of a model without tokens.
        end: the token that ends a text; None where the model has none.
        why_unscored: "" or why there is no accuracy mode.
        inputs: data type of its samples; "" for none.
        weights: file that the model's weights come from; "" for none.
    """

    name: str
    model: str
    codec: str
    metric: str = ""
    target: float | None = None
    latency_ns: int | None = None
    tokens: Tokens | None = None
    interactive: Tokens | None = None
    dtype: str = ""
    end: int | None = None
    why_unscored: str = ""
    inputs: str = ""
    weights: str = ""


BENCHMARKS = {
    each.name: each
    for each in (
        Benchmark(
            "digits", "digits", "distbench.models.digits_data",
            metric="top-1 of the 360 images that no training step has seen", target=0.98,
            latency_ns=15 * MS, inputs="uint8", weights="distbench/models/digits_w32.npz",
        ),
        Benchmark(
            "tinylm", "tinylm", "distbench.models.tinylm_data",
            metric="tokens that are the reference's, place by place", target=0.99,
            tokens=Tokens(500 * MS, 50 * MS), interactive=Tokens(200 * MS, 25 * MS),
            dtype="u1",
            inputs="uint8", weights="distbench/models/tinylm_w64.npz",
        ),
        Benchmark(
            "resnet50", "resnet50,samples=1024", "distbench.models.classes",
            why_unscored="its images are noise and its weights random ones", inputs="uint8",
        ),
        Benchmark(
            "echo", "echo", "", latency_ns=15 * MS,
            why_unscored="it computes nothing: it shows what LoadGen and dispatch cost",
        ),
    )
}  # fmt: skip


def benchmark(name: str) -> Benchmark:
    """Return a benchmark by its name.

    Raises:
        UsageError: there is none of this name.
    """
    if name not in BENCHMARKS:
        raise UsageError(
            f"benchmark {name!r} is none of {', '.join(BENCHMARKS)}{nearest(name, [*BENCHMARKS])}"
        )
    return BENCHMARKS[name]


def codec(bench: Benchmark) -> Any:
    """Return the module of a benchmark's functions."""
    return importlib.import_module(bench.codec)


def scored(bench: Benchmark, answers: Mapping[int, bytes]) -> tuple[float, float]:
    """Count what is right among LoadGen's logged answers.

    Args:
        bench: one that is scored.
        answers: by sample index.

    Returns:
        How much is right, and of how much.

    Raises:
        UsageError: an answer is no output of this model, or a scored sample has none.
    """
    try:
        right, of = codec(bench).scored(answers)
    except KeyError as error:
        raise UsageError(
            f"accuracy of {bench.name}: LoadGen's log has no answer for sample {error}"
        ) from error
    except ValueError as error:
        raise UsageError(f"accuracy of {bench.name}: {error}") from error
    return float(right), float(of)


def encoder(bench: Benchmark) -> Callable[[Sequence[Any]], list[bytes]]:
    """Return the function that makes bytes of a group's outputs."""
    made: Callable[[Sequence[Any]], list[bytes]]
    made = codec(bench).encoded if bench.codec else (lambda outputs: [b""] * len(outputs))
    return made
