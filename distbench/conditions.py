"""What a run was measured under, and where two runs differ in it.

A condition is named as it is recorded: an option by its name (``batch_size``), what describes a
rank's host by its field (``kernel``, ``gpu.driver_version``, ``variables.NCCL_ALGO``). What changes
from launch to launch by itself is none: load, memory in use, stolen time, where results go.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from distbench.errors import UsageError, where

NO_CONDITIONS = {
    *("model", "dtype", "output_dir", "name", "quiet", "strict", "timeout", "driver_token"),
}
"""Options that do not change what is measured; the model's name and dtype stand in ``MODEL``."""
MODEL = ("name", "digest", "dtype", "total", "depth")
"""What makes it the same model, fed the same way."""
PASSING = {
    *("hostname", "memory_available_bytes", "load_average", "steal_jiffies", "reasons"),
    # An idle GPU turns its link down; which GPU it is, its UUID says.
    *("gpu.pcie_generation", "gpu.uuid", "gpu.pci_bus_id"),
}
"""Fields of the environment that differ between two launches of the same thing."""
MEMORY_TOLERANCE = 0.01
"""MemTotal is what the kernel left of the memory, so that each kernel gives a little another."""
GROUPS = {
    # One wheel brings them all.
    "torch": {
        *("torch_version", "torch_git_version", "torch_cuda_version"),
        *("cudnn_version", "nccl_version"),
    },
    "world_size": {
        f"variables.{name}WORLD_SIZE"  # as torchrun sets them
        for name in ("", "LOCAL_", "GROUP_")
    },
    "cuda": {"torch_cuda_version", "cudnn_version"},
    "code": {"distbench_version", "git_commit", "git_dirty"},
    "driver": {"gpu.driver_version"},
    # TF32 is a switch of the process, so it shows among the host's fields.
    "dtype": {
        *("model.dtype", "float32_matmul_precision", "cuda_matmul_fp32_precision"),
        *("cudnn_conv_fp32_precision", "cuda_matmul_allow_tf32", "cudnn_allow_tf32"),
    },
    "firmware": {"gpu.vbios_version"},
}
"""Words that stand for several conditions."""
SHOWN = 4


@dataclass(frozen=True)
class RankConditions:
    """What one rank ran under.

    Attributes:
        label: such as "rank 1 (jw3)".
        place: what it ran on, for people: the host, with the GPU's UUID where there is one.
        identity: the UUID, or the host without one; "" for a pod, whose hostname is new each time.
        values: by name.
    """

    label: str
    place: str
    identity: str
    values: dict[str, Any]


@dataclass(frozen=True)
class Conditions:
    """What a run was measured under.

    Attributes:
        run: what holds for the whole run, by name.
        ranks: in order of rank.
    """

    run: dict[str, Any]
    ranks: tuple[RankConditions, ...]


@dataclass(frozen=True)
class Difference:
    """A condition in which two runs differ.

    Attributes:
        name: of the condition.
        base: its value in the first run, as text.
        new: in the second.
        ranks: labels of the ranks that it concerns; empty where it concerns all.
        of_hosts: whether it tells of the hosts, and not of what was run on them.
    """

    name: str
    base: str
    new: str
    ranks: tuple[str, ...] = ()
    of_hosts: bool = False

    @property
    def title(self) -> str:
        """Its name, and the ranks that it concerns."""
        if not self.ranks:
            return self.name
        more = len(self.ranks) - SHOWN
        listed = ", ".join(self.ranks[:SHOWN]) + (f" and {more} more" if more > 0 else "")
        return f"{self.name} of {listed}"


def conditions(result: dict[str, Any]) -> Conditions:
    """Return what a run was measured under.

    Args:
        result: the content of result.json.
    """
    window, config = result["window"], result["config"]
    run = {"scenario": result["scenario"], "world_size": window["world_size"]}
    run |= {f"model.{name}": window["model"].get(name) for name in MODEL}
    run |= {name: item["value"] for name, item in config.items() if name not in NO_CONDITIONS}
    if run.get("driver"):  # where it is, and not which port was free
        run["driver"] = run["driver"].rpartition(":")[0] or run["driver"]
    ranks = []
    common = result["environment"]["common"]
    for row, own in zip(result["per_rank"], result["environment"]["ranks"], strict=True):
        described = _laid_over(common, own)
        uuid = str((described.get("gpu") or {}).get("uuid") or "")
        pod = (described.get("container") or {}).get("kubernetes", False)
        values = dict(_flat(described))
        values["device.name"] = row["device"]
        ranks.append(
            RankConditions(
                label=where(row["rank"], row["host"]),
                place=f"{row['host']} {uuid}".strip(),
                identity=uuid or ("" if pod else row["host"]),
                values=values,
            )
        )
    return Conditions(run, tuple(ranks))


