"""The position-wise feed-forward block, plain or gated."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Literal

import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn.gated_activation import GATES, gated
from mmattn.nn.names import OUR_FEED_FORWARD, FeedForwardNames, find, place
from mmattn.nn.shared_input import shared_input
from mmattn.ops.request import check_dropout

ActivationName = Literal["gelu", "gelu_tanh", "relu", "silu", "geglu", "swiglu"]

_PLAIN: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "silu": F.silu,
}


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
        names: Under which the Linears are registered, and whether a gated block's first two are one. Whatever they
            are, `up_proj`, `gate_proj` and `down_proj` read them.

    Raises:
        UsageError: When the activation is unknown, or a number is out of range.
    """

    def __init__(
        self,
        embed_dim: int,
        ffn_dim: int,
        *,
        activation: ActivationName = "gelu",
        dropout_p: float = 0.0,
        bias: bool = True,
        names: FeedForwardNames = OUR_FEED_FORWARD,
    ) -> None:
        super().__init__()
        if activation not in _PLAIN and activation not in GATES:
            known = ", ".join([*_PLAIN, *GATES])
            raise UsageError(f"activation {activation!r} is unknown: use one of {known}")
        for name, size in (("embed_dim", embed_dim), ("ffn_dim", ffn_dim)):
            if size < 1:
                raise UsageError(f"FeedForward: {name} is {size}, it must be at least 1")
        check_dropout("FeedForward", "dropout_p", dropout_p, may_drop_all=True)
        self.activation = activation
        self.is_gated = activation in GATES
        self.dropout_p = dropout_p
        self._up_path, self._down_path = tuple(names.up.split(".")), tuple(names.down.split("."))
        self._gate_path = None if names.gate is None or not self.is_gated else tuple(names.gate.split("."))
        is_joined = self.is_gated and self._gate_path is None
        place(self, self._up_path, nn.Linear(embed_dim, 2 * ffn_dim if is_joined else ffn_dim, bias=bias))
        if self._gate_path is not None:
            place(self, self._gate_path, nn.Linear(embed_dim, ffn_dim, bias=bias))
        place(self, self._down_path, nn.Linear(ffn_dim, embed_dim, bias=bias))

    @property
    def up_proj(self) -> nn.Linear:
        """The first Linear, or what took its place; with the gate's rows after its own where they are joined."""
        return find(self, self._up_path)  # pyright: ignore[reportReturnType]

    @property
    def gate_proj(self) -> nn.Linear | None:
        """The gate's Linear, or what took its place; None where there is none, or it is joined with `up_proj`."""
        return None if self._gate_path is None else find(self, self._gate_path)  # pyright: ignore[reportReturnType]

    @property
    def down_proj(self) -> nn.Linear:
        """The last Linear, or what took its place."""
        return find(self, self._down_path)  # pyright: ignore[reportReturnType]

    def forward(self, x: Tensor) -> Tensor:
        """Map x `[..., C]` to `[..., C]`."""
        if not self.is_gated:
            hidden = _PLAIN[self.activation](self.up_proj(x))
        elif (gate_proj := self.gate_proj) is not None:
            x = shared_input(x, gate_proj, self.up_proj)
            hidden = GATES[self.activation].activation(gate_proj(x)) * self.up_proj(x)
        else:
            hidden = gated(self.up_proj(x), GATES[self.activation])
        if self.training and self.dropout_p > 0:
            hidden = F.dropout(hidden, self.dropout_p)
        return self.down_proj(hidden)

    def extra_repr(self) -> str:
        """What `print(module)` adds."""
        return f"activation={self.activation!r}"
