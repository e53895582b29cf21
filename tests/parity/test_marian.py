"""Our network against stock `MarianMTModel`, the same random weights in both."""

from __future__ import annotations

import pytest
import torch

from mmattn.models.translator import open_network
from tests.parity.translator_stock import (
    check,
    check_gradients,
    check_states_and_logits,
    save_stock,
    sources,
    stock_labels,
    stock_model,
    targets,
    trio,
)

FORMS = {
    "as OPUS-MT": {},
    "embeddings not scaled": {"scale_embedding": False},
    "gelu": {"activation_function": "gelu"},
    "gelu_new": {"activation_function": "gelu_new"},
    "one layer, one head": {
        "encoder_layers": 1,
        "decoder_layers": 1,
        "encoder_attention_heads": 1,
        "decoder_attention_heads": 1,
    },
    "an output matrix of its own": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_states_and_logits_are_stocks(form, tmp_path):
    check_states_and_logits(trio(tmp_path, "marian", **FORMS[form]))


@pytest.mark.parametrize("overrides", [{}, {"tie_word_embeddings": False}], ids=str)
def test_states_and_logits_of_two_vocabularies_are_stocks(overrides, tmp_path):
    models = trio(tmp_path, "marian, two vocabularies", **overrides)
    assert models.ours.config.output_size != models.ours.config.vocab_size
    check_states_and_logits(models)


@pytest.mark.parametrize("kind", ["marian", "marian, two vocabularies"])
def test_gradients_of_the_loss_are_stocks(kind, tmp_path):
    check_gradients(trio(tmp_path, kind))


@torch.no_grad()
def test_the_logits_bias_counts(tmp_path):
    models = trio(tmp_path, "marian")
    ids, mask = sources(models.stock.config)
    target = targets(models.stock.config)
    before = models.ours(ids, target, source_mask=mask).logits
    models.ours.decoder.head.bias.zero_()
    after = models.ours(ids, target, source_mask=mask).logits
    torch.testing.assert_close(before - after, models.stock.final_logits_bias.expand_as(before), rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_file_without_a_logits_bias_is_stock_with_zeros(tmp_path):
    stock = stock_model("marian")
    stock.final_logits_bias.zero_()
    tensors = {name: tensor for name, tensor in stock.state_dict().items() if name != "final_logits_bias"}
    save_stock(stock, tmp_path)
    stock.save_pretrained(tmp_path, state_dict=tensors)
    ours = open_network(tmp_path)
    assert ours.decoder.head.bias is None
    ids, mask = sources(stock.config)
    target = targets(stock.config)
    expected = stock(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(ours(ids, target, source_mask=mask).logits, expected, rtol=1e-4, atol=1e-5)


def test_label_smoothing_is_torchs_over_the_scored_places(tmp_path):
    models = trio(tmp_path, "marian")
    config = models.stock.config
    ids, mask = sources(config)
    target, labels = stock_labels(config)
    models.ours.config.label_smoothing = 0.1
    smoothed = models.ours(ids, target, source_mask=mask, labels=labels)
    losses = []
    for model in (models.stock, models.exact):
        logits = model(input_ids=ids, attention_mask=mask.long(), decoder_input_ids=target).logits
        losses.append(
            torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), labels.flatten(), reduction="sum", label_smoothing=0.1
            )
        )
    check(smoothed.loss_sum[None], losses[0][None], losses[1][None], "smoothed loss")
    is_scored = labels != -100
    assert torch.equal(smoothed.targets, labels[is_scored])


@torch.no_grad()
def test_half_precision_stays_near_stock_in_the_same_type(tmp_path):
    stock = stock_model("marian")
    ours = open_network(save_stock(stock, tmp_path), dtype="bfloat16")
    ids, mask = sources(stock.config)
    target = targets(stock.config)
    arguments = {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": target}
    exact = stock.double()(**arguments).logits
    low = stock.bfloat16()(**arguments).logits
    check(ours(ids, target, source_mask=mask).logits, low, exact, "bfloat16 logits")
