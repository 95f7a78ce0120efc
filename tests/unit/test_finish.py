"""The outputs that were kept from a window, and the untimed pass over held-out samples."""

from types import SimpleNamespace

import numpy as np
import pytest

from distbench.finish import accuracy_pass, alike, all_finite, check_outputs, text_pass
from distbench.sut import FromCallable

NAN, INF = float("nan"), float("inf")


class BFloat16:
    """As much of a tensor of a type that numpy has not as is looked at."""

    dtype = "torch.bfloat16"

    def __init__(self, values):
        self.values = np.asarray(values, np.float32)

    def detach(self):
        return self

    def cpu(self):
        return self

    def float(self):
        return self.values

    def __array__(self, *_args, **_kwargs):
        raise TypeError("Got unsupported ScalarType BFloat16")


# Numbers


@pytest.mark.parametrize(
    "outputs",
    [
        [1.0, -2.5],
        [[1, 2], [3, 4]],
        np.zeros((3, 4), np.float16),
        np.array([1 + 2j]),
        ["nan", "inf"],
        [b"nan"],
        [None, None],
        [],
        [[1.0], [2.0, 3.0]],
        [np.zeros(2), np.zeros(3)],
        [{"label": "cat", "scores": np.ones(3)}],
        [{"scores": [1.0, None]}, {}],
        [("cat", 0.5), ("dog", 0.25)],
        [np.array(["a", None], object)],
        BFloat16([1.0, 2.0]),
        [BFloat16([1.0]), BFloat16([2.0])],
        5,
        True,
    ],
)
def test_what_is_finite_or_no_number_passes(outputs):
    assert all_finite(outputs)


@pytest.mark.parametrize("bad", [NAN, INF, -INF, np.float32("nan"), np.float16("inf")])
@pytest.mark.parametrize(
    "place",
    [
        lambda bad: [1.0, bad],
        lambda bad: np.array([[0.0, 1.0], [bad, 2.0]]),
        lambda bad: np.array([bad], np.float16),
        lambda bad: np.array([complex(0.0, bad)]),
        lambda bad: [[1.0], [2.0, bad]],
        lambda bad: [np.zeros(2), np.array([0.0, 0.0, bad])],
        lambda bad: [None, bad],
        lambda bad: ["label", None, [bad]],
        lambda bad: [{"label": "cat", "scores": np.array([1.0, bad])}],
        lambda bad: [{"boxes": [[0.0, bad]]}],
        lambda bad: [("cat", None, bad)],
        lambda bad: BFloat16([0.0, bad]),
        lambda bad: [BFloat16([0.0, 1.0]), BFloat16([bad])],
        lambda bad: bad,
    ],
)
def test_a_number_that_is_not_finite_is_found_wherever_it_is(place, bad):
    assert not all_finite(place(bad))


# Comparing


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (3, 3),
        ("cat", "cat"),
        (1.0, 1.0005),
        (np.array([100.0, 0.05]), np.array([100.0, 0.1])),  # rounding is of the largest
        (np.array([1.0, 2.0], np.float16), np.array([1.0, 2.0], np.float32)),
        (np.zeros(0), np.zeros(0)),
        (0.0, 0),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ([1, [2.0, 3.0]], [1, [2.0005, 3.0]]),
        ({"a": np.ones(2), "b": "x"}, {"b": "x", "a": np.ones(2)}),
        ([{"a": np.ones(2)}], [{"a": np.ones(2)}]),
        (None, None),
        (BFloat16([1.0, 2.0]), BFloat16([1.0, 2.0])),
        (INF, INF),
        (True, True),
        (("cat", 0.5), ("cat", 0.5)),
    ],
)
def test_outputs_that_agree(one, other):
    assert alike(one, other)
    assert alike(other, one)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (3, 4),
        (10_000_000, 10_000_001),  # integers are exact, however large
        ("cat", "dog"),
        (1.0, 1.01),
        (0.0, 1e-9),
        (np.array([1.0, 2.0]), np.array([1.0, 2.1])),
        (np.array([1.0, 2.0]), np.array([2.0, 1.0])),
        (np.zeros(2), np.zeros(3)),
        (np.zeros((1, 2)), np.zeros(2)),
        (np.zeros(1), 0.0),
        ([[1, 2], [3]], [[1, 2], [4]]),
        ([[1, 2], [3]], [[1, 2], [3], [4, 5]]),
        ({"a": np.ones(2)}, {"a": np.zeros(2)}),
        ({"a": 1}, {"a": 1, "b": 2}),
        ([{"a": np.ones(2)}], [{"a": np.zeros(2)}]),
        (1.0, None),
        (1.0, "1.0"),
        (None, "x"),
        (NAN, 1.0),
        (1.0, NAN),
        (NAN, NAN),
        (INF, -INF),
        (INF, 1e30),
        (BFloat16([1.0, 2.0]), BFloat16([1.0, 3.0])),
    ],
)
def test_outputs_that_differ(one, other):
    assert not alike(one, other)
    assert not alike(other, one)


# Kept groups


