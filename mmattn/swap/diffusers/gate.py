"""T-GATE (arXiv 2404.02747): after some step, cross-attention's outputs are reused and guidance is dropped.

Approximate, and therefore only on request. Up to step k everything runs as usual; then each cross-attention layer
gives, for the rest of the steps, the mean of its last outputs for the two halves of guidance, and the half without
the prompt is no longer computed. It works through the pipeline's step callback:

    swapped = mmattn.swap_attention(pipe, gate=12)
    pipe("a red circle", num_inference_steps=25, callback_on_step_end=swapped.gate)
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from diffusers.callbacks import PipelineCallback
from torch import Tensor

from mmattn.errors import RunError, UsageError

_TEXT = ("prompt_embeds",)
_SDXL = ("prompt_embeds", "add_text_embeds", "add_time_ids")
_INPAINT = ("mask", "masked_image_latents")
# Pipeline class: the tensors that hold both halves of guidance.
HALVED = {
    "StableDiffusionPipeline": _TEXT,
    "StableDiffusionImg2ImgPipeline": _TEXT,
    "StableDiffusionInpaintPipeline": (*_TEXT, *_INPAINT),
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLImg2ImgPipeline": _SDXL,
    "StableDiffusionXLInpaintPipeline": (*_SDXL, *_INPAINT),
}


class _GuidanceOff(float):
    """What the gate writes into the pipeline; whoever starts the pipeline anew overwrites it."""


class Gate(PipelineCallback):
    """The state of one pipeline's gate, and the callback to pass to the pipeline. One generation at a time.

    Attributes:
        step: k, counted from 1; the outputs of step k are those that are reused.
    """

    def __init__(self, step: int, pipe: Any) -> None:
        # Nothing is registered as diffusers' config: a gate is never saved.
        name = type(pipe).__name__
        if name not in HALVED:
            raise UsageError(f"gate serves {', '.join(HALVED)}, not {name}")
        if step < 1:
            raise UsageError(f"gate is {step}: give the step, counted from 1, whose outputs are reused")
        self.step = step
        self._inputs = list(HALVED[name])
        self._pipe: Any = pipe
        self._run: Any = None  # the scheduler's list of times: a new object for each run
        self._is_paused = False
        self.reset()

    def __deepcopy__(self, memo: dict[int, Any]) -> Gate:
        copy = Gate.__new__(Gate)
        memo[id(self)] = copy
        copy.step, copy._inputs = self.step, list(self._inputs)
        copy._pipe = memo.get(id(self._pipe))  # the copied pipeline, when that is what is being copied
        copy._run, copy._is_paused = None, False
        copy.reset()
        return copy

    @property
    def tensor_inputs(self) -> list[str]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What the pipeline hands to the callback."""
        return self._inputs

    def callback_fn(
        self, pipeline: Any, step_index: int, timesteps: Any, callback_kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Called by the pipeline at the end of each step."""
        if pipeline is not self._pipe:
            raise UsageError("gate: this callback belongs to another pipeline; pass the gate of its own swap")
        self._is_called_back = True
        last = step_index + 1 >= pipeline.num_timesteps
        if last:
            self.reset()
        elif step_index + 1 == self.step:
            if not self._outputs or self._run is not pipeline.scheduler.timesteps:
                raise RunError(
                    f"gate={self.step}: no cross-attention layer has an output to be reused: the swap was restored, or "
                    "something has replaced its processors (see check())"
                )
            if pipeline.do_classifier_free_guidance:
                self._outputs = {layer: _mean_of_halves(output) for layer, output in self._outputs.items()}
                callback_kwargs |= {name: callback_kwargs[name].chunk(2)[1] for name in self._inputs}
                self._mark = _GuidanceOff(0.0)
            else:
                self._mark = _GuidanceOff(pipeline.guidance_scale)
            pipeline._guidance_scale = self._mark
        return callback_kwargs

    def reset(self) -> None:
        """Forget the outputs."""
        self._outputs: dict[Any, Tensor] = {}
        self._mark: _GuidanceOff | None = None
        self._calls = 0
        self._is_called_back = False

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block layers compute as if there were no gate, and it sees none of it."""
        self._is_paused = True
        try:
            yield
        finally:
            self._is_paused = False

    def reused(self, layer: Any, hidden_states: Tensor) -> Tensor | None:
        """The output that a layer gives instead of computing one; None before the gate."""
        if self._mark is None or self._is_paused:
            return None
        output = self._outputs.get(layer)
        is_of_this_run = self._pipe._guidance_scale is self._mark  # or it was started anew, the last run broken off
        if not is_of_this_run or output is None or output.shape[:2] != hidden_states.shape[:2]:
            self.reset()
            return None
        return output

    def noted(self, layer: Any, output: Tensor) -> Tensor:
        """Remember a layer's output, and hand it on."""
        if self._is_paused:
            return output
        times = self._pipe.scheduler.timesteps
        if times is not self._run:
            self.reset()
            self._run = times
        if layer is next(iter(self._outputs), layer):
            self._calls += 1
        if self._calls > self.step and not self._is_called_back:
            raise RunError(f"gate={self.step} has no effect: call the pipeline with callback_on_step_end=swapped.gate")
        self._outputs[layer] = output
        return output


def _mean_of_halves(output: Tensor) -> Tensor:
    without, with_prompt = output.chunk(2)
    return (without + with_prompt) / 2
