"""`mmattn.steer_attention`: which words count how much, and where, in what a diffusion pipeline draws."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mmattn.errors import RunError, UsageError
from mmattn.maps.edits import PromptEdit, check_share, check_weights
from mmattn.maps.layers import is_compiled
from mmattn.maps.prompt_memory import noting_prompts
from mmattn.maps.steer_changes import MapExchange, ScoreBias, map_exchange, score_bias
from mmattn.maps.steer_install import STEERERS, SteeredLayer, standing_in, steered_layers
from mmattn.maps.steer_prompts import SteeredPrompts
from mmattn.maps.steer_regions import Region, read_regions
from mmattn.ops.observe import Steer

_log = logging.getLogger(__name__)
_KEPT = 4  # texts; a pipeline passes one, callbacks may change it


@contextlib.contextmanager
def steer_attention(
    pipe: Any,
    weights: Mapping[str, float] | None = None,
    regions: Mapping[str, Any] | None = None,
    edit: PromptEdit | Literal["replace", "refine"] | None = None,
    *,
    end_weight: float | None = None,
    steps: float = 1.0,
) -> Iterator[None]:
    """Within the block (and this thread or task only), steer the cross-attention of what a pipeline draws.

    Words are looked up in the prompts that the pipeline is given, in all places where they occur. Only the conditional
    half of guidance is steered. LoRA, IP-Adapters, ControlNets and `swap_attention` keep working; everything is as it
    was afterwards. The forward stays on its fused backend, and layers and steps without a change run as they are: a
    weight of 1, a region that covers everything and an edit of a prompt to itself give the very same pictures.

    Args:
        pipe: a diffusers pipeline with a `UNet2DConditionModel`, stock, swapped or ours (SD 1.x, 2.x, XL), or a
            `TextToImage`.
        weights: words or phrases and their weight: each query's attention to their tokens is multiplied by it, and its
            attention to all tokens normalised again. 0 hides a word.
        regions: phrases and where in the picture they may be looked for: a box (left, top, right, bottom) in fractions
            of the picture, or a mask [height, width] of any size: a picture, an array, a tensor. Attention to the
            phrase is multiplied by the share of a place that the region covers, and normalised again. All other words
            may be looked for everywhere.
        edit: prompt-to-prompt (arXiv 2208.01626): prompts come in pairs [source, edited] in one batch and from equal
            noise, and the edited picture takes the attention maps of the source. A `PromptEdit`, or its kind.
        end_weight: weight of the token that ends the text and of padding while a region limits a phrase; None: 0. Text
            encoders put the whole prompt into them, so that with more weight objects appear outside their regions.
        steps: share of a generation's steps, from its first on, in which weights and regions count. Layout is settled
            in the first ones; afterwards the whole prompt may work on details. Image to image begins later in the
            schedule: its share is of the steps that are left.

    Raises:
        UsageError: arguments that cannot be, a pipeline or layers that cannot be steered, a compiled U-Net; while
            drawing: a word that is not in a prompt, or prompts that cannot be matched.
    """
    pipeline, unet = _opened(pipe)
    if weights is None and regions is None and edit is None:
        raise UsageError("steer_attention: nothing to steer; give weights, regions or edit")
    if end_weight is not None and not regions:
        raise UsageError("steer_attention: end_weight is for regions, and there are none; leave it out")
    if edit is not None and steps != 1:
        raise UsageError("steer_attention: steps is for weights and regions; PromptEdit has cross_steps and self_steps")
    if edit is not None and (weights is not None or regions is not None):
        raise UsageError(
            "steer_attention: an edit takes the source's maps as they are, so that weights and regions would not reach "
            "them; use PromptEdit(weights=...) with an edit, or leave the edit out"
        )
    steerer = _Steering(
        pipeline,
        unet,
        steered_layers(unet),
        check_weights(weights if weights is not None else {}, "steer_attention", least=0.0),
        read_regions(regions if regions is not None else {}),
        check_weights({"end_weight": end_weight or 0.0}, "steer_attention", least=0.0)["end_weight"],
        check_share(steps, "steer_attention: steps"),
        None if edit is None else _read_edit(edit),
    )
    if any(isinstance(other, _Steering) and other.unet is unet for other in STEERERS.get()):
        raise UsageError("steer_attention: this U-Net is being steered already; give everything to one block")
    with standing_in(unet, steerer.layers), noting_prompts(pipeline, steerer.note):
        token = STEERERS.set((*STEERERS.get(), steerer))
        try:
            yield
        finally:
            STEERERS.reset(token)
    if not steerer.passes:
        _log.warning("steer_attention: the U-Net did not run within the block, in this thread")
    elif steerer.is_in_vain:
        _log.warning(
            "steer_attention: nothing was changed: the shares of the steps leave no step, or no layer is small enough "
            "for max_self_tokens"
        )


def _read_edit(edit: Any) -> PromptEdit:
    if isinstance(edit, PromptEdit):
        return edit
    if edit in ("replace", "refine"):
        return PromptEdit(edit)
    raise UsageError(f"steer_attention: edit is {edit!r}; give 'replace', 'refine' or a PromptEdit")


def _opened(pipe: Any) -> tuple[Any, nn.Module]:
    """The pipeline and its U-Net."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    pipeline = pipe.pipeline if hasattr(pipe, "pipeline") else pipe
    unet = getattr(pipeline, "unet", None)
    if unet is not None and is_compiled(unet):
        raise UsageError(
            "steer_attention: the U-Net is compiled, and a compiled graph cannot be steered; steer the pipeline with "
            "the U-Net that was not compiled (unet._orig_mod, or a model loaded anew)"
        )
    if not isinstance(unet, UNet2DConditionModel):
        raise UsageError(
            f"steer_attention takes a pipeline with a UNet2DConditionModel (Stable Diffusion 1.x, 2.x, XL, mmattn's "
            f"own) or a TextToImage, not a {type(pipe).__name__}"
        )
    return pipeline, unet


