"""Our own architecture: forms of cross-attention, image encoders, decoding states, what is trained."""

from __future__ import annotations

import pytest
import torch

from mmattn.errors import ConfigError, UsageError
from mmattn.models.vlm import CaptioningNetwork, VLMConfig, build_network, cross_attention_parameters
from tests.models.tiny import pixels, tiny_config, tiny_network, tokens

FORMS = {
    "every layer": {},
    "every second layer": {"cross_attention_every": 2},
    "gated, every second layer": {"cross_attention_every": 2, "gated": True},
    "grouped heads": {"num_kv_heads": 1},
    "rotary positions": {"positions": "rotary", "embed_dim": 30},
    "post-norm": {"norm_first": False, "embedding_norm": True, "head_transform": True, "tie_word_embeddings": False},
}


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_decoding_steps_give_the_logits_of_the_full_pass(form):
    network = tiny_network(tiny_config(**FORMS[form]))
    ids = tokens(6, 11)
    full = network(pixels(2), ids).logits
    state = network.start(network.project_context(network.encode_images(pixels(2))), rows_per_context=3, max_length=11)
    steps = [state.logits(ids[:, :4]), *(state.logits(ids[:, i : i + 1]) for i in range(4, 11))]
    torch.testing.assert_close(torch.stack(steps, dim=1), full[:, 3:])


def test_context_has_an_entry_per_layer_and_only_where_there_is_cross_attention():
    network = tiny_network(tiny_config(cross_attention_every=2, gated=True))
    context = network.project_context(network.encode_images(pixels(5)))
    assert [kv if kv is None else tuple(kv.key.shape) for kv in context] == [None, (5, 3, 9, 11)] * 2


@torch.no_grad()
def test_a_closed_gate_leaves_the_text_models_logits_identical():
    gated = build_network(tiny_config(cross_attention_every=2, gated=True)).eval()
    text_only = gated(None, tokens(4, 9)).logits
    assert torch.equal(gated(pixels(2), tokens(4, 9)).logits, text_only)
    for block in gated.decoder.body.gated.values():
        block.attn_gate.fill_(0.5)
    assert not torch.equal(gated(pixels(2), tokens(4, 9)).logits, text_only)


@torch.no_grad()
def test_gated_blocks_inserted_into_a_text_model_leave_its_logits_identical():
    plain = tiny_network(tiny_config(cross_attention_every=4, num_layers=4))
    gated = build_network(tiny_config(cross_attention_every=2, gated=True)).eval()
    shared = {name: tensor for name, tensor in plain.state_dict().items() if "cross_attn" not in name}
    report = gated.load_state_dict(shared, strict=False)
    assert not report.unexpected_keys
    assert all(".gated." in name for name in report.missing_keys)
    expected = plain(None, tokens(4, 9)).logits
    assert torch.equal(gated(pixels(2), tokens(4, 9)).logits, expected)


@torch.no_grad()
def test_reorder_continues_other_rows_and_may_change_their_number():
    network = tiny_network(tiny_config())
    context, ids = network.project_context(network.encode_images(pixels(2))), tokens(2, 4)
    state = network.start(context, max_length=9)
    state.logits(ids)
    state.reorder(torch.tensor([0, 0, 0, 1, 1, 1]))
    assert (state.batch_size, state.rows_per_context, state.num_rows) == (2, 3, 6)
    following = tokens(6, 1, seed=5)
    logits = state.logits(following)
    whole = network(pixels(2), torch.cat([ids.repeat_interleave(3, dim=0), following], dim=1)).logits
    torch.testing.assert_close(logits, whole[:, -1])
    state.reorder(torch.tensor([2, 5]))
    assert state.num_rows == 2
    last = tokens(2, 1, seed=6)
    texts = torch.cat([ids, following[[2, 5]], last], dim=1)
    torch.testing.assert_close(state.logits(last), network(pixels(2), texts).logits[:, -1])


