"""Turn multi-head attention into grouped-query or multi-query attention."""

from __future__ import annotations

from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn.kv_heads_svd import merge_by_svd, svd_refusals
from mmattn.nn.names import find
from mmattn.nn.packed_linears import packing_refusals
from mmattn.nn.projected_attention import ProjectedAttention

ModuleT = TypeVar("ModuleT", bound=nn.Module)
KVHeadSource = Literal["mean", "svd", "first", "random"]


def convert_kv_heads(module: ModuleT, num_kv_heads: int, *, how: KVHeadSource = "mean") -> ModuleT:
    """Reduce the key/value heads of every attention in a module to `num_kv_heads`, in place.

    Neighbouring heads are mean-pooled (arXiv 2305.13245, section 2.1). The output is unchanged when the heads pooled
    together are equal; otherwise a short further training is meant to follow. An optimiser made before must be made
    anew, since the weights are new parameters. Weights that several attentions share stay shared. Either all attentions
    are converted or, on an error, none.

    Args:
        module: `SelfAttention`, `CrossAttention`, a layer or a whole network.
        num_kv_heads: A divisor of each attention's present number.
        how: What a head is made from: the "mean" of its group, the "first" of it, or "random" (Xavier weights and zero
            bias from torch's global generator): figure 4 of the paper compares them. "svd" comes closer: the heads
            nearest in least squares, with queries and outputs changed to suit (see `kv_heads_svd`).

    Returns:
        The same module.

    Raises:
        UsageError: When there is no attention in the module, the number does not divide, `how` is unknown, or a
            projection is not a plain Linear (adapter, quantised weight), or with "svd" one that norms or rotates its
            keys, or shares a weight.
    """
    if how not in get_args(KVHeadSource):
        raise UsageError(f"convert_kv_heads: how={how!r} is unknown: use {', '.join(get_args(KVHeadSource))}")
    attentions = {name: child for name, child in module.named_modules() if isinstance(child, ProjectedAttention)}
    if not attentions:
        raise UsageError(f"convert_kv_heads: {type(module).__name__} holds no attention of mmattn.nn")
    for name, child in attentions.items():
        _check_convertible(name or type(child).__name__, child, num_kv_heads, how)
    if how == "svd":
        _check_unshared(attentions)
    made: dict[int, nn.Parameter] = {}
    for child in attentions.values():
        _convert(child, num_kv_heads, how, made)
    return module


def _check_unshared(attentions: dict[str, ProjectedAttention]) -> None:
    """Refuse weights that several attentions share: "svd" gives each of them its own."""
    owners: dict[int, str] = {}
    for name, child in attentions.items():
        for key, parameter in child.named_parameters():
            if id(parameter) in owners:
                raise UsageError(
                    f"convert_kv_heads: {name}.{key} is {owners[id(parameter)]} too, and how='svd' needs weights of "
                    "their own for both: use another, or untie them"
                )
            owners[id(parameter)] = f"{name}.{key}"


def _check_convertible(name: str, module: ProjectedAttention, num_kv_heads: int, how: KVHeadSource) -> None:
    if num_kv_heads < 1 or module.num_kv_heads % num_kv_heads:
        raise UsageError(
            f"convert_kv_heads: {name} has {module.num_kv_heads} key/value heads, not divisible into {num_kv_heads}"
        )
    names = module.names
    changed = (names.query, names.key, names.value, names.out) if how == "svd" else (names.key, names.value)
    reasons = [reason for each in changed for reason in packing_refusals({each: find(module, each.split("."))})]
    if how == "svd":
        reasons += svd_refusals(module)
    if reasons:
        raise UsageError(f"convert_kv_heads: {name} cannot be converted: {'; '.join(reasons)}")


def _convert(module: ProjectedAttention, num_kv_heads: int, how: KVHeadSource, made: dict[int, nn.Parameter]) -> None:
    """Convert one attention; `made` holds what parameters have become, by identity: the old ones were all there at
    once, so that no two of them have the same."""
    was_fused = module.is_fused
    module.unfuse()
    if how == "svd":
        merge_by_svd(module, num_kv_heads)
    else:
        for linear in (module.k_proj, module.v_proj):
            for name in ("weight", "bias"):
                old = getattr(linear, name)
                if old is None:
                    continue
                if id(old) not in made:
                    new = _reduced(old, num_kv_heads, module.head_dim, how)
                    made[id(old)] = made[id(new)] = new  # of a Linear that is shared it comes again
                setattr(linear, name, made[id(old)])
            linear.out_features = num_kv_heads * module.head_dim
    module.num_kv_heads = num_kv_heads
    if was_fused:
        module.fuse()


def _reduced(parameter: Tensor, num_kv_heads: int, head_dim: int, how: KVHeadSource) -> nn.Parameter:
    # [G, D, ...] to [G', G / G', D, ...].
    heads = parameter.detach().unflatten(0, (num_kv_heads, -1, head_dim))
    if how == "first":
        reduced = heads[:, 0].flatten(0, 1).clone()
    elif how == "mean":
        wide = torch.promote_types(parameter.dtype, torch.float32)
        reduced = heads.to(wide).mean(dim=1).to(parameter.dtype).flatten(0, 1)
    else:
        reduced = torch.zeros_like(heads[:, 0].flatten(0, 1))
        if reduced.ndim > 1:
            nn.init.xavier_uniform_(reduced)
    return nn.Parameter(reduced, requires_grad=parameter.requires_grad)
