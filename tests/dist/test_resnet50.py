"""ResNet-50: its names and shapes, its arithmetic by another route, weights, dtypes, both engines."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distbench import models
from distbench.engines import eager as engines
from distbench.engines.eager import EagerOnCpu, EagerOnGpu
from distbench.environment import describe
from distbench.errors import UsageError
from distbench.finish import alike
from distbench.gpus import Device
from distbench.models import precision, resnet50
from distbench.models.digits import build as build_digits
from distbench.models.resnet50 import build, load_net
from distbench.models.resnet50_net import MEAN, STD, Bottleneck, ResNet50, empty_net, fill_randomly
from distbench.sut import FOREVER, Echo
from tests.dist.test_eager import FakeCuda
from tests.support import run_ranks

CPU = torch.device("cpu")
CPU_DEVICE = Device("cpu", 0, "", "", "", "")
GPU_DEVICE = Device("cuda", 0, "GPU-1", "NVIDIA A30", "", "")
SMALL = 64  # pixels a side: 8 % of the work of 224


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    """Leave torch's switches as they were."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before


@pytest.fixture(scope="module")
def net() -> ResNet50:
    return load_net(CPU)[0]


def _images(count: int, size: int = SMALL) -> Tensor:
    noise = np.random.default_rng(5).integers(0, 256, (count, 3, size, size), dtype=np.uint8)
    return torch.from_numpy(noise)


def _logits(net: ResNet50, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return net(images)


# Names and shapes


def _by_rule() -> dict[str, tuple[int, ...]]:
    """Return names and shapes from the architecture: bottlenecks 3, 4, 6, 3, widths 64 to 512."""

    def conv(name: str, out: int, into: int, size: int) -> None:
        wanted[f"{name}.weight"] = (out, into, size, size)

    def norm(name: str, channels: int) -> None:
        for part in ("weight", "bias", "running_mean", "running_var"):
            wanted[f"{name}.{part}"] = (channels,)
        wanted[f"{name}.num_batches_tracked"] = ()

    wanted: dict[str, tuple[int, ...]] = {}
    conv("conv1", 64, 3, 7)
    norm("bn1", 64)
    into = 64
    for stage, count in zip((1, 2, 3, 4), (3, 4, 6, 3), strict=True):
        width = 32 * 2**stage
        for i in range(count):
            name = f"layer{stage}.{i}"
            for k, (a, b, size) in enumerate(
                [(width, into, 1), (width, width, 3), (4 * width, width, 1)], 1
            ):
                conv(f"{name}.conv{k}", a, b, size)
                norm(f"{name}.bn{k}", a)
            if i == 0:
                conv(f"{name}.downsample.0", 4 * width, into, 1)
                norm(f"{name}.downsample.1", 4 * width)
            into = 4 * width
    wanted["fc.weight"], wanted["fc.bias"] = (1000, 2048), (1000,)
    return wanted


def test_names_shapes_and_their_order_are_torchvisions(net: ResNet50) -> None:
    found = {name: tuple(value.shape) for name, value in net.state_dict().items()}
    assert list(found.items()) == list(_by_rule().items())
    assert len(found) == 320
    assert sum(each.numel() for each in net.parameters()) == 25_557_032


def test_the_3x3_convolution_halves_the_image() -> None:
    strides = {
        name: layer.stride[0]
        for name, layer in empty_net(torch.device("meta")).named_modules()
        if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1)
    }
    assert strides == {
        "conv1": 2,
        **{f"layer{stage}.0.{name}": 2 for stage in (2, 3, 4) for name in ("conv2", "downsample.0")},
    }


def test_sizes_through_the_stages() -> None:
    net = empty_net(torch.device("meta"))
    seen: dict[str, tuple[int, ...]] = {}
    for name in ("conv1", "maxpool", "layer1", "layer2", "layer3", "layer4"):
        net.get_submodule(name).register_forward_hook(
            lambda _m, _i, out, name=name: seen.update({name: tuple(out.shape)})
        )
    assert net(torch.empty(2, 3, 224, 224, dtype=torch.uint8)).shape == (2, 1000)
    assert seen == {
        "conv1": (2, 64, 112, 112),
        "maxpool": (2, 64, 56, 56),
        "layer1": (2, 256, 56, 56),
        "layer2": (2, 512, 28, 28),
        "layer3": (2, 1024, 14, 14),
        "layer4": (2, 2048, 7, 7),
    }


# Arithmetic


def _normed(x: Tensor, layer: Any) -> Tensor:
    """Batch norm in eval mode by its formula."""
    mean, variance, weight, bias = (
        each[:, None, None]
        for each in (layer.running_mean, layer.running_var, layer.weight, layer.bias)
    )
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight + bias


