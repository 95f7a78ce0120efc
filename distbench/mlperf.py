"""MLPerf Datacenter: MLCommons' LoadGen, unmodified, drives every rank as one system.

    python -m distbench.mlperf --scenario offline --rules mlperf-v5.0,shortened=5s
    torchrun --standalone --nproc-per-node 2 -m distbench.mlperf --scenario server --target-qps 100
    torchrun --standalone --nproc-per-node 2 -m distbench.mlperf --mode accuracy
    torchrun --standalone --nproc-per-node 2 -m distbench.mlperf --mode compliance --audit TEST01

LoadGen runs in the driver process and its own logs are the official word; every latency under it is
from there. A sample goes to the replica with the least outstanding; Offline's are dealt out in
pieces. What comes out is "MLPerf-style, unverified": a result of MLPerf is submitted and reviewed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from distbench import suite
from distbench.cli import Option, Values, duration_ns, one_of, positive, positive_number
from distbench.command import measure_joined, options_but, run_scenario, start_command
from distbench.compliance import AUDITS
from distbench.errors import UsageError
from distbench.load import PAYLOADS, Load
from distbench.models import check_model
from distbench.official import MODES, Official
from distbench.rules import parse_rules
from distbench.settings import Settings, script_settings
from distbench.sut import Indices, SystemUnderTest
from distbench.user_conf import SCENARIOS

if TYPE_CHECKING:
    from distbench.run import Run
    from distbench.windows import Windows
    from distbench.world import World

MAX_BATCH = {"offline": 32, "server": 1, "singlestream": 1, "multistream": 8}


def measure_mlperf(sut: SystemUnderTest, world: World, settings: Settings) -> Run | Windows:
    """Take one run of LoadGen's; all ranks call it.

    Args:
        sut: the system under test of this rank.
        world: all ranks.
        settings: with ``official`` and ``load``; alike on all ranks.

    Returns:
        The run, on every rank.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    from distbench.central import open_dispatch  # noqa: PLC0415  torch, which --help does without
    from distbench.courses import loadgen_course  # noqa: PLC0415
    from distbench.window import measure  # noqa: PLC0415

    assert settings.official is not None
    with open_dispatch(world, settings) as dispatch:
        course = loadgen_course(dispatch, settings.official.scenario)
        run = measure(course, sut, world, settings)
        if not dispatch.lost:
            dispatch.unload(sut, np.arange(sut.resident, dtype=np.int64))
        return run


def run_mlperf(
    sut: SystemUnderTest | Callable[[Indices], Sequence[Any]],
    world: World | None = None,
    *,
    scenario: str = "offline",
    mode: str = "performance",
    benchmark: str = "digits",
    rules: str = "mlperf-v5.0",
    target_qps: float | None = None,
    user_conf: str = "",
    audit: str = "",
    max_batch: int | None = None,
    max_wait_s: float = 0.0,
    warmup_s: float = 1.0,
    timeout_s: float | None = None,
    output_dir: str = "results",
    name: str = "",
    quiet: bool = True,
) -> Run | Windows:
    """Let LoadGen drive all ranks, and return the run.

    Args:
        sut: as of ``run_offline``; its outputs must be those that the benchmark's codec reads.
        world: from ``distbench.join``; without it this process joins on its own.
        scenario: "offline", "server", "singlestream" or "multistream".
        mode: "performance", "accuracy", or "compliance" with an audit.
        benchmark: of ``suite.BENCHMARKS``, whose limits, answers and score it has.
        rules: a round of MLPerf, such as "mlperf-v5.0,shortened=5s".
        target_qps: of Server and Offline, queries/s; None: user_conf's, or a default.
        user_conf: text of LoadGen's user.conf; "" for none.
        audit: of compliance mode: "TEST01", "TEST04" or "TEST06".
        max_batch: samples of a group at most; None: by scenario.
        max_wait_s: how long the oldest sample of a group waits for others at most, s.
        warmup_s: how long to warm up at least, s.
        timeout_s: how long a rank's count may stand still, s; None: by the slowest warm-up group.
        output_dir: where the result directory goes.
        name: replaces the scenario in the directory's name.
        quiet: no progress on stderr.

    Returns:
        The run, on every rank; ``.report()`` is the text.

    Raises:
        UsageError: something cannot be used as asked, on any rank; all ranks raise it.
        IncompleteError: the result could not be written.
    """
    official = Official(scenario, mode, benchmark, rules, target_qps, user_conf, audit=audit)
    load = Load(1.0, "poisson", "central", max_batch or _group(official), round(max_wait_s * 1e9))
    settings = script_settings(
        5.0, warmup_s, timeout_s, rules=rules, output_dir=output_dir, name=name, quiet=quiet,
        load=load, official=official, model_name=official.benchmark.model,
    )  # fmt: skip
    return measure_joined(measure_mlperf, sut, world, settings)


