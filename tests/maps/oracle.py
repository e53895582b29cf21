"""Attention weights of a diffusion model the slow way: from the layers' own projections, in any dtype."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor, nn


class Found(dict[int, list[Tensor]]):
    """Weights [R, H, Lq, Lk] of every call by layer, and the largest absolute score of all."""

    largest_score = 0.0


@contextlib.contextmanager
def eager_weights(model: nn.Module, names: dict[int, str], dtype: torch.dtype):
    """Within the block every call of the named layers adds its weights [R, H, Lq, Lk] to `found[number]`.

    Rows of a model of ours that share a prompt are told apart again.
    """
    found = Found({number: [] for number in names})
    handles = []
    for number, name in names.items():
        module: Any = model.get_submodule(name)

        def look(module: Any, args: Any, kwargs: Any, output: Any, number: int = number) -> None:
            states = args[0] if args else kwargs["hidden_states"]
            context = kwargs.get("encoder_hidden_states", args[1] if len(args) > 1 else None)
            scores = _scores(module, states, context, dtype)
            found.largest_score = max(found.largest_score, scores[scores.isfinite()].abs().max().item())
            found[number].append(scores.softmax(-1))

        handles.append(module.register_forward_hook(look, with_kwargs=True))
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def _scores(module: Any, states: Tensor, context: Any, dtype: torch.dtype) -> Tensor:
    context = context[0] if isinstance(context, tuple) else context
    if hasattr(module, "q_proj"):
        heads, query = module.num_heads, module.q_proj(states)
        key = context.key.transpose(1, 2).flatten(2) if hasattr(context, "key") else module.k_proj(context)
    else:
        heads, query, key = module.heads, module.to_q(states), module.to_k(context)
    key = key.repeat_interleave(query.shape[0] // key.shape[0], dim=0)
    query, key = (each.to(dtype).unflatten(-1, (heads, -1)).transpose(1, 2) for each in (query, key))
    scores = query @ key.mT * query.shape[-1] ** -0.5
    mask = getattr(context, "key_mask", None)
    if mask is not None:
        mask = mask.repeat_interleave(query.shape[0] // mask.shape[0], dim=0)
        scores = scores.masked_fill(~mask[:, None, None, :], float("-inf"))
    return scores
