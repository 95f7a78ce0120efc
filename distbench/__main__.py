"""`python -m distbench` lists the commands."""

from __future__ import annotations

import sys

COMMANDS = {
    "offline": "every sample at once: samples/s over all ranks",
    "server": "queries by a schedule, whatever became of those before: latency under a load",
    "singlestream": "one query at a time on each rank: the latency of a lone user",
    "multistream": "queries of eight samples, one at a time on each rank",
    "coordinated": "the same work on 1 .. N ranks in turn: scaling efficiency, and what is lost",
    "distributed": "one model over several ranks: pipeline stages or tensor-parallel parts",
    "collectives": "what the network gives: collective operations, their bandwidth and latency",
    "mlperf": "MLCommons' LoadGen drives every rank: Offline, Server and the streams",
    "driver": "the process that issues queries under central dispatch, on a host of its own",
    "plan": "before a run: how many queries, how long, what could not be VALID",
    "audit": "MLCommons' compliance tests, judged from the runs that LoadGen drove",
    "verify": "recompute every figure of a result directory and check every hash",
    "submission": "lay runs of LoadGen's out in the format of MLPerf's submission checker",
    "salvage": "make a report from whatever rank folders are left",
    "compare": "launches of one thing against launches of another: faster, slower, undecided",
    "baseline": "record launches, and hold later ones against them",
    "report": "a result directory as text, json, csv or Markdown",
}


def main() -> int:
    """Print the commands; returns the exit status."""
    if sys.argv[1:] and sys.argv[1] not in ("-h", "--help"):
        asked = sys.argv[1]
        hint = f": `python -m distbench.{asked}`" if asked in COMMANDS else ""
        sys.stderr.write(f"distbench: each command is a module of its own{hint}\n")
        return 2
    width = max(len(name) for name in COMMANDS)
    lines = [
        f"  python -m distbench.{name.ljust(width)}  {what}" for name, what in COMMANDS.items()
    ]
    sys.stdout.write("distbench measures inference on nodes that work together\n\n")
    sys.stdout.write("\n".join(lines) + "\n\nEach takes --help.\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
