"""Runs LoadGen on given cases and writes what it recorded. Runs in an environment of its own.

python loadgen_child.py CASES.json RESULTS.json; only the standard library and mlcommons-loadgen.
Each case is run in order in this one process. A case has:

    scenario   LoadGen's name
    settings   attributes of TestSettings
    total, resident, equal_issue   the library of samples
    seed       of the delays
    late       Server: positions of queries that are held back until all are issued
    hold_s     for how long they are then held
    tokens     whether it is a token model; then late_first are positions with a late first token
    few_tokens positions of a sample with one token
    trace      false: only the summary's keys
    conf       a model: LoadGen's built-in mlperf.conf comes first

A case that has a ``model`` runs nothing: it asks for what mlperf.conf says of it.

The system under test answers at once, or after a seeded delay of tens of microseconds.
"""

import json
import random
import re
import sys
import tempfile
import time
from pathlib import Path

import mlperf_loadgen as lg

SAMPLE = re.compile(
    r'"name":"Sample".*?"ts":([0-9.]+),"args":\{"sample_seq":([0-9]+),"query_seq":([0-9]+),'
    r'"sample_idx":([0-9]+),"issue_start_ns":([0-9]+),"complete_ns":([0-9]+)\}'
)
TOKEN = re.compile(
    r'"name":"Token_Latency".*?"ts":([0-9.]+),"args":\{ "issue_delay":([0-9]+),'
    r'"issue_to_done":([0-9]+)\}'
)
SPAN = re.compile(
    r'"name":"(GenerateQueries|SampleLoop)","ph":"X".*?"ts":([0-9.]+),"dur":([0-9.]+)'
)


def spin(duration_ns):
    end = time.perf_counter_ns() + duration_ns
    while time.perf_counter_ns() < end:
        pass


class System:
    """A system under test whose answers are known beforehand."""

    def __init__(self, case):
        self.case = case
        self.random = random.Random(case["seed"])
        self.late = set(case.get("late", ()))
        self.late_first = set(case.get("late_first", ()))
        self.few = set(case.get("few_tokens", ()))
        self.held = []
        self.position = 0
        self.tokens = []
        # Keeps what LoadGen copies from alive.
        self.data = bytearray(8)

    def issue(self, samples):
        scenario = self.case["scenario"]
        samples = [sample.id for sample in samples]
        if scenario == "Server":
            for sample in samples:
                self.one(sample)
            return
        if scenario == "Offline" and self.case.get("tokens"):
            self.tokens = [self.random.randrange(2, 200) for _ in samples]
            for sample, count in zip(samples, self.tokens, strict=True):
                self.complete([sample], count)
            return
        # In pieces, out of order.
        self.random.shuffle(samples)
        begin = 0
        while begin < len(samples):
            end = begin + self.random.randrange(1, 6)
            spin(int(self.random.expovariate(1 / 15_000)))
            self.complete(samples[begin:end])
            begin = end

    def one(self, sample):
        place, self.position = self.position, self.position + 1
        count = 0
        if self.case.get("tokens"):
            count = 1 if place in self.few else self.random.randrange(2, 200)
            self.tokens.append(count)
            if place not in self.late_first:
                self.first(sample)
        if place in self.late or place in self.late_first:
            self.held.append((sample, count, place in self.late_first))
        else:
            self.complete([sample], count)

    def first(self, sample):
        lg.FirstTokenComplete([lg.QuerySampleResponse(sample, 0, 0)])

    def complete(self, samples, count=0):
        if self.case.get("tokens"):
            answers = [lg.QuerySampleResponse(sample, 0, 0, count) for sample in samples]
        else:
            answers = [lg.QuerySampleResponse(sample, 0, 0) for sample in samples]
        lg.QuerySamplesComplete(answers)

    def flush(self):
        if self.held:
            time.sleep(self.case.get("hold_s", 0))
        for sample, count, without_first in self.held:
            if without_first:
                self.first(sample)
            self.complete([sample], count)
        self.held.clear()


