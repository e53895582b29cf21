"""Recording diffusion models while they draw: which places of the picture looked at which words of the prompt.

R rows of the model's batch, P prompts, H heads, C cells of a layer's grid, T tokens kept.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.maps.capture import SeenAttention, is_recomputing, watching
from mmattn.maps.layers import attending_layers, check_heads, check_not_compiled, chosen_layers
from mmattn.maps.record import AttentionMaps, is_recording
from mmattn.maps.recordings import RecordedPicture
from mmattn.maps.tokens import TextTokens, text_tokens
from mmattn.swap.layers import SetAttribute

_MODELS = ("unet", "transformer")
_ALL_STEPS = -1
_OTHER_ORDERS = ("Pix2Pix", "LEdits", "PAG")  # of the rows in the batch than negative, positive


class Texts(NamedTuple):
    """The prompts of one generation.

    Attributes:
        prompts: None where only embeddings are known.
        second: SDXL's `prompt_2`, where it is given.
        negatives: of guidance's other half; None: the empty text.
    """

    prompts: list[str] | None = None
    second: list[str] | None = None
    negatives: list[str] | None = None


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
    if maps.wanted.guidance != "both" and any(word in type(pipeline).__name__ for word in _OTHER_ORDERS):
        raise UsageError(
            f"record_attention: which rows of {type(pipeline).__name__} follow the prompt is not known: guidance='both'"
            " records them all"
        )
    drawing = Drawing(model, maps, pipeline)
    with contextlib.ExitStack() as stack:
        stack.enter_context(drawing.watched())
        encode = getattr(pipeline, "encode_prompt", None)
        if encode is not None:
            step = SetAttribute(pipeline, "encode_prompt", _noting(encode, drawing))
            step.do()
            stack.callback(step.undo)
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


def _noting(encode: Callable[..., Any], drawing: Drawing) -> Callable[..., Any]:
    signature = inspect.signature(encode)

    def encode_prompt(*args: Any, **kwargs: Any) -> Any:
        if is_recording(drawing.maps):
            drawing.note(signature.bind_partial(*args, **kwargs).arguments)
        return encode(*args, **kwargs)

    return encode_prompt


@dataclass(eq=False)
class Drawing:
    """One recorder's view of a model that draws.

    Attributes:
        model: the U-Net.
        maps: gets a `RecordedPicture` for each picture.
        pipeline: around it; None for a model by itself.
        pictures: those that are being drawn, in the order of the rows that are kept.
    """

    model: nn.Module
    maps: AttentionMaps
    pipeline: Any = None
    pictures: list[RecordedPicture] = field(default_factory=list)
    _texts: Texts = field(default_factory=Texts)
    _is_fresh: bool = True  # the next forward begins a generation
    _is_guided: bool | None = None
    _step: int = 0
    _most_steps: int = 0
    _last_time: float = float("inf")
    _rows: range = range(0)
    _size: tuple[int, int] = (0, 0)
    _unseen: dict[str, str] = field(default_factory=dict)
    _numbers: dict[int, int] = field(default_factory=dict)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Look at the model within the block."""
        name = "the model" if self.pipeline is None else "the pipeline's model"
        check_not_compiled(name, self.model)
        layers = chosen_layers(attending_layers(self.model, self.maps.role), self.maps.wanted.layers)
        for layer in layers:
            count = getattr(layer.module, "heads", getattr(layer.module, "num_heads", None))
            if isinstance(count, int):
                check_heads(self.maps.wanted.heads, count, layer.name)
        self._numbers = {id(layer.module): layer.number for layer in layers}
        self.maps.layer_names = {layer.number: layer.name for layer in layers}
        self.maps.why_empty = self._why_empty
        self.maps.drawing = self
        hook = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
        try:
            with watching([layer.module for layer in layers], lambda: is_recording(self.maps), self._see):
                yield
        finally:
            hook.remove()

    # What is known of the texts.

    def note(self, given: dict[str, Any]) -> None:
        """Prompts as a pipeline gives them to its own `encode_prompt`."""
        prompt = _listed(given.get("prompt"))
        if "do_classifier_free_guidance" in given:
            self._is_guided = bool(given["do_classifier_free_guidance"])
        if prompt is None:  # embeddings, of texts that a façade may have told
            self._is_fresh = True
            return
        if self._is_fresh and self._texts.prompts is not None and "device" not in given:
            self._texts = self._texts._replace(negatives=prompt)  # a pixel pipeline encodes them one after the other
            return
        second, negatives = _listed(given.get("prompt_2")), _listed(given.get("negative_prompt"))
        self.expect(Texts(prompt, second, negatives))

    def expect(self, texts: Texts, *, is_guided: bool | None = None) -> None:
        """The next forward begins to draw these."""
        self._texts, self._is_fresh = texts, True
        self._is_guided = is_guided if is_guided is not None else self._is_guided

    def take_images(self, images: Sequence[Image.Image]) -> None:
        """The pictures that came of what was recorded last."""
        for picture, image in zip(self.pictures, images, strict=False):
            picture.image = image

    # While the model runs.

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise UsageError(
                "record_attention: the model runs inside torch.compile, where nothing can be seen: run it uncompiled"
            )
        if is_recomputing() or not is_recording(self.maps):
            return
        sample = args[0] if args else kwargs.get("sample", kwargs.get("hidden_states"))
        if not isinstance(sample, Tensor) or sample.dim() != 4:
            raise UsageError(
                f"record_attention: {type(model).__name__} draws no pictures [batch, channels, rows, columns]"
            )
        time = args[1] if len(args) > 1 else kwargs.get("timestep")
        now, is_training = _number(time)
        # Times fall within a generation. A pipeline says when one begins, unless it is given embeddings.
        is_new = self._is_fresh or now > self._last_time
        is_new = is_new or (self.pipeline is None and (now == self._last_time or is_training))
        self._rows = self._kept_rows(sample.shape[0])
        self._size = sample.shape[2], sample.shape[3]
        if is_new or len(self._rows) != len(self.pictures):
            self._begin()
        else:
            self._step += 1
        self._most_steps = max(self._most_steps, self._step + 1)
        self._last_time, self._is_fresh = now, False

    def _kept_rows(self, rows: int) -> range:
        wanted = self.maps.wanted.guidance
        if self.pipeline is None or wanted == "both":
            return range(rows)
        guided = getattr(self.pipeline, "do_classifier_free_guidance", self._is_guided)
        if guided is None:
            raise UsageError(
                f"record_attention: whether {type(self.pipeline).__name__} is guided is not known: guidance='both'"
                " records every row"
            )
        if not guided:
            if wanted == "unconditional":
                raise UsageError("record_attention: guidance='unconditional', but this call has no guidance")
            return range(rows)
        return range(rows // 2, rows) if wanted == "conditional" else range(rows // 2)

    def _begin(self) -> None:
        prompts, seconds = self._prompts(len(self._rows))
        kept = self._kept_tokens(prompts)
        self.pictures = [RecordedPicture(*each) for each in zip(prompts, seconds, kept, strict=True)]
        self._step = 0
        self._texts = Texts() if self.pipeline is not None else self._texts

    def _prompts(self, count: int) -> tuple[list[TextTokens | None], list[TextTokens | None]]:
        """The text of every row that is kept, and SDXL's second one."""
        wanted, texts = self.maps.wanted, self._texts
        prompts = wanted.prompts if wanted.prompts is not None else texts.prompts
        if prompts is None:
            return [None] * count, [None] * count
        negatives = texts.negatives or [""]
        if wanted.guidance == "unconditional":
            prompts = negatives * (len(prompts) // len(negatives))
        elif (
            wanted.guidance == "both" and self.pipeline is not None and count % (2 * len(prompts)) == 0 and self._halves
        ):
            prompts = negatives * (len(prompts) // len(negatives)) + prompts
        if count % len(prompts):
            raise UsageError(f"record_attention: {len(prompts)} prompts for {count} pictures: give one for each")
        each = count // len(prompts)
        tokenizers = [getattr(self.pipeline, name, None) for name in ("tokenizer", "tokenizer_2")]
        first = wanted.tokenizer or tokenizers[0] or tokenizers[1]
        if first is None:
            return [None] * count, [None] * count
        tokens = [self._cut(first, prompt) for prompt in prompts for _ in range(each)]
        seconds: list[TextTokens | None] = [None] * count
        if texts.second is not None and texts.second != texts.prompts and len(texts.second) == len(prompts):
            seconds = [self._cut(tokenizers[1], prompt) for prompt in texts.second for _ in range(each)]
        return list(tokens), seconds

    @property
    def _halves(self) -> bool:
        return bool(getattr(self.pipeline, "do_classifier_free_guidance", self._is_guided))

    def _cut(self, tokenizer: Any, prompt: str) -> TextTokens:
        # Textual inversion writes a word of several vectors as several words.
        convert = getattr(self.pipeline, "maybe_convert_prompt", None)
        converted = prompt if convert is None else convert(prompt, tokenizer)
        return text_tokens(tokenizer, converted)

    def _kept_tokens(self, prompts: Sequence[TextTokens | None]) -> list[list[int] | None]:
        """Positions to keep of each prompt; None: all. A word need not be in every prompt, but in one."""
        tokens = self.maps.wanted.tokens
        if tokens is None:
            return [None] * len(prompts)
        known = [prompt for prompt in prompts if prompt is not None]
        words = [token for token in tokens if isinstance(token, str)]
        if words and len(known) < len(prompts):
            raise UsageError(
                f"record_attention: tokens={tokens} are words, but the prompt's words are not known, only its "
                "embeddings: name them with prompts=[...], or give positions"
            )
        for word in words:
            if not any(prompt.find(word) for prompt in known):
                known[0].positions(word)  # raises, and says which words are there
        numbers = {token for token in tokens if isinstance(token, int)}
        return [sorted(numbers.union(*(_positions(prompt, word) for word in words))) for prompt in prompts]

    def _see(self, module: nn.Module, seen: SeenAttention | None) -> None:
        if not self.pictures:  # the layer was called by itself
            return
        wanted, number = self.maps.wanted, self._numbers[id(module)]
        if seen is None:
            processor = getattr(module, "processor", None)
            self._unseen[self.maps.layer_names[number]] = type(processor or module).__name__
            return
        if wanted.steps is not None and self._step not in wanted.steps:
            return
        heads, length, num_keys = seen.sizes
        check_heads(wanted.heads, heads, self.maps.layer_names[number])
        step = self._step if "step" in wanted.views else _ALL_STEPS
        grid = _grid(length, self._size, self.maps.layer_names[number])
        if not self.pictures[0].sums:
            self.maps.texts += self.pictures
        for row, picture in zip(self._rows, self.pictures, strict=True):
            weights = _columns(seen, row, picture.kept, num_keys, wanted.heads, average="head" not in wanted.views)
            picture.add(number, step, grid, weights)

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


def _columns(
    seen: SeenAttention, row: int, kept: list[int] | None, num_keys: int, heads: list[int] | None, *, average: bool
) -> Tensor:
    """Weights [H', C, T] of a row; tokens that a swapped layer leaves out as padding have none."""
    if kept is None:
        return seen.kept(row, None, heads, average=average)
    inside = [place for place in kept if place < num_keys]
    device = (seen.query if seen.query is not None else seen.weights).device  # pyright: ignore
    weights = seen.kept(row, torch.tensor(inside, dtype=torch.long, device=device), heads, average=average)
    return torch.nn.functional.pad(weights, (0, len(kept) - len(inside))) if len(inside) < len(kept) else weights


def _grid(length: int, size: tuple[int, int], where: str) -> tuple[int, int]:
    """Rows and columns of a layer's places: the sample's, halved until they are so many."""
    rows, columns = size
    while rows * columns > length:
        rows, columns = (rows + 1) // 2, (columns + 1) // 2
    if rows * columns != length:
        raise UsageError(f"record_attention: {where} has {length} places, which are no grid of a sample of {size}")
    return rows, columns


def _positions(prompt: TextTokens | None, word: str) -> list[int]:
    return [] if prompt is None else [place for run in prompt.find(word) for place in run]


def _listed(text: Any) -> list[str] | None:
    return None if text is None else [text] if isinstance(text, str) else list(text)


def _number(time: Any) -> tuple[float, bool]:
    """A timestep as a number, and whether every row has its own."""
    if isinstance(time, Tensor):
        return float(time.max()), time.numel() > 1 and bool((time != time.flatten()[0]).any())
    return (float("inf") if time is None else float(time)), False
