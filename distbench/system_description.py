"""What a submission tree says of a system and of its weights: by the runs, else by a person.

The keys are those that MLPerf's submission checker reads (mlcommons/inference,
tools/submission/submission_checker.py, tag v5.0.1). A value is what the run recorded, "N/A" where
it is known that there is no such thing, or "" where only a person knows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from distbench import files
from distbench.cli import nearest
from distbench.errors import UsageError
from distbench.gates import WORDING
from distbench.loadgen_verdict import official_of
from distbench.run import Run
from distbench.suite import benchmark

FIELDS = (
    *("division", "submitter", "status", "system_name", "number_of_nodes"),
    *("host_processor_model_name", "host_processors_per_node", "host_processor_core_count"),
    *("host_memory_capacity", "host_storage_capacity", "host_storage_type"),
    *("accelerators_per_node", "accelerator_model_name", "accelerator_memory_capacity"),
    *("framework", "operating_system", "system_type", "other_software_stack"),
    *("host_processor_frequency", "host_processor_caches", "host_memory_configuration"),
    *("host_processor_interconnect", "host_networking", "host_networking_topology"),
    *("accelerator_frequency", "accelerator_host_interconnect", "accelerator_interconnect"),
    *("accelerator_interconnect_topology", "accelerator_memory_configuration"),
    *("accelerator_on-chip_memories", "cooling", "hw_notes", "sw_notes"),
    *("host_network_card_count", "system_type_detail"),
)
"""Keys of systems/<system>.json."""
NETWORK_FIELDS = (
    *("is_network", "network_type", "network_media", "network_rate", "nic_loadgen"),
    *("number_nic_loadgen", "net_software_stack_loadgen", "network_protocol"),
    *("number_connections", "nic_sut", "number_nic_sut", "net_software_stack_sut"),
    "network_topology",
)
"""More of them where LoadGen's host is not one of the system's."""
MAY_BE_EMPTY = (
    *("host_processor_frequency", "host_processor_caches", "host_processor_interconnect"),
    *("accelerator_frequency", "accelerator_interconnect_topology"),
    *("accelerator_on-chip_memories", "hw_notes", "sw_notes", "system_type_detail"),
    *NETWORK_FIELDS,
)
"""Keys that have to be there, and of which the checker takes ""."""
WEIGHTS_FIELDS = (
    *("input_data_types", "retraining", "starting_weights_filename", "weight_data_types"),
    "weight_transformations",
)
"""Keys of measurements/.../<system>_<implementation>_<Scenario>.json; none may be empty."""
CHOICES = {
    "status": ("available", "preview", "rdi"),
    "system_type": ("datacenter", "edge", "datacenter,edge", "edge,datacenter"),
}
"""What the checker takes."""
CHOSEN = ("system_name", "system_type")
"""Keys that have a value of their own, and of which a person may say another."""
NONE = "N/A"
GIB = 1 << 30


@dataclass(frozen=True)
class Node:
    """One host of the system.

    Attributes:
        environment: of its first rank.
        gpus: of its ranks, each once; empty where they compute on the CPU.
    """

    environment: Mapping[str, Any]
    gpus: tuple[Mapping[str, Any], ...]


def nodes_of(run: Run) -> dict[str, Node]:
    """Return the hosts that computed, by name, in order of rank."""
    found: dict[str, Node] = {}
    for record in run.workers:
        environment = record.before["environment"]
        gpu, node = environment.get("gpu"), found.get(record.host, Node(environment, ()))
        new = (gpu,) if gpu is not None and gpu not in node.gpus else ()
        found[record.host] = Node(node.environment, (*node.gpus, *new))
    return found


def places_of(run: Run) -> str:
    """Return what a run's ranks computed on, in one line."""
    return ", ".join(
        f"{record.host} {device['uuid'] or device['type']}"
        for record in run.workers
        for device in [record.before["device"]]
    )


def told(run: Run) -> dict[str, str]:
    """Return what a run tells of its system, by the checker's keys; "" what it does not."""
    official = official_of(run) or {}
    nodes = list(nodes_of(run).values())
    known = _hosts(nodes) | _accelerators(nodes) | _software(run, official, nodes)
    known["number_of_nodes"] = str(len(nodes))
    if official["network"]:
        known |= _network(run, official, nodes)
    return known


def _each(nodes: Sequence[Node], value: Callable[[Node], str]) -> str:
    """Return a value of all nodes: one where they are alike; "" where it is unknown of any."""
    found = list(dict.fromkeys(map(value, nodes)))
    return "; ".join(found) if all(found) else ""


def _plain(name: str) -> Callable[[Node], str]:
    return lambda node: str(node.environment.get(name) or "")


