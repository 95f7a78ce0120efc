"""Weights from a local file, by name and strictly: none missing, none extra, every shape right.

    .safetensors   by the package of that name (the extra ``hf``)
    .npz           arrays by name, as numpy.savez writes them
    any other      a torch file, as torch.save(model.state_dict(), path) writes it

No file can run code: a pickle may hold tensors, and is refused for anything else.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distbench.errors import UsageError
from distbench.files import sha256_file

UNUSED = ".num_batches_tracked"
"""Ends the names that training alone uses: older files lack them."""
NAMED = 3


def read_weights(path: Path) -> tuple[dict[str, Tensor], str]:
    """Read a file of weights.

    Args:
        path: the file; its ending says how it is read.

    Returns:
        The tensors by name, on the CPU, mapped from the file where that is possible; and the file's
        digest, ``"sha256:<hex>"``.

    Raises:
        UsageError: the file cannot be read, is damaged, or holds more than tensors by name.
    """
    read = {".safetensors": _read_safetensors, ".npz": _read_npz}.get(
        path.suffix.lower(), _read_torch
    )
    try:
        digest = sha256_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what torch thinks of a file, the sentences below tell
            found = read(path)
    except UsageError:
        raise
    except OSError as error:
        raise UsageError(f"weights {path} cannot be read: {error.strerror or error}") from error
    except Exception as error:  # a damaged file shows itself in a dozen types of error
        raise _refusal(path, error) from error
    if not isinstance(found, Mapping):
        raise UsageError(
            f"weights {path} hold no tensors by name but: {type(found).__name__}; save "
            "model.state_dict() by itself"
        )
    for name, value in found.items():
        if not isinstance(value, Tensor) or value.layout != torch.strided:
            raise UsageError(
                f"weights {path} hold no dense tensor under {name!r} but: {_kind(value)}; save "
                "model.state_dict() by itself"
            )
    return {str(name): value for name, value in found.items()}, f"sha256:{digest}"


def load_strictly(net: torch.nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Copy tensors into a module, on its own device and in its own dtype.

    Args:
        net: its memory may hold anything.
        tensors: by the names of the module's state dict; what only training uses may be absent.
        path: the file they are from, for the sentence.

    Raises:
        UsageError: names are missing or unknown, or a tensor has another shape or is no float.
    """
    wanted = net.state_dict()
    missing = [name for name in wanted if name not in tensors and not name.endswith(UNUSED)]
    unknown = [name for name in tensors if name not in wanted]
    unlike = [
        f"{name} {_described(tensors[name])} where {_described(value)} is needed"
        for name, value in wanted.items()
        if name in tensors and _described(tensors[name]) != _described(value)
    ]
    told = (("missing", missing), ("not known", unknown), ("unlike", unlike))
    problems = [f"{what}: {_first(names)}" for what, names in told if names]
    if problems:
        raise UsageError(
            f"weights {path} are not those of this model ({len(wanted)} tensors): "
            f"{'; '.join(problems)}"
        )
    with torch.no_grad():
        for name, value in wanted.items():
            if name in tensors:
                value.copy_(tensors[name])
            else:
                value.zero_()


def _described(value: Tensor) -> str:
    """Return the shape; with the dtype where it is no float, as in a quantized model."""
    shape = f"({', '.join(map(str, value.shape))})"
    return shape if value.is_floating_point() else f"{shape} {str(value.dtype).split('.')[-1]}"


def _first(names: list[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} more" if more > 0 else "")


def _kind(value: Any) -> str:
    return f"{value.layout} tensor" if isinstance(value, Tensor) else type(value).__name__


def _read_torch(path: Path) -> Any:
    # Files older than torch 1.6 are no zip and cannot be mapped.
    mapped = zipfile.is_zipfile(path)
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)


def _read_npz(path: Path) -> Any:
    with path.open("rb") as file, np.load(file, allow_pickle=False) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays}


def _read_safetensors(path: Path) -> Any:
    try:
        from safetensors.torch import load_file  # noqa: PLC0415  an extra
    except ImportError as error:
        raise UsageError(
            f"weights {path}: reading them needs safetensors: pip install safetensors"
        ) from error
    return load_file(path)


def _refusal(path: Path, error: Exception) -> UsageError:
    # By its name, since nothing here imports pickle. Its own text advises to load the file anyway.
    if type(error).__name__ == "UnpicklingError":
        return UsageError(
            f"weights {path} are no pickle of tensors alone, and any other could run code, so it "
            "was not loaded: save model.state_dict() by itself with torch.save"
        )
    first = str(error).partition("\n")[0].partition(". ")[0]  # what follows is advice
    reason = f"{type(error).__name__}: {first[:120]}".rstrip(": ")
    return UsageError(
        f"weights {path} are damaged, cut short or of another kind than their name says "
        f"({reason}): copy the file again and compare its sha256"
    )