def _benchmark(name: str) -> str:
    return suite.benchmark(name).name


def _round(text: str) -> str:
    parse_rules(text)
    return text


OPTIONS = (
    Option("scenario", "offline", one_of(*SCENARIOS), "LoadGen's scenario", "|".join(SCENARIOS)),
    Option("mode", "performance", one_of(*MODES), "LoadGen's mode", "|".join(MODES)),
    Option("audit", None, one_of(*AUDITS), "MLCommons' test of compliance mode", "|".join(AUDITS)),
    Option("benchmark", "digits", _benchmark, ", ".join(suite.BENCHMARKS), "NAME"),
    Option("model", None, check_model, "in place of the benchmark's own", "MODEL"),
    Option(
        "rules", "mlperf-v5.0", _round,
        "mlperf-v5.0 or mlperf-v5.1[,shortened=5s][,interactive]", "ROUND",
    ),
    Option(
        "target-qps", None, positive_number,
        "of Server (default: 200) and Offline (default: 1.1 times the warm-up's)", "Q",
    ),
    Option("user-conf", None, str, "LoadGen's user.conf", "FILE"),
    Option("max-batch", None, positive, "samples of a group at most", "N"),
    Option("max-wait", "0s", duration_ns, "the oldest sample waits for others so long", "TIME"),
    Option("payload", "index", one_of(*PAYLOADS), "what the driver sends", "index|data"),
    Option("driver", "", str, "one started by hand, on any host with LoadGen", "ADDR:PORT"),
    Option("driver-token", "", str, "the file of its token, on rank 0's host", "FILE"),
)  # fmt: skip


def read_official(values: Values) -> dict[str, Any]:
    """Read the options of an official run.

    Raises:
        UsageError: they do not go together, or user.conf has a line that LoadGen does not know.
    """
    v = values.values
    official = Official(
        v["scenario"],
        v["mode"],
        v["benchmark"],
        v["rules"],
        v["target_qps"],
        _text_of(v["user_conf"]),
        v["user_conf"] or "user.conf",
        v["audit"] or "",
    )
    load = Load(
        official.target_qps or 1.0,
        dispatch="central",
        max_batch=v["max_batch"] or _group(official),
        max_wait_ns=v["max_wait"],
        payload=v["payload"],
        driver=v["driver"],
        driver_token=v["driver_token"],
    )
    return {
        "load": load,
        "official": official,
        "model_name": v["model"] or official.benchmark.model,
    }


def _group(official: Official) -> int:
    """Return how many samples a group has at most, where nobody says: texts are issued alone."""
    return 1 if official.benchmark.tokens else MAX_BATCH[official.scenario]


def _text_of(path: str | None) -> str:
    if path is None:
        return ""
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UsageError(f"user.conf {path} cannot be read: {error} (--user-conf)") from error


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        DistbenchError: anything that a sentence can tell.
    """
    left_out = ("model", "batch-size", "duration", "num-samples", "rules", "shares", "until")
    options = (*OPTIONS, *options_but(*left_out, "samples"))
    purpose = __doc__ or ""
    return run_scenario("distbench.mlperf", purpose, options, argv, measure_mlperf, read_official)


if __name__ == "__main__":
    start_command(main)
