"""Inputs of GroupNorm in channels-last, and what its results are held to; for the interpreter and for a card."""

import torch
from torch.nn.functional import group_norm as torch_group_norm
from torch.nn.functional import silu

from tests.tolerance import BACKWARD_FACTOR, FORWARD_FACTOR, check_within

EPS = 1e-5


def draw(*sizes, seed=0):
    return torch.randn(*sizes, generator=torch.Generator().manual_seed(sum(sizes) + seed))


def inputs(sizes, dtype, *, has_shift, device="cpu"):
    """([x, weight, bias, shift], gradient of the output); x with a mean that is large beside its deviation, as a
    residual's channels have them."""
    x = draw(*sizes) + 5 * draw(sizes[1], 1, 1)
    weight, bias, shift = (draw(*some, seed=1) for some in ((sizes[1],), (sizes[1],), sizes[:2]))
    weight[0] = 0
    tensors = [laid_out(x), weight, bias.flip(0), shift if has_shift else None]
    return [None if each is None else each.to(device, dtype) for each in tensors], laid_out(
        draw(*sizes, seed=2) + 0.5
    ).to(device, dtype)


def laid_out(x):
    return x.contiguous(memory_format=torch.channels_last)


def stock(x, weight, bias, shift, groups, eps, has_silu):
    """As autocast has it, the parameters' type being wider than the pictures'."""
    x = x if shift is None else x + shift[:, :, None, None]
    out = torch_group_norm(x.to(weight.dtype), groups, weight, bias, eps).to(x.dtype)
    return silu(out) if has_silu else out


def results(function, tensors, cotangent, groups, has_silu):
    """The output and all gradients."""
    leaves = [None if tensor is None else tensor.detach().requires_grad_() for tensor in tensors]
    out = function(*leaves, groups, EPS, has_silu)
    return [out.detach(), *torch.autograd.grad(out, [leaf for leaf in leaves if leaf is not None], cotangent)]


def check_norm(tensors, grad, groups, has_silu):
    """Output and gradients of ours within the rule, and laid out in channels-last."""
    from mmattn.kernels.group_norm import group_norm

    tensors = [laid_out(tensors[0]), *tensors[1:]]
    exact = results(
        stock, [None if each is None else each.double() for each in tensors], grad.double(), groups, has_silu
    )
    found, eager = (results(run, tensors, grad, groups, has_silu) for run in (group_norm, stock))
    for what, got, low, right in zip(("output", "x", "weight", "bias", "shift"), found, eager, exact, strict=False):
        assert got.dtype is low.dtype
        check_within(got, low, right, factor=FORWARD_FACTOR if what == "output" else BACKWARD_FACTOR, what=what)
    for each in found[:2]:
        assert each.is_contiguous(memory_format=torch.channels_last)
    return found
