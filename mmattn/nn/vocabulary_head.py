"""The last product of a text network: hidden states to a score for each token of the vocabulary."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.nn.feed_forward import ActivationName, plain_activation


class VocabularyHead(nn.Module):
    """Hidden states to logits, with the word embedding's matrix or one of its own.

    Args:
        embed_dim: C.
        vocab_size: V.
        is_tied: the matrix is handed in at each call (the word embedding's), else it is `weight`.
        bias: "trained" (a parameter), "fixed" (a buffer, as Marian has it) or None.
        transform: activation of a dense layer with a norm before the product, as in BERT (arXiv 1810.04805); None:
            no such layer.
        norm_eps: of that norm.
        weight_std: spread of a matrix of its own at the start.

    Attributes:
        fixed_token: a token whose vector in the word embedding the training loss leaves as it is; None for none.
    """

    fixed_token: int | None = None

    def __init__(
        self,
        embed_dim: int,
        vocab_size: int,
        *,
        is_tied: bool = True,
        bias: Literal["trained", "fixed"] | None = "trained",
        transform: ActivationName | None = None,
        norm_eps: float = 1e-5,
        weight_std: float = 0.02,
    ) -> None:
        super().__init__()
        self.has_transform = transform is not None
        if transform is not None:
            self.activation = plain_activation(transform)
            self.dense = nn.Linear(embed_dim, embed_dim)
            self.norm = nn.LayerNorm(embed_dim, eps=norm_eps)
        self.register_parameter("weight", None)
        if not is_tied:
            self.weight = nn.Parameter(torch.empty(vocab_size, embed_dim))
            nn.init.normal_(self.weight, std=weight_std)
        self.bias: Tensor | None
        if bias == "trained":
            self.bias = nn.Parameter(torch.zeros(vocab_size))
        elif bias == "fixed":
            self.register_buffer("bias", torch.zeros(vocab_size))
        else:
            self.bias = None

    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        """`[..., C]` to `[..., V]`; `word_embedding [V, C]` serves where the head has no matrix of its own."""
        return self.product(self.transformed(hidden), word_embedding if self.weight is None else self.weight, self.bias)

    def transformed(self, hidden: Tensor) -> Tensor:
        """`[..., C]` to `[..., C]`: the dense layer and norm, where there are any."""
        return self.norm(self.activation(self.dense(hidden))) if self.has_transform else hidden

    def product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product with the matrix; inference puts another form of it here."""
        return F.linear(hidden, weight, bias)
