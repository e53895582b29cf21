"""Blocks and caches on a card, eager and compiled, under the tolerance rule."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from mmattn.nn import SelfAttention, TransformerLayer, fuse
from mmattn.nn.positions import RotaryEmbedding
from mmattn.ops.cache import KVCache
from mmattn.ops.registry import use_backend
from mmattn.ops.tolerance import BACKWARD_FACTOR, FORWARD_FACTOR
from tests.gpu.card import DEVICE, DTYPES, MARKS
from tests.tolerance import check_within

pytestmark = MARKS

WIDTH, CONTEXT_WIDTH, LENGTH, CONTEXT_LENGTH, BATCH, BEAMS = 80, 56, 37, 23, 3, 2


def make_layer(dtype: torch.dtype, **options) -> TransformerLayer:
    torch.manual_seed(3)
    values = {"num_kv_heads": 2, "has_cross_attention": True, "context_dim": CONTEXT_WIDTH, "qk_norm": "rms"}
    layer = TransformerLayer(WIDTH, 4, 97, is_causal=True, rotary=RotaryEmbedding(20), **values | options)
    return layer.to(DEVICE, dtype).eval()


def make_inputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Two rows a context, the second context padded."""
    torch.manual_seed(5)
    places = torch.arange(CONTEXT_LENGTH)
    return {
        "x": torch.randn(BATCH * BEAMS, LENGTH, WIDTH).to(DEVICE, dtype),
        "context": torch.randn(BATCH, CONTEXT_LENGTH, CONTEXT_WIDTH).to(DEVICE, dtype),
        "context_mask": (places < torch.tensor([[CONTEXT_LENGTH], [9], [1]])).to(DEVICE),
    }


def results(layer, inputs: dict[str, Tensor], run=None) -> dict[str, Tensor]:
    """The output, and the gradients of the context and of every weight; `run` is the layer in another form."""
    inputs = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in inputs.items()}
    layer.zero_grad()
    output = (layer if run is None else run)(inputs.pop("x"), **inputs)
    output.float().square().sum().backward()  # a mean's gradients would be too small for float16
    found = {"output": output.detach(), "grad of context": inputs["context"].grad}
    return found | {f"grad of {name}": weight.grad.clone() for name, weight in layer.named_parameters()}


@contextlib.contextmanager
def _products_of_kernels(dtype: torch.dtype) -> Iterator[None]:
    """torch's fused float32 attention multiplies in TF32 pieces on a card; eager's error is measured in the same."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = dtype is torch.float32 or before
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


def check_layer(layer, dtype: torch.dtype, what: str, run=None) -> None:
    """Hold a layer to the rule, in the form `run` when there is one."""
    inputs = make_inputs(dtype)
    got = results(layer, inputs, run)
    with use_backend("eager"):
        with _products_of_kernels(dtype):
            eager = results(layer, inputs)
        doubles = {name: t.double() if t.is_floating_point() else t for name, t in inputs.items()}
        reference = results(copy.deepcopy(layer).double(), doubles)
    for name, expected in reference.items():
        factor = FORWARD_FACTOR if name == "output" else BACKWARD_FACTOR
        check_within(got[name], eager[name], expected, factor=factor, what=f"{what} {name}")


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_layer(dtype, norm_first):
    layer = make_layer(dtype, norm_first=norm_first)
    check_layer(layer, dtype, f"{dtype} layer")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_compiled_layer(dtype):
    layer = make_layer(dtype)
    check_layer(layer, dtype, f"{dtype} compiled layer", torch.compile(layer, fullgraph=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_a_fused_layer(dtype):
    layer, inputs = make_layer(dtype), make_inputs(dtype)
    apart = layer(**inputs)
    packed = fuse(copy.deepcopy(layer))
    exact = copy.deepcopy(layer).double()(**{n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})
    check_within(packed(**inputs), apart, exact, factor=FORWARD_FACTOR, what=f"{dtype} fused layer")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("pieces", [[1] * LENGTH, [20, 1, 1, LENGTH - 22]], ids=["one by one", "in pieces"])
@torch.no_grad()
def test_steps_with_caches_equal_the_whole(dtype, pieces):
    layer, inputs = make_layer(dtype), make_inputs(dtype)
    context = layer.project_context(inputs["context"], inputs["context_mask"])
    cache = KVCache(
        BATCH * BEAMS, 2, WIDTH // 4, max_length=LENGTH, initial_length=4, dtype=dtype, device=torch.device(DEVICE)
    )
    steps, start = [], 0
    for piece in pieces:
        steps.append(layer(inputs["x"][:, start : start + piece], context=context, cache=cache))
        start += piece
    whole = layer(inputs["x"], context=context)
    exact = copy.deepcopy(layer).double()(**{n: t.double() if t.is_floating_point() else t for n, t in inputs.items()})
    check_within(torch.cat(steps, dim=1), whole, exact, factor=FORWARD_FACTOR, what=f"{dtype} steps")


@torch.no_grad()
def test_reordered_beams_and_a_window():
    torch.manual_seed(7)
    attn = SelfAttention(WIDTH, 4, num_kv_heads=2, is_causal=True).to(DEVICE).eval()
    x = torch.randn(4, 11, WIDTH, device=DEVICE)
    rows = torch.tensor([2, 2, 0, 3], device=DEVICE)
    for window in (None, 5):
        cache = KVCache(
            4, 2, WIDTH // 4, max_length=11, window=window, dtype=torch.float32, device=torch.device(DEVICE)
        )
        attn(x[:, :7], cache=cache)
        cache.reorder(rows)
        after = torch.cat([attn(x[:, place : place + 1], cache=cache) for place in range(7, 11)], dim=1)
        joined = torch.cat([x[rows, :7], x[:, 7:]], dim=1)
        fresh = KVCache(
            4, 2, WIDTH // 4, max_length=11, window=window, dtype=torch.float32, device=torch.device(DEVICE)
        )
        expected = attn(joined, cache=fresh)[:, 7:]
        torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-5)
