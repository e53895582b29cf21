"""Swapping and taking it back: twice, in any order, with the user's hand in between, in copies, in part, in failure."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from diffusers import (
    ControlNetModel,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNetMotionModel,
)
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, IPAdapterAttnProcessor2_0

import mmattn
from mmattn.errors import RunError, UsageError
from mmattn.swap.diffusers.install import InstallProcessor
from mmattn.swap.diffusers.processors import SwappedAttnProcessor

from . import zoo_sd
from .diffusers_pieces import (
    CROSS,
    LAYERS,
    Picture,
    a_text,
    attentions,
    draw,
    registries,
    run_tiny,
    run_unet,
    tiny_pipeline,
    tiny_unet,
)
from .zoo import FAMILIES
from .zoo_base import liven, seeded


@pytest.fixture
def unet():
    return tiny_unet()


def kinds(model):
    return {type(attn.processor) for attn in attentions(model).values()}


def test_it_is_a_context_manager_also_when_the_block_fails(unet):
    before = Picture(unet)
    with pytest.raises(TypeError), mmattn.swap_attention(unet):
        unet(torch.ones(1))
    assert before.differences(Picture(unet)) == []


def test_swapping_twice_is_an_error_and_restoring_twice_is_not(unet):
    before = Picture(unet)
    swapped = mmattn.swap_attention(unet)
    during = Picture(unet)
    with pytest.raises(
        UsageError, match=r"model\.down_blocks.*attn1 is already swapped; call restore\(\) of that swap"
    ):
        mmattn.swap_attention(unet)
    assert during.differences(Picture(unet)) == []
    assert "restored" not in repr(swapped)
    assert swapped.restore() == []
    assert swapped.restore() == []
    assert swapped.restore(force=True) == []
    assert "restored" in repr(swapped)
    assert swapped.check() == ["this swap was restored"]
    with pytest.raises(RunError, match="this swap was restored"):
        swapped.verify()
    assert before.differences(Picture(unet)) == []
    with mmattn.swap_attention(unet) as again:
        assert again.check() == []


@pytest.mark.parametrize("first", [0, 1])
def test_roles_one_after_the_other(unet, first):
    stock, before = run_unet(unet), Picture(unet)
    swaps = [mmattn.swap_attention(unet, role="self", backend="eager"), mmattn.swap_attention(unet, role="cross")]
    assert [len(swap.report().swapped) for swap in swaps] == [CROSS, CROSS]
    assert (run_unet(unet) - stock).abs().max() < 1e-5
    assert all(swap.verify().is_ok for swap in swaps)
    assert swaps[first].restore() == []
    assert kinds(unet) == {SwappedAttnProcessor, AttnProcessor2_0}
    assert swaps[1 - first].check() == []
    assert swaps[1 - first].restore() == []
    assert before.differences(Picture(unet)) == []


def test_a_dropped_handle_leaves_the_swap_and_a_later_one_restores_to_stock():
    for build, run in ((tiny_unet, run_unet), (FAMILIES["flux"].build, FAMILIES["flux"].run)):
        model = build()
        stock, old = run(model), {name: processor for name, processor in model.attn_processors.items()}
        before = registries()
        mmattn.swap_attention(model)
        gc.collect()
        assert registries() != before
        assert torch.equal(run(model), stock)
        swapped = mmattn.swap_attention(model)
        assert swapped.report().layers[0].old_class == type(next(iter(old.values()))).__name__
        assert swapped.verify().is_ok
        assert swapped.restore() == []
        gc.collect()
        assert all(processor is old[name] for name, processor in model.attn_processors.items())
        assert registries() == before
        assert torch.equal(run(model), stock)


def test_a_swapped_model_goes_with_its_last_reference():
    """As a stock one does: who frees a card's memory need not think of collecting cycles."""
    for build, run in ((tiny_unet, run_unet), (FAMILIES["pixart"].build, FAMILIES["pixart"].run)):
        model = build()
        mmattn.swap_attention(model)
        run(model)
        gc.collect()  # the handle
        gone = weakref.ref(model)
        gc.disable()
        try:
            del model
            assert gone() is None
        finally:
            gc.enable()


def test_processors_that_the_user_puts_in_stay_until_forced(unet):
    old = dict(unet.attn_processors)
    swapped = mmattn.swap_attention(unet)
    theirs = AttnProcessor()
    name, attn = next(iter(attentions(unet, "attn2").items()))
    attn.set_processor(theirs)
    assert swapped.check() == [
        f"model.{name}: its processor was replaced by AttnProcessor (attention slicing, IP-Adapter loading and "
        "set_attn_processor do so)"
    ]
    left = swapped.restore()
    assert left == [f"model.{name}: AttnProcessor was installed since; left as it is"]
    assert attn.processor is theirs
    assert all(processor is old[key] for key, processor in unet.attn_processors.items() if name not in key)
    assert swapped.restore() == []
    assert attn.processor is theirs
    assert swapped.restore(force=True) == []
    assert attn.processor is old[f"{name}.processor"]
    assert swapped.restore(force=True) == []


