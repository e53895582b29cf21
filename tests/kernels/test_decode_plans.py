"""Remembered launches of the decode kernels: equal to those that Triton makes anew, on a card that is not there."""

import pytest
import torch

pytest.importorskip("triton")

from mmattn.kernels import decode
from mmattn.kernels.decode import attend, decode_attention
from mmattn.kernels.decode_kernels import add_splits_kernel, decode_kernel
from mmattn.kernels.launch import is_interpreted
from tests.kernels.faked_card import faked_card

KERNELS = {kernel.__name__: kernel for kernel in (decode_kernel, add_splits_kernel)}
pytestmark = pytest.mark.skipif(is_interpreted(), reason="nothing is compiled there")


@pytest.fixture
def launched(monkeypatch):
    """What was launched, in order; nothing is planned yet."""
    monkeypatch.setattr(decode._PLANS, "plans", {})
    with faked_card() as launched:
        yield launched


def draw(heads, length, batch=2, head_dim=40):
    return torch.zeros(batch, heads, length, head_dim, dtype=torch.float16)


def named(launch):
    """(kernel, programs, arguments by name), tensors as addresses."""
    name, programs, arguments = launch
    numbers = [each.data_ptr() if isinstance(each, torch.Tensor) else each for each in arguments]
    return name, programs, dict(zip(KERNELS[name].arg_names, numbers, strict=True))


def masks(keys):
    return {
        "none": (None, None),
        "key": (torch.ones(2, 1, keys, dtype=torch.bool), None),
        "both": (torch.ones(1, 1, keys, dtype=torch.bool), torch.ones(1, 6, 3, keys, dtype=torch.bool)),
    }


@pytest.mark.parametrize("mask", ["none", "key", "both"])
@pytest.mark.parametrize(("keys", "kernels"), [(29, 1), (4099, 2)], ids=["one share", "many"])
def test_planned_launches_are_those_that_triton_makes(launched, keys, kernels, mask):
    query, key, value = draw(6, 3), draw(2, keys), draw(2, keys)
    key_mask, attn_mask = masks(keys)[mask]
    known = {
        "query_ptr": query,
        "key_ptr": key,
        "value_ptr": value,
        "key_mask_ptr": key if key_mask is None else key_mask,
        "attn_mask_ptr": key if attn_mask is None else attn_mask,
    }
    runs = []
    for _ in range(3):
        launched.clear()
        known["output_ptr"] = attend(query, key, value, key_mask, attn_mask, True, 0.3)
        runs.append([named(launch) for launch in launched])
        assert len(runs[-1]) == kernels
        buffers = {}
        for _, _, arguments in runs[-1]:
            for name, argument in arguments.items():
                if name in known:
                    assert argument == known[name].data_ptr(), name
                elif name.endswith("_ptr"):
                    buffers.setdefault(name, set()).add(argument)
        # Partial sums are handed on; where there are none their pointers are the output's.
        assert set(buffers) == {"partial_ptr", "statistics_ptr"}
        assert all(len(found) == 1 for found in buffers.values())
        outputs = {known["output_ptr"].data_ptr()}
        assert (buffers["partial_ptr"] == outputs) == (kernels == 1)
    assert len(decode._PLANS.plans) == 1
    for made, *others in zip(*runs, strict=True):
        for other in others:
            assert other[:2] == made[:2]
            for name, argument in made[2].items():
                assert name.endswith("_ptr") or other[2][name] == argument, name


def test_a_growing_cache_has_one_plan_a_block(launched):
    query, key = draw(6, 1, batch=1), draw(2, 1024, batch=1)
    for keys in range(600, 700):
        launched.clear()
        attend(query, key[:, :, :keys], key[:, :, :keys], None, None, True, 0.3)
        name, _, arguments = named(launched[0])
        assert name == "decode_kernel"
        assert arguments["num_keys"] == keys
    # Blocks of 128 keys: 600 to 640, 641 to 699.
    assert len(decode._PLANS.plans) == 2


def test_other_sizes_are_other_plans(launched):
    query, key = draw(6, 3), draw(2, 257)
    calls = [
        (query, key, key, None, None, False, 0.3),
        (query, key, key, None, None, True, 0.3),
        (query, key, key, None, None, False, 0.7),
        (query[:, :, :2], key, key, None, None, False, 0.3),
        (query, key[:, :1], key[:, :1], None, None, False, 0.3),
        (query, key[:, :, :128], key[:, :, :128], None, None, False, 0.3),
        (query, key[:, :, 1:], key[:, :, 1:], None, None, False, 0.3),
        (query, key, key.transpose(2, 3).contiguous().transpose(2, 3), None, None, False, 0.3),
        (query, key, key, torch.ones(1, 1, 1, dtype=torch.bool), None, False, 0.3),
        (query, key, key, torch.ones(1, 1, 257, dtype=torch.bool), None, False, 0.3),
        (query, key, key, None, torch.ones(1, 1, 3, 257, dtype=torch.bool), False, 0.3),
        (query, key, key, None, torch.ones(1, 1, 1, 257, dtype=torch.bool), False, 0.3),
    ]
    expected = []
    for call in calls:
        decode_attention(*call)
        expected.append([named(launch) for launch in launched])
        launched.clear()
    assert len(decode._PLANS.plans) == len(calls)
    for call, made in zip(calls, expected, strict=True):
        launched.clear()
        decode_attention(*call)
        for first, again in zip(made, [named(launch) for launch in launched], strict=True):
            assert first[:2] == again[:2]
            for name, argument in first[2].items():
                assert name.endswith("_ptr") or again[2][name] == argument, name
