"""Which of MLPerf's rules a run is held to: the option ``--rules`` and the limits behind it.

``gates.py`` judges a window by them; ``rounds.py`` has the figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from distbench.cli import nearest, positive_duration_ns
from distbench.errors import UsageError
from distbench.rounds import (
    MIN_DURATION_NS,
    MIN_QUERIES,
    OFFLINE_LIMIT,
    PERCENTILES,
    ROUNDS,
    Round,
    Tokens,
)


@dataclass(frozen=True)
class Rules:
    """What ``--rules`` asked for.

    Attributes:
        name: "none" or a round's.
        round: None with "none".
        shortened_ns: minimum duration of a shortened run, which is never VALID; None: in full.
        interactive: whether Server's limits are those of its interactive variant.
    """

    name: str = "none"
    round: Round | None = None
    shortened_ns: int | None = None
    interactive: bool = False


def parse_rules(text: str) -> Rules:
    """Read ``none | mlperf-v5.0 | mlperf-v5.1 [,shortened=5s] [,interactive]``.

    Raises:
        UsageError: an unknown name or setting, or a setting of no rules.
    """
    name, *settings = (part.strip() for part in text.split(","))
    names = ["none", *ROUNDS]
    if name not in names:
        raise UsageError(f"rules {name!r} are not one of {', '.join(names)}{nearest(name, names)}")
    shortened_ns, interactive = None, False
    for setting in settings:
        key, equals, value = setting.partition("=")
        if setting != "interactive" and (key != "shortened" or not equals):
            raise UsageError(
                f"rules {text!r}: {setting!r} is neither shortened=DURATION nor interactive"
                f"{nearest(key, ['shortened', 'interactive'])}"
            )
        if name == "none":
            raise UsageError(f"rules {text!r}: without rules there is nothing to shorten or vary")
        if equals:
            shortened_ns = positive_duration_ns(value)
        else:
            interactive = True
    return Rules(name, ROUNDS.get(name), shortened_ns, interactive)


@dataclass(frozen=True)
class Limits:
    """What a run is judged against.

    Attributes:
        min_duration_ns: ns.
        min_queries: queries; Offline: samples.
        percentile: of the latency limits and of early stopping.
        latency_ns: Server's limit on the percentile, ns.
        ttft_ns: limit on the percentile of the time to first token, ns.
        tpot_ns: limit on the percentile of the time per output token, ns.
        shortened: whether the minimum duration is not the round's.
    """

    min_duration_ns: int = MIN_DURATION_NS
    min_queries: int = 100
    percentile: float = 0.99
    latency_ns: int | None = None
    ttft_ns: int | None = None
    tpot_ns: int | None = None
    shortened: bool = False


def limits(
    rules: Rules,
    scenario: str,
    model: str = "",
    interactive: bool = False,
    dataset_size: int | None = None,
    latency_ns: int | None = None,
    option: str = "--latency-bound",
    tokens: Tokens | None = None,
) -> Limits:
    """Return a round's limits.

    Args:
        rules: of a round.
        scenario: "offline", "server", "singlestream" or "multistream".
        model: of the round; "" for one that it does not have.
        interactive: Server's interactive variant.
        dataset_size: samples of a model that the round does not have.
        latency_ns: Server's limit for such a model, ns.
        tokens: or its limits on tokens.
        option: of the command, that gives this limit.

    Raises:
        UsageError: no round; or the round has no such model, variant or limit.
    """
    if rules.round is None:
        raise UsageError("rules 'none' have no limits: give a round, such as --rules mlperf-v5.0")
    known = rules.round.model(model) if model else None
    common: dict[str, Any] = {
        "min_duration_ns": rules.shortened_ns or MIN_DURATION_NS,
        "shortened": rules.shortened_ns is not None,
    }
    if scenario == "offline":
        least = (
            known.offline_samples if known else min(OFFLINE_LIMIT, dataset_size or OFFLINE_LIMIT)
        )
        return Limits(min_queries=least, **common)
    if scenario not in MIN_QUERIES:
        raise UsageError(f"{rules.name} has no scenario {scenario}: leave --rules out")
    common |= {"min_queries": MIN_QUERIES[scenario], "percentile": PERCENTILES[scenario]}
    if scenario != "server":
        return Limits(**common)
    if interactive and not (known and known.interactive):
        raise UsageError(f"{rules.name} has no interactive variant of {model or 'this model'}")
    if known:
        tokens = known.interactive if interactive else known.server_tokens
    if tokens and (known or latency_ns is None):
        return Limits(ttft_ns=tokens.ttft_ns, tpot_ns=tokens.tpot_ns, **common)
    limit = known.server_latency_ns if known else latency_ns
    if limit is None:
        raise UsageError(
            f"{rules.name} has no Server limit for {model or 'this model'}: give {option}"
        )
    return Limits(latency_ns=limit, **common)
