"""Attention weights from the pass that computes the attention: what is asked for, and what comes of it.

Shapes: B batch, R of its rows, H query heads, H' of them, G key/value heads, Lq / Lk lengths, D head_dim, T keys.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mmattn.ops.request import Request


@dataclass(frozen=True, eq=False)
class MapsAsked:
    """Weights that an observer wants of a call.

    Attributes:
        rows: rows of the batch, one after the other; None: all.
        keys: for each of those rows the keys to keep, in any order; those that the call does not have get weights of 0.
            None: all keys.
        heads: query heads to keep; None: all.
        average: over those heads.
    """

    rows: range | None = None
    keys: tuple[tuple[int, ...], ...] | None = None
    heads: tuple[int, ...] | None = None
    average: bool = False
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    def fits(self, request: Request) -> bool:
        """Are these rows and heads there, each once? (Who asked says what is wrong, once the call is done.)"""
        batch, heads = request.query.shape[:2]
        rows = range(batch) if self.rows is None else self.rows
        is_one_by_one = len(rows) > 0 and rows.step == 1 and rows.start >= 0 and rows.stop <= batch
        is_known = self.heads is None or (
            0 < len(set(self.heads)) == len(self.heads) and set(self.heads) <= set(range(heads))
        )
        return is_one_by_one and is_known and (self.keys is None or len(self.keys) == len(rows))

    def for_shared_keys(self, rows_each: int) -> MapsAsked | None:
        """The same of a call in which each row of the batch stands for so many rows, their queries one after the other;
        None where rows that share their keys want different ones."""
        if rows_each == 1:
            return self
        if rows_each not in self._made:
            self._made[rows_each] = self._for_shared_keys(rows_each)
        return self._made[rows_each]

    def _for_shared_keys(self, rows_each: int) -> MapsAsked | None:
        if self.rows is None:
            return self if self.keys is None else None
        rows = range(self.rows.start // rows_each, (self.rows.stop - 1) // rows_each + 1)
        if self.keys is None:
            return MapsAsked(rows, None, self.heads, self.average)
        found: dict[int, tuple[int, ...]] = {}
        for row, keys in zip(self.rows, self.keys, strict=True):
            if found.setdefault(row // rows_each, keys) != keys:
                return None
        return MapsAsked(rows, tuple(found[row] for row in rows), self.heads, self.average)

    def table(self, request: Request) -> tuple[Tensor, int]:
        """(int32 [R, T] of the keys to keep, -1 where a row wants fewer, and the first of those rows)."""
        device, (batch, num_keys) = request.query.device, (request.key.shape[0], request.key.shape[2])
        rows = range(batch) if self.rows is None else self.rows
        if self.keys is None:
            return torch.arange(num_keys, dtype=torch.int32, device=device).expand(len(rows), num_keys), rows.start
        if device not in self._made:
            longest = max(map(len, self.keys))
            padded = [[*keys, *(-1,) * (longest - len(keys))] for keys in self.keys]
            # An ordinary tensor, whatever mode the first call is in; and one copy for all layers and steps.
            with torch.inference_mode(False):
                self._made[device] = torch.tensor(padded, dtype=torch.int32, device=device).view(len(rows), longest)
        return self._made[device], rows.start


@dataclass(frozen=True, eq=False, slots=True)
class SamePassMaps:
    """What a backend computed beside its output.

    Attributes:
        asked: what was asked for.
        weights: float32 [R, H' or 1, Lq, T].
        log_sum_exp: float32 [B, H, Lq], of the masked scores.
    """

    asked: MapsAsked
    weights: Tensor
    log_sum_exp: Tensor

    def of_row(self, row: int) -> Tensor:
        """Weights [H' or 1, Lq, T] of a row of the batch, of the keys that were asked for it."""
        asked = self.asked
        number = row if asked.rows is None else row - asked.rows.start
        weights = self.weights[number]
        return weights if asked.keys is None else weights[..., : len(asked.keys[number])]
