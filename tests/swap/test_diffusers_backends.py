"""Which backend a swapped layer runs on: ours by name, by role, and diffusers' own choice; and the dispatcher world."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, attention_backend
from diffusers.models.transformers.transformer_anyflow_far import AnyFlowAttention, AnyFlowCausalAttnProcessor
from diffusers.models.transformers.transformer_flux import FluxAttnProcessor
from diffusers.models.transformers.transformer_kandinsky import Kandinsky5Attention
from diffusers.models.transformers.transformer_krea2 import Krea2Attention
from diffusers.models.transformers.transformer_stable_audio3 import StableAudio3SelfAttention

import mmattn
from mmattn.errors import BackendError, RunError, UsageError
from mmattn.ops import observe
from mmattn.swap.diffusers.dispatcher import UseBackend, backend_function

from .diffusers_pieces import LAYERS, Picture, a_text, attentions, draw, forget, registries, run_unet, tiny_unet
from .zoo import FAMILIES

REGISTRY = attention_dispatch._AttentionBackendRegistry


@pytest.fixture
def unet():
    return tiny_unet()


@pytest.fixture
def flux():
    return FAMILIES["flux"].build()


@pytest.fixture
def dispatched(monkeypatch):
    """Names of the backends that diffusers' dispatcher calls."""
    names = []
    for member, function in list(REGISTRY._backends.items()):

        def named(*arguments, member=member, function=function, **rest):
            names.append(member.value)
            return function(*arguments, **rest)

        monkeypatch.setitem(REGISTRY._backends, member, named)
    return names


def calls_of(run) -> list[tuple[str | None, str]]:
    """Role and backend of every attention of ours in `run`."""
    seen = []
    with observe.observing(lambda call: seen.append((call.role, call.backend))):
        run()
    return seen


def test_stock_unets_do_not_follow_diffusers_choice(unet, dispatched):
    before = REGISTRY._active_backend
    unet.set_attention_backend("_native_math")
    try:
        run_unet(unet)
        assert dispatched == []
        assert REGISTRY._active_backend != before  # what we put back: a process-wide default
    finally:
        REGISTRY.set_active_backend(before)


def test_a_swapped_unet_follows_it_layer_by_layer(unet, dispatched):
    stock, before = run_unet(unet), registries()
    swapped = mmattn.swap_attention(unet)
    assert calls_of(lambda: run_unet(unet)) == LAYERS // 2 * [("self", "sdpa"), ("cross", "sdpa")]
    assert dispatched == []

    unet.set_attention_backend("_native_math")
    assert calls_of(lambda: run_unet(unet)) == []
    assert dispatched == LAYERS * ["_native_math"]
    assert (run_unet(unet) - stock).abs().max() < 1e-5
    assert swapped.check() == []
    active = REGISTRY._active_backend
    assert swapped.verify().is_ok
    assert REGISTRY._active_backend is active

    unet.reset_attention_backend()
    dispatched.clear()
    assert len(calls_of(lambda: run_unet(unet))) == LAYERS
    assert dispatched == []
    assert swapped.restore() == []
    assert registries() == before
    assert torch.equal(run_unet(unet), stock)


@pytest.mark.parametrize("name", ["_native_math", "native", "flex"])
def test_masks_reach_diffusers_backends(unet, dispatched, name):
    text, mask = a_text(), torch.tensor([[0, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 1]])
    stock = run_unet(unet, text, encoder_attention_mask=mask)
    for settings in ({}, {"drop_padding": False}):
        with mmattn.swap_attention(unet, **settings):
            unet.set_attention_backend(name)
            assert (run_unet(unet, text, encoder_attention_mask=mask) - stock).abs().max() < 1e-5
    assert dispatched == 2 * LAYERS * [name]


def test_a_backend_that_takes_no_mask_says_so(unet):
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1, 1, 0, 0, 0, 0, 0]])
    with mmattn.swap_attention(unet):
        unet.set_attention_backend("_native_flash")
        with pytest.raises(ValueError, match=r"attn_mask"):
            run_unet(unet, encoder_attention_mask=mask)


def test_another_model_is_not_affected_after_restoring(unet, flux, dispatched):
    run = FAMILIES["flux"].run
    stock = run(flux)
    assert set(dispatched) == {"native"}
    swapped = mmattn.swap_attention(unet)
    unet.set_attention_backend("_native_math")
    swapped.restore()
    dispatched.clear()
    assert torch.equal(run(flux), stock)
    assert set(dispatched) == {"native"}


