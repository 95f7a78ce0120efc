"""MLCommons' tests on answers and figures that are made up, each with one thing wrong."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pytest

from distbench.compliance import (
    AUDITS,
    LEAST_LOGGED,
    Check,
    Timed,
    answer_hash,
    audit_conf,
    check_audit,
    same_answers,
    same_hashes,
    same_sample,
    same_score,
    same_tokens,
    took_config,
    verification,
)
from distbench.errors import UsageError
from distbench.mllog import Entry
from distbench.official import Official, settled

MS = 1_000_000


def test_the_audit_configs_are_mlcommons() -> None:
    """As mlcommons/inference has them, tag v5.0.1, compliance/nvidia/TEST*/audit.config."""
    assert audit_conf("TEST01").splitlines() == [
        "*.*.mode = 2",
        "*.*.accuracy_log_rng_seed = 720381539243781796",
        "*.*.accuracy_log_sampling_target = 4096",
    ]
    assert audit_conf("TEST04").splitlines()[1:] == [
        "*.*.performance_issue_unique = 0",
        "*.*.performance_issue_same = 1",
        "*.*.performance_issue_same_index = 3",
    ]
    assert audit_conf("TEST06").splitlines()[2:] == [
        "*.*.accuracy_log_sampling_target = 100",
        "*.*.min_query_count = 100",
        "*.*.min_duration = 0",
    ]
    assert list(AUDITS) == ["TEST01", "TEST04", "TEST06"]


@pytest.mark.parametrize(
    ("mode", "audit", "tokens", "said"),
    [
        ("compliance", "", True, "give --audit TEST01, TEST04, TEST06"),
        ("compliance", "TEST05", True, "give --audit"),
        ("performance", "TEST01", True, "this is --mode performance"),
        ("compliance", "TEST06", False, "digits has none"),
    ],
)
def test_what_is_no_audit_is_refused(mode: str, audit: str, tokens: bool, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        check_audit(mode, audit, "digits", tokens)


def test_an_audit_is_settled_as_loadgen_will_have_it() -> None:
    asked = Official("server", "compliance", "tinylm", audit="TEST06", target_qps=20.0)
    plan = settled(asked, 1000, 1000, [50.0])
    assert (plan["mode"], plan["audit"]) == ("compliance", "TEST06")
    assert plan["min_duration_ns"] == 0 and plan["capacity"] == 100
    plain = settled(Official("server", name="tinylm", target_qps=20.0), 1000, 1000, [50.0])
    assert plain["audit"] == "" and plain["capacity"] > 10_000
    with pytest.raises(UsageError, match="TEST06 looks at tokens"):
        Official("offline", "compliance", audit="TEST06")
    same = settled(Official("offline", "compliance", audit="TEST04"), 99, 99, [1000.0])
    assert same["min_duration_ns"] == 600 * 1000 * MS


MANY = range(LEAST_LOGGED)


def test_one_byte_of_one_answer() -> None:
    reference = dict.fromkeys(MANY, b"ab")
    same = [Entry(i, b"ab") for i in MANY]
    assert same_answers(same, reference).passed
    wrong = same_answers([*same, Entry(1, b"aX")], reference)
    assert wrong.passed is False and "64 of 65" in wrong.told and "sample 1" in wrong.told
    assert same_answers([Entry(99, b"ab")], reference).passed is False, "the reference has it not"
    few = same_answers(same[1:], reference)
    assert few.passed is None and "64 are needed" in few.told
    assert same_answers([], reference).passed is None


def test_hashes_of_outputs() -> None:
    digest = hashlib.sha256(b"ab").hexdigest()[:16]
    assert answer_hash(b"ab") == digest
    same = [[0, digest] for _ in MANY]
    assert same_hashes(same, {0: b"ab"}).passed
    assert same_hashes([*same, [1, digest]], {0: b"ab", 1: b"aB"}).passed is False
    assert same_hashes([[7, digest]], {0: b"ab"}).passed is False
    assert same_hashes(same[1:], {0: b"ab"}).passed is None
    assert same_hashes([], {0: b"ab"}).passed is None


def test_that_loadgen_took_the_audit_config() -> None:
    keys = {
        "effective_performance_issue_same": True,
        "effective_performance_issue_same_index": 3,
        "effective_accuracy_log_rng_seed": 720381539243781796,
        "effective_accuracy_log_sampling_target": 4096,
    }
    one, two = np.array([3, 3, 3]), np.array([3, 3, 4])
    assert took_config("TEST04", keys, one).passed
    assert took_config("TEST04", keys, two).passed is False, "an ordinary run"
    plain = {**keys, "effective_performance_issue_same": False}
    assert took_config("TEST04", plain, one).passed is False
    assert took_config("TEST01", keys, two).passed
    assert (
        took_config("TEST01", {**keys, "effective_accuracy_log_rng_seed": 0}, two).passed is False
    )
    assert took_config("TEST06", keys, two).passed is False, "a target of 4096 is TEST01's"


@pytest.mark.parametrize(
    ("scenario", "found", "wanted", "least", "passed"),
    [
        ("offline", 109.9, 100.0, False, True),
        ("offline", 110.1, 100.0, False, False),
        ("offline", 10.0, 100.0, False, True),
        ("offline", 90.1, 100.0, True, True),
        ("offline", 89.9, 100.0, True, False),
        ("singlestream", 239_000, 200_000, False, True),
        ("singlestream", 239_000, 200_001, False, False),
        ("multistream", 1_910_000, 1_600_000, True, True),
        ("multistream", 1_910_000, 1_600_001, True, False),
        ("server", 0, 100.0, False, None),
    ],
)
def test_scores_as_mlcommons_compares_them(
    scenario: str, found: float, wanted: float, least: bool, passed: bool | None
) -> None:
    key = {
        "offline": "result_samples_per_second",
        "server": "result_completed_samples_per_sec",
        "singlestream": "early_stopping_latency_ss",
        "multistream": "early_stopping_latency_ms",
    }[scenario]
    assert same_score(scenario, {key: found}, {key: wanted}, least=least).passed is passed


def timed(service_ms: list[float], fresh: int = 0, tokens: list[int] | None = None) -> Timed:
    """Return rows of which the first so many are new to the run."""
    service = (np.array(service_ms) * MS).astype(np.int64)
    counts = None if tokens is None else np.array(tokens, np.int64)
    return Timed(service, np.arange(len(service)) < fresh, counts)


def test_a_cache_shows() -> None:
    slow, fast = timed([10.0] * 20, 20), timed([1.0] * 20, 20)
    assert same_sample(fast, slow).passed is False
    assert same_sample(slow, fast).passed, "slower is no cache"
    assert same_sample(slow, slow).passed
    assert same_sample(timed([9.1] * 20), slow).passed
    assert same_sample(timed([9.0] * 20), slow).passed is False
    few = same_sample(timed([1.0] * 9), slow)
    assert few.passed is None and "10 are needed" in few.told
    short = timed([0.2] * 20, 20)
    assert same_sample(timed([0.17] * 20), short).passed, "of 0.2 ms a fifth may be noise"
    assert same_sample(timed([0.16] * 20), short).passed is False


def test_a_cache_that_fills_up_in_the_performance_run_does_not_hide() -> None:
    """60,000 queries over 1,797 samples: nearly all are answered from the cache there too."""
    reference = timed([4.0] * 1_797 + [0.2] * 58_203, 1_797)
    assert same_sample(timed([4.0] + [0.2] * 59_999), reference).passed is False
    rare = timed([4.0] * 9 + [0.2] * 1_000, 9)
    assert same_sample(timed([0.2] * 1_000), rare).passed is None


def test_a_text_is_compared_with_others_of_its_length() -> None:
    """It is short: against all texts it would look cached, and against its like it is not."""
    reference = timed([100.0] * 50 + [10.0] * 10, 60, [70] * 50 + [7] * 10)
    again = timed([10.0] * 30, 0, [7] * 30)
    assert same_sample(again, reference).passed
    assert same_sample(timed([5.0] * 30, 0, [7] * 30), reference).passed is False
    rare = timed([100.0] * 50 + [10.0] * 9, 59, [70] * 50 + [7] * 9)
    found = same_sample(again, rare)
    assert found.passed is None and "about as many tokens" in found.told


def of(entry: Entry, scenario: str = "server", kind: str = "u1", end: int | None = 9) -> Any:
    """Return what is said of so many good entries, the last of them replaced."""
    width = np.dtype(kind).itemsize
    first = np.array([5], kind).tobytes()
    good = Entry(0, first + np.array([6], kind).tobytes(), first, 2)
    assert len(good.data) == 2 * width
    found = same_tokens(scenario, [good] * (LEAST_LOGGED - 1) + [entry], kind, end)
    return [each.passed for each in found]


def test_tokens_as_test06_looks_at_them() -> None:
    assert of(Entry(1, bytes([5, 6, 9]), bytes([5]), 3)) == [True, True, True]
    assert of(Entry(1, bytes([5, 6, 9]), bytes([6]), 3)) == [False, True, True]
    assert of(Entry(1, bytes([5, 6, 9]), bytes([5, 6]), 3)) == [False, True, True], "two tokens"
    assert of(Entry(1, bytes([5, 6, 9]), b"", 3)) == [False, True, True]
    assert of(Entry(1, bytes([5, 9, 9]), bytes([5]), 3)) == [True, False, True]
    assert of(Entry(1, bytes([5, 6, 9]), bytes([5]), 4)) == [True, True, False]
    assert of(Entry(1, bytes([5, 6]), bytes([5]), None)) == [True, True, False]
    assert of(Entry(1, bytes([9]), bytes([9]), 1)) == [True, True, True]
    assert of(Entry(1, bytes([5, 6]), b"", 2), "offline")[0], "Offline tells no first token"
    assert of(Entry(1, bytes([5, 9, 9]), bytes([5]), 3), end=None) == [True, True, True]
    wide = Entry(0, np.array([7, 2, 2], "<i8").tobytes(), np.array([7], "<i8").tobytes(), 3)
    assert of(wide, kind="<i8", end=2) == [True, False, True]
    few = same_tokens("server", [wide], "<i8", 7)
    assert [each.passed for each in few] == [None, None, None]
    assert all(each.passed is None for each in same_tokens("server", [], "u1", 9))


def test_what_a_submissions_checker_looks_for() -> None:
    good, bad, unknown = (Check("score", each, "") for each in (True, False, None))
    answers = Check("answers", True, "")
    texts = verification("TEST01", [answers, good])
    assert {name: "TEST PASS" in text for name, text in texts.items()} == {
        "verify_accuracy.txt": True,
        "verify_performance.txt": True,
    }
    texts = verification("TEST01", [answers, bad])
    assert "TEST PASS" in texts["verify_accuracy.txt"]
    assert "TEST FAIL" in texts["verify_performance.txt"]
    assert "TEST PASS" not in verification("TEST04", [good, unknown])["verify_performance.txt"]
    assert list(verification("TEST04", [good])) == ["verify_performance.txt"]
    entries = [Entry(0, bytes([5, 9]), bytes([5]), 2)] * LEAST_LOGGED
    text = verification("TEST06", same_tokens("server", entries, "u1", 9))["verify_accuracy.txt"]
    for line in (
        "First token check pass: True",
        "EOS check pass: True",
        "Sample length check pass: True",
        "TEST06 verification complete",
    ):
        assert line in text.splitlines()
    text = verification("TEST06", same_tokens("offline", entries, "u1", 9))["verify_accuracy.txt"]
    assert "First token check pass: Skipped" in text
    wrong = [*entries, Entry(0, bytes([5, 9]), bytes([5]), 3)]
    text = verification("TEST06", same_tokens("server", wrong, "u1", 9))["verify_accuracy.txt"]
    assert "Sample length check pass: False" in text and "verification failed" in text
    assert all("MLPerf-style, unverified" in each for each in texts.values())
