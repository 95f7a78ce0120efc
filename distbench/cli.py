"""Command lines: options, where each value came from, and exit statuses. Imports no torch."""

from __future__ import annotations

import argparse
import difflib
import math
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from distbench.errors import (
    EXIT_CRASH,
    EXIT_INTERRUPTED,
    EXIT_OK,
    DistbenchError,
    ModelError,
    UsageError,
)

UNITS_NS = {"ns": 1, "us": 10**3, "ms": 10**6, "s": 10**9, "m": 60 * 10**9, "h": 3600 * 10**9}


def duration_ns(text: str) -> int:
    """Read a duration with its unit, such as "60s", "2ms" or "1.5m"; returns ns.

    Raises:
        UsageError: no unit, no number, or negative.

    Example:
        >>> duration_ns("1.5ms")
        1500000
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([a-z]*)", text.strip())
    if not match:
        raise UsageError(f"{text!r} is no duration: give a number with a unit, such as 60s")
    number, unit = match.groups()
    if unit not in UNITS_NS:
        had = f"has the unknown unit {unit!r}" if unit else "has no unit"
        raise UsageError(f"duration {text!r} {had}: write {number}s, {number}ms or {number}m")
    return round(float(number) * UNITS_NS[unit])


def positive_duration_ns(text: str) -> int:
    """Read a duration above zero; returns ns.

    Raises:
        UsageError: as ``duration_ns``, or zero.
    """
    value = duration_ns(text)
    if value <= 0:
        raise UsageError(f"duration {text!r} must be above zero")
    return value


def positive(text: str) -> int:
    """Read a whole number of at least 1.

    Raises:
        UsageError: it is not.
    """
    if not re.fullmatch(r"\d+", text.strip()) or int(text) < 1:
        raise UsageError(f"{text!r} is not a whole number of at least 1")
    return int(text)


def positive_number(text: str) -> float:
    """Read a plain number above zero, such as a rate.

    Raises:
        UsageError: it is not.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise UsageError(f"{text!r} is not a number above 0")
    return value


def whole(text: str) -> int:
    """Read a whole number of at least 0.

    Raises:
        UsageError: it is not.
    """
    if not re.fullmatch(r"\d+", text.strip()):
        raise UsageError(f"{text!r} is not a whole number of at least 0")
    return int(text)


