"""The tolerance rule: a fast path may differ from the float64 reference by at most twice what the eager path in the
same dtype differs, three times for gradients. No tolerance is chosen by taste; non-finite values fail by themselves.

Eager's error may be near nothing by luck, so what no path can avoid is allowed besides: one rounding of the largest
result in its dtype, and of the largest sum of absolute terms in the dtype of accumulation. The latter grows with the
largest score, since scores are rounded too and weights know them no better. (A query that may attend to one key has
the gradient 0 only as a difference of two products that are rounded apart; saturated rows likewise.)

In float64 the eager path would be compared with itself: there its error is taken to be float32's, scaled by the ratio
of the two types' eps.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmattn.ops.attention import attention
from mmattn.ops.tolerance import BACKWARD_FACTOR, FORWARD_FACTOR, deviation


def check_within(
    got: Tensor, eager: Tensor, reference: Tensor, *, factor: float, what: str, unavoidable: float = 0.0
) -> None:
    """Fail unless `got` is as near to `reference` (float64) as the rule asks, given `eager` in got's dtype (float32 if
    that is float64). `unavoidable` is what rounding of cancelling terms may add.

    The message has the worst position with its values, the error and the bound, and the share of elements beyond it.
    """
    assert got.shape == reference.shape, f"{what}: shape {list(got.shape)}, reference {list(reference.shape)}"
    if got.numel() == 0:
        return
    bad = ~got.isfinite()
    assert not bad.any(), f"{what}: not finite at {bad.nonzero()[0].tolist()}, {int(bad.sum())} of {bad.numel()}"
    found = deviation(got, eager, reference, factor=factor, unavoidable=unavoidable)
    if not found.is_within:
        error = (got.double() - reference.double()).abs()
        position = torch.unravel_index(error.argmax(), error.shape)
        index = tuple(int(axis) for axis in position)
        share = (error > found.bound).double().mean().item()
        raise AssertionError(
            f"{what}: worst at {list(index)}: got {got[index].item():.9g}, reference {reference[index].item():.9g}, "
            f"error {found.error:.3g} > {found.bound:.3g} = {factor:g} x eager's {found.eager_error:.3g} "
            f"+ one rounding; {share:.1%} of the elements are beyond it"
        )


def run_with_gradients(
    function: Callable[..., Tensor], tensors: Mapping[str, Tensor], cotangent: Tensor | None, **arguments: Any
) -> dict[str, Tensor]:
    """Call `function(**tensors, **arguments)`: {"output": ..., "grad of NAME": ...}, gradients given a cotangent."""
    leaves = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    if cotangent is None:
        with torch.no_grad():
            return {"output": function(**leaves, **arguments)}
    for leaf in leaves.values():
        leaf.requires_grad_()
    output = function(**leaves, **arguments)
    output.backward(cotangent.to(output.dtype))
    gradients = {f"grad of {name}": leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"output": output.detach(), **gradients}


def check_attention(
    function: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    backward: bool = True,
    bias_gradient: bool = False,
    has_rounded_products: bool = False,
    what: str = "attention",
    **arguments: Any,
) -> dict[str, Tensor]:
    """Hold `function` (signature of `mmattn.attention`) to the rule on the given inputs, in their dtype.

    Args:
        function: the fast path.
        query: [B, H, Lq, D], in the dtype to be tested.
        key: [B, G, Lk, D].
        value: [B, G, Lk, D].
        backward: compare gradients too.
        bias_gradient: `attn_mask` is a float bias whose gradient is compared too.
        has_rounded_products: weights and their gradients are rounded to the inputs' half type before the products, as
            every fused half kernel does and eager does not; only to be said where terms cancel by construction.
        what: begins a failure's message.
        **arguments: masks, scale and so on.

    Returns:
        What `function` gave: "output", "grad of query" and so on.
    """
    tensors = {"query": query, "key": key, "value": value}
    if bias_gradient:
        tensors["attn_mask"] = arguments.pop("attn_mask")
    cotangent = None
    if backward:
        generator = torch.Generator().manual_seed(query.numel())
        cotangent = torch.randn(query.shape, generator=generator, dtype=torch.float64).to(query)
    got = run_with_gradients(function, tensors, cotangent, **arguments)
    reference = run_with_gradients(eager, {n: t.double() for n, t in tensors.items()}, cotangent, **arguments)
    low_dtype = torch.float32 if query.dtype is torch.float64 else query.dtype
    low = run_with_gradients(eager, {n: t.to(low_dtype) for n, t in tensors.items()}, cotangent, **arguments)
    sums = largest_sums({n: t.double() for n, t in tensors.items()}, cotangent, **arguments)
    scale = abs(arguments.get("scale") or query.shape[-1] ** -0.5)
    largest_score = scale * (query.double().norm(dim=-1).max() * key.double().nan_to_num().norm(dim=-1).max()).item()
    eps = torch.finfo(query.dtype).eps
    roundings = min(eps, torch.finfo(torch.float32).eps) * (1 + largest_score) + (eps if has_rounded_products else 0)
    for name, expected in reference.items():
        factor = FORWARD_FACTOR if name == "output" else BACKWARD_FACTOR
        unavoidable = roundings * sums[name]
        check_within(got[name], low[name], expected, factor=factor, what=f"{what}: {name}", unavoidable=unavoidable)
    return got


def largest_sums(tensors: Mapping[str, Tensor], cotangent: Tensor | None, **arguments: Any) -> dict[str, float]:
    """For each result of `run_with_gradients` the largest sum of its terms' absolute values, by the formulas of
    attention's backward: dS = P * (dP - sum(P * dP)) with dP = dO @ V^T."""
    key, value = tensors["key"], tensors["value"]
    with torch.no_grad():
        _, weights = eager(**tensors, **arguments, return_weights=True)
    group = tensors["query"].shape[1] // key.shape[1]
    key, value = (t.nan_to_num().abs().repeat_interleave(group, dim=1) for t in (key, value))
    sums = {"output": weights @ value}
    if cotangent is not None:
        scale = abs(arguments.get("scale") or key.shape[-1] ** -0.5)
        cotangent = cotangent.double().abs()
        products = cotangent @ value.transpose(-1, -2)
        scores = weights * (products + (weights * products).sum(-1, keepdim=True))
        sums["grad of query"] = scale * scores @ key
        sums["grad of key"] = scale * scores.transpose(-1, -2) @ tensors["query"].abs()
        sums["grad of value"] = weights.transpose(-1, -2) @ cotangent
        sums["grad of attn_mask"] = scores
        for name in ("grad of key", "grad of value"):
            sums[name] = sums[name].unflatten(1, (-1, group)).sum(2)
    return {name: terms.max().item() if terms.numel() else 0.0 for name, terms in sums.items()}


def eager(query: Tensor, key: Tensor, value: Tensor, **arguments: Any) -> Any:
    """The specification, in the dtype of its inputs; a float mask follows that dtype."""
    mask = arguments.get("attn_mask")
    if mask is not None and mask.is_floating_point():
        arguments["attn_mask"] = mask.to(query.dtype)
    return attention(query, key, value, backend="eager", **arguments)
