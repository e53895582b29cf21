"""The decode kernels on Triton's interpreter, against the float64 specification under the tolerance rule."""

import dataclasses
import functools

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from mmattn import Translator, use_backend
from mmattn.errors import BackendError
from mmattn.ops.attention import attention
from mmattn.ops.observe import observing
from mmattn.ops.static_cache import visible_places
from tests.inference.tiny_translators import ENGLISH, save_own_translator
from tests.kernels.cases import poisoned
from tests.ops.cases import (
    Shape,
    allowed_everywhere,
    generator_for,
    make_attn_mask,
    make_inputs,
    make_key_mask,
    used_by_anyone,
)
from tests.tolerance import check_attention

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

# Imported here, after the check: they need triton.
from mmattn.kernels import decode  # noqa: E402
from mmattn.kernels.decode import (  # noqa: E402
    DecodeConfig,
    attend,
    decode_attention,
    decode_launches,
    dim_tiles,
    shares,
)
from mmattn.kernels.launch import Card  # noqa: E402

decoded = functools.partial(attention, backend="triton_decode")
check = functools.partial(check_attention, decoded, backward=False)

# Keys of one block and of many, groups that share keys, queries that fill a block and that do not, every way of
# cutting a head.
SHAPES = [
    Shape(1, 1, 1, 1, 1, 40),
    Shape(2, 3, 1, 1, 16, 64),
    Shape(1, 6, 2, 5, 77, 80),
    Shape(1, 8, 1, 3, 257, 40),
    Shape(3, 2, 2, 1, 257, 96),
    Shape(1, 1, 1, 1, 1021, 128),
    Shape(1, 3, 1, 5, 1021, 160),
    Shape(1, 3, 1, 1, 4099, 72),
    Shape(1, 16, 1, 5, 131, 23),
]
ONE_SHARE = Shape(3, 6, 2, 3, 29, 40)
SHARES = Shape(2, 3, 1, 3, 293, 23)
BOTH = pytest.mark.parametrize("shape", [ONE_SHARE, SHARES], ids=str)
MASKS = [("boolean", "none"), ("none", "gaps"), ("empty-rows", "nothing"), ("boolean-heads", "all")]


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sizes(shape, is_causal):
    # One type a size, the other for the next: each path is run in both.
    number = SHAPES.index(shape)
    dtype = (torch.float16, torch.float32)[(number + is_causal) % 2]
    check(*make_inputs(shape, dtype, generator_for(number, 3)), is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True], ids=["all", "causal"])
@pytest.mark.parametrize(("attn_kind", "key_kind"), MASKS)
@BOTH
def test_masked_keys_have_no_influence(shape, attn_kind, key_kind, is_causal):
    """NaN in them reaches nothing, and rows without keys give zeros."""
    generator = generator_for(MASKS.index((attn_kind, key_kind)), 7)
    query, key, value = make_inputs(shape, torch.float16, generator)
    attn_mask, key_mask = make_attn_mask(attn_kind, shape, generator), make_key_mask(key_kind, shape, generator)
    allowed = allowed_everywhere(shape, attn_mask, key_mask, is_causal)
    unused = ~used_by_anyone(shape, allowed)
    key, value = poisoned(key, unused), poisoned(value, unused)
    got = check(query, key, value, attn_mask=attn_mask, key_mask=key_mask, is_causal=is_causal)
    assert not got["output"][~allowed.any(-1)].any()
    assert unused.any()


@BOTH
def test_a_key_used_by_no_query_of_the_two_masks(shape):
    """Allowed by the mask for the first query only, and by causality for the last only."""
    query, key, value = make_inputs(shape, torch.float32, generator_for(11))
    attn_mask = torch.ones(shape.queries, shape.keys, dtype=torch.bool)
    attn_mask[1:, -1] = False
    key, value = key.clone(), value.clone()
    key[:, :, -1], value[:, :, -1] = float("nan"), float("inf")
    check(query, key, value, attn_mask=attn_mask, is_causal=True)


