"""Can a driver run on this host: asked before one is started; never imports torch.

    python -m distbench.drivable [--rules mlperf-v5.0]

Ends with 0, or with the sentence that says what is missing. `launch/ssh.py --loadgen-host` asks.
"""

from __future__ import annotations

from collections.abc import Sequence

from distbench.cli import Option, parse, run_command
from distbench.errors import EXIT_OK
from distbench.loadgen import check_installed
from distbench.mlperf_files import EXTRAS
from distbench.rules import parse_rules

OPTIONS = (
    Option("rules", "none", parse_rules, "a round, whose LoadGen must be here", "ROUND"),
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    """Run the command; returns the exit status.

    Raises:
        UsageError: the round's LoadGen is not here, or there is no such round.
    """
    round_ = parse("distbench.drivable", __doc__ or "", OPTIONS, argv).values["rules"].round
    if round_ is not None:
        check_installed(round_.loadgen, EXTRAS[round_.name])
    return EXIT_OK


if __name__ == "__main__":
    run_command(main)
