"""A model that never returns, outside the timed window: its rank is named, and every rank ends."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from tests.support import run_module, torchrun

pytestmark = pytest.mark.timeout(150)

HANGS = """
import os
import sys
import threading

import numpy as np

from distbench import offline, readiness, window
from distbench.command import start_command
from distbench.sut import Echo

PLACE = os.environ["HANGS_IN"]


def hang(place, rank):
    if place == PLACE and rank == 1:
        print(f"hangs in {place}", flush=True)
        threading.Event().wait()


class Model(Echo):
    def __init__(self, rank):
        super().__init__()
        self.rank, self.scoring = rank, False
        self.held_out = np.arange(128)

    def load(self, indices):
        hang("load", self.rank)

    def score(self, indices, outputs):
        return len(indices), len(indices)

    def poll(self, until_ns):
        hang("accuracy pass" if self.scoring else "warm-up", self.rank)
        return super().poll(until_ns)

    def close(self):
        pass


def build(world):
    hang("factory", world.rank)
    made = Model(world.rank)
    original = window.finish.accuracy_pass

    def accuracy_pass(*args):
        made.scoring = True
        return original(*args)

    window.finish.accuracy_pass = accuracy_pass
    return made


if __name__ == "__main__":
    readiness.SETUP_S = 2.0
    start_command(offline.main)
"""


@pytest.mark.parametrize(
    "place",
    [
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("factory", "load")),
        "warm-up",
        "accuracy pass",
    ],
)
def test_a_model_that_hangs_outside_the_window_is_ended_and_named(
    tmp_path: Path, place: str
) -> None:
    (tmp_path / "hangs.py").write_text(HANGS)
    argv = ["--model", "hangs:build", "--num-samples", "6400", "--warmup", "10ms"]
    begin = time.monotonic()
    done = torchrun(2, "hangs", *argv, cwd=tmp_path, HANGS_IN=place)
    assert time.monotonic() - begin < 60
    assert done.returncode == 1
    assert f"hangs in {place}" in done.stdout
    assert "was lost: with work in flight its count stood at" in done.stderr
    assert "the limit being 2 s" in done.stderr
    left = list((tmp_path / "results").glob("*"))
    if place != "accuracy pass":
        assert left == []
        return
    # The window is whole: its throughput is not thrown away with the accuracy.
    result = json.loads((left[0] / "result.json").read_bytes())
    assert result["verdict"]["status"] == "INCOMPLETE"
    assert "MEASUREMENT INCOMPLETE" in done.stdout
    assert result["metrics"]["throughput"]["n"] == 6400
    assert result["metrics"]["throughput"]["value"] > 0
    assert result["metrics"]["accuracy"]["value"] is None
    assert run_module("distbench.verify", str(left[0])).returncode == 6
