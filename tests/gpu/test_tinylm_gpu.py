"""The text model on a real GPU: its tokens, its stamps, its memory."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from distbench.engines.slot_decoder import available_bytes
from distbench.errors import UsageError
from distbench.gpus import choose_device
from distbench.models.tinylm import build
from distbench.sut import FOREVER, Done, First, run_indices


def _cuda() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that is too old is no error of these tests
        return torch.cuda.is_available()


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _cuda(), reason="no CUDA device"),
    pytest.mark.timeout(300),
]


@pytest.mark.parametrize("batching", ["continuous", "static"])
@pytest.mark.parametrize("slots", [1, 8, 64])
def test_tokens_are_the_references(slots: int, batching: str) -> None:
    sut = build(choose_device("cuda", 0), slots=slots, batching=batching)
    outputs = run_indices(sut, sut.held_out, 1)
    right, total = sut.score(sut.held_out, outputs)
    assert right == total > 0


def test_the_held_out_text_costs_what_it_does_on_a_cpu() -> None:
    sut = build(choose_device("cuda", 0))
    bits, count = sut.text_bits(0, 1, lambda: None)  # type: ignore[attr-defined]
    assert (bits / count, count) == (pytest.approx(1.361, abs=1e-3), 5468)


def test_a_token_is_stamped_after_it_is_on_the_host() -> None:
    sut = build(choose_device("cuda", 0), slots=8)
    for row in range(8):
        sut.issue(row, np.array([row], np.int64))
    firsts = sut.poll(FOREVER)
    assert [type(each) for each in firsts] == [First] * 8
    ended: list[Done] = []
    while len(ended) < 8:
        ended += [each for each in sut.poll(FOREVER) if isinstance(each, Done)]
    for done in ended:
        assert np.all(np.diff(done.token_ns) > 0)


def test_more_slots_than_the_gpu_has_memory_for_are_refused() -> None:
    device = choose_device("cuda", 0)
    most = available_bytes(torch.device("cuda", device.index)) // 147_456
    with pytest.raises(UsageError, match=r"usable on cuda:\d.*give slots="):
        build(device, slots=most + 1)
