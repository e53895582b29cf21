"""Packed batches of the translator: the padded loss, sentence by sentence, and its gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.ops.segments import Segments
from tests.models.tiny_translator import FORMS, PAD, tiny_config, tiny_network, tokens

SOURCES, TARGETS = [5, 11, 1, 7, 3, 13], [4, 7, 2, 17, 1, 6]


def _batch() -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """A padded batch, and where its source and target tokens are; one label is not scored."""
    source, target, labels = (tokens(6, length, seed=length) for length in (13, 17, 19))
    is_source = torch.arange(13) < torch.tensor(SOURCES)[:, None]
    is_target = torch.arange(17) < torch.tensor(TARGETS)[:, None]
    labels = labels[:, :17].masked_fill(~is_target, -100)
    labels[0, 0] = -100
    source[~is_source] = target[~is_target] = PAD
    return (
        {"source_ids": source, "target_ids": target, "source_mask": is_source, "labels": labels},
        is_source,
        is_target,
    )


def _packed(padded: dict[str, Tensor], is_source: Tensor, is_target: Tensor) -> dict:
    return {
        "source_ids": padded["source_ids"][is_source],
        "target_ids": padded["target_ids"][is_target],
        "labels": padded["labels"][is_target],
        "source_segments": Segments.of(SOURCES),
        "target_segments": Segments.of(TARGETS),
    }


@pytest.mark.parametrize("form", FORMS)
def test_loss_and_gradients_are_those_of_the_padded_batch(form):
    network = tiny_network(tiny_config(**FORMS[form], label_smoothing=0.1)).double()
    padded, is_source, is_target = _batch()
    losses = [network(**padded).loss_sum, network(**_packed(padded, is_source, is_target)).loss_sum]
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=1e-10)
    parameters = [parameter for parameter in network.parameters() if parameter.requires_grad]
    expected, found = (torch.autograd.grad(loss, parameters, allow_unused=True) for loss in losses)
    for one, other in zip(found, expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


def test_the_packed_loss_is_the_sum_of_the_sentences_alone():
    network = tiny_network(tiny_config()).double()
    padded, is_source, is_target = _batch()
    output = network(**_packed(padded, is_source, is_target))
    alone = [
        network(
            padded["source_ids"][row : row + 1, : SOURCES[row]],
            padded["target_ids"][row : row + 1, : TARGETS[row]],
            labels=padded["labels"][row : row + 1, : TARGETS[row]],
        )
        for row in range(6)
    ]
    torch.testing.assert_close(output.loss_sum, sum(one.loss_sum for one in alone), rtol=1e-12, atol=1e-10)
    assert torch.equal(output.targets, torch.cat([one.targets for one in alone]))
    assert int(output.num_tokens) == sum(TARGETS) - 1


def test_logits_of_a_packed_batch():
    network = tiny_network(tiny_config())
    padded, is_source, is_target = _batch()
    packed = _packed(padded, is_source, is_target)
    del packed["labels"], padded["labels"]
    torch.testing.assert_close(network(**packed).logits, network(**padded).logits[is_target], rtol=1e-4, atol=1e-5)


def test_dropout_and_training_mode():
    network = tiny_network(tiny_config(dropout_p=0.3, attention_dropout_p=0.2)).train()
    padded, is_source, is_target = _batch()
    packed = _packed(padded, is_source, is_target)
    losses = [float(network(**packed).loss_sum.detach()) for _ in range(2)]
    assert losses[0] != losses[1]


def test_what_packed_batches_cannot_have_is_refused():
    network = tiny_network(tiny_config())
    padded, is_source, is_target = _batch()
    packed = _packed(padded, is_source, is_target)
    message = "a packed batch needs source_segments and target_segments, and takes no source_mask or alignment"
    for change in ({"target_segments": None}, {"source_mask": is_source}, {"alignment": torch.zeros(1)}):
        with pytest.raises(UsageError, match=message):
            network(**packed | change)
    layer = network.encoder.layers[0]
    states = torch.randn(sum(SOURCES), 36)
    with pytest.raises(UsageError, match=r"packed sequences \(segments\) take no key_mask"):
        layer(states, segments=Segments.of(SOURCES), key_mask=is_source)
    with pytest.raises(UsageError, match=r"x has shape \[1, 40, 36\], expected packed rows \[rows, 36\]"):
        layer(states[None], segments=Segments.of(SOURCES))
    with pytest.raises(UsageError, match="context_segments need a cross-attention"):
        layer(states, segments=Segments.of(SOURCES), context_segments=Segments.of(SOURCES))
    with pytest.raises(UsageError, match="packed sequences need segments, context_segments and the context's rows"):
        network.decoder.layers[0](states, segments=Segments.of(SOURCES), context=states)
    long = Segments.of([30])
    with pytest.raises(UsageError, match="a source of 30 tokens, but this model has 29 positions"):
        network.encoder(torch.ones(30, dtype=torch.int64), None, network.decoder.words, long)
    with pytest.raises(UsageError, match="30 target tokens, but this model has 29 positions"):
        network.decoder(torch.ones(30, dtype=torch.int64), states, segments=long, context_segments=long)
