"""Judge MLCommons' compliance tests, from result directories of runs that LoadGen drove.

    python -m distbench.audit results/*-offline-*
    python -m distbench.audit PERFORMANCE ACCURACY TEST01_RUN TEST04_RUN --to audit/

Give the run in performance mode, the one in accuracy mode, and those in compliance mode, in any
order; all of one scenario and under the same conditions. Each run in compliance mode is judged as
MLCommons' scripts do, and harder where these are weak: every byte of an answer counts, and a cache
is looked for in what the ranks took. The outputs that they kept of the performance run are compared
with the accuracy run's besides. What is printed is "MLPerf-style, unverified". Needs no torch.

Exit status: 0 all passed; 1 something failed, or could not be told; 2 the runs do not go together.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from distbench import files
from distbench.cli import Option, parse, positionals, run_command
from distbench.compliance import (
    Check,
    Timed,
    same_answers,
    same_hashes,
    same_sample,
    same_score,
    same_tokens,
    took_config,
    verification,
)
from distbench.conditions import Difference, conditions, differences, listed
from distbench.errors import EXIT_CRASH, EXIT_OK, EXIT_USAGE, UsageError
from distbench.gates import WORDING
from distbench.joined import answered
from distbench.loadgen_verdict import official_of, told_by
from distbench.mllog import read_answers, read_entries
from distbench.run import Run, load_run
from distbench.suite import benchmark
from distbench.verify import check_hashes

NATIVE = "outputs"
"""Name of the audit that needs no run of its own."""
OF_THE_TEST = {"mode", "audit", "official"}
"""Options in which the runs of an audit differ; of the last, which scripts give, see ``ASKED``."""
ASKED = (
    *("round", "benchmark", "config", "model", "total", "resident", "tokens", "network"),
    *("shortened", "edited", "seeds"),
)
"""What of the plan must be alike; of all runs but TEST06's the least duration too, and of Server's
the rate."""
SOUND = ("VALID", "SHORTENED", "AUDIT")
"""Words of the rules on a run that something can be proven with."""
MARKS = {True: "passed", False: "FAILED", None: "unknown"}


@dataclass(frozen=True)
class Audited:
    """One run, read.

    Attributes:
        path: its result directory.
        run: it.
        result: as result.json has it, recomputed.
        official: what LoadGen was asked.
        keys: of LoadGen's detail log.
    """

    path: Path
    run: Run
    result: Mapping[str, Any]
    official: Mapping[str, Any]
    keys: Mapping[str, Any]

    @property
    def loadgen(self) -> Path:
        """The folder of LoadGen's logs."""
        return self.path / "loadgen"

    @property
    def role(self) -> str:
        """What it is for: performance, accuracy, or a test's name."""
        return str(self.official.get("audit") or self.official["mode"])


@dataclass(frozen=True)
class Judgement:
    """What came of one test.

    Attributes:
        audit: "TEST01" and so on, or "outputs".
        path: the run that was judged.
        checks: all of it.
    """

    audit: str
    path: Path
    checks: tuple[Check, ...]

    @property
    def passed(self) -> bool:
        """Whether everything was told, and good."""
        return all(each.passed for each in self.checks)


def read_audited(path: Path) -> Audited:
    """Read a run that LoadGen drove, and see that nobody changed it.

    Raises:
        UsageError: it is none, it is damaged, or it did not come to its end.
    """
    if not (path / "ranks").is_dir():
        raise UsageError(f"{path} is no result directory: it has no folder ranks/")
    wrong, missing = check_hashes(path)
    if wrong or missing:
        raise UsageError(f"{path} is not as it was written: {[*wrong, *missing][0]}")
    run = load_run(path)
    official, told = official_of(run), told_by(run)
    if official is None:
        raise UsageError(
            f"{path} is no run of LoadGen's: give runs of `python -m distbench.mlperf`"
        )
    if told["problem"]:
        raise UsageError(f"{path}: {told['problem']}: run it again")
    if any("answers" not in (each.after or {}) for each in run.workers) or run.missing:
        raise UsageError(f"{path} is INCOMPLETE, or of an earlier distbench: run it again")
    return Audited(path, run, run.result(), official, told["keys"])


def by_role(runs: Sequence[Audited]) -> dict[str, Audited]:
    """Return the runs by their role, once they are known to go together.

    Raises:
        UsageError: two have one role, or two were made under unlike conditions.
    """
    found: dict[str, Audited] = {}
    for each in runs:
        if each.role in found:
            raise UsageError(
                f"{found[each.role].path} and {each.path} are both of {each.role}: give one"
            )
        found[each.role] = each
    first = next(iter(runs))
    for other in runs[1:]:
        unlike = _unlike(first, other)
        if unlike:
            raise UsageError(
                f"{first.path} and {other.path} differ in {listed(unlike)}: give runs of one kind"
            )
    return found


def _unlike(first: Audited, other: Audited) -> list[Difference]:
    found = differences(conditions(dict(first.result)), conditions(dict(other.result)))
    names = [*ASKED, *["target_qps"] * (first.official["scenario"] == "server")]
    names += ["min_duration_ns"] * ("TEST06" not in (first.role, other.role))
    asked = [
        Difference(name, str(first.official[name]), str(other.official[name]))
        for name in names
        if first.official[name] != other.official[name]
    ]
    return asked + [each for each in found if each.name not in OF_THE_TEST]


