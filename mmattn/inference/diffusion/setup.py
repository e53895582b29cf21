"""A text-to-image model ready to be trained: opened or new; what of it is trained, and how the result is saved."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

import torch
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from torch import nn
from transformers import PreTrainedModel

from mmattn.errors import CheckpointError, ConfigError
from mmattn.inference.diffusion.denoising import DenoisingNetwork
from mmattn.inference.diffusion.new_token import NewTokenEmbedding, add_new_token
from mmattn.inference.diffusion.pixel_pipeline import GUIDANCE_SCALE, PixelPipeline
from mmattn.inference.diffusion.text_encoder_setup import TextEncoderConfig, make_text_encoding
from mmattn.inference.diffusion.unet_files import save_unet_lora
from mmattn.inference.text_to_image import TextToImage
from mmattn.inference.trained import model_source, require_source, run_part, trained_model
from mmattn.models.unet import UNet
from mmattn.models.unet.kv_file import cross_attention_kv_names, save_cross_attention_kv
from mmattn.training.selection import LoRAConfig, add_lora, train_only

TRAIN_WHAT = ("all", "lora", "cross_attention_kv")


@dataclass
class UNetConfig:
    """Form of a U-Net that works on pixels; the width of the text is the text encoder's.

    Args:
        block_out_channels: Channels of each level, from the finest to the coarsest; each level halves the side.
        attention: For each level, whether it has transformer blocks.
        layers_per_block: ResNets (and transformers) of each level on the way down; one more on the way up.
        transformer_layers: Layers of each transformer.
        num_heads: Heads of each attention; they divide the channels.
        norm_groups: Groups of the group norms; they divide the channels.
        dropout_p: Dropout in the ResNets, in training only.
    """

    block_out_channels: list[int] = field(default_factory=lambda: [64, 96, 128])
    attention: list[bool] = field(default_factory=lambda: [False, True, True])
    layers_per_block: int = 1
    transformer_layers: int = 1
    num_heads: int = 4
    norm_groups: int = 16
    dropout_p: float = 0.0


@dataclass
class ScheduleConfig:
    """Noise schedule.

    Args:
        prediction_type: What the U-Net predicts: "epsilon" (the noise) or "v_prediction" (velocity, arXiv 2202.00512).
        beta_schedule: Of diffusers: "squaredcos_cap_v2" (cosine, for pixels), "scaled_linear", "linear".
        num_train_timesteps: Noise levels.
        zero_terminal_snr: The last level is noise alone (arXiv 2305.08891); needs "v_prediction".
    """

    prediction_type: str = "v_prediction"
    beta_schedule: str = "squaredcos_cap_v2"
    num_train_timesteps: int = 1000
    zero_terminal_snr: bool = False


@dataclass
class ModelConfig:
    """The model: a Stable Diffusion or pixel-space folder to start from, or the form of a new pixel-space model.

    Args:
        from_pretrained: Hub id, a model's folder or a training run's. None makes a new model; what is said of new
            models is refused beside it.
        revision: Branch, tag or commit on the hub.
        variant: Infix of the weight files, such as fp16; training itself is in float32 or mixed precision.
        image_size: Of a new model: side of its pictures in pixels, the same as `pictures.resolution`.
        pixel_unshuffle: Of a new model: its U-Net sees squares of so many pixels a side as one place. 1: every pixel.
        guidance_scale: Of a new model: what its pictures are drawn with where nothing else is asked for.
        text_encoder: Only for a new model; of an opened pixel-space model only `frozen` counts.
        unet: Only for a new model.
        schedule: Only for a new model.
    """

    from_pretrained: Optional[str] = None  # noqa: UP045 (OmegaConf reads Optional on every Python version)
    revision: Optional[str] = None  # noqa: UP045
    variant: Optional[str] = None  # noqa: UP045
    image_size: int = 32
    pixel_unshuffle: int = 2
    guidance_scale: float = GUIDANCE_SCALE
    text_encoder: TextEncoderConfig = field(default_factory=TextEncoderConfig)
    unet: UNetConfig = field(default_factory=UNetConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)


@dataclass
class NewTokenConfig:
    """A new word for `train_what: cross_attention_kv`; captions and prompts name the subject by it.

    Args:
        token: The word, such as `<new1>`; None adds none.
        initializer: A known word, of one token, that it starts from: what the subject is, in a short word.
    """

    token: Optional[str] = None  # noqa: UP045
    initializer: str = "object"


def make_text_to_image(config: ModelConfig, captions: Iterable[str]) -> TextToImage:
    """Open the model that is to be trained, in float32 on the CPU, or make a new one.

    Args:
        config: the model.
        captions: of the training split; a new model's tokenizer is made from them.

    Raises:
        CheckpointError: the checkpoint cannot be opened.
        ConfigError: a form that does not fit together, or one beside a checkpoint, which has its own.
    """
    require_source(config, ["revision", "variant"])
    if config.from_pretrained is not None:
        _require_defaults(config)
        opened = TextToImage.from_pretrained(
            model_source(config.from_pretrained),
            revision=config.revision,
            variant=config.variant,
            dtype=torch.float32,
            device="cpu",
        )
        unet = opened.pipeline.unet
        if unet.config.time_cond_proj_dim is not None:
            raise CheckpointError(
                f"{config.from_pretrained}: its U-Net was distilled with guidance as an input (time_cond_proj_dim), "
                "which this training does not give it: start from the model that it was distilled from"
            )
    else:
        text = make_text_encoding(captions, config.text_encoder)
        unet = _new_unet(config, text.width)
        text.tokenizer.model_max_length = text.max_length or text.tokenizer.model_max_length
        parts = (unet, text.encoder, text.tokenizer, _new_scheduler(config.schedule))
        opened = TextToImage(PixelPipeline(*parts, config.pixel_unshuffle, config.guidance_scale))
    return opened


def _require_defaults(config: ModelConfig) -> None:
    """Of an opened model, settings of a new one would be ignored."""
    plain = ModelConfig(text_encoder=TextEncoderConfig(frozen=config.text_encoder.frozen))
    names = ("image_size", "pixel_unshuffle", "guidance_scale", "text_encoder", "unet", "schedule")
    given = [name for name in names if getattr(config, name) != getattr(plain, name)]
    if given:
        raise ConfigError(
            f"{', '.join(f'model.{name}' for name in given)}: for a new model, and model.from_pretrained opens one: "
            "leave them out"
        )


def trains_text_encoder(config: ModelConfig) -> bool:
    """Whether the text encoder is to be trained: a new one is, an opened one where `frozen` is false."""
    is_new = config.from_pretrained is None and config.text_encoder.from_pretrained is None
    return is_new or config.text_encoder.frozen is False


def _new_unet(config: ModelConfig, text_width: int) -> UNet:
    form, factor = config.unet, config.pixel_unshuffle
    levels = len(form.block_out_channels)
    if len(form.attention) != levels or not levels:
        raise ConfigError(
            f"model.unet.attention has {len(form.attention)} entries and block_out_channels {levels}: give one a level"
        )
    multiple = factor * 2 ** (levels - 1)
    if config.image_size % multiple:
        raise ConfigError(f"model.image_size {config.image_size} must be a multiple of {multiple} with {levels} levels")
    unfit = [n for n in form.block_out_channels if n % form.norm_groups or n % form.num_heads]
    if unfit:
        raise ConfigError(
            f"model.unet.block_out_channels {unfit[0]} is no multiple of norm_groups {form.norm_groups} and num_heads "
            f"{form.num_heads}"
        )
    kinds = ["CrossAttnDownBlock2D" if has else "DownBlock2D" for has in form.attention]
    channels = 3 * factor * factor
    return UNet(  # pyright: ignore[reportCallIssue] (its signature is stock's, by functools.wraps)
        sample_size=config.image_size // factor,
        in_channels=channels,
        out_channels=channels,
        down_block_types=tuple(kinds),
        up_block_types=tuple(kind.replace("Down", "Up") for kind in reversed(kinds)),
        block_out_channels=tuple(form.block_out_channels),
        layers_per_block=form.layers_per_block,
        transformer_layers_per_block=form.transformer_layers,
        cross_attention_dim=text_width,
        attention_head_dim=form.num_heads,  # diffusers' misnomer: the number of heads
        norm_num_groups=form.norm_groups,
        use_linear_projection=True,
        dropout=form.dropout_p,
    )


def _new_scheduler(config: ScheduleConfig) -> DDIMScheduler:
    if config.prediction_type not in ("epsilon", "v_prediction"):
        raise ConfigError(
            f"model.schedule.prediction_type {config.prediction_type!r} is unknown: use epsilon or v_prediction"
        )
    if config.zero_terminal_snr and config.prediction_type == "epsilon":
        raise ConfigError("model.schedule.zero_terminal_snr needs prediction_type v_prediction: noise alone tells none")
    try:
        return DDIMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
            rescale_betas_zero_snr=config.zero_terminal_snr,
            timestep_spacing="trailing",
            clip_sample=True,
        )
    except NotImplementedError as error:
        raise ConfigError(
            f"model.schedule.beta_schedule {config.beta_schedule!r} is unknown: use squaredcos_cap_v2, scaled_linear "
            "or linear"
        ) from error


@dataclass(frozen=True)
class Trained:
    """What a run trains.

    Attributes:
        network: one module; its parameters with `requires_grad` are trained.
        what: one of `TRAIN_WHAT`.
        token: the new token, None without one.
        embedding: its embedding.
    """

    network: DenoisingNetwork
    what: str
    token: str | None = None
    embedding: NewTokenEmbedding | None = None


def choose_trained(
    model: TextToImage,
    what: str,
    lora: LoRAConfig,
    new_token: NewTokenConfig,
    *,
    train_text_encoder: bool,
    cache_texts: bool = True,
    streams: bool = False,
) -> Trained:
    """Freeze what is not to be trained, and put in what is new.

    Args:
        model: changed in place.
        what: one of `TRAIN_WHAT`.
        lora: used for "lora".
        new_token: used for "cross_attention_kv".
        train_text_encoder: with "all", of a pixel-space model.
        cache_texts: a frozen text encoder of a pixel-space model is not part of the network, since batches come with
            its states.
        streams: the data is streamed, so that text states cannot be kept: a text encoder that is frozen is part of the
            network, whatever the model.

    Raises:
        ConfigError: settings that have nothing to act on.
    """
    pipeline: Any = model.pipeline
    unet, encoder = pipeline.unet, pipeline.text_encoder
    is_pixel = isinstance(pipeline, PixelPipeline)
    if new_token.token is not None and what != "cross_attention_kv":
        raise ConfigError(f"new_token.token is for train_what=cross_attention_kv, not {what}: leave it out")
    if train_text_encoder and (what != "all" or not is_pixel):
        raise ConfigError(
            "model.text_encoder.frozen=false: a text encoder is trained with train_what=all of a pixel-space model only"
        )
    for part in pipeline.components.values():
        if isinstance(part, nn.Module):
            part.requires_grad_(False)
    embedding = None
    if what == "all":
        unet.requires_grad_(True)
        if train_text_encoder:
            _train_used(encoder)
    elif what == "lora":
        add_lora(unet, lora)
    else:
        train_only(unet, cross_attention_kv_names(unet))
        if new_token.token is not None:
            if getattr(pipeline, "text_encoder_2", None) is not None:
                raise ConfigError("new_token.token needs a model with one text encoder; this one has two")
            embedding = add_new_token(encoder, pipeline.tokenizer, new_token.token, new_token.initializer)
    has_text = train_text_encoder or embedding is not None or ((is_pixel or streams) and not cache_texts)
    if streams and not has_text:
        raise ConfigError(
            "cache.texts=true keeps the text states of every caption, which is too much for data that is streamed: set "
            "it to false, and the text encoder runs in every step"
        )
    if streams and getattr(pipeline, "text_encoder_2", None) is not None:
        raise ConfigError("data.streaming=true needs a model with one text encoder; this one has two")
    own_text = encoder if has_text else None
    network = DenoisingNetwork(unet, own_text, pixel_factor(pipeline))
    return Trained(network, what, new_token.token, embedding)


def pixel_factor(pipeline: Any) -> int:
    """`pixel_unshuffle` of a pixel-space pipeline; 1 for latents."""
    return int(pipeline.config["pixel_unshuffle"]) if isinstance(pipeline, PixelPipeline) else 1


def _train_used(encoder: PreTrainedModel) -> None:
    """Train what has a part in the last hidden states: not the poolers and projections that some encoders add, which
    would be counted as trained and, in several processes, be waited for."""
    encoder.requires_grad_(True)
    with torch.enable_grad():
        states = encoder(input_ids=torch.ones(1, 2, dtype=torch.long)).last_hidden_state
        grads = torch.autograd.grad(states.sum(), list(encoder.parameters()), allow_unused=True)
    for parameter, grad in zip(encoder.parameters(), grads, strict=True):
        parameter.requires_grad_(grad is not None)


def save_trained(model: TextToImage, trained: Trained, folder: Path) -> None:
    """Save what was trained: the whole pipeline for "all", else the file of the adapters or of the keys and values."""
    if trained.what == "all":
        model.save_pretrained(folder)
    elif trained.what == "lora":
        save_unet_lora(model.pipeline.unet, folder)
    else:
        tokens = {} if trained.embedding is None else {str(trained.token): trained.embedding.vector.detach().cpu()}
        save_cross_attention_kv(model.pipeline.unet, folder, tokens=tokens)


def open_trained(folder: Path, config: ModelConfig, what: str) -> TextToImage:
    """The model of a run's folder: its own pipeline, or the one it started from with what was trained put in.

    Raises:
        CheckpointError: something does not open.
    """
    if what == "all" or config.from_pretrained is None:
        return TextToImage.from_pretrained(trained_model(folder))
    folder = run_part(folder)
    base = model_source(config.from_pretrained)
    model = TextToImage.from_pretrained(base, revision=config.revision, variant=config.variant)
    if what == "lora":
        model.load_lora(folder)
    else:
        model.load_cross_attention_kv(folder)
    return model
