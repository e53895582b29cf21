"""Tokens that a swapped layer leaves out as padding, and where those that it keeps stood.

Padding at the end needs none of this: what is kept stays at its place.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from mmattn.swap.parts import is_diffusers


def kept_places(module: nn.Module) -> tuple[int | None, Tensor | None]:
    """Of the forward that a layer has just run: how many tokens the text had, where some may have been left out; and
    the places `[B, L]` in it of the keys of each row, where they are not at their own."""
    if not is_diffusers(module):
        return None, None
    from mmattn.swap.diffusers.padding import kept_keys

    valid = kept_keys(getattr(module, "processor", None))
    return (None, None) if valid is None else (valid.total, valid.index)


def put_back(weights: Tensor, places: Tensor, count: int, kept: Sequence[int] | None) -> Tensor:
    """A row's weights `[H, C, L]` at their places among `count` tokens, of which `kept` are wanted; 0 elsewhere."""
    whole = weights.new_zeros(*weights.shape[:-1], count)
    whole.scatter_(-1, places.to(weights.device).expand_as(weights), weights)
    return whole if kept is None else whole[..., list(kept)]
