"""LoadGen drives gloo ranks: its logs and the report, key by key; accuracy; lost ranks."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from distbench.audit import judged, read_audited
from distbench.errors import UsageError
from distbench.models.digits_data import read_data
from distbench.models.tinylm_data import draw_samples, read_expected, read_text, training_bytes
from distbench.run import load_run
from distbench.scores import NO_TEXT
from distbench.submission import main as submission
from distbench.verify import verify
from tests.support import run_ranks, torchrun

pytestmark = pytest.mark.timeout(120)

SHORT = "mlperf-v5.0,shortened=1s"
KEYS = {
    "offline": {
        "throughput": ("result_samples_per_second", 1),
        "latency.p90": ("result_90.00_percentile_latency_ns", 1e9),
        "latency.max": ("result_max_latency_ns", 1e9),
    },
    "server": {
        "throughput": ("result_completed_samples_per_sec", 1),
        "throughput.scheduled": ("result_scheduled_samples_per_sec", 1),
        "latency.p50": ("result_50.00_percentile_latency_ns", 1e9),
        "latency.p99": ("result_99.00_percentile_latency_ns", 1e9),
        "latency.p99.9": ("result_99.90_percentile_latency_ns", 1e9),
        "latency.max": ("result_max_latency_ns", 1e9),
        "latency.mean": ("result_mean_latency_ns", 1e9),
    },
    "singlestream": {
        "throughput": ("result_qps_with_loadgen_overhead", 1),
        "latency.p90": ("result_90.00_percentile_latency_ns", 1e9),
    },
    "multistream": {
        "latency.p99": ("result_99.00_percentile_per_query_latency_ns", 1e9),
        "latency.max": ("result_max_latency_ns", 1e9),
    },
}
"""Metrics by scenario, and where LoadGen has them."""
TOKENS = {
    "throughput.tokens": ("result_completed_tokens_per_second", 1),
    "ttft.p99": ("result_first_token_99.00_percentile_latency_ns", 1e9),
    "ttft.mean": ("result_first_token_mean_latency_ns", 1e9),
    "tpot.p99": ("result_time_per_output_token_99.00_percentile_ns", 1e9),
    "tpot.max": ("result_time_to_output_token_max", 1e9),
}


def official_run(out: str, scenario: str, name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Take a run of LoadGen's on this rank; tells what is left of it."""
    from distbench.load import Load
    from distbench.mlperf import MAX_BATCH, measure_mlperf
    from distbench.models import load_model
    from distbench.official import Official
    from distbench.settings import Settings
    from distbench.world import join

    options = {"rules": SHORT, **options}
    group = options.pop("max_batch", 1 if name == "tinylm" else MAX_BATCH[scenario])
    payload = options.pop("payload", "index")
    model = options.pop("model", name)
    mode = options.pop("mode", "performance")
    official = Official(scenario, mode, name, **options)
    load = Load(1.0, dispatch="central", max_batch=group, payload=payload)
    settings = Settings(
        warmup_ns=50_000_000, output_dir=out, model_name=model, load=load, official=official,
        quiet=True,
    )  # fmt: skip
    with join(device="cpu", timeout_s=30) as world:
        sut = load_model(model, world, group)
        try:
            run = measure_mlperf(sut, world, settings)
        finally:
            sut.close()
        return {"result": run.result(), "folder": str(run.folder or "")}


def logged(folder: str | Path) -> dict[str, Any]:
    """Read LoadGen's detail log with nothing of distbench's."""
    text = (Path(folder) / "loadgen" / "mlperf_log_detail.txt").read_text()
    found = re.findall(r':::MLLOG \{"key": "([^"]+)", "value": (.*?), "time_ms"', text)
    return {key: value.strip('"') for key, value in found}


