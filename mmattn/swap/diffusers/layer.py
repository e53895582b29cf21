"""What all our processors share: the way into attention and out of it, projections, masks, the attention itself.

Shapes: B batch, L queries, Lk keys, C channels, H query heads, G key/value heads, D head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import Tensor, nn

from mmattn.swap.attend import attend, reference_kind
from mmattn.swap.diffusers.context_cache import ContextCache, KeyValue
from mmattn.swap.diffusers.gate import Gate
from mmattn.swap.diffusers.padding import PaddingReader, ValidKeys, as_bias, note_kept


@dataclass(eq=False)
class Settings:
    """How a swapped layer is to work.

    Attributes:
        backend: a name of `mmattn.backends()`, or "auto".
        role: "self", "cross" or None, for `mmattn.use_backend`.
        cache_context: keep the text's keys and values while the text stays the same.
        drop_padding: leave padded text tokens out where a mask says which they are.
        where: the layer's name, for messages.
        padding: reads masks; shared by the layers of a model.
        gate: reuses outputs of cross-attention after some step; shared by the layers of a model.
        stock: the processor that was there before.
    """

    backend: str = "auto"
    role: str | None = None
    cache_context: bool = False
    drop_padding: bool = True
    where: str = "an attention layer"
    padding: PaddingReader = field(default_factory=PaddingReader)
    gate: Gate | None = None
    stock: Any = None


class Swapped:
    """Mixin of our processors. `_attention_backend` is what diffusers' own `set_attention_backend` sets: while it is
    set, attention goes through diffusers' dispatcher to that backend; None means ours."""

    settings: Settings
    context_cache: ContextCache
    _attention_backend: Any
    _parallel_config: Any

    def prepare(self) -> None:
        """Give a new processor its defaults; every processor can be made without arguments, as diffusers does."""
        self.settings = Settings()
        self.context_cache = ContextCache()
        self._attention_backend = None
        self._parallel_config = None

    def attend(
        self,
        attn: nn.Module,
        query: Tensor,
        keys: KeyValue,
        *,
        attn_mask: Tensor | None = None,
        key_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """Attention over [B, H, L, D], joined to [B, L, H x D]."""
        scale: float = attn.scale  # pyright: ignore[reportAssignmentType]
        if self._attention_backend is not None and reference_kind() is None:
            output = self._through_diffusers(query, keys, attn_mask, key_mask, is_causal, scale)
        else:
            output = attend(
                query,
                *keys,
                attn_mask=attn_mask,
                key_mask=key_mask,
                is_causal=is_causal,
                scale=scale,
                role=self.settings.role,
                backend=self.settings.backend,
                caller=attn,
            ).transpose(1, 2)
        return output.flatten(2).to(query.dtype)

    def _through_diffusers(
        self,
        query: Tensor,
        keys: KeyValue,
        attn_mask: Tensor | None,
        key_mask: Tensor | None,
        is_causal: bool,
        scale: float,
    ) -> Tensor:
        if key_mask is not None:
            attn_mask = key_mask[:, None, None, :]
        query, key, value = (tensor.transpose(1, 2) for tensor in (query, *keys))
        return dispatch_attention_fn(
            query,
            key,
            value,
            attn_mask=attn_mask,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=query.shape[2] != key.shape[2],
            backend=self._attention_backend,
            parallel_config=self._parallel_config,
        )

    def project_context(
        self, attn: Any, context: Tensor, valid: ValidKeys | None, modules: tuple[nn.Module | None, ...], project: Any
    ) -> KeyValue:
        """`project(context)` over the valid tokens only, remembered where that is wanted and safe.

        Args:
            attn: the attention module.
            context: [B, Lk, C].
            valid: which tokens are real.
            modules: everything that `project` uses.
            project: a context to (key, value).
        """

        def run() -> KeyValue:
            return project(context if valid is None else valid.keep(context))

        if not self.settings.cache_context or torch.compiler.is_compiling():
            return run()
        if torch.is_grad_enabled() or attn.training:
            self.context_cache.clear()
            return run()
        return self.context_cache.fetch(context, modules, run, None if valid is None else valid.identity)

    def valid_keys(self, mask: Tensor | None, context: Tensor) -> ValidKeys | None:
        """Which tokens of the context are real, where a mask says so and padding is to be left out."""
        if torch.compiler.is_compiling():
            return None
        valid = None
        # A mask of another length is for `bias` to complain about.
        if mask is not None and self.settings.drop_padding and mask.shape[-1] == context.shape[1]:
            valid = self.settings.padding.read(mask, context.shape[0])
        note_kept(self, valid)
        return valid

    def bias(self, attn: Any, mask: Tensor | None, batch: int, num_keys: int) -> Tensor | None:
        """An `attention_mask` as it is added to the scores."""
        return None if mask is None else as_bias(mask, batch, attn.heads, num_keys, where=self.settings.where)


def enter(attn: Any, hidden_states: Tensor, temb: Tensor | None) -> tuple[Tensor, torch.Size | None]:
    """Normalise and flatten a layer's input, pictures [B, C, height, width] included: [B, L, C], and their shape."""
    if attn.spatial_norm is not None:
        hidden_states = attn.spatial_norm(hidden_states, temb)
    shape = None
    if hidden_states.dim() == 4:
        shape = hidden_states.shape
        hidden_states = hidden_states.flatten(2).transpose(1, 2)
    if attn.group_norm is not None:
        hidden_states = attn.group_norm(hidden_states.transpose(1, 2)).transpose(1, 2)
    return hidden_states, shape


def leave(attn: Any, hidden_states: Tensor, residual: Tensor, shape: torch.Size | None) -> Tensor:
    """Output projection and dropout, the picture's shape, residual and rescaling."""
    hidden_states = attn.to_out[1](attn.to_out[0](hidden_states))
    if shape is not None:
        hidden_states = hidden_states.transpose(-1, -2).reshape(shape)
    if attn.residual_connection:
        hidden_states = hidden_states + residual
    return hidden_states / attn.rescale_output_factor if attn.rescale_output_factor != 1 else hidden_states


def split_heads(states: Tensor, head_dim: int) -> Tensor:
    """[B, L, H x D] to [B, H, L, D], without a copy."""
    return states.unflatten(-1, (-1, head_dim)).transpose(1, 2)


def head_dim_of(attn: Any, query: Tensor) -> int:
    """D of a projected query [B, L, H x D]."""
    return query.shape[-1] // attn.heads


def normed_heads(norm: Any, states: Tensor, head_dim: int) -> Tensor:
    """Queries or keys [B, L, H x D] as heads [B, H, L, D], normed head by head or, as Sana does, across all heads."""
    if norm is None:
        return split_heads(states, head_dim)
    size = getattr(norm, "normalized_shape", None) or getattr(norm, "dim", None)
    if isinstance(size, tuple) and size[-1] == states.shape[-1]:
        return split_heads(norm(states), head_dim)
    return norm(split_heads(states, head_dim))