def _convolved(x: Tensor, weight: Tensor, stride: int = 1, padding: int = 0) -> Tensor:
    """Convolve as one product of matrices over unfolded patches."""
    n, size = len(x), weight.shape[-1]
    out = (x.shape[-1] + 2 * padding - size) // stride + 1
    patches = F.unfold(x, size, stride=stride, padding=padding)
    return (weight.flatten(1) @ patches).reshape(n, len(weight), out, out)


@pytest.mark.parametrize(("channels", "stride"), [(16, 1), (16, 2), (8, 1)])
def test_a_bottleneck_by_its_formula(channels: int, stride: int) -> None:
    torch.manual_seed(3)
    block = Bottleneck(channels, 4, stride).double().eval()
    for name, value in block.state_dict().items():
        if value.is_floating_point():
            value.uniform_(0.5, 1.5) if name.endswith("running_var") else value.normal_()
    x = torch.randn(2, channels, 6, 6, dtype=torch.float64)
    before = x.clone()
    y = _normed(_convolved(x, block.conv1.weight), block.bn1).clamp(min=0)
    y = _normed(_convolved(y, block.conv2.weight, stride, padding=1), block.bn2).clamp(min=0)
    y = _normed(_convolved(y, block.conv3.weight), block.bn3)
    shortcut = x
    if (channels, stride) != (16, 1):
        first, second = block.downsample
        shortcut = _normed(_convolved(x, first.weight, stride), second)
    with torch.inference_mode():
        torch.testing.assert_close(block(x), (y + shortcut).clamp(min=0), rtol=1e-12, atol=1e-12)
    assert torch.equal(x, before), "the shortcut's input must not be written to"


def test_pixels_are_normalised_on_the_way_in(net: ResNet50) -> None:
    seen: list[Tensor] = []
    handle = net.conv1.register_forward_pre_hook(lambda _m, inputs: seen.append(inputs[0].clone()))
    images = _images(2, 32)
    before = images.clone()
    _logits(net, images)
    handle.remove()
    wanted = (images.double() / 255 - torch.tensor(MEAN, dtype=torch.float64)[:, None, None]) / (
        torch.tensor(STD, dtype=torch.float64)[:, None, None]
    )
    torch.testing.assert_close(seen[0].double(), wanted, rtol=1e-5, atol=1e-5)
    assert torch.equal(images, before)


def test_constants_are_no_part_of_the_weights_but_follow_them() -> None:
    net = empty_net(CPU).half()
    assert {net.mean.dtype, net.scale.dtype} == {torch.float16}
    assert "mean" not in net.state_dict()
    torch.testing.assert_close(net.mean.flatten(), torch.tensor([123.7, 116.3, 103.5]).half())


# Random weights


def test_random_weights_follow_their_seed_and_leave_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    (first, said), (second, _), (other, _) = (load_net(CPU, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), before)
    assert said == "random(seed=3)"
    assert not first.training
    pairs = zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not torch.equal(first.fc.weight, other.fc.weight)
    assert not torch.equal(first.conv1.weight, other.conv1.weight)


def test_random_weights_are_drawn_as_stated(net: ResNet50) -> None:
    for name, value in net.state_dict().items():
        if value.dim() > 1:
            # A standard deviation of n normal numbers scatters by 1 / sqrt(2 n) of itself.
            ratio = value.std().item() / (2 / value[0].numel()) ** 0.5
            assert abs(ratio - 1) < 5 / (2 * value.numel()) ** 0.5, name
        elif name.endswith((".weight", ".running_var")):
            assert (value == (0.25 if name.endswith("bn3.weight") else 1)).all(), name
        else:
            assert (value == 0).all(), name


def test_activations_stay_of_one_order() -> None:
    net, _ = load_net(CPU)
    seen: list[float] = []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        for block in stage:
            block.register_forward_hook(lambda _m, _i, out: seen.append(float(out.std())))
    _logits(net, _images(2))
    assert len(seen) == 16
    assert 0.1 < min(seen) and max(seen) < 20


def test_nothing_is_made_on_the_cpu_for_another_device() -> None:
    net = empty_net(torch.device("meta"))
    assert {each.device.type for each in (*net.parameters(), *net.buffers())} == {"meta"}


# Weights from a file


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "resnet50.pth"
    net = empty_net(CPU)
    fill_randomly(net, seed=9)
    torch.save(net.half().state_dict(), path)
    return path


