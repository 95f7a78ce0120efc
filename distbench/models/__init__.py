"""Models by name, and the user's own by MODULE:FACTORY."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distbench.cli import nearest, one_of, positive, positive_duration_ns
from distbench.errors import DistbenchError, ModelError, UsageError
from distbench.sut import Echo, Sleep, SystemUnderTest, adapted

if TYPE_CHECKING:
    from distbench.models.decoders import DecoderModel
    from distbench.world import World

DTYPES = ("fp32", "tf32", "bf16", "fp16")
"""What --dtype takes; ``precision`` tells what each means."""


def _path(text: str) -> str:
    if not text:
        raise UsageError("no file is named")
    return text


OPTIONS: dict[str, dict[str, Callable[[str], Any]]] = {
    "digits": {"width": positive, "depth": positive},
    "resnet50": {
        "weights": _path,
        "samples": positive,
        "layout": one_of("channels_last", "contiguous"),
    },
    "tinylm": {"slots": positive, "batching": one_of("continuous", "static")},
    "llama": {
        **dict.fromkeys(("layers", "d", "heads", "kv_heads", "hidden", "vocabulary"), positive),
        **dict.fromkeys(("prompt", "output", "slots"), positive),
        "batching": one_of("continuous", "static"),
    },
    "sleep": {"per_sample": positive_duration_ns},
    "echo": {},
}
"""Embedded models and the options each takes after its name."""
TOKEN_MODELS = ("tinylm", "llama")
"""Those that write texts, and that several ranks can share."""
STAND_INS = ("sleep", "echo")
"""Those that compute nothing."""


def check_model(spec: str) -> str:
    """Check what --model was given as far as that needs no torch; returns it unchanged.

    Raises:
        UsageError: an unknown name (the nearest is named), or an unusable option of a model.
    """
    if not _is_factory(spec):
        split_model(spec)
    elif spec.startswith("hf:"):
        raise UsageError("models of the hf: kind are not in this version; use MODULE:FACTORY")
    elif not all(spec.partition(":")[::2]):
        raise UsageError(f"{spec!r} names no factory: write MODULE:FACTORY, such as mine:build")
    return spec


def split_model(spec: str) -> tuple[str, dict[str, Any]]:
    """Split NAME[,key=value...] and read the values.

    Raises:
        UsageError: the name or an option is unknown, or a value is unusable.
    """
    name, *pairs = spec.split(",")
    if name not in OPTIONS:
        raise UsageError(
            f"there is no model {name!r}{nearest(name, list(OPTIONS))}; there are "
            f"{', '.join(OPTIONS)}, or your own as MODULE:FACTORY"
        )
    values = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if key not in OPTIONS[name] or not equals:
            known = ", ".join(f"{k}=..." for k in OPTIONS[name]) or "none"
            raise UsageError(f"model {name} takes no {pair!r}; it takes {known}")
        try:
            values[key] = OPTIONS[name][key](text)
        except UsageError as error:
            raise UsageError(f"model {name}, {key}: {error}") from None
    return name, values


def load_model(spec: str, world: World, batch_size: int, dtype: str = "") -> SystemUnderTest:
    """Build the system under test that --model names.

    Args:
        spec: NAME[,key=value...] or MODULE:FACTORY.
        world: this rank's place; given to the factory.
        batch_size: largest group that will be issued.
        dtype: one of ``DTYPES``; "" is fp32 for an embedded model, and its own for any other.

    Raises:
        UsageError: the model cannot be built; the sentence names the model and the reason.
    """
    check_dtype(spec, dtype)
    if _is_factory(spec):
        return _from_factory(spec, world)
    name, values = split_model(spec)
    if name == "echo":
        return Echo()
    if name == "sleep":
        return Sleep(values.get("per_sample", 1_000_000), now=world.now)
    if name in TOKEN_MODELS:
        return _token_model(spec, world, batch_size, dtype)
    # torch, and only where it is used
    if name == "resnet50":
        from distbench.models.resnet50 import build as build_resnet50  # noqa: PLC0415

        return build_resnet50(world.device, batch_size, world.now, dtype or "fp32", **values)
    if name != "digits":
        raise AssertionError(f"{name} is in OPTIONS and has no branch in load_model")
    from distbench.models.digits import build  # noqa: PLC0415

    return build(world.device, batch_size, world.now, dtype or "fp32", **values)


def check_dtype(spec: str, dtype: str) -> None:
    """Refuse a --dtype that the model would not follow.

    Args:
        spec: NAME[,key=value...] or MODULE:FACTORY.
        dtype: one of ``DTYPES``; "" where none was asked for.

    Raises:
        UsageError: the model is one of the user's own, or a stand-in.
    """
    if not dtype:
        return
    if _is_factory(spec):
        raise UsageError(
            f"--dtype {dtype} does not apply to model {spec}: its factory decides what it computes "
            "in, so set it there"
        )
    name = spec.partition(",")[0]
    if name in STAND_INS:
        raise UsageError(f"--dtype {dtype} does not apply to model {name}: it computes nothing")
    if name == "tinylm" and dtype != "fp32":
        raise UsageError(f"model tinylm computes in fp32 alone, not in {dtype} (--dtype)")
    if name == "llama" and dtype == "tf32":
        raise UsageError("model llama computes in fp32, bf16 or fp16, not in tf32 (--dtype)")


def _is_factory(spec: str) -> bool:
    """Tell MODULE:FACTORY from a name with options, in whose values a colon may stand."""
    return ":" in spec.partition(",")[0]


def _token_model(spec: str, world: World, batch_size: int, dtype: str) -> SystemUnderTest:
    import torch  # noqa: PLC0415

    from distbench.models.decoders import build_whole  # noqa: PLC0415

    device = world.device
    place = torch.device("cuda", device.index) if device.type == "cuda" else torch.device("cpu")
    return build_whole(token_model(spec, batch_size, dtype), place, world.now)


def token_model(spec: str, batch_size: int, dtype: str = "") -> DecoderModel:
    """Return the token model that --model names, before any of it is in memory.

    Args:
        spec: NAME[,key=value...], of ``TOKEN_MODELS``.
        batch_size: samples of a group, which must be 1.
        dtype: one of ``DTYPES``; "" is fp32.

    Raises:
        UsageError: the groups are larger, or its sizes do not fit together.
    """
    check_dtype(spec, dtype)
    name, values = split_model(spec)
    if batch_size != 1:
        raise UsageError(
            f"model {name} takes one sample a group, not {batch_size}: give --batch-size 1, "
            "or --max-batch 1 in Server; how many texts it writes together is its slots=..."
        )
    if name == "llama":
        from distbench.models.decoders import llama  # noqa: PLC0415

        return llama(values, dtype or "fp32")
    from distbench.models.tinylm import describe  # noqa: PLC0415

    return describe(**values)


def _from_factory(spec: str, world: World) -> SystemUnderTest:
    module_name, _, attribute = spec.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        made = getattr(importlib.import_module(module_name), attribute)(world)
    except DistbenchError:
        raise
    except Exception as error:
        raise ModelError(f"model {spec} could not be built: {error!r}") from error
    try:
        return adapted(made)
    except UsageError as error:
        raise UsageError(f"model {spec}: the factory returned what is no model: {error}") from None
