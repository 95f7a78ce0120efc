"""The embedded digits files: pinned, small, and what their description says. Needs no torch."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distbench.errors import UsageError
from distbench.files import sha256_file
from distbench.models import digits_data
from distbench.models.digits_data import DATA_FILE, SHA256, WEIGHTS_FILE, read_data, read_pinned

FOLDER = Path(digits_data.__file__).parent
SIZE_LIMIT_BYTES = 200_000


@pytest.mark.parametrize("name", [DATA_FILE, WEIGHTS_FILE])
def test_file_is_the_pinned_one(name):
    assert sha256_file(FOLDER / name) == SHA256[name]


def test_pins_name_both_files_and_no_other():
    assert sorted(SHA256) == sorted([DATA_FILE, WEIGHTS_FILE])
    assert all(re.fullmatch("[0-9a-f]{64}", digest) for digest in SHA256.values())


def test_both_files_together_are_small():
    assert sum((FOLDER / name).stat().st_size for name in SHA256) <= SIZE_LIMIT_BYTES


def test_images_and_labels():
    data = read_data()
    assert (data.images.shape, data.images.dtype) == ((1797, 8, 8), np.uint8)
    assert (data.images.min(), data.images.max()) == (0, 16)
    assert (data.labels.shape, data.labels.dtype) == ((1797,), np.uint8)
    assert sorted(set(data.labels.tolist())) == list(range(10))
    assert np.bincount(data.labels).min() >= 170


def test_held_out_rows_are_sorted_unique_and_those_of_train_test_split():
    held_out = read_data().held_out
    assert (held_out.shape, held_out.dtype) == ((360,), np.int32)
    assert np.all(np.diff(held_out) > 0)
    assert held_out[0] >= 0
    assert held_out[-1] < 1797
    # train_test_split(..., test_size=0.2, random_state=0) of scikit-learn, which is not installed.
    drawn = np.random.RandomState(0).permutation(1797)[:360]
    assert held_out.tolist() == sorted(drawn.tolist())


def test_weights_are_finite_float16():
    arrays = read_pinned(WEIGHTS_FILE)
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
    assert sum(array.size for array in arrays.values()) == 28_714
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_a_changed_byte_is_refused_with_file_both_digests_and_remedy(tmp_path):
    content = bytearray((FOLDER / DATA_FILE).read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / DATA_FILE
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        read_data(tmp_path)
    for part in (str(path), SHA256[DATA_FILE], sha256_file(path), "reinstall distbench"):
        assert part in str(caught.value)


def test_a_missing_file_is_refused_with_file_and_remedy(tmp_path):
    with pytest.raises(UsageError, match=r"No such file.*reinstall distbench") as caught:
        read_data(tmp_path)
    assert str(tmp_path / DATA_FILE) in str(caught.value)


def test_an_unreadable_file_is_refused(tmp_path):
    (tmp_path / DATA_FILE).mkdir()
    with pytest.raises(UsageError, match=r"Is a directory.*reinstall distbench"):
        read_data(tmp_path)


def test_reading_the_data_does_not_import_torch():
    code = (
        "import sys; from distbench.models.digits_data import read_data; read_data(); "
        "sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == 0
