"""The sizes of a decoder of the Llama kind, and what follows from them; without torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from distbench.errors import UsageError

PROMPT, OUTPUT, SLOTS = 32, 32, 8
"""Tokens of a sample of ``llama``, and texts that are written together, where nothing is asked."""


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
            raise UsageError("every size of a decoder must be at least 1")
        if self.width % (2 * self.heads) or self.heads % self.kv_heads:
            raise UsageError(
                f"{self.heads} heads do not divide a width of {self.width} into even parts, or "
                f"{self.kv_heads} key and value heads do not divide {self.heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.width // self.heads

    @property
    def attention_weights(self) -> int:
        """Parameters of one layer's attention and its norm."""
        return 2 * self.width * (self.width + self.kv_heads * self.head_dim) + self.width

    @property
    def feed_weights(self) -> int:
        """Parameters of one layer's feed-forward part and its norm."""
        return 3 * self.width * self.hidden + self.width

    @property
    def embedding_weights(self) -> int:
        """Parameters of the embedding, which is the head too."""
        return self.vocabulary * self.width

    @property
    def matrix_weights(self) -> int:
        """Parameters that are multiplied with every token: all but the norms."""
        return self.weights - (2 * self.layers + 1) * self.width

    @property
    def weights(self) -> int:
        """Parameters of the whole network."""
        layer = self.attention_weights + self.feed_weights
        return self.layers * layer + self.embedding_weights + self.width


TRAINED = NetConfig()
"""The sizes of the trained weights."""


def llama_config(values: Mapping[str, Any]) -> NetConfig:
    """Return the sizes of a ``llama``.

    Args:
        values: layers, d (width), heads, kv_heads, hidden, vocabulary; whatever is not given has a
            default, kv_heads a quarter of the heads and hidden 8/3 of the width.

    Raises:
        UsageError: they do not fit together.
    """
    width, heads = values.get("d", 256), values.get("heads", 8)
    return NetConfig(
        vocabulary=values.get("vocabulary", 256),
        width=width,
        layers=values.get("layers", 8),
        heads=heads,
        kv_heads=values.get("kv_heads", max(1, heads // 4)),
        hidden=values.get("hidden", 8 * width // 3 // 32 * 32 or 32),
    )
