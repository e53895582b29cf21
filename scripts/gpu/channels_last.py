"""The diffusion U-Net in channels-last, for profile_training.py: changes of diffusers' classes in this process."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

if "cpu" in sys.argv:  # Triton decides when a kernel is defined whether its interpreter runs it
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

EXPERIMENTS = Path(__file__).resolve().parent / "experiments"


def is_channels_last(x: Tensor) -> bool:
    """Are the channels of pictures [B, C, H, W] neighbours in memory?"""
    return x.is_contiguous(memory_format=torch.channels_last)


def to_channels_last(*, with_weights: bool = False) -> None:
    """Let every convolution take and give pictures in channels-last; weights stay as they are, or are laid out so when
    they are first met."""

    def forward(self: nn.Conv2d, x: Tensor) -> Tensor:
        if with_weights and not is_channels_last(self.weight):
            self.weight.data = self.weight.data.contiguous(memory_format=torch.channels_last)
        return self._conv_forward(x.contiguous(memory_format=torch.channels_last), self.weight, self.bias)

    nn.Conv2d.forward = forward


def fuse_norms() -> None:
    """Everything in channels-last, and norms with what is about them by the kernels of the experiment: convolutions get
    and give half types, nothing in between is laid out otherwise or kept in float32."""
    sys.path.append(str(EXPERIMENTS))
    from channels_last_norm import channels_last_group_norm

    def normed(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, *, has_silu: bool = False) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        return channels_last_group_norm(
            x, norm.weight, norm.bias, norm.num_groups, norm.eps, shift=shift, has_silu=has_silu
        )

    def block(self: ResnetBlock2D, x: Tensor, temb: Tensor) -> Tensor:
        if self.upsample is not None or self.downsample is not None or self.time_embedding_norm != "default":
            raise RuntimeError("this change is for the ResNets of training.py's U-Net")
        shift = self.time_emb_proj(self.nonlinearity(temb)).to(x.dtype)
        hidden = self.conv1(normed(self.norm1, x, has_silu=True))
        hidden = self.conv2(self.dropout(normed(self.norm2, hidden, shift, has_silu=True)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden

    def leave(self: Any, hidden_states: Tensor, residual: Tensor, batch_size: int, **sizes: int) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        rows = hidden_states.reshape(batch_size, sizes["height"], sizes["width"], sizes["inner_dim"])
        picture = rows.permute(0, 3, 1, 2)
        return (picture if self.use_linear_projection else self.proj_out(picture)) + residual

    to_channels_last(with_weights=True)
    nn.GroupNorm.forward = normed
    ResnetBlock2D.forward = block
    Transformer2DModel._get_output_for_continuous_inputs = leave


def compile_all_but_resnets() -> None:
    """Let training.torch_compile compile transformer layers only: what calls the kernels above stays as it is."""
    from mmattn.inference.diffusion.task import DiffusionTask

    DiffusionTask.repeated_layers = tuple(each for each in DiffusionTask.repeated_layers if each is not ResnetBlock2D)
