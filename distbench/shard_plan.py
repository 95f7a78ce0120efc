"""Before a run of several layouts: which one should win, by the model's shape and the links."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from distbench.cli import Option, duration_ns, one_of, positive, positive_number
from distbench.errors import UsageError
from distbench.layout import check_shape, check_world, lanes_of, parse_layout
from distbench.models import TOKEN_MODELS, split_model
from distbench.models.tinylm_data import OUTPUT_LIMITS, PROMPT_LIMITS
from distbench.predict import Link, Speed, Work, foresee, reduce_of
from distbench.report.units import rounded, table
from distbench.shape import OUTPUT, PROMPT, SLOTS, TRAINED, llama_config

ITEM_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
SCALES = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def bytes_per_s(text: str) -> float:
    """Read a rate.

    >>> bytes_per_s("100Mbit/s"), bytes_per_s("933GB/s")
    (12500000.0, 933000000000.0)

    Raises:
        UsageError: it has no unit, or is none.
    """
    found = re.fullmatch(r"([0-9.]+(?:e[0-9]+)?)([kMGT]?)(bit|B)/s", text)
    try:
        value = float(found[1]) * SCALES[found[2]] / (8 if found[3] == "bit" else 1) if found else 0
    except ValueError:
        value = 0
    if value <= 0:
        raise UsageError(f"{text!r} is no rate: write it as 100Mbit/s or 12.5MB/s")
    return value


OPTIONS = (
    Option("shard", None, str, "layouts: pp, tp, such as pp2, pp2xtp2, replicas", "LAYOUT[,...]"),
    Option("ranks", "2", positive, "of the run, with --shard", "N"),
    Option("micro-batches", None, positive, "of a pipeline, with --shard", "N"),
    Option("dtype", "fp32", one_of(*ITEM_BYTES), "of the model, with --shard", "TYPE"),
    Option("link-rate", None, bytes_per_s, "between two ranks, with --shard", "RATE"),
    Option("link-latency", "50us", duration_ns, "of a message, with --shard", "TIME"),
    Option("flops", None, positive_number, "operations/s that a rank reaches, with --shard", "N"),
    Option("memory-rate", None, bytes_per_s, "at which a rank reads its weights", "RATE"),
)


def shard_lines(values: Mapping[str, Any]) -> list[str]:
    """Return what is foreseen of each layout, as text.

    Args:
        values: of ``OPTIONS``, and ``model``.

    Raises:
        UsageError: an option is missing, or a layout divides neither ranks nor model.
    """
    for name in ("link_rate", "flops", "memory_rate"):
        if values[name] is None:
            raise UsageError(
                f"--{name.replace('_', '-')} is needed with --shard; a short run of "
                "distbench.distributed measures all of them itself"
            )
    work, speed_of = _work(values)
    link = Link(values["link_latency"] / 1e9, values["link_rate"])
    rows = [["layout", "samples/s", "tokens/s", "held by"]]
    rates = {}
    for text in values["shard"].split(","):
        layout = parse_layout(text, None, values["ranks"])
        check_world(layout, values["ranks"])
        lanes = lanes_of(layout, values["micro_batches"] or 0, work.slots)
        check_shape(layout, work.config, lanes, work.slots)
        told = foresee(
            layout, lanes, work, speed_of(lanes), link, reduce_of(link, max(layout.tp, 2))
        )
        rates[layout.name] = rate = values["ranks"] / layout.degree / told.text_s
        rows.append([layout.name, rounded(rate, 4), rounded(rate * work.output, 4), told.held_by])
    best = max(rates, key=lambda name: rates[name])
    others = [f"{rates[best] / rates[name]:.3g} times {name}" for name in rates if name != best]
    return [*table(rows), f"{best} should win" + (f": {', '.join(others)}" if others else "")]


def _work(values: Mapping[str, Any]) -> tuple[Work, Any]:
    """Return what is written, and the speed of a rank by the number of micro-batches."""
    name, given = split_model(values["model"] or "tinylm")
    if name not in TOKEN_MODELS:
        raise UsageError(f"--shard plans token models: give --model {' or '.join(TOKEN_MODELS)}")
    config, prompt, output = TRAINED, fmean(PROMPT_LIMITS), fmean(OUTPUT_LIMITS)
    if name == "llama":
        config = llama_config(given)
        prompt, output = given.get("prompt", PROMPT), given.get("output", OUTPUT)
    item = ITEM_BYTES[values["dtype"]]
    work = Work(config, item, prompt, output, given.get("slots", SLOTS))

    def speed(lanes: int) -> Speed:
        rows = work.slots // lanes
        read_s = config.matrix_weights * item / values["memory_rate"]
        token_s = 2 * config.matrix_weights / values["flops"]
        return Speed({rows: max(read_s, rows * token_s)}, max(read_s, prompt * token_s))

    return work, speed


def asked(values: Mapping[str, Any], origins: Mapping[str, str]) -> Sequence[str]:
    """Return the options of this plan that were given without --shard."""
    names = [option.name.replace("-", "_") for option in OPTIONS]
    return [name for name in names if origins[name] != "default" and values["shard"] is None]
