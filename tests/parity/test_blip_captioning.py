"""Our captioning network against stock `BlipForConditionalGeneration`, the same random weights in both."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from mmattn.data.collate import pack
from mmattn.models.vlm import CaptioningNetwork, DecoderState, open_network
from tests.parity.blip_stock import SEP, assert_as_exact_as_stock, pixels, save_stock, stock_model, tokens


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[CaptioningNetwork, nn.Module, nn.Module]:
    """Ours, stock in float32, stock in float64."""
    stock = stock_model("captioning")
    folder = save_stock(stock, Path(tmp_path_factory.mktemp("captioning")))
    ours = open_network(folder)
    assert isinstance(ours, CaptioningNetwork)
    return ours, stock, copy.deepcopy(stock).double()


def _capture(modules: nn.ModuleList) -> list[Tensor]:
    """The list that fills with each module's output when it runs."""
    outputs: list[Tensor] = []
    for module in modules:
        module.register_forward_hook(lambda _m, _i, out: outputs.append(out[0] if isinstance(out, tuple) else out))
    return outputs


def greedy(state: DecoderState, prompt: Tensor, max_new_tokens: int) -> list[int]:
    """Decode one row until SEP."""
    ids, found = prompt, []
    for _ in range(max_new_tokens):
        best = int(state.logits(ids).argmax(-1))
        found.append(best)
        if best == SEP:
            break
        ids = torch.tensor([[best]])
    return found


@torch.no_grad()
def test_image_features_are_stocks(pair):
    ours, stock, exact = pair
    assert_as_exact_as_stock(
        ours.encode_images(pixels(3)),
        stock.vision_model(pixels(3)).last_hidden_state,
        exact.vision_model(pixels(3).double()).last_hidden_state,
    )


@torch.no_grad()
def test_hidden_states_of_every_layer_are_stocks(tmp_path):
    stock = stock_model("captioning", seed=5)
    ours, exact = open_network(save_stock(stock, tmp_path)), copy.deepcopy(stock).double()
    seen = [
        _capture(network)
        for network in (
            ours.decoder.body.layers,
            stock.text_decoder.bert.encoder.layer,
            exact.text_decoder.bert.encoder.layer,
        )
    ]
    ours(pixels(2), tokens(2, 11))
    stock(pixels(2), tokens(2, 11))
    exact(pixels(2).double(), tokens(2, 11))
    assert len(seen[0]) == 3
    for own, other, truth in zip(*seen, strict=True):
        assert_as_exact_as_stock(own, other, truth)


@torch.no_grad()
def test_logits_are_stocks(pair):
    ours, stock, exact = pair
    ids = tokens(2, 13)
    assert_as_exact_as_stock(
        ours(pixels(2), ids).logits, stock(pixels(2), ids).logits, exact(pixels(2).double(), ids).logits
    )


@torch.no_grad()
def test_logits_under_a_padding_mask_are_stocks(pair):
    ours, stock, exact = pair
    ids, mask = tokens(2, 13), torch.ones(2, 13, dtype=torch.long)
    mask[1, 8:] = 0
    outputs = [
        ours(pixels(2), ids, attention_mask=mask),
        stock(pixels(2), ids, attention_mask=mask),
        exact(pixels(2).double(), ids, attention_mask=mask),
    ]
    assert_as_exact_as_stock(*[output.logits[mask.bool()] for output in outputs])


def test_loss_with_label_smoothing_and_its_gradient_are_stocks(pair):
    ours, stock, exact = pair
    ids = tokens(3, 11)
    labels = ids.clone()
    labels[:, :3] = -100
    labels[2, 7:] = -100
    output = ours(pixels(3), ids, labels=labels)
    loss, stock_loss = output.loss_sum / output.num_tokens, stock(pixels(3), ids, labels=labels).loss
    exact_loss = exact(pixels(3).double(), ids, labels=labels).loss
    assert int(output.num_tokens) == 8 + 8 + 4
    assert output.targets.shape == (20,)
    assert_as_exact_as_stock(loss.detach()[None], stock_loss.detach()[None], exact_loss.detach()[None])
    name = "encoder.layer.1.crossattention.self.key.weight"
    gradients = [
        torch.autograd.grad(loss, ours.decoder.body.layers[1].cross_attn.k_proj.weight)[0],
        torch.autograd.grad(stock_loss, stock.text_decoder.bert.get_parameter(name))[0],
        torch.autograd.grad(exact_loss, exact.text_decoder.bert.get_parameter(name))[0],
    ]
    assert_as_exact_as_stock(*gradients, factor=3)