@dataclass(frozen=True, eq=False)
class _TextPlan:
    """What to do for one text tensor, which is held so that its identity stays its own. Tensors of inference mode have
    no version, so that their contents are held too."""

    text: Tensor
    version: int
    contents: Tensor | None
    is_guided: bool
    bias: ScoreBias | None
    exchange: MapExchange | None

    def is_for(self, text: Tensor, is_guided: bool) -> bool:
        """Whether it was made for this tensor as it is now."""
        if text is not self.text or is_guided != self.is_guided:
            return False
        return text._version == self.version if self.contents is None else torch.equal(text, self.contents)


@dataclass(eq=False)
class _Generation:
    """The steps of one generation: `timesteps` is the scheduler's, which sets new ones for each; `first` and `latest`
    are numbers of steps in it."""

    timesteps: Tensor
    first: int
    latest: int

    def goes_on(self, timesteps: Tensor, number: int) -> bool:
        """Whether a step belongs to it."""
        return timesteps is self.timesteps and number >= self.latest

    def share(self, number: int) -> float:
        """The share of its steps that is done before this one."""
        return (number - self.first) / (len(self.timesteps) - self.first)


@dataclass(frozen=True, eq=False)
class _Pass:
    """One run of the U-Net: n pictures a row of text, latents of a size, the share of the steps that are done; of the
    layers those that were changed."""

    plan: _TextPlan
    pictures: int
    size: tuple[int, int]
    share: float
    changed: set[str] = field(default_factory=set)


