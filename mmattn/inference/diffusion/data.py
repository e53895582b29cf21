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

from mmattn._home import expand_home
from mmattn.data.buckets import Buckets, assign_buckets, picture_sizes, usable_source
from mmattn.data.cached_inputs import cache_latents, cache_texts, text_entries
from mmattn.data.captions import known_captions
from mmattn.data.readers import open_image_text
from mmattn.data.records import ImageTextSource
from mmattn.data.source_facts import source_facts
from mmattn.data.spec import DataConfig
from mmattn.data.stream_rows import stream_layout
from mmattn.data.tensor_cache import TensorCache
from mmattn.data.text_to_image import NoiseConfig, NoiseShape, PictureConfig, TextToImageCollator
from mmattn.errors import ConfigError, DataError
from mmattn.inference.diffusion.denoising import encode_pixels
from mmattn.inference.diffusion.pixel_pipeline import PixelPipeline
from mmattn.inference.diffusion.prompt_tokens import cut_message
from mmattn.inference.diffusion.sd_text_encoding import sd_text_encodings
from mmattn.inference.diffusion.setup import Trained
from mmattn.inference.diffusion.text_encoding import PromptEncoder, TextEncoding
from mmattn.inference.frozen_parts import placed
from mmattn.inference.text_fingerprints import encoders_fingerprint
from mmattn.inference.text_to_image import TextToImage

_log = logging.getLogger(__name__)

_AT_ONCE = 4  # pictures that go through the VAE together
_MOST_SAID = 5  # captions that are named when they are cut


@dataclass
class CacheConfig:
    """What frozen encoders compute is kept on disk.

    Args:
        folder: Where it lies. None: `cache` in the run's output folder. Runs may share one.
        latents: Stable Diffusion: encode every picture once, before training (and its mirror image with
            `pictures.flip`). Not with random crops, nor with `data.streaming`.
        texts: Encode every caption once, where the text encoder is frozen; else in every step. Stable Diffusion's are
            always kept, but where a new token is trained. Not with `data.streaming`.
    """

    folder: Optional[str] = None  # noqa: UP045 (OmegaConf reads Optional on every Python version)
    latents: bool = True
    texts: bool = True

    def __post_init__(self) -> None:
        expand_home(self, "folder")


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
        self.stream = stream_layout(self.source) if split == "train" else None
        if self.stream is not None:
            _require_streamable(pictures, cache, has_latents=getattr(pipeline, "vae", None) is not None)
        self.buckets: Buckets | None = None
        if pictures.buckets:
            self.buckets = assign_buckets(picture_sizes(self.source, pictures), pictures, min_examples=batch_size)
        sizes = None if self.buckets is None else self.buckets.example_sizes
        vae = getattr(pipeline, "vae", None)
        folder = Path(cache.folder) if cache.folder is not None else cache_folder
        is_pixel = isinstance(pipeline, PixelPipeline)
        encoding: PromptEncoder = pipeline.text_encoding if is_pixel else sd_text_encodings(pipeline)
        token = trained.token if split == "train" else None
        if not isinstance(encoding, TextEncoding) or token is not None:  # a TextEncoding says itself what it cuts
            _check_captions(encoding, known_captions(self.source), self.source.name, token)
        texts = None
        if trained.network.text_encoder is None:
            texts = self._texts(pipeline, encoding, folder, device, is_preview=is_preview)
        latents = None
        if vae is not None and cache.latents:
            _require_whole(pictures)
            if not is_preview:
                latents = self._latents(vae, pictures, folder, sizes, device)
        self.collate = TextToImageCollator(
            pictures,
            noise,
            seed=seed,
            noise_shape=NoiseShape(3, 1) if vae is None else NoiseShape(vae.config.latent_channels, latent_factor(vae)),
            num_train_timesteps=pipeline.scheduler.config.num_train_timesteps,
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
        self, pipeline: Any, encoding: PromptEncoder, folder: Path, device: torch.device | str, *, is_preview: bool
    ) -> TensorCache | _EachTime:
        encode = _Encode(encoding)
        if is_preview:
            return _EachTime(encode)
        names = ("text_encoder", "text_encoder_2")
        with placed([part for name in names if (part := getattr(pipeline, name, None)) is not None], device):
            return cache_texts(self.source, folder, {"encoder": encoding.fingerprint()}, encode)

    def _latents(
        self, vae: Any, pictures: PictureConfig, folder: Path, sizes: np.ndarray | None, device: torch.device | str
    ) -> TensorCache:
        fingerprint = {"vae": encoders_fingerprint([vae], [], {}), "data": source_facts(self.source)}

        def encode(pixels: Tensor) -> tuple[Tensor, Tensor]:
            mean, std = encode_pixels(vae, pixels.to(device))
            return mean.cpu(), std.cpu()

        with placed([vae], device):
            return cache_latents(self.source, pictures, folder, fingerprint, encode, sizes=sizes, batch_size=_AT_ONCE)


def _require_whole(pictures: PictureConfig) -> None:
    if pictures.crop != "center":
        raise ConfigError(
            f"pictures.crop={pictures.crop} and cache.latents=true: latents of whole pictures are kept, so set "
            "pictures.crop=center or cache.latents=false"
        )


def _require_streamable(pictures: PictureConfig, cache: CacheConfig, *, has_latents: bool) -> None:
    if pictures.buckets:
        raise ConfigError(
            "pictures.buckets=true needs the size of every picture beforehand, which data.streaming does not look at: "
            "set it to false"
        )
    if has_latents and cache.latents:
        raise ConfigError(
            "cache.latents=true keeps the latents of every picture, which is too much for data that is streamed: set "
            "it to false, and the VAE runs in every step"
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
    """Captions to the tokens that the pipeline's text encoder takes; pickled for data workers without the encoder."""

    def __init__(self, pipeline: Any) -> None:
        self.tokens = pipeline.text_encoding.tokens if isinstance(pipeline, PixelPipeline) else None
        self.tokenizer = pipeline.tokenizer

    def __call__(self, captions: list[str]) -> dict[str, Tensor]:
        if self.tokens is not None:
            return self.tokens(captions)
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


def _check_captions(encoder: PromptEncoder, captions: Sequence[str], name: str, token: str | None) -> None:
    """Say which captions are too long, once, with what is cut of the first; a new token has to be in some of them.

    Raises:
        DataError: no caption has the new token, or it is in the part that is cut.
    """
    if token is not None and not any(token in caption for caption in captions):
        raise DataError(
            f"{name}: no caption has the new token {token!r} (new_token.token), such as {captions[0]!r}: write it into "
            "the captions of what it shall mean"
        )
    if encoder.max_length is None:
        return
    # A token is a character at least, so that most captions need no second look.
    long = [caption for caption in captions if len(caption) > encoder.max_length - 2]
    if not long:
        return
    cuts = [(caption, cut) for caption, cut in zip(long, encoder.cut(long), strict=True) if cut is not None]
    for caption, cut in cuts:
        if token is not None and token in cut and token not in caption.removesuffix(cut):
            raise DataError(
                f"{name}: {cut_message(caption, cut, encoder.max_length)}, and the new token {token!r} with it: name "
                "it earlier"
            )
    for caption, cut in cuts[:_MOST_SAID]:
        _log.warning("%s", cut_message(caption, cut, encoder.max_length))
    if len(cuts) > _MOST_SAID:
        _log.warning("%d more captions are cut", len(cuts) - _MOST_SAID)
