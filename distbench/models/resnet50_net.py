"""ResNet-50 v1.5: 25,557,032 parameters, 1,000 classes, by the names that torchvision gives them.

    uint8 (n, 3, h, w) -> normalised -> 7x7 conv /2, 3x3 max pool /2
        -> 3, 4, 6, 3 bottlenecks of width 64, 128, 256, 512, all stages but the first /2
        -> mean over pixels -> linear -> (n, 1000)

A bottleneck is 1x1, 3x3, 1x1 convolutions, the last four times as wide, beside a shortcut. In v1.5
the 3x3 convolution halves the image, in v1 (He et al., arXiv 1512.03385) the first 1x1 did, which
takes 6 % fewer operations. MLPerf and torchvision mean v1.5.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

EXPANSION = 4
CLASSES = 1000
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)
"""Of ImageNet's training images by colour, 0 to 1: what torchvision's weights were trained with."""
BRANCH_SCALE = 0.25
"""Of a random bottleneck's last batch norm. 16 branches of full scale would double the variance at
every shortcut; with this the activations stay of one order, and fp16 stays finite."""


class Bottleneck(nn.Module):
    """Three convolutions beside a shortcut.

    Args:
        channels: of the input.
        width: of the 3x3 convolution; the output has four times as many channels.
        stride: of the 3x3 convolution.
    """

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        out = EXPANSION * width
        self.conv1 = nn.Conv2d(channels, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, out, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out)
        self.relu = nn.ReLU(inplace=True)
        self.downsample: nn.Module = nn.Identity()
        if stride != 1 or channels != out:
            self.downsample = nn.Sequential(
                nn.Conv2d(channels, out, 1, stride=stride, bias=False), nn.BatchNorm2d(out)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Compute shape (n, 4 width, h / stride, w / stride) from (n, channels, h, w)."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        return self.relu(y.add_(self.downsample(x)))  # type: ignore[no-any-return]


class ResNet50(nn.Module):
    """The network, with whatever weights torch gives a new module; see ``empty_net``."""

    mean: Tensor
    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.layer1 = _stage(64, width=64, blocks=3, stride=1)
        self.layer2 = _stage(256, width=128, blocks=4, stride=2)
        self.layer3 = _stage(512, width=256, blocks=6, stride=2)
        self.layer4 = _stage(1024, width=512, blocks=3, stride=2)
        self.fc = nn.Linear(2048, CLASSES)
        self.register_buffer("mean", torch.empty(3, 1, 1), persistent=False)
        self.register_buffer("scale", torch.empty(3, 1, 1), persistent=False)
        self.set_constants()

    def set_constants(self) -> None:
        """Fill in what the pixels are normalised by, which no file of weights holds."""
        self.mean.copy_(torch.tensor([255 * mean for mean in MEAN]).reshape(3, 1, 1))
        self.scale.copy_(torch.tensor([1 / (255 * std) for std in STD]).reshape(3, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        """Score each image against each class.

        The images cross to the model's device as bytes; over there they become numbers of the
        parameters' dtype, in the parameters' memory format.

        Args:
            images: shape (n, 3, h, w), uint8, RGB, on any device; 224 x 224 is what it is for.

        Returns:
            Logits, shape (n, 1000), float32 whatever the parameters are, on the model's device.
        """
        weight = self.conv1.weight
        last = weight.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if last else torch.contiguous_format
        x = images.to(weight.device).to(weight.dtype, memory_format=layout)
        x = x.sub_(self.mean).mul_(self.scale)
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits.float()


def _stage(channels: int, width: int, blocks: int, stride: int) -> nn.Sequential:
    """Return bottlenecks, the first of which halves the image where the stride is 2."""
    rest = [Bottleneck(EXPANSION * width, width, 1) for _ in range(blocks - 1)]
    return nn.Sequential(Bottleneck(channels, width, stride), *rest)


def empty_net(device: torch.device) -> ResNet50:
    """Build the network in eval mode; its weights are whatever the device's memory held.

    Args:
        device: where its memory is taken; nothing crosses to it.
    """
    with torch.device("meta"):
        net = ResNet50()
    net = net.to_empty(device=device)
    net.set_constants()
    return net.eval()


def fill_randomly(net: ResNet50, seed: int) -> None:
    """Give the network seeded random weights, made on its own device.

    Convolutions and the last layer are normal with variance 2 / fan-in, biases 0, batch norms leave
    what comes in as it is, but for the last one of each bottleneck (``BRANCH_SCALE``).

    Args:
        net: its memory may hold anything.
        seed: of the weights. Equal seeds give equal weights on devices of one kind only, since each
            kind has a generator of its own.
    """
    generator = torch.Generator(net.fc.weight.device).manual_seed(seed)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.dim() > 1:
                value.normal_(0.0, math.sqrt(2 / value[0].numel()), generator=generator)
            elif name.endswith("bn3.weight"):
                value.fill_(BRANCH_SCALE)
            else:
                ones = name.endswith((".weight", ".running_var"))
                value.fill_(1.0 if ones else 0.0)
