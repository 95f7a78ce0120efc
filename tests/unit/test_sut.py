"""Systems under test: the adapter around a function, the known-answer stand-ins, untimed passes."""

import time

import numpy as np
import pytest

from distbench.errors import ModelError, UsageError
from distbench.samples import FAILED, PENDING, SampleLog
from distbench.sut import (
    FOREVER,
    KEPT_ERRORS,
    Done,
    Echo,
    First,
    FromCallable,
    Sleep,
    SystemUnderTest,
    collector,
    on_host,
    run_indices,
)


def indices(*values):
    return np.array(values, np.int64)


STAND_INS = [
    lambda: FromCallable(lambda samples: samples * 2),
    Echo,
    lambda: Sleep(0),
]


@pytest.mark.parametrize("make", STAND_INS)
def test_a_stand_in_follows_the_protocol(make):
    sut = make()
    assert isinstance(sut, SystemUnderTest)
    assert (sut.total, sut.resident, sut.depth) == (1024, 1024, 1)
    sut.load(indices(1, 2))
    assert sut.poll(FOREVER) == []
    sut.issue(0, indices(5, 6, 7))
    sut.issue(3, indices(8))
    [first] = sut.poll(FOREVER)
    [second] = sut.poll(FOREVER)
    assert (first.row, first.count, len(first.outputs), first.error) == (0, 3, 3, "")
    assert (second.row, second.count, len(second.outputs)) == (3, 1, 1)
    assert sut.poll(0) == []
    sut.unload(indices(1, 2))


@pytest.mark.parametrize("make", STAND_INS)
def test_close_drops_what_was_not_computed(make):
    sut = make()
    sut.issue(0, indices(1))
    sut.close()
    assert sut.poll(FOREVER) == []


def test_a_function_gets_the_indices_and_its_outputs_come_back():
    seen = []

    def function(samples):
        seen.append(samples)
        return [f"output {sample}" for sample in samples]

    sut = FromCallable(function, total=10)
    assert sut.total == sut.resident == 10
    sut.issue(4, indices(9, 3))
    assert seen == []  # issue never works
    assert sut.poll(FOREVER) == [Done(4, 2, ["output 9", "output 3"])]
    assert [each.tolist() for each in seen] == [[9, 3]]
    assert seen[0].dtype == np.int64


def test_an_error_of_the_function_is_not_swallowed():
    sut = FromCallable(lambda samples: 1 / 0)
    sut.issue(0, indices(1))
    with pytest.raises(ZeroDivisionError):
        sut.poll(FOREVER)


def test_echo_returns_the_indices_themselves():
    sut = Echo(8)
    sut.issue(2, indices(7, 1))
    [done] = sut.poll(FOREVER)
    assert done.outputs.tolist() == [7, 1]
    assert (done.started_ns, done.finished_ns, done.device_ns, done.token_ns) == (0, 0, 0, ())


class Clock:
    """A clock that only sleeping moves; a sleep ends late, and once ends early."""

    def __init__(self):
        self.at_ns = 10**12
        self.slept = []

    def __call__(self):
        return self.at_ns

    def sleep(self, seconds):
        asked = round(seconds * 1e9)
        self.slept.append(asked)
        self.at_ns += asked // 2 if len(self.slept) == 1 else asked + 300


def test_sleep_keeps_to_an_absolute_deadline_and_stamps_it(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "sleep", clock.sleep)
    sut = Sleep(1_000_000, now=clock)
    sut.issue(0, indices(1, 2, 3))
    [done] = sut.poll(FOREVER)
    # Woken half way it sleeps the rest, and the 300 ns that it overslept are not made up for.
    assert clock.slept == [3_000_000, 1_500_000]
    assert (done.started_ns, done.finished_ns) == (10**12, 10**12 + 3_000_300)
    sut.issue(3, indices(4))
    [done] = sut.poll(FOREVER)
    assert done.started_ns == 10**12 + 3_000_300
    assert done.finished_ns == done.started_ns + 1_000_300
    assert sut.stamps == [(10**12, 10**12 + 3_000_300), (done.started_ns, done.finished_ns)]


