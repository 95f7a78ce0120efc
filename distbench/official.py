"""What an official run asks of LoadGen, settled before it starts: conf, counts, what is expected.

LoadGen gets its own mlperf.conf and one user.conf: the user's, followed by the lines that
``--target-qps``, a shortened run, and a benchmark outside MLPerf's list need. From both follow how
many samples LoadGen will issue, which is what the logs are made for, and whether it can last.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from distbench.arrivals import offline_samples, poisson_ns
from distbench.compliance import AUDITS, check_audit
from distbench.errors import UsageError, agreed
from distbench.rounds import MS, OFFLINE_LIMIT, SAMPLES_PER_QUERY, Model, Round, Tokens
from distbench.rules import Limits, Rules, limits, parse_rules
from distbench.suite import BENCHMARKS, Benchmark, benchmark
from distbench.user_conf import SCENARIOS, Conf, look_up, parse_conf

MODES = {
    "performance": "PerformanceOnly",
    "accuracy": "AccuracyOnly",
    "compliance": "PerformanceOnly",
}
"""LoadGen's names of the modes."""
DEFAULT_QPS = 200.0
"""Of Server, where neither the command nor user.conf gives a rate."""
STREAM_LATENCY_NS = {"singlestream": 10 * MS, "multistream": 80 * MS}
"""LoadGen's own expected latencies (loadgen/test_settings.h)."""
CEILING_QPS = 1.0e6
"""LoadGen from Python completes no more, whatever the system does (0.7 to 1.2 million samples/s of
one that does nothing, on an AMD EPYC, 2026-11-26: ``benchmarks/mlperf.py``)."""
EXPECTED_SHARE = 0.5
"""An expected latency that is too long lets LoadGen run out of queries, one too short costs it
memory: half of what the warm-up took is asked for."""
ROUND_TRIP_S = 40e-6
"""A query's way to a replica and back takes no less (38 to 41 us measured over TCP on loopback)."""
STREAM_PLANNED = 2.2
"""LoadGen makes queries for twice the duration at the expected latency, and no more."""
STREAM_SPARE = 1024
LONGEST, LONGEST_SPARE_S = 4.0, 60.0
"""A Server run that would last so many times its schedule, and so much longer, is refused."""
FREE = {
    "offline": ("target_qps",),
    "server": ("target_qps",),
    "singlestream": ("target_latency",),
    "multistream": ("target_latency",),
}
"""Keys that a submitter chooses; R, and the comments of mlperf.conf."""
HIGHER = ("min_duration", "min_query_count", "performance_sample_count_override")
"""Keys that a submitter may set higher than mlperf.conf has them, C."""


Value = Callable[[str, float], float]
"""What a user.conf says of a key, or else."""


