"""IP-Adapters come, change and go while a pipeline is swapped; nothing of them is lost."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, IPAdapterAttnProcessor2_0
from safetensors.torch import load_file

import mmattn
from mmattn.errors import RunError

from . import zoo_sd
from .diffusers_pieces import CROSS, LAYERS, Picture, attentions, draw, run_tiny, tiny_pipeline
from .zoo_base import seeded

OURS = LAYERS + 2  # the VAE has two


def load(pipe, scales=(0.7, 0.4)):
    projections = [zoo_sd.plain_projection, zoo_sd.plus_projection][: len(scales)]
    return seeded(lambda: zoo_sd.load_adapters(pipe, [make() for make in projections], list(scales)))()


def pictures():
    return [draw(2, 1, 56, seed=4), draw(2, 1, 17, 52, seed=5)]


def run(pipe, **named):
    return run_tiny(pipe, steps=2, ip_adapter_image_embeds=pictures(), **named)


@pytest.fixture
def pipe():
    return tiny_pipeline()


def test_adapters_that_are_there_are_kept(pipe):
    load(pipe)
    stock, before, names = run(pipe), Picture(pipe), list(pipe.unet.state_dict())
    with mmattn.swap_attention(pipe) as swapped:
        assert torch.equal(run(pipe), stock)
        assert list(pipe.unet.state_dict()) == names
        assert "IP-Adapter x 2" in str(swapped.report())
        assert swapped.verify().is_ok
    assert before.differences(Picture(pipe)) == []
    assert torch.equal(run(pipe), stock)


def test_a_scale_that_is_set_while_swapped_counts_and_stays(pipe):
    other = load(tiny_pipeline(), (0.1, -0.9))
    stock = run(load(pipe))
    swapped = mmattn.swap_attention(pipe)
    pipe.set_ip_adapter_scale([0.1, -0.9])
    expected = run(other)
    assert torch.equal(run(pipe), expected)
    assert not torch.equal(expected, stock)
    assert swapped.restore() == []
    assert torch.equal(run(pipe), expected)
    assert next(iter(attentions(pipe.unet, "attn2").values())).processor.scale == [0.1, -0.9]


def test_scales_by_layer(pipe):
    other = load(tiny_pipeline())
    load(pipe)
    with mmattn.swap_attention(pipe):
        for each in (other, pipe):
            each.set_ip_adapter_scale([{"down": {"block_0": [0.3]}}, 0.5])
        assert torch.equal(run(pipe), run(other))


def test_an_adapter_that_is_loaded_while_swapped(pipe):
    expected = run(load(tiny_pipeline()))
    old = dict(pipe.unet.attn_processors)
    swapped = mmattn.swap_attention(pipe)
    load(pipe)
    assert torch.equal(run(pipe), expected)
    problems = swapped.check()
    assert len(problems) == LAYERS
    assert any(
        "attn1: its processor was replaced by a new one of its class, without its settings" in p for p in problems
    )
    assert any("attn2: its processor was replaced by IPAdapterAttnProcessor2_0" in problem for problem in problems)
    with pytest.raises(RunError, match=r"verify: the swap is not in place: .* \(and 7 more\)"):
        swapped.verify()
    left = swapped.restore()
    assert len(left) == CROSS
    assert all("attn2: IPAdapterAttnProcessor2_0 was installed since; left as it is" in line for line in left)
    assert torch.equal(run(pipe), expected)
    for name, attn in attentions(pipe.unet, "attn1").items():
        assert attn.processor is old[f"{name}.processor"]
    with mmattn.swap_attention(pipe) as again:  # and once more, with the adapter
        assert again.check() == []
        assert torch.equal(run(pipe), expected)
    assert torch.equal(run(pipe), expected)


def test_an_adapter_that_is_unloaded_while_swapped(pipe):
    plain = run_tiny(pipe)
    load(pipe)
    swapped = mmattn.swap_attention(pipe)
    pipe.unload_ip_adapter()
    assert torch.equal(run_tiny(pipe), plain)
    left = swapped.restore()
    assert len(left) == CROSS
    assert all("attn2: AttnProcessor2_0 was installed since" in line for line in left)
    assert torch.equal(run_tiny(pipe), plain)
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


def test_loaded_and_unloaded_while_swapped(pipe):
    plain, swapped = run_tiny(pipe), mmattn.swap_attention(pipe)
    load(pipe)
    pipe.unload_ip_adapter()
    assert torch.equal(run_tiny(pipe), plain)
    swapped.restore(force=True)
    assert torch.equal(run_tiny(pipe), plain)
    assert {type(processor) for processor in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}


def test_saving_while_swapped_writes_the_same_files(pipe, tmp_path):
    load(pipe)
    pipe.unet.save_pretrained(tmp_path / "stock")
    with mmattn.swap_attention(pipe):
        pipe.unet.save_pretrained(tmp_path / "ours")
        pipe.vae.save_pretrained(tmp_path / "vae")
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("stock", "ours")]
    assert files[0] == files[1]
    for name in files[0]:
        assert (tmp_path / "stock" / name).read_bytes() == (tmp_path / "ours" / name).read_bytes()
    weights = load_file(tmp_path / "ours" / "diffusion_pytorch_model.safetensors")
    assert sum("to_k_ip" in name for name in weights) == 2 * CROSS


def test_slicing_would_delete_the_adapters_and_restoring_brings_them_back(pipe):
    load(pipe)
    stock, old = run(pipe), dict(pipe.unet.attn_processors)
    swapped = mmattn.swap_attention(pipe)
    pipe.enable_attention_slicing()
    problems = swapped.check()
    assert len(problems) >= LAYERS
    assert "its processor was replaced by SlicedAttnProcessor (attention slicing, " in "\n".join(problems)
    left = swapped.restore()
    assert any("SlicedAttnProcessor was installed since; left as it is" in line for line in left)
    assert swapped.restore(force=True) == []
    assert all(processor is old[name] for name, processor in pipe.unet.attn_processors.items())
    assert torch.equal(run(pipe), stock)


def test_a_copy_has_weights_of_its_own(pipe):
    load(pipe)
    stock = run(pipe)
    swapped = mmattn.swap_attention(pipe)
    twin = copy.deepcopy(pipe)
    mine, its = (attentions(each.unet, "attn2") for each in (pipe, twin))
    for name in mine:
        assert its[name].processor.to_k_ip[0].weight is not mine[name].processor.to_k_ip[0].weight
        assert its[name].processor.settings.stock.to_k_ip is its[name].processor.to_k_ip
    assert torch.equal(run(twin), stock)
    twin.set_ip_adapter_scale([0.0, 0.0])
    assert not torch.equal(run(twin), stock)
    assert torch.equal(run(pipe), stock)
    twin.set_ip_adapter_scale([0.7, 0.4])
    swapped.restore()
    assert torch.equal(run(twin), stock)
    mmattn.swap_attention(twin).restore()
    assert torch.equal(run(twin), stock)
    assert {type(attn.processor) for attn in attentions(twin.unet, "attn2").values()} == {IPAdapterAttnProcessor2_0}


def test_moving_and_casting_reach_the_weights(pipe):
    load(pipe)
    with mmattn.swap_attention(pipe):
        pipe.unet.to(torch.bfloat16)
    processors = [
        attn.processor for attn in attentions(pipe.unet, "attn2").values() if hasattr(attn.processor, "to_k_ip")
    ]
    assert len(processors) >= CROSS
    assert {processor.to_k_ip[0].weight.dtype for processor in processors} == {torch.bfloat16}


def test_training_an_adapter(pipe):
    load(pipe)
    unet = pipe.unet

    def gradients():
        unet.zero_grad()
        conditions = {"image_embeds": pictures()}
        text = draw(2, 7, 48, seed=1)
        unet(draw(2, 4, 8, 8), torch.tensor(10), text, added_cond_kwargs=conditions).sample.square().sum().backward()
        return {name: weight.grad for name, weight in unet.named_parameters() if "_ip" in name}

    stock = gradients()
    with mmattn.swap_attention(pipe):
        ours = gradients()
    assert len(stock) == 4 * CROSS
    assert ours.keys() == stock.keys()
    assert all(gradient.any() and torch.equal(ours[name], gradient) for name, gradient in stock.items())