def test_a_file_gives_its_weights_and_digest(file: Path) -> None:
    net, digest = load_net(CPU, str(file))
    assert digest == f"sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert not net.training
    wanted = torch.load(file, weights_only=True)
    assert all(torch.equal(v.to(wanted[k].dtype), wanted[k]) for k, v in net.state_dict().items())
    assert net.fc.weight.dtype == torch.float32
    assert torch.isfinite(_logits(net, _images(1))).all()


def test_a_file_of_another_network_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "resnet50.pth"
    wanted = {name: torch.empty(shape) for name, shape in _by_rule().items() if len(shape) == 1}
    wanted["fc.weight"] = torch.ones(10, 2048)
    wanted["classifier.weight"] = torch.ones(2)
    torch.save(wanted, path)
    with pytest.raises(UsageError) as caught:
        load_net(CPU, str(path))
    assert str(caught.value) == (
        f"weights {path} are not those of this model (320 tensors): missing: conv1.weight, "
        "layer1.0.conv1.weight, layer1.0.conv2.weight and 50 more; not known: classifier.weight; "
        "unlike: fc.weight (10, 2048) where (1000, 2048) is needed"
    )


# The system under test


def test_images_are_bytes_alike_in_every_build() -> None:
    first, second = (build(CPU_DEVICE, 1, samples=3) for _ in range(2))
    assert isinstance(first, EagerOnCpu)
    assert (first.total, first.resident) == (3, 3)
    assert first.samples.shape == (3, 3, 224, 224)
    assert first.samples.dtype == torch.uint8
    assert torch.equal(first.samples, second.samples)
    assert len(np.unique(first.samples)) == 256
    assert resnet50.SAMPLES * first.samples[0].numel() == 38_535_168


def test_more_images_than_memory_are_refused() -> None:
    with pytest.raises(UsageError, match=r"samples: 10000000000 images take 1505280.0 GB, and this"):
        build(CPU_DEVICE, 1, samples=10**10)


def test_what_the_system_under_test_states() -> None:
    sut: Any = build(CPU_DEVICE, 1, samples=1)
    assert (sut.digest, sut.dtype) == ("random(seed=0)", "fp32")
    assert sut.flops_per_sample == _operations() == 8_178_368_512
    assert not hasattr(sut, "score"), "noise has no right answer"


def _operations() -> int:
    """Count two operations for each weight that an output is made of."""
    net, counted = empty_net(torch.device("meta")), []
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(
                lambda m, _i, out: counted.append(2 * out.numel() * m.weight[0].numel())
            )
    net(torch.empty(1, 3, 224, 224, dtype=torch.uint8))
    return sum(counted)


@pytest.mark.parametrize(
    ("layout", "wanted"),
    [("channels_last", torch.channels_last), ("contiguous", torch.contiguous_format)],
)
def test_every_convolution_sees_the_layout_that_was_asked_for(layout: str, wanted: Any) -> None:
    sut = build(CPU_DEVICE, 1, samples=1, layout=layout)
    seen: list[bool] = []
    for layer in sut.module.modules():
        if isinstance(layer, nn.Conv2d):
            assert layer.weight.is_contiguous(memory_format=wanted)
            layer.register_forward_hook(
                lambda _m, inputs, out: seen.extend(
                    each.is_contiguous(memory_format=wanted) for each in (inputs[0], out)
                )
            )
    _logits(sut.module, _images(1))
    assert seen == [True] * (2 * 53)


def test_the_layout_changes_rounding_alone() -> None:
    one, other = (
        build(CPU_DEVICE, 1, samples=1, layout=layout) for layout in ("channels_last", "contiguous")
    )
    a, b = (_logits(each.module, _images(1)) for each in (one, other))
    assert alike(a, b)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_half_precision_gives_float32_logits_near_those_of_fp32(
    net: ResNet50, dtype: str, stored: torch.dtype
) -> None:
    images = _images(2)
    truth = _logits(net, images)
    half: Any = build(CPU_DEVICE, 2, samples=1, dtype=dtype)
    assert {each.dtype for each in half.module.parameters()} == {stored}
    assert half.dtype == dtype
    found = _logits(half.module, images)
    assert found.dtype == torch.float32
    assert float((found - truth).abs().max() / truth.abs().max()) <= 2e-2


