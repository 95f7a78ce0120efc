"""Tell a slow host from the cost of being rank 0, by runs in which two hosts exchange their ranks.

For run i let d_i be ln(cost on host A / cost on host B), where cost is the time per sample of a
closed loop, or the median latency of Server, and s_i = +1 where A has rank 0, else -1. Then

    d_i = host + s_i role + noise

host is how much slower A is than B wherever rank 0 is, role how much slower rank 0 is on either.
Both come from the means of the two orders, in the order ABBA so that a slow drift cancels; their
intervals are Student's t on the pooled variance within the orders (n - 2 degrees of freedom).
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

sys.path.append(str(Path(__file__).resolve().parent.parent))

from distbench.student import t_quantile

LEVEL = 0.99
"""Of the intervals: two effects are looked at, and each is to be blamed rightly."""
LEAST = 0.005
"""Of an effect that is told: half a per cent is within what the weather of a host does."""


def cost(row: dict[str, Any]) -> float | None:
    """Return what a rank's samples cost, s: median latency in Server, else time per sample."""
    metrics = row["metrics"]
    if metrics.get("latency.p50") is not None:
        return float(metrics["latency.p50"])
    rate = metrics.get("throughput")
    return 1 / rate if rate else None


def pair(result: dict[str, Any], hosts: Sequence[str]) -> tuple[float, int] | None:
    """Return (d, s) of a run; None where a host has no figure."""
    costs: dict[str, list[float]] = {host: [] for host in hosts}
    for row in result["per_rank"]:
        found = cost(row)
        if found is not None and row["host"] in costs:
            costs[row["host"]].append(found)
    if not all(costs.values()):
        return None
    one, other = (fmean(math.log(each) for each in costs[host]) for host in hosts)
    return one - other, 1 if result["per_rank"][0]["host"] == hosts[0] else -1


def effects(pairs: Sequence[tuple[float, int]]) -> dict[str, tuple[float, float]]:
    """Return ``host`` and ``role``, each with half the width of its interval, as logarithms.

    Args:
        pairs: (d, s) of the runs, both orders at least twice.

    Raises:
        ValueError: an order has fewer than two runs.
    """
    sides = [[d for d, s in pairs if s == sign] for sign in (1, -1)]
    if min(map(len, sides)) < 2:
        raise ValueError("each order needs two runs")
    means = [fmean(side) for side in sides]
    squares = sum((d - m) ** 2 for side, m in zip(sides, means, strict=True) for d in side)
    df = len(pairs) - 2
    error = math.sqrt(squares / df * sum(1 / len(side) for side in sides)) / 2
    half = t_quantile((1 + LEVEL) / 2, df) * error
    return {"host": ((means[0] + means[1]) / 2, half), "role": ((means[0] - means[1]) / 2, half)}


def told_apart(folders: Sequence[Path], hosts: Sequence[str]) -> list[str]:
    """Return what the runs say of two hosts and of rank 0, in sentences.

    Args:
        folders: results of the runs.
        hosts: by their own names; A and B.
    """
    paths = [folder / "result.json" for folder in folders]
    results = [json.loads(path.read_bytes()) for path in paths if path.exists()]
    pairs = [each for each in (pair(result, hosts) for result in results) if each is not None]
    try:
        found = effects(pairs)
    except ValueError as error:
        return [f"hosts and rank 0 are not told apart: {error}, of {len(pairs)} with figures"]
    names = {"host": f"{hosts[0]} against {hosts[1]}", "role": "rank 0 against rank 1"}
    sentences = []
    for key, (effect, half) in found.items():
        low, middle, high = (
            100 * math.expm1(each) for each in (effect - half, effect, effect + half)
        )
        real = abs(effect) > half and abs(effect) >= LEAST
        word = "slower" if effect > 0 else "faster"
        verdict = f"{abs(middle):.2f} % {word}" if real else "no difference told"
        sentences.append(
            f"{names[key]}: {verdict} (time per sample {middle:+.2f} %, {LEVEL:.0%} interval "
            f"{low:+.2f} to {high:+.2f} %, {len(pairs)} runs)"
        )
    return sentences
