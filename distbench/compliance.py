"""MLCommons' compliance tests, and two of our own, judged from what LoadGen and the ranks logged.

    TEST01   answers logged while it is timed are the accuracy run's, and cost no speed
    TEST04   one sample, issued again and again, is not answered faster
    TEST06   the first token told early is the answer's first, at most one end token, true counts

Beside TEST04 stands ``same_sample``, which looks at what the ranks took, and beside TEST01
``same_hashes``, of outputs that every performance run keeps.

Source: mlcommons/inference, tag v5.0.1, compliance/nvidia/TEST01, TEST04 and TEST06: audit.config,
README.md, verify_accuracy.py, verify_performance.py, run_verification.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from distbench.errors import UsageError
from distbench.mllog import Entry
from distbench.samples import Array

SEED, PERFORMANCE = 720381539243781796, 2
AUDITS = {
    "TEST01": {
        "mode": PERFORMANCE,
        "accuracy_log_rng_seed": SEED,
        "accuracy_log_sampling_target": 4096,
    },
    "TEST04": {
        "mode": PERFORMANCE,
        "performance_issue_unique": 0,
        "performance_issue_same": 1,
        "performance_issue_same_index": 3,
    },
    "TEST06": {
        "mode": PERFORMANCE,
        "accuracy_log_rng_seed": SEED,
        "accuracy_log_sampling_target": 100,
        "min_query_count": 100,
        "min_duration": 0,
    },
}
"""Keys of each test's audit.config, which LoadGen reads last."""
SCORES = {
    "offline": "result_samples_per_second",
    "server": "result_completed_samples_per_sec",
    "singlestream": "early_stopping_latency_ss",
    "multistream": "early_stopping_latency_ms",
}
"""Key of what a test compares of two runs."""
THRESHOLD, RELAXED = 0.10, 0.20
SHORT_NS = {"singlestream": 200_000, "multistream": 1_600_000}
"""Of a latency up to this much, what disturbs a host is more: ``RELAXED`` holds."""
LEAST_ROWS, ABOUT = 10, 0.1
"""Below so many a median tells nothing; texts whose tokens differ by less are of a length."""
LEAST_LOGGED = 64
"""Of fewer logged answers nothing is told."""
LOGGED_AS = {
    "accuracy_log_rng_seed": "effective_accuracy_log_rng_seed",
    "accuracy_log_sampling_target": "effective_accuracy_log_sampling_target",
    "performance_issue_same": "effective_performance_issue_same",
    "performance_issue_same_index": "effective_performance_issue_same_index",
    "min_duration": "effective_min_duration_ms",
}
"""Keys of audit.config as LoadGen logs what it made of them; the number of queries depends on the
scenario."""
HASH_DIGITS = 16


@dataclass(frozen=True)
class Check:
    """One thing that a test looks at.

    Attributes:
        name: of it.
        passed: None where it cannot be told.
        told: what was found, and what it was held against.
    """

    name: str
    passed: bool | None
    told: str


@dataclass(frozen=True)
class Timed:
    """What two runs are compared by, a row for each completed sample.

    Attributes:
        service_ns: from the issue of its group to the engine until the outputs were back, by the
            clock of its rank: neither dispatch nor the wait for a batch is in it.
        fresh: whether the run had not had this sample before.
        tokens: of its answer; None of a model without.
    """

    service_ns: Array
    fresh: Any
    tokens: Array | None = None


def check_audit(mode: str, audit: str, name: str, has_tokens: bool, unscored: str = "") -> None:
    """Refuse what is no audit, or none of this benchmark.

    Args:
        mode: of the run.
        audit: the test; "" for none.
        name: of the benchmark.
        has_tokens: whether it is one of tokens.
        unscored: why it has no accuracy mode; "" where it has.

    Raises:
        UsageError: likewise.
    """
    known = ", ".join(AUDITS)
    if mode == "compliance" and audit not in AUDITS:
        raise UsageError(f"--mode compliance runs one of MLCommons' tests: give --audit {known}")
    if mode != "compliance" and audit:
        raise UsageError(f"--audit {audit} is run by --mode compliance, and this is --mode {mode}")
    if audit == "TEST06" and not has_tokens:
        raise UsageError(f"TEST06 looks at tokens, and {name} has none: give TEST01 or TEST04")
    if audit == "TEST01" and unscored:
        raise UsageError(
            f"TEST01 compares answers with those of accuracy mode, which {name} has not, for "
            f"{unscored}: give TEST04"
        )