def _size(size_bytes: Any) -> str:
    return f"{size_bytes / GIB:.4g} GiB" if size_bytes else ""


def _frequency(rate_hz: Any) -> str:
    return f"{rate_hz / 1e6:.0f} MHz at most" if rate_hz else ""


def _cores(node: Node) -> str:
    """Return the cores of one processor, which is what MLPerf lists."""
    cores, sockets = (node.environment.get(name) for name in ("cpu_cores", "cpu_sockets"))
    return str(cores // sockets) if cores and sockets and cores % sockets == 0 else ""


def _system(node: Node) -> str:
    name, kernel = (node.environment.get(each) for each in ("os", "kernel"))
    return f"{name}, Linux {kernel}" if name and kernel else ""


def _hosts(nodes: Sequence[Node]) -> dict[str, str]:
    return {
        "host_processor_model_name": _each(nodes, _plain("cpu_model")),
        "host_processors_per_node": _each(nodes, _plain("cpu_sockets")),
        "host_processor_core_count": _each(nodes, _cores),
        "host_processor_frequency": _each(
            nodes, lambda node: _frequency(node.environment.get("cpu_max_hz"))
        ),
        "host_processor_caches": _each(nodes, _plain("cpu_caches")),
        "host_memory_capacity": _each(
            nodes, lambda node: _size(node.environment.get("memory_total_bytes"))
        ),
        "operating_system": _each(nodes, _system),
    }


def _accelerators(nodes: Sequence[Node]) -> dict[str, str]:
    """Return what is known of the accelerators that the ranks computed on."""
    keys = [name for name in FIELDS if name.startswith("accelerator")]
    if not any(node.gpus for node in nodes):
        return dict.fromkeys(keys, NONE) | {"accelerators_per_node": "0"}

    def of(value: Callable[[Mapping[str, Any]], str]) -> str:
        return _each(
            [Node({}, (gpu,)) for node in nodes for gpu in node.gpus],
            lambda one: value(one.gpus[0]),
        )

    def link(gpu: Mapping[str, Any]) -> str:
        generation, width = gpu.get("pcie_generation_max"), gpu.get("pcie_width_max")
        return f"PCIe Gen{generation} x{width}" if generation and width else ""

    known = {
        "accelerators_per_node": _each(nodes, lambda node: str(len(node.gpus))),
        "accelerator_model_name": of(lambda gpu: str(gpu.get("name") or "")),
        "accelerator_memory_capacity": of(lambda gpu: _size(gpu.get("memory_total_bytes"))),
        "accelerator_frequency": of(lambda gpu: _frequency(gpu.get("max_sm_clock_hz"))),
        "accelerator_host_interconnect": of(link),
    }
    if sum(len(node.gpus) for node in nodes) == 1:  # none to be connected with
        known |= {"accelerator_interconnect": NONE, "accelerator_interconnect_topology": NONE}
    return known


def _software(run: Run, official: Mapping[str, Any], nodes: Sequence[Node]) -> dict[str, str]:
    def stack(node: Node) -> str:
        own = node.environment
        drivers = {str(gpu.get("driver_version")) for gpu in node.gpus if gpu.get("driver_version")}
        changed = ", changed" if own.get("git_dirty") else ""
        commit = f" (commit {own['git_commit']}{changed})" if own.get("git_commit") else ""
        parts = [
            f"distbench {own.get('distbench_version')}{commit}",
            f"mlcommons-loadgen {official['loadgen']}",
            f"Python {own.get('python_version')}",
            f"NumPy {own.get('numpy_version')}",
        ]
        if node.gpus:
            named = {"CUDA": "torch_cuda_version", "cuDNN": "cudnn_version", "NCCL": "nccl_version"}
            parts += [f"{word} {own[key]}" for word, key in named.items() if own.get(key)]
            parts += [f"NVIDIA driver {version}" for version in sorted(drivers)]
        return ", ".join(parts)

    ranks = len(run.workers)
    return {
        "framework": _each(
            nodes,
            lambda node: f"PyTorch {version}" if (version := _plain("torch_version")(node)) else "",
        ),
        "other_software_stack": _each(nodes, stack),
        "sw_notes": f"{WORDING}: MLCommons' LoadGen drove {ranks} "
        f"{'rank' if ranks == 1 else 'ranks'} of distbench; nobody has reviewed this",
    }


def _network(run: Run, official: Mapping[str, Any], nodes: Sequence[Node]) -> dict[str, str]:
    driver = run.driver.before if run.driver is not None else {}
    return {
        "is_network": "true",
        "network_protocol": "TCP",
        "number_connections": str(driver.get("replicas") or ""),
        "net_software_stack_loadgen": "TCP of the Linux kernel; distbench "
        f"{driver.get('distbench')}, mlcommons-loadgen {official['loadgen']}, Python "
        f"{driver.get('python')}",
        "net_software_stack_sut": _each(
            nodes,
            lambda node: (
                f"TCP of Linux {node.environment.get('kernel')}; distbench "
                f"{node.environment.get('distbench_version')}"
            ),
        ),
    }


def weights_told(run: Run) -> dict[str, str]:
    """Return what a run tells of its weights, by ``WEIGHTS_FIELDS``; "" what it does not."""
    official, model = official_of(run) or {}, run.first.before["model"]
    bench, spec = benchmark(official["benchmark"]), str(official["model"])
    known = dict.fromkeys(WEIGHTS_FIELDS, "")
    if spec.partition(",")[0] != bench.model.partition(",")[0]:
        return known  # a model of the user's own
    if not bench.inputs:  # a stand-in
        return dict.fromkeys(WEIGHTS_FIELDS, NONE)
    digest, computed = str(model["digest"]), model.get("dtype") or "fp32"
    stored = "fp32" if computed == "tf32" else computed
    own = [pair[len("weights=") :] for pair in spec.split(",") if pair.startswith("weights=")]
    random = digest.startswith("random")
    named = Path(own[0]).name if own else bench.weights
    change = "none" if stored == "fp32" else f"rounded from fp32 to {stored}"
    return {
        "input_data_types": bench.inputs,
        # No reference has weights for what MLPerf does not have.
        "retraining": NONE if not official["listed"] else "no" if random else "",
        "starting_weights_filename": digest if random else ", ".join(filter(None, (named, digest))),
        "weight_data_types": stored,
        "weight_transformations": f"{change}; computed in TF32" if computed == "tf32" else change,
    }


def one_system(runs: Sequence[Run]) -> dict[str, str]:
    """Return what several runs tell of the one system that they ran on.

    Raises:
        UsageError: they ran on different ones; the sentence has both values.
    """
    seen: dict[str, tuple[str, str]] = {}
    for run in runs:
        own = {"its ranks on": places_of(run), **told(run)}
        for key in dict.fromkeys([*seen, *own]):
            value, run_id = own.get(key, ""), str(run.first.before["run_id"])
            if not value and key not in NETWORK_FIELDS:
                continue  # what is unknown of a run contradicts nothing
            first, before = seen.setdefault(key, (value, run_id))
            if value != first:
                raise UsageError(
                    f"{before} has {key} {first!r}, and {run_id} {value!r}: runs of one system are "
                    "of the same hosts, devices and software; give those of another in a tree of "
                    "their own --system"
                )
    return {key: value for key, (value, _) in seen.items() if key in (*FIELDS, *NETWORK_FIELDS)}


def read_description(path: str, network: bool) -> dict[str, str]:
    """Read what a person says of a system.

    Args:
        path: a JSON object of texts or whole numbers.
        network: whether the keys of the Network division are allowed.

    Raises:
        UsageError: a key is unknown (the nearest is named), or a value unusable.
    """
    given = files.read_json(Path(path))
    if not isinstance(given, dict):
        raise UsageError(f"{path} is no JSON object of keys and values (--describe)")
    names = [*FIELDS, *WEIGHTS_FIELDS, *(NETWORK_FIELDS if network else ())]
    for name, value in given.items():
        if name not in names:
            raise UsageError(
                f"{path} has {name!r}, which the checker does not know{nearest(name, names)} "
                "(--describe)"
            )
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise UsageError(f"{path}: {name} is neither a text nor a whole number (--describe)")
        if any(mark in str(value) for mark in '"\n\r'):
            raise UsageError(
                f"{path}: {name} has a quotation mark or a line break, which would break the "
                "checker's table (--describe)"
            )
        choices = CHOICES.get(name)
        if choices and value not in choices:
            raise UsageError(
                f"{path}: {name} is {value!r}, and the checker takes {', '.join(choices)} "
                "(--describe)"
            )
    return {name: str(value) for name, value in given.items()}


def merged(
    names: Sequence[str], known: Mapping[str, str], said: Mapping[str, str], path: str
) -> dict[str, str]:
    """Return a value for each key: what the runs tell, else what a person said, else "".

    Raises:
        UsageError: a person said otherwise than the runs tell.
    """
    found = {}
    for name in names:
        own, other = known.get(name, ""), said.get(name, "")
        if own and other and name == "sw_notes":
            found[name] = f"{own}. {other}"
            continue
        if own and other and own != other and name not in CHOSEN:
            raise UsageError(
                f"{path} has {name} {other!r}, and the runs tell {own!r}: leave it out, or say "
                "more in hw_notes or sw_notes (--describe)"
            )
        found[name] = other or own
    return found
