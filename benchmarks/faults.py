"""Faults in the middle of a two-host run, over and over: what becomes of it, and how soon.

    python benchmarks/faults.py
    python benchmarks/faults.py --rounds 1 --json faults.json

Needs root and the packages that tests/cluster needs: its hosts are namespaces with a real sshd.
Each round makes three new hosts, starts the launcher on jw1 for jw2 and jw3, lets the window run,
does harm, and waits. Told of each fault: seconds from the harm to the launcher's end; whether exit
status and result are as they must be; whether the rank that failed is the only one named; processes
left on hosts that can be reached; and completed samples in logs on disks that can be reached which
the result lacks, which must be none. Where the power is cut, a copy of the disk of that instant
tells how old the oldest completed row is that had not reached it. A full disk, a folder that is
gone and a model out of memory show at the end of the window, about 5 s after the harm.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import Report, Row, parser

from tests.cluster.faults import FAULTS, LAUNCHER_KILLED, POWER_CUT, RANKS, Seen, once
from tests.cluster.ssh_rig import available, ssh_hosts


def one(name: str) -> Seen | str:
    """Do one fault once; returns what was seen, or why nothing was."""
    with tempfile.TemporaryDirectory(prefix="faults-") as folder, ssh_hosts(Path(folder)) as hosts:
        try:
            return once(hosts, name)
        except Exception as error:  # a round that goes wrong in any way is one to tell of
            said = " ".join(str(error).split())[:300]
            return f"{name}: a round went wrong: {type(error).__name__}: {said}"


def line(name: str, all_seen: list[Seen], rounds: int) -> str:
    """Return one fault's line: how often each thing was as it must be."""
    fault = FAULTS[name]
    ends = sum((seen.code, seen.status) == (fault.code, fault.status) for seen in all_seen)
    named = sum(seen.named == [RANKS[fault.culprit]] for seen in all_seen)
    told = f"{name}: {fault.status} and exit status {fault.code} in {ends} of {rounds}, "
    if name != LAUNCHER_KILLED:  # there no rank failed
        told += f"the right rank alone named in {named}, "
    told += f"{sum(seen.left for seen in all_seen)} processes left, "
    told += f"{sum(seen.lost for seen in all_seen)} samples lost"
    if name == POWER_CUT:
        oldest = max((seen.oldest_lost_s for seen in all_seen), default=float("nan"))
        told += f" elsewhere; on the disk itself nothing older than {oldest:.2f} s"
    return told


def main() -> None:
    """Do all faults and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=5, help="of each fault (5)")
    options = made.parse_args()
    if available():
        raise SystemExit(available())
    report = Report("faults", vars(options))
    told: dict[str, list[Seen]] = {name: [] for name in FAULTS}
    for _ in range(options.rounds):
        for name in FAULTS:
            seen = one(name)
            if isinstance(seen, str):
                report.say(seen)
            else:
                told[name].append(seen)
    report.table(
        "From the fault to the end of the launcher and of all processes, of rounds that ended",
        [Row(name, [each.took_s for each in seen], "s") for name, seen in told.items()],
    )
    for name, seen in told.items():
        report.say(line(name, seen, options.rounds))
    report.end(options.json)


if __name__ == "__main__":
    main()
