"""Before a run: how many queries, how long, and what would be INVALID or UNDECIDED in any case.

    python -m distbench.plan --scenario server --target-qps 0.5 --rules mlperf-v5.0 --latency 10s
    python -m distbench.plan --scenario offline --target-qps 21000 --rules mlperf-v5.0
    python -m distbench.plan --shard pp,tp --link-rate 1Gbit/s --flops 1e10 --memory-rate 5GB/s

Nothing is measured and torch is not loaded. Exit status: 0, or 3 under --strict where the run as
planned could not be VALID.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from distbench.arrivals import LONGEST_S, NS, offline_samples, single_stream_queries
from distbench.cli import (
    Option,
    one_of,
    parse,
    positive,
    positive_duration_ns,
    positive_number,
    run_command,
)
from distbench.early_stopping import least_queries, over_allowed
from distbench.errors import EXIT_OK, EXIT_STRICT, UsageError
from distbench.gates import WORDING
from distbench.metrics import QUANTILES
from distbench.rounds import PERCENTILES
from distbench.rules import Limits, Rules, limits, parse_rules
from distbench.shard_plan import OPTIONS as SHARD_OPTIONS
from distbench.shard_plan import asked, shard_lines
from distbench.stats import least_samples

CONFIDENCE = 0.95
MOST = 1e15
"""Queries or samples: no window of MLPerf's length has more, and a double still counts them."""
ALL = tuple(QUANTILES.items())
SCENARIOS = ("offline", "server", "singlestream", "multistream")


@dataclass(frozen=True)
class Plan:
    """What a run would be.

    Attributes:
        queries: queries; of Offline, samples.
        wall_s: how long the window would last, without warm-up, s.
        budget: queries that may be over the latency limit under early stopping; None: without it.
        lines: the whole plan as text.
        problems: why the run could not be VALID or decided, each with its remedy.
    """

    queries: int
    wall_s: float
    budget: int | None
    lines: tuple[str, ...]
    problems: tuple[str, ...]


def plan(
    scenario: str,
    rate_qps: float,
    rules: Rules,
    *,
    model: str = "",
    duration_ns: int | None = None,
    queries: int | None = None,
    latency_ns: int | None = None,
) -> Plan:
    """Plan one window.

    Args:
        scenario: one of ``SCENARIOS``.
        rate_qps: Server: target rate; Offline: expected samples/s of all ranks; streams: expected
            queries/s of the closed loop, which is 1 / latency.
        rules: of a round, or none.
        model: of the round; "" for another.
        duration_ns: least duration asked for; by default the round's, or 5 s.
        queries: exactly so many instead; of Offline, samples.
        latency_ns: Server's limit where the round does not know the model.

    Raises:
        UsageError: the round has no such model or limit, or no window could be so large.
    """
    judged = None
    if rules.round is not None:
        judged = limits(rules, scenario, model, latency_ns=latency_ns, option="--latency")
    asked_ns = duration_ns or (judged.min_duration_ns if judged else 5_000_000_000)
    if asked_ns / NS * rate_qps > MOST:
        raise UsageError(
            f"{rate_qps:g}/s for {_duration(asked_ns / NS)} are more than anything could issue: "
            "give as --target-qps the rate of a short run"
        )
    least = judged.min_queries if judged else 1
    n = queries or _queries(scenario, rate_qps, asked_ns, least, _multiple(rules, model))
    wall_s = n / rate_qps
    if wall_s > LONGEST_S:
        raise UsageError(
            f"{n:,} {_unit(scenario)} at {rate_qps:g}/s would take more than three years: give as "
            "--target-qps the rate of a short run"
        )
    lines = [f"{_unit(scenario).ljust(17)}{n:,} in {_duration(wall_s)}"]
    problems: list[str] = []
    budget = None
    if judged is not None:
        problems += _under_rules(scenario, n, wall_s, rate_qps, judged)
        if scenario != "offline":
            budget = over_allowed(n, judged.percentile)
            lines.append(_budget(scenario, n, judged, budget))
    if scenario != "offline":  # whose latencies are places in one queue
        lines += _intervals(n)
    if scenario == "server":
        limit_ns = latency_ns if judged is None else judged.latency_ns
        problems += _undecided(n, rate_qps, limit_ns)
    return Plan(n, wall_s, budget, tuple(lines), tuple(problems))


def _unit(scenario: str) -> str:
    return "samples" if scenario == "offline" else "queries"


def _intervals(n: int) -> list[str]:
    few = [label for label, q in ALL if n < least_samples(q, CONFIDENCE)]
    return [
        "intervals        "
        + ", ".join(f"{label} from {least_samples(q, CONFIDENCE):,}" for label, q in ALL)
        + " independent queries",
        *[f"                 not resolvable with {n:,}: {', '.join(few)}"] * bool(few),
    ]


def _undecided(n: int, rate_qps: float, limit_ns: int | None) -> list[str]:
    """Return that the judged percentile, Server's p99, would have no interval to hold to it."""
    least = least_samples(PERCENTILES["server"], CONFIDENCE)
    if limit_ns is None or n >= least:
        return []
    return [
        f"UNDECIDED by construction: the interval of p99, which the limit judges, needs {least:,} "
        f"independent queries, and {n:,} are planned: give --num-queries {least} or more, which "
        f"takes {_duration(least / rate_qps)}"
    ]


