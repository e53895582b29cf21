"""Recording of attention weights beside the forward, while every output stays what it is.

Three families, one recorder. Our translator and vision-language model read each finished text once more in one pass,
so that beams and early stopping need no bookkeeping. Diffusion models and stock transformers models are looked at
while they run. Either way attention stays on its fused kernels, and weights are computed from its queries and keys.

H heads, L tokens of a text, Lk features of a picture or tokens of a source, C cells of a picture, T tokens kept.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextvars import ContextVar
from typing import Any, get_args

import numpy as np
import torch
from PIL import Image

from mmattn.errors import UsageError
from mmattn.maps.alignment import Alignment
from mmattn.maps.capture import seen_call
from mmattn.maps.draw import Heatmap, HeatmapGrid
from mmattn.maps.files import save_maps
from mmattn.maps.layers import Layers, Numbers, Role, as_numbers, check_heads
from mmattn.maps.recordings import (
    Place,
    Recorded,
    RecordedPair,
    RecordedPicture,
    RecordedText,
    TextToRecord,
)
from mmattn.maps.tokens import TextTokens
from mmattn.maps.wanted import Guidance, Prompts, Tokens, View, Wanted
from mmattn.ops.observe import AttentionCall, observing
from mmattn.ops.request import Request
from mmattn.ops.same_pass import MapsAsked
from mmattn.swap.verify import is_verifying

__all__ = ["AttentionMaps", "RecordedText", "TextToRecord", "record_attention", "recorders_of"]

_log = logging.getLogger(__name__)
_GRID_WORDS = 12  # that a grid shows unless it is told which


class AttentionMaps:
    """What `record_attention` fills: one entry in `texts` for every text or picture made within the block, in order.

    Attributes:
        texts: `RecordedText` (a text on a picture), `RecordedPicture` (drawn from a prompt) or `RecordedPair` (a
            translation), by the model that was recorded.
        layer_names: number to name of the layers, where they have one.
    """

    def __init__(self, target: Any, wanted: Wanted) -> None:
        self.target: Any = target  # None when the block has ended
        self.wanted = wanted
        self.texts: list[Recorded] = []
        self.layer_names: dict[int, str] = {}
        self.drawing: Any = None  # what looks at a diffusion model
        self.why_empty: Callable[[], str] = lambda: "the model made no text within record_attention()"

    @property
    def role(self) -> Role:
        """ "cross" or "self"."""
        return self.wanted.role

    def __len__(self) -> int:
        return len(self.texts)

    # Used by the façades of our models.

    def record(self, text: TextToRecord, read: Callable[[], object]) -> None:
        """Keep the weights of one text. `read` runs the model over it, and over nothing else, with one row."""
        self.texts.append(RecordedText(text, self.weights_of(read)[0]))

    def pair(
        self,
        target: TextTokens,
        source: TextTokens,
        read: Callable[[], object],
        *,
        align: Callable[[np.ndarray], Alignment] | None,
        best: tuple[Any, list[int] | None],
    ) -> RecordedPair:
        """The weights of one translation, which the caller puts into `texts`.

        Args:
            target: the tokens that the rows of `read` chose.
            source: the tokens that were attended to.
            read: as in `record`.
            align: as in `RecordedPair`.
            best: the module, and the heads, that tell alignments best.
        """
        weights, callers = self.weights_of(read)
        number = next((number for number in weights if callers[number] is best[0]), None)
        spot = None if number is None or self.wanted.heads is not None else (number, best[1])
        source = source if self.role == "cross" else target
        return RecordedPair(target, source, weights, is_shifted=False, best=spot, align=align)

    def weights_of(self, read: Callable[[], object]) -> tuple[dict[int, torch.Tensor], list[Any]]:
        """Float32 `[H, L, Lk]` by layer of what `read` does with one row, and the module of every layer."""
        calls: list[AttentionCall] = []
        asked = MapsAsked(heads=None if self.wanted.heads is None else tuple(self.wanted.heads))

        def ask(_: Request, caller: Any) -> MapsAsked | None:
            return asked if getattr(caller, "role", self.role) == self.role else None

        with observing(calls.append, ask):
            read()
        calls = [call for call in calls if call.role == self.role]
        chosen = self.wanted.numbered_layers(len(calls))
        weights = {number: self._weights(calls[number], asked) for number in chosen}
        return weights, [call.caller for call in calls]

    def _weights(self, call: AttentionCall, asked: MapsAsked) -> torch.Tensor:
        check_heads(self.wanted.heads, call.query.shape[1], f"in {self.role}-attention")
        seen = seen_call(call, asked=asked)
        weights = seen.asked_for(0)
        weights = seen.kept(0, None, self.wanted.heads, average=False) if weights is None else weights
        return weights.cpu()

    def expect_prompts(self, prompts: Sequence[str], negatives: Sequence[str] | None, *, is_guided: bool) -> None:
        """Say what is drawn next, of which the pipeline is given embeddings."""
        from mmattn.maps.denoising import Texts

        self.drawing.expect(
            Texts(list(prompts), None, None if negatives is None else list(negatives)), is_guided=is_guided
        )

    def take_images(self, images: Sequence[Image.Image]) -> None:
        """The pictures that came of what was recorded last."""
        self.drawing.take_images(images)

    def end(self) -> None:
        """Let go of the target, its model and pipeline: maps may outlive them."""
        reason = self.why_empty()
        self.why_empty = lambda: reason
        self.target = self.drawing = None

    def warn_of(self, unseen: Mapping[str, str]) -> None:
        """Say it where layers, by name, are in no map, since their attention could not be seen, while others are."""
        kept = {number for text in self.texts for number in text.weights} if unseen else set()
        missing = [name for number, name in self.layer_names.items() if name in unseen and number not in kept]
        if kept and missing:
            names, kinds = ", ".join(missing), ", ".join(sorted({unseen[name] for name in missing}))
            _log.warning("record_attention: in no map, because it cannot be seen how %s attends: %s", kinds, names)

    # Used by everybody.

    def array(self, text: int = 0, *, layer: Numbers = None, head: Numbers = None, step: Numbers = None) -> np.ndarray:
        """Weights of a text or picture, averaged over the layers, heads and steps chosen (all recorded by default).

        Texts: `[L, Lk]`, a row for each token's query. Drawn pictures: `[rows, columns, T]` at the finest grid among
        the layers, a column for each token kept (all, padding included, unless `tokens` was given; those sum to 1).

        Args:
            text: number of the text or picture in `texts`.
            layer: a layer's number, or several; attending layers are counted from 0.
            head: a head's number among those recorded, or several. Drawn pictures: needs `views=["head"]`.
            step: a step's number, or several: drawn pictures with `views=["step"]`.

        Raises:
            UsageError: nothing was recorded, or no such text, layer, head or step.
        """
        recorded = self._text(text)
        return recorded.array(self._averaged(recorded, layer, head, step))

    def heatmap(
        self,
        word: str | None = None,
        text: int = 0,
        *,
        layer: Numbers = None,
        head: Numbers = None,
        step: Numbers = None,
        place: Place = "predicting",
        occurrence: int = 0,
        image: Image.Image | None = None,
    ) -> Heatmap:
        """Where in the picture a word belongs: where the model looked for it, or which places of a drawn picture looked
        at it (several tokens of a word are added up there).

        Args:
            word: a word or phrase of the text, question or prompt; None: the mean over all that was generated.
            text: number of the text or picture in `texts`.
            layer: as in `array`.
            head: as in `array`.
            step: as in `array`.
            place: for generated words, the query that chose the word ("predicting") or the one that had read it.
            occurrence: which one, when the word occurs more than once.
            image: the picture to draw on, where the recorder does not know it: a pipeline returns it at its end.

        Raises:
            UsageError: as `array`; the word is not there; self-attention was recorded, which has no picture; or `image`
                is none of Pillow's.
        """
        recorded = self._text(text)
        if self.role != "cross":
            raise UsageError("heatmap() needs record_attention(role='cross'); array() gives the self-attention weights")
        if place not in get_args(Place):
            raise UsageError(f"heatmap: place is {place!r}; choose one of {', '.join(get_args(Place))}")
        if not isinstance(image, Image.Image | None):
            raise UsageError(f"heatmap: image is a {type(image).__name__}; give a picture of Pillow, or leave it out")
        averaged = self._averaged(recorded, layer, head, step)
        return recorded.heatmap(averaged, word, place, occurrence, image)

    def grid(
        self, words: Sequence[str] | None = None, text: int = 0, *, image: Image.Image | None = None, **chosen: Any
    ) -> HeatmapGrid:
        """The maps of several words in one picture, each in its own colours from its least to its most.

        Args:
            words: those to show; None: the text's, the first twelve.
            text: as in `heatmap`.
            image: as in `heatmap`.
            **chosen: other arguments of `heatmap`.

        Raises:
            UsageError: as `heatmap`, or there are no words.
        """
        recorded = self._text(text)
        shown = recorded.words[:_GRID_WORDS] if words is None else list(words)
        if not shown:
            raise UsageError("grid() has no words to show: give words=[...]")
        return HeatmapGrid([self.heatmap(word, text, image=image, **chosen) for word in shown])

    def alignment(self, text: int = 0, *, layer: Numbers = None, head: Numbers = None) -> Alignment:
        """Which source words a translation's words come from: `pairs()`, `words()`, `save("x.png")`.

        Args:
            text: number of the translation in `texts`.
            layer: as in `array`; without layer and head those that the model's config names for alignments, if any.
            head: as in `array`.

        Raises:
            UsageError: as `array`, or what was recorded is no translation.
        """
        recorded = self._text(text)
        if layer is None and head is None and isinstance(recorded, RecordedPair) and recorded.best is not None:
            layer, head = recorded.best
        return recorded.alignment(self._averaged(recorded, layer, head, None))

    def save(self, path: Any) -> None:
        """Write everything that was recorded into a NumPy file: arrays `TEXT/LAYER`, and `about`, JSON that says what
        their axes are (head, token, feature; of drawn pictures step, head, cell, token).

        Raises:
            UsageError: nothing was recorded, or a name that does not end in .npz.
            RunError: the file cannot be written.
        """
        self._text(0)
        save_maps(path, self.texts, self.role, self.layer_names)

    def _averaged(self, recorded: Recorded, layer: Numbers, head: Numbers, step: Numbers) -> dict[int, np.ndarray]:
        weights = recorded.weights
        for name, numbers in (("layer", layer), ("head", head), ("step", step)):
            if numbers is not None and not as_numbers(numbers):
                raise UsageError(f"{name}=[]: give one or more numbers, or leave it out")
        chosen = list(weights) if layer is None else as_numbers(layer) or []
        unknown = [number for number in chosen if number not in weights]
        if unknown:
            raise UsageError(f"layers {unknown} were not recorded, only {sorted(weights)}")
        steps = self._steps(recorded, step)
        found = {}
        for number in chosen:
            stacked = weights[number] if weights[number].dim() == 4 else weights[number][None]
            stacked = stacked if steps is None else stacked[steps]
            heads = as_numbers(head)
            if heads is not None:
                self._check_heads(recorded, heads, stacked.shape[1])
                stacked = stacked[:, heads]
            found[number] = stacked.mean(dim=(0, 1)).numpy()
        return found

    def _check_heads(self, recorded: Recorded, heads: list[int], count: int) -> None:
        if isinstance(recorded, RecordedPicture) and "head" not in self.wanted.views:
            raise UsageError("heads were averaged while recording: record_attention(..., views=['head']) keeps them")
        if max(heads) >= count or min(heads) < 0:
            raise UsageError(f"heads {heads} were asked for, {count} were recorded")

    def _steps(self, recorded: Recorded, step: Numbers) -> list[int] | None:
        """Places of the steps among those that were kept."""
        wanted = as_numbers(step)
        if wanted is None:
            return None
        if not isinstance(recorded, RecordedPicture):
            raise UsageError("step= is for drawn pictures: a text is read in one pass")
        if "step" not in self.wanted.views:
            raise UsageError("steps were averaged while recording: record_attention(..., views=['step']) keeps them")
        unknown = [number for number in wanted if number not in recorded.steps]
        if unknown:
            raise UsageError(f"steps {unknown} were not recorded, only {recorded.steps}")
        return [recorded.steps.index(number) for number in wanted]

    def _text(self, number: int) -> Recorded:
        if not self.texts:
            raise UsageError(f"nothing was recorded: {self.why_empty()}")
        if not -len(self.texts) <= number < len(self.texts):
            raise UsageError(f"text {number} was asked for, {len(self.texts)} were recorded")
        return self.texts[number]


_RECORDERS: ContextVar[tuple[AttentionMaps, ...]] = ContextVar("mmattn_recorders", default=())


@contextlib.contextmanager
def record_attention(
    target: Any,
    role: Role = "cross",
    layers: Layers = None,
    heads: Numbers = None,
    steps: Numbers = None,
    tokens: Tokens = None,
    *,
    views: Collection[View] = (),
    guidance: Guidance = "conditional",
    prompts: Prompts = None,
    tokenizer: Any = None,
) -> Iterator[AttentionMaps]:
    """Record the attention of the texts or pictures that `target` makes or reads within the block; its results stay
    the same, bit for bit. The maps can be used in the block and after it.

    Other threads that use the model meanwhile are not recorded.

    Args:
        target: `VisionLanguageModel`, `Translator` or `TextToImage`; a diffusers pipeline with a U-Net or another model
            with cross-attention, swapped or not, or that model by itself; a transformers model with cross-attention.
        role: "cross" (text and picture, target and source) or "self".
        layers: attending layers to keep, counted from 0 in the order in which they run, or parts of their names
            ("up_blocks.1"); all by default.
        heads: heads to keep; all by default.
        steps: denoising steps to keep, counted from 0; all by default.
        tokens: of a drawn picture's prompt, the words (or token positions) to keep; None: every token, padding
            included. Fewer tokens are faster and smaller.
        views: what of a drawn picture is kept apart and not averaged while recording: "head", "step". Layers always
            are. Texts keep their heads anyway.
        guidance: which half of a pipeline's batch is kept: "conditional", "unconditional" or "both".
        prompts: of a pipeline that is given embeddings, or of a model by itself: the texts, one for each prompt.
        tokenizer: of a transformers model, for the words of its texts.

    Raises:
        UsageError: a target whose attention cannot be recorded or that is compiled, an argument that does not fit it,
            or layers and heads that are not there.
    """
    wanted = Wanted.checked(role, layers, heads, steps, tokens, views, guidance, prompts, tokenizer)
    maps = AttentionMaps(target, wanted)
    with contextlib.ExitStack() as stack:
        stack.callback(maps.end)
        stack.enter_context(_watching(target, maps))
        token = _RECORDERS.set((*_RECORDERS.get(), maps))
        stack.callback(_RECORDERS.reset, token)
        yield maps


def recorders_of(target: Any) -> list[AttentionMaps]:
    """The recorders that wait for texts of this model here and now."""
    return [maps for maps in _RECORDERS.get() if maps.target is target]


def is_recording(maps: AttentionMaps) -> bool:
    """Whether a recorder's block is open here: in this thread or task, and not for a swap's `verify`."""
    return not is_verifying() and any(open_maps is maps for open_maps in _RECORDERS.get())


def _watching(target: Any, maps: AttentionMaps) -> contextlib.AbstractContextManager[object]:
    """What looks at a target while it runs; nothing for models that hand over their texts themselves."""
    if hasattr(target, "records_attention") and not hasattr(target, "pipeline"):
        maps.wanted.refuse_for(type(target).__name__, ("steps", "tokens", "views", "prompts", "tokenizer"))
        return contextlib.nullcontext()
    pipeline = getattr(target, "pipeline", target)
    if isinstance(getattr(pipeline, "components", None), dict):
        from mmattn.maps.denoising import watching_pipeline

        return watching_pipeline(pipeline, maps)
    if isinstance(target, torch.nn.Module):
        from mmattn.swap.parts import is_diffusers, is_transformers, uncompiled

        if is_diffusers(uncompiled(target)):
            from mmattn.maps.denoising import watching_model

            return watching_model(target, maps)
        if is_transformers(uncompiled(target)):
            from mmattn.maps.stock_models import watching_stock

            return watching_stock(target, maps)
    raise UsageError(
        "record_attention takes a VisionLanguageModel, a Translator, a TextToImage, a diffusers pipeline or model, or a"
        f" transformers model, not a {type(target).__name__}"
    )
