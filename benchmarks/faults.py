"""Faults in the middle of a two-host run, over and over: what becomes of it, and how soon.

    python benchmarks/faults.py
    python benchmarks/faults.py --rounds 1 --json faults.json

Needs root and the packages that tests/cluster needs: its hosts are namespaces with a real sshd.
Each round makes three new hosts, starts the launcher on jw1 for jw2 and jw3, lets the window run,
does harm, and waits. Told of each fault: seconds from the harm to the launcher's end; whether the
exit status is 6 and the result INCOMPLETE; whether the rank that failed is the only one named;
processes left on hosts that can be reached; and completed samples in the survivor's log on its own
disk that the result lacks, which must be none.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from common import Report, Row, parser

from tests.cluster.ssh_rig import available, ssh_hosts
from tests.cluster.test_launch import FAULTS, ended, file, left, result, started

if TYPE_CHECKING:
    from tests.cluster.ssh_rig import SshHosts

END_S = 45.0
RANKS = {"jw2": 0, "jw3": 1}


def completed(hosts: SshHosts, host: str, path: str) -> int:
    """Count the completed samples in a host's own log of its rank."""
    folder = f"{path}/ranks/{RANKS[host]:05d}"
    rows = np.load(io.BytesIO(file(hosts, host, f"{folder}/samples.npy")))
    names = json.loads(file(hosts, host, f"{folder}/rank.json"))["columns"]
    ended_rows = rows[:, names.index("completed")] > 0
    return int(rows[ended_rows, names.index("count")].sum())


def one(fault: str) -> dict[str, Any]:
    """Do one fault once; returns what was seen."""
    harm, culprit = FAULTS[fault]
    survivor = "jw3" if culprit == "jw2" else "jw2"
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, ssh_hosts(Path(folder)) as hosts:
        job = started(hosts)
        harm(hosts)
        begin = time.monotonic()
        code, _ = ended(job, END_S)
        took_s = time.monotonic() - begin
        path, found = result(hosts)
        named = {f["rank"] for f in found["verdict"]["findings"] if f["level"] == "incomplete"}
        rows = {row["rank"]: row["samples"] or 0 for row in found["per_rank"]}
        kept = rows.get(RANKS[survivor], 0)
        return {
            "took_s": took_s,
            "good": code == 6 and found["verdict"]["status"] == "INCOMPLETE",
            "named": named == {RANKS[culprit]},
            "left": sum(map(len, left(hosts, survivor, "jw1").values())),
            "lost": completed(hosts, survivor, path) - kept,
        }


def main() -> None:
    """Do all faults and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=5, help="of each fault (5)")
    options = made.parse_args()
    if available():
        raise SystemExit(available())
    report = Report("faults", vars(options))
    told: dict[str, list[dict[str, Any]]] = {fault: [] for fault in FAULTS}
    for _ in range(options.rounds):
        for fault in FAULTS:
            try:
                told[fault].append(one(fault))
            except AssertionError as error:
                report.say(f"{fault}: {' '.join(str(error).split())[:300]}")
                told[fault].append(dict.fromkeys(("good", "named", "left", "lost"), 0))
                told[fault][-1]["took_s"] = END_S
    report.table(
        "From the fault to the launcher's end",
        [Row(fault, [each["took_s"] for each in seen], "s") for fault, seen in told.items()],
    )
    for fault, seen in told.items():
        good, named = (sum(each[key] for each in seen) for key in ("good", "named"))
        report.say(
            f"{fault}: INCOMPLETE and exit status 6 in {good} of {len(seen)}, the right rank alone "
            f"named in {named}, {sum(each['left'] for each in seen)} processes left, "
            f"{sum(each['lost'] for each in seen)} samples lost"
        )
    report.end(options.json)


if __name__ == "__main__":
    main()
