"""Attention maps from the forward's own pass, on Triton's interpreter: against float64, beside the plain forward."""

import dataclasses

import pytest
import torch

import mmattn
from mmattn.errors import UsageError
from tests.kernels.cases import FEW_KEYS, MANY_KEYS, poisoned
from tests.ops.cases import (
    Shape,
    allowed_everywhere,
    generator_for,
    make_attn_mask,
    make_inputs,
    make_key_mask,
    used_by_anyone,
)

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

# Imported here, after the check: they need triton.
from mmattn.kernels import short_keys_forward  # noqa: E402
from mmattn.kernels.short_keys import short_key_attention  # noqa: E402
from mmattn.kernels.short_keys_configs import ForwardConfig  # noqa: E402
from mmattn.kernels.short_keys_maps import short_key_attention_maps  # noqa: E402
from tests.kernels.map_checks import check_maps, keys_of  # noqa: E402

HALF_OR_SINGLE = (torch.float16, torch.float32)
SHAPES = [
    Shape(2, 2, 1, 1, 1, 40),
    Shape(1, 3, 3, 63, 16, 64),
    Shape(2, 1, 1, 63, 77, 40),
    Shape(1, 1, 1, 257, 77, 80),
    Shape(1, 2, 1, 17, 257, 72),
    Shape(1, 1, 1, 63, 257, 23),
    Shape(2, 1, 1, 17, 512, 160),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape):
    number = SHAPES.index(shape)
    tensors = make_inputs(shape, HALF_OR_SINGLE[number % 2], generator_for(number, 3))
    keys = keys_of(shape, min(shape.keys, (11, 3, 19)[number % 3]), 5)
    check_maps(tensors, keys, average=number % 2 == 0)


@pytest.mark.parametrize("dtype", HALF_OR_SINGLE, ids=str)
@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_all_keys_sum_to_one(shape, dtype):
    tensors = make_inputs(shape, dtype, generator_for(7))
    keys = torch.arange(shape.keys).expand(shape.batch, -1)
    maps = check_maps(tensors, keys)
    torch.testing.assert_close(maps.sum(-1), torch.ones(maps.shape[:3]))


@pytest.mark.parametrize("average", [False, True], ids=["heads", "mean"])
@pytest.mark.parametrize("heads", [None, [4], [5, 0, 3]], ids=str)
def test_rows_and_heads(heads, average):
    """Grouped heads, in the order asked for; one row of several; keys that are not there have none."""
    shape = Shape(2, 6, 2, 13, 77, 17)
    tensors = make_inputs(shape, torch.float32, generator_for(11))
    keys = torch.tensor([[76, -1, 0, 200, 5]], dtype=torch.int32)
    maps = check_maps(tensors, keys, first_row=1, heads=heads, average=average)
    assert not maps[0, :, :, [1, 3]].any()


@pytest.mark.parametrize(
    ("attn_kind", "key_kind"), [("boolean-heads", "none"), ("none", "gaps"), ("empty-rows", "nothing")]
)
@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_masked_keys_have_no_weight(shape, attn_kind, key_kind):
    """NaN in them reaches nothing, and rows without keys give zeros."""
    generator = generator_for(13)
    query, key, value = make_inputs(shape, torch.float16, generator)
    attn_mask, key_mask = make_attn_mask(attn_kind, shape, generator), make_key_mask(key_kind, shape, generator)
    allowed = allowed_everywhere(shape, attn_mask, key_mask)
    if key_mask is not None:
        unused = ~key_mask[:, None].expand(shape.batch, shape.kv_heads, shape.keys) & ~used_by_anyone(shape, allowed)
        key, value = poisoned(key, unused), poisoned(value, unused)
    keys = keys_of(shape, 13, 17)
    maps = check_maps((query, key, value), keys, key_mask=key_mask, attn_mask=attn_mask)
    kept = allowed.expand(shape.batch, shape.heads, shape.queries, shape.keys)
    kept = kept.gather(3, keys[:, None, None].expand(-1, shape.heads, shape.queries, -1))
    assert (~kept).any()
    assert not maps[~kept].any()


@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_huge_scores_and_views(shape):
    query, key, value = make_inputs(shape, torch.float32, generator_for(19))
    query = (300 * query).transpose(1, 2).contiguous().transpose(1, 2)
    key = torch.cat([key, torch.full_like(key, float("nan"))], dim=2)[:, :, : shape.keys]
    check_maps((query, key, value), keys_of(shape, 5, 23).mT.contiguous().mT, average=True)


