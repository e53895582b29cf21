"""Pictures from texts in three lines."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.schedulers.scheduling_utils import SchedulerMixin
from PIL import Image
from torch import Tensor, nn

from mmattn.errors import CheckpointError, UsageError
from mmattn.inference.diffusion.adapters import Adapters, load_kv
from mmattn.inference.diffusion.checks import (
    check_guidance,
    check_rescale,
    check_size,
    check_steps,
    check_text_width,
    check_whole,
    each_prompt,
)
from mmattn.inference.diffusion.context_once import context_projected_once
from mmattn.inference.diffusion.pipeline_folder import PIPELINES, open_pipeline
from mmattn.inference.diffusion.pixel_pipeline import GUIDANCE_SCALE, PixelPipeline
from mmattn.inference.diffusion.prompts import EncodedPrompts, check_encoded, encode_prompts
from mmattn.inference.diffusion.schedulers import check_seeded, make_scheduler
from mmattn.inference.diffusion.seeds import make_generators, noise_sources
from mmattn.inference.hub import evaluating, push_folder
from mmattn.inference.moving import Movable
from mmattn.maps.record import recorders_of
from mmattn.models.unet import CompiledUNet

Prompts = str | Sequence[str]

# Pictures drawn together by default: as many as have this many pixels, about four of 512 x 512.
_PIXELS_AT_ONCE = 4 * 512 * 512
_MOST_AT_ONCE = 64


class TextToImage(Movable):
    """Stable Diffusion 1.x, 2.x and XL, and pixel-space pipelines of ours, as one thing that draws pictures.

    A thin layer on diffusers' pipelines and schedulers: what it adds is that a seed gives the same picture whatever it
    is drawn together with, that the prompt's keys and values are projected once per generation, and that arguments
    which would be ignored are refused.

    Args:
        pipeline: a `StableDiffusionPipeline`, `StableDiffusionXLPipeline` or `PixelPipeline`. Its models are put into
            evaluation mode during a call, and back after it.

    Attributes:
        compiled: takes the U-Net's steps where they are compiled; None: they are not.

    Raises:
        CheckpointError: a text encoder that does not fit the U-Net.
        UsageError: a pipeline of another kind.
    """

    records_attention = True

    def __init__(self, pipeline: Any) -> None:
        if not isinstance(pipeline, tuple(PIPELINES.values())):
            raise UsageError(f"TextToImage takes one of {', '.join(PIPELINES)}, not {type(pipeline).__name__}")
        encoders = [pipeline.text_encoder, getattr(pipeline, "text_encoder_2", None)]
        check_text_width(pipeline.unet, encoders)
        self._pipeline = pipeline
        self._adapters = Adapters(pipeline)
        self.compiled: CompiledUNet | None = None

    @classmethod
    def from_pretrained(
        cls,
        id_or_folder: str | Path,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        variant: str | None = None,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        local_files_only: bool = False,
        scheduler: str | SchedulerMixin | None = None,
        compile: bool = False,
    ) -> TextToImage:
        """Open a Stable Diffusion folder, or what `mmattn train diffusion/...` made.

        Args:
            id_or_folder: a folder or a hub id.
            revision: branch, tag or commit on the hub.
            token: hub token; None: the stored one.
            variant: infix of the weight files, such as `fp16`.
            dtype: of the weights; None: bfloat16 (or float16) on a CUDA device, else float32.
            device: None: the first accelerator, else the CPU.
            local_files_only: never go to the network.
            scheduler: a name of `mmattn.inference.diffusion.schedulers.SCHEDULERS`, of a class of diffusers, or a
                scheduler; None: the folder's own.
            compile: draw in compiled steps, see `compile()`.

        Raises:
            CheckpointError: nothing there, a model of another family, or files that do not fit together.
            UsageError: an unknown scheduler.
        """
        pipeline = open_pipeline(
            id_or_folder,
            revision=revision,
            token=token,
            variant=variant,
            dtype=dtype,
            device=device,
            local_files_only=local_files_only,
        )
        if scheduler is not None:
            pipeline.scheduler = make_scheduler(scheduler, pipeline.scheduler)
        t2i = cls(pipeline)
        if compile:
            t2i.compile()
        return t2i

    def compile(self, *, backend: str = "inductor") -> None:
        """Run the U-Net from now on in compiled steps: its transformer blocks are compiled once for each width, at
        first use, and on a CUDA device the whole step is replayed as a CUDA graph, one for each number and size of
        pictures. The scheduler, guidance and the decoder stay outside; pictures stay the same up to rounding.

        Weights, LoRA files and their scales may change afterwards: what changes is seen, and compiled anew where it
        must be. Offloading, hooks and recorded or steered attention are refused; `t2i.compiled = None` goes back.

        Args:
            backend: of torch.compile.

        Raises:
            UsageError: a U-Net of another class than `mmattn.UNet`, or a device other than a CPU or a CUDA device.
        """
        self.compiled = CompiledUNet(self._pipeline.unet, backend=backend)

    @property
    def pipeline(self) -> Any:
        """The diffusers pipeline: for offloading, callbacks, and whatever else diffusers does."""
        return self._pipeline

    @property
    def device(self) -> torch.device:
        """Where the pipeline works."""
        return self._pipeline.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the U-Net's weights."""
        return self._pipeline.unet.dtype

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of pictures in pixels where none are asked for."""
        if isinstance(self._pipeline, PixelPipeline):
            return self._pipeline.default_size
        side = self._pipeline.unet.config.sample_size
        height, width = (side, side) if isinstance(side, int) else side
        return height * self._size_factor, width * self._size_factor

    @property
    def guidance_scale(self) -> float:
        """Of pictures where none is asked for: what a pixel-space model was made with, else 5."""
        is_pixels = isinstance(self._pipeline, PixelPipeline)
        return float(self._pipeline.config["guidance_scale"]) if is_pixels else GUIDANCE_SCALE

    @property
    def _size_factor(self) -> int:
        is_pixels = isinstance(self._pipeline, PixelPipeline)
        return self._pipeline.config.pixel_unshuffle if is_pixels else self._pipeline.vae_scale_factor

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the pipeline's folder; stock diffusers and transformers classes open its parts.

        Raises:
            UsageError: LoRA files are loaded, which the folder cannot hold.
            CheckpointError: a disk that refuses.
        """
        self._adapters.check_none("save_pretrained")
        try:
            self._pipeline.save_pretrained(str(folder))
        except OSError as error:
            raise CheckpointError(f"{folder}: cannot be written ({error.strerror or error})") from error

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, token: str | None = None, commit_message: str | None = None
    ) -> str:
        """Save to a hub repository, made when it is not there; returns its address."""
        return push_folder(self.save_pretrained, repo_id, private=private, token=token, commit_message=commit_message)

    def load_lora(self, path: str | Path, scale: float = 1.0) -> str:
        """Load a LoRA file beside those that are loaded already.

        Args:
            path: a file, or a folder or hub id with `pytorch_lora_weights.safetensors` in it.
            scale: how strongly it is applied.

        Returns:
            The adapter's name, for `pipeline.set_adapters` and the like.

        Raises:
            CheckpointError: nothing there, or weights for another model.
        """
        return self._adapters.load(path, scale)

    def unload_lora(self) -> None:
        """Take all LoRA files off again."""
        self._adapters.unload()

    def load_cross_attention_kv(self, folder: str | Path) -> tuple[str, ...]:
        """Put keys and values of a Custom Diffusion file into the U-Net, and its new tokens into the tokenizer.

        Args:
            folder: as in `mmattn.models.unet.kv_file.read_cross_attention_kv`, or that of a training run.

        Returns:
            The new tokens, to be used in prompts.

        Raises:
            CheckpointError: weights for another U-Net; nothing is changed then.
            UsageError: tokens that are there already, or that one of two text encoders would not know.
        """
        return load_kv(self._pipeline, folder)

    def encode(self, prompts: Prompts, *, negative_prompts: Prompts | None = None) -> EncodedPrompts:
        """Run the text encoder once, for any number of calls of `generate`.

        Args:
            prompts: one or several texts.
            negative_prompts: one for all, or one for each prompt; None: the pipeline's own.
        """
        with self._evaluating():
            return encode_prompts(self._pipeline, prompts, negative_prompts, is_guided=self._may_guide)

    def generate(
        self,
        prompts: Prompts | EncodedPrompts,
        *,
        negative_prompts: Prompts | None = None,
        num_inference_steps: int = 25,
        guidance_scale: float | None = None,
        guidance_rescale: float = 0.0,
        num_images_per_prompt: int = 1,
        height: int | None = None,
        width: int | None = None,
        seed: int | Sequence[int] | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        batch_size: int | None = None,
        progress: bool | None = None,
        on_batch: Callable[[int, list[Image.Image]], None] | None = None,
    ) -> list[Image.Image]:
        """Draw pictures.

        Every picture has a source of noise of its own: picture j of a prompt is drawn from `seed + j`, and is the same
        whatever else is drawn with it, in whatever batches.

        Args:
            prompts: one or several texts, or what `encode` returned.
            negative_prompts: what guidance leads away from, one for all or one for each prompt.
            num_inference_steps: steps of denoising.
            guidance_scale: how far guidance goes beyond the prompt's own prediction; 1 or 0: no guidance, and half the
                work; None: the model's own (`guidance_scale`). A distilled U-Net (`time_cond_proj_dim`) takes it as an
                input instead.
            guidance_rescale: how much of the prediction's spread is brought back after guidance (arXiv 2305.08891).
            num_images_per_prompt: pictures of each prompt.
            height: of the pictures in pixels; None: the model's own.
            width: likewise.
            seed: of the noise, one for all prompts or one for each; None: 0.
            generator: in place of seeds, one for the only picture or a list with one for each.
            batch_size: pictures drawn together; None: as many as have the pixels of four of 512 x 512, at most 64.
            progress: show a progress bar over the steps; None: on a terminal.
            on_batch: called after each batch with the number of its first picture and its pictures.

        Returns:
            RGB pictures, those of the first prompt first.

        Raises:
            UsageError: an argument that cannot be used or would be ignored; known before the first step.
        """
        pipeline = self._pipeline
        self._check_compiled()
        check_seeded(pipeline.scheduler)
        encoded = prompts if isinstance(prompts, EncodedPrompts) else None
        if encoded is not None and negative_prompts is not None:
            raise UsageError("negative_prompts belongs to encode(): these prompts are encoded already")
        has_negative = negative_prompts is not None if encoded is None else encoded.has_negative
        guidance_scale = self.guidance_scale if guidance_scale is None else guidance_scale
        scale = check_guidance(guidance_scale, pipeline.unet, has_negative=has_negative)
        size = check_size(height, width, self.size, self._size_factor)
        settings = {
            "num_inference_steps": check_steps(num_inference_steps, pipeline.scheduler),
            "guidance_scale": scale,
            "guidance_rescale": check_rescale(guidance_rescale, is_guided=scale > 1),
            "height": size[0],
            "width": size[1],
        }
        at_once = _at_once(size) if batch_size is None else check_whole(batch_size, "batch_size")
        count = check_whole(num_images_per_prompt, "num_images_per_prompt")
        texts = prompts.prompts if isinstance(prompts, EncodedPrompts) else each_prompt(prompts)
        sources = noise_sources(seed, generator, len(texts), count)
        is_guided = scale > 1 and self._may_guide
        with self._evaluating():
            if encoded is None:
                encoded = encode_prompts(pipeline, texts, negative_prompts, is_guided=is_guided)
            else:
                check_encoded(encoded, pipeline.unet, is_guided=is_guided)
            numbers = [number for number in range(len(encoded)) for _ in range(count)]
            images: list[Image.Image] = []
            for start in range(0, len(numbers), at_once):
                rows = slice(start, start + at_once)
                tensors = encoded.rows(numbers[rows], is_guided=is_guided)
                recorders = recorders_of(self)
                for recorder in recorders:
                    recorder.expect_prompts(*encoded.texts(numbers[rows]), is_guided=is_guided)
                with self._bar(progress, len(images), len(numbers[rows]), len(numbers)):
                    drawn = self._draw(tensors, make_generators(sources[rows]), settings)
                for recorder in recorders:
                    recorder.take_images(drawn)
                images += drawn
                if on_batch is not None:
                    on_batch(start, drawn)
        return images

    # The parts of a call.

    def _draw(
        self, tensors: dict[str, Tensor], generators: list[torch.Generator], settings: dict[str, Any]
    ) -> list[Image.Image]:
        steps = self.compiled
        with context_projected_once(self._pipeline.unet) if steps is None else steps.installed():
            return self._pipeline(**tensors, generator=generators, output_type="pil", **settings).images

    def _check_compiled(self) -> None:
        if self.compiled is None:
            return
        if self.compiled.unet is not self._pipeline.unet:
            raise UsageError("the pipeline has another U-Net than the one that was compiled: call compile() again")
        if recorders_of(self):
            raise UsageError(
                "attention cannot be recorded or steered in compiled steps: open the model without compile for that"
            )

    @property
    def _may_guide(self) -> bool:
        """Whether guidance is a second half of the batch; a distilled U-Net has it inside."""
        return self._pipeline.unet.config.get("time_cond_proj_dim") is None

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for model in self._models():
                stack.enter_context(evaluating(model))
            yield

    def _models(self) -> list[nn.Module]:
        return [part for part in self._pipeline.components.values() if isinstance(part, nn.Module)]

    @contextlib.contextmanager
    def _bar(self, progress: bool | None, done: int, drawing: int, total: int) -> Iterator[None]:
        """The pipeline's own bar, which says which pictures it is at."""
        label = "Drawing" if drawing == total else f"Drawing {done + 1}-{done + drawing} of {total}"
        before = getattr(self._pipeline, "_progress_bar_config", {})
        # tqdm leaves a bar out by itself, with None, where there is no terminal.
        disable = None if progress is None else not progress
        self._pipeline.set_progress_bar_config(desc=label, unit="step", leave=False, disable=disable)
        try:
            yield
        finally:
            self._pipeline.set_progress_bar_config(**before)


def _at_once(size: tuple[int, int]) -> int:
    return min(max(1, _PIXELS_AT_ONCE // (size[0] * size[1])), _MOST_AT_ONCE)
