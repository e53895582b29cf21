"""What frozen parts of a diffusion model make of captions and pictures, computed once and kept on disk.

Latents carry the captions and the crop of the very record they were made from, since a record that cannot be read is
replaced by another (`SkippingSource`), and a picture must not meet the caption of a third.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mmattn.data.captions import all_captions, require_captions
from mmattn.data.picture_fit import PictureConfig, fit_picture, signed_pixels
from mmattn.data.records import ImageTextSource, read_records
from mmattn.data.tensor_cache import TensorCache
from mmattn.errors import UsageError

_FACTS = "facts"
_MIRRORED = "/mirrored"


def text_entries(
    states: Tensor, key_mask: Tensor | None = None, pooled: Tensor | None = None
) -> list[dict[str, Tensor]]:
    """An encoded batch of captions as cache entries, one a caption, padding left out.

    Args:
        states: [B, L, C].
        key_mask: bool [B, L], True = may attend; None where the U-Net attends to padding too (CLIP in SD).
        pooled: [B, P], where the encoder has one.
    """
    entries = [
        {"states": row if key_mask is None else row[mask]}
        for row, mask in zip(states, key_mask if key_mask is not None else [None] * len(states), strict=True)
    ]
    if pooled is not None:
        for entry, row in zip(entries, pooled, strict=True):
            entry["pooled"] = row
    return entries


def pad_texts(entries: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Entries of `text_entries` to a batch: `text_states` [B, L, C], `text_mask` bool [B, L] where lengths differ,
    `pooled` [B, P] where there is one.
    """
    lengths = [len(entry["states"]) for entry in entries]
    first, longest = entries[0]["states"], max(*lengths, 1)
    states = first.new_zeros(len(entries), longest, first.shape[1])
    for row, entry, length in zip(states, entries, lengths, strict=True):
        row[:length] = entry["states"]
    batch = {"text_states": states}
    if min(lengths) < longest:
        batch["text_mask"] = torch.arange(longest) < torch.tensor(lengths)[:, None]
    if "pooled" in entries[0]:
        batch["pooled"] = torch.stack([entry["pooled"] for entry in entries])
    return batch


def cache_texts(
    source: ImageTextSource,
    folder: str | Path,
    fingerprint: Mapping[str, Any],
    encode: Callable[[list[str]], list[dict[str, Tensor]]],
    *,
    batch_size: int = 64,
) -> TensorCache:
    """The embeddings of every caption of a source, and of "".

    Args:
        source: Pictures with captions.
        folder: Where caches lie.
        fingerprint: Of the text encoder and its tokenizer.
        encode: Captions to entries, such as `text_entries` makes.
        batch_size: Captions encoded at once.
    """
    keys = ["", *all_captions(source)]
    return TensorCache.open_or_build(folder, {"of": "captions", **fingerprint}, keys, encode, batch_size=batch_size)


def latent_key(example: int, mirrored: bool) -> str:
    """The key of a picture's latents."""
    return f"{example}{_MIRRORED}" if mirrored else str(example)


def read_facts(entry: Mapping[str, Tensor]) -> dict[str, Any]:
    """`captions` and `time_ids` of the record that an entry's latents were made from."""
    return json.loads(entry[_FACTS].numpy().tobytes())


def cache_latents(
    source: ImageTextSource,
    pictures: PictureConfig,
    folder: str | Path,
    fingerprint: Mapping[str, Any],
    encode: Callable[[Tensor], tuple[Tensor, Tensor]],
    *,
    sizes: np.ndarray | None = None,
    batch_size: int = 8,
) -> TensorCache:
    """The VAE's latents of every picture, and of its mirror image with `pictures.flip`.

    Args:
        source: Pictures with captions.
        pictures: Size and mirroring; `crop` must be "center".
        folder: Where caches lie.
        fingerprint: Of the VAE and of the data (`source_facts`).
        encode: float32 [B, 3, H, W] in [-1, 1] to mean and standard deviation of the latents, [B, C, h, w] each.
        sizes: Height and width of each example, int [num_examples, 2]; None: squares of `pictures.resolution`.
        batch_size: Pictures encoded at once.

    Raises:
        UsageError: random crops.
    """
    if pictures.crop != "center":
        raise UsageError(f"latents of pictures.crop={pictures.crop} cannot be cached: use center")
    if sizes is None:
        sizes = np.full((len(source), 2), pictures.resolution)
    build = _LatentBuilder(source, sizes, encode)
    order = np.lexsort((sizes[:, 1], sizes[:, 0])).tolist()  # stable: batches of one size
    keys = [latent_key(example, flip) for example in order for flip in ((False, True) if pictures.flip else (False,))]
    facts = {
        "of": "latents",
        "pictures": dataclasses.asdict(pictures),
        "sizes": hashlib.sha256(np.ascontiguousarray(sizes, dtype=np.int64).data).hexdigest(),
        **fingerprint,
    }
    return TensorCache.open_or_build(folder, facts, keys, build, batch_size=batch_size)


class _LatentBuilder:
    def __init__(
        self, source: ImageTextSource, sizes: np.ndarray, encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    ) -> None:
        self.source, self.sizes, self.encode = source, sizes, encode

    def __call__(self, keys: Sequence[str]) -> list[dict[str, Tensor]]:
        examples = [int(key.removesuffix(_MIRRORED)) for key in keys]
        numbers = sorted(set(examples))
        records = dict(zip(numbers, read_records(self.source, numbers), strict=True))
        fitted = []
        for key, example in zip(keys, examples, strict=True):
            size = (int(self.sizes[example][0]), int(self.sizes[example][1]))
            fitted.append(fit_picture(records[example].image, size, mirrored=key.endswith(_MIRRORED)))
        latents = self._encoded([picture.pixels for picture in fitted])
        entries = []
        for example, picture, (mean, std) in zip(examples, fitted, latents, strict=True):
            record = records[example]
            facts = {"captions": require_captions(record.id, record.texts), "time_ids": picture.time_ids()}
            text = np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8).copy()
            entries.append({"mean": mean, "std": std, _FACTS: torch.from_numpy(text)})
        return entries

    def _encoded(self, pictures: Sequence[np.ndarray]) -> list[tuple[Tensor, Tensor]]:
        """Latents of pictures that may differ in size: keys come sorted by it, so there are few runs."""
        encoded: list[tuple[Tensor, Tensor]] = []
        start = 0
        for end in range(1, len(pictures) + 1):
            if end == len(pictures) or pictures[end].shape != pictures[start].shape:
                means, stds = self.encode(signed_pixels(pictures[start:end]))
                encoded += zip(means, stds, strict=True)
                start = end
        return encoded
