from __future__ import annotations

import copy
import io
from pathlib import Path

import peft
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mmattn.errors import UsageError
from mmattn.nn import CrossAttention, SelfAttention, TransformerLayer, fuse, unfuse
from mmattn.ops.cache import KVCache

EMBED_DIM, CONTEXT_DIM = 24, 17


def make(dtype: torch.dtype = torch.float64) -> TransformerLayer:
    torch.manual_seed(20)
    layer = TransformerLayer(
        EMBED_DIM,
        6,
        31,
        num_kv_heads=2,
        has_cross_attention=True,
        context_dim=CONTEXT_DIM,
        is_causal=True,
        qk_norm="rms",
    )
    return layer.to(dtype).eval()


def attentions(layer: TransformerLayer) -> tuple[SelfAttention, CrossAttention]:
    assert layer.self_attn is not None
    assert layer.cross_attn is not None
    return layer.self_attn, layer.cross_attn


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor]:
    torch.manual_seed(21)
    return torch.randn(6, 5, EMBED_DIM).double(), torch.randn(3, 7, CONTEXT_DIM).double()


def run(layer: nn.Module, inputs: tuple[Tensor, Tensor]) -> Tensor:
    with torch.no_grad():
        return layer(inputs[0], context=inputs[1])


def count_products(layer: nn.Module, inputs: tuple[Tensor, Tensor], monkeypatch: pytest.MonkeyPatch) -> int:
    count = 0
    linear = F.linear

    def counting(*args: Tensor) -> Tensor:
        nonlocal count
        count += 1
        return linear(*args)

    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", counting)
        run(layer, inputs)
    return count


def test_fused_is_equal_and_takes_fewer_products(inputs, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make()
    expected = run(layer, inputs)
    assert count_products(layer, inputs, monkeypatch) == 4 + 4 + 2
    assert fuse(layer) is layer
    assert count_products(layer, inputs, monkeypatch) == 2 + 3 + 2
    torch.testing.assert_close(run(layer, inputs), expected, rtol=1e-11, atol=1e-11)
    assert all(attention.is_fused for attention in attentions(layer))
    assert "fused" in repr(layer.self_attn)
    unfuse(layer)
    assert count_products(layer, inputs, monkeypatch) == 4 + 4 + 2
    assert torch.equal(run(layer, inputs), expected)


def test_without_bias(inputs) -> None:
    torch.manual_seed(22)
    module = SelfAttention(EMBED_DIM, 6, bias=False, out_bias=True).double().eval()
    with torch.no_grad():
        expected = module(inputs[0])
        torch.testing.assert_close(module.fuse()(inputs[0]), expected, rtol=1e-11, atol=1e-11)


@torch.no_grad()
def test_cached_steps_are_equal_when_fused(inputs) -> None:
    x, context = inputs
    layer = make()
    expected = run(layer, inputs)
    fuse(layer)
    cache = KVCache(6, 2, 4, max_length=5, dtype=torch.float64, device="cpu")
    projected = layer.project_context(context)
    steps = [layer(step, context=projected, cache=cache) for step in x.split(1, dim=1)]
    torch.testing.assert_close(torch.cat(steps, dim=1), expected, rtol=1e-11, atol=1e-11)


def test_state_dict_is_unchanged_and_stays_usable(tmp_path: Path, inputs) -> None:
    layer = make()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    fuse(layer)
    state = layer.state_dict()
    assert list(state) == list(before)
    assert all(torch.equal(state[name], before[name]) for name in before)
    save_file(state, tmp_path / "layer.safetensors")
    opened = load_file(tmp_path / "layer.safetensors")
    assert all(torch.equal(opened[name], before[name]) for name in before)
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in torch.load(buffer).items())
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    expected = run(other, inputs)
    layer.load_state_dict(other.state_dict())
    assert attentions(layer)[0].is_fused
    torch.testing.assert_close(run(layer, inputs), expected, rtol=1e-11, atol=1e-11)


