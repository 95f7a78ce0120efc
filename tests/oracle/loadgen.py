"""LoadGen as an oracle: makes its environments, runs cases in them, compares what comes out.

``record.py`` runs the same cases once and keeps the results in ``tests/data``, so that the tests
without LoadGen compare the same things.
"""

import hashlib
import json
import re
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np

from distbench.arrivals import offline_samples, poisson_ns, single_stream_queries
from distbench.judged import (
    QUANTILES,
    judge_multi_stream,
    judge_offline,
    judge_server,
    judge_single_stream,
    judge_tokens,
)
from distbench.loadgen_rng import (
    CAPPED,
    LEMIRE,
    REJECT,
    WHOLE,
    loadable_set,
    multistream_order,
    offline_order,
    sample_order,
)
from distbench.rounds import PERCENTILES, SAMPLES_PER_QUERY, V5_0, V5_1
from distbench.rules import Limits, Rules, limits

CHILD = Path(__file__).with_name("loadgen_child.py")
BUILDS = {"5.0.13": (REJECT, WHOLE), "5.1.2": (LEMIRE, WHOLE), "6.0.17": (LEMIRE, CAPPED)}
"""What each wheel draws with."""
MS = 1_000_000


def environment(version, folder):
    """Make a virtual environment with one LoadGen; returns its Python, or why there is none."""
    python = folder / "bin" / "python"
    package = f"mlcommons-loadgen=={version}"
    commands = (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--quiet", "--only-binary", ":all:", package],
        [str(python), "-c", "import mlperf_loadgen"],
    )
    for command in commands:
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return None, f"{package} cannot be installed here: {last}"
    return python, ""