def judged(runs: Sequence[Audited]) -> list[Judgement]:
    """Judge every test that the runs allow.

    Raises:
        UsageError: they do not go together, or one that a test needs is not there.
    """
    found = by_role(runs)
    performance, accuracy = found.get("performance"), found.get("accuracy")
    tests = [each for role, each in found.items() if role.startswith("TEST")]
    out = []
    if performance is not None and accuracy is not None:
        hashes = [
            pair for r in performance.run.workers for pair in (r.after or {}).get("answers", [])
        ]
        check = same_hashes(hashes, read_answers(accuracy.loadgen))
        sound = (_sound(performance), _sound(accuracy))
        out.append(Judgement(NATIVE, performance.path, (*sound, check)))
    for test in sorted(tests, key=lambda each: each.role):
        out.append(Judgement(test.role, test.path, tuple(_checks(test, performance, accuracy))))
    if not out:
        raise UsageError(
            "nothing can be judged: give a run in performance mode and one in accuracy mode, and "
            "with them those in compliance mode"
        )
    return out


def _checks(test: Audited, performance: Audited | None, accuracy: Audited | None) -> list[Check]:
    """Judge one run in compliance mode."""
    scenario, driver = test.official["scenario"], test.run.driver
    assert driver is not None
    checks = [_sound(test), took_config(test.role, test.keys, driver.column("index"))]
    if test.role == "TEST06":
        bench = benchmark(test.official["benchmark"])
        entries = read_entries(test.loadgen)
        return [*checks, *same_tokens(scenario, entries, bench.dtype, bench.end)]
    if performance is None:
        raise UsageError(f"{test.role} of {test.path} needs the run in performance mode: give it")
    checks.insert(0, _sound(performance))
    found = (performance, test)
    if test.role == "TEST04":
        checks.append(same_score(scenario, test.keys, performance.keys, least=False))
        return [*checks, _undisturbed(same_sample(_timed(test), _timed(performance)), found)]
    if accuracy is None:
        raise UsageError(f"TEST01 of {test.path} needs the run in accuracy mode: give it")
    logged, reference = read_entries(test.loadgen), read_answers(accuracy.loadgen)
    checks += [_sound(accuracy), same_answers(logged, reference)]
    return [*checks, same_score(scenario, test.keys, performance.keys, least=True)]


def _sound(run: Audited) -> Check:
    """Tell whether a run is one that something can be proven with."""
    rules, errors = run.result["verdict"]["rules"], len(told_by(run.run)["errors"])
    failed = [gate["name"] for gate in rules["gates"] if not gate["passed"]]
    said = (
        f"{run.path.name} is {rules['result']} by the rules, with {errors} errors in LoadGen's log"
    )
    said += f"; not kept: {', '.join(failed)}" if failed else ""
    said += f"; its measurement is {run.result['verdict']['status']}"
    return Check(f"valid ({run.role})", rules["result"] in SOUND, said)


def _undisturbed(check: Check, runs: Sequence[Audited]) -> Check:
    """Leave a difference in speed open where one of the two measurements is INVALID."""
    bad = [each.path.name for each in runs if each.result["verdict"]["status"] != "VALID"]
    if check.passed is not False or not bad:
        return check
    said = f"{check.told}; but the measurement of {' and '.join(bad)} is not VALID: repeat both"
    return Check(check.name, None, said)


def _timed(run: Audited) -> Timed:
    """Return what a run is compared by, of all ranks."""
    driver, parts = run.run.driver, []
    assert driver is not None
    index = driver.column("index")
    fresh = np.zeros(len(index), bool)
    fresh[np.unique(index, return_index=True)[1]] = True  # rows are in the order of issue
    for record in run.run.workers:
        good = answered(record, driver)
        took = (record.column("completed") - record.column("issued"))[good]
        parts.append((record.column("query")[good], took))
    query, service_ns = (np.concatenate(part) for part in zip(*parts, strict=True))
    tokens = driver.column("tokens")[query] if run.official["tokens"] else None
    return Timed(service_ns, fresh[query], tokens)


def lines(judgements: Sequence[Judgement], official: Mapping[str, Any]) -> list[str]:
    """Lay out what came of the tests."""
    out = [
        f"{official['benchmark']}, {official['scenario']}, {official['round']}: compliance, "
        f"{WORDING}"
    ]
    for each in judgements:
        out.append(f"{each.audit}  {MARKS[each.passed]}  {each.path}")
        out += [f"  {MARKS[check.passed]}  {check.name}: {check.told}" for check in each.checks]
    return out


def write(folder: Path, judgements: Sequence[Judgement]) -> None:
    """Write what came of the tests: audit.json, and the texts that a submission has of each.

    Raises:
        UsageError: the folder is there already, or cannot be written.
    """
    try:
        folder.mkdir(parents=True)
        for each in judgements:
            if each.audit == NATIVE:
                continue
            (folder / each.audit).mkdir()
            for name, text in verification(each.audit, each.checks).items():
                files.write_bytes(folder / each.audit / name, text.encode())
        told = [
            asdict(each) | {"passed": each.passed, "path": each.path.name} for each in judgements
        ]
        files.write_json(folder / "audit.json", {"wording": WORDING, "audits": told})
    except OSError as error:
        raise UsageError(
            f"{folder} cannot be written: {error.strerror or error}; give another --to"
        ) from error


OPTIONS = (Option("to", None, Path, "also write audit.json and verify_*.txt there", "DIR"),)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UsageError: the runs do not go together, or cannot be read.
    """
    rest, (paths, *more) = positionals(argv, OPTIONS)
    values = parse("distbench.audit", __doc__ or "", OPTIONS, rest).values
    if not paths or more:
        sys.stderr.write("distbench: give result directories of `python -m distbench.mlperf`\n")
        return EXIT_USAGE
    runs = [read_audited(Path(each)) for each in paths]
    found = judged(runs)
    sys.stdout.write("\n".join(lines(found, runs[0].official)) + "\n")
    if values["to"] is not None:
        write(values["to"], found)
    return EXIT_OK if all(each.passed for each in found) else EXIT_CRASH


if __name__ == "__main__":
    run_command(main)
