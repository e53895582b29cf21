"""What we save, stock classes open with equal tensors; what stock saves, we give back as it was."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from mmattn.models.vlm import build_network, open_network, save_network
from mmattn.models.vlm.blip import config_from_stock, is_blip
from tests.parity.blip_stock import STOCK_CLASSES, blip_config, pixels, save_stock, stock_model, tokens


@pytest.mark.parametrize("task", STOCK_CLASSES)
def test_stock_opens_what_we_save_with_equal_tensors(task, tmp_path):
    stock = stock_model(task)
    save_network(open_network(save_stock(stock, tmp_path / "stock")), tmp_path / "ours")
    again, report = STOCK_CLASSES[task].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    expected = stock.state_dict()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("task", STOCK_CLASSES)
def test_the_file_is_the_stock_file(task, tmp_path):
    save_network(open_network(save_stock(stock_model(task), tmp_path / "stock")), tmp_path / "ours")
    stock, ours = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "ours"))
    assert stock.keys() == ours.keys()
    assert all(torch.equal(stock[name], ours[name]) for name in stock)
    assert json.loads((tmp_path / "ours/config.json").read_text()) == json.loads(
        (tmp_path / "stock/config.json").read_text()
    )
    assert sorted(path.name for path in (tmp_path / "ours").iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize("task", ["captioning", "question_answering"])
def test_a_vocabulary_matrix_of_its_own_survives(task, tmp_path):
    config = blip_config(vision_width=33 if task == "question_answering" else 26, tie_word_embeddings=False)
    config.vision_config.num_attention_heads = 3 if task == "question_answering" else 2
    config.tie_word_embeddings = False
    stock = STOCK_CLASSES[task](config).eval()
    torch.nn.init.normal_(stock.text_decoder.cls.predictions.decoder.bias)
    ours = open_network(save_stock(stock, tmp_path / "stock"))
    save_network(ours, tmp_path / "ours")
    again, report = STOCK_CLASSES[task].from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    for name in ("decoder.weight", "decoder.bias"):
        kept = again.text_decoder.cls.predictions.get_parameter(name)
        assert torch.equal(kept, stock.text_decoder.cls.predictions.get_parameter(name))
    if task == "captioning":
        with torch.no_grad():
            torch.testing.assert_close(
                ours(pixels(2), tokens(2, 7)).logits, stock(pixels(2), tokens(2, 7)).logits, rtol=1e-4, atol=1e-5
            )


def test_a_network_from_scratch_in_blips_form_is_a_blip_folder(tmp_path):
    config = config_from_stock(blip_config().to_dict() | {"architectures": ["BlipForConditionalGeneration"]})
    config.stock = {}
    assert is_blip(config)
    network = build_network(config).eval()
    save_network(network, tmp_path)
    stock, report = STOCK_CLASSES["captioning"].from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    with torch.no_grad():
        torch.testing.assert_close(
            network(pixels(2), tokens(2, 7)).logits, stock.eval()(pixels(2), tokens(2, 7)).logits, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize(("dtype", "expected"), [(None, torch.float32), ("auto", torch.bfloat16)])
def test_half_precision_weights_are_float32_unless_asked(dtype, expected, tmp_path):
    ours = open_network(save_stock(stock_model("captioning").bfloat16(), tmp_path), dtype=dtype)
    assert {parameter.dtype for parameter in ours.parameters()} == {expected}
    save_network(ours, tmp_path / "again")
    assert json.loads((tmp_path / "again/config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