def audit_conf(audit: str) -> str:
    """Return the text of a test's audit.config."""
    return "".join(f"*.*.{key} = {value}\n" for key, value in AUDITS[audit].items())


def answer_hash(answer: bytes) -> str:
    """Return what is kept of an answer."""
    return hashlib.sha256(answer).hexdigest()[:HASH_DIGITS]


def took_config(audit: str, keys: Mapping[str, Any], indices: Array) -> Check:
    """Tell whether LoadGen ran the test: whether it took audit.config.

    Args:
        audit: the test.
        keys: of the run's detail log.
        indices: of all samples that were issued.
    """
    asked = {LOGGED_AS[k]: v for k, v in AUDITS[audit].items() if k in LOGGED_AS}
    other = [key for key, value in asked.items() if keys.get(key) != value]
    said = f"{', '.join(other)} of its log are not the test's" if other else "as in its log"
    distinct = len(np.unique(indices))
    if audit == "TEST04":
        said += "; one sample" if distinct == 1 else f"; {distinct:,} different samples"
        said += " was issued" if distinct == 1 else " were issued"
    passed = not other and (audit != "TEST04" or distinct == 1)
    return Check("audit.config", passed, said)


# -- answers -------------------------------------------------------------------------------------


def same_answers(logged: Sequence[Entry], reference: Mapping[int, bytes]) -> Check:
    """Compare the answers that LoadGen logged in a performance run with the accuracy run's.

    MLCommons' script compares the first number of each alone; here every byte counts.

    Args:
        logged: from ``mllog.read_entries``.
        reference: from ``mllog.read_answers``, by sample index.
    """
    pairs = [(each.index, each.data == reference.get(each.index)) for each in logged]
    return _alike("answers", "logged answers are the accuracy run's, byte for byte", pairs)


def same_hashes(hashes: Sequence[Sequence[Any]], reference: Mapping[int, bytes]) -> Check:
    """Compare the outputs that ranks kept of a performance run with the accuracy run's.

    Args:
        hashes: pairs of a sample index and ``answer_hash``.
        reference: likewise.
    """
    pairs = [(int(i), i in reference and answer_hash(reference[i]) == h) for i, h in hashes]
    return _alike("outputs", "outputs kept by the ranks hash like the accuracy run's", pairs)


def _alike(name: str, what: str, pairs: Sequence[tuple[int, bool]]) -> Check:
    other = list(dict.fromkeys(index for index, same in pairs if not same))
    same = sum(good for _, good in pairs)
    said = f"{same:,} of {len(pairs):,} {what}"
    if other:
        said += f"; of sample {other[0]} it is not"
    if not other and len(pairs) < LEAST_LOGGED:
        return Check(name, None, f"{said}, and {LEAST_LOGGED} are needed: make the run longer")
    return Check(name, not other, said)


# -- speed ---------------------------------------------------------------------------------------


def threshold(scenario: str, reference: float) -> float:
    """Return by how much a score may be off, as a fraction.

    Example:
        >>> threshold("singlestream", 200_000), threshold("offline", 200_000)
        (0.2, 0.1)
    """
    return RELAXED if reference <= SHORT_NS.get(scenario, -1) else THRESHOLD


def same_score(
    scenario: str, test: Mapping[str, Any], reference: Mapping[str, Any], *, least: bool
) -> Check:
    """Compare LoadGen's scores of two runs as MLCommons' scripts do.

    Args:
        scenario: distbench's name of it.
        test: keys of the audited run's detail log.
        reference: likewise of the performance run's.
        least: whether the score must not be too low either, as in TEST01.
    """
    key = SCORES[scenario]
    found, wanted = float(test.get(key) or 0), float(reference.get(key) or 0)
    if not found or not wanted:
        return Check("score", None, f"{key} is not in both logs: too few queries for an estimate")
    off = threshold(scenario, wanted)
    passed = found < wanted * (1 + off) and (not least or found > wanted * (1 - off))
    held = f"{1 - off:g} to {1 + off:g}" if least else f"below {1 + off:g}"
    said = f"{key} {found:.6g}, reference {wanted:.6g}: {found / wanted:.3f} of it, to be {held}"
    return Check("score", passed, said)


