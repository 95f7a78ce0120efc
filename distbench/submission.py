"""Lay runs of LoadGen's out as a submission tree, in the format of MLPerf's checker of v5.0.1.

    python -m distbench.submission --submitter acme --system a30x2 --to tree results/*-offline-*

One system a call: its runs may be of several models and scenarios, performance, accuracy and
compliance. The tree is "MLPerf-style, unverified": a format to try, not a result of MLPerf's.
What only a person knows of the system comes from --describe, a JSON object, and what is still
missing is listed. Exit status: 0 written, 2 refused. Needs no torch.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from distbench import files, submission_remarks
from distbench.audit import Audited, judged
from distbench.cli import Option, one_of, parse, positionals, run_command
from distbench.compliance import verification
from distbench.errors import EXIT_OK, UsageError
from distbench.gates import WORDING
from distbench.loadgen_verdict import told_by
from distbench.mllog import ACCURACY
from distbench.submission_runs import (
    DIVISIONS,
    Scenario,
    Taken,
    Verified,
    arranged,
    check_together,
    failed_tests,
    no_texts,
    take,
    word_of,
)
from distbench.submission_tree import (
    Place,
    Tree,
    check_free,
    code_files,
    folder_name,
    scenario_files,
    write_tree,
)
from distbench.system_description import (
    FIELDS,
    MAY_BE_EMPTY,
    NETWORK_FIELDS,
    WEIGHTS_FIELDS,
    merged,
    one_system,
    read_description,
    weights_told,
)


@dataclass(frozen=True)
class Submission:
    """A tree that can be written, and what is to be said of it.

    Attributes:
        place: whose it is.
        scenarios: of the system.
        tree: all files.
        missing: keys that only a person knows and nobody has told, by file.
        remarks: what the checker will say, by the folder that it is about.
    """

    place: Place
    scenarios: Sequence[Scenario]
    tree: Tree
    missing: Mapping[str, Sequence[str]]
    remarks: Mapping[str, Sequence[str]]


def build(
    place: Place, runs: Sequence[Taken], describe: str = "", verified: Verified = no_texts
) -> Submission:
    """Make a tree of runs, in memory.

    Args:
        place: whose it is.
        runs: of one system.
        describe: file with what a person says of it; "" for none.
        verified: verifies a compliance run; see ``submission_runs.arranged``.

    Raises:
        UsageError: they do not go together, or the description cannot be used.
    """
    check_together(runs, place.division)
    scenarios = arranged(runs, verified)
    failed = [f"{name} of {each.model}" for each in scenarios for name in failed_tests(each)]
    if failed and place.division != "open":
        raise UsageError(
            f"{', '.join(failed)} did not pass: see `python -m distbench.audit`, or give "
            "--division open"
        )
    told, network = one_system([run.run for run in runs]), bool(runs[0].official["network"])
    told |= {"division": place.division, "submitter": place.submitter}
    told |= {"system_name": place.system, "system_type": "datacenter"}
    said = read_description(describe, network) if describe else {}
    names = [*FIELDS, *(NETWORK_FIELDS if network else ())]
    described = merged(names, told, said, describe)
    tree: Tree = {}
    missing = {f"systems/{place.system}.json": _empty(described)}
    remarks = {f"systems/{place.system}.json": submission_remarks.of_system(described)}
    for each in scenarios:
        weights = merged(WEIGHTS_FIELDS, weights_told(each.first.run), said, describe)
        own = submission_remarks.of_scenario(each, place.division)
        own += submission_remarks.of_weights(weights)
        tree |= scenario_files(place, each, weights, own)
        tree |= code_files(place, each.model, each.first)
        missing[f"measurements/{place.system}/{each.model}/{each.name}"] = _empty(weights)
        remarks[f"{each.model}/{each.name}"] = own
    remarks["results"] = submission_remarks.of_models(scenarios, place.division)
    # Without it the checker refuses all of the system: so it comes last.
    tree[f"{place.root}/systems/{place.system}.json"] = files.to_json(described)
    return Submission(place, scenarios, tree, missing, remarks)


def _empty(described: Mapping[str, str]) -> list[str]:
    """Return the keys without a value, those first that the checker asks for."""
    names = [name for name, value in described.items() if not value]
    return sorted(names, key=MAY_BE_EMPTY.__contains__)


def to_text(made: Submission, to: Path) -> str:
    """Return what the command prints: what was written, what is missing, what will be said."""
    place = made.place
    lines = [f"{to / place.root}: {len(made.tree)} files, {WORDING}"]
    for each in made.scenarios:
        lines.append(f"  {each.model}/{each.name}")
        lines += [f"    {run.part}  {run.run_id}  {word_of(run)}" for run in each.runs]
        if each.accuracy is not None:
            lines.append(
                f"    the whole {ACCURACY}, to be kept: {each.accuracy.logs.resolve() / ACCURACY}"
            )
    lost = {where: names for where, names in made.missing.items() if names}
    for where, names in lost.items():
        lines.append(f"missing in {where}, which only a person knows:")
        lines += [f"  {name}{' (may stay empty)' * (name in MAY_BE_EMPTY)}" for name in names]
    if lost:
        lines.append("give them with --describe FILE.json, into a new tree")
    said = {where: every for where, every in made.remarks.items() if every}
    if said:
        lines.append(f"{submission_remarks.CHECKER} will say:")
        lines += [f"  {where}: {each}" for where, every in said.items() for each in every]
    else:
        lines.append(f"nothing is known that {submission_remarks.CHECKER} would say against it")
    return "\n".join(lines) + "\n"


def verified(scenario: Scenario, name: str) -> dict[str, str]:
    """Return the texts of a compliance run's verification, by file; see ``audit``.

    Raises:
        UsageError: a run that it needs is not among those given, or of another kind.
    """
    given = [scenario.performance, scenario.accuracy, scenario.audits[name].run]
    runs = [
        Audited(each.folder, each.run, each.result, each.official, told_by(each.run)["keys"])
        for each in given
        if each is not None
    ]
    (found,) = (each for each in judged(runs) if each.audit == name)
    return verification(name, found.checks)


OPTIONS = (
    Option("submitter", None, folder_name, "who submits: a folder's name", "NAME"),
    Option("system", None, folder_name, "the system's short name: likewise", "NAME"),
    Option("division", "open", one_of(*DIVISIONS), "MLPerf's division", "|".join(DIVISIONS)),
    Option("implementation", "distbench", folder_name, "name of the code", "NAME"),
    Option("describe", "", str, "JSON of what only a person knows of the system", "FILE"),
    Option("to", None, str, "folder of the tree", "DIR"),
)


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UsageError: a run or an option cannot be used as asked.
    """
    rest, lists = positionals(argv, OPTIONS)
    given = parse("distbench.submission", __doc__ or "", OPTIONS, rest).values
    lost = [f"--{name}" for name in ("submitter", "system", "to") if not given[name]]
    folders = [folder for words in lists for folder in words]
    if lost or not folders:
        raise UsageError(f"needed: {', '.join(lost + ([] if folders else ['RUN_DIR...']))}")
    place = Place(given["division"], given["submitter"], given["system"], given["implementation"])
    made = build(place, [take(Path(folder)) for folder in folders], given["describe"], verified)
    to = Path(given["to"])
    check_free(to, place, made.tree)
    write_tree(to, made.tree)
    sys.stdout.write(to_text(made, to))
    return EXIT_OK


if __name__ == "__main__":
    run_command(main)
