"""What a U-Net does to pictures between its transformer blocks, on a card: everything in channels-last.

Convolutions of a GPU take pictures whose channels are neighbours in memory. Given others, they lay every picture out
anew, and GroupNorm, which torch computes on the other layout, lays it out back; under autocast it and SiLU keep it in
float32 besides. Here pictures stay in channels-last from the first convolution to the last, and norms, with the time
embedding before them and SiLU after them, are kernels of mmattn's (`kernels.group_norm`). Values differ from stock's by
rounding, of which there is less.

It is so in training, where parameters stay as they are in memory (a convolution's weights are laid out as they are
cast), and in compiled denoising steps (`captured_pictures`). On a CPU, in float32, in other steps without gradients and
within transforms of torch.func everything is diffusers' own. So is whatever has hooks or adapters, and whatever
diffusers' other networks have (samplers within ResNets, other norms and activations).

Sizes: B pictures, C channels, H and W.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.nn.functional as F
from diffusers.models.resnet import ResnetBlock2D as _StockResnet
from diffusers.models.transformers.transformer_2d import Transformer2DModel as _StockTransformer
from diffusers.models.upsampling import Upsample2D as _StockUpsample
from torch import Tensor, nn

from mmattn.kernels.plain import is_compiled_call, is_eager_call
from mmattn.nn.packed_linears import is_hooked
from mmattn.ops.triton_missing import triton_missing

# In names of modules that adapters brought.
_OF_ADAPTERS = (".lora_", ".modules_to_save.")
# Measured there, and where kernels of our own run; a test adds "cpu", for Triton's interpreter.
_DEVICES = ("cuda",)
_HALVES = (torch.bfloat16, torch.float16)
_CAPTURED = "_has_captured_pictures"


def channels_last(x: Tensor) -> Tensor:
    """Pictures `[B, C, H, W]` whose channels are neighbours in memory."""
    return x.contiguous(memory_format=torch.channels_last)


def are_wanted_channels_last(unet: nn.Module, sample: Tensor) -> bool:
    """Should a U-Net have its pictures in channels-last, called with that sample?"""
    kind = sample.device.type
    if kind not in _DEVICES or not _is_their_time(unet) or sample.dim() != 4:
        return False
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else sample.dtype
    return dtype in _HALVES and _are_kernels_there(sample)


def _are_kernels_there(x: Tensor) -> bool:
    return (is_compiled_call(x) or is_eager_call(x)) and triton_missing(x.device.type) is None


def _is_their_time(module: nn.Module) -> bool:
    return torch.is_grad_enabled() or getattr(module, _CAPTURED, False)


def _fits(module: nn.Module, x: Tensor) -> bool:
    """Is this a picture for our kernels, given to that layer?"""
    return (
        x.device.type in _DEVICES
        and x.dtype in _HALVES
        and _is_their_time(module)
        and x.dim() == 4
        and _are_kernels_there(x)  # asked before the layout, which a tensor within vmap does not tell
        and x.is_contiguous(memory_format=torch.channels_last)
    )


def _is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Is it of that class, with nothing of somebody else's on it?"""
    return type(module) is kind and not is_hooked(module)


def _is_plain_conv(module: nn.Module) -> bool:
    # Who makes pictures that can be tiled puts another `_conv_forward` on each convolution.
    is_own = _is_plain(module, nn.Conv2d) and "_conv_forward" not in module.__dict__
    return is_own and cast(nn.Conv2d, module).padding_mode == "zeros"


def _is_biased_conv(module: nn.Module) -> bool:
    return _is_plain_conv(module) and module.bias is not None


def _is_plain_norm(module: nn.Module) -> bool:
    return _is_plain(module, nn.GroupNorm) and cast(nn.GroupNorm, module).weight is not None


