"""Recording transformers models: every forward as it runs, and every `generate` by reading its texts once more.

Beams are reordered and dropped while a text is generated, so nothing is kept of that: when `generate` has returned, its
texts go through the model in one forward, without a word of it reaching the caller.

B rows, L tokens of a text, Lk of what it attends to.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from mmattn.errors import MmattnError, UsageError
from mmattn.maps.capture import SeenAttention, watching
from mmattn.maps.generated import TARGETS, Call, check_call, rereading
from mmattn.maps.in_place import Hook, in_place
from mmattn.maps.layers import attending_layers, check_heads, check_not_compiled, chosen_layers
from mmattn.maps.record import AttentionMaps, is_recording
from mmattn.maps.recordings import Recorded, RecordedPair, RecordedText, TextToRecord
from mmattn.maps.tokens import TextTokens, numbered_tokens, tokens_of_ids
from mmattn.ops.same_pass import MapsAsked
from mmattn.swap.layers import SetAttribute
from mmattn.swap.parts import uncompiled
from mmattn.swap.transformers import find, patched

_READINGS: ContextVar[tuple[Reading, ...]] = ContextVar("mmattn_readings", default=())


@contextlib.contextmanager
def watching_stock(target: nn.Module, maps: AttentionMaps) -> Iterator[None]:
    """Within the block the model is looked at.

    Raises:
        UsageError: it is compiled, has no such layers or heads, or an argument means nothing for it.
    """
    check_not_compiled("the model", target)
    maps.wanted.refuse_for("transformers model", ("steps", "tokens", "views", "prompts"))
    model: Any = uncompiled(target)
    layers = chosen_layers(attending_layers(model, maps.role), maps.wanted.layers)
    maps.layer_names = {layer.number: layer.name for layer in layers}
    reading = Reading(model, maps, {id(layer.module): layer.number for layer in layers})
    maps.why_empty = reading.why_empty
    with contextlib.ExitStack() as stack:
        stack.callback(model.register_forward_pre_hook(Hook(reading.begin), with_kwargs=True).remove)
        hook = model.register_forward_hook(Hook(reading.end), with_kwargs=True, always_call=True)
        stack.callback(hook.remove)
        if hasattr(model, "generate"):
            stack.enter_context(
                in_place(model, "record_attention", lambda: [SetAttribute(model, "generate", _Generate(model))])
            )
        stack.enter_context(watching([layer.module for layer in layers], reading.wants, reading.see, reading.ask))
        stack.callback(_READINGS.reset, _READINGS.set((*_READINGS.get(), reading)))
        stack.callback(reading.forget)
        yield
    maps.warn_of(reading.unseen)


class _Generate:
    """A model's `generate`, and one forward over its texts after it for the recorders that are open. A copied model,
    deep or pickled, has its own `generate`."""

    def __init__(self, model: Any) -> None:
        self._model, self._generate = model, model.generate
        functools.update_wrapper(self, model.generate)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, str]]:
        return getattr, (self._model, "generate")

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model, generate = self._model, self._generate
        readings = [reading for reading in _READINGS.get() if reading.model is model]
        if not readings or any(reading.is_generating for reading in readings):
            return generate(*args, **kwargs)
        call = Call.of(args, kwargs)
        check_call(model, call)
        with contextlib.ExitStack() as stack:
            for reading in readings:
                stack.enter_context(reading.generating())
            output = generate(*args, **kwargs)
        given, num_given = rereading(model, call, output, readings[0].first)
        was_training = model.training
        with contextlib.ExitStack() as stack:
            for reading in readings:
                stack.enter_context(reading.reading(num_given))
            # Dropout would draw, and what is drawn later would be something else.
            stack.callback(model.train, was_training)
            model.eval()
            with torch.no_grad():
                _read(model, given)
        return output


def _read(model: Any, given: dict[str, Any]) -> None:
    try:
        model(**given)
    except MmattnError:
        raise
    except Exception as error:  # whatever a model raises whose arguments have to grow in a way that is not known
        reason = (str(error).splitlines() or [""])[0]
        raise UsageError(
            f"record_attention: the texts of {type(model).__name__}.generate() cannot be read again "
            f"({type(error).__name__}: {reason}): record a forward over them"
        ) from error


@dataclass(eq=False)
class Reading:
    """One recorder's view of a transformers model.

    Attributes:
        model: the model.
        maps: gets a recording for every row of a forward.
        numbers: id of an attention module to the layer's number.
        is_generating: `generate` is under way.
        first: arguments of the first forward of the generation, where the model's own was called.
        unseen: class of a layer that has run unseen, by the layer's name.
    """

    model: Any
    maps: AttentionMaps
    numbers: dict[int, int]
    is_generating: bool = False
    first: dict[str, Any] | None = None
    unseen: dict[str, str] = field(default_factory=dict)
    _given: dict[str, Any] | None = None  # the arguments of the forward that is under way
    _layers: dict[int, list[Tensor]] = field(default_factory=dict)
    _num_given: int | None = None
    _was_called: bool = False

    def wants(self) -> bool:
        """Whether attention that runs now belongs to a forward that is recorded."""
        return self._given is not None and not self.is_generating and is_recording(self.maps)

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward begins."""
        if not is_recording(self.maps):
            return
        given = dict(inspect.signature(model.forward).bind_partial(*args, **kwargs).arguments)
        given |= given.pop("kwargs", {})
        if self.is_generating:
            if self.first is None:
                self.first = given
            return
        self._was_called = True
        self._given, self._layers = given, {}

    def end(self, model: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        """A forward has ended, well if it has an output."""
        if self.is_generating or self._given is None or not is_recording(self.maps):
            return
        given, self._given = self._given, None
        if output is not None and self._layers:
            self.maps.texts += self._recorded(given)

    def see(self, module: nn.Module, seen: SeenAttention | None) -> None:
        """A layer has run."""
        number = self.numbers[id(module)]
        if seen is None:
            self.unseen[self.maps.layer_names[number]] = type(module).__name__
            return
        heads = self.maps.wanted.heads
        check_heads(heads, seen.sizes[0], self.maps.layer_names[number])
        self._layers[number] = [self._weights(seen, row) for row in range(seen.rows)]

    def ask(self, module: nn.Module) -> MapsAsked:
        """The weights that `see` is going to read of a layer."""
        heads = self.maps.wanted.heads
        return MapsAsked(heads=None if heads is None else tuple(heads))

    def _weights(self, seen: SeenAttention, row: int) -> Tensor:
        weights = seen.asked_for(row)
        weights = seen.kept(row, None, self.maps.wanted.heads, average=False) if weights is None else weights
        return weights.cpu()

    @contextlib.contextmanager
    def generating(self) -> Iterator[None]:
        """Within the block `generate` is under way."""
        self.is_generating, self.first, self._was_called = True, None, True
        try:
            yield
        finally:
            self.is_generating = False

    @contextlib.contextmanager
    def reading(self, num_given: int) -> Iterator[None]:
        """Within the block finished texts are read, of which so many tokens were given."""
        self._num_given, self.first = num_given, None
        try:
            yield
        finally:
            self._num_given = None

    def forget(self) -> None:
        """Drop what belongs to a forward that was interrupted."""
        self._given, self._layers = None, {}

    def why_empty(self) -> str:
        """Why nothing was recorded."""
        if self.unseen:
            name, kind = next(iter(self.unseen.items()))
            return f"{name} ({kind}) attended in a way that cannot be seen: {_remedy(self.model, kind)}"
        if self._was_called:
            return f"the model ran, but its {self.maps.role}-attention did not: it got nothing to attend to"
        return "the model's forward or generate() did not run within record_attention() (in this thread)"

    # What is kept.

    def _recorded(self, given: dict[str, Any]) -> list[Recorded]:
        shapes = {tuple(rows[0].shape[1:]) for rows in self._layers.values()}
        if len(shapes) > 1:
            raise UsageError(
                f"record_attention: these layers attend to different things ({len(shapes)} shapes): choose with layers="
                f"among {', '.join(sorted(set(self.maps.layer_names.values())))}"
            )
        length, num_keys = next(iter(shapes))
        ids = self._target_ids(given, length)
        rows = len(next(iter(self._layers.values())))
        return [self._row(given, row, ids, num_keys) for row in range(rows)]

    def _row(self, given: dict[str, Any], row: int, ids: Tensor | None, num_keys: int) -> Recorded:
        weights = {number: rows[row] for number, rows in self._layers.items()}
        length = next(iter(weights.values())).shape[1]
        target = numbered_tokens(range(length)) if ids is None else self._tokens(ids[row].tolist())
        used = length if ids is None else _used(ids[row].tolist(), self._pad)
        target = _cut(target, used)
        weights = {number: each[:, :used] for number, each in weights.items()}
        if self.maps.role == "self":
            weights = {number: each[:, :, :used] for number, each in weights.items()}
            return RecordedPair(target, target, weights, is_shifted=False)
        grid, extra = self._grid(num_keys)
        if self._looks_at_pictures:
            num_given = used if self._num_given is None else min(self._num_given, used)
            text = TextToRecord(list(target.pieces), num_given, None, grid, extra)
            return RecordedText(text, weights)
        source = given.get("input_ids")
        sources = None
        if isinstance(source, Tensor) and source.shape[1] == num_keys:
            mask = given.get("attention_mask")
            kept = num_keys if mask is None else int(mask[row].sum())
            sources = self._tokens(source[row].tolist())
            sources = _cut(sources, kept) if mask is None or bool(mask[row, :kept].all()) else sources
        return RecordedPair(target, sources, weights)

    @property
    def _pad(self) -> int | None:
        return getattr(self.model.config, "pad_token_id", None)

    @property
    def _looks_at_pictures(self) -> bool:
        return hasattr(self.model.config, "vision_config")

    def _tokens(self, ids: list[int]) -> TextTokens:
        tokenizer = self.maps.wanted.tokenizer
        return numbered_tokens(ids) if tokenizer is None else tokens_of_ids(tokenizer, ids)

    def _target_ids(self, given: dict[str, Any], length: int) -> Tensor | None:
        """The tokens [B, L] whose queries were seen; None where they came as embeddings."""
        labels, shift = given.get("labels"), getattr(self.model, "prepare_decoder_input_ids_from_labels", None)
        if given.get("decoder_input_ids") is None and isinstance(labels, Tensor) and shift is not None:
            given = given | {"decoder_input_ids": shift(labels=labels)}
        for name in TARGETS:
            ids = given.get(name)
            if isinstance(ids, Tensor) and ids.shape[1] == length:
                return ids
        return None

    def _grid(self, num_keys: int) -> tuple[tuple[int, int] | None, int]:
        """Rows and columns of a picture's features, and how many stand before them; no grid for pictures in tiles."""
        vision = getattr(self.model.config, "vision_config", None)
        size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
        if not isinstance(size, int) or not isinstance(patch, int) or hasattr(vision, "max_num_tiles"):
            return None, 0
        side = size // patch
        return ((side, side), num_keys - side * side) if side * side <= num_keys else (None, 0)


def _remedy(model: nn.Module, kind: str) -> str:
    """What to do about attention of this class, that was not seen."""
    module = next(each for each in model.modules() if type(each).__name__ == kind)
    if find.code_of(type(module)).asks_interface:
        return 'model.set_attn_implementation("sdpa") or "eager" can be'
    if patched.forward_for(module) is not None and patched.refusal(module) is None:
        return "that of mmattn.swap_attention(model) can be"
    return "it is computed in a way of its own, which is not known"


def _used(ids: list[int], pad: int | None) -> int:
    """How many tokens come before the padding at the end; the first is never padding, though it may look so."""
    used = len(ids)
    while used > 1 and ids[used - 1] == pad:
        used -= 1
    return used


def _cut(text: TextTokens, length: int) -> TextTokens:
    if length >= len(text):
        return text
    made = TextTokens("", text.ids[:length], text.pieces[:length], text.starts[:length])
    return TextTokens(" ".join(word for word, _ in made.words()), made.ids, made.pieces, made.starts)
