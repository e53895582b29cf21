"""The data side of a diffusion run: usable pictures, their buckets, and what frozen encoders make of them, cached."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Optional

import numpy as np
import torch
from torch import Tensor

from mmattn.data.buckets import Buckets, assign_buckets, picture_sizes, usable_source
from mmattn.data.cached_inputs import cache_latents, cache_texts, text_entries
from mmattn.data.captions import all_captions
from mmattn.data.readers import open_image_text
from mmattn.data.records import ImageTextSource
from mmattn.data.source_facts import source_facts
from mmattn.data.spec import DataConfig
from mmattn.data.tensor_cache import TensorCache
from mmattn.data.text_to_image import NoiseConfig, NoiseShape, PictureConfig, TextToImageCollator
from mmattn.errors import ConfigError, DataError
from mmattn.inference.denoising import encode_pixels
from mmattn.inference.diffusion_setup import Trained
from mmattn.inference.pixel_pipeline import PixelPipeline
from mmattn.inference.prompt_tokens import cut_message
from mmattn.inference.sd_text_encoding import sd_text_encodings
from mmattn.inference.text_encoding import PromptEncoder, TextEncoding
from mmattn.inference.text_fingerprints import encoders_fingerprint
from mmattn.inference.text_to_image import TextToImage

_log = logging.getLogger(__name__)

_MOST_SAID = 5  # captions that are named when they are cut


@dataclass
class CacheConfig:
    """What frozen encoders compute is kept on disk.

    Args:
        folder: Where; None: `cache` in the run's output folder. Runs may share one.
        latents: Encode every picture once, before training (and its mirror image with `pictures.flip`). Not with
            random crops.
        texts: Encode every caption once, where the text encoder is frozen; else in every step. Stable Diffusion's are
            always kept, but where a new token is trained.
    """

    folder: Optional[str] = None  # noqa: UP045 (OmegaConf reads Optional on every Python version)
    latents: bool = True
    texts: bool = True


class DiffusionData:
    """One split of the data as batches for one model.

    Args:
        model: the model that is trained.
        trained: what of it is.
        data: the data.
        pictures: size, crop and mirroring.
        noise: timesteps and noise.
        cache: what is kept on disk.
        cache_folder: where, unless `cache.folder` says.
        seed: of all draws.
        caption_dropout: part of the captions that is left out.
        batch_size: buckets with fewer pictures are given up.
        split: of the data.
        device: where the frozen encoders run.
        is_preview: encode what is asked for, and write no caches.

    Raises:
        ConfigError: settings that the model cannot serve.
        DataError: pictures or captions that cannot be used.
    """

    def __init__(
        self,
        model: TextToImage,
        trained: Trained,
        data: DataConfig,
        pictures: PictureConfig,
        noise: NoiseConfig,
        cache: CacheConfig,
        *,
        cache_folder: Path,
        seed: int,
        caption_dropout: float = 0.0,
        batch_size: int = 1,
        split: str = "train",
        device: torch.device | str = "cpu",
        is_preview: bool = False,
    ) -> None:
        pipeline = model.pipeline
        check_pictures(pipeline, pictures)
        self.source: ImageTextSource = usable_source(open_image_text(data, split), pictures)
        self.buckets: Buckets | None = None
        if pictures.buckets:
            self.buckets = assign_buckets(picture_sizes(self.source, pictures), pictures, min_examples=batch_size)
        sizes = None if self.buckets is None else self.buckets.example_sizes
        vae = getattr(pipeline, "vae", None)
        folder = Path(cache.folder) if cache.folder is not None else cache_folder
        has_encoder = trained.network.text_encoder is not None
        texts = None if has_encoder else self._texts(pipeline, folder, device, is_preview=is_preview)
        if texts is None and trained.token is not None:
            self._require_token(trained.token)
        latents = None
        if vae is not None and cache.latents:
            _require_whole(pictures)
            if not is_preview:
                latents = self._latents(vae.to(device), pictures, folder, sizes)
        self.collate = TextToImageCollator(
            pictures,
            noise,
            seed=seed,
            noise_shape=NoiseShape(3, 1) if vae is None else NoiseShape(vae.config.latent_channels, latent_factor(vae)),
            tokenize=_Tokens(pipeline) if texts is None else None,
            texts=texts,
            latents=latents,
            sizes=sizes,
            caption_dropout=caption_dropout,
            has_posterior=vae is not None,
            has_time_ids=getattr(pipeline, "text_encoder_2", None) is not None,
        )

    def __len__(self) -> int:
        return len(self.source)

    def batch(self, draws: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """The batch of these (epoch, example) draws."""
        return self.collate(self.source, draws)

    def _texts(
        self, pipeline: Any, folder: Path, device: torch.device | str, *, is_preview: bool
    ) -> TensorCache | _EachTime:
        is_pixel = isinstance(pipeline, PixelPipeline)
        for name in ("text_encoder", "text_encoder_2"):
            if (encoder := getattr(pipeline, name, None)) is not None:
                encoder.to(device)
        encoding: PromptEncoder = pipeline.text_encoding if is_pixel else sd_text_encodings(pipeline)
        encode = _Encode(encoding)
        if is_preview:
            return _EachTime(encode)
        _say_cuts(encoding, self.source)
        return cache_texts(self.source, folder, {"encoder": encoding.fingerprint()}, encode)

    def _latents(self, vae: Any, pictures: PictureConfig, folder: Path, sizes: np.ndarray | None) -> TensorCache:
        fingerprint = {"vae": encoders_fingerprint([vae], [], {}), "data": source_facts(self.source)}
        return cache_latents(
            self.source, pictures, folder, fingerprint, lambda pixels: encode_pixels(vae, pixels), sizes=sizes
        )

    def _require_token(self, token: str) -> None:
        captions = all_captions(self.source)
        if not any(token in caption for caption in captions):
            raise DataError(
                f"{self.source.name}: no caption has the new token {token!r} (new_token.token), such as "
                f"{captions[0]!r}: write it into the captions of what it shall mean"
            )


def _require_whole(pictures: PictureConfig) -> None:
    if pictures.crop != "center":
        raise ConfigError(
            f"pictures.crop={pictures.crop} and cache.latents=true: latents of whole pictures are kept, so set "
            "pictures.crop=center or cache.latents=false"
        )


class _EachTime:
    """Stands in for a cache: encodes a caption whenever it is asked for."""

    def __init__(self, encode: _Encode) -> None:
        self.encode = encode

    def __getitem__(self, caption: str) -> Mapping[str, Tensor]:
        return self.encode([caption])[0]


class _Encode:
    """Captions to cache entries."""

    def __init__(self, encoder: PromptEncoder) -> None:
        self.encoder = encoder

    @torch.no_grad()
    def __call__(self, captions: Sequence[str]) -> list[dict[str, Tensor]]:
        encoded = self.encoder.encode_prompts(list(captions)).to("cpu")
        return text_entries(encoded.states, encoded.key_mask, encoded.pooled)


class _Tokens:
    """Captions to the tokens that the pipeline's text encoder takes."""

    def __init__(self, pipeline: Any) -> None:
        self.text = pipeline.text_encoding if isinstance(pipeline, PixelPipeline) else None
        self.tokenizer = pipeline.tokenizer

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        if self.text is not None:
            return self.text.tokenize(captions)
        # Stable Diffusion attends to the padding, and so has no mask.
        length = self.tokenizer.model_max_length
        batch = self.tokenizer(captions, padding="max_length", truncation=True, max_length=length, return_tensors="pt")
        return {"input_ids": batch["input_ids"]}