def test_force_at_once(unet):
    before = Picture(unet)
    swapped = mmattn.swap_attention(unet)
    unet.set_attn_processor(AttnProcessor())
    assert swapped.restore(force=True) == []
    assert before.differences(Picture(unet)) == []


def test_putting_the_old_processor_back_by_hand_is_no_quarrel(unet):
    before, old = Picture(unet), dict(unet.attn_processors)
    swapped = mmattn.swap_attention(unet)
    unet.set_attn_processor(dict(old))
    assert len(swapped.check()) == LAYERS
    assert swapped.restore() == []
    assert before.differences(Picture(unet)) == []


def test_slicing_is_swapped_kept_and_restored(unet):
    unet.set_attention_slice(1)
    stock, before = run_unet(unet), Picture(unet)
    with mmattn.swap_attention(unet) as swapped:
        assert {layer.old_class for layer in swapped.layers} == {"SlicedAttnProcessor"}
        assert (run_unet(unet) - stock).abs().max() < 1e-5
        assert swapped.verify().is_ok
    assert before.differences(Picture(unet)) == []


def test_a_copy_belongs_to_no_handle(unet):
    stock = run_unet(unet)
    swapped = mmattn.swap_attention(unet)
    twin = copy.deepcopy(unet)
    assert kinds(twin) == {SwappedAttnProcessor}
    assert not {id(attn.processor) for attn in attentions(twin).values()} & {
        id(attn.processor) for attn in attentions(unet).values()
    }
    assert torch.equal(run_unet(twin), stock)
    swapped.restore()
    assert kinds(twin) == {SwappedAttnProcessor}
    assert torch.equal(run_unet(twin), stock)
    with mmattn.swap_attention(twin) as again:
        assert again.layers[0].old_class == "AttnProcessor2_0"
        assert again.verify().is_ok
        assert torch.equal(run_unet(twin), stock)
    assert kinds(twin) == {AttnProcessor2_0}
    assert torch.equal(run_unet(twin), stock)


def test_saving_while_swapped_writes_the_same_files(unet, tmp_path):
    unet.save_pretrained(tmp_path / "stock")
    with mmattn.swap_attention(unet):
        assert list(unet.state_dict()) == list(tiny_unet().state_dict())
        unet.save_pretrained(tmp_path / "ours")
        torch.save(unet, tmp_path / "whole.pt")
    for path in (tmp_path / "stock").iterdir():
        assert path.read_bytes() == (tmp_path / "ours" / path.name).read_bytes()
    loaded = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(run_unet(loaded), run_unet(unet))


def test_from_pipe_shares_the_swapped_model():
    pipe = tiny_pipeline()
    stock = run_tiny(pipe)
    swapped = mmattn.swap_attention(pipe)
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe)
    assert other.unet is pipe.unet
    with pytest.raises(UsageError, match="already swapped"):
        mmattn.swap_attention(other)
    assert torch.equal(run_tiny(pipe), stock)
    assert swapped.restore() == []
    assert kinds(other.unet) == {AttnProcessor2_0}
    with mmattn.swap_attention(other):
        assert torch.equal(run_tiny(pipe), stock)


def test_a_step_that_fails_undoes_those_before_it(monkeypatch):
    pipe = tiny_pipeline()
    before, count = Picture(pipe), []
    do = InstallProcessor.do

    def failing(step):
        count.append(1)
        if len(count) == 6:
            raise MemoryError
        do(step)

    monkeypatch.setattr(InstallProcessor, "do", failing)
    with pytest.raises(MemoryError):
        mmattn.swap_attention(pipe)
    monkeypatch.undo()
    assert before.differences(Picture(pipe)) == []
    with mmattn.swap_attention(pipe) as swapped:
        assert swapped.check() == []
    assert before.differences(Picture(pipe)) == []


def test_verifying_changes_nothing(unet):
    unet.train()
    modes = {name: module.training for name, module in unet.named_modules()}
    with mmattn.swap_attention(unet) as swapped:
        during = Picture(unet)
        random = torch.random.get_rng_state()
        assert swapped.verify().is_ok
        assert torch.equal(torch.random.get_rng_state(), random)
        assert during.differences(Picture(unet)) == []
    assert modes == {name: module.training for name, module in unet.named_modules()}


def test_verifying_on_the_users_own_inputs(unet):
    inputs = {"sample": torch.ones(1, 4, 8, 8), "timestep": torch.tensor(3), "encoder_hidden_states": a_text(batch=1)}
    with mmattn.swap_attention(unet) as swapped:
        verification = swapped.verify(**inputs)
        assert verification.is_ok
        assert [verdict.name for verdict in verification.models] == ["model"]
    pipe = tiny_pipeline()
    with mmattn.swap_attention(pipe) as swapped, pytest.raises(UsageError, match="inputs go to one model's forward"):
        swapped.verify(**inputs)


