"""Token models through saved runs: TTFT, TPOT, gaps, tokens/s, goodput, and their gates."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench.bounds import parse_bounds
from distbench.gates import Gate
from distbench.judged import judge_tokens, time_per_token_ns
from distbench.quantiles import percentiles_ns
from distbench.rules import limits, parse_rules
from distbench.run import load_run
from distbench.samples import SampleLog
from distbench.sut import Done, First, collector
from distbench.verify import verify

from .serving import MS, US, S, queries, served, tokens
from .synthetic import in_memory, make_run
from .test_verdict import found

PERCENTILES = {"p50": 0.5, "p90": 0.9, "p95": 0.95, "p97": 0.97, "p99": 0.99, "p99.9": 0.999}


def texts(n: int, seed: int, gap_ns: int = MS, least: int = 2) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    at = queries(n, gap_ns, served=rng.integers(5 * MS, 9 * MS, n))
    first_ns = rng.integers(1 * MS, 3 * MS, n)
    at["stamps"] = tokens(at, rng.integers(least, 17, n), first_ns)
    return at


def parts(at: dict[str, Any]) -> tuple[Any, Any, Any]:
    latency = at["completed"] - at["scheduled"]
    ttft = at["first_token"] - at["scheduled"]
    return latency, ttft, time_per_token_ns(latency, ttft, at["tokens"])


def test_times_of_tokens_are_loadgens_over_both_ranks() -> None:
    both = [texts(900, 1), texts(700, 2)]
    got = in_memory(change=served(both)).result()["metrics"]
    for name, place in (("ttft", 1), ("tpot", 2)):
        values = np.concatenate([parts(at)[place] for at in both])
        for label, wanted in zip(
            PERCENTILES, percentiles_ns(values, [*PERCENTILES.values()]), strict=True
        ):
            assert got[f"{name}.{label}"]["value"] == wanted / S, (name, label)
    gaps = np.concatenate(
        [np.diff(at["stamps"][row, :n]) for at in both for row, n in enumerate(at["tokens"])]
    )
    assert got["gap.mean"]["n"] == len(gaps)
    assert got["gap.max"]["value"] == gaps.max() / S
    assert got["gap.p90"]["value"] == percentiles_ns(gaps, [0.9])[0] / S
    every = sum(int(at["tokens"].sum()) for at in both)
    makespan = in_memory(change=served(both)).result()["window"]["makespan_s"]
    assert got["throughput.tokens"]["value"] == pytest.approx(every / makespan)


def test_a_model_without_tokens_has_no_figures_of_them() -> None:
    got = in_memory(ranks=1, change=served([queries(200)])).result()["metrics"]
    assert not [name for name in got if name.split(".")[0] in ("ttft", "tpot", "gap", "goodput")]
    assert "throughput.tokens" not in got


def test_one_token_has_no_time_per_token_and_no_gap() -> None:
    at = texts(300, 3, least=1)
    assert (at["tokens"] == 1).any()
    got = in_memory(ranks=1, change=served([at])).result()["metrics"]
    assert got["tpot.p50"]["n"] == int((at["tokens"] > 1).sum())
    assert got["ttft.p50"]["n"] == 300
    assert got["gap.p50"]["n"] == int((at["tokens"] - 1).sum())


def test_goodput_counts_the_queries_that_keep_every_bound() -> None:
    both = [texts(500, 5), texts(400, 6)]
    asked = "8ms@p90,ttft=2ms@p50,tpot=700us@p99"
    bounds = [asdict(each) for each in parse_bounds(asked)]
    got = in_memory(change=served(both, bounds=bounds)).result()
    good = 0
    for at in both:
        latency, ttft, tpot = parts(at)
        good += int(((latency <= 8 * MS) & (ttft <= 2 * MS) & (tpot <= 700 * US)).sum())
    assert 50 < good < 800
    assert got["metrics"]["goodput"]["n"] == good
    assert got["metrics"]["goodput"]["value"] == pytest.approx(good / got["window"]["makespan_s"])


@pytest.mark.parametrize("rules", ["mlperf-v5.1", "mlperf-v5.1,interactive"])
@pytest.mark.parametrize("slow", [0, 4, 60])
def test_the_gates_are_those_of_the_same_latencies(rules: str, slow: int) -> None:
    both = [texts(1_500, 8, gap_ns=500 * US), texts(600, 9)]
    late = both[0]["first_token"]
    late[:slow] += 3 * S  # both rounds' limits on TTFT are below
    both[0]["completed"][:slow] += 4 * S
    both[0]["finished"][:slow] += 4 * S
    stamps = both[0]["stamps"][:slow]
    stamps[stamps > 0] += 3 * S
    rules += ",shortened=500ms"

    def change(ranks: Any) -> None:
        served(both)(ranks)
        for rank in ranks:
            rank.before["rules"] = rules
            rank.before["model"]["name"] = "llama3_1-8b"

    run = in_memory(change=change)
    asked = parse_rules(rules)
    held = limits(asked, "server", "llama3_1-8b", interactive=asked.interactive)
    joined = {
        name: np.concatenate([at[name] for at in both])
        for name in ("scheduled", "completed", "first_token", "tokens")
    }
    order = np.argsort(joined["scheduled"], kind="stable")
    due, done, first, count = (joined[name][order] for name in joined)
    judged = judge_tokens(due, done - due, first - due, count, held)
    word = run.result()["verdict"]["rules"]
    assert [Gate(**gate) for gate in word["gates"]] == list(judged.gates)
    assert word["result"] == judged.result
    passed = {gate.name: gate.passed for gate in judged.gates}
    assert passed["early_stopping.ttft"] == (slow < 12)


def test_a_query_of_one_token_is_an_error_under_the_rules() -> None:
    at = texts(1_000, 4, least=1)

    def change(ranks: Any) -> None:
        served([at])(ranks)
        ranks[0].before["rules"] = "mlperf-v5.1,shortened=500ms"
        ranks[0].before["model"]["name"] = "llama3_1-8b"

    gates = in_memory(ranks=1, change=change).result()["verdict"]["rules"]["gates"]
    (errors,) = [gate for gate in gates if gate["name"] == "errors"]
    assert errors["value"] == int((at["tokens"] == 1).sum()) > 0
    assert not errors["passed"]


def test_limits_on_tokens_are_kept_by_no_model_without_them() -> None:
    def change(ranks: Any) -> None:
        served([queries(1_000)])(ranks)
        ranks[0].before["rules"] = "mlperf-v5.1,shortened=500ms"
        ranks[0].before["model"]["name"] = "llama3_1-8b"

    word = in_memory(ranks=1, change=change).result()["verdict"]["rules"]
    assert word["result"] == "INVALID"
    assert {g["name"]: g["value"] for g in word["gates"]}["errors"] == 1_000


def test_a_stored_run_keeps_its_tokens_and_verify_watches_them(tmp_path: Path) -> None:
    change = served([texts(400, 1), texts(300, 2)])
    assert found(tmp_path / "a", change)[0] == "VALID"
    folder = make_run(tmp_path / "b", change=change)
    assert load_run(folder).result() == in_memory(change=change).result()
    assert verify(folder)[0] == 0
    path = folder / "ranks" / "00001" / "tokens.npy"
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    status, lines = verify(folder)
    assert status == 1
    assert any("tokens.npy" in line for line in lines)


def test_a_run_without_its_tokens_is_incomplete(tmp_path: Path) -> None:
    folder = make_run(tmp_path / "r", change=served([texts(100, 1), texts(100, 2)]))
    (folder / "ranks" / "00001" / "tokens.npy").unlink()
    assert load_run(folder).result()["verdict"]["status"] == "INCOMPLETE"


@pytest.mark.parametrize("way", ["early", "since issue", "after completion", "not in order"])
def test_stamps_of_tokens_that_cannot_be_true_make_a_run_invalid(tmp_path: Path, way: str) -> None:
    at = texts(400, 3)

    def change(ranks: Any) -> None:
        served([at], bounds=[asdict(each) for each in parse_bounds("ttft=1s@p90")])(ranks)
        log = ranks[0].log
        if way == "early":
            log.first_token -= S
            log.token_ns[log.token_ns > 0] -= S
        elif way == "since issue":
            log.first_token[:] = MS
            log.token_ns[:, 0] = MS
        elif way == "after completion":
            last = log.tokens - 1
            log.token_ns[np.arange(400), last] = log.completed + 1
        else:
            log.token_ns[:, 1] = log.token_ns[:, 0] - 1

    state, findings = found(tmp_path, change, ranks=1)
    assert state == "INVALID"
    (told,) = [f for f in findings if f.code == "stamps-contradict"]
    assert told.value == 400
    got = in_memory(ranks=1, change=change).result()["metrics"]
    assert not [name for name in got if name.startswith(("ttft", "tpot", "gap"))]
    assert (got["goodput"]["value"], got["goodput"]["reason"]) == (None, "no query has a ttft")


def test_queries_at_fault_are_left_out_and_are_errors_under_the_rules() -> None:
    at = texts(1_000, 3)

    def change(ranks: Any) -> None:
        served([at])(ranks)
        ranks[0].log.first_token[:7] = 1
        ranks[0].before["rules"] = "mlperf-v5.1,shortened=500ms"
        ranks[0].before["model"]["name"] = "llama3_1-8b"

    got = in_memory(ranks=1, change=change).result()
    assert got["metrics"]["ttft.p50"]["n"] == 993
    gates = {gate["name"]: gate["value"] for gate in got["verdict"]["rules"]["gates"]}
    assert gates["errors"] == 7


# Stamps of the loop


def test_first_tokens_and_the_others_are_stored_as_they_come(tmp_path: Path) -> None:
    log = SampleLog.create(
        tmp_path / "samples.npy", 3, ("completed", "count", "tokens", "first_token")
    )
    log.record_tokens(tmp_path / "tokens.npy", 4)
    log.count[:] = 1
    collect = collector(log, {}, [], lambda: 99)
    assert collect([First(2, 7), First(0, 8)]) == 0
    assert log.first_token.tolist() == [8, 0, 7]
    done = [Done(2, 1, [0], token_ns=(7, 9, 12)), Done(1, 1, [0], token_ns=[5]), Done(0, 1, [0])]
    assert collect(done) == 3
    assert log.tokens.tolist() == [0, 1, 3]
    assert log.first_token.tolist() == [8, 5, 7]
    assert log.token_ns is not None
    assert log.token_ns.tolist() == [[0, 0, 0, 0], [5, 0, 0, 0], [7, 9, 12, 0]]
    stored = np.load(tmp_path / "tokens.npy")
    assert stored.tolist() == log.token_ns.tolist()


def test_a_log_that_is_frozen_keeps_its_tokens_too(tmp_path: Path) -> None:
    log = SampleLog.create(tmp_path / "samples.npy", 2, ("completed", "count"))
    log.record_tokens(tmp_path / "tokens.npy", 2)
    assert log.token_ns is not None
    log.token_ns[0] = 3
    log.freeze()
    log.token_ns[1] = 4
    assert log.token_ns.tolist() == [[3, 3], [4, 4]]
    assert np.load(tmp_path / "tokens.npy").tolist() == [[3, 3], [0, 0]]


def test_no_room_for_tokens_is_a_sentence(tmp_path: Path) -> None:
    from distbench.errors import UsageError

    log = SampleLog.in_memory(10**9, ())
    with pytest.raises(UsageError, match="no room for 1000000000 samples"):
        log.record_tokens(tmp_path / "tokens.npy", 10**6)
    assert list(tmp_path.iterdir()) == []
