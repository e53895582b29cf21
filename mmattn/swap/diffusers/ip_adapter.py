"""IP-Adapter: a second cross-attention to pictures, whose weights live in the processor."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.image_processor import IPAdapterMaskProcessor
from diffusers.models.attention_processor import IPAdapterAttnProcessor2_0
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.swap.diffusers.layer import Swapped, enter, leave, split_heads
from mmattn.swap.diffusers.processors import attend_plainly


class SwappedIPAdapterAttnProcessor(Swapped, IPAdapterAttnProcessor2_0):
    """Text and any number of IP-Adapters with scales (one, or one a picture) and masks. It holds the same weight
    modules as the processor that it replaces, under the same names, and shares its list of scales."""

    def __init__(self) -> None:
        nn.Module.__init__(self)  # the stock constructor would make weights
        self.prepare()
        self.to_k_ip, self.to_v_ip = nn.ModuleList(), nn.ModuleList()
        self.num_tokens: Any = []
        self.hidden_size = self.cross_attention_dim = None

    def adopt(self, stock: Any) -> None:
        """Take over the weights and scales of a stock IP-Adapter processor, not copies of them."""
        self.settings.stock = stock
        self.to_k_ip, self.to_v_ip = stock.to_k_ip, stock.to_v_ip
        self.num_tokens = stock.num_tokens
        self.hidden_size, self.cross_attention_dim = stock.hidden_size, stock.cross_attention_dim
        self.train(stock.training)

    @property
    def scale(self) -> list[Any]:
        """A number or a list of numbers for each adapter; `set_ip_adapter_scale` writes into it."""
        return [] if self.settings.stock is None else self.settings.stock.scale

    @scale.setter
    def scale(self, value: list[Any]) -> None:
        self.settings.stock.scale = value

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Any = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        scale: float = 1.0,
        ip_adapter_masks: Any = None,
    ) -> Tensor:
        """As `SwappedAttnProcessor`; `encoder_hidden_states` is (text, [pictures [B, n, tokens, C] of an adapter])."""
        gate = self.settings.gate
        if gate is not None and (reused := gate.reused(self, hidden_states)) is not None:
            return reused
        text, pictures = self._split(encoder_hidden_states)
        states, shape = enter(attn, hidden_states, temb)
        query, output = attend_plainly(self, attn, states, text, attention_mask)
        if len(pictures) != len(self.scale):
            raise UsageError(
                f"{self.settings.where}: {len(self.scale)} IP-Adapters, {len(pictures)} picture embeddings"
            )
        masks = self._checked_masks(ip_adapter_masks, pictures)
        adapters = zip(pictures, self.scale, self.to_k_ip, self.to_v_ip, masks, strict=True)
        for picture, strength, to_k, to_v, mask in adapters:
            strengths = strength if isinstance(strength, list) else [strength]
            if all(number == 0 for number in strengths):
                continue
            if mask is None:
                if isinstance(strength, list):
                    raise UsageError(f"{self.settings.where}: a scale for each picture needs ip_adapter_masks")
                output = output + strength * self._attend_picture(attn, query, picture, to_k, to_v)
            else:
                output = self._add_masked(attn, query, output, picture, strengths, to_k, to_v, mask)
        output = leave(attn, output, hidden_states, shape)
        return output if gate is None else gate.noted(self, output)

    def _split(self, states: Any) -> tuple[Tensor, list[Tensor]]:
        """Text and pictures; the old form, one tensor with the picture's tokens at its end, is still taken."""
        if isinstance(states, tuple):
            return states[0], states[1]
        if not isinstance(states, Tensor):
            raise UsageError(f"{self.settings.where} has an IP-Adapter, but got no text and picture embeddings")
        end = states.shape[1] - self.num_tokens[0]
        return states[:, :end], [states[:, end:]]

    def _attend_picture(self, attn: Any, query: Tensor, picture: Tensor, to_k: nn.Module, to_v: nn.Module) -> Tensor:
        """Attention to all tokens of all pictures of one adapter: [B, L, H x D]."""
        states = picture.flatten(1, 2) if picture.dim() == 4 else picture
        head_dim = query.shape[-1]
        keys = split_heads(to_k(states), head_dim), split_heads(to_v(states), head_dim)
        return self.attend(attn, query, keys)

    def _add_masked(
        self,
        attn: Any,
        query: Tensor,
        output: Tensor,
        picture: Tensor,
        strengths: list[float],
        to_k: nn.Module,
        to_v: nn.Module,
        mask: Tensor,
    ) -> Tensor:
        """Each picture on its own, within its own mask [1, pictures, height, width]."""
        count = mask.shape[1]
        strengths = strengths * count if len(strengths) == 1 else strengths
        for number, strength in enumerate(strengths):
            part = self._attend_picture(attn, query, picture[:, number], to_k, to_v)
            window = IPAdapterMaskProcessor.downsample(mask[:, number], part.shape[0], part.shape[1], part.shape[2])
            output = output + strength * (part * window.to(query))
        return output

    def _checked_masks(self, masks: Any, pictures: list[Tensor]) -> list[Tensor | None]:
        """One mask, or None, for each adapter."""
        if masks is None:
            return [None] * len(self.scale)
        if isinstance(masks, Tensor):
            masks = list(masks.unsqueeze(1))
        if len(masks) != len(self.scale):
            raise UsageError(f"ip_adapter_masks: {len(masks)} masks for {len(self.scale)} IP-Adapters")
        for index, (mask, strength, picture) in enumerate(zip(masks, self.scale, pictures, strict=True)):
            if mask is None:
                continue
            if not isinstance(mask, torch.Tensor) or mask.dim() != 4:
                raise UsageError(
                    f"ip_adapter_masks[{index}] must be a tensor [1, pictures, height, width], as "
                    "IPAdapterMaskProcessor makes it"
                )
            if mask.shape[1] != picture.shape[1]:
                raise UsageError(f"ip_adapter_masks[{index}]: {mask.shape[1]} masks for {picture.shape[1]} pictures")
            if isinstance(strength, list) and len(strength) != mask.shape[1]:
                raise UsageError(f"ip_adapter_masks[{index}]: {mask.shape[1]} masks for {len(strength)} scales")
        return masks
