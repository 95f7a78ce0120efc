"""The embedded text model's files and samples: pinned, small, the same everywhere. No torch."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from distbench.errors import UsageError
from distbench.files import sha256, sha256_file
from distbench.models import tinylm_data
from distbench.models.arrays import decode_arrays
from distbench.models.tinylm_data import (
    EXPECTED_FILE,
    SAMPLES,
    SHA256,
    SLOT_LENGTH,
    TEXT_FILE,
    VOCABULARY,
    WEIGHTS_FILE,
    draw_samples,
    pinned,
    read_expected,
    read_text,
    samples,
    training_bytes,
)

FOLDER = Path(tinylm_data.__file__).parent
SIZE_LIMIT_BYTES = 320_000


@pytest.fixture(scope="module")
def text():
    return read_text()


@pytest.fixture(scope="module")
def drawn(text):
    return draw_samples(text)


@pytest.mark.parametrize("name", [TEXT_FILE, WEIGHTS_FILE, EXPECTED_FILE])
def test_file_is_the_pinned_one(name):
    assert sha256_file(FOLDER / name) == SHA256[name]
    assert re.fullmatch("[0-9a-f]{64}", SHA256[name])


def test_the_files_together_are_small():
    assert sum((FOLDER / name).stat().st_size for name in SHA256) <= SIZE_LIMIT_BYTES


def test_the_text_is_ascii_from_the_declaration_to_the_last_amendment(text):
    assert len(text) == 54_675
    assert max(text) < VOCABULARY
    assert text.startswith(b"The Declaration of Independence")
    assert text.count(b"We the People of the United States") == 1
    assert text.rstrip().endswith(b"election of\nRepresentatives shall have intervened.")


def test_a_tenth_of_the_text_is_held_out(text):
    assert training_bytes(text) == 49_207
    assert b"Amendment XXV\n" in text[training_bytes(text) :]


def test_weights_are_finite_float16():
    arrays = decode_arrays(*pinned(WEIGHTS_FILE))
    assert {array.dtype for array in arrays.values()} == {np.dtype(np.float16)}
    assert sum(array.size for array in arrays.values()) == 137_664
    assert all(np.isfinite(array).all() for array in arrays.values())


def test_samples_are_cut_from_the_text_within_their_limits(text, drawn):
    assert len(drawn.prompts) == len(drawn.output_lengths) == len(drawn.starts) == SAMPLES == 1024
    lengths = [len(prompt) for prompt in drawn.prompts]
    assert (min(lengths), max(lengths)) == (16, 64)
    assert (drawn.output_lengths.min(), drawn.output_lengths.max()) == (8, 128)
    for prompt, start in zip(drawn.prompts, drawn.starts, strict=True):
        assert text[start : start + len(prompt)] == prompt
    assert SLOT_LENGTH == 192
    assert drawn.output_lengths.dtype == np.int64


def test_samples_are_the_same_everywhere(drawn):
    whole = b"".join(drawn.prompts) + drawn.output_lengths.tobytes()
    assert sha256(whole) == "3dba68cc3aab2d0416c6568e6196d0c4b34cc6f88a375a4e86e63c5234973ee7"


def test_output_lengths_are_uniform(drawn):
    # 121 values, 8.5 of each expected; chi-square with 120 degrees of freedom is below 170 in all
    # but 1 of 600 draws, and this draw is fixed.
    counts = np.bincount(drawn.output_lengths, minlength=129)[8:]
    expected = SAMPLES / 121
    assert ((counts - expected) ** 2 / expected).sum() < 170


def test_expected_tokens_belong_to_held_out_prompts(text, drawn):
    expected = read_expected(drawn)
    assert len(expected.held_out) >= 50
    assert np.all(np.diff(expected.held_out) > 0)
    assert np.all(drawn.starts[expected.held_out] >= training_bytes(text))
    assert sorted(expected.tokens) == expected.held_out.tolist()
    for index, tokens in expected.tokens.items():
        assert (tokens.dtype, len(tokens)) == (np.uint8, drawn.output_lengths[index])
        assert tokens.max() < VOCABULARY


def test_the_payload_of_a_sample_is_its_prompt(drawn):
    assert samples([5, 1023, 5]) == [drawn.prompts[5], drawn.prompts[1023], drawn.prompts[5]]


@pytest.mark.parametrize("name", [TEXT_FILE, WEIGHTS_FILE, EXPECTED_FILE])
def test_a_changed_byte_is_refused_with_file_both_digests_and_remedy(tmp_path, name):
    content = bytearray((FOLDER / name).read_bytes())
    content[len(content) // 2] ^= 1
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UsageError) as caught:
        pinned(name, tmp_path)
    for part in (str(path), SHA256[name], sha256_file(path), "reinstall distbench"):
        assert part in str(caught.value)


def test_samples_and_engine_are_had_without_torch():
    code = (
        "import sys; from distbench.models.tinylm_data import samples; samples([0]); "
        "import distbench.engines.slots; sys.exit('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False, timeout=60)
    assert done.returncode == 0
