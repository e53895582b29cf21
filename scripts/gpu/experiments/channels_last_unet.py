"""A denoising step of Stable Diffusion's U-Net as a CUDA graph, in channels-last with our norms, beside other ways.

Random weights, float16, 64 x 64, both halves of guidance for one picture; the text's keys and values are there already.
Stock is diffusers'; "graphed" is what `TextToImage.compile` does: transformer blocks compiled, pictures in
channels-last with our norms, everything replayed; beside it the same with pictures as stock lays them out, and with
ResNets compiled, in channels-last, in place of our norms. Milliseconds a step, variants in turn, medians.

    python scripts/gpu/experiments/channels_last_unet.py [--rows FILE] [--tiny --device cpu]

About two minutes on an H100. A verdict: a gain over what torch.compile makes of ResNets, or none.
"""

from __future__ import annotations

import contextlib
import copy
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import experiment
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.resnet import ResnetBlock2D
from diffusion import SD15, SMALL, Step, made, unet_step
from measure import Options, median_and_spread, wall_ms
from torch import Tensor, nn

from mmattn.inference.diffusion.context_once import context_projected_once
from mmattn.models.unet import CompiledUNet, UNet, pictures

TABLE = "A denoising step in channels-last, ms"
OURS = "graphed"
STOCKS_LAYOUT = "pictures as stock's"
COMPILED = f"ResNets by {experiment.COMPILED}"


class _Conv(nn.Conv2d):
    """In channels-last, whatever comes."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(pictures.channels_last(input))


class _CompiledResnet(ResnetBlock2D):
    """By torch.compile, for each size by itself."""

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _compiled_resnet(self, input_tensor, temb)


_compiled_resnet = torch.compile(ResnetBlock2D.forward, fullgraph=True, dynamic=False)


def compile_resnets(unet: nn.Module) -> None:
    """ResNets compiled, and all convolutions in channels-last."""
    for module in unet.modules():
        if isinstance(module, ResnetBlock2D):
            module.__class__ = _CompiledResnet
        elif type(module) is nn.Conv2d:
            module.__class__ = _Conv
            module.weight.data = pictures.channels_last(module.weight.data)


@contextlib.contextmanager
def layout_of(name: str) -> Iterator[None]:
    """Within it a variant is installed and takes its first step: what it captures is what is replayed."""
    own, pictures._DEVICES = pictures._DEVICES, pictures._DEVICES if name == OURS else ()
    try:
        yield
    finally:
        pictures._DEVICES = own


# Of the largest number; stock's own kernels are as far from each other in half types.
FURTHEST = 5e-3


@contextlib.contextmanager
def compiled_variants(stock: Any, options: Options) -> Iterator[dict[str, Callable[[Step], Tensor]]]:
    """Each variant of our U-Net by its name: what runs a step of it."""
    with contextlib.ExitStack() as until:
        runs = {}
        for name in (STOCKS_LAYOUT, COMPILED, OURS):
            unet = UNet.from_stock(copy.deepcopy(stock))
            if name == COMPILED:
                compile_resnets(unet)
            until.enter_context(context_projected_once(unet))
            steps = CompiledUNet(unet, backend="eager" if options.tiny else "inductor")
            with layout_of(name):
                until.enter_context(steps.installed())
            runs[name] = partial(run_step, unet)
        yield runs


def run_step(unet: Any, step: Step) -> Tensor:
    """A step of that U-Net."""
    return step(unet)


@torch.no_grad()
def main() -> int:
    """One row."""
    options = experiment.start(__doc__)
    stock = made(UNet2DConditionModel, SD15 | (SMALL if options.tiny else {}), options).eval()
    step, problems = unet_step(stock), list[str]()
    with compiled_variants(stock, options) as variants:
        runs = {"stock": partial(run_step, stock, step)} | {name: partial(run, step) for name, run in variants.items()}
        outputs: dict[str, Tensor] = {}
        for name, run in runs.items():
            begin = time.perf_counter()
            with layout_of(name):
                outputs[name] = run().double()
            print(f"  {name}: first step {time.perf_counter() - begin:.1f} s", flush=True)
        largest = outputs["stock"].abs().max().item()
        for name, output in outputs.items():
            apart = (output - outputs["stock"]).abs().max().item() / largest
            if not apart <= FURTHEST:
                problems.append(f"{name}: {apart:.1e} of the largest number from stock")
        with options.turn():
            times = wall_ms(runs, 1 if options.tiny else 2 + 3 * options.repeats, options.device)
    found = {name: median_and_spread(times[name]) for name in runs}
    middles = {name: middle for name, (middle, _) in found.items()}
    said = experiment.verdict("SD 1.5", middles, [OURS], [STOCKS_LAYOUT, COMPILED], options.device)
    shown = {name: f"{middle:.2f} ±{spread:.0%}" for name, (middle, spread) in found.items()}
    options.add(TABLE, step="SD 1.5 U-Net, float16, 64 x 64, batch 2", **shown, verdict=said)
    print("\n".join(problems) or "all values right", flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
