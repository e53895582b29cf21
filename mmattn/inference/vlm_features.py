"""The features of a frozen image encoder: made once for every training picture, and kept on disk."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, Optional

import torch
from torch import Tensor, nn

from mmattn._home import expand_home
from mmattn.data.cached_features import cache_features
from mmattn.data.images import PixelTransform
from mmattn.data.records import ImageTextSource
from mmattn.data.source_facts import source_facts
from mmattn.data.stream_rows import stream_layout
from mmattn.data.tensor_cache import TensorCache
from mmattn.errors import ConfigError
from mmattn.inference.frozen_parts import encoding_device, placed
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.inference.vlm_setup import ExampleConfig
from mmattn.inference.weight_hash import add_weights
from mmattn.models.vlm import ImageEncoderConfig
from mmattn.training import TrainingConfig
from mmattn.training.config import CACHE_FOLDER
from mmattn.training.devices import resolve_precision

_GIB = 2**30
_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class FeatureCacheConfig:
    """What the frozen image encoder computes is kept on disk. The log's first line says whether, and why not.

    Args:
        features: Encode every picture once, before training, where nothing random or trained comes before the features
            and the run draws pictures more than once.
        max_gib: Not where the features take more room than this, in GiB.
        folder: Where it lies. None: `cache` in the run's output folder. Runs may share one.
    """

    features: bool = True
    max_gib: float = 20.0
    folder: Optional[str] = None  # noqa: UP045 (OmegaConf reads Optional on every Python version)

    def __post_init__(self) -> None:
        expand_home(self, "folder")
        if not self.max_gib > 0:
            raise ConfigError(f"cache.max_gib must be positive, not {self.max_gib}")


@dataclass(frozen=True)
class PictureFeatures:
    """`cache`: the features of all training pictures, None where the encoder runs in every step; `remark`: which."""

    cache: TensorCache | None = None
    remark: str = ""


def open_features(
    vlm: VisionLanguageModel,
    source: ImageTextSource,
    cache: FeatureCacheConfig,
    training: TrainingConfig,
    examples: ExampleConfig,
    *,
    is_preview: bool = False,
) -> PictureFeatures:
    """Encode all training pictures once, unless that was done before, or the encoder has to run in every step.

    Args:
        vlm: With what is not trained frozen.
        source: The training pictures.
        cache: Whether and where.
        training: Of the run.
        examples: Whether pictures are changed at random.
        is_preview: Say what would be done, and encode nothing.

    Raises:
        RunError: the disk is full or cannot be written.
    """
    encoder, image, pictures = vlm.network.image, vlm.network.config.image, len(source)
    if any(parameter.requires_grad for parameter in encoder.parameters()):
        return PictureFeatures()
    gib = pictures * image.num_features * image.embed_dim * 4 / _GIB  # half of it where autocast gives half floats
    is_streamed = stream_layout(source) is not None
    reason = _why_not(image, pictures, gib, cache, training, examples, is_streamed=is_streamed)
    if reason is not None:
        return PictureFeatures(remark=f"the frozen image encoder runs in every step: {reason}")
    folder = Path(training.output_dir) / CACHE_FOLDER if cache.folder is None else Path(cache.folder)
    remark = f"the frozen image encoder runs once for each picture, {gib:.2f} GiB in {folder}"
    if is_preview:
        return PictureFeatures(remark=remark)
    device = encoding_device(training)
    precision = resolve_precision(training.mixed_precision, device)
    fingerprint = {"encoder": _fingerprint(vlm), "precision": precision, "data": source_facts(source)}
    encode = _Encode(encoder, device, precision)
    with _evaluating(encoder), placed([encoder], device):
        made = cache_features(source, PixelTransform.from_processor(vlm.processor), folder, fingerprint, encode)
    return PictureFeatures(made, remark)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    was_training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(was_training)


class _Encode:
    def __init__(self, encoder: nn.Module, device: torch.device, precision: str) -> None:
        self.encoder, self.device, self.dtype = encoder, device, _AUTOCAST.get(precision)

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        # As in a training step, so that the features are the same.
        with contextlib.nullcontext() if self.dtype is None else torch.autocast(self.device.type, self.dtype):
            return self.encoder(pixels.to(self.device)).cpu()


def _why_not(
    image: ImageEncoderConfig,
    pictures: int,
    gib: float,
    cache: FeatureCacheConfig,
    training: TrainingConfig,
    examples: ExampleConfig,
    *,
    is_streamed: bool,
) -> str | None:
    if not cache.features:
        return "cache.features is false"
    if is_streamed:
        return "the pictures are streamed (data.streaming)"
    if examples.has_view:
        return "pictures are cropped or mirrored at random (examples.view_min_area, examples.view_flip)"
    if image.dropout_p or image.attention_dropout_p:
        return "it has dropout"
    draws = training.max_steps * training.batch_size
    if draws <= pictures:
        return f"the run draws {draws} pictures, of {pictures} that there are"
    if gib > cache.max_gib:
        return f"the features of {pictures} pictures take {gib:.1f} GiB, more than cache.max_gib {cache.max_gib:g}"
    return None


def _fingerprint(vlm: VisionLanguageModel) -> str:
    values: dict[str, Any] = vlm.network.config.to_dict()["image"]
    digest = sha256(json.dumps(values, sort_keys=True).encode())
    add_weights(digest, vlm.network.image)
    return digest.hexdigest()
