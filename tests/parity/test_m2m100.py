"""Our network against stock `M2M100ForConditionalGeneration` (M2M100, NLLB), the same random weights in both."""

from __future__ import annotations

import pytest
import torch

from tests.parity.translator_stock import check_gradients, check_states_and_logits, sources, targets, trio

FORMS = {
    "as NLLB": {},
    "embeddings not scaled": {"scale_embedding": False},
    "swish": {"activation_function": "swish"},
    "another padding token, so another first position": {"pad_token_id": 5},
    "an output matrix of its own": {"tie_word_embeddings": False},
}


@pytest.mark.parametrize("form", FORMS)
def test_states_and_logits_are_stocks(form, tmp_path):
    check_states_and_logits(trio(tmp_path, "m2m100", **FORMS[form]))


def test_gradients_of_the_loss_are_stocks(tmp_path):
    check_gradients(trio(tmp_path, "m2m100"))


@torch.no_grad()
def test_padding_on_the_left_does_not_move_positions(tmp_path):
    """As fairseq counts them: the first real token is at the first position wherever it stands."""
    models = trio(tmp_path, "m2m100")
    config = models.stock.config
    ids, _ = sources(config, rows=2, length=7)
    target = targets(config, rows=1)
    expected = models.ours(ids[:1], target).logits
    padded = torch.cat((ids.new_full((1, 4), config.pad_token_id), ids[:1]), dim=1)
    mask = padded != config.pad_token_id
    torch.testing.assert_close(models.ours(padded, target, source_mask=mask).logits, expected, rtol=1e-4, atol=1e-5)
    stock = models.stock(input_ids=padded, attention_mask=mask.long(), decoder_input_ids=target).logits
    torch.testing.assert_close(expected, stock, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_the_longest_source_and_target_are_stocks(tmp_path):
    models = trio(tmp_path, "m2m100")
    config = models.stock.config
    length = config.max_position_embeddings
    ids, _ = sources(config, rows=1, length=length)
    target = targets(config, rows=1, length=length)
    expected = models.stock(input_ids=ids, decoder_input_ids=target).logits
    torch.testing.assert_close(models.ours(ids, target).logits, expected, rtol=1e-4, atol=1e-5)