@pytest.mark.parametrize("first", [0, 1])
def test_the_process_default_comes_back_in_either_order(first):
    before, models = REGISTRY._active_backend, [tiny_unet(), tiny_unet()]
    swaps = [mmattn.swap_attention(models[0])]
    models[0].set_attention_backend("_native_math")
    swaps.append(mmattn.swap_attention(models[1]))
    swaps[first].restore()
    swaps[1 - first].restore()
    assert REGISTRY._active_backend is before


def test_diffusers_context_manager_is_about_other_models(unet, dispatched):
    with mmattn.swap_attention(unet), attention_backend("_native_math"):
        run_unet(unet)
    assert dispatched == []
    assert REGISTRY._active_backend == AttentionBackendName.NATIVE


@pytest.mark.parametrize("name", ["eager", "sdpa"])
def test_a_named_backend(unet, name):
    stock = run_unet(unet)
    with mmattn.swap_attention(unet, backend=name) as swapped:
        with mmattn.use_backend("flex"):  # a name holds
            assert {backend for _, backend in calls_of(lambda: run_unet(unet))} == {name}
        assert (run_unet(unet) - stock).abs().max() < 1e-5
        assert swapped.verify().is_ok
        assert f"now {name}" in str(swapped.report())


def test_auto_follows_use_backend_by_role(unet):
    with mmattn.swap_attention(unet):
        with mmattn.use_backend("eager", role="cross"):
            assert set(calls_of(lambda: run_unet(unet))) == {("self", "sdpa"), ("cross", "eager")}
        with mmattn.use_backend("eager", role="self"):
            assert set(calls_of(lambda: run_unet(unet))) == {("self", "eager"), ("cross", "sdpa")}
        assert {backend for _, backend in calls_of(lambda: run_unet(unet))} == {"sdpa"}


def test_joint_layers_have_no_role():
    for key in ("sd3", "flux"):
        model = FAMILIES[key].build()
        with mmattn.swap_attention(model), mmattn.use_backend("eager"):
            seen = set(calls_of(lambda key=key, model=model: FAMILIES[key].run(model)))
        assert (None, "eager") in seen


def test_the_dispatcher_calls_ours_for_each_layer(flux, dispatched):
    before = registries()
    with mmattn.swap_attention(flux) as swapped:
        seen = calls_of(lambda: FAMILIES["flux"].run(flux))
        assert seen == [(None, "sdpa")] * 2 + [("self", "sdpa")] * 3
        assert dispatched == []
        assert {"mmattn_joint_auto", "mmattn_self_auto"} <= {member.value for member in AttentionBackendName}
        assert len(swapped.report().swapped) == 5
    assert registries() == before


def test_a_role_of_a_dispatcher_model():
    wan = FAMILIES["wan"].build()
    with mmattn.swap_attention(wan, role="cross", backend="eager"):
        assert calls_of(lambda: FAMILIES["wan"].run(wan)) == 2 * [("cross", "eager")]


def test_two_models_share_a_registered_backend(flux):
    before, other = registries(), FAMILIES["flux"].build()
    stock = FAMILIES["flux"].run(flux)
    first, second = mmattn.swap_attention(flux), mmattn.swap_attention(other)
    first.restore()
    assert torch.equal(FAMILIES["flux"].run(other), stock)
    assert len(calls_of(lambda: FAMILIES["flux"].run(other))) == 5
    second.restore()
    assert registries() == before


def test_a_choice_of_diffusers_in_between_is_named_and_stays(flux):
    before = registries()
    swapped = mmattn.swap_attention(flux)
    flux.set_attention_backend("_native_math")
    problems = swapped.check()
    assert len(problems) == 5
    assert problems[0] == ("model.transformer_blocks.0.attn: the processor's backend was set to _native_math since")
    left = swapped.restore()
    assert len(left) == 5
    assert {processor._attention_backend.value for processor in flux.attn_processors.values()} == {"_native_math"}
    assert registries() == before
    assert swapped.restore(force=True) == []
    assert {processor._attention_backend for processor in flux.attn_processors.values()} == {None}