def test_the_gpu_engine_in_fp16_through_a_fake() -> None:
    fake = FakeCuda()
    net = load_net(CPU)[0].half().to(memory_format=torch.channels_last)
    images = _images(4, 32)
    sut = EagerOnGpu(net, images, 3, CPU, cuda=fake, pin=False)
    slot = sut._free[0]
    assert slot.pinned_in.dtype == slot.device_in.dtype == torch.uint8
    assert (slot.pinned_out.shape, slot.pinned_out.dtype) == ((3, 1000), torch.float32)
    sut.issue(0, np.array([3, 1, 0]))
    sut.issue(3, np.array([2]))
    done = [*sut.poll(FOREVER), *sut.poll(FOREVER)]
    assert [each.row for each in done] == [0, 3]
    found = np.concatenate([each.outputs for each in done])
    assert found.dtype == np.float32
    truth = _logits(net, images[[3, 1, 0, 2]]).numpy()
    assert np.abs(found - truth).max() <= 2e-2 * np.abs(truth).max()


def test_the_engine_is_that_of_the_weights_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(engines, "EagerOnGpu", lambda *args, **more: made.append((args, more)))
    gpu = torch.device("cuda", 3)
    module = SimpleNamespace(parameters=lambda: iter([SimpleNamespace(device=gpu)]))
    engines.eager(module, "samples", 8, "now")  # type: ignore[arg-type]
    assert made == [((module, "samples", 8, gpu), {"now": "now"})]
    assert isinstance(engines.eager(nn.Linear(1, 1), _images(1), 8), EagerOnCpu)


# Dtypes


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_tf32_is_off_unless_asked_for(dtype: str) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        precision.set_precision(dtype, CPU_DEVICE)
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cudnn.allow_tf32


def test_tf32_switches_on_both_and_the_record_can_read_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    assert precision.set_precision("tf32", GPU_DEVICE) == torch.float32
    found = describe(CPU_DEVICE)
    assert found["cuda_matmul_allow_tf32"] is found["cudnn_allow_tf32"] is True
    assert found["cuda_matmul_fp32_precision"] == found["cudnn_conv_fp32_precision"] == "tf32"
    assert not [name for name in found["reasons"] if "tf32" in name or "precision" in name]


def test_tf32_is_refused_where_nothing_computes_in_it(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"tf32 is a mode of NVIDIA GPUs, .*: give fp32"):
        build(CPU_DEVICE, 1, dtype="tf32")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (7, 5))
    with pytest.raises(UsageError, match="NVIDIA A30 has no TF32; give fp32 or fp16"):
        precision.set_precision("tf32", GPU_DEVICE)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (8, 0))
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    with pytest.raises(UsageError, match="NVIDIA_TF32_OVERRIDE=0 keeps .* from it; unset it"):
        precision.set_precision("tf32", GPU_DEVICE)


class Lacking(nn.Module):
    """Has no kernel, as torch says it."""

    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError("\"conv\" not implemented for 'Half'\nand more")


def test_a_kernel_that_torch_lacks_is_a_sentence() -> None:
    with pytest.raises(UsageError) as caught:
        precision.count_flops(Lacking(), torch.ones(1), "fp16")
    assert str(caught.value) == (
        f"torch {torch.__version__} cannot compute this model in fp16 on this device "
        "(\"conv\" not implemented for 'Half'); give another --dtype or --device"
    )


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_digits_takes_a_dtype_and_keeps_its_accuracy(dtype: str) -> None:
    sut: Any = build_digits(CPU_DEVICE, 360, dtype=dtype)
    sut.issue(0, sut.held_out)
    (done,) = sut.poll(FOREVER)
    right, of = sut.score(sut.held_out, done.outputs)
    assert (sut.dtype, of) == (dtype, 360)
    assert done.outputs.dtype == np.float32
    assert right >= 357


@pytest.mark.parametrize(("asked", "built"), [("", "fp32"), ("bf16", "bf16")])
@pytest.mark.parametrize("spec", ["digits", "resnet50,samples=1"])
def test_the_commands_dtype_reaches_the_model(spec: str, asked: str, built: str) -> None:
    world: Any = SimpleNamespace(device=CPU_DEVICE, now=lambda: 0)
    sut: Any = models.load_model(spec, world, 1, asked)
    assert sut.dtype == built
    assert sut.now is world.now


def _disagree() -> str:
    from distbench.offline import run_offline
    from distbench.world import join

    with join(device="cpu", timeout_s=30) as world:
        sut: Any = Echo()
        sut.dtype = "fp16" if world.rank else "fp32"
        try:
            run_offline(sut, world, num_samples=64)
        except UsageError as error:
            return str(error)
    return "nothing was said"


def test_ranks_that_compute_in_different_dtypes_are_refused() -> None:
    for said in run_ranks(_disagree, 2):
        assert "the ranks differ in what the model computes in (model)" in said
        assert '"fp32" on rank 0' in said and '"fp16" on rank 1' in said
