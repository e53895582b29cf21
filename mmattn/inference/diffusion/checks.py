"""Arguments of text-to-image generation, checked before the first step."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from typing import Any

from diffusers.schedulers.scheduling_pndm import PNDMScheduler

from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.texts import check_unicode


def each_prompt(prompts: str | Sequence[str], name: str = "prompts") -> list[str]:
    """The prompts as a list.

    Raises:
        UsageError: an empty list, or something that is no text.
    """
    if isinstance(prompts, str):
        check_unicode(prompts, f"the only one of {name}")
        return [prompts]
    if not isinstance(prompts, list | tuple):
        raise UsageError(f"{name} is a {type(prompts).__name__}: give a str or a list of them")
    if not prompts:
        raise UsageError(f"no {name} were given: the list is empty")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str):
            raise UsageError(f"{name}: number {number} of {len(prompts)} is a {type(prompt).__name__}, not a str")
        check_unicode(prompt, f"{name}: number {number} of {len(prompts)}")
    return list(prompts)


def check_whole(value: Any, name: str) -> int:
    """A whole number of 1 or more.

    Raises:
        UsageError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise UsageError(f"{name} is {value!r}: it must be a whole number of 1 or more")
    return value


def check_steps(num_inference_steps: Any, scheduler: Any) -> int:
    """A number of steps that the scheduler can take.

    Raises:
        UsageError: no whole number, less than 1, fewer than the scheduler needs, or more than the model was trained
            with.
    """
    steps = check_whole(num_inference_steps, "num_inference_steps")
    trained = scheduler.config.get("num_train_timesteps")
    if trained is not None and steps > trained:
        raise UsageError(f"num_inference_steps is {steps}, but the model was trained with {trained}: take no more")
    # By its class: a scheduler made from another's config keeps that one's settings in its own.
    if isinstance(scheduler, PNDMScheduler) and not scheduler.config.get("skip_prk_steps"):
        fewest = scheduler.pndm_order
        if steps < fewest:
            raise UsageError(
                f"num_inference_steps is {steps}, but PNDMScheduler begins with {fewest} Runge-Kutta steps "
                f"(skip_prk_steps is false): take {fewest} or more, or another scheduler"
            )
    return steps


def check_size(height: Any, width: Any, default: tuple[int, int], factor: int) -> tuple[int, int]:
    """Height and width of the pictures in pixels.

    Args:
        height: None for the model's own.
        width: likewise.
        default: the model's own height and width.
        factor: what both must be multiples of.

    Raises:
        UsageError: no whole numbers, or no multiples.
    """
    sides = []
    for name, value, own in (("height", height, default[0]), ("width", width, default[1])):
        side = own if value is None else check_whole(value, name)
        if side % factor:
            lower, upper = side // factor * factor, (side // factor + 1) * factor
            near = f"{lower} or {upper}" if lower else str(upper)
            raise UsageError(f"{name} is {side}, but this model draws multiples of {factor}: take {near}")
        sides.append(side)
    return sides[0], sides[1]


def check_guidance(guidance_scale: Any, unet: Any, *, has_negative: bool) -> float:
    """A guidance scale that means something for this U-Net.

    Args:
        guidance_scale: above 1 leads towards the prompt; 1 or 0 turns guidance off.
        unet: a U-Net distilled from guided predictions (`time_cond_proj_dim`) takes the scale as an input.
        has_negative: there are negative prompts.

    Raises:
        UsageError: a scale that would be ignored or is none, or negative prompts that would be ignored.
    """
    is_number = isinstance(guidance_scale, int | float) and not isinstance(guidance_scale, bool)
    if not is_number or not math.isfinite(guidance_scale) or guidance_scale < 0:
        raise UsageError(f"guidance_scale is {guidance_scale!r}: it must be a number of 0 or more")
    if 0 < guidance_scale < 1:
        raise UsageError(
            f"guidance_scale is {guidance_scale}, which would be ignored: guidance begins above 1; 1 or 0 turns it off"
        )
    if unet.config.get("time_cond_proj_dim") is not None:
        if has_negative:
            raise UsageError(
                "negative prompts would be ignored: this U-Net was distilled and takes guidance as a number only "
                "(time_cond_proj_dim); leave them out"
            )
        if guidance_scale < 1:
            raise UsageError(
                f"guidance_scale is {guidance_scale}: this U-Net was distilled with guidance as an input "
                "(time_cond_proj_dim), which begins at 1"
            )
    elif guidance_scale <= 1 and has_negative:
        raise UsageError(
            f"guidance_scale is {guidance_scale}, which turns guidance off, so the negative prompts would be ignored: "
            "leave them out, or take a guidance_scale above 1"
        )
    return float(guidance_scale)


def check_rescale(guidance_rescale: Any, *, is_guided: bool) -> float:
    """`guidance_rescale` as a number from 0 to 1.

    Raises:
        UsageError: another value, or one that would be ignored because there is no guidance.
    """
    is_number = isinstance(guidance_rescale, int | float) and not isinstance(guidance_rescale, bool)
    if not is_number or not 0 <= guidance_rescale <= 1:
        raise UsageError(f"guidance_rescale is {guidance_rescale!r}: it must be a number from 0 to 1")
    if guidance_rescale and not is_guided:
        raise UsageError(f"guidance_rescale {guidance_rescale} would be ignored: guidance_scale is 1 or less")
    return float(guidance_rescale)


def check_text_width(unet: Any, text_encoders: Sequence[Any]) -> None:
    """Text encoders whose states, side by side, have the width that the U-Net's cross-attention reads.

    Raises:
        CheckpointError: they do not.
    """
    widths = [encoder.config.hidden_size for encoder in text_encoders if encoder is not None]
    expected = expected_width(unet)
    if widths and sum(widths) != expected:  # without text encoders, prompts come as embeddings
        raise CheckpointError(
            f"the text encoder gives states of width {' + '.join(map(str, widths))}, but the U-Net's cross-attention"
            f" reads {expected}: they do not belong together"
        )


def expected_width(unet: Any) -> int:
    """Channels of the text states that a U-Net takes.

    Raises:
        CheckpointError: the U-Net's levels differ in it, or it reads no text.
    """
    projected = unet.config.get("encoder_hid_dim")
    width = unet.config.cross_attention_dim if projected is None else projected
    widths = set(width) if isinstance(width, list | tuple) else {width}
    if len(widths) != 1 or not isinstance(next(iter(widths)), int):
        raise CheckpointError(f"the U-Net's cross_attention_dim is {width}: one width of text for all levels is needed")
    return widths.pop()


def takes_generator(scheduler: Any) -> bool:
    """Whether a scheduler's steps take a generator for what they draw."""
    return "generator" in inspect.signature(scheduler.step).parameters
