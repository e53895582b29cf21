"""Classes without an interface: BLIP and TrOCR, whose forward is replaced."""

from __future__ import annotations

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from transformers import TrOCRConfig, VisionEncoderDecoderConfig, VisionEncoderDecoderModel, ViTConfig
from transformers.cache_utils import DynamicCache, EncoderDecoderCache
from transformers.models.blip.modeling_blip_text import BlipTextSelfAttention

from mmattn.errors import UsageError
from mmattn.ops.observe import observing
from mmattn.ops.tolerance import deviation
from mmattn.swap import swap_attention
from mmattn.swap.transformers import patched

from .test_transformers import assert_same, everything
from .zoo_base import Draw, liven, seeded
from .zoo_transformers import FAMILIES, SPREAD, padded


@seeded
def build_trocr():
    encoder = ViTConfig(
        hidden_size=40, num_hidden_layers=1, num_attention_heads=5, intermediate_size=53, image_size=24, patch_size=8
    )
    decoder = TrOCRConfig(
        d_model=42,
        decoder_layers=2,
        decoder_attention_heads=3,
        decoder_ffn_dim=53,
        vocab_size=101,
        cross_attention_hidden_size=40,
        init_std=SPREAD,
    )
    config = VisionEncoderDecoderConfig.from_encoder_decoder_configs(
        encoder, decoder, decoder_start_token_id=0, pad_token_id=1
    )
    return liven(VisionEncoderDecoderModel(config))


@torch.no_grad()
def run_trocr(model, **settings):
    draw = Draw(model)
    tokens, mask = padded(draw, (11, 4), 1)
    return model(draw.normal(2, 3, 24, 24), decoder_input_ids=tokens, decoder_attention_mask=mask, **settings)


def run_blip(model, **settings):
    draw = Draw(model)
    texts, mask = padded(draw, (11, 4), 0)
    with torch.no_grad():
        return model(pixel_values=draw.normal(2, 3, 48, 48), input_ids=texts, attention_mask=mask, **settings)


def run_marian(model, **settings):
    draw = Draw(model)
    tokens, mask = padded(draw, (11, 4), 100)
    with torch.no_grad():
        return model(tokens, attention_mask=mask, decoder_input_ids=tokens, **settings)


def test_trocr_is_as_near_to_float64_as_stock():
    model = build_trocr()
    before, stock = everything(model), run_trocr(model).logits
    with swap_attention(model) as swap:
        ours = run_trocr(model).logits
        assert swap.verify().is_ok
        assert [layer.role for layer in swap.layers] == ["self", "self", "cross", "self", "cross"]
        assert swap.report().refused == []
    assert deviation(ours, stock, run_trocr(build_trocr().double()).logits).is_within
    assert_same(before, everything(model))


@pytest.mark.parametrize("num_beams", [1, 3])
def test_trocr_generates_the_same_tokens(num_beams):
    model = build_trocr()
    pictures = Draw(model).normal(2, 3, 24, 24)
    settings = {"max_new_tokens": 9, "min_new_tokens": 9, "num_beams": num_beams}
    stock = model.generate(pictures, **settings)
    with swap_attention(model):
        assert torch.equal(model.generate(pictures, **settings), stock)


def test_weights_are_recorded_as_in_stock():
    trocr, marian = build_trocr(), FAMILIES["marian"].build()
    for model in (trocr.encoder, marian):
        model.set_attn_implementation("eager")  # stock's other ones record nothing
    for model, run in ((FAMILIES["blip"].build(), run_blip), (trocr, run_trocr), (marian, run_marian)):
        stock = run(model, output_attentions=True)
        calls = []
        with swap_attention(model), observing(calls.append):
            ours = run(model, output_attentions=True)
            weights = [call.backend for call in calls]
            run(model)
            if model is marian:
                model.set_attn_implementation("sdpa")
                assert len(run(model, output_attentions=True).cross_attentions) == 2
                del calls[-6:]
        names = [name for name in stock if "attentions" in name and stock[name] is not None]
        assert names
        for name in names:
            assert len(stock[name]) == len(ours[name]) > 0
            for wanted, got in zip(stock[name], ours[name], strict=True):
                torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)
        assert set(weights) == {"eager"}  # the only one that has weights
        assert {call.backend for call in calls[len(weights) :]} == {"sdpa"}


def text_attention(model, kind):
    return getattr(model.text_decoder.bert.encoder.layer[0], kind).self


