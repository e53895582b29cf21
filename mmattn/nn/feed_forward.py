"""The position-wise feed-forward block, plain or gated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.errors import UsageError

ActivationName = Literal["gelu", "gelu_tanh", "relu", "silu", "geglu", "swiglu"]

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}
_GATED: dict[str, Callable[[Tensor], Tensor]] = {"geglu": F.gelu, "swiglu": F.silu}


def plain_activation(name: ActivationName) -> Callable[[Tensor], Tensor]:
    """The function of an activation that is not gated.

    Raises:
        UsageError: When it is unknown, or gated.
    """
    if name not in _PLAIN:
        raise UsageError(f"activation {name!r} is unknown here: use one of {', '.join(_PLAIN)}")
    return _PLAIN[name]


class FeedForward(nn.Module):
    """`down_proj(act(up_proj(x)))`, or `down_proj(act(gate_proj(x)) * up_proj(x))` when gated (arXiv 2002.05202).

    Args:
        embed_dim: C, width of input and output.
        ffn_dim: Width between the two products.
        activation: "gelu", "gelu_tanh", "relu", "silu"; gated: "geglu", "swiglu".
        dropout_p: Dropout on the activation, in training only.
        bias: Whether the Linears have a bias.

    Raises:
        UsageError: When the activation is unknown.
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int,
        *,
        activation: ActivationName = "gelu",
        dropout_p: float = 0.0,
        bias: bool = True,
    ) -> None:
        super().__init__()
        if activation not in _PLAIN and activation not in _GATED:
            names = ", ".join([*_PLAIN, *_GATED])
            raise UsageError(f"activation {activation!r} is unknown: use one of {names}")
        self.activation = activation
        self.is_gated = activation in _GATED
        self.dropout_p = dropout_p
        self.up_proj = nn.Linear(embed_dim, ffn_dim, bias=bias)
        if self.is_gated:
            self.gate_proj = nn.Linear(embed_dim, ffn_dim, bias=bias)
        self.down_proj = nn.Linear(ffn_dim, embed_dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map x `[..., C]` to `[..., C]`."""
        if self.is_gated:
            hidden = _GATED[self.activation](self.gate_proj(x)) * self.up_proj(x)
        else:
            hidden = _PLAIN[self.activation](self.up_proj(x))
        if self.training and self.dropout_p > 0:
            hidden = F.dropout(hidden, self.dropout_p)
        return self.down_proj(hidden)

    def extra_repr(self) -> str:
        """What `print(module)` adds."""
        return f"activation={self.activation!r}"
