"""Percentiles by LoadGen's rule, against integers worked by hand and a sort."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.quantiles import percentiles_ns


@pytest.mark.parametrize(
    ("n", "quantile", "wanted"),
    [
        (100, 0.0, 1),
        (100, 0.5, 51),  # position 50 of 0..99: one above textbook nearest rank, 50
        (100, 0.9, 91),
        (100, 0.99, 100),
        (100, 0.57, 57),  # 100 * 0.57 is 56.99... in double precision, and is cut
        (10, 0.97, 10),  # position 9
        (10, 0.95, 10),
        (10, 0.89, 9),  # position 8
        (1000, 0.999, 1000),
        (1000, 0.99, 991),
        (1, 0.999, 1),
        (2, 0.5, 2),
        (3, 0.5, 2),
    ],
)
def test_worked_by_hand_on_one_to_n(n, quantile, wanted):
    shuffled = np.random.default_rng(n).permutation(np.arange(1, n + 1))
    assert percentiles_ns(shuffled, [quantile]) == [wanted]


@given(
    st.lists(st.integers(-(2**62), 2**62), min_size=1, max_size=300),
    st.lists(st.floats(0, 1, exclude_max=True), min_size=1, max_size=6),
)
def test_equals_a_sort_and_changes_nothing(values, quantiles):
    given_ns = np.array(values, np.int64)
    found = percentiles_ns(given_ns, quantiles)
    assert found == [sorted(values)[int(len(values) * q)] for q in quantiles]
    assert all(type(each) is int for each in found)
    assert given_ns.tolist() == values


def test_order_of_the_quantiles_is_kept():
    assert percentiles_ns(np.arange(100), [0.99, 0.1, 0.99, 0.5]) == [99, 10, 99, 50]


def test_nothing_in_gives_an_error():
    with pytest.raises(ValueError, match="no latencies"):
        percentiles_ns(np.zeros(0, np.int64), [0.5])


@pytest.mark.parametrize("quantile", [1.0, -0.01, 99, float("nan")])
def test_a_quantile_outside_its_range_gives_an_error(quantile):
    with pytest.raises(ValueError, match="not all in"):
        percentiles_ns(np.arange(10), [0.5, quantile])
