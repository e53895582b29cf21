"""Maps of transformers models: the weights that eager attention returns, on outputs that do not change."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from mmattn import record_attention, swap_attention
from mmattn.errors import UsageError
from mmattn.maps.recordings import RecordedPair, RecordedText
from tests.swap.test_transformers_patched import build_trocr, run_trocr
from tests.swap.zoo_base import Draw
from tests.swap.zoo_transformers import FAMILIES, VOCAB, padded

NAMES = ["marian", "t5", "bart", "nllb", "whisper", "blip", "mllama"]
SOURCES = (13, 7, 2)


def build(name, implementation="sdpa"):
    model = FAMILIES[name].build()
    if name != "blip":  # which has eager attention only
        model.set_attn_implementation(implementation)
    return model


@torch.no_grad()
def eager_weights(name, **inputs):
    """What stock returns with `output_attentions`, [layers][R, H, L, Lk]."""
    model = build(name, "eager")
    found = model(**inputs, output_attentions=True)
    return found.cross_attentions


def translator_inputs(model):
    draw, pad = Draw(model), model.config.pad_token_id
    ids, mask = padded(draw, SOURCES, pad)
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("swapped", [False, True], ids=["stock", "swapped"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES)
def test_outputs_stay_and_rows_sum_to_one(name, implementation, swapped):
    family, model = FAMILIES[name], build(name, implementation)
    handle = swap_attention(model) if swapped else None
    plain = family.run(model)
    hooks = [(dict(each._forward_hooks), dict(each._forward_pre_hooks), set(vars(each))) for each in model.modules()]
    with record_attention(model) as maps:
        assert torch.equal(family.run(model), plain)
    after = [(dict(each._forward_hooks), dict(each._forward_pre_hooks), set(vars(each))) for each in model.modules()]
    assert hooks == after
    assert handle is None or handle.check() == []
    assert len(maps) == len(plain)
    for recorded in maps.texts:
        for weights in recorded.weights.values():
            assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)


@pytest.mark.parametrize("name", ["marian", "t5", "bart", "nllb"])
def test_translators_give_the_weights_that_eager_returns(name):
    model = build(name)
    inputs = translator_inputs(model)
    targets = Draw(model, seed=5).integers(VOCAB - 1, 3, 11, low=3)
    expected = eager_weights(name, **inputs, decoder_input_ids=targets)
    with record_attention(model) as maps, torch.no_grad():
        model(**inputs, decoder_input_ids=targets)
    assert list(maps.texts[0].weights) == list(range(len(expected)))
    for layer, weights in enumerate(expected):
        for row in range(3):
            assert torch.allclose(maps.texts[row].weights[layer], weights[row], atol=2e-6)
    first = maps.texts[1]
    assert isinstance(first, RecordedPair)
    assert first.target.ids == tuple(targets[1].tolist())
    assert first.source.ids == tuple(inputs["input_ids"][1, :7].tolist()), "padding is no word"
    alignment = maps.alignment(1)
    assert alignment.source == [str(number) for number in first.source.ids]
    assert alignment.target == [str(number) for number in targets[1, 1:].tolist()]
    # The query of a token chose the one after it.
    assert np.allclose(alignment.weights, maps.array(1)[:-1, :7], atol=1e-6)


@torch.no_grad()
def test_weights_of_trocr_which_asks_no_interface():
    model = build_trocr()
    expected = run_trocr(model, output_attentions=True).cross_attentions
    with record_attention(model) as maps:
        run_trocr(model)
    for row, text in enumerate(maps.texts):
        for layer, weights in enumerate(expected):
            assert torch.equal(text.weights[layer], weights[row, :, : text.weights[layer].shape[1]])
    assert len(maps) == len(expected[0])


@pytest.mark.parametrize("settings", [{}, {"num_beams": 3, "num_return_sequences": 2}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", ["marian", "t5"])
def test_generated_texts_are_read_once_more(name, settings):
    model = build(name)
    inputs = translator_inputs(model)
    wanted = GenerationConfig(max_new_tokens=9, decoder_start_token_id=model.config.decoder_start_token_id, **settings)
    wanted.pad_token_id, wanted.eos_token_id = model.config.pad_token_id, model.config.eos_token_id
    plain = model.generate(**inputs, generation_config=wanted)
    with record_attention(model) as maps:
        tokens = model.generate(**inputs, generation_config=wanted)
    assert torch.equal(plain, tokens)
    assert "generate" not in vars(model)
    assert len(maps) == len(tokens)
    repeats = settings.get("num_return_sequences", 1)
    repeated = {key: value.repeat_interleave(repeats, dim=0) for key, value in inputs.items()}
    expected = eager_weights(name, **repeated, decoder_input_ids=tokens)
    for row, recorded in enumerate(maps.texts):
        length = len(recorded.target)
        assert recorded.target.ids == tuple(tokens[row, :length].tolist())
        for layer, weights in recorded.weights.items():
            assert torch.allclose(weights, expected[layer][row, :, :length], atol=2e-6)


def test_generating_draws_nothing_more():
    model = build("marian").train()
    inputs = translator_inputs(model)
    settings = {"do_sample": True, "max_new_tokens": 5}
    ends = []
    for record in (False, True):
        torch.manual_seed(0)
        if record:
            with record_attention(model):
                model.generate(**inputs, **settings)
        else:
            model.generate(**inputs, **settings)
        ends.append(torch.rand(3))
    assert torch.equal(*ends)
    assert model.training


@torch.no_grad()
def test_pictures_of_blip():
    model = build("blip")
    draw = Draw(model)
    pixels, texts = draw.normal(2, 3, 48, 48), draw.integers(VOCAB - 3, 2, 7, low=3)
    expected = model.text_decoder(
        texts, encoder_hidden_states=model.vision_model(pixels).last_hidden_state, output_attentions=True
    ).cross_attentions
    with record_attention(model) as maps:
        model(pixel_values=pixels, input_ids=texts)
        model.generate(pixel_values=pixels, max_new_tokens=5)
    assert len(maps) == 4
    for layer, weights in enumerate(expected):
        assert torch.allclose(maps.texts[1].weights[layer], weights[1], atol=2e-6)
    assert isinstance(maps.texts[0], RecordedText)
    word = str(texts[0, 2].item())
    heat = maps.heatmap(word)
    assert heat.values.shape == (6, 6)
    position = texts[0].tolist().index(int(word))
    assert np.allclose(heat.values.flatten(), maps.array()[position, 1:], atol=1e-6)
    assert maps.texts[2].text.num_given == 1


@torch.no_grad()
def test_sound_of_whisper_and_tiles_of_mllama():
    model = build("whisper")
    sound = Draw(model).normal(2, 20, 150)
    plain = model.generate(sound, max_new_tokens=6)
    with record_attention(model) as maps:
        assert torch.equal(model.generate(sound, max_new_tokens=6), plain)
    assert len(maps) == 2
    alignment = maps.alignment()
    assert len(alignment.source) == 75
    assert len(alignment.pairs()) == len(alignment.target)
    with pytest.raises(UsageError, match="has no words, and is no picture whose rows and columns are known"):
        maps.heatmap("1")
    with record_attention(model) as maps, pytest.raises(UsageError, match="301 frames are generated from window by"):
        model.generate(Draw(model).normal(1, 20, 301))
    model = build("mllama")
    with record_attention(model) as maps:
        FAMILIES["mllama"].run(model)
    assert maps.array().shape == (13, 40)
    with pytest.raises(UsageError, match="no grid of one picture"):
        maps.heatmap("1")


def test_mllama_generation_is_read_again():
    model = build("mllama")
    draw = Draw(model)
    texts = draw.integers(VOCAB - 1, 1, 5, low=3)
    texts[0, 1] = VOCAB
    tiles = torch.ones(1, 1, 4, dtype=torch.long)
    sees = torch.zeros(1, 5, 1, 4, dtype=torch.long)
    sees[:, 1:] = 1
    inputs = {
        "input_ids": texts,
        "attention_mask": torch.ones(1, 5, dtype=torch.long),
        "pixel_values": draw.normal(1, 1, 4, 3, 42, 42),
        "aspect_ratio_ids": torch.tensor([[6]]),
        "aspect_ratio_mask": tiles,
        "cross_attention_mask": sees,
    }
    plain = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    with record_attention(model) as maps:
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert torch.equal(plain, tokens)
    assert maps.array().shape[0] == tokens.shape[1]
    assert maps.texts[0].text.num_given == 5


def test_adapters_are_part_of_what_is_seen():
    model = build("marian")
    config = LoraConfig(r=4, lora_alpha=8, init_lora_weights=False, target_modules=["q_proj", "k_proj", "v_proj"])
    torch.manual_seed(0)
    adapted = get_peft_model(model, config).eval()
    inputs = translator_inputs(adapted)
    targets = Draw(model, seed=5).integers(VOCAB - 1, 3, 11, low=3)
    with torch.no_grad(), record_attention(adapted) as maps:
        adapted(**inputs, decoder_input_ids=targets)
        with adapted.disable_adapter():
            adapted(**inputs, decoder_input_ids=targets)
        model.set_attn_implementation("eager")
        expected = adapted(**inputs, decoder_input_ids=targets, output_attentions=True).cross_attentions
    assert len(maps) == 9
    assert torch.allclose(maps.texts[0].weights[1], expected[1][0], atol=2e-6)
    assert not torch.allclose(maps.texts[0].weights[1], maps.texts[3].weights[1], atol=1e-3)


def test_self_attention_and_labels():
    model = build("marian")
    inputs = translator_inputs(model)
    labels = Draw(model, seed=5).integers(VOCAB - 1, 3, 7, low=3)
    with record_attention(model) as maps, torch.no_grad():
        model(**inputs, labels=labels)
    assert maps.texts[0].target.ids[1:] == tuple(labels[0, :-1].tolist())
    with record_attention(model, role="self", layers="decoder") as maps, torch.no_grad():
        model(**inputs, labels=labels)
    assert np.allclose(np.triu(maps.array(), 1), 0)
    with (
        record_attention(model, role="self"),
        torch.no_grad(),
        pytest.raises(UsageError, match=r"attend to different things \(2 shapes\): choose with layers="),
    ):
        model(**inputs, labels=labels)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"steps": 1}, "steps means nothing for a transformers model"),
        ({"tokens": "a"}, "tokens means nothing for a transformers model"),
        ({"layers": 5}, r"layers has 5, which is not there: there are 0 \(model.decoder.layers.0.encoder_attn\)"),
        ({"layers": [0, 5]}, r"layers has 5, which is not there"),
        ({"layers": []}, r"layers is \[\]; give numbers"),
        ({"heads": 9}, r"heads=\[9\], but there are 4 heads"),
    ],
)
def test_wrong_arguments_are_named(arguments, message):
    model = build("marian")
    with pytest.raises(UsageError, match=message), record_attention(model, **arguments):
        FAMILIES["marian"].run(model)


def test_nothing_recorded_says_why():
    model = build("marian")
    with record_attention(model) as maps:
        pass
    with pytest.raises(UsageError, match=r"forward or generate\(\) did not run within record_attention\(\) \(in this"):
        maps.array()
    vit = FAMILIES["vit"].build()
    with pytest.raises(UsageError, match="ViTModel has no cross-attention that can be read"), record_attention(vit):
        pass
    with pytest.raises(UsageError, match="the model is compiled"), record_attention(torch.compile(model)):
        pass
