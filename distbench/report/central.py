"""The text report's lines on central dispatch."""

from __future__ import annotations

from typing import Any

from distbench.report.units import duration, wrapped


def driver_lines(driver: dict[str, Any]) -> list[str]:
    """Return what is known of the driver, whose clock every latency is on."""
    bound = driver["parts_bound_s"]
    known = "the ranks' too"
    if bound is None:
        known = "how it stands to the ranks' is not known"
    elif bound:
        known = f"queue and return are known to +-{duration(bound)}"
    late = "unknown" if driver["late_s"] is None else duration(driver["late_s"])
    told = f"{driver['host']}, process {driver['pid']}: latencies are on its clock, {known}; began "
    return wrapped(f"  driver         {told}{late} after the agreed instant", 17)
