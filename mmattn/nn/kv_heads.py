"""Turn multi-head attention into grouped-query or multi-query attention."""

from __future__ import annotations

from typing import TypeVar

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn.packed_linears import packing_refusals
from mmattn.nn.projected_attention import ProjectedAttention

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def convert_kv_heads(module: ModuleT, num_kv_heads: int) -> ModuleT:
    """Reduce the key/value heads of every attention in a module to `num_kv_heads`, in place.

    Neighbouring heads are mean-pooled (arXiv 2305.13245, section 2.1). The output is unchanged when the heads pooled
    together are equal; otherwise a short further training is meant to follow. An optimiser made before must be made
    anew, since the weights are new parameters. Either all attentions are converted or, on an error, none.

    Args:
        module: `SelfAttention`, `CrossAttention`, a layer or a whole network.
        num_kv_heads: A divisor of each attention's present number.

    Returns:
        The same module.

    Raises:
        UsageError: When there is no attention in the module, the number does not divide, or a projection is not a plain
            Linear (adapter, quantised weight).
    """
    attentions = {name: child for name, child in module.named_modules() if isinstance(child, ProjectedAttention)}
    if not attentions:
        raise UsageError(f"convert_kv_heads: {type(module).__name__} holds no attention of mmattn.nn")
    for name, child in attentions.items():
        _check_convertible(name or type(child).__name__, child, num_kv_heads)
    for child in attentions.values():
        _convert(child, num_kv_heads)
    return module


def _check_convertible(name: str, module: ProjectedAttention, num_kv_heads: int) -> None:
    if num_kv_heads < 1 or module.num_kv_heads % num_kv_heads:
        raise UsageError(
            f"convert_kv_heads: {name} has {module.num_kv_heads} key/value heads, not divisible into {num_kv_heads}"
        )
    reasons = [
        reason
        for projection in ("k_proj", "v_proj")
        for reason in packing_refusals({projection: getattr(module, projection)})
    ]
    if reasons:
        raise UsageError(f"convert_kv_heads: {name} cannot be converted: {'; '.join(reasons)}")


def _convert(module: ProjectedAttention, num_kv_heads: int) -> None:
    was_fused = module.is_fused
    module.unfuse()
    for linear in (module.k_proj, module.v_proj):
        linear.weight = _pooled(linear.weight, num_kv_heads, module.head_dim)
        if linear.bias is not None:
            linear.bias = _pooled(linear.bias, num_kv_heads, module.head_dim)
        linear.out_features = num_kv_heads * module.head_dim
    module.num_kv_heads = num_kv_heads
    if was_fused:
        module.fuse()


def _pooled(parameter: Tensor, num_kv_heads: int, head_dim: int) -> nn.Parameter:
    # [G, D, ...] to [G', G / G', D, ...]; summed in at least float32.
    heads = parameter.detach().unflatten(0, (num_kv_heads, -1, head_dim))
    wide = torch.promote_types(parameter.dtype, torch.float32)
    pooled = heads.to(wide).mean(dim=1).to(parameter.dtype)
    return nn.Parameter(pooled.flatten(0, 1), requires_grad=parameter.requires_grad)
