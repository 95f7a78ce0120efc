"""What the commands of all scenarios share: options, settings, model, report, exit status."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, NoReturn

from distbench.cli import (
    Option,
    Values,
    command_line,
    duration_ns,
    one_of,
    parse,
    percent,
    positive,
    positive_duration_ns,
    run_command,
    whole,
)
from distbench.errors import EXIT_INCOMPLETE, EXIT_OK, EXIT_STRICT, UsageError
from distbench.models import DTYPES, check_model, load_model
from distbench.rules import parse_rules
from distbench.settings import Settings
from distbench.sut import adapted

if TYPE_CHECKING:
    from distbench.run import Run
    from distbench.sut import SystemUnderTest
    from distbench.windows import Windows
    from distbench.world import World

    Measure = Callable[[SystemUnderTest, World, Settings], Run | Windows]


def _rules(text: str) -> str:
    parse_rules(text)
    return text


COMMON_OPTIONS = (
    Option("model", "digits", check_model, "NAME[,key=value...] or MODULE:FACTORY", "MODEL"),
    Option(
        "dtype",
        None,
        one_of(*DTYPES),
        "what an embedded model computes in (default: fp32)",
        "|".join(DTYPES),
    ),
    Option(
        "device",
        "auto",
        one_of("auto", "cpu", "cuda"),
        "what each rank computes on",
        "auto|cpu|cuda",
    ),
    Option(
        "backend", "auto", one_of("auto", "nccl", "gloo"), "of the data group", "auto|nccl|gloo"
    ),
    Option("batch-size", "32", positive, "samples a group", "N"),
    Option("duration", "5s", positive_duration_ns, "about how long to measure", "TIME"),
    Option("num-samples", None, positive, "samples of all ranks, in place of a duration", "N"),
    Option("warmup", "1s", duration_ns, "warm up for at least so long", "TIME"),
    Option("rules", "none", _rules, "none, mlperf-v5.0 or mlperf-v5.1[,shortened=5s]", "ROUND"),
    Option("seed", "0", whole, "of sample order and kept outputs", "N"),
    Option(
        "shares",
        "even",
        one_of("even", "rate"),
        "of samples to ranks, by warm-up rate",
        "even|rate",
    ),
    Option(
        "until",
        None,
        percent,
        "repeat windows until throughput is known to within this",
        "PERCENT",
    ),
    Option(
        "samples",
        None,
        one_of("gather", "shard"),
        "all on rank 0, or each on its rank's disk (default: gather up to 10,000,000)",
        "gather|shard",
    ),
    Option(
        "timeout", None, positive_duration_ns, "a rank that stands still so long is lost", "TIME"
    ),
    Option("output-dir", "results", str, "where the result directory goes", "DIR"),
    Option("name", "", str, "replaces the scenario in the directory's name", "NAME"),
    Option("strict", None, None, "exit 3 unless the measurement is VALID"),
    Option("quiet", None, None, "no progress on stderr"),
)


FIELDS = {"duration": "duration_ns", "warmup": "warmup_ns", "timeout": "timeout_ns"}
"""Options whose settings have another name; that of the model is ``model_name``."""
NO_SETTINGS = ("model", "device", "backend", "strict")


def options_but(*names: str) -> tuple[Option, ...]:
    """Return the common options without those that a scenario does not have."""
    return tuple(option for option in COMMON_OPTIONS if option.name not in names)


def settings_from(module: str, values: Values, argv: Sequence[str], **more: Any) -> Settings:
    """Turn a command line into settings; raises what ``Settings`` does.

    Args:
        module: such as "distbench.offline".
        values: of ``COMMON_OPTIONS``, or of a part of them; others are the scenario's to read.
        argv: as it was given.
        more: settings that the scenario read of its own options.
    """
    common = {option.name.replace("-", "_") for option in COMMON_OPTIONS} - set(NO_SETTINGS)
    read = {name: value for name, value in values.values.items() if name in common}
    for name in ("samples", "dtype"):
        read[name] = read.get(name) or ""
    own = {"model_name": values.values["model"]}
    own |= {FIELDS.get(name, name): value for name, value in read.items()} | more
    return Settings(config=values.config(), command=command_line(module, argv), **own)


def measure_joined(
    measure: Measure, sut: Any, world: World | None, settings: Settings
) -> Run | Windows:
    """Take windows of a system under test or a plain function, joining where there is no world."""
    with ExitStack() as stack:
        if world is None:
            from distbench.world import join  # noqa: PLC0415  only the run itself needs torch

            world = stack.enter_context(join())
        return measure(adapted(sut), world, settings)


def run_scenario(
    module: str,
    purpose: str,
    options: Sequence[Option],
    argv: Sequence[str],
    measure: Callable[[Any, World, Settings], Run | Windows],
    more: Callable[[Values], dict[str, Any]] = lambda _values: {},
    build: Callable[[Settings, World], Any] | None = None,
) -> int:
    """Run a scenario's command on this rank; returns the exit status.

    Args:
        module: such as "distbench.offline".
        purpose: what stands above the options in the help.
        options: of the command.
        argv: without the program's name.
        measure: takes the window; returns the run, on every rank.
        more: reads the scenario's own options into settings.
        build: makes what is measured; None: the system under test that --model names.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    values = parse(module, purpose, options, argv)
    settings = settings_from(module, values, argv, **more(values))
    from distbench.readiness import setup_limit_s  # noqa: PLC0415
    from distbench.record import watched  # noqa: PLC0415
    from distbench.world import join  # noqa: PLC0415  --help never imports torch

    with join(backend=values.values["backend"], device=values.values["device"]) as world:
        problem, sut = None, None
        try:
            with watched(world, setup_limit_s(settings)):
                sut = (build or _load)(settings, world)
        except UsageError as error:
            problem = error
        world.check("model", problem)
        assert sut is not None
        try:
            run = measure(sut, world, settings)
        finally:
            sut.close()
        return report_run(run, world.rank, values.values["strict"])


def report_run(run: Run | Windows, rank: int, strict: bool) -> int:
    """Print the report on rank 0; returns the exit status.

    Args:
        run: what was measured.
        rank: this one.
        strict: whether anything but VALID is a failure.
    """
    if rank != 0:
        return EXIT_OK
    verdict = run.result()["verdict"]["status"]
    sys.stdout.write(f"{run.report()}results  {run.folder}\n")
    sys.stdout.flush()
    if verdict == "INCOMPLETE":
        return EXIT_INCOMPLETE
    return EXIT_STRICT if strict and verdict != "VALID" else EXIT_OK


def _load(settings: Settings, world: World) -> SystemUnderTest:
    return load_model(settings.model_name, world, settings.group, settings.dtype)


def start_command(main: Callable[[Sequence[str]], int]) -> NoReturn:
    """Run a scenario's ``main`` and end the process; torchrun's summary shows an error's sentence.

    Args:
        main: takes argv, returns the exit status.
    """
    run_command(main, _record_error)


def _record_error(error: BaseException) -> None:
    from distbench.world import record_error  # noqa: PLC0415

    record_error(error)
