"""user.conf as LoadGen reads it, and what LoadGen lets pass: a wrong name there is no error.

    # model.Scenario.key = number; * stands for any model or scenario
    *.Server.target_qps = 200
    resnet50.Offline.target_qps = 1800

LoadGen looks a key up as model.Scenario, *.Scenario, model.* and *.*, in this order, and of equal
names the last one holds. Source: mlcommons/inference, loadgen/test_settings_internal.cc,
TestSettings::FromConfig, tag v5.0.1; the keys were tried one by one on mlcommons-loadgen 5.0.13.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from distbench.cli import nearest
from distbench.errors import UsageError

SCENARIOS = {
    "offline": "Offline",
    "server": "Server",
    "singlestream": "SingleStream",
    "multistream": "MultiStream",
}
"""LoadGen's names of the scenarios."""
EVERYWHERE = (
    "mode",
    "min_duration",
    "max_duration",
    "min_query_count",
    "max_query_count",
    "accuracy_log_rng_seed",
    "accuracy_log_sampling_target",
    "print_timestamps",
    "performance_issue_unique",
    "performance_issue_same",
    "performance_issue_same_index",
    "performance_sample_count_override",
    "sample_concatenate_permutation",
    "use_token_latencies",
    "infer_token_latencies",
    "token_latency_scaling_factor",
)
"""Keys of every scenario."""
KEYS = {
    "offline": (*EVERYWHERE, "target_qps"),
    "server": (
        *EVERYWHERE,
        "target_qps",
        "target_latency",
        "target_latency_percentile",
        "ttft_latency",
        "tpot_latency",
        "coalesce_queries",
        "max_async_queries",
    ),
    "singlestream": (*EVERYWHERE, "target_latency", "target_latency_percentile"),
    "multistream": (
        *EVERYWHERE,
        "target_latency",
        "target_latency_percentile",
        "samples_per_query",
    ),
}
"""Keys that LoadGen knows, by scenario."""

FRACTIONS = ("target_qps", "target_latency_percentile", "token_latency_scaling_factor")
"""Keys that take a fraction; so does the expected latency of the streams."""
STREAMS = ("SingleStream", "MultiStream")
_WHOLE, _FRACTION = re.compile(r"0|[1-9][0-9]*"), re.compile(r"[0-9]+(\.[0-9]+)?(e[+-]?[0-9]+)?")

Conf = Mapping[str, float]
"""Value of each name, such as "digits.Server.target_qps"."""


def parse_conf(text: str, models: Sequence[str], path: str = "user.conf") -> dict[str, float]:
    """Read a user.conf.

    Args:
        text: of the file.
        models: names of models that may stand in it.
        path: of the file, for messages.

    Raises:
        UsageError: a line is none of LoadGen's, or names what LoadGen does not know.
    """
    found: dict[str, float] = {}
    for number, line in enumerate(text.splitlines(), 1):
        words = line.split()
        if not words or words[0] == "#":
            continue
        here = f"{path}, line {number}"
        if words[0].startswith("#"):
            if len(words) == 1:
                continue
            raise UsageError(
                f"{here}: LoadGen takes a comment for one only after `# `, with a blank"
            )
        if len(words) != 3 or words[1] != "=":
            raise UsageError(
                f"{here}: {line.strip()!r} is not `model.Scenario.key = number`, with blanks "
                "around the = and nothing behind the number, without which LoadGen drops the file"
            )
        _check_name(words[0], models, here)
        found[words[0]] = _number(words[0], words[2], here)
    return found


def _number(name: str, text: str, here: str) -> float:
    """Read a value as LoadGen does: C's strtoull for most keys, which stops at a point or an e."""
    _, scenario, key = name.split(".")
    fraction = key in FRACTIONS or (key == "target_latency" and scenario in STREAMS)
    if not re.fullmatch(_FRACTION if fraction else _WHOLE, text):
        kind = "number" if fraction else "whole number in plain digits, and LoadGen reads another"
        raise UsageError(f"{here}: {text!r} is no {kind}")
    return float(text)


def _check_name(name: str, models: Sequence[str], here: str) -> None:
    parts = name.split(".")
    if len(parts) != 3:
        raise UsageError(f"{here}: {name!r} is not model.Scenario.key, such as *.Server.target_qps")
    model, scenario, key = parts
    kinds = {"*": "", **{theirs: ours for ours, theirs in SCENARIOS.items()}}
    if model != "*" and model not in models:
        raise UsageError(f"{here}: no benchmark is named {model!r}{nearest(model, models)}")
    if scenario not in kinds:
        raise UsageError(
            f"{here}: scenario {scenario!r} is none of {', '.join(kinds)}"
            f"{nearest(scenario, [*kinds])}"
        )
    ours = kinds[scenario]
    keys = KEYS[ours] if ours else tuple(dict.fromkeys(k for each in KEYS.values() for k in each))
    if key not in keys:
        raise UsageError(
            f"{here}: LoadGen knows no key {key!r}"
            f"{f' of {scenario}' if ours else ''}, and would pass over it{nearest(key, keys)}"
        )


def look_up(conf: Conf, model: str, scenario: str, key: str) -> float | None:
    """Return what a conf says of a key, as LoadGen looks it up; None where it says nothing.

    Args:
        conf: from ``parse_conf``.
        model: as LoadGen is told it.
        scenario: distbench's name of it.
        key: without model and scenario.
    """
    kind = SCENARIOS[scenario]
    for name in (f"{model}.{kind}", f"*.{kind}", f"{model}.*", "*.*"):
        if f"{name}.{key}" in conf:
            return conf[f"{name}.{key}"]
    return None