def test_verifying_finds_a_wrong_processor(unet, monkeypatch):
    leave = mmattn.swap.diffusers.processors.leave
    monkeypatch.setattr(mmattn.swap.diffusers.processors, "leave", lambda *arguments: 1.01 * leave(*arguments))
    with mmattn.swap_attention(unet) as swapped:
        verification = swapped.verify()
    assert not verification.is_ok
    assert not any(verdict.is_ok for verdict in [*verification.layers, *verification.models])
    text = str(verification)
    assert text.endswith("NOT the same output")
    assert "8 layers, 0 within tolerance; worst model." in text
    assert text.count("BEYOND") == LAYERS + 2


def test_all_controlnets_of_a_list():
    config = {
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "attention_head_dim": 2,
        "cross_attention_dim": zoo_sd.TEXT,
        "norm_num_groups": 4,
        "conditioning_embedding_out_channels": (8, 16),
    }
    nets = [seeded(lambda: liven(ControlNetModel(**config)))() for _ in range(2)]
    pipe = StableDiffusionControlNetPipeline(**zoo_sd.parts(tiny_unet()), controlnet=nets)
    with mmattn.swap_attention(pipe, parts=["controlnet"]) as swapped:
        names = [layer.full_name for layer in swapped.report().swapped]
        assert len(names) == 2 * 4
        assert names[0].startswith("controlnet.nets.0.down_blocks.0")
        assert names[-1].startswith("controlnet.nets.1.mid_block")
        assert kinds(nets[1]) == {SwappedAttnProcessor}
        assert kinds(pipe.unet) == {AttnProcessor2_0}


def test_parts_of_a_pipeline():
    pipe = tiny_pipeline()
    before = Picture(pipe)
    with mmattn.swap_attention(pipe, parts=["vae"]) as swapped:
        assert {layer.part for layer in swapped.layers} == {"vae"}
        assert kinds(pipe.unet) == {AttnProcessor2_0}
    with mmattn.swap_attention(pipe) as swapped:
        assert {layer.part for layer in swapped.layers} == {"unet", "vae"}  # text encoders only by name
    for parts, message in (
        (["unet", "nonsense"], r"no part nonsense in StableDiffusionPipeline; it has text_encoder, unet, vae"),
        ("unet", r'parts is a list of names: parts=\["unet"\]'),
        (["motion_modules"], r"has no such attention in these parts"),
    ):
        with pytest.raises(UsageError, match=message):
            mmattn.swap_attention(pipe, parts=parts)
    with pytest.raises(UsageError, match="a model by itself has no parts"):
        mmattn.swap_attention(pipe.unet, parts=["unet"])
    assert before.differences(Picture(pipe)) == []


def test_motion_modules_are_a_part_of_their_own():
    family = FAMILIES["animatediff"]
    pipe = family.build()
    before = Picture(pipe.unet)
    with mmattn.swap_attention(pipe, parts=["motion_modules"]) as swapped:
        assert {layer.part for layer in swapped.report().swapped} == {"motion_modules"}
        assert all("motion_modules" in layer.name for layer in swapped.report().swapped)
        count = len(swapped.report().swapped)
    with mmattn.swap_attention(pipe, parts=["unet"]) as swapped:
        assert not any("motion_modules" in layer.name for layer in swapped.report().swapped)
        assert count + len(swapped.report().swapped) == len(attentions(pipe.unet))
    assert before.differences(Picture(pipe.unet)) == []


def test_modules_that_are_exchanged_while_swapped_are_noticed():
    pipe = FAMILIES["animatediff"].build()
    with mmattn.swap_attention(pipe) as swapped:
        assert swapped.check() == []
        pipe.enable_free_noise(context_length=4, context_stride=2)
        there = set(pipe.unet.modules())
        gone = [layer.full_name for layer in swapped.layers if layer.part != "vae" and layer.module not in there]
        assert gone
        why = "its module is no longer in the model (enable_free_noise puts others in their place)"
        assert swapped.check() == [f"{name}: {why}" for name in gone]
        with pytest.raises(RunError, match="the swap is not in place: motion_modules"):
            swapped.verify()


def test_a_motion_model_that_is_made_from_a_swapped_unet():
    """With an IP-Adapter, whose weights diffusers takes over."""
    adapter = FAMILIES["animatediff"].build().motion_adapter
    pipe = StableDiffusionPipeline(**zoo_sd.parts(zoo_sd.unet_with(zoo_sd.SD1)))
    unet = seeded(lambda: zoo_sd.load_adapters(pipe, [zoo_sd.plain_projection()], [0.6]))().unet
    plain = UNetMotionModel.from_unet2d(unet, adapter).eval()
    with mmattn.swap_attention(unet):
        made = UNetMotionModel.from_unet2d(unet, adapter).eval()
    assert kinds(made) == {AttnProcessor2_0, IPAdapterAttnProcessor2_0}

    @torch.no_grad()
    def run(model):
        images, sample = {"image_embeds": [draw(1, 1, 56)]}, draw(1, 4, 2, 16, 16)
        return model(sample, torch.tensor(3), a_text(batch=2), added_cond_kwargs=images).sample

    stock = run(plain)
    assert torch.equal(run(made), stock)
    with mmattn.swap_attention(made):
        assert torch.equal(run(made), stock)
