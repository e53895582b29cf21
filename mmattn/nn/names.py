"""Under which names the blocks register their parts: ours, or those that a stock model's state dict, LoRA files and
peft targets address.

A name may be a path: the part is then held by plain containers, which come into being with it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from torch import nn


@dataclass(frozen=True)
class AttentionNames:
    """The Linears of an attention; only `out` may be a path."""

    query: str = "q_proj"
    key: str = "k_proj"
    value: str = "v_proj"
    out: str = "out_proj"


@dataclass(frozen=True)
class FeedForwardNames:
    """The Linears of a feed-forward block.

    Without a `gate`, `up` holds both of a gated block in one product: the value's half first, then the gate's.
    """

    up: str = "up_proj"
    gate: str | None = "gate_proj"
    down: str = "down_proj"


OUR_ATTENTION = AttentionNames()
OUR_FEED_FORWARD = FeedForwardNames()


@dataclass(frozen=True)
class LayerNames:
    """The parts of a transformer layer, and the Linears in them."""

    self_attn_norm: str = "self_attn_norm"
    self_attn: str = "self_attn"
    cross_attn_norm: str = "cross_attn_norm"
    cross_attn: str = "cross_attn"
    ffn_norm: str = "ffn_norm"
    ffn: str = "ffn"
    attention: AttentionNames = OUR_ATTENTION
    feed_forward: FeedForwardNames = OUR_FEED_FORWARD


OUR_LAYER = LayerNames()
DIFFUSERS_ATTENTION = AttentionNames(query="to_q", key="to_k", value="to_v", out="to_out.0")
DIFFUSERS_FEED_FORWARD = FeedForwardNames(up="net.0.proj", gate=None, down="net.2")
DIFFUSERS_LAYER = LayerNames(
    self_attn_norm="norm1",
    self_attn="attn1",
    cross_attn_norm="norm2",
    cross_attn="attn2",
    ffn_norm="norm3",
    ffn="ff",
    attention=DIFFUSERS_ATTENTION,
    feed_forward=DIFFUSERS_FEED_FORWARD,
)


def place(owner: nn.Module, path: Sequence[str], part: nn.Module) -> None:
    """Register a part at a path below its owner.

    Numbered parts are held by a `Sequential`, whose gaps are filled with `Identity`, so that it can be indexed; named
    ones by a bare module.
    """
    for name, below in itertools.pairwise(path):
        if owner._modules.get(name) is None:
            _register(owner, name, nn.Sequential() if below.isdecimal() else nn.Module())
        owner = cast(nn.Module, owner._modules[name])
    _register(owner, path[-1], part)


def _register(owner: nn.Module, name: str, part: nn.Module) -> None:
    if isinstance(owner, nn.Sequential):
        while len(owner) < int(name):
            owner.append(nn.Identity())
    # Not `add_module`: it refuses a name that is a property of the owner, as our own names are.
    setattr(owner, name, part)


def find(owner: nn.Module, path: Sequence[str]) -> nn.Module:
    """The part at a path below its owner."""
    for name in path:
        # Past `nn.Module.__getattr__`, which decoding feels.
        owner = owner._modules[name]  # pyright: ignore[reportAssignmentType]
    return owner
