"""What our kernels take of a processor: compiled ahead of time for it, no card needed.

    scripts/gpu/kernel_resources.py [--capability 80 90] [--head-dim 40 64] [--keys 77 257] [--channels 320]
                                    [--dtype float32]

Registers a thread (255 at most), bytes of shared memory a program, bytes spilt a thread, matrix instructions: of a warp
group (only compute capability 9.0 has them), of a warp, and through tensor memory (from 10.0 on, 100 here). Triton
brings compiler and reader.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mmattn.kernels.biased_sum import launch_of as biased_sum_launch  # noqa: E402
from mmattn.kernels.decode import decode_launches  # noqa: E402
from mmattn.kernels.gated_kernels import backward_launch as gated_backward_launch  # noqa: E402
from mmattn.kernels.gated_kernels import forward_launch as gated_forward_launch  # noqa: E402
from mmattn.kernels.group_norm_launches import Config, Cut, norm_config  # noqa: E402
from mmattn.kernels.group_norm_launches import backward_launches as norm_backward_launches  # noqa: E402
from mmattn.kernels.group_norm_launches import forward_launches as norm_forward_launches  # noqa: E402
from mmattn.kernels.launch import Launch  # noqa: E402
from mmattn.kernels.packed_rows_backward import backward_launches as packed_backward_launches  # noqa: E402
from mmattn.kernels.packed_rows_forward import forward_launch as packed_forward_launch  # noqa: E402
from mmattn.kernels.resources import compiling_for, resources_of  # noqa: E402
from mmattn.kernels.short_keys_backward import backward_launches  # noqa: E402
from mmattn.kernels.short_keys_backward_split import split_bwd_kernel  # noqa: E402
from mmattn.kernels.short_keys_forward import forward_launch  # noqa: E402
from mmattn.kernels.short_keys_maps import maps_launch  # noqa: E402

DECODE_KEYS = 4096
HEAD_DIMS = (40, 64, 72, 80, 96, 128, 160)
KEYS = (77, 128, 256, 512)
CHANNELS = (256, 320, 512, 640, 768, 1024, 1280)
GROUPS = 32
GATED_WIDTH = 2560  # of a U-Net's feed-forward blocks
FEW_QUERIES = 256  # for which the backward may take another kernel
KEPT = 10  # words that maps are made of


def launches(head_dim: int, num_keys: int, dtype: torch.dtype) -> list[Launch]:
    """All kernels for a U-Net's layout [B, L, H, D], the forward alone and with maps first; within `compiling_for`, for
    its configurations."""

    def make(length: int) -> torch.Tensor:
        return torch.empty(2, length, 8, head_dim, dtype=dtype).transpose(1, 2)

    query, key, value, output = make(4096), make(num_keys), make(num_keys), make(4096)
    lse = torch.empty(2, 8, 4096)
    forward = forward_launch(query, key, value, None, None, 0.3, output, lse)
    kept = torch.zeros(1, KEPT, dtype=torch.int64)
    maps = maps_launch(forward, torch.empty(1, 8, KEPT, 4096), kept, 1, None)
    backward = backward_launches(output, query, key, value, output, lse, None, None, 0.3)
    few = make(FEW_QUERIES)
    of_few = backward_launches(few, few, key, value, few, lse[..., :FEW_QUERIES], None, None, 0.3)
    split = [launch for launch in of_few.launches if launch.kernel is split_bwd_kernel]
    return [forward, maps, *backward.launches, *split]


def decode_launches_of(head_dim: int, num_keys: int, dtype: torch.dtype) -> tuple[Launch, ...]:
    """Both kernels of a step of decoding for one text, four query heads to each of eight key/value heads."""
    query, key = (torch.empty(1, heads, length, head_dim, dtype=dtype) for heads, length in ((32, 1), (8, num_keys)))
    return decode_launches(query, key, key, None, None, False, 0.3, query)


def packed_launches_of(head_dim: int, dtype: torch.dtype, is_causal: bool = True) -> tuple[Launch, ...]:
    """All kernels for packed rows, 16 heads each."""
    query, output = (torch.empty(4096, 16, head_dim, dtype=dtype) for _ in range(2))
    lse, starts, numbers = torch.empty(16, 4096), *(torch.empty(n, dtype=torch.int32) for n in (301, 4096))
    tensors = (query, query, query)
    forward = packed_forward_launch(*tensors, starts, starts, numbers, is_causal, 0.3, output, lse)
    places = (starts, starts, numbers, numbers)
    backward = packed_backward_launches(output, *tensors, output, lse, *places, is_causal, 0.3, lse, tensors)
    return (forward, *backward)


def norm_launches_of(
    channels: int, dtype: torch.dtype, *, side: int = 32, batch: int = 256, has_silu: bool = True,
    config: Config | None = None,
) -> tuple[Launch, ...]:  # fmt: skip
    """All kernels of GroupNorm, with a time embedding, of square pictures; parameters are in float32."""
    x = torch.empty(batch, channels, side, side, dtype=dtype, memory_format=torch.channels_last)
    weight, shift = torch.empty(channels), torch.empty(batch, channels, dtype=dtype)
    norms = torch.empty(batch, 3, channels)
    cut = Cut.of(x, GROUPS, config or norm_config())
    forward = norm_forward_launches(cut, x, weight, weight, shift, 1e-5, has_silu, x, norms)
    backward = norm_backward_launches(cut, x, weight, weight, norms, x, has_silu, x, (weight, weight), shift)
    return (*forward, *backward)


def biased_sum_launch_of(channels: int, dtype: torch.dtype) -> Launch:
    """Two pictures and a bias."""
    x = torch.empty(16, channels, 32, 32, dtype=dtype, memory_format=torch.channels_last)
    return biased_sum_launch(x, x, torch.empty(channels), torch.empty_like(x))


def gated_launches_of(width: int, dtype: torch.dtype, activation: str) -> tuple[Launch, ...]:
    """Both kernels of a gated feed-forward block."""
    joined, half = (torch.empty(4096, columns, dtype=dtype) for columns in (2 * width, width))
    return (
        gated_forward_launch(joined, half, activation),
        gated_backward_launch(half, joined, torch.empty_like(joined), activation),
    )


TAKEN = ("kernel", "warps", "registers", "shared", "spilt", "group, warp, tensor memory products")


def head(*where: str) -> str:
    """The first lines of a table whose rows say of each kernel `where` it belongs."""
    names = (*where, *TAKEN)
    return f"| {' | '.join(names)} |\n|{'---|' * len(names)}"


def row(launch: Launch, *where: object) -> str:
    """A line of the table."""
    found = resources_of(launch)
    name = launch.kernel.__name__.removesuffix("_kernel")
    products = f"{found.warp_group_products}, {found.warp_products}, {found.tensor_memory_products}"
    numbers = (launch.num_warps, found.registers, found.shared_bytes, found.spilled_bytes, products)
    return f"| {' | '.join(map(str, (*where, name, *numbers)))} |"


def main() -> int:
    """A line for each kernel."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capability", type=int, nargs="+", default=[80, 90], help="ten times the number: 80 is 8.0")
    parser.add_argument("--head-dim", type=int, nargs="+", default=HEAD_DIMS)
    parser.add_argument("--keys", type=int, nargs="+", default=KEYS)
    parser.add_argument("--channels", type=int, nargs="+", default=CHANNELS, help="of pictures that norms are for")
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), default=torch.bfloat16, metavar="NAME")
    arguments = parser.parse_args()
    print(head("capability", "head_dim", "keys"))
    for capability in arguments.capability:
        with compiling_for(capability):
            for head_dim, num_keys in itertools.product(arguments.head_dim, arguments.keys):
                for launch in launches(head_dim, num_keys, arguments.dtype):
                    print(row(launch, capability / 10, head_dim, num_keys), flush=True)
            for head_dim in arguments.head_dim:
                for launch in decode_launches_of(head_dim, DECODE_KEYS, arguments.dtype):
                    print(row(launch, capability / 10, head_dim, DECODE_KEYS), flush=True)
                for launch in packed_launches_of(head_dim, arguments.dtype):
                    print(row(launch, capability / 10, head_dim, "packed"), flush=True)
            for channels in arguments.channels:
                for launch in (
                    *norm_launches_of(channels, arguments.dtype),
                    biased_sum_launch_of(channels, arguments.dtype),
                ):
                    print(row(launch, capability / 10, "-", f"{channels} channels"), flush=True)
            for activation in ("gelu", "silu"):
                for launch in gated_launches_of(GATED_WIDTH, arguments.dtype, activation):
                    print(row(launch, capability / 10, activation, GATED_WIDTH), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