def agree(scenario: str, name: str, told: dict[str, Any], ranks: int) -> None:
    """Compare a result with LoadGen's own log, key by key."""
    result, keys = told["result"], logged(told["folder"])
    wanted = KEYS[scenario] | (TOKENS if name == "tinylm" and scenario == "server" else {})
    for metric, (key, by) in wanted.items():
        assert result["metrics"][metric]["value"] == float(keys[key]) / by, metric
    rules = result["verdict"]["rules"]
    assert rules["source"] == "loadgen" and rules["wording"] == "MLPerf-style, unverified"
    errors = "is_error\": true" in (
        Path(told["folder"]) / "loadgen" / "mlperf_log_detail.txt"
    ).read_text()
    assert not errors
    valid = keys["result_validity"] == "VALID"
    assert rules["result"] == ("SHORTENED" if valid else "INVALID")
    gates = {gate["name"]: gate["passed"] for gate in rules["gates"]}
    assert gates["loadgen-valid"] == valid and gates["errors"]
    assert gates["min_queries"] == (keys["result_min_queries_met"] == "true")
    count = int(keys["result_query_count"])
    each = {"offline": int(keys["effective_samples_per_query"]), "multistream": 8}.get(scenario, 1)
    assert result["window"]["samples"] == count * each
    assert [row["samples"] > 0 for row in result["per_rank"]] == [True] * ranks
    assert sum(row["samples"] for row in result["per_rank"]) == count * each
    metrics = result["metrics"]
    assert gates["settings"]
    assert metrics["dispatch.latency.p50"]["value"] > 0
    assert 0 < metrics["dispatch.latency.max"]["value"] <= metrics["latency.max"]["value"] * 1.01
    if "ttft.p99" in metrics and metrics["ttft.p99"]["value"] is not None:
        assert metrics["ttft.p99"]["value"] <= metrics["latency.p99"]["value"]
        assert metrics["tpot.p99"]["value"] < metrics["latency.p99"]["value"] / 4
    for label in ("latency.p90", "latency.p99"):
        estimate = metrics.get(f"{label}.early_stopping", {"value": None})["value"]
        assert estimate is None or estimate >= metrics[label]["value"]
    code, lines = verify(Path(told["folder"]))
    assert code == 0, lines


def expected() -> Any:
    return read_expected(draw_samples(read_text()))


def run(tmp_path: Path, ranks: int, scenario: str, name: str, **options: Any) -> dict[str, Any]:
    told = run_ranks(official_run, ranks, str(tmp_path), scenario, name, options)
    assert all(each["result"] == told[0]["result"] for each in told)
    return told[0]


QUICK = ("offline",)
"""Server on two ranks is what the command below runs."""
SCENARIOS = ("offline", "server", "singlestream", "multistream")


@pytest.mark.parametrize("scenario", QUICK)
def test_digits_on_two_ranks(tmp_path: Path, scenario: str) -> None:
    agree(scenario, "digits", run(tmp_path, 2, scenario, "digits"), 2)


def test_texts_on_two_ranks(tmp_path: Path) -> None:
    told = run(tmp_path, 2, "server", "tinylm", target_qps=20.0)
    agree("server", "tinylm", told, 2)
    bits(told)


def bits(told: dict[str, Any]) -> None:
    """The held-out text is told by both ranks, a part each, and is as hard as training said."""
    found, folder = told["result"]["metrics"]["bits_per_byte"], Path(told["folder"])
    assert found["n"] == len(read_text()) - training_bytes(read_text())
    assert found["value"] == pytest.approx(1.361, abs=1e-3)
    parts = [json.loads(each.read_text())["text"] for each in folder.glob("ranks/*/after.json")]
    assert len(parts) == 2 and all(each["bytes"] > 2600 for each in parts)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("name", ["digits", "tinylm"])
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_every_scenario(tmp_path: Path, scenario: str, name: str, ranks: int) -> None:
    options = {"target_qps": 20.0} if (scenario, name) == ("server", "tinylm") else {}
    if ranks == 2 and (options or (name == "digits" and scenario in QUICK)):
        pytest.skip("it is among the quick tests")
    if (scenario, name) == ("multistream", "tinylm"):  # 662 queries are 5,296 texts
        options = {"user_conf": "*.MultiStream.min_query_count = 10"}
    agree(scenario, name, run(tmp_path, ranks, scenario, name, **options), ranks)


