"""Our attention processors, one a contract. They call the projections as modules, so that LoRA, DoRA, quantised and
offloaded layers work; they are made without arguments, as diffusers makes processors anew when adapters come and go;
and they subclass the stock class that diffusers' own code asks for."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import (
    AttnAddedKVProcessor2_0,
    AttnProcessor2_0,
    JointAttnProcessor2_0,
)
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.swap.diffusers.context_cache import KeyValue
from mmattn.swap.diffusers.layer import Swapped, enter, head_dim_of, leave, normed_heads, split_heads


def project_text(attn: Any, context: Tensor, head_dim: int) -> KeyValue:
    """Keys and values [B, G, Lk, D] of a context [B, Lk, C]."""
    if attn.norm_cross is not None:
        context = attn.norm_encoder_hidden_states(context)
    return _project_keys(attn, context, head_dim)


def _project_keys(attn: Any, states: Tensor, head_dim: int) -> KeyValue:
    key = normed_heads(attn.norm_k, attn.to_k(states), head_dim)
    return key, split_heads(attn.to_v(states), head_dim)


def attend_plainly(
    processor: Swapped, attn: Any, states: Tensor, context: Tensor | None, mask: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Self-attention of `states` [B, L, C], or cross-attention to `context` [B, Lk, C']: query [B, H, L, D] and the
    joined output [B, L, H x D]."""
    query = attn.to_q(states)
    head_dim = head_dim_of(attn, query)
    query = normed_heads(attn.norm_q, query, head_dim)
    batch = query.shape[0]
    if context is None:
        keys, valid = _project_keys(attn, states, head_dim), None
    else:
        valid = processor.valid_keys(mask, context)
        modules = (attn.norm_cross, attn.to_k, attn.to_v, attn.norm_k)
        keys = processor.project_context(attn, context, valid, modules, lambda kept: project_text(attn, kept, head_dim))
    if valid is not None:
        output = processor.attend(attn, query, keys, key_mask=valid.key_mask)
    else:
        bias = processor.bias(attn, mask, batch, keys[0].shape[2])
        # diffusers' kernels know only causality from the first query on; both agree, since L == Lk here.
        is_causal = attn.is_causal and context is None
        output = processor.attend(attn, query, keys, attn_mask=bias, is_causal=is_causal)
    return query, output


class SwappedAttnProcessor(Swapped, AttnProcessor2_0):
    """Self- and cross-attention of U-Nets, ControlNets, VAEs and plain transformers: all that
    `diffusers.models.attention_processor.Attention` offers, with nothing skipped that the module has."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """[B, L, C] or [B, C, height, width] to the same shape; see diffusers for the arguments."""
        gate = self.settings.gate
        if gate is not None and (reused := gate.reused(self, hidden_states)) is not None:
            return reused
        states, shape = enter(attn, hidden_states, temb)
        _, output = attend_plainly(self, attn, states, encoder_hidden_states, attention_mask)
        output = leave(attn, output, hidden_states, shape)
        return output if gate is None else gate.noted(self, output)


class SwappedAddedKVAttnProcessor(Swapped, AttnAddedKVProcessor2_0):
    """Attention of Kandinsky 2, DeepFloyd IF and unCLIP: keys and values of the text stand before those of the picture
    itself, or alone."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """[B, C, height, width] (or [B, C, L]) to the same shape; see diffusers for the arguments."""
        states = hidden_states.flatten(2).transpose(1, 2)
        context = states if encoder_hidden_states is None else encoder_hidden_states
        states = attn.group_norm(states.transpose(1, 2)).transpose(1, 2)
        query = attn.to_q(states)
        head_dim = head_dim_of(attn, query)
        query, batch = split_heads(query, head_dim), query.shape[0]

        def project(kept: Tensor) -> KeyValue:
            if encoder_hidden_states is not None and attn.norm_cross is not None:
                kept = attn.norm_encoder_hidden_states(kept)
            return split_heads(attn.add_k_proj(kept), head_dim), split_heads(attn.add_v_proj(kept), head_dim)

        if encoder_hidden_states is None:
            key, value = project(context)
        else:
            modules = (attn.norm_cross, attn.add_k_proj, attn.add_v_proj)
            key, value = self.project_context(attn, context, None, modules, project)
        bias = None if attention_mask is None else self.bias(attn, attention_mask, batch, key.shape[2])
        if not attn.only_cross_attention:
            own = split_heads(attn.to_k(states), head_dim), split_heads(attn.to_v(states), head_dim)
            key, value = torch.cat([key, own[0]], dim=2), torch.cat([value, own[1]], dim=2)
            if bias is not None:  # the picture's own tokens are never masked
                bias = torch.nn.functional.pad(bias, (0, states.shape[1]))
        output = self.attend(attn, query, (key, value), attn_mask=bias)
        output = attn.to_out[1](attn.to_out[0](output))
        return output.transpose(-1, -2).reshape(hidden_states.shape) + hidden_states


class SwappedJointAttnProcessor(Swapped, JointAttnProcessor2_0):
    """Attention of SD3: picture and text in one softmax. Padding is part of it and is never left out."""

    def __init__(self) -> None:
        super().__init__()
        self.prepare()

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Any:
        """Picture [B, L, C] and text [B, Lk, C] to both, or the picture alone; see diffusers for the arguments."""
        if attention_mask is not None:
            raise UsageError(f"{self.settings.where}: joint attention takes no attention_mask (stock drops it unseen)")
        own = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        head_dim = head_dim_of(attn, own[0])
        query, key, value = self._heads(own, attn.norm_q, attn.norm_k, head_dim)
        if encoder_hidden_states is not None:
            added = tuple(to(encoder_hidden_states) for to in (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj))
            text = self._heads(added, attn.norm_added_q, attn.norm_added_k, head_dim)
            query, key, value = (torch.cat(pair, dim=2) for pair in zip((query, key, value), text, strict=True))
        output = self.attend(attn, query, (key, value))
        if encoder_hidden_states is None:
            return attn.to_out[1](attn.to_out[0](output))
        length = hidden_states.shape[1]
        picture, words = output[:, :length], output[:, length:]
        if not attn.context_pre_only:
            words = attn.to_add_out(words)
        return attn.to_out[1](attn.to_out[0](picture)), words

    @staticmethod
    def _heads(projected: tuple[Tensor, ...], norm_q: Any, norm_k: Any, head_dim: int) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value = projected
        return normed_heads(norm_q, query, head_dim), normed_heads(norm_k, key, head_dim), split_heads(value, head_dim)
