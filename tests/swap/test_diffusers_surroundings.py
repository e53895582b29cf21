"""What surrounds a model: offloading, casting, compiling, layer skipping, fused projections."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import cpu_offload
from diffusers.hooks import (
    LayerSkipConfig,
    PyramidAttentionBroadcastConfig,
    apply_group_offloading,
    apply_layer_skip,
    apply_layerwise_casting,
    apply_pyramid_attention_broadcast,
)
from diffusers.models.attention_processor import Attention, FusedAttnProcessor2_0
from torch._dynamo.testing import CompileCounter

import mmattn
from mmattn.errors import RunError, UsageError

from .diffusers_pieces import (
    CROSS,
    LAYERS,
    Picture,
    a_text,
    attentions,
    draw,
    hits,
    registries,
    run_tiny,
    run_unet,
    tiny_pipeline,
    tiny_unet,
)
from .zoo import FAMILIES
from .zoo_base import liven, seeded

CPU = torch.device("cpu")


@pytest.fixture
def unet():
    return tiny_unet()


def offload_one_by_one(model):
    cpu_offload(model, execution_device=CPU)


def offload_blocks(model):
    apply_group_offloading(model, CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def offload_leaves(model):
    apply_group_offloading(model, CPU, CPU, offload_type="leaf_level")


def cast_layers(model):
    apply_layerwise_casting(model, storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)


def cast_layers_to_half(model):
    model.to(torch.bfloat16)
    model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.bfloat16)


WAYS = [offload_one_by_one, offload_blocks, offload_leaves, cast_layers, cast_layers_to_half]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("is_first", [True, False])
def test_weights_that_come_when_they_are_needed(way, is_first):
    stock, ours = tiny_unet(), tiny_unet()
    way(stock)
    text = a_text().to(torch.bfloat16 if way is cast_layers_to_half else torch.float32)
    expected = run_unet(stock, text)
    if is_first:
        way(ours)
    swapped = mmattn.swap_attention(ours)
    if not is_first:
        run_unet(ours, a_text())
        way(ours)
    for _ in range(2):
        assert torch.equal(run_unet(ours, text), expected)
    assert swapped.verify().is_ok
    assert swapped.restore() == []
    assert torch.equal(run_unet(ours, text), expected)


def test_another_text_while_weights_come_and_go(unet):
    stock = tiny_unet()
    cpu_offload(unet, execution_device=CPU)
    with mmattn.swap_attention(unet):
        for seed in (1, 2, 1):
            assert torch.equal(run_unet(unet, a_text(seed)), run_unet(stock, a_text(seed)))


def test_verifying_keeps_its_hands_off_hooks_that_give_outputs_again(unet):
    config = PyramidAttentionBroadcastConfig(
        cross_attention_block_skip_range=2,
        cross_attention_timestep_skip_range=(0, 1000),
        cross_attention_block_identifiers=("attn2",),
        current_timestep_callback=lambda: 500,
    )
    stock = tiny_unet()
    for model in (stock, unet):
        apply_pyramid_attention_broadcast(model, config)
    expected = [run_unet(stock, a_text(seed)) for seed in (1, 2, 3)]
    with mmattn.swap_attention(unet) as swapped:
        found = [run_unet(unet, a_text(1))]
        with pytest.raises(
            RunError, match="hook 'pyramid_attention_broadcast' on .* of model gives outputs of earlier"
        ):
            swapped.verify()
        found += [run_unet(unet, a_text(seed)) for seed in (2, 3)]
    assert all(map(torch.equal, found, expected))


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_unet_is_swapped_and_compiled_again_once(unet):
    counter = CompileCounter()
    compiled = torch.compile(unet, backend=counter, fullgraph=True)
    stock, before = [run_unet(compiled, a_text(seed)) for seed in (1, 2)], Picture(unet)
    assert counter.frame_count == 1
    with mmattn.swap_attention(compiled) as swapped:
        assert len(swapped.report().swapped) == LAYERS
        # The registry remembers its choices; while that is empty, dynamo guards on it, and compiles once more.
        run_unet(unet)
        for _ in range(2):
            for seed in (1, 2):
                assert torch.equal(run_unet(compiled, a_text(seed)), stock[seed - 1])
        assert counter.frame_count == 2
        assert hits(swapped) == 0  # nothing is kept by what is compiled
    assert before.differences(Picture(unet)) == []
    assert torch.equal(run_unet(compiled, a_text(1)), stock[0])


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("key", ["pixart", "sd35", "flux"])
def test_compiling_transformers(key):
    """PixArt with padding: masked instead of left out."""
    family = FAMILIES[key]
    model = family.build()
    stock = family.run(model)
    with mmattn.swap_attention(model):
        assert (family.run(torch.compile(model, backend="eager", fullgraph=True)) - stock).abs().max() < 1e-5


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("key", ["flux", "wan"])
def test_compiling_repeated_blocks(key):
    """As often as stock, however many blocks there are: torch guards the identity of what a block's backend is."""
    family = FAMILIES[key]
    graphs = []
    for is_swapped in (False, True):
        torch.compiler.reset()
        model, counter = family.build(), CompileCounter()
        swapped = mmattn.swap_attention(model) if is_swapped else None
        model.compile_repeated_blocks(backend=counter, fullgraph=True)
        family.run(model)
        graphs.append(counter.frame_count)
        if swapped is not None:
            assert swapped.verify().is_ok, "which runs uncompiled"
            swapped.restore()
    assert graphs[0] == graphs[1]