def _queries(scenario: str, rate_qps: float, duration_ns: int, least: int, multiple: int) -> int:
    """Return how many queries LoadGen would issue; of Server's random schedule the mean."""
    if scenario == "offline":
        return offline_samples(least, duration_ns, rate_qps, multiple)
    if scenario == "singlestream" and multiple > 1:
        expected_ns = max(1, round(NS / rate_qps))
        return single_stream_queries(least, duration_ns, expected_ns, multiple)
    n = max(least, math.ceil(duration_ns / 1e9 * rate_qps))
    return n + -n % multiple


def _multiple(rules: Rules, model: str) -> int:
    """Return what the number of queries is padded to: the data, where all count equally often."""
    if rules.round is None or not model:
        return 1
    known = rules.round.model(model)
    return (known.performance_samples or known.offline_samples) if known.equal_issue else 1


def _under_rules(
    scenario: str, n: int, wall_s: float, rate_qps: float, judged: Limits
) -> list[str]:
    """Return what the gates would refuse whatever the latencies are."""
    found = []
    shown = _unit(scenario)
    if n < judged.min_queries:
        found.append(
            f"INVALID by construction: {n:,} {shown}, and the rules ask for {judged.min_queries:,}"
        )
    if wall_s < judged.min_duration_ns / 1e9:
        found.append(
            f"INVALID by construction: {_duration(wall_s)}, and the rules ask for "
            f"{_duration(judged.min_duration_ns / 1e9)}: plan "
            f"{math.ceil(judged.min_duration_ns / 1e9 * rate_qps):,} {shown} or more"
        )
    if judged.shortened:
        found.append("a shortened run is never VALID under the rules: it serves to try things out")
    if scenario == "offline":
        return found
    over = 0 if scenario == "server" else 1
    least = least_queries(judged.percentile, over)
    if n < least:
        found.append(
            f"INVALID by construction: early stopping at p{100 * judged.percentile:g} needs "
            f"{least:,} queries at the least, and {n:,} are planned: give --num-queries {least}, "
            f"which takes {_duration(least / rate_qps)} at {rate_qps:g} queries/s"
        )
    return found


def _budget(scenario: str, n: int, judged: Limits, budget: int | None) -> str:
    label = f"p{100 * judged.percentile:g}"
    if scenario != "server":  # no limit: early stopping estimates the percentile
        if not budget:
            return f"early stopping   {n:,} queries are too few for an estimate of {label}"
        return (
            f"early stopping   its estimate of {label} leaves out the {budget - 1:,} longest of "
            f"{n:,} latencies, and is the longest of the others"
        )
    if budget is None:
        return f"early stopping   {n:,} queries are too few for {label}, even if none is over"
    plain = n - 1 - int(n * judged.percentile)
    return (
        f"early stopping   {budget:,} of {n:,} may be over the limit; {label} alone would allow "
        f"{plain:,}"
    )


def _duration(seconds: float) -> str:
    """Format a duration.

    >>> _duration(2.5), _duration(918.0), _duration(26736.0)
    ('2.5 s', '918 s (15.3 min)', '26,736 s (7.43 h)')
    """
    if seconds < 120:
        return f"{seconds:.4g} s"
    more = f"{seconds / 60:.3g} min" if seconds < 7200 else f"{seconds / 3600:.3g} h"
    return f"{seconds:,.0f} s ({more})"


OPTIONS = (
    Option("scenario", "offline", one_of(*SCENARIOS), "what to plan", "|".join(SCENARIOS)),
    Option("target-qps", None, positive_number, "expected samples/s or queries/s", "Q"),
    Option("rules", "none", parse_rules, "none, mlperf-v5.0 or mlperf-v5.1[,shortened=5s]", "R"),
    Option(
        "model",
        "",
        str,
        "the round's name of a model, for its limits; with --shard a token model",
        "NAME",
    ),
    Option("latency", None, positive_duration_ns, "Server's limit for another model", "TIME"),
    Option("duration", None, positive_duration_ns, "instead of the rules' minimum", "TIME"),
    Option("num-queries", None, positive, "exactly so many, in place of a duration", "N"),
    Option("num-samples", None, positive, "the same of Offline, which counts samples", "N"),
    Option("strict", None, None, "exit 3 where the run could not be VALID"),
    *SHARD_OPTIONS,
)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UsageError: an option cannot be used as asked.
    """
    given = parse("distbench.plan", __doc__ or "", OPTIONS, argv)
    v = given.values
    if v["shard"] is not None:
        sys.stdout.write("\n".join(["PLAN  layouts of one model", *shard_lines(v)]) + "\n")
        return EXIT_OK
    if lost := asked(v, given.origins):
        raise UsageError(f"--{lost[0].replace('_', '-')} is of --shard: give that as well")
    if v["target_qps"] is None:
        raise UsageError("--target-qps is needed: the rate you expect, from a short run")
    own, other = "num_queries", "num_samples"
    if v["scenario"] == "offline":
        own, other = other, own
    if v[other] is not None:
        names = [f"--{name.replace('_', '-')}" for name in (other, own)]
        raise UsageError(f"{names[0]}: {v['scenario']} counts {own[4:]}, give {names[1]}")
    made = plan(
        v["scenario"],
        v["target_qps"],
        v["rules"],
        model=v["model"],
        duration_ns=v["duration"],
        queries=v[own],
        latency_ns=v["latency"],
    )
    name = v["rules"].name
    kind = f"rules {name} ({WORDING})" if name != "none" else "no rules"
    sys.stdout.write(f"PLAN  {v['scenario']} at {v['target_qps']:g}/s, {kind}\n")
    sys.stdout.write("\n".join([*made.lines, *(made.problems or ["nothing stands in its way"])]))
    sys.stdout.write("\n")
    return EXIT_STRICT if v["strict"] and made.problems else EXIT_OK


if __name__ == "__main__":
    run_command(main)