@pytest.mark.parametrize(
    ("name", "of"), [("digits", 360), pytest.param("tinylm", 5233, marks=pytest.mark.slow)]
)
def test_accuracy_is_that_of_loadgens_log_and_of_our_own_pass(
    tmp_path: Path, name: str, of: int
) -> None:
    told = run(tmp_path, 2, "offline", name, mode="accuracy")
    found = told["result"]["metrics"]["accuracy"]
    assert (found["value"], found["n"]) == (1.0, of) and "mlperf_log_accuracy.json" in found["definition"]  # fmt: skip
    folder = Path(told["folder"])
    entries = json.loads((folder / "loadgen" / "mlperf_log_accuracy.json").read_text())
    assert len({each["qsl_idx"] for each in entries}) == len(entries) == told["result"]["window"]["samples"]  # fmt: skip
    assert told["result"]["verdict"]["status"] == "VALID"
    assert told["result"]["verdict"]["rules"]["result"] == "SHORTENED"
    if name == "tinylm":
        bits(told)
    else:
        assert told["result"]["metrics"]["bits_per_byte"]["reason"] == NO_TEXT
    # One answer changed: another figure, and verify says that the files are not those.
    held_out = {"digits": read_data().held_out, "tinylm": expected().held_out}[name]
    one = next(each for each in entries if each["qsl_idx"] == int(held_out[0]))
    one["data"] = "7F" * (len(one["data"]) // 2)
    held = json.loads(json.dumps(entries))
    (folder / "loadgen" / "mlperf_log_accuracy.json").write_text(json.dumps(held))
    changed = load_run(folder).result()["metrics"]["accuracy"]
    assert changed["n"] == of and changed["value"] < 1
    assert verify(folder)[0] == 1


def test_samples_cross_the_wire_as_data(tmp_path: Path) -> None:
    told = run(tmp_path, 2, "offline", "digits", payload="data", mode="accuracy")
    assert told["result"]["metrics"]["accuracy"]["value"] == 1.0
    assert told["result"]["clock"]["driver"]["payload"] == "data"


def from_a_script(out: str) -> dict[str, Any]:
    """Serve the benchmark with a function of the user's own."""
    import numpy as np

    import distbench
    from distbench.models.digits_data import read_data

    labels = read_data().labels
    with distbench.join(device="cpu") as world:
        run = distbench.run_mlperf(
            lambda indices: np.eye(10)[labels[indices]], world, mode="accuracy", rules=SHORT,
            warmup_s=0.05, output_dir=out,
        )  # fmt: skip
        return run.result()


def test_a_function_serves_a_benchmark_from_a_script(tmp_path: Path) -> None:
    """It has 1,024 samples: not all that are held out, which is told."""
    for result in run_ranks(from_a_script, 2, str(tmp_path)):
        found = result["metrics"]["accuracy"]
        assert found["value"] is None and "no answer for sample" in found["reason"]
        assert result["verdict"]["rules"]["result"] == "INVALID"


def refused(out: str, options: dict[str, Any]) -> str:
    """Return the sentence that all ranks get, and that nothing was left."""
    try:
        official_run(out, options.pop("scenario"), "digits", options)
    except UsageError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"scenario": "offline", "target_qps": 5.0}, "give --target-qps .* or more"),
        ({"scenario": "server", "rules": "mlperf-v5.1"}, r"5\.0\.13 is installed here"),
    ],
)
def test_what_cannot_last_is_refused_before_loadgen_starts(
    tmp_path: Path, options: dict[str, Any], told: str
) -> None:
    sentences = run_ranks(refused, 2, str(tmp_path), options)
    assert len(set(sentences)) == 1 and re.search(told, sentences[0]), sentences
    assert not list(tmp_path.rglob("mlperf_log_detail.txt"))


def test_the_command_under_torchrun(tmp_path: Path) -> None:
    argv = ("distbench.mlperf", "--rules", SHORT, "--scenario", "server")
    argv += ("--target-qps", "700")
    told = torchrun(2, *argv, "--warmup", "100ms", "--output-dir", str(tmp_path), timeout_s=90)
    assert told.returncode == 0, told.stderr
    first = told.stdout.splitlines()[0]
    assert "MLPerf v5.0 gates: SHORTENED (MLPerf-style, unverified)" in first, told.stdout
    assert "LoadGen 5.0.13 in performance mode, target_qps 700" in told.stdout
    assert "p99.9" in told.stdout and "max" in told.stdout
    (folder,) = tmp_path.iterdir()
    result = json.loads((folder / "result.json").read_text())
    agree("server", "digits", {"result": result, "folder": folder}, 2)


# -- compliance ----------------------------------------------------------------------------------


def judge(*folders: str) -> dict[str, dict[str, bool | None]]:
    """Return what every check of every test that the runs allow says."""
    made = judged([read_audited(Path(each)) for each in folders])
    return {each.audit: {check.name: check.passed for check in each.checks} for each in made}


@pytest.mark.slow
def test_test01_of_two_ranks(tmp_path: Path) -> None:
    folders = [
        run(tmp_path, 2, "offline", "digits", **options)["folder"]
        for options in (
            {"target_qps": 150_000.0},
            {"mode": "accuracy"},
            {"mode": "compliance", "audit": "TEST01", "target_qps": 150_000.0},
        )
    ]
    found = judge(*folders)
    assert found["outputs"]["outputs"] is True and found["outputs"]["valid (accuracy)"] is True
    assert found["TEST01"]["answers"] is True and found["TEST01"]["audit.config"] is True
    logged = json.loads((Path(folders[2]) / "loadgen" / "mlperf_log_accuracy.json").read_text())
    assert 2_000 < len(logged) < 8_192, "about 4,096 of 165,000 answers"
    result = load_run(folders[2]).result()
    assert result["verdict"]["rules"]["audit"] == "TEST01"
    assert result["verdict"]["rules"]["result"] in ("SHORTENED", "INVALID")
    # The same with one answer changed.
    logged[7]["data"] = "7F"
    path = Path(folders[2]) / "loadgen" / "mlperf_log_accuracy.json"
    path.write_text(json.dumps(logged))
    with pytest.raises(UsageError, match="not as it was written"):
        read_audited(Path(folders[2]))


