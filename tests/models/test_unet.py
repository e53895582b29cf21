"""The U-Net's own contract: contexts, refusals, settings, copies."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor2_0, FusedAttnProcessor2_0
from torch import nn

import mmattn
from mmattn.errors import UsageError
from mmattn.models.unet import TransformerBlock, UNet, UNetContext
from mmattn.nn import CrossAttention
from mmattn.ops.observe import AttentionCall, observing
from tests.swap.zoo_base import liven, seeded

TINY: dict[str, Any] = {
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "block_out_channels": (12, 20),
    "layers_per_block": 1,
    "attention_head_dim": 2,
    "cross_attention_dim": 11,
    "norm_num_groups": 4,
}
ATTENTIONS = 4  # to the text: one down, one in the middle, two up


@seeded
def tiny() -> UNet:
    return liven(UNet(**TINY))


@pytest.fixture(scope="module")
def unet() -> UNet:
    return tiny().requires_grad_(False)


def inputs(rows: int = 2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(rows, 4, 6, 5, generator=generator), torch.randn(rows, 7, 11, generator=generator)


def test_it_is_stocks_class_and_not(unet: UNet) -> None:
    assert mmattn.UNet is UNet
    assert isinstance(unet, UNet2DConditionModel)
    assert UNet.__name__ == "UNet2DConditionModel"
    assert repr(unet).startswith("mmattn.UNet(")
    assert sum(isinstance(module, TransformerBlock) for module in unet.modules()) == ATTENTIONS
    assert {type(module).__name__ for module in unet.modules()} >= set(unet._repeated_blocks)
    torch.manual_seed(3)
    ours = UNet(**TINY)
    torch.manual_seed(3)
    stock = UNet2DConditionModel(**TINY)
    for name, tensor in stock.state_dict().items():
        assert torch.equal(ours.state_dict()[name], tensor), name


@pytest.mark.parametrize("again", [copy.deepcopy, lambda unet: pickle.loads(pickle.dumps(unet))])
def test_copies_are_of_their_own(again: Any) -> None:
    first, (x, text) = tiny(), inputs()
    other = again(first)
    assert type(other) is UNet
    context = UNetContext(text)
    with torch.no_grad():
        assert torch.equal(first(x, 5, context).sample, other(x, 5, context).sample)
        for parameter in other.parameters():
            parameter.mul_(1.1)
        # A context serves several networks, each with its own keys and values.
        fresh = again(other)
        assert torch.equal(fresh(x, 5, context).sample, fresh(x, 5, text).sample)
        assert torch.equal(first(x, 5, context).sample, first(x, 5, text).sample)
        assert not torch.equal(first(x, 5, text).sample, fresh(x, 5, text).sample)


def test_from_stock_shares_the_parameters() -> None:
    stock = liven(UNet2DConditionModel(**TINY))
    stock.conv_in.weight.requires_grad_(False)
    stock.enable_gradient_checkpointing()
    ours = UNet.from_stock(stock.train())
    assert UNet.from_stock(ours) is ours
    assert ours.training
    assert ours.is_gradient_checkpointing
    theirs = dict(stock.named_parameters())
    assert {name: id(each) for name, each in ours.named_parameters()} == {n: id(each) for n, each in theirs.items()}
    assert not ours.conv_in.weight.requires_grad
    assert dict(ours.config) == dict(stock.config)


class Odd(AttnProcessor2_0):
    pass


def test_from_stock_refuses_what_it_would_lose() -> None:
    stock = UNet2DConditionModel(**TINY)
    stock.mid_block.attentions[0].transformer_blocks[0].attn2.set_processor(Odd())
    with pytest.raises(UsageError, match=r"mid_block\.attentions\.0\.transformer_blocks\.0 has an attn2 with the proc"):
        UNet.from_stock(stock)
    stock = UNet2DConditionModel(**TINY)
    stock.fuse_qkv_projections()
    with pytest.raises(UsageError, match="fused|FusedAttnProcessor"):
        UNet.from_stock(stock)
    stock = UNet2DConditionModel(**TINY)
    stock.conv_in = nn.Sequential(stock.conv_in)
    with pytest.raises(UsageError, match=r"other tensors than its config says .*: conv_in\.0\.bias"):
        UNet.from_stock(stock)
    stock = UNet2DConditionModel(**TINY)
    stock.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
    with pytest.raises(UsageError, match="has hooks of accelerate or diffusers"):
        UNet.from_stock(stock)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attention_type": "gated"}, r"transformer_blocks\.0 has a GLIGEN fuser"),
        ({"dual_cross_attention": True}, "dual_cross_attention=True has two text attentions"),
        (
            {"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")},
            r"down_blocks\.0\.attentions\.0 in a SimpleCrossAttnDownBlock2D is attention of another kind",
        ),
        (
            {"up_block_types": ("AttnUpBlock2D", "CrossAttnUpBlock2D")},
            r"up_blocks\.0\.attentions\.0 in a AttnUpBlock2D",
        ),
        (
            {"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"},
            r"mid_block\.attentions in a|mid_block\.attentions\.0 in a",
        ),
    ],
)
def test_blocks_of_another_kind_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        UNet(**TINY | changes)


@torch.no_grad()
def test_a_context_holds_what_was_projected(unet: UNet) -> None:
    x, text = inputs()
    mask = torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    lazy, eager = UNetContext(text, mask), unet.project_context(text, mask)
    assert repr(lazy) == "UNetContext(text [2, 7, 11], key_mask, 0 projections kept)"
    assert repr(eager) == f"UNetContext(text [2, 7, 11], key_mask, {ATTENTIONS} projections kept)"
    assert (lazy.batch_size, lazy.length) == (2, 7)
    expected = unet(x, 5, lazy).sample
    assert lazy.nbytes == eager.nbytes > text.nbytes + mask.nbytes
    assert torch.equal(unet(x, 5, eager).sample, expected)
    moved = eager.to("cpu", torch.float64)
    assert moved.text.dtype is torch.float64
    found = copy.deepcopy(unet).double()(x.double(), 5, unet.project_context(text, mask).to(dtype=torch.float64)).sample
    torch.testing.assert_close(found.float(), expected)
    short = unet(x[1:], 5, text[1:, :4]).sample
    torch.testing.assert_close(expected[1:], short)


def test_gradients_never_meet_kept_projections() -> None:
    unet, (x, text) = tiny(), inputs()
    context = UNetContext(text)
    with torch.no_grad():
        unet(x, 5, context)  # kept, without a graph
    with torch.inference_mode():
        inferred = UNetContext(text)
        unet(x, 5, inferred)
    expected = torch.autograd.grad(unet(x, 5, text).sample.square().sum(), list(unet.parameters()))
    for given in (context, inferred, unet.project_context(text), UNetContext(text)):
        for _ in range(2):  # a second training step with the same context
            found = torch.autograd.grad(unet(x, 5, given).sample.square().sum(), list(unet.parameters()))
            for one, other in zip(found, expected, strict=True):
                torch.testing.assert_close(one, other)
    frozen = tiny().requires_grad_(False)
    frozen.conv_in.requires_grad_(True)
    with torch.inference_mode():
        kept = frozen.project_context(text)
    frozen(x, 5, kept).sample.sum().backward()  # projects anew, since autograd may save no inference tensor
    trained = text.clone().requires_grad_()
    frozen(x, 5, UNetContext(trained)).sample.sum().backward()
    assert trained.grad is not None
    assert trained.grad.abs().max() > 0


def test_bad_texts(unet: UNet) -> None:
    x, text = inputs()
    with pytest.raises(UsageError, match=r"the text is \[2, 7, 13\], this U-Net takes a width of 11: it was made for"):
        unet(x, 5, torch.ones(2, 7, 13))
    with pytest.raises(UsageError, match="takes a width of 11"):
        unet.project_context(torch.ones(2, 7, 13))
    with pytest.raises(UsageError, match="2 samples and 3 texts: a multiple of the texts is needed"):
        unet(x, 5, torch.ones(3, 7, 11))
    with pytest.raises(UsageError, match="encoder_hidden_states is None, but the blocks attend to a text"):
        unet(x, 5, None)
    with pytest.raises(UsageError, match=r"text is torch\.int64 \[2, 7, 11\], expected floats \[B, Lk, C\]"):
        UNetContext(text.long())
    with pytest.raises(UsageError, match=r"text is torch\.float32 \[7, 11\]"):
        UNetContext(text[0])
    for mask in (torch.ones(2, 7), torch.ones(2, 6, dtype=torch.bool)):
        with pytest.raises(UsageError, match=r"key_mask is .*, it must be boolean \[B, Lk\] = \[2, 7\]"):
            UNetContext(text, mask)


def test_unknown_attention_keywords(unet: UNet) -> None:
    x, text = inputs()
    for given in ({"gligen": {}}, {"ip_adapter_masks": [x], "scale": 0.5}):
        name = sorted(given)[0]
        with pytest.raises(UsageError, match=f"cross_attention_kwargs has {name}: only `scale`"):
            unet(x, 5, text, cross_attention_kwargs=given)
    expected = unet(x, 5, text).sample
    assert torch.equal(unet(x, 5, text, None, None, None, {"scale": 1.0}).sample, expected)  # by position too
    assert torch.equal(unet(x, 5, text, return_dict=False)[0], expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda unet: unet.set_attn_processor(AttnProcessor2_0()),
            r"no attention processors to set \(AttnProcessor2_0\)",
        ),
        (lambda unet: unet.set_attn_processor({"x": AttnProcessor2_0()}), "no attention processors to set"),
        (lambda unet: unet.set_attn_processor(FusedAttnProcessor2_0()), "no attention processors to set"),
        (lambda unet: unet.set_default_attn_processor(), "mmattn.use_backend"),
        (lambda unet: unet.set_attention_backend("flash"), r"does not follow set_attention_backend\('flash'\)"),
        (lambda unet: unet.enable_xformers_memory_efficient_attention(), "does not use xformers"),
        (lambda unet: unet.set_use_npu_flash_attention(True), "does not use NPU"),
        (lambda unet: unet.set_use_xla_flash_attention(True), "does not use XLA"),
        (lambda unet: unet._load_ip_adapter_weights([{}]), r"cannot take an IP-Adapter: .*swap_attention"),
        (lambda unet: unet.load_attn_procs("folder"), "merge_cross_attention_kv"),
        (lambda unet: unet.save_attn_procs("folder"), "save_cross_attention_kv"),
        (lambda unet: copy.deepcopy(unet).train().fuse_qkv_projections(), r"training mode"),
    ],
)
def test_settings_by_processors_are_refused(change: Any, message: str, unet: UNet) -> None:
    with pytest.raises(UsageError, match=message):
        change(unet)


def test_settings_that_mean_nothing_here(unet: UNet, caplog: pytest.LogCaptureFixture) -> None:
    unet.set_attn_processor({})
    unet.set_attention_slice(None)
    unet.disable_xformers_memory_efficient_attention()
    assert not caplog.text
    unet.set_attention_slice("auto")
    assert "needs no attention slicing" in caplog.text


@torch.no_grad()
def test_observers_see_every_call(unet: UNet) -> None:
    x, text = inputs()
    calls: list[AttentionCall] = []
    with observing(calls.append):
        unet(x, 5, unet.project_context(text))
    assert [call.role for call in calls] == ["self", "cross"] * ATTENTIONS
    names = {id(module): name for name, module in unet.named_modules()}
    assert names[id(calls[1].caller)] == "down_blocks.0.attentions.0.transformer_blocks.0.attn2"
    assert isinstance(calls[1].caller, CrossAttention)


@torch.no_grad()
def test_the_backend_is_ones_choice(unet: UNet) -> None:
    x, text = inputs()
    expected, calls = unet(x, 5, text).sample, []
    with mmattn.use_backend("eager", role="cross"), observing(calls.append):
        torch.testing.assert_close(unet(x, 5, text).sample, expected)
    assert {call.backend for call in calls if call.role == "cross"} == {"eager"}


@torch.no_grad()
def test_a_block_compiles_whole_with_a_context(unet: UNet) -> None:
    _, text = inputs()
    block = unet.mid_block.attentions[0].transformer_blocks[0]
    given = {"hidden_states": torch.randn(4, 6, 20), "encoder_hidden_states": unet.project_context(text)}
    compiled = torch.compile(block, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(**given), block(**given))
