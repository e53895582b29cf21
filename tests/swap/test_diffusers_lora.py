"""LoRA and DoRA in a swapped U-Net: applied as stock applies them, and never a kept projection from before."""

from __future__ import annotations

import contextlib
import copy

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import get_peft_model_state_dict

import mmattn

from .diffusers_pieces import (
    CROSS,
    Picture,
    a_text,
    add_lora,
    attentions,
    hits,
    run_tiny,
    run_unet,
    tiny_pipeline,
    tiny_unet,
)

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")


@contextlib.contextmanager
def twins(build=tiny_unet):
    """Stock and swapped, equal otherwise."""
    stock, ours = build(), build()
    with mmattn.swap_attention(ours) as swapped:
        yield stock, ours, swapped


def with_adapters(**settings):
    def build():
        unet = tiny_unet()
        add_lora(unet, *TARGETS, name="a", **settings)
        add_lora(unet, "to_k", "to_v", name="b", r=2)
        unet.set_adapters(["a"])
        return unet

    return build


def tuners(unet):
    return [module for module in unet.modules() if isinstance(module, BaseTunerLayer)]


# What may happen to an adapter between two steps.


def add_another(unet):
    add_lora(unet, "to_v", name="c")
    unet.set_adapters(["a", "c"])


def set_weights(unet):
    unet.set_adapters(["a"], [0.3])


def set_two(unet):
    unet.set_adapters(["a", "b"], [0.7, -0.4])


def set_other(unet):
    unet.set_adapter("b")


def disable(unet):
    unet.disable_adapters()


def disable_and_enable_another(unet):
    unet.disable_adapters()
    unet.set_adapter("b")
    unet.enable_adapters()


def scale_layers(unet):
    for layer in tuners(unet):
        layer.scale_layer(0.5)


def fuse(unet):
    unet.fuse_lora(lora_scale=0.5)


def fuse_safely(unet):
    unet.fuse_lora(safe_fusing=True)


def fuse_and_unfuse(unet):
    unet.fuse_lora()
    unet.unfuse_lora()


def fuse_and_unload(unet):
    unet.fuse_lora()
    unet.unload_lora()


def unload(unet):
    unet.unload_lora()


def delete(unet):
    unet.delete_adapters("a")


def change_in_place(unet):
    with torch.no_grad():
        for layer in tuners(unet):
            layer.lora_B["a"].weight.mul_(0.5)


def put_another_in_its_place(unet):
    """Peft copies the other's weights through `data`."""
    own = get_peft_model_state_dict(unet, adapter_name="a")
    other = {name: -2 * value if "lora_B" in name else value for name, value in own.items()}
    metadata = {"r": 4, "lora_alpha": 8, "target_modules": list(TARGETS)}
    unet.load_lora_adapter(other, adapter_name="a", prefix=None, metadata=metadata, hotswap=True)


def merge_by_hand(unet):
    for layer in tuners(unet):
        layer.merge()


CHANGES = [
    add_another, set_weights, set_two, set_other, disable, disable_and_enable_another, scale_layers, fuse, fuse_safely,
    fuse_and_unfuse, fuse_and_unload, unload, delete, change_in_place, put_another_in_its_place, merge_by_hand,
]  # fmt: skip
THE_SAME_IN_ANOTHER_WAY = [fuse_safely, fuse_and_unfuse, fuse_and_unload, merge_by_hand]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_of_adapters_is_seen(change):
    with twins(with_adapters()) as (stock, ours, swapped):
        text = a_text()
        before = run_unet(ours, text)
        assert torch.equal(before, run_unet(stock, text))
        run_unet(ours, text)
        assert hits(swapped) == CROSS
        for unet in (stock, ours):
            change(unet)
        expected = run_unet(stock, text)
        assert torch.equal(run_unet(ours, text), expected)
        assert torch.equal(run_unet(ours, text), expected)
        if change not in THE_SAME_IN_ANOTHER_WAY:
            assert (before - expected).abs().max() > 1e-3
        swapped.restore()
        assert torch.equal(run_unet(ours, text), expected)


def test_the_base_model_is_not_what_a_merged_one_gets():
    """The way that diffusers documents: load, fuse, unload. The base weights are written through `.data`."""
    with twins() as (stock, ours, swapped):
        text = a_text()
        before = run_unet(ours, text)
        for unet in (stock, ours):
            add_lora(unet, *TARGETS)
            unet.fuse_lora()
            unet.unload_lora()
        assert torch.equal(run_unet(ours, text), run_unet(stock, text))
        assert (run_unet(ours, text) - before).abs().max() > 1e-3
        assert swapped.restore() == []
        assert not vars(ours).keys() & {"fuse_lora", "unfuse_lora"}


def test_a_scale_that_is_passed_along():
    with twins(with_adapters()) as (stock, ours, swapped):
        text = a_text()
        for scale in (1.0, 0.5, 0.5, 0.0, 1.0):
            named = {"cross_attention_kwargs": {"scale": scale}}
            assert torch.equal(run_unet(ours, text, **named), run_unet(stock, text, **named))
        assert hits(swapped) == CROSS  # of the scale that came twice


