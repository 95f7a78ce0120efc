"""What a finding is, and how findings make a status.

A finding about the measurement (skew, clock, harness, interference) invalidates where its effect
exceeds ``EFFECT_INVALID`` of the headline metric, else it is doubtful: see ``trust``. A finding of
fact (failed, missing or non-finite output, another process on the GPU) invalidates whatever its
size: see ``checks``.
"""

from __future__ import annotations

from dataclasses import dataclass

EFFECT_INVALID = 0.05
"""An effect on the headline above this makes the window INVALID: at 5 % two systems that differ by
what a purchase is decided on can no longer be told apart."""
EFFECT_DOUBTFUL = 0.01
"""An effect above this is named: 1 % is the difference that careful comparisons look for."""
STATUS_ORDER = ("VALID", "UNDECIDED", "INVALID", "INCOMPLETE")
LEVELS = ("incomplete", "invalid", "undecided", "doubtful", "info")


@dataclass(frozen=True)
class Finding:
    """Something a reader must know about a run.

    Attributes:
        level: "info", "doubtful", "invalid", or "incomplete" for a rank that was lost.
        code: kebab-case name.
        message: one sentence: host, rank, value, limit.
        rank: whom it is about; None for all.
        host: its host, "" for all.
        value: the measured value, None where there is none.
        limit: what it was held against.
        remedy: what to do.
    """

    level: str
    code: str
    message: str
    rank: int | None = None
    host: str = ""
    value: float | None = None
    limit: float | None = None
    remedy: str = ""


def graded(effect: float) -> str | None:
    """Return the level that an effect on the headline calls for, None below all limits."""
    if effect > EFFECT_INVALID:
        return "invalid"
    return "doubtful" if effect > EFFECT_DOUBTFUL else None


def worst_first(found: list[Finding]) -> list[Finding]:
    """Return the findings by level, each once."""
    return sorted(dict.fromkeys(found), key=lambda f: LEVELS.index(f.level))


def status(found: list[Finding]) -> str:
    """Return the worst status that the findings call for."""
    called = {"invalid": "INVALID", "incomplete": "INCOMPLETE", "undecided": "UNDECIDED"}
    worst = max((STATUS_ORDER.index(called.get(f.level, "VALID")) for f in found), default=0)
    return STATUS_ORDER[worst]
