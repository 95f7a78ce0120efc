"""MLCommons' tests on answers and figures that are made up, each with one thing wrong."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from distbench.compliance import (
    AUDITS,
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


def test_one_byte_of_one_answer() -> None:
    reference = {0: b"ab", 1: b"cd"}
    same = [Entry(0, b"ab"), Entry(1, b"cd"), Entry(0, b"ab")]
    assert same_answers(same, reference).passed
    wrong = same_answers([*same, Entry(1, b"cX")], reference)
    assert wrong.passed is False and "3 of 4" in wrong.told and "sample 1" in wrong.told
    assert same_answers([Entry(2, b"ab")], reference).passed is False, "the accuracy run has it not"
    assert same_answers([], reference).passed is None


def test_hashes_of_outputs() -> None:
    digest = hashlib.sha256(b"ab").hexdigest()[:16]
    assert answer_hash(b"ab") == digest
    assert same_hashes([[0, digest], [0, digest]], {0: b"ab"}).passed
    assert same_hashes([[0, digest], [1, digest]], {0: b"ab", 1: b"aB"}).passed is False
    assert same_hashes([[7, digest]], {0: b"ab"}).passed is False
    assert same_hashes([], {0: b"ab"}).passed is None


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


def timed(
    latency_ms: list[float], index: list[int] | None = None, rate: float | None = None
) -> Timed:
    latency = (np.array(latency_ms) * MS).astype(np.int64)
    return Timed(rate, np.array(index or [3] * len(latency_ms), np.int64), latency)


def test_a_cache_shows_by_its_direction() -> None:
    slow, fast = timed([10.0] * 20), timed([1.0] * 20)
    for scenario in ("server", "singlestream", "multistream"):
        assert same_sample(scenario, fast, slow, tokens=False).passed is False, "a lower latency"
        assert same_sample(scenario, slow, fast, tokens=False).passed, "slower is no cache"
        assert same_sample(scenario, slow, slow, tokens=False).passed
        few = same_sample(scenario, timed([1.0] * 9), slow, tokens=False)
        assert few.passed is None and "10 are needed" in few.told
    more, less = timed([], rate=1000.0), timed([], rate=900.0)
    assert same_sample("offline", more, less, tokens=False).passed is False, "a higher rate"
    assert same_sample("offline", less, more, tokens=False).passed


def test_a_text_is_compared_with_itself() -> None:
    """Sample 3 is short: against all texts it would look cached, and against itself it is not."""
    reference = timed([100.0] * 50 + [10.0] * 10, [5] * 50 + [3] * 10)
    again = timed([10.0] * 30)
    assert same_sample("server", again, reference, tokens=True).passed
    assert same_sample("server", again, reference, tokens=False).passed is False
    rare = timed([100.0] * 50 + [10.0] * 9, [5] * 50 + [3] * 9)
    found = same_sample("server", again, rare, tokens=True)
    assert found.passed is None and "of this sample" in found.told


def test_tokens_as_test06_looks_at_them() -> None:
    good = Entry(0, bytes([5, 6, 9]), bytes([5]), 3)
    names = {each.name: each.passed for each in same_tokens("server", [good], "u1", 9)}
    assert names == {"first token": True, "end token": True, "length": True}
    cases = {
        "first token": Entry(1, bytes([5, 6, 9]), bytes([6]), 3),
        "end token": Entry(1, bytes([5, 9, 9]), bytes([5]), 3),
        "length": Entry(1, bytes([5, 6, 9]), bytes([5]), 4),
    }
    for name, entry in cases.items():
        found = {each.name: each.passed for each in same_tokens("server", [good, entry], "u1", 9)}
        assert found == {**names, name: False}, name
    unsaid = Entry(0, bytes([5]), b"", None)
    assert [each.passed for each in same_tokens("server", [unsaid], "u1", 9)] == [
        False,
        True,
        False,
    ]
    assert same_tokens("offline", [unsaid], "u1", 9)[0].passed, "Offline tells no first token"
    wide = Entry(0, np.array([7, 2, 2], "<i8").tobytes(), np.array([7], "<i8").tobytes(), 3)
    assert [each.passed for each in same_tokens("server", [wide], "<i8", 2)] == [True, False, True]
    only_ends = Entry(0, bytes([9]), bytes([9]), 1)
    assert all(each.passed for each in same_tokens("server", [only_ends], "u1", 9))
    assert all(each.passed is None for each in same_tokens("server", [], "u1", 9))
    assert same_tokens("server", [good], "u1", None)[1].told == "the model has none"


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
    entries = [Entry(0, bytes([5, 9]), bytes([5]), 2)]
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
    wrong = [Entry(0, bytes([5, 9]), bytes([5]), 3)]
    text = verification("TEST06", same_tokens("server", wrong, "u1", 9))["verify_accuracy.txt"]
    assert "Sample length check pass: False" in text and "verification failed" in text
    assert all("MLPerf-style, unverified" in each for each in texts.values())
