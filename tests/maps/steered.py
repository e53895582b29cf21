"""What the tests of steering share: small pipelines, and the steered attention written out in maps."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import mmattn
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.models.unet import UNet
from tests.inference.tiny_pipelines import pixel_parts, seeds, stable_diffusion, stable_diffusion_xl
from tests.swap.zoo_base import quiet

TOKENS = 11  # of the small Stable Diffusion's texts, padding included
PROMPT = "a red circle above a blue square"
RED, CIRCLE, BLUE, END = 2, 3, 6, 8  # positions of its words, after a special token, and of the end
EDITED = "a green circle above a blue star"
KINDS = ("sd", "xl", "pixels", "ours", "ours pixels", "swapped")


def build(kind: str) -> Any:
    """A pipeline with random weights."""
    if kind.endswith("pixels"):
        pipe: Any = quiet(PixelPipeline(**pixel_parts()))
    else:
        pipe = stable_diffusion_xl() if kind == "xl" else stable_diffusion()
    if kind.startswith("ours"):
        pipe.unet = UNet.from_stock(pipe.unet)
    if kind == "swapped":
        mmattn.swap_attention(pipe)
    return pipe


@torch.no_grad()
def run(pipe: Any, prompts: Any = PROMPT, *, steps: int = 3, seed: int = 7, **settings: Any) -> Tensor:
    """What is drawn, every picture from the same noise: latents, or pixels where there are none."""
    count = len([prompts] if isinstance(prompts, str) else prompts) * settings.get("num_images_per_prompt", 1)
    kind = "pt" if isinstance(pipe, PixelPipeline) else "latent"
    values = {"num_inference_steps": steps, "guidance_scale": 3.0, "output_type": kind} | settings
    return pipe(prompts, generator=seeds(*[seed] * count), **values).images


class WrittenOut:
    """torch's fused attention in plain products, with its maps changed where a test says so.

    Args:
        change: gets maps [B, H, Lq, Lk], whether they are over the text, and the step; returns the maps to be used.
        unet: whose runs are the steps.
    """

    def __init__(self, change: Callable[[Tensor, bool, int], Tensor], unet: Any) -> None:
        self.change, self.unet, self.step = change, unet, -1
        self.stock = F.scaled_dot_product_attention

    def attend(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if query.shape[2] == TOKENS:  # the text encoder's
            return self.stock(query, key, value, *args, **kwargs)
        maps = (query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5).softmax(dim=-1)
        return self.change(maps, key.shape[2] == TOKENS, self.step) @ value

    @contextlib.contextmanager
    def used(self) -> Iterator[None]:
        """In place of torch's, in stock processors."""

        def count(*_: Any) -> None:
            self.step += 1

        hook = self.unet.register_forward_pre_hook(count)
        F.scaled_dot_product_attention = self.attend  # pyright: ignore[reportAttributeAccessIssue]
        try:
            yield
        finally:
            F.scaled_dot_product_attention = self.stock
            hook.remove()


def coverage(mask: np.ndarray, height: int, width: int) -> Tensor:
    """Means over the cells of a grid whose sides divide the mask's."""
    rows, columns = mask.shape
    cells = mask.reshape(height, rows // height, width, columns // width)
    return torch.from_numpy(cells.mean(axis=(1, 3)))
