"""What compiled inference shares, whatever the model: own compilations of a function, CUDA graphs."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import nn

from mmattn.errors import MmattnError, RunError, UsageError
from mmattn.ops.observe import OBSERVERS, STEER
from mmattn.ops.replay import replayed

DEVICES = ("cpu", "cuda")
_WARM_UPS = 2  # runs before a capture, in which libraries set themselves up

OutputsT = TypeVar("OutputsT")


def check_device(network: nn.Module, use_graphs: bool | None = None) -> torch.device:
    """Where the weights are.

    Args:
        network: whose steps are compiled.
        use_graphs: whether they are captured; None: on a CUDA device.

    Raises:
        UsageError: a device other than a CPU or a CUDA device, or graphs on a CPU.
    """
    device = next(network.parameters()).device
    if device.type not in DEVICES:
        raise UsageError(f"compile=True works on {' and '.join(DEVICES)}, the network is on {device}: leave it out")
    if use_graphs and device.type != "cuda":
        raise UsageError(f"use_graphs=True needs a CUDA device, the network is on {device}: leave it out")
    return device


def check_not_autocast(device: torch.device) -> None:
    """Raise on autocast: which casts were compiled in would depend on the first call.

    Raises:
        UsageError: autocast is on.
    """
    if torch.is_autocast_enabled(device.type):
        raise UsageError("compile=True does not go with autocast: open the model with dtype= instead")


def check_unwatched() -> None:
    """Raise where somebody wants to see or change attention, which a compiled step would pass over.

    Raises:
        UsageError: attention is recorded or steered.
    """
    if OBSERVERS.get() or STEER.get() is not None:
        raise UsageError(
            "attention cannot be recorded or steered in compiled steps: open the model without compile for that"
        )


@contextlib.contextmanager
def compiling() -> Iterator[None]:
    """Around a first call: what torch.compile raises becomes one clear line.

    Raises:
        RunError: the step cannot be compiled on this machine.
    """
    try:
        yield
    except MmattnError:
        raise
    except Exception as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RunError(f"compile=True: the step cannot be compiled here: {reason}; leave compile out") from error


def mark_varying(tensors: Sequence[tuple[torch.Tensor, Sequence[int]]]) -> None:
    """Tell torch.compile which axes of the tensors of a first call vary."""
    for tensor, axes in tensors:
        torch._dynamo.maybe_mark_dynamic(tensor, list(axes))


def captured(
    step: Callable[..., OutputsT], tensors: Sequence[Any], device: torch.device, pool: Any = None
) -> Callable[[], OutputsT]:
    """The step as a CUDA graph over these tensors; its outputs are good until the next call. Attention's backends are
    chosen for being replayed, here and wherever the step is compiled in `replayed()` before.

    Args:
        step: takes the tensors.
        tensors: at addresses that stay.
        device: a CUDA device.
        pool: memory shared with other graphs, none of which runs at the same time; None: its own.
    """
    with torch.cuda.device(device), replayed():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                step(*tensors)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        capture = torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local")
        # The current stream is entered once more: after a capture that fails, torch does not go back to it.
        with torch.cuda.stream(torch.cuda.current_stream()), capture:
            outputs = step(*tensors)

    def replay() -> OutputsT:
        graph.replay()
        return outputs

    return replay