def test_sleep_on_the_real_clock_takes_no_less_than_it_says():
    sut = Sleep(2_000_000)
    before = sut.now()
    sut.issue(0, indices(1, 2, 3))
    [done] = sut.poll(FOREVER)
    after = sut.now()
    assert before <= done.started_ns <= done.finished_ns <= after
    assert done.finished_ns - done.started_ns >= 6_000_000
    assert done.outputs.tolist() == [1, 2, 3]


# Outputs on the host


class Tensor:
    """What ``on_host`` needs of a tensor, and where it is."""

    def __init__(self, name, place="device", tracked=True):
        self.name, self.place, self.tracked = name, place, tracked

    def detach(self):
        return Tensor(self.name, self.place, tracked=False)

    def cpu(self):
        return Tensor(self.name, "host", self.tracked)

    def __eq__(self, other):
        return vars(self) == vars(other)


def host(name):
    return Tensor(name, "host", tracked=False)


def test_tensors_are_copied_to_the_host():
    assert on_host(Tensor("a")) == host("a")
    assert on_host([Tensor("a"), Tensor("b")]) == [host("a"), host("b")]
    assert on_host((Tensor("a"), Tensor("b"))) == [host("a"), host("b")]


@pytest.mark.parametrize(
    "outputs", ["text", b"bytes", np.arange(3), [1, 2], ["a"], [], (), {"a": 1}, None, 5]
)
def test_what_is_no_tensor_is_returned_as_it_is(outputs):
    assert on_host(outputs) is outputs


def test_outputs_of_a_function_are_on_the_host_when_the_group_is_done():
    sut = FromCallable(lambda samples: [Tensor(int(sample)) for sample in samples])
    sut.issue(0, indices(3, 4))
    assert sut.poll(FOREVER)[0].outputs == [host(3), host(4)]


# Untimed passes


class Deep:
    """Accepts ``depth`` groups and returns them out of order, a First before each."""

    total = resident = 100

    def __init__(self, depth):
        self.depth, self.flying, self.sizes, self.most = depth, [], [], 0

    def issue(self, row, samples, data=None):
        self.flying.append((row, samples))
        self.sizes.append(len(samples))
        self.most = max(self.most, len(self.flying))
        assert len(self.flying) <= self.depth

    def poll(self, until_ns):
        assert until_ns == FOREVER
        row, samples = self.flying.pop()
        return [First(row, 5), Done(row, len(samples), (samples * 10).tolist())]


