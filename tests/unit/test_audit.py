"""The audit command on runs whose logs are made up: which go together, and what is judged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from distbench.audit import Audited, judged, lines, main, read_audited, write
from distbench.compliance import answer_hash
from distbench.errors import UsageError
from distbench.verdict import result
from tests.unit.test_loadgen_verdict import run


def audited(
    tmp_path: Path, role: str, answers: dict[int, bytes] | None = None, **more: Any
) -> Audited:
    """Return a run of Server over two ranks; the driver has 490 us for each query."""
    mode = role if role in ("performance", "accuracy") else "compliance"
    audit = role if mode == "compliance" else ""
    keys = more.pop("keys", {})
    made = run(keys, {"mode": mode, "audit": audit})
    for record in made.records:
        assert record.after is not None
        record.after["answers"] = more.get("hashes", [[1, answer_hash(b"b")]])
        record.before["config"] = {"mode": {"value": mode, "origin": "option"}}
    path = tmp_path / role
    (path / "loadgen").mkdir(parents=True)
    entries = [
        {"seq_id": i, "qsl_idx": i, "data": data.hex()} for i, data in (answers or {}).items()
    ]
    (path / "loadgen" / "mlperf_log_accuracy.json").write_text(json.dumps(entries))
    assert made.driver is not None and made.driver.after is not None
    told = made.driver.after["loadgen"]
    return Audited(path, made, result(made), made.first.before["official"], told["keys"])


ALL = {0: b"a", 1: b"b", 2: b"c"}


def roles(tmp_path: Path) -> dict[str, Audited]:
    return {
        "performance": audited(tmp_path, "performance"),
        "accuracy": audited(tmp_path, "accuracy", ALL),
        "TEST01": audited(tmp_path, "TEST01", {2: b"c"}),
        "TEST04": audited(tmp_path, "TEST04"),
    }


def test_all_that_the_runs_allow_is_judged_in_any_order(tmp_path: Path) -> None:
    found = roles(tmp_path)
    for order in (list(found.values()), list(found.values())[::-1]):
        made = judged(order)
        assert [each.audit for each in made] == ["outputs", "TEST01", "TEST04"]
        assert all(each.passed for each in made), [each.checks for each in made]
    names = [[check.name for check in each.checks] for each in judged(list(found.values()))]
    valid = ["valid (performance)", "valid (TEST01)"]
    assert names[1] == [*valid, "answers", "score"]
    assert names[2] == ["valid (performance)", "valid (TEST04)", "score", "same-sample"]
    text = "\n".join(lines(judged(list(found.values())), found["TEST01"].official))
    assert "MLPerf-style, unverified" in text and "1 of 1 logged answers" in text


def test_another_answer_fails(tmp_path: Path) -> None:
    found = roles(tmp_path)
    other = audited(tmp_path / "other", "TEST01", {2: b"X"})
    made = judged([found["performance"], found["accuracy"], other])
    assert [each.passed for each in made] == [True, False]
    kept = audited(tmp_path / "kept", "performance", hashes=[[1, answer_hash(b"X")]])
    assert [each.passed for each in judged([kept, found["accuracy"]])] == [False]


def test_a_faster_sample_fails_though_the_rate_is_the_offered_one(tmp_path: Path) -> None:
    found = roles(tmp_path)
    run, driver = found["TEST04"].run, found["TEST04"].run.driver
    assert driver is not None and driver.rows is not None
    rows = driver.rows.copy()
    columns = driver.before["columns"]
    done, issued = columns.index("completed"), columns.index("issued")
    rows[:, done] = rows[:, issued] + (rows[:, done] - rows[:, issued]) // 2
    cached = replace(found["TEST04"], run=replace(run, driver=replace(driver, rows=rows)))
    (made,) = judged([found["performance"], cached])
    assert {each.name: each.passed for each in made.checks} == {
        "valid (performance)": True,
        "valid (TEST04)": True,
        "score": True,
        "same-sample": False,
    }


def test_runs_that_loadgen_calls_invalid_prove_nothing(tmp_path: Path) -> None:
    found = roles(tmp_path)
    invalid = audited(tmp_path / "x", "TEST04", keys={"result_validity": "INVALID"})
    (made,) = judged([found["performance"], invalid])
    assert not made.passed and made.checks[1].passed is False


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