def test_weights_are_held_once_and_released() -> None:
    self_attn, _ = attentions(fuse(make()))
    storages = {getattr(self_attn, name).weight.untyped_storage().data_ptr() for name in self_attn.packed_names}
    assert len(storages) == 1
    self_attn.unfuse()
    for name in self_attn.packed_names:
        weight = getattr(self_attn, name).weight
        assert weight.untyped_storage().nbytes() == weight.nbytes


def test_loading_by_assignment_undoes_it(inputs) -> None:
    layer = fuse(make())
    other = make()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    expected = run(other, inputs)
    layer.load_state_dict(other.state_dict(), assign=True)
    assert torch.equal(run(layer, inputs), expected)
    assert not any(attention.is_fused for attention in attentions(layer))


def test_training_mode_refuses_and_undoes(inputs) -> None:
    layer = make().train()
    with pytest.raises(
        UsageError, match=r"fuse: self_attn: it is in training mode \(call eval\(\) first\); cross_attn"
    ):
        fuse(layer)
    assert not any(attention.is_fused for attention in attentions(layer))
    with pytest.raises(UsageError, match="SelfAttention cannot be fused: it is in training mode"):
        attentions(layer)[0].fuse()
    fuse(layer.eval())
    layer.train()
    assert not any(attention.is_fused for attention in attentions(layer))
    layer(inputs[0], context=inputs[1]).sum().backward()
    assert all(parameter.grad is not None for parameter in layer.parameters())


def test_gradients_are_right_while_fused(inputs) -> None:
    x, context = inputs
    plain, fused = make(), fuse(make())
    for layer in (plain, fused):
        layer(x, context=context).square().sum().backward()
    for ours, theirs in zip(fused.parameters(), plain.parameters(), strict=True):
        assert ours.grad is not None
        assert torch.equal(ours.grad, theirs.grad)
    assert all(attention.is_fused for attention in attentions(fused))
    frozen = fuse(make().requires_grad_(False))
    wanted = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: frozen(x, context=context[:1]), wanted[:1, :2])


def test_weights_changed_in_place_are_followed(inputs) -> None:
    layer = fuse(make())
    with torch.no_grad():
        layer.get_parameter("self_attn.k_proj.weight").mul_(-2.0)
        layer.get_parameter("cross_attn.v_proj.bias").add_(3.0)
    expected = run(unfuse(copy.deepcopy(layer)), inputs)
    torch.testing.assert_close(run(layer, inputs), expected, rtol=1e-11, atol=1e-11)


def test_moves_keep_it(inputs) -> None:
    layer = fuse(make()).float()
    assert attentions(layer)[0].is_fused
    half = tuple(tensor.float() for tensor in inputs)
    fused = run(layer, half)
    torch.testing.assert_close(fused, run(unfuse(layer), half))
    assert fused.dtype is torch.float32


def test_a_moved_projection_undoes_it(inputs) -> None:
    layer = fuse(make())
    layer.get_submodule("self_attn.q_proj").float().double()
    expected = run(unfuse(copy.deepcopy(layer)), inputs)
    torch.testing.assert_close(run(layer, inputs), expected, rtol=1e-11, atol=1e-11)
    self_attn, cross_attn = attentions(layer)
    assert not self_attn.is_fused
    assert cross_attn.is_fused


def test_a_copy_is_independent(inputs) -> None:
    layer = fuse(make())
    expected = run(layer, inputs)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert attentions(twin)[0].is_fused
    assert torch.equal(run(layer, inputs), expected)
    assert not torch.equal(run(twin, inputs), expected)


def add_lora(layer: TransformerLayer) -> nn.Module:
    """LoRA with weights that change the output: `init_lora_weights=False` leaves neither factor at zero."""
    torch.manual_seed(23)
    config = peft.LoraConfig(r=3, target_modules=["q_proj", "k_proj", "v_proj"], init_lora_weights=False)
    return peft.inject_adapter_in_model(config, layer).double().eval()


