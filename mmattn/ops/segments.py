"""Where sequences lie in a packed tensor: one after the other, without padding."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.kernels.plain import makes_fake_tensors

_BLOCK = 128


@dataclass(frozen=True, eq=False)
class Segments:
    """The sequences of a packed tensor `[N, ...]`: the first `lengths[0]` rows are the first, and so on.

    Attributes:
        lengths: rows of each sequence, at least 1; numbers, so that nobody has to ask the device for them.
        cu_seqlens: int32 `[num_sequences + 1]`, where each begins, and N: as variable-length kernels take it.
        total: N, the rows of all sequences.
        longest: rows of the longest sequence.
        longest_block: that, up to the next multiple of 128, which is as good to variable-length kernels: they work in
            blocks, and torch.compile makes one code for all lengths of a block.
    """

    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    # What follows from the two is no field: torch's FSDP makes a call's dataclasses anew of all their fields. It is not
    # asked of `lengths` in every layer, which may be thousands, and which torch.compile would look at one by one.
    if TYPE_CHECKING:
        total: int = field(init=False)
        longest: int = field(init=False)
        longest_block: int = field(init=False)
        _merged: list[Segments] = field(init=False)  # what was last asked for
        _row_numbers: list[Tensor] = field(init=False)  # made once, for all layers

    def __post_init__(self) -> None:
        starts = self.cu_seqlens
        if isinstance(starts, Tensor) and (starts.dtype is not torch.int32 or starts.dim() != 1):
            raise UsageError(
                f"packed sequences: cu_seqlens are {starts.dtype} {list(starts.shape)}, they must be int32 "
                "[num_sequences + 1]: Segments.of(cu_seqlens.diff()) makes them so"
            )
        object.__setattr__(self, "total", sum(self.lengths))
        object.__setattr__(self, "longest", max(self.lengths, default=0))
        object.__setattr__(self, "longest_block", -(-self.longest // _BLOCK) * _BLOCK)
        object.__setattr__(self, "_merged", [])
        object.__setattr__(self, "_row_numbers", [])

    def __len__(self) -> int:
        """How many sequences."""
        return self.cu_seqlens.shape[0] - 1

    @classmethod
    def of(cls, lengths: Iterable[int] | Tensor, device: torch.device | str = "cpu") -> Segments:
        """The segments of sequences of these lengths.

        Raises:
            UsageError: no sequence, an empty one, or one whose length is no whole number.
        """
        given = lengths.tolist() if isinstance(lengths, Tensor) else list(lengths)
        numbers = tuple(int(length) for length in given)
        if any(number != length for number, length in zip(numbers, given, strict=True)):
            raise UsageError(f"packed sequences: lengths {given[:8]} must be whole numbers")
        if not numbers or min(numbers) < 1:
            raise UsageError(
                f"packed sequences: lengths {list(numbers[:8])}{', ...' if len(numbers) > 8 else ''} must be one or "
                "more, each at least 1: leave empty sequences out"
            )
        starts = list(itertools.accumulate(numbers, initial=0))
        return cls(numbers, torch.tensor(starts, dtype=torch.int32, device=device))

    @classmethod
    def equal(cls, count: int, length: int, device: torch.device | str = "cpu") -> Segments:
        """`count` segments of `length` rows each, made on the device itself."""
        if count < 1 or length < 1:
            raise UsageError(f"packed sequences: {count} of {length} rows: both must be at least 1")
        ends = torch.arange(0, count * length + 1, length, dtype=torch.int32, device=device)
        return cls((length,) * count, ends)

    def positions(self) -> Tensor:
        """int64 `[N]`: the place of each row in its sequence, from 0."""
        starts = self.cu_seqlens[self.row_numbers()].long()
        return torch.arange(self.total, device=starts.device) - starts

    def row_numbers(self) -> Tensor:
        """int32 `[N]`: the sequence of each row, from 0. Kept: models ask for `positions` before their layers run."""
        if self._row_numbers:
            return self._row_numbers[0]
        if torch.compiler.is_compiling() or makes_fake_tensors():
            return self._numbered()
        # A tensor made in inference mode, and kept, could not be saved for a later backward pass.
        with torch.inference_mode(False):
            self._row_numbers[:] = [self._numbered()]
        return self._row_numbers[0]

    def _numbered(self) -> Tensor:
        numbers = torch.arange(len(self), dtype=torch.int32, device=self.cu_seqlens.device)
        # With the total given, CUDA need not be waited for.
        return numbers.repeat_interleave(self.cu_seqlens.diff(), output_size=self.total)

    def merged(self, count: int) -> Segments:
        """The same rows as `count` sequences, equally many neighbours joined in each.

        Raises:
            UsageError: the sequences cannot be shared out equally.
        """
        if count == len(self):
            return self
        if not self._merged or len(self._merged[0]) != count:
            self._merged[:] = [self._joined(count)]
        return self._merged[0]

    def _joined(self, count: int) -> Segments:
        joined, rest = divmod(len(self.lengths), count)
        if rest or not joined:
            raise UsageError(
                f"packed sequences: {len(self.lengths)} cannot be shared out equally among {count} contexts: there have"
                " to be as many for each"
            )
        lengths = tuple(sum(self.lengths[start : start + joined]) for start in range(0, len(self.lengths), joined))
        return Segments(lengths, self.cu_seqlens[::joined].contiguous())

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Segments:
        """The same on another device."""
        return replace(self, cu_seqlens=self.cu_seqlens.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Segments:
        """The same in pinned memory; data loaders ask for it."""
        return replace(self, cu_seqlens=self.cu_seqlens.pin_memory())


def check_segments(what: str, segments: object) -> None:
    """Raise `UsageError` for what is no `Segments`."""
    if not isinstance(segments, Segments):
        raise UsageError(
            f"{what}: packed sequences are described by mmattn.ops.segments.Segments, not by a "
            f"{type(segments).__name__}: Segments.of(lengths), or Segments.of(cu_seqlens.diff())"
        )


@dataclass(slots=True)
class PackedRequest:
    """What a backend is asked to compute on packed sequences; see `packed_attention` for the meaning of each field."""

    query: Tensor
    key: Tensor
    value: Tensor
    query_segments: Segments
    key_segments: Segments
    is_causal: bool
    scale: float
    dropout_p: float
