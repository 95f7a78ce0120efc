"""All that one GPU can show; ``gpu.sh`` calls this where torch sees one.

    python benchmarks/gpu.py
    python benchmarks/gpu.py --seconds 20 --json a30.json

1. The commands under torchrun, one rank, and ``verify`` on what each wrote: Offline over NCCL, with
   resnet50 in every dtype, Server with digits, resnet50 and tinylm, SingleStream; and some of them
   driven by LoadGen, where it is installed.
2. The tests in tests/gpu.
3. Time per batch on the host and on the device, for several widths and batch sizes of the digits
   network, in distbench's loop. Device time is that between two events around the computation, so
   device / host is the share of the time in which the device computes.
4. The same batches by distbench's loop and by two bare loops, in turn: a synchronous one as most
   people write it, and one that keeps two batches in flight, which is the best a bare loop can do.

What is measured in this process has the GPU locked; 1 and 2 come first, before this process has a
CUDA context that they would take for a stranger's. One JSON file holds everything. The exit status
is 1 where a command, a test or a comparison of outputs failed.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import torch
from common import ROOT, Report, Row, interleave, parser, ratios

from distbench.clock import now_ns
from distbench.engines.eager import GPU_DEPTH, EagerOnCpu, EagerOnGpu
from distbench.errors import UsageError
from distbench.gpus import Device, choose_device, lock_gpu
from distbench.models.digits_net import build_net, read_data
from distbench.nvml import nvml_snapshot
from distbench.offline import offline_loop
from distbench.prepare import ALL_COLUMNS, groups_of
from distbench.samples import PENDING, SampleLog
from distbench.start import quiet
from distbench.sut import FOREVER, Indices, collector

WIDTHS, BATCHES = (32, 128, 512), (1, 32, 512)
COMPARED = ((32, 32), (32, 512), (512, 32))
"""Width and batch size in the comparison of loops."""
BLOCK_NS, MOST_GROUPS = 50_000_000, 2000
DTYPES = ("fp32", "tf32", "bf16", "fp16")
SHOWN = {
    "throughput": (1.0, ""),
    "accuracy": (1.0, ""),
    "throughput.tokens": (1.0, ""),
    **{
        f"{name}.{quantile}": (1e6, "us")
        for name in ("batch_latency", "latency", "lateness", "device", "ttft", "tpot")
        for quantile in ("p50", "p99")
    },
}
"""Of each command's metrics: how its unit is scaled, and to what."""
TOLERANCE = 1e-3
"""Between a GPU and a CPU in float32, relative to the largest logit."""


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    """Run Python with the repository importable."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.run(
        [sys.executable, *argv],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=900,
        check=False,
    )


def tail(text: str) -> str:
    """Return the last lines of an output."""
    return "\n".join(text.strip().splitlines()[-15:])


# -- 1. the commands ----------------------------------------------------------------------------


def commands(seconds: float) -> list[tuple[str, str, list[str]]]:
    """Return the runs: a name, the scenario's module, its flags."""
    lasting = ["--duration", f"{seconds:g}s", "--device", "cuda", "--quiet"]
    resnet, tiny = ["--model", "resnet50", "--dtype"], ["--model", "tinylm"]
    at_500 = ["--target-qps", "500"]
    batched = [*resnet, "fp16", "--max-batch", "8", "--max-wait", "2ms"]
    made = [("Offline, digits, over NCCL", "offline", ["--backend", "nccl"])]
    for dtype in DTYPES:
        flags = [*resnet, dtype, "--batch-size", "64"]
        made.append((f"Offline, resnet50 {dtype}, batch size 64", "offline", flags))
    made += [
        ("Server, digits, 500 queries/s", "server", at_500),
        ("Server, resnet50 fp16, 500 queries/s", "server", [*at_500, *batched]),
        ("Server, tinylm, 10 queries/s", "server", ["--target-qps", "10", *tiny]),
        ("SingleStream, digits", "singlestream", []),
    ]
    runs = [(name, scenario, [*lasting, *flags]) for name, scenario, flags in made]
    return [*runs, *driven(seconds)]


