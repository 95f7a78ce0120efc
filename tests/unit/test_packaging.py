"""What setup.cfg, constraints.txt, README.md and the workflow promise agrees with the tree.

Nothing is built or installed here, and nothing is asked over the network.
"""

import ast
import configparser
import fnmatch
import os
import re
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "distbench"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")

# What would name the machine that a file was written on.
MACHINE_PATHS = re.compile(
    re.escape(str(Path(__file__).resolve().parents[2])).encode()
    + rb"""/ | (?<![\w./-]) / (?: root | home/\w+ ) /[.] (?: pyenv | cache | local ) \b""",
    re.VERBOSE,
)
LOCAL_PIN = re.compile(rb"==\s*[\w.]+[+]cpu\b")


@pytest.fixture(scope="module")
def config():
    parser = configparser.ConfigParser(interpolation=None)
    with (ROOT / "setup.cfg").open(encoding="utf-8") as file:
        parser.read_file(file)
    return parser


@pytest.fixture(scope="module")
def tree():
    """Every file that git tracks or would take, relative to the root."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        check=True,
        capture_output=True,
    ).stdout
    paths = (Path(os.fsdecode(name)) for name in listed.split(b"\0") if name)
    return sorted(path for path in set(paths) if (ROOT / path).is_file())


def lines(value):
    kept = (line.strip() for line in value.splitlines())
    return [line for line in kept if line and not line.startswith("#")]


def dotted(folder):
    return ".".join(folder.parts)


# setup.cfg


def test_the_version_is_a_literal(config):
    assert config["metadata"]["version"] == "attr: distbench.__version__"
    module = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    values = [
        node.value
        for node in module.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__version__"
    ]
    assert len(values) == 1
    assert isinstance(values[0], ast.Constant)
    assert re.fullmatch(r"\d+\.\d+\.\d+", values[0].value)


def test_files_named_in_the_metadata_exist(config):
    described = config["metadata"]["long_description"].removeprefix("file:").strip()
    for name in (described, *lines(config["metadata"]["license_files"])):
        assert (ROOT / name).is_file(), f"setup.cfg names {name}, which does not exist"


def test_find_takes_every_package_and_nothing_else(config, tree):
    assert config["options"]["packages"] == "find:"
    include = lines(config["options.packages.find"]["include"])

    def found(folder):
        return any(fnmatch.fnmatchcase(dotted(folder), pattern) for pattern in include)

    folders = {path.parent for path in tree if path.suffix == ".py"}
    ours = {folder for folder in folders if folder.parts[:1] == ("distbench",)}
    assert Path("distbench") in ours
    for folder in sorted(ours):
        assert (ROOT / folder / "__init__.py").is_file(), f"{folder} has no __init__.py"
        assert found(folder), f"setup.cfg's find: leaves out {folder}"
    for folder in sorted(folders - ours):
        assert not found(folder), f"setup.cfg's find: takes {folder}"


def test_package_data_covers_every_data_file(config, tree):
    patterns = {name: lines(value) for name, value in config["options.package_data"].items()}
    data = [path for path in tree if path.parts[0] == "distbench" and path.suffix != ".py"]
    assert Path("distbench/py.typed") in data
    assert any(path.suffix == ".npz" for path in data)
    for path in data:
        assert any(path.match(pattern) for pattern in patterns.get(dotted(path.parent), [])), (
            f"setup.cfg's package_data leaves out {path}"
        )
    for package, wanted in patterns.items():
        for pattern in wanted:
            assert list((ROOT / package.replace(".", "/")).glob(pattern)), (
                f"package_data: no file matches {pattern} in {package}"
            )


def test_one_oldest_python(config):
    oldest = PYTHONS[0]
    assert config["options"]["python_requires"] == f">={oldest}"
    assert config["mypy"]["python_version"] == oldest
    ruff = (ROOT / "ruff.toml").read_text(encoding="utf-8")
    assert f'target-version = "py{oldest.replace(".", "")}"' in ruff


def test_classifiers_claim_the_pythons_that_the_workflow_runs(config):
    claimed = re.findall(r":: (3\.\d+)$", config["metadata"]["classifiers"], re.MULTILINE)
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    matrix = re.findall(r"^\s+python: \[(.+)\]$", workflow, re.MULTILINE)
    assert len(matrix) == 1
    assert claimed == [version.strip(' "') for version in matrix[0].split(",")] == list(PYTHONS)


# constraints.txt


@pytest.fixture(scope="module")
def constraints():
    text = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    return [Requirement(line) for line in lines(text)]


def test_every_constraint_is_one_exact_version(constraints):
    for pin in constraints:
        assert re.fullmatch(r"==\d+(\.\d+)*", str(pin.specifier)), f"not an exact pin: {pin}"
        assert not pin.extras, f"pip refuses a constraint with extras: {pin}"


@pytest.mark.parametrize("python", PYTHONS)
def test_each_requirement_has_one_pin_that_fits_it(config, constraints, python):
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    pins = {}
    for pin in constraints:
        if pin.marker is None or pin.marker.evaluate(environment):
            name = canonicalize_name(pin.name)
            assert name not in pins, f"{name} has two pins on Python {python}"
            pins[name] = str(pin.specifier).removeprefix("==")
    wanted = lines(config["options"]["install_requires"])
    wanted += lines(config["options.extras_require"]["test"])
    for requirement in map(Requirement, wanted):
        version = pins.get(canonicalize_name(requirement.name))
        assert version, f"constraints.txt does not pin {requirement.name} on Python {python}"
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


# README.md and CI


def fenced_lines(text):
    """The lines inside ``` blocks, as .ci/run takes them."""
    fenced, kept = False, []
    for line in text.splitlines():
        if re.match(r" *```", line):
            fenced = not fenced
        elif fenced:
            kept.append(line.strip())
    return kept


