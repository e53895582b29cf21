"""Recording diffusion models while they draw: which places of the picture looked at which words of the prompt.

R rows of the model's batch, P prompts, H heads, C cells of a layer's grid, T tokens kept.
"""

from __future__ import annotations

import contextlib
import inspect
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.maps.capture import SeenAttention, is_recomputing, watching
from mmattn.maps.drawn_texts import DrawnTexts, Texts
from mmattn.maps.in_place import Hook
from mmattn.maps.joint import check_joint, picture_part
from mmattn.maps.layers import (
    attending_layers,
    check_heads,
    check_not_compiled,
    check_not_compiling,
    chosen_layers,
    grid_of,
)
from mmattn.maps.left_out import kept_places, put_back
from mmattn.maps.prompt_memory import noting_prompts
from mmattn.maps.record import AttentionMaps, is_recording
from mmattn.maps.recordings import RecordedPicture
from mmattn.ops.same_pass import MapsAsked

_log = logging.getLogger(__name__)
_MODELS = ("unet", "transformer")
_ALL_STEPS = -1
# Pipelines whose batches hold other rows than a negative and a positive half, or views of a larger picture.
_OTHER_ORDERS = ("Pix2Pix", "LEdits", "PAG", "LuminaPipeline", "Panorama")
_ONE_HALF = ("Flux", "Chroma")  # transformers that get prompts and negative prompts in calls of their own, if at all
_RISING = ("LuminaNextDiT",)  # models whose times rise from noise to picture


@contextlib.contextmanager
def watching_pipeline(pipeline: Any, maps: AttentionMaps) -> Iterator[None]:
    """Within the block the pipeline's U-Net, or transformer, is looked at, and its prompts are noted.

    Raises:
        UsageError: no such model in it, one that is compiled or has no such layers.
    """
    model = next((part for name in _MODELS if isinstance(part := pipeline.components.get(name), nn.Module)), None)
    if model is None:
        raise UsageError(f"record_attention: {type(pipeline).__name__} has neither a unet nor a transformer")
    maps.wanted.refuse_for("pipeline, which has its own", ("tokenizer",))
    if maps.wanted.guidance != "both" and _is_one_of(pipeline, _OTHER_ORDERS):
        raise UsageError(
            f"record_attention: which rows of {type(pipeline).__name__} follow the prompt is not known: guidance='both'"
            " records them all"
        )
    is_apart = type(model).__name__.startswith(_ONE_HALF) or "guider" in pipeline.components
    if maps.wanted.guidance != "conditional" and is_apart:
        raise UsageError(
            f"record_attention: guidance={maps.wanted.guidance!r} is for pipelines whose batch has two halves, not for "
            f"a {type(pipeline).__name__}; leave it out"
        )
    drawing = Drawing(model, maps, pipeline, is_apart)
    with drawing.watched(), noting_prompts(pipeline, drawing.note):
        yield


@contextlib.contextmanager
def watching_model(model: nn.Module, maps: AttentionMaps) -> Iterator[None]:
    """Within the block a U-Net, or another diffusers model, by itself is looked at; every row of it.

    Raises:
        UsageError: it is compiled or has no such layers, or prompts without a tokenizer.
    """
    if maps.wanted.guidance != "conditional":
        raise UsageError("record_attention: guidance is a pipeline's; of a model by itself every row is recorded")
    if (maps.wanted.prompts is None) != (maps.wanted.tokenizer is None):
        raise UsageError(
            "record_attention: a model by itself needs both prompts and tokenizer to know words, or neither"
        )
    with Drawing(model, maps).watched():
        yield