def run(python, cases, folder):
    """Run cases in one process of an environment; returns their results, in order."""
    asked, answered = folder / "cases.json", folder / "results.json"
    asked.write_text(json.dumps(cases))
    command = [str(python), str(CHILD), str(asked), str(answered)]
    done = subprocess.run(
        command, timeout=300, cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(answered.read_text())


# Orders and schedules


def order_case(scenario, total, resident, least, duration_ms=0, equal=False, seeds=V5_0.seeds, **s):
    settings = {
        "min_query_count": least,
        "min_duration_ms": duration_ms,
        "qsl_rng_seed": seeds.qsl,
        "sample_index_rng_seed": seeds.sample_index,
        "schedule_rng_seed": seeds.schedule,
    }
    if scenario == "Server":
        settings["server_target_qps"] = 20_000.0
    if scenario == "SingleStream":
        settings["single_stream_expected_latency_ns"] = 100_000
    return {
        "scenario": scenario, "total": total, "resident": resident, "equal_issue": equal, "seed": 0,
        "settings": settings | s,
    }  # fmt: skip


def order_cases():
    """Every scenario, sets around the shuffle's change of method, and whole runs cut short."""
    sets = [(100, 50, 330), (1, 1, 20), (2, 2, 20), (5000, 1024, 700), (10, 50, 60), (7, 3, 30)]
    cases = [order_case("Server", *each) for each in sets]
    # The square of 65,535 is the last that fits into 32 bits.
    for size in (65_535, 65_536, 70_000):
        cases.append(order_case("Server", size, size, 120))
        cases.append(order_case("Offline", size, size, size, equal=True, seeds=V5_1.seeds))
    for scenario in ("Server", "SingleStream", "MultiStream"):
        cases += [order_case(scenario, *each, equal=True) for each in sets]
        cases.append(order_case(scenario, 64, 64, 128, equal=True, seeds=V5_1.seeds))
    cases += [order_case("SingleStream", *each, seeds=V5_1.seeds) for each in sets]
    cases += [order_case("MultiStream", *each, seeds=V5_1.seeds) for each in sets]
    cases += [order_case("Offline", *each, equal=equal) for each in sets for equal in (0, 1)]
    # Longer than the minimum count: the order of equal issue repeats.
    cases.append(order_case("Server", 40, 40, 10, 5, equal=True))
    cases.append(order_case("Server", 40, 40, 10, 5))
    cases.append(order_case("SingleStream", 40, 40, 10, 5, equal=True))
    cases.append(order_case("Offline", 40, 40, 10, 5, offline_expected_qps=3.3e5))
    cases.append(order_case("Offline", 41, 41, 10, 5, equal=True, offline_expected_qps=1234.5))
    # The schedule of a whole run, of which one query is issued.
    for seeds in (V5_0.seeds, V5_1.seeds):
        for qps, least in ((0.5, 100), (2.0, 13_368), (450.56, 270_336), (1e3 / 3, 100)):
            more = {"server_target_qps": qps, "max_query_count": 1, "seeds": seeds}
            cases.append(order_case("Server", 50, 50, least, 600_000, **more))
    more = {"server_target_qps": 2.0, "max_query_count": 1}
    cases.append(order_case("Server", 999, 999, 100, 600_000, equal=True, **more))
    return cases


def check_order(case, result, version):
    """Compare which samples were loaded and issued, when, and how many were planned."""
    variant, subset = BUILDS[version]
    at, keys, settings = result["columns"], result["keys"], case["settings"]
    seed, least = settings["sample_index_rng_seed"], settings["min_query_count"]
    duration_ns = settings["min_duration_ms"] * MS
    loaded = loadable_set(
        case["total"], case["resident"], settings["qsl_rng_seed"], variant, subset
    )
    equal, multiple = case["equal_issue"], len(loaded) if case["equal_issue"] else 1
    if case["scenario"] == "MultiStream":
        # LoadGen's list ends with the padding.
        same(result["loaded"], np.resize(loaded, len(loaded) + 7), "loaded")
        issued = length(at["index"]) // 8
        same(at["index"], multistream_order(loaded, issued, least, seed, variant), "index")
        return
    same(result["loaded"], loaded, "loaded")
    if case["scenario"] == "Offline":
        qps = settings.get("offline_expected_qps", 1.0)
        samples = offline_samples(least, duration_ns, qps, multiple)
        assert keys["generated_samples_per_query"] == samples
        same(at["index"], offline_order(loaded, samples, seed, variant, equal), "index")
        return
    if case["scenario"] == "SingleStream" and equal:
        least = single_stream_queries(least, duration_ns, 100_000, case["resident"])
        assert keys["effective_min_query_count"] == least
    issued = length(at["index"])
    same(at["index"], sample_order(loaded, issued, least, seed, variant, equal), "index")
    if case["scenario"] == "Server":
        rate, seed = settings["server_target_qps"], settings["schedule_rng_seed"]
        due = poisson_ns(rate, duration_ns, least, seed, multiple)
        assert keys["generated_query_count"] == len(due)
        same(at["scheduled_ns"], due[:issued], "scheduled")
        after = poisson_ns(rate, duration_ns, len(due) + 1, seed)[len(due)]
        assert keys["generated_query_duration"] == after


def digest(numbers):
    """Return what a record keeps of a long list of integers."""
    array = np.asarray(numbers, "<i8").reshape(-1)
    name = hashlib.sha256(array.tobytes()).hexdigest()
    return {"count": len(array), "first": array[:8].tolist(), "sha256": name}


def length(recorded):
    """Return how long a list was, or is."""
    return recorded["count"] if isinstance(recorded, dict) else len(recorded)


def same(recorded, computed, what):
    """Compare with a list, or with what a record keeps of one."""
    if isinstance(recorded, dict):
        assert digest(computed) == recorded, what
    else:
        assert np.asarray(computed).reshape(-1).tolist() == recorded, what


# Rounds


def conf_cases(round_):
    """Ask mlperf.conf of every model and scenario; then run each once for what has no attribute."""
    names = [m.name for m in round_.models] + [
        f"{m.name}-interactive" for m in round_.models if m.interactive
    ]
    scenarios = ("Server", "Offline", "SingleStream", "MultiStream")
    cases = [{"model": name, "scenario": each} for name in names for each in scenarios]
    settings = {"min_query_count": 1, "min_duration_ms": 0, "performance_sample_count_override": 1}
    settings |= {"use_token_latencies": False}
    return cases + [
        {"conf": name, "scenario": "Server", "settings": settings, "total": 1, "resident": 1,
         "seed": 0, "trace": False}
        for name in names
    ]  # fmt: skip


def check_conf(round_, case, found):
    """Compare a round's figures with LoadGen's own mlperf.conf."""
    model = round_.model(case.get("model", case.get("conf")).removesuffix("-interactive"))
    if "conf" in case:
        assert found["keys"]["effective_sample_concatenate_permutation"] == model.equal_issue
        return
    seeds = ("qsl_rng_seed", "sample_index_rng_seed", "schedule_rng_seed")
    assert [found[name] for name in seeds] == list(astuple(round_.seeds))
    assert found["performance_sample_count_override"] == (model.performance_samples or 0)
    interactive = case["model"].endswith("-interactive")
    tokens = model.interactive if interactive else model.server_tokens
    # Whisper is a token model too, but has no limits.
    assert found["use_token_latencies"] == (tokens is not None or model.name == "whisper")
    scenario = case["scenario"].lower()
    # Without a count in mlperf.conf LoadGen's own holds.
    if scenario == "offline":
        least = model.offline_samples if not interactive else found["min_query_count"]
        held = Limits(min_queries=least)
    else:
        own = None if model.server_latency_ns or tokens else 10 * MS
        held = limits(Rules(round_.name, round_), scenario, "" if own else model.name, interactive,
                      latency_ns=own)  # fmt: skip
    assert found["min_duration_ms"] * MS == held.min_duration_ns
    assert found["min_query_count"] == held.min_queries
    assert found["multi_stream_samples_per_query"] == SAMPLES_PER_QUERY
    for name in ("server", "singlestream", "multistream"):
        key = name.replace("stream", "_stream") + "_target_latency_percentile"
        assert found[key] == PERCENTILES[name]
    if scenario == "server":
        assert found["server_target_latency_ns"] == (held.latency_ns or 0)
        if tokens:
            assert (found["ttft_latency"], found["tpot_latency"]) == (held.ttft_ns, held.tpot_ns)


# Latencies


def latency_case(scenario, least, seed, **more):
    """A run of ``least`` queries (Offline: samples) with known late ones; ``more`` is settings."""
    case = {"scenario": scenario, "total": 64, "resident": 64, "seed": seed}
    for name in ("late", "late_first", "few_tokens", "hold_s", "tokens", "trace"):
        if name in more:
            case[name] = more.pop(name)
    case["settings"] = {"min_query_count": least, "min_duration_ms": 0} | more
    return case


def server_case(queries, late, seed, percentile=0.99, **more):
    """``late`` queries exceed 40 ms, as far as the machine keeps the others below."""
    places = np.random.default_rng(seed).choice(queries, late, replace=False).tolist()
    settings = {
        "server_target_qps": 40_000.0,
        "server_target_latency_ns": 40 * MS,
        "server_target_latency_percentile": percentile,
    }
    return latency_case("Server", queries, seed, late=places, hold_s=0.06, **(settings | more))


def token_case(queries, late, late_first, seed, **more):
    """Late last tokens make TPOT slow, late first ones TTFT."""
    random = np.random.default_rng(seed)
    places = random.choice(queries, late + late_first, replace=False).tolist()
    return latency_case(
        "Server", queries, seed, tokens=True, hold_s=0.06,
        late=places[:late], late_first=places[late:], server_target_qps=40_000.0,
        use_token_latencies=True, ttft_latency=40 * MS, tpot_latency=150_000, **more,
    )  # fmt: skip


def latency_cases():
    """Every scenario at and around the counts where early stopping changes its mind."""
    near_p90 = (43, 44, 45, 63, 64, 65, 80, 81)
    near_p99 = (458, 459, 460, 661, 662, 663, 837, 838)
    cases = [server_case(n, k, n + k, 0.9) for n in near_p90 for k in (0, 1, 2)]
    cases += [server_case(n, k, n + k) for n in near_p99 for k in (0, 1, 2)]
    cases += [server_case(1, 0, 7), server_case(1000, 9, 8), server_case(1000, 11, 9)]
    # Below the minimum duration, at it, and below the minimum count.
    cases.append(server_case(459, 0, 10, min_duration_ms=30, max_query_count=700))
    cases.append(server_case(459, 0, 11, min_duration_ms=15))
    cases.append(server_case(700, 0, 12, max_query_count=500))
    cases += [token_case(662, late, first, 20 + late) for late in (0, 1, 2) for first in (0, 1, 2)]
    cases += [token_case(459, 0, 0, 30), token_case(458, 0, 0, 31)]
    cases.append(token_case(1000, 12, 12, 32))
    cases.append(token_case(100, 2, 2, 33, few_tokens=[7, 50]))
    cases += [latency_case("SingleStream", n, n) for n in (1, *near_p90, *near_p99, 1246)]
    unusual = {"single_stream_target_latency_percentile": 0.999}
    cases.append(latency_case("SingleStream", 700, 5, **unusual))
    cases.append(latency_case("SingleStream", 64, 6, min_duration_ms=500, max_query_count=70))
    cases.append(latency_case("SingleStream", 64, 6, min_duration_ms=5, max_query_count=9000))
    cases += [latency_case("MultiStream", n, n) for n in (63, 64, 459, 661, 662, 663)]
    cases.append(latency_case("MultiStream", 45, 45, multi_stream_target_latency_percentile=0.9))
    cases.append(latency_case("MultiStream", 81, 45, multi_stream_target_latency_percentile=0.9))
    cases.append(latency_case("MultiStream", 662, 6, min_duration_ms=900, max_query_count=62))
    cases += [latency_case("Offline", n, n) for n in (1, 2, 43, 64, 459, 662, 1000)]
    cases.append(latency_case("Offline", 100, 5, min_duration_ms=1, offline_expected_qps=1e4))
    cases.append(latency_case("Offline", 100, 5, min_duration_ms=60, offline_expected_qps=1e3))
    cases.append(latency_case("Offline", 300, 5, tokens=True, use_token_latencies=True))
    return cases


def limits_of(case):
    """Return the limits that a case was run with."""
    s = case["settings"]
    percentile = {
        "Server": s.get("server_target_latency_percentile", 0.99),
        "SingleStream": s.get("single_stream_target_latency_percentile", 0.9),
        "MultiStream": s.get("multi_stream_target_latency_percentile", 0.99),
    }
    return Limits(
        min_duration_ns=s["min_duration_ms"] * MS,
        min_queries=s["min_query_count"],
        percentile=percentile.get(case["scenario"], 0.99),
        latency_ns=s.get("server_target_latency_ns"),
        ttft_ns=s.get("ttft_latency"),
        tpot_ns=s.get("tpot_latency"),
    )


def judged_of(case, result):
    """Judge the latencies that LoadGen recorded of a case."""
    at = {name: np.array(values, np.int64) for name, values in result["columns"].items()}
    held, scenario = limits_of(case), case["scenario"]
    if scenario == "Offline":
        return judge_offline(at["latency_ns"], held, 0, at.get("tokens"))
    # LoadGen's start is before the first schedule by an amount known within these two.
    issued = at["scheduled_ns"] + result["start_before_ns"][1]
    if scenario == "SingleStream":
        return judge_single_stream(issued, at["latency_ns"], held)
    if scenario == "MultiStream":
        return judge_multi_stream(issued[::8], at["latency_ns"].reshape(-1, 8), held)
    if case.get("tokens"):
        return judge_tokens(at["scheduled_ns"], at["latency_ns"], at["ttft_ns"], at["tokens"], held)
    return judge_server(at["scheduled_ns"], at["latency_ns"], held)


SPREADS = {
    "latency": "result_{}_percentile_latency_ns",
    "query_latency": "result_{}_percentile_per_query_latency_ns",
    "ttft": "result_first_token_{}_percentile_latency_ns",
    "tpot": "result_time_per_output_token_{}_percentile_ns",
}
EXTREMES = {
    "latency": "result_{}_latency_ns",
    "query_latency": "result_{}_query_latency_ns",
    "ttft": "result_first_token_{}_latency_ns",
    "tpot": "result_time_to_output_token_{}",
}


def check_latencies(case, result):
    """Compare every key that LoadGen derives from the latencies it recorded."""
    keys, judged = result["keys"], judged_of(case, result)
    for name, spread in judged.spreads.items():
        for quantile, value in zip(QUANTILES.values(), spread.quantiles_ns.values(), strict=True):
            assert keys[SPREADS[name].format(f"{quantile * 100:.2f}")] == value
        for word, value in (("min", spread.min_ns), ("max", spread.max_ns)):
            assert keys[EXTREMES[name].format(word)] == value
        assert keys[EXTREMES[name].format("mean")] == spread.mean_ns
    check_gates(judged, keys)
    check_figures(case, judged, keys, result.get("start_before_ns"))


def check_gates(judged, keys):
    """Compare pass and fail of each gate, the verdict, and "would need N more"."""
    gates = {gate.name: gate for gate in judged.gates}
    stopping = [gate for name, gate in gates.items() if name.startswith("early_stopping")]
    fewest = gates.get("min_queries") or gates["min_samples"]
    perf = [gate for name, gate in gates.items() if ".p" in name]
    assert keys["result_min_duration_met"] == gates["min_duration"].passed
    assert keys["result_min_queries_met"] == fewest.passed
    assert keys["early_stopping_met"] == all(gate.passed for gate in stopping)
    assert keys.get("result_perf_constraints_met", True) == all(gate.passed for gate in perf)
    # LoadGen's verdict leaves errors out.
    passed = all(gate.passed for name, gate in gates.items() if name != "errors")
    assert keys["result_validity"] == ("VALID" if passed else "INVALID")
    for name, key in (
        ("early_stopping", "early_stopping_result"),
        ("early_stopping.ttft", "early_stopping_ttft_result"),
        ("early_stopping.tpot", "early_stopping_tpot_result"),
    ):
        text = keys.get(key, "")
        if more := re.search(r"at least (\d+) more queries", text):
            assert gates[name].needed == int(more[1])
        elif least := re.search(r"Need to process at least (\d+) queries", text):
            assert gates[name].limit == int(least[1])
            assert gates[name].needed == int(least[1]) - keys["result_query_count"]
        elif name in gates and text:
            assert gates[name].passed
            assert gates[name].needed is None


ABSENT = {"early_stopping_latency_ss": 0, "early_stopping_latency_ms": 0}
"""What LoadGen prints where there is no estimate."""


def check_figures(case, judged, keys, bracket):
    """Compare the headline and the other figures; doubles as LoadGen prints them, to 6 digits."""
    names = {
        "SingleStream": ("early_stopping_latency_ss", "early_stopping_latency_ms",
                         "result_qps_without_loadgen_overhead"),
        "MultiStream": ("early_stopping_latency_ms",),
        "Server": ("result_completed_samples_per_sec", "result_scheduled_samples_per_sec"),
        "Offline": ("result_samples_per_second",),
    }[case["scenario"]]  # fmt: skip
    if case["scenario"] == "Server" and not case.get("tokens"):
        names += ("result_overlatency_query_count",)
    if case.get("tokens"):
        offline = case["scenario"] == "Offline"
        names += ("result_tokens_per_second" if offline else "result_completed_tokens_per_second",)
    assert judged.headline in names
    for name in names:
        if name in judged.figures:
            value = judged.figures[name]
            assert keys[name] == (value if isinstance(value, int) else float(f"{value:.6g}")), name
        else:
            # One query has no rate, and LoadGen prints what 0 / 0 is.
            assert keys[name] == ABSENT.get(name) or name.endswith("scheduled_samples_per_sec")
    if case["scenario"] == "SingleStream" and bracket and judged.spreads["latency"].count > 1:
        name = "result_qps_with_loadgen_overhead"
        begin_ns = (judged.spreads["latency"].count - 1) / judged.figures[name] * 1e9
        slowest = begin_ns + bracket[0] - bracket[1]
        low = (judged.spreads["latency"].count - 1) / slowest * 1e9
        assert low * (1 - 1e-5) <= keys[name] <= judged.figures[name] * (1 + 1e-5)
