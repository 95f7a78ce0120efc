"""A byte-level decoder of the Llama kind, small enough to ship trained.

    bytes (B, T) -> embedding -> [RMSNorm, attention, +; RMSNorm, SwiGLU, +] x layers
                 -> RMSNorm -> the embedding again, as the head -> (B, T, vocabulary)

Attention has rotary positions and fewer heads for keys and values than for queries. Every size
stands in ``NetConfig``; the default is the one that carries trained weights, 137,664 of them. Any
other size has random weights: load to measure, with nothing to say about its text.

There is one forward pass. Without a cache it computes a whole text, each byte from those before it.
With a cache it computes the bytes it is given, each at a position of its own in a slot of its own,
writes their keys and values there and reads those of the positions before: so a prompt, one more
byte of one text, and one more byte of many texts at different positions are the same call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from distbench.errors import UsageError
from distbench.models.arrays import check_arrays, decode_arrays
from distbench.models.tinylm_data import SHA256, WEIGHTS_FILE, pinned


@dataclass(frozen=True)
class NetConfig:
    """The sizes of a decoder.

    Attributes:
        vocabulary: tokens; 128 are the bytes of ASCII.
        width: of the residual stream.
        layers: number of blocks.
        heads: of the queries; each ``width // heads`` wide, which must be even.
        kv_heads: of the keys and values; divides ``heads``.
        hidden: width inside SwiGLU.
        rope_base: of the rotary positions' wavelengths.
        norm_eps: added to the mean square in RMSNorm.

    Raises:
        UsageError: the sizes do not fit together.
    """

    vocabulary: int = 128
    width: int = 64
    layers: int = 3
    heads: int = 4
    kv_heads: int = 2
    hidden: int = 160
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        sizes = (self.vocabulary, self.width, self.layers, self.heads, self.kv_heads, self.hidden)
        if min(sizes) < 1:
            raise UsageError("every size of the tinylm model must be at least 1")
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise UsageError(
                f"{self.heads} heads do not divide a width of {self.width} into even parts, or "
                f"{self.kv_heads} key and value heads do not divide {self.heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads


TRAINED = NetConfig()
"""The sizes of the trained weights."""


@dataclass(frozen=True)
class KVCache:
    """Keys and values of every slot, allocated once.

    Attributes:
        keys: shape (layers, slots, length, kv_heads, head_dim).
        values: likewise.
    """

    keys: Tensor
    values: Tensor

    @property
    def slots(self) -> int:
        """Texts that it holds."""
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        """Positions of a slot."""
        return self.keys.shape[2]


def new_cache(
    config: NetConfig,
    slots: int,
    length: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> KVCache:
    """Allocate a cache; one that is made under ``inference_mode`` can be used only there.

    Args:
        config: of the network; a rank that holds some of the heads gives its own ``kv_heads``.
        slots: texts it holds.
        length: positions of each.
        dtype: of the network's parameters.
        device: of the network's parameters.
    """
    shape = (config.layers, slots, length, config.kv_heads, config.head_dim)
    return KVCache(*(torch.zeros(shape, dtype=dtype, device=device) for _ in range(2)))


def slot_bytes(config: NetConfig, length: int, dtype: torch.dtype = torch.float32) -> int:
    """Return what one slot of such a cache takes.

    Args:
        config: of the network.
        length: positions of the slot.
        dtype: of the network's parameters.
    """
    return 2 * config.layers * length * config.kv_heads * config.head_dim * dtype.itemsize


@dataclass(frozen=True)
class _Place:
    """Where the bytes of one call stand, worked out once for all layers.

    Attributes:
        cos, sin: of the rotations, shape (B or 1, T, 1, head_dim / 2).
        rows: slots that are written, shape (B, 1), int64.
        positions: that are written, shape (B, T), int64.
        read: slots that are read: a slice where they are the first ones, which copies nothing.
        limit: positions that are read.
        seen: which of these a byte may see, shape (B, 1, T, limit), bool.
    """

    cos: Tensor
    sin: Tensor
    rows: Tensor | None = None
    positions: Tensor | None = None
    read: Tensor | slice | None = None
    limit: int = 0
    seen: Tensor | None = None


class Attention(nn.Module):
    """Causal attention of one layer; the number of heads is read off the projections' outputs."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        kv_width = config.kv_heads * config.head_dim
        self.q = nn.Linear(config.width, config.width, bias=False)
        self.k = nn.Linear(config.width, kv_width, bias=False)
        self.v = nn.Linear(config.width, kv_width, bias=False)
        self.o: nn.Module = nn.Linear(config.width, config.width, bias=False)

    def forward(self, x: Tensor, place: _Place, keys: Tensor | None, values: Tensor | None) -> Any:
        """Attend from each byte to those up to it.

        Args:
            x: shape (B, T, width).
            place: of the bytes.
            keys: this layer's part of the cache, which takes the new ones; None where ``x`` is the
                whole text.
            values: likewise.

        Returns:
            Shape (B, T, width).
        """
        batch, new, _ = x.shape
        # -1, not the number of heads: a rank of a sharded network holds only some of them.
        q = rotate(self.q(x).view(batch, new, -1, self.head_dim), place.cos, place.sin)
        k = rotate(self.k(x).view(batch, new, -1, self.head_dim), place.cos, place.sin)
        v = self.v(x).view(batch, new, -1, self.head_dim)
        if keys is not None and values is not None:
            keys[place.rows, place.positions] = k
            values[place.rows, place.positions] = v
            k, v = keys[place.read, : place.limit], values[place.read, : place.limit]
        mixed = scaled_dot_product_attention(
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
            attn_mask=place.seen,
            is_causal=place.seen is None,
            enable_gqa=True,
        )
        return self.o(mixed.transpose(1, 2).reshape(batch, new, -1))


