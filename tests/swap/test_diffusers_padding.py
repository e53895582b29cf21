"""Padding is left out where a mask says so, exactly, and nowhere else."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers import PixArtTransformer2DModel
from diffusers.models.attention_processor import Attention
from torch import Tensor

import mmattn
from mmattn.errors import UsageError
from mmattn.ops.tolerance import deviation
from mmattn.swap.diffusers import padding
from mmattn.swap.diffusers.padding import PaddingReader, read_padding

from . import zoo_dits
from .diffusers_pieces import CROSS, TEXT, a_text, attentions, draw, hits, misses, run_unet, tiny_unet
from .zoo import FAMILIES
from .zoo_base import liven, seeded

TOKENS = 11
MASKS = {  # what pipelines give: 1 for a token, 0 for padding; and how many tokens are projected then
    "right": ([[1] * 11, [1, 1, 1, 1] + [0] * 7], 11),
    "right, all of it": ([[1] * 5 + [0] * 6, [1, 1, 1] + [0] * 8], 5),
    "equal lengths": ([[1] * 4 + [0] * 7] * 2, 4),
    "left": ([[0] * 7 + [1] * 4, [0] * 5 + [1] * 6], 6),
    "gaps": ([[1, 0, 1, 0, 0, 1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0, 0, 0, 0, 1]], 4),
    "one token": ([[0] * 10 + [1], [1] + [0] * 10], 1),
    "none": ([[1] * 11] * 2, 11),
    "a row with nothing": ([[1] * 5 + [0] * 6, [0] * 11], 11),
}


@pytest.fixture
def seen(monkeypatch):
    """Numbers of tokens that each Linear layer was given, by the identity of its weight."""
    lengths: dict[int, list[int]] = {}
    linear = torch.nn.functional.linear

    def counted(states, weight, bias=None):
        lengths.setdefault(id(weight), []).append(states.shape[1] if states.dim() > 2 else 0)
        return linear(states, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", counted)
    return lengths


def mask_of(name: str) -> Tensor:
    return torch.tensor(MASKS[name][0])


@torch.no_grad()
def run_pixart(model, mask, texts=None):
    texts = draw(2, TOKENS, TEXT, seed=1).to(model.dtype) if texts is None else texts
    sizes = {"resolution": None, "aspect_ratio": None}
    noise = draw(2, 4, 8, 12).to(model.dtype)
    return model(noise, texts, torch.tensor([500, 500]), sizes, encoder_attention_mask=mask).sample


def check_near_stock(ours: Tensor, stock: Tensor, exact: Tensor) -> None:
    """Ours at most twice as far as stock is from what stock gives in float64, and a rounding."""
    found = deviation(ours, stock, exact)
    assert found.is_within, found


def test_pixart_without_a_projection_of_captions():
    """Its texts are as wide as its keys' inputs."""
    config = zoo_dits.PIXART | {"num_layers": 1, "caption_channels": None}
    model = seeded(lambda: liven(PixArtTransformer2DModel(**config)))()
    with mmattn.swap_attention(model) as swapped:
        assert len(swapped.verify().models) == 1
        assert swapped.verify().is_ok


@pytest.mark.parametrize("name", MASKS)
def test_pixart(name, seen):
    model, mask = FAMILIES["pixart"].build(), mask_of(name)
    keys = [attn.to_k.weight for attn in attentions(model, "attn2").values()]
    stock, exact = run_pixart(model, mask), run_pixart(FAMILIES["pixart"].build().double(), mask)
    assert all(seen[id(weight)] == [TOKENS] for weight in keys)
    seen.clear()
    with mmattn.swap_attention(model, role="cross") as swapped:
        check_near_stock(run_pixart(model, mask), stock, exact)
        assert all(set(seen[id(weight)]) == {MASKS[name][1]} for weight in keys)
        assert swapped.verify().is_ok
    seen.clear()
    with mmattn.swap_attention(model, drop_padding=False):
        check_near_stock(run_pixart(model, mask), stock, exact)
        assert all(set(seen[id(weight)]) == {TOKENS} for weight in keys)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["right", "left", "a row with nothing"])
