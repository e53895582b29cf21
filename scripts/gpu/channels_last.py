"""A U-Net of diffusers' parts in channels-last: what an experiment and profile_training.py try.

On a CPU its norms need Triton's interpreter, which is chosen before triton is imported.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.transformers.transformer_2d import Transformer2DModel
from torch import Tensor, nn

from mmattn.kernels.group_norm import group_norm


def channels_last(x: Tensor) -> Tensor:
    """Pictures [B, C, H, W] whose channels are neighbours in memory."""
    return x.contiguous(memory_format=torch.channels_last)


class _Conv(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(channels_last(input))


class _Norm(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return _normed(self, input)


class _ResNet(ResnetBlock2D):
    """Without SiLU and the time embedding as operations of their own."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        x = channels_last(input_tensor)
        hidden = self.conv1(_normed(self.norm1, x, has_silu=True))
        shift = self.time_emb_proj(self.nonlinearity(temb)).to(hidden.dtype)
        hidden = self.conv2(self.dropout(_normed(self.norm2, hidden, shift, has_silu=True)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + hidden


class _CompiledResNet(ResnetBlock2D):
    """By torch.compile, for each size by itself."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _compiled_resnet(self, input_tensor, temb)


_compiled_resnet = torch.compile(ResnetBlock2D.forward, fullgraph=True, dynamic=False)


class _Transformer(Transformer2DModel):
    """What comes out of its layers stays as it lies in memory."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, **sizes: int
    ) -> Tensor:
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        rows = hidden_states.reshape(batch_size, sizes["height"], sizes["width"], sizes["inner_dim"])
        picture = rows.permute(0, 3, 1, 2)
        return (picture if self.use_linear_projection else self.proj_out(picture)) + residual


def _normed(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, *, has_silu: bool = False) -> Tensor:
    return group_norm(channels_last(x), norm.weight, norm.bias, shift, norm.num_groups, norm.eps, has_silu)


def to_channels_last(unet: nn.Module, *, with_weights: bool = True) -> None:
    """Let every convolution take and give pictures in channels-last; without weights, those stay as they are."""
    for module in unet.modules():
        if with_weights and type(module) is nn.Conv2d:
            module.weight.data = channels_last(module.weight.data)
    _become(unet, {nn.Conv2d: _Conv})


def compile_resnets(unet: nn.Module) -> None:
    """Convolutions in channels-last, and every ResNet compiled."""
    to_channels_last(unet)
    _become(unet, {ResnetBlock2D: _CompiledResNet})


def _is_plain(resnet: ResnetBlock2D) -> bool:
    """Is it all that `_ResNet` does?"""
    return (
        resnet.upsample is None
        and resnet.downsample is None
        and resnet.time_emb_proj is not None
        and not resnet.skip_time_act
        and resnet.time_embedding_norm == "default"
        and resnet.output_scale_factor == 1.0
        and type(resnet.nonlinearity) is nn.SiLU
    )


def _become(unet: nn.Module, kinds: dict[type[nn.Module], type[nn.Module]]) -> None:
    for module in unet.modules():
        if type(module) in kinds:
            module.__class__ = kinds[type(module)]


def fuse_norms(unet: nn.Module) -> None:
    """Everything in channels-last, and norms with what is about them by the kernels of experiments/group_norm_silu.py:
    convolutions get and give what they compute with, nothing in between is laid out otherwise.

    Raises:
        RuntimeError: a ResNet of another kind than Stable Diffusion's.
    """
    to_channels_last(unet)
    for module in unet.modules():
        if type(module) is ResnetBlock2D and not _is_plain(module):
            raise RuntimeError("a ResNet that does something else than those of Stable Diffusion")
    _become(unet, {ResnetBlock2D: _ResNet, Transformer2DModel: _Transformer, nn.GroupNorm: _Norm})