class SwiGLU(nn.Module):
    """The feed-forward part of one layer: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.gate = nn.Linear(config.width, config.hidden, bias=False)
        self.up = nn.Linear(config.width, config.hidden, bias=False)
        self.down: nn.Module = nn.Linear(config.hidden, config.width, bias=False)

    def forward(self, x: Tensor) -> Any:
        """Map shape (..., width) to the same shape."""
        return self.down(silu(self.gate(x)) * self.up(x))


class Block(nn.Module):
    """One layer: attention and feed-forward, each added to what comes in."""

    def __init__(self, config: NetConfig) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.attention = Attention(config)
        self.feed_norm = nn.RMSNorm(config.width, config.norm_eps)
        self.feed = SwiGLU(config)

    def forward(self, x: Tensor, place: _Place, keys: Tensor | None, values: Tensor | None) -> Any:
        """Map shape (B, T, width) to the same shape; see ``Attention``."""
        x = x + self.attention(self.attention_norm(x), place, keys, values)
        return x + self.feed(self.feed_norm(x))


class TinyLM(nn.Module):
    """The decoder, with whatever weights torch gives a new module; see ``build_net``.

    Args:
        config: its sizes.
    """

    def __init__(self, config: NetConfig = TRAINED) -> None:
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        tokens: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        slots: Tensor | None = None,
        limit: int | None = None,
    ) -> Tensor:
        """Score every possible next byte after each byte.

        Args:
            tokens: shape (B, T), int64, on the network's device.
            cache: takes the keys and values; None computes whole texts, from position 0.
            positions: of the tokens in their slots, shape (B, T), int64; whatever a slot holds at
                these and at smaller positions must be its own text, larger ones are not looked at.
            slots: of the B texts, shape (B,), int64; None: the first B slots.
            limit: more than any of ``positions``; the fewer, the less is read. None: all.

        Returns:
            Logits, shape (B, T, vocabulary), in the dtype of the parameters.
        """
        x = self.embedding(tokens)
        place = self._place(x, cache, positions, slots, limit)
        for number, layer in enumerate(self.layers):
            keys, values = (cache.keys[number], cache.values[number]) if cache else (None, None)
            x = layer(x, place, keys, values)
        return linear(self.norm(x), self.embedding.weight)

    def _place(
        self,
        x: Tensor,
        cache: KVCache | None,
        positions: Tensor | None,
        slots: Tensor | None,
        limit: int | None,
    ) -> _Place:
        if cache is None:
            rising = torch.arange(x.shape[1], device=x.device)[None]
            return _Place(*rotations(rising, self.config, x.dtype))
        assert positions is not None, "a cache needs positions"
        cos, sin = rotations(positions, self.config, x.dtype)
        limit = limit or cache.length
        held = torch.arange(limit, device=x.device)
        rows = torch.arange(len(x), device=x.device) if slots is None else slots
        return _Place(
            cos,
            sin,
            rows[:, None],
            positions,
            slice(0, len(x)) if slots is None else slots,
            limit,
            (held <= positions[:, :, None])[:, None],
        )


def rotations(positions: Tensor, config: NetConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the angles by which heads turn at each position.

    Pair i of a head turns by position x rope_base ** (-2 i / head_dim). Worked out in float64,
    each time: a table would be rounded with the parameters, and be lost by a module made on "meta".

    Args:
        positions: shape (B, T), int64.
        config: of the network.
        dtype: of the result.

    Returns:
        Two tensors, shape (B, T, 1, head_dim / 2).
    """
    pairs = torch.arange(0, config.head_dim, 2, dtype=torch.float64, device=positions.device)
    angles = positions[:, :, None, None] * config.rope_base ** (-pairs / config.head_dim)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each head's pairs, (i, i + head_dim / 2), as Llama does.

    Args:
        x: shape (B, T, heads, head_dim).
        cos: shape (B or 1, T, 1, head_dim / 2).
        sin: likewise.
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def build_net(folder: Path | None = None, dtype: torch.dtype = torch.float32) -> tuple[TinyLM, str]:
    """Build the trained network and say where its weights come from.

    Args:
        folder: where the file of trained weights lies; None is the installed package.
        dtype: of the parameters; the file has them in float16.

    Returns:
        The network, on the CPU, in eval mode; and ``"sha256:<hex>"`` of the file.

    Raises:
        UsageError: the file is missing, unreadable or not the pinned one.
    """
    path, content = pinned(WEIGHTS_FILE, folder)
    return load_net(path, content, TRAINED).to(dtype), f"sha256:{SHA256[WEIGHTS_FILE]}"