@BOTH
def test_what_another_group_sees_has_no_influence(shape):
    """Heads that share keys see every other key, those of the next group the rest; NaN in what a group does not see."""
    shape = dataclasses.replace(shape, heads=6, kv_heads=2, keys=min(shape.keys, 131))
    query, key, value = make_inputs(shape, torch.float32, generator_for(89))
    group = shape.heads // shape.kv_heads
    heads, places = torch.arange(shape.heads)[:, None], torch.arange(shape.keys)
    mask = ((heads // group + places) % 2 == 0)[None, :, None]
    unused = ~mask[:, ::group, 0].expand(shape.batch, -1, -1)
    check(query, poisoned(key, unused), poisoned(value, unused), attn_mask=mask)


@pytest.mark.parametrize("axes", [(2, 1, 1), (1, 6, 1), (2, 1, 3), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("has_key_mask", [False, True], ids=["one mask", "both masks"])
def test_axes_of_size_one(axes, has_key_mask):
    shape = dataclasses.replace(SHARES, heads=2 if axes[1] == 2 else 6, kv_heads=2, keys=131)
    mask = torch.rand(*axes, shape.keys, generator=generator_for(13)) < 0.6
    query, key, value = make_inputs(shape, torch.float32, generator_for(17))
    key_mask = make_key_mask("right", shape, generator_for(19)) if has_key_mask else None
    check(query, key, value, attn_mask=mask, key_mask=key_mask)


@pytest.mark.parametrize("position", [0, 5, 130, 200])
def test_a_ring_of_places(position):
    """What a static cache gives: places not yet filled hold anything, half of the ring is beyond the window."""
    shape = Shape(2, 6, 3, 1, 139, 40)
    query, key, value = make_inputs(shape, torch.float32, generator_for(position, 23))
    places = visible_places(torch.tensor([position]), torch.tensor([83]), shape.keys)
    storage = torch.cat((key, value), dim=1)
    storage[:, :, ~places[0]] = float("nan")
    check(query, storage[:, :3], storage[:, 3:], attn_mask=places)


@pytest.mark.parametrize("factor", [30.0, 3000.0])
@BOTH
def test_huge_scores(shape, factor):
    query, key, value = make_inputs(shape, torch.float32, generator_for(29))
    check(query * factor, key, value)


@BOTH
def test_strongly_negative_scores(shape):
    generator = generator_for(31)
    query, key, value = make_inputs(shape, torch.float16, generator)
    mask = make_attn_mask("boolean", shape, generator)
    query, key = query.abs() + 4, -(key.abs() + 4)
    check(query, key, value, attn_mask=mask, scale=1.0, has_rounded_products=True)


def test_one_share_far_above_the_others():
    """Every weight of the other shares rounds to zero."""
    query, key, value = make_inputs(SHARES, torch.float32, generator_for(37))
    query, key = query.abs(), key.clone()
    key[:, :, 199] = 300.0
    check(query, key, value, scale=1.0)


def test_negative_and_zero_scale():
    query, key, value = make_inputs(SHARES, torch.float32, generator_for(41))
    for scale in (-0.3, 0.0):
        check(query, key, value, scale=scale)


@BOTH
def test_views(shape):
    """[B, L, H, D] storage, a cache's front part, values with other strides."""
    query, key, value = make_inputs(shape, torch.float32, generator_for(43))
    expected = decoded(query, key, value)
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    key = torch.cat([key, torch.full_like(key, float("nan"))], dim=2)[:, :, : shape.keys]
    value = value.transpose(2, 3).contiguous().transpose(2, 3)
    output = decoded(query, key, value)
    assert output.stride() == query.stride()
    assert torch.equal(output, expected)
    one = make_inputs(dataclasses.replace(shape, heads=shape.kv_heads), torch.float32, generator_for(47))
    expanded = one[0][:, :, :1].expand(-1, -1, shape.queries, -1)
    assert torch.equal(decoded(expanded, *one[1:]), decoded(expanded.contiguous(), *one[1:]))


@pytest.mark.parametrize("sizes", [(0, 7, 11), (2, 0, 11), (2, 7, 0)], ids=["no batch", "no queries", "no keys"])
def test_nothing_to_do(sizes):
    batch, queries, keys = sizes
    query, key = torch.randn(batch, 6, queries, 5), torch.randn(batch, 3, keys, 5)
    assert torch.equal(decoded(query, key, key), torch.zeros_like(query))


CONFIGS = [DecodeConfig(16, 16, programs_per_processor=3), DecodeConfig(64, 128, programs_per_processor=1)]


@pytest.mark.parametrize("config", CONFIGS, ids=["small blocks", "large blocks"])
def test_every_configuration_computes_the_same(monkeypatch, config):
    monkeypatch.setattr(decode, "decode_config", lambda *_: config)
    shape = dataclasses.replace(SHARES, batch=1, queries=11)
    query, key, value = make_inputs(shape, torch.float32, generator_for(53))
    check(query, key, value, is_causal=True, key_mask=make_key_mask("gaps", shape, generator_for(59)))


def test_equal_bits_in_every_run():
    tensors = make_inputs(SHARES, torch.float16, generator_for(61))
    assert torch.equal(decoded(*tensors), decoded(*tensors))


def test_opcheck():
    for shape in (Shape(1, 2, 1, 2, 13, 5), Shape(1, 2, 1, 2, 131, 5)):
        tensors = make_inputs(shape, torch.float32, generator_for(67))
        views = [tensor.transpose(1, 2).contiguous().transpose(1, 2) for tensor in tensors]
        mask = torch.rand(1, 1, shape.queries, shape.keys) < 0.7
        key_mask = torch.rand(shape.batch, 1, shape.keys, generator=generator_for(71)) < 0.6
        for arguments in ((*tensors, None, None, True, 0.3), (*views, key_mask, mask, False, 0.3)):
            torch.library.opcheck(decode_attention, arguments)


class Seen(TorchDispatchMode):
    """Operations that come to the dispatcher."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


def test_both_roads_give_the_same_bits():
    """Eager calls go round torch's dispatcher, unless somebody wants to see them."""
    tensors = make_inputs(SHARES, torch.float16, generator_for(83))
    with Seen() as seen:
        through = decoded(*tensors, is_causal=True)
    assert "mmattn.decode_attention.default" in seen.names
    assert torch.equal(decoded(*tensors, is_causal=True), through)
    with FakeTensorMode() as mode:
        fake = decoded(*(mode.from_tensor(tensor) for tensor in tensors))
    assert (fake.shape, fake.dtype, fake.stride()) == (through.shape, through.dtype, through.stride())
    leaf = tensors[0].requires_grad_()
    with pytest.raises(RuntimeError, match="mmattn.decode_attention.*no autograd formula"):
        attend(leaf, *tensors[1:], None, None, False, 0.3).sum().backward()


def test_compiled_whole():
    """One graph that keeps the operation, and serves other numbers of keys too."""
    compiled = torch.compile(decoded, fullgraph=True, backend="aot_eager", dynamic=True)
    query, key, value = make_inputs(SHARES, torch.float32, generator_for(73))
    with torch.no_grad():
        for keys in (211, 223, 227):
            tensors = query, key[:, :, :keys], value[:, :, :keys]
            with torch.compiler.set_stance("default" if keys == 211 else "fail_on_recompile"):
                assert torch.equal(compiled(*tensors, is_causal=True), decoded(*tensors, is_causal=True))


def test_gradients_are_refused():
    query, key, value = (tensor.requires_grad_() for tensor in make_inputs(ONE_SHARE, torch.float32, generator_for(79)))
    with pytest.raises(BackendError, match=r"gradients on cpu \(has a backward on none\)"):
        decoded(query, key, value)
    with torch.no_grad():
        decoded(query, key, value)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"queries": 17}, r"17 queries \(serves at most 16\)"),
        ({"head_dim": 161}, r"head_dim 161 \(serves 1 to 160\)"),
        ({"attn_mask": torch.zeros(2, 1)}, r"float mask on cpu \(serves causal, key, boolean\)"),
        ({"dropout_p": 0.1}, "dropout"),
        ({"return_weights": True}, "returning the weights"),
        ({"dtype": torch.bfloat16}, r"dtype bfloat16 on cpu \(serves float32, float16\)"),
    ],
)
def test_refusals(arguments, reason):
    sizes = {name: arguments.pop(name, default) for name, default in (("queries", 2), ("head_dim", 8))}
    dtype = arguments.pop("dtype", torch.float32)
    query = torch.zeros(1, 1, sizes["queries"], sizes["head_dim"], dtype=dtype)
    key = torch.zeros(1, 1, 3, sizes["head_dim"], dtype=dtype)
    with pytest.raises(BackendError, match=f"'triton_decode' cannot serve this call: {reason}"):
        decoded(query, key, key, **arguments)


