"""What MLPerf's submission checker will say of a tree, as far as the runs tell it.

The checker is mlcommons/inference, tools/submission/submission_checker.py, tag v5.0.1; words in
quotation marks are its own. It tests a format and its limits, no more: that it says nothing makes
no result of MLPerf's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from distbench.loadgen_verdict import told_by
from distbench.mllog import DETAIL, PREFIX
from distbench.rounds import MS, ROUNDS, V5_0
from distbench.submission_runs import AUDITS, Scenario, Taken, failed_tests
from distbench.system_description import MAY_BE_EMPTY
from distbench.user_conf import SCENARIOS

CHECKER = "MLPerf's submission checker (mlcommons/inference, tag v5.0.1)"
LEAST_DURATION_MS = 600_000


def of_scenario(scenario: Scenario, division: str) -> list[str]:
    """Return what the checker will say of one scenario's folders, a sentence each."""
    found = []
    official = scenario.first.official
    if not official["listed"]:
        found.append(
            f'"has an invalid model {scenario.model}": it knows only the names of MLPerf\'s list, '
            "and looks no further; the rest it would say of a name that it knows"
        )
    if scenario.performance is None:
        found.append('"performance/run_1 is missing"')
    else:
        found += _of_performance(scenario.performance)
    if scenario.accuracy is None:
        found.append('"has no accuracy.txt"')
    else:
        found += _of_accuracy(scenario.accuracy, division)
    for name, audit in scenario.audits.items():
        missing = [text for text in AUDITS[name].texts if text not in audit.texts]
        found += [f'"{text} is missing" in {name}' for text in missing]
    found += [f"{name} did not pass: see its verify_*.txt" for name in failed_tests(scenario)]
    if division != "open" and not scenario.audits:
        found.append('"no compliance dir", unless it is run with --skip_compliance')
    return found


def of_models(scenarios: Sequence[Scenario], division: str) -> list[str]:
    """Return what it will say of the runs together: their round, and the scenarios of a model."""
    round_ = scenarios[0].first.official["round"]
    found = []
    if round_ != V5_0.name:
        found.append(
            f'"qsl_rng_seed is wrong": these runs are of {round_}; take the checker of that round'
        )
    if division == "open":
        return found
    for model in dict.fromkeys(each.model for each in scenarios):
        own = [each for each in scenarios if each.model == model]
        official = own[0].first.official
        if not official["listed"]:
            continue
        needed = ROUNDS[round_].model(official["benchmark"]).scenarios
        names, here = [SCENARIOS[each] for each in needed], [each.name for each in own]
        missing = ", ".join(name for name in names if name not in here)
        if missing:
            found.append(f'{model}: "does not have all required scenarios, missing {missing}"')
        found += [
            f'{model}/{name}: "ignoring scenario {name} (neither required nor optional)"'
            for name in here
            if name not in names
        ]
    return found


def of_system(described: Mapping[str, str]) -> list[str]:
    """Return what it will say of systems/<system>.json."""
    found = [] if described["status"] else ['"has invalid status ()", and looks no further']
    empty = [name for name, value in described.items() if not value]
    empty = [name for name in empty if name not in (*MAY_BE_EMPTY, "status")]
    if empty:
        found.append(f'"requires a meaningful response but is empty": {", ".join(empty)}')
    return found


def of_weights(described: Mapping[str, str]) -> list[str]:
    """Return what it will say of a scenario's JSON file in measurements/."""
    empty = [name for name, value in described.items() if not value]
    return [f'"is missing meaningful value": {", ".join(empty)}'] if empty else []


def _of_performance(run: Taken) -> list[str]:
    keys: Mapping[str, Any] = told_by(run.run)["keys"]
    found = _of_log(run)
    if keys.get("result_validity") != "VALID":
        found.append(f'"has issues": LoadGen says {keys.get("result_validity", "nothing")}')
    if not keys.get("early_stopping_met", True):
        found.append('"Early stopping condition was not met"')
    least_ms = keys.get("effective_min_duration_ms", 0)
    if least_ms < LEAST_DURATION_MS:
        found.append(
            f'"Test duration less than 600s in user config. expected={LEAST_DURATION_MS}, '
            f'found={least_ms}"'
        )
    if not run.official["listed"]:
        return found
    model = ROUNDS[run.official["round"]].model(run.official["benchmark"])
    loaded = keys.get("effective_performance_sample_count", 0)
    if model.performance_samples and loaded < model.performance_samples:
        found.append(
            f'"performance_sample_count, found {loaded}, needs to be >= '
            f'{model.performance_samples}"'
        )
    samples = keys.get("effective_samples_per_query", 0)
    if run.official["scenario"] == "offline" and samples < model.offline_samples:
        found.append(
            '"Required minimum samples per query not met by user config, Expected='
            f'{model.offline_samples}, Found={samples}"'
        )
    limit_ns, own_ns = model.server_latency_ns, keys.get("effective_target_latency_ns", 0)
    if run.official["scenario"] == "server" and limit_ns and own_ns > limit_ns:
        found.append(
            f'"Latency constraint with early stopping not met": {own_ns / MS:.9g} ms, and '
            f"{limit_ns / MS:g} ms is the limit"
        )
    return found


def _of_accuracy(run: Taken, division: str) -> list[str]:
    told, target = told_by(run.run), run.official["target_accuracy"]
    found = [f"{each} (of the accuracy run)" for each in _of_log(run)]
    if division != "open" and told["right"] / told["of"] < target:
        found.append(f'"accuracy not valid": {told["right"] / told["of"]:.4g} is below {target:g}')
    return found


def _of_log(run: Taken) -> list[str]:
    """Return what it will say of a detail log: errors, and lines that its parser takes for torn."""
    errors, found = told_by(run.run)["errors"], []
    if errors:
        found.append(f'"contains errors": {len(errors)}, the first of them {errors[0]}')
    with (run.logs / DETAIL).open(encoding="utf-8", errors="replace") as log:
        for line in log:
            if line.startswith(PREFIX.strip()) and not _read(line[len(PREFIX) - 1 :]):
                found.append(f'"Encountered invalid line": {line.rstrip()[:80]} ...')
                break
    return found


def _read(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
