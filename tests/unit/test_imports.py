"""What an import costs: a control node without torch reads, verifies and salvages results."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

LAYER_0 = "errors files samples clock quantiles network wire pings liveness cli run metrics verdict"
ABOVE = "report.text verify salvage sut prepare finish record start"
BETWEEN_RUNS = "conditions launches compare baseline plan report.tables report.__main__ submission"
TORCH_FREE = [*LAYER_0.split(), *ABOVE.split(), *BETWEEN_RUNS.split()]

# A torch that cannot be imported, installed or not; what asks for it fails by name.
WITHOUT_TORCH = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] == 'torch':
            raise ModuleNotFoundError('torch was asked for')
sys.meta_path.insert(0, Refuse())
"""


def python(code, *argv):
    return subprocess.run(
        [sys.executable, "-c", code, *argv],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=ROOT,
        check=False,
    )


@pytest.mark.parametrize("name", TORCH_FREE)
def test_a_module_is_imported_without_torch(name):
    code = f"{WITHOUT_TORCH}\nimport distbench.{name}\nassert 'torch' not in sys.modules"
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_the_check_above_notices_torch():
    done = python(f"{WITHOUT_TORCH}\nimport distbench.world")
    assert done.returncode == 1
    assert "torch was asked for" in done.stderr


def test_import_distbench_loads_neither_numpy_nor_torch():
    code = "import sys, distbench; print({'numpy', 'torch'} & set(sys.modules), distbench)"
    done = python(code)
    assert done.stdout.startswith("set() <module 'distbench'"), done


@pytest.mark.parametrize(
    "command",
    ["verify", "salvage", "offline", "compare", "baseline", "plan", "report", "submission"],
)
def test_help_needs_no_torch(command):
    code = (
        f"{WITHOUT_TORCH}\nimport runpy\nsys.argv[1:] = ['--help']\n"
        f"runpy.run_module('distbench.{command}', run_name='__main__')"
    )
    done = python(code)
    assert done.returncode == 0, done.stderr
    assert command in done.stdout
    assert done.stderr == ""
