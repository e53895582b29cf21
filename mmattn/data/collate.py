"""Records to batches: which texts, which view, in what layout; a pure function of (seed, epoch, example)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from mmattn.data.cached_features import PictureTexts, read_features
from mmattn.data.draws import draw_generator
from mmattn.data.images import PixelTransform
from mmattn.data.records import ImageTextRecord, ImageTextSource, TextItem, read_records
from mmattn.data.tensor_cache import TensorCache
from mmattn.errors import UsageError
from mmattn.ops.segments import Segments

IGNORED = -100


class ImageTextCollator:
    """Makes the batches on which a decoder learns to caption and to answer.

    A caption is laid out as `bos prompt text eos`, an answer as `bos question sep answer eos`. Scored are the text or
    answer and the `eos`. What does not fit `max_length` is cut from the question first, as long as that takes more
    than half the room, then from the text, which then has no `eos`.

    Args:
        transform: Pictures to pixel values.
        tokenizer: Without special tokens of its own in `encode(..., add_special_tokens=False)`.
        texts_per_image: Texts drawn per picture and epoch, all different where there are enough.
        max_length: Tokens per row at most.
        seed: Of the draws.
        prompt: Stands before every caption, not scored ("a picture of").
        kind_weights: How likely a kind of text is drawn, relative to 1 for kinds that are not named; 0 leaves a kind
            out. None draws all texts alike.
        token_dropout: Part of the text's own tokens that the decoder reads as unknown while it has to predict the next
            one (word dropout, arXiv 1511.06349 section 3.1): it then has to look at the picture instead of going by
            what usually follows. Labels stay.
        view: Random crops and the like for training.
        features: What a frozen image encoder made of whole pictures (`cache_features`): batches then hold that, no
            picture is opened, and `view` must be None.
        packed: Without padding: all rows one after the other.
        bos_id, sep_id, eos_id, pad_id: Where the model's differ from the tokenizer's (BLIP's bos is not in its
            tokenizer's settings, and its eos is the sep token).

    Raises:
        UsageError: a size that leaves no room, or a special token that neither the tokenizer nor the caller names.
    """

    def __init__(
        self,
        transform: PixelTransform,
        tokenizer: PreTrainedTokenizerBase,
        texts_per_image: int = 1,
        max_length: int = 32,
        seed: int = 0,
        *,
        prompt: str = "",
        kind_weights: Mapping[str, float] | None = None,
        token_dropout: float = 0.0,
        view: Callable[[np.ndarray, np.random.Generator], np.ndarray] | None = None,
        features: TensorCache | None = None,
        packed: bool = False,
        bos_id: int | None = None,
        sep_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
    ) -> None:
        if texts_per_image < 1 or max_length < 4:
            raise UsageError(f"need texts_per_image >= 1 and max_length >= 4, not {texts_per_image} and {max_length}")
        if view is not None and features is not None:
            raise UsageError("features are those of whole pictures, which a view would change: pass one of the two")
        self.transform, self.tokenizer, self.view, self.features = transform, tokenizer, view, features
        self.packed = packed
        self.texts_per_image, self.max_length, self.seed = texts_per_image, max_length, seed
        self.kind_weights = dict(kind_weights) if kind_weights is not None else None
        self.bos_id = _token_id("bos", bos_id, tokenizer.bos_token_id)
        self.sep_id = _token_id("sep", sep_id, tokenizer.sep_token_id)
        self.eos_id = _token_id("eos", eos_id, tokenizer.eos_token_id)
        self.pad_id = _token_id("pad", pad_id, tokenizer.pad_token_id)
        if not 0 <= token_dropout < 1:
            raise UsageError(f"token_dropout must be at least 0 and below 1, not {token_dropout}")
        self.token_dropout = token_dropout
        self.unknown_id = _token_id("unk", None, tokenizer.unk_token_id) if token_dropout else self.pad_id
        self._prompt_ids = self._encode(prompt) if prompt else []
        self._known: dict[str, list[int]] = {}

    def __call__(self, source: ImageTextSource, draws: Sequence[tuple[int, int]]) -> dict[str, Any]:
        """The batch for (epoch, example) pairs.

        Returns:
            `pixel_values` float32 [B, 3, S, S], or None and `features` [B, Lk, C] where there are any; `input_ids`,
            `labels` (-100 where not scored) and `attention_mask` int64 [B * T, L], T = `texts_per_image`; row i belongs
            to picture i // T. Labels stand under their own token: the model shifts them.

            Packed, `input_ids` and `labels` are those of `pack`, with `segments` in place of the mask.
        """
        pictures, records = self._pictures(source, draws)
        rows = []
        for record, (epoch, example) in zip(records, draws, strict=True):
            items = self.draw_texts(record, draw_generator(self.seed, epoch, example, "texts"))
            rows += [self.lay_out(item) for item in items]
        batch = self.pad(rows)
        if self.token_dropout:
            self._drop_tokens(batch, draws)
        return {**pictures, **(pack(batch) if self.packed else batch)}

    def _pictures(
        self, source: ImageTextSource, draws: Sequence[tuple[int, int]]
    ) -> tuple[dict[str, torch.Tensor | None], Sequence[ImageTextRecord | PictureTexts]]:
        """What the batch says of pictures, and who knows their texts."""
        examples = [example for _, example in draws]
        if self.features is not None:
            features, texts = read_features(self.features, examples)
            return {"pixel_values": None, "features": features}, texts
        records = read_records(source, examples)
        images = [record.image for record in records]
        if self.view is not None:
            generators = [draw_generator(self.seed, epoch, example, "view") for epoch, example in draws]
            images = [self.view(image, generator) for image, generator in zip(images, generators, strict=True)]
        return {"pixel_values": self.transform(images)}, records

    def _drop_tokens(self, batch: dict[str, torch.Tensor], draws: Sequence[tuple[int, int]]) -> None:
        """Replace part of the scored tokens in `input_ids`, in place."""
        shape = (self.texts_per_image, self.max_length)  # drawn at full length: a batch's padding changes nothing
        drawn = [draw_generator(self.seed, epoch, example, "tokens").random(shape) for epoch, example in draws]
        ids, labels = batch["input_ids"], batch["labels"]
        is_dropped = torch.from_numpy(np.concatenate(drawn)[:, : ids.shape[1]] < self.token_dropout)
        ids[is_dropped & (labels != IGNORED)] = self.unknown_id

    def draw_texts(self, record: ImageTextRecord | PictureTexts, generator: np.random.Generator) -> list[TextItem]:
        """`texts_per_image` of the record's texts."""
        if self.kind_weights is None:
            weights = np.ones(len(record.texts))
        else:
            weights = np.array([self.kind_weights.get(item.kind, 1.0) for item in record.texts])
        usable = np.flatnonzero(weights > 0)
        if not len(usable):
            kinds = ", ".join(sorted({item.kind for item in record.texts})) or "no texts"
            raise UsageError(f"record {record.id} has nothing that kind_weights lets through, only: {kinds}")
        # The largest of log(u) / w is drawn with chance w / sum(w); sorting draws without replacement
        # (Efraimidis and Spirakis, 2006).
        keys = np.log(generator.random(len(usable))) / weights[usable]
        order = usable[np.argsort(-keys, kind="stable")]
        return [record.texts[order[position % len(order)]] for position in range(self.texts_per_image)]

    def lay_out(self, item: TextItem) -> tuple[list[int], int]:
        """Token ids of one row, and how many at its start are not scored."""
        text = self._ids(item.text)
        before = [self.bos_id]
        if item.question is None:
            before += self._prompt_ids
        else:
            room = self.max_length - 3
            question = self._ids(item.question)
            before += [*question[: max(room - len(text), room // 2)], self.sep_id]
        return [*before, *text, self.eos_id][: self.max_length], len(before)

    def prompt_ids(self, question: str | None = None) -> list[int]:
        """What stands before the text in a row: the start of decoding for a caption, or for an answer."""
        row, unscored = self.lay_out(TextItem("", question))
        return row[:unscored]

    def pad(self, rows: Sequence[tuple[list[int], int]]) -> dict[str, torch.Tensor]:
        """Rows from `lay_out`, padded on the right: `input_ids`, `labels`, `attention_mask`, int64 [R, L]."""
        shape = (len(rows), max(len(ids) for ids, _ in rows))
        input_ids = np.full(shape, self.pad_id, dtype=np.int64)
        labels = np.full(shape, IGNORED, dtype=np.int64)
        attention_mask = np.zeros(shape, dtype=np.int64)
        for row, (ids, unscored) in enumerate(rows):
            input_ids[row, : len(ids)] = ids
            labels[row, unscored : len(ids)] = ids[unscored:]
            attention_mask[row, : len(ids)] = 1
        arrays = {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask}
        return {key: torch.from_numpy(array) for key, array in arrays.items()}

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False))

    def _ids(self, text: str) -> list[int]:
        """Scenes repeat their texts, and a look-up is a hundred times faster than the tokenizer."""
        ids = self._known.get(text)
        if ids is None:
            ids = self._encode(text)
            if len(self._known) < 100_000:
                self._known[text] = ids
        return ids


def pack(batch: Mapping[str, torch.Tensor]) -> dict[str, Any]:
    """Padded rows, as `ImageTextCollator.pad` gives them, one after the other without padding.

    A row's last token predicts nothing and is left out.

    Returns:
        `input_ids` int64 [N], `labels` int64 [N], the token that follows each (-100 where that is not scored), and the
        `segments` of the rows.
    """
    is_followed = batch["attention_mask"][:, 1:].bool()
    return {
        "input_ids": batch["input_ids"][:, :-1][is_followed],
        "labels": batch["labels"][:, 1:][is_followed],
        "segments": Segments.of(is_followed.sum(dim=1).tolist()),
    }


def _token_id(name: str, given: int | None, own: object) -> int:
    token = own if given is None else given
    if not isinstance(token, int):
        raise UsageError(f"the tokenizer has no {name} token: pass {name}_id")
    return token