@pytest.mark.parametrize("depth", [1, 2, 5])
@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 40])
def test_outputs_come_in_the_order_of_the_indices(depth, count):
    order = np.random.default_rng(count).permutation(count).astype(np.int64)
    sut = Deep(depth)
    assert run_indices(sut, order, 4) == (order * 10).tolist()
    assert sut.sizes == [4] * (count // 4) + [count % 4] * (count % 4 > 0)
    assert sut.most == min(depth, len(sut.sizes))
    assert sut.flying == []


def test_several_groups_out_of_one_poll():
    class Eager(Deep):
        def poll(self, until_ns):
            ended = [Done(row, len(each), each.tolist()) for row, each in self.flying]
            self.flying = []
            return ended

    assert run_indices(Eager(3), indices(4, 3, 2, 1, 0, 9, 8), 2) == [4, 3, 2, 1, 0, 9, 8]


@pytest.mark.parametrize("given_outputs", [0, 1, 3])
def test_a_wrong_number_of_outputs_is_refused(given_outputs):
    sut = FromCallable(lambda samples: [0] * given_outputs)
    with pytest.raises(UsageError) as caught:
        run_indices(sut, indices(70, 71), 2)
    assert str(caught.value) == (
        f"the model failed on samples 70 and following: {given_outputs} outputs for 2 samples"
    )


def test_a_group_that_failed_is_refused_with_its_message():
    class Failing(Echo):
        def poll(self, until_ns):
            row, samples = self.queue.popleft()
            return [Done(row, len(samples), samples, "out of memory" if row else "")]

    with pytest.raises(UsageError, match=r"samples 12 and following: out of memory"):
        run_indices(Failing(), indices(10, 11, 12, 13), 2)


# Stamping what has ended


def collected(*done, issued=(2, 0, 3), wanted=(), columns=("completed", "count", "started",
                                                           "finished", "device")):  # fmt: skip
    log, errors, kept = SampleLog.in_memory(len(issued), columns), [], {}
    log.count[:] = issued
    clock = iter(range(100, 200))
    groups = collector(log, kept, errors, lambda: next(clock), wanted)(done)
    return log, errors, groups, kept


def test_ended_groups_are_stamped_each_with_its_own_reading():
    done = [Done(2, 3, [7, 8, 9], "", 11, 12, 13), First(0, 5), Done(0, 2, [1, 2])]
    log, errors, groups, kept = collected(*done)
    assert (groups, errors, log.ended, kept) == (2, [], [5], {})
    assert log.completed.tolist() == [102, PENDING, 100]
    assert (log.started[2], log.finished[2], log.device[2]) == (11, 12, 13)


@pytest.mark.parametrize(
    ("wanted", "rows"),
    [((), []), ((0,), [0]), ((1,), [2]), ((1, 2), [2]), ((0, 3, 4), [0, 4]), ((5,), [5])],
)
def test_outputs_are_kept_of_the_first_group_at_or_behind_each_place(wanted, rows):
    done = [Done(0, 2, "ab"), Done(2, 2, "cd"), Done(4, 1, "e"), Done(5, 1, "f")]
    kept = collected(*done, issued=(2, 0, 2, 0, 1, 1), wanted=wanted)[3]
    assert sorted(kept) == rows
    assert all(kept[row] == done[[0, 2, 4, 5].index(row)].outputs for row in rows)


def test_a_log_without_optional_columns_takes_what_it_has():
    done = Done(0, 2, [1, 2], "", 11, 12, 13, (5, 6))
    log, errors, groups, _ = collected(done, columns=("completed", "count"))
    assert (groups, errors, int(log.completed[0])) == (1, [], 100)


@pytest.mark.parametrize(
    ("done", "message"),
    [
        (Done(0, 2, [1, 2], "no such digit"), "no such digit"),
        (Done(0, 2, [1]), "1 outputs for 2 samples"),
        (Done(0, 3, [1, 2, 3]), "a group of 2 samples as one of 3"),
        (Done(0, 1, [1]), "a group of 2 samples as one of 1"),
    ],
)
def test_a_group_that_did_not_end_as_it_was_issued_fails(done, message):
    log, errors, groups, kept = collected(done, wanted=(0,))
    # What was issued has ended, whatever the model says of it.
    assert (groups, log.ended, int(log.completed[0]), int(log.count[0])) == (1, [2], FAILED, 2)
    assert message in errors[0]
    assert kept == {}


def test_outputs_that_have_no_length_complete_nothing():
    log = SampleLog.in_memory(1, ("completed", "count"))
    log.count[0] = 1
    with pytest.raises(TypeError):
        collector(log, {}, [], lambda: 5)([Done(0, 1, None)])
    assert log.completed.tolist() == [PENDING]
    assert log.ended == [0]


@pytest.mark.parametrize("rows", [(1,), (-2,), (0, 0)])
def test_a_row_that_begins_no_group_in_flight_is_refused_and_completes_nothing(rows):
    log = SampleLog.in_memory(3, ("completed", "count"))
    log.count[:] = 2, 0, 3
    done = [Done(row, 2 if row == 0 else 1, [1, 2] if row == 0 else [1]) for row in rows]
    with pytest.raises(ModelError, match=f"row {rows[-1]}, which begins no group in flight"):
        collector(log, {}, [], lambda: 5)(done)
    assert log.completed.tolist() == [PENDING if len(rows) == 1 else 5, PENDING, PENDING]


def test_few_messages_are_kept():
    count = KEPT_ERRORS + 3
    done = [Done(n, 1, [1], f"wrong {n}") for n in range(count)]
    errors = collected(*done, issued=(1,) * count)[1]
    assert errors == [f"wrong {n}" for n in range(KEPT_ERRORS)]
