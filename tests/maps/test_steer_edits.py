"""Which columns an edited prompt takes, and everything that is refused."""

from __future__ import annotations

import logging

import pytest
import torch

import mmattn
from mmattn.errors import RunError, UsageError
from mmattn.maps import PromptEdit
from mmattn.maps.edits import edit_columns
from mmattn.models.unet import UNet
from tests.swap.zoo_base import quiet

from .steered import EDITED, PROMPT, build, run
from .test_steer_changes import tokens

LENGTH = 11


def columns(kind: str, source: str, edited: str, **weights: float):
    return edit_columns(PromptEdit(kind, weights=weights), tokens(source), tokens(edited), LENGTH)  # pyright: ignore


def test_words_swapped_for_words_of_as_many_tokens_keep_their_columns():
    found = columns("replace", "a red cir-cle", "a blue squ-are")
    assert torch.equal(found.taken, torch.eye(LENGTH))
    assert found.own is None


@pytest.mark.parametrize("pair", [("a red ring", "a dark-blue ring"), ("a dark-blue-ish ring", "a red ring")])
def test_a_replaced_map_still_sums_to_one(pair):
    found = columns("replace", *pair)
    assert torch.allclose(found.taken.sum(1), torch.ones(LENGTH))
    assert found.own is None


def test_a_word_dropped_and_a_word_added():
    found = columns("refine", "a small red ring", "a red ring above")
    wanted = torch.zeros(LENGTH, LENGTH)
    for source, target in ((0, 0), (1, 1), (3, 2), (4, 3), (5, 5), *((place, place) for place in range(6, LENGTH))):
        wanted[source, target] = 1
    assert torch.equal(found.taken, wanted)
    assert found.own.nonzero().flatten().tolist() == [4]


def test_nothing_to_change():
    for kind in ("replace", "refine"):
        assert columns(kind, "a red ring", "a red ring") is None
        assert columns(kind, "a red ring", "a red ring", red=1.0) is None
        assert columns(kind, "a red ring", "a red ring", red=2.0) is not None


@pytest.mark.parametrize(
    ("kind", "source", "edited", "message"),
    [
        ("replace", "a red ring", "a ring", "'a red ring' has 3 words and 'a ring' has 2; use 'refine'"),
        ("refine", "red ring", "blue square", "have no word in common.*use 'replace'"),
    ],
)
def test_words_that_cannot_be_matched(kind, source, edited, message):
    with pytest.raises(UsageError, match=message):
        columns(kind, source, edited)


def test_reweighting_needs_equal_prompts():
    with pytest.raises(UsageError, match="'reweight' is for two equal prompts, not 'a red ring' and 'a blue ring'"):
        columns("reweight", "a red ring", "a blue ring", ring=2.0)
    with pytest.raises(UsageError, match="'green' is not in 'a red ring'; its words are 'a', 'red', 'ring'"):
        columns("reweight", "a red ring", "a red ring", green=2.0)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "swap"}, "kind is 'swap'; choose one of replace, refine, reweight"),
        ({"cross_steps": 1.5}, "cross_steps is 1.5; it is a share of the steps"),
        ({"self_steps": True}, "self_steps is True"),
        ({"max_self_tokens": 1.5}, "max_self_tokens is 1.5; it must be a whole number"),
        ({"weights": {"red": float("inf")}}, "the weight of 'red' is inf; it must be a finite number"),
        ({"kind": "reweight"}, "'reweight' needs weights"),
    ],
)
def test_edits_that_cannot_be(settings, message):
    with pytest.raises(UsageError, match=message):
        PromptEdit(**settings)


@pytest.fixture(scope="module")
def pipe():
    return build("sd")


def refused(pipe, message: str, **wanted) -> None:
    with pytest.raises(UsageError, match=message), mmattn.steer_attention(pipe, **wanted):
        pytest.fail("it was taken")


def test_arguments_that_cannot_be(pipe):
    refused(pipe, "nothing to steer; give weights, regions or edit")
    refused(pipe, "the weight of 'red' is nan; it must be a finite number of 0 or more", weights={"red": float("nan")})
    refused(pipe, "the weight of 'red' is -1; it must be a finite number of 0 or more", weights={"red": -1})
    refused(pipe, "the weight of 'red' is 'much'", weights={"red": "much"})
    refused(pipe, "weights has ' ' for a word", weights={" ": 2})
    refused(pipe, "weights is a list; give words with numbers", weights=["red"])
    refused(pipe, "reaches outside the picture", regions={"red": (0, 0, 2, 1)})
    refused(pipe, "end_weight is for regions, and there are none", weights={"red": 2}, end_weight=0.5)
    box = {"red": (0, 0, 0.5, 1)}
    refused(pipe, "weight of 'end_weight' is -1; it must be a finite number of 0", regions=box, end_weight=-1)
    refused(pipe, "steps is 2; it is a share of the steps", weights={"red": 2}, steps=2)
    refused(pipe, "steps is for weights and regions; PromptEdit has", edit="replace", steps=0.5)
    refused(pipe, "edit is 'swap'; give 'replace', 'refine' or a PromptEdit", edit="swap")
    refused(pipe, r"use PromptEdit\(weights=...\) with an edit", edit="replace", weights={"red": 2})
    refused(pipe.unet, "takes a pipeline with a UNet2DConditionModel.*not a UNet2DConditionModel", weights={"red": 2})
    refused(torch.nn.Linear(2, 3), "takes a pipeline with a UNet2DConditionModel", weights={"red": 2})