def test_half_types_and_what_they_make_of_the_bias(name, dtype, seen):
    model, mask = FAMILIES["pixart"].build().to(dtype), mask_of(name)
    keys = [attn.to_k.weight for attn in attentions(model, "attn2").values()]
    stock = run_pixart(model, mask)
    seen.clear()
    with mmattn.swap_attention(model):
        ours = run_pixart(model, mask)
    assert all(seen[id(weight)] == [MASKS[name][1]] for weight in keys)
    assert (ours - stock).abs().max() <= 8 * torch.finfo(dtype).eps * stock.abs().max()


def test_what_is_in_the_padding_does_not_matter():
    model, mask = FAMILIES["pixart"].build(), mask_of("gaps")
    texts = draw(2, TOKENS, TEXT, seed=1)
    stock = run_pixart(model, mask, texts)
    exact = run_pixart(FAMILIES["pixart"].build().double(), mask, texts.double())
    spoilt = texts.masked_fill(mask[..., None] == 0, float("nan"))
    with mmattn.swap_attention(model):
        check_near_stock(run_pixart(model, mask, spoilt), stock, exact)


@pytest.mark.parametrize("name", MASKS)
def test_a_unet_with_a_text_mask(name, seen):
    unet, mask, text = tiny_unet(), mask_of(name), a_text(tokens=TOKENS)
    stock = run_unet(unet, text, encoder_attention_mask=mask)
    exact = run_unet(tiny_unet().double(), text.double(), encoder_attention_mask=mask)
    assert (stock - run_unet(unet, text)).abs().max() > 1e-3 or name == "none"
    seen.clear()
    with mmattn.swap_attention(unet):
        check_near_stock(run_unet(unet, text, encoder_attention_mask=mask), stock, exact)
    keys = [attn.to_k.weight for attn in attentions(unet, "attn2").values()]
    assert all(set(seen[id(weight)]) == {MASKS[name][1]} for weight in keys)


def test_without_a_mask_all_77_tokens_are_attended_to(seen):
    unet = tiny_unet()
    with mmattn.swap_attention(unet):
        run_unet(unet, a_text(tokens=77))
    assert all(seen[id(attn.to_k.weight)] == [77] for attn in attentions(unet, "attn2").values())


def test_another_mask_of_the_same_text_is_another_context():
    unet, text = tiny_unet(), a_text(tokens=TOKENS)
    masks = [mask_of(name) for name in ("right", "left", "right", "gaps")] + [None]
    stock = [run_unet(unet, text, encoder_attention_mask=mask) for mask in masks]
    exact = [run_unet(tiny_unet().double(), text.double(), encoder_attention_mask=mask) for mask in masks]
    with mmattn.swap_attention(unet) as swapped:
        for mask, *expected in zip(masks, stock, exact, strict=True):
            check_near_stock(run_unet(unet, text, encoder_attention_mask=mask), *expected)
        assert misses(swapped) == 4 * CROSS
        assert hits(swapped) == CROSS  # the third is the first


def test_a_mask_is_read_once_for_all_layers_and_again_when_it_changes(monkeypatch):
    reads = []
    read = padding.read_padding
    monkeypatch.setattr(padding, "read_padding", lambda mask, batch: reads.append(mask) or read(mask, batch))
    unet, text, mask = tiny_unet(), a_text(tokens=TOKENS), mask_of("right")
    with mmattn.swap_attention(unet):
        run_unet(unet, text, encoder_attention_mask=mask)
        assert len(reads) == 1
    reader, bias = PaddingReader(), torch.zeros(2, TOKENS)
    assert reader.read(bias, 2).length == TOKENS
    bias[:, 3:] = -10000
    assert reader.read(bias, 2).length == 3