def test_the_callers_mask_of_the_context_counts():
    """Stock's BLIP never passes one; a caller of the module may."""
    model = FAMILIES["blip"].build()
    module, draw = text_attention(model, "crossattention"), Draw(model)
    states, context = draw.normal(2, 7, 48), draw.normal(2, 11, 64)
    lowest = torch.finfo(torch.float32).min
    mask = torch.where(draw.lengths(11, 4).bool(), 0.0, lowest)[:, None, None]
    arguments = {"encoder_hidden_states": context, "encoder_attention_mask": mask, "attention_mask": torch.ones(1)}
    with torch.no_grad():
        stock = module(states, **arguments)[0]
        with swap_attention(model):
            ours = module(states, **arguments)[0]
            assert not torch.allclose(module(states, encoder_hidden_states=context)[0], ours)
    torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["attention", "crossattention"])
@pytest.mark.parametrize("make", [DynamicCache, lambda: EncoderDecoderCache(DynamicCache(), DynamicCache())])
def test_caches_are_filled_and_read_as_in_stock(kind, make):
    model = FAMILIES["blip"].build()
    module, draw = text_attention(model, kind), Draw(model)
    states = [draw.normal(2, length, 48) for length in (5, 1)]
    context = {"encoder_hidden_states": draw.normal(2, 11, 64)} if kind == "crossattention" else {}

    def run():
        cache, outputs = make(), []
        with torch.no_grad():
            outputs = [module(each, cache=cache, **context)[0] for each in states]
        parts = [cache.self_attention_cache, cache.cross_attention_cache] if hasattr(cache, "is_updated") else [cache]
        keys = [layer.keys for part in parts for layer in part.layers]
        return outputs, keys, getattr(cache, "is_updated", None)

    stock = run()
    with swap_attention(model):
        ours = run()
    assert ours[2] == stock[2]
    for wanted, got in zip((*stock[0], *stock[1]), (*ours[0], *ours[1]), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_dropout_needs_training():
    model = FAMILIES["blip"].build()
    module, states = text_attention(model, "attention"), Draw(model).normal(2, 7, 48)
    module.dropout.p = 0.5
    with swap_attention(model), torch.no_grad():
        kept = module(states)[0]
        assert torch.equal(module(states)[0], kept)
        module.train()
        assert not torch.equal(module(states)[0], kept)


class Counting(ModelHook):
    def __init__(self):
        self.count = 0

    def pre_forward(self, module, *args, **kwargs):
        self.count += 1
        return args, kwargs


def test_hooks_of_accelerate_go_on_running():
    model = FAMILIES["blip"].build()
    module, hook = text_attention(model, "attention"), Counting()
    stock = run_blip(model).logits
    add_hook_to_module(module, hook)
    before = everything(model)
    calls = []
    with swap_attention(model), observing(calls.append):
        torch.testing.assert_close(run_blip(model).logits, stock, rtol=1e-5, atol=1e-5)
    assert hook.count == 1
    assert module in [call.caller for call in calls]
    assert_same(before, everything(model))
    remove_hook_from_module(module)
    assert torch.equal(run_blip(model).logits, stock)


def test_a_forward_of_somebody_else_is_left_alone():
    model = FAMILIES["blip"].build()
    text_attention(model, "attention").forward = print
    with swap_attention(model) as swap:
        assert [layer.refused for layer in swap.report().refused] == [
            "BlipTextSelfAttention: somebody has replaced its forward by builtin_function_or_method"
        ]


def test_another_versions_forward_is_left_alone(monkeypatch):
    monkeypatch.setattr(patched, "__version__", "6.1.0")
    monkeypatch.setattr(BlipTextSelfAttention, "forward", lambda self, hidden_states, past, **keywords: None)
    model = FAMILIES["blip"].build()
    with pytest.raises(UsageError) as error:
        swap_attention(model, role="cross")
    reason = "BlipTextSelfAttention: its forward is not the one of transformers 5.24 (found 6.1.0)"
    assert str(error.value) == "swap_attention: 2 of 2 layers must be left alone: " + "; ".join(
        f"model.text_decoder.bert.encoder.layer.{index}.crossattention.self: {reason}" for index in (0, 1)
    )


def test_a_subclass_is_not_taken_for_the_class():
    class MyAttention(BlipTextSelfAttention):
        def forward(self, hidden_states, **keywords):
            return hidden_states, None

    model = FAMILIES["blip"].build()
    text_attention(model, "attention").__class__ = MyAttention
    with swap_attention(model) as swap:
        assert [layer.refused for layer in swap.report().refused] == [
            "MyAttention: computes its attention itself, not through transformers' attention interface"
        ]
