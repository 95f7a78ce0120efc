"""distbench against LoadGen itself: installs it, runs it, and compares exactly.

Each wheel gets an environment of its own. Where it cannot be installed the tests skip and say why;
``tests/unit`` compares the same cases with a record of them.
"""

import re

import pytest

from distbench.early_stopping import least_queries
from distbench.rounds import ROUNDS
from tests.oracle import loadgen as oracle

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=list(oracle.BUILDS))
def build(request, tmp_path_factory):
    """One LoadGen: its version, and a function that runs cases in it."""
    folder = tmp_path_factory.mktemp(request.param)
    python, reason = oracle.environment(request.param, folder / "venv")
    if python is None:
        pytest.skip(reason)
    return request.param, lambda cases: oracle.run(python, cases, folder)


def test_loadgen_issues_these_samples_at_these_times(build):
    version, run = build
    cases = oracle.order_cases()
    results = run(cases)
    assert len(results) == len(cases)
    for case, result in zip(cases, results, strict=True):
        oracle.check_order(case, result, version)


def test_loadgen_judges_latencies_alike(build):
    _, run = build
    cases = oracle.latency_cases()
    results = run(cases)
    assert len(results) == len(cases)
    for case, result in zip(cases, results, strict=True):
        oracle.check_latencies(case, result)
    words = [result["keys"]["result_validity"] for result in results]
    assert min(words.count("VALID"), words.count("INVALID")) > 20


@pytest.mark.parametrize("percentile", [0.9, 0.99, 0.999])
@pytest.mark.parametrize("queries", [5_000, 20_000, 100_000])
def test_loadgen_wants_as_many_more_queries_when_all_are_late(build, percentile, queries):
    settings = {"server_target_latency_ns": 0, "server_target_qps": 400_000.0}
    case = oracle.server_case(queries, 0, 1, percentile, trace=False, **settings)
    keys = build[1]([case])[0]["keys"]
    over = keys["result_overlatency_query_count"]
    assert over == queries
    more = re.search(r"at least (\d+) more", keys["early_stopping_result"])
    assert int(more[1]) == least_queries(percentile, over) - queries


def test_loadgen_estimates_alike_from_many_queries(build):
    cases = [oracle.latency_case("SingleStream", 20_000, 3)]
    cases.append(oracle.latency_case("MultiStream", 5_000, 4))
    for case, result in zip(cases, build[1](cases), strict=True):
        oracle.check_latencies(case, result)


def test_the_rounds_figures_are_those_of_its_loadgen(build):
    version, run = build
    rounds = [each for each in ROUNDS.values() if each.loadgen == version]
    if not rounds:
        pytest.skip(f"no round has LoadGen {version}")
    for round_ in rounds:
        assert oracle.BUILDS[version] == (round_.variant, round_.subset)
        cases = oracle.conf_cases(round_)
        for case, found in zip(cases, run(cases), strict=True):
            oracle.check_conf(round_, case, found)
