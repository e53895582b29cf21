"""Packed texts of a vision-language network: the losses and gradients of the texts one by one."""

from __future__ import annotations

import copy
import re

import pytest
import torch
from torch import Tensor

from mmattn.data.collate import pack
from mmattn.errors import UsageError
from mmattn.models.vlm import CaptioningNetwork, VisionLanguageNetwork
from mmattn.nn import cross_attention
from mmattn.ops.segments import Segments
from tests.models.tiny import pixels, tiny_config, tiny_network, tokens
from tests.parity.blip_stock import assert_as_exact_as_stock

# Texts of three pictures, two each: unequal lengths, and unequal numbers of tokens that are not scored.
LENGTHS = [5, 2, 11, 7, 3, 13]
UNSCORED = [1, 1, 4, 2, 1, 6]
FORMS = {
    "learned": {},
    "rotary, grouped heads": {"positions": "rotary", "embed_dim": 36, "num_heads": 6, "num_kv_heads": 2},
    "every other layer": {"cross_attention_every": 2},
    "gated": {"gated": True, "cross_attention_every": 2},
    "blip": {"norm_first": False, "embedding_norm": True, "head_transform": True, "label_smoothing": 0.1},
}


def _rows() -> dict[str, Tensor]:
    ids = tokens(len(LENGTHS), max(LENGTHS))
    mask = torch.arange(ids.shape[1]) < torch.tensor(LENGTHS)[:, None]
    is_scored = mask & (torch.arange(ids.shape[1]) >= torch.tensor(UNSCORED)[:, None])
    return {"input_ids": ids * mask, "labels": ids.where(is_scored, -100), "attention_mask": mask.long()}


