"""What LoadGen recorded of runs in which it drove us, put through our own gates."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distbench.official import Official, settled
from distbench.user_conf import SCENARIOS
from tests.oracle.loadgen import MS, check_gates, check_latencies, judged_of
from tests.support import environment

pytestmark = pytest.mark.timeout(100)

TOTAL = 200
LATENCY = {"server_target_latency_ns": 15 * MS}
TOKENS = {"ttft_latency": 500 * MS, "tpot_latency": 50 * MS}
INTERACTIVE = {"ttft_latency": 200 * MS, "tpot_latency": 25 * MS}
FEWEST = {"offline": TOTAL, "server": 100, "singlestream": 100, "multistream": 662}
LATE = tuple(range(0, 200, 10))


def case(scenario: str, word: str, limits: Any = None, **more: Any) -> dict[str, Any]:
    """Return a run that LoadGen calls so; ``limits`` are those that it is to be held to."""
    tokens, rules = more.pop("tokens", 0), more.pop("rules", "")
    asked = Official(
        scenario,
        name="tinylm" if tokens else "echo",
        rules=f"mlperf-v5.0,shortened=200ms{rules}",
        target_qps=more.pop("qps", None),
    )
    return {
        "official": settled(asked, TOTAL, TOTAL, [2000.0, 2000.0]),
        "scenario": SCENARIOS[scenario],
        "settings": {"min_query_count": FEWEST[scenario], "min_duration_ms": 200, **(limits or {})},
        "word": word,
        "tokens": tokens,
        "takes_s": 0.0,
        "late": (),
        "late_s": 0.05,
    } | more


CASES = {
    "offline": case("offline", "VALID", takes_s=0.15),
    "offline too short": case("offline", "INVALID"),
    "offline, texts": case("offline", "VALID", takes_s=0.15, tokens=9),
    "server": case("server", "", LATENCY, qps=4000.0),
    "server, some late": case("server", "INVALID", LATENCY, qps=4000.0, late=LATE),
    "server, too few": case("server", "INVALID", LATENCY, qps=1500.0),
    "texts": case("server", "", TOKENS, qps=3000.0, tokens=9),
    "texts, some late": case(
        "server", "INVALID", TOKENS, qps=3000.0, tokens=9, late=LATE, late_s=0.6
    ),
    "texts at once": case("server", "", INTERACTIVE, qps=3000.0, tokens=9, rules=",interactive"),
    "singlestream": case("singlestream", "VALID", takes_s=2e-4),
    "singlestream, texts": case("singlestream", "VALID", takes_s=2e-4, tokens=9),
    "multistream": case("multistream", "VALID"),
    "multistream, texts": case("multistream", "VALID", tokens=9),
}  # fmt: skip


@pytest.fixture(scope="module")
def driven(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Let LoadGen drive all of them, in one process of its own."""
    pytest.importorskip("mlperf_loadgen", reason="LoadGen comes with the extra [mlperf]")
    folder = tmp_path_factory.mktemp("driven")
    asked, answered = folder / "cases.json", folder / "results.json"
    asked.write_text(json.dumps([*CASES.values()]))
    argv = [sys.executable, "-m", "tests.oracle.driven_child", str(asked), str(answered)]
    done = subprocess.run(
        argv, env=environment(), capture_output=True, text=True, check=False, timeout=90,
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, json.loads(answered.read_text()), strict=True))


@pytest.mark.parametrize("name", CASES)
def test_a_run_that_loadgen_drove_is_judged_as_it_did(driven: dict[str, Any], name: str) -> None:
    asked, result = CASES[name], driven[name]
    keys = result["keys"]
    # LoadGen counts the conf files of a process, which here has all the runs.
    assert [each for each in result["errors"] if "Multiple conf files" not in each] == []
    assert keys["result_validity"] == (asked["word"] or keys["result_validity"])
    if asked["tokens"] and "Stream" in asked["scenario"]:
        # With token latencies its estimates of streams are of other times, see method.md.
        check_gates(judged_of(asked, result), keys)
    else:
        check_latencies(asked, result)
    assert judged_of(asked, result).result == keys["result_validity"]
