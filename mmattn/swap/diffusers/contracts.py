"""Which stock processors we replace, by exact class, and what each of them skips that a module may have.

A processor that skips a setting (diffusers' SDPA processor ignores `scale_qk`, say) computes something else than
ours would, which skips nothing. Such a layer is left alone, by name: a swap must not change the output.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from diffusers.models import attention_processor as stock
from diffusers.models.transformers.sana_transformer import SanaAttnProcessor2_0

from mmattn.swap.diffusers.ip_adapter import SwappedIPAdapterAttnProcessor
from mmattn.swap.diffusers.layer import Swapped
from mmattn.swap.diffusers.processors import (
    SwappedAddedKVAttnProcessor,
    SwappedAttnProcessor,
    SwappedJointAttnProcessor,
)


class Contract(NamedTuple):
    """How a stock class is replaced.

    Attributes:
        ours: the class of our processor.
        skipped: settings that the stock class ignores, of `SETTINGS`.
    """

    ours: type[Swapped]
    skipped: tuple[str, ...]


# A setting of `Attention`: whether a module has it, in its own words. Not `fused_projections`: `unfuse_qkv_projections`
# leaves that flag on, and only the processors named "Fused..." look at the fused layers.
SETTINGS: dict[str, Callable[[Any], bool]] = {
    "scale_qk": lambda attn: attn.scale != (attn.inner_dim // attn.heads) ** -0.5,
    "is_causal": lambda attn: attn.is_causal,
    "qk_norm": lambda attn: attn.norm_q is not None or attn.norm_k is not None,
    "spatial_norm": lambda attn: attn.spatial_norm is not None,
    "group_norm": lambda attn: attn.group_norm is not None,
    "residual_connection": lambda attn: attn.residual_connection,
    "rescale_output_factor": lambda attn: attn.rescale_output_factor != 1,
    "norm_cross": lambda attn: attn.norm_cross is not None,
}
_ALWAYS = ("is_causal",)
_OF_UNET = ("spatial_norm", "residual_connection", "rescale_output_factor", "qk_norm")
_OF_JOINT = ("spatial_norm", "group_norm", "residual_connection", "rescale_output_factor", "norm_cross")
_OF_SANA = ("spatial_norm", "group_norm", "residual_connection", "norm_cross")
_SDPA = ("scale_qk", *_ALWAYS)

CONTRACTS: dict[type, Contract] = {
    stock.AttnProcessor2_0: Contract(SwappedAttnProcessor, _SDPA),
    stock.AttnProcessor: Contract(SwappedAttnProcessor, (*_ALWAYS, "qk_norm")),
    stock.SlicedAttnProcessor: Contract(SwappedAttnProcessor, (*_ALWAYS, "qk_norm", "spatial_norm")),
    stock.XFormersAttnProcessor: Contract(SwappedAttnProcessor, (*_ALWAYS, "qk_norm")),
    stock.AttnAddedKVProcessor: Contract(SwappedAddedKVAttnProcessor, (*_ALWAYS, *_OF_UNET)),
    stock.AttnAddedKVProcessor2_0: Contract(SwappedAddedKVAttnProcessor, (*_SDPA, *_OF_UNET)),
    stock.SlicedAttnAddedKVProcessor: Contract(SwappedAddedKVAttnProcessor, (*_ALWAYS, *_OF_UNET)),
    stock.XFormersAttnAddedKVProcessor: Contract(SwappedAddedKVAttnProcessor, (*_ALWAYS, *_OF_UNET)),
    stock.IPAdapterAttnProcessor: Contract(SwappedIPAdapterAttnProcessor, (*_ALWAYS, "qk_norm")),
    stock.IPAdapterAttnProcessor2_0: Contract(SwappedIPAdapterAttnProcessor, (*_SDPA, "qk_norm")),
    stock.IPAdapterXFormersAttnProcessor: Contract(SwappedIPAdapterAttnProcessor, (*_ALWAYS, "qk_norm")),
    SanaAttnProcessor2_0: Contract(SwappedAttnProcessor, (*_SDPA, *_OF_SANA)),
    stock.JointAttnProcessor2_0: Contract(SwappedJointAttnProcessor, (*_SDPA, *_OF_JOINT)),
    stock.XFormersJointAttnProcessor: Contract(SwappedJointAttnProcessor, (*_ALWAYS, *_OF_JOINT)),
}

_LINEAR = "linear attention, not a softmax"
_PAG = "perturbed-attention guidance depends on its own processors"
_CUSTOM = "a trained Custom Diffusion processor holds weights"
_FUSED = "projections are fused: call unfuse_qkv_projections() first"
# By the beginning of the class's name; the first that fits is the reason.
REFUSALS: tuple[tuple[str, str], ...] = (
    ("SanaLinear", _LINEAR),
    ("SanaMultiscale", _LINEAR),
    ("PAGCFGSana", _LINEAR),
    ("PAGIdentitySana", _LINEAR),
    ("PAG", _PAG),
    ("CustomDiffusion", _CUSTOM),
    ("Fused", _FUSED),
    ("CrossAttnStore", "an attention store belongs to its pipeline"),
    ("AttendExcite", "an attention store belongs to its pipeline"),
    ("LEDITS", "an attention store belongs to its pipeline"),
    ("Pix2PixZero", "an attention store belongs to its pipeline"),
)


def refusal(attn: Any, processor: Any) -> str | None:
    """Why a layer with this processor is left alone; None when it can be replaced."""
    name = type(processor).__name__
    contract = CONTRACTS.get(type(processor))
    if contract is None:
        for beginning, reason in REFUSALS:
            if name.startswith(beginning):
                return f"{name}: {reason}"
        return f"{name}: not a class that mmattn knows"
    if attn.to_out is None or (attn.to_k is None and attn.added_kv_proj_dim is None):
        return f"{name}: the layer lacks to_k or to_out; its model computes attention by itself"
    skipped = [setting for setting in contract.skipped if SETTINGS[setting](attn)]
    if skipped:
        return f"{name} ignores {', '.join(skipped)} of this layer, ours would not: the output would change"
    return None


def features(attn: Any, processor: Any) -> list[str]:
    """What a layer has that our processor keeps, for the report."""
    found = [name for name, is_there in SETTINGS.items() if is_there(attn)]
    if getattr(attn, "upcast_attention", False) or getattr(attn, "upcast_softmax", False):
        found.append("upcast (scores and softmax in float32)")
    if attn.inner_kv_dim != attn.inner_dim:
        found.append("grouped heads")
    if hasattr(processor, "to_k_ip"):
        found.append(f"IP-Adapter x {len(processor.to_k_ip)}")
    if any(hasattr(layer, "base_layer") for layer in (attn.to_q, attn.to_k, attn.to_v, attn.to_out[0])):
        found.append("LoRA")
    return found
