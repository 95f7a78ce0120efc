"""What computes the tokens of a ``SlotEngine``: a torch network over one cache of keys and values.

The tokens and positions of all slots stay on the device. A step is one forward pass over the slots
up to the highest one in use, and one copy of as many tokens to the host; only a prefill sends
something the other way. Each call runs inside ``torch.inference_mode`` as a whole: a tensor made in
there cannot be updated in place outside.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from distbench.errors import UsageError

ROUND = 32
"""Positions are read in multiples of this, so that few shapes occur."""
USABLE = 0.9
"""Share of the memory available now that the cache may take: activations need some, and so do the
other processes of a host."""


class SlotDecoder:
    """Greedy decoding in slots.

    Args:
        net: in eval mode; called with tokens, cache, positions, slots and limit, as ``TinyLM`` is.
        cache: its keys and values, with ``slots`` and ``length``, on the network's device.
        vocabulary: tokens are 0 .. vocabulary-1.
        device: of both.
    """

    def __init__(self, net: Any, cache: Any, vocabulary: int, device: torch.device) -> None:
        self.net = net
        self.cache = cache
        self.slots, self.length, self.vocabulary = cache.slots, cache.length, vocabulary
        self.device = device
        self._tokens = torch.zeros(cache.slots, dtype=torch.int64, device=device)
        self._positions = torch.zeros(cache.slots, dtype=torch.int64, device=device)

    def prefill(self, slots: Sequence[int], prompts: Sequence[bytes]) -> list[int]:
        """Read prompts into slots; returns the token after each.

        Shorter prompts are filled up with zeros. What the filling leaves in the cache lies behind
        the prompt, and is overwritten before anything looks that far.

        Args:
            slots: free ones.
            prompts: as many, none empty.
        """
        longest = max(map(len, prompts))
        filled = b"".join(prompt.ljust(longest, b"\0") for prompt in prompts)
        codes = np.frombuffer(filled, np.uint8).reshape(len(prompts), longest).astype(np.int64)
        with torch.inference_mode():
            tokens = torch.from_numpy(codes).to(self.device)
            rows = torch.tensor(slots, device=self.device)
            lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.device)
            positions = torch.arange(longest, device=self.device).expand_as(tokens)
            logits = self.net(tokens, self.cache, positions, rows, self._rounded(longest))
            each = torch.arange(len(prompts), device=self.device)
            first = logits[each, lengths - 1].argmax(dim=-1)
            self._tokens[rows] = first
            self._positions[rows] = lengths
            told: list[int] = first.tolist()
        return told

    def decode(self, top: int, limit: int) -> list[int]:
        """Write one token more in each of the first slots; returns the tokens.

        Args:
            top: how many slots.
            limit: length of the longest text in them, prompt included.
        """
        with torch.inference_mode():
            tokens, positions = self._tokens[:top], self._positions[:top]
            logits = self.net(
                tokens[:, None], self.cache, positions[:, None], None, self._rounded(limit)
            )
            tokens.copy_(logits[:, 0].argmax(dim=-1))
            # A slot without a text is computed along, and must not run out of its cache.
            positions.add_(1).clamp_(max=self.length - 1)
            written: list[int] = tokens.tolist()
        return written

    def _rounded(self, limit: int) -> int:
        return min(int(self.length), -(-limit // ROUND) * ROUND)


def check_memory(slots: int, slot_bytes: int, device: torch.device) -> None:
    """Refuse more slots than the device has memory for.

    Args:
        slots: asked for.
        slot_bytes: keys and values of one slot.
        device: where they would lie.

    Raises:
        UsageError: they would take more than ``USABLE`` of what is available now.
    """
    available = available_bytes(device)
    usable = int(available * USABLE)
    if slots * slot_bytes <= usable:
        return
    most = usable // slot_bytes
    remedy = f"give slots={most} or fewer" if most else "free memory there"
    raise UsageError(
        f"{slots:,} slots need {slots * slot_bytes:,} bytes for their keys and values, and "
        f"{usable:,} are usable on {device}, {USABLE:.0%} of the {available:,} available: {remedy}"
    )


def available_bytes(device: torch.device) -> int:
    """Return how many bytes can be allocated on a device now, by the kernel's or CUDA's account.

    Raises:
        UsageError: the kernel does not say.
    """
    if device.type == "cuda":
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + held
    for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise UsageError("/proc/meminfo names no MemAvailable: slots cannot be checked on this kernel")