def test_lora_refuses_it(inputs) -> None:
    layer = make()
    plain = run(layer, inputs)
    add_lora(layer)
    adapted = run(layer, inputs)
    assert not torch.allclose(adapted, plain)
    with pytest.raises(UsageError, match=r"self_attn: q_proj is a peft\.tuners\.lora\.layer\.Linear, not a plain"):
        fuse(layer)
    assert torch.equal(run(layer, inputs), adapted)


def test_lora_added_later_undoes_it(inputs) -> None:
    separate = make()
    add_lora(separate)
    expected = run(separate, inputs)
    layer = fuse(make())
    add_lora(layer)
    assert torch.equal(run(layer, inputs), expected)
    assert not any(attention.is_fused for attention in attentions(layer))


class ScaledLinear(nn.Linear):
    """Stands for the Linears of quantisation packages: the weight is not what the product uses."""

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * 3.0


def test_replaced_linears(inputs) -> None:
    layer = fuse(make())
    self_attn, cross_attn = attentions(layer)
    replacement = ScaledLinear(EMBED_DIM, 24).double()
    self_attn.q_proj = replacement
    expected = run(layer, inputs)
    assert not self_attn.is_fused
    assert cross_attn.is_fused
    separate = unfuse(copy.deepcopy(layer))
    torch.testing.assert_close(expected, run(separate, inputs), rtol=1e-11, atol=1e-11)
    with pytest.raises(UsageError, match=r"q_proj is a .*ScaledLinear, not a plain torch Linear"):
        self_attn.fuse()


def test_dynamic_quantisation_undoes_and_refuses(inputs) -> None:
    narrow = tuple(tensor.float() for tensor in inputs)
    layer = fuse(make(torch.float32))
    with pytest.warns(DeprecationWarning, match="quantization"):
        quantised = torch.ao.quantization.quantize_dynamic(layer, {nn.Linear}, dtype=torch.qint8)
    run(quantised, narrow)
    assert not any(attention.is_fused for attention in attentions(quantised))
    with pytest.raises(UsageError, match=r"q_proj is a .*quantized.*not a plain torch Linear"):
        fuse(quantised)


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
def test_hooks_refuse_and_undo(inputs, kind: str) -> None:
    layer = fuse(make())
    calls: list[int] = []
    projection = layer.get_submodule("self_attn.k_proj")
    getattr(projection, f"register_{kind}")(lambda *arguments: calls.append(1))
    run(layer, inputs)
    assert calls == [1]
    with pytest.raises(UsageError, match="k_proj has hooks, which a packed product would pass by"):
        fuse(layer)


def test_backward_hooks_refuse_and_undo(inputs) -> None:
    layer = fuse(make()).requires_grad_(False)
    calls: list[int] = []
    layer.get_submodule("self_attn.k_proj").register_full_backward_hook(lambda *arguments: calls.append(1))
    layer(inputs[0].requires_grad_(), context=inputs[1]).sum().backward()
    assert calls == [1]
    with pytest.raises(UsageError, match="k_proj has hooks, which a packed product would pass by"):
        fuse(layer)


def test_what_cannot_be_packed_is_named() -> None:
    module = SelfAttention(EMBED_DIM, 6).eval()
    module.k_proj = nn.Linear(EMBED_DIM, EMBED_DIM, bias=False)
    assert module.fuse_refusals() == ["some projections have a bias and some have none"]
    module.k_proj = nn.Linear(EMBED_DIM, EMBED_DIM).double()
    assert module.fuse_refusals() == ["weights differ in dtype or device"]
    module.k_proj = module.v_proj
    assert module.fuse_refusals() == ["projections share one weight"]
    module.v_proj = nn.utils.parametrizations.weight_norm(nn.Linear(EMBED_DIM, EMBED_DIM))
    assert "v_proj is a torch.nn.utils.parametrize.ParametrizedLinear" in module.fuse_refusals()[0]


def test_fusing_under_inference_mode_leaves_trainable_weights(inputs) -> None:
    layer = make()
    with torch.inference_mode():
        fuse(layer)
        layer(inputs[0], context=inputs[1])
    layer.train()
    layer(inputs[0], context=inputs[1]).sum().backward()
    assert layer.get_parameter("self_attn.q_proj.weight").grad is not None
