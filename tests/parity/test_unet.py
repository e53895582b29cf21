"""The U-Net beside stock: forward and the gradients of all parameters, in the configurations of Stable Diffusion."""

from __future__ import annotations

import functools

import pytest
import torch

from mmattn.models.unet import UNet, UNetContext
from tests.parity.unet_stock import CONFIGS, LENGTH, Trio, check, check_gradients, inputs, stock_unet, trio


@functools.cache
def models_of(kind: str) -> Trio:
    return trio(kind)


@pytest.mark.parametrize("kind", CONFIGS)
def test_forward_and_gradients(kind: str) -> None:
    models, given = models_of(kind), inputs(kind)
    with torch.no_grad():
        ours, stock, exact = models.outputs(given)
    check(ours, stock, exact, kind)
    assert stock.std() > 0.1
    check_gradients(models, given)


@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_a_projected_context_is_the_text(kind: str) -> None:
    models, given = models_of(kind), inputs(kind)
    text = given.pop("encoder_hidden_states")
    expected = models.ours(**given, encoder_hidden_states=text).sample
    for context in (models.ours.project_context(text), UNetContext(text)):
        for _ in range(2):
            found = models.ours(**given, encoder_hidden_states=context).sample
            torch.testing.assert_close(found, expected, rtol=0, atol=0)


@torch.no_grad()
def test_a_text_mask_is_stocks() -> None:
    models, given = models_of("sd1"), inputs("sd1")
    keep = torch.ones(2, LENGTH, dtype=torch.bool)
    keep[0, 4:] = keep[1, 6:] = False
    masked = given | {"encoder_attention_mask": keep}
    ours, stock, exact = models.outputs(masked)
    check(ours, stock, exact, "encoder_attention_mask")
    assert (stock - models.stock(**given).sample).abs().max() > 1e-3
    given["encoder_hidden_states"] = models.ours.project_context(given["encoder_hidden_states"], keep)
    check(models.ours(**given).sample, stock, exact, "key_mask of a context")


@torch.no_grad()
def test_a_mask_of_the_latents_is_stocks() -> None:
    # Possible at a single resolution only: stock has one mask for all.
    single = {"block_out_channels": (24,), "down_block_types": ("CrossAttnDownBlock2D",), "attention_head_dim": 3}
    models = trio("sd1", **single, up_block_types=("CrossAttnUpBlock2D",))
    given = inputs("sd1", height=5, width=3) | {"attention_mask": torch.tensor([[1] * 11 + [0] * 4, [1] * 15])}
    ours, stock, exact = models.outputs(given)
    check(ours, stock, exact, "attention_mask")
    assert (stock - models.stock(**given | {"attention_mask": None}).sample).abs().max() > 1e-3


@torch.no_grad()
def test_several_latents_to_a_prompt() -> None:
    models, given = models_of("sd2"), inputs("sd2", rows=6)
    text = given["encoder_hidden_states"][:2]
    _, stock, exact = models.outputs(given | {"encoder_hidden_states": text.repeat_interleave(3, dim=0)})
    ours = models.ours(**given | {"encoder_hidden_states": models.ours.project_context(text)}).sample
    check(ours, stock, exact, "three latents to a prompt")


@torch.no_grad()
def test_strided_input() -> None:
    models, given = models_of("sd1"), inputs("sd1")
    expected = models.ours(**given).sample
    given["sample"] = given["sample"].transpose(2, 3).contiguous().transpose(2, 3)
    given["encoder_hidden_states"] = given["encoder_hidden_states"].repeat(1, 2, 1)[:, :LENGTH]
    assert not given["sample"].is_contiguous()
    assert not given["encoder_hidden_states"].is_contiguous()
    torch.testing.assert_close(models.ours(**given).sample, expected)


def test_gradient_checkpointing_changes_nothing() -> None:
    plain = UNet.from_stock(stock_unet("sd1")).train()
    frugal = UNet.from_stock(stock_unet("sd1")).train()
    frugal.enable_gradient_checkpointing()
    given = inputs("sd1")
    for unet in (plain, frugal):
        text = UNetContext(given["encoder_hidden_states"])
        unet(**given | {"encoder_hidden_states": text}).sample.square().mean().backward()
    for (name, expected), (_, found) in zip(plain.named_parameters(), frugal.named_parameters(), strict=True):
        torch.testing.assert_close(
            found.grad, expected.grad, rtol=0, atol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_dropout_is_where_stock_has_it() -> None:
    models = trio("sd1", dropout=0.2)
    given, outputs = inputs("sd1"), []
    for unet in (models.ours.train(), models.stock.train()):
        torch.manual_seed(5)
        outputs.append(unet(**given).sample)
    torch.testing.assert_close(*outputs)
    assert (outputs[0] - models.ours.eval()(**given).sample).abs().max() > 1e-3


def test_bfloat16() -> None:
    models = models_of("sdxl")
    given = inputs("sdxl")
    low = {
        name: value.bfloat16() if name in ("sample", "encoder_hidden_states") else value
        for name, value in given.items()
    }
    with torch.no_grad():
        exact = models.outputs(given)[2]
        ours, stock = (
            UNet.from_stock(stock_unet("sdxl")).bfloat16()(**low).sample,
            stock_unet("sdxl").bfloat16()(**low).sample,
        )
    check(ours, stock, exact, "bfloat16")
