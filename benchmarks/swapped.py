"""Whether swapped runs blame a slow host, and a slow role, each over and over.

    python benchmarks/swapped.py
    python benchmarks/swapped.py --rounds 2 --json swapped.json

Needs root and the packages that tests/cluster needs. Each round is one `launch/ssh.py --repeat 4
--swap` of the Sleep SUT on two hosts, one of which, or the rank 0 on whichever, takes a tenth more
for each sample. Told: how often the launcher blamed that and nothing else.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from common import Report, parser

from tests.cluster.faults import blamed, swapped
from tests.cluster.ssh_rig import available, ssh_hosts

CULPRITS = {"jw3": "host", "rank 0": "role"}


def main() -> None:
    """Do all rounds and print."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=20, help="of each culprit (20)")
    options = made.parse_args()
    if available():
        raise SystemExit(available())
    report = Report("swapped", vars(options))
    right = dict.fromkeys(CULPRITS, 0)
    for _ in range(options.rounds):
        for place, culprit in CULPRITS.items():
            with tempfile.TemporaryDirectory() as folder, ssh_hosts(Path(folder)) as hosts:
                done = swapped(hosts, place)
            told = blamed(done.stderr) if done.returncode == 0 else "nothing: it failed"
            right[place] += told == culprit
            if told != culprit:
                report.say(f"{place} was slow: blamed {told or 'neither'}: {done.stderr[-500:]}")
    for place, count in right.items():
        report.say(f"{place} slower by a tenth: blamed alone in {count} of {options.rounds}")
    report.end(options.json)


if __name__ == "__main__":
    main()
