"""Attention within transforms of torch.func, and on fake tensors: masks cannot be looked at there."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from mmattn.errors import BackendError
from mmattn.nn import SinusoidalPositions
from mmattn.ops.attention import attention
from mmattn.ops.packed import packed_attention
from mmattn.ops.segments import Segments
from tests.ops.cases import Shape, generator_for, make_inputs

SHAPE = Shape(2, 6, 3, 7, 11, 5)
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's, on a CPU
CALLS = ["plain", "key mask", "no keys", "boolean mask", "bias", "causal", "all"]


def masks(call: str) -> dict:
    generator = generator_for(CALLS.index(call))
    key_mask = torch.rand(SHAPE.batch, SHAPE.keys, generator=generator) > 0.4
    attn_mask = torch.rand(SHAPE.queries, SHAPE.keys, generator=generator) > 0.3
    return {
        "plain": {},
        "key mask": {"key_mask": key_mask},
        "no keys": {"key_mask": key_mask & torch.tensor([[True], [False]])},
        "boolean mask": {"attn_mask": attn_mask},
        "bias": {"attn_mask": torch.randn(SHAPE.queries, SHAPE.keys, generator=generator, dtype=torch.float64)},
        "causal": {"is_causal": True},
        "all": {"key_mask": key_mask, "attn_mask": attn_mask, "is_causal": True},
    }[call]


def inputs(count: int = 2) -> list[torch.Tensor]:
    """Query, key, value, each `[count, ...]`."""
    drawn = [make_inputs(SHAPE, torch.float64, generator_for(number)) for number in range(count)]
    return [torch.stack([tensor.detach() for tensor in tensors]) for tensors in zip(*drawn, strict=True)]


@pytest.mark.parametrize("call", CALLS)
def test_grad_and_vmap(call):
    arguments, stacked = masks(call), inputs()

    def loss(backend, *tensors):
        return attention(*tensors, backend=backend, **arguments).sin().sum()

    def gradients(backend, *tensors):
        return torch.func.grad(lambda *each: loss(backend, *each), argnums=(0, 1, 2))(*tensors)

    expected = [gradients("eager", *tensors) for tensors in zip(*stacked, strict=True)]
    one_by_one = [gradients("sdpa", *tensors) for tensors in zip(*stacked, strict=True)]
    at_once = torch.func.vmap(lambda *tensors: gradients("sdpa", *tensors))(*stacked)
    torch.testing.assert_close(one_by_one, expected)
    torch.testing.assert_close(list(zip(*at_once, strict=True)), expected)
    outputs = torch.func.vmap(lambda *tensors: attention(*tensors, **arguments))(*stacked)
    each = [attention(*tensors, **arguments) for tensors in zip(*stacked, strict=True)]
    torch.testing.assert_close(outputs, torch.stack(each))


def test_a_mask_for_each():
    stacked = inputs()
    key_masks = torch.rand(2, SHAPE.batch, SHAPE.keys, generator=generator_for(3)) > 0.4
    run = lambda query, key, value, key_mask: attention(query, key, value, key_mask=key_mask)  # noqa: E731
    at_once = torch.func.vmap(run)(*stacked, key_masks)
    each = [run(*tensors) for tensors in zip(*stacked, key_masks, strict=True)]
    torch.testing.assert_close(at_once, torch.stack(each))


@pytest.mark.parametrize("call", CALLS)
def test_forward_mode_and_second_derivatives_are_eagers(call):
    arguments, tensors = masks(call), [tensor[0] for tensor in inputs()]
    run = lambda *each: attention(*each, **arguments)  # noqa: E731
    _, pushed = torch.func.jvp(run, tuple(tensors), tuple(tensors))
    step = 1e-6
    ahead, behind = (run(*(tensor * (1 + sign * step) for tensor in tensors)) for sign in (1, -1))
    torch.testing.assert_close(pushed, (ahead - behind) / (2 * step), atol=1e-7, rtol=1e-6)
    one_head = [tensor[:, :1, :3].requires_grad_() for tensor in tensors[:1]]
    key, value = tensors[1][:, :1], tensors[2][:, :1]
    cut = {name: value[:3] if name == "attn_mask" else value for name, value in arguments.items()}
    second, by_eager = (
        torch.func.grad(
            lambda query, backend=backend: (
                torch.func.grad(lambda inner: attention(inner, *tensors[1:], backend=backend, **arguments).sin().sum())(
                    query
                )
                .square()
                .sum()
            )
        )(tensors[0])
        for backend in ("auto", "eager")
    )
    torch.testing.assert_close(second, by_eager)
    assert torch.autograd.gradgradcheck(lambda query: attention(query, key, value, backend="eager", **cut), one_head)


def test_who_has_them_is_said():
    query, key, value = (tensor[0].requires_grad_() for tensor in inputs())
    with pytest.raises(BackendError, match=r"no forward-mode derivatives .*: backend=\"eager\" has them"):
        torch.func.jvp(lambda each: attention(each, key, value, backend="sdpa"), (query,), (query,))


@pytest.mark.parametrize("call", CALLS)
def test_fake_tensors(call):
    arguments, tensors = masks(call), [tensor[0] for tensor in inputs()]
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(tensor) for tensor in tensors]
        given = {name: mode.from_tensor(each) if name != "is_causal" else each for name, each in arguments.items()}
        assert attention(*fake, **given).shape == tensors[0].shape


def test_a_traced_graph_keeps_no_mask():
    query, key, value = (tensor[0] for tensor in inputs())
    one, other = (masks(call)["key_mask"] for call in ("key mask", "all"))
    graph = make_fx(lambda key_mask: attention(query, key, value, key_mask=key_mask))(one)
    torch.testing.assert_close(graph(other), attention(query, key, value, key_mask=other))


@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads_are_exported_for_any_lengths(is_causal):
    class Attend(torch.nn.Module):
        def forward(self, query, key):
            return attention(query, key, key, is_causal=is_causal).transpose(1, 2).flatten(2)

    def draw(batch, queries, keys):
        # In memory [B, L, H, D], as projections give them.
        shapes = ((batch, queries, 4, 8), (batch, keys, 2, 8))
        return tuple(torch.randn(shape).transpose(1, 2) for shape in shapes)

    batch, queries, keys = (torch.export.Dim(name, min=2) for name in ("batch", "queries", "keys"))
    sizes = ({0: batch, 2: queries}, {0: batch, 2: keys})
    exported = torch.export.export(Attend(), draw(3, 5, 7), dynamic_shapes=sizes).module()
    for given in (draw(2, 11, 4), draw(5, 3, 13)):
        torch.testing.assert_close(exported(*given), Attend()(*given))


def test_what_fake_tensors_leave_is_not_kept():
    positions, segments = SinusoidalPositions(6, 11), Segments.of([3, 1, 4])
    rows, places = torch.randn(8, 2, 3), torch.arange(7)
    for _ in range(2):  # before real tensors and after them
        with FakeTensorMode() as mode:
            assert isinstance(positions(mode.from_tensor(places)), FakeTensor)
            fake = mode.from_tensor(rows)
            assert packed_attention(fake, fake, fake, segments).shape == rows.shape
        assert positions(places).isfinite().all()
        assert packed_attention(rows, rows, rows, segments).isfinite().all()
