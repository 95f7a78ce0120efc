"""The files of a submission tree, as MLPerf's checker of v5.0.1 wants them.

    <division>/<submitter>/
      results/<system>/<model>/<Scenario>/
        performance/run_1/  mlperf_log_summary.txt, mlperf_log_detail.txt
        accuracy/           the same, accuracy.txt, mlperf_log_accuracy.json (first and last 4 KiB)
      measurements/<system>/<model>/<Scenario>/
        user.conf, README.md, <system>_<implementation>_<Scenario>.json
      compliance/<system>/<model>/<Scenario>/<TEST>/
        verify_*.txt, performance/run_1/, accuracy/
      systems/<system>.json
      code/<model>/<implementation>/README.md

LoadGen's logs are copied byte for byte. All of a tree is made in memory before any of it is
written.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distbench import files
from distbench.errors import DistbenchError, UsageError
from distbench.gates import WORDING
from distbench.loadgen_verdict import told_by
from distbench.mllog import ACCURACY, DETAIL, SUMMARY
from distbench.submission_runs import (
    AUDITS,
    DIVISIONS,
    USER_CONF,
    Audit,
    Scenario,
    Taken,
    word_of,
)
from distbench.suite import benchmark

LOG_LIMIT_BYTES = 10 << 10
"""Of mlperf_log_accuracy.json, by the checker."""
END_BYTES = 4096
"""Of each end of it that stays, as truncate_accuracy_log.py of the same repository has it."""
CUT = b"\n\n...\n\n"
BESIDE = (".git", ".github", "assets")
"""Folders that the checker takes beside those of the divisions."""

Tree = dict[str, bytes]
"""Contents by path below the folder of the divisions."""


@dataclass(frozen=True)
class Place:
    """Whose tree it is, and of what.

    Attributes:
        division: "open", "closed" or "network".
        submitter: a folder's name.
        system: likewise.
        implementation: likewise.
    """

    division: str
    submitter: str
    system: str
    implementation: str

    @property
    def root(self) -> str:
        """The submitter's folder."""
        return f"{self.division}/{self.submitter}"

    def of(self, part: str, scenario: Scenario) -> str:
        """Return a scenario's folder in results, measurements or compliance."""
        return f"{self.root}/{part}/{self.system}/{scenario.model}/{scenario.name}"


def folder_name(text: str) -> str:
    """Read a name that may stand in a path: the checker takes no spaces and no leading dots.

    Raises:
        UsageError: it may not.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}", text) or text.endswith("__pycache__"):
        raise UsageError(
            f"{text!r} is no name of a folder that the checker takes: give letters, digits, and "
            "., _, + or - after the first"
        )
    return text


def truncated(path: Path) -> bytes:
    """Return a log of answers as the tree has it: whole up to 10 KiB, else its two ends."""
    size = path.stat().st_size
    with path.open("rb") as log:
        if size <= LOG_LIMIT_BYTES:
            return log.read()
        begin = log.read(END_BYTES)
        log.seek(size - END_BYTES)
        return begin + CUT + log.read()


def scenario_files(
    place: Place, scenario: Scenario, weights: Mapping[str, str], remarks: Sequence[str]
) -> Tree:
    """Return the files of one scenario.

    Args:
        place: whose tree it is.
        scenario: its runs.
        weights: by ``system_description.WEIGHTS_FIELDS``.
        remarks: what the checker will say.
    """
    results, measured = place.of("results", scenario), place.of("measurements", scenario)
    tree: Tree = {}
    if scenario.performance is not None:
        tree |= _logs(f"{results}/performance/run_1", scenario.performance)
    if scenario.accuracy is not None:
        tree |= _logs(f"{results}/accuracy", scenario.accuracy)
        tree |= _answers(
            f"{results}/accuracy", scenario.accuracy, _accuracy_line(scenario.accuracy)
        )
    name = f"{place.system}_{place.implementation}_{scenario.name}.json"
    tree[f"{measured}/{USER_CONF}"] = (scenario.first.logs / USER_CONF).read_bytes()
    tree[f"{measured}/{name}"] = files.to_json(dict(weights))
    tree[f"{measured}/README.md"] = _readme(place, scenario, remarks).encode()
    for test, audit in scenario.audits.items():
        tree |= audit_files(f"{place.of('compliance', scenario)}/{test}", audit)
    return tree


def audit_files(folder: str, audit: Audit) -> Tree:
    """Return the files of one compliance test.

    Args:
        folder: of the test.
        audit: its run and the texts of its verification.
    """
    kind = AUDITS[audit.run.part]
    tree = _logs(f"{folder}/performance/run_1", audit.run)
    for name in (*kind.texts, *kind.more):
        if name in audit.texts:
            inner = "accuracy/" if name in kind.more else ""
            tree[f"{folder}/{inner}{name}"] = audit.texts[name].encode()
    if kind.answers == "truncated":
        tree |= _answers(f"{folder}/accuracy", audit.run, "")
    elif kind.answers == "whole":
        tree[f"{folder}/accuracy/{ACCURACY}"] = (audit.run.logs / ACCURACY).read_bytes()
    return tree


def code_files(place: Place, model: str, run: Taken) -> Tree:
    """Return the files of a model's code folder: which distbench it is, and how to run it."""
    environment = run.run.first.before["environment"]
    text = (
        f"# {model}: {place.implementation}\n\n"
        f"{WORDING}.\n\n"
        f"The code is distbench {_version(environment)}: `distbench.mlperf` lets MLCommons' "
        f"LoadGen {run.official['loadgen']}, unmodified, drive all ranks as one system.\n\n"
        "In a clone of it, at that commit:\n\n"
        "    pip install '.[mlperf]'\n"
        f"    python -m distbench.mlperf --benchmark {run.official['benchmark']}\n\n"
        "The commands of the runs are in README.md of each scenario, in `measurements/`.\n"
    )
    return {f"{place.root}/code/{model}/{place.implementation}/README.md": text.encode()}


