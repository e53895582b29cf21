"""What keeping a text's keys and values saves, what it costs in memory, and when nothing is kept."""

from __future__ import annotations

import copy
import gc
import threading
import weakref

import pytest
import torch
from torch import nn

import mmattn

from .diffusers_pieces import (
    CROSS,
    TOKENS,
    a_text,
    attentions,
    draw,
    hits,
    keys_of,
    misses,
    run_tiny,
    run_unet,
    tiny_pipeline,
    tiny_unet,
)


@pytest.fixture
def unet():
    return tiny_unet()


@pytest.fixture
def projections(monkeypatch):
    """Calls of each Linear layer, by the identity of its weight: a forward hook would switch the cache off."""
    counts: dict[int, int] = {}
    linear = torch.nn.functional.linear

    def counted(states, weight, bias=None):
        counts[id(weight)] = counts.get(id(weight), 0) + 1
        return linear(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    return counts


def test_it_is_projected_once_for_all_steps(projections):
    pipe = tiny_pipeline()
    weights = [id(to_k.weight) for to_k in keys_of(pipe.unet)]
    stock = run_tiny(pipe, steps=4)
    assert [projections[weight] for weight in weights] == [4] * CROSS
    projections.clear()
    with mmattn.swap_attention(pipe) as swapped:
        assert torch.equal(run_tiny(pipe, steps=4), stock)
        assert [projections[weight] for weight in weights] == [1] * CROSS
        assert (hits(swapped), misses(swapped)) == (3 * CROSS, CROSS)
        own = [id(attn.to_k.weight) for attn in attentions(pipe.unet, "attn1").values()]
        assert [projections[weight] for weight in own] == [4] * CROSS


def test_without_it_nothing_is_kept(unet):
    with mmattn.swap_attention(unet, cache_context=False) as swapped:
        text = a_text()
        assert torch.equal(run_unet(unet, text), run_unet(unet, text))
        assert (hits(swapped), swapped.cache_bytes()) == (0, 0)
        assert "fuse_lora" not in vars(unet)


def test_memory_is_bounded(unet):
    with mmattn.swap_attention(unet) as swapped:
        run_unet(unet, a_text(0))
        one = swapped.cache_bytes()
        assert one == sum(2 * 2 * TOKENS * to_k.out_features * 4 for to_k in keys_of(unet))
        old = a_text(1)
        is_alive = weakref.ref(old)
        run_unet(unet, old)
        assert swapped.cache_bytes() == 2 * one
        del old
        for seed in range(2, 6):
            run_unet(unet, a_text(seed))
        assert swapped.cache_bytes() == 2 * one
        gc.collect()
        assert is_alive() is None
        swapped.clear_cache()
        assert swapped.cache_bytes() == 0
        run_unet(unet)
    assert swapped.cache_bytes() == 0


def test_the_two_halves_of_guidance_may_come_one_after_the_other(unet):
    with mmattn.swap_attention(unet) as swapped:
        texts = [a_text(1), a_text(2)]
        for _ in range(3):
            for text in texts:
                run_unet(unet, text)
        assert misses(swapped) == 2 * CROSS
        assert hits(swapped) == 4 * CROSS


def test_nothing_is_kept_in_training(unet):
    with mmattn.swap_attention(unet) as swapped:
        text = a_text()
        run_unet(unet, text)
        assert swapped.cache_bytes() > 0
        with torch.enable_grad():
            unet(draw(2, 4, 8, 8), torch.tensor(10), text).sample.sum().backward()
        assert swapped.cache_bytes() == 0
        assert all(to_k.weight.grad.any() for to_k in keys_of(unet))
        run_unet(unet, text)
        unet.train()
        run_unet(unet, text)
        assert (hits(swapped), swapped.cache_bytes()) == (0, 0)


def test_dropout_in_a_projection_switches_it_off(unet):
    for attn in attentions(unet, "attn2").values():
        attn.to_k = nn.Sequential(attn.to_k, nn.Dropout(0.5))  # in training, though its parent is not
    with mmattn.swap_attention(unet, role="cross") as swapped:
        text = a_text()
        assert not torch.equal(run_unet(unet, text), run_unet(unet, text))
        assert hits(swapped) == 0
        unet.eval()
        assert torch.equal(run_unet(unet, text), run_unet(unet, text))
        assert hits(swapped) == CROSS


def test_inference_mode(unet):
    stock = run_unet(unet)
    with mmattn.swap_attention(unet) as swapped:
        text = a_text()
        with torch.inference_mode():
            assert torch.equal(run_unet(unet, text), stock)
            assert torch.equal(run_unet(unet), stock)  # and a text that was made in it
        assert swapped.cache_bytes() == 0
        assert torch.equal(run_unet(unet, text), stock)
        with torch.inference_mode():
            assert torch.equal(run_unet(unet, text), stock)
        assert hits(swapped) == CROSS
        text.requires_grad_()
        unet(draw(2, 4, 8, 8), torch.tensor(10), text).sample.sum().backward()
        assert text.grad.any()


def test_autocast_is_part_of_the_key(unet):
    text = a_text()
    precisions = [None, torch.bfloat16, torch.float16, None]

    def run(dtype):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return run_unet(unet, text)

    stock = [run(dtype) for dtype in precisions]
    with mmattn.swap_attention(unet):
        assert all(torch.equal(run(dtype), expected) for dtype, expected in zip(precisions, stock, strict=True))


def test_a_hook_on_all_modules_is_seen(unet):
    def louder(module, inputs, output):
        return 1.5 * output if isinstance(module, nn.Linear) else None

    with mmattn.swap_attention(unet) as swapped:
        text = a_text()
        run_unet(unet, text)
        handle = nn.modules.module.register_module_forward_hook(louder)
        try:
            after = run_unet(unet, text)
            assert (hits(swapped), swapped.cache_bytes()) == (0, 0)
        finally:
            handle.remove()
    handle = nn.modules.module.register_module_forward_hook(louder)
    try:
        assert torch.equal(after, run_unet(unet, text))
    finally:
        handle.remove()


def test_a_copy_keeps_nothing(unet):
    with mmattn.swap_attention(unet) as swapped:
        text = a_text()
        expected = run_unet(unet, text)
        twin = copy.deepcopy(unet)
        caches = [attn.processor.context_cache for attn in attentions(twin).values()]
        assert sum(cache.nbytes for cache in caches) == 0
        for to_k in keys_of(twin):
            with torch.no_grad():
                to_k.weight.mul_(1.5)
        assert not torch.equal(run_unet(twin, text), expected)
        assert torch.equal(run_unet(unet, text), expected)
        assert hits(swapped) == CROSS
        assert sum(cache.nbytes for cache in caches) > 0


def test_two_threads_with_a_prompt_each(unet):
    texts = [a_text(1), a_text(2), a_text(3)]
    expected = [run_unet(unet, text) for text in texts]
    wrong = []

    def generate(number):
        for _ in range(8):
            if not torch.equal(run_unet(unet, texts[number]), expected[number]):
                wrong.append(number)

    with mmattn.swap_attention(unet):
        threads = [threading.Thread(target=generate, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []
