"""How the package is built: layers, what nothing may use, docstrings, sizes. Read from the source.

Nothing here imports a module of distbench but the package itself, so it needs no torch.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import distbench

PACKAGE = Path(distbench.__file__).parent
LAYERS = (
    # Records, judgement, wire: numpy only.
    "errors files samples clock loadgen_rng arrivals rounds rules early_stopping gates judged "
    "bounds scenarios load batching cells settings search histogram quantiles student stats "
    "steady run scores rank_files shape layout predict stages sharding sums windows times laps "
    "pool intervals metrics findings checks settled trust pace ruling operations transports fabric "
    "fabric_verdict user_conf suite mllog compliance official mlperf_files forbidden "
    "loadgen_verdict "
    "floor_verdict verdict tried trail scaling report compare conditions launches wire pings "
    "liveness network cli joined waiting frames dispatch loadgen floor driver drivable talk",
    # The machine; torch.
    "world seating start sut environment gpus models engines prepare harness record preamble "
    "readiness finish probe nvml window peak command parallel shards cuts tensors",
    # Scenarios.
    "offline server singlestream multistream worker null_replica central spawn coordinated "
    "distributed collectives fabric_window courses mlperf",
    # Commands around runs.
    "plan shard_plan verify audit salvage baseline submission submission_runs submission_tree "
    "submission_remarks system_description",
)
LAYER = {name: number for number, names in enumerate(LAYERS) for name in names.split()}
COLLECTIVE = {"world", "parallel", "shards", "tensors"}
"""The modules that may call torch.distributed."""
SERIALIZERS = {"pickle", "_pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
MAX_LINES, MAX_FUNCTION_LINES = 400, 60

SOURCES = sorted(PACKAGE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text(encoding="utf-8")) for path in SOURCES}


def name_of(path: Path) -> str:
    """Return a module's dotted name inside the package; "" for the package itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


sources = pytest.mark.parametrize("path", SOURCES, ids=lambda path: name_of(path) or "distbench")


def at_run_time(node: ast.AST) -> Iterator[ast.AST]:
    """Walk a tree without what stands under ``if TYPE_CHECKING``."""
    yield node
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for other in child.orelse:
                yield from at_run_time(other)
        else:
            yield from at_run_time(child)


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every name that a tree imports at run time, wherever the import stands, dotted."""
    for node in at_run_time(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports name the whole path"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(tree: ast.AST) -> set[str]:
    """Return the first part below distbench of what is imported from it."""
    parts = [name.split(".") for name in imports(tree)]
    found = {part[1] for part in parts if part[0] == "distbench" and len(part) > 1}
    return {name for name in found if name in MODULES}


MODULES = {name_of(path).split(".")[0] for path in SOURCES} - {"", "__main__"}


def test_every_module_has_a_layer_and_only_modules_have() -> None:
    assert set(LAYER) == MODULES
    assert sum(len(names.split()) for names in LAYERS) == len(LAYER)
    assert len(SOURCES) > 25


def test_the_coverage_of_layer_0_is_that_of_all_its_modules() -> None:
    script = (PACKAGE.parent / ".ci" / "run").read_text()
    (listed,) = re.findall(r'^layer0="(.*)"$', script, re.M)
    assert sorted(listed.split()) == sorted(LAYERS[0].split())


@sources
def test_a_module_imports_from_its_own_layer_or_lower_ones(path: Path) -> None:
    top = name_of(path).split(".")[0]
    if top in ("", "__main__"):
        # Resolved on first use: an import here would be one for every command.
        assert own_imports(TREES[path]) == set()
        return
    own = LAYER.get(top, len(LAYERS))
    higher = {name for name in own_imports(TREES[path]) if LAYER.get(name, 0) > own}
    assert higher == set(), f"{top} is of layer {own}"


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import distbench.world", {"world"}),
        ("from distbench import world, __version__", {"world"}),
        ("def f():\n    from distbench.world import join", {"world"}),
        ("if TYPE_CHECKING:\n    from distbench.world import join", set()),
        ("if typing.TYPE_CHECKING:\n    x = 1\nelse:\n    import distbench.run", {"run"}),
        ("import distbench", set()),
    ],
)
def test_the_check_of_layers_sees_an_import(source: str, found: set[str]) -> None:
    assert own_imports(ast.parse(source)) == found


def distributed(tree: ast.AST) -> list[str]:
    """Return where torch.distributed is named, but for torchrun's own error handler."""
    named = [name for name in imports(tree) if name.startswith("torch.distributed")]
    named += [
        ast.unparse(node)
        for node in at_run_time(tree)
        if isinstance(node, ast.Attribute) and ast.unparse(node) == "torch.distributed"
    ]
    return [name for name in named if not name.startswith("torch.distributed.elastic")]


