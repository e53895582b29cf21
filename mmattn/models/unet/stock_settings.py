"""What diffusers sets on a U-Net by way of attention processors. Ours has none: each setting means the same, or says
what to use instead."""

from __future__ import annotations

import logging
from typing import Any, NoReturn

from diffusers.models.attention_processor import FusedAttnProcessor2_0
from torch import nn

from mmattn.errors import UsageError
from mmattn.nn.fusion import fuse, unfuse
from mmattn.nn.projected_attention import ProjectedAttention

_log = logging.getLogger(__name__)

_INSTEAD = "its attention is fused already: choose a backend with mmattn.use_backend"
_STOCK_CLASS = "use diffusers' own U-Net, with mmattn.swap_attention"


class StockAttentionSettings(nn.Module):
    """A mixin before diffusers' class: its settings of attention, for a network without processors."""

    @property
    def attn_processors(self) -> dict[str, Any]:
        """Empty: there are no attention processors."""
        return {}

    def set_attn_processor(self, processor: Any) -> None:
        """Refused, except where it asks for what is the case: nothing to set, or fused projections after
        `fuse_qkv_projections`.

        Raises:
            UsageError: always else.
        """
        if isinstance(processor, dict) and not processor:
            return
        if type(processor) is FusedAttnProcessor2_0 and self._is_fused():
            return
        kinds = processor.values() if isinstance(processor, dict) else [processor]
        names = ", ".join(sorted({type(kind).__name__ for kind in kinds}))
        self._refuse(
            f"has no attention processors to set ({names})", f"{_INSTEAD}; for other processors {_STOCK_CLASS}"
        )

    def set_default_attn_processor(self) -> NoReturn:
        """Refused: there are no attention processors.

        Raises:
            UsageError: always.
        """
        self._refuse("has no attention processors to set", _INSTEAD)

    def set_attention_slice(self, slice_size: Any = "auto") -> None:
        """Slicing saves the memory of attention scores, which a fused kernel never holds: said, and nothing done."""
        if slice_size is not None:
            _log.warning("mmattn's UNet needs no attention slicing: fused attention never holds the scores")

    def set_attention_backend(self, backend: str) -> NoReturn:
        """Refused: diffusers would change its process-wide default, and nothing here.

        Raises:
            UsageError: always.
        """
        self._refuse(f"does not follow set_attention_backend({backend!r})", _INSTEAD)

    def set_use_memory_efficient_attention_xformers(self, valid: bool, attention_op: Any = None) -> None:
        """Refused, unless it turns xformers off.

        Raises:
            UsageError: when `valid`.
        """
        if valid:
            self._refuse("does not use xformers", _INSTEAD)

    def set_use_npu_flash_attention(self, valid: bool) -> None:
        """As `set_use_memory_efficient_attention_xformers`."""
        if valid:
            self._refuse("does not use NPU flash attention", _INSTEAD)

    def set_use_xla_flash_attention(self, use_xla_flash_attention: bool, *arguments: Any, **options: Any) -> None:
        """As `set_use_memory_efficient_attention_xformers`."""
        if use_xla_flash_attention:
            self._refuse("does not use XLA flash attention", _INSTEAD)

    def fuse_qkv_projections(self) -> None:
        """Pack the projections of every attention, for inference: `mmattn.nn.fuse`.

        Raises:
            UsageError: in training mode, with an adapter or a quantised weight.
        """
        fuse(self)

    def unfuse_qkv_projections(self) -> None:
        """Undo `fuse_qkv_projections`."""
        unfuse(self)

    def load_attn_procs(self, pretrained_model_name_or_path_or_dict: Any, **options: Any) -> NoReturn:
        """Refused: a Custom Diffusion file holds weights of stock's processors.

        Raises:
            UsageError: always.
        """
        self._refuse(
            "cannot load attention processors", "mmattn.models.unet.kv_file.merge_cross_attention_kv merges them"
        )

    def save_attn_procs(self, save_directory: Any, *arguments: Any, **options: Any) -> NoReturn:
        """Refused, as `load_attn_procs`.

        Raises:
            UsageError: always.
        """
        instead = "mmattn.models.unet.kv_file.save_cross_attention_kv writes such a file"
        self._refuse("has no attention processors to save", instead)

    def _load_ip_adapter_weights(self, state_dicts: Any, *arguments: Any, **options: Any) -> NoReturn:
        self._refuse("cannot take an IP-Adapter", _STOCK_CLASS)

    def _is_fused(self) -> bool:
        return all(module.is_fused for module in self.modules() if isinstance(module, ProjectedAttention))

    def _refuse(self, what: str, instead: str) -> NoReturn:
        raise UsageError(f"mmattn's UNet {what}: {instead}")
