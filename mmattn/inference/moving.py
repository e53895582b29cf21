"""Moving the models of a façade to another device or dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.inference import folders
from mmattn.inference.linear import add_fast_products, drop_fast_products, use_fast_products
from mmattn.inference.origins import Origin, origin_of
from mmattn.inference.quantized import is_quantized
from mmattn.inference.traced_products import trace_products
from mmattn.models.compiled_steps import DEVICES
from mmattn.models.decoding import LayerContexts
from mmattn.models.saving import weights_dtype
from mmattn.nn import fuse
from mmattn.nn.projected_attention import ProjectedAttention

NetworkT = TypeVar("NetworkT", bound=nn.Module)
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


class Movable(ABC):
    """What has `to`: a façade.

    Attributes:
        compiled: takes the steps where they are compiled; None: they are not.
    """

    compiled: Any = None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it works."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Dtype of the weights."""

    @abstractmethod
    def _models(self) -> Sequence[nn.Module]:
        """All that is moved."""

    def to(
        self,
        device: torch.device | str | int | torch.dtype | None = None,
        dtype: torch.dtype | str | None = None,
    ) -> Self:
        """Move the model to another device or dtype, in place: `.to("cuda")`, `.to(torch.float16)`,
        `.to("cuda", torch.bfloat16)`. It then gives what a model that was opened there gives; compiled steps are
        compiled anew. Encoded pictures and sources stay where they are and have a `to` of their own.

        Args:
            device: where to, or a dtype; None: where it is.
            dtype: of the floating-point weights; None: as it is.

        Returns:
            The same object.

        Raises:
            UsageError: a device that cannot be used here or holds no numbers ("meta"), something that is no dtype of
                weights, weights in int8, models that are offloaded, or a device without compiled steps where they are
                on. Nothing has moved then.
        """
        if isinstance(device, torch.dtype):
            if dtype is not None:
                raise UsageError(f"to({device}, {dtype}): give a device and then a dtype, or one of them")
            device, dtype = None, device
        place = None if device is None else folders.usable_device(device)
        kind = None if dtype is None else _weights_dtype(dtype)
        moved = [model for model in self._models() if not _is_there(model, place, kind)]
        for model in moved:
            _check_movable(model)
        if moved and self.compiled is not None and place is not None and place.type not in DEVICES:
            raise UsageError(
                f"to(): compiled steps work on {' and '.join(DEVICES)}, not on {place}: set .compiled = None before"
            )
        for model in moved:
            self._move(model, place, kind)
        if moved and self.compiled is not None:
            self.compiled.reset()
        return self

    def _move(self, model: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
        kept = _kept_in_float32(model, dtype)
        # In inference mode, whose tensors can never be trained, only what was opened in it. And not by the `to` of
        # diffusers' models, which at every dtype warns of modules that are to stay in float32, even of none.
        with torch.inference_mode(any(parameter.is_inference() for parameter in model.parameters())):
            nn.Module.to(model, device=device, dtype=dtype)
            for name, tensor in kept.items():
                model.get_parameter(name).data = tensor.to(device=device, dtype=torch.float32)


class NetworkFacade(Movable, Generic[NetworkT]):
    """A façade on one network of ours, whose products have the form that suits its device.

    Attributes:
        network: the network.
    """

    network: NetworkT

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return next(self.network.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the network's weights."""
        return next(self.network.parameters()).dtype

    def _models(self) -> Sequence[nn.Module]:
        return [self.network]

    def _move(self, model: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> None:
        was_suited = drop_fast_products(model) or any(
            part.is_fused for part in model.modules() if isinstance(part, ProjectedAttention)
        )
        super()._move(model, device, dtype)
        if was_suited and self.device.type == "cpu":  # packed projections pack themselves again
            add_fast_products(model)
            if self.compiled is not None:
                trace_products(model)

    def _check_encoded(self, what: str, contexts: LayerContexts, origin: Origin | None) -> None:
        """Refuse what another model encoded, or this one on another device or in another dtype than it has now.

        Raises:
            UsageError: it was.
        """
        if origin is not None and origin is not origin_of(self.network):
            raise UsageError(f"these {what} were encoded by another model: encode them with this one")
        tensor = next(context.key for context in contexts if context is not None)
        is_dtype_free = torch.is_autocast_enabled(self.device.type)
        if tensor.device != self.device or (tensor.dtype != self.dtype and not is_dtype_free):
            raise UsageError(
                f"these {what} were encoded on {tensor.device} in {_short(tensor.dtype)}, and the model is on "
                f"{self.device} in {_short(self.dtype)} now: give {what}.to(model.device, model.dtype), or encode "
                "them again"
            )


def suit_products(network: nn.Module) -> None:
    """Put the products of a network, in place, into the form that suits the device that it is on.

    Raises:
        UsageError: as `mmattn.nn.fuse`.
    """
    if next(network.parameters()).device.type == "cpu":
        use_fast_products(network)  # packed projections alone gain nothing there
    else:
        fuse(network)


def _weights_dtype(dtype: torch.dtype | str) -> torch.dtype:
    found = dtype if isinstance(dtype, torch.dtype) else weights_dtype(dtype)
    if found is None:
        raise UsageError("to(): dtype 'auto' is that of a file: name one")
    if found not in DTYPES:
        raise UsageError(f"to(): weights are {', '.join(map(_short, DTYPES))}, not {_short(found)}")
    return found


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _is_there(model: nn.Module, device: torch.device | None, dtype: torch.dtype | None) -> bool:
    tensors = [*model.parameters(), *model.buffers()]
    return all(device in (None, tensor.device) for tensor in tensors) and all(
        dtype in (None, tensor.dtype) for tensor in tensors if tensor.is_floating_point()
    )


def _check_movable(model: nn.Module) -> None:
    name = type(model).__name__
    if is_quantized(model):
        raise UsageError(
            'to(): the weights are in 8 bits (quantize="int8"), which are for a CPU and have no other dtype: open the '
            "model without quantize to move it"
        )
    if any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in model.modules()):
        raise UsageError(
            f"to(): the {name} has hooks of accelerate or diffusers (offloading, casting), which move it themselves: "
            "remove them before"
        )
    if getattr(model, "is_quantized", False):
        raise UsageError(f"to(): the {name} is quantised: open it where and in what it shall work")


def _kept_in_float32(model: nn.Module, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Weights, by name, that half floats are too narrow for (T5's): transformers opens them in float32 as well."""
    names: set[str] = set()
    if dtype in (torch.float16, torch.bfloat16):
        names.update(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if dtype is torch.float16:
        names.update(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {
        name: parameter.data
        for name, parameter in model.named_parameters()
        if any(f".{part}." in f".{name}." for part in names)
    }
