"""Records what LoadGen says into tests/data: python -m tests.oracle.record (about a minute).

Makes an environment for each LoadGen in a temporary folder. The latencies are new ones in each
recording, so that all of it is recorded at once. Server cases whose number of late queries the
machine has changed are run again, so that the counts that decide stay in the record.
"""

import gzip
import json
import sys
import tempfile
from pathlib import Path

import numpy as np

from distbench.rounds import V5_0, V5_1
from tests.oracle.loadgen import (
    conf_cases,
    digest,
    environment,
    latency_cases,
    order_cases,
    run,
)

DATA = Path(__file__).parent.parent / "data"
LATENCIES = DATA / "loadgen_latencies.npz"
RECORDS = DATA / "loadgen_records.json.gz"
COLUMNS = ("latency_ns", "ttft_ns", "tokens")
FEW = ("early", "result", "generated", "effective_min_query", "effective_sample_conc")
TRIES = 20


def short(case, result):
    """Keep of an order what decides."""
    columns = {name: digest(result["columns"][name]) for name in ("index", "scheduled_ns")}
    return {"case": case, "loaded": digest(result["loaded"]), "columns": columns,
            "keys": some(result["keys"], ("generated", "effective_min_query"))}  # fmt: skip


def some(keys, prefixes):
    return {name: value for name, value in keys.items() if name.startswith(prefixes)}


def is_as_planned(case, result):
    """Say whether as many queries were late as the case wanted."""
    if case["scenario"] != "Server" or case.get("tokens"):
        return True
    issued = result["keys"]["result_query_count"]
    late = [place for place in case["late"] if place < issued]
    return result["keys"]["result_overlatency_query_count"] == len(late)


def recorded_latencies(python, folder):
    """Run the latency cases; returns those entries and their columns, end to end."""
    cases = latency_cases()
    results = run(python, cases, folder)
    for _ in range(TRIES):
        again = [i for i, case in enumerate(cases) if not is_as_planned(case, results[i])]
        if not again:
            break
        for i, result in zip(again, run(python, [cases[i] for i in again], folder), strict=True):
            results[i] = result
    assert not again, [cases[i] for i in again]
    entries, joined = [], {name: [] for name in COLUMNS}
    for case, result in zip(cases, results, strict=True):
        columns = result["columns"]
        for name in COLUMNS:
            joined[name] += columns.get(name, [])
        lengths = {name: len(columns[name]) for name in COLUMNS if name in columns}
        entries.append({
            "case": case, "lengths": lengths, "last_scheduled_ns": columns["scheduled_ns"][-1],
            "start_before_ns": result["start_before_ns"], "keys": some(result["keys"], FEW),
            "errors": result["errors"],
        })  # fmt: skip
    return entries, joined


def load_latencies():
    """Return (case, result) of each recorded run, as ``run`` would give them."""
    with np.load(LATENCIES, allow_pickle=False) as stored:
        joined = {name: stored[name].astype(np.int64) for name in stored.files}
    at, found = dict.fromkeys(joined, 0), []
    for entry in load()["latencies"]:
        # The rules use the last scheduled instant only.
        columns = {"scheduled_ns": np.array([entry["last_scheduled_ns"]], np.int64)}
        for name, length in entry["lengths"].items():
            columns[name] = joined[name][at[name] : at[name] + length]
            at[name] += length
        found.append((entry["case"], entry | {"columns": columns}))
    return found


def load():
    """Return the records."""
    return json.loads(gzip.decompress(RECORDS.read_bytes()))


def main():
    record = {"orders": {}, "conf": {}}
    with tempfile.TemporaryDirectory() as name:
        for version in ("5.0.13", "5.1.2", "6.0.17"):
            folder = Path(name) / version
            python, reason = environment(version, folder)
            if python is None:
                sys.exit(reason)
            if version != "5.1.2":
                cases = order_cases()
                results = run(python, cases, folder)
                record["orders"][version] = [
                    short(case, result) for case, result in zip(cases, results, strict=True)
                ]
            if version != "6.0.17":
                round_ = {"5.0.13": V5_0, "5.1.2": V5_1}[version]
                cases = conf_cases(round_)
                results = run(python, cases, folder)
                for result in results:
                    if "keys" in result:
                        result["keys"] = some(result["keys"], ("effective_sample_conc",))
                record["conf"][round_.name] = [
                    {"case": case, "found": result}
                    for case, result in zip(cases, results, strict=True)
                ]
        record["latencies"], joined = recorded_latencies(python, folder)
    DATA.mkdir(exist_ok=True)
    assert max(map(max, joined.values())) < 2**31
    np.savez_compressed(LATENCIES, **{k: np.array(v, np.int32) for k, v in joined.items()})
    text = json.dumps(record, separators=(",", ":")).encode()
    RECORDS.write_bytes(gzip.compress(text, 9, mtime=0))


if __name__ == "__main__":
    main()
