"""One steered attention call beside maps written out in float64, with gradients; regions at any resolution."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from mmattn.errors import RunError, UsageError
from mmattn.maps.edits import PromptEdit
from mmattn.maps.layers import grid_of
from mmattn.maps.steer_changes import MapExchange, ScoreBias, map_exchange, score_bias
from mmattn.maps.steer_regions import Region, read_regions
from mmattn.maps.tokens import TextTokens
from mmattn.ops.attention import attention
from mmattn.ops.observe import observing, steering
from mmattn.ops.tolerance import deviation

BATCH, HEADS, KV_HEADS, KEYS, DIM = 5, 6, 3, 13, 7
ROWS, COLUMNS = 3, 5
CPU = torch.device("cpu")


def tokens(text: str) -> TextTokens:
    """A token a word, but for words with a hyphen, which have one for each part; a special token at both ends."""
    words = [word.split("-") for word in text.split()]
    pieces = [piece for word in words for piece in word]
    starts = [number == 0 for word in words for number in range(len(word))]
    ids = [1, *(10 + sum(map(ord, piece)) for piece in pieces), 2]
    return TextTokens(text, tuple(ids), ("", *pieces, ""), (True, *starts, True))


def tensors(dtype: torch.dtype = torch.float64, places: int = ROWS * COLUMNS) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = [(BATCH, HEADS, places, DIM), (BATCH, KV_HEADS, KEYS, DIM), (BATCH, KV_HEADS, KEYS, DIM)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def maps_of(query: Tensor, key: Tensor) -> Tensor:
    key = key.repeat_interleave(HEADS // KV_HEADS, dim=1)
    return (query @ key.transpose(-1, -2) / DIM**0.5).softmax(dim=-1)


def over(maps: Tensor, value: Tensor) -> Tensor:
    return maps @ value.repeat_interleave(HEADS // KV_HEADS, dim=1)


def check(apply, written_out, **arguments) -> None:
    """`apply(request, run)` against `written_out(query, key, value)`: float64 with gradients, others by the rule."""
    leaves = [tensor.requires_grad_() for tensor in tensors()]
    other = [tensor.detach().clone().requires_grad_() for tensor in leaves]
    with steering(apply):
        found = attention(*leaves, **arguments)
    expected = written_out(*other)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    cotangent = torch.randn_like(expected)
    found.backward(cotangent)
    expected.backward(cotangent)
    for leaf, reference in zip(leaves, other, strict=True):
        torch.testing.assert_close(leaf.grad, reference.grad, rtol=1e-10, atol=1e-11)
    for dtype in (torch.float32, torch.bfloat16):
        with steering(apply):
            fast = attention(*tensors(dtype), **arguments)
            eager = attention(*tensors(dtype), **arguments | {"backend": "eager"})
            reference = attention(*[tensor.double() for tensor in tensors(dtype)], **arguments)
        assert deviation(fast, eager, reference).is_within


PROMPTS = [None, tokens("a red cir-cle"), tokens("red on a cir-cle of red"), None, tokens("cir-cle red")]


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_weights_and_regions(backend):
    box = Region("circle", box=(0.0, 1 / 3, 0.5, 1.0))
    bias = score_bias(PROMPTS, KEYS, {"red": 2.5, "circle": 1.0}, [box], 0.25, torch.ones(1, dtype=torch.float64))
    assert bias is not None
    share = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    share[1:, :2], share[1:, 2] = 1.0, 0.5
    factors = torch.ones(BATCH, ROWS * COLUMNS, KEYS, dtype=torch.float64)
    for row, red, circle in ((1, [2], [3, 4]), (2, [1, 7], [4, 5]), (4, [3], [1, 2])):
        factors[row][:, red] *= 2.5
        factors[row][:, circle] *= share.flatten()[:, None]
        factors[row][:, len(PROMPTS[row]) - 1 :] *= 0.25  # the end
    valid = torch.arange(KEYS) < torch.tensor([13, 7, 11, 2, 5])[:, None]

    def written_out(query, key, value):
        maps = maps_of(query, key) * factors[:, None] * valid[:, None, None]
        return over(maps / maps.sum(-1, keepdim=True), value)

    def apply(request, run):
        return bias.apply(request, run, size=(2 * ROWS - 1, 2 * COLUMNS), pictures=1, where="a layer")

    check(apply, written_out, key_mask=valid, backend=backend)


def test_pictures_folded_into_the_queries():
    bias = score_bias(
        PROMPTS, KEYS, {}, [Region("red", box=(0.2, 0.0, 1.0, 0.5))], 0.0, torch.ones(1, dtype=torch.float64)
    )
    assert bias is not None
    query, key, value = tensors(places=2 * ROWS * COLUMNS)

    def steered(pictures):
        return lambda request, run: bias.apply(request, run, size=(ROWS, COLUMNS), pictures=pictures, where="x")

    with steering(steered(2)):
        together = attention(query, key, value)
    for number in range(2):
        part = query[:, :, number * ROWS * COLUMNS : (number + 1) * ROWS * COLUMNS]
        with steering(steered(1)):
            alone = attention(part, key, value)
        torch.testing.assert_close(
            together[:, :, number * ROWS * COLUMNS : (number + 1) * ROWS * COLUMNS], alone, rtol=1e-12, atol=1e-13
        )


def test_regions_that_leave_nothing_over():
    """A tokenizer without a token before the text."""
    prompt = TextTokens("red ring", (3, 4, 2), ("red", "ring", ""), (True, True, True))
    box, like = Region("red ring", box=(0.0, 0.0, 0.5, 1.0)), torch.ones(1)
    with pytest.raises(UsageError, match="all of 'red ring' is limited to regions.*give an end_weight above 0"):
        score_bias([prompt], KEYS, {}, [box], 0.0, like)
    assert score_bias([prompt], KEYS, {}, [box], 0.5, like) is not None
    assert score_bias([prompt], KEYS, {}, [Region("ring", box=box.box)], 0.0, like) is not None
    with pytest.raises(UsageError, match="would attend to nothing"):
        score_bias([prompt], KEYS, {"red": 0.0}, [Region("ring", box=box.box)], 0.0, like)


def test_masks_of_the_call_still_count():
    bias = ScoreBias(torch.log(torch.rand(BATCH, KEYS) + 0.5), [])
    query, key, value = tensors()
    allowed = torch.rand(BATCH, 1, ROWS * COLUMNS, KEYS, generator=torch.Generator().manual_seed(5)) > 0.4
    added = torch.randn(BATCH, HEADS, ROWS * COLUMNS, KEYS, dtype=torch.float64)
    for mask in (allowed, added):
        with steering(lambda request, run: bias.apply(request, run, size=(3, 5), pictures=1, where="x")):
            found = attention(query, key, value, attn_mask=mask)
        total = bias.words[:, None, None].double()
        total = total.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else total + mask
        torch.testing.assert_close(found, attention(query, key, value, attn_mask=total), rtol=1e-12, atol=1e-13)


def test_maps_of_another_row():
    source, edited = tokens("a red cir-cle above b"), tokens("a pale-blue cir-cle above c")
    exchange = map_exchange([None, source, edited, None, None], KEYS, PromptEdit(weights={"circle": -2.0}), CPU)
    assert exchange is not None
    assert exchange.own is None
    assert exchange.rows.tolist() == [0, 1, 1, 3, 4]

    def written_out(query, key, value):
        maps = maps_of(query, key)
        new = torch.zeros_like(maps[1])
        new[..., :2] = maps[1][..., :2]
        new[..., 2:4] = maps[1][..., 2:3] / 2  # one token shared out between two
        new[..., 4:6] = maps[1][..., 3:5] * -2
        new[..., 6:12] = maps[1][..., 5:11]
        new[..., 12] = maps[1][..., 11] + maps[1][..., 12]
        return over(torch.cat([maps[:2], new[None], maps[3:]]), value)

    check(lambda request, run: exchange.cross(request, run), written_out)


def test_maps_of_another_row_and_columns_of_the_own():
    source, edited = tokens("a red cir-cle"), tokens("a large red cir-cle left")
    exchange = map_exchange([source, edited, None, None, None], KEYS, PromptEdit("refine", weights={"left": 3}), CPU)
    assert exchange is not None

    def written_out(query, key, value):
        maps = maps_of(query, key)
        new = maps[1].clone()
        new[..., :2] = maps[0][..., :2]
        new[..., 3:6] = maps[0][..., 2:5]
        new[..., 6] *= 3
        new[..., 7] = maps[0][..., 5]  # the end
        new[..., 8:] = maps[0][..., 6:11]
        return over(torch.cat([maps[:1], new[None], maps[2:]]), value)

    check(lambda request, run: exchange.cross(request, run), written_out)
    seen = []
    with observing(seen.append), steering(lambda request, run: exchange.cross(request, run)):
        attention(*tensors())
    assert len(seen) == 1


def test_self_attention_of_another_row():
    exchange = MapExchange(torch.tensor([0, 0, 2]), torch.tensor([1]), torch.eye(KEYS)[None], None)
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(6, 3, 11, 5, generator=generator, dtype=torch.float64) for _ in range(3))
    rows = [0, 1, 0, 1, 4, 5]  # two pictures a row
    with steering(lambda request, run: exchange.own_maps(request, run, pictures=2)):
        found = attention(query, key, value)
    torch.testing.assert_close(found, attention(query[rows], key[rows], value), rtol=0, atol=0)
    with pytest.raises(UsageError, match="start from different noise.*give both the same seed"):
        exchange.check_noise(query)
    exchange.check_noise(query[[0, 1, 0, 1, 4, 5]])


def means(mask: np.ndarray, height: int, width: int) -> Tensor:
    """Means over cells that need not end between pixels: each pixel is cut up until they do."""
    rows, columns = mask.shape
    cut = mask.repeat(height, axis=0).repeat(width, axis=1).reshape(height, rows, width, columns)
    return torch.from_numpy(cut.mean(axis=(1, 3)))


@pytest.mark.parametrize("size", [(7, 5), (8, 8), (1, 13), (64, 48)])
def test_coverage_is_the_mean_over_each_cell(size):
    mask = np.random.default_rng(0).random((13, 7)) > 0.4
    drawn = np.zeros((40, 40))
    drawn[16:24, 5:] = 1
    regions = read_regions({"a": mask, "b": (0.125, 0.4, 1.0, 0.6)})
    for region, truth in zip(regions, (mask, drawn), strict=True):
        torch.testing.assert_close(region.coverage(*size), means(truth, *size), rtol=0, atol=1e-12)
        assert not region.is_everything
    whole = read_regions({"a": np.ones((3, 2)), "b": (0, 0, 1, 1), "c": [0, 0, 1.0, 1]})
    for region in whole:
        assert region.is_everything
        torch.testing.assert_close(region.coverage(*size), torch.ones(size, dtype=torch.float64), rtol=0, atol=1e-12)


def test_masks_of_any_kind():
    mask = np.array([[0, 1, 1], [0, 0, 1]])
    picture = Image.fromarray((mask * 200).astype(np.uint8))
    given = (mask, mask.astype(bool), mask.astype(np.float64), torch.from_numpy(mask), torch.tensor(mask) > 0, picture)
    found = [read_regions({"a": each})[0].coverage(4, 6) for each in given]
    assert all(torch.equal(each, found[0]) for each in found)
    assert found[0].sum() == 12


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((0, 0, 1.5, 1), r"region of 'cat', \(0, 0, 1.5, 1\), reaches outside the picture.*fractions of the picture"),
        ((-0.1, 0, 1, 1), "reaches outside the picture"),
        ((10, 20, 200, 300), "reaches outside the picture"),
        ((0, float("nan"), 1, 1), "reaches outside the picture"),
        ((0.5, 0, 0.5, 1), "is empty; a box is"),
        ((0, 0.7, 1, 0.2), "is empty; a box is"),
        (np.zeros((3, 4)), "is empty: its mask is 0 everywhere"),
        (np.full((3, 4), 0.5), "other values than 0 and 1"),
        (np.full((3, 4), np.nan), "other values than 0 and 1"),
        (np.ones((3, 4, 3)), r"is Tensor \[3, 4, 3\]; give a box"),
        ("left", "is 'left'; give a box"),
        ((0, 0, 1), r"is \(0, 0, 1\); give a box"),
    ],
)
def test_regions_that_cannot_be(given, message):
    with pytest.raises(UsageError, match=message):
        read_regions({"cat": given})


def test_regions_without_phrases():
    with pytest.raises(UsageError, match="regions is a tuple; give phrases with boxes or masks"):
        read_regions((0, 0, 1, 1))
    with pytest.raises(UsageError, match="regions has '' for a phrase"):
        read_regions({"": (0, 0, 1, 1)})


def test_grid_of_a_layer():
    assert grid_of((9, 13), 117, where="x") == (9, 13)
    assert grid_of((9, 13), 35, where="x") == (5, 7)
    assert grid_of((9, 13), 12, where="x") == (3, 4)
    with pytest.raises(RunError, match="mid has 36 places, which is no level of 9 x 13"):
        grid_of((9, 13), 36, where="mid")