def test_words_that_are_not_there(pipe):
    listed = "'a', 'red', 'circle', 'above', 'blue', 'square'"
    for wanted, what in (({"weights": {"green": 2}}, "weights"), ({"regions": {"green": (0, 0, 0.5, 1)}}, "regions")):
        message = f"steer_attention: {what}: 'green' is not in '{PROMPT}'; its words are {listed}"
        with mmattn.steer_attention(pipe, **wanted), pytest.raises(UsageError, match=message):
            run(pipe)
    with mmattn.steer_attention(pipe, weights={"gree": 2}), pytest.raises(UsageError, match="'gree' is not in"):
        run(pipe, "a green circle")
    long = "a red circle above a blue square above a green star"
    message = r"'star' is not in .*the text encoder takes 11 tokens, the rest was cut"
    with mmattn.steer_attention(pipe, weights={"star": 2}), pytest.raises(UsageError, match=message):
        run(pipe, long)
    # Each prompt of a call must have the word.
    with mmattn.steer_attention(pipe, weights={"red": 2}), pytest.raises(UsageError, match="'red' is not in 'a star'"):
        run(pipe, [PROMPT, "a star"])


def test_rows_that_are_no_pairs(pipe):
    with mmattn.steer_attention(pipe, edit="replace"):
        with pytest.raises(
            UsageError, match=r"takes prompts in pairs, \[source, edited\], drawn in one batch; here are 3"
        ):
            run(pipe, [PROMPT, EDITED, "a star"])
        with pytest.raises(UsageError, match="has 7 words and 'a star' has 2; use 'refine'"):
            run(pipe, [PROMPT, "a star"])
        with pytest.raises(UsageError, match="start from different noise"):
            pipe([PROMPT, EDITED], num_inference_steps=2, generator=torch.Generator().manual_seed(0))


def test_embeddings_whose_words_are_not_known(pipe):
    text = torch.randn(1, 11, pipe.text_encoder.config.hidden_size)
    message = "did not encode within the block.*give prompts, not embeddings"
    with mmattn.steer_attention(pipe, weights={"red": 2}), pytest.raises(UsageError, match=message):
        pipe(prompt_embeds=text, negative_prompt_embeds=text, num_inference_steps=2)


def test_two_prompts_for_two_text_encoders():
    pipe = build("xl")
    with mmattn.steer_attention(pipe, weights={"red": 2}):
        with pytest.raises(UsageError, match="prompt and prompt_2 differ"):
            run(pipe, PROMPT, prompt_2="a star")
        run(pipe, PROMPT, prompt_2=PROMPT)


def test_layers_that_cannot_be_steered():
    pipe = build("sd")
    pipe.fuse_qkv_projections(vae=False)
    refused(pipe, r"layers cannot be steered: .*FusedAttnProcessor2_0: projections are fused", weights={"red": 2})
    pipe = build("sd")
    with mmattn.swap_attention(pipe, gate=1):
        refused(pipe, "the swap has a gate, which reuses outputs", weights={"red": 2})
    with mmattn.swap_attention(pipe):
        pipe.unet.set_attention_backend("native")
        refused(pipe, r"call reset_attention_backend\(\) first", weights={"red": 2})
        pipe.unet.reset_attention_backend()


def test_compiled_u_nets():
    pipe = build("sd")
    stock = pipe.unet
    pipe.unet = torch.compile(stock)
    refused(pipe, r"the U-Net is compiled.*unet._orig_mod", weights={"red": 2})
    pipe.unet = stock
    stock.compile_repeated_blocks()
    refused(pipe, "the U-Net is compiled", weights={"red": 2})


def test_a_forward_that_is_compiled_behind_our_back(pipe, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with mmattn.steer_attention(pipe, weights={"red": 2}), pytest.raises(RunError, match="no layer of it was steered"):
        run(pipe)


def test_layers_behind_hooks():
    pipe = build("sd")
    layer = pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    layer.forward = layer.forward
    refused(pipe, r"attn2: its forward is replaced, by a hook", weights={"red": 2})


def test_blocks_within_blocks(pipe):
    with mmattn.steer_attention(pipe, weights={"red": 2}):
        refused(pipe, "is being steered already; give everything to one block", weights={"blue": 2})
        run(pipe)


def test_processors_replaced_within_the_block():
    pipe = build("sd")
    with mmattn.steer_attention(pipe, weights={"red": 2}):
        pipe.unet.set_default_attn_processor()
        with pytest.raises(UsageError, match="was replaced within the block; load adapters"):
            run(pipe)


def test_gradient_checkpointing():
    pipe = quiet(build("sd"))
    pipe.unet.enable_gradient_checkpointing()
    text = pipe.encode_prompt(PROMPT, "cpu", 1, False)[0]
    with mmattn.steer_attention(pipe, weights={"red": 2}):
        run(pipe)
        with pytest.raises(UsageError, match="gradient checkpointing runs layers again"):
            pipe.unet(torch.randn(1, 4, 4, 4), 3, text)


def test_a_time_that_is_no_step():
    pipe = build("sd")
    with mmattn.steer_attention(pipe, edit="replace"):
        run(pipe, [PROMPT, EDITED])
        text = pipe.encode_prompt([PROMPT, EDITED], "cpu", 1, False)[0]
        pipe._guidance_scale = 1
        with (
            pytest.raises(RunError, match="given time 3, which is no step of the pipeline's DDIMScheduler"),
            torch.no_grad(),
        ):
            pipe.unet(torch.randn(2, 4, 4, 4), 3, text)


def test_a_block_in_which_nothing_ran(pipe, caplog):
    with caplog.at_level(logging.WARNING), mmattn.steer_attention(pipe, weights={"red": 2}):
        pass
    assert "the U-Net did not run within the block" in caplog.text
    assert mmattn.steer_attention is not None
    assert not isinstance(pipe.unet, UNet)