@pytest.mark.usefixtures("fresh_compiler")
def test_compiling_in_training():
    attn = seeded(lambda: liven(Attention(20, 12, heads=2, dim_head=10, norm_num_groups=4)))()

    def gradients(model):
        states, text = draw(2, 20, 3, 5).requires_grad_(), draw(2, 7, 12, seed=1).requires_grad_()
        model(states, encoder_hidden_states=text).square().sum().backward()
        return states.grad, text.grad

    stock = gradients(attn)
    with mmattn.swap_attention(attn):
        ours = gradients(torch.compile(attn, backend="aot_eager", fullgraph=True))
    assert all(
        (got - expected).abs().max() < 1e-5 * expected.abs().max() for got, expected in zip(ours, stock, strict=True)
    )


@pytest.mark.parametrize(
    "settings", [{"skip_attention": True}, {"skip_attention": False, "skip_attention_scores": True}]
)
@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_layer_skipping_knows_our_processor(settings, backend):
    stock, ours = tiny_unet(), tiny_unet()
    before = registries()
    where = "down_blocks.0.attentions.0.transformer_blocks"
    with mmattn.swap_attention(ours, backend=backend) as swapped:
        for model in (stock, ours):
            apply_layer_skip(model, LayerSkipConfig([0], fqn=where, skip_ff=False, **settings))
        expected = run_unet(stock)
        assert torch.allclose(run_unet(ours), expected, rtol=0, atol=0 if backend == "auto" else 1e-5)
        assert (expected - run_unet(tiny_unet())).abs().max() > 1e-3
        assert swapped.check() == []
    assert registries() == before
    assert torch.equal(run_unet(ours), expected)


def test_fused_projections_are_left_alone_until_they_are_undone(unet):
    stock = run_unet(unet)
    unet.fuse_qkv_projections()
    with pytest.raises(UsageError, match=r"8 of 8 .*FusedAttnProcessor2_0: .*call unfuse_qkv_projections\(\) first"):
        mmattn.swap_attention(unet)
    unet.unfuse_qkv_projections()
    with mmattn.swap_attention(unet) as swapped:  # though the flag that they are fused is still set
        assert len(swapped.report().swapped) == LAYERS
        assert torch.equal(run_unet(unet), stock)


def test_fusing_while_swapped_is_noticed(unet):
    stock, old = run_unet(unet), dict(unet.attn_processors)
    swapped = mmattn.swap_attention(unet)
    unet.fuse_qkv_projections()
    problems = swapped.check()
    assert len(problems) == LAYERS
    assert "its processor was replaced by FusedAttnProcessor2_0" in problems[0]
    assert (run_unet(unet) - stock).abs().max() < 1e-4
    left = swapped.restore()
    assert len(left) == LAYERS
    assert {type(processor) for processor in unet.attn_processors.values()} == {FusedAttnProcessor2_0}
    swapped.restore(force=True)
    assert all(processor is old[name] for name, processor in unet.attn_processors.items())


def test_diffusers_default_processors_cannot_be_asked_for_while_swapped(unet):
    with mmattn.swap_attention(unet) as swapped:
        with pytest.raises(ValueError, match="SwappedAttnProcessor"):
            unet.set_default_attn_processor()
        assert swapped.check() == []


def test_cross_attention_kwargs_that_no_layer_knows_are_dropped_as_before(unet):
    stock = run_unet(unet)
    with mmattn.swap_attention(unet):
        assert torch.equal(run_unet(unet, cross_attention_kwargs={"nonsense": 1}), stock)


def test_a_module_that_stands_for_a_projection(unet):
    """As quantised layers do, whose `.weight` is not what they multiply with."""

    class Doubled(torch.nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.layer = layer

        def forward(self, states):
            return 2 * self.layer(states)

    for attn in attentions(unet).values():
        attn.to_k, attn.to_v, attn.to_q = Doubled(attn.to_k), Doubled(attn.to_v), Doubled(attn.to_q)
    text = a_text()
    stock = run_unet(unet, text)
    with mmattn.swap_attention(unet) as swapped:
        for _ in range(2):
            assert torch.equal(run_unet(unet, text), stock)
        assert hits(swapped) == CROSS


def test_a_copied_pipeline_runs_by_itself():
    pipe = tiny_pipeline()
    stock = run_tiny(pipe)
    with mmattn.swap_attention(pipe):
        twin = copy.deepcopy(pipe)
        assert torch.equal(run_tiny(twin), stock)
    assert torch.equal(run_tiny(twin), stock)
    with mmattn.swap_attention(twin):
        assert torch.equal(run_tiny(twin), stock)
