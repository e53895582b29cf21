"""A diffusion pipeline that works on pixels: U-Net, text encoder, tokenizer and scheduler, without an autoencoder."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders.lora_pipeline import StableDiffusionLoraLoaderMixin
from diffusers.loaders.textual_inversion import TextualInversionLoaderMixin
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.diffusion.checks import (
    check_guidance,
    check_size,
    check_steps,
    check_text_width,
    check_whole,
    each_prompt,
    expected_width,
    takes_generator,
)
from mmattn.inference.diffusion.text_encoding import EncodedText, TextEncoding
from mmattn.models.unet import UNet, UNetContext

OUTPUT_TYPES = ("pil", "np", "pt")
GUIDANCE_SCALE = 5.0  # where neither a call nor a model says another
_COLOURS = 3


class PixelPipeline(DiffusionPipeline, StableDiffusionLoraLoaderMixin, TextualInversionLoaderMixin):
    """Text to image in pixel space, by classifier-free guidance (arXiv 2207.12598).

    Unlike Stable Diffusion it has no autoencoder, takes any text encoder, and hides the padding of the texts from the
    cross-attention. Its folder holds stock parts: stock diffusers and transformers classes open each of them.
    LoRA files are loaded by `load_lora_weights`, and models moved by `enable_model_cpu_offload`, as in diffusers.

    Args:
        unet: sees `3 * f * f` channels, where f is `pixel_unshuffle`; stock or ours (which projects the text once).
        text_encoder: any text encoder of transformers.
        tokenizer: the text encoder's.
        scheduler: any of diffusers', for epsilon, v-prediction or samples; its config says whether it clips.
        pixel_unshuffle: side of the squares of pixels that become one place of the U-Net's; 1: none.
        guidance_scale: of calls that give none; it is saved with the folder.

    Raises:
        CheckpointError: parts that do not fit together.
        UsageError: a guidance scale that would be ignored or is none.
    """

    model_cpu_offload_seq = "text_encoder->unet"
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012 (diffusers' name and type)

    unet: UNet2DConditionModel
    text_encoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    scheduler: Any

    def __init__(
        self,
        unet: UNet2DConditionModel,
        text_encoder: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        scheduler: SchedulerMixin,
        pixel_unshuffle: int = 1,
        guidance_scale: float = GUIDANCE_SCALE,
    ) -> None:
        super().__init__()
        _check_parts(unet, pixel_unshuffle)
        check_guidance(guidance_scale, unet, has_negative=False)
        check_text_width(unet, [text_encoder])
        self.register_modules(unet=unet, text_encoder=text_encoder, tokenizer=tokenizer, scheduler=scheduler)
        self.register_to_config(pixel_unshuffle=pixel_unshuffle, guidance_scale=float(guidance_scale))
        self.image_processor = VaeImageProcessor(vae_scale_factor=pixel_unshuffle)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> PixelPipeline:
        """As diffusers' method; the U-Net is opened as `mmattn.UNet` unless `unet=` is given."""
        if "unet" not in kwargs:
            passed = ("revision", "token", "variant", "local_files_only")
            options = {name: kwargs[name] for name in passed if name in kwargs}
            dtype = kwargs.get("dtype", kwargs.get("torch_dtype"))
            place = os.fspath(pretrained_model_name_or_path)
            kwargs["unet"] = UNet.from_pretrained(place, subfolder="unet", dtype=dtype, **options)
        return super().from_pretrained(str(pretrained_model_name_or_path), **kwargs)

    @property
    def text_encoding(self) -> TextEncoding:
        """Text encoder and tokenizer as one."""
        return TextEncoding(self.text_encoder, self.tokenizer)

    @property
    def default_size(self) -> tuple[int, int]:
        """Height and width of pictures in pixels where none are asked for: the U-Net's `sample_size`."""
        size = self.unet.config["sample_size"]
        if size is None:
            raise UsageError("the U-Net's config has no sample_size: give height and width")
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.config["pixel_unshuffle"], width * self.config["pixel_unshuffle"]

    @property
    def guidance_scale(self) -> float:
        """Of the last call, or the one under way, as in diffusers; before any, of calls that give none."""
        return getattr(self, "_guidance_scale", float(self.config["guidance_scale"]))

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the last call, or the one under way, puts guidance's half before the prompts', as in diffusers."""
        return getattr(self, "_guidance_scale", 0.0) > 1

    def encode_prompt(self, prompt: Sequence[str]) -> EncodedText:
        """Text states `[B, L, C]` of the prompts, and their padding mask; a prompt that is cut is warned of."""
        return self.text_encoding.encode_prompts(prompt)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        negative_prompt: str | Sequence[str] | None = None,
        num_inference_steps: int = 50,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_attention_mask: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, int, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Any:
        """Draw pictures.

        Args:
            prompt: one text, or a list.
            negative_prompt: what guidance leads away from, one for all or one for each prompt; None: the empty text.
            num_inference_steps: steps of denoising.
            guidance_scale: how far guidance goes beyond the prompt's own prediction; 1 or 0: no guidance, and half the
                work; None: the model's own (`config.guidance_scale`).
            guidance_rescale: how much of the prediction's spread is brought back after guidance (arXiv 2305.08891).
            num_images_per_prompt: pictures of each prompt; they share its keys and values.
            height: of the pictures in pixels, a multiple of `pixel_unshuffle`; None: the U-Net's `sample_size`.
            width: likewise.
            generator: source of the noise, or a list with one for each picture.
            latents: noise to begin with, `[B * num_images_per_prompt, 3, height, width]`, standard normal.
            prompt_embeds: `[B, L, C]` in place of `prompt`, as `encode_prompt` gives them.
            prompt_attention_mask: bool `[B, L]`, True = may attend; None: no padding.
            negative_prompt_embeds: in place of `negative_prompt`, of `B` rows and any length.
            negative_prompt_attention_mask: likewise.
            output_type: "pil", "np" `[B, H, W, 3]` or "pt" `[B, 3, H, W]`; both of 0 to 1.
            return_dict: an `ImagePipelineOutput` rather than a tuple.
            callback_on_step_end: called with the pipeline, the number of the step, its time and `{"latents": ...}`;
                returns a dict, whose "latents" go on.
            callback_on_step_end_tensor_inputs: what the callback is given; there are only the latents.

        Raises:
            UsageError: an argument that cannot be used; known before the first step.
        """
        size = check_size(height, width, self.default_size, self.config["pixel_unshuffle"])
        steps = check_steps(num_inference_steps, self.scheduler)
        if guidance_scale is None:
            guidance_scale = self.config["guidance_scale"]
        scale = check_guidance(guidance_scale, self.unet, has_negative=_given(negative_prompt, negative_prompt_embeds))
        _check_output(output_type, callback_on_step_end_tensor_inputs)
        self._guidance_scale = scale
        positive = self._texts("prompt", prompt, prompt_embeds, prompt_attention_mask)
        texts = positive
        if scale > 1:
            negative = self._negatives(
                len(positive.states), negative_prompt, negative_prompt_embeds, negative_prompt_attention_mask
            )
            texts = joined(negative, positive)
        pictures = len(positive.states) * check_whole(num_images_per_prompt, "num_images_per_prompt")
        sample = self._noise((pictures, _COLOURS, *size), generator, latents)
        context = self._context(texts, num_images_per_prompt)
        guidance = (scale, guidance_rescale)
        sample = self._denoise(sample, context, steps, guidance, generator, callback_on_step_end)
        images: Any = self.image_processor.postprocess(sample.clamp(-1, 1), output_type=output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    # The parts of a call.

    def _texts(self, name: str, prompt: Any, embeds: Tensor | None, mask: Tensor | None) -> EncodedText:
        if (prompt is None) == (embeds is None):
            raise UsageError(f"give either {name} or {name}_embeds, and not both")
        if embeds is None:
            if mask is not None:
                raise UsageError(f"{name}_attention_mask belongs to {name}_embeds: leave it out")
            encoded = self.encode_prompt(each_prompt(prompt, name))
            states, mask = encoded.states, encoded.key_mask
        else:
            states = embeds
        width = expected_width(self.unet)
        if states.ndim != 3 or states.shape[-1] != width:
            raise UsageError(f"{name}_embeds has shape {list(states.shape)}, expected [batch, length, {width}]")
        if mask is not None and mask.shape != states.shape[:2]:
            raise UsageError(
                f"{name}_attention_mask has shape {list(mask.shape)}, its embeddings say {list(states.shape[:2])}"
            )
        device = self._execution_device
        states = states.to(device, self.unet.dtype)
        return EncodedText(states, None if mask is None else mask.to(device, torch.bool))

    def _negatives(self, count: int, prompt: Any, embeds: Tensor | None, mask: Tensor | None) -> EncodedText:
        if embeds is None:
            given = "" if prompt is None else prompt
            prompt = [given] * count if isinstance(given, str) else given
        texts = self._texts("negative_prompt", prompt, embeds, mask)
        if len(texts.states) != count:
            raise UsageError(f"{len(texts.states)} negative prompts for {count} prompts: give one, or one for each")
        return texts

    def _noise(self, shape: tuple[int, ...], generator: Any, latents: Tensor | None) -> Tensor:
        if isinstance(generator, list) and len(generator) != shape[0]:
            raise UsageError(f"{len(generator)} generators for {shape[0]} pictures: give one, or one for each picture")
        if latents is not None and tuple(latents.shape) != shape:
            raise UsageError(f"latents has shape {list(latents.shape)}, expected {list(shape)}")
        device = self._execution_device
        if latents is None:
            # In float32 whatever the model's dtype: steps add up, and pixels have no autoencoder to hide it.
            latents = randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        return latents.to(device, torch.float32)

    def _context(self, texts: EncodedText, num_images: int) -> dict[str, Any]:
        """Arguments of the U-Net that say what is attended to, the same at every step."""
        if isinstance(self.unet, UNet):
            return {"encoder_hidden_states": UNetContext(texts.states, texts.key_mask)}
        mask = None if texts.key_mask is None else texts.key_mask.repeat_interleave(num_images, dim=0)
        states = texts.states.repeat_interleave(num_images, dim=0)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def _denoise(
        self,
        sample: Tensor,
        context: dict[str, Any],
        num_steps: int,
        guidance: tuple[float, float],
        generator: Any,
        callback: Any,
    ) -> Tensor:
        self.scheduler.set_timesteps(num_steps, device=sample.device)
        sample = sample * self.scheduler.init_noise_sigma
        extra = {"generator": generator} if takes_generator(self.scheduler) else {}
        timesteps = self.scheduler.timesteps
        progress_bar: Any = self.progress_bar
        with progress_bar(total=len(timesteps)) as bar:
            for number, timestep in enumerate(timesteps):
                predicted = self._predict(sample, timestep, context, *guidance)
                sample = self.scheduler.step(predicted, timestep, sample, return_dict=False, **extra)[0]
                if callback is not None:
                    sample = callback(self, number, timestep, {"latents": sample}).pop("latents", sample)
                bar.update()
        return sample

    def _predict(
        self, sample: Tensor, timestep: Tensor, context: dict[str, Any], scale: float, rescale: float
    ) -> Tensor:
        """The guided prediction, float32 `[B, 3, H, W]`; both halves of guidance go through the U-Net together."""
        factor = self.config["pixel_unshuffle"]
        given = self.scheduler.scale_model_input(sample, timestep)
        given = F.pixel_unshuffle(given, factor).to(self.unet.dtype)
        rows = torch.cat([given, given]) if scale > 1 else given
        predicted = F.pixel_shuffle(self.unet(rows, timestep, return_dict=False, **context)[0].float(), factor)
        if scale <= 1:
            return predicted
        without, with_prompt = predicted.chunk(2)
        guided = without + scale * (with_prompt - without)
        return rescale_noise_cfg(guided, with_prompt, guidance_rescale=rescale) if rescale > 0 else guided


def joined(first: EncodedText, second: EncodedText) -> EncodedText:
    """The rows of both, the shorter ones padded with masked zeros."""
    length = max(first.states.shape[1], second.states.shape[1])
    states = torch.cat([pad_length(text.states, length) for text in (first, second)])
    if first.key_mask is None and second.key_mask is None and first.states.shape == second.states.shape:
        return EncodedText(states)
    return EncodedText(states, torch.cat([pad_length(mask_of(text), length) for text in (first, second)]))


def mask_of(text: EncodedText) -> Tensor:
    """The padding mask bool `[B, L]`, all True where nothing is padded."""
    if text.key_mask is not None:
        return text.key_mask
    return torch.ones(text.states.shape[:2], dtype=torch.bool, device=text.states.device)


def pad_length(tensor: Tensor, length: int) -> Tensor:
    """States `[B, L, C]` or a mask `[B, L]`, with zeros behind them up to that length."""
    missing = length - tensor.shape[1]
    return F.pad(tensor, (0, 0, 0, missing) if tensor.ndim == 3 else (0, missing)) if missing else tensor


def _given(*values: Any) -> bool:
    return any(value is not None for value in values)


def _check_parts(unet: UNet2DConditionModel, factor: int) -> None:
    if isinstance(factor, bool) or not isinstance(factor, int) or factor < 1:
        raise CheckpointError(f"pixel_unshuffle is {factor!r}: it must be a whole number of 1 or more")
    channels = _COLOURS * factor * factor
    config: Any = unet.config
    if (config.in_channels, config.out_channels) != (channels, channels):
        raise CheckpointError(
            f"the U-Net takes {config.in_channels} channels and gives {config.out_channels}, but pixels with "
            f"pixel_unshuffle {factor} have {channels}: set both to {channels}"
        )
    for name in ("addition_embed_type", "class_embed_type", "num_class_embeds", "time_cond_proj_dim"):
        if config.get(name) is not None:
            raise CheckpointError(
                f"the U-Net's config has {name}={config[name]!r}, an input that PixelPipeline lacks: leave it out"
            )


def _check_output(output_type: str, tensor_inputs: Sequence[str]) -> None:
    if output_type not in OUTPUT_TYPES:
        raise UsageError(f"output_type is {output_type!r}: choose one of {', '.join(OUTPUT_TYPES)}")
    unknown = [name for name in tensor_inputs if name != "latents"]
    if unknown:
        raise UsageError(f"callback_on_step_end_tensor_inputs has {unknown[0]!r}: only 'latents' can be had")