class _LaidOut(torch.autograd.Function):
    """A convolution's weights cast and laid out in one pass, and their gradient likewise."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.dtype = weight.dtype
        ctx.layout = torch.contiguous_format if weight.is_contiguous() else torch.channels_last
        return weight.to(dtype=dtype, memory_format=torch.channels_last)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0].to(dtype=ctx.dtype, memory_format=ctx.layout), None


def _laid_out(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A convolution's weights in that dtype. Of that dtype already, they are left to the convolution to lay out, which
    keeps no copy until its backward pass."""
    if weight.dtype is dtype:
        return weight
    if torch.compiler.is_compiling() or not weight.requires_grad:
        return weight.to(dtype=dtype, memory_format=torch.channels_last)
    return _LaidOut.apply(weight, dtype)  # pyright: ignore[reportReturnType]


def _convolved(conv: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """A plain convolution with that bias."""
    own = cast(nn.Conv2d, conv)
    weight = _laid_out(own.weight, x.dtype)
    return F.conv2d(x, weight, bias, own.stride, own.padding, own.dilation, own.groups)  # pyright: ignore[reportArgumentType]


def _convolved_and_added(conv: nn.Module, x: Tensor, residual: Tensor, also: Tensor | None = None) -> Tensor:
    """A convolution of x, and its residual; `also` is added to the bias of a convolution that `_is_biased_conv`."""
    if not _is_biased_conv(conv):
        return residual + conv(x)
    hidden, bias = _convolved(conv, x, None), cast(Tensor, conv.bias)
    bias = bias if also is None else bias + also
    if residual.dtype is not hidden.dtype or residual.shape != hidden.shape:
        return residual + (hidden + bias[:, None, None])
    from mmattn.kernels.biased_sum import biased_sum  # only here, because it needs triton

    return biased_sum(residual, hidden, bias)


def _normed(norm: nn.Module, x: Tensor, shift: Tensor | None = None, *, has_silu: bool = False) -> Tensor:
    from mmattn.kernels.group_norm import group_norm  # only here, because it needs triton

    own = cast(nn.GroupNorm, norm)
    return group_norm(x, own.weight, own.bias, shift, own.num_groups, own.eps, has_silu)


class GroupNorm(nn.GroupNorm):
    """torch's, by a kernel of mmattn's where the pictures are in channels-last."""

    def forward(self, input: Tensor) -> Tensor:
        """[B, C, H, W] as the input lies in memory."""
        return _normed(self, input) if _fits(self, input) and self.weight is not None else super().forward(input)


class ResnetBlock2D(_StockResnet):
    """diffusers', without SiLU and the time embedding as operations of their own where the pictures are in
    channels-last."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """As stock."""
        if not self.runs_own_kernels(input_tensor, temb, *args, **kwargs):
            return super().forward(input_tensor, cast(Tensor, temb), *args, **kwargs)
        hidden = _normed(self.norm1, input_tensor, has_silu=True)
        hidden, shift = self._first_convolution(hidden, temb)
        # Not every convolution keeps the layout: somebody's own, or torch's without cuDNN.
        hidden = self.dropout(_normed(self.norm2, channels_last(hidden), shift, has_silu=True))
        return self._with_shortcut(hidden, input_tensor)

    def runs_own_kernels(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> bool:
        """Would it compute with mmattn's kernels, called with that? Then there is little left to compile."""
        if args or kwargs.get("scale") is not None or not _fits(self, input_tensor):
            return False
        if (temb is None) != (self.time_emb_proj is None):
            return False
        return (
            self.upsample is None
            and self.downsample is None
            and self.time_embedding_norm == "default"
            and self.output_scale_factor == 1.0
            and _is_plain(self.nonlinearity, nn.SiLU)
            and _is_plain_norm(self.norm1)
            and _is_plain_norm(self.norm2)
        )

    def _first_convolution(self, hidden: Tensor, temb: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Its output, and what is to be added to every place of it; the convolution's bias is in the latter."""
        if temb is None:
            return self.conv1(hidden), None
        projection: Any = self.time_emb_proj
        if not self.skip_time_act:
            temb = self.nonlinearity(temb)
        if _is_plain(projection, nn.Linear) and _is_biased_conv(self.conv1):
            shift = F.linear(cast(Tensor, temb), projection.weight, projection.bias + self.conv1.bias)
            hidden = _convolved(self.conv1, hidden, None)
        else:
            shift, hidden = projection(temb), self.conv1(hidden)
        return hidden, shift.expand(hidden.shape[:2]).contiguous()

    def _with_shortcut(self, hidden: Tensor, residual: Tensor) -> Tensor:
        """The second convolution, added to what went past it."""
        shortcut, conv = self.conv_shortcut, self.conv2
        if shortcut is None:
            return _convolved_and_added(conv, hidden, residual)
        if _is_biased_conv(conv) and _is_biased_conv(shortcut):
            return _convolved_and_added(conv, hidden, _convolved(shortcut, residual, None), shortcut.bias)
        return _convolved_and_added(conv, hidden, shortcut(residual))


class Upsample2D(_StockUpsample):
    """diffusers', which stays in channels-last where the pictures are."""

    def forward(self, hidden_states: Tensor, output_size: int | None = None, *args: Any, **kwargs: Any) -> Tensor:
        """As stock."""
        is_usual = self.interpolate and self.use_conv and not self.use_conv_transpose and self.name == "conv"
        has_more = output_size is not None or args or kwargs.get("scale") is not None
        if not is_usual or has_more or self.norm is not None or not _fits(self, hidden_states):
            return super().forward(hidden_states, output_size, *args, **kwargs)
        count, channels, height, width = hidden_states.shape
        places = hidden_states.permute(0, 2, 3, 1)[:, :, None, :, None]
        doubled = places.expand(count, height, 2, width, 2, channels).reshape(count, 2 * height, 2 * width, channels)
        return cast(nn.Conv2d, self.conv)(doubled.permute(0, 3, 1, 2))


class Transformer2DModel(_StockTransformer):
    """diffusers', which leaves rows of places as they are: they are a picture in channels-last."""

    def _get_output_for_continuous_inputs(
        self, hidden_states: Tensor, residual: Tensor, batch_size: int, height: int, width: int, inner_dim: int
    ) -> Tensor:
        if not _fits(self, residual):
            return super()._get_output_for_continuous_inputs(
                hidden_states, residual, batch_size, height, width, inner_dim
            )
        if self.use_linear_projection:
            hidden_states = self.proj_out(hidden_states)
        picture = hidden_states.reshape(batch_size, height, width, inner_dim).permute(0, 3, 1, 2)
        if self.use_linear_projection:
            return picture + residual
        return _convolved_and_added(self.proj_out, picture, residual)


_KINDS: dict[type[nn.Module], type[nn.Module]] = {
    _StockResnet: ResnetBlock2D,
    _StockUpsample: Upsample2D,
    _StockTransformer: Transformer2DModel,
    nn.GroupNorm: GroupNorm,
}


@contextlib.contextmanager
def captured_pictures(unet: nn.Module) -> Iterator[None]:
    """Within it a U-Net's pictures are in channels-last without gradients too, where they would be in training."""
    layers: list[Any] = [unet, *(module for module in unet.modules() if type(module) in _KINDS.values())]
    for layer in layers:
        setattr(layer, _CAPTURED, True)
    try:
        yield
    finally:
        for layer in layers:
            delattr(layer, _CAPTURED)


def lay_out_weights(unet: nn.Module) -> None:
    """Lay out convolutions' weights as `captured_pictures` wants them, once and for all, where that is done: they are
    the same parameters with the same values, at another place in memory."""
    for name, module in unet.named_modules():
        # Adapters are small, and their files are written as they lie in memory: safetensors takes no other layout.
        is_own = isinstance(module, nn.Conv2d) and not any(part in name for part in _OF_ADAPTERS)
        weight = cast(nn.Conv2d, module).weight if is_own else None
        if weight is not None and weight.device.type in _DEVICES and weight.dtype in _HALVES:
            weight.data = channels_last(weight.data)


def adopt_picture_layers(unet: nn.Module) -> None:
    """Make a U-Net's layers for pictures those of this module: the same modules and parameters, of another class."""
    resnets = [module for module in unet.modules() if isinstance(module, _StockResnet)]
    own_norms = {norm for resnet in resnets for norm in (resnet.norm1, resnet.norm2)}
    for module in unet.modules():
        if type(module) in _KINDS and module not in own_norms:
            module.__class__ = _KINDS[type(module)]
