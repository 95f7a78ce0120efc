"""The text report's lines on central dispatch, and on LoadGen where it drives."""

from __future__ import annotations

from typing import Any

from distbench.floor_verdict import near_floor
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


def official_words(official: dict[str, Any]) -> str:
    """Return what LoadGen was asked, for the report's headline."""
    rate = official["target_qps"]
    asked = f", target_qps {rate:g}" if rate is not None else ""
    sut = ", Network SUT" if official["network"] else ""
    audit = f" ({official['audit']})" if official.get("audit") else ""
    return f"LoadGen {official['loadgen']} in {official['mode']} mode{audit}{asked}{sut}"


def loadgen_rows(names: dict[str, str]) -> dict[str, str]:
    """Return the rows of the table of latencies, titles by series: LoadGen's, then ours."""
    ours = {"dispatch.latency": "dispatch", "lateness": "lateness", "queue": "queue"}
    rest = {name: title for name, title in names.items() if name != "latency"}
    floor = {"floor.latency": "floor"}
    return {"latency": "LoadGen", **ours, "return": "return", **rest, **floor}


def marked(metrics: dict[str, Any], name: str) -> str:
    """Return a percentile as the table has it: marked where it is near the floor."""
    return duration(metrics[name]["value"]) + "*" * near_floor(metrics, name)


LOADGEN_FOOT = (
    "LoadGen, ttft and tpot are read from its log, and count from when LoadGen scheduled a sample; "
    "dispatch is from when it handed the sample over to the completion message, on the driver's "
    "clock: lateness of the rank's loop + queue + service + return; floor is LoadGen and dispatch "
    "with replicas that do nothing, measured right after, and * is less than 10 times of it"
)
"""What stands below that table."""
_FOOT = {
    "offline": "batch latency is completion - issue, with up to the engine's depth of groups in "
    "flight",
    "server": "latency is from the schedule to the completion, whatever came between: lateness + "
    "queue + service + return; batch is from the issue of a group to its completion",
    "singlestream": "latency is from the issue of a query to its completion",
    "multistream": "latency is from the issue of a query of 8 samples to the completion of all",
}
"""What stands below the latencies of all other runs, by scenario."""


def foot(result: dict[str, Any]) -> str:
    """Return what the latencies of a run are, in words."""
    if result["window"].get("official"):
        return LOADGEN_FOOT
    return "percentiles by LoadGen's rule, sorted[int(n * p)]; " + _FOOT[result["scenario"]]
