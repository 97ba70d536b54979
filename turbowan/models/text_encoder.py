"""The umT5 encoder in the form Wan uses it: few launches, and nothing waits for the GPU.

Source: T5 (google-research/text-to-text-transfer-transformer); umT5 gives every layer a position bias of its own.
Parameter names are those of `transformers`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops

BUCKETS, FARTHEST = 32, 128  # of the position bias; from so many tokens apart all distances share a bucket
EPS = 1e-6


@dataclass(frozen=True)
class TextSizes:
    """Of an umT5 encoder; 256384, 4096, 24, 64, 64 and 10240 in umT5-xxl."""

    vocabulary: int
    width: int
    layers: int
    heads: int
    head_width: int
    hidden: int


class Norm(nn.Module):
    """Root-mean-square norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return ops.rms_norm(x, self.weight, EPS)


class SelfAttention(nn.Module):
    """Attention of all tokens to all, unscaled, with a bias that depends on distance."""

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        inner = sizes.heads * sizes.head_width
        self.q, self.k, self.v = (_linear(sizes.width, inner, sizes.width) for _ in range(3))
        nn.init.normal_(self.q.weight, std=(sizes.width * sizes.head_width) ** -0.5)  # in place of a scale
        self.o = _linear(inner, sizes.width, inner)
        self.relative_attention_bias = nn.Embedding(BUCKETS, sizes.heads)
        nn.init.normal_(self.relative_attention_bias.weight, std=sizes.width**-0.5)
        self._head_width = sizes.head_width

    def forward(self, x: Tensor, buckets: Tensor, hidden: Tensor | None) -> Tensor:
        batch, length, _ = x.shape
        q, k, v = (self._heads(layer(x)) for layer in (self.q, self.k, self.v))
        bias = self.relative_attention_bias.weight.t()[:, buckets].to(x.dtype)  # [heads, L, L]
        if hidden is not None:
            bias = (bias + hidden).flatten(0, 1)
        elif batch > 1:
            bias = bias.repeat(batch, 1, 1)
        scores = torch.baddbmm(bias, q, k.transpose(1, 2))
        out = torch.bmm(scores.softmax(dim=-1), v).unflatten(0, (batch, -1))
        return self.o(out.transpose(1, 2).reshape(batch, length, -1))  # type: ignore[no-any-return]

    def _heads(self, x: Tensor) -> Tensor:
        """[B, L, heads * D] -> [B * heads, L, D], for one sample without a copy."""
        return x.unflatten(-1, (-1, self._head_width)).transpose(1, 2).flatten(0, 1)


class FeedForward(nn.Module):
    """Gated GELU."""

    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.wi_0, self.wi_1 = (_linear(sizes.width, sizes.hidden, sizes.width) for _ in range(2))
        self.wo = _linear(sizes.hidden, sizes.width, sizes.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))  # type: ignore[no-any-return]


class AttentionLayer(nn.Module):
    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.SelfAttention, self.layer_norm = SelfAttention(sizes), Norm(sizes.width)

    def forward(self, x: Tensor, buckets: Tensor, hidden: Tensor | None) -> Tensor:
        return _finite(x + self.SelfAttention(self.layer_norm(x), buckets, hidden))


class FeedForwardLayer(nn.Module):
    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.DenseReluDense, self.layer_norm = FeedForward(sizes), Norm(sizes.width)

    def forward(self, x: Tensor) -> Tensor:
        return _finite(x + self.DenseReluDense(self.layer_norm(x)))


class Block(nn.Module):
    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(sizes), FeedForwardLayer(sizes)])

    def forward(self, x: Tensor, buckets: Tensor, hidden: Tensor | None) -> Tensor:
        return self.layer[1](self.layer[0](x, buckets, hidden))  # type: ignore[no-any-return]


class Stack(nn.Module):
    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.block = nn.ModuleList(Block(sizes) for _ in range(sizes.layers))
        self.final_layer_norm = Norm(sizes.width)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        buckets = position_buckets(x.shape[1]).to(x.device, non_blocking=True)
        hidden = None
        if mask is not None:  # [B, 1, 1, L], as low as the dtype goes at keys that are not there
            hidden = (1 - mask[:, None, None].to(x.dtype)) * torch.finfo(x.dtype).min
        for block in self.block:
            x = block(x, buckets, hidden)
        return self.final_layer_norm(x)  # type: ignore[no-any-return]


class Model(nn.Module):
    def __init__(self, sizes: TextSizes) -> None:
        super().__init__()
        self.shared, self.encoder = nn.Embedding(sizes.vocabulary, sizes.width), Stack(sizes)

    def forward(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        return self.encoder(self.shared(ids), mask)  # type: ignore[no-any-return]


class TextEncoder(nn.Module):
    """umT5 with the rows past the prompt set to zero.

    Args:
        vocabulary, width, layers, heads, head_width, hidden: see `TextSizes`.
    """

    def __init__(self, vocabulary: int, width: int, layers: int, heads: int, head_width: int, hidden: int) -> None:
        super().__init__()
        self.sizes = TextSizes(vocabulary, width, layers, heads, head_width, hidden)
        self.model = Model(self.sizes)

    @property
    def width(self) -> int:
        return self.sizes.width

    @property
    def blocks(self) -> nn.ModuleList:
        """In the order they run."""
        return self.model.encoder.block

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Token ids to embeddings.

        Args:
            ids: int64 [B, L]. mask: [B, L], 1 at the prompt's tokens; None where all are.

        Returns:
            [B, L, D] in the weights' dtype; rows where the mask is 0 are zero.
        """
        text = self.model(ids, mask)
        return text if mask is None else text * mask.unsqueeze(-1).to(text.dtype)


def position_buckets(length: int) -> Tensor:
    """int64 [L, L]: the bucket of each key's (column's) distance from each query (row), 16 for either direction.

    Half of them stand for one distance each, the others for ranges that grow by the same factor up to FARTHEST.
    """
    place = torch.arange(length)
    offset = place[None, :] - place[:, None]
    one_way, exact = BUCKETS // 2, BUCKETS // 4
    distance = offset.abs()
    growth = torch.log(distance.clamp(min=1).float() / exact) / math.log(FARTHEST / exact) * (one_way - exact)
    far = (exact + growth.long()).clamp(max=one_way - 1)
    return torch.where(distance < exact, distance, far) + (offset > 0) * one_way


def _linear(inputs: int, outputs: int, fan: int) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, bias=False)
    nn.init.normal_(layer.weight, std=fan**-0.5)
    return layer


def _finite(x: Tensor) -> Tensor:
    """In float16 sums of umT5's layers can pass the largest number."""
    if x.dtype != torch.float16:
        return x
    largest = torch.finfo(x.dtype).max - 1000
    return x.clamp(-largest, largest)