def _logs(folder: str, run: Taken) -> Tree:
    return {f"{folder}/{name}": (run.logs / name).read_bytes() for name in (SUMMARY, DETAIL)}


def _answers(folder: str, run: Taken, line: str) -> Tree:
    """Return the log of answers, truncated, and accuracy.txt with the hash of all of it."""
    log = run.logs / ACCURACY
    text = f"{line}hash={files.sha256_file(log)}\n"
    return {f"{folder}/{ACCURACY}": truncated(log), f"{folder}/accuracy.txt": text.encode()}


def _accuracy_line(run: Taken) -> str:
    """Return the score, as accuracy-imagenet.py of the reference writes that of its models.

    A benchmark that the checker scores by other words (its ``ACC_PATTERN``) needs a line of its
    own here.
    """
    told, bench = told_by(run.run), benchmark(run.official["benchmark"])
    right, of = told["right"], told["of"]
    percent = f"{100 * right / of:.6f}"
    return f"accuracy={percent}%, good={right:g}, total={of:g}\n{bench.metric}; {WORDING}\n"


def _version(environment: Mapping[str, Any]) -> str:
    commit = environment.get("git_commit")
    changed = ", with changes that are not in it" if environment.get("git_dirty") else ""
    named = f" (commit {commit}{changed})" if commit else " (no commit is known)"
    return f"{environment.get('distbench_version')}{named}"


def _readme(place: Place, scenario: Scenario, remarks: Sequence[str]) -> str:
    """Return README.md of a scenario: how to repeat its runs, and what they are worth."""
    first, record = scenario.first, scenario.first.run.first
    model, ranks = record.before["model"], len(first.run.workers)
    hosts = list(dict.fromkeys(each.host for each in first.run.workers))
    driver = first.run.driver.host if first.run.driver is not None else "a host that is not known"
    lines = [
        f"# {scenario.model}, {scenario.name}, on {place.system}",
        "",
        f"{WORDING}: MLCommons' LoadGen {first.official['loadgen']} drove distbench "
        f"{_version(record.before['environment'])}, by the settings of {first.official['round']}. "
        "It was neither submitted to MLCommons nor reviewed.",
        "",
        f"- {ranks} {'rank' if ranks == 1 else 'ranks'} on {', '.join(hosts)}",
        f"- model {first.official['model']}, weights {model['digest'] or 'none'}, "
        f"computed in {model.get('dtype') or 'a type that is not recorded'}",
        f"- LoadGen ran on {driver}; `user.conf` is what it was given in {first.run_id}",
    ]
    for run in scenario.runs:
        lines += ["", f"## {run.part}: {run.run_id}", "", f"    {run.run.first.before['command']}"]
        if len(hosts) > 1:
            lines += ["", "on each host, with torchrun's rendezvous (`launch/ssh.py` gives it)."]
        lines += ["", f"distbench says: {word_of(run)}."]
    if scenario.accuracy is not None:
        log = scenario.accuracy.logs / ACCURACY
        lines += [
            "",
            f"`{ACCURACY}` had {log.stat().st_size:,} bytes, SHA-256 {files.sha256_file(log)}; the "
            f"whole of it is in `loadgen/` of {scenario.accuracy.run_id}.",
        ]
    if remarks:
        lines += ["", "MLPerf's submission checker of v5.0.1 will say:", ""]
        lines += [f"- {each}" for each in remarks]
    return "\n".join(lines) + "\n"


def check_free(to: Path, place: Place, tree: Tree) -> None:
    """Refuse to write over what is there, or into a folder that holds something else.

    Raises:
        UsageError: it does; the sentence names it.
    """
    if to.exists() and not to.is_dir():
        raise UsageError(f"{to} is no folder (--to)")
    strange = [
        path.name
        for path in (to.iterdir() if to.exists() else ())
        if path.name not in (*DIVISIONS, *BESIDE) and path.suffix not in (".md", ".pdf")
    ]
    if strange:
        raise UsageError(
            f"{to} holds {strange[0]}, which is no part of a submission tree: give --to a folder "
            "of its own"
        )
    taken = [to / place.root / "systems" / f"{place.system}.json"]
    taken += [to / place.root / part / place.system for part in ("results", "measurements")]
    taken.append(to / place.root / "compliance" / place.system)
    for path in taken:
        if path.exists():
            raise UsageError(
                f"{path} is there already, and nothing is written over: give another --system or "
                "--to, or remove all of that system"
            )
    for name, content in tree.items():
        path = to / name
        if path.exists() and path.read_bytes() != content:
            raise UsageError(
                f"{path} is there already and says otherwise: give another --implementation or --to"
            )


def write_tree(to: Path, tree: Tree) -> None:
    """Write the files of a tree; those that are there already are alike.

    Raises:
        DistbenchError: the disk is full or the folder cannot be written.
    """
    try:
        for name, content in tree.items():
            path = to / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                files.write_bytes(path, content)
    except OSError as error:
        raise DistbenchError(
            f"{to / name} cannot be written: {error.strerror or error}; make room, remove what was "
            "written there of this system, and try again"
        ) from error