@pytest.mark.parametrize("key", ["flux", "wan", "qwenimage"])
@pytest.mark.parametrize("is_forced", [False, True])
def test_processors_that_were_exchanged_are_named_and_stay_until_forced(key, is_forced):
    """As loading an IP-Adapter into FLUX.1 does."""
    model = FAMILIES[key].build()
    before, own = Picture(model), list(model.attn_processors.values())
    swapped = mmattn.swap_attention(model)
    theirs = type(own[0])()
    model.set_attn_processor(theirs)
    replaced = (
        f"its processor was replaced, by one of {type(theirs).__name__} (IP-Adapter loading and set_attn_processor"
    )
    assert [replaced in line for line in swapped.check()] == [True] * len(own)
    with pytest.raises(RunError, match="the swap is not in place: model"):
        swapped.verify()
    left = swapped.restore(force=is_forced)
    if not is_forced:
        assert [replaced in line and line.endswith("; left as it is") for line in left] == [True] * len(own)
        assert set(model.attn_processors.values()) == {theirs}
        left = swapped.restore(force=True)
    assert left == []
    assert before.differences(Picture(model)) == []


def test_a_step_that_fails_leaves_nothing_registered(flux, monkeypatch):
    before, stock = registries(), Picture(flux)

    def fail(step):
        raise RuntimeError("broken")

    monkeypatch.setattr(UseBackend, "do", fail)
    with pytest.raises(RuntimeError, match="broken"):
        mmattn.swap_attention(flux)
    assert registries() == before
    assert stock.differences(Picture(flux)) == []


def test_a_later_swap_takes_out_what_a_dropped_handle_has_registered(flux):
    before = registries()
    mmattn.swap_attention(flux, backend="sdpa")
    forget()
    with mmattn.swap_attention(flux, backend="eager"):
        assert registries() != before
    assert registries() == before
    assert {processor._attention_backend for processor in flux.attn_processors.values()} == {None}


def test_block_masks_stay_with_diffusers_flex_backend(flux):
    for processor in flux.attn_processors.values():
        processor._attention_backend = AttentionBackendName.FLEX
    with pytest.raises(UsageError, match="FluxAttnProcessor: set to diffusers' backend flex, whose block masks no"):
        mmattn.swap_attention(flux)
    causal = AnyFlowAttention(24, 2, 12, processor=AnyFlowCausalAttnProcessor())
    with pytest.raises(UsageError, match="AnyFlowCausalAttnProcessor: set to diffusers' backend flex"):
        mmattn.swap_attention(causal)


@pytest.mark.parametrize(
    "layer",
    [StableAudio3SelfAttention(64, 32), Krea2Attention(48, 4, 2), Kandinsky5Attention(48, 24)],
    ids=lambda layer: type(layer).__name__,
)
def test_layers_say_their_sizes_in_many_ways(layer):
    with mmattn.swap_attention(layer) as swapped:
        assert swapped.verify().is_ok
        assert len(swapped.verify().layers) == 1


def test_one_processor_object_for_all_layers(flux):
    flux.set_attn_processor(FluxAttnProcessor())
    stock, before = FAMILIES["flux"].run(flux), Picture(flux)
    with mmattn.swap_attention(flux) as swapped:
        assert swapped.check() == []
        assert swapped.verify().is_ok
        assert calls_of(lambda: FAMILIES["flux"].run(flux)) == 5 * [(None, "sdpa")]
        assert torch.equal(FAMILIES["flux"].run(flux), stock)
    assert before.differences(Picture(flux)) == []
    with pytest.raises(UsageError, match="shares its processor object with layers that are not asked for"):
        mmattn.swap_attention(flux, role="self")


def test_a_copy_of_a_dispatcher_model_is_stock(flux):
    stock, before = FAMILIES["flux"].run(flux), registries()
    swapped = mmattn.swap_attention(flux)
    twin = copy.deepcopy(flux)
    swapped.restore()
    assert registries() == before
    assert calls_of(lambda: FAMILIES["flux"].run(twin)) == []
    assert torch.equal(FAMILIES["flux"].run(twin), stock)
    with mmattn.swap_attention(twin):
        assert torch.equal(FAMILIES["flux"].run(twin), stock)
    assert {processor._attention_backend for processor in twin.attn_processors.values()} == {None}


@pytest.mark.parametrize("chosen", [None, AttentionBackendName._NATIVE_MATH])
def test_a_pickled_dispatcher_model_is_stock(flux, chosen):
    """As it has to be in another process, which knows no backend of ours."""
    for processor in flux.attn_processors.values():
        processor._attention_backend = chosen
    stock = FAMILIES["flux"].run(flux)
    with mmattn.swap_attention(flux):
        data = pickle.dumps(flux)
    twin = pickle.loads(data)
    assert {processor._attention_backend for processor in twin.attn_processors.values()} == {chosen}
    assert torch.equal(FAMILIES["flux"].run(twin), stock)


