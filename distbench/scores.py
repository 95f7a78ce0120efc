"""What was scored of a model: sums that each rank left, and the figures that they give."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from distbench.run import Run

NO_TEXT = "the system tells no probabilities of a held-out text"
ACCURACY = "right / scored over the model's held-out samples, untimed"
BITS = "mean of -log2 of the probability given to each byte of the held-out text, untimed"
SUMS = {"score": ("right", "of"), "text": ("bits", "bytes")}
"""Numerator and denominator of each, by their key in after.json."""


def fraction(run: Run, key: str, definition: str) -> dict[str, Any]:
    """Sum what the ranks left, then divide.

    Args:
        run: its records.
        key: of ``SUMS``.
        definition: of the figure; the two sums are added to it.

    Returns:
        ``value``, ``n``, ``definition`` and ``reason`` of a metric.
    """
    none = {"value": None, "n": 0, "definition": definition}
    told = [s for r in run.left if (s := (r.after or {}).get(key)) is not None]
    if len(told) < run.world_size:
        return {**none, "reason": "a rank left no score"}
    if reasons := [each["reason"] for each in told if each["reason"]]:
        return {**none, "reason": reasons[0]}
    over, under = (sum(each[name] for each in told) for name in SUMS[key])
    shown = f"{definition} ({over:g}/{under:g})"
    value, reason = (over / under, "") if under else (None, "nothing was scored")
    return {"value": value, "n": int(under), "definition": shown, "reason": reason}


def of_first(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return of the first window's metrics those that later windows have not: they score once."""
    return {name: metrics[name] for name in ("accuracy", "bits_per_byte") if name in metrics}
