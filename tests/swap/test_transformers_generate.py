"""Generation with swapped attention: the tokens of stock, greedy and with beams, whatever the cache."""

from __future__ import annotations

import pytest
import torch

from mmattn.ops.observe import observing
from mmattn.swap import swap_attention

from .zoo_base import Draw
from .zoo_transformers import FAMILIES, SOURCES, VOCAB, padded

SEARCHES = {
    "greedy": {"num_beams": 1},
    "beams": {"num_beams": 3},
    "static": {"num_beams": 1, "cache_implementation": "static"},
}


def mllama_inputs(draw: Draw):
    texts, mask = (each.flip(1) for each in padded(draw, (13, 9), 0))  # padded on the left, as for generation
    tiles = draw.lengths(4, 2)
    sees = torch.zeros(2, 13, 1, 4, dtype=torch.long)
    for row, picture in enumerate((1, 5)):
        texts[row, picture] = VOCAB
        sees[row, picture:, 0] = tiles[row]
    return {
        "input_ids": texts,
        "attention_mask": mask,
        "pixel_values": draw.normal(2, 1, 4, 3, 42, 42),
        "aspect_ratio_ids": torch.tensor([[6], [2]]),
        "aspect_ratio_mask": tiles[:, None],
        "cross_attention_mask": sees,
    }


def generate(model, key: str, **settings):
    draw = Draw(model)
    if key == "whisper":
        inputs = {"input_features": draw.normal(2, 20, 150)}
    elif key == "blip":
        inputs = {"pixel_values": draw.normal(2, 3, 48, 48)}
    elif key == "mllama":
        inputs = mllama_inputs(draw)
    else:
        tokens, mask = padded(draw, SOURCES, model.config.pad_token_id)
        inputs = {"input_ids": tokens, "attention_mask": mask}
    lengths = {"max_new_tokens": 11} | ({} if key in ("blip", "mllama") else {"min_new_tokens": 11})
    return model.generate(**inputs, **lengths, do_sample=False, no_repeat_ngram_size=2, **settings)


KEYS = ["marian", "t5", "bart", "nllb", "whisper", "blip", "mllama"]
CASES = [(key, search) for key in KEYS for search in SEARCHES]
CASES.remove(("blip", "static"))  # stock's own BLIP overruns a static cache


@pytest.mark.parametrize(("key", "search"), CASES)
def test_tokens_are_those_of_stock(key, search):
    model, calls = FAMILIES[key].build(), []
    stock = generate(model, key, **SEARCHES[search])
    with swap_attention(model), observing(calls.append):
        ours = generate(model, key, **SEARCHES[search])
    assert torch.equal(ours, stock)
    assert stock.unique().numel() > 3
    assert {call.role for call in calls} == {"self", "cross"}


@pytest.mark.parametrize("role", ["self", "cross"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_one_role_swapped(role, implementation):
    model = FAMILIES["marian"].build()
    model.set_attn_implementation(implementation)
    stock = generate(model, "marian", num_beams=3)
    with swap_attention(model, role=role):
        assert torch.equal(generate(model, "marian", num_beams=3), stock)


def test_keys_and_values_of_the_source_are_projected_once():
    model, calls = FAMILIES["blip"].build(), []
    project = model.text_decoder.bert.encoder.layer[0].crossattention.self.key
    hook = project.register_forward_hook(lambda *_: calls.append(1))
    with swap_attention(model):
        tokens = generate(model, "blip", num_beams=1)
    hook.remove()
    assert tokens.shape[1] > 3
    assert len(calls) == 1
