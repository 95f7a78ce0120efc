"""What a benchmark's name stands for: codecs, and scores held against the models' own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import distbench
from distbench.errors import UsageError
from distbench.models import digits_data, tinylm_data
from distbench.rounds import ROUNDS
from distbench.suite import BENCHMARKS, benchmark, codec, encoder, scored


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_has_what_it_says(name: str) -> None:
    bench = benchmark(name)
    assert bench.name == name
    if bench.codec:
        assert callable(codec(bench).encoded)
    assert (bench.target is None) == bool(bench.why_unscored)
    if bench.target is not None:
        assert callable(codec(bench).scored) and bench.metric
    if bench.codec:
        assert bench.inputs
    weights = Path(distbench.__file__).parents[1] / bench.weights
    assert not bench.weights or weights.is_file()
    listed = {each.name for round_ in ROUNDS.values() for each in round_.models}
    assert name in listed or bench.latency_ns or bench.tokens, "Server has a limit"


def test_an_unknown_benchmark() -> None:
    with pytest.raises(UsageError, match="did you mean resnet50"):
        benchmark("resnet5")


def test_digits_are_scored_on_what_was_held_out() -> None:
    bench, data = benchmark("digits"), digits_data.read_data()
    logits = np.eye(10)[data.labels]
    blobs = encoder(bench)(logits)
    answers = dict(enumerate(blobs))
    assert scored(bench, answers) == (360.0, 360.0)
    wrong = int(data.held_out[7])
    answers[wrong] = encoder(bench)(np.roll(logits[[wrong]], 1, axis=1))[0]
    assert scored(bench, answers) == (359.0, 360.0)
    trained = next(k for k in range(1797) if k not in set(data.held_out.tolist()))
    answers[trained] = answers[wrong]
    assert scored(bench, answers) == (359.0, 360.0)
    answers[wrong] = b"x"
    with pytest.raises(UsageError, match="answered with 1 bytes, not 8"):
        scored(bench, answers)
    del answers[wrong]
    with pytest.raises(UsageError, match=f"no answer for sample {wrong}"):
        scored(bench, answers)


def test_texts_are_scored_token_by_token() -> None:
    bench = benchmark("tinylm")
    expected = tinylm_data.read_expected(tinylm_data.draw_samples(tinylm_data.read_text()))
    held = expected.held_out.tolist()
    blobs = encoder(bench)([expected.tokens[index].astype(np.int64) for index in held])
    answers = dict(zip(held, blobs, strict=True))
    total = sum(map(len, blobs))
    assert scored(bench, answers) == (total, total)
    answers[held[0]] = answers[held[0]][:-3]
    answers[held[1]] = bytes([answers[held[1]][0] ^ 1]) + answers[held[1]][1:]
    assert scored(bench, answers) == (total - 4, total)


def test_samples_as_bytes() -> None:
    images = digits_data.read_data().images
    assert digits_data.samples([5, 0]) == [images[5].tobytes(), images[0].tobytes()]
    assert encoder(benchmark("echo"))([1, 2]) == [b"", b""]
