"""A digit classifier small enough to ship: trained at one size, random at every other.

    uint8 (n, 8, 8) -> /16 -> [3x3 conv, ReLU] x depth -> mean over pixels -> linear -> (n, 10)

The last convolution halves the image and doubles the channels; all others keep 8x8 pixels and
``width`` channels. Training puts a batch norm behind each convolution and folds it into weight and
bias at the end (``train_digits``), so an inference runs none. Width 32 and depth 3 carry trained
weights, 28,714 of them, which get all 360 held-out images right: 95 % interval 99.0 to 100 % (exact
binomial), where cross-validation of the recipe gave 99.2 %; ``train_digits`` tells how both came
about. Any other size is load to measure; it has no accuracy to state.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from distbench.errors import UsageError
from distbench.models.digits_data import (
    SHA256,
    WEIGHTS_FILE,
    DigitsData,
    read_data,
    read_pinned,
)

__all__ = ["SHA256", "DigitsData", "DigitsNet", "build_net", "random_net", "read_data"]

TRAINED_WIDTH = 32
TRAINED_DEPTH = 3
WIDTH_LIMITS = (1, 1024)
DEPTH_LIMITS = (3, 32)
CLASSES = 10
INK_MAX = 16


class DigitsNet(nn.Module):
    """The network, with whatever weights torch gives a new module; see ``build_net``.

    Args:
        width: channels of every convolution but the last, which has twice as many.
        depth: number of convolutions.

    Raises:
        UsageError: ``width`` or ``depth`` is outside its limits.
    """

    def __init__(self, width: int = TRAINED_WIDTH, depth: int = TRAINED_DEPTH) -> None:
        super().__init__()
        _check("width", width, WIDTH_LIMITS)
        _check("depth", depth, DEPTH_LIMITS)
        layers: list[nn.Module] = [nn.Conv2d(1, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        layers += [nn.Conv2d(width, 2 * width, 3, stride=2, padding=1), nn.ReLU()]
        self.layers = nn.Sequential(*layers)
        self.head = nn.Linear(2 * width, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Score each image against each digit.

        The images cross to the model's device as bytes; they become numbers of the parameters'
        dtype, 0 to 1, over there.

        Args:
            images: shape (n, 8, 8), uint8, 0 to 16, on any device.

        Returns:
            Logits, shape (n, 10), float32 whatever the parameters are, on the model's device.
        """
        weight = self.head.weight
        pixels = images.to(weight.device).to(weight.dtype).unsqueeze(1) / INK_MAX
        logits: Tensor = self.head(self.layers(pixels).mean(dim=(2, 3)))
        return logits.float()


def build_net(
    width: int = TRAINED_WIDTH,
    depth: int = TRAINED_DEPTH,
    seed: int = 0,
    folder: Path | None = None,
) -> tuple[DigitsNet, str]:
    """Build the network for inference and say where its weights come from.

    Args:
        width: channels, 1 to 1024.
        depth: convolutions, 3 to 32.
        seed: of the random weights; the trained ones (width 32, depth 3) do not depend on it.
        folder: where the file of trained weights lies; None is the installed package.

    Returns:
        The network, on the CPU, float32, in eval mode; and its provenance, ``"sha256:<hex>"`` of
        the file of trained weights or ``"random(seed=<seed>)"``.

    Raises:
        UsageError: ``width`` or ``depth`` is outside its limits, or the file of trained weights is
            missing, unreadable or not the pinned one.
    """
    if (width, depth) != (TRAINED_WIDTH, TRAINED_DEPTH):
        return random_net(width, depth, seed).eval(), f"random(seed={seed})"
    arrays = read_pinned(WEIGHTS_FILE, folder)
    net = _empty_net(width, depth)
    net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return net.eval(), f"sha256:{SHA256[WEIGHTS_FILE]}"


def random_net(width: int, depth: int, seed: int) -> DigitsNet:
    """Build the network with seeded random weights; torch's global generators stay as they are.

    Each weight is normal with variance 2 / fan-in, which keeps the size of the activations through
    any number of ReLU layers, so that deep variants stay finite in half precision. Biases are 0.

    Args:
        width: channels, 1 to 1024.
        depth: convolutions, 3 to 32.
        seed: of the weights.

    Returns:
        The network, on the CPU, float32, in train mode.

    Raises:
        UsageError: ``width`` or ``depth`` is outside its limits.
    """
    net = _empty_net(width, depth)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.zero_()
            else:
                fan_in = parameter[0].numel()
                parameter.normal_(0.0, math.sqrt(2 / fan_in), generator=generator)
    return net


def _empty_net(width: int, depth: int) -> DigitsNet:
    # A module made on "meta" draws no random numbers; its memory is then left for the caller.
    with torch.device("meta"):
        net = DigitsNet(width, depth)
    return net.to_empty(device="cpu")


def _check(name: str, value: int, limits: tuple[int, int]) -> None:
    low, high = limits
    if not low <= value <= high:
        raise UsageError(f"{name} {value} of the digits model is not between {low} and {high}")