def cached(out: str, audit: str, cache: bool) -> str:
    """Serve with 4 ms a sample, or with none for one that came before; returns the folder."""
    import time

    import numpy as np

    import distbench

    seen: set[int] = set()

    def serve(indices: Any) -> Any:
        new = [i for i in indices.tolist() if not cache or i not in seen]
        seen.update(new)
        time.sleep(0.004 * len(new))
        return np.zeros((len(indices), 10))

    with distbench.join(device="cpu") as world:
        run = distbench.run_mlperf(
            serve, world, scenario="server", mode="compliance" if audit else "performance",
            audit=audit, rules="mlperf-v5.0,shortened=5s", target_qps=100.0, warmup_s=0.05,
            output_dir=out, user_conf="*.Server.target_latency = 1000",
        )  # fmt: skip
        return str(run.folder)


@pytest.mark.slow
@pytest.mark.parametrize("cache", [True, False])
def test_a_cache_is_found_in_server_whose_rate_hides_it(tmp_path: Path, cache: bool) -> None:
    folders = [run_ranks(cached, 2, str(tmp_path), x, cache)[0] for x in ("", "TEST04")]
    checks = judge(*folders)["TEST04"]
    assert checks["score"] is True, "MLCommons' rule sees nothing: the rate is the offered one"
    assert checks["same-sample"] is not cache
    (made,) = judged([read_audited(Path(each)) for each in folders])
    times = float(made.checks[-1].told.split()[0])
    assert times > 2 if cache else 0.8 < times < 1.25, "whatever the host's other work was"
    issued = load_run(folders[1]).driver
    assert issued is not None and len(set(issued.column("index").tolist())) == 1


@pytest.mark.slow
@pytest.mark.parametrize("scenario", ["server", "offline"])
def test_test06_looks_at_the_tokens_of_two_ranks(tmp_path: Path, scenario: str) -> None:
    options = {"mode": "compliance", "audit": "TEST06"}
    told = run(tmp_path, 2, scenario, "tinylm", **options, **QPS.get(scenario, {}))
    names = ("valid (TEST06)", "audit.config", "first token", "end token", "length")
    assert judge(told["folder"]) == {"TEST06": dict.fromkeys(names, True)}
    assert told["result"]["verdict"]["rules"]["result"] == "SHORTENED"
    assert told["result"]["window"]["samples"] == 100


QPS = {"server": {"target_qps": 20.0}}


@pytest.mark.slow
def test_the_floor_beside_a_run_of_two_ranks(tmp_path: Path) -> None:
    """A model that does nothing is its own floor; one of 50 ms is far from it."""
    told = run(tmp_path, 2, "server", "echo", target_qps=500.0)
    metrics = told["result"]["metrics"]
    ratio = metrics["latency.p50"]["value"] / metrics["floor.latency.p50"]["value"]
    assert 0.1 < ratio < 10
    assert "near-floor" in {each["code"] for each in told["result"]["verdict"]["findings"]}
    text = (Path(told["folder"]) / "report.txt").read_text()
    assert re.search(r"^floor +[0-9,]+ ", text, re.MULTILINE) and "us*" in text
    assert verify(Path(told["folder"]))[0] == 0
@pytest.mark.slow
def test_runs_become_a_submission_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [
        run(tmp_path / mode, 2, "offline", "digits", mode=mode)["folder"]
        for mode in ("performance", "accuracy")
    ]
    tree = tmp_path / "tree"
    argv = ("--submitter", "acme", "--system", "two", "--to", str(tree))
    assert submission([*argv, *folders]) == 0
    place = tree / "open/acme/results/two/digits/Offline"
    found = {str(path.relative_to(place)) for path in place.rglob("*") if path.is_file()}
    assert found == {
        *(f"{part}/mlperf_log_{name}.txt" for part in ("performance/run_1", "accuracy")
          for name in ("summary", "detail")),
        "accuracy/accuracy.txt", "accuracy/mlperf_log_accuracy.json",
    }  # fmt: skip
    for folder, part in zip(folders, ("performance/run_1", "accuracy"), strict=True):
        for name in ("mlperf_log_summary.txt", "mlperf_log_detail.txt"):
            assert (place / part / name).read_bytes() == (
                Path(folder) / "loadgen" / name
            ).read_bytes()
    assert (place / "accuracy/accuracy.txt").read_text().startswith("accuracy=100.000000%, good=360")
    conf = tree / "open/acme/measurements/two/digits/Offline/user.conf"
    assert conf.read_bytes() == (Path(folders[0]) / "loadgen/user.conf").read_bytes()
    told = capsys.readouterr().out
    assert '"Test duration less than 600s in user config. expected=600000, found=1000"' in told
    assert "Encountered invalid line" not in told and "contains errors" not in told