def test_kept_outputs_are_counted():
    kept = {
        0: [1.0, 2.0],
        4: [3.0, NAN],
        8: None,  # its group failed
        12: ["cat", "dog"],
        16: np.array([[0.5], [0.25]]),
    }
    indices_of = {0: [10, 11], 4: [12, 13], 8: [14, 15], 12: [16, 17], 16: [18, 19]}
    accurate = {10: 1.0, 11: 2.0, 13: 3.0, 16: "cat", 17: "dag", 19: np.array([0.25])}
    assert check_outputs(kept, indices_of, accurate) == {
        "groups": 4,
        "non_finite": 1,
        "compared": 6,
        "different": 2,  # samples 13 and 17
    }


def test_nothing_kept_and_nothing_to_compare_with():
    zero = {"groups": 0, "non_finite": 0, "compared": 0, "different": 0}
    assert check_outputs({}, {}, {}) == zero
    assert check_outputs({0: None}, {0: [1]}, {1: 5}) == zero
    assert check_outputs({0: [5]}, {0: [1]}, {}) == zero | {"groups": 1}


# The accuracy pass


class Scored(FromCallable):
    """Is right about even samples; ten of its samples are held out."""

    held_out = np.arange(100, 110)

    def __init__(self, function=lambda samples: samples % 2, **more):
        super().__init__(function)
        vars(self).update(more)

    @staticmethod
    def score(indices, outputs):
        assert len(indices) == len(outputs)
        return sum(int(x) == 0 for x in outputs), len(outputs)


def ranks(size):
    return [
        SimpleNamespace(
            rank=r, world_size=size, host=f"jw{r + 2}", replica=r, replicas=size, leader=True
        )
        for r in range(size)
    ]


@pytest.mark.parametrize("size", [1, 2, 3, 11])
def test_the_held_out_samples_are_scored_once_each_over_all_ranks(size):
    told = [accuracy_pass(Scored(), world, 4) for world in ranks(size)]
    assert sum(score["right"] for score, _ in told) == 5
    assert sum(score["of"] for score, _ in told) == 10
    assert {score["reason"] for score, _ in told} == {""}
    outputs = {}
    for _, each in told:
        assert not outputs.keys() & each.keys()
        outputs |= each
    assert outputs == {sample: sample % 2 for sample in range(100, 110)}


def test_a_model_that_fails_in_the_accuracy_pass_leaves_a_reason():
    def fail(_samples):
        raise RuntimeError("out of memory")

    [world] = ranks(1)
    score, outputs = accuracy_pass(Scored(fail), world, 4)
    assert (score["right"], score["of"], outputs) == (0, 0, {})
    assert score["reason"].startswith("the accuracy pass failed on rank 0 (jw2): RuntimeError(")


@pytest.mark.parametrize(
    ("digest", "reason"),
    [
        ("random:seed=0", "the weights are random:seed=0: performance only"),
        ("sha256:ab", "the model has no held-out samples to score"),
        ("", "the model has no held-out samples to score"),
    ],
)
def test_a_model_without_held_out_samples_says_why(digest, reason):
    [world] = ranks(1)
    for missing in ("held_out", "score"):
        sut = Scored(digest=digest, **{missing: None})
        assert accuracy_pass(sut, world, 4) == ({"right": 0, "of": 0, "reason": reason}, {})
    assert accuracy_pass(FromCallable(len), world, 4)[0]["of"] == 0


# The text


def of_seven(part, parts, tell):
    """Bytes of 1, 2, ... 7 bits, dealt out in turn."""
    mine = range(1 + part, 8, parts)
    for _ in mine:
        tell()
    return float(sum(mine)), len(mine)


@pytest.mark.parametrize("size", [1, 2, 9])
def test_every_byte_is_told_once_over_all_ranks(size):
    pieces = []
    told = [
        text_pass(Scored(text_bits=of_seven), world, tell=lambda: pieces.append(1))
        for world in ranks(size)
    ]
    assert sum(each["bits"] for each in told) == 28
    assert sum(each["bytes"] for each in told) == len(pieces) == 7
    assert {each["reason"] for each in told} == {""}


def test_a_rank_that_follows_tells_nothing_of_its_own():
    [world] = ranks(1)
    world.leader = False
    told = text_pass(Scored(text_bits=of_seven), world)
    assert told == {"bits": 0, "bytes": 0, "reason": ""}


def unsure(_part, _parts, _tell):
    return INF, 3


@pytest.mark.parametrize(
    ("text_bits", "options", "reason"),
    [
        (None, {}, "the system tells no probabilities of a held-out text"),
        (of_seven, {"scored": True}, "scored in the first window"),
        (of_seven, {"raised": True}, "the model raised in the window, so what is in flight"),
        (lambda: 1, {}, "the text was not told on rank 0 (jw2): TypeError("),
        (unsure, {}, "the text was not told on rank 0 (jw2): ValueError('3 bytes are told in inf"),
    ],
)
def test_a_text_that_is_not_told_says_why(text_bits, options, reason):
    [world] = ranks(1)
    told = text_pass(Scored(text_bits=text_bits), world, **options)
    assert (told["bits"], told["bytes"]) == (0, 0)
    assert told["reason"].startswith(reason)
