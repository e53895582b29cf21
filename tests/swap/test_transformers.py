"""Swapped transformers models: the families of the zoo against stock, by the tolerance rule, and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from mmattn.ops.observe import observing
from mmattn.ops.tolerance import BACKWARD_FACTOR, deviation
from mmattn.swap import swap_attention

from .zoo_base import Draw
from .zoo_transformers import FAMILIES, SOURCES, VOCAB, padded

# by role: (self, cross)
LAYERS = {
    "marian": (4, 2),
    "t5": (4, 2),
    "flan_t5": (4, 2),
    "bart": (4, 2),
    "nllb": (4, 2),
    "whisper": (4, 2),
    "blip": (4, 2),
    "mllama": (8, 2),
    "vit": (2, 0),
    "clip": (4, 0),
}
CROSS = [key for key, counts in LAYERS.items() if counts[1]]


@pytest.fixture(params=FAMILIES)
def key(request):
    return request.param


def build(key: str, implementation: str = "sdpa"):
    model = FAMILIES[key].build()
    if key != "blip":  # that one has no choice
        model.set_attn_implementation(implementation)
    return model


def everything(model: nn.Module):
    """What a restore must put back: attributes of modules by identity, configs and registries by content."""
    modules = {name: dict(vars(module)) for name, module in model.named_modules()}
    configs = {}
    for name, module in model.named_modules():
        config = vars(module).get("config")
        if isinstance(config, PreTrainedConfig):
            configs[name] = (type(config), dict(vars(config)))
    registries = [dict(registry._global_mapping) for registry in (AttentionInterface, AttentionMaskInterface)]
    return modules, configs, registries


def assert_same(before, after):
    assert before[1:] == after[1:]
    assert before[0].keys() == after[0].keys()
    for name, attributes in before[0].items():
        assert attributes.keys() == after[0][name].keys(), name
        assert all(value is after[0][name][attribute] for attribute, value in attributes.items()), name


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_swapped_families_are_as_near_to_float64_as_stock_eager(key, implementation):
    family, model = FAMILIES[key], build(key, implementation)
    stock = family.run(model)
    with swap_attention(model) as swap:
        ours = family.run(model)
        report = swap.report()
    assert torch.equal(family.run(model), stock)
    eager = family.run(build(key, "eager"))
    reference = family.run(build(key, "eager").double())
    assert deviation(ours, eager, reference).is_within
    assert report.refused == []
    roles = [layer.role for layer in report.swapped]
    assert (roles.count("self"), roles.count("cross")) == LAYERS[key]


@pytest.mark.parametrize("backend", ["sdpa", "eager"])
def test_named_backends_serve_every_layer(key, backend):
    model, calls = build(key), []
    with swap_attention(model, backend), observing(calls.append):
        FAMILIES[key].run(model)
    assert {call.backend for call in calls} == {backend}
    assert len(calls) == sum(LAYERS[key])


@pytest.mark.parametrize(
    ("key", "role"),
    [(key, role) for key in LAYERS for role in (None, "self", "cross") if role != "cross" or key in CROSS],
)
def test_restore_puts_back_every_object(key, role):
    model = build(key)
    before = everything(model)
    swap = swap_attention(model, role=role)
    assert swap.check() == []
    assert swap.restore() == []
    assert_same(before, everything(model))
    assert swap.restore() == []
    assert swap.check() == ["this swap was restored"]


def test_verify_proves_every_family(key):
    model = build(key).train()
    swap = swap_attention(model)
    verification = swap.verify()
    assert verification.is_ok, str(verification)
    assert len(verification.layers) == sum(LAYERS[key])
    assert len(verification.models) == 1
    assert verification.unprobed == []
    assert all(module.training for module in model.modules())
    assert str(swap.verify()) == str(verification)
    swap.restore()


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_half_precision_is_as_near_to_float64_as_stock_eager(key, implementation):
    family, model = FAMILIES[key], build(key, implementation).bfloat16()
    with swap_attention(model) as swap:
        ours = family.run(model)
        verification = swap.verify()
    assert verification.is_ok, str(verification)
    assert verification.models[0].deviation.error < 1e-3  # it was run in float32
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    eager = family.run(build(key, "eager").bfloat16())
    reference = family.run(build(key, "eager").double())
    assert deviation(ours, eager, reference).is_within


@pytest.mark.parametrize("key", CROSS)
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_role_cross_leaves_self_attention_to_the_bit(key, implementation):
    """Every module that is not swapped gives, for the inputs that it had before, the very same output."""
    family, model = FAMILIES[key], build(key, implementation)
    with swap_attention(model, role="self") as swap:
        others = {id(module) for module in swap.modules()}
    seen = []

    def record(module, args, kwargs, output):
        if id(module) in others and kwargs.get("cache") is None:
            seen.append((module, args, kwargs, output))

    for module in model.modules():
        if hasattr(getattr(module, "config", None), "use_cache"):
            module.config.use_cache = False  # a cache would be another input the second time
    hooks = [module.register_forward_hook(record, with_kwargs=True) for module in model.modules()]
    family.run(model)
    for hook in hooks:
        hook.remove()
    assert len(seen) == LAYERS[key][0]
    calls = []
    with swap_attention(model, role="cross"), observing(calls.append), torch.no_grad():
        for module, args, kwargs, output in seen:
            assert torch.equal(module(*args, **kwargs)[0], output[0])
        assert calls == []
        family.run(model)
    assert [call.role for call in calls] == ["cross"] * LAYERS[key][1]


@pytest.mark.parametrize("key", ["marian", "nllb", "bart", "t5"])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_padding_is_never_attended_to(key, implementation):
    """Rows of a padded batch equal the same rows alone."""
    model = build(key, implementation)
    draw, pad = Draw(model), model.config.pad_token_id
    sources, mask = padded(draw, SOURCES, pad)
    targets = draw.integers(VOCAB - 1, len(SOURCES), 5, low=3)
    with swap_attention(model), torch.no_grad():
        batch = model(sources, attention_mask=mask, decoder_input_ids=targets).logits
        for row, length in enumerate(SOURCES):
            alone = model(sources[row : row + 1, :length], decoder_input_ids=targets[row : row + 1]).logits[0]
            torch.testing.assert_close(batch[row], alone, rtol=1e-5, atol=1e-5)
        changed = sources.masked_fill(mask == 0, 5)
        assert torch.equal(model(changed, attention_mask=mask, decoder_input_ids=targets).logits, batch)


@pytest.mark.parametrize("key", ["marian", "t5"])
def test_padding_reaches_the_operation_as_a_key_mask(key):
    model, calls = build(key), []
    with swap_attention(model), observing(calls.append):
        FAMILIES[key].run(model)
    encoder, cross = calls[:2], [call for call in calls if call.role == "cross"]
    for call in (*encoder, *cross):
        assert call.key_mask.sum(1).tolist() == list(SOURCES)
    for call in cross:
        assert call.attn_mask is None
    assert all((call.attn_mask is None) == (key == "marian") for call in encoder)  # T5 has its positions there


def test_grouped_heads_are_not_repeated():
    model, calls = build("mllama"), []
    with swap_attention(model), observing(calls.append):
        FAMILIES["mllama"].run(model)
    text = [(call.query.shape[1], call.key.shape[1]) for call in calls][-5:]
    assert text == [(4, 2)] * 5


def without_a_mask(model):
    draw = Draw(model)
    texts = draw.integers(VOCAB - 1, 2, 13, low=3)
    texts[:, 1] = VOCAB
    with torch.no_grad():
        return model(
            input_ids=texts,
            pixel_values=draw.normal(2, 1, 4, 3, 42, 42),
            aspect_ratio_ids=torch.tensor([[6], [2]]),
            aspect_ratio_mask=draw.lengths(4, 2)[:, None],
        ).logits


def test_mllama_cross_attention_without_a_mask_is_not_causal():
    stock, eager = without_a_mask(build("mllama")), without_a_mask(build("mllama", "eager"))
    assert (stock - eager).abs().max() > 0.1  # stock's sdpa is
    model = build("mllama")
    with swap_attention(model) as swap:
        ours = without_a_mask(model)
        assert swap.report().notes == [
            "MllamaTextCrossAttention: without a mask stock's sdpa makes this cross-attention causal, its eager does "
            "not; mmattn does not"
        ]
    reference = without_a_mask(build("mllama", "eager").double())
    assert deviation(ours, eager, reference).is_within
    assert torch.equal(without_a_mask(model), stock)
    with swap_attention(build("mllama", "eager")) as swap:
        assert swap.report().notes == []


def gradients(model, run):
    model.zero_grad()
    with torch.enable_grad():
        run(model).square().mean().backward()
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def loss_inputs(model):
    draw = Draw(model)
    sources, mask = padded(draw, SOURCES, model.config.pad_token_id)
    targets = draw.integers(VOCAB - 1, len(SOURCES), 7, low=3)
    return lambda each: each(sources, attention_mask=mask, decoder_input_ids=targets).logits


@pytest.mark.parametrize("key", ["marian", "t5", "whisper"])
def test_gradients_are_as_near_to_float64_as_stock_eager(key):
    model = build(key)
    run = FAMILIES[key].run.__wrapped__ if key == "whisper" else loss_inputs(model)
    with swap_attention(model):
        ours = gradients(model, run)
    eager = gradients(build(key, "eager"), run)
    reference = gradients(build(key, "eager").double(), run)
    assert ours.abs().max() > 0
    assert deviation(ours, eager, reference, factor=BACKWARD_FACTOR).is_within


def test_dropout_is_for_training_only():
    model = build("bart")
    for module in model.modules():
        if hasattr(module, "dropout") and hasattr(module, "q_proj"):
            module.dropout = 0.5
    run, stock = loss_inputs(model), loss_inputs(model)(model)
    with swap_attention(model):
        assert torch.allclose(run(model), stock, atol=1e-5)
        for module in model.modules():
            module.training = hasattr(module, "q_proj")  # dropout within attention only
        torch.manual_seed(0)
        first, second = run(model), run(model)
    assert not torch.equal(first, second)
