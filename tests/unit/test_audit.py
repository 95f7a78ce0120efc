"""The audit command on runs whose logs are made up: which go together, and what is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distbench.audit import Audited, Judgement, judged, lines, main, read_audited, write
from distbench.compliance import LEAST_LOGGED, answer_hash
from distbench.errors import UsageError
from distbench.verdict import result
from tests.unit.test_loadgen_verdict import run

CONFIGS = {
    "TEST01": {
        "effective_accuracy_log_rng_seed": 720381539243781796,
        "effective_accuracy_log_sampling_target": 4096,
    },
    "TEST04": {
        "effective_performance_issue_same": True,
        "effective_performance_issue_same_index": 3,
    },
}
"""What LoadGen logs of a run that took the test's audit.config."""


def audited(tmp_path: Path, role: str, **more: Any) -> Audited:
    """Return a run of Server over two ranks, which have 405 us for each query."""
    mode = role if role in ("performance", "accuracy") else "compliance"
    audit = role if mode == "compliance" else ""
    keys = CONFIGS.get(role, {}) | more.get("keys", {})
    made = run(keys, {"mode": mode, "audit": audit}, right=1, of=1)
    for record in made.records:
        assert record.after is not None
        record.after["answers"] = more.get("hashes", [[1, answer_hash(b"b")]] * 32)
        record.before["config"] = {"mode": {"value": mode, "origin": "option"}}
    path = tmp_path / role
    (path / "loadgen").mkdir(parents=True)
    entries = [
        {"seq_id": i, "qsl_idx": i % 3, "data": (more.get("answer") or b"abc"[i % 3 :][:1]).hex()}
        for i in range(LEAST_LOGGED)
    ]
    (path / "loadgen" / "mlperf_log_accuracy.json").write_text(json.dumps(entries))
    assert made.driver is not None and made.driver.rows is not None
    columns, rows = made.driver.before["columns"], made.driver.rows
    if more.get("same", role == "TEST04"):
        rows[:, columns.index("index")] = 3
    failed = more.get("failed", 0)
    rows[:failed, columns.index("completed")] = -2
    assert made.driver.after is not None
    told = made.driver.after["loadgen"]
    return Audited(path, made, result(made), made.first.before["official"], told["keys"])


def roles(tmp_path: Path) -> dict[str, Audited]:
    names = ("performance", "accuracy", "TEST01", "TEST04")
    return {name: audited(tmp_path, name) for name in names}


def passed(judgement: Judgement) -> dict[str, bool | None]:
    return {each.name: each.passed for each in judgement.checks}


def test_all_that_the_runs_allow_is_judged_in_any_order(tmp_path: Path) -> None:
    found = roles(tmp_path)
    for order in (list(found.values()), list(found.values())[::-1]):
        made = judged(order)
        assert [each.audit for each in made] == ["outputs", "TEST01", "TEST04"]
        assert all(each.passed for each in made), [each.checks for each in made]
    names = [[check.name for check in each.checks] for each in judged(list(found.values()))]
    assert names[0] == ["valid (performance)", "valid (accuracy)", "outputs"]
    begin = ["valid (performance)", "valid (TEST01)", "audit.config"]
    assert names[1] == [*begin, "valid (accuracy)", "answers", "score"]
    begin = ["valid (performance)", "valid (TEST04)", "audit.config"]
    assert names[2] == [*begin, "score", "same-sample"]
    text = "\n".join(lines(judged(list(found.values())), found["TEST01"].official))
    assert "MLPerf-style, unverified" in text and "64 of 64 logged answers" in text


def test_another_answer_fails(tmp_path: Path) -> None:
    found = roles(tmp_path)
    other = audited(tmp_path / "other", "TEST01", answer=b"X")
    made = judged([found["performance"], found["accuracy"], other])
    assert [each.passed for each in made] == [True, False]
    kept = audited(tmp_path / "kept", "performance", hashes=[[1, answer_hash(b"X")]] * 32)
    assert [each.passed for each in judged([kept, found["accuracy"]])] == [False]


