"""Our own forms of the translation network: decoding states, shared sources, configs, what is trained."""

from __future__ import annotations

import pytest
import torch

from mmattn.errors import ConfigError, UsageError
from mmattn.models.translator import TranslatorNetwork, cross_attention_parameters
from tests.models.tiny_translator import FORMS, PAD, batch, tiny_config, tiny_network, tokens


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_decoding_steps_give_the_logits_of_the_full_pass(form):
    network = tiny_network(tiny_config(**FORMS[form]))
    ids, mask = batch(2, 7)
    target = tokens(6, 11)
    full = network(ids, target, source_mask=mask).logits
    contexts = network.project_context(network.encode(ids, mask), mask)
    state = network.start(contexts, rows_per_context=3, max_length=11)
    steps = [state.logits(target[:, :4]), *(state.logits(target[:, i : i + 1]) for i in range(4, 11))]
    torch.testing.assert_close(torch.stack(steps, dim=1), full[:, 3:], rtol=1e-4, atol=1e-5)
    assert state.length == 11


@torch.no_grad()
@pytest.mark.parametrize("form", FORMS)
def test_padding_changes_nothing(form):
    network = tiny_network(tiny_config(**FORMS[form]))
    ids, mask = batch(2, 11)
    target = tokens(2, 5)
    padded = network(ids, target, source_mask=mask).logits
    for row in range(2):
        alone = network(ids[row : row + 1, mask[row]], target[row : row + 1]).logits
        torch.testing.assert_close(padded[row : row + 1], alone, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_several_targets_share_a_source():
    network = tiny_network(tiny_config())
    ids, mask = batch(2, 7)
    target = tokens(6, 5)
    shared = network(ids, target, source_mask=mask).logits
    repeated = network(ids.repeat_interleave(3, 0), target, source_mask=mask.repeat_interleave(3, 0)).logits
    torch.testing.assert_close(shared, repeated, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_reorder_and_select_continue_the_right_rows():
    network = tiny_network(tiny_config(decoder_kv_heads=2))
    ids, mask = batch(3, 7)
    start = tokens(3, 4)
    contexts = network.project_context(network.encode(ids, mask), mask)
    state = network.start(contexts, max_length=13)
    state.logits(start)
    state.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
    following = tokens(6, 1, seed=5)
    logits = state.logits(following)
    whole = torch.cat((start.repeat_interleave(2, 0), following), dim=1)
    torch.testing.assert_close(logits, network(ids, whole, source_mask=mask).logits[:, -1], rtol=1e-4, atol=1e-5)
    state.select_contexts(torch.tensor([2, 1]))
    last = tokens(4, 1, seed=6)
    kept = torch.cat((whole[[4, 5, 2, 3]], last), dim=1)
    expected = network(ids[[2, 1]], kept, source_mask=mask[[2, 1]]).logits[:, -1]
    torch.testing.assert_close(state.logits(last), expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_a_window_sees_the_last_tokens_only():
    network = tiny_network(tiny_config(positions="rotary", decoder_layers=1, decoder_heads=3))
    ids, mask = batch(2, 7)
    contexts = network.project_context(network.encode(ids, mask), mask)
    target = tokens(2, 17)
    wide, narrow = (network.start(contexts, max_length=17, window=window) for window in (None, 5))
    for place in range(17):
        full, windowed = (state.logits(target[:, place : place + 1]) for state in (wide, narrow))
        if place < 5:
            torch.testing.assert_close(windowed, full)
        else:
            assert not torch.allclose(windowed, full, atol=1e-4)
    # One rotary layer: what it sees of the last tokens does not depend on where they stand.
    again = network.start(contexts, max_length=5)
    expected = [again.logits(target[:, place : place + 1]) for place in range(12, 17)][-1]
    torch.testing.assert_close(windowed, expected, rtol=1e-4, atol=1e-5)
    assert narrow.peak_cache_bytes < wide.peak_cache_bytes


@pytest.mark.parametrize("form", FORMS)
def test_every_weight_is_trained(form):
    network = tiny_network(tiny_config(**FORMS[form])).train()
    ids, mask = batch(3, 7)
    network(ids, tokens(3, 5), source_mask=mask, labels=tokens(3, 5, seed=7)).loss_sum.backward()
    unused = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    assert not unused
    assert all(parameter.grad.isfinite().all() for parameter in network.parameters())


def test_num_tokens_counts_the_scored_places():
    network = tiny_network(tiny_config())
    ids, mask = batch(2, 7)
    labels = tokens(2, 5, seed=7)
    labels[0, 3:] = -100
    output = network(ids, tokens(2, 5), source_mask=mask, labels=labels)
    assert int(output.num_tokens) == 8
    assert output.logits is None
    assert output.targets.shape == (8,)
    assert output.alignment_sum is None
    assert output.num_aligned is None
    with pytest.raises(UsageError, match=r"labels has shape \[2, 4\], the texts \[2, 5\]"):
        network(ids, tokens(2, 5), labels=labels[:, :4])


def test_texts_longer_than_the_positions_are_refused():
    network = tiny_network(tiny_config())
    ids, mask = batch(2, 7)
    with pytest.raises(UsageError, match="a source of 30 tokens, but this model has 29 positions: split it"):
        network.encode(tokens(1, 30))
    with pytest.raises(UsageError, match="30 target tokens, but this model has 29 positions: generate fewer tokens"):
        network(ids, tokens(2, 30), source_mask=mask)
    contexts = network.project_context(network.encode(ids, mask), mask)
    with pytest.raises(UsageError, match="max_length 30 is more than this model's 29 positions"):
        network.start(contexts, max_length=30)
    with pytest.raises(UsageError, match="the decoder needs the contexts"):
        network.decoder(tokens(2, 3))


def test_fresh_weights_follow_the_global_generator_and_padding_starts_at_zero():
    networks = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        networks.append(TranslatorNetwork(tiny_config(target_vocab_size=67)))
    first, second, other = (network.state_dict() for network in networks)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["decoder.embedding.words.weight"], other["decoder.embedding.words.weight"])
    for side in ("encoder", "decoder"):
        assert not first[f"{side}.embedding.words.weight"][PAD].any()


def test_cross_attention_parameters_are_the_cross_attentions_and_their_norms():
    network = tiny_network(tiny_config())
    found = cross_attention_parameters(network)
    assert len(found) == 3 * (4 * 2 + 2)
    assert all(name.startswith("decoder.layers.") for name in found)
    assert sum(".cross_attn_norm." in name for name in found) == 3 * 2


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"encoder_layers": 0}, "encoder_layers is 0, it must be at least 1"),
        ({"decoder_heads": 5}, "embed_dim 36 is not divisible by decoder_heads 5"),
        ({"dropout_p": float("nan")}, "dropout_p is nan: it must be between 0 and 1"),
        ({"decoder_kv_heads": 4}, "decoder_heads 6 is not divisible by decoder_kv_heads 4"),
        ({"encoder_kv_heads": 0}, "encoder_heads 3 is not divisible by encoder_kv_heads 0"),
        (
            {"positions": "relative"},
            "positions is 'relative': choose one of sinusoidal, ",
        ),
        ({"positions": "rotary", "encoder_heads": 4}, "rotary needs heads of an even width, not 9"),
        ({"positions": "tensor2tensor", "embed_dim": 33, "decoder_heads": 3}, "needs an even embed_dim, not 33"),
        ({"alignment_layer": 3}, "alignment_layer 3: there are 3 decoder layers"),
        ({"alignment_layer": -1}, "alignment_layer -1: there are 3 decoder layers"),
        ({"alignment_heads": [0, 6]}, r"alignment_heads \[0, 6\]: there are 6 heads"),
        ({"alignment_heads": []}, r"alignment_heads is \[\]: name at least one head"),
        ({"pad_token_id": 61}, "pad_token_id 61 is outside the vocabulary of 61"),
        ({"target_vocab_size": 31}, "pad_token_id 59 is outside the vocabulary of 31"),
        ({"eos_token_id": -1}, "eos_token_id -1 is outside the vocabulary of 61"),
    ],
    ids=str,
)
def test_parts_that_do_not_fit_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        TranslatorNetwork(tiny_config(**overrides))


def test_config_dicts_come_back_and_unknown_fields_do_not():
    config = tiny_config(**FORMS["rotary, grouped heads"], alignment_heads=[1, 4])
    assert type(config).from_dict(config.to_dict()) == config
    with pytest.raises(ConfigError, match="no such field: embed_dims; known: vocab_size, "):
        type(config).from_dict(config.to_dict() | {"embed_dims": 3})
    with pytest.raises(ConfigError, match="alignment_heads is 3, it must be"):
        type(config).from_dict(config.to_dict() | {"alignment_heads": 3})
