"""What every family of the zoo is made of: the entry, and helpers for random weights and inputs."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

Built = TypeVar("Built")
QUERY_OR_KEY = re.compile(r"(to_q|to_k|add_[qk]_proj|\b[qk]_proj|query|key|\b[qk])\.weight$")
VALUE_OR_OUT = re.compile(r"(to_v|add_v_proj|to_out\.0|to_add_out)\.weight$")


def itself(built: Any) -> nn.Module:
    return built


def unet_of(built: Any) -> nn.Module:
    return built.unet


@dataclass(frozen=True)
class Family:
    """One model family: how to build it small with random weights, and how to run it."""

    name: str
    kind: str  # "diffusers" or "transformers"
    build: Callable[[], Any]  # a pipeline or a model in evaluation mode; two builds are equal
    run: Callable[[Any], Tensor]  # one float tensor; the same at each call
    model_of: Callable[[Any], nn.Module] = itself  # the module whose attention is in question


class Draw:
    """Random inputs from a seed, on a model's device and (if real) of its type."""

    def __init__(self, model: Any, seed: int = 1) -> None:
        self.device, self.dtype = model.device, model.dtype
        self.generator = torch.Generator().manual_seed(seed)  # on the CPU, so that every device gets the same

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.device, self.dtype)

    def integers(self, high: int, *shape: int, low: int = 0) -> Tensor:
        return torch.randint(low, high, shape, generator=self.generator).to(self.device)

    def lengths(self, *counts: int) -> Tensor:
        """A padding mask: a row of `counts[i]` ones, then zeros, for each i."""
        places = torch.arange(max(counts))
        return (places < torch.tensor(counts)[:, None]).long().to(self.device)


def seeded(build: Callable[[], Built]) -> Callable[[], Built]:
    """Run `build` from one seed and leave the caller's random state alone."""

    @functools.wraps(build)
    def wrapped() -> Built:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return build()

    return wrapped


@torch.no_grad()
def liven(model: Any, *, sharper: float = 2.0, louder: float = 1.0) -> Any:
    """Evaluation mode, with weights that all count: a fresh model has zeros, ones and nearly flat attention."""
    for name, weight in model.named_parameters():
        if weight.numel() == 1:
            weight.fill_(0.7)  # a gate, 0 when fresh
        elif weight.ndim == 1:
            weight.add_(0.1 * torch.randn_like(weight))
        elif not weight.any():
            weight.normal_(std=weight[0].numel() ** -0.5)
        elif QUERY_OR_KEY.search(name):
            weight.mul_(sharper)
        elif VALUE_OR_OUT.search(name):
            # Fresh attention is faint beside the residual path, and a U-Net's middle faintest beside the skips.
            weight.mul_(louder * (3 if name.startswith("mid_block") else 1))
    return model.eval()


def quiet(pipe: Any) -> Any:
    pipe.set_progress_bar_config(disable=True)
    return pipe
