"""The text encoders of a Stable Diffusion pipeline, through the pipeline's own `encode_prompt`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from mmattn.errors import CheckpointError
from mmattn.inference.diffusion.prompt_tokens import check_prompts, cut_text
from mmattn.inference.diffusion.text_encoding import EncodedText
from mmattn.inference.text_fingerprints import encoders_fingerprint


class PipelineTextEncoding:
    """Prompts to what a Stable Diffusion U-Net was trained on: 77 tokens, padding included and attended.

    SD 1.x and 2.x have one encoder and no pooled state; SDXL has two, side by side, and a pooled state. An empty
    prompt becomes zeros where the pipeline does so with a negative prompt that is not given
    (`force_zeros_for_empty_prompt`, SDXL), so that training without captions and guidance mean the same.

    Args:
        pipeline: a diffusers pipeline of SD 1.x, SD 2.x or SDXL.

    Raises:
        CheckpointError: a pipeline of another family, or one whose text encoders were left out.
    """

    def __init__(self, pipeline: Any) -> None:
        parts = pipeline.components
        self._is_xl = "text_encoder_2" in parts
        # The refiner of SDXL has the second encoder only.
        suffixes = ("", "_2") if self._is_xl else ("",)
        self.encoders = [part for suffix in suffixes if (part := parts.get(f"text_encoder{suffix}")) is not None]
        self.tokenizers = [part for suffix in suffixes if (part := parts.get(f"tokenizer{suffix}")) is not None]
        if "unet" not in parts or "text_encoder_3" in parts or not hasattr(pipeline, "encode_prompt"):
            raise CheckpointError(f"{type(pipeline).__name__} is not a pipeline of Stable Diffusion 1.x, 2.x or SDXL")
        if not self.encoders or len(self.encoders) != len(self.tokenizers):
            raise CheckpointError(
                f"{type(pipeline).__name__} has no text encoder with its tokenizer: open the whole folder"
            )
        self.pipeline = pipeline
        self.max_length: int | None = min(tokenizer.model_max_length for tokenizer in self.tokenizers)

    @property
    def width(self) -> int:
        """C, the channels of the states: those of all encoders together."""
        return sum(encoder.config.hidden_size for encoder in self.encoders)

    @torch.no_grad()
    def encode_prompts(self, prompts: Sequence[str]) -> EncodedText:
        """Texts to states `[B, 77, C]`, pooled `[B, P]` for SDXL; no mask, since Stable Diffusion attends padding."""
        prompts = check_prompts(prompts)
        encoded = self.pipeline.encode_prompt(
            prompt=prompts,
            device=self.encoders[0].device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
        )
        states, pooled = encoded[0], encoded[2] if self._is_xl else None
        if getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False):
            is_empty = torch.tensor([not prompt for prompt in prompts], device=states.device)
            states = states.masked_fill(is_empty[:, None, None], 0)
            pooled = None if pooled is None else pooled.masked_fill(is_empty[:, None], 0)
        return EncodedText(states, None, pooled)

    def cut(self, prompts: Sequence[str]) -> list[str | None]:
        """What of each prompt does not fit into the encoders, as text; None where all of it does."""
        cuts = [
            [cut_text(one, prompt, one.model_max_length) for one in self.tokenizers]
            for prompt in check_prompts(prompts)
        ]
        return [max((cut for cut in row if cut is not None), key=len, default=None) for row in cuts]

    def fingerprint(self) -> str:
        """Hash of configs, weights and tokenizers: equal hashes, equal states (in float rounding)."""
        zeros = bool(getattr(self.pipeline.config, "force_zeros_for_empty_prompt", False))
        settings = {"max_length": self.max_length, "pipeline": type(self.pipeline).__name__, "empty_is_zero": zeros}
        return encoders_fingerprint(self.encoders, self.tokenizers, settings)


def sd_text_encodings(pipeline: Any) -> PipelineTextEncoding:
    """The text encoders of a Stable Diffusion pipeline behind one door; see `PipelineTextEncoding`."""
    return PipelineTextEncoding(pipeline)