def test_a_faster_sample_fails_though_the_rate_is_the_offered_one(tmp_path: Path) -> None:
    found = roles(tmp_path)
    run, records = found["TEST04"].run, []
    for record in found["TEST04"].run.records:
        assert record.rows is not None
        rows, columns = record.rows.copy(), record.before["columns"]
        done, issued = rows[:, columns.index("completed")], rows[:, columns.index("issued")]
        done[:] = issued + (done - issued) // 2
        records.append(replace(record, rows=rows))
    cached = replace(found["TEST04"], run=replace(run, records=tuple(records)))
    (made,) = judged([found["performance"], cached])
    names = ("valid (performance)", "valid (TEST04)", "audit.config", "score")
    assert passed(made) == {**dict.fromkeys(names, True), "same-sample": False}
    verdict = {**cached.result["verdict"], "status": "INVALID"}
    disturbed = replace(cached, result={**cached.result, "verdict": verdict})
    (open_,) = judged([found["performance"], disturbed])
    assert passed(open_)["same-sample"] is None and not open_.passed
    assert "repeat both" in open_.checks[-1].told


def test_what_proves_nothing(tmp_path: Path) -> None:
    """A run that LoadGen calls INVALID, one with failed rows, and one that was not the test."""
    found = roles(tmp_path)
    invalid = audited(tmp_path / "x", "TEST04", keys={"result_validity": "INVALID"})
    assert passed(judged([found["performance"], invalid])[0])["valid (TEST04)"] is False
    failed = audited(tmp_path / "y", "TEST04", failed=9)
    assert passed(judged([found["performance"], failed])[0])["valid (TEST04)"] is False
    cases: dict[str, dict[str, Any]] = {
        "index": {"same": False},
        "key": {"keys": {"effective_performance_issue_same": False}},
    }
    for name, more in cases.items():
        plain = audited(tmp_path / name, "TEST04", **more)
        assert passed(judged([found["performance"], plain])[0])["audit.config"] is False
    verdict = found["accuracy"].result["verdict"]
    low = {**verdict, "rules": {**verdict["rules"], "result": "INVALID"}}
    poor = replace(found["accuracy"], result={**found["accuracy"].result, "verdict": low})
    assert passed(judged([found["performance"], poor])[0])["valid (accuracy)"] is False


def test_what_does_not_go_together_is_refused(tmp_path: Path) -> None:
    found = roles(tmp_path)
    with pytest.raises(UsageError, match="both of performance"):
        judged([found["performance"], audited(tmp_path / "two", "performance")])
    with pytest.raises(UsageError, match="needs the run in performance mode"):
        judged([found["TEST04"]])
    with pytest.raises(UsageError, match="needs the run in accuracy mode"):
        judged([found["TEST01"], found["performance"]])
    with pytest.raises(UsageError, match="nothing can be judged"):
        judged([found["performance"]])
    unlike = replace(found["accuracy"], result={**found["accuracy"].result, "scenario": "offline"})
    with pytest.raises(UsageError, match=r"differ in scenario \(server and offline\)"):
        judged([found["performance"], unlike])
    other = replace(found["accuracy"], official={**found["accuracy"].official, "resident": 5})
    with pytest.raises(UsageError, match=r"differ in resident \(1797 and 5\)"):
        judged([found["performance"], other])
    changed: dict[str, Any] = {"target_qps": 7.0, "min_duration_ns": 1, "shortened": True}
    for name, value in changed.items():
        other = replace(found["TEST04"], official={**found["TEST04"].official, name: value})
        with pytest.raises(UsageError, match=f"differ in {name}"):
            judged([found["performance"], other])
    with pytest.raises(UsageError):
        read_audited(tmp_path)
    assert main([]) == 2


def test_what_is_written(tmp_path: Path) -> None:
    made = judged(list(roles(tmp_path).values()))
    write(tmp_path / "to", made)
    names = sorted(str(p.relative_to(tmp_path / "to")) for p in (tmp_path / "to").rglob("*.txt"))
    assert names == [
        "TEST01/verify_accuracy.txt",
        "TEST01/verify_performance.txt",
        "TEST04/verify_performance.txt",
    ]
    told = json.loads((tmp_path / "to" / "audit.json").read_text())
    assert [each["passed"] for each in told["audits"]] == [True] * 3
    with pytest.raises(UsageError, match="give another --to"):
        write(tmp_path / "to", made)
