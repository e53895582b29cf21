"""Stock U-Nets with random weights, the reference of the U-Net's parity tests."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from mmattn.models.unet import UNet
from mmattn.ops.tolerance import BACKWARD_FACTOR, FORWARD_FACTOR
from tests.swap.zoo_base import liven, seeded
from tests.swap.zoo_sd import SD1, SD2, SDXL, UPSCALE
from tests.tolerance import check_within

LENGTH = 7  # tokens of a text
# What no Stable Diffusion has at once: text in the time embedding, a projection of the text, class embeddings, no
# middle, nested numbers of layers, dropout.
MIXED: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 5,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "mid_block_type": None,
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (24, 40),
    "layers_per_block": (2, 1),
    "transformer_layers_per_block": ((2, 1), 1),
    "reverse_transformer_layers_per_block": (1, (1, 2, 1)),
    "attention_head_dim": (3, 5),
    "cross_attention_dim": 22,
    "encoder_hid_dim": 14,
    "addition_embed_type": "text",
    "addition_embed_type_num_heads": 7,
    "class_embed_type": "projection",
    "projection_class_embeddings_input_dim": 11,
    "norm_num_groups": 8,
}
CONFIGS: dict[str, dict[str, Any]] = {"sd1": SD1, "sd2": SD2, "sdxl": SDXL, "upscale": UPSCALE, "mixed": MIXED}


def stock_unet(kind: str, **changes: Any) -> UNet2DConditionModel:
    """A stock U-Net in evaluation mode, every weight random; the same at each call."""
    return seeded(lambda: liven(UNet2DConditionModel(**CONFIGS[kind] | changes), louder=1.5))()


def inputs(kind: str, *, rows: int = 2, height: int = 13, width: int = 11, seed: int = 1) -> dict[str, Any]:
    """Arguments of `forward`; the sizes of the latents are odd by default."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    config = CONFIGS[kind]
    given: dict[str, Any] = {
        "sample": normal(rows, config.get("in_channels", 4), height, width),
        "timestep": torch.randint(1000, (rows,), generator=generator),
        "encoder_hidden_states": normal(rows, LENGTH, config.get("encoder_hid_dim") or config["cross_attention_dim"]),
    }
    if kind == "sdxl":
        sizes = 100 * normal(rows, 6).abs()
        given["added_cond_kwargs"] = {"text_embeds": normal(rows, 40), "time_ids": sizes}
    if kind == "upscale":
        given["class_labels"] = torch.randint(1000, (rows,), generator=generator)
    if kind == "mixed":
        given["class_labels"] = normal(rows, 11)
    return given


def doubled(given: Any) -> Any:
    """The same arguments in float64."""
    if isinstance(given, dict):
        return {name: doubled(value) for name, value in given.items()}
    return given.double() if isinstance(given, Tensor) and given.is_floating_point() else given


@dataclass(frozen=True)
class Trio:
    """The same weights three times.

    Attributes:
        ours: around a copy of stock's parameters.
        stock: in float32.
        exact: stock in float64.
    """

    ours: UNet
    stock: UNet2DConditionModel
    exact: UNet2DConditionModel

    def outputs(self, given: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
        """What the three make of the same arguments."""
        return self.ours(**given).sample, self.stock(**given).sample, self.exact(**doubled(given)).sample


def trio(kind: str, **changes: Any) -> Trio:
    """A stock U-Net and ours."""
    stock = stock_unet(kind, **changes)
    return Trio(UNet.from_stock(copy.deepcopy(stock)), stock, copy.deepcopy(stock).double())


def check(ours: Tensor, stock: Tensor, exact: Tensor, what: str, *, backward: bool = False) -> None:
    """Hold ours to the tolerance rule, stock's float32 being the eager path."""
    factor = BACKWARD_FACTOR if backward else FORWARD_FACTOR
    check_within(ours.detach(), stock.detach(), exact.detach(), factor=factor, what=what)


def check_gradients(models: Trio, given: dict[str, Any]) -> None:
    """The gradient of every weight, under a random cotangent."""
    outputs = models.outputs(given)
    cotangent = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(3))
    for model, output in zip((models.ours, models.stock, models.exact), outputs, strict=True):
        model.zero_grad()
        output.backward(cotangent.to(output.dtype))
    ours, stock, exact = (dict(model.named_parameters()) for model in (models.ours, models.stock, models.exact))
    assert set(ours) == set(stock)
    for name, parameter in ours.items():
        assert parameter.grad is not None, name
        check(parameter.grad, stock[name].grad, exact[name].grad, f"grad of {name}", backward=True)
