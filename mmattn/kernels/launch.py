"""What all kernels' launchers share: strides as kernels want them, and a launch as a value that can be run on tensors
or compiled without a device."""

from __future__ import annotations

import contextlib
import functools
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.kernels.tiles import tiles_of

ACCESS_BYTES = 16


class Card(NamedTuple):
    """What configurations depend on: compute capability, and the number of multiprocessors."""

    capability: tuple[int, int]
    processors: int

    @property
    def has_warp_groups(self) -> bool:
        """Are there matrix instructions of a warp group, and the shared memory that goes with them?"""
        return self.capability >= (9, 0)


# Where there is no card: the interpreter, compiling ahead of time.
STAND_IN: ContextVar[Card] = ContextVar("mmattn_kernels_stand_in", default=Card((9, 0), 4))  # noqa: B039
# Kernel arguments that change from call to call: one compiled kernel serves all their values.
SIZES = (
    "num_batches", "num_heads", "group", "num_queries", "num_keys", "num_chunks", "num_splits", "num_parts",
    "num_blocks",
)  # fmt: skip
# Rows that a program counts from one address (keys that it holds), and how far it can count.
_MOST_ROWS = 512
_MOST_OFFSET = 2**31 - 1


def is_interpreted() -> bool:
    """Do kernels run on Triton's CPU interpreter? Decided before the first kernel is defined."""
    return bool(triton.knobs.runtime.interpret)  # pyright: ignore[reportAttributeAccessIssue]


def card_of(device: torch.device) -> Card:
    """The card that kernels are configured for."""
    return _card(device) if device.type == "cuda" else STAND_IN.get()


_NOTHING = contextlib.nullcontext()


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Within the block `device` is the current one: Triton launches on that, whatever the tensors' device is."""
    is_other = device.type == "cuda" and device.index != torch.cuda.current_device()
    return torch.cuda.device(device) if is_other else _NOTHING


@functools.cache
def _card(device: torch.device) -> Card:
    return Card(
        torch.cuda.get_device_capability(device), torch.cuda.get_device_properties(device).multi_processor_count
    )


@dataclass(frozen=True)
class Launch:
    """One kernel launch.

    Attributes:
        kernel: the function decorated with `triton.jit`.
        programs: how many programs run.
        arguments: the kernel's arguments by name.
        num_warps: warps a program.
        num_stages: depth of the software pipeline of its loops.
    """

    kernel: Any
    programs: int
    arguments: dict[str, Any]
    num_warps: int
    num_stages: int

    @property
    def _options(self) -> dict[str, Any]:
        # Fused multiply-adds were Triton's default up to 3.9, which warns where nobody says, and are not from 3.10 on.
        options = {"num_warps": self.num_warps, "num_stages": self.num_stages, "enable_fp_fusion": True}
        return options | ({"launch_pdl": True} if self.is_early else {})

    @property
    def is_early(self) -> bool:
        """May it be begun before the stream's last kernel has ended (programmatic dependent launch)? Its programs then
        wait (`blocks.begin`): the time between two kernels is saved. Forwards only: where backwards did so too, most
        chains of them took longer on an H200: what comes early crowds on the processors that are free then."""
        return bool(self.arguments.get("IS_EARLY"))

    def run(self, device: torch.device) -> Any:
        """Launch on `device`; nothing to do without programs. Returns the compiled kernel, None if there is none."""
        if not self.programs:
            return None
        with on_device(device):
            return self.kernel[(self.programs,)](**self.arguments, **self._options)

    def compile(self) -> Any:
        """Compile for the active driver's target without running; the compiled kernel holds its cubin."""
        return self.kernel.warmup(grid=(self.programs,), **self.arguments, **self._options)


def early_argument(device: torch.device) -> dict[str, bool]:
    """The argument of kernels that say `begin`: whether that card can begin them early."""
    return {"IS_EARLY": card_of(device).capability >= (9, 0) and not is_interpreted()}


def access_unit(*tensors: Tensor) -> int:
    """How many elements a kernel may move at once: 16 bytes' worth if all strides between rows allow it, else 1."""
    unit = ACCESS_BYTES // tensors[0].element_size()
    fits = all(stride % unit == 0 for tensor in tensors for stride in tensor.stride()[:-1])
    return unit if fits else 1


def tensor_arguments(unit: int, **tensors: Tensor) -> dict[str, Any]:
    """Pointers and strides of tensors [B, H, L, D] as kernels take them, under the tensors' names. To kernels packed
    rows [N, H, D] are [1, H, N, D].

    Strides are counted in units, all but the last: multiplying by `unit` in the kernel tells the compiler what it could
    not know of a stride like 40, that rows begin at multiples of 16 bytes.

    Raises:
        UsageError: rows so far apart that a program's offsets among them, which have 32 bits, do not reach.
    """
    arguments: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if tensor.dim() == 4:
            (batch, head, row, column), num_rows = tensor.stride(), tensor.shape[2]
        else:
            (row, head, column), batch, num_rows = tensor.stride(), 0, tensor.shape[0]
        farthest = (min(num_rows, _MOST_ROWS) - 1) * row
        if farthest > _MOST_OFFSET:
            raise UsageError(
                f"attention kernels: rows of {name} {list(tensor.shape)} lie {row} elements apart, too far for offsets "
                f"of 32 bits: pass {name}.contiguous()"
            )
        arguments[f"{name}_ptr"] = tensor
        arguments[f"{name}_strides"] = (batch // unit, head // unit, row // unit, column)
    return arguments


def mask_arguments(query: Tensor, key: Tensor, key_mask: Tensor | None, attn_mask: Tensor | None) -> dict[str, object]:
    """Both masks as kernels take them: bytes and strides, an axis that broadcasts having stride 0. A mask that is not
    there is another tensor's pointer, never read."""
    batch, heads, num_queries, _ = query.shape
    kv_heads, num_keys = key.shape[1:3]
    arguments: dict[str, object] = {"HAS_KEY_MASK": key_mask is not None, "HAS_ATTN_MASK": attn_mask is not None}
    arguments |= {"key_mask_ptr": key, "key_mask_strides": (0, 0, 0)}
    arguments |= {"attn_mask_ptr": key, "attn_mask_strides": (0, 0, 0, 0)}
    if key_mask is not None:
        key_mask = key_mask.view(torch.uint8).expand(batch, kv_heads, num_keys)
        arguments |= {"key_mask_ptr": key_mask, "key_mask_strides": key_mask.stride()}
    if attn_mask is not None:
        attn_mask = attn_mask.view(torch.uint8).expand(batch, heads, num_queries, num_keys)
        arguments |= {"attn_mask_ptr": attn_mask, "attn_mask_strides": attn_mask.stride()}
    return arguments


def walk_over_keys(num_keys: int, block: int) -> dict[str, object]:
    """Arguments of a kernel that walks over keys in whole blocks, and in finer ones over what is left."""
    whole, rest = divmod(num_keys, block)
    return {"WHOLE_BLOCKS": whole, "BLOCK_N": block, "LAST_TILES": tiles_of(rest) if rest else ()}