def test_shares_cover_all_keys_and_fill_the_card():
    for processors in (4, 108, 132):
        card = Card((9, 0), processors)
        for programs in (1, 3, 8, 64, 127, 144, 200, 1024):
            for blocks in (1, 2, 7, 64, 509, 4096):
                splits, each = shares(programs, blocks, card, 2)
                assert 1 <= splits <= decode.MAX_SPLITS
                # No share is empty, none is missing.
                assert (splits - 1) * each < blocks <= splits * each
    hopper = Card((9, 0), 132)
    assert shares(8, 64, hopper, 2) == (32, 2)
    assert shares(1024, 16, hopper, 2)[0] == 1


def test_keys_are_read_once_for_a_group():
    """All queries of a group are in one program as long as they fit."""
    query, key = torch.zeros(2, 24, 5, 64), torch.zeros(2, 3, 31, 64)
    (launch,) = decode_launches(query.half(), key.half(), key.half(), None, None, False, 1.0, query.half())
    assert launch.programs == 2 * 3
    assert launch.arguments["BLOCK_M"] == 64


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_blocks_cover_a_head(dtype):
    for head_dim in range(1, decode.MAX_HEAD_DIM + 1):
        tiles = dim_tiles(dtype, head_dim)
        assert [start for start, _ in tiles] == [sum(size for _, size in tiles[:n]) for n in range(len(tiles))]
        # Only the last block reaches beyond.
        assert tiles[-1][0] < head_dim <= sum(tiles[-1])
    assert dim_tiles(torch.float16, 72) == ((0, 64), (64, 32))


def test_a_translator_decodes_with_it(tmp_path):
    """Beams folded into the queries over a padded source, and caches that grow: the same words."""
    folder = save_own_translator(tmp_path, files=tmp_path)
    translator = Translator.from_pretrained(folder)
    source = translator.encode(ENGLISH[:2])
    expected = translator.translate(source, num_beams=2, max_new_tokens=3)
    calls = []
    with observing(calls.append), use_backend("triton_decode"):
        assert translator.translate(source, num_beams=2, max_new_tokens=3) == expected
    assert {(call.backend, call.role) for call in calls} == {("triton_decode", "self"), ("triton_decode", "cross")}
