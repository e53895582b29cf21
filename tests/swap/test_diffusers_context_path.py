"""Models that project the text before their layers see it (PixArt, DeepFloyd IF): that is done once as well."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module

import mmattn
from mmattn.swap.diffusers import context_cache, context_path, fingerprint
from mmattn.swap.diffusers.context_path import Remembered

from .diffusers_pieces import attentions, draw, hits
from .zoo import FAMILIES
from .zoo_dits import TEXT

SIZES = {"resolution": None, "aspect_ratio": None}
LAYERS = 3


def caption(seed: int = 1):
    return draw(2, 9, TEXT, seed=seed)


@torch.no_grad()
def run(model, text):
    return model(draw(2, 4, 8, 12), text, torch.tensor([500, 500]), SIZES).sample


@pytest.fixture
def model():
    return FAMILIES["pixart"].build()


def projection(model):
    return model.caption_projection


def test_the_projected_text_is_one_tensor_over_the_steps(model):
    stock = run(model, caption())
    with mmattn.swap_attention(model) as swapped:
        text = caption()
        with torch.no_grad():
            assert projection(model)(text) is projection(model)(text)
        for _ in range(4):
            assert torch.equal(run(model, text), stock)
        assert hits(swapped) == 3 * LAYERS
        assert swapped.cache_bytes() > 0
        swapped.clear_cache()
        assert swapped.cache_bytes() == 0
    assert "forward" not in vars(projection(model))


def change_text(model, text):
    text.mul_(1.5)


def change_weights(model, text):
    with torch.no_grad():
        projection(model).linear_2.weight.mul_(1.5)


def load_weights(model, text):
    model.load_state_dict({name: 1.1 * value for name, value in model.state_dict().items()})


def hook(model, text):
    projection(model).linear_1.register_forward_hook(lambda module, inputs, output: 1.5 * output)


def outer_hook(model, text):
    projection(model).register_forward_pre_hook(lambda module, inputs: (1.5 * inputs[0],))


def change_keys(model, text):
    for attn in attentions(model, "attn2").values():
        with torch.no_grad():
            attn.to_v.weight.mul_(1.5)


CHANGES = [change_text, change_weights, load_weights, hook, outer_hook, change_keys]


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_seen(model, change):
    with mmattn.swap_attention(model) as swapped:
        text = caption()
        before = run(model, text)
        assert torch.equal(run(model, text), before)
        change(model, text)
        after = run(model, text)
        swapped.clear_cache()
        fresh = run(model, text)
    assert torch.equal(after, fresh)
    assert (fresh - before).abs().max() > 1e-4


@pytest.mark.parametrize("change", [change_text, change_weights, load_weights], ids=lambda change: change.__name__)
def test_a_change_is_missed_when_the_address_is_all_one_looks_at(model, change, monkeypatch):
    for module in (fingerprint, context_cache, context_path):
        monkeypatch.setattr(module, "of_tensor", lambda tensor: fingerprint.Fingerprint(tensor.data_ptr(), ()))
    with mmattn.swap_attention(model) as swapped:
        text = caption()
        run(model, text)
        change(model, text)
        after = run(model, text)
        swapped.clear_cache()
        assert not torch.equal(after, run(model, text))


def test_an_output_that_somebody_changed_is_not_given_out_again(model):
    with mmattn.swap_attention(model), torch.no_grad():
        text = caption()
        expected = projection(model)(text).clone()
        projection(model)(text).zero_()
        assert torch.equal(projection(model)(text), expected)


def test_autocast_training_and_gradients(model):
    text = caption()

    @torch.no_grad()
    def under(dtype):
        with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
            return projection(model)(text)

    stock = [under(dtype) for dtype in (None, torch.bfloat16, torch.float16, None)]
    with mmattn.swap_attention(model) as swapped:
        ours = [under(dtype) for dtype in (None, torch.bfloat16, torch.float16, None)]
        assert [output.dtype for output in ours] == [output.dtype for output in stock]
        assert all(torch.equal(*pair) for pair in zip(ours, stock, strict=True))
        output = projection(model)(text)
        output.sum().backward()
        assert swapped.cache_bytes() == 0
        assert projection(model).linear_1.weight.grad is not None
        model.train()
        with torch.no_grad():
            assert projection(model)(text) is not projection(model)(text)


def test_a_copy_has_its_own(model):
    with mmattn.swap_attention(model):
        text = caption()
        expected = run(model, text)
        twin = copy.deepcopy(model)
        remembered = vars(projection(twin))["forward"]
        assert isinstance(remembered, Remembered)
        assert remembered.module is projection(twin)
        assert remembered.nbytes == 0
        change_weights(twin, text)
        assert not torch.equal(run(twin, text), expected)
        assert torch.equal(run(model, text), expected)
    assert not torch.equal(run(twin, text), expected)
    before = run(twin, text)
    with mmattn.swap_attention(twin):
        assert torch.equal(run(twin, text), before)


def drop_the_handle(model):
    mmattn.swap_attention(model)
    return model


def copied(model):
    with mmattn.swap_attention(model):
        return copy.deepcopy(model)


def pickled(model):
    with mmattn.swap_attention(model):
        return pickle.loads(pickle.dumps(model))


@pytest.mark.parametrize("leave", [drop_the_handle, copied, pickled], ids=lambda leave: leave.__name__)
@torch.no_grad()
def test_a_later_swap_takes_over_what_no_handle_takes_care_of(model, leave):
    stock = run(model, caption())
    model = leave(model)
    gc.collect()
    assert "forward" in vars(projection(model))
    text = caption()
    swapped = mmattn.swap_attention(model)
    assert torch.equal(run(model, text), stock)
    projection(model).linear_1.weight.data.mul_(1.5)  # what no counter sees
    swapped.clear_cache()
    changed = run(model, text)
    assert swapped.restore() == []
    assert not vars(model).keys() & set(context_path.WRITING) | vars(projection(model)).keys() & {"forward"}
    assert torch.equal(run(model, text), changed)
    assert not torch.equal(changed, stock)


def test_self_attention_alone_leaves_the_projection_alone(model):
    for settings in ({"role": "self"}, {"cache_context": False}):
        with mmattn.swap_attention(model, **settings):
            assert not vars(model).keys() & {"fuse_lora"} | vars(projection(model)).keys() & {"forward"}


def test_a_hook_that_was_put_over_it_stays(model):
    class Louder(ModelHook):
        def post_forward(self, module, output):
            return 1.5 * output

    swapped = mmattn.swap_attention(model)
    text = caption()
    run(model, text)
    add_hook_to_module(projection(model), Louder())
    hooked = run(model, text)
    left = swapped.restore()
    assert len(left) == 1
    expected = "PixArtTransformer2DModel: PixArtAlphaTextProjection.forward was set to something else since"
    assert left[0].startswith(expected)
    assert (run(model, text) - hooked).abs().max() < 1e-5
    remove_hook_from_module(projection(model))
    assert (run(model, text) - run(FAMILIES["pixart"].build(), text)).abs().max() == 0


def test_deepfloyd_projects_its_text_once(monkeypatch):
    family = FAMILIES["deepfloyd_if"]
    pipe = family.build()
    calls = []
    linear = torch.nn.functional.linear
    weight = pipe.unet.encoder_hid_proj.weight
    stock = family.run(pipe)

    def counted(states, matrix, bias=None):
        calls.extend([1] if matrix is weight else [])
        return linear(states, matrix, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    with mmattn.swap_attention(pipe) as swapped:
        assert torch.equal(family.run(pipe), stock)
        assert len(calls) == 1
        assert hits(swapped) == 10
