"""Alignments read from cross-attention, and the guided-alignment loss (arXiv 1909.02074)."""

from __future__ import annotations

import math

import pytest
import torch

from mmattn.errors import UsageError
from mmattn.inference.decode import DecodeSettings, decode
from mmattn.models.translator.alignment import AlignmentReader, alignment_loss
from tests.models.tiny_translator import EOS, PAD, batch, tiny_config, tiny_network, tokens


def _weights_by_hand(network, ids, mask, target, layer, heads):
    """Softmax of scaled products, from what goes into the layer's projections."""
    found = {}
    cross = network.decoder.layers[layer].cross_attn
    hooks = [
        cross.q_proj.register_forward_hook(lambda _m, _i, out: found.update(query=out)),
        cross.k_proj.register_forward_hook(lambda _m, _i, out: found.update(key=out)),
    ]
    network(ids, target, source_mask=mask)
    for hook in hooks:
        hook.remove()
    rows, sources = len(target), len(ids)
    query = found["query"].view(rows, target.shape[1], cross.num_heads, -1)
    key = found["key"].view(sources, ids.shape[1], cross.num_kv_heads, -1)
    key = key.repeat_interleave(rows // sources, 0).repeat_interleave(cross.num_heads // cross.num_kv_heads, 2)
    scores = torch.einsum("rthd,rshd->rhts", query, key) / math.sqrt(query.shape[-1])
    scores = scores.masked_fill(~mask.repeat_interleave(rows // sources, 0)[:, None, None], float("-inf"))
    return scores.softmax(-1)[:, heads].mean(1)


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [None, 1, 2, 3])
@pytest.mark.parametrize(("layer", "heads"), [(None, None), (0, [4]), (2, [5, 0, 3]), (1, [2, 3])])
def test_the_reader_gives_the_attention_of_the_chosen_layer_and_heads(kv_heads, layer, heads):
    network = tiny_network(tiny_config(decoder_kv_heads=kv_heads, alignment_layer=layer, alignment_heads=heads))
    ids, mask = batch(2, 7)
    target = tokens(6, 5)
    reader = network.alignment_reader()
    with reader.reading():
        network(ids, target, source_mask=mask)
    found = reader.take().view(6, 5, 7)
    chosen = 1 if layer is None else layer
    expected = _weights_by_hand(network, ids, mask, target, chosen, list(range(6)) if heads is None else heads)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    assert not found.view(2, 3, 5, 7)[1, :, :, 4:].any(), "padding is never looked at"


def test_the_last_layer_but_one_is_read_unless_it_is_the_only_one():
    assert tiny_config().chosen_alignment_layer == 1
    assert tiny_config(decoder_layers=1).chosen_alignment_layer == 0


def test_the_loss_is_the_cross_entropy_of_the_aligned_rows():
    weights = torch.tensor([[[0.5, 0.25, 0.25], [0.1, 0.2, 0.7]], [[0.0, 1.0, 0.0], [0.3, 0.3, 0.4]]])
    gold = torch.tensor([[[1.0, 0.0, 0.0], [0.0, 0.5, 0.5]], [[0.0, 1.0, 0.0], [0.0, 0.0, 0.0]]])
    total, count = alignment_loss(weights, gold)
    assert int(count) == 3
    assert count.dtype is torch.int64
    by_hand = -(math.log(0.5) + 0.5 * math.log(0.2) + 0.5 * math.log(0.7) + math.log(1.0))
    assert total.item() == pytest.approx(by_hand, rel=1e-6)


def test_a_weight_of_zero_gives_a_large_finite_loss():
    total, count = alignment_loss(torch.tensor([[[0.0, 1.0]]]), torch.tensor([[[1.0, 0.0]]]))
    assert int(count) == 1
    assert 50 < total.item() < 100
    total, count = alignment_loss(torch.tensor([[[0.3, 0.7]]]), torch.zeros(1, 1, 2))
    assert (total.item(), int(count)) == (0.0, 0)


def _guided(rows: int = 4):
    network = tiny_network(tiny_config(decoder_kv_heads=2, alignment_layer=1, alignment_heads=[0, 3, 5]))
    ids, mask = batch(2, 7)
    labels = tokens(rows, 5, seed=7)
    labels[1, 3:] = -100
    gold = torch.zeros(rows, 5, 7)
    gold[:, 0, 1] = 1.0
    gold[:, 2, :2] = 0.5
    return network, {"source_ids": ids, "target_ids": tokens(rows, 5), "source_mask": mask, "labels": labels}, gold


def test_guidance_leaves_the_ordinary_loss_as_it_is():
    network, inputs, gold = _guided()
    plain, guided = network(**inputs), network(**inputs, alignment=gold)
    torch.testing.assert_close(guided.loss_sum, plain.loss_sum, rtol=0, atol=0)
    assert int(guided.num_tokens) == int(plain.num_tokens)
    assert int(guided.num_aligned) == 4 * 2
    with torch.no_grad():
        weights = _weights_by_hand(
            network, inputs["source_ids"], inputs["source_mask"], inputs["target_ids"], 1, [0, 3, 5]
        )
    expected, _ = alignment_loss(weights, gold)
    torch.testing.assert_close(guided.alignment_sum.detach(), expected, rtol=1e-4, atol=1e-5)
    unlabelled = network(inputs["source_ids"], inputs["target_ids"], source_mask=inputs["source_mask"], alignment=gold)
    torch.testing.assert_close(unlabelled.alignment_sum, guided.alignment_sum)
    assert unlabelled.loss_sum is None


def test_gradients_reach_the_layers_queries_and_keys_and_not_what_comes_after():
    network, inputs, gold = _guided()
    network(**inputs, alignment=gold).alignment_sum.backward()
    layers = network.decoder.layers
    for projection in (layers[1].cross_attn.q_proj, layers[1].cross_attn.k_proj):
        assert projection.weight.grad.abs().max() > 1e-3
    assert layers[0].cross_attn.v_proj.weight.grad.abs().max() > 0, "what comes before is trained"
    assert network.encoder.layers[0].ffn.up_proj.weight.grad.abs().max() > 0
    after = [layers[1].cross_attn.v_proj, layers[1].ffn.up_proj, layers[2].self_attn.q_proj]
    assert all(module.weight.grad is None or not module.weight.grad.any() for module in after)
    # Heads that are not named have no part: the rows of head 1 in q_proj (6 wide) stay untouched.
    gradient = layers[1].cross_attn.q_proj.weight.grad.view(6, 6, 36)
    assert gradient[[0, 3, 5]].abs().amax(dim=(1, 2)).min() > 0
    assert not gradient[[1, 2, 4]].any()


def test_steps_on_the_guided_loss_lower_it():
    network, inputs, gold = _guided()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(20):
        output = network(**inputs, alignment=gold)
        loss = output.alignment_sum / output.num_aligned
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


@torch.no_grad()
@pytest.mark.parametrize("kv_heads", [None, 2])
@pytest.mark.parametrize(
    "arguments",
    [{}, {"num_beams": 4, "num_return_sequences": 3}, {"num_beams": 3, "early_stopping": True}, {"do_sample": True}],
    ids=str,
)
@pytest.mark.parametrize("forced", [False, True])
def test_weights_kept_while_decoding_are_those_of_the_finished_text(kv_heads, arguments, forced):
    network = tiny_network(tiny_config(decoder_kv_heads=kv_heads, alignment_heads=[1, 4]))
    network.decoder.head.bias[EOS] += 4 if kv_heads else 7
    network.decoder.head.bias[PAD] = -20
    ids, mask = batch(5, 7)
    contexts = network.project_context(network.encode(ids, mask), mask)
    state = network.start(contexts, max_length=17, reads_alignment=True)
    prompt = torch.tensor([[PAD, 3 + row] if forced else [PAD] for row in range(5)])
    settings = DecodeSettings(eos_token_id=EOS, pad_token_id=PAD, max_length=17).updated(**arguments)
    generator = torch.Generator().manual_seed(0)
    results = decode(state, prompt, settings, num_forced=int(forced), keep_rows=True, generator=generator)
    lengths = set()
    reader = network.alignment_reader()
    for row, candidates in enumerate(results):
        for one in candidates:
            assert [place for place, chosen in enumerate(one.rows) if chosen < 0] == ([0] if forced else [])
            with reader.reading():
                network(ids[row : row + 1], torch.tensor([[PAD, *one.tokens[:-1]]]), source_mask=mask[row : row + 1])
            expected = reader.take()[0]
            first = int(forced)
            for place, chosen in enumerate(one.rows[first:]):
                torch.testing.assert_close(state.steps[place][chosen], expected[first + place], rtol=1e-3, atol=1e-5)
            lengths.add(len(one.tokens))
    assert len(lengths) > 1, "sentences shall leave at different steps"


def test_what_did_not_run_cannot_be_read():
    network = tiny_network(tiny_config())
    reader = AlignmentReader(network.decoder.layers[0].cross_attn)
    with reader.reading():
        pass
    with pytest.raises(UsageError, match="no cross-attention was seen: alignments cannot be read inside a compiled"):
        reader.take()