@dataclass(frozen=True)
class Official:
    """What was asked for.

    Attributes:
        scenario: distbench's name of it.
        mode: "performance", "accuracy" or "compliance".
        name: of the benchmark.
        rules: such as "mlperf-v5.0,shortened=5s".
        target_qps: of Server and Offline; None: user.conf's, or a default.
        user_conf: text of the user's file; "" without one.
        conf_path: of that file.
        audit: of compliance mode, one of ``compliance.AUDITS``.

    Raises:
        UsageError: the benchmark, the rules or a line of user.conf is unknown.
    """

    scenario: str
    mode: str = "performance"
    name: str = "digits"
    rules: str = "mlperf-v5.0"
    target_qps: float | None = None
    user_conf: str = ""
    conf_path: str = "user.conf"
    audit: str = ""

    def __post_init__(self) -> None:
        bench, conf = self.benchmark, self.conf
        if self.round is None:
            raise UsageError(
                "an official run is one of a round, whose LoadGen and seeds it uses: give --rules "
                "mlperf-v5.0 or another"
            )
        if self.mode == "accuracy" and bench.target is None:
            raise UsageError(f"{bench.name} has no accuracy mode: {bench.why_unscored}")
        has_tokens = bool(self.tokens or bench.tokens)
        check_audit(self.mode, self.audit, self.name, has_tokens, bench.why_unscored)
        self._limits(OFFLINE_LIMIT)  # of a model whose size is not known yet
        if self.target_qps is None:
            return
        if self.scenario in STREAM_LATENCY_NS:
            raise UsageError(
                f"{SCENARIOS[self.scenario]} has no rate: leave out --target-qps, or give another "
                "--scenario"
            )
        if look_up(conf, self.config, self.scenario, "target_qps") is not None:
            raise UsageError(
                f"--target-qps {self.target_qps:g} and {self.conf_path} both give a rate: leave "
                "one out"
            )

    @property
    def benchmark(self) -> Benchmark:
        """The benchmark."""
        return benchmark(self.name)

    @property
    def held_to(self) -> Rules:
        """The rules."""
        return parse_rules(self.rules)

    @property
    def round(self) -> Round | None:
        """The round; None with "none"."""
        return self.held_to.round

    @property
    def listed(self) -> Model | None:
        """The benchmark in the round's list; None where it has none of this name."""
        assert self.round is not None
        return next((each for each in self.round.models if each.name == self.name), None)

    @property
    def config(self) -> str:
        """The model's name as LoadGen is told it."""
        return f"{self.name}-interactive" if self.held_to.interactive else self.name

    @property
    def conf(self) -> Conf:
        """What the user's file says."""
        known = [each.name for each in self.round.models] if self.round else []
        names = list(dict.fromkeys([*BENCHMARKS, *known]))
        names += [f"{each}-interactive" for each in names]
        return parse_conf(self.user_conf, names, self.conf_path)

    @property
    def tokens(self) -> Tokens | None:
        """Server's limits on tokens; None for a model that has none."""
        bench, listed, fast = self.benchmark, self.listed, self.held_to.interactive
        if listed:
            return listed.interactive if fast else listed.server_tokens
        return bench.interactive if fast else bench.tokens

    def _limits(self, total: int) -> Limits:
        listed, bench = self.listed, self.benchmark
        if self.held_to.interactive and self.tokens is None:
            raise UsageError(f"{self.name} has no interactive variant: leave `interactive` out")
        return limits(
            self.held_to,
            self.scenario,
            listed.name if listed else "",
            interactive=bool(listed) and self.held_to.interactive,
            dataset_size=total,
            latency_ns=bench.latency_ns,
            tokens=self.tokens,
        )


def settled(
    asked: Official, total: int, resident: int, rates: Sequence[float], depth: int = 1
) -> dict[str, Any]:
    """Return what the driver is told of a run, JSON-able.

    Args:
        asked: what was asked for.
        total: samples of the model.
        resident: how many of these fit in memory at once.
        rates: of all replicas' warm-ups, samples/s.
        depth: groups that a replica had in flight then: a stream has one query at a time.

    Returns:
        ``conf``: text of user.conf. ``capacity``: samples that LoadGen will issue at most.
        ``target_qps`` and ``min_duration_ns`` as LoadGen will have them. ``edited``: keys of the
        user's file that the rules do not leave to a submitter.

    Raises:
        UsageError: LoadGen would end before the minimum duration. All ranks raise it alike.
    """
    limit = asked._limits(total)
    lines = _own_lines(asked, limit, rates)
    named = {line.partition(" =")[0]: float(line.split()[-1]) for line in lines}
    value = partial(_look_up, {**asked.conf, **named}, asked)
    listed = asked.listed
    chosen = listed.performance_samples if listed and listed.performance_samples else resident
    loaded = min(int(value("performance_sample_count_override", chosen)) or resident, total)
    plan = _described(asked, limit, lines, total, loaded, chosen, value)
    equal = bool(value("sample_concatenate_permutation", bool(listed and listed.equal_issue)))
    multiple = loaded if equal else 1
    if asked.scenario in STREAM_LATENCY_NS:
        plan |= _stream_counts(asked, value, limit, multiple, rates, depth)
    else:
        plan |= _rated_counts(asked, value, limit, multiple, min(sum(rates), CEILING_QPS))
    if asked.mode == "accuracy":
        plan["capacity"] = _accuracy_count(asked, total, loaded)
    return plan


