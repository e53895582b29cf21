"""Heads shared out over processes as torch's tensor parallelism does it: each has some columns of the query, key and
value projections, and those of the output projection that belong to them. What the processes give is added up."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from mmattn.nn import CrossAttention, RotaryEmbedding, SelfAttention
from mmattn.ops.segments import Segments

PROCESSES = 2


def share(module: nn.Module, process: int) -> nn.Module:
    part = copy.deepcopy(module)
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        linear, axis = part.get_submodule(name), int(name == "out_proj")
        linear.weight = nn.Parameter(linear.weight.chunk(PROCESSES, axis)[process].detach().clone())
        if name != "out_proj":
            linear.bias = nn.Parameter(linear.bias.chunk(PROCESSES)[process].detach().clone())
        elif process:
            linear.bias = None
    return part


@pytest.mark.parametrize("is_packed", [False, True])
def test_parts_add_up(is_packed: bool) -> None:
    torch.manual_seed(3)
    x, context = torch.randn(6, 5, 24, dtype=torch.float64), torch.randn(2, 7, 10, dtype=torch.float64)
    cross = CrossAttention(24, 4, context_dim=10, num_kv_heads=2, qk_norm="rms").double()
    itself = SelfAttention(24, 4, num_kv_heads=2, rotary=RotaryEmbedding(6), is_causal=True).double()
    mask = torch.rand(6, 1, 5, 7) < 0.7

    def run(module: nn.Module) -> Tensor:
        if isinstance(module, CrossAttention):
            if is_packed:
                words, places = Segments.of([2, 3]), Segments.of([4, 3])
                return module(x[0], context[0], segments=words, context_segments=places)
            return module(x, context, attn_mask=mask)
        return module(x[0], segments=Segments.of([2, 3])) if is_packed else module(x)

    for module in (cross, itself):
        together = sum(run(share(module, process)) for process in range(PROCESSES))
        torch.testing.assert_close(together, run(module))
