"""Pictures with captions to the batches that a diffusion model learns from; a pure function of (seed, epoch, example).

All that is random is drawn here, noise and timesteps included, so that neither the number of processes nor a resume
changes a step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from mmattn.data.cached_inputs import latent_key, pad_texts, read_facts
from mmattn.data.captions import drawn_caption, require_captions
from mmattn.data.draws import draw_generator, uniform_rows
from mmattn.data.picture_fit import PictureConfig, fit_picture, signed_pixels
from mmattn.data.records import ImageTextSource, read_records
from mmattn.errors import ConfigError, UsageError

__all__ = ["NoiseConfig", "NoiseShape", "PictureConfig", "TextToImageCollator"]

TIMESTEP_SAMPLINGS = ("uniform", "logit_normal")
_CAPTION, _DROPOUT, _FLIP, _DOWN, _ACROSS, _TIMESTEP, _COUNT = range(7)  # columns of an example's uniform numbers


class TensorLookup(Protocol):
    """What `TensorCache` offers: tensors by name for each key."""

    def __getitem__(self, key: str, /) -> Mapping[str, Tensor]: ...


@dataclass
class NoiseConfig:
    """What is drawn for each example beside its picture and caption.

    Args:
        timestep_sampling: How noise levels are drawn: "uniform", or "logit_normal" (the sigmoid of a normal number;
            arXiv 2403.03206 section 3.1).
        timestep_mean: logit_normal: above 0 for more noise, below for less.
        timestep_std: logit_normal: its spread.
        offset_noise: Strength of noise that is one number a channel, so that bright and dark pictures are learned
            (Guttenberg, "Diffusion with offset noise", 2023), such as 0.1; 0 draws none.
    """

    timestep_sampling: str = "uniform"
    timestep_mean: float = 0.0
    timestep_std: float = 1.0
    offset_noise: float = 0.0

    def __post_init__(self) -> None:
        if self.timestep_sampling not in TIMESTEP_SAMPLINGS:
            raise ConfigError(
                f"timestep_sampling must be one of {', '.join(TIMESTEP_SAMPLINGS)}, not {self.timestep_sampling!r}"
            )
        if not self.timestep_std > 0 or not np.isfinite([self.timestep_mean, self.timestep_std]).all():
            raise ConfigError(
                f"timestep_mean must be finite and timestep_std positive, not {self.timestep_mean} and "
                f"{self.timestep_std}"
            )
        if not 0 <= self.offset_noise < float("inf"):
            raise ConfigError(f"offset_noise must be 0 or more, not {self.offset_noise}")


@dataclass(frozen=True)
class NoiseShape:
    """The shape of what noise is added to: pixels as they are (3, 1), or a VAE's latents (4, 8).

    Args:
        channels: Of pixels or latents.
        factor: How many pixels, across and down, make one place.
    """

    channels: int = 3
    factor: int = 1

    def __call__(self, height: int, width: int) -> tuple[int, int, int]:
        """(channels, rows, columns) for a picture of so many pixels.

        Raises:
            UsageError: they are no multiples of `factor`.
        """
        if height % self.factor or width % self.factor:
            raise UsageError(f"pictures of {width} x {height} pixels: the model needs multiples of {self.factor}")
        return self.channels, height // self.factor, width // self.factor


@dataclass(frozen=True, eq=False)
class _Pictures:
    tensors: dict[str, Tensor]
    captions: list[list[str]]  # all of each picture
    time_ids: list[tuple[int, ...]]


class TextToImageCollator:
    """Makes the batches of text-to-image training.

    Args:
        pictures: Size, crop and mirroring.
        noise: Timesteps and noise.
        seed: Of all draws.
        noise_shape: From a picture's height and width to the shape of its noise.
        num_train_timesteps: Timesteps are 0 to this minus 1; the scheduler's.
        tokenize: Captions to tensors [B, ...] by name, such as "input_ids" and "attention_mask".
        texts: Instead of `tokenize`: a cache of embeddings by caption, from `cache_texts`; it has to hold "" too when
            captions are dropped.
        latents: A cache from `cache_latents`: pictures are then not opened at all.
        sizes: Height and width of each example, int [num_examples, 2], from `assign_buckets`. None: squares.
        caption_dropout: Part of the captions replaced by "", so that guidance has something to guide away from
            (arXiv 2207.12598).
        has_posterior: Draw the noise by which a VAE's posterior is sampled, too. Always so with `latents`.
        has_time_ids: Give SDXL's six numbers on size and crop.

    Raises:
        UsageError: parts that do not fit together.
    """

    def __init__(
        self,
        pictures: PictureConfig,
        noise: NoiseConfig,
        *,
        seed: int,
        noise_shape: Callable[[int, int], tuple[int, int, int]],
        num_train_timesteps: int = 1000,
        tokenize: Callable[[list[str]], Mapping[str, Tensor]] | None = None,
        texts: TensorLookup | None = None,
        latents: TensorLookup | None = None,
        sizes: np.ndarray | None = None,
        caption_dropout: float = 0.0,
        has_posterior: bool = False,
        has_time_ids: bool = False,
    ) -> None:
        if (tokenize is None) == (texts is None):
            raise UsageError("TextToImageCollator needs either tokenize or texts")
        if not 0 <= caption_dropout <= 1:
            raise UsageError(f"caption_dropout must lie between 0 and 1, not {caption_dropout}")
        if pictures.buckets and sizes is None:
            raise UsageError("pictures.buckets needs the sizes of the examples: see mmattn.data.buckets.assign_buckets")
        if latents is not None and pictures.crop != "center":
            raise UsageError(f"pictures.crop={pictures.crop} cannot be had from cached latents: use center")
        self.pictures, self.noise, self.seed, self.noise_shape = pictures, noise, seed, noise_shape
        self.tokenize, self.texts, self.latents, self.sizes = tokenize, texts, latents, sizes
        self.caption_dropout, self.has_time_ids = caption_dropout, has_time_ids
        self.num_train_timesteps = num_train_timesteps
        self.has_posterior = has_posterior or latents is not None

    def __call__(self, source: ImageTextSource, draws: Sequence[tuple[int, int]]) -> dict[str, Tensor]:
        """The batch for (epoch, example) pairs, of one size.

        Returns:
            `pixels` float32 [B, 3, H, W] in [-1, 1], or `latent_mean` and `latent_std` float32 [B, C, h, w]; what
            `tokenize` gives, or `text_states` [B, L, C], with `text_mask` bool [B, L] (True = may attend) where
            captions differ in length and `pooled` [B, P] where the encoder has one; `noise` float32 [B, C, h, w];
            `timesteps` int64 [B]; and where asked for `posterior` [B, C, h, w], `offset` [B, C, 1, 1] (standard
            normal, not scaled yet) and `time_ids` float32 [B, 6].

        Raises:
            DataError: a record without a caption.
            UsageError: draws of several sizes.
        """
        uniform = self._uniform(draws)
        size = self._size(draws)
        shape = self.noise_shape(*size)
        mirrored = [bool(self.pictures.flip and number < 0.5) for number in uniform[:, _FLIP]]
        if self.latents is None:
            pictures = self._from_source(source, draws, size, uniform, mirrored)
        else:
            pictures = self._from_latents(self.latents, draws, shape, mirrored)
        captions = [
            "" if row[_DROPOUT] < self.caption_dropout else drawn_caption(choices, row[_CAPTION])
            for choices, row in zip(pictures.captions, uniform, strict=True)
        ]
        batch = {**pictures.tensors, **self._noise(draws, shape), "timesteps": self._timesteps(uniform[:, _TIMESTEP])}
        if self.has_time_ids:
            batch["time_ids"] = torch.tensor(pictures.time_ids, dtype=torch.float32)
        text = self._text(captions)
        if taken := batch.keys() & text.keys():
            raise UsageError(f"tokenize gives {', '.join(sorted(taken))}, which the batch holds already")
        return {**batch, **text}

    def _uniform(self, draws: Sequence[tuple[int, int]]) -> np.ndarray:
        """Uniform numbers in [0, 1), float64 [B, columns]."""
        epochs, examples = np.array(draws, dtype=np.int64).T
        uniform = np.empty((len(draws), _COUNT))
        for epoch in np.unique(epochs):
            rows = epochs == epoch
            uniform[rows] = uniform_rows(self.seed, f"text-to-image/{epoch}", examples[rows], _COUNT)
        return uniform

    def _size(self, draws: Sequence[tuple[int, int]]) -> tuple[int, int]:
        if self.sizes is None:
            return self.pictures.resolution, self.pictures.resolution
        sizes = {(int(height), int(width)) for height, width in self.sizes[[example for _, example in draws]]}
        if len(sizes) > 1:
            named = ", ".join(f"{width} x {height}" for height, width in sorted(sizes))
            raise UsageError(f"examples of several sizes cannot share a batch ({named}): set Task.groups")
        return sizes.pop()

    def _from_source(
        self,
        source: ImageTextSource,
        draws: Sequence[tuple[int, int]],
        size: tuple[int, int],
        uniform: np.ndarray,
        mirrored: list[bool],
    ) -> _Pictures:
        records = read_records(source, [example for _, example in draws])
        is_random = self.pictures.crop == "random"
        places = uniform[:, [_DOWN, _ACROSS]].tolist() if is_random else [(0.5, 0.5)] * len(draws)
        fitted = [
            fit_picture(record.image, size, place=(place[0], place[1]), mirrored=flip)
            for record, place, flip in zip(records, places, mirrored, strict=True)
        ]
        return _Pictures(
            {"pixels": signed_pixels([picture.pixels for picture in fitted])},
            [require_captions(record.id, record.texts) for record in records],
            [picture.time_ids() for picture in fitted],
        )

    def _from_latents(
        self, latents: TensorLookup, draws: Sequence[tuple[int, int]], shape: tuple[int, int, int], mirrored: list[bool]
    ) -> _Pictures:
        entries = [latents[latent_key(example, flip)] for (_, example), flip in zip(draws, mirrored, strict=True)]
        tensors = {
            f"latent_{name}": torch.stack([entry[name] for entry in entries]).float() for name in ("mean", "std")
        }
        found = tuple(tensors["latent_mean"].shape[1:])
        if found != shape:
            raise UsageError(f"the cached latents have shape {found}, and the noise has {shape}")
        facts = [read_facts(entry) for entry in entries]
        return _Pictures(tensors, [fact["captions"] for fact in facts], [tuple(fact["time_ids"]) for fact in facts])

    def _noise(self, draws: Sequence[tuple[int, int]], shape: tuple[int, int, int]) -> dict[str, Tensor]:
        shapes = {"noise": shape}
        if self.has_posterior:
            shapes["posterior"] = shape
        if self.noise.offset_noise > 0:
            shapes["offset"] = (shape[0], 1, 1)
        return {name: self._normal(draws, name, form) for name, form in shapes.items()}

    def _normal(self, draws: Sequence[tuple[int, int]], purpose: str, shape: tuple[int, int, int]) -> Tensor:
        """Standard normal numbers, float32 [B, *shape]; those of a row depend on its own draw only."""
        drawn = np.empty((len(draws), *shape), dtype=np.float32)
        for row, (epoch, example) in zip(drawn, draws, strict=True):
            draw_generator(self.seed, epoch, example, purpose).standard_normal(out=row, dtype=np.float32)
        return torch.from_numpy(drawn)

    def _timesteps(self, uniform: np.ndarray) -> Tensor:
        shares = torch.from_numpy(np.ascontiguousarray(uniform))
        if self.noise.timestep_sampling == "logit_normal":
            normal = torch.special.ndtri(shares)  # minus infinity for 0, whose sigmoid is 0
            shares = torch.sigmoid(self.noise.timestep_mean + self.noise.timestep_std * normal)
        return (shares * self.num_train_timesteps).long().clamp_(0, self.num_train_timesteps - 1)

    def _text(self, captions: list[str]) -> dict[str, Tensor]:
        if self.tokenize is not None:
            return dict(self.tokenize(captions))
        assert self.texts is not None
        return pad_texts([self.texts[caption] for caption in captions])
