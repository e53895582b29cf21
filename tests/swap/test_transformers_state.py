"""What a swap of a transformers model does to other models, copies, files, compilers, adapters, and the way back."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from transformers import MarianMTModel
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

from mmattn.errors import RunError, UsageError
from mmattn.ops.observe import observing
from mmattn.swap import swap_attention
from mmattn.swap.transformers.settings import ConfigView

from .test_transformers import assert_same, everything
from .zoo_base import Draw
from .zoo_transformers import FAMILIES


@pytest.fixture(params=["marian", "blip", "mllama"])
def key(request):
    return request.param


def calls_of(model, key):
    calls = []
    with observing(calls.append):
        FAMILIES[key].run(model)
    return calls


def is_registered():
    gc.collect()  # models of other tests
    return ["mmattn" in registry._global_mapping for registry in (AttentionInterface, AttentionMaskInterface)]


def test_both_registries_know_us_exactly_while_a_model_is_swapped():
    assert is_registered() == [False, False]
    first, second = FAMILIES["marian"].build(), FAMILIES["t5"].build()
    one, two = swap_attention(first), swap_attention(second)
    assert is_registered() == [True, True]
    one.restore()
    assert is_registered() == [True, True]
    two.restore()
    assert is_registered() == [False, False]


def test_somebody_elses_entry_under_our_name_comes_back(monkeypatch):
    theirs = lambda *args, **kwargs: None  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, "mmattn", theirs)
    with swap_attention(FAMILIES["vit"].build()) as swap:
        assert AttentionInterface._global_mapping["mmattn"] is not theirs
        AttentionInterface.register("mmattn", theirs)
        assert swap.check() == ["transformers' attention implementation 'mmattn' was unregistered since"]
    assert AttentionInterface._global_mapping["mmattn"] is theirs


def test_an_entry_that_was_there_before_comes_back(monkeypatch):
    theirs = lambda *args, **kwargs: None  # noqa: E731
    monkeypatch.setitem(AttentionInterface._global_mapping, "mmattn", theirs)
    with swap_attention(FAMILIES["vit"].build()) as swap:
        assert AttentionInterface._global_mapping["mmattn"] is not theirs
        assert swap.check() == []
    assert AttentionInterface._global_mapping["mmattn"] is theirs


def test_a_model_from_a_file_registers_us():
    model = FAMILIES["vit"].build()
    with swap_attention(model):
        ours, data = FAMILIES["vit"].run(model), pickle.dumps(model)
    assert is_registered() == [False, False]
    other = pickle.loads(data)
    assert torch.equal(FAMILIES["vit"].run(other), ours)
    assert len(calls_of(other, "vit")) == 2
    swap_attention(other).restore()
    assert is_registered() == [False, False]


def test_two_models_one_restored(key):
    first, second = FAMILIES[key].build(), FAMILIES[key].build()
    stock = FAMILIES[key].run(first)
    one, two = swap_attention(first), swap_attention(second)
    ours = FAMILIES[key].run(second)
    one.restore()
    assert calls_of(first, key) == []
    assert torch.equal(FAMILIES[key].run(first), stock)
    assert len(calls_of(second, key)) == len(two.layers)
    assert torch.equal(FAMILIES[key].run(second), ours)
    two.restore()


def test_models_that_share_a_config_are_swapped_one_by_one():
    first = FAMILIES["marian"].build()
    second = MarianMTModel(first.config).eval()
    assert second.config is first.config
    with swap_attention(first):
        assert calls_of(second, "marian") == []
        assert len(calls_of(first, "marian")) == 6


@pytest.mark.parametrize("first_out", ["cross", "self"])
def test_roles_one_after_the_other_and_back_in_any_order(key, first_out):
    model = FAMILIES[key].build()
    before = everything(model)
    swaps = {"cross": swap_attention(model, role="cross"), "self": swap_attention(model, "eager", role="self")}
    calls = calls_of(model, key)
    assert {(call.role, call.backend) for call in calls} == {("cross", "sdpa"), ("self", "eager")}
    last = "self" if first_out == "cross" else "cross"
    swaps[first_out].restore()
    assert {call.role for call in calls_of(model, key)} == {last}
    assert swaps[last].check() == []
    swaps[last].restore()
    assert_same(before, everything(model))


def test_a_second_swap_is_refused(key):
    model = FAMILIES[key].build()
    with swap_attention(model):
        before = everything(model)
        with pytest.raises(UsageError, match="is already swapped; call restore"):
            swap_attention(model, role="cross")
        assert_same(before, everything(model))


def test_a_dropped_handle_leaves_the_swap_and_a_later_one_restores_to_stock(key):
    model = FAMILIES[key].build()
    before, stock = everything(model), FAMILIES[key].run(model)
    swap_attention(model)
    gc.collect()
    assert calls_of(model, key)
    swap_attention(model).restore()
    assert torch.equal(FAMILIES[key].run(model), stock)
    assert_same(before, everything(model))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_stay_swapped_when_the_original_is_restored(key, how):
    model = FAMILIES[key].build()
    stock = FAMILIES[key].run(model)
    swap = swap_attention(model)
    ours = FAMILIES[key].run(model)
    other = copy.deepcopy(model) if how == "deepcopy" else pickle.loads(pickle.dumps(model))
    swap.restore()
    assert len(calls_of(other, key)) == len(swap.layers)
    assert torch.equal(FAMILIES[key].run(other), ours)
    assert torch.equal(FAMILIES[key].run(model), stock)
    callers = {id(call.caller) for call in calls_of(other, key)}
    assert callers <= {id(module) for module in other.modules()}
    for module in other.modules():
        if isinstance(vars(module).get("config"), ConfigView):  # still one config, whoever sets it
            assert vars(module.config) is vars(module.config.stock_config)
            assert any(vars(each).get("config") is module.config.stock_config for each in other.modules())
    taken_over = swap_attention(other)
    taken_over.restore()
    assert calls_of(other, key) == []
    assert torch.equal(FAMILIES[key].run(other), stock)
    assert not any("_mmattn" in vars(module) or "forward" in vars(module) for module in other.modules())


def test_a_copy_keeps_the_registration_while_it_lives():
    model = FAMILIES["vit"].build()
    swap = swap_attention(model)
    other = copy.deepcopy(model)
    swap.restore()
    assert is_registered() == [True, True]
    del other
    with swap_attention(model):
        pass
    assert is_registered() == [False, False]


def test_settings_are_seen_on_both_sides_of_a_view():
    model = FAMILIES["marian"].build()
    attention = model.model.decoder.layers[0].self_attn
    with swap_attention(model):
        assert isinstance(attention.config, type(model.config))
        assert attention.config._attn_implementation == "mmattn"
        assert model.config._attn_implementation == "sdpa"
        model.config.activation_dropout = 0.25
        assert attention.config.activation_dropout == 0.25
        attention.config.activation_dropout = 0.5
        assert model.config.activation_dropout == 0.5
        attention.config._attn_implementation = "eager"
        assert model.config._attn_implementation == "eager"
        model.set_attn_implementation("sdpa")
        assert copy.deepcopy(attention.config)._attn_implementation == "mmattn"


def test_saved_files_do_not_know_us(key, tmp_path):
    model = FAMILIES[key].build()
    stock = FAMILIES[key].run(model)
    with swap_attention(model):
        model.save_pretrained(tmp_path)
    assert "mmattn" not in "".join(path.read_text() for path in tmp_path.glob("*.json"))
    again = type(model).from_pretrained(tmp_path)
    assert torch.equal(FAMILIES[key].run(again), stock)


def test_a_change_of_implementation_in_between():
    model = FAMILIES["marian"].build()
    swap = swap_attention(model)
    ours = FAMILIES["marian"].run(model)
    model.set_attn_implementation("eager")
    assert swap.check() == []
    assert len(calls_of(model, "marian")) == 6
    assert torch.allclose(FAMILIES["marian"].run(model), ours, atol=1e-5)
    model.config._attn_implementation_internal = "flash_attention_2"
    problems = swap.check()
    assert len(problems) == 6
    assert problems[0] == (
        "model.model.encoder.layers.0.self_attn: the model's attention implementation was set to flash_attention_2 "
        "since, and so were its masks"
    )
    with pytest.raises(RunError, match="the swap is not in place"):
        swap.verify()
    with pytest.raises(UsageError, match="flash_attention_2 made a"):
        FAMILIES["marian"].run(model)
    assert swap.restore() == []
    assert model.config._attn_implementation == "flash_attention_2"  # theirs, not ours to undo


@pytest.mark.parametrize("force", [False, True])
def test_a_module_that_somebody_changed_is_left_and_named(force):
    model = FAMILIES["blip"].build()
    before = everything(model)
    text = model.text_decoder.bert.encoder.layer[0].attention.self
    swap = swap_attention(model)
    theirs = lambda *args, **kwargs: None  # noqa: E731
    text.forward = theirs
    name = "model.text_decoder.bert.encoder.layer.0.attention.self"
    problem = f"{name}: BlipTextSelfAttention.forward was replaced by something else since"
    assert swap.check() == [problem]
    left = swap.restore(force=force)
    if force:
        assert left == []
        assert_same(before, everything(model))
    else:
        assert left == [f"{problem}; left as it is"]
        assert text.forward is theirs


def test_a_config_that_somebody_changed_is_left_and_named():
    model = FAMILIES["vit"].build()
    swap = swap_attention(model)
    attention, theirs = swap.layers[0].module, copy.deepcopy(model.config)
    attention.config = theirs
    problem = f"{swap.layers[0].full_name}: ViTAttention.config was set to something else since"
    assert swap.check() == [problem]
    assert swap.restore() == [f"{problem}; left as it is"]
    assert attention.config is theirs


def test_a_compiled_model_gives_the_same():
    model = FAMILIES["vit"].build()
    stock = FAMILIES["vit"].run(model)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with swap_attention(compiled) as swap:
        torch.testing.assert_close(FAMILIES["vit"].run(compiled), stock, rtol=1e-5, atol=1e-5)
        assert calls_of(compiled, "vit") == []  # within a graph nobody is told
        assert len(swap.layers) == 2
    assert torch.equal(FAMILIES["vit"].run(compiled), stock)


@pytest.mark.parametrize("key", ["marian", "blip"])
def test_a_compiled_layer_gives_the_same(key):
    """With self- and cross-attention, and padding, in one graph without breaks."""
    model = FAMILIES[key].build()
    draw = Draw(model)
    if key == "marian":
        layer, names = model.model.decoder.layers[0], ("encoder_hidden_states", "encoder_attention_mask")
        padding = draw.lengths(11, 4).bool()[:, None, None].repeat(1, 1, 7, 1)
        inputs = (draw.normal(2, 7, 64), *zip(names, (draw.normal(2, 11, 64), padding), strict=True))
    else:
        layer = model.text_decoder.bert.encoder.layer[0]
        lowest = torch.finfo(torch.float32).min
        padding = torch.where(draw.lengths(7, 4).bool(), 0.0, lowest)[:, None, None]
        inputs = (
            draw.normal(2, 7, 48),
            ("encoder_hidden_states", draw.normal(2, 11, 64)),
            ("attention_mask", padding),
        )
    torch._dynamo.reset()
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    with torch.no_grad():
        stock = layer(inputs[0], **dict(inputs[1:]))
        with swap_attention(model):
            ours = compiled(inputs[0], **dict(inputs[1:]))
        torch.testing.assert_close(ours, stock, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(compiled(inputs[0], **dict(inputs[1:])), stock)


def test_adapters_count():
    peft = pytest.importorskip("peft")
    model = FAMILIES["marian"].build()
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(model, config).eval()
    stock = FAMILIES["marian"].run(model)
    with swap_attention(model) as swap:
        torch.testing.assert_close(FAMILIES["marian"].run(model), stock, rtol=1e-5, atol=1e-5)
        with adapted.disable_adapter():
            assert (FAMILIES["marian"].run(model) - stock).abs().max() > 0.01
        assert swap.check() == []


@pytest.mark.parametrize("key", ["marian", "blip"])
def test_checkpointed_training_gives_the_same_gradients(key):
    model = FAMILIES[key].build()

    def gradient():
        model.zero_grad()
        with torch.enable_grad():
            FAMILIES[key].run.__wrapped__(model).square().mean().backward()
        return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])

    with swap_attention(model):
        plain = gradient()
        model.gradient_checkpointing_enable()
        for module in model.train().modules():
            for name in ("p", "dropout", "activation_dropout", "layerdrop"):
                if isinstance(vars(module).get(name), float):
                    setattr(module, name, 0.0)
        torch.testing.assert_close(gradient(), plain)
