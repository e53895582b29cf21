"""Models that training begins with."""

from __future__ import annotations

import pytest

from mmattn.errors import ConfigError
from mmattn.inference.diffusion.setup import ModelConfig, TextEncoderConfig, UNetConfig, make_text_to_image


def test_a_new_model_has_the_guidance_scale_of_its_config():
    text = TextEncoderConfig(width=32, num_layers=1, num_heads=2, max_length=16)
    unet = UNetConfig(block_out_channels=[32, 64], attention=[False, True], num_heads=2, norm_groups=8)
    config = ModelConfig(image_size=16, text_encoder=text, unet=unet, guidance_scale=2)
    assert make_text_to_image(config, ["a red circle"]).guidance_scale == 2


def test_an_opened_model_has_its_own():
    config = ModelConfig(from_pretrained="folder", guidance_scale=2, image_size=16)
    with pytest.raises(ConfigError, match=r"^model\.image_size, model\.guidance_scale: for a new model, and model\."):
        make_text_to_image(config, [])