def same_sample(test: Timed, reference: Timed) -> Check:
    """Tell whether a sample that comes again and again is computed faster: from a cache.

    What the ranks took for it is compared with what they took for samples that the performance run
    had not had before, so that a cache which fills up during that run does not hide. A text takes
    as long as it is: of a token model only those of about as many tokens are compared.

    Args:
        test: the run that issued one sample.
        reference: the performance run.
    """
    own = reference.fresh
    if test.tokens is not None and reference.tokens is not None and len(test.tokens):
        length = float(np.median(test.tokens))
        own = own & (np.abs(reference.tokens - length) <= ABOUT * length)
    own_ns = reference.service_ns[own]
    if min(len(own_ns), len(test.service_ns)) < LEAST_ROWS:
        like = " of about as many tokens" if test.tokens is not None else ""
        return Check(
            "same-sample",
            None,
            f"the performance run has {len(own_ns)} samples that were new to it{like}, the other "
            f"{len(test.service_ns)}, and {LEAST_ROWS} are needed: make them longer",
        )
    medians = float(np.median(own_ns)), float(np.median(test.service_ns))
    off = RELAXED if medians[0] <= SHORT_NS["singlestream"] else THRESHOLD
    times = medians[0] / max(medians[1], 1.0)
    said = (
        f"{times:.3f} times as fast as samples that were new to the performance run, by the ranks' "
        f"median ({len(test.service_ns):,} and {len(own_ns):,} samples), to be below {1 + off:g}"
    )
    return Check("same-sample", times < 1 + off, said)


# -- tokens --------------------------------------------------------------------------------------


def same_tokens(scenario: str, logged: Sequence[Entry], kind: str, end: int | None) -> list[Check]:
    """Look at the tokens that LoadGen logged, as TEST06 does.

    Args:
        scenario: distbench's name of it; Offline tells no first token.
        logged: from ``mllog.read_entries``.
        kind: numpy's name of a token's type in an answer.
        end: the token that ends a text; None where the model has none.
    """
    if not logged:
        names = ("first token", "end token", "length")
        return [Check(name, None, "no answer was logged") for name in names]
    width = np.dtype(kind).itemsize
    checks = [Check("first token", True, "Offline tells none")]
    if scenario != "offline":
        early = [(e.index, len(e.first) == width and e.data[:width] == e.first) for e in logged]
        checks = [_alike("first token", "answers begin with the token that came first", early)]
    if end is None:
        checks.append(Check("end token", True, "the model has none"))
    else:
        ends = [(e.index, _ends(np.frombuffer(e.data, kind), end) <= 1) for e in logged]
        checks.append(_alike("end token", "answers end with one end token at most", ends))
    counts = [(e.index, e.tokens == len(e.data) / width) for e in logged]
    return [*checks, _alike("length", "answers have as many tokens as were told", counts)]


def _ends(tokens: Any, end: int) -> int:
    """Count the end tokens at the end of a text."""
    other = np.flatnonzero(tokens != end)
    return len(tokens) - (int(other[-1]) + 1 if len(other) else 0)


# -- what MLCommons' checker reads ---------------------------------------------------------------


def verification(audit: str, checks: Sequence[Check]) -> dict[str, str]:
    """Return the texts that a submission's checker looks for, by name of the file.

    Args:
        audit: the test.
        checks: all of it; one that could not be told fails.
    """
    head = _head(audit, checks)
    named = {each.name: each.passed is True for each in checks}
    if audit == "TEST06":
        first = "Skipped" if "Offline tells none" in head else str(named["first token"])
        lines = f"First token check pass: {first}\nEOS check pass: {named['end token']}\n"
        lines += f"Sample length check pass: {named['length']}\n"
        done = "complete" if all(named.values()) else "failed"
        return {"verify_accuracy.txt": f"{head}{lines}TEST06 verification {done}\n"}
    texts = {}
    if audit == "TEST01":
        own = [each for each in checks if each.name in OF_ANSWERS]
        texts["verify_accuracy.txt"] = _told(audit, own)
    own = [each for each in checks if each.name not in OF_ANSWERS]
    texts["verify_performance.txt"] = _told(audit, own)
    return texts


OF_ANSWERS = ("answers", "valid (accuracy)")
"""Checks of TEST01 that stand in verify_accuracy.txt."""


def _told(audit: str, checks: Sequence[Check]) -> str:
    good = all(each.passed is True for each in checks)
    return f"{_head(audit, checks)}{'TEST PASS' if good else 'TEST FAIL'}\n"


def _head(audit: str, checks: Sequence[Check]) -> str:
    said = "".join(f"{_word(each.passed)}  {each.name}: {each.told}\n" for each in checks)
    return f"{audit}, judged by distbench; MLPerf-style, unverified\n{said}"


def _word(passed: bool | None) -> str:
    return {True: "passed ", False: "FAILED ", None: "unknown"}[passed]
