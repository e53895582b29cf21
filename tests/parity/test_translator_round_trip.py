"""What we save, stock classes open with equal tensors and logits; what stock saves, we give back as it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mmattn.models.translator import TranslatorConfig, TranslatorNetwork, family_of, open_network, save_network
from tests.parity.translator_stock import CLASSES, CONFIGS, VOCAB, save_stock, sources, stock_model, targets

FORMS = {
    "marian": ("marian", {}),
    "marian, swapped activation names": ("marian", {"activation_function": "silu"}),
    "marian, untied": ("marian", {"tie_word_embeddings": False}),
    "marian, two vocabularies": ("marian, two vocabularies", {}),
    "marian, two vocabularies, untied": ("marian, two vocabularies", {"tie_word_embeddings": False}),
    "m2m100": ("m2m100", {}),
    "m2m100, untied": ("m2m100", {"tie_word_embeddings": False, "pad_token_id": 5}),
}
M2M100_FORM = {
    "norm_first": True,
    "positions": "tensor2tensor",
    "logits_bias": False,
    "pad_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
    "position_offset": 2,
    "activation": "relu",
}


def own_config(**overrides) -> TranslatorConfig:
    values = {
        "vocab_size": VOCAB,
        "embed_dim": 30,
        "encoder_layers": 2,
        "decoder_layers": 3,
        "encoder_heads": 3,
        "decoder_heads": 5,
        "encoder_ffn_dim": 37,
        "decoder_ffn_dim": 41,
        "max_positions": 53,
        "pad_token_id": VOCAB - 1,
        "decoder_start_token_id": VOCAB - 1,
    }
    return TranslatorConfig(**values | overrides)


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_stock_opens_what_we_save_with_equal_tensors_and_logits(form, tmp_path):
    kind, overrides = FORMS[form]
    stock = stock_model(kind, **overrides)
    save_network(open_network(save_stock(stock, tmp_path / "stock")), tmp_path / "ours")
    again, report = type(stock).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    expected = stock.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    ids, mask = sources(stock.config)
    arguments = {
        "input_ids": ids,
        "attention_mask": mask.long(),
        "decoder_input_ids": targets(stock.config),
    }
    assert torch.equal(again.eval()(**arguments).logits, stock(**arguments).logits)


@pytest.mark.parametrize("form", FORMS)
def test_the_file_is_the_stock_file(form, tmp_path):
    kind, overrides = FORMS[form]
    save_network(open_network(save_stock(stock_model(kind, **overrides), tmp_path / "stock")), tmp_path / "ours")
    stock, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "ours"))
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("stock", "ours")]
    # Marian has one number of layers for both sides; what stock itself never writes may be there.
    assert configs[0].items() <= configs[1].items()
    assert set(configs[1]) - set(configs[0]) <= {"num_hidden_layers"}
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [
        own_config(),
        own_config(logits_bias=False),
        own_config(tie_word_embeddings=False),
        own_config(target_vocab_size=VOCAB + 4),
        own_config(**M2M100_FORM),
        own_config(**M2M100_FORM, tie_word_embeddings=False),
    ],
    ids=["marian", "without bias", "untied", "two vocabularies", "m2m100", "m2m100, untied"],
)
def test_a_network_from_scratch_is_a_stock_folder(config, tmp_path):
    torch.manual_seed(0)
    network = TranslatorNetwork(config).eval()
    for parameter in network.parameters():
        if parameter.dim() == 1:
            parameter.add_(0.2 * torch.randn_like(parameter))
    if config.logits_bias:
        network.decoder.head.bias.normal_()
    family = family_of(config)
    assert family is not None
    save_network(network, tmp_path)
    opener = next(each for each in CLASSES.values() if each.__name__ == family.stock_class)
    stock, report = opener.from_pretrained(tmp_path, output_loading_info=True)
    unexplained = {name: found for name, found in report.items() if found}
    if not config.logits_bias and family.has_logits_bias:
        # A buffer of zeros: stock makes it by itself.
        assert unexplained.pop("missing_keys", {"final_logits_bias"}) == {"final_logits_bias"}
    assert not unexplained
    ids, mask = sources(stock.config)
    target = targets(stock.config)
    expected = stock.eval()(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(network(ids, target, source_mask=mask).logits, expected, rtol=1e-4, atol=1e-5)
    again = open_network(tmp_path)
    assert torch.equal(again(ids, target, source_mask=mask).logits, network(ids, target, source_mask=mask).logits)


@pytest.mark.parametrize(
    ("overrides", "family"),
    [
        ({}, "marian"),
        ({"encoder_kv_heads": 3, "decoder_kv_heads": 5}, "marian"),
        ({"activation": "gelu_tanh"}, "marian"),
        (M2M100_FORM, "m2m_100"),
        (M2M100_FORM | {"pad_token_id": 7, "position_offset": 8}, "m2m_100"),
        (M2M100_FORM | {"position_offset": 0}, None),
        (M2M100_FORM | {"logits_bias": True}, None),
        (M2M100_FORM | {"target_vocab_size": VOCAB}, None),
        ({"norm_first": True}, None),
        ({"positions": "tensor2tensor"}, None),
        ({"positions": "learned"}, None),
        ({"positions": "rotary"}, None),
        ({"position_offset": 1}, None),
        ({"decoder_kv_heads": 1}, None),
        ({"encoder_kv_heads": 1}, None),
        ({"activation": "swiglu"}, None),
        ({"norm_eps": 1e-6}, None),
    ],
    ids=str,
)
def test_which_stock_class_can_say_a_config(overrides, family):
    found = family_of(own_config(**overrides))
    assert (None if found is None else found.model_type) == family


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("auto", torch.bfloat16)])
@pytest.mark.parametrize("kind", CONFIGS)
def test_half_precision_weights_are_float32_unless_asked(kind, dtype, expected, tmp_path):
    ours = open_network(save_stock(stock_model(kind).bfloat16(), tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in ours.parameters()} == {expected}
    save_network(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
