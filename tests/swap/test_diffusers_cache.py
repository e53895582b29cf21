"""Keys and values of a text are kept over the steps, and never given out when they are no longer right."""

from __future__ import annotations

import copy
import gc
import types
import weakref

import numpy
import pytest
import torch
from torch import Tensor, nn
from torch.optim import optimizer

import mmattn
from mmattn.swap.diffusers import context_cache, context_path, fingerprint

from .diffusers_pieces import CROSS, TEXT, TOKENS, a_text, attentions, draw, hits, keys_of, run_unet, tiny_unet


@pytest.fixture
def unet():
    return tiny_unet()


@pytest.fixture
def by_address_alone(monkeypatch):
    """The key that must not be: what a test of staleness is worth is seen when it fails with this one."""

    def of_tensor(tensor: Tensor):
        return fingerprint.Fingerprint(tensor.data_ptr(), ())

    for module in (fingerprint, context_cache, context_path):
        monkeypatch.setattr(module, "of_tensor", of_tensor)
    monkeypatch.setattr(fingerprint, "_OPTIMIZERS", types.SimpleNamespace(steps=0, watch=bool, rest=bool))


# What may happen between two steps. Each is given the U-Net and the text, and returns the text of the next step.


def other_prompt(unet, text):
    return a_text(5)


def change_text_in_place(unet, text):
    return text.mul_(1.5)


def other_view_of_the_same_memory(unet, text):
    return text.view(-1)[: text.numel()].view(2, TEXT, TOKENS).transpose(1, 2)


def change_weights_in_place(unet, text):
    for to_k in keys_of(unet):
        with torch.no_grad():
            to_k.weight.mul_(1.5)
    return text


def load_other_weights(unet, text):
    unet.load_state_dict({name: 1.1 * value for name, value in unet.state_dict().items()})
    return text


def assign_data(unet, text):
    for to_k in keys_of(unet):
        to_k.weight.data = 1.5 * to_k.weight.data
    return text


def new_parameters(unet, text):
    for to_k in keys_of(unet):
        to_k.weight = nn.Parameter(1.5 * to_k.weight.detach())
    return text


def new_modules(unet, text):
    for attn in attentions(unet, "attn2").values():
        attn.to_k = copy.deepcopy(attn.to_k)
        attn.to_k.weight.data = 1.5 * attn.to_k.weight.data
    return text


def optimizer_step(unet, text, make=lambda weights: torch.optim.SGD(weights, lr=0.5)):
    weights = [to_k.weight for to_k in keys_of(unet)]
    for weight in weights:
        weight.grad = draw(*weight.shape)
    make(weights).step()
    return text


def fused_optimizer_step(unet, text):
    return optimizer_step(unet, text, lambda weights: torch.optim.AdamW(weights, lr=0.5, fused=True))


def many_at_once_optimizer_step(unet, text):
    return optimizer_step(unet, text, lambda weights: torch.optim.Adam(weights, lr=0.5, foreach=True))


def half_and_back(unet, text):
    unet.to(torch.bfloat16).to(torch.float32)
    return text


def parametrize(unet, text):
    for to_k in keys_of(unet):
        nn.utils.parametrizations.weight_norm(to_k)
        with torch.no_grad():
            to_k.parametrizations.weight.original0.mul_(1.5)
    return text


def hook_on_the_projection(unet, text):
    for to_k in keys_of(unet):
        to_k.register_forward_hook(lambda module, inputs, output: 1.5 * output)
    return text


def hook_before_the_projection(unet, text):
    for to_k in keys_of(unet):
        to_k.register_forward_pre_hook(lambda module, inputs: (1.5 * inputs[0],))
    return text


def replace_forward(unet, text):
    for to_k in keys_of(unet):
        to_k.forward = lambda states, to_k=to_k: nn.Linear.forward(to_k, 1.5 * states)
    return text


class Scaled(nn.Module):
    """A projection with a tensor that is neither parameter nor buffer."""

    def __init__(self, linear, scales):
        super().__init__()
        self.linear, self.scales = linear, scales

    def forward(self, states):
        return self.linear(states) * self.scales["now"][0]


def change_a_plain_tensor(unet, text):
    for attn in attentions(unet, "attn2").values():
        attn.to_k.scales["now"][0].mul_(1.5)
    return text


def another_plain_tensor(unet, text):
    for attn in attentions(unet, "attn2").values():
        attn.to_k.scales["now"] = [torch.tensor(1.5)]
    return text


CHANGES = [
    other_prompt, change_text_in_place, other_view_of_the_same_memory, change_weights_in_place, load_other_weights,
    assign_data, new_parameters, new_modules, optimizer_step, fused_optimizer_step, many_at_once_optimizer_step,
    half_and_back, parametrize, hook_on_the_projection, hook_before_the_projection, replace_forward,
]  # fmt: skip
AT_THE_SAME_ADDRESS = [
    change_text_in_place, other_view_of_the_same_memory, change_weights_in_place, load_other_weights, optimizer_step,
    fused_optimizer_step, many_at_once_optimizer_step,
]  # fmt: skip