def load_net(path: Path, content: bytes, config: NetConfig) -> TinyLM:
    """Build a network from the content of an .npz file.

    Args:
        path: named where the content is refused.
        content: of the file.
        config: its sizes.

    Returns:
        The network, on the CPU, float32, in eval mode.

    Raises:
        UsageError: it is no file of plain arrays, or keys are missing, extra or misshapen.
    """
    net = _empty_net(config)
    arrays = decode_arrays(path, content)
    check_arrays(path, arrays, {name: each.shape for name, each in net.state_dict().items()})
    net.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    return net.eval()


def random_net(config: NetConfig, seed: int) -> TinyLM:
    """Build a network with seeded random weights; torch's global generators stay as they are.

    Weights are normal with variance 1 / fan-in; what is added to the residual stream is smaller by
    the root of twice the number of layers, so that deep networks stay finite in half precision.

    Args:
        config: its sizes.
        seed: of the weights.

    Returns:
        The network, on the CPU, float32, in train mode.
    """
    net = _empty_net(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            deviation = 1 / math.sqrt(parameter.shape[1])
            if name.endswith(("o.weight", "down.weight")):
                deviation /= math.sqrt(2 * config.layers)
            parameter.normal_(0.0, deviation, generator=generator)
    return net


def _empty_net(config: NetConfig) -> TinyLM:
    # A module made on "meta" draws no random numbers; its memory is then left for the caller.
    with torch.device("meta"):
        net = TinyLM(config)
    return net.to_empty(device="cpu")
