"""The transformer block of diffusers' U-Nets, on the shared layer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from diffusers.models.activations import GEGLU
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.models.unet.context import UNetContext
from mmattn.nn.cross_attention import CrossAttention
from mmattn.nn.layer import TransformerLayer
from mmattn.nn.names import DIFFUSERS_LAYER
from mmattn.nn.norms import make_norm

# They compute attention and nothing else, so that there is nothing to lose with them.
_PLAIN_PROCESSORS = (AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor, XFormersAttnProcessor)


class TransformerBlock(TransformerLayer):
    """A `TransformerLayer` under stock's names (`attn1`, `attn2`, `ff`, `norm1` to `norm3`), called as stock calls it.

    Args:
        stock: The block to replace: its parameters become this block's, without a copy.
        name: Of the block in its network, for messages.

    Raises:
        UsageError: When the block has what this one cannot do.
    """

    def __init__(self, stock: BasicTransformerBlock, name: str) -> None:
        refusal = block_refusal(stock)
        if refusal is not None:
            raise UsageError(
                f"UNet: {name} {refusal}, which mmattn's blocks do not do: use diffusers' class, with"
                " mmattn.swap_attention where it can be swapped"
            )
        only_cross = bool(stock.only_cross_attention)
        sizes: dict[str, Any] = {
            "embed_dim": stock.dim,
            "num_heads": stock.num_attention_heads,
            "head_dim": stock.attention_head_dim,
            "context_dim": cast(Attention, stock.attn2).cross_attention_dim,
        }
        norm_eps = cast(nn.LayerNorm, stock.norm1).eps
        with torch.device("meta"):  # the weights are stock's
            super().__init__(
                **sizes,
                ffn_dim=cast(nn.Linear, stock.ff.net[2]).in_features,
                has_self_attention=not only_cross,
                has_cross_attention=True,
                norm_eps=norm_eps,
                activation="geglu",
                attention_bias=stock.attention_bias,
                dropout_p=stock.dropout,
                ffn_dropout_p=0.0,
                activation_dropout_p=stock.dropout,
                # With a text attention in its place, `attn1` is not the layer's self-attention.
                names=replace(DIFFUSERS_LAYER, self_attn="", self_attn_norm="") if only_cross else DIFFUSERS_LAYER,
            )
            if only_cross:
                names = DIFFUSERS_LAYER.attention
                self.attn1 = CrossAttention(**sizes, bias=stock.attention_bias, out_bias=True, names=names)
                self.norm1 = make_norm("layer", stock.dim, norm_eps)
        self.only_cross_attention = only_cross
        adopt_parameters(self, stock, name)
        self.train(stock.training)

    @property
    def cross_attentions(self) -> list[CrossAttention]:
        """The attentions to the text: one, or two where `only_cross_attention`."""
        return [module for module in (self._modules["attn1"], self.cross_attn) if isinstance(module, CrossAttention)]

    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | UNetContext | None = None,
        encoder_attention_mask: Tensor | None = None,
        timestep: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        class_labels: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> Tensor:
        """As `BasicTransformerBlock.forward`.

        Args:
            hidden_states: `[B * n, L, C]`.
            attention_mask: Bias of the first attention, `[B * n, 1, Lk]`, or any mask that `SelfAttention` takes.
            encoder_hidden_states: The text `[B, Lk, Cc]`, or a `UNetContext`.
            encoder_attention_mask: Bias of the attention to the text, `[B * n, 1, Lk]`.
            timestep: Unused, as in stock's blocks of this kind.
            cross_attention_kwargs: Nothing is known here; `UNet.forward` refuses what it does not use itself.
            class_labels: Unused, as `timestep`.
            added_cond_kwargs: Unused, as `timestep`.

        Returns:
            `[B * n, L, C]`.

        Raises:
            UsageError: On a wrong shape, a missing text or an unknown keyword.
        """
        check_attention_kwargs(cross_attention_kwargs)
        if encoder_hidden_states is None:
            raise UsageError("UNet: encoder_hidden_states is None, but the blocks attend to a text")
        text, attn1 = encoder_hidden_states, self._modules["attn1"]
        if isinstance(attn1, CrossAttention):
            out = attn1(self.norm1(hidden_states), _for_attention(text, attn1), attn_mask=attention_mask)
            hidden_states, attention_mask = self._add(hidden_states, out, self.norm1), None
        return super().forward(
            hidden_states,
            attn_mask=attention_mask,
            context=_for_attention(text, self.cross_attn),
            context_attn_mask=encoder_attention_mask,
        )


def _for_attention(text: Tensor | UNetContext, attention: Any) -> Any:
    return text.keys_and_values(attention) if isinstance(text, UNetContext) else text


def check_attention_kwargs(given: dict[str, Any] | None) -> None:
    """Raise on any entry of `cross_attention_kwargs`: stock hands them to attention processors, and there are none.

    Raises:
        UsageError: naming the entries and what to do instead.
    """
    if given:
        raise UsageError(
            f"UNet: cross_attention_kwargs has {', '.join(sorted(given))}: only `scale` (of LoRA) means anything here."
            " GLIGEN, IP-Adapters and attention processors need diffusers' own U-Net, with mmattn.swap_attention"
        )


def block_refusal(stock: BasicTransformerBlock) -> str | None:
    """What a stock block has that ours cannot do, as a predicate ("has ..."); None when there is nothing."""
    if type(stock) is not BasicTransformerBlock:
        return f"is a {type(stock).__name__}"
    if hasattr(stock, "fuser"):
        return "has a GLIGEN fuser (attention_type)"
    if stock.norm_type != "layer_norm" or not stock.norm_elementwise_affine:
        return f"has {stock.norm_type} norms" + ("" if stock.norm_elementwise_affine else " without weights")
    if stock.pos_embed is not None:
        return "has positions of its own"
    if stock.double_self_attention or stock.attn2 is None:
        return "has no attention to the text"
    if not isinstance(stock.ff.net[0], GEGLU) or len(stock.ff.net) != 3:
        return f"has a feed-forward with {type(stock.ff.net[0]).__name__}"
    for name in ("attn1", "attn2"):
        reason = _attention_refusal(getattr(stock, name))
        if reason is not None:
            return f"has an {name} with {reason}"
    return None


def _attention_refusal(attention: Attention) -> str | None:
    if type(attention.processor) not in _PLAIN_PROCESSORS:
        return f"the processor {type(attention.processor).__name__} (set the default processor first)"
    if attention.fused_projections:
        return "fused projections (unfuse it first, or load the weights anew)"
    for name in ("group_norm", "spatial_norm", "norm_cross", "norm_q", "add_k_proj"):
        if getattr(attention, name, None) is not None:
            return name
    if not attention.scale_qk or attention.residual_connection or attention.rescale_output_factor != 1:
        return "another scale or residual"
    return None


def adopt_parameters(ours: nn.Module, stock: nn.Module, name: str) -> None:
    """Make a stock module's parameters and buffers those of ours, which has the same names; nothing is copied.

    Raises:
        UsageError: When the names or shapes differ.
    """
    theirs, own = (dict([*module.named_parameters(), *module.named_buffers()]) for module in (stock, ours))
    faults = sorted(set(theirs) ^ set(own)) or [key for key in own if own[key].shape != theirs[key].shape]
    if faults:
        listed = ", ".join(faults[:4]) + (f" and {len(faults) - 4} more" if len(faults) > 4 else "")
        raise UsageError(f"UNet: {name} has other tensors than its config says (adapters? unload them first): {listed}")
    for key, tensor in theirs.items():
        owner, _, leaf = key.rpartition(".")
        setattr(ours.get_submodule(owner), leaf, tensor)