def test_a_dispatcher_that_is_built_otherwise_is_not_touched(flux, unet, monkeypatch):
    before = Picture(flux)
    monkeypatch.delattr(REGISTRY, "_supported_arg_names")
    with pytest.raises(UsageError, match=r"diffusers 0.42.*: its attention dispatcher is not built as in 0.42"):
        mmattn.swap_attention(flux)
    stock = run_unet(unet)
    with mmattn.swap_attention(unet):  # needs no registered backend
        assert torch.equal(run_unet(unet), stock)
    monkeypatch.undo()
    assert before.differences(Picture(flux)) == []


def test_a_backend_that_cannot_serve_is_refused_before_anything_changes(unet, flux):
    for model in (unet.double(), flux.double()):
        before = Picture(model)
        with pytest.raises(BackendError, match=r"'flex' cannot serve model\..*: dtype float64 on cpu"):
            mmattn.swap_attention(model, backend="flex")
        assert before.differences(Picture(model)) == []


def dispatch(function, *shape, mask=None, **named):
    query, key, value = (draw(*shape, seed=seed) for seed in range(3))
    return function(query, key, value, attn_mask=mask, **named)


MASKS = {
    "[B, Lk]": torch.tensor([[True, True, False, True, False]] * 2),
    "[B, Lk] bias": torch.tensor([[0.0, 0.0, -3.0, 0.0, -10000.0]] * 2),
    "[B, 1, 1, Lk]": torch.tensor([[[[True, True, False, True, False]]]] * 2),
    "[Lq, Lk]": torch.ones(5, 5).tril().bool(),
    "[H, Lq, Lk]": draw(2, 5, 5, seed=7),
    "[B, 1, Lq, Lk]": draw(2, 1, 5, 5, seed=7) > -1,
    "[1, H, Lq, Lk]": draw(1, 2, 5, 5, seed=7),
}


@pytest.mark.parametrize("name", MASKS)
def test_the_registered_function_reads_masks_as_diffusers_native_does(name):
    native = REGISTRY._backends[AttentionBackendName.NATIVE]
    shape = (2, 5, 2, 8)  # as many heads as rows, so that mixing them up shows
    ours = dispatch(backend_function("self", "auto"), *shape, mask=MASKS[name])
    assert (ours - dispatch(native, *shape, mask=MASKS[name])).abs().max() < 1e-6


def test_the_registered_function_and_causality():
    native, ours = REGISTRY._backends[AttentionBackendName.NATIVE], backend_function("self", "auto")
    query, key = draw(1, 5, 2, 8), draw(1, 7, 2, 8, seed=1)
    for keys in (key, key[:, :5], key[:, :3]):
        expected = native(query, keys, keys, is_causal=True)
        assert (ours(query, keys, keys, is_causal=True) - expected).abs().max() < 1e-6
    with pytest.raises(UsageError, match="as many queries as keys"):
        ours(query, key, key, is_causal=True, attn_mask=torch.ones(5, 7).bool())


def test_the_registered_function_and_grouped_heads():
    native, ours = REGISTRY._backends[AttentionBackendName.NATIVE], backend_function("self", "auto")
    query, key = draw(1, 5, 4, 8), draw(1, 7, 2, 8, seed=1)
    expected = native(query, key, key, enable_gqa=True, scale=0.5)
    assert (ours(query, key, key, enable_gqa=True, scale=0.5) - expected).abs().max() < 1e-6
    with pytest.raises(UsageError, match="4 query heads, 2 key heads, and enable_gqa is off"):
        ours(query, key, key)
    with pytest.raises(UsageError, match="turn context parallelism off"):
        ours(query, key, key, enable_gqa=True, _parallel_config=object())


def test_dropout_in_training_goes_through():
    torch.manual_seed(0)
    ours = dispatch(backend_function("self", "auto"), 1, 5, 2, 8, dropout_p=0.9)
    assert (ours == 0).any()


def test_layers_named_twice_are_swapped_once(unet):
    assert len(attentions(unet)) == LAYERS
    unet.add_module("again", unet.mid_block)
    with mmattn.swap_attention(unet) as swapped:
        assert len(swapped.report().swapped) == LAYERS
