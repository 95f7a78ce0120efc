"""Files of arrays: what is refused, and that the sentence names it. Needs no torch."""

import io
import pickle

import numpy as np
import pytest

from distbench.errors import UsageError
from distbench.models.arrays import check_arrays, decode_arrays

SHAPES = {"a": (2, 3), "b": (4,)}


def content(save=np.savez, **arrays):
    file = io.BytesIO()
    save(file, **arrays)
    return file.getvalue()


def good():
    return {"a": np.ones((2, 3), np.float16), "b": np.zeros(4, np.float32)}


def test_a_whole_file_passes(tmp_path):
    arrays = decode_arrays(tmp_path / "w.npz", content(**good()))
    check_arrays(tmp_path / "w.npz", arrays, SHAPES)
    assert all(np.array_equal(arrays[name], array) for name, array in good().items())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"b": None}, "without b"),
        ({"c": np.ones(1)}, "with unknown c"),
        ({"a": np.ones((3, 2))}, r"with misshapen a \(3, 2\) in place of \(2, 3\)"),
        ({"a": np.ones((2, 3), np.int64)}, "with not finite floats in a"),
        ({"b": np.array([0, np.nan, 0, 0])}, "with not finite floats in b"),
        ({"a": None, "d": np.ones(1)}, "without a, with unknown d;"),
    ],
)
def test_keys_that_are_missing_extra_or_misshapen_are_named(tmp_path, change, sentence):
    arrays = {name: array for name, array in {**good(), **change}.items() if array is not None}
    path = tmp_path / "w.npz"
    with pytest.raises(UsageError, match=sentence) as caught:
        check_arrays(path, decode_arrays(path, content(**arrays)), SHAPES)
    assert str(path) in str(caught.value)


def test_of_many_keys_the_first_are_named_and_the_rest_counted(tmp_path):
    shapes = {f"layer{number}": (1,) for number in range(9)}
    with pytest.raises(UsageError, match="layer0, layer1, layer2, layer3, layer4 and 4 more"):
        check_arrays(tmp_path / "w.npz", {}, shapes)


UNPICKLED = []


class Evil:
    """Unpickling it would be seen."""

    def __reduce__(self):
        return UNPICKLED.append, (1,)


def damaged():
    whole = content(**good())
    one = io.BytesIO()
    np.save(one, np.ones(3))
    middle = whole.index(b"\0" * 8, 100)
    packed = content(np.savez_compressed, a=np.arange(1000.0))
    return {
        "a pickle": pickle.dumps(Evil()),
        "pickled objects in an npz": content(a=np.array([Evil()], object)),
        "an array without a name": one.getvalue(),
        "half a file": whole[: len(whole) // 2],
        "a changed byte": whole[:middle] + b"\1" + whole[middle + 1 :],
        "a changed byte, compressed": packed[:200] + b"\xff\xff" + packed[202:],
        "text": b"weights",
        "nothing": b"",
    }


@pytest.mark.parametrize("what", damaged())
def test_what_is_no_file_of_plain_arrays_is_refused_and_nothing_is_unpickled(tmp_path, what):
    path = tmp_path / "w.npz"
    with pytest.raises(UsageError, match=r"no \.npz file of plain arrays") as caught:
        decode_arrays(path, damaged()[what])
    assert str(path) in str(caught.value)
    assert UNPICKLED == []
