"""Generation with transformers models: padding, encoded sources, threads, interrupts, and what cannot be read again."""

from __future__ import annotations

import threading

import pytest
import torch
from torch.overrides import _get_current_function_mode_stack

from mmattn import record_attention
from mmattn.errors import UsageError
from mmattn.maps import stock_models
from mmattn.ops.observe import OBSERVERS
from tests.swap.zoo_base import Draw
from tests.swap.zoo_transformers import VOCAB

from .test_stock_models import build, eager_weights, translator_inputs


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_padding_that_generate_finds_by_itself_is_not_attended_to(settings):
    model = build("mllama")
    draw, pad = Draw(model), model.config.text_config.pad_token_id
    texts = draw.integers(VOCAB - 1, 2, 7, low=3)
    texts[0, 1], texts[1, 4], texts[1, :3] = VOCAB, VOCAB, pad
    sees = torch.zeros(2, 7, 1, 4, dtype=torch.long)
    sees[0, 1:], sees[1, 4:] = 1, 1
    inputs = {
        "input_ids": texts,
        "pixel_values": draw.normal(2, 1, 4, 3, 42, 42),
        "aspect_ratio_ids": torch.tensor([[6], [6]]),
        "aspect_ratio_mask": torch.ones(2, 1, 4, dtype=torch.long),
        "cross_attention_mask": sees,
    }
    wanted = settings | {"max_new_tokens": 4, "do_sample": False, "pad_token_id": pad}
    found = []
    for mask in ({"attention_mask": (texts != pad).long()}, {}):
        with record_attention(model) as maps:
            tokens = model.generate(**inputs, **mask, **wanted)
        found.append((tokens, maps))
    (tokens, with_mask), (others, without) = found
    assert torch.equal(tokens, others)
    for one, other in zip(with_mask.texts, without.texts, strict=True):
        for number, weights in one.weights.items():
            assert torch.equal(weights, other.weights[number])


def test_padding_that_a_translator_attends_to_is_shown():
    """Without a mask transformers attends to it, and the maps are those of what was run."""
    model = build("marian")
    inputs = translator_inputs(model)
    with record_attention(model) as maps:
        tokens = model.generate(input_ids=inputs["input_ids"], max_new_tokens=7)
    expected = eager_weights("marian", input_ids=inputs["input_ids"], decoder_input_ids=tokens)
    for row, recorded in enumerate(maps.texts):
        for layer, weights in recorded.weights.items():
            assert torch.allclose(weights, expected[layer][row, :, : weights.shape[1]], atol=2e-6)


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
def test_encoded_sources(settings):
    model = build("marian")
    inputs = translator_inputs(model)

    def generate():  # beams repeat the caller's rows in place
        encoded, mask = model.get_encoder()(**inputs), inputs["attention_mask"]
        return model.generate(encoder_outputs=encoded, attention_mask=mask, max_new_tokens=7, **settings)

    plain = generate()
    with record_attention(model) as maps:
        assert torch.equal(generate(), plain)
    with record_attention(model) as expected:
        model.generate(**inputs, max_new_tokens=7, **settings)
    assert len(maps) == len(plain)
    for one, other in zip(maps.texts, expected.texts, strict=True):
        assert one.target.ids == other.target.ids
        for number, weights in one.weights.items():
            assert torch.allclose(weights, other.weights[number], atol=1e-6)


def test_recorders_within_each_other_and_in_other_threads():
    """One reading serves all, and whoever comes first need not be the last to go."""
    model = build("marian")
    inputs = translator_inputs(model)
    with record_attention(model) as outer:
        with record_attention(model, layers=0) as inner:
            model.generate(**inputs, max_new_tokens=5)
        model.generate(**inputs, max_new_tokens=5)
    assert [len(outer), len(inner)] == [6, 3]
    opened, gone = threading.Event(), threading.Event()
    failed = []

    def first():
        try:
            with record_attention(model):
                opened.set()
                assert inside.wait(60)
        except BaseException as error:
            failed.append(error)
        gone.set()

    inside = threading.Event()
    thread = threading.Thread(target=first)
    thread.start()
    assert opened.wait(60)
    with record_attention(model) as maps:
        inside.set()
        assert gone.wait(60)
        model.generate(**inputs, max_new_tokens=5)
    thread.join()
    assert failed == []
    assert len(maps) == 3
    assert "generate" not in vars(model)


@torch.no_grad()
def test_an_interrupt_leaves_nothing_behind():
    model = build("marian")
    inputs = translator_inputs(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    layer = model.model.decoder.layers[0].encoder_attn
    hook = layer.out_proj.register_forward_pre_hook(interrupt)
    with record_attention(model) as maps:
        for call in (lambda: model.generate(**inputs), lambda: model(**inputs, decoder_input_ids=inputs["input_ids"])):
            with pytest.raises(KeyboardInterrupt):
                call()
        hook.remove()
        model.generate(**inputs, max_new_tokens=5)
    assert len(maps) == 3
    assert _get_current_function_mode_stack() == []
    assert OBSERVERS.get() == ()


def test_generations_that_cannot_be_read_again_are_refused_before_they_run():
    model = build("blip")
    draw = Draw(model)
    pixels, texts = draw.normal(2, 3, 48, 48), draw.integers(VOCAB - 3, 2, 5, low=3)
    texts[1, 3:] = model.config.text_config.pad_token_id
    message = r"BlipForConditionalGeneration.generate\(\) is given texts of different lengths without an attention_mask"
    with record_attention(model) as maps, pytest.raises(UsageError, match=message):
        model.generate(pixel_values=pixels, input_ids=texts, max_new_tokens=5)
    assert len(maps) == 0
    model = build("mllama")
    states = Draw(model).normal(1, 5, model.config.text_config.hidden_size)
    with (
        record_attention(model) as maps,
        pytest.raises(UsageError, match=r"generate\(inputs_embeds=...\) returns no tokens of its prompt"),
    ):
        model.generate(inputs_embeds=states, max_new_tokens=5)


def test_a_reading_that_fails_is_said_in_a_line(monkeypatch):
    model = build("marian")
    inputs = translator_inputs(model)
    monkeypatch.setattr(stock_models, "rereading", lambda *_: ({"input_ids": None}, 1))
    with (
        record_attention(model),
        pytest.raises(UsageError, match="texts of MarianMTModel.* cannot be read again .Value"),
    ):
        model.generate(**inputs, max_new_tokens=5)
