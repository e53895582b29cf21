"""Recording of attention weights for texts on pictures, while every output stays what it is.

The model decodes on its fused kernels, unobserved. When a text is done it is read once more in one pass under an
observer that keeps the queries and keys, and the weights are computed from those. So beams, reordering and early
stopping need no bookkeeping, and results are bit for bit those of a run without a recorder.

H heads, L tokens of a text, Lk features of a picture.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from mmattn.errors import UsageError
from mmattn.maps.draw import Heatmap
from mmattn.ops.attention import attention
from mmattn.ops.observe import AttentionCall, observing

_CHUNK = 256  # queries whose weights are computed at a time

Layers = int | Sequence[int] | None


@dataclass(frozen=True, eq=False)
class TextToRecord:
    """A finished text, as the model's façade hands it to the recorder.

    Attributes:
        pieces: the text of each token, "" for special tokens.
        num_given: tokens that were given (prompt, question); those after them were generated.
        image: the picture.
        grid: rows and columns of the picture's features.
        num_extra: features before the grid's, such as a class token.
    """

    pieces: list[str]
    num_given: int
    image: Image.Image
    grid: tuple[int, int]
    num_extra: int

    @property
    def sentence(self) -> str:
        """The text, a space between tokens."""
        return " ".join(filter(None, self.pieces))


@dataclass(frozen=True, eq=False)
class RecordedText:
    """A text with its attention weights: `weights[layer]` is float32 `[H, L, Lk]` on the CPU."""

    text: TextToRecord
    weights: dict[int, torch.Tensor]

    def positions(self, word: str | None, place: Literal["predicting", "reading"], occurrence: int) -> list[int]:
        """The tokens whose queries speak for a word (several when it is cut into pieces); all generated ones for None.

        Raises:
            UsageError: the word is not in the text.
        """
        num_tokens, num_given = len(self.text.pieces), self.text.num_given
        if word is None:
            tokens = list(range(num_given, num_tokens)) or [t for t, piece in enumerate(self.text.pieces) if piece]
        else:
            found = _find(self.text.pieces, word)
            if len(found) <= occurrence:
                times = f"{len(found)} times" if found else "not"
                raise UsageError(f"{word!r} is {times} in the recorded text {self.text.sentence!r}")
            tokens = found[occurrence]
        # A generated token was chosen by the query before it; a given one has no other than its own.
        return [token - 1 if place == "predicting" and token >= num_given else token for token in tokens]


class AttentionMaps:
    """What `record_attention` fills: a `RecordedText` in `texts` for every text made within the block, in order."""

    def __init__(self, target: Any, role: Literal["self", "cross"], layers: Layers, heads: Layers) -> None:
        self.target = target
        self.role = role
        self.texts: list[RecordedText] = []
        self._layers = _as_numbers(layers)
        self._heads = _as_numbers(heads)

    def __len__(self) -> int:
        return len(self.texts)

    def record(self, text: TextToRecord, read: Callable[[], object]) -> None:
        """Keep the weights of one text. `read` runs the model over it, and over nothing else, with one row."""
        calls: list[AttentionCall] = []
        with observing(calls.append):
            read()
        weights: dict[int, torch.Tensor] = {}
        for layer, call in enumerate(call for call in calls if call.role == self.role):
            if self._layers is None or layer in self._layers:
                weights[layer] = self._weights(call)
        if not weights:
            raise UsageError(f"record_attention: none of layers={self._layers} made a {self.role}-attention call")
        self.texts.append(RecordedText(text, weights))

    def _weights(self, call: AttentionCall) -> torch.Tensor:
        length = call.query.shape[2]
        parts = []
        for first in range(0, length, _CHUNK):
            rows = slice(first, min(first + _CHUNK, length))
            mask = call.attn_mask
            if mask is not None and mask.shape[2] > 1:
                mask = mask[:, :, rows]
            # Cut keys, not a mask, keep the causal diagonal at the end of the queries that are left.
            keys = slice(None, call.key.shape[2] - (length - rows.stop) if call.is_causal else None)
            mask = mask[..., keys] if mask is not None and mask.shape[3] > 1 else mask
            _, weights = attention(
                call.query[:, :, rows],
                call.key[:, :, keys],
                call.value[:, :, keys],
                attn_mask=mask,
                key_mask=None if call.key_mask is None else call.key_mask[:, keys],
                is_causal=call.is_causal,
                scale=call.scale,
                backend="eager",
                return_weights=True,
            )
            missing = call.key.shape[2] - weights.shape[3]
            parts.append(torch.nn.functional.pad(weights[0].float(), (0, missing)).cpu())
        weights = torch.cat(parts, dim=1)
        if self._heads is None:
            return weights
        if max(self._heads) >= weights.shape[0]:
            raise UsageError(f"record_attention: heads={self._heads}, but there are {weights.shape[0]} heads")
        return weights[self._heads]

    def array(self, text: int = 0, *, layer: Layers = None, head: Layers = None) -> np.ndarray:
        """Weights `[L, Lk]` of a text, averaged over the layers and heads chosen (all recorded ones by default).

        Args:
            text: number of the text in `texts`.
            layer: a layer's number, or several; attending layers are counted from 0.
            head: a head's number among those recorded, or several.

        Raises:
            UsageError: nothing was recorded, or no such text, layer or head.
        """
        recorded = self._text(text)
        chosen = list(recorded.weights) if layer is None else _as_numbers(layer) or []
        unknown = [number for number in chosen if number not in recorded.weights]
        if unknown:
            raise UsageError(f"layers {unknown} were not recorded, only {sorted(recorded.weights)}")
        stacked = torch.stack([recorded.weights[number] for number in chosen])
        heads = _as_numbers(head)
        if heads is not None:
            if max(heads) >= stacked.shape[1]:
                raise UsageError(f"heads {heads} were asked for, {stacked.shape[1]} were recorded")
            stacked = stacked[:, heads]
        return stacked.mean(dim=(0, 1)).numpy()

    def heatmap(
        self,
        word: str | None = None,
        text: int = 0,
        *,
        layer: Layers = None,
        head: Layers = None,
        place: Literal["predicting", "reading"] = "predicting",
        occurrence: int = 0,
    ) -> Heatmap:
        """Where in the picture the model looked for a word.

        Args:
            word: a word or phrase of the text (or question); None: the mean over all that was generated.
            text: number of the text in `texts`.
            layer: as in `array`.
            head: as in `array`.
            place: for generated words, the query that chose the word ("predicting") or the one that had read it.
            occurrence: which one, when the word occurs more than once.

        Raises:
            UsageError: as `array`; the word is not there; or self-attention was recorded, which has no picture.
        """
        recorded = self._text(text)
        if self.role != "cross":
            raise UsageError("heatmap() needs record_attention(role='cross'); array() gives the self-attention weights")
        weights = self.array(text, layer=layer, head=head)
        source = recorded.text
        values = weights[recorded.positions(word, place, occurrence)].mean(axis=0)[source.num_extra :]
        return Heatmap(values.reshape(source.grid), source.image, word or source.sentence, source.sentence)

    def _text(self, number: int) -> RecordedText:
        if not self.texts:
            raise UsageError("nothing was recorded: call caption(), ask() or match() within record_attention()")
        if not -len(self.texts) <= number < len(self.texts):
            raise UsageError(f"text {number} was asked for, {len(self.texts)} were recorded")
        return self.texts[number]


_RECORDERS: ContextVar[tuple[AttentionMaps, ...]] = ContextVar("mmattn_recorders", default=())


@contextlib.contextmanager
def record_attention(
    target: Any, role: Literal["self", "cross"] = "cross", layers: Layers = None, heads: Layers = None
) -> Iterator[AttentionMaps]:
    """Record the attention of the texts that `target` makes or reads within the block; its results stay the same.

    Each text is read once more for it (no picture is encoded again). The maps can be used in the block and after it.

    Args:
        target: a `VisionLanguageModel`.
        role: "cross" (text to picture) or "self" (text to text).
        layers: attending layers to keep, counted from 0; all by default.
        heads: heads to keep; all by default.

    Raises:
        UsageError: a target whose attention cannot be recorded, or a wrong role.
    """
    if not hasattr(target, "records_attention"):
        raise UsageError(f"record_attention takes a VisionLanguageModel, not a {type(target).__name__}")
    if role not in ("self", "cross"):
        raise UsageError(f"record_attention: role is {role!r}; it must be 'self' or 'cross'")
    maps = AttentionMaps(target, role, layers, heads)
    token = _RECORDERS.set((*_RECORDERS.get(), maps))
    try:
        yield maps
    finally:
        _RECORDERS.reset(token)


def recorders_of(target: Any) -> list[AttentionMaps]:
    """The recorders that wait for texts of this model here and now."""
    return [maps for maps in _RECORDERS.get() if maps.target is target]


def _as_numbers(chosen: Layers) -> list[int] | None:
    if chosen is None:
        return None
    return [chosen] if isinstance(chosen, int) else list(chosen)


def _find(pieces: Sequence[str], word: str) -> list[list[int]]:
    """Runs of tokens that spell a word or phrase, spaces and case aside."""
    wanted = "".join(word.lower().split())
    runs = []
    for first in range(len(pieces)):
        spelled = ""
        for last in range(first, len(pieces)):
            spelled += pieces[last]
            if not pieces[last] or not wanted.startswith(spelled):
                break
            if spelled == wanted:
                runs.append(list(range(first, last + 1)))
                break
    return runs
