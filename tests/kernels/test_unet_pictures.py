"""A U-Net's training in channels-last with kernels of mmattn's, on Triton's interpreter: held to stock diffusers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

pytest.importorskip("triton")

from mmattn.models.unet import UNet, pictures
from tests.swap.zoo_base import liven
from tests.tolerance import BACKWARD_FACTOR, FORWARD_FACTOR, check_within

pytestmark = pytest.mark.interpreter

TINY: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (12, 20),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 11,
    "norm_num_groups": 4,
}


@pytest.fixture(autouse=True)
def on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card; in float32 too, in which the interpreter and stock can be compared closely."""
    monkeypatch.setattr(pictures, "_DEVICES", ("cpu",))
    monkeypatch.setattr(pictures, "_HALVES", (torch.float16, torch.float32))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What our kernels are used for, in order."""
    found: list[str] = []
    own = pictures._normed

    def normed(norm: nn.Module, x: Tensor, shift: Tensor | None = None, *, has_silu: bool = False) -> Tensor:
        found.append("shift" if shift is not None else "silu" if has_silu else "norm")
        assert x.is_contiguous(memory_format=torch.channels_last)
        return own(norm, x, shift, has_silu=has_silu)

    monkeypatch.setattr(pictures, "_normed", normed)
    return found


def stock(**changes: Any) -> UNet2DConditionModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return liven(UNet2DConditionModel(**TINY | changes))


def inputs(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    sizes = ((2, 4, 6, 10), (2, 7, 11), (2, 4, 6, 10))
    sample, text, cotangent = (torch.randn(*size, generator=generator).to(dtype) for size in sizes)
    return sample, text, cotangent


def step(unet: nn.Module, dtype: torch.dtype = torch.float32) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of sample and parameters."""
    sample, text, cotangent = inputs(dtype)
    sample.requires_grad_()
    out = unet(sample, torch.tensor([3, 541]), text).sample
    unet.zero_grad()
    (out * cotangent).sum().backward()
    found = {name: each.grad for name, each in unet.named_parameters() if each.grad is not None}
    assert sample.grad is not None
    return out.detach(), {"sample": sample.grad, **found}


@pytest.mark.parametrize("changes", [{}, {"use_linear_projection": True, "resnet_skip_time_act": True}], ids=str)
def test_a_step_is_stocks(changes: dict[str, Any], calls: list[str]) -> None:
    theirs = stock(**changes)
    ours = UNet.from_stock(copy.deepcopy(theirs))
    out, grads = step(ours)
    low, low_grads = step(theirs)
    exact, exact_grads = step(theirs.double(), torch.float64)
    # Every ResNet's two norms, those of transformers, and the last.
    assert (calls.count("silu"), calls.count("shift"), calls.count("norm")) == (8, 8, 5)
    assert out.is_contiguous()
    check_within(out, low, exact, factor=FORWARD_FACTOR, what="output")
    assert grads.keys() == low_grads.keys() == exact_grads.keys()
    for name, grad in grads.items():
        check_within(grad, low_grads[name], exact_grads[name], factor=BACKWARD_FACTOR, what=name, unavoidable=1e-6)


def test_autocast(calls: list[str]) -> None:
    theirs = stock()
    ours = UNet.from_stock(copy.deepcopy(theirs))
    with torch.autocast("cpu", torch.float16):
        sample, text, cotangent = inputs()
        out = ours(sample, 7, text).sample
        (out * cotangent).sum().backward()
    assert out.dtype is torch.float16
    assert len(calls) == 21
    assert {each.grad.dtype for each in ours.parameters() if each.grad is not None} == {torch.float32}
    assert all(each.grad.stride() == each.stride() for each in ours.parameters() if each.grad is not None)
    exact = theirs.double()(sample.double(), 7, text.double()).sample
    assert (out.double() - exact).abs().max() < 0.02 * exact.abs().max()


def test_what_somebody_hangs_on_a_layer_is_called() -> None:
    ours = UNet.from_stock(stock())
    plain, _ = step(ours)
    resnet = ours.down_blocks[0].resnets[0]
    seen = []
    for name in ("conv1", "conv2", "time_emb_proj"):
        getattr(resnet, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    out, _ = step(ours)
    assert seen == ["time_emb_proj", "conv1", "conv2"]
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("wanted", ["no gradients", "other activation", "double"])
def test_everything_else_is_stocks_own(wanted: str, calls: list[str]) -> None:
    changes = {"act_fn": "gelu"} if wanted == "other activation" else {}
    theirs, dtype = stock(**changes), torch.float64 if wanted == "double" else torch.float32
    ours, theirs = UNet.from_stock(copy.deepcopy(theirs)).to(dtype), theirs.to(dtype)
    sample, text, _ = inputs(dtype)
    with torch.set_grad_enabled(wanted != "no gradients"):
        torch.testing.assert_close(ours(sample, 7, text).sample, theirs(sample, 7, text).sample)
    assert set(calls) <= ({"norm"} if wanted == "other activation" else set())


def test_frozen_weights_and_one_that_is_wanted() -> None:
    ours = UNet.from_stock(stock()).requires_grad_(False)
    wanted = ours.mid_block.resnets[0].conv1.weight.requires_grad_()
    _, grads = step(ours)
    assert grads.keys() == {"sample", "mid_block.resnets.0.conv1.weight"}
    assert wanted.grad is not None
    assert wanted.grad.abs().sum() > 0