@pytest.mark.parametrize("values", [0.0, -3.0, -8999.0])
def test_a_bias_that_is_no_padding_is_applied(values, seen):
    attn = seeded(lambda: liven(Attention(20, cross_attention_dim=TEXT, heads=2, dim_head=10)))()
    bias = torch.zeros(2, 1, TOKENS)
    bias[:, :, 4:] = values

    @torch.no_grad()
    def run(attn):
        dtype = attn.to_q.weight.dtype
        states, text = draw(2, 15, 20).to(dtype), a_text(tokens=TOKENS).to(dtype)
        return attn(states, encoder_hidden_states=text, attention_mask=bias.to(dtype))

    stock, exact = run(attn), run(copy.deepcopy(attn).double())
    seen.clear()
    with mmattn.swap_attention(attn):
        check_near_stock(run(attn), stock, exact)
    assert set(seen[id(attn.to_k.weight)]) == {TOKENS}


def test_self_attention_keeps_masked_keys(seen):
    attn = seeded(lambda: liven(Attention(20, heads=2, dim_head=10)))()
    bias = torch.zeros(2, 15)
    bias[:, 9:] = -10000

    @torch.no_grad()
    def run(attn):
        dtype = attn.to_q.weight.dtype
        return attn(draw(2, 15, 20).to(dtype), attention_mask=bias.to(dtype))

    stock, exact = run(attn), run(copy.deepcopy(attn).double())
    seen.clear()
    with mmattn.swap_attention(attn):
        check_near_stock(run(attn), stock, exact)
    assert set(seen[id(attn.to_k.weight)]) == {15}


def test_joint_attention_takes_no_mask():
    model = FAMILIES["sd3"].build()
    block = model.transformer_blocks[0].attn
    with (
        mmattn.swap_attention(model),
        pytest.raises(UsageError, match=r"transformer_blocks.0.attn .*no attention_mask"),
    ):
        block(draw(2, 5, 96), encoder_hidden_states=draw(2, TOKENS, 96), attention_mask=torch.zeros(2, 1, TOKENS))


def test_reading_masks():
    ok, no = 0.0, -10000.0
    right = read_padding(torch.tensor([[ok, ok, no], [ok, no, no]]), 2)
    assert right is not None
    assert (right.index, right.length) == (None, 2)
    assert right.key_mask is not None
    assert right.key_mask.tolist() == [[True, True], [True, False]]
    gaps = read_padding(torch.tensor([[[no, ok, ok]], [[ok, no, ok]]]), 2)
    assert gaps is not None
    assert gaps.index is not None
    assert gaps.index.tolist() == [[1, 2], [0, 2]]
    assert (gaps.length, gaps.key_mask) == (2, None)
    for form in (torch.float16, torch.bfloat16):
        same = read_padding(torch.tensor([[ok, ok, no], [ok, no, no]], dtype=form), 2)
        assert same is not None
        assert same.identity == right.identity
    for masked in (float("-inf"), torch.finfo(torch.float32).min):
        assert read_padding(torch.tensor([[ok, ok, masked], [ok, masked, masked]]), 2).identity == right.identity
    assert read_padding(torch.tensor([[True, True, False], [True, False, False]]), 2).identity == right.identity
    assert read_padding(torch.tensor([[ok, ok, no], [ok, ok, no]]), 2).identity != right.identity


@pytest.mark.parametrize(
    "mask",
    [
        torch.tensor([[0.0, -3.0]]),
        torch.tensor([[0.0, 1.0]]),
        torch.tensor([[-10000.0, -10000.0]]),
        torch.tensor([[0.0, -10000.0]], requires_grad=True),
        torch.zeros(2, 2),  # of another batch
        torch.zeros(1, 3, 2),
        torch.zeros(1, 1, 1, 2),
        torch.zeros(1, 0),
        torch.tensor([[0.0, float("nan")]]),
    ],
)
def test_what_is_no_padding_mask(mask):
    assert read_padding(mask, 1) is None