@dataclass(eq=False)
class Drawing:
    """One recorder's view of a model that draws.

    Attributes:
        model: the U-Net.
        maps: gets a `RecordedPicture` for each picture.
        pipeline: around it; None for a model by itself.
        is_apart: guidance's halves run one after the other, if at all, the conditional one first.
        pictures: those that are being drawn, in the order of the rows that are kept.
    """

    model: nn.Module
    maps: AttentionMaps
    pipeline: Any = None
    is_apart: bool = False
    pictures: list[RecordedPicture] = field(default_factory=list)
    _is_fresh: bool = True  # the next forward begins a generation
    _has_noted: bool = False  # it may: prompts were encoded, by the pipeline or by a callback on the way
    _is_guided: bool | None = None
    _step: int = 0
    _most_steps: int = 0
    _last_time: float = float("inf")
    _batch: int = 0  # rows of the forward that is under way, and those that are kept
    _rows: range = range(0)
    _size: tuple[int, int] = (0, 0)
    _text: Tensor | None = None  # of the forward that is under way
    _first_text: Tensor | None = None  # of the generation's first forward
    _first_rows: Tensor = field(default_factory=lambda: torch.empty(0))  # of it, those of the pictures
    _latest_text: Tensor | None = None
    _timesteps: Any = None  # of the generation
    _guided_step: int | None = None  # a guider's count of steps, each of which may have several forwards
    _count: int = 0  # of rows of the generation's first forward
    _is_aside: bool = False  # the forward that is under way is none of the generation's own
    _unseen: dict[str, str] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)
    _joint: set[int] = field(default_factory=set)  # ids of layers of joint attention
    _asked: MapsAsked | None = None  # for the pictures that are being drawn

    def __post_init__(self) -> None:
        self._texts = DrawnTexts(self.model, self.maps.wanted, self.pipeline)
        self._signature = inspect.signature(self.model.forward)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look at the model within the block."""
        name = "the model" if self.pipeline is None else "the pipeline's model"
        check_not_compiled(name, self.model)
        layers = chosen_layers(attending_layers(self.model, self.maps.role), self.maps.wanted.layers)
        for layer in layers:
            if layer.is_joint:
                check_joint(layer.name, layer.module)
            count = getattr(layer.module, "heads", getattr(layer.module, "num_heads", None))
            if isinstance(count, int):
                check_heads(self.maps.wanted.heads, count, layer.name)
        self._numbers = {id(layer.module): layer.number for layer in layers}
        self._joint = {id(layer.module) for layer in layers if layer.is_joint}
        self.maps.layer_names = {layer.number: layer.name for layer in layers}
        self.maps.why_empty = self._why_empty
        self.maps.drawing = self
        hook = self.model.register_forward_pre_hook(Hook(self._before), with_kwargs=True)
        try:
            with watching([layer.module for layer in layers], lambda: is_recording(self.maps), self._see, self._ask):
                yield
        finally:
            hook.remove()
        self.maps.warn_of(self._unseen)
        steps = self.maps.wanted.steps
        if steps is not None and self.maps.texts and max(steps) >= self._most_steps:
            _log.warning(
                "record_attention: steps=%s, but there were %d steps, 0 to %d",
                steps,
                self._most_steps,
                self._most_steps - 1,
            )

    # What is known of the texts.

    def note(self, arguments: dict[str, Any], result: Any) -> None:
        """A pipeline has encoded prompts."""
        if "do_classifier_free_guidance" in arguments:
            self._is_guided = bool(arguments["do_classifier_free_guidance"])
        self._has_noted = True
        self._texts.note(arguments, result)

    def expect(self, texts: Texts, *, is_guided: bool) -> None:
        """The next forward begins to draw these, says a façade."""
        self._is_fresh, self._is_guided = True, is_guided
        self._texts.expect(texts)

    def take_images(self, images: Sequence[Image.Image]) -> None:
        """The pictures that came of what was recorded last."""
        for picture, image in zip(self.pictures, images, strict=False):
            picture.image = image

    # While the model runs.

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        check_not_compiling()
        if is_recomputing() or not is_recording(self.maps):
            return
        given = self._signature.bind_partial(*args, **kwargs).arguments
        sample = given.get("sample", given.get("hidden_states"))
        size = _size_of(sample, given)
        if sample is None or size is None:
            raise UsageError(
                f"record_attention: {type(model).__name__} draws no pictures [batch, channels, rows, columns]"
            )
        text = given.get("encoder_hidden_states")
        self._text = text if isinstance(text, Tensor | None) else getattr(text, "text", None)  # a UNetContext
        now, is_training = _number(given.get("timestep"))
        now = -now if type(model).__name__.startswith(_RISING) else now
        # Times fall within a generation. A pipeline says when one begins, unless it is given embeddings.
        is_new = self._is_fresh or now > self._last_time or (self._has_noted and not self._goes_on)
        is_new = is_new or (self.pipeline is None and (now == self._last_time or is_training))
        guider = None if self.pipeline is None else self.pipeline.components.get("guider")
        if guider is not None:
            is_new = is_new or self._timesteps is not self._scheduled
        self._guided_step, latest = getattr(guider, "_step", None), self._guided_step
        is_again = self._is_guidance(sample.shape[0]) if guider is None else self._guided_step == latest
        self._is_aside = not is_new and now == self._last_time and is_again
        if self._is_aside:
            return
        self._batch, self._rows = sample.shape[0], self._kept_rows(sample.shape[0])
        self._size = size
        is_other = not is_new and self._has_other_text(sample.shape[0])
        if is_new or len(self._rows) != len(self.pictures) or (is_other and self.pipeline is None):
            self._begin(sample.shape[0])
        else:
            self._step += 1
            if is_other and self.maps.wanted.prompts is None and any(picture.prompt for picture in self.pictures):
                _log.warning(
                    "record_attention: from step %d on a picture is drawn from another text: its maps go by the words "
                    "of the first",
                    self._step,
                )
        self._most_steps = max(self._most_steps, self._step + 1)
        self._last_time, self._is_fresh, self._has_noted = now, False, False

    def _is_guidance(self, count: int) -> bool:
        """Whether a further forward at one time is some guidance's: it has other rows, or another text."""
        first, text = self._first_text, self._text
        if count != self._count:
            return True
        if first is None or text is None or first is text:
            return False
        return first.shape != text.shape or not torch.equal(first, text)

    def _has_other_text(self, count: int) -> bool:
        """Whether these pictures are drawn from another text than in their first forward, said once."""
        text, latest, self._latest_text = self._text, self._latest_text, self._text
        if text is latest or text is None or not len(self._first_rows):
            return False
        rows = self._rows_of(text, count)
        if rows.shape == self._first_rows.shape and torch.equal(rows, self._first_rows):
            return False
        self._first_rows = rows[:0]
        return True

    def _rows_of(self, text: Tensor, count: int) -> Tensor:
        """The text [R, Lk, C] of each row that is kept, of `count`."""
        each = max(1, count // len(text))
        return text.detach()[[row // each for row in self._rows]]

    def _kept_rows(self, rows: int) -> range:
        wanted = self.maps.wanted.guidance
        if self.pipeline is None or wanted == "both":
            return range(rows)
        guided = self._halves
        if guided is None:
            raise UsageError(
                f"record_attention: whether {type(self.pipeline).__name__} is guided is not known: where another"
                " pipeline runs its model, record that one; guidance='both' records every row"
            )
        if not guided:
            if wanted == "unconditional":
                raise UsageError("record_attention: guidance='unconditional', but this call has no guidance")
            return range(rows)
        return range(rows // 2, rows) if wanted == "conditional" else range(rows // 2)

    def _begin(self, count: int) -> None:
        steps, wanted = self._num_steps, self.maps.wanted.steps
        if steps is not None and wanted is not None and max(wanted) >= steps:
            raise UsageError(
                f"record_attention: steps={wanted}, but this generation has {steps} steps, 0 to {steps - 1}"
            )
        texts = self._texts.of_rows(self._text, self._rows, count, is_guided=bool(self._halves))
        kept = self._texts.kept(texts, None if self._text is None else self._text.shape[1])
        self.pictures = [RecordedPicture(*text, places) for text, places in zip(texts, kept, strict=True)]
        self._step, self._count, self._first_text, self._asked = 0, count, self._text, None
        self._latest_text, self._timesteps = self._text, self._scheduled
        self._first_rows = torch.empty(0) if self._text is None else self._rows_of(self._text, count)

    @property
    def _num_steps(self) -> int | None:
        """Forwards of a generation at most, where the pipeline's scheduler says it."""
        return None if self._scheduled is None else len(self._scheduled)

    @property
    def _scheduled(self) -> Any:
        """The times of the pipeline's scheduler, which makes new ones for each generation."""
        return getattr(getattr(self.pipeline, "scheduler", None), "timesteps", None)

    @property
    def _goes_on(self) -> bool:
        """Whether the scheduler's times are still those of the generation under way."""
        return self._scheduled is not None and self._timesteps is self._scheduled

    @property
    def _halves(self) -> bool | None:
        """Whether the batch has two halves; None: not known."""
        if self.is_apart:
            return False
        return getattr(self.pipeline, "do_classifier_free_guidance", self._is_guided)

    def _ask(self, module: nn.Module) -> MapsAsked | None:
        """The weights that `_see` is going to take of a layer's forward."""
        wanted = self.maps.wanted
        is_passed_over = wanted.steps is not None and self._step not in wanted.steps
        if not self.pictures or self._is_aside or is_passed_over or id(module) in self._joint:
            return None
        if self._asked is None or self._asked.rows != self._rows:
            kept = [picture.kept for picture in self.pictures]
            keys = None if None in kept else tuple(tuple(places or ()) for places in kept)
            heads = None if wanted.heads is None else tuple(wanted.heads)
            self._asked = MapsAsked(self._rows, keys, heads, average="head" not in wanted.views)
        return self._asked

    def _see(self, module: nn.Module, seen: SeenAttention | None) -> None:
        if not self.pictures or self._is_aside:  # without pictures, the layer was called by itself
            return
        wanted, number = self.maps.wanted, self._numbers[id(module)]
        if seen is None or seen.rows != self._batch:  # windows, say
            processor = getattr(module, "processor", None)
            self._unseen[self.maps.layer_names[number]] = type(processor or module).__name__
            return
        if wanted.steps is not None and self._step not in wanted.steps:
            return
        where = f"record_attention: {self.maps.layer_names[number]}"
        keys, (total, places) = range(seen.sizes[2]), kept_places(module)
        count = len(keys) if total is None else total
        if id(module) in self._joint:
            count = length = 0 if self._text is None else self._text.shape[1]
            seen, first = picture_part(module, seen, length, self._size[0] * self._size[1])
            keys = range(first, first + length)
        heads, num_places, _ = seen.sizes
        check_heads(wanted.heads, heads, self.maps.layer_names[number])
        step = self._step if "step" in wanted.views else _ALL_STEPS
        grid = grid_of(self._size, num_places, where=where)
        if not self.pictures[0].sums:
            self.maps.texts += self.pictures
        for row, picture in zip(self._rows, self.pictures, strict=True):
            weights = seen.asked_for(row)
            if places is not None:
                weights = seen.kept(row, None, wanted.heads, average="head" not in wanted.views)
                weights = put_back(weights, places[row * len(places) // seen.rows], count, picture.kept)
            elif weights is None:
                weights = _columns(seen, row, picture.kept, keys, wanted.heads, average="head" not in wanted.views)
            # Tokens that a swapped layer leaves out as padding have none.
            missing = (count if picture.kept is None else len(picture.kept)) - weights.shape[-1]
            picture.add(number, step, grid, torch.nn.functional.pad(weights, (0, missing)) if missing else weights)

    def _why_empty(self) -> str:
        if self._unseen:
            name, processor = next(iter(self._unseen.items()))
            return (
                f"{name} ran under {processor}, whose attention cannot be seen (and {len(self._unseen) - 1} more): set "
                "the default processor with model.set_attn_processor(AttnProcessor2_0()), or swap_attention"
            )
        if self._most_steps:
            return (
                f"there were {self._most_steps} steps, 0 to {self._most_steps - 1}, and steps={self.maps.wanted.steps}"
            )
        return "the model did not run within record_attention() (in this thread)"


def _is_one_of(pipeline: Any, parts: Sequence[str]) -> bool:
    """Whether one of these is a part of the name of a pipeline's class, or of one above it."""
    return any(part in each.__name__ for each in type(pipeline).__mro__ for part in parts)


def _columns(
    seen: SeenAttention, row: int, kept: list[int] | None, keys: range, heads: list[int] | None, *, average: bool
) -> Tensor:
    """Weights [H', C, T] of a row, whose text has these keys."""
    if kept is None and len(keys) == seen.sizes[2]:
        return seen.kept(row, None, heads, average=average)
    inside = list(keys) if kept is None else [keys[place] for place in kept if place < len(keys)]
    device = (seen.query if seen.query is not None else seen.weights).device  # pyright: ignore
    return seen.kept(row, torch.tensor(inside, dtype=torch.long, device=device), heads, average=average)


def _size_of(sample: Any, given: dict[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of what is drawn; None where it is no picture."""
    if not isinstance(sample, Tensor):
        return None
    if sample.dim() == 4:
        return sample.shape[2], sample.shape[3]
    places = given.get("img_ids")  # of packed places, [L, 3]: each with its row and column
    if sample.dim() != 3 or not isinstance(places, Tensor) or places.shape[-1] != 3:
        return None
    places = places.reshape(-1, 3)
    own = places[places[:, 0] == places[0, 0]]  # not those of given pictures (FLUX.1 Kontext)
    rows, columns = (int(each) + 1 for each in own.amax(0)[1:])
    return rows, columns


def _number(time: Any) -> tuple[float, bool]:
    """A timestep as a number, and whether every row has its own."""
    if isinstance(time, Tensor):
        return float(time.max()), time.numel() > 1 and bool((time != time.flatten()[0]).any())
    return (float("inf") if time is None else float(time)), False