@torch.no_grad()
def test_select_contexts_keeps_pictures_with_all_their_rows():
    network = tiny_network(tiny_config(cross_attention_every=2))
    ids = tokens(6, 5)
    state = network.start(network.project_context(network.encode_images(pixels(3))), rows_per_context=2, max_length=9)
    state.logits(ids[:, :4])
    state.select_contexts(torch.tensor([2, 0]))
    kept = ids[[4, 5, 0, 1]]
    expected = network(pixels(3)[[2, 0]], kept).logits[:, -1]
    torch.testing.assert_close(state.logits(kept[:, 4:]), expected)


@torch.no_grad()
def test_decoding_under_autocast_keeps_its_caches_in_the_low_precision():
    network = tiny_network(tiny_config())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        context = network.project_context(network.encode_images(pixels(1)))
        state = network.start(context, max_length=5)
        logits = state.logits(tokens(1, 3))
    assert logits.dtype is torch.bfloat16
    assert torch.isfinite(logits).all()


def test_decoding_errors_say_the_sizes():
    network = tiny_network(tiny_config())
    context = network.project_context(network.encode_images(pixels(2)))
    with pytest.raises(UsageError, match="max_length 24 is more than this model's 23 positions"):
        network.start(context, max_length=24)
    state = network.start(context, rows_per_context=2, max_length=3)
    with pytest.raises(UsageError, match=r"input_ids has 3 rows, this state has 4 \(2 contexts with 2 rows each\)"):
        state.logits(tokens(3, 1))
    with pytest.raises(UsageError, match="5 rows cannot be shared evenly by 2 contexts"):
        state.reorder(torch.arange(5))
    with torch.no_grad(), pytest.raises(UsageError, match="max_length is 3"):
        state.logits(tokens(4, 5))
    with pytest.raises(UsageError, match="no layer has a context"):
        network.start((None,) * 4, max_length=3)


def test_texts_longer_than_the_positions_are_refused():
    network = tiny_network(tiny_config())
    with pytest.raises(UsageError, match="24 tokens, but this text model has 23 positions"):
        network(None, tokens(1, 24))


def test_pictures_of_another_size_are_refused():
    network = tiny_network(tiny_config())
    with pytest.raises(UsageError, match=r"pixel_values has shape \[1, 3, 13, 13\], .*\[B, 3, 12, 12\]"):
        network.encode_images(pixels(1, size=13))


@torch.no_grad()
def test_the_loss_counts_labels_only_and_shifts_them():
    network = tiny_network(tiny_config(label_smoothing=0.1))
    ids = tokens(4, 9)
    labels = ids.clone()
    labels[:, :4] = -100
    labels[3] = -100
    output = network(pixels(2), ids, labels=labels)
    logits = network(pixels(2), ids).logits[:, :-1]
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), labels[:, 1:].flatten(), reduction="sum", label_smoothing=0.1
    )
    torch.testing.assert_close(output.loss_sum, expected)
    assert int(output.num_tokens) == 15
    assert torch.equal(output.targets, labels[:, 1:][labels[:, 1:] != -100])


def test_a_batch_without_labels_gives_a_zero_loss_with_zero_gradients():
    network = tiny_network(tiny_config())
    output = network(pixels(1), tokens(1, 5), labels=torch.full((1, 5), -100))
    assert (output.loss_sum.item(), int(output.num_tokens)) == (0.0, 0)
    output.loss_sum.backward()
    assert all(p.grad is None or not p.grad.any() for p in network.parameters())


def test_labels_of_another_shape_are_refused():
    with pytest.raises(UsageError, match=r"labels has shape \[1, 4\], the texts \[1, 5\]"):
        tiny_network(tiny_config())(pixels(1), tokens(1, 5), labels=tokens(1, 4))


