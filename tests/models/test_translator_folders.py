"""Opening and saving translators: our own format, strictness, pickles, variants; every refusal by its message."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mmattn.errors import CheckpointError
from mmattn.models.translator import open_network, save_network
from mmattn.nn import convert_kv_heads, fuse
from tests.models.tiny_translator import FORMS, batch, tiny_config, tiny_network, tokens
from tests.parity.translator_stock import save_stock, stock_model

SHARED = "model.shared.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A stock Marian folder."""
    return save_stock(stock_model("marian"), tmp_path / "stock")


def _edit(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")


def _edit_config(folder: Path, **values: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def _assert_equal(network: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    found = network.state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())


@torch.no_grad()
@pytest.mark.parametrize("form", [name for name in FORMS if name not in ("marian", "two vocabularies")])
def test_our_own_forms_come_back_bit_equal(form, tmp_path):
    network = tiny_network(tiny_config(**FORMS[form], label_smoothing=0.1, alignment_heads=[1, 5]))
    save_network(network, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "mmattn_translator"
    again = open_network(tmp_path)
    assert not again.training
    assert again.config == network.config
    _assert_equal(again, network.state_dict())
    ids, mask = batch(2, 7)
    target = tokens(4, 5)
    assert torch.equal(again(ids, target, source_mask=mask).logits, network(ids, target, source_mask=mask).logits)


@pytest.mark.parametrize("form", ["marian", "rotary, grouped heads"])
def test_an_opened_network_can_be_trained(form, tmp_path):
    save_network(tiny_network(tiny_config(**FORMS[form])), tmp_path)
    network = open_network(tmp_path).train()
    ids, mask = batch(2, 7)
    network(ids, tokens(2, 5), source_mask=mask, labels=tokens(2, 5)).loss_sum.backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_alignment_settings_survive_a_stock_folder(tmp_path):
    network = tiny_network(tiny_config(alignment_layer=0, alignment_heads=[2, 3]))
    save_network(network, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "marian"
    again = open_network(tmp_path).config
    assert (again.alignment_layer, again.alignment_heads) == (0, [2, 3])


def test_missing_extra_and_mis_shaped_tensors_are_listed_in_one_line(folder):
    def change(tensors):
        del tensors["model.encoder.layers.1.fc1.bias"]
        tensors["model.surprise"] = torch.zeros(3)
        tensors["model.decoder.layers.0.fc2.weight"] = torch.zeros(30, 43)

    _edit(folder, change)
    with pytest.raises(CheckpointError) as caught:
        open_network(folder)
    message = str(caught.value)
    assert "\n" not in message
    assert str(folder) in message
    assert "1 missing: model.encoder.layers.1.fc1.bias" in message
    assert "1 not known: model.surprise" in message
    assert "1 of another shape: model.decoder.layers.0.fc2.weight is [30, 43], not [30, 41]" in message


def test_tensors_that_older_files_hold_may_be_there(folder):
    """Tied copies and position tables, as in the files of the OPUS-MT checkpoints."""
    expected = open_network(folder).state_dict()

    def change(tensors):
        for name in ("model.encoder.embed_tokens.weight", "model.decoder.embed_tokens.weight", "lm_head.weight"):
            tensors[name] = tensors[SHARED].clone()
        for side in ("encoder", "decoder"):
            tensors[f"model.{side}.embed_positions.weight"] = torch.zeros(53, 30)

    _edit(folder, change)
    _assert_equal(open_network(folder), expected)
    _edit(folder, lambda tensors: tensors.pop(SHARED))
    _assert_equal(open_network(folder), expected)
    _edit(folder, lambda tensors: tensors["lm_head.weight"].add_(1))
    _edit(folder, lambda tensors: tensors.update({SHARED: tensors["model.encoder.embed_tokens.weight"].clone()}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight must equal model\.shared\.weight, to which it is tied"):
        open_network(folder)


def test_a_pickle_of_tensors_is_announced(folder, caplog):
    expected = open_network(folder).state_dict()
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with caplog.at_level(logging.WARNING):
        network = open_network(folder)
    assert "pytorch_model.bin is a pickle, not safetensors" in caplog.text
    _assert_equal(network, expected)


def test_a_variant_is_opened_by_name(folder):
    (folder / "model.safetensors").rename(folder / "model.fp16.safetensors")
    with pytest.raises(CheckpointError, match=r"no weights, looked for model\.safetensors"):
        open_network(folder)
    open_network(folder, variant="fp16")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model_type": "blip"}, "model_type blip is not a translator .*: marian, m2m_100 and mmattn_translator can"),
        ({"model_type": "t5"}, "model_type t5 is not a translator"),
        ({"architectures": ["MarianForCausalLM"]}, "MarianForCausalLM is not supported, only MarianMTModel"),
        ({"activation_function": "tanh"}, "activation_function tanh: only gelu, .* can be used"),
        ({"pad_token_id": None}, "pad_token_id is None, one token id is needed"),
        ({"eos_token_id": [0, 1]}, r"eos_token_id is \[0, 1\], one token id is needed"),
        ({"decoder_attention_heads": 4}, "embed_dim 30 is not divisible by decoder_heads 4"),
        ({"d_model": "wide"}, "no marian config"),
        ({"pad_token_id": 97}, "pad_token_id 97 is outside the vocabulary of 97"),
        ({"alignment_layer": 7}, "alignment_layer 7: there are 3 decoder layers"),
    ],
    ids=str,
)
def test_configs_that_cannot_be_opened_are_named(folder, values, message):
    _edit_config(folder, **values)
    with pytest.raises(CheckpointError, match=message) as caught:
        open_network(folder)
    assert "\n" not in str(caught.value)
    assert str(folder) in str(caught.value)


def test_own_configs_that_cannot_be_opened_are_named(tmp_path):
    save_network(tiny_network(tiny_config(positions="rotary")), tmp_path)
    _edit_config(tmp_path, embed_dmi=3)
    with pytest.raises(CheckpointError, match="no such field: embed_dmi; known: "):
        open_network(tmp_path)


def test_a_network_with_adapters_is_not_saved(tmp_path):
    network = tiny_network(tiny_config())
    layer = network.decoder.layers[0]
    layer.ffn.up_proj = nn.Sequential(layer.ffn.up_proj)
    with pytest.raises(CheckpointError, match=r"merge or remove adapters first: 2 not in the format: .*up_proj\.0\."):
        save_network(network, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_converted_heads_are_saved_when_the_config_says_so(tmp_path):
    network = tiny_network(tiny_config())
    convert_kv_heads(network.decoder, 2)
    with pytest.raises(CheckpointError, match=r"k_proj\.weight is \[12, 36\], its config says \[36, 36\]"):
        save_network(network, tmp_path)
    network.config.decoder_kv_heads = 2
    save_network(network, tmp_path)
    again = open_network(tmp_path)
    assert again.config.decoder_kv_heads == 2
    _assert_equal(again, network.state_dict())


@torch.no_grad()
def test_a_fused_network_translates_and_saves_as_before(tmp_path):
    network = tiny_network(tiny_config())
    ids, mask = batch(2, 7)
    target = tokens(2, 5)
    expected = network(ids, target, source_mask=mask).logits
    save_network(network, tmp_path / "before")
    fuse(network)
    torch.testing.assert_close(network(ids, target, source_mask=mask).logits, expected, rtol=1e-4, atol=1e-5)
    save_network(network, tmp_path / "after")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("before", "after"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], tensor) for name, tensor in after.items())