def latent_factor(vae: Any) -> int:
    """Pixels, across and down, of one place of a VAE's latents."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def check_pictures(pipeline: Any, pictures: PictureConfig) -> None:
    """Raise `ConfigError` for a size of pictures that the model does not take."""
    vae = getattr(pipeline, "vae", None)
    factor = pipeline.config.pixel_unshuffle if vae is None else latent_factor(vae)
    name, side = ("step", pictures.step) if pictures.buckets else ("resolution", pictures.resolution)
    if side % factor:
        raise ConfigError(f"pictures.{name} {side} must be a multiple of {factor} for this model")


def _say_cuts(encoder: PromptEncoder, source: ImageTextSource) -> None:
    """Captions that are too long are cut: said once, with what was cut of the first."""
    if encoder.max_length is None or isinstance(encoder, TextEncoding):  # the latter says so itself
        return
    # A token is a character at least, so that most captions need no second look.
    long = [caption for caption in all_captions(source) if len(caption) > encoder.max_length]
    cuts = [(caption, cut) for caption, cut in zip(long, encoder.cut(long), strict=True) if cut is not None]
    for caption, cut in cuts[:_MOST_SAID]:
        _log.warning("%s", cut_message(caption, cut, encoder.max_length))
    if len(cuts) > _MOST_SAID:
        _log.warning("%d more captions are cut", len(cuts) - _MOST_SAID)
