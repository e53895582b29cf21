"""Where these tests run: on a CUDA card. MMATTN_TEST_DEVICE=cpu runs them on a CPU, which only shows that they run."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from mmattn.ops.registry import TABLE
from tests.ops.cases import Shape, make_attn_mask, make_inputs, make_key_mask

DEVICE = os.environ.get("MMATTN_TEST_DEVICE", "cuda")
MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE == "cuda" and not torch.cuda.is_available(), reason="needs a CUDA device"),
]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HALF_TYPES = DTYPES[1:]
USABLE = [row.name for row in TABLE if DEVICE in row.limits.dtypes and row.unusable(DEVICE) is None]
# Those that serve every call. The others have smaller grids: flex beside them, Triton's in tests/kernels, varlen and
# flash in tests/gpu/test_varlen.py.
BACKENDS = [name for name in USABLE if name in ("sdpa", "eager")]


@dataclass(frozen=True)
class Call:
    """Arguments of one attention call, on the device."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None
    key_mask: Tensor | None

    @property
    def masks(self) -> dict[str, Tensor | None]:
        return {"attn_mask": self.attn_mask, "key_mask": self.key_mask}


def make_call(shape: Shape, dtype: torch.dtype, attn_kind: str, key_kind: str, generator: torch.Generator) -> Call:
    """Drawn on the CPU, so that every device gets the same."""
    query, key, value = (tensor.to(DEVICE) for tensor in make_inputs(shape, dtype, generator))
    attn_mask = make_attn_mask(attn_kind, shape, generator)
    if attn_mask is not None:
        attn_mask = attn_mask.to(DEVICE, dtype if attn_mask.is_floating_point() else None)
    key_mask = make_key_mask(key_kind, shape, generator)
    return Call(query, key, value, attn_mask, None if key_mask is None else key_mask.to(DEVICE))
