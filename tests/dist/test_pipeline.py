"""The token loop of several ranks, over links that are faked: order, rendezvous, who gets what."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import numpy as np
import pytest
import torch

from distbench.engines import stopwatch
from distbench.engines.pipeline import PipelineEngine
from distbench.engines.stage import Edge, Edges, StageRank
from distbench.engines.stopwatch import Stopwatch
from distbench.layout import own_part, stages
from distbench.models.decoders import DecoderModel, llama
from distbench.models.parity import whole_engine
from distbench.models.tinylm_net import TinyLM, new_cache
from distbench.models.tinylm_weights import fill
from distbench.sut import run_indices

CPU = torch.device("cpu")
HANGS_S = 3.0


class Hung(Exception):
    """An operation whose partner never came."""


class Stream:
    """A communicator of two ranks as NCCL's: each rank's operations run in the order of posting,
    and a send ends only when the other rank's next operation is its receive."""

    def __init__(self) -> None:
        self.queues: tuple[deque[Any], deque[Any]] = (deque(), deque())
        self.lock = threading.Lock()

    def post(self, side: int, kind: str, tensor: torch.Tensor) -> threading.Event:
        """Queue an operation of one rank, and let run what can."""
        done = threading.Event()
        with self.lock:
            self.queues[side].append((kind, tensor, done))
            while all(self.queues) and {queue[0][0] for queue in self.queues} == {"send", "take"}:
                pair = {kind: (tensor, done) for kind, tensor, done in map(popped, self.queues)}
                with torch.inference_mode():
                    pair["take"][0].copy_(pair["send"][0])
                pair["send"][1].set(), pair["take"][1].set()
        return done


def popped(queue: deque[Any]) -> Any:
    return queue.popleft()


class FakeLink:
    """One direction between two ranks over a stream."""

    def __init__(self, stream: Stream, side: int) -> None:
        self.stream, self.side = stream, side

    def post(self, tensor: torch.Tensor) -> Any:
        done = self.stream.post(self.side, "send", tensor.clone())
        return Posted(done)

    def begin(self, tensor: torch.Tensor) -> Any:
        return Posted(self.stream.post(self.side, "take", tensor))


class Posted:
    def __init__(self, done: threading.Event) -> None:
        self.done = done

    def wait(self) -> None:
        if not self.done.wait(HANGS_S):
            raise Hung


def ring(count: int, shared: bool) -> list[Edges]:
    """Return the edges of a pipeline; with one stream for all between two ranks where shared."""
    between = {}

    def link(source: int, target: int, name: str) -> tuple[FakeLink, FakeLink]:
        pair = tuple(sorted((source, target)))
        key = pair if shared else (*pair, source, name)
        stream = between.setdefault(key, Stream())
        return FakeLink(stream, source > target), FakeLink(stream, target > source)

    above: list[Any] = [None] * count
    below: list[tuple[Edge, ...]] = [()] * count
    back: list[Any] = [None] * count
    for upper in range(count - 1):
        head, body = (link(upper, upper + 1, name) for name in ("head", "body"))
        below[upper] = (Edge(head[0], body[0], False),)
        above[upper + 1] = Edge(head[1], body[1], False)
    back[count - 1], back[0] = link(count - 1, 0, "back")
    return [Edges(*each) for each in zip(above, below, back, strict=True)]


def pipeline(
    model: DecoderModel, count: int, lanes: int, shared: bool
) -> tuple[PipelineEngine, list[threading.Thread], list[BaseException]]:
    """Start the ranks of a pipeline, each on a thread; returns the leader's engine."""
    ranks = []
    for halves, edges in zip(stages(model.config, count), ring(count, shared), strict=True):
        with torch.device("meta"):
            net = TinyLM(model.config, *halves)
        fill(net.to_empty(device="cpu"), model.whole)
        cache = new_cache(own_part(model.config, *halves, 1), model.slots, model.length)
        ranks.append(StageRank(net, cache, lanes, edges, CPU, Stopwatch(CPU)))
    failed: list[BaseException] = []

    def follow(rank: StageRank) -> None:
        try:
            rank.follow()
        except Hung as error:
            failed.append(error)

    threads = [threading.Thread(target=follow, args=(rank,), daemon=True) for rank in ranks[1:]]
    for thread in threads:
        thread.start()
    prompts = (model.prompts, model.output_lengths, model.length)
    return PipelineEngine(ranks[0], *prompts), threads, failed


@pytest.fixture(scope="module")
def small() -> DecoderModel:
    return llama({"layers": 4, "d": 32, "heads": 4, "output": 6, "prompt": 5, "slots": 12})


