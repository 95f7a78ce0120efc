"""Every error distbench raises on purpose.

    DistbenchError            exit 1   something broke; the sentence says where
    |- UsageError             exit 2   options, files or hosts that cannot be used as asked
    |   `- ModelError        exit 2   the user's model raised; its traceback is shown as well
    |- IncompleteError        exit 6   a rank, a disk or an interrupt ended the run early
    |- ClockError             exit 1   two clocks gave answers that contradict each other

Each message is one sentence a user can act on: host, rank, value, limit, remedy. Only ``main``
functions turn an error into an exit status; the library raises.
"""

from __future__ import annotations

from dataclasses import dataclass

EXIT_OK = 0
EXIT_CRASH = 1
EXIT_USAGE = 2
EXIT_STRICT = 3
EXIT_REGRESSION = 5
EXIT_INCOMPLETE = 6
EXIT_INTERRUPTED = 130

DRIVER = -1
"""Stands for the driver of central dispatch where a rank's number would."""


class DistbenchError(Exception):
    """Base of every error raised on purpose.

    Attributes:
        exit_code: what a command ends with.
        agreed: whether every rank raises it, so that none has to be told.
    """

    exit_code = EXIT_CRASH
    agreed = False


class UsageError(DistbenchError):
    """The command, a file or a host cannot be used as asked."""

    exit_code = EXIT_USAGE


def agreed(sentence: str) -> UsageError:
    """Return the error of something that every rank finds by itself, alike."""
    error = UsageError(sentence)
    error.agreed = True
    return error


class ModelError(UsageError):
    """The user's model, or what builds it, raised; ``__cause__`` is what."""


class IncompleteError(DistbenchError):
    """The run ended early, and what was measured until then was kept."""

    exit_code = EXIT_INCOMPLETE


class ClockError(DistbenchError):
    """Exchanges between two clocks contradict each other, so no offset can be stated."""


@dataclass(frozen=True)
class End:
    """Why a run ends early.

    Attributes:
        code: "lost", "failed" or "terminated".
        rank: whose doing it is.
        host: its host.
        sentence: what happened and what to do.
        exit_code: what this process ends with.
    """

    code: str
    rank: int
    host: str
    sentence: str
    exit_code: int


def where(rank: int, host: str) -> str:
    """Name a rank, or the driver of central dispatch, as every message does.

    Args:
        rank: global rank; ``DRIVER`` for the driver.
        host: hostname of it.

    Example:
        >>> where(1, "jw3")
        'rank 1 (jw3)'
    """
    return f"the driver ({host})" if rank == DRIVER else f"rank {rank} ({host})"
