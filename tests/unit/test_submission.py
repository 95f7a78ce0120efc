"""The submission tree: every file and key that MLPerf's checker of v5.0.1 reads, and refusals.

What the checker reads stands here literally, from its source (mlcommons/inference,
tools/submission/submission_checker.py), and not from the modules under test.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from distbench import submission_runs
from distbench.errors import DistbenchError, UsageError
from distbench.submission import main
from distbench.submission_runs import Audit, Scenario, take
from distbench.submission_tree import (
    Place,
    audit_files,
    folder_name,
    scenario_files,
    truncated,
    write_tree,
)
from distbench.system_description import one_system, told

from .submitted import GPU, stored
from .synthetic import make_run


def words(text: str) -> list[str]:
    return text.split()


SYSTEM_KEYS = words(
    """
division submitter status system_name number_of_nodes host_processor_model_name
host_processors_per_node host_processor_core_count host_memory_capacity host_storage_capacity
host_storage_type accelerators_per_node accelerator_model_name accelerator_memory_capacity framework
operating_system system_type other_software_stack host_processor_frequency host_processor_caches
host_memory_configuration host_processor_interconnect host_networking host_networking_topology
accelerator_frequency accelerator_host_interconnect accelerator_interconnect
accelerator_interconnect_topology accelerator_memory_configuration accelerator_on-chip_memories
cooling hw_notes sw_notes host_network_card_count system_type_detail
    """
)
NETWORK_KEYS = words(
    """
is_network network_type network_media network_rate nic_loadgen number_nic_loadgen
net_software_stack_loadgen network_protocol number_connections nic_sut number_nic_sut
net_software_stack_sut network_topology
    """
)
MEANINGFUL = words(
    """
division submitter system_type status system_name number_of_nodes host_processor_model_name
host_processors_per_node host_processor_core_count host_memory_capacity host_memory_configuration
host_storage_capacity host_storage_type host_networking host_network_card_count
host_networking_topology accelerators_per_node accelerator_model_name accelerator_memory_capacity
accelerator_host_interconnect accelerator_memory_configuration accelerator_interconnect cooling
framework operating_system other_software_stack
    """
)
MEASURED_KEYS = words(
    """
input_data_types retraining starting_weights_filename weight_data_types weight_transformations
    """
)
PERSON = {
    "status": "available",
    "host_storage_capacity": "4 TB",
    "host_storage_type": "NVMe SSD",
    "host_memory_configuration": "12x 128 GB DDR4",
    "host_networking": "10 Gb Ethernet",
    "host_networking_topology": "one switch",
    "host_network_card_count": 1,
    "cooling": "air",
    "hw_notes": "two of three nodes of a rack",
}
FULL = "mlperf-v5.0"
PLACE = Place("open", "acme", "a30x2", "distbench")


@pytest.fixture(autouse=True)
def unsynced(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of these files has to survive a power cut."""
    monkeypatch.setattr(os, "fsync", lambda _fd: None)


def submit(to: Path, *folders: Path, **options: str) -> None:
    given = {"submitter": "acme", "system": "a30x2", "to": str(to), **options}
    words = [word for name, text in given.items() for word in (f"--{name}", text)]
    assert main([*words, *map(str, folders)]) == 0


def described(tmp_path: Path, **more: Any) -> str:
    path = tmp_path / "describe.json"
    path.write_text(json.dumps(PERSON | more))
    return str(path)


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A performance and an accuracy run of both scenarios."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        f"{scenario}-{mode}": stored(folder / f"{scenario}-{mode}", scenario, mode)
        for scenario in ("offline", "server")
        for mode in ("performance", "accuracy")
    }


