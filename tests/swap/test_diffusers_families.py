"""Every diffusers family of the zoo: the same output, proof on request, and everything back as it was."""

from __future__ import annotations

import pytest
import torch

import mmattn
from mmattn.errors import UsageError
from mmattn.ops.tolerance import BACKWARD_FACTOR, deviation
from mmattn.swap.attend import computing_reference

from .diffusers_pieces import Picture, a_text, check_by_the_rule, draw, tiny_unet
from .zoo import FAMILIES

# How many layers are swapped in all that `build` gives: U-Net or transformer, ControlNet, VAE.
SWAPPED = {
    "sd1": 22,
    "sd2": 34,
    "sdxl": 38,
    "sd1_controlnet": 30,
    "sd1_ip_adapter": 26,  # the resampler of an IP-Adapter Plus has four
    "sd1_ip_masks": 26,
    "sd1_lora": 22,
    "inpaint": 22,
    "upscale": 22,
    "vae": 2,
    "kandinsky22": 15,
    "movq": 5,
    "deepfloyd_if": 10,
    "unclip": 10,
    "animatediff": 48,
    "svd": 40,
    "kandinsky3": 19,
    "pixart": 6,
    "sd3": 3,
    "sd35": 6,
    "flux": 5,
    "wan": 4,
    "wan_i2v": 4,
    "qwenimage": 2,
    "hunyuan_video": 3,
    "sana": 3,
}
REFUSED = {"sana": 3}  # its self-attention is linear
# Padding is left out, or masked as keys are: other sums, rounded otherwise.
NOT_BIT_EQUAL = {"kandinsky3", "pixart", "qwenimage", "hunyuan_video", "sana"}


def test_every_family_is_here():
    diffusers = {key for key, family in FAMILIES.items() if family.kind == "diffusers"}
    assert diffusers == set(SWAPPED) | {"cogvideox"}


@pytest.mark.parametrize("key", SWAPPED)
def test_the_output_stays_the_same_and_restoring_leaves_no_trace(key):
    family = FAMILIES[key]
    built = family.build()
    before = Picture(built)
    stock = family.run(built)

    swapped = mmattn.swap_attention(built)
    assert len(swapped.report().swapped) == SWAPPED[key]
    assert len(swapped.report().refused) == REFUSED.get(key, 0)
    ours = family.run(built)
    if key in NOT_BIT_EQUAL:
        check_by_the_rule(ours, stock, lambda: family.run(built))
    else:
        assert torch.equal(ours, stock)
    assert swapped.check() == []
    verification = swapped.verify()
    assert verification.is_ok, str(verification)

    assert swapped.restore() == []
    assert before.differences(Picture(built)) == []
    assert torch.equal(family.run(built), stock)


def test_a_model_of_unknown_attention_is_left_alone():
    built = FAMILIES["cogvideox"].build()
    before = Picture(built)
    with pytest.raises(UsageError, match=r"2 of 2 layers must be left alone: .*attn1: CogVideoXAttnProcessor2_0"):
        mmattn.swap_attention(built)
    assert before.differences(Picture(built)) == []


@pytest.mark.parametrize("build", [tiny_unet, *(FAMILIES[key].build for key in ("pixart", "sd35", "flux"))])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_types(build, dtype):
    model = build().to(dtype)
    with mmattn.swap_attention(model) as swapped:
        verification = swapped.verify()
    assert verification.is_ok, str(verification)


@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_gradients_of_a_unet_in_training(is_checkpointed):
    unet = tiny_unet().train()
    if is_checkpointed:
        unet.enable_gradient_checkpointing()

    def gradients():
        unet.zero_grad()
        sample, text = draw(2, 4, 8, 8).requires_grad_(), a_text().requires_grad_()
        unet(sample, torch.tensor(10), text).sample.square().sum().backward()
        return {name: weight.grad for name, weight in unet.named_parameters()} | {
            "sample": sample.grad,
            "text": text.grad,
        }

    stock = gradients()
    with mmattn.swap_attention(unet) as swapped:
        ours = gradients()
        with computing_reference("eager"):
            eager = gradients()
        with computing_reference("float64"):
            reference = gradients()
        assert swapped.cache_bytes() == 0
    assert ours.keys() == stock.keys()
    assert not any(gradient is None for gradient in ours.values())
    for name, gradient in ours.items():
        found = deviation(gradient, eager[name], reference[name], factor=BACKWARD_FACTOR)
        assert found.is_within, (name, found)
        assert torch.equal(gradient, stock[name]), name


def test_checkpointing_and_none_give_the_same_gradients():
    found = []
    for is_checkpointed in (False, True):
        unet = tiny_unet().train()
        if is_checkpointed:
            unet.enable_gradient_checkpointing()
        with mmattn.swap_attention(unet):
            text = a_text().requires_grad_()
            unet(draw(2, 4, 8, 8), torch.tensor(10), text).sample.sum().backward()
        found.append(text.grad)
    assert torch.equal(*found)
