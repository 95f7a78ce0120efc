"""A whole decoder on a GPU behind the token loop of several ranks: tokens, and what events tell."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from distbench.models.decoders import llama
from distbench.models.parity import whole_engine
from distbench.sut import run_indices


def _cuda() -> bool:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a driver that is too old is no error of these tests
        return torch.cuda.is_available()


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not _cuda(), reason="no CUDA device"),
    pytest.mark.timeout(300),
]


def test_the_loop_on_a_gpu_writes_what_it_does_on_a_cpu() -> None:
    model = llama({"layers": 4, "d": 64, "heads": 8, "kv_heads": 2, "output": 12})
    indices = np.arange(24, dtype=np.int64)
    host, card = (whole_engine(model, torch.device(each), 4) for each in ("cpu", "cuda:0"))
    wanted, found = (run_indices(each, indices, 1) for each in (host, card))
    same = sum(int((a == b).sum()) for a, b in zip(wanted, found, strict=True))
    assert same > 0.8 * sum(map(len, wanted))
    sums = card.watch.read()
    assert sums["work_ns"] > sums["prefill_ns"] > 0
