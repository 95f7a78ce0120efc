"""Limits of the user's own: how they are written, and what is refused."""

from __future__ import annotations

import pytest

from distbench.bounds import Bound, parse_bounds
from distbench.errors import UsageError
from distbench.load import Load

MS = 10**6


def test_bounds_are_read() -> None:
    assert parse_bounds("15ms@p99") == (Bound("latency", "p99", 15 * MS),)
    found = parse_bounds("1s@p50, ttft=500ms@p99 ,tpot = 30ms @ p99.9")
    assert [each.metric for each in found] == ["latency.p50", "ttft.p99", "tpot.p99.9"]
    assert [each.quantile for each in found] == [0.5, 0.99, 0.999]
    assert [each.limit_ns for each in found] == [1000 * MS, 500 * MS, 30 * MS]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("15ms", "write DURATION@PERCENTILE"),
        ("@p99", "write DURATION@PERCENTILE"),
        ("", "write DURATION@PERCENTILE"),
        ("15@p99", "has no unit"),
        ("-5ms@p99", "is no duration"),
        ("0ms@p99", "above zero"),
        ("15ms@p98", "none of the percentiles p50, p90"),
        ("15ms@99", "did you mean p99"),
        ("tfft=15ms@p99", "did you mean ttft"),
        ("15ms@p99,20ms@p99", "latency.p99 has two bounds"),
    ],
)
def test_what_is_no_bound_is_refused_in_a_sentence(text: str, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_bounds(text)
    assert told in str(caught.value)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"target_qps": 0.0}, "not above 0"),
        ({"target_qps": float("nan")}, "not above 0"),
        ({"target_qps": float("inf")}, "not above 0"),
        ({"target_qps": -3.0}, "not above 0"),
        ({"target_qps": 1.0, "arrival": "trace:"}, "none of poisson, constant, trace:FILE"),
        ({"target_qps": 1.0, "arrival": "uniform"}, "none of poisson"),
        ({"target_qps": 1.0, "dispatch": "random"}, "neither static nor central"),
        ({"target_qps": 1.0, "max_batch": 0}, "below 1"),
        ({"target_qps": 1.0, "max_wait_ns": -1}, "less than no time"),
    ],
)
def test_a_load_that_cannot_be_offered_is_refused(values: dict, told: str) -> None:
    with pytest.raises(UsageError) as caught:
        Load(**values)
    assert told in str(caught.value)
