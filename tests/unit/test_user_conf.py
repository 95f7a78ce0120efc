"""user.conf: what LoadGen reads of it, and the names that it would pass over without a word."""

from __future__ import annotations

import pytest

from distbench.errors import UsageError
from distbench.user_conf import KEYS, SCENARIOS, look_up, parse_conf

MODELS = ("digits", "tinylm", "resnet50")


def test_lines_comments_and_the_last_of_equal_names() -> None:
    text = """
    # a comment, and one behind a line
    *.Server.target_qps = 100
    digits.Server.target_qps = 2e2
    digits.Server.target_qps = 250.5
    #
    #nothing
    """
    found = parse_conf(text, MODELS)
    assert found == {"*.Server.target_qps": 100.0, "digits.Server.target_qps": 250.5}


def test_an_expected_latency_may_have_a_fraction() -> None:
    assert parse_conf("*.SingleStream.target_latency = 0.25", MODELS)


def test_the_nearest_name_holds() -> None:
    names = ("digits.Server", "*.Server", "digits.*", "*.*")
    conf = {f"{name}.min_duration": float(k) for k, name in enumerate(names)}
    for k, name in enumerate(names):
        assert look_up(conf, "digits", "server", "min_duration") == k
        del conf[f"{name}.min_duration"]
    assert look_up(conf, "digits", "server", "min_duration") is None
    assert look_up({"*.Offline.min_duration": 1.0}, "digits", "server", "min_duration") is None


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("*.Server.target_qsp = 3", "LoadGen knows no key 'target_qsp' of Server.*target_qps"),
        ("*.*.min_durration = 3", "no key 'min_durration'.*did you mean min_duration"),
        ("*.Sever.target_qps = 3", "scenario 'Sever'.*did you mean Server"),
        ("digit.Server.target_qps = 3", "no benchmark is named 'digit'; did you mean digits"),
        ("Server.target_qps = 3", "is not model.Scenario.key"),
        ("*.Server.target_qps=3", "with blanks around the ="),
        ("*.Server.target_qps = 3 # more", "nothing behind the number"),
        ("#a comment of many words", "only after `# `"),
        ("*.*.min_duration = 600e3", "whole number in plain digits"),
        ("*.*.min_query_count = 0300", "whole number in plain digits"),
        ("*.Server.target_latency = 15.5", "whole number in plain digits"),
        ("*.*.target_latency = 0.5", "whole number in plain digits"),
        ("*.Server.target_qps = 1_000", "is no number"),
        ("*.Server.target_qps = many", "'many' is no number"),
        ("*.Server.target_qps = nan", "'nan' is no number"),
        ("*.Offline.ttft_latency = 3", "no key 'ttft_latency' of Offline"),
        ("*.*.qsl_rng_seed = 3", "no key 'qsl_rng_seed'"),
    ],
)  # fmt: skip
def test_what_loadgen_would_pass_over_is_refused(line: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse_conf(line, MODELS, "my.conf")
    with pytest.raises(UsageError, match=r"my\.conf, line 1"):
        parse_conf(line, MODELS, "my.conf")


def test_every_scenario_has_keys() -> None:
    assert KEYS.keys() == SCENARIOS.keys()
