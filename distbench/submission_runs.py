"""The runs of a submission tree: read, held against each other, and put in their places."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from distbench.errors import EXIT_OK, UsageError
from distbench.loadgen_verdict import official_of, told_by
from distbench.mllog import ACCURACY, DETAIL, SUMMARY
from distbench.run import Run, load_run
from distbench.user_conf import SCENARIOS
from distbench.verify import verify
from distbench.windows import window_folders

DIVISIONS = ("open", "closed", "network")
USER_CONF = "user.conf"
SIZE_LIMIT_BYTES = 50 << 20
"""Of any file, by the checker."""


@dataclass(frozen=True)
class Kind:
    """What the tree has of one of MLCommons' compliance tests.

    Attributes:
        texts: of its verification; the checker reads them.
        answers: whether LoadGen's log of answers is kept, and whether whole.
        more: texts that stand beside it where the verification makes them.
    """

    texts: tuple[str, ...]
    answers: str = ""
    more: tuple[str, ...] = ()


AUDITS = {
    "TEST01": Kind(
        ("verify_accuracy.txt", "verify_performance.txt"),
        "truncated",
        ("baseline_accuracy.txt", "compliance_accuracy.txt"),
    ),
    "TEST04": Kind(("verify_performance.txt",)),
    "TEST06": Kind(("verify_accuracy.txt",), "whole"),
}
"""By name, as ``official["audit"]`` has it."""


@dataclass(frozen=True)
class Taken:
    """One run of LoadGen's, as it was stored.

    Attributes:
        folder: its result directory.
        run: its records.
        official: what LoadGen was asked.
        result: the judgement, made anew.
    """

    folder: Path
    run: Run
    official: Mapping[str, Any]
    result: Mapping[str, Any]

    @property
    def run_id(self) -> str:
        """Its name."""
        return str(self.run.first.before["run_id"])

    @property
    def logs(self) -> Path:
        """Where LoadGen's logs lie."""
        return self.folder / "loadgen"

    @property
    def part(self) -> str:
        """What it is in a scenario: "performance", "accuracy" or the name of a test."""
        mode = str(self.official["mode"])
        return str(self.official["audit"]) if mode == "compliance" else mode


@dataclass(frozen=True)
class Audit:
    """One compliance test's run and what its verification wrote, by file name."""

    run: Taken
    texts: Mapping[str, str]


@dataclass(frozen=True)
class Scenario:
    """One scenario of one model.

    Attributes:
        model: its folder's name.
        name: of the scenario, as LoadGen has it.
        performance: its run; None without one.
        accuracy: likewise.
        audits: by name of the test.
    """

    model: str
    name: str
    performance: Taken | None = None
    accuracy: Taken | None = None
    audits: Mapping[str, Audit] = field(default_factory=dict)

    @property
    def runs(self) -> list[Taken]:
        """All its runs."""
        plain = [run for run in (self.performance, self.accuracy) if run is not None]
        return [*plain, *(audit.run for audit in self.audits.values())]

    @property
    def first(self) -> Taken:
        """The performance run, or else another."""
        return self.runs[0]


Verified = Callable[[Scenario, str], Mapping[str, str]]
"""From a scenario and the name of one of its tests to the texts of its verification, by file."""


def no_texts(_scenario: Scenario, _name: str) -> Mapping[str, str]:
    """Verify nothing."""
    return {}


def take(folder: Path) -> Taken:
    """Read a result directory and make sure that it can be shown.

    Raises:
        UsageError: it is no run of LoadGen's, does not verify, is incomplete or has torn logs.
    """
    if window_folders(folder):
        raise UsageError(f"{folder} holds several windows: give runs of python -m distbench.mlperf")
    status, lines = verify(folder)
    if status != EXIT_OK:
        raise UsageError(
            f"{folder} does not verify: {lines[0]}; see `python -m distbench.verify {folder}`"
        )
    run = load_run(folder)
    official = official_of(run)
    if official is None:
        raise UsageError(
            f"{folder} was not driven by LoadGen: give runs of python -m distbench.mlperf"
        )
    problem = told_by(run)["problem"]
    if problem:
        raise UsageError(f"{folder}: LoadGen's logs do not tell all: {problem}; run it again")
    taken = Taken(folder, run, official, run.result())
    if official["mode"] == "compliance" and official["audit"] not in AUDITS:
        raise UsageError(
            f"{folder} is the audit {official['audit']}, which is distbench's own: the tree has "
            f"places for {', '.join(AUDITS)}"
        )
    _check_logs(taken)
    return taken


def _check_logs(taken: Taken) -> None:
    """Refuse a run of which a file is not here or too large for the tree."""
    kind = AUDITS.get(taken.part)
    for name in (DETAIL, SUMMARY, ACCURACY, USER_CONF):
        path = taken.logs / name
        if not path.is_file():
            raise UsageError(f"{path} is not here: copy it from the driver's host, or run again")
        cut = name == ACCURACY and (kind is None or kind.answers != "whole")
        size = 0 if cut else path.stat().st_size
        if size > SIZE_LIMIT_BYTES:
            raise UsageError(
                f"{path} has {size / (1 << 20):.0f} MiB, and {SIZE_LIMIT_BYTES >> 20} MiB is the "
                "most that a submission may have in one file"
            )


