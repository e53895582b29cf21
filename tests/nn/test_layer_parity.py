"""TransformerLayer against the layers of transformers and torch with the same weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from transformers import BertConfig, MarianConfig, ViTConfig
from transformers.models.bert.modeling_bert import BertLayer
from transformers.models.marian.modeling_marian import MarianDecoderLayer
from transformers.models.vit.modeling_vit import ViTLayer

from mmattn.nn import TransformerLayer

EMBED_DIM, NUM_HEADS, FFN_DIM = 35, 5, 61
BATCH, LENGTH, CONTEXT_LENGTH = 3, 7, 11


def copy_weights(layer: TransformerLayer, stock: nn.Module, names: dict[str, str]) -> None:
    """Copy each named stock submodule's tensors; strict both ways."""
    tensors = dict(stock.state_dict())
    state = {}
    for ours, theirs in names.items():
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = tensors.pop(f"{theirs}.{kind}")
    assert not tensors
    layer.load_state_dict(state)


def random_state(module: nn.Module) -> nn.Module:
    """Give every tensor, norms and biases included, values that matter."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0.3, 0.3)
    return module.eval()


def assert_parity(layer: TransformerLayer, stock: nn.Module, ours, theirs, x: Tensor, extra: list[Tensor]) -> None:
    """Equal in float64; in float32 at most twice the stock layer's own error (DESIGN, tolerance)."""
    wide = theirs(stock, x, *extra)
    torch.testing.assert_close(ours(layer, x, *extra), wide, rtol=1e-11, atol=1e-11)
    narrow = [tensor.float() for tensor in extra]
    stock_error = (theirs(copy.deepcopy(stock).float(), x.float(), *narrow).double() - wide).abs().max()
    our_error = (ours(copy.deepcopy(layer).float(), x.float(), *narrow).double() - wide).abs().max()
    assert our_error <= 2 * stock_error


@pytest.fixture
def x() -> Tensor:
    torch.manual_seed(0)
    return torch.randn(BATCH, LENGTH, EMBED_DIM, dtype=torch.float64)


@pytest.fixture
def key_mask() -> Tensor:
    mask = torch.ones(BATCH, LENGTH, dtype=torch.bool)
    mask[1, 5:] = False
    mask[2, :2] = False
    return mask


BERT_SELF = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn_norm": "attention.output.LayerNorm",
    "ffn.up_proj": "intermediate.dense",
    "ffn.down_proj": "output.dense",
    "ffn_norm": "output.LayerNorm",
}


@torch.no_grad()
def test_bert_layer_post_norm(x: Tensor, key_mask: Tensor) -> None:
    config = BertConfig(hidden_size=EMBED_DIM, num_attention_heads=NUM_HEADS, intermediate_size=FFN_DIM)
    config._attn_implementation = "eager"
    stock = random_state(BertLayer(config, layer_idx=0)).double()
    layer = TransformerLayer(EMBED_DIM, NUM_HEADS, FFN_DIM, norm_first=False, norm_eps=1e-12).double().eval()
    copy_weights(layer, stock, BERT_SELF)

    def theirs(module, x):
        bias = torch.zeros(BATCH, 1, 1, LENGTH, dtype=x.dtype).masked_fill(~key_mask[:, None, None], -1e9)
        return module(x, attention_mask=bias)

    assert_parity(layer, stock, lambda module, x: module(x, key_mask=key_mask), theirs, x, [])


@torch.no_grad()
def test_bert_decoder_layer_with_cross_attention(x: Tensor) -> None:
    config = BertConfig(
        hidden_size=EMBED_DIM,
        num_attention_heads=NUM_HEADS,
        intermediate_size=FFN_DIM,
        is_decoder=True,
        add_cross_attention=True,
    )
    config._attn_implementation = "eager"
    stock = random_state(BertLayer(config, layer_idx=0)).double()
    layer = TransformerLayer(
        EMBED_DIM, NUM_HEADS, FFN_DIM, has_cross_attention=True, is_causal=True, norm_first=False, norm_eps=1e-12
    )
    layer.double().eval()
    cross = {
        ours.replace("self_attn", "cross_attn"): theirs.replace("attention.", "crossattention.")
        for ours, theirs in BERT_SELF.items()
        if "self_attn" in ours
    }
    copy_weights(layer, stock, BERT_SELF | cross)
    context = torch.randn(BATCH, CONTEXT_LENGTH, EMBED_DIM, dtype=torch.float64)
    context_mask = torch.ones(BATCH, CONTEXT_LENGTH, dtype=torch.bool)
    context_mask[0, 6:] = False

    def ours(module, x, context):
        return module(x, context=context, context_mask=context_mask)

    def theirs(module, x, context):
        causal = torch.full((LENGTH, LENGTH), -1e9, dtype=x.dtype).triu(1)[None, None]
        padding = torch.zeros(BATCH, 1, 1, CONTEXT_LENGTH, dtype=x.dtype).masked_fill(
            ~context_mask[:, None, None], -1e9
        )
        return module(x, causal, encoder_hidden_states=context, encoder_attention_mask=padding)

    assert_parity(layer, stock, ours, theirs, x, [context])


