"""``--dtype``: what an embedded model computes in, and what torch is told about it.

    fp32         float32 throughout, TF32 off in matrix products and in convolutions
    tf32         float32 weights; the GPU rounds the inputs of both to TF32
    bf16, fp16   weights and activations in that type, cast once (autocast casts in every call)

TF32 is a switch of the whole process. It is set for every dtype, so that none depends on torch's
defaults, which allow it in convolutions.
"""

from __future__ import annotations

import os
import warnings

import torch
from torch.utils.flop_counter import FlopCounterMode

from distbench.errors import UsageError
from distbench.gpus import Device
from distbench.models import DTYPES

TORCH_DTYPES = dict(
    zip(DTYPES, (torch.float32, torch.float32, torch.bfloat16, torch.float16), strict=True)
)
"""What the weights are stored in, by the names that --dtype takes."""
TF32_CAPABILITY = (8, 0)
"""Compute capability of the first GPUs with TF32, Ampere (CUDA C++ Programming Guide)."""


def set_precision(dtype: str, device: Device) -> torch.dtype:
    """Switch TF32 on or off in this process, and return what the weights are stored in.

    Args:
        dtype: one of ``DTYPES``.
        device: where to compute.

    Raises:
        UsageError: TF32 was asked for where nothing computes in it.
    """
    if dtype == "tf32":
        _check_tf32(device)
    wanted = dtype == "tf32"
    with warnings.catch_warnings():
        # torch >= 2.9 advises fp32_precision instead. After that neither it nor anyone else in the
        # process can read these switches, which the record and torch.compile do.
        warnings.simplefilter("ignore")
        torch.backends.cuda.matmul.allow_tf32 = wanted
        torch.backends.cudnn.allow_tf32 = wanted
    return TORCH_DTYPES[dtype]


def _check_tf32(device: Device) -> None:
    if device.type != "cuda":
        raise UsageError(
            "--dtype tf32 is a mode of NVIDIA GPUs, and this rank computes on the CPU: give fp32"
        )
    if torch.cuda.get_device_capability(device.index) < TF32_CAPABILITY:
        raise UsageError(
            f"--dtype tf32: {device.name or 'this GPU'} has no TF32; give fp32 or fp16"
        )
    if os.environ.get("NVIDIA_TF32_OVERRIDE") == "0":
        raise UsageError(
            "--dtype tf32: NVIDIA_TF32_OVERRIDE=0 keeps NVIDIA's libraries from it; unset it"
        )


def count_flops(net: torch.nn.Module, sample: torch.Tensor, dtype: str) -> int:
    """Compute one sample and return its operations, two for a multiplication with its addition.

    torch counts them from the layers' shapes. A kernel that this torch lacks, as CPUs' builds do in
    half precision, is told here and not in the run.

    Args:
        net: on its device, in its dtype, in eval mode.
        sample: shape (1, ...).
        dtype: its name, for the sentence.

    Raises:
        UsageError: torch cannot compute the model in this dtype here.
    """
    try:
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            net(sample)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise UsageError(
            f"torch {torch.__version__} cannot compute this model in {dtype} on this device "
            f"({reason}); give another --dtype or --device"
        ) from error
    return int(counter.get_total_flops())