def test_dora():
    with twins(with_adapters(use_dora=True)) as (stock, ours, swapped):
        text = a_text()
        assert torch.equal(run_unet(ours, text), run_unet(stock, text))
        assert torch.equal(run_unet(ours, text), run_unet(stock, text))
        assert hits(swapped) == CROSS
        for unet in (stock, ours):
            with torch.no_grad():
                for layer in tuners(unet):
                    layer.lora_magnitude_vector["a"].weight.mul_(1.5)
        assert torch.equal(run_unet(ours, text), run_unet(stock, text))
        for unet in (stock, ours):
            unet.fuse_lora()
        assert torch.equal(run_unet(ours, text), run_unet(stock, text))
        assert swapped.verify().is_ok


def test_dropout_of_an_adapter_in_training():
    with twins(with_adapters(lora_dropout=0.5)) as (stock, ours, swapped):
        text = a_text()
        for unet in (stock, ours):
            unet.train()
        outputs = []
        for unet in (stock, ours, ours):
            torch.manual_seed(len(outputs) // 2)
            outputs.append(run_unet(unet, text))
        torch.manual_seed(0)
        assert torch.equal(run_unet(ours, text), outputs[0])
        assert torch.equal(outputs[0], outputs[1])
        assert not torch.equal(outputs[1], outputs[2])
        assert hits(swapped) == 0
        for unet in (stock, ours):
            unet.eval()
        assert torch.equal(run_unet(ours, text), run_unet(stock, text))


def test_gradients_reach_the_adapter():
    gradients = []
    with twins(with_adapters()) as (stock, ours, _):
        for unet in (stock, ours):
            run = torch.enable_grad()(unet.forward)
            run(torch.ones(2, 4, 8, 8), torch.tensor(10), a_text()).sample.square().sum().backward()
            named = {name: weight.grad for name, weight in unet.named_parameters() if "lora_" in name and ".a." in name}
            gradients.append(named)
        assert gradients[0].keys() == gradients[1].keys()
        assert len(gradients[0]) == 2 * 4 * 2 * CROSS
        for name, gradient in gradients[0].items():
            assert gradient.any(), name
            assert torch.equal(gradients[1][name], gradient), name


def test_an_adapter_that_is_there_already_is_kept_and_named():
    unet = with_adapters()()
    stock = run_unet(unet)
    with mmattn.swap_attention(unet) as swapped:
        assert all("LoRA" in layer.features for layer in swapped.layers)
        assert "keeps LoRA" in str(swapped.report())
        assert torch.equal(run_unet(unet), stock)
        assert swapped.verify().is_ok


def test_a_pipeline_loads_and_unloads_while_swapped(tmp_path):
    donor = tiny_unet()
    add_lora(donor, *TARGETS)
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=get_peft_model_state_dict(donor))
    stock, ours = tiny_pipeline(), tiny_pipeline()
    swapped = mmattn.swap_attention(ours)
    plain = run_tiny(stock)
    steps = [
        lambda pipe: pipe.load_lora_weights(tmp_path, adapter_name="new"),
        lambda pipe: pipe.set_adapters(["new"], [0.5]),
        lambda pipe: pipe.disable_lora(),
        lambda pipe: pipe.enable_lora(),
        lambda pipe: pipe.fuse_lora(),
        lambda pipe: pipe.unfuse_lora(),
        lambda pipe: pipe.unload_lora_weights(),
    ]
    seen = []
    for step in steps:
        for pipe in (stock, ours):
            step(pipe)
        expected = run_tiny(stock)
        before = hits(swapped)
        assert torch.equal(run_tiny(ours), expected)
        assert hits(swapped) - before == 3 * CROSS  # also with an adapter fresh from a file
        assert swapped.check() == []
        seen.append((expected - plain).abs().max().item())
    assert min(seen[:2]) > 1e-2
    assert max(seen[-1:]) < 1e-4
    assert swapped.restore() == []


def test_fusing_in_a_copy_is_the_copys_own():
    unet = with_adapters()()
    with mmattn.swap_attention(unet) as swapped:
        text = a_text()
        expected = run_unet(unet, text)
        twin = copy.deepcopy(unet)
        run_unet(twin, text)
        twin.fuse_lora()
        twin.unload_lora()
        assert not tuners(twin)
        assert tuners(unet)
        assert torch.equal(run_unet(unet, text), expected)
        assert hits(swapped) == CROSS
        caches = [attn.processor.context_cache for attn in attentions(twin).values()]
        assert sum(cache.nbytes for cache in caches) == 0


def test_restoring_after_all_that_leaves_no_trace():
    unet = with_adapters()()
    before = Picture(unet)
    swapped = mmattn.swap_attention(unet)
    run_unet(unet, cross_attention_kwargs={"scale": 0.5})
    swapped.restore()
    run_unet(unet, cross_attention_kwargs={"scale": 1.0})
    assert before.differences(Picture(unet)) == []
