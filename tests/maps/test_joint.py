"""Joint attention: the part of the picture's places over the text's tokens, of Stable Diffusion 3 and FLUX.1."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import ChromaPipeline, ChromaTransformer2DModel, FluxKontextPipeline
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

from mmattn import record_attention, swap_attention
from mmattn.errors import UsageError
from tests.swap import zoo_dits
from tests.swap.zoo_base import liven, quiet, seeded
from tests.tolerance import check_within

from .joint_pipelines import CLIP_TOKENS, T5_TOKENS, flux, joint_weights, stable_diffusion_3

PROMPTS = ["a red circle", "a blue star below"]
STEPS = 3
TEXT = {"sd3": CLIP_TOKENS + T5_TOKENS, "flux": T5_TOKENS}
PLACES = {"sd3": (12, 8), "flux": (12, 8)}


@pytest.fixture(scope="module")
def pipes():
    return {"sd3": stable_diffusion_3(), "flux": flux()}


def draw(pipe, prompts=PROMPTS, **changes):
    settings = {"num_inference_steps": STEPS, "guidance_scale": 5.0, "height": 48, "width": 32, "output_type": "latent"}
    settings |= {"generator": torch.Generator().manual_seed(0), "max_sequence_length": T5_TOKENS}
    return pipe(prompts, **settings | changes).images


def check_maps(maps, run, name, model, *, rows):
    """Recorded weights beside those written out, averaged as the recorder does."""
    names = maps.layer_names
    with joint_weights(model, names, torch.float64) as reference:
        run()
    with joint_weights(model, names, torch.float32) as eager:
        run()
    text, count = TEXT[name], PLACES[name][0] * PLACES[name][1]
    both = slice(0, count), slice(count, None)
    places, tokens = both if name == "sd3" else (slice(text, text + count), slice(0, text))
    for number in names:
        assert len(reference[number]) == STEPS
        for picture, row in zip(maps.texts, rows, strict=True):
            expected, low = (
                torch.stack(found[number])[:, row, :, places, tokens].mean(dim=(0, 1)) for found in (reference, eager)
            )
            got = picture.weights[number][0, 0]
            if picture.kept is not None:
                expected, low = expected[:, picture.kept], low[:, picture.kept]
            check_within(got, low, expected, factor=2, what=f"layer {number}", unavoidable=1e-6)


@pytest.mark.parametrize("swapped", [False, True], ids=["stock", "swapped"])
@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_weights_are_true_and_pictures_stay(pipes, name, swapped):
    pipe = pipes[name]
    handle = swap_attention(pipe.transformer) if swapped else None
    plain = draw(pipe)
    with record_attention(pipe) as maps:
        assert torch.equal(draw(pipe), plain)
    if handle is not None:
        handle.restore()
    assert [picture.prompt.text for picture in maps.texts] == PROMPTS
    assert len(maps.layer_names) == {"sd3": 4, "flux": 2}[name], "FLUX's single-stream layers are self-attention"
    assert maps.array(1).shape == (12, 8, TEXT[name])
    share = maps.array(1).sum(-1)
    assert (share > 0).all()
    assert (share < 1).all()
    # Guidance puts SD 3's negative half before; FLUX's batch has none.
    check_maps(maps, lambda: draw(pipe), name, pipe.transformer, rows=[2, 3] if name == "sd3" else [0, 1])


def test_a_word_is_at_the_tokens_of_both_kinds_of_encoders(pipes):
    with record_attention(pipes["sd3"], tokens=["star", "circle"]) as maps:
        draw(pipes["sd3"])
    first, second = maps.texts
    t5 = second.also.find("star")[0]
    assert t5[0] > CLIP_TOKENS
    assert second.kept == sorted([*second.prompt.find("star")[0], *t5])
    assert second.words == ["star"]
    heat = maps.heatmap("star", 1)
    assert heat.values.shape == (12, 8)
    assert np.allclose(heat.values, maps.array(1).sum(-1), atol=1e-6)
    assert first.words == ["circle"]
    check_maps(maps, lambda: draw(pipes["sd3"]), "sd3", pipes["sd3"].transformer, rows=[2, 3])
    assert maps.grid(["star"], 1).draw().width > 100


def test_the_pictures_that_kontext_is_given_are_no_places_of_the_one_it_draws(pipes):
    pipe = quiet(FluxKontextPipeline(**pipes["flux"].components))
    given = torch.rand(1, 3, 48, 32, generator=torch.Generator().manual_seed(1))

    def run():
        return draw(pipe, given, prompt=PROMPTS, max_area=48 * 32, _auto_resize=False)

    plain = run()
    with record_attention(pipe) as maps:
        assert torch.equal(run(), plain)
    assert maps.array(1).shape == (12, 8, TEXT["flux"])
    check_maps(maps, run, "flux", pipe.transformer, rows=[0, 1])


def test_words_of_flux_are_the_second_prompts(pipes):
    with record_attention(pipes["flux"], tokens="green") as maps:
        draw(pipes["flux"], PROMPTS[:1], prompt_2=["a green square"])
    assert maps.texts[0].prompt.text == "a green square"
    assert maps.texts[0].kept == maps.texts[0].prompt.find("green")[0]


def test_flux_guided_by_a_negative_prompt_has_forwards_of_its_own(pipes):
    settings = {"negative_prompt": ["no green square"] * 2, "true_cfg_scale": 3.0}
    plain = draw(pipes["flux"], **settings)
    with record_attention(pipes["flux"], views=["step"]) as maps:
        assert torch.equal(draw(pipes["flux"], **settings), plain)
    assert [picture.prompt.text for picture in maps.texts] == PROMPTS
    assert maps.texts[0].steps == [0, 1, 2]
    assert set(maps.texts[0].counts.values()) == {1}
    with (
        pytest.raises(UsageError, match="guidance='both' is for pipelines whose batch has two halves, not for a Flux"),
        record_attention(pipes["flux"], guidance="both"),
    ):
        pass


def test_chroma_is_guided_in_forwards_of_their_own(pipes):
    parts = {name: pipes["flux"].components[name] for name in ("scheduler", "vae")}
    sizes = {"approximator_num_channels": 16, "approximator_hidden_dim": 24, "approximator_layers": 1}
    config = {
        name: value for name, value in zoo_dits.FLUX.items() if name not in ("guidance_embeds", "pooled_projection_dim")
    }
    transformer = seeded(lambda: liven(ChromaTransformer2DModel(**config, **sizes)))()
    t5 = {"text_encoder": pipes["flux"].text_encoder_2, "tokenizer": pipes["flux"].tokenizer_2}
    pipe = quiet(ChromaPipeline(**parts, **t5, transformer=transformer))
    with record_attention(pipe, steps=0) as maps:
        draw(pipe)
    with record_attention(pipe, steps=0) as unguided:
        draw(pipe, guidance_scale=0.0)
    assert [picture.prompt.text for picture in maps.texts] == PROMPTS
    assert np.array_equal(maps.array(1), unguided.array(1))


def test_skipped_layers_of_sd3_are_no_generation_of_their_own(pipes):
    settings = {"skip_guidance_layers": [1], "skip_layer_guidance_start": 0.0, "skip_layer_guidance_stop": 1.0}
    plain = draw(pipes["sd3"], **settings)
    with record_attention(pipes["sd3"], views=["step"]) as maps:
        assert torch.equal(draw(pipes["sd3"], **settings), plain)
    assert [picture.prompt.text for picture in maps.texts] == PROMPTS
    assert maps.texts[0].steps == [0, 1, 2]


@pytest.mark.parametrize("key", ["sd3", "flux"])
def test_a_transformer_by_itself(key):
    family = zoo_dits.FAMILIES[key]
    model = family.build()
    plain = family.run(model)
    with record_attention(model, tokens=[1, 5], layers=0) as maps:
        assert torch.equal(family.run(model), plain)
    assert len(maps) == 2
    assert maps.array().shape == ((12, 16, 2) if key == "sd3" else (9, 12, 2))


def test_an_order_that_is_not_known_is_refused(pipes):
    class Other(torch.nn.Module):
        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None):
            return FluxAttnProcessor()(attn, hidden_states, encoder_hidden_states, attention_mask, image_rotary_emb)

    model = zoo_dits.FAMILIES["flux"].build()
    model.transformer_blocks[0].attn.processor = Other()
    message = r"transformer_blocks.0.attn attends to text and picture in one softmax, and in which order .* Other"
    with pytest.raises(UsageError, match=message), record_attention(model):
        pass
    with record_attention(model, layers=1) as maps:
        zoo_dits.FAMILIES["flux"].run(model)
    assert len(maps) == 2