@pytest.mark.parametrize("gated", [False, True])
def test_training_cross_attention_alone_leaves_every_other_tensor_bit_identical(gated):
    network = tiny_network(tiny_config(cross_attention_every=2, gated=gated))
    chosen = cross_attention_parameters(network)
    kinds = {name.split(".layers.")[-1].split(".gated.")[-1].split(".", 1)[1] for name in chosen}
    names = {"cross_attn.q_proj.weight", "cross_attn.out_proj.bias", "cross_attn_norm.weight"}
    assert names | ({"attn_gate", "ffn_gate", "ffn.up_proj.weight", "ffn_norm.bias"} if gated else set()) <= kinds
    assert all("self_attn" not in name and "words" not in name for name in chosen)
    network.requires_grad_(False)
    for parameter in chosen.values():
        parameter.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    optimizer = torch.optim.AdamW(chosen.values(), lr=0.1)
    network(pixels(2), tokens(4, 7), labels=tokens(4, 7)).loss_sum.backward()
    optimizer.step()
    changed = {name for name, tensor in network.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == set(chosen)


def test_networks_without_cross_attention_parameters_name_none():
    assert cross_attention_parameters(tiny_network(tiny_config()).image) == {}


@torch.no_grad()
@pytest.mark.parametrize("num_layers", [0, 1])
def test_the_conv_encoder_sees_a_picture_alike_alone_and_in_a_batch(num_layers):
    network = tiny_network(tiny_config(image={"num_layers": num_layers, "convs_per_stage": [2, 1, 3]}))
    features = network.encode_images(pixels(3))
    assert features.shape == (3, 9, 22) == (3, network.config.image.num_features, 22)
    torch.testing.assert_close(network.encode_images(pixels(3)[1:2]), features[1:2])


@torch.no_grad()
def test_the_conv_encoder_knows_where_things_are():
    network = tiny_network(tiny_config(image={"num_layers": 0}))
    features = network.encode_images(torch.zeros(1, 3, 12, 12))[0].unflatten(0, (3, 3))
    inner = features[1, 1]
    assert not torch.allclose(features[1, 2], inner)
    assert not torch.allclose(features[2, 1], inner)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (tiny_config("translating"), "task is 'translating': choose one of captioning"),
        (tiny_config(image={"kind": "resnet"}), "image.kind is 'resnet': choose one of vit, conv"),
        (tiny_config(image={"num_heads": 3}), "image.embed_dim 22 is not divisible by image.num_heads 3"),
        (tiny_config(image={"kind": "vit", "patch_size": 5}), "image_size 12 is not divisible by image.patch_size 5"),
        (tiny_config(image={"grid": 6}), "3 stages, .* do not take image.image_size 12 to image.grid 6"),
        (tiny_config(image={"num_heads": 0}), "image.num_heads is 0: it must be at least 1"),
        (tiny_config(image={"position_std": -1.0}), "image.position_std is -1.0: it must be 0 or more"),
        (tiny_config(max_positions=-1), "text.max_positions is -1: it must be at least 1"),
        (tiny_config(dropout_p=1.5), "text.dropout_p is 1.5: it must be between 0 and 1"),
        (tiny_config(label_smoothing=1.5), "text.label_smoothing is 1.5: it must be at least 0 and below 1"),
        (tiny_config(num_heads=2), "text.embed_dim 33 is not divisible by text.num_heads 2"),
        (tiny_config(cross_attention_every=5), "between 1 and text.num_layers 4"),
        (tiny_config(bos_token_id=43), "text.bos_token_id 43 is outside the vocabulary of 43"),
    ],
)
def test_configs_that_do_not_fit_are_refused(config, message):
    with pytest.raises(ConfigError, match=message):
        build_network(config)


def test_a_network_refuses_the_config_of_another_task():
    with pytest.raises(UsageError, match="CaptioningNetwork does captioning, the config says task: matching"):
        CaptioningNetwork(tiny_config("matching"))


def test_an_unknown_config_field_is_named():
    values = tiny_config().to_dict()
    values["text"]["num_layer"] = 3
    with pytest.raises(ConfigError, match="no such field: text.num_layer"):
        VLMConfig.from_dict(values)


def test_either_pictures_or_features_are_needed():
    network = tiny_network(tiny_config("matching"))
    with pytest.raises(UsageError, match="either pixel_values or features"):
        network(None, tokens(1, 5))


def test_a_frozen_stem_keeps_its_statistics_while_the_rest_trains():
    network = tiny_network(tiny_config())
    stem = network.image.embedding.stem
    network.train()
    assert stem.training
    for parameter in network.parameters():
        parameter.requires_grad_(False)
    for parameter in cross_attention_parameters(network).values():
        parameter.requires_grad_(True)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    network.train()
    network(pixels(3), tokens(3, 7))
    assert network.decoder.training
    assert not stem.training
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name]), name
