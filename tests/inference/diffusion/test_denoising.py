"""Noise, targets and weights of the diffusion loss, against float64 by hand; the trained new token."""

import math
from typing import ClassVar

import pytest
import torch
from diffusers import DDIMScheduler, EDMEulerScheduler, EulerDiscreteScheduler, FlowMatchEulerDiscreteScheduler
from torch import nn

from mmattn.errors import CheckpointError, ConfigError
from mmattn.inference.diffusion.denoising import DenoisingLoss, DenoisingNetwork, encode_pixels, scaled_latents
from mmattn.inference.diffusion.new_token import NewTokenEmbedding, add_new_token
from tests.inference.tiny_pipelines import pixel_parts, stable_diffusion

TIMESTEPS = torch.tensor([0, 7, 50, 98, 99])


class _Says(nn.Module):
    """Predicts what it is told, and keeps what it was given."""

    def __init__(self, prediction: torch.Tensor) -> None:
        super().__init__()
        self.prediction = prediction

    def forward(self, noisy, timesteps, text):
        self.noisy, self.text = noisy, text
        return self.prediction


def _batch(draws: torch.Generator) -> dict[str, torch.Tensor]:
    shape = (5, 3, 7, 11)
    return {
        "pixels": torch.rand(shape, generator=draws) * 2 - 1,
        "noise": torch.randn(shape, generator=draws),
        "offset": torch.randn(5, 3, 1, 1, generator=draws),
        "timesteps": TIMESTEPS,
        "text_states": torch.randn(5, 2, 4, generator=draws),
    }


def _scheduler(**settings) -> DDIMScheduler:
    return DDIMScheduler(num_train_timesteps=100, beta_schedule="squaredcos_cap_v2", **settings)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_loss_equals_the_formulas(prediction, zero_snr, gamma):
    scheduler = _scheduler(prediction_type=prediction, rescale_betas_zero_snr=zero_snr)
    batch = _batch(torch.Generator().manual_seed(0))
    model = _Says(torch.randn(5, 3, 7, 11, generator=torch.Generator().manual_seed(1)))
    loss = DenoisingLoss(scheduler, min_snr_gamma=gamma, offset_noise=0.1)(model, batch)
    alpha = scheduler.alphas_cumprod[TIMESTEPS].double()[:, None, None, None]
    noise = batch["noise"].double() + 0.1 * batch["offset"].double()
    clean = batch["pixels"].double()
    torch.testing.assert_close(
        model.noisy.double(), alpha.sqrt() * clean + (1 - alpha).sqrt() * noise, atol=1e-5, rtol=0
    )
    target = noise if prediction == "epsilon" else alpha.sqrt() * noise - (1 - alpha).sqrt() * clean
    expected = ((model.prediction.double() - target) ** 2).flatten(1).mean(1)
    if gamma is not None:
        ratio = (alpha / (1 - alpha)).flatten()
        cut = ratio.clamp(max=gamma)
        expected = expected * (
            cut / (ratio + 1) if prediction == "v_prediction" else torch.where(ratio > 0, cut / ratio, 1)
        )
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-6)
    assert list(model.text) == ["text_states"]


def test_a_right_prediction_costs_nothing():
    batch = _batch(torch.Generator().manual_seed(0))
    del batch["offset"]
    loss = DenoisingLoss(_scheduler(prediction_type="epsilon"))(_Says(batch["noise"]), batch)
    assert loss.abs().max() == 0


def test_a_scheduler_that_predicts_something_else_is_refused():
    with pytest.raises(CheckpointError, match="prediction_type='sample'"):
        DenoisingLoss(EulerDiscreteScheduler(prediction_type="sample"))


def test_schedulers_without_betas_are_refused():
    for scheduler in (FlowMatchEulerDiscreteScheduler(), EDMEulerScheduler()):
        with pytest.raises(CheckpointError, match="has no beta_schedule"):
            DenoisingLoss(scheduler)


def test_latents_with_a_mean_and_a_spread_by_channel():
    config = {"scaling_factor": 0.5, "latents_mean": [1.0, 2.0], "latents_std": [0.5, 4.0]}
    latents = torch.full((3, 2, 5, 7), 3.0)
    found = scaled_latents(config, latents)
    assert found[:, 0].unique().tolist() == [2.0]
    assert found[:, 1].unique().tolist() == [0.125]


def test_a_vae_works_in_its_own_dtype_under_autocast():
    vae = stable_diffusion().vae
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    plain = encode_pixels(vae, pixels)
    with torch.autocast("cpu", torch.bfloat16):
        cast = encode_pixels(vae, pixels)
    assert all(torch.equal(*pair) for pair in zip(plain, cast, strict=True))


def test_latents_are_scaled_as_the_vae_says():
    class VAE:
        config: ClassVar = {"scaling_factor": 0.5, "shift_factor": 0.25}

    draws = torch.Generator().manual_seed(0)
    shape = (5, 4, 3, 5)
    batch = {name: torch.rand(shape, generator=draws) for name in ("latent_mean", "latent_std", "posterior", "noise")}
    batch |= {"timesteps": torch.zeros(5, dtype=torch.long), "text_states": torch.zeros(5, 1, 4)}
    model = _Says(batch["noise"])
    scheduler = _scheduler(prediction_type="epsilon")
    DenoisingLoss(scheduler, vae=VAE)(model, batch)
    clean = (batch["latent_mean"] + batch["latent_std"] * batch["posterior"] - 0.25) * 0.5
    alpha = float(scheduler.alphas_cumprod[0])
    expected = math.sqrt(alpha) * clean + math.sqrt(1 - alpha) * batch["noise"]
    torch.testing.assert_close(model.noisy, expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_text_encoder_in_the_network_stays_in_evaluation_mode():
    parts = pixel_parts()
    network = DenoisingNetwork(parts["unet"], parts["text_encoder"].requires_grad_(False), 2).train()
    assert network.unet.training
    assert not network.text_encoder.training
    parts["text_encoder"].requires_grad_(True)
    assert network.train().text_encoder.training


def test_only_the_new_token_moves():
    parts = pixel_parts()
    encoder, tokenizer = parts["text_encoder"], parts["tokenizer"]
    ids = tokenizer("a red circle", return_tensors="pt")["input_ids"]
    before = encoder(ids).last_hidden_state
    added = add_new_token(encoder, tokenizer, "<new1>", "red")
    assert isinstance(encoder.get_input_embeddings(), NewTokenEmbedding)
    assert torch.equal(encoder(ids).last_hidden_state, before)
    other = tokenizer("a <new1> circle", return_tensors="pt")["input_ids"]
    assert added.token_id in other[0].tolist()
    encoder(other).last_hidden_state.square().sum().backward()
    trained = [name for name, parameter in encoder.named_parameters() if parameter.grad is not None]
    assert [name.rpartition(".")[2] for name in trained] == ["vector"]
    with pytest.raises(ConfigError, match="'<new1>' is a token of this text encoder already"):
        add_new_token(encoder, tokenizer, "<new1>", "red")
