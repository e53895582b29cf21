"""Cross-attention with the projections of queries and outputs folded into the keys and values of a prompt.

Scores are (x Wq_h^T) K_h^T = x (K_h Wq_h)^T and outputs P_h V_h Wo_h^T = P_h (V_h Wo_h^T). A prompt's keys and values
do not change from step to step, so both brackets are computed once for each prompt and layer; a step is then a product,
a softmax over groups of keys, and a product. (arXiv 2405.04434 does the same with the keys of a latent cache.) Weights
of a head add up to 1: with a share of the outputs' bias in the values of each head it costs nothing either.

Shapes: B rows of a batch, P prompts, N places of the picture, C its channels, H heads of D, L keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

# Rows of scores begin at multiples of 16 bytes in a two-byte type, as matrix products want them.
MULTIPLE = 8
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Projections:
    """Attributes: weights of the queries [H * D, C] and of the outputs [C, H * D], and the outputs' bias [C]."""

    query: Tensor
    output: Tensor
    bias: Tensor


@dataclass(frozen=True)
class Folded:
    """A prompt's keys and values with the projections in them.

    Attributes:
        key: [P, H * L', C], scaled; L' is L, or more where H * L is no multiple of `MULTIPLE`.
        value: [P, H * L', C], the bias in them.
        heads: H.
        length: L.
    """

    key: Tensor
    value: Tensor
    heads: int
    length: int

    @property
    def nbytes(self) -> int:
        """What is held for the prompts."""
        return self.key.nbytes + self.value.nbytes


def fold(projections: Projections, key: Tensor, value: Tensor, scale: float) -> Folded:
    """Fold the projections into keys and values [P, H, L, D], in float32 at least, once for each prompt."""
    heads, length, head_dim = key.shape[1:]
    exact = torch.promote_types(key.dtype, torch.float32)
    of_query = projections.query.to(exact).view(heads, head_dim, -1)
    of_output = projections.output.to(exact).view(-1, heads, head_dim).permute(1, 2, 0)
    rest = -length % MULTIPLE if heads * length % MULTIPLE else 0

    def folded(tensor: Tensor, weights: Tensor, bias: Tensor | float = 0.0) -> Tensor:
        # Of a head all prompts together: its weights are read once.
        rows = tensor.transpose(0, 1).flatten(1, 2)
        products = (rows @ weights + bias).unflatten(1, (-1, length)).transpose(0, 1)
        return F.pad(products, (0, 0, 0, rest)).flatten(1, 2).to(key.dtype)

    shares = projections.bias.to(exact) / heads
    both = folded(scale * key.to(exact), of_query), folded(value.to(exact), of_output, shares)
    return Folded(*both, heads, length)


def attend_folded(rows: Tensor, folded: Folded) -> Tensor:
    """Cross-attention of rows [B, N, C] after their norm: [B, N, C]. Rows of a batch that share a prompt follow one
    another; B is a multiple of P."""
    key, value, heads, length = folded.key, folded.value, folded.heads, folded.length
    together = rows.reshape(key.shape[0], -1, rows.shape[2])
    scores = (together @ key.mT).unflatten(2, (heads, -1))
    if scores.shape[3] > length:
        is_rest = torch.arange(scores.shape[3], device=scores.device) >= length
        scores = scores.masked_fill(is_rest, float("-inf"))
    return (scores.softmax(3).flatten(2) @ value).view(rows.shape)


def unavoidable(rows: Tensor, folded: Folded) -> float:
    """What no order of adding up avoids, for the tolerance rule: one rounding of the largest sum of absolute terms,
    which grows with the largest score."""
    both = Folded(folded.key.double(), folded.value.double().abs(), folded.heads, folded.length)
    score = (rows.double().reshape(both.key.shape[0], -1, rows.shape[2]) @ both.key.mT).abs().max().item()
    eps = min(torch.finfo(rows.dtype).eps, torch.finfo(torch.float32).eps)
    return eps * (1 + score) * attend_folded(rows.double(), both).max().item()


def attend_projected(
    rows: Tensor, projections: Projections, key: Tensor, value: Tensor, attend: Attend = F.scaled_dot_product_attention
) -> Tensor:
    """The same as layers compute it: queries, attention to keys and values [B, H, L, D], outputs."""
    heads = key.shape[1]
    query = F.linear(rows, projections.query).unflatten(2, (heads, -1)).transpose(1, 2)
    return F.linear(attend(query, key, value).transpose(1, 2).flatten(2), projections.output, projections.bias)
