"""The diffusion recipe's configuration, and its task: denoise captioned pictures."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

import torch
from diffusers.models.resnet import ResnetBlock2D
from PIL.Image import Image
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from mmattn.config import load_config
from mmattn.config.resolve import trained_config
from mmattn.data.captions import known_captions
from mmattn.data.counted import counted
from mmattn.data.readers import open_image_text
from mmattn.data.spec import DataConfig
from mmattn.data.text_to_image import NoiseConfig, PictureConfig
from mmattn.errors import ConfigError
from mmattn.inference.diffusion.data import CacheConfig, DiffusionData
from mmattn.inference.diffusion.denoising import DenoisingLoss, DenoisingNetwork
from mmattn.inference.diffusion.scores import (
    EvalConfig,
    check_evaluation,
    denoising_loss,
    require_scorable,
    sample_grid,
    sample_prompts,
    score_splits,
)
from mmattn.inference.diffusion.setup import (
    TRAIN_WHAT,
    ModelConfig,
    NewTokenConfig,
    Trained,
    choose_trained,
    make_text_to_image,
    open_trained,
    pixel_factor,
    save_trained,
    trains_text_encoder,
)
from mmattn.inference.frozen_parts import encoding_device, placed
from mmattn.inference.text_to_image import TextToImage
from mmattn.nn import TransformerLayer
from mmattn.training import Batch, Draw, Loss, Task, TrainingConfig
from mmattn.training.config import CACHE_FOLDER
from mmattn.training.recipe_settings import SCORES_AND_PATHS
from mmattn.training.selection import LoRAConfig, selection

_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


@dataclass
class LossConfig:
    """What the loss weighs, and what it leaves out.

    Args:
        min_snr_gamma: Cut-off of the weights by signal-to-noise ratio (arXiv 2303.09556), such as 5. None weighs all
            noise levels alike.
        caption_dropout: Part of the captions that is left out, so that guidance has something to guide away from.
    """

    min_snr_gamma: Optional[float] = None  # noqa: UP045 (OmegaConf reads Optional on every Python version)
    caption_dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ConfigError(f"loss.min_snr_gamma must be positive or null, not {self.min_snr_gamma}")
        if not 0 <= self.caption_dropout <= 1:
            raise ConfigError(f"loss.caption_dropout must lie between 0 and 1, not {self.caption_dropout}")


@dataclass
class DiffusionConfig:
    """The whole configuration of the recipe.

    Args:
        train_what: "all" (the U-Net, and the text encoder unless that is frozen), "lora" (small adapters in the U-Net;
            section `lora`) or "cross_attention_kv" (what the U-Net's cross-attention makes of the text, and a new word;
            section `new_token`). The last two need `model.from_pretrained`.
    """

    train_what: str = "all"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    pictures: PictureConfig = field(default_factory=lambda: PictureConfig(resolution=32))
    noise: NoiseConfig = field(default_factory=NoiseConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    lora: LoRAConfig = field(default_factory=lambda: LoRAConfig(targets=list(_TARGETS)))
    new_token: NewTokenConfig = field(default_factory=NewTokenConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    evaluation: EvalConfig = field(default_factory=EvalConfig)
    training: TrainingConfig = field(default_factory=lambda: TrainingConfig(output_dir="runs/diffusion"))

    def __post_init__(self) -> None:
        if self.train_what not in TRAIN_WHAT:
            raise ConfigError(f"train_what is {self.train_what!r}: choose one of {', '.join(TRAIN_WHAT)}")
        if self.train_what != "all" and self.model.from_pretrained is None:
            raise ConfigError(f"train_what={self.train_what} needs a model to start from: set model.from_pretrained")
        if self.model.from_pretrained is None and self.pictures.resolution != self.model.image_size:
            raise ConfigError(
                f"pictures.resolution {self.pictures.resolution} is what is trained on, and model.image_size "
                f"{self.model.image_size} what a new model draws: set both alike"
            )


class DiffusionTask(Task):
    """Denoising of captioned pictures.

    Args:
        config: of the recipe.
        is_preview: encode what is asked for, and write no caches.
    """

    unit = "pictures"
    repeated_layers = (TransformerLayer, ResnetBlock2D, GradientCheckpointingLayer)
    free_settings = SCORES_AND_PATHS
    not_for_workers = ("model", "t2i", "trained", "denoising", "_scored")

    def __init__(self, config: DiffusionConfig, *, is_preview: bool = False) -> None:
        self.config, self.is_preview = config, is_preview
        seed = config.training.seed
        with torch.random.fork_rng(devices=[]):  # new weights and adapters are a function of the seed
            torch.manual_seed(seed)
            captions = [] if config.model.from_pretrained else known_captions(open_image_text(config.data, "train"))
            self.t2i = make_text_to_image(config.model, captions)
            self.trained = choose_trained(
                self.t2i,
                config.train_what,
                config.lora,
                config.new_token,
                train_text_encoder=trains_text_encoder(config.model),
                cache_texts=config.cache.texts,
                streams=config.data.streaming,
            )
        check_evaluation(self.t2i, config.evaluation)
        if config.training.eval_every and not is_preview:
            require_scorable(config.data, config.evaluation)
        self.model = self.trained.network
        self._scored: dict[str, DiffusionData] = {}
        self.best = config.evaluation.best
        self.is_higher_better = not (self.best or "").endswith(("/loss", "/fid"))
        self.data = self._data("train", config.loss.caption_dropout)
        self.stream = self.data.stream
        self.groups = None if self.data.buckets is None else self.data.buckets.groups
        self.prompts = sample_prompts(config.evaluation, config.data)
        self.denoising = make_loss(self.t2i, config)

    def _data(self, split: str, caption_dropout: float = 0.0) -> DiffusionData:
        device = encoding_device(self.config.training)
        return _open_data(
            self.t2i, self.trained, self.config, split, device, caption_dropout, is_preview=self.is_preview
        )

    def __len__(self) -> int:
        return len(self.data)

    def collate(self, draws: Sequence[Draw]) -> Batch:
        return self.data.batch(draws)

    def count(self, batch: Batch) -> int:
        return len(batch["timesteps"])

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return Loss(self.denoising(model, batch).sum(), self.count(batch))

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        with self._drawing(model):
            scores = score_splits(self.t2i, self.config.data, self.config.evaluation)
        return scores | _split_losses(self.model, self.denoising, self.config, self._scored_data)

    def _scored_data(self, split: str) -> DiffusionData:
        if split not in self._scored:
            self._scored[split] = self._data(split)
        return self._scored[split]

    def draw(self, model: nn.Module) -> Mapping[str, Image]:
        with self._drawing(model):
            grid = sample_grid(self.t2i, self.prompts, self.config.evaluation)
        return {} if grid is None else {"grid": grid}

    @contextlib.contextmanager
    def _drawing(self, model: nn.Module) -> Iterator[None]:
        """Inside, the whole pipeline is where the network is; afterwards what is not trained is where it was."""
        parts = [part for part in self.t2i.pipeline.components.values() if isinstance(part, nn.Module)]
        with placed(parts, next(model.parameters()).device):
            yield

    def save(self, model: nn.Module, folder: Path) -> None:
        save_trained(self.t2i, self.trained, folder)

    def describe(self) -> str:
        what = f"training {self.config.train_what}: {selection(self.model)}"
        text = f"{self.data.source.name}: {counted(len(self), 'picture')}; {what}"
        return text if self.data.buckets is None else f"{text}; {self.data.buckets.describe()}"


def evaluate_folder(folder: Path, config: DiffusionConfig) -> dict[str, float]:
    """Scores of what a run left, on the data of `config`.

    Which model it is, and what of it was trained, is said by the config beside the run's checkpoints: `config` may be
    of other data. A folder that belongs to no run is taken to be what `config` says.
    """
    try:
        file = trained_config(folder)
    except ConfigError:
        own = config
    else:
        own = load_config(DiffusionConfig, str(file), is_saved=True)
    t2i = open_trained(folder, own.model, own.train_what)
    network = DenoisingNetwork(t2i.pipeline.unet, None, pixel_factor(t2i.pipeline)).eval()
    scores = score_splits(t2i, config.data, config.evaluation)

    def data(split: str) -> DiffusionData:
        return _open_data(t2i, Trained(network, "all"), config, split, t2i.device, is_preview=True)

    return scores | _split_losses(network, make_loss(t2i, config), config, data)


def _open_data(
    t2i: TextToImage,
    trained: Trained,
    config: DiffusionConfig,
    split: str,
    device: torch.device,
    caption_dropout: float = 0.0,
    *,
    is_preview: bool,
) -> DiffusionData:
    return DiffusionData(
        t2i,
        trained,
        config.data,
        config.pictures,
        config.noise,
        config.cache,
        cache_folder=Path(config.training.output_dir) / CACHE_FOLDER,
        seed=config.training.seed,
        caption_dropout=caption_dropout,
        batch_size=config.training.batch_size,
        split=split,
        device=device,
        is_preview=is_preview,
    )


def _split_losses(
    network: nn.Module, loss: DenoisingLoss, config: DiffusionConfig, data: Callable[[str], DiffusionData]
) -> dict[str, float]:
    """The denoising loss of each split, `split/loss`, where the config wants it."""
    evaluation, training = config.evaluation, config.training
    at_once = training.micro_batch_size or min(training.batch_size, 16)
    return {
        f"{split}/loss": denoising_loss(network, loss, data(split), evaluation.limit, batch_size=at_once)
        for split in (evaluation.splits if evaluation.loss else [])
    }


def make_loss(t2i: TextToImage, config: DiffusionConfig) -> DenoisingLoss:
    """The loss that the config describes, for a model."""
    return DenoisingLoss(
        t2i.pipeline.scheduler,
        min_snr_gamma=config.loss.min_snr_gamma,
        offset_noise=config.noise.offset_noise,
        vae=getattr(t2i.pipeline, "vae", None),
    )
