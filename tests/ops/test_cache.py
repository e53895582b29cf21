"""Caches: what they hold, how they grow, what they refuse."""

import pytest
import torch

from mmattn.errors import UsageError
from mmattn.ops.cache import ContextKV, KVCache


def make(batch=2, heads=3, head_dim=5, **changed):
    options = {"max_length": 17, "dtype": torch.float32, "device": "cpu"} | changed
    return KVCache(batch, heads, head_dim, **options)


def positions(start, end, batch=2):
    """Keys whose elements are their position plus 100 x row; values are the negatives."""
    key = torch.arange(start, end).view(1, 1, -1, 1) + 100 * torch.arange(batch).view(-1, 1, 1, 1)
    key = key.expand(batch, 3, end - start, 5).float()
    return key, -key


def test_growth_doubles_up_to_max_length():
    cache = make(initial_length=3)
    capacities = []
    for start in range(17):
        key, value = cache.update(*positions(start, start + 1))
        capacities.append(cache.capacity)
        assert torch.equal(key, positions(0, start + 1)[0])
        assert torch.equal(value, positions(0, start + 1)[1])
    assert capacities == [3] * 3 + [6] * 3 + [12] * 6 + [17] * 5
    assert cache.nbytes == 2 * 2 * 3 * 17 * 5 * 4


def test_everything_is_preallocated_by_default():
    cache = make()
    assert (cache.capacity, cache.length, cache.position, cache.batch_size) == (17, 0, 0, 2)
    before = cache.nbytes
    cache.update(*positions(0, 17))
    assert cache.nbytes == before


def test_overflow_says_the_sizes():
    cache = make(initial_length=2)
    cache.update(*positions(0, 12))
    with pytest.raises(UsageError, match="12 positions held and 6 more asked for, max_length is 17"):
        cache.update(*positions(12, 18))
    assert cache.length == 12
    cache.reset()
    key, _ = cache.update(*positions(0, 17))
    assert key.shape[2] == 17


@pytest.mark.parametrize("rows", [[1, 0], [1, 1], [0], [1, 0, 0, 1, 1]])
def test_reorder(rows):
    cache = make(initial_length=2)
    cache.update(*positions(0, 3))
    cache.reorder(torch.tensor(rows))
    assert cache.batch_size == len(rows)
    key, value = cache.update(*positions(3, 4, batch=len(rows)))
    assert torch.equal(key[:, :, :3], positions(0, 3)[0][rows])
    assert torch.equal(value[:, :, :3], positions(0, 3)[1][rows])


def test_window_keeps_the_last_positions_in_bounded_storage():
    cache = make(window=4, max_length=1000)
    for start in range(40):
        key, _ = cache.update(*positions(start, start + 1))
        assert torch.equal(key, positions(max(0, start - 3), start + 1)[0])
    assert (cache.length, cache.position, cache.capacity) == (4, 40, 8)
    key, _ = cache.update(*positions(40, 53))
    assert torch.equal(key, positions(37, 53)[0])
    assert cache.length == 4
    cache.reorder(torch.tensor([1]))
    key, _ = cache.update(*positions(53, 54, batch=1))
    assert torch.equal(key[:, :, :3], positions(50, 53)[0][1:])


@pytest.mark.parametrize("name", ["max_length", "initial_length", "window"])
def test_sizes_must_be_positive(name):
    with pytest.raises(UsageError, match=f"KVCache: {name} is 0, it must be at least 1"):
        make(**{name: 0})
    with pytest.raises(UsageError, match="batch_size is -1"):
        make(batch=-1)


def test_wrong_shapes_and_gradients_are_refused():
    cache = make()
    key, value = positions(0, 3)
    with pytest.raises(UsageError, match=r"cannot append key \[2, 3, 3, 4\]"):
        cache.update(key[..., :4], value[..., :4])
    with pytest.raises(UsageError, match=r"to a cache of \[B, G, L, D\] = \[2, 3, L, 5\]"):
        cache.update(key[:1], value[:1])
    with pytest.raises(UsageError, match="holds no gradients"):
        cache.update(key.clone().requires_grad_(), value)
    with torch.no_grad():
        cache.update(key.clone().requires_grad_(), value)


def test_context_select_and_move():
    key, value = positions(0, 7, batch=3)
    key_mask = torch.arange(7) < torch.tensor([[7], [3], [5]])
    context = ContextKV(key, value, key_mask)
    assert (context.batch_size, context.length) == (3, 7)
    assert context.nbytes == 2 * 3 * 3 * 7 * 5 * 4 + 3 * 7
    picked = context.select(torch.tensor([2, 2]))
    assert torch.equal(picked.key, key[[2, 2]])
    assert torch.equal(picked.value, value[[2, 2]])
    assert torch.equal(picked.key_mask, key_mask[[2, 2]])
    half = context.to(dtype=torch.bfloat16)
    assert (half.key.dtype, half.value.dtype, half.key_mask.dtype) == (torch.bfloat16, torch.bfloat16, torch.bool)
    assert context.to(device="meta").key_mask.device.type == "meta"
    assert ContextKV(key, value).select(torch.tensor([0])).key_mask is None
    with pytest.raises(AttributeError):
        context.key = value


def test_context_refuses_wrong_shapes():
    key, value = positions(0, 7)
    with pytest.raises(UsageError, match=r"must both be \[B, G, Lk, D\]"):
        ContextKV(key, value[:, :, :6])
    with pytest.raises(UsageError, match=r"it must be boolean \[B, Lk\] = \[2, 7\]"):
        ContextKV(key, value, torch.ones(2, 7))