def test_packed_texts_of_two_pictures_have_the_loss_and_gradients_of_stocks_padded_ones(pair):
    ours, stock, exact = pair
    rows = {"input_ids": tokens(4, 11), "labels": tokens(4, 11), "attention_mask": torch.ones(4, 11, dtype=torch.int64)}
    for row, (unscored, length) in enumerate([(1, 7), (3, 11), (2, 3), (1, 9)]):
        rows["labels"][row, :unscored] = -100
        rows["labels"][row, length:] = -100
        rows["input_ids"][row, length:] = 0
        rows["attention_mask"][row, length:] = 0
    output = ours(pixels(2), **pack(rows))
    each = pixels(2).repeat_interleave(2, dim=0)  # stock gives every text a picture of its own
    stock_loss, exact_loss = stock(each, **rows).loss, exact(each.double(), **rows).loss
    loss = output.loss_sum / output.num_tokens
    assert_as_exact_as_stock(loss.detach()[None], stock_loss.detach()[None], exact_loss.detach()[None])
    pairs = {
        "image.layers.0.ffn.up_proj.weight": "vision_model.encoder.layers.0.mlp.fc1.weight",
        "decoder.body.embedding.words.weight": "text_decoder.bert.embeddings.word_embeddings.weight",
        "decoder.body.embedding.positions.weight": "text_decoder.bert.embeddings.position_embeddings.weight",
        "decoder.body.layers.2.cross_attn.v_proj.weight": (
            "text_decoder.bert.encoder.layer.2.crossattention.self.value.weight"
        ),
        "decoder.body.layers.0.self_attn.q_proj.weight": (
            "text_decoder.bert.encoder.layer.0.attention.self.query.weight"
        ),
    }
    found = torch.autograd.grad(loss, [ours.get_parameter(name) for name in pairs])
    others, truths = (
        torch.autograd.grad(value, [model.get_parameter(name) for name in pairs.values()])
        for value, model in ((stock_loss, stock), (exact_loss, exact))
    )
    for gradients in zip(found, others, truths, strict=True):
        assert_as_exact_as_stock(*gradients, factor=3)


@torch.no_grad()
def test_several_texts_share_a_picture(pair):
    ours, _, _ = pair
    ids = tokens(6, 9)
    shared = ours(pixels(2), ids).logits
    repeated = ours(pixels(2).repeat_interleave(3, dim=0), ids).logits
    torch.testing.assert_close(shared, repeated)


@torch.no_grad()
@pytest.mark.parametrize("prompt_length", [1, 4])
def test_greedy_tokens_are_stocks(pair, prompt_length):
    ours, stock, _ = pair
    seen: set[int] = set()
    for index in range(4):
        picture, prompt = pixels(4)[index : index + 1], tokens(1, prompt_length, seed=index)
        context = ours.project_context(ours.encode_images(picture))
        found = greedy(ours.start(context, max_length=prompt_length + 17), prompt, 17)
        # Stock drops the last column of a prompt: the tokenizer's closing SEP.
        closed = torch.cat([prompt, torch.tensor([[SEP]])], dim=1)
        expected = stock.generate(picture, input_ids=closed, max_new_tokens=17, do_sample=False)
        assert found == expected[0, prompt_length:].tolist()
        seen.update(found)
    assert len(seen) > 4, "the reference repeats itself, so that the comparison says little"


@torch.no_grad()
def test_steps_give_the_logits_of_the_full_pass(pair):
    ours, _, _ = pair
    ids = tokens(4, 12)
    full = ours(pixels(2), ids).logits
    state = ours.start(ours.project_context(ours.encode_images(pixels(2))), rows_per_context=2, max_length=12)
    steps = [state.logits(ids[:, :5]), *(state.logits(ids[:, i : i + 1]) for i in range(5, 12))]
    torch.testing.assert_close(torch.stack(steps, dim=1), full[:, 4:])
    assert state.length == 12
