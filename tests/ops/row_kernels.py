"""What takes the place of `varlen_attn` and `flash_attn_varlen_func` without a card: the same, in plain products.

They hold to what the kernels promise and no more: rows behind the last sequence are not read, and whatever lies there
is left in their gradients.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from mmattn.ops import registry
from mmattn.ops.backends import eager, flash, varlen
from mmattn.ops.limits import FLOATS, Backend
from mmattn.ops.request import prepare

NAMES = ("varlen", "flash")


class _Garbage(torch.autograd.Function):
    """NaN from a row on, in the rows and in their gradient."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, end: int) -> Tensor:
        ctx.end = end
        return _spoilt(rows, end)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _spoilt(grad_outputs[0], ctx.end), None


def _spoilt(rows: Tensor, end: int) -> Tensor:
    rows = rows.clone()
    rows[end:] = float("nan")
    return rows


def attend_rows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    query_starts: Tensor,
    key_starts: Tensor,
    max_queries: int,
    max_keys: int,
    *,
    scale: float,
    is_causal: bool,
    dropout_p: float = 0.0,
) -> Tensor:
    """Attention of each sequence's rows [N, H, D], by the specification."""
    # What is not there is set to -inf and scaled, as flash attention does.
    assert scale > 0
    ends = []
    for starts, longest in ((query_starts, max_queries), (key_starts, max_keys)):
        assert starts.dtype is torch.int32
        assert starts.device == query.device
        assert starts[0] == 0
        assert (starts.diff() >= 0).all()
        assert starts.diff().max() <= longest
        ends.append(starts.tolist())
    assert ends[0][-1] == len(query)
    assert ends[1][-1] <= len(key) == len(value)
    key, value = (_Garbage.apply(rows, ends[1][-1]) for rows in (key, value))  # pyright: ignore
    outputs = []
    for number in range(len(ends[0]) - 1):
        q, k, v = (
            rows[end[number] : end[number + 1]].transpose(0, 1)[None]
            for rows, end in ((query, ends[0]), (key, ends[1]), (value, ends[1]))
        )
        # Not by `attention`: observers would see it.
        output, _ = eager.run(prepare(q, k, v, None, None, is_causal, scale, dropout_p, False))
        outputs.append(output[0].transpose(0, 1))
    return torch.cat(outputs)


# Of torch 2.12 and newer, and as torch 2.11 has it.
_SIGNATURE = inspect.signature(varlen_attn)
_OLD_SIGNATURE = _SIGNATURE.replace(
    parameters=[each for name, each in _SIGNATURE.parameters.items() if name != "enable_gqa"]
)


def _varlen_attn(calls: dict[str, dict[str, Any]], signature: inspect.Signature) -> Callable[..., Tensor]:
    def run(*args: Any, **kwargs: Any) -> Tensor:
        call = signature.bind(*args, **kwargs).arguments
        calls["varlen"] = call
        if "enable_gqa" in signature.parameters and not call.get("enable_gqa", False):
            assert call["query"].shape[1] == call["key"].shape[1]
        assert call["window_size"] in ((-1, 0), (-1, -1))
        return attend_rows(*args, scale=call["scale"], is_causal=call["window_size"] == (-1, 0))

    run.__signature__ = signature  # pyright: ignore[reportFunctionMemberAccess]
    return run


def _flash_attn(calls: dict[str, dict[str, Any]]) -> Callable[..., Tensor]:
    def run(*args: Any, dropout_p: float, softmax_scale: float, causal: bool) -> Tensor:
        calls["flash"] = {"args": args, "dropout_p": dropout_p, "softmax_scale": softmax_scale, "causal": causal}
        return attend_rows(*args, scale=softmax_scale, is_causal=causal, dropout_p=dropout_p)

    return run


def install(monkeypatch: pytest.MonkeyPatch, is_old_torch: bool = False) -> dict[str, dict[str, Any]]:
    """Put them in place, and let the two backends serve a CPU in every dtype and head size. Returns the last call's
    arguments by backend, filled as calls come."""
    calls: dict[str, dict[str, Any]] = {}
    signature = _OLD_SIGNATURE if is_old_torch else _SIGNATURE
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", _varlen_attn(calls, signature))
    package = types.SimpleNamespace(flash_attn_varlen_func=_flash_attn(calls))
    monkeypatch.setitem(sys.modules, "flash_attn", package)  # pyright: ignore[reportArgumentType]
    rows = {row.name: _on_a_cpu(row) for row in (varlen.BACKEND, flash.BACKEND)}
    table = tuple(rows.get(row.name, row) for row in registry.TABLE)
    monkeypatch.setattr(registry, "TABLE", table)
    monkeypatch.setattr(registry, "_BY_NAME", {row.name: row for row in table})
    monkeypatch.setattr(registry, "_CHOICES", {})
    return calls


def _on_a_cpu(row: Backend) -> Backend:
    limits = dataclasses.replace(
        row.limits,
        dtypes={"cpu": FLOATS},
        grad_devices=("cpu",),
        masks={"cpu": row.limits.masks["cuda"]},
        min_head_dim=1,
        head_dim_step=1,
    )
    return dataclasses.replace(row, limits=limits, unusable=lambda device: None)
