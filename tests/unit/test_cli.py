"""Command lines: what is read, what is refused in which words, and the exit statuses."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench import cli
from distbench.cli import Option, Values, duration_ns, one_of, parse, positive, whole
from distbench.errors import UsageError

ROOT = Path(__file__).parents[2]

OPTIONS = (
    Option("batch-size", "32", positive, "samples a group", "N"),
    Option("duration", "5s", duration_ns, "how long", "TIME"),
    Option("num-samples", None, positive, "samples of all ranks", "N"),
    Option("device", "auto", one_of("auto", "cpu", "cuda"), "auto, cpu or cuda"),
    Option("name", "", str, "a name", "NAME"),
    Option("strict", None, None, "exit 3 unless VALID"),
)


def read(*argv):
    return parse("distbench.offline", "What it does.", OPTIONS, argv)


# Values


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("60s", 60 * 10**9),
        ("2ms", 2_000_000),
        ("1.5ms", 1_500_000),
        ("1.5m", 90 * 10**9),
        ("2h", 7_200 * 10**9),
        ("7us", 7_000),
        ("0.5us", 500),
        ("3ns", 3),
        ("0s", 0),
        (" 1 s ", 10**9),
    ],
)
def test_durations(text, wanted):
    assert duration_ns(text) == wanted


@given(st.integers(0, 10**6), st.sampled_from(sorted(cli.UNITS_NS)))
def test_a_whole_number_of_any_unit_is_exact(number, unit):
    assert duration_ns(f"{number}{unit}") == number * cli.UNITS_NS[unit]


@given(st.integers(0, 2**53 - 1))
def test_a_duration_comes_back_from_its_nanoseconds(value):
    assert duration_ns(f"{value}ns") == value
    micros, rest = divmod(value, 1000)
    if value < 2**43:  # with its thousandths the text has at most the digits of a double
        assert duration_ns(f"{micros}.{rest:03d}us") == value


@given(st.text(max_size=8))
def test_any_text_is_a_duration_or_a_sentence_that_quotes_it(text):
    try:
        value = duration_ns(text)
    except UsageError as error:
        assert repr(text) in str(error)
    else:
        assert value >= 0


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("5", "duration '5' has no unit: write 5s, 5ms or 5m"),
        ("5 sec", "duration '5 sec' has the unknown unit 'sec': write 5s, 5ms or 5m"),
        ("-5s", "'-5s' is no duration: give a number with a unit, such as 60s"),
        ("5S", "'5S' is no duration"),
        ("s", "'s' is no duration"),
        ("", "'' is no duration"),
        ("1e3s", "'1e3s' is no duration"),
        (".5s", "'.5s' is no duration"),
        ("nan", "'nan' is no duration"),
    ],
)
def test_what_is_no_duration(text, sentence):
    with pytest.raises(UsageError) as caught:
        duration_ns(text)
    assert str(caught.value).startswith(sentence)


def test_a_positive_duration():
    assert cli.positive_duration_ns("1ns") == 1
    for text in ("0s", "0.0001ns"):
        with pytest.raises(UsageError, match=f"duration '{text}' must be above zero"):
            cli.positive_duration_ns(text)


@pytest.mark.parametrize("text", ["0", "-1", "1.5", "x", "", "1_000", "+3", "0x10"])
def test_what_is_not_positive(text):
    with pytest.raises(UsageError) as caught:
        positive(text)
    assert str(caught.value) == f"{text!r} is not a whole number of at least 1"


@pytest.mark.parametrize("text", ["-1", "1.5", "x", "", "1_000", "+3"])
def test_what_is_not_whole(text):
    with pytest.raises(UsageError, match="is not a whole number of at least 0"):
        whole(text)


def test_whole_numbers():
    assert (positive("1"), positive(" 12 "), whole("0"), whole("007")) == (1, 12, 0, 7)


def test_one_of_names_the_words_and_the_nearest():
    choice = one_of("auto", "cpu", "cuda")
    assert choice("cuda") == "cuda"
    with pytest.raises(UsageError) as caught:
        choice("cudo")
    assert str(caught.value) == "'cudo' is not one of auto, cpu, cuda; did you mean cuda?"
    with pytest.raises(UsageError) as caught:
        choice("tpu-v5")
    assert str(caught.value) == "'tpu-v5' is not one of auto, cpu, cuda"


# Options


def test_defaults_and_their_origin():
    values = read()
    assert values.values == {
        "batch_size": 32,
        "duration": 5 * 10**9,
        "num_samples": None,
        "device": "auto",
        "name": "",
        "strict": False,
    }
    assert set(values.origins.values()) == {"default"}
    assert values.config() == {
        "batch_size": {"value": "32", "origin": "default"},
        "duration": {"value": "5s", "origin": "default"},
        "num_samples": {"value": None, "origin": "default"},
        "device": {"value": "auto", "origin": "default"},
        "name": {"value": "", "origin": "default"},
        "strict": {"value": "no", "origin": "default"},
    }


@pytest.mark.parametrize(
    "argv",
    [
        ("--batch-size", "8", "--num-samples", "100", "--strict"),
        ("--batch_size", "8", "--num_samples", "100", "--strict"),
        ("--batch_size=8", "--num-samples=100", "--strict"),
    ],
)
def test_dashes_and_underscores_are_alike(argv):
    values = read(*argv)
    assert values.values["batch_size"] == 8
    assert values.values["num_samples"] == 100
    assert values.values["strict"] is True
    assert values.texts["strict"] == "yes"
    given_names = {name for name, origin in values.origins.items() if origin == "command line"}
    assert given_names == {"batch_size", "num_samples", "strict"}


def test_underscores_in_values_stay():
    assert read("--name", "my_run_1").values["name"] == "my_run_1"
    assert read("--name=--my_run").values["name"] == "--my_run"


def test_a_value_equal_to_the_default_was_still_given():
    values = read("--batch-size", "32")
    assert values.config()["batch_size"] == {"value": "32", "origin": "command line"}


def test_the_last_of_two_holds():
    assert read("--batch-size", "8", "--batch-size", "9").values["batch_size"] == 9


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("--batchsize", "--batch-size"),
        ("--bathc_size=4", "--batch-size"),
        ("--durations", "--duration"),
        ("--sample-num", "--num-samples"),
        ("--stric", "--strict"),
        ("--halp", "--help"),
    ],
)
def test_a_wrong_name_suggests_the_nearest(wrong, right):
    with pytest.raises(UsageError) as caught:
        read(wrong)
    told = str(caught.value)
    assert f"unrecognized arguments: {wrong.replace('_', '-')}" in told
    assert f"; did you mean {right}?; `python -m distbench.offline --help` lists" in told


def test_a_name_that_is_near_to_none_suggests_none():
    with pytest.raises(UsageError) as caught:
        read("--xyzzy-quux")
    assert "did you mean" not in str(caught.value)


def test_names_are_not_abbreviated():
    with pytest.raises(UsageError, match="unrecognized arguments: --dur"):
        read("--dur", "5s")


def test_a_stray_word_is_refused():
    with pytest.raises(UsageError, match="unrecognized arguments: results"):
        read("results")


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--batch-size", "0"), "--batch-size: '0' is not a whole number of at least 1"),
        (("--duration", "5"), "--duration: duration '5' has no unit"),
        (("--device", "gpu"), "--device: 'gpu' is not one of auto, cpu, cuda"),
        (("--duration",), "argument --duration: expected one argument"),
        (("--strict=yes",), "argument --strict: ignored explicit argument 'yes'"),
    ],
)
def test_an_unusable_value_is_told_with_its_option(argv, sentence):
    with pytest.raises(UsageError) as caught:
        read(*argv)
    assert str(caught.value).startswith(sentence)


def test_an_empty_value_is_read_as_one():
    with pytest.raises(UsageError, match=r"--batch-size: '' is not a whole number"):
        read("--batch-size", "")


def test_help_names_every_option_with_its_default_and_exits_0(capsys):
    with pytest.raises(SystemExit) as caught:
        read("--help")
    assert caught.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "What it does." in shown
    for option in OPTIONS:
        assert f"--{option.name}" in shown
        assert option.help in shown
    assert "--batch-size N samples a group (default: 32)" in shown
    assert "--num-samples N samples of all ranks --device" in shown  # no default to tell


def test_a_command_line_can_be_typed_again(monkeypatch):
    argv = ["--name", "two words", "--model", "m,key='x'"]
    for name in ("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    typed = cli.command_line("distbench.offline", argv)
    assert shlex.split(typed) == ["python", "-m", "distbench.offline", *argv]
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    typed = cli.command_line("distbench.offline", argv)
    start = "torchrun --nnodes 2 --nproc-per-node 4 -m distbench.offline"
    assert shlex.split(typed) == [*start.split(), *argv]


def test_config_is_made_of_what_was_written():
    values = Values({"a": 5}, {"a": "5ns"}, {"a": "command line"})
    assert values.config() == {"a": {"value": "5ns", "origin": "command line"}}


# Exit statuses


def run(body, *argv, stdout=subprocess.PIPE):
    """Run a program whose ``main(argv)`` has this body, and whose errors are recorded on stderr."""
    code = (
        "import sys\n"
        "from distbench.cli import run_command\n"
        "from distbench.errors import *\n"
        "def main(argv):\n"
        f"    {body}\n"
        "run_command(main, lambda error: sys.stderr.write(f'recorded {type(error).__name__}\\n'))\n"
    )
    quiet = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        cwd=ROOT,
        env=quiet,
        check=False,
    )


@pytest.mark.parametrize("status", [0, 3, 6])
def test_the_status_that_main_returns(status):
    done = run(f"print(*argv); return {status}", "--a", "b c")
    assert (done.returncode, done.stdout, done.stderr) == (status, "--a b c\n", "")


@pytest.mark.parametrize(
    ("error", "status"),
    [("DistbenchError", 1), ("UsageError", 2), ("IncompleteError", 6), ("ClockError", 1)],
)
def test_an_error_on_purpose_is_one_sentence(error, status):
    done = run(f"raise {error}('the disk of jw3 is full')")
    assert done.returncode == status
    assert done.stderr == f"distbench: the disk of jw3 is full\nrecorded {error}\n"


def test_a_status_that_an_error_brings_along():
    done = run("error = UsageError('told by rank 1'); error.exit_code = 6; raise error")
    assert (done.returncode, done.stderr.splitlines()[0]) == (6, "distbench: told by rank 1")


@pytest.mark.parametrize(
    ("kind", "cause", "traced"),
    [
        ("ModelError", "TypeError('theirs')", True),
        ("ModelError", "ValueError('theirs')", True),
        ("UsageError", "OSError(2, 'theirs')", False),
        ("UsageError", "RuntimeError('theirs')", False),
    ],
)
def test_a_cause_that_the_user_wrote_is_traced(kind, cause, traced):
    done = run(f"raise {kind}('the model failed') from {cause}")
    assert done.returncode == 2
    assert ("theirs" in done.stderr) is traced
    assert "distbench: the model failed\n" in done.stderr


def test_an_unforeseen_error_is_a_traceback_and_1():
    done = run("raise KeyError('a bug')")
    assert done.returncode == 1
    assert "Traceback (most recent call last)" in done.stderr
    assert "KeyError: 'a bug'" in done.stderr
    assert done.stderr.endswith("recorded KeyError\n")


def test_an_interrupt_is_130_without_a_traceback():
    done = run("raise KeyboardInterrupt")
    assert (done.returncode, done.stderr) == (130, "distbench: interrupted\n")


@pytest.mark.parametrize("size", [10, 1_000_000])
def test_a_reader_that_went_away_is_no_error(size):
    # The short text is still in a buffer when main returns, the long one breaks in main.
    read_end, write_end = os.pipe()
    os.close(read_end)
    try:
        done = run(f"sys.stdout.write('x' * {size}); return 0", stdout=write_end)
    finally:
        os.close(write_end)
    assert (done.returncode, done.stderr) == (0, "")