def _laid_over(common: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Give a rank's description again, of which ``verdict.common_and_rest`` lifted the common."""
    whole = dict(common)
    for name, value in own.items():
        both = isinstance(value, dict) and isinstance(whole.get(name), dict)
        whole[name] = _laid_over(whole[name], value) if both else value
    return whole


def _flat(described: dict[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in described.items():
        if above + name in PASSING:
            continue
        if isinstance(value, dict):
            yield from _flat(value, f"{above}{name}.")
        else:
            yield above + name, value


def differences(base: Conditions, new: Conditions) -> list[Difference]:
    """Return every condition in which two runs differ.

    Ranks are paired by what they ran on, since a rendezvous may number the hosts otherwise each
    time; where neither run's hosts are all among the other's, by their number.

    Args:
        base: of the first run.
        new: of the second.
    """
    found = [
        Difference(name, _shown(base.run.get(name), "unset"), _shown(new.run.get(name), "unset"))
        for name in dict.fromkeys([*base.run, *new.run])
        if not _same(name, base.run.get(name), new.run.get(name))
    ]
    gone, come = _only_in(base.ranks, new.ranks), _only_in(new.ranks, base.ranks)
    if gone and come:  # on some of the same hosts, another world size tells it all
        found.append(Difference("hosts", gone, come, of_hosts=True))
        pairs = list(zip(base.ranks, new.ranks, strict=False))
    else:
        pairs = _pairs(base.ranks, new.ranks)
    names = dict.fromkeys(name for pair in pairs for rank in pair for name in rank.values)
    for name in names:
        groups: dict[tuple[str, str], list[str]] = {}
        for a, b in pairs:
            old, now = a.values.get(name), b.values.get(name)
            if not _same(name, old, now):
                key = (_shown(old, "unknown"), _shown(now, "unknown"))
                groups.setdefault(key, []).append(b.label)
        for (old_text, now_text), labels in groups.items():
            ranks = () if len(labels) == len(pairs) else tuple(labels)
            found.append(Difference(name, old_text, now_text, ranks, of_hosts=True))
    return found


def _pairs(
    these: Sequence[RankConditions], others: Sequence[RankConditions]
) -> list[tuple[RankConditions, RankConditions]]:
    """Pair the ranks that ran on the same thing."""
    left: dict[str, list[RankConditions]] = {}
    for rank in reversed(these):
        left.setdefault(rank.identity, []).append(rank)
    return [(left[rank.identity].pop(), rank) for rank in others if left.get(rank.identity)]


def _only_in(these: Sequence[RankConditions], others: Sequence[RankConditions]) -> str:
    """List what ranks of the first run ran on, and none of the other; "" for nothing."""
    left = Counter(rank.identity for rank in these) - Counter(rank.identity for rank in others)
    places = list(dict.fromkeys(rank.place for rank in these if left[rank.identity]))
    more = len(places) - SHOWN
    return ", ".join(places[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _same(name: str, a: Any, b: Any) -> bool:
    if name == "memory_total_bytes" and a and b:
        return bool(abs(a - b) <= MEMORY_TOLERANCE * max(a, b))
    if type(a) is type(b) and not isinstance(a, dict | list):
        return bool(a == b)  # as below, but fast enough for thousands of ranks
    # As JSON, where 1, 1.0 and true differ.
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


def _shown(value: Any, absent: str) -> str:
    if value is None or value == "":
        return absent
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."


def covers(word: str, name: str) -> bool:
    """Tell whether a word that a user gave stands for a condition.

    Example:
        >>> covers("torch", "nccl_version"), covers("gpu", "gpu.name"), covers("python", "kernel")
        (True, True, False)
    """
    return (
        name in (word, f"{word}_version")
        or name.startswith(f"{word}.")
        or name in GROUPS.get(word, ())
    )


def known_names(these: Sequence[Conditions]) -> list[str]:
    """Return every name of a condition in these runs, and the words that stand for several."""
    found = dict.fromkeys(name for each in these for name in each.run)
    found |= dict.fromkeys(name for each in these for r in each.ranks for name in r.values)
    return [*found, "hosts", "model", "gpu", "container", *GROUPS]


def listed(these: Sequence[Difference]) -> str:
    """Name differences in a sentence: the first few with both values, the others by name.

    Example:
        >>> listed([Difference("batch_size", "32", "64")])
        'batch_size (32 and 64)'
    """
    shown = [f"{d.title} ({d.base} and {d.new})" for d in these[:SHOWN]]
    more = list(dict.fromkeys(d.name for d in these[SHOWN:]))
    return ", ".join(shown) + (f" and in {', '.join(more)}" if more else "")


def check_side(results: Sequence[dict[str, Any]], these: Sequence[Conditions], side: str) -> None:
    """Refuse launches of one side that were not made under the same conditions.

    Args:
        results: of the side, for their names.
        these: the conditions of each.
        side: its name, for the sentence.

    Raises:
        UsageError: they are unlike.
    """
    for result, other in zip(results[1:], these[1:], strict=True):
        found = differences(these[0], other)
        if found:
            raise UsageError(
                f"launches of the {side} are unlike: {results[0]['run_id']} and "
                f"{result['run_id']} differ in {listed(found)}; give launches of one kind"
            )