@pytest.mark.parametrize("lanes", [1, 2, 3, 6])
@pytest.mark.parametrize("count", [2, 3, 4])
def test_nothing_hangs_where_a_send_ends_only_with_its_receive(
    small: DecoderModel, count: int, lanes: int
) -> None:
    engine, threads, failed = pipeline(small, count, lanes, shared=False)
    indices = np.arange(30, dtype=np.int64)
    found = run_indices(engine, indices, 1)
    engine.close()
    for thread in threads:
        thread.join(HANGS_S)
    assert not failed
    assert not any(thread.is_alive() for thread in threads)
    wanted = run_indices(whole_engine(small, CPU, lanes), indices, 1)
    assert [each.tolist() for each in found] == [each.tolist() for each in wanted]
    steps = [engine.rank.watch.prefills, engine.rank.watch.decodes]
    assert min(steps) > 0


def test_one_communicator_for_both_directions_would_hang(small: DecoderModel) -> None:
    """The fake is one that can hang: what the links of their own are for."""
    engine, threads, failed = pipeline(small, 2, 2, shared=True)
    with pytest.raises(Hung):
        run_indices(engine, np.arange(4, dtype=np.int64), 1)
    for thread in threads:
        thread.join(2 * HANGS_S)
    assert failed


def test_texts_are_spread_over_the_lanes(small: DecoderModel) -> None:
    """Four texts in twelve slots of three lanes: no lane has more than two of them."""
    engine = whole_engine(small, CPU, 3)
    for row in range(4):
        engine.issue(row, np.array([row]))
    engine.poll(0)
    held = [len(lane._texts) + len(lane._admitted) for lane in engine._lanes]
    assert sorted(held) == [1, 1, 2]


def test_a_check_gives_the_logits_of_the_whole_network(small: DecoderModel) -> None:
    engine, _, _ = pipeline(small, 2, 4, shared=False)
    prompts, forced = small.prompts[:3], small.prompts[3:6]
    found = engine.logits(2, prompts, forced)
    engine.close()
    with torch.device("meta"):
        net = TinyLM(small.config)
    fill(net.to_empty(device="cpu"), small.whole)
    with torch.inference_mode():
        texts = zip(prompts, forced, strict=True)
        tokens = torch.tensor([list(prompt + more) for prompt, more in texts])
        wanted = net(tokens)[:, len(prompts[0]) - 1 :].transpose(0, 1)
    assert found.shape == (1 + len(forced[0]), 3, small.config.vocabulary)
    assert torch.allclose(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_a_wait_counts_from_the_beginning_of_the_window() -> None:
    times = iter([100, 250, 300, 340])
    watch = Stopwatch(CPU, lambda: next(times))
    watch.open(200)
    watch.begin_wait()  # at 100, before the window
    watch.end_wait(24)  # at 250
    watch.begin_work(prefill=True, rows=3)  # at 300
    watch.end_work()  # at 340
    found = watch.read()
    assert (found["wait_ns"], found["work_ns"], found["prefill_ns"]) == (50, 40, 40)
    assert (found["prefills"], found["decodes"], found["rows"]) == (1, 0, 3)
    assert found["received_bytes"] == 24
    watch.open(1000)
    assert set(watch.read().values()) == {0}


class FakeEvent:
    """An event of a device whose clock a test sets, in ms; who waits for one knows all before it."""

    clock = known = 0.0

    def __init__(self) -> None:
        self.at = FakeEvent.clock

    def synchronize(self) -> None:
        FakeEvent.known = max(FakeEvent.known, self.at)

    def elapsed_time(self, other: FakeEvent) -> float:
        assert other.at <= FakeEvent.known, "the device is not through with it yet"
        return other.at - self.at


def test_on_a_gpu_events_on_its_stream_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """The host is through at once; the device waits for 2.5 ms and works for 6.5 ms."""
    monkeypatch.setattr(stopwatch, "_event", FakeEvent)
    FakeEvent.clock = FakeEvent.known = 0.0
    watch = Stopwatch(torch.device("cuda", 0), lambda: 7)
    watch.open(0)
    for step in range(3):
        FakeEvent.clock = 20.0 * step
        watch.begin_wait()
        FakeEvent.clock += 2.5
        watch.end_wait(8)
        watch.begin_work(prefill=step == 0, rows=2)
        FakeEvent.clock += 6.5
        watch.end_work()
    found = watch.read()
    assert (found["work_ns"], found["prefill_ns"]) == (19_500_000, 6_500_000)
    assert found["wait_ns"] == 7_500_000
    assert (found["prefills"], found["decodes"], found["received_bytes"]) == (1, 2, 24)


def test_events_are_read_before_they_pile_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "_event", FakeEvent)
    FakeEvent.clock = FakeEvent.known = 0.0
    watch = Stopwatch(torch.device("cuda", 0), lambda: 7)
    for _ in range(stopwatch.BEHIND + 10):
        watch.begin_work(prefill=False, rows=1)
        FakeEvent.clock += 1.0
        watch.end_work()
    assert len(watch._events) == stopwatch.BEHIND
    assert watch.work_ns == 10_000_000
