"""What a prompt is to a U-Net: its text states, and the keys and values that each cross-attention makes of them.

Sizes: B prompts, Lk tokens, C width of the text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn.cross_attention import CrossAttention
from mmattn.ops.cache import ContextKV


class UNetContext:
    """The text of a generation, projected once and shared by all of its steps: state that the caller holds.

    Given to a `UNet` as `encoder_hidden_states`. Each layer's keys and values are projected at their first use inside a
    forward, or all at once by `UNet.project_context`, and kept here. They belong to the weights and adapters as they
    were then: make a new context after changing those. Where gradients of the text or of a projection are wanted, as
    in training, the layer projects anew at each call and nothing is kept.

    A latent batch may be n times the prompts: row i attends to prompt i // n.

    Args:
        text: `[B, Lk, C]`, the text encoder's states.
        key_mask: boolean `[B, Lk]`, True = may attend; None: every token, padding too, as Stable Diffusion was trained.

    Raises:
        UsageError: on a wrong shape or type.
    """

    def __init__(self, text: Tensor, key_mask: Tensor | None = None) -> None:
        if text.dim() != 3 or not text.is_floating_point():
            raise UsageError(f"UNetContext: text is {text.dtype} {list(text.shape)}, expected floats [B, Lk, C]")
        if key_mask is not None and (key_mask.dtype is not torch.bool or key_mask.shape != text.shape[:2]):
            raise UsageError(
                f"UNetContext: key_mask is {key_mask.dtype} {list(key_mask.shape)}, it must be boolean [B, Lk] = "
                f"{list(text.shape[:2])}"
            )
        self.text = text
        self.key_mask = key_mask
        # By the module that made it, so that one context serves any number of networks. Plain, for torch.compile.
        self._kept: dict[nn.Module, ContextKV | Tensor] = {}

    @property
    def batch_size(self) -> int:
        """Number of prompts B."""
        return self.text.shape[0]

    @property
    def length(self) -> int:
        """Number of tokens Lk, padding included."""
        return self.text.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes held: text, mask, and what has been projected so far."""
        mask = 0 if self.key_mask is None else self.key_mask.nbytes
        return self.text.nbytes + mask + sum(kept.nbytes for kept in self._kept.values())

    def to(
        self,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        non_blocking: bool = False,
    ) -> UNetContext:
        """This context on another device or in another dtype (of text, keys and values); itself where nothing changes,
        so that hooks that move a model's arguments leave what is projected in place. `non_blocking` as in torch."""
        text = self.text.to(device=device, dtype=dtype, non_blocking=non_blocking)
        if text is self.text:
            return self
        key_mask = None if self.key_mask is None else self.key_mask.to(device=device)
        moved = UNetContext(text, key_mask)
        moved._kept = {module: kept.to(device=device, dtype=dtype) for module, kept in self._kept.items()}
        return moved

    def keys_and_values(self, attention: CrossAttention) -> ContextKV:
        """The text's keys and values for one attention: those kept, or projected now.

        Raises:
            UsageError: when the text has another width than the attention takes.
        """
        projections = (attention.k_proj, attention.v_proj)
        kept = self._kept_or_made(attention, projections, lambda: attention.project_context(self.text, self.key_mask))
        return cast(ContextKV, kept)

    def through(self, projection: nn.Module) -> UNetContext:
        """This context with its text passed through a module first (a U-Net's `encoder_hid_proj`), once; both hold
        the same keys and values."""
        passed = UNetContext(
            cast(Tensor, self._kept_or_made(projection, (projection,), lambda: projection(self.text))), self.key_mask
        )
        passed._kept = self._kept
        return passed

    def _kept_or_made(
        self, maker: nn.Module, projections: tuple[nn.Module, ...], make: Callable[[], ContextKV | Tensor]
    ) -> ContextKV | Tensor:
        if torch.is_grad_enabled() and (self.text.requires_grad or any(map(_is_trained, projections))):
            return make()
        kept = self._kept.get(maker)
        if kept is None or (torch.is_grad_enabled() and _is_inference(kept)):
            self._kept[maker] = kept = make()
        return kept

    def __repr__(self) -> str:
        masked = "" if self.key_mask is None else ", key_mask"
        return f"UNetContext(text {list(self.text.shape)}{masked}, {len(self._kept)} projections kept)"


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _is_inference(kept: ContextKV | Tensor) -> bool:
    # Made in inference mode: autograd refuses to save such a tensor for a backward pass. (Dynamo cannot ask.)
    return not torch.compiler.is_compiling() and (kept if isinstance(kept, Tensor) else kept.key).is_inference()