class _Steering:
    """One block under way."""

    def __init__(
        self,
        pipeline: Any,
        unet: nn.Module,
        layers: dict[nn.Module, SteeredLayer],
        weights: dict[str, float],
        regions: list[Region],
        end_weight: float,
        steps: float,
        edit: PromptEdit | None,
    ) -> None:
        self.unet = unet
        self.layers = layers
        self.passes = 0
        self.is_in_vain = False
        self._has_changed = False
        self._pipeline = pipeline
        self._weights, self._regions, self._end_weight, self._edit = weights, regions, end_weight, edit
        self._steps = steps
        self._prompts = SteeredPrompts(pipeline)
        self._plans: list[_TextPlan] = []
        self._generation: _Generation | None = None
        self._now: _Pass | None = None

    def layer(self, module: nn.Module) -> SteeredLayer:
        """The layer that a module is."""
        return self.layers[module]

    def note(self, arguments: dict[str, Any], result: Any) -> None:
        """Remember prompts."""
        self._prompts.note(arguments, result)

    def begin(self, unet: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Look at what the U-Net is given, and decide what this run is to be."""
        if unet is not self.unet:
            return
        self._now = None
        self.passes += 1
        if torch.is_grad_enabled() and getattr(unet, "is_gradient_checkpointing", False):
            raise UsageError(
                "steer_attention: gradient checkpointing runs layers again outside the block, unsteered; call "
                "unet.disable_gradient_checkpointing(), or steer under torch.no_grad()"
            )
        given = dict(zip(("sample", "timestep", "encoder_hidden_states"), args, strict=False)) | kwargs
        sample, text = given["sample"], given["encoder_hidden_states"]
        text = text if isinstance(text, Tensor) else text.text  # a UNetContext
        plan = self._plan_of(text)
        share = 0.0
        if plan.exchange is not None or self._steps < 1:
            timesteps, number = self._step(given["timestep"])
            if self._generation is None or not self._generation.goes_on(timesteps, number):
                self._generation = _Generation(timesteps, number, number)
                if plan.exchange is not None:
                    plan.exchange.check_noise(sample)
            self._generation.latest = number
            share = self._generation.share(number)
        self._now = _Pass(plan, sample.shape[0] // text.shape[0], (sample.shape[-2], sample.shape[-1]), share)

    def change(self, module: nn.Module, num_queries: int) -> Steer | None:
        """What to do to a layer's attention in this run; None: nothing."""
        layer, now = self.layers.get(module), self._now
        if layer is None or now is None:
            return None
        change = self._cross(layer, now) if layer.role == "cross" else self._self(now, num_queries)
        if change is not None:
            now.changed.add(layer.name)
            self._has_changed = True
        return change

    def end(self, unet: nn.Module) -> None:
        """See to it that all was done that was to be done."""
        now = self._now
        if unet is not self.unet or now is None:
            return
        self._now = None
        self.is_in_vain = not self._has_changed and any(plan.bias or plan.exchange for plan in self._plans)
        cross = next((layer for layer in self.layers.values() if layer.role == "cross"), None)
        if cross is not None and not now.changed and self._cross(cross, now) is not None:
            raise RunError(
                "steer_attention: the U-Net ran and no layer of it was steered; if torch.compile runs its forward, "
                "steer with a U-Net that is not compiled"
            )

    def _cross(self, layer: SteeredLayer, now: _Pass) -> Steer | None:
        bias, exchange = now.plan.bias, now.plan.exchange
        if bias is not None and now.share < self._steps:
            return functools.partial(bias.apply, size=now.size, pictures=now.pictures, where=layer.name)
        if exchange is not None and self._edit is not None and now.share < self._edit.cross_steps:
            return exchange.cross
        return None

    def _self(self, now: _Pass, num_queries: int) -> Steer | None:
        edit, exchange = self._edit, now.plan.exchange
        if edit is None or exchange is None or now.share >= edit.self_steps or num_queries > edit.max_self_tokens:
            return None
        return functools.partial(exchange.own_maps, pictures=now.pictures)

    def _plan_of(self, text: Tensor) -> _TextPlan:
        is_guided = bool(getattr(self._pipeline, "do_classifier_free_guidance", False))
        plan = next((plan for plan in self._plans if plan.is_for(text, is_guided)), None)
        if plan is not None:
            return plan
        prompts = self._prompts.prompts_of(text, is_guided=is_guided)
        length, device = text.shape[1], text.device
        bias = exchange = None
        if self._edit is not None:
            exchange = map_exchange(prompts, length, self._edit, device)
        else:
            bias = score_bias(prompts, length, self._weights, self._regions, self._end_weight, text)
        version, contents = (-1, text.clone()) if text.is_inference() else (text._version, None)
        plan = _TextPlan(text, version, contents, is_guided, bias, exchange)
        self._plans = [plan, *self._plans[: _KEPT - 1]]
        return plan

    def _step(self, timestep: Any) -> tuple[Tensor, int]:
        """The scheduler's steps, and the number of this one."""
        timesteps = self._pipeline.scheduler.timesteps
        time = timestep.flatten()[0] if isinstance(timestep, Tensor) else timestep
        found = (timesteps == torch.as_tensor(time, device=timesteps.device)).nonzero()
        if not len(found):
            raise RunError(
                f"steer_attention: the U-Net is given time {float(time):g}, which is no step of the pipeline's "
                f"{type(self._pipeline.scheduler).__name__}, so that it is not known how much is done"
            )
        return timesteps, int(found[0])