def settings_of(case, folder):
    settings = lg.TestSettings()
    if "conf" in case:
        settings.FromConfig("", case["conf"], case["scenario"], 0)
    if case.get("equal_issue"):
        # Some wheels have no attribute for it.
        path = folder / "user.conf"
        path.write_text("*.*.sample_concatenate_permutation = 1\n")
        settings.FromConfig(str(path), "model", case["scenario"], 2)
    settings.scenario = getattr(lg.TestScenario, case["scenario"])
    settings.mode = lg.TestMode.PerformanceOnly
    for name, value in case["settings"].items():
        setattr(settings, name, value)
    return settings


def ns(microseconds):
    """LoadGen prints microseconds with three digits: whole ns."""
    whole, _, part = microseconds.partition(".")
    return int(whole) * 1000 + int(part.ljust(3, "0"))


def read_trace(path, tokens):
    """Return the columns of the samples, in order of issue; times from the first schedule."""
    rows, first_tokens, spans = [], {}, []
    with path.open() as lines:
        for line in lines:
            if found := SAMPLE.search(line):
                rows.append([ns(found[1]), *(int(found[i]) for i in (2, 3, 4, 5, 6))])
            elif found := TOKEN.search(line):
                first_tokens[ns(found[1])] = int(found[2]) + int(found[3])
            elif len(spans) < 2 and (found := SPAN.search(line)):
                spans.append((found[1], ns(found[2]), ns(found[3])))
    rows.sort(key=lambda row: row[1])
    origin = rows[0][0]
    columns = {
        "scheduled_ns": [row[0] - origin for row in rows],
        "query": [row[2] for row in rows],
        "index": [row[3] for row in rows],
        "issue_delay_ns": [row[4] for row in rows],
        "latency_ns": [row[5] for row in rows],
    }
    if tokens:
        columns["ttft_ns"] = [first_tokens[row[0]] for row in rows]
    # LoadGen's start lies between the end of the first of these spans and the second's beginning.
    spans = {name: (begin, begin + length) for name, begin, length in reversed(spans)}
    bracket = [origin - spans["GenerateQueries"][1], origin - spans["SampleLoop"][0]]
    return columns, bracket


def run(case):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        system = System(case)
        sut = lg.ConstructSUT(system.issue, system.flush)
        loaded = []
        library = lg.ConstructQSL(
            case["total"], case["resident"], loaded.extend, lambda samples: None
        )
        log = lg.LogSettings()
        log.enable_trace = case.get("trace", True)
        log.log_output.outdir = name
        # No file of that name: an audit.config in the current folder would override the settings.
        lg.StartTestWithLogSettings(
            sut, library, settings_of(case, folder), log, str(folder / "no.config")
        )
        lg.DestroyQSL(library)
        lg.DestroySUT(sut)
        result = {"loaded": loaded, "keys": {}, "errors": 0}
        for line in (folder / "mlperf_log_detail.txt").read_text().splitlines():
            # LoadGen writes what is no JSON where it has divided by 0.
            line = re.sub(r'"value": (-?(?:inf|nan)),', r'"value": "\1",', line)
            entry = json.loads(line.removeprefix(":::MLLOG "))
            result["errors"] += entry["metadata"]["is_error"]
            if re.match("result_|early_stopping|generated_|effective_", entry["key"]):
                result["keys"][entry["key"]] = entry["value"]
        if log.enable_trace:
            path = folder / "mlperf_log_trace.json"
            tokens = case.get("tokens") and case["scenario"] == "Server"
            columns, bracket = read_trace(path, tokens)
            result |= {"columns": columns, "start_before_ns": bracket}
        if case.get("tokens"):
            result["columns"]["tokens"] = system.tokens
        return result


def config(case):
    """Return what the built-in mlperf.conf says of a model and scenario."""
    settings = lg.TestSettings()
    settings.FromConfig("", case["model"], case["scenario"], 0)
    names = [name for name in dir(settings) if not name.startswith("_") and name != "FromConfig"]
    values = {name: getattr(settings, name) for name in names}
    return {k: v for k, v in values.items() if isinstance(v, bool | int | float)}


def main():
    cases = json.loads(Path(sys.argv[1]).read_text())
    results = [config(case) if "model" in case else run(case) for case in cases]
    Path(sys.argv[2]).write_text(json.dumps(results))


if __name__ == "__main__":
    main()
