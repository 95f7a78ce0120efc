"""Can a driver run here: asked of a host before one is started."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from distbench.drivable import main
from distbench.errors import UsageError

ROOT = Path(__file__).parents[2]


def test_a_host_with_the_rounds_loadgen_can_drive() -> None:
    assert main([]) == 0
    assert main(["--rules", "mlperf-v5.0,shortened=2s"]) == 0


def test_another_rounds_loadgen_is_refused_with_the_line_of_pip() -> None:
    with pytest.raises(UsageError, match=r"5\.0\.13 is installed.*pip install mlcommons-loadgen=="):
        main(["--rules", "mlperf-v5.1"])
    with pytest.raises(UsageError, match=r"did you mean mlperf-v5\.0\?"):
        main(["--rules", "mlperf-5.0"])


@pytest.mark.parametrize("absent", ["torch", "mlperf_loadgen"])
def test_torch_is_not_needed_and_loadgen_is(absent: str) -> None:
    code = f"import sys; sys.modules[{absent!r}] = None; sys.argv[1:] = ['--rules', 'mlperf-v5.0']"
    code += "; from distbench.cli import run_command; from distbench.drivable import main"
    code += "; run_command(main)"
    argv = [sys.executable, "-c", code]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60, cwd=ROOT, check=False)
    if absent == "torch":
        assert (done.returncode, done.stderr) == (0, "")
    else:
        assert done.returncode == 2
        assert done.stderr.startswith("distbench: LoadGen is not installed here")
        assert "`pip install mlcommons-loadgen==5.0.13`" in done.stderr
