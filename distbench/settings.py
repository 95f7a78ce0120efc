"""How to run a window: what a command line or a script asked for, checked."""

from __future__ import annotations

import shlex
import sys
from dataclasses import dataclass, field
from typing import Any

from distbench.cells import Plan
from distbench.errors import UsageError
from distbench.layout import ShardPlan
from distbench.load import Load
from distbench.official import Official
from distbench.rules import parse_rules
from distbench.search import LIMITS

SAMPLE_LIMIT = 10_000_000
"""Samples of all ranks that are gathered; above it they stay on their ranks (--samples shard)."""


@dataclass(frozen=True)
class Settings:
    """How to run a window; see ``offline.run_offline`` for the meaning of each.

    Raises:
        UsageError: a value is out of its range.
    """

    batch_size: int = 32
    duration_ns: int = 5_000_000_000
    num_samples: int | None = None
    warmup_ns: int = 1_000_000_000
    seed: int = 0
    shares: str = "even"
    timeout_ns: int | None = None
    samples: str = ""
    until: float | None = None
    rules: str = "none"
    output_dir: str = "results"
    name: str = ""
    quiet: bool = False
    config: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    model_name: str = ""
    dtype: str = ""
    load: Load | None = None
    scaling: Plan | None = None
    shard: ShardPlan | None = None
    official: Official | None = None

    @property
    def group(self) -> int:
        """Samples of a group at most."""
        return self.load.max_batch if self.load is not None else self.batch_size

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UsageError(f"a batch size of {self.batch_size} is below 1")
        if self.duration_ns <= 0 or self.warmup_ns < 0:
            raise UsageError("the duration must be above zero, and the warm-up not negative")
        if self.num_samples is not None and self.num_samples < 1:
            raise UsageError(f"{self.num_samples} samples are fewer than 1 (--num-samples)")
        if self.until is not None and not 0 < self.until < 1:
            raise UsageError(
                f"an interval of +-{self.until:%} is not between 0 and 100 % (--until)"
            )
        if self.num_samples is not None and self.load is not None and self.load.searched:
            raise UsageError(
                "a peak search has windows of many rates, so none of one number of queries: give "
                "--duration and --probe in place of --num-samples"
            )
        if self.load is not None and self.load.searched:
            longest_ns = max(each.limit_ns for each in self.load.bounds)
            if self.load.probe_ns < longest_ns or self.duration_ns < LIMITS * longest_ns:
                raise UsageError(
                    f"a bound of {longest_ns / 1e9:g} s is not seen to be missed in shorter "
                    f"windows: give --probe {longest_ns / 1e9:g}s or longer, and --duration "
                    f"{LIMITS * longest_ns / 1e9:g}s or longer"
                )
        parse_rules(self.rules)
        if self.samples not in ("", "gather", "shard"):
            raise UsageError(f"samples {self.samples!r} are neither gather nor shard (--samples)")
        if self.samples == "gather" and (self.num_samples or 0) > SAMPLE_LIMIT:
            raise UsageError(
                f"{self.num_samples} samples are more than {SAMPLE_LIMIT}, which is as many as are "
                "gathered: leave --samples gather out, and they stay on their ranks"
            )
        if self.shares not in ("even", "rate"):
            raise UsageError(f"shares {self.shares!r} are neither even nor rate")


def script_settings(
    duration_s: float, warmup_s: float, timeout_s: float | None, **others: Any
) -> Settings:
    """Return the settings of a script, which gives times in seconds.

    Raises:
        UsageError: a value is out of its range.
    """
    return Settings(
        duration_ns=round(duration_s * 1e9),
        warmup_ns=round(warmup_s * 1e9),
        timeout_ns=None if timeout_s is None else round(timeout_s * 1e9),
        command=shlex.join(["python", *sys.argv]),
        **others,
    )