@pytest.fixture(scope="module")
def readme_commands():
    readme = ROOT / "README.md"
    assert readme.is_file(), "README.md is missing: it must give the install and test commands"
    return [line for line in fenced_lines(readme.read_text(encoding="utf-8")) if "venv" in line]


def check_command(command, *parts):
    assert not command.endswith(("\\", "&&", "|")), f"not on a single line: {command}"
    for part in ("python3 -m venv ", "pip install ", "-c constraints.txt", *parts):
        assert part in command, f"README.md's command lacks {part!r}: {command}"


def test_readme_has_one_test_command_on_one_line(readme_commands):
    found = [line for line in readme_commands if "pytest" in line]
    assert len(found) == 1, (
        "README.md must have exactly one line in a fenced block with both 'venv' and 'pytest', "
        f"the test command that .ci/run runs; it has {len(found)}"
    )
    check_command(found[0], "-m venv .venv", "[test]")


def test_readme_has_an_install_command_on_one_line(readme_commands):
    found = [line for line in readme_commands if "-m venv" in line and "pytest" not in line]
    assert found, (
        "README.md must have a line in a fenced block that makes a venv and installs distbench "
        "in it with constraints.txt"
    )
    check_command(found[0])


def test_ci_run_is_executable():
    assert os.access(ROOT / ".ci/run", os.X_OK), "chmod +x .ci/run"


def test_actions_are_pinned_by_commit():
    for workflow in (ROOT / ".github/workflows").glob("*.yml"):
        for used in re.findall(r"uses: *(\S+)", workflow.read_text(encoding="utf-8")):
            assert re.fullmatch(r"[\w./-]+@[0-9a-f]{40}", used), f"{workflow.name}: {used}"


# Every file


def test_no_file_tells_of_the_machine_it_was_written_on(tree):
    assert tree, "git lists no file"
    told = []
    for path in tree:
        content = (ROOT / path).read_bytes()
        for pattern in (MACHINE_PATHS, LOCAL_PIN):
            told += [f"{path}: {match[0].decode()}" for match in pattern.finditer(content)]
    assert not told, f"paths of a machine, or pins on a local build: {told}"
