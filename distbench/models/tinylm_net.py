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

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention, silu

from distbench.shape import TRAINED, NetConfig


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
        config: of the network; that of a shard has the layers and heads that it holds, see
            ``layout.own_part``.
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
    """One layer: attention and feed-forward, each added to what comes in; or one of the two.

    Args:
        config: of the network.
        attention: whether it has the first part.
        feed: whether it has the second.
    """

    def __init__(self, config: NetConfig, attention: bool = True, feed: bool = True) -> None:
        super().__init__()
        self.attends, self.feeds = attention, feed
        if attention:
            self.attention_norm = nn.RMSNorm(config.width, config.norm_eps)
            self.attention = Attention(config)
        if feed:
            self.feed_norm = nn.RMSNorm(config.width, config.norm_eps)
            self.feed = SwiGLU(config)

    def forward(self, x: Tensor, place: _Place, keys: Tensor | None, values: Tensor | None) -> Any:
        """Map shape (B, T, width) to the same shape; see ``Attention``."""
        if self.attends:
            x = x + self.attention(self.attention_norm(x), place, keys, values)
        if self.feeds:
            x = x + self.feed(self.feed_norm(x))
        return x


class TinyLM(nn.Module):
    """The decoder or a stage of it, with whatever weights torch gives a new module.

    A stage of a pipeline has some of the half layers, which are attentions and feed-forwards in
    turn, under the names that they have in the whole; the first one has the embedding, the last one
    the norm and, as its head, the embedding too.

    Args:
        config: the sizes of the whole.
        begin: the first half layer of this stage.
        end: behind its last one; None: all that follow.
    """

    def __init__(self, config: NetConfig = TRAINED, begin: int = 0, end: int | None = None) -> None:
        super().__init__()
        self.config = config
        end = 2 * config.layers if end is None else end
        self.first, self.last = begin == 0, end == 2 * config.layers
        if self.first or self.last:
            self.embedding = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleDict(
            {
                str(number): Block(config, 2 * number >= begin, 2 * number + 1 < end)
                for number in range(begin // 2, (end + 1) // 2)
            }
        )
        if self.last:
            self.norm = nn.RMSNorm(config.width, config.norm_eps)

    def forward(
        self,
        x: Tensor,
        cache: KVCache | None = None,
        positions: Tensor | None = None,
        slots: Tensor | None = None,
        limit: int | None = None,
    ) -> Tensor:
        """Score every possible next byte after each byte.

        Args:
            x: tokens, shape (B, T), int64, on the network's device; of a stage that is not the
                first, what the one before returned.
            cache: takes the keys and values of this stage's attentions; None computes whole texts,
                from position 0.
            positions: of the tokens in their slots, shape (B, T), int64; whatever a slot holds at
                these and at smaller positions must be its own text, larger ones are not looked at.
            slots: of the B texts, shape (B,), int64; None: the first B slots.
            limit: more than any of ``positions``; the fewer, the less is read. None: all.

        Returns:
            Logits, shape (B, T, vocabulary), in the dtype of the parameters; of a stage that is not
            the last, the residual stream, shape (B, T, width).
        """
        if self.first:
            x = self.embedding(x)
        place = self._place(x, cache, positions, slots, limit)
        attentions = 0
        for layer in self.layers.values():
            keys = values = None
            if cache is not None and layer.attends:
                keys, values = cache.keys[attentions], cache.values[attentions]
                attentions += 1
            x = layer(x, place, keys, values)
        return linear(self.norm(x), self.embedding.weight) if self.last else x

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