def percent(text: str) -> float:
    """Read a share such as "1%"; returns it as a fraction.

    Raises:
        UsageError: no number with a per cent sign, or not between 0 and 100.

    Example:
        >>> percent("0.5%")
        0.005
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*%", text.strip())
    if not match or not 0 < float(match.group(1)) < 100:
        raise UsageError(f"{text!r} is no share: give a number of per cent, such as 1%")
    return float(match.group(1)) / 100


def one_of(*words: str) -> Callable[[str], str]:
    """Return a reader that takes one of these words; it raises UsageError for any other."""

    def read(text: str) -> str:
        if text not in words:
            raise UsageError(f"{text!r} is not one of {', '.join(words)}{nearest(text, words)}")
        return text

    return read


def nearest(wrong: str, names: Sequence[str]) -> str:
    """Return "; did you mean X?" for the nearest name, "" when none is near."""
    close = difflib.get_close_matches(wrong, names, n=1, cutoff=0.5)
    return f"; did you mean {close[0]}?" if close else ""


@dataclass(frozen=True)
class Option:
    """One option of a command.

    Attributes:
        name: with dashes, without the leading two.
        default: as text, or None where there is none.
        read: text to value; None for a switch.
        help: one line.
        metavar: what stands for the value in the help.
    """

    name: str
    default: str | None
    read: Callable[[str], Any] | None
    help: str
    metavar: str = "X"


@dataclass(frozen=True)
class Values:
    """The options of one run of a command.

    Attributes:
        values: read values by name with underscores.
        texts: as they were written, or the default.
        origins: "command line" or "default".
    """

    values: dict[str, Any]
    texts: dict[str, str | None]
    origins: dict[str, str]

    def config(self) -> dict[str, dict[str, Any]]:
        """Return the ``config`` section of result.json."""
        return {
            name: {"value": self.texts[name], "origin": self.origins[name]} for name in self.values
        }


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        names = [s for action in self._actions for s in action.option_strings]
        unknown = re.search(r"unrecognized arguments: (\S+)", message)
        hint = nearest(unknown.group(1).split("=")[0], names) if unknown else ""
        raise UsageError(f"{message}{hint}; `python -m {self.prog} --help` lists all options")


def parse(module: str, purpose: str, options: Sequence[Option], argv: Sequence[str]) -> Values:
    """Read a command line.

    Args:
        module: such as "distbench.offline".
        purpose: what stands above the options in the help.
        options: of the command.
        argv: without the program's name; ``_`` and ``-`` in option names are alike.

    Raises:
        UsageError: an unknown option (the nearest is named) or an unusable value.
        SystemExit: after --help.
    """
    parser = _Parser(
        prog=module,
        description=purpose,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for option in options:
        if option.read is None:
            text = option.help.replace("%", "%%")  # which argparse would take for its own
            parser.add_argument(f"--{option.name}", action="store_true", help=text)
        else:
            shown = f" (default: {option.default})" if option.default else ""
            text = (option.help + shown).replace("%", "%%")
            parser.add_argument(f"--{option.name}", metavar=option.metavar, help=text)
    given = vars(parser.parse_args([_dashed(word) for word in argv]))
    values: dict[str, Any] = {}
    texts: dict[str, str | None] = {}
    origins: dict[str, str] = {}
    for option in options:
        key = option.name.replace("-", "_")
        text = given[key]
        if option.read is None:
            values[key], texts[key] = bool(text), "yes" if text else "no"
            origins[key] = "command line" if text else "default"
            continue
        origins[key] = "default" if text is None else "command line"
        texts[key] = option.default if text is None else text
        try:
            values[key] = None if texts[key] is None else option.read(texts[key] or "")
        except UsageError as error:
            raise UsageError(f"--{option.name}: {error}") from None
    return Values(values, texts, origins)


def _dashed(word: str) -> str:
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return name.replace("_", "-") + equals + value


def read_words(text: str) -> tuple[str, ...]:
    """Read words separated by commas."""
    return tuple(word.strip() for word in text.split(",") if word.strip())


def positionals(
    argv: Sequence[str], options: Sequence[Option]
) -> tuple[list[str], list[list[str]]]:
    """Take the words that belong to no option out of a command line.

    Args:
        argv: without the program's name.
        options: of the command, to know which take a value.

    Returns:
        What is left, for ``cli.parse``, and the words in lists, split at each ``--``.
    """
    valued = {f"--{option.name}" for option in options if option.read is not None}
    rest: list[str] = []
    lists: list[list[str]] = [[]]
    words = iter(argv)
    for word in words:
        if word == "--":
            lists.append([])
        elif word.startswith("-"):
            rest.append(word)
            if word.replace("_", "-") in valued:
                rest += [value for value in [next(words, None)] if value is not None]
        else:
            lists[-1].append(word)
    return rest, lists


def command_line(module: str, argv: Sequence[str]) -> str:
    """Return the command as it can be typed again, with torchrun where torchrun started it."""
    nodes, local = os.environ.get("GROUP_WORLD_SIZE"), os.environ.get("LOCAL_WORLD_SIZE")
    started = ["python"]
    if nodes and local:
        started = ["torchrun", "--nnodes", nodes, "--nproc-per-node", local]
    return shlex.join([*started, "-m", module, *argv])


def run_command(
    main: Callable[[Sequence[str]], int],
    record_error: Callable[[BaseException], None] = lambda _error: None,
) -> NoReturn:
    """Run a command and end the process with its exit status.

    A sentence goes to stderr for every error raised on purpose; a traceback only where there is a
    cause that the user wrote (a model factory) or distbench did not foresee.

    Args:
        main: takes argv, returns the exit status.
        record_error: hands an error to torch elastic, for torchrun's Root Cause block.
    """
    try:
        status = main(sys.argv[1:])
        sys.stdout.flush()
    except DistbenchError as error:
        if isinstance(error, ModelError) and error.__cause__ is not None:
            traceback.print_exception(error.__cause__)
        sys.stderr.write(f"distbench: {error}\n")
        record_error(error)
        status = error.exit_code
    except KeyboardInterrupt:
        sys.stderr.write("distbench: interrupted\n")
        status = EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader went away. What is still buffered has nowhere to go either, at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = EXIT_OK
    except Exception as error:
        traceback.print_exc()
        record_error(error)
        status = EXIT_CRASH
    sys.stderr.flush()
    sys.exit(status)
