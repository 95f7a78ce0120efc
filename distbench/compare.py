"""Compare launches of one thing with launches of another: how much faster, and is it certain.

    for i in 1 2 3 4 5; do python -m distbench.offline --name a; done     and with --name b
    python -m distbench.compare results/*-a-* -- results/*-b-*

The unit is the launch: windows of one process share its memory layout, its clocks and its luck, so
that only launches show how far a repeat may fall from the figure. Welch's t on the logarithms gives
the interval of new / base. Launches under unlike conditions are refused, unless the condition is
the one under test. Every figure is recomputed from the rank folders, but for samples that stay on
their ranks (--samples shard), which all ranks judged together. Needs no torch.

Exit status: 0; 5 on a regression, which is a change for the worse whose interval excludes no change
and whose estimate is beyond the threshold; 2 where the launches cannot be compared.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distbench.cli import Option, nearest, parse, percent, positionals, read_words, run_command
from distbench.conditions import (
    Conditions,
    Difference,
    check_side,
    conditions,
    covers,
    differences,
    known_names,
    listed,
)
from distbench.errors import EXIT_OK, EXIT_REGRESSION, UsageError
from distbench.fabric_verdict import SCENARIO as COLLECTIVES
from distbench.launches import (
    BETTER,
    LEAST,
    MOST_LAUNCHES,
    NOT_RECOMPUTED,
    launches_needed,
    not_recomputed,
    variance,
    welch,
)
from distbench.scenarios import scenario
from distbench.windows import load_run


@dataclass(frozen=True)
class Comparison:
    """What two sides of launches say about each other.

    Attributes:
        metric: its name.
        unit: its unit.
        base: its value in each launch of the base.
        new: of the new side.
        ratio: new / base, of the geometric means.
        low: of the 95 % interval of ``ratio``; None without one.
        high: of the interval.
        df: Welch's degrees of freedom; None without an interval.
        threshold: a change up to this is none, as a fraction.
        verdict: "faster", "slower" ("better", "worse" for what is no speed), "no difference" or
            "undecided".
        regression: for the worse, the interval excludes no change, estimate beyond the threshold.
        needed: launches a side that would decide, by estimate, where it is undecided; None when
            there is no estimate or it is above ``MOST_LAUNCHES``.
        tested: conditions in which the sides differ, all of them named as under test.
        notes: what a reader should know, a sentence each.
    """

    metric: str
    unit: str
    base: tuple[float, ...]
    new: tuple[float, ...]
    ratio: float
    low: float | None
    high: float | None
    df: float | None
    threshold: float
    verdict: str
    regression: bool
    needed: int | None
    tested: tuple[Difference, ...]
    notes: tuple[str, ...]

    @property
    def lower_is_better(self) -> bool:
        """Whether a smaller value of this metric is the better one."""
        return _lower_is_better(self.unit)


def compare(
    base: Sequence[dict[str, Any]],
    new: Sequence[dict[str, Any]],
    *,
    metric: str = "",
    threshold: float = 0.01,
    across: Sequence[str] = (),
) -> Comparison:
    """Compare launches.

    Args:
        base: results, as in result.json, a launch each.
        new: of the other side.
        metric: a name in their ``metrics``; "" is what their scenario judges.
        threshold: a change up to this counts as none, as a fraction.
        across: conditions that may differ between the sides, being what is tested.

    Raises:
        UsageError: a launch is not VALID, lacks the metric or is given twice, or the launches are
            unlike in something that is not under test.
    """
    if not base or not new:
        raise UsageError("a side has no launch: give at least 2, better 5, on each")
    both = [*base, *new]
    metric = metric or headline_of(both)
    check_launches(both, metric)
    described = [conditions(result) for result in both]
    known = known_names(described)
    for word in across:
        if not any(covers(word, name) for name in known) and word not in known:
            raise UsageError(f"{word!r} is no condition of these launches{nearest(word, known)}")
    old, now = described[: len(base)], described[len(base) :]
    check_side(base, old, "base")
    check_side(new, now, "new side")
    tested = differences(old[0], now[0])
    unlike = [d for d in tested if not any(covers(word, d.name) for word in across)]
    if unlike:
        wanted = ",".join(dict.fromkeys(d.name for d in unlike))
        raise UsageError(
            f"base and new differ in {listed(unlike)}: compare like with like, or say that this "
            f"is what you test with --across {wanted}"
        )
    left, right = (tuple(r["metrics"][metric]["value"] for r in side) for side in (base, new))
    unit = both[0]["metrics"][metric]["unit"]
    same = [word for word in across if not any(covers(word, d.name) for d in tested)]
    notes = (*(f"{word} is under test, and the same on both sides" for word in same),)
    notes += _notes(base, new, described)
    return judged(metric, unit, left, right, threshold, tuple(tested), notes)


def headline_of(results: Sequence[dict[str, Any]]) -> str:
    """Return the metric that the scenario of the first result judges.

    Raises:
        UsageError: it judges none.
    """
    if results[0]["scenario"] == COLLECTIVES:
        known = [name for name in results[0]["metrics"] if name.endswith(".busbw")]
        raise UsageError(
            f"a run of collectives has a figure for each operation: name one with --metric, such "
            f"as {known[0] if known else 'all_reduce.busbw'}"
        )
    return scenario(results[0]["scenario"]).headline


def judged(
    metric: str,
    unit: str,
    base: tuple[float, ...],
    new: tuple[float, ...],
    threshold: float,
    tested: tuple[Difference, ...] = (),
    notes: tuple[str, ...] = (),
) -> Comparison:
    """Judge the values of two sides, all above zero; see ``Comparison`` for the arguments.

    "No difference" comes first: an interval that lies inside the threshold says so whether or not
    it excludes no change.
    """
    logs = [[math.log(value) for value in side] for side in (base, new)]
    change, half, df = welch(*logs)
    words = ("faster", "slower") if unit == "s" or unit.endswith("/s") else ("better", "worse")
    gain = -change if _lower_is_better(unit) else change
    verdict, needed = "undecided", None
    if half is not None:
        lowest, highest = math.log1p(-threshold), math.log1p(threshold)
        if lowest <= change - half and change + half <= highest:
            verdict = "no difference"
        elif abs(change) > half:
            verdict = words[0] if gain > 0 else words[1]
        else:
            spread = math.sqrt((variance(logs[0]) + variance(logs[1])) / 2)
            room = highest - change if change > 0 else change - lowest
            needed = launches_needed(spread, max(abs(change), room))
    ratio, beyond = math.exp(change), abs(math.expm1(change)) > threshold
    return Comparison(
        metric=metric,
        unit=unit,
        base=base,
        new=new,
        ratio=ratio,
        low=None if half is None else math.exp(change - half),
        high=None if half is None else math.exp(change + half),
        df=df,
        threshold=threshold,
        verdict=verdict,
        regression=verdict == words[1] and beyond,
        needed=needed,
        tested=tested,
        notes=notes,
    )


def _lower_is_better(unit: str) -> bool:
    return not (unit == "1" or unit.endswith("/s"))


def check_launches(results: Sequence[dict[str, Any]], metric: str) -> None:
    """Refuse a launch that is given twice, is not VALID or has no usable value of the metric.

    Args:
        results: of all sides.
        metric: its name.

    Raises:
        UsageError: see above; the sentence names the launch.
    """
    seen: set[str] = set()
    for result in results:
        run = result["run_id"]
        launch = re.sub(r"-w\d+$", "", run)  # a window of it is no other launch
        if launch in seen:
            raise UsageError(
                f"launch {launch} is given twice, which would count it twice: give it once, and "
                "of its windows the directory above them"
            )
        seen.add(launch)
        verdict = result["verdict"]
        if verdict["status"] != "VALID":
            found = [f["message"] for f in verdict["findings"] if f["level"] not in _MILD]
            raise UsageError(
                f"launch {run} is {verdict['status']}"
                f"{': ' + found[0] if found else ''}; leave it out, or repeat it"
            )
        known = result["metrics"]
        if metric not in known:
            raise UsageError(f"launch {run} has no metric {metric!r}{nearest(metric, [*known])}")
        value = known[metric]["value"]
        if value is None:
            raise UsageError(f"{metric} of launch {run} is unknown: {known[metric]['reason']}")
        if value <= 0:
            raise UsageError(
                f"{metric} of launch {run} is {value}: only values above 0 have a ratio"
            )


_MILD = ("doubtful", "info")


def _notes(
    base: Sequence[dict[str, Any]], new: Sequence[dict[str, Any]], described: Sequence[Conditions]
) -> tuple[str, ...]:
    notes = []
    times = [[result["window"]["started_utc"] for result in side] for side in (base, new)]
    if max(times[0]) < min(times[1]) or max(times[1]) < min(times[0]):
        notes.append(
            "all launches of one side ran before those of the other, so that a drift of the "
            "cluster looks like a difference: where it can be, launch both sides in turn"
        )
    if not all(each.run.get("model.digest") for each in described):
        notes.append("the model gives no digest, so that equal weights are not proven")
    if any(rank.values.get("git_dirty") for each in described for rank in each.ranks):
        notes.append("distbench had changes that its commit does not name")
    both = [*base, *new]
    if any(not_recomputed(result) for result in both):
        notes.append(NOT_RECOMPUTED)
    doubts = [
        {f["code"] for f in r["verdict"]["findings"] if f["level"] == "doubtful"} for r in both
    ]
    if any(doubts):
        notes.append(
            f"{sum(map(bool, doubts))} of {len(both)} launches have doubtful findings: "
            f"{', '.join(sorted(set().union(*doubts)))}"
        )
    return tuple(notes)


def to_text(found: Comparison, tested: str = "under test") -> str:
    """Lay out a comparison as text, the verdict first.

    Args:
        found: from ``compare``.
        tested: what to call the conditions in which the sides differ.
    """
    lines = [f"{found.metric}: {_sentence(found)}"]
    for name, values in (("base", found.base), ("new", found.new)):
        logs = [math.log(value) for value in values]
        mean = math.exp(math.fsum(logs) / len(logs))
        spread = f", sd {as_percent(math.sqrt(variance(logs)))}" if len(logs) > 1 else ""
        count = f"{len(values)} launch{'es' * (len(values) > 1)}"
        lines.append(f"  {name:4}  {mean:,.6g} {found.unit}  geometric mean of {count}{spread}")
    if found.low is not None:
        lines.append(
            f"  new / base  {found.ratio:.5g} ({found.low:.5g} to {found.high:.5g}), 95 % interval "
            f"by Welch's t on logarithms, {found.df:.3g} degrees of freedom"
        )
    lines += [f"  {tested}  {d.title}: {d.base} -> {d.new}" for d in found.tested]
    lines += [f"  note: {note}" for note in found.notes]
    return "\n".join(lines) + "\n"


def _sentence(found: Comparison) -> str:
    limit = as_percent(found.threshold)
    if found.low is None or found.high is None:
        sides = f"{len(found.base)} and {len(found.new)}"
        return (
            f"undecided: {sides} launches give no interval (new / base is {found.ratio:.5g}); at "
            f"least {LEAST} a side are needed, {BETTER} are better"
        )
    if found.verdict in ("faster", "slower", "better", "worse"):
        sizes = sorted(abs(end - 1) for end in (found.low, found.high))
        interval = " to ".join(map(as_percent, sizes))
        return f"{found.verdict} by {as_percent(abs(found.ratio - 1))} ({interval})"
    interval = (
        f"change {_signed(found.ratio)}, interval {_signed(found.low)} to {_signed(found.high)}"
    )
    if found.verdict == "no difference":
        return f"no difference above {limit} ({interval})"
    if found.needed is None:
        return (
            f"undecided ({interval}): by estimate more than {MOST_LAUNCHES:,} launches a side "
            "would be needed"
        )
    more = [max(found.needed - len(side), 0) for side in (found.base, found.new)]
    return (
        f"undecided ({interval}; neither all on one side of 0 nor inside +-{limit}): by estimate "
        f"about {found.needed} launches a side would decide, {more[0]} more of base and {more[1]} "
        "more of new"
    )


def as_percent(fraction: float) -> str:
    """Format a fraction as percent, three significant digits.

    >>> as_percent(0.0314159), as_percent(12.345)
    ('3.14 %', '1,234 %')
    """
    value = 100 * fraction
    return f"{value:,.0f} %" if abs(value) >= 999.5 else f"{value:.3g} %"


def _signed(ratio: float) -> str:
    return ("+" if ratio >= 1 else "-") + as_percent(abs(ratio - 1))


def load_result(folder: str) -> dict[str, Any]:
    """Judge a result directory again, from its rank folders, if all that it rests on is there.

    Raises:
        UsageError: it is no result directory, or damaged.
    """
    try:
        return load_run(Path(folder)).result()
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise UsageError(
            f"{folder} is damaged and cannot be judged ({error!r}): see `python -m "
            f"distbench.verify {folder}`"
        ) from error


OPTIONS = (
    Option("metric", None, str, "a name in metrics (default: what the scenario judges)", "NAME"),
    Option("threshold", "1%", percent, "a change up to this is none", "PERCENT"),
    Option("across", "", read_words, "conditions under test, which may differ", "NAME[,NAME]"),
)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status."""
    rest, lists = positionals(argv, OPTIONS)
    given = parse("distbench.compare", __doc__ or "", OPTIONS, rest).values
    if len(lists) != 2 or not all(lists):
        raise UsageError("give launches of both sides, with -- between them: BASE... -- NEW...")
    base, new = [[load_result(folder) for folder in side] for side in lists]
    found = compare(base, new, **{name: value for name, value in given.items() if value})
    sys.stdout.write(to_text(found))
    return EXIT_REGRESSION if found.regression else EXIT_OK


if __name__ == "__main__":
    run_command(main)
