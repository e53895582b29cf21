"""Prompts that pipelines rewrite, change on the way or encode unseen: words stay at their tokens, or it is said."""

from __future__ import annotations

import contextlib
import logging

import numpy as np
import pytest
import torch
from diffusers import (
    AudioLDM2UNet2DConditionModel,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    PixArtAlphaPipeline,
    StableDiffusionPanoramaPipeline,
)
from diffusers.guiders import SkipLayerGuidance
from diffusers.hooks import LayerSkipConfig
from diffusers.modular_pipelines.stable_diffusion_xl import StableDiffusionXLAutoBlocks

import mmattn
from mmattn.errors import UsageError
from mmattn.inference.diffusion.text_encoder_setup import TextEncoderConfig, new_text_encoder
from tests.swap import zoo_dits, zoo_sd
from tests.swap.zoo_base import Draw, quiet, seeded

from .joint_pipelines import _t5
from .steered import PROMPT, TOKENS, build, run

OTHER = "a green circle above a star"


def test_a_word_of_several_vectors():
    pipe = build("sd")
    vectors = torch.randn(2, zoo_sd.TEXT, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion({"<new>": vectors}, token="<new>")
    prompt = "a <new> circle above a star"
    with mmattn.record_attention(pipe) as maps:
        run(pipe, prompt)
    text = maps.texts[0].prompt
    assert text.pieces[1:7] == ("a", "", "<new>", "", "<new>_1", "circle"), "this tokenizer knows no space by itself"
    assert text.positions("<new>") == [3]
    with mmattn.steer_attention(pipe, weights={"circle": 0}), mmattn.record_attention(pipe) as hidden:
        run(pipe, prompt)
    assert np.flatnonzero(hidden.array().max((0, 1)) == 0).tolist() == [6], "the very token is hidden, no other"


def test_a_tokenizer_that_pads_on_the_left():
    pipe = build("sd")
    pipe.tokenizer.padding_side = "left"
    padded = tuple(pipe.tokenizer(PROMPT, padding="max_length", max_length=TOKENS).input_ids)
    with mmattn.steer_attention(pipe, weights={"circle": 0}), mmattn.record_attention(pipe) as maps:
        run(pipe)
    (place,) = maps.texts[0].prompt.positions("circle")
    assert padded[place] == pipe.tokenizer("circle").input_ids[1]
    assert np.flatnonzero(maps.array().max((0, 1)) == 0).tolist() == [place]


@seeded
def pixart() -> PixArtAlphaPipeline:
    """With a tokenizer that tells capitals apart; 13 tokens, most of them padding that is masked."""
    config = TextEncoderConfig(width=8, num_layers=0, num_heads=1, max_length=13, lowercase=False)
    tokenizer = new_text_encoder(["a red circle above a blue square"] * 9, config).tokenizer
    parts = {"vae": zoo_sd.vae(), "transformer": zoo_dits.build_pixart(), "text_encoder": _t5(tokenizer)}
    return quiet(PixArtAlphaPipeline(tokenizer=tokenizer, scheduler=DPMSolverMultistepScheduler(), **parts))


def test_capitals_that_a_pipeline_takes_out_and_padding_that_a_swap_leaves_out():
    pipe = pixart()
    sizes = {"height": 128, "width": 96, "use_resolution_binning": False, "max_sequence_length": 13}

    def draw():
        run(pipe, "A RED Circle", steps=2, clean_caption=False, **sizes)

    with mmattn.record_attention(pipe) as stock:
        draw()
    assert stock.texts[0].prompt.ids == tuple(pipe.tokenizer("a red circle").input_ids)
    assert stock.heatmap("Red").word == "Red"
    with mmattn.swap_attention(pipe), mmattn.record_attention(pipe) as swapped:
        draw()
    assert swapped.array().shape == stock.array().shape == (8, 6, 13)
    assert np.allclose(swapped.array(), stock.array(), atol=1e-4)


@pytest.mark.parametrize("tokens", [None, [3, 15, 20]])
def test_padding_before_the_text_keeps_its_columns(tokens):
    """Of one row the whole text is kept, but of the other not where it stood."""
    model = zoo_dits.build_pixart()
    draw, found = Draw(model), []
    mask = torch.arange(21) >= torch.tensor([0, 7])[:, None]
    states = draw.normal(2, 4, 24, 32), draw.normal(2, 21, zoo_dits.TEXT), torch.tensor([500, 500])
    sizes = {"resolution": None, "aspect_ratio": None}
    for swap in (contextlib.nullcontext, lambda: mmattn.swap_attention(model)):
        with swap(), torch.no_grad(), mmattn.record_attention(model, tokens=tokens) as maps:
            model(*states, sizes, encoder_attention_mask=mask.long())
        found.append([maps.array(row) for row in range(2)])
    assert np.allclose(*found, atol=1e-6)


def test_a_second_text_is_not_taken_for_the_first():
    """AudioLDM 2's, which may be the shorter one."""
    kinds = {"down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "block_out_channels": (8, 16)}
    kinds |= {"up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "cross_attention_dim": ((None, 8, 16),) * 2}
    sizes = {"layers_per_block": 1, "norm_num_groups": 8, "attention_head_dim": 2, "transformer_layers_per_block": 1}
    model = AudioLDM2UNet2DConditionModel(**kinds, **sizes)
    draw = Draw(model)
    texts = {"encoder_hidden_states": draw.normal(1, 9, 8), "encoder_hidden_states_1": draw.normal(1, 7, 16)}
    with torch.no_grad(), mmattn.record_attention(model) as maps:
        model(draw.normal(1, 4, 16, 12), 10, **texts)
    with pytest.raises(UsageError, match="attend to different things: 9 keys in layers .* 7 keys in layers"):
        maps.array()


def test_another_text_on_the_way_is_said(caplog):
    pipe = build("sd")
    other, negative = pipe.encode_prompt(OTHER, "cpu", 1, True, "")

    def change(pipeline, step, time, given):
        return {"prompt_embeds": torch.cat([negative, other])} if step == 1 else given

    def halve(pipeline, step, time, given):
        pipeline._guidance_scale = 0.0
        return {"prompt_embeds": given["prompt_embeds"][-1:]}

    settings = {"callback_on_step_end_tensor_inputs": ["prompt_embeds"], "steps": 4}
    with caplog.at_level(logging.WARNING), mmattn.record_attention(pipe) as maps:
        run(pipe, callback_on_step_end=halve, **settings)
    assert not caplog.messages, "the same prompt without guidance's other half"
    assert set(maps.texts[0].counts.values()) == {4}
    with caplog.at_level(logging.WARNING), mmattn.record_attention(pipe) as maps:
        run(pipe, callback_on_step_end=change, **settings)
    assert len(maps) == 1
    (message,) = caplog.messages
    assert "from step 2 on a picture is drawn from another text: its maps go by the words of the first" in message


def test_views_of_a_panorama_are_not_taken_for_pictures():
    """Several views a batch come as negative, positive, negative, positive; and each is a part of the picture."""
    parts = build("sd").components | {"scheduler": DDIMScheduler()}
    pipe = StableDiffusionPanoramaPipeline(**parts, requires_safety_checker=False)
    refused = pytest.raises(UsageError, match="which rows of StableDiffusionPanoramaPipeline follow the prompt is not")
    with refused, mmattn.record_attention(pipe):
        pass


def test_modular_pipelines():
    parts = build("xl").components
    pipe = StableDiffusionXLAutoBlocks().init_pipeline()
    pipe.update_components(
        **{name: part for name, part in parts.items() if part is not None and name in pipe.components}
    )
    quiet(pipe)

    def draw():
        noise = torch.Generator().manual_seed(1)
        sizes = {"height": 32, "width": 32, "num_inference_steps": 2}
        return pipe(prompt=PROMPT, generator=noise, output="latents", **sizes)

    plain = draw()
    with mmattn.swap_attention(pipe), mmattn.record_attention(pipe, prompts=PROMPT) as maps:
        assert torch.equal(draw(), plain)
    assert len(maps) == 1
    assert set(maps.texts[0].counts.values()) == {2}
    # The halves of guidance are forwards with texts of their own, the conditional one first.
    with mmattn.record_attention(pipe.unet) as alone:
        draw()
    assert len(alone) == 4
    assert np.allclose((alone.array(0) + alone.array(2)) / 2, maps.array(), atol=1e-6)
    assert not np.allclose((alone.array(1) + alone.array(3)) / 2, maps.array(), atol=1e-4)
    # Of a guider's further forwards of a step none is a step of its own.
    skipped = LayerSkipConfig([0], fqn="mid_block.attentions.0.transformer_blocks")
    during = {"skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    pipe.update_components(guider=SkipLayerGuidance(skip_layer_config=skipped, **during))
    with mmattn.record_attention(pipe, views="step") as maps:
        draw()
        draw()
    assert [(picture.steps, set(picture.counts.values())) for picture in maps.texts] == [([0, 1], {1})] * 2
    with pytest.raises(UsageError, match="guidance='both' is for pipelines whose batch has two halves"):
        mmattn.record_attention(pipe, guidance="both").__enter__()
    with pytest.raises(UsageError, match="StableDiffusionXLModularPipeline has no encode_prompt"):
        mmattn.steer_attention(pipe, weights={"red": 2}).__enter__()


def test_verifying_is_neither_recorded_nor_steered():
    pipe = build("sd")
    swapped = mmattn.swap_attention(pipe)
    with mmattn.steer_attention(pipe, weights={"red": 2}):
        expected = run(pipe)
    with mmattn.record_attention(pipe) as maps, mmattn.steer_attention(pipe, weights={"red": 2}):
        assert swapped.verify().is_ok
        assert torch.equal(run(pipe), expected)
        assert swapped.verify().is_ok
    assert len(maps) == 1
    assert set(maps.texts[0].counts.values()) == {3}
