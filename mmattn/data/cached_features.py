"""What a frozen image encoder makes of each picture of a source, computed once and kept on disk, with its texts.

The texts stand beside the features, since a record that cannot be read is replaced by another (`SkippingSource`), and a
picture must not meet the texts of a third; and since no picture then has to be opened to learn from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmattn.data.images import PixelTransform
from mmattn.data.records import ImageTextRecord, ImageTextSource, TextItem, read_records
from mmattn.data.tensor_cache import TensorCache

FEATURES = "features"
_TEXTS = "texts"
_AT_ONCE = 8  # pictures that go through the encoder together

EncodePixels = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class PictureTexts:
    """A record without its picture: `id` and `texts` as in `ImageTextRecord`."""

    id: str
    texts: tuple[TextItem, ...]


def cache_features(
    source: ImageTextSource,
    transform: PixelTransform,
    folder: str | Path,
    fingerprint: Mapping[str, Any],
    encode: EncodePixels,
) -> TensorCache:
    """The features of every picture of a source.

    Args:
        source: Pictures with texts.
        transform: Pictures to pixel values.
        folder: Where caches lie.
        fingerprint: Of the encoder, the arithmetic it runs in and the data (`source_facts`).
        encode: float32 [B, 3, S, S], B >= 2, to features [B, Lk, C] on the CPU.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    pixels = [transform.size, transform.mean, transform.std, int(transform.resample)]
    facts = {"of": "picture features", "pixels": pixels, **fingerprint}
    keys = [str(example) for example in range(len(source))]
    build = _Builder(source, transform, encode)
    return TensorCache.open_or_build(folder, facts, keys, build, batch_size=_AT_ONCE, label="caching picture features")


class _Builder:
    def __init__(self, source: ImageTextSource, transform: PixelTransform, encode: EncodePixels) -> None:
        self.source, self.transform, self.encode = source, transform, encode

    def __call__(self, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        records = read_records(self.source, [int(key) for key in keys])
        pixels = self.transform([record.image for record in records])
        # A product of few rows may be summed in another order than one of many: never a single picture.
        features = self.encode(pixels if len(pixels) > 1 else pixels.expand(2, -1, -1, -1).contiguous())
        return [{FEATURES: row, _TEXTS: _as_bytes(record)} for row, record in zip(features, records, strict=False)]


def _as_bytes(record: ImageTextRecord) -> Tensor:
    texts = {"id": record.id, "texts": [dataclasses.asdict(item) for item in record.texts]}
    return torch.from_numpy(np.frombuffer(json.dumps(texts).encode(), dtype=np.uint8).copy())


def read_features(cache: TensorCache, examples: Sequence[int]) -> tuple[Tensor, list[PictureTexts]]:
    """Features [B, Lk, C] of examples by number, and the texts of each."""
    entries = [cache[str(example)] for example in examples]
    facts = [json.loads(entry[_TEXTS].numpy().tobytes()) for entry in entries]
    texts = [PictureTexts(fact["id"], tuple(TextItem(**item) for item in fact["texts"])) for fact in facts]
    return torch.stack([entry[FEATURES] for entry in entries]), texts