@pytest.mark.parametrize("forward", [ForwardConfig(16, 4), ForwardConfig(64, 2, 4, 2, False, False)], ids=str)
@pytest.mark.parametrize("shape", [FEW_KEYS, MANY_KEYS], ids=str)
def test_every_configuration_computes_the_same(monkeypatch, shape, forward):
    """Several blocks a program, blocks beyond the queries, sizes cut and padded."""
    monkeypatch.setattr(short_keys_forward, "forward_config", lambda *_: forward)
    shape = dataclasses.replace(shape, queries=37)
    check_maps(make_inputs(shape, torch.float32, generator_for(29)), keys_of(shape, 7, 31))


@pytest.mark.parametrize("sizes", [(2, 0, 11, 3), (2, 7, 0, 3), (2, 7, 11, 0)], ids=["no queries", "no keys", "none"])
def test_nothing_to_do(sizes):
    batch, queries, num_keys, kept = sizes
    query, key = torch.randn(batch, 6, queries, 5), torch.randn(batch, 3, num_keys, 5)
    keys = torch.zeros(batch, kept, dtype=torch.int64)
    output, _, maps = short_key_attention_maps(query, key, key, None, None, 1.0, keys, 0, None, True)
    assert maps.shape == (batch, 1, queries, kept)
    assert not maps.any()
    assert torch.equal(output, short_key_attention(query, key, key, None, None, 1.0)[0])


def test_opcheck_and_gradients():
    """Views too; gradients are the plain operation's, and flow through the output only."""
    shape = Shape(2, 2, 1, 17, 13, 5)
    tensors = make_inputs(shape, torch.float32, generator_for(37))
    views = [tensor.transpose(1, 2).contiguous().transpose(1, 2).requires_grad_() for tensor in tensors]
    keys = keys_of(shape, 3, 41)[1:]
    mask = torch.rand(2, 1, 17, 13, generator=generator_for(43)) < 0.8
    for rest in ((keys, 1, None, False), (keys, 0, [1], True)):
        torch.library.opcheck(short_key_attention_maps, (*views, None, mask, 0.3, *rest))
    output, lse, maps = short_key_attention_maps(*views, None, mask, 0.3, keys, 1, None, True)
    assert not lse.requires_grad
    assert not maps.requires_grad
    expected = short_key_attention(*views, None, mask, 0.3)[0]
    for got, wanted in zip(*(torch.autograd.grad(each.sum(), views) for each in (output, expected)), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keys": torch.zeros(3, 1).long()}, "3 rows from row 0 on, but the batch has 2"),
        ({"first_row": 1}, "2 rows from row 1 on, but the batch has 2"),
        ({"keys": torch.zeros(2, 1)}, r"keys are torch.float32 \[2, 1\] on cpu; give integers \[R, T\] on cpu"),
        ({"heads": [0, 3]}, r"heads are \[0, 3\]; give some of the 3 heads, each once"),
        ({"heads": [1, 1]}, r"heads are \[1, 1\]; give some of the 3 heads, each once"),
        ({"heads": []}, r"heads are \[\]; give some of the 3 heads"),
    ],
)
def test_refusals(changes, message):
    settings = {"keys": torch.zeros(2, 1).long(), "first_row": 0, "heads": None, "average": False} | changes
    query = torch.zeros(2, 3, 5, 8)
    with pytest.raises(UsageError, match=message):
        short_key_attention_maps(query, query, query, None, None, 1.0, **settings)


def recorded(unet, sample, text, backend, **arguments):
    """What a U-Net gives, unobserved and recorded, and its maps."""
    with torch.no_grad(), mmattn.use_backend(backend, role="cross"):
        plain = unet(sample, 5, text).sample
        with mmattn.record_attention(unet, **arguments) as maps:
            output = unet(sample, 5, text).sample
    return plain, output, maps


@pytest.fixture(scope="module")
def unet():
    from tests.models.test_unet import tiny

    return tiny().eval()


@pytest.mark.parametrize(
    "arguments",
    [{}, {"tokens": [5, 0, 2]}, {"heads": [1], "views": ["head"], "tokens": [3]}],
    ids=["all", "some", "head"],
)
def test_recorded_maps_are_the_kernels(monkeypatch, unet, arguments):
    """The recorder takes them from the pass, and the model's output stays, bit for bit."""
    draw = generator_for(47)
    sample = torch.randn(2, 4, 8, 8, generator=draw)
    text = torch.randn(2, 7, unet.config.cross_attention_dim, generator=draw)
    _, _, expected = recorded(unet, sample, text, "eager", **arguments)
    monkeypatch.setattr("mmattn.maps.capture.kept_weights", lambda *_, **__: pytest.fail("computed again"))
    plain, output, maps = recorded(unet, sample, text, "triton", **arguments)
    assert torch.equal(output, plain)
    assert len(maps.texts) == 2
    for number in range(2):
        for layer, weights in expected.texts[number].weights.items():
            torch.testing.assert_close(maps.texts[number].weights[layer], weights, atol=1e-5, rtol=1e-5)
