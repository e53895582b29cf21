"""Products with weights of 8 bits on a CPU: torch's dynamic quantisation, by its own kernels (fbgemm).

A weight is rounded to 8 bits with a scale for each output, once; the input is rounded as it comes, to 7 bits, because
processors without VNNI saturate on products of 8-bit pairs.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn.packed_linears import PackedLinears, packing_refusals
from mmattn.nn.projected_attention import ProjectedAttention
from mmattn.nn.vocabulary_head import VocabularyHead

_ENGINE = "fbgemm"


class Int8Linear(nn.Module):
    """`x @ W^T + b` with W in 8 bits.

    Args:
        weight: `[N, K]`, float32 on a CPU.
        bias: `[N]` or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self._packed = pack_int8(weight, bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`, float32."""
        return torch.ops.quantized.linear_dynamic.default(x, self._packed, True)

    def extra_repr(self) -> str:
        """What `print(module)` adds."""
        return f"in_features={self.in_features}, out_features={self.out_features}"


class Int8Head(VocabularyHead):
    """A vocabulary head with its matrix in 8 bits; the word embedding stays as it is."""

    def product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `VocabularyHead`; the matrix is packed at the first call."""
        packed = self.__dict__.get("_packed")
        if packed is None:
            packed = self.__dict__["_packed"] = pack_int8(weight, bias)
        return torch.ops.quantized.linear_dynamic.default(hidden, packed, True)


def pack_int8(weight: Tensor, bias: Tensor | None) -> Any:
    """A weight `[N, K]` and its bias in fbgemm's form, 8 bits with a symmetric scale for each of the N outputs."""
    weight = weight.detach().float()
    scales = weight.abs().amax(dim=1).clamp_min(torch.finfo(torch.float32).tiny) / 127
    zeros = torch.zeros(weight.shape[0], dtype=torch.int64)
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = _ENGINE
    try:
        with warnings.catch_warnings():
            # torch announces that tensors of quantised dtypes will go; its fbgemm products take no other weights yet.
            warnings.filterwarnings("ignore", message=".*quantized tensor creation functions.*")
            quantized = torch.quantize_per_channel(weight, scales, zeros, 0, torch.qint8)
        return torch.ops.quantized.linear_prepack.default(quantized, None if bias is None else bias.detach().float())
    finally:
        torch.backends.quantized.engine = before


def quantize_linears(network: nn.Module) -> None:
    """Put every Linear and vocabulary head of a network into 8 bits, in place. The network is for inference only then.

    Raises:
        UsageError: not on a CPU, or a torch without fbgemm.
    """
    device = next(network.parameters()).device
    if device.type != "cpu":
        raise UsageError(
            f'quantize="int8" works on a CPU, the network is on {device}: pass device="cpu" or leave it out'
        )
    if _ENGINE not in torch.backends.quantized.supported_engines:
        raise UsageError(f'quantize="int8" needs a torch with {_ENGINE}, this one was built without it')
    for module in list(network.modules()):
        if isinstance(module, ProjectedAttention):
            _quantize_packed(module)
    for name, module in list(network.named_modules()):
        if type(module) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, Int8Linear(module.weight, module.bias))
        elif type(module) is VocabularyHead:
            module.__class__ = Int8Head


def is_quantized(network: nn.Module) -> bool:
    """Whether `quantize_linears` has been at a network."""
    return any(isinstance(module, Int8Linear | Int8Head) for module in network.modules())


class _InPacked(nn.Module):
    """Stands where a projection was that is now part of an `Int8Packed`."""


class Int8Packed:
    """Several projections of one input as one product in 8 bits, in the place of `PackedLinears`."""

    def __init__(self, linears: Mapping[str, nn.Linear]) -> None:
        parts = list(linears.values())
        biases: list[Tensor] = [linear.bias for linear in parts if linear.bias is not None]
        bias = torch.cat(biases) if biases else None
        self._product = Int8Linear(torch.cat([linear.weight for linear in parts]), bias)

    def __call__(self, x: Tensor) -> Tensor:
        """`[..., C]` to the projections side by side."""
        return self._product(x)

    def is_current(self, modules: Mapping[str, nn.Module | None]) -> bool:
        """Always: there are no other weights any more."""
        return True

    def requires_grad(self) -> bool:
        """Never: 8 bits are not trained."""
        return False

    def release(self) -> None:
        """Refuse: the weights in full precision are gone.

        Raises:
            UsageError: always.
        """
        raise UsageError("a quantised network is for inference only: open it without quantize to train it")


def _quantize_packed(module: ProjectedAttention) -> None:
    module.unfuse()
    linears = {name: module._modules[name] for name in module.packed_names}
    if packing_refusals(linears):
        return
    packed = Int8Packed(cast("dict[str, nn.Linear]", linears))
    for name in linears:
        setattr(module, name, _InPacked())
    module._packed = cast(PackedLinears, packed)
