"""Where steering enters a U-Net: stand-ins for the forward of its attention modules, which do nothing by themselves.

They ask the block that is under way in the caller's thread or task; others that use the same U-Net, and layers in
which nothing is to be changed, go through the module's own forward.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from mmattn.errors import RunError, UsageError
from mmattn.maps.in_place import Hook, in_place
from mmattn.nn.projected_attention import ProjectedAttention
from mmattn.ops.observe import Steer, steering
from mmattn.ops.request import Request
from mmattn.swap.diffusers.context_path import StandIn
from mmattn.swap.diffusers.install import InstallProcessor, plan_model
from mmattn.swap.diffusers.layer import Swapped
from mmattn.swap.layers import Options, SetAttribute
from mmattn.swap.verify import is_verifying


class Steerer(Protocol):
    """A block of `steer_attention` that is under way."""

    def begin(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A U-Net is about to run."""
        ...

    def change(self, module: nn.Module, num_queries: int) -> Steer | None:
        """What to do to a module's attention now; None: nothing."""
        ...

    def end(self, unet: nn.Module) -> None:
        """A U-Net has run."""
        ...

    def layer(self, module: nn.Module) -> SteeredLayer:
        """The layer that a module is."""
        ...


STEERERS: ContextVar[tuple[Steerer, ...]] = ContextVar("mmattn_steerers", default=())


def _steerers() -> tuple[Steerer, ...]:
    """The blocks that are under way here; none for a swap's `verify`."""
    return () if is_verifying() else STEERERS.get()


@dataclass(frozen=True, eq=False)
class SteeredLayer:
    """An attention layer of a U-Net.

    Attributes:
        name: its path.
        role: "self" or "cross".
        found: the processor that a stock layer had, None for ours.
        ours: computes the layer through `mmattn.attention` where the stock processor does not; None where it does.
    """

    name: str
    role: str
    found: Any = None
    ours: Swapped | None = None

    def run(self, module: nn.Module, original: Callable[..., Any], args: Any, kwargs: Any, steer: Steer) -> Any:
        """The layer's output with its attention to the text, or to itself, changed.

        Raises:
            UsageError: the processor was replaced within the block.
            RunError: the layer computed no attention that could be changed.
        """
        processor = getattr(module, "processor", None)
        if processor is not self.found:
            raise UsageError(
                f"steer_attention: the processor of {self.name} was replaced within the block; load adapters, swap and "
                "set processors before it"
            )
        once = _Once(steer)
        with steering(once):
            output = original(*args, **kwargs) if self.ours is None else _processed(self.ours, module, *args, **kwargs)
        if not once.is_done:
            raise RunError(
                f"steer_attention: {self.name} ({type(module).__name__}) computed no attention to be changed"
            )
        return output


class _Once:
    """Steers the first call; an IP-Adapter's attention to its picture comes after the text's."""

    def __init__(self, steer: Steer) -> None:
        self._steer = steer
        self.is_done = False

    def __call__(self, request: Request, run: Callable[[Request], Tensor]) -> Tensor:
        if self.is_done:
            return run(request)
        self.is_done = True
        return self._steer(request, run)


def _processed(
    processor: Any,
    module: nn.Module,
    hidden_states: Tensor,
    encoder_hidden_states: Any = None,
    attention_mask: Tensor | None = None,
    **others: Any,
) -> Any:
    """As `Attention.forward` with another processor; it leaves out what a processor does not take, too."""
    taken = inspect.signature(processor.__call__).parameters
    return processor(
        module,
        hidden_states,
        encoder_hidden_states=encoder_hidden_states,
        attention_mask=attention_mask,
        **{name: value for name, value in others.items() if name in taken},
    )


def steered_layers(unet: nn.Module) -> dict[nn.Module, SteeredLayer]:
    """The attention layers of a U-Net, stock, swapped or ours.

    Raises:
        UsageError: layers whose attention cannot be reached, each with the reason.
    """
    layers: dict[nn.Module, SteeredLayer] = {
        module: SteeredLayer(name, module.role)
        for name, module in unet.named_modules()
        if isinstance(module, ProjectedAttention)
    }
    refused = []
    for layer in plan_model(unet, "unet", Options(cache_context=False)).layers:
        if "_block" not in layer.name.partition(".")[0]:  # an IP-Adapter's own, in encoder_hid_proj
            continue
        module: Any = layer.module
        processor = getattr(module, "processor", None)
        reason = layer.refused if isinstance(module, Attention) and layer.role != "joint" else "no layer of its kind"
        if isinstance(processor, Swapped):
            reason = _swapped_refusal(processor)
        elif not isinstance(vars(module).get("forward", None), SteeredForward | None):
            reason = (
                "its forward is replaced, by a hook that moves or casts it or the like, which steering would pass by"
            )
        step: Any = layer.step
        if reason is None and not isinstance(processor, Swapped) and not isinstance(step, InstallProcessor):
            reason = f"{layer.old_class}: it leaves attention to diffusers' dispatcher"
        if reason is not None:
            refused.append(f"{layer.name}: {reason}")
            continue
        ours = None if isinstance(processor, Swapped) else step.ours
        layers[module] = SteeredLayer(layer.name, layer.role, processor, ours)
    if refused:
        more = f"; and {len(refused) - 3} more" if len(refused) > 3 else ""
        raise UsageError(f"steer_attention: {len(refused)} layers cannot be steered: {'; '.join(refused[:3])}{more}")
    return layers


def _swapped_refusal(processor: Swapped) -> str | None:
    if processor.settings.gate is not None:
        return "the swap has a gate, which reuses outputs: swap without one"
    if processor._attention_backend is not None:
        return "set_attention_backend sends it past mmattn: call reset_attention_backend() first"
    return None


class SteeredForward(StandIn):
    """Stands in for an attention module's `forward`."""

    def __init__(self, module: nn.Module, name: str = "forward") -> None:
        super().__init__(module, name)
        self._before = vars(module).get(name)  # such as a hook of accelerate

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = self.stock if self._before is None else self._before
        for steerer in () if torch.compiler.is_compiling() else _steerers():
            states = args[0] if args else kwargs.get("hidden_states", kwargs.get("x"))
            change = None if states is None else steerer.change(self.module, states.shape[1])
            if change is not None:
                return steerer.layer(self.module).run(self.module, original, args, kwargs, change)
        return original(*args, **kwargs)


@dataclass(eq=False)
class _AroundForward:
    """Tells the steerers when a U-Net begins to run and when it has run."""

    unet: nn.Module
    _hooks: tuple[Any, ...] = ()

    def do(self) -> None:
        """Hook in."""

        def begin(unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for steerer in _steerers():
                steerer.begin(unet, args, kwargs)

        def end(unet: nn.Module, args: Any, output: Any) -> None:
            for steerer in _steerers():
                steerer.end(unet)

        self._hooks = (
            self.unet.register_forward_pre_hook(Hook(begin), with_kwargs=True),
            self.unet.register_forward_hook(Hook(end)),
        )

    def undo(self, *, force: bool = False) -> str | None:
        """Take the hooks out."""
        for hook in self._hooks:
            hook.remove()
        return None

    def problem(self) -> str | None:
        """None: nobody else takes them out."""
        return None


def standing_in(unet: nn.Module, layers: dict[nn.Module, SteeredLayer]) -> contextlib.AbstractContextManager[None]:
    """Stand-ins in place within the block."""
    return in_place(
        unet,
        "steer_attention",
        lambda: [_AroundForward(unet), *(SetAttribute(module, "forward", SteeredForward(module)) for module in layers)],
    )
