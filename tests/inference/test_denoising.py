"""Noise, targets and weights of the diffusion loss, against float64 by hand; the trained new token."""

import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler
from torch import nn

from mmattn.errors import CheckpointError, ConfigError
from mmattn.inference.denoising import DenoisingLoss, DenoisingNetwork
from mmattn.inference.new_token import NewTokenEmbedding, add_new_token
from tests.inference.tiny_pipelines import pixel_parts

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


def test_latents_are_scaled_as_the_vae_says():
    class Config:
        scaling_factor, shift_factor = 0.5, 0.25

    class VAE:
        config = Config

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
