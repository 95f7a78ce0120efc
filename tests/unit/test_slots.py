"""The slot engine over a decoder that is worked by hand: who is computed when, and what is told."""

import numpy as np
import pytest

from distbench.engines.slots import KEPT_STEPS, SlotEngine
from distbench.errors import UsageError
from distbench.models.tinylm_data import draw_samples, read_text
from distbench.sut import FOREVER, Done, First, SystemUnderTest, run_indices

PROMPTS = [bytes([number, 2, 3][: 1 + number % 3]) for number in range(100)]


def after(text):
    """Return the token that follows a text: it depends on all of it."""
    return sum(place * code for place, code in enumerate(text, 1)) % 128


def written(prompt, count):
    text = list(prompt)
    for _ in range(count):
        text.append(after(text))
    return text[len(prompt) :]


class Decoder:
    """Keeps every slot's text, and what it was asked."""

    length, vocabulary = 192, 128

    def __init__(self, slots):
        self.slots = slots
        self.texts = [[] for _ in range(slots)]
        self.calls = []

    def prefill(self, slots, prompts):
        self.calls.append(("prefill", tuple(slots)))
        for slot, prompt in zip(slots, prompts, strict=True):
            self.texts[slot] = [*prompt, after(prompt)]
        return [self.texts[slot][-1] for slot in slots]

    def decode(self, top, limit):
        self.calls.append(("decode", top, limit))
        for text in self.texts[:top]:
            text.append(after(text))
        return [text[-1] for text in self.texts[:top]]


class Zeros(Decoder):
    """Costs nothing: every token is 0."""

    def prefill(self, slots, prompts):
        return [0] * len(slots)

    def decode(self, top, limit):
        return [0] * top


def ticking():
    ticks = iter(range(1, 10**9))
    return lambda: next(ticks)


def engine(slots, lengths, batching="continuous", prompts=PROMPTS):
    return SlotEngine(Decoder(slots), prompts, np.array(lengths, np.int64), batching, ticking())


def issue(sut, *rows):
    for row in rows:
        sut.issue(row, np.array([row], np.int64))


def drive(sut, count):
    """Issue all rows as Offline does, as many as the engine takes; returns what each poll told."""
    told, flying, rows = [], 0, list(range(count))
    while rows or flying:
        while rows and flying < sut.depth:
            issue(sut, rows.pop(0))
            flying += 1
        told.append(sut.poll(FOREVER))
        flying -= sum(isinstance(each, Done) for each in told[-1])
    return told


def test_it_follows_the_protocol():
    sut = engine(4, [3] * 100)
    assert isinstance(sut, SystemUnderTest)
    assert (sut.total, sut.resident, sut.depth) == (100, 100, 4)
    sut.load(np.arange(3))
    sut.unload(np.arange(3))


def test_nothing_to_do_is_told_at_once_and_asks_nothing_of_the_decoder():
    sut = engine(2, [3] * 100)
    assert sut.poll(FOREVER) == ()
    drive(sut, 3)
    calls = len(sut.decoder.calls)
    assert sut.poll(FOREVER) == ()
    assert len(sut.decoder.calls) == calls > 0


def test_a_row_from_prefill_to_its_last_token():
    sut = engine(2, [3] * 100)
    issue(sut, 5)
    assert sut.poll(FOREVER) == [First(5, 2, written(PROMPTS[5], 3)[0])]
    assert sut.poll(FOREVER) == []
    [done] = sut.poll(FOREVER)
    assert (done.row, done.count, done.error, done.device_ns) == (5, 1, "", 0)
    assert [each.tolist() for each in done.outputs] == [written(PROMPTS[5], 3)]
    assert done.outputs[0].dtype == np.int64
    assert (done.started_ns, done.finished_ns, done.token_ns) == (1, 4, [2, 3, 4])
    assert (sut.prefills, sut.steps) == (1, 2)


def test_a_row_of_one_token_ends_with_its_prefill():
    sut = engine(2, [1] * 100)
    issue(sut, 3, 4)
    first, second, *ended = sut.poll(FOREVER)
    tokens = [written(PROMPTS[row], 1)[0] for row in (3, 4)]
    assert (first, second) == (First(3, 2, tokens[0]), First(4, 2, tokens[1]))
    assert [(done.row, done.outputs[0].tolist()) for done in ended] == [
        (row, written(PROMPTS[row], 1)) for row in (3, 4)
    ]
    assert sut.poll(FOREVER) == ()


def test_continuous_fills_a_slot_at_the_next_poll():
    sut = engine(2, [2, 4, 3, *[3] * 97])
    issue(sut, 0, 1)
    sut.poll(FOREVER)
    [done] = sut.poll(FOREVER)
    assert done.row == 0
    issue(sut, 2)
    assert [type(each) for each in sut.poll(FOREVER)] == [First]
    assert sut.decoder.calls[-1] == ("prefill", (0,))


def test_static_fills_no_slot_before_all_are_free():
    sut = engine(2, [2, 4, 3, *[3] * 97], "static")
    issue(sut, 0, 1)
    sut.poll(FOREVER)
    assert [done.row for done in sut.poll(FOREVER)] == [0]
    issue(sut, 2)
    assert sut.poll(FOREVER) == []
    assert [done.row for done in sut.poll(FOREVER)] == [1]
    issue(sut, 3)
    assert [each.row for each in sut.poll(FOREVER)] == [2, 3]
    assert sut.decoder.calls[-1] == ("prefill", (0, 1))