def test_every_file_and_every_key_of_a_tree(
    tmp_path: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    submit(tmp_path / "tree", *runs.values(), describe=described(tmp_path))
    root = tmp_path / "tree" / "open" / "acme"
    assert [path.name for path in (tmp_path / "tree").iterdir()] == ["open"]
    wanted = {"systems/a30x2.json", "code/digits/distbench/README.md"}
    for scenario in ("Offline", "Server"):
        results, measured = (
            f"{each}/a30x2/digits/{scenario}" for each in ("results", "measurements")
        )
        wanted |= {
            f"{results}/performance/run_1/mlperf_log_summary.txt",
            f"{results}/performance/run_1/mlperf_log_detail.txt",
            f"{results}/accuracy/mlperf_log_summary.txt",
            f"{results}/accuracy/mlperf_log_detail.txt",
            f"{results}/accuracy/mlperf_log_accuracy.json",
            f"{results}/accuracy/accuracy.txt",
            f"{measured}/user.conf",
            f"{measured}/README.md",
            f"{measured}/a30x2_distbench_{scenario}.json",
        }
    assert files_of(root) == wanted
    for scenario in ("offline", "server"):
        results = root / "results/a30x2/digits" / scenario.capitalize()
        measured = root / "measurements/a30x2/digits" / scenario.capitalize()
        for mode, part in (("performance", "performance/run_1"), ("accuracy", "accuracy")):
            for name in ("mlperf_log_summary.txt", "mlperf_log_detail.txt"):
                logged = runs[f"{scenario}-{mode}"] / "loadgen" / name
                assert (results / part / name).read_bytes() == logged.read_bytes()
        conf = runs[f"{scenario}-performance"] / "loadgen/user.conf"
        assert (measured / "user.conf").read_bytes() == conf.read_bytes()
        log = (runs[f"{scenario}-accuracy"] / "loadgen/mlperf_log_accuracy.json").read_bytes()
        short = (results / "accuracy/mlperf_log_accuracy.json").read_bytes()
        assert len(log) > 100_000 and len(short) == 4096 + len(b"\n\n...\n\n") + 4096 <= 10 * 1024
        assert short.startswith(log[:4096]) and short.endswith(log[-4096:])
        lines = (results / "accuracy/accuracy.txt").read_text().splitlines()
        score = re.match(r"^accuracy=([\d\.]+).*", lines[0])
        assert score is not None and float(score.group(1)) == 100.0
        hashes = [found for line in lines if (found := re.match(r"^hash=([\w\d]+)$", line))]
        assert [each.group(1) for each in hashes] == [hashlib.sha256(log).hexdigest()]
        readme = (measured / "README.md").read_text()
        for mode in ("performance", "accuracy"):
            assert f"-m distbench.mlperf --name {scenario}-{mode}\n" in readme
        assert f"SHA-256 {hashlib.sha256(log).hexdigest()}" in readme
        assert (
            '"Test duration less than 600s in user config. expected=600000, found=2000"' in readme
        )
        assert json.loads(
            (measured / f"a30x2_distbench_{scenario.capitalize()}.json").read_text()
        ) == {
            "input_data_types": "uint8",
            "retraining": "N/A",
            "starting_weights_filename": "distbench/models/digits_w32.npz, sha256:abcd",
            "weight_data_types": "fp32",
            "weight_transformations": "none",
        }
    system = json.loads((root / "systems/a30x2.json").read_text())
    assert len(SYSTEM_KEYS) == 35 and sorted(system) == sorted(SYSTEM_KEYS)
    assert all(isinstance(value, str) for value in system.values())
    assert [name for name in MEANINGFUL if not system[name]] == []
    assert (system["division"], system["submitter"]) == ("open", "acme")
    assert system["status"] in ("available", "preview", "rdi")
    assert system["system_type"] == "datacenter"
    for path in root.rglob("*"):
        assert " " not in path.name and not path.name.startswith(".")
        assert not path.is_dir() or list(path.iterdir())
        text = path.read_text() if path.suffix == ".md" else "MLPerf-style, unverified"
        assert "MLPerf-style, unverified" in text
    told_ = capsys.readouterr().out
    assert "20 files, MLPerf-style, unverified" in told_
    whole = (runs["server-accuracy"] / "loadgen/mlperf_log_accuracy.json").resolve()
    assert f"to be kept: {whole}" in told_
    assert "offline-performance  not VALID by the rules (it is a shortened run)" in told_


def test_what_only_a_person_knows_is_listed_and_never_invented(
    tmp_path: Path, runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    submit(tmp_path / "tree", runs["offline-performance"])
    system = json.loads((tmp_path / "tree/open/acme/systems/a30x2.json").read_text())
    lines = capsys.readouterr().out.splitlines()
    names = {name for name, value in system.items() if not value}
    assert names == {*PERSON, "host_processor_interconnect", "system_type_detail"}
    for name in names:
        more = "" if name in MEANINGFUL else " (may stay empty)"
        assert f"  {name}{more}" in lines
    empty = [name for name in SYSTEM_KEYS if name in names and name in MEANINGFUL]
    empty.remove("status")
    asked = f'"requires a meaningful response but is empty": {", ".join(empty)}'
    assert f"  systems/a30x2.json: {asked}" in lines
    assert '  systems/a30x2.json: "has invalid status ()", and looks no further' in lines
    assert '  digits/Offline: "has no accuracy.txt"' in lines


def test_a_system_with_accelerators(tmp_path: Path) -> None:
    run = take(stored(tmp_path / "r", gpus=1)).run
    known = told(run)
    assert {name: value for name, value in known.items() if name in SYSTEM_KEYS} == {
        "number_of_nodes": "2",
        "host_processor_model_name": "Xeon Gold 6248R",
        "host_processors_per_node": "2",
        "host_processor_core_count": "24",
        "host_processor_frequency": "4000 MHz at most",
        "host_processor_caches": "L1 Data 32K, L2 Unified 1024K",
        "host_memory_capacity": "1536 GiB",
        "accelerators_per_node": "1",
        "accelerator_model_name": "NVIDIA A30",
        "accelerator_memory_capacity": "24 GiB",
        "accelerator_frequency": "1440 MHz at most",
        "accelerator_host_interconnect": "PCIe Gen4 x16",
        "framework": "PyTorch 2.13.0+cu126",
        "operating_system": "Debian GNU/Linux 12, Linux 6.1.0",
        "other_software_stack": f"distbench 0.1.0 (commit {'ab' * 20}), mlcommons-loadgen 5.0.13, "
        "Python 3.11.9, NumPy 2.4.6, CUDA 12.6, cuDNN 91002, NCCL 2.27.5, NVIDIA driver 550.54.15",
        "sw_notes": "MLPerf-style, unverified: MLCommons' LoadGen drove 2 ranks of distbench; "
        "nobody has reviewed this",
    }


@pytest.mark.parametrize(
    ("change", "name", "value"),
    [
        ({"cpu_model": None}, "host_processor_model_name", ""),
        ({"cpu_sockets": None}, "host_processor_core_count", ""),
        ({"cpu_sockets": 5}, "host_processor_core_count", ""),
        ({"memory_total_bytes": None}, "host_memory_capacity", ""),
        ({"torch_version": None}, "framework", ""),
        ({"kernel": None}, "operating_system", ""),
        ({"git_dirty": True}, "other_software_stack", "ab, changed)"),
        ({"gpu": {**GPU, "uuid": "GPU-0"}}, "accelerators_per_node", "1"),
    ],
)
def test_what_is_unknown_stays_empty(
    tmp_path: Path, change: Mapping[str, Any], name: str, value: str
) -> None:
    known = told(take(stored(tmp_path / "r", environment=change)).run)
    assert known[name] == value if not value else value in known[name]


def test_an_unknown_value_contradicts_no_known_one(tmp_path: Path) -> None:
    folders = [
        stored(tmp_path / "a", environment={"cpu_sockets": None}), stored(tmp_path / "b", "server")
    ]  # fmt: skip
    assert one_system([take(each).run for each in folders])["host_processors_per_node"] == "2"


def test_the_keys_of_the_network_division(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = stored(tmp_path / "r", benchmark="resnet50", rules=FULL, gpus=1, asked={"network": True})
    for division, right in (("network", ""), ("closed", "give --division network or open")):
        if right:
            with pytest.raises(UsageError, match=right):
                submit(tmp_path / division, run, division=division)
        else:
            more = described(tmp_path, network_media="copper")
            submit(tmp_path / division, run, division=division, describe=more)
    system = json.loads((tmp_path / "network/network/acme/systems/a30x2.json").read_text())
    assert sorted(system) == sorted([*SYSTEM_KEYS, *NETWORK_KEYS])
    known = {name: value for name, value in system.items() if name in NETWORK_KEYS and value}
    assert known == {
        "is_network": "true",
        "network_media": "copper",
        "network_protocol": "TCP",
        "number_connections": "2",
        "net_software_stack_loadgen": "TCP of the Linux kernel; distbench 0.1.0, "
        "mlcommons-loadgen 5.0.13, Python 3.11.9",
        "net_software_stack_sut": "TCP of Linux 6.1.0; distbench 0.1.0",
    }
    out = capsys.readouterr().out
    assert "r  VALID by the rules; measurement VALID" in out
    assert "  nic_sut (may stay empty)" in out.splitlines()
    local = stored(tmp_path / "l", "server", benchmark="resnet50", rules=FULL, gpus=1)
    with pytest.raises(UsageError, match="give --division closed or open"):
        submit(tmp_path / "n", local, division="network")
    with pytest.raises(UsageError, match="r has is_network 'true', and l ''"):
        submit(tmp_path / "n", run, local)


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"statsu": "available"}, "has 'statsu', .* did you mean status?"),
        ({"network_media": "copper"}, "has 'network_media', which the checker does not know"),
        ({"status": "Available"}, "the checker takes available, preview, rdi"),
        ({"system_type": "cloud"}, "the checker takes datacenter, edge"),
        ({"cooling": 'by "air"'}, "cooling has a quotation mark"),
        ({"cooling": "air\nwater"}, "cooling has a quotation mark or a line break"),
        ({"cooling": True}, "cooling is neither a text nor a whole number"),
        ({"cooling": ["air"]}, "cooling is neither a text nor a whole number"),
        ({"framework": "TensorRT"}, "framework 'TensorRT', and the runs tell 'PyTorch 2.13.0"),
        ({"submitter": "other"}, "submitter 'other', and the runs tell 'acme'"),
        ({"retraining": "yes"}, "retraining 'yes', and the runs tell 'N/A'"),
    ],
)
def test_a_description_that_cannot_be_used(
    tmp_path: Path, runs: dict[str, Path], more: dict[str, Any], why: str
) -> None:
    with pytest.raises(UsageError, match=why):
        submit(tmp_path / "tree", runs["offline-performance"], describe=described(tmp_path, **more))
    assert not (tmp_path / "tree").exists()