def _one_by_one(network: VisionLanguageNetwork, pictures: Tensor | None) -> list[Tensor]:
    """The loss of each text, alone and unpadded."""
    rows = _rows()
    losses = []
    for row, length in enumerate(LENGTHS):
        picture = None if pictures is None else pictures[row // 2 : row // 2 + 1]
        ids, labels = (rows[name][row : row + 1, :length] for name in ("input_ids", "labels"))
        losses.append(network(picture, ids, labels=labels).loss_sum)
    return losses


def _gradients(network: VisionLanguageNetwork, loss: Tensor) -> dict[str, Tensor]:
    network.zero_grad()
    loss.backward()
    return {name: parameter.grad for name, parameter in network.named_parameters() if parameter.grad is not None}


@pytest.fixture(params=["keys and values", "absorbed"])
def way(request, monkeypatch) -> None:
    """Both ways of cross-attention in training; at these sizes the second would not be taken by itself."""
    if request.param == "absorbed":
        monkeypatch.setattr(cross_attention, "is_less_work", lambda *_: True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("has_pictures", [True, False])
@pytest.mark.usefixtures("way")
def test_packed_texts_give_the_loss_and_gradients_of_texts_one_by_one(form, has_pictures):
    network = tiny_network(tiny_config(**FORMS[form])).double()
    pictures = pixels(3).double() if has_pictures else None
    expected = torch.stack(_one_by_one(network, pictures)).sum()
    packed = network(pictures, **pack(_rows()))
    torch.testing.assert_close(packed.loss_sum, expected, rtol=1e-12, atol=0)
    assert packed.num_tokens == sum(length - unscored for length, unscored in zip(LENGTHS, UNSCORED, strict=True))
    found, exact = _gradients(network, packed.loss_sum), _gradients(network, expected)
    assert found.keys() == exact.keys()
    for name, gradient in exact.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-10, msg=name)


def test_each_text_of_a_pack_has_the_loss_that_it_has_alone():
    network = tiny_network(tiny_config()).double()
    pictures, batch = pixels(3).double(), pack(_rows())
    alone = _one_by_one(network, pictures)
    for row, labels in enumerate(batch["labels"].split(batch["segments"].lengths)):
        others = torch.full_like(batch["labels"], -100)
        start = sum(batch["segments"].lengths[:row])
        others[start : start + len(labels)] = labels
        only = network(pictures, **{**batch, "labels": others}).loss_sum
        torch.testing.assert_close(only, alone[row], rtol=1e-12, atol=0)


@pytest.mark.parametrize("form", ["learned", "blip"])
@pytest.mark.usefixtures("way")
def test_packed_float32_is_as_exact_as_padded(form):
    network, rows = tiny_network(tiny_config(**FORMS[form])), _rows()
    exact_network = copy.deepcopy(network).double()
    padded = network(pixels(3), rows["input_ids"], labels=rows["labels"]).loss_sum
    padded_gradients = _gradients(network, padded)
    packed = network(pixels(3), **pack(rows)).loss_sum
    exact = exact_network(pixels(3).double(), **pack(rows)).loss_sum
    assert_as_exact_as_stock(packed, padded, exact)
    gradients, exact_gradients = _gradients(network, packed), _gradients(exact_network, exact)
    scales = {name: gradient.abs().max() for name, gradient in exact_gradients.items() if gradient.abs().max() > 1e-9}
    assert len(scales) > 50
    joined = [
        torch.cat([(each[name] / scale).flatten() for name, scale in scales.items()])
        for each in (gradients, padded_gradients, exact_gradients)
    ]
    assert_as_exact_as_stock(*joined, factor=3)


def test_what_a_packed_text_gives_without_labels():
    network = tiny_network(tiny_config()).double()
    rows, pictures = _rows(), pixels(3).double()
    batch = pack(rows)
    logits = network(pictures, batch["input_ids"], segments=batch["segments"]).logits
    for row, part in enumerate(logits.split(batch["segments"].lengths)):
        alone = network(pictures[row // 2 : row // 2 + 1], rows["input_ids"][row : row + 1, : LENGTHS[row] - 1]).logits
        torch.testing.assert_close(part, alone[0], rtol=1e-10, atol=1e-12)


def test_packing_leaves_out_padding_and_the_last_token_only():
    batch = pack(_rows())
    assert batch["segments"].lengths == tuple(length - 1 for length in LENGTHS)
    ids, rows = batch["input_ids"].split(batch["segments"].lengths), _rows()
    for row, length in enumerate(LENGTHS):
        assert torch.equal(ids[row], rows["input_ids"][row, : length - 1])
    labels = torch.cat([rows["labels"][row, 1:length] for row, length in enumerate(LENGTHS)])
    assert torch.equal(batch["labels"], labels)


def test_what_does_not_go_with_packed_texts_is_refused():
    network = tiny_network(tiny_config())
    assert isinstance(network, CaptioningNetwork)
    batch = pack(_rows())
    with pytest.raises(UsageError, match=r"packed sequences \(segments\) take no key_mask"):
        network(pixels(3), **batch, attention_mask=torch.ones_like(batch["input_ids"]))
    with pytest.raises(UsageError, match="6 cannot be shared out equally among 4 contexts"):
        network(pixels(4), **batch)
    with pytest.raises(UsageError, match=re.escape("packed texts (segments) take their contexts as one tensor")):
        network.decoder(batch["input_ids"], network.project_context(torch.randn(3, 9, 22)), segments=batch["segments"])
    with pytest.raises(UsageError, match="29 tokens, but this text model has 23 positions"):
        network(None, torch.ones(29, dtype=torch.int64), segments=Segments.of([29]))


def test_segments_are_merged_in_equal_numbers():
    segments = Segments.of([2, 3, 5, 7, 11, 13])
    merged = segments.merged(3)
    assert merged.lengths == (5, 12, 24)
    assert merged.cu_seqlens.tolist() == [0, 5, 17, 41]
    assert segments.merged(6) is segments
    with pytest.raises(UsageError, match="6 cannot be shared out equally among 7 contexts"):
        segments.merged(7)


def test_segments_of_one_length():
    segments = Segments.equal(3, 5)
    assert segments.lengths == (5, 5, 5)
    assert torch.equal(segments.cu_seqlens, Segments.of([5, 5, 5]).cu_seqlens)
    with pytest.raises(UsageError, match="0 of 5 rows: both must be at least 1"):
        Segments.equal(0, 5)