def _accuracy_count(asked: Official, total: int, loaded: int) -> int:
    """Return how many samples accuracy mode issues: MultiStream fills up its last queries."""
    if asked.scenario != "multistream":
        return total
    sets = [loaded] * (total // loaded) + [total % loaded]
    return sum(-(-each // SAMPLES_PER_QUERY) * SAMPLES_PER_QUERY for each in sets)


def _look_up(conf: Conf, asked: Official, key: str, otherwise: float) -> float:
    if key in AUDITS.get(asked.audit, {}):  # which LoadGen reads last
        return AUDITS[asked.audit][key]
    found = look_up(conf, asked.config, asked.scenario, key)
    return otherwise if found is None else found


def _described(
    asked: Official,
    limit: Limits,
    lines: Sequence[str],
    total: int,
    loaded: int,
    chosen: int,
    value: Value,
) -> dict[str, Any]:
    """Return what of a plan asks for no counting."""
    assert asked.round is not None
    return {
        "scenario": asked.scenario,
        "mode": asked.mode,
        "audit": asked.audit,
        "benchmark": asked.name,
        "config": asked.config,
        "round": asked.round.name,
        "loadgen": asked.round.loadgen,
        "shortened": limit.shortened,
        "listed": asked.listed is not None,
        "total": total,
        "resident": loaded,
        "samples_wanted": chosen,
        "seeds": asdict(asked.round.seeds),
        "tokens": bool(value("use_token_latencies", _has_tokens(asked))),
        "min_duration_ns": _least_ns(value, limit),
        "conf": _text(asked, lines),
        "edited": _edited(asked, limit, chosen),
        "target_qps": None,
        "target_accuracy": asked.benchmark.target,
    }


def _least_ns(value: Value, limit: Limits) -> int:
    return int(value("min_duration", limit.min_duration_ns / MS) * MS)


def _least_queries(asked: Official, value: Value, limit: Limits) -> int:
    """Return LoadGen's least number of queries: of Offline its samples."""
    own = limit.min_queries if asked.scenario != "offline" or asked.listed else 1
    return int(value("min_query_count", own))


def _rated_counts(
    asked: Official, value: Value, limit: Limits, multiple: int, rate: float
) -> dict[str, Any]:
    """Return how many samples Server or Offline will issue."""
    assert asked.round is not None
    least_ns, queries = _least_ns(value, limit), _least_queries(asked, value, limit)
    if asked.scenario == "server":
        qps = value("target_qps", DEFAULT_QPS)
        made = len(poisson_ns(qps, least_ns, queries, asked.round.seeds.schedule, multiple))
        longest_s = LONGEST * max(made / qps, least_ns / 1e9) + LONGEST_SPARE_S
        if asked.mode != "accuracy" and made / rate > longest_s:
            raise agreed(
                f"{made:,} queries at target_qps {qps:g} would keep these ranks busy for "
                f"{made / rate:.3g} s, at the {rate:.4g} samples/s of their warm-up, and LoadGen "
                f"cannot be stopped: give --target-qps {_number(float(f'{rate:.3g}'))} or less"
            )
        return {"target_qps": qps, "capacity": made}
    qps = value("target_qps", 1.0)
    made = offline_samples(queries, least_ns, qps, multiple)
    if asked.mode != "accuracy" and made / rate < least_ns / 1e9:
        raise agreed(
            f"target_qps {qps:g} lets LoadGen issue {made:,} samples, which these ranks do in "
            f"{made / rate:.3g} s at the {rate:.4g} samples/s of their warm-up, and the run has "
            f"to last {least_ns / 1e9:g} s: give --target-qps {rate * 1.05:.4g} or more"
        )
    return {"target_qps": qps, "capacity": made}


def _has_tokens(asked: Official) -> bool:
    return bool(asked.tokens or asked.benchmark.tokens)


def _own_lines(asked: Official, limit: Limits, rates: Sequence[float]) -> list[str]:
    """Return the lines of user.conf that the user's file does not have."""
    kind, name = SCENARIOS[asked.scenario], asked.config
    own: dict[str, float] = {}
    if limit.shortened:
        own["min_duration"] = limit.min_duration_ns // MS
    if asked.listed is None:
        if asked.scenario == "server" and limit.latency_ns:
            own["target_latency"] = limit.latency_ns // MS
        if asked.benchmark.tokens:
            own["use_token_latencies"] = 1
        if asked.scenario == "server" and limit.ttft_ns and limit.tpot_ns:
            own |= {"ttft_latency": limit.ttft_ns // MS, "tpot_latency": limit.tpot_ns // MS}
        if asked.scenario == "offline":
            own["min_query_count"] = limit.min_queries
    if asked.scenario in STREAM_LATENCY_NS:
        took_ms = (_spread(asked, rates) / max(rates) + ROUND_TRIP_S) * 1e3
        own["target_latency"] = float(f"{took_ms * EXPECTED_SHARE:.3g}")
    elif asked.target_qps is not None:
        own["target_qps"] = asked.target_qps
    elif asked.scenario == "server":
        own["target_qps"] = DEFAULT_QPS
    else:
        own["target_qps"] = float(f"{min(sum(rates), CEILING_QPS) * 1.1:.4g}")
    shortening = {"min_duration"} if limit.shortened else set[str]()
    kept = {
        key: value
        for key, value in own.items()
        if key in shortening or look_up(asked.conf, name, asked.scenario, key) is None
    }
    return [f"{name}.{kind}.{key} = {_number(value)}" for key, value in kept.items()]


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else repr(float(value))


def _text(asked: Official, lines: Sequence[str]) -> str:
    given = asked.user_conf
    if given and not given.endswith("\n"):
        given += "\n"
    return given + "".join(f"{line}\n" for line in ["# set by distbench", *lines])


def _edited(asked: Official, limit: Limits, resident: int) -> list[str]:
    """Return the keys of the user's file that the rules do not leave to a submitter."""
    least = {
        "min_duration": limit.min_duration_ns / MS,
        "min_query_count": limit.min_queries,
        "performance_sample_count_override": resident,
    }
    edited = []
    for name in asked.conf:
        model, kind, key = name.split(".")
        applies = model in ("*", asked.config) and kind in ("*", SCENARIOS[asked.scenario])
        if not applies or key in FREE[asked.scenario]:
            continue
        if key in HIGHER and asked.conf[name] >= least[key]:
            continue
        edited.append(name)
    return edited


def _spread(asked: Official, rates: Sequence[float]) -> int:
    """Return how many samples of a stream's query one replica gets: they go to all of them."""
    return -(-SAMPLES_PER_QUERY // len(rates)) if asked.scenario == "multistream" else 1


def _stream_counts(
    asked: Official,
    value: Value,
    limit: Limits,
    multiple: int,
    rates: Sequence[float],
    depth: int,
) -> dict[str, Any]:
    """Return how many samples a stream may issue: LoadGen makes its queries before it starts."""
    least_ns, queries = _least_ns(value, limit), _least_queries(asked, value, limit)
    expected_ns = value("target_latency", STREAM_LATENCY_NS[asked.scenario] / MS) * MS
    samples = int(value("samples_per_query", SAMPLES_PER_QUERY))
    samples = samples if asked.scenario == "multistream" else 1
    made = max(queries, math.ceil(STREAM_PLANNED * least_ns / max(expected_ns, 1))) + STREAM_SPARE
    made = -(-made // multiple) * multiple + multiple
    right_s = _spread(asked, rates) * depth / max(rates) + ROUND_TRIP_S
    if asked.mode != "accuracy" and made * right_s < least_ns / 1e9:
        raise agreed(
            f"target_latency {expected_ns / MS:g} ms lets LoadGen make {made:,} queries, which "
            f"last {made * right_s:.3g} s at the {right_s * 1e3:.3g} ms of the warm-up, and the "
            f"run has to last {least_ns / 1e9:g} s: give target_latency {right_s * 1e3:.3g} or "
            "less in user.conf"
        )
    return {"capacity": made * samples, "expected_latency_ns": int(expected_ns)}