def test_a_description_is_read(tmp_path: Path, runs: dict[str, Path]) -> None:
    more = {"system_name": "Two A30", "sw_notes": "no swap", "framework": "PyTorch 2.13.0+cu126"}
    submit(tmp_path / "t", runs["offline-performance"], describe=described(tmp_path, **more))
    system = json.loads((tmp_path / "t/open/acme/systems/a30x2.json").read_text())
    assert system["system_name"] == "Two A30" and system["host_network_card_count"] == "1"
    assert re.match(
        "MLPerf-style, unverified: .*; nobody has reviewed this. no swap", system["sw_notes"]
    )
    (tmp_path / "list.json").write_text("[]")
    with pytest.raises(UsageError, match="no JSON object"):
        submit(tmp_path / "t2", runs["offline-performance"], describe=str(tmp_path / "list.json"))


# Weights


@pytest.mark.parametrize(
    ("shape", "wanted"),
    [
        ({"model": {"dtype": "bf16"}}, ("bf16", "rounded from fp32 to bf16")),
        ({"model": {"dtype": "tf32"}}, ("fp32", "none; computed in TF32")),
        ({"asked": {"model": "mine:build"}}, ("", "")),
    ],
)
def test_weights(tmp_path: Path, shape: dict[str, Any], wanted: tuple[str, str]) -> None:
    submit(tmp_path / "t", stored(tmp_path / "r", **shape))
    (path,) = (tmp_path / "t").rglob("a30x2_distbench_Offline.json")
    measured = json.loads(path.read_text())
    assert sorted(measured) == sorted(MEASURED_KEYS)
    assert (measured["weight_data_types"], measured["weight_transformations"]) == wanted
    assert bool(measured["input_data_types"]) == bool(wanted[0])


@pytest.mark.parametrize(
    ("spec", "digest", "file", "retraining"),
    [
        ("resnet50,samples=1024", "random(seed=0)", "random(seed=0)", "no"),
        ("resnet50,weights=/w/r.pth,samples=1024", "sha256:12", "r.pth, sha256:12", ""),
    ],
)
def test_weights_of_a_model_of_the_list(
    tmp_path: Path, spec: str, digest: str, file: str, retraining: str
) -> None:
    made = stored(
        tmp_path / "r", benchmark="resnet50", asked={"model": spec}, model={"digest": digest}
    )
    submit(tmp_path / "t", made)
    (path,) = (tmp_path / "t").rglob("measurements/a30x2/resnet50/Offline/*.json")
    measured = json.loads(path.read_text())
    assert measured["starting_weights_filename"] == file
    assert measured["retraining"] == retraining and measured["input_data_types"] == "uint8"


# What the checker will say


@pytest.mark.parametrize(
    ("scenario", "shape", "said"),
    [
        ("offline", {"keys": {"result_validity": "INVALID"}}, '"has issues": LoadGen says INVALID'),
        ("offline", {"errors": ("it broke",)}, '"contains errors": 1, the first of them'),
        (
            "offline",
            {"keys": {"effective_samples_per_query": 24_575}},
            '"Required minimum samples per query not met by user config, Expected=24576, '
            'Found=24575"',
        ),
        (
            "offline",
            {"keys": {"effective_performance_sample_count": 1_023}},
            '"performance_sample_count, found 1023, needs to be >= 1024"',
        ),
        (
            "server",
            {"keys": {"effective_target_latency_ns": 15_000_001}},
            "15.000001 ms, and 15 ms is the limit",
        ),
        ("server", {"keys": {"early_stopping_met": False}}, '"Early stopping condition was not'),
        ("offline", {"rules": "mlperf-v5.1"}, '"qsl_rng_seed is wrong": these runs are of mlperf'),
        ("offline", {"keys": {"x": float("inf")}}, '"Encountered invalid line"'),
    ],
)  # fmt: skip
def test_what_the_checker_will_say(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    scenario: str,
    shape: dict[str, Any],
    said: str,
) -> None:
    good = {"benchmark": "resnet50", "rules": FULL, "gpus": 1}
    made = stored(tmp_path / "r", scenario, **{**good, **shape})
    if "x" in shape.get("keys", {}):  # as LoadGen writes it, which is no JSON
        log = made / "loadgen/mlperf_log_detail.txt"
        log.write_text(log.read_text().replace("Infinity", "inf"))
        taken = take_anew(made)
    else:
        taken = made
    submit(tmp_path / "t", taken)
    out = capsys.readouterr().out
    assert said in out
    assert "Test duration" not in out