def test_the_decoder_is_asked_for_the_slots_and_positions_in_use_and_no_more():
    sut = engine(3, [5, 2, 3, *[3] * 97])
    issue(sut, 0, 1, 2)
    for _ in range(5):
        sut.poll(FOREVER)
    # Each prompt with its first token is 2, 3 and 4 long; 1 ends first, then 2, and 0 is left.
    assert sut.decoder.calls[1:] == [
        ("decode", 3, 4),
        ("decode", 3, 5),
        ("decode", 1, 4),
        ("decode", 1, 5),
    ]


def test_the_lowest_free_slot_is_taken():
    sut = engine(4, [9, 2, 2, 9, *[9] * 96])
    issue(sut, 0, 1, 2, 3)
    sut.poll(FOREVER)
    sut.poll(FOREVER)
    issue(sut, 4)
    sut.poll(FOREVER)
    assert sut.decoder.calls[-1] == ("prefill", (1,))


@pytest.mark.parametrize("batching", ["continuous", "static"])
@pytest.mark.parametrize("slots", [1, 3, 8])
def test_every_row_ends_once_with_its_own_tokens(slots, batching):
    lengths = np.random.default_rng(slots).integers(1, 30, 100)
    sut = engine(slots, lengths, batching)
    polls = drive(sut, 100)
    told = [each for poll in polls for each in poll]
    firsts = {each.row: each.token_ns for each in told if isinstance(each, First)}
    ended = {each.row: each for each in told if isinstance(each, Done)}
    assert len(told) == 200
    assert sorted(firsts) == sorted(ended) == list(range(100))
    for row, done in ended.items():
        assert told.index(First(row, firsts[row], done.outputs[0][0])) < told.index(done)
        assert done.outputs[0].tolist() == written(PROMPTS[row], lengths[row])
        assert len(done.token_ns) == lengths[row]
        assert done.token_ns[0] == firsts[row] > done.started_ns
        assert np.all(np.diff(done.token_ns) > 0)
        assert done.finished_ns == done.token_ns[-1]


def test_a_poll_is_one_call_of_the_decoder():
    sut = engine(3, np.random.default_rng(0).integers(1, 9, 100))
    polls = drive(sut, 100)
    assert len(polls) == len(sut.decoder.calls) == sut.steps + sut.prefills


@pytest.mark.parametrize("slots", [8, 32])
def test_continuous_takes_at_most_070_of_the_steps_of_static(slots):
    samples = draw_samples(read_text())
    assert (samples.output_lengths.min(), samples.output_lengths.max()) == (8, 128)
    steps = {}
    for batching in ("continuous", "static"):
        sut = SlotEngine(Zeros(slots), samples.prompts, samples.output_lengths, batching)
        run_indices(sut, np.arange(sut.total), 1)
        steps[batching] = sut.steps
    # A step is lost wherever a slot stands empty: least are those with all slots full.
    assert steps["continuous"] >= (samples.output_lengths - 1).sum() / slots
    assert steps["continuous"] <= 0.70 * steps["static"]


def test_what_was_written_long_ago_is_forgotten_though_the_engine_is_never_idle():
    sut = engine(2, [40] * 100, prompts=PROMPTS)
    issue(sut, 0)
    for _ in range(20):
        sut.poll(FOREVER)
    for number in range(3 * KEPT_STEPS):
        if not sut._prompts.waiting:
            issue(sut, number % 100)
        for done in sut.poll(FOREVER):
            if isinstance(done, Done):
                assert done.outputs[0].tolist() == written(PROMPTS[done.row], 40)
    assert sut.steps > 2 * KEPT_STEPS
    assert len(sut._lane._written) == len(sut._lane._stamps) <= KEPT_STEPS + 40


def test_more_than_one_sample_a_group_is_refused_with_the_remedy():
    with pytest.raises(UsageError, match=r"was issued 2: give --batch-size 1"):
        engine(2, [3] * 100).issue(0, np.array([1, 2], np.int64))


def test_a_prompt_off_the_wire_replaces_the_samples_own():
    sut = engine(1, [4] * 100)
    sut.issue(0, np.array([7], np.int64), [b"abc"])
    polls = [sut.poll(FOREVER) for _ in range(4)]
    assert polls[-1][0].outputs[0].tolist() == written(b"abc", 4)


@pytest.mark.parametrize("prompt", [b"", b"a" * 189, b"caf\xc3\xa9"])
def test_a_prompt_off_the_wire_that_cannot_be_written_on_is_refused(prompt):
    with pytest.raises(UsageError, match=r"not between 1 and 188.*samples\(\)"):
        engine(1, [4] * 100).issue(0, np.array([7], np.int64), [prompt])


def test_an_unknown_batching_is_refused():
    with pytest.raises(UsageError, match="'dynamic' is neither continuous nor static"):
        engine(1, [4] * 100, "dynamic")


def test_close_forgets_what_waits_and_what_is_written():
    sut = engine(2, [9] * 100)
    issue(sut, 0, 1)
    sut.poll(FOREVER)
    sut.poll(FOREVER)
    issue(sut, 2)
    sut.close()
    assert sut.poll(FOREVER) == ()
    issue(sut, 3)
    told = [each for _ in range(9) for each in sut.poll(FOREVER)]
    assert [each.row for each in told] == [3, 3]
    assert told[1].outputs[0].tolist() == written(PROMPTS[3], 9)


def test_an_error_of_the_decoder_is_not_swallowed():
    sut = engine(2, [9] * 100)
    sut.decoder.decode = lambda top, limit: 1 / 0
    issue(sut, 0)
    sut.poll(FOREVER)
    with pytest.raises(ZeroDivisionError):
        sut.poll(FOREVER)
