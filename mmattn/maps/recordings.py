"""What is kept of one text or picture: its attention weights, and what their rows and columns stand for.

H heads, L tokens of a text, Lk features of a picture or tokens of a source, S steps, T tokens kept, C cells of a grid.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from mmattn.errors import UsageError
from mmattn.maps.alignment import Alignment, word_alignment
from mmattn.maps.draw import Heatmap
from mmattn.maps.tokens import REST, SPACE, TextTokens, find_pieces

Place = Literal["predicting", "reading"]
Averaged = Mapping[int, np.ndarray]
"""Layer number to weights averaged over heads and steps."""

_CELL = 8  # pixels that stand for a cell of the finest grid where no picture is given


@dataclass(frozen=True, eq=False)
class TextToRecord:
    """A finished text, as the model's façade hands it to the recorder.

    Attributes:
        pieces: the text of each token, "" for special tokens.
        num_given: tokens that were given (prompt, question); those after them were generated.
        image: the picture; None where only its features are known.
        grid: rows and columns of the picture's features; None where they are no grid.
        num_extra: features before the grid's, such as a class token.
    """

    pieces: list[str]
    num_given: int
    image: Image.Image | None
    grid: tuple[int, int] | None
    num_extra: int

    @property
    def sentence(self) -> str:
        """The text, a space between tokens."""
        return " ".join(piece for piece in self.pieces if piece not in ("", SPACE, REST))


@dataclass(frozen=True, eq=False)
class RecordedText:
    """A text that looked at a picture: `weights[layer]` is float32 `[H, L, Lk]` on the CPU."""

    text: TextToRecord
    weights: dict[int, torch.Tensor]

    def positions(self, word: str | None, place: Place, occurrence: int) -> list[int]:
        """The tokens whose queries speak for a word (several when it is cut into pieces); all generated ones for None.

        Raises:
            UsageError: the word is not in the text.
        """
        num_tokens, num_given = len(self.text.pieces), self.text.num_given
        if word is None:
            tokens = list(range(num_given, num_tokens)) or [
                t for t, piece in enumerate(self.text.pieces) if piece.strip()
            ]
        else:
            found = find_pieces(self.text.pieces, word)
            if len(found) <= occurrence:
                times = f"{len(found)} times" if found else "not"
                raise UsageError(f"{word!r} is {times} in the recorded text {self.text.sentence!r}")
            tokens = found[occurrence]
        # A generated token was chosen by the query before it; a given one has no other than its own.
        return [token - 1 if place == "predicting" and token >= num_given else token for token in tokens]

    @property
    def words(self) -> list[str]:
        """What `heatmap` knows, each once."""
        return list(dict.fromkeys(piece for piece in self.text.pieces if piece not in ("", SPACE, REST)))

    def array(self, averaged: Averaged) -> np.ndarray:
        """`[L, Lk]`."""
        return np.mean(list(averaged.values()), axis=0)

    def heatmap(
        self, averaged: Averaged, word: str | None, place: Place, occurrence: int, image: Image.Image | None
    ) -> Heatmap:
        """See `AttentionMaps.heatmap`."""
        source = self.text
        if source.grid is None:
            raise UsageError("these features are no grid of one picture: array() gives the weights")
        rows = self.array(averaged)[self.positions(word, place, occurrence)]
        values = rows.mean(axis=0)[source.num_extra :].reshape(source.grid)
        picture = image or source.image or _blank(source.grid)
        return Heatmap(values, picture, word or source.sentence, source.sentence)

    def alignment(self, averaged: Averaged) -> Alignment:
        """Refused: a picture has no words."""
        raise UsageError("alignment() is for translations; of a text on a picture, heatmap() shows a word")

    def about(self) -> dict[str, Any]:
        """What `AttentionMaps.save` writes beside the weights."""
        text = self.text
        facts = {"axes": ["head", "token", "feature"], "pieces": text.pieces, "num_given": text.num_given}
        return facts | {"grid": text.grid, "num_extra": text.num_extra}


@dataclass(eq=False)
class RecordedPicture:
    """A picture that was drawn from a prompt, which its places looked at.

    Attributes:
        prompt: its tokens; None where only embeddings are known.
        second: those of a second prompt beside it (SDXL's `prompt_2`), where it is another one.
        also: of the same text by a further encoder (SD 3's T5), at later positions.
        kept: positions of the tokens that were kept, None: of all, padding included.
        grids: layer to rows and columns of its places.
        image: the picture, once it is known.
        sums: (layer, step) to weights added up `[H', C, T]`; step -1 stands for all steps.
        counts: how many were added up.
    """

    prompt: TextTokens | None
    second: TextTokens | None = None
    also: TextTokens | None = None
    kept: list[int] | None = None
    grids: dict[int, tuple[int, int]] = field(default_factory=dict)
    image: Image.Image | None = None
    sums: dict[tuple[int, int], torch.Tensor] = field(default_factory=dict)
    counts: dict[tuple[int, int], int] = field(default_factory=dict)

    def add(self, layer: int, step: int, grid: tuple[int, int], weights: torch.Tensor) -> None:
        """Add the weights [H', C, T] of one layer in one step."""
        key = layer, step
        self.grids[layer] = grid
        if key in self.sums:
            self.sums[key] += weights
        else:
            self.sums[key] = weights
        self.counts[key] = self.counts.get(key, 0) + 1

    @property
    def steps(self) -> list[int]:
        """The steps that were kept apart; [-1] where they were averaged."""
        return sorted({step for _, step in self.sums})

    @property
    def weights(self) -> dict[int, torch.Tensor]:
        """Layer to float32 `[S, H', C, T]` on the CPU; S and H' are 1 where steps and heads were averaged."""
        found: dict[int, torch.Tensor] = {}
        for layer in sorted(self.grids):
            keys = [(layer, step) for step in self.steps if (layer, step) in self.sums]
            found[layer] = torch.stack([(self.sums[key] / self.counts[key]).cpu() for key in keys])
        return found

    @property
    def words(self) -> list[str]:
        """What `heatmap` knows, each once."""
        if self.prompt is None:
            return []
        known = [word for word, places in self.prompt.words() if self._columns(places) is not None]
        return list(dict.fromkeys(known))

    def array(self, averaged: Averaged) -> np.ndarray:
        """`[rows, columns, T]` at the finest grid among the layers; coarser ones are interpolated to it.

        Raises:
            UsageError: the layers attend to different things, such as the text and the picture itself.
        """
        widths: dict[int, list[int]] = {}
        for layer, weights in averaged.items():
            widths.setdefault(weights.shape[-1], []).append(layer)
        if len(widths) > 1:
            found = ", ".join(f"{width} keys in layers {layers}" for width, layers in widths.items())
            raise UsageError(f"these layers attend to different things: {found}; choose with layer=")
        rows, columns = max((self.grids[layer] for layer in averaged), key=lambda grid: grid[0] * grid[1])
        total = np.zeros((rows, columns, next(iter(averaged.values())).shape[-1]), dtype=np.float64)
        for layer, weights in averaged.items():
            grid = torch.from_numpy(np.ascontiguousarray(weights.T)).unflatten(1, self.grids[layer])[None]
            finest = F.interpolate(grid, size=(rows, columns), mode="bilinear", align_corners=False)
            total += finest[0].permute(1, 2, 0).numpy()
        return (total / len(averaged)).astype(np.float32)

    def heatmap(
        self, averaged: Averaged, word: str | None, place: Place, occurrence: int, image: Image.Image | None
    ) -> Heatmap:
        """See `AttentionMaps.heatmap`."""
        if self.prompt is None:
            raise UsageError(
                "the prompt's words are not known, only its embeddings: record_attention(..., prompts=[...]) names them"
            )
        if word is None:
            raise UsageError(f"heatmap() of a drawn picture needs a word: {', '.join(map(repr, self.words))}")
        values = self.array(averaged)[..., self._places(word, occurrence)].sum(axis=-1)
        return Heatmap(values, image or self.image or _blank(values.shape), word, self.prompt.text)

    def alignment(self, averaged: Averaged) -> Alignment:
        """Refused: a picture has no words."""
        raise UsageError("alignment() is for translations; of a drawn picture, heatmap() shows a word")

    def about(self) -> dict[str, Any]:
        """What `AttentionMaps.save` writes beside the weights."""
        facts: dict[str, Any] = {"axes": ["step", "head", "cell", "token"], "kept": self.kept}
        facts |= {"prompt": None if self.prompt is None else self.prompt.text}
        facts |= {"pieces": None if self.prompt is None else self.prompt.pieces}
        return facts | {"grids": {str(layer): grid for layer, grid in self.grids.items()}, "steps": self.steps}

    def _places(self, word: str, occurrence: int) -> list[int]:
        """Columns of a word; SDXL's second prompt is looked at when the first does not have it."""
        assert self.prompt is not None
        text = self.prompt
        if self.second is not None and not text.find(word) and self.second.find(word):
            text = self.second
        places = text.positions(word, occurrence)
        if self.also is not None and len(self.also.find(word)) > occurrence:
            places = [*places, *self.also.positions(word, occurrence)]
        columns = self._columns(places)
        if columns is None:
            raise UsageError(f"{word!r} was not recorded: tokens={self.words} were")
        return columns

    def _columns(self, places: Sequence[int]) -> list[int] | None:
        if self.kept is None:
            return list(places)
        return [self.kept.index(place) for place in places] if set(places) <= set(self.kept) else None


@dataclass(frozen=True, eq=False)
class RecordedPair:
    """A text that looked at another one, or at frames of sound: `weights[layer]` is float32 `[H, L, Lk]` on the CPU.

    Attributes:
        target: the text that looked.
        source: what it looked at; None where that has no words.
        weights: by layer.
        is_shifted: query i chose token i + 1, as in a decoder that is given its own tokens.
        best: layer and heads that tell alignments best, where the model says so.
        align: token weights `[L, Lk]` to words, in the model's own way; None: by the marks of its tokens.
    """

    target: TextTokens
    source: TextTokens | None
    weights: dict[int, torch.Tensor]
    is_shifted: bool = True
    best: tuple[int, list[int] | None] | None = None
    align: Callable[[np.ndarray], Alignment] | None = None

    @property
    def words(self) -> list[str]:
        """Words of the text that looked."""
        return [word for word, _ in self.target.words()]

    def array(self, averaged: Averaged) -> np.ndarray:
        """`[L, Lk]`: row i is the query that was given token i."""
        return np.mean(list(averaged.values()), axis=0)

    def heatmap(
        self, averaged: Averaged, word: str | None, place: Place, occurrence: int, image: Image.Image | None
    ) -> Heatmap:
        """Refused: there is no picture, or none whose places are known."""
        if self.source is None:
            raise UsageError(
                "heatmap(): what this text looked at has no words, and is no picture whose rows and columns are known: "
                "array() gives the weights, a column for each place"
            )
        raise UsageError("heatmap() is for pictures; of a translation, alignment() shows which words belong together")

    def alignment(self, averaged: Averaged) -> Alignment:
        """See `AttentionMaps.alignment`."""
        if self.align is not None:
            return self.align(self.array(averaged))
        return word_alignment(self.target, self.source, self.array(averaged), is_shifted=self.is_shifted)

    def about(self) -> dict[str, Any]:
        """What `AttentionMaps.save` writes beside the weights."""
        source = None if self.source is None else self.source.pieces
        return {"axes": ["head", "token", "source"], "pieces": self.target.pieces, "source_pieces": source}


Recorded = RecordedText | RecordedPicture | RecordedPair


def _blank(grid: Sequence[int]) -> Image.Image:
    """A grey picture of a grid's shape."""
    return Image.new("RGB", (grid[1] * _CELL, grid[0] * _CELL), "#808080")