def before_and_after(unet, swapped, change):
    """Outputs before a change, after it, and after it with nothing kept."""
    text = a_text()
    before = run_unet(unet, text)
    again = run_unet(unet, text)
    assert torch.equal(before, again)
    assert hits(swapped) == CROSS
    text = change(unet, text)
    after = run_unet(unet, text)
    swapped.clear_cache()
    return before, after, run_unet(unet, text)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(unet, change):
    with mmattn.swap_attention(unet) as swapped:
        before, after, fresh = before_and_after(unet, swapped, change)
    assert torch.equal(after, fresh)
    assert (before - fresh).abs().max() > 1e-4  # staleness would show


@pytest.mark.parametrize("change", [change_a_plain_tensor, another_plain_tensor], ids=lambda change: change.__name__)
def test_a_change_of_a_plain_tensor_is_seen(unet, change):
    for attn in attentions(unet, "attn2").values():
        attn.to_k = Scaled(attn.to_k, {"now": [torch.tensor(1.0)]})
    test_a_change_is_seen(unet, change)


@pytest.mark.parametrize("change", AT_THE_SAME_ADDRESS, ids=lambda change: change.__name__)
def test_a_change_is_missed_when_the_address_is_all_one_looks_at(unet, change, by_address_alone):
    with mmattn.swap_attention(unet) as swapped:
        _, after, fresh = before_and_after(unet, swapped, change)
    assert not torch.equal(after, fresh)


def another_tensor_at_the_same_address(unet, text):
    """Two tensors over one piece of memory, as if the first had been freed: torch sees two storages."""
    memory = text.numpy()
    numpy.multiply(memory, 1.5, out=memory)
    other = torch.from_numpy(memory)
    assert other.data_ptr() == text.data_ptr()
    assert other._version == text._version
    return other


def test_another_tensor_at_the_same_address_is_another_text(unet):
    with mmattn.swap_attention(unet) as swapped:
        _, after, fresh = before_and_after(unet, swapped, another_tensor_at_the_same_address)
    assert torch.equal(after, fresh)


def test_another_tensor_at_the_same_address_is_missed_when_the_address_is_all(unet, by_address_alone):
    with mmattn.swap_attention(unet) as swapped:
        _, after, fresh = before_and_after(unet, swapped, another_tensor_at_the_same_address)
    assert not torch.equal(after, fresh)


def test_the_address_of_a_kept_text_is_not_given_to_another(unet):
    with mmattn.swap_attention(unet) as swapped:
        text = a_text()
        run_unet(unet, text)
        address, is_alive = text.data_ptr(), weakref.ref(text)
        del text
        gc.collect()
        others = [a_text(seed) for seed in range(50)]
        assert address not in [other.data_ptr() for other in others]
        assert is_alive() is not None
        swapped.clear_cache()
        assert is_alive() is None


def test_a_storage_that_is_gone_is_never_mistaken_for_a_new_one():
    seen = set()
    kept = []
    for seed in range(30):  # freed at once, so that torch gives out the same addresses again and again
        text = draw(64, 64, seed=seed)
        found = fingerprint.of_tensor(text)
        assert found is not None
        assert found.key not in seen
        seen.add(found.key)
        kept.append(found.held)
        del text


def test_a_write_that_no_counter_sees_needs_clear_cache(unet):
    with mmattn.swap_attention(unet) as swapped:
        text = a_text()
        before = run_unet(unet, text)
        for to_k in keys_of(unet):
            to_k.weight.data.mul_(1.5)  # as diffusers' EMAModel does
        swapped.clear_cache()
        after = run_unet(unet, text)
    assert torch.equal(after, run_unet(unet, text))
    assert not torch.equal(after, before)


def test_one_hook_watches_optimizers_whatever_becomes_of_handles(unet):
    hooks = optimizer._global_optimizer_post_hooks
    before = len(hooks)
    for _ in range(3):
        mmattn.swap_attention(unet)
        gc.collect()
        assert len(hooks) == before + 1
    mmattn.swap_attention(unet).restore()
    assert len(hooks) == before


def test_texts_that_never_come_again_are_not_kept_for_long():
    """Some models make a new tensor of the same text at each step."""
    cache, to_k = context_cache.ContextCache(), nn.Linear(3, 5)

    def fetch(text):
        return cache.fetch(text, (to_k,), lambda: (to_k(text), to_k(text)))

    texts = [torch.randn(2, 7, 3) for _ in range(context_cache._PATIENCE + 2)]
    with torch.no_grad():
        for text in texts[:-2]:
            fetch(text)
        assert cache.nbytes > 0
        for text in texts[-2:]:
            fetch(text)
        assert (cache.nbytes, cache.hits) == (0, 0)
        again = [fetch(texts[-1]) for _ in range(3)]  # one that does is projected once more, and kept
    assert (cache.hits, cache.misses) == (2, len(texts) + 1)
    assert again[0][0] is again[2][0]