def driven(seconds: float) -> list[tuple[str, str, list[str]]]:
    """Return the runs that LoadGen drives; none where it is not installed."""
    if not find_spec("mlperf_loadgen"):
        return []
    rules = ["--rules", f"mlperf-v5.0,shortened={seconds:g}s", "--device", "cuda", "--quiet"]
    resnet = ["--benchmark", "resnet50", "--dtype", "fp16", "--max-batch"]
    tiny = ["--benchmark", "tinylm", "--target-qps", "10"]
    made = [
        ("Offline, digits", "offline", []),
        ("Offline, resnet50 fp16, batch size 64", "offline", [*resnet, "64"]),
        ("Server, digits, 500 queries/s", "server", ["--target-qps", "500"]),
        (
            "Server, resnet50 fp16, 500 queries/s",
            "server",
            [*resnet, "8", "--max-wait", "2ms", "--target-qps", "500"],
        ),
        ("Server, tinylm, 10 queries/s", "server", tiny),
        ("SingleStream, resnet50 fp16", "singlestream", [*resnet, "1"]),
        ("MultiStream, resnet50 fp16", "multistream", [*resnet, "8"]),
        ("accuracy, digits", "offline", ["--mode", "accuracy"]),
    ]
    return [
        (f"LoadGen: {name}", "mlperf", [*rules, "--scenario", scenario, *flags])
        for name, scenario, flags in made
    ]


