"""The error tree: which exit status each kind ends a command with."""

import pytest

from distbench import errors
from distbench.errors import ClockError, DistbenchError, IncompleteError, UsageError, where


@pytest.mark.parametrize(
    ("kind", "status"),
    [(DistbenchError, 1), (UsageError, 2), (IncompleteError, 6), (ClockError, 1)],
)
def test_each_kind_has_the_status_that_the_docstring_draws(kind, status):
    assert kind.exit_code == status
    assert kind("a sentence").exit_code == status
    assert issubclass(kind, DistbenchError)
    [line] = [x for x in errors.__doc__.splitlines() if f" {kind.__name__} " in f" {x} "]
    assert f"exit {status} " in line


def test_kinds_are_told_apart():
    kinds = [UsageError, IncompleteError, ClockError]
    for kind in kinds:
        assert [other for other in kinds if issubclass(kind, other)] == [kind]


def test_statuses_are_the_documented_ones():
    named = {name: value for name, value in vars(errors).items() if name.startswith("EXIT_")}
    assert named.pop("EXIT_OK") == 0
    assert named.pop("EXIT_CRASH") == 1
    assert named.pop("EXIT_USAGE") == 2
    assert named.pop("EXIT_STRICT") == 3
    assert named.pop("EXIT_INCOMPLETE") == 6
    assert named.pop("EXIT_INTERRUPTED") == 130
    assert not [name for name, value in named.items() if value in (0, 1, 2, 3, 6, 130)]


def test_an_error_is_not_agreed_until_said_so():
    error = UsageError("x")
    error.agreed = True
    assert not UsageError("y").agreed


def test_where_names_rank_and_host():
    assert where(1, "jw3") == "rank 1 (jw3)"