def not_valid(taken: Taken) -> list[str]:
    """Return why a run is not VALID by the rules, a phrase each; nothing where it is."""
    verdict = taken.result["verdict"]
    rules = verdict["rules"]
    if rules["result"] in ("VALID", "AUDIT"):
        return []
    found = ["it is a shortened run"] if rules["shortened"] else []
    found += [_shown(gate) for gate in rules["gates"] if not gate["passed"]]
    if rules["result"] == "INVALID" and not found:  # for a fact among these
        told = verdict["findings"]
        found += [
            f"{each['code']}: {each['message']}" for each in told if each["level"] == "invalid"
        ]
    return found


def _shown(gate: Mapping[str, Any]) -> str:
    unit = "" if gate["unit"] == "1" else f" {gate['unit']}"
    return f"gate {gate['name']}: {gate['value']:g}, limit {gate['limit']:g}{unit}"


FAILED = ("TEST FAIL", "verification failed")
"""What stands in the text of a verification that did not pass."""


def failed_tests(scenario: Scenario) -> list[str]:
    """Return the compliance tests that were verified and did not pass."""
    return [
        name
        for name, audit in scenario.audits.items()
        if any(f in text for f in FAILED for text in audit.texts.values())
    ]


def word_of(taken: Taken) -> str:
    """Return what distbench says of a run, in one line."""
    why = not_valid(taken)
    if taken.part in AUDITS and not why:
        return "a run of the test, whose outcome is in verify_*.txt"
    word = f"not VALID by the rules ({'; '.join(why)})" if why else "VALID by the rules"
    return f"{word}; measurement {taken.result['verdict']['status']}"


def check_together(runs: Sequence[Taken], division: str) -> None:
    """Refuse runs that make no tree together.

    Raises:
        UsageError: two are of one place, of different rounds or weights, or not of the division.
    """
    first = runs[0]
    for run in runs:
        if run.official["round"] != first.official["round"]:
            raise UsageError(
                f"{first.run_id} is of {first.official['round']}, and {run.run_id} of "
                f"{run.official['round']}: a tree is of one round"
            )
        network = bool(run.official["network"])
        if network != (division == "network") and division != "open":
            where = "outside the system, over a network" if network else "on the system itself"
            right = "network" if network else "closed"
            raise UsageError(
                f"{run.run_id}: LoadGen ran {where}, which is not the {division} division's: give "
                f"--division {right} or open"
            )
        if division != "open" and (why := not_valid(run)):
            raise UsageError(
                f"{run.run_id} is not VALID by the rules: {'; '.join(why)}; run it again, or give "
                "--division open"
            )
    for name in dict.fromkeys(model_of(run) for run in runs):
        _one_model([run for run in runs if model_of(run) == name])


def _one_model(runs: Sequence[Taken]) -> None:
    """Refuse runs of one model that have different weights or computed otherwise."""
    first = runs[0]
    for run in runs:
        for key in ("name", "digest", "dtype"):
            own, other = (each.run.first.before["model"].get(key) for each in (first, run))
            if own != other:
                raise UsageError(
                    f"{first.run_id} has the model's {key} {own!r}, and {run.run_id} {other!r}: "
                    f"all runs of {model_of(run)} in a tree are of one model"
                )


def model_of(run: Taken) -> str:
    """Return the name of a model's folder: the benchmark's, as LoadGen was told it.

    The checker knows the names of MLPerf's list (it takes resnet50 for its own resnet). For others
    a submitter may write model_mapping.json, which says that a model does the task of one of the
    list: digits and tinylm do not, so none is written here.
    """
    return str(run.official["config"])


def arranged(runs: Sequence[Taken], verified: Verified = no_texts) -> list[Scenario]:
    """Put runs in their places, in order of model and scenario.

    Args:
        runs: in any order.
        verified: verifies a compliance run against the others of its scenario.

    Raises:
        UsageError: two are of one place; the sentence has both.
    """
    found: dict[tuple[str, str], Scenario] = {}
    for run in runs:
        key = model_of(run), SCENARIOS[run.official["scenario"]]
        place = found.get(key, Scenario(*key))
        if run.part in AUDITS:
            other = place.audits.get(run.part)
            before = other.run if other is not None else None
            new = replace(place, audits={**place.audits, run.part: Audit(run, {})})
        elif run.part == "accuracy":
            before, new = place.accuracy, replace(place, accuracy=run)
        else:
            before, new = place.performance, replace(place, performance=run)
        if before is not None:
            raise UsageError(
                f"{before.run_id} and {run.run_id} are both the {run.part} run of {key[0]}, "
                f"{key[1]}: give one of them"
            )
        found[key] = new
    return [
        replace(
            place,
            audits={
                name: Audit(audit.run, verified(place, name))
                for name, audit in sorted(place.audits.items())
            },
        )
        for _, place in sorted(found.items())
    ]