@sources
def test_only_world_and_tensors_speak_to_torch_distributed(path: Path) -> None:
    found = distributed(TREES[path])
    if name_of(path) not in COLLECTIVE:
        assert found == []
    else:
        assert found != []


def forbidden(tree: ast.AST) -> Iterator[str]:
    """Yield what would pickle, or hand a command to a shell."""
    for name in imports(tree):
        if set(name.split(".")) & SERIALIZERS:
            yield name
    plain = {
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
        and ast.unparse(node.func) == "torch.load"
        and "weights_only=True" in map(ast.unparse, node.keywords)
    }
    for node in ast.walk(tree):
        if node in plain:
            continue  # torch.load of tensors alone, which runs no code
        if isinstance(node, ast.Attribute | ast.Name | ast.alias):
            name = node.attr if isinstance(node, ast.Attribute) else getattr(node, "id", None)
            name = name or getattr(node, "name", "")
            if re.fullmatch(
                r"(\w+_)?(all_gather|gather|broadcast|scatter|send|recv)_object\w*", name
            ):
                yield name
        if isinstance(node, ast.Attribute) and ast.unparse(node) in (
            "torch.load", "torch.save", "os.system", "os.popen", "subprocess.getoutput",
        ):  # fmt: skip
            yield ast.unparse(node)
        if isinstance(node, ast.keyword) and node.arg in ("shell", "allow_pickle"):
            value = ast.unparse(node.value)
            if value != "False":
                yield f"{node.arg}={value}"


@sources
def test_nothing_is_pickled_and_no_shell_is_used(path: Path) -> None:
    assert list(forbidden(TREES[path])) == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from pickle import loads",
        "def f():\n    import multiprocessing.pickle",
        "dist.all_gather_object(a, b)",
        "dist.broadcast_object_list(a)",
        "from torch.distributed import gather_object",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "torch.load(path, weights_only=plain)",
        "subprocess.run(text, shell=True)",
        "subprocess.run(text, shell=yes)",
        "np.load(path, allow_pickle=True)",
        "os.system(text)",
    ],
)
def test_the_check_above_sees_it(source: str) -> None:
    assert len(list(forbidden(ast.parse(source)))) == 1


def test_what_is_harmless_passes() -> None:
    harmless = "import json\nnp.load(p, allow_pickle=False)\nrun(c, shell=False)\nload(p)"
    harmless += "\ntorch.load(p, weights_only=True)"
    assert list(forbidden(ast.parse(harmless))) == []


# Names


def test_the_public_names() -> None:
    assert sorted(distbench.__all__) == [
        "Done", "Layout", "Load", "Run", "ShardPlan", "SystemUnderTest", "Windows", "World", "join",
        "load_run",
        "run_collectives", "run_coordinated", "run_distributed", "run_mlperf",
        "run_multistream", "run_offline",
        "run_server",
        "run_singlestream",
    ]  # fmt: skip


def test_no_public_name_is_a_modules_name() -> None:
    assert set(distbench.__all__) & MODULES == set()
    assert not [name for name in distbench.__all__ if (PACKAGE / f"{name}.py").exists()]


def test_every_public_name_is_where_it_is_said_to_be() -> None:
    assert sorted(distbench._HOMES) == sorted(distbench.__all__)
    for name, home in distbench._HOMES.items():
        tree = TREES[PACKAGE / f"{home.removeprefix('distbench.')}.py"]
        defined = [
            node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)
        ]
        assert name in defined, home
    assert {"World", "__version__"} <= set(dir(distbench))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        distbench.nothing  # noqa: B018


# Docstrings and sizes


def public(body: list[ast.stmt], owner: str = "") -> Iterator[ast.FunctionDef | ast.ClassDef]:
    """Yield the public functions and classes of a module, and the public methods of those."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                yield from public(node.body)


@sources
def test_what_is_public_has_a_docstring(path: Path) -> None:
    tree = TREES[path]
    assert ast.get_docstring(tree) or name_of(path) == "__main__"
    assert [node.name for node in public(tree.body) if not ast.get_docstring(node)] == []


@sources
def test_no_module_is_longer_than_400_lines(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES


@sources
def test_no_function_is_longer_than_60_lines(path: Path) -> None:
    long = [
        (node.name, (node.end_lineno or 0) - node.lineno + 1)
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (node.end_lineno or 0) - node.lineno + 1 > MAX_FUNCTION_LINES
    ]
    assert long == []
