"""What torch counts the kernels' operations as: what it counts its own attention as."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mmattn.ops.packed import packed_attention
from tests.kernels.cases import triton_attention
from tests.kernels.packed_cases import Packed

pytest.importorskip("triton")
pytestmark = pytest.mark.interpreter

# Imported here, after the check: they need triton.
import mmattn.kernels.flops  # noqa: E402, F401
from mmattn.kernels.decode import decode_attention  # noqa: E402
from mmattn.kernels.short_keys_maps import short_key_attention_maps  # noqa: E402

ROOT = Path(__file__).parents[2]
BATCH, HEADS, KV_HEADS, QUERIES, KEYS, HEAD_DIM = 2, 6, 3, 11, 13, 40


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def tensors(has_grad=False, kv_heads=KV_HEADS):
    shapes = ((HEADS, QUERIES), (kv_heads, KEYS), (kv_heads, KEYS))
    return [torch.randn(BATCH, *shape, HEAD_DIM, requires_grad=has_grad) for shape in shapes]


@pytest.mark.parametrize("kv_heads", [HEADS, KV_HEADS])
def test_short_keys_forward_and_backward(kv_heads):
    query, key, value = tensors(has_grad=True, kv_heads=kv_heads)
    ours = counted(lambda: triton_attention(query, key, value).sum().backward())
    shapes = query.shape, key.shape, value.shape
    expected = sdpa_flop_count(*shapes) + sdpa_backward_flop_count(query.shape, *shapes)
    assert ours == expected == 14 * BATCH * HEADS * QUERIES * KEYS * HEAD_DIM
    with torch.no_grad():
        assert counted(lambda: triton_attention(query, key, value)) == 4 * BATCH * HEADS * QUERIES * KEYS * HEAD_DIM


@pytest.mark.parametrize("heads", [None, [1, 4]])
def test_maps_are_the_scores_of_their_keys_once_more(heads):
    keys = torch.tensor([[0, 3, 5, 7, -1]])
    run = lambda: short_key_attention_maps(*tensors(), None, None, 0.3, keys, 0, heads, True)  # noqa: E731
    attention = 4 * BATCH * HEADS * QUERIES * KEYS * HEAD_DIM
    assert counted(run) == attention + 2 * (HEADS if heads is None else 2) * QUERIES * keys.numel() * HEAD_DIM


def test_decoding():
    query, key, value = tensors()
    assert counted(lambda: decode_attention(query, key, value, None, None, False, 0.3)) == (
        4 * BATCH * HEADS * QUERIES * KEYS * HEAD_DIM
    )


@pytest.mark.parametrize("keys", [(7, 2, 11, 5), (3, 1, 13, 2)])
def test_packed_sequences_count_their_own_keys_only(keys):
    case = Packed((7, 2, 11, 5), keys, 4, 2, 40)
    rows = [row.requires_grad_() for row in case.rows(torch.float32)]
    run = lambda: packed_attention(*rows, *case.segments(), backend="triton_packed")  # noqa: E731
    pairs = sum(lq * lk for lq, lk in zip(case.queries, case.keys, strict=True))
    assert counted(lambda: run().sum().backward()) == 14 * 4 * 40 * pairs
    with torch.no_grad():
        assert counted(run) == 4 * 4 * 40 * pairs


def test_lengths_that_are_not_known_count_as_equal():
    case = Packed((8, 4), (5, 7), 4, 2, 40)
    with FakeTensorMode() as fake:
        rows = [fake.from_tensor(row) for row in case.rows(torch.float32)]
        starts = [fake.from_tensor(each.cu_seqlens) for each in case.segments()]
        numbers = [fake.from_tensor(each.row_numbers()) for each in case.segments()]
        run = lambda: torch.ops.mmattn.packed_rows_attention(*rows, *starts, *numbers, False, 0.3)  # noqa: E731
        assert counted(run) == 4 * 4 * 40 * (12 * 12 // 2)


_FIRST_STEP = """
import types, torch
from mmattn.training import rates
from tests.kernels.cases import triton_attention
clock = rates.Rates(types.SimpleNamespace(device=torch.device("cpu"), mixed_precision="bf16", num_processes=1), 0, 10)
clock._peak = 1e12
with clock.counted():
    triton_attention(*(torch.ones(1, 2, size, 40) for size in (11, 13, 13)))
print(int(clock._flops))
"""


def test_the_first_step_of_a_run_knows_them():
    """Though the backends import them only when they are first called."""
    found = subprocess.run([sys.executable, "-c", _FIRST_STEP], cwd=ROOT, capture_output=True, text=True, check=True)
    assert int(found.stdout) == 4 * 2 * 11 * 13 * 40