def take_anew(folder: Path) -> Path:
    from distbench.record import write_report

    write_report(folder)
    return folder


def test_the_checker_has_nothing_to_say_of_a_good_run_but_what_is_not_there(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    both = [
        stored(tmp_path / scenario, scenario, benchmark="resnet50", rules=FULL)
        for scenario in ("offline", "server")
    ]
    submit(tmp_path / "t", *both, describe=described(tmp_path, retraining="no"), division="closed")
    out = capsys.readouterr().out
    said = out.partition("will say:\n")[2].splitlines()
    assert said == [
        f"  resnet50/{scenario}: {each}"
        for scenario in ("Offline", "Server")
        for each in (
            '"has no accuracy.txt"',
            '"no compliance dir", unless it is run with --skip_compliance',
        )
    ]
    submit(tmp_path / "u", both[0], division="closed")
    assert 'resnet50: "does not have all required scenarios, missing Server"' in (
        capsys.readouterr().out
    )


# Refusals


def refused(why: str, to: Path, *folders: Path, **options: str) -> None:
    with pytest.raises(UsageError, match=why):
        submit(to, *folders, **options)
    assert not to.exists()


def test_runs_that_make_no_tree(tmp_path: Path, runs: dict[str, Path]) -> None:
    to, first = tmp_path / "t", runs["offline-performance"]
    again = stored(tmp_path / "again")
    refused("offline-performance and again are both the performance run", to, first, again)
    other = stored(tmp_path / "v51", "server", rules="mlperf-v5.1")
    refused("is of mlperf-v5.0, and v51 of mlperf-v5.1", to, first, other)
    other = stored(tmp_path / "cpu", "server", environment={"cpu_model": "EPYC"})
    refused("host_processor_model_name 'Xeon Gold 6248R', and cpu 'EPYC'", to, first, other)
    other = stored(tmp_path / "gpus", "server", gpus=1)
    refused("ranks on 'node-0 cpu, node-1 cpu', and gpus 'node-0 GPU-0, node-1", to, first, other)
    other = stored(tmp_path / "w", "server", model={"digest": "sha256:ef"})
    refused("model's digest 'sha256:abcd', and w 'sha256:ef'", to, first, other)
    other = stored(tmp_path / "d", "offline", "accuracy", model={"dtype": "bf16"})
    refused("model's dtype 'fp32', and d 'bf16'", to, first, other)
    refused("is not VALID by the rules: it is a shortened run", to, first, division="closed")


def test_runs_that_cannot_be_shown(tmp_path: Path) -> None:
    to = tmp_path / "t"
    refused("was not driven by LoadGen", to, make_run(tmp_path / "offline"))
    (tmp_path / "empty").mkdir()
    refused("is no result directory", to, tmp_path / "empty")
    changed = stored(tmp_path / "changed")
    log = changed / "loadgen/mlperf_log_summary.txt"
    log.write_text(log.read_text() + "Result is : VALID\n")
    refused("changed does not verify: loadgen/mlperf_log_summary.txt", to, changed)
    torn = stored(tmp_path / "torn")
    log = torn / "loadgen/mlperf_log_detail.txt"
    log.write_text(log.read_text()[:-30])
    refused("LoadGen's logs do not tell all: .*cannot be read", to, take_anew(torn))
    lost = stored(tmp_path / "lost")
    (lost / "driver/after.json").unlink()
    refused("lost does not verify", to, lost)
    bare = stored(tmp_path / "bare")
    (bare / "loadgen/mlperf_log_summary.txt").unlink()
    refused("mlperf_log_summary.txt is not here", to, take_anew(bare))
    (tmp_path / "many/windows/000").mkdir(parents=True)
    refused("holds several windows", to, tmp_path / "many")
    own = stored(tmp_path / "own", mode="compliance", asked={"audit": "same-sample"})
    refused("is the audit same-sample, which is distbench's own", to, own)


def test_a_file_that_is_too_large(
    tmp_path: Path, runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(submission_runs, "SIZE_LIMIT_BYTES", 4 << 10)
    log = runs["offline-performance"] / "loadgen/mlperf_log_detail.txt"
    size = log.stat().st_size
    monkeypatch.setattr(submission_runs, "SIZE_LIMIT_BYTES", size)
    take(runs["offline-performance"])
    monkeypatch.setattr(submission_runs, "SIZE_LIMIT_BYTES", size - 1)
    with pytest.raises(UsageError, match=r"mlperf_log_detail\.txt has 0 MiB"):
        take(runs["offline-performance"])


def test_nothing_is_written_over(tmp_path: Path, runs: dict[str, Path]) -> None:
    to, first = tmp_path / "t", runs["offline-performance"]
    submit(to, first)
    before = {name: (to / name).read_bytes() for name in files_of(to)}
    with pytest.raises(UsageError, match=r"systems/a30x2\.json is there already"):
        submit(to, runs["server-performance"])
    submit(to, runs["server-performance"], system="other")  # of the same code
    assert {name: (to / name).read_bytes() for name in before} == before
    (to / "open/acme/code/digits/distbench/README.md").write_text("mine")
    with pytest.raises(UsageError, match="says otherwise: give another --implementation"):
        submit(to, first, system="third")
    submit(to, first, system="third", implementation="mine", division="open")
    assert (to / "open/acme/measurements/third/digits/Offline/third_mine_Offline.json").is_file()
    (to / "notes.txt").write_text("")
    with pytest.raises(UsageError, match=r"holds notes\.txt, which is no part of a"):
        submit(to, first, system="fourth")
    with pytest.raises(UsageError, match="is no folder"):
        submit(to / "notes.txt", first)


@pytest.mark.parametrize(
    "name", ["", "a b", ".a", "a/b", "..", "-a", "a" * 101, "x__pycache__", "a\n"]
)
def test_names_that_the_checker_does_not_take(name: str) -> None:
    with pytest.raises(UsageError, match="is no name of a folder"):
        folder_name(name)


def test_what_has_to_be_given(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="needed: --system, --to, RUN_DIR"):
        main(["--submitter", "acme"])
    assert folder_name("A30x2-pcie_1.0+") == "A30x2-pcie_1.0+"


def test_a_disk_that_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_path: Path, _data: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("distbench.files.write_bytes", full)
    with pytest.raises(DistbenchError, match="a/b cannot be written: No space left on device"):
        write_tree(tmp_path, {"a/b": b""})


@pytest.mark.parametrize(
    ("size", "length"), [(0, 0), (4096, 4096), (10 * 1024, 10 * 1024), (10 * 1024 + 1, 8199)]
)
def test_how_a_log_of_answers_is_cut(tmp_path: Path, size: int, length: int) -> None:
    log = bytes(k % 251 for k in range(size))
    (tmp_path / "log").write_bytes(log)
    cut = truncated(tmp_path / "log")
    assert len(cut) == length
    assert cut == log if length == size else cut == log[:4096] + b"\n\n...\n\n" + log[-4096:]


# Compliance


@pytest.mark.parametrize(
    ("test", "texts", "wanted"),
    [
        (
            "TEST01",
            {"verify_accuracy.txt": "TEST PASS\n", "verify_performance.txt": "TEST PASS\n"},
            {
                "verify_accuracy.txt", "verify_performance.txt",
                "accuracy/mlperf_log_accuracy.json", "accuracy/accuracy.txt",
            },
        ),
        (
            "TEST01",
            {
                "verify_accuracy.txt": "TEST FAIL\n", "verify_performance.txt": "TEST PASS\n",
                "baseline_accuracy.txt": "accuracy=1\n", "compliance_accuracy.txt": "accuracy=1\n",
            },
            {
                "verify_accuracy.txt", "verify_performance.txt",
                "accuracy/mlperf_log_accuracy.json", "accuracy/accuracy.txt",
                "accuracy/baseline_accuracy.txt", "accuracy/compliance_accuracy.txt",
            },
        ),
        ("TEST04", {"verify_performance.txt": "TEST PASS\n"}, {"verify_performance.txt"}),
        (
            "TEST06",
            {"verify_accuracy.txt": "TEST06 verification complete\n"},
            {"verify_accuracy.txt", "accuracy/mlperf_log_accuracy.json"},
        ),
    ],
)  # fmt: skip
def test_the_files_of_a_compliance_test(
    tmp_path: Path, test: str, texts: dict[str, str], wanted: set[str]
) -> None:
    run = take(stored(tmp_path / "r", mode="compliance", asked={"audit": test}))
    tree = audit_files("x", Audit(run, texts))
    logs = {f"performance/run_1/mlperf_log_{name}.txt" for name in ("summary", "detail")}
    assert set(tree) == {f"x/{name}" for name in wanted | logs}
    for name in logs:
        assert tree[f"x/{name}"] == (run.logs / Path(name).name).read_bytes()
    for name, text in texts.items():
        assert text.encode() in (tree.get(f"x/{name}"), tree.get(f"x/accuracy/{name}"))
    whole = (run.logs / "mlperf_log_accuracy.json").read_bytes()
    kept = tree.get("x/accuracy/mlperf_log_accuracy.json")
    assert {"TEST01": 8199, "TEST04": None, "TEST06": len(whole)}[test] == (
        None if kept is None else len(kept)
    )
    if test == "TEST01":
        hashed = f"hash={hashlib.sha256(whole).hexdigest()}\n"
        assert tree["x/accuracy/accuracy.txt"].decode() == hashed


SAME = {"effective_performance_issue_same": True, "effective_performance_issue_same_index": 3}


@pytest.mark.parametrize(("index", "word"), [(3, "TEST PASS"), (None, "TEST FAIL")])
def test_a_compliance_run_has_its_place_and_its_verification(
    tmp_path: Path,
    runs: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    index: int | None,
    word: str,
) -> None:
    """The second one is an ordinary run under the name of the test."""
    audit = stored(
        tmp_path / "audit", mode="compliance", asked={"audit": "TEST04"}, keys=SAME, index=index
    )
    submit(tmp_path / "t", runs["offline-performance"], audit)
    folder = tmp_path / "t/open/acme/compliance/a30x2/digits/Offline"
    assert files_of(folder) == {
        "TEST04/performance/run_1/mlperf_log_summary.txt",
        "TEST04/performance/run_1/mlperf_log_detail.txt",
        "TEST04/verify_performance.txt",
    }
    text = (folder / "TEST04/verify_performance.txt").read_text()
    assert "score: result_samples_per_second 1000, reference 1000" in text
    assert word in text
    out = capsys.readouterr().out
    assert "is missing" not in out and "TEST04  audit  " in out
    assert ("TEST04 did not pass" in out) == (word == "TEST FAIL")
    with pytest.raises(UsageError, match="needs the run in performance mode"):
        submit(tmp_path / "alone", audit)
    tree = scenario_files(
        PLACE,
        Scenario("digits", "Offline", audits={"TEST04": Audit(take(audit), {})}),
        {},
        [],
    )
    assert "open/acme/measurements/a30x2/digits/Offline/user.conf" in tree