def command(report: Report, name: str, scenario: str, flags: list[str]) -> bool:
    """Run a scenario by torchrun and verify what it wrote; returns whether all went well."""
    with tempfile.TemporaryDirectory(prefix="distbench-gpu-") as folder:
        done = run(
            *("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
            *("-m", f"distbench.{scenario}", *flags, "--output-dir", folder),
        )
        found = list(Path(folder).iterdir())
        if done.returncode or len(found) != 1:
            report.say(f"{name} FAILED ({done.returncode}):\n{tail(done.stdout)}")
            return False
        result = json.loads((found[0] / "result.json").read_bytes())
        rank = json.loads((found[0] / "ranks/00000/rank.json").read_bytes())
        check = run("-m", "distbench.verify", str(found[0]))
    told = result["metrics"]
    rows = [
        Row(key, [told[key]["value"] * scale], unit or told[key]["unit"])
        for key, (scale, unit) in SHOWN.items()
        if key in told and told[key]["value"] is not None
    ]
    busy = result["per_rank"][0]["metrics"].get("device_busy")
    if busy is not None:
        rows.append(Row("device busy", [busy]))
    report.table(f"1. {name}, backend {rank['backend']}", rows)
    verdict = result["verdict"]
    codes = ", ".join(f"{each['level']} {each['code']}" for each in verdict["findings"]) or "none"
    report.say(f"measurement {verdict['status']}; findings: {codes}")
    report.say("verify: good" if check.returncode == 0 else f"verify FAILED:\n{tail(check.stdout)}")
    report.record["runs"][name] = result
    return check.returncode == 0 and ("nccl" not in flags or rank["backend"] == "nccl")


# -- 2. the tests --------------------------------------------------------------------------------


def tests(report: Report) -> bool:
    """Run tests/gpu; returns whether some ran and none failed."""
    with tempfile.TemporaryDirectory(prefix="distbench-gpu-") as folder:
        told = Path(folder) / "junit.xml"
        done = run(
            *("-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider", f"--junitxml={told}")
        )
        if not told.exists():
            report.say(f"2. tests/gpu FAILED to run:\n{tail(done.stdout)}")
            return False
        suites = list(ElementTree.parse(told).getroot().iter("testsuite"))
    counts = {
        name: sum(int(suite.get(name, 0)) for suite in suites)
        for name in ("tests", "failures", "errors", "skipped")
    }
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    good = done.returncode == 0 and passed > 0
    report.say(f"\n2. tests/gpu: {passed} passed of {counts['tests']}, {counts['skipped']} skipped")
    if not good:
        report.say(f"tests/gpu FAILED:\n{tail(done.stdout)}")
    report.record["tests"] = {**counts, "passed": passed}
    return good


# -- 3. and 4. loops in this process -------------------------------------------------------------


class Case:
    """One network and one batch size on the GPU, warm, with a block of batches to compute.

    Attributes:
        module: on the GPU.
        samples: on the host.
        batch: samples a group.
        gpu: the device.
        sut: distbench's engine over them.
        groups: of a block, for about ``BLOCK_NS``.
        order: the sample indices of a block.
        log: of a block.
    """

    def __init__(self, width: int, batch: int, gpu: torch.device) -> None:
        net, _ = build_net(width)
        self.module = net.to(gpu)
        self.samples = torch.from_numpy(read_data().images)
        self.batch, self.gpu = batch, gpu
        self.sut = EagerOnGpu(self.module, self.samples, batch, gpu)
        self.resize(20)
        self.offline()  # the first groups choose kernels
        took_ns = min(self.offline()[0] for _ in range(3))
        self.resize(min(max(int(BLOCK_NS / took_ns * self.groups), 20), MOST_GROUPS))

    def resize(self, groups: int) -> None:
        """Choose the length of a block."""
        self.groups = groups
        rows = groups * self.batch
        self.order: Indices = np.arange(rows, dtype=np.int64) % len(self.samples)
        self.log = SampleLog.in_memory(rows, ALL_COLUMNS)

    def offline(self) -> tuple[int, int]:
        """Run a block through distbench; returns ns on the host and ns on the device."""
        errors: list[str] = []
        groups = groups_of(self.order, self.batch)
        begin = now_ns()
        self.log.completed[:] = PENDING
        offline_loop(self.sut, self.log, groups, collector(self.log, {}, errors, now_ns), now_ns)
        took = now_ns() - begin
        if errors:
            raise SystemExit(f"distbench's loop failed: {errors[0]}")
        return took, int(self.log.device.sum())


def synchronous(case: Case) -> None:
    """Compute a block one batch after the other, waiting for each."""
    with torch.inference_mode():
        for _, indices in groups_of(case.order, case.batch):
            chosen = case.samples.index_select(0, torch.from_numpy(indices))
            case.module(chosen.to(case.gpu)).cpu().numpy()


class Pipelined:
    """A bare loop with two batches in flight, through pinned memory and two streams."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.copying, self.computing = (torch.cuda.Stream(case.gpu) for _ in range(2))
        shape = (case.batch, *case.samples.shape[1:])
        dtype = case.samples.dtype
        self.slots = [
            (
                torch.empty(shape, dtype=dtype, pin_memory=True),
                torch.empty(shape, dtype=dtype, device=case.gpu),
                torch.empty((case.batch, 10), pin_memory=True),
                torch.cuda.Event(),
                torch.cuda.Event(),
            )
            for _ in range(GPU_DEPTH)
        ]

    def __call__(self) -> None:
        """Compute a block."""
        turns = itertools.cycle(self.slots)
        flying: list[tuple[torch.Tensor, torch.cuda.Event]] = []
        with torch.inference_mode():
            for _, indices in groups_of(self.case.order, self.case.batch):
                if len(flying) == GPU_DEPTH:
                    self.collect(*flying.pop(0))
                pinned, on_device, out, copied, end = next(turns)
                torch.index_select(self.case.samples, 0, torch.from_numpy(indices), out=pinned)
                with torch.cuda.stream(self.copying):
                    on_device.copy_(pinned, non_blocking=True)
                    copied.record(self.copying)
                with torch.cuda.stream(self.computing):
                    self.computing.wait_event(copied)
                    out.copy_(self.case.module(on_device), non_blocking=True)
                    end.record(self.computing)
                flying.append((out, end))
            for each in flying:
                self.collect(*each)

    def collect(self, out: torch.Tensor, end: torch.cuda.Event) -> Any:
        """Wait for a batch and take its outputs."""
        end.synchronize()
        return np.array(out.numpy())


def sizes(report: Report, gpu: torch.device, rounds: int) -> None:
    """Measure host and device time per batch."""
    host, device, share = [], [], []
    for width, batch in itertools.product(WIDTHS, BATCHES):
        case = Case(width, batch, gpu)
        blocks = [case.offline() for _ in range(rounds)]
        name = f"width {width}, batch size {batch}"
        on_host = [took / 1e3 / case.groups for took, _ in blocks]
        on_device = [busy / 1e3 / case.groups for _, busy in blocks]
        host.append(Row(name, on_host, "us"))
        device.append(Row(name, on_device, "us"))
        share.append(Row(name, ratios(on_device, on_host)))
        case.sut.close()
    report.table("3. Host time per batch, two in flight", host)
    report.table("   Device time per batch", device)
    report.table("   Device / host", share)


def loops(report: Report, gpu: torch.device, rounds: int) -> None:
    """Compare distbench's loop with the bare ones."""
    rows = []
    for width, batch in COMPARED:
        case = Case(width, batch, gpu)
        pipelined = Pipelined(case)
        blocks: dict[str, Callable[[], Any]] = {
            "sync": lambda case=case: synchronous(case),
            "piped": pipelined,
            "ours": case.offline,
        }

        def timed(block: Callable[[], Any], groups: int = case.groups) -> Callable[[], float]:
            def measure() -> float:
                begin = now_ns()
                block()
                return (now_ns() - begin) / 1e3 / groups

            return measure

        cases = {name: timed(block) for name, block in blocks.items()}
        interleave(2, **cases)
        told = interleave(rounds, **cases)
        rows += [
            Row(f"width {width}, batch size {batch}: synchronous", told["sync"], "us"),
            Row("  pipelined", told["piped"], "us"),
            Row("  distbench", told["ours"], "us"),
            Row("  ratio distbench / synchronous", ratios(told["ours"], told["sync"])),
            Row("  ratio distbench / pipelined", ratios(told["ours"], told["piped"])),
        ]
        case.sut.close()
    report.table("4. Loops, per batch", rows)


def same_outputs(report: Report, gpu: torch.device) -> bool:
    """Compare the GPU's logits with the CPU's, over all samples; returns whether they agree."""
    case = Case(32, 512, gpu)
    reference = EagerOnCpu(build_net()[0], case.samples)
    worst = 0.0
    for _, indices in groups_of(np.arange(len(case.samples)), case.batch):
        outputs = []
        for sut in (case.sut, reference):
            sut.issue(0, indices)
            outputs.append(np.asarray(sut.poll(FOREVER)[0].outputs))
        scale = float(np.abs(outputs[1]).max())
        worst = max(worst, float(np.abs(outputs[0] - outputs[1]).max()) / scale)
    case.sut.close()
    good = worst <= TOLERANCE
    report.say(
        f"largest difference between the GPU's logits and the CPU's: {worst:.1e} of the largest "
        f"logit, over {len(case.samples)} samples (limit {TOLERANCE:g}: "
        f"{'held' if good else 'MISSED'})"
    )
    report.record["largest_difference"] = worst
    return good


def result_path(device: Device) -> Path:
    """Return a new file's path: the date, the GPU, and a number where there is one already."""
    name = re.sub(r"[^A-Za-z0-9]+", "-", device.name or torch.cuda.get_device_name(device.index))
    start = f"{datetime.now(timezone.utc):%Y-%m-%d}-{name.strip('-')}"
    folder = ROOT / "benchmarks" / "results"
    folder.mkdir(exist_ok=True)
    numbers = itertools.chain([""], (f"-{i}" for i in itertools.count(2)))
    return next(p for n in numbers if not (p := folder / f"{start}{n}.json").exists())


def main() -> int:
    """Measure, print and write; returns the exit status."""
    made = parser(__doc__)
    made.add_argument("--rounds", type=int, default=31, help="blocks of each kind (31)")
    made.add_argument("--seconds", type=float, default=5.0, help="of each command (5)")
    options = made.parse_args()
    try:
        device = choose_device("cuda", 0)
    except UsageError as error:
        raise SystemExit(str(error)) from error
    report = Report("gpu", vars(options))
    report.record["device"] = asdict(device)
    report.say(f"{device.name or 'a GPU that NVML does not name'}, torch {torch.__version__}")
    report.record["runs"] = {}
    good = [command(report, *each) for each in commands(options.seconds)]
    good.append(tests(report))
    gpu = torch.device("cuda", device.index)
    with lock_gpu(device.uuid), quiet():
        torch.cuda.set_device(gpu)
        before = nvml_snapshot(device.uuid)
        sizes(report, gpu, max(3, options.rounds // 6))
        loops(report, gpu, options.rounds)
        good.append(same_outputs(report, gpu))
        report.record["nvml"] = {"before": before, "after": nvml_snapshot(device.uuid)}
    report.record["environment"] |= {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpu": torch.cuda.get_device_name(gpu),
        "capability": list(torch.cuda.get_device_capability(gpu)),
    }
    report.record["good"] = all(good)
    path = Path(options.json) if options.json else result_path(device)
    report.end(str(path))
    print(f"results  {path}", flush=True)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