@torch.no_grad()
def test_vit_layer_pre_norm(x: Tensor) -> None:
    config = ViTConfig(hidden_size=EMBED_DIM, num_attention_heads=NUM_HEADS, intermediate_size=FFN_DIM)
    config._attn_implementation = "sdpa"  # its eager softmax is float32 in every dtype
    stock = random_state(ViTLayer(config)).double()
    layer = TransformerLayer(EMBED_DIM, NUM_HEADS, FFN_DIM, norm_eps=config.layer_norm_eps).double().eval()
    names = {f"self_attn.{name}_proj": f"attention.{name}_proj" for name in ("q", "k", "v")}
    names |= {"self_attn.out_proj": "attention.o_proj", "ffn.up_proj": "mlp.fc1", "ffn.down_proj": "mlp.fc2"}
    names |= {"self_attn_norm": "layernorm_before", "ffn_norm": "layernorm_after"}
    copy_weights(layer, stock, names)
    assert_parity(layer, stock, lambda module, x: module(x), lambda module, x: module(x), x, [])


@torch.no_grad()
def test_marian_decoder_layer(x: Tensor) -> None:
    config = MarianConfig(
        d_model=EMBED_DIM, decoder_attention_heads=NUM_HEADS, decoder_ffn_dim=FFN_DIM, activation_function="swish"
    )
    config._attn_implementation = "eager"
    stock = random_state(MarianDecoderLayer(config, layer_idx=0)).double()
    layer = TransformerLayer(
        EMBED_DIM, NUM_HEADS, FFN_DIM, has_cross_attention=True, is_causal=True, norm_first=False, activation="silu"
    )
    layer.double().eval()
    names = {"ffn.up_proj": "fc1", "ffn.down_proj": "fc2", "ffn_norm": "final_layer_norm"}
    for ours, theirs in (("self_attn", "self_attn"), ("cross_attn", "encoder_attn")):
        names |= {f"{ours}.{name}_proj": f"{theirs}.{name}_proj" for name in ("q", "k", "v", "out")}
        names[f"{ours}_norm"] = f"{theirs}_layer_norm"
    copy_weights(layer, stock, names)
    context = torch.randn(BATCH, CONTEXT_LENGTH, EMBED_DIM, dtype=torch.float64)

    def theirs(module, x, context):
        causal = torch.full((LENGTH, LENGTH), -1e9, dtype=x.dtype).triu(1)[None, None]
        return module(x, causal, encoder_hidden_states=context, use_cache=False)

    assert_parity(layer, stock, lambda module, x, context: module(x, context=context), theirs, x, [context])


@pytest.mark.parametrize("norm_first", [True, False])
def test_torch_encoder_layer_and_its_gradients(x: Tensor, key_mask: Tensor, norm_first: bool) -> None:
    stock = nn.TransformerEncoderLayer(
        EMBED_DIM, NUM_HEADS, FFN_DIM, dropout=0.0, activation="relu", batch_first=True, norm_first=norm_first
    )
    random_state(stock).double().train()
    layer = TransformerLayer(EMBED_DIM, NUM_HEADS, FFN_DIM, norm_first=norm_first, activation="relu").double()
    state = stock.state_dict()
    packed = {kind: state.pop(f"self_attn.in_proj_{kind}").chunk(3) for kind in ("weight", "bias")}
    for kind, parts in packed.items():
        state |= {f"self_attn.{name}_proj.{kind}": part for name, part in zip("qkv", parts, strict=True)}
    renames = {"norm1": "self_attn_norm", "norm2": "ffn_norm", "linear1": "ffn.up_proj", "linear2": "ffn.down_proj"}
    for theirs, ours in renames.items():
        for kind in ("weight", "bias"):
            state[f"{ours}.{kind}"] = state.pop(f"{theirs}.{kind}")
    layer.load_state_dict(state)
    weights = torch.randn_like(x)
    results = []
    for module, arguments in ((layer, {"key_mask": key_mask}), (stock, {"src_key_padding_mask": ~key_mask})):
        inputs = x.clone().requires_grad_()
        out = module(inputs, **arguments)
        (out * weights).sum().backward()
        results.append((out, inputs.grad, module.get_submodule("self_attn.out_proj").weight.grad))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
