"""What a diffusion model learns: to tell the noise from the picture, at any noise level."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch
import torch.nn.functional as F
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmattn.errors import CheckpointError
from mmattn.inference.diffusion.text_encoding import EncodedText
from mmattn.models.unet import UNet, UNetContext

PREDICTIONS = ("epsilon", "v_prediction")


class DenoisingNetwork(nn.Module):
    """U-Net and, where batches hold tokens, its text encoder, as one module.

    Args:
        unet: the U-Net.
        text_encoder: turns tokens into text states; None where batches hold the states themselves.
        pixel_unshuffle: as in `PixelPipeline`; 1 for latents.
    """

    def __init__(self, unet: UNet, text_encoder: PreTrainedModel | None = None, pixel_unshuffle: int = 1) -> None:
        super().__init__()
        self.unet, self.text_encoder, self.pixel_unshuffle = unet, text_encoder, pixel_unshuffle

    def train(self, mode: bool = True) -> Self:
        """As in torch; a frozen text encoder stays without dropout."""
        super().train(mode)
        if self.text_encoder is not None and not any(p.requires_grad for p in self.text_encoder.parameters()):
            self.text_encoder.eval()
        return self

    def forward(self, noisy: Tensor, timesteps: Tensor, text: Mapping[str, Tensor]) -> Tensor:
        """The prediction for noisy pixels or latents.

        Args:
            noisy: `[B, C, H, W]`.
            timesteps: int64 `[B]`.
            text: `input_ids` and `attention_mask` `[B, L]` for the text encoder, or `text_states` `[B, L, C]` with
                `text_mask` bool `[B, L]` where some are padded; for SDXL `pooled` `[B, P]` and `time_ids` `[B, 6]` too.

        Returns:
            `[B, C, H, W]`.
        """
        encoded = self._encoded(text)
        added: dict[str, Any] = {}
        if "time_ids" in text:
            added["added_cond_kwargs"] = {"text_embeds": encoded.pooled, "time_ids": text["time_ids"]}
        predicted = self.unet(
            F.pixel_unshuffle(noisy, self.pixel_unshuffle),
            timesteps,
            UNetContext(encoded.states, encoded.key_mask),
            return_dict=False,
            **added,
        )[0]
        return F.pixel_shuffle(predicted, self.pixel_unshuffle)

    def _encoded(self, text: Mapping[str, Tensor]) -> EncodedText:
        if self.text_encoder is None:
            return EncodedText(text["text_states"], text.get("text_mask"), text.get("pooled"))
        output = self.text_encoder(input_ids=text["input_ids"], attention_mask=text.get("attention_mask"))
        mask = text.get("attention_mask")
        return EncodedText(output.last_hidden_state, None if mask is None else mask.bool())


class DenoisingLoss:
    """Mean squared error of the prediction, by example.

    Args:
        scheduler: the pipeline's; its noise schedule and prediction type are trained.
        min_snr_gamma: weights by the signal-to-noise ratio, cut off at gamma (min-SNR, arXiv 2303.09556); None: equal
            weights.
        offset_noise: strength of the batch's `offset`.
        vae: of a latent model: its latents' scale and shift.

    Raises:
        CheckpointError: a scheduler without betas (flow matching, EDM), or one that predicts something else than noise
            or velocity.
    """

    def __init__(
        self, scheduler: Any, *, min_snr_gamma: float | None = None, offset_noise: float = 0.0, vae: Any = None
    ) -> None:
        if "beta_schedule" not in scheduler.config:
            raise CheckpointError(
                f"the model's scheduler, {type(scheduler).__name__}, has no beta_schedule: training is for noise "
                "schedules as Stable Diffusion has them"
            )
        self.schedule: Any = DDPMScheduler.from_config(scheduler.config)
        self.prediction_type: str = self.schedule.config.prediction_type
        if self.prediction_type not in PREDICTIONS:
            raise CheckpointError(
                f"the model's scheduler has prediction_type={self.prediction_type!r}: training is for "
                f"{' and '.join(PREDICTIONS)}"
            )
        self.min_snr_gamma, self.offset_noise, self.vae = min_snr_gamma, offset_noise, vae

    def __call__(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """The loss of each example, float32 `[B]`.

        Args:
            model: a `DenoisingNetwork`, wrapped or not.
            batch: from `TextToImageCollator`, on the model's device.
        """
        clean, timesteps, noise = self._clean(batch), batch["timesteps"], batch["noise"]
        if "offset" in batch:
            noise = noise + self.offset_noise * batch["offset"]
        noisy = self.schedule.add_noise(clean, noise, timesteps)
        target = noise
        if self.prediction_type == "v_prediction":
            target = self.schedule.get_velocity(clean, noise, timesteps)
        predicted = model(noisy, timesteps, _text_of(batch))
        errors = F.mse_loss(predicted.float(), target.float(), reduction="none").flatten(1).mean(1)
        return errors * self.weights(timesteps)

    def weights(self, timesteps: Tensor) -> Tensor:
        """The weight of each example by its timestep, float32 `[B]`."""
        if self.min_snr_gamma is None:
            return torch.ones_like(timesteps, dtype=torch.float32)
        ratio = compute_snr(self.schedule, timesteps).float()
        # The error of a velocity is that of the noise times (ratio + 1) / ratio. Pure noise has ratio 0.
        cut = ratio.clamp(max=self.min_snr_gamma)
        return cut / (ratio + 1) if self.prediction_type == "v_prediction" else torch.where(ratio > 0, cut / ratio, 1.0)

    def _clean(self, batch: Mapping[str, Tensor]) -> Tensor:
        if self.vae is None:
            return batch["pixels"]
        if "pixels" in batch:
            mean, std = encode_pixels(self.vae, batch["pixels"])
        else:
            mean, std = batch["latent_mean"], batch["latent_std"]
        return scaled_latents(self.vae.config, mean + std * batch["posterior"])


def scaled_latents(config: Any, latents: Tensor) -> Tensor:
    """A VAE's latents as the U-Net was trained on them: what pipelines undo before they decode."""
    if config.get("latents_mean") is not None and config.get("latents_std") is not None:
        means, stds = (
            torch.tensor(config[name], device=latents.device, dtype=latents.dtype)[:, None, None]
            for name in ("latents_mean", "latents_std")
        )
        return (latents - means) * config["scaling_factor"] / stds
    return (latents - (config.get("shift_factor") or 0.0)) * config["scaling_factor"]


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of a VAE's latents, `[B, c, h, w]` each, for pixels `[B, 3, H, W]` in [-1, 1].

    The VAE is moved to the pixels' device, and works in its own dtype: SDXL's overflows in float16.
    """
    if vae.device != pixels.device:
        vae.to(pixels.device)
    with torch.autocast(pixels.device.type, enabled=False):
        posterior = vae.encode(pixels.to(vae.dtype)).latent_dist
    return posterior.mean.float(), posterior.std.float()


def _text_of(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = ("input_ids", "attention_mask", "text_states", "text_mask", "pooled", "time_ids")
    return {name: batch[name] for name in names if name in batch}
