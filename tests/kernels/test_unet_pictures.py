"""A U-Net's training in channels-last with kernels of mmattn's, on Triton's interpreter: held to stock diffusers."""

from __future__ import annotations

import copy
import types
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

pytest.importorskip("triton")

from mmattn.models.unet import UNet, pictures
from tests.models.test_unet import TINY
from tests.swap.zoo_base import liven
from tests.tolerance import BACKWARD_FACTOR, FORWARD_FACTOR, check_within

pytestmark = pytest.mark.interpreter


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


class Wrapped(nn.Module):
    """Somebody's own layer about a convolution: no bias to be seen, and pictures in rows of pixels."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return 2 * self.inner(x).contiguous()


def doubled(conv: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return 2 * nn.functional.conv2d(x, weight, bias, conv.stride, conv.padding)


@pytest.mark.parametrize("is_wrapped", [True, False], ids=["another layer", "another _conv_forward"])
def test_somebodys_own_convolutions(is_wrapped: bool, calls: list[str]) -> None:
    names = ("down_blocks.0.resnets.0.conv1", "mid_block.resnets.0.conv2", "up_blocks.1.resnets.0.conv_shortcut")
    names = (*names, "down_blocks.0.attentions.0.proj_out")
    theirs = stock()
    ours = UNet.from_stock(copy.deepcopy(theirs))
    for unet in (ours, theirs):
        for name in names:
            conv: Any = unet.get_submodule(name)
            if is_wrapped:
                unet.set_submodule(name, Wrapped(conv))
            else:
                conv._conv_forward = types.MethodType(doubled, conv)
    (out, grads), (wanted, wanted_grads) = step(ours), step(theirs)
    assert calls.count("shift") > 3
    torch.testing.assert_close(out, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(grads, wanted_grads, rtol=1e-3, atol=1e-4)


def test_a_hook_on_an_activation_sees_every_use() -> None:
    ours, seen = UNet.from_stock(stock()), []
    ours.mid_block.resnets[0].nonlinearity.register_forward_hook(lambda *_: seen.append(1))
    step(ours)
    assert len(seen) == 3  # one is that of the time embedding


def test_weights_of_the_pictures_dtype_are_not_kept_twice() -> None:
    """A convolution in channels-last lays them out itself, where it needs them."""
    ours, kept = UNet.from_stock(stock()), []
    sample, text, _ = inputs()
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        ours(sample, 7, text)
    weights = [each.weight for each in ours.modules() if isinstance(each, nn.Conv2d) and each.kernel_size == (3, 3)]
    shapes, own = {weight.shape for weight in weights}, {weight.data_ptr() for weight in weights}
    held = [tensor for tensor in kept if tensor.shape in shapes]
    assert len(held) >= len(weights)
    assert {tensor.data_ptr() for tensor in held} == own


def test_adapters_can_be_saved_after_compiled_steps(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ours = UNet.from_stock(stock())
    ours.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1"], modules_to_save=["conv_out"]))
    pictures.lay_out_weights(ours)
    conv = ours.get_submodule("mid_block.resnets.0.conv1.base_layer")
    assert cast(nn.Conv2d, conv).weight.is_contiguous(memory_format=torch.channels_last)
    ours.save_lora_adapter(tmp_path)
    assert list(tmp_path.iterdir())


def test_transforms_of_torch_func(calls: list[str]) -> None:
    """They have no rules for our operations."""
    resnet = pictures.ResnetBlock2D(in_channels=4, temb_channels=3, groups=2)
    generator = torch.Generator().manual_seed(0)
    x, embedding = (torch.randn(size, generator=generator) for size in ((2, 4, 3, 5), (2, 3)))

    def loss(x: Tensor) -> Tensor:
        return resnet(x, embedding).square().sum()

    wanted = loss(x.requires_grad_())
    wanted_grad = torch.autograd.grad(wanted, x)[0]
    x = x.detach()
    torch.testing.assert_close(torch.func.vmap(loss)(x[None])[0], wanted)
    x = pictures.channels_last(x)
    compiled = torch.compile(lambda x: torch.func.grad(loss)(x), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), wanted_grad)
    assert not calls
    loss(x)
    assert calls == ["silu", "shift"]
