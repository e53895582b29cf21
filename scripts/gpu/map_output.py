"""Attention maps from the forward's own pass on a card: what they cost beside the forward, and beside other ways.

Maps of 10 words, averaged over the heads, of the half of the batch that follows the prompts, as `record_attention`
takes them; the forward alone, torch's (the best of its kernels) and ours; the same maps computed again from queries,
keys and log-sum-exp in torch's operations; and the eager backend, which returns all weights. bfloat16, layout
[B, L, H, D], microseconds of the card, calls replayed as one CUDA graph over inputs larger than its cache, medians.
Output and log-sum-exp are held to those of the forward alone, bit for bit, and the maps to eager ones in float32.

    python scripts/gpu/map_output.py [--device cpu] [--rows FILE] [--tiny]        about a minute on an H100
"""

from __future__ import annotations

import functools
import itertools
import math
import os
import sys
import time
from collections.abc import Callable
from typing import NamedTuple

if "cpu" in sys.argv:  # Triton decides when a kernel is defined whether its interpreter runs it
    os.environ["TRITON_INTERPRET"] = "1"

import torch
from attention import CACHE_BYTES, PINNED, SHAPES, Shape
from measure import Options, Status, card_us, measure_ceilings, read_options, tell, wait
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import mmattn
from mmattn.kernels.short_keys import short_key_attention
from mmattn.kernels.short_keys_maps import short_key_attention_maps
from mmattn.maps.weights import RowCall, kept_weights

SECONDS = 30  # of its turn, after which no further shape is begun
WORDS = 10
BATCHES = (2, 8)
WANTED = [*SHAPES[:3], Shape("512 keys", 8, 4096, 512, 64)]
TINY = [Shape("tiny", 2, 17, 13, 40)]
FURTHEST = 2e-5  # a weight in float32, of scores that are rounded in another order


class Call(NamedTuple):
    """One call, the keys to keep of each row of the second half of its batch, and its log-sum-exp."""

    query: Tensor
    key: Tensor
    value: Tensor
    keys: Tensor
    lse: Tensor

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def scale(self) -> float:
        return self.query.shape[3] ** -0.5

    @property
    def first_row(self) -> int:
        return self.query.shape[0] // 2


def make_call(shape: Shape, batch: int, device: str) -> Call:
    """Random inputs; words anywhere in the text, in any order."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float16

    def draw(length: int) -> Tensor:
        return torch.randn(batch, length, shape.heads, shape.head_dim, device=device, dtype=dtype).transpose(1, 2)

    query, key, value = draw(shape.queries), draw(shape.keys), draw(shape.keys)
    keys = torch.stack([torch.randperm(shape.keys)[:WORDS] for _ in range(batch - batch // 2)]).to(device)
    lse = short_key_attention(query, key, value, None, None, shape.head_dim**-0.5)[1]
    return Call(query, key, value, keys, lse)


def forward(call: Call) -> tuple[Tensor, Tensor]:
    """Our forward alone."""
    return short_key_attention(*call.tensors, None, None, call.scale)


def with_maps(call: Call, average: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Our forward and the maps from its pass."""
    return short_key_attention_maps(
        *call.tensors, None, None, call.scale, call.keys, call.first_row, None, average
    )  # fmt: skip


def computed_again(call: Call) -> list[Tensor]:
    """The maps from queries, keys and log-sum-exp, as for backends that give no maps."""
    rows = range(call.first_row, call.query.shape[0])
    return [
        kept_weights(RowCall(call.query[row], call.key[row], call.scale, None, call.lse[row]), keys=keys, average=True)
        for row, keys in zip(rows, call.keys, strict=True)
    ]


def recomputing(call: Call) -> object:
    """Our forward, and the maps computed again."""
    return forward(call), computed_again(call)


def eager(call: Call) -> object:
    """All weights, and the words' averaged over the heads."""
    output, weights = mmattn.attention(*call.tensors, backend="eager", return_weights=True)
    index = call.keys[:, None, None].expand(-1, *weights.shape[1:3], -1)
    return output, weights[call.first_row :].gather(3, index).float().mean(1)


def check(call: Call) -> list[str]:
    """What is wrong with the maps or with the output beside them."""
    plain = forward(call)
    found = []
    for average in (False, True):
        output, lse, maps = with_maps(call, average)
        same = torch.equal(output, plain[0]) and torch.equal(lse, plain[1])
        found += [] if same else [f"average={average}: output or log-sum-exp are not the forward's bits"]
        found += [] if torch.equal(maps, with_maps(call, average)[2]) else ["two runs give different maps"]
        _, weights = mmattn.attention(*(each.float() for each in call.tensors), backend="eager", return_weights=True)
        index = call.keys[:, None, None].expand(-1, *weights.shape[1:3], -1)
        expected = weights[call.first_row :].gather(3, index)
        error = (maps - (expected.mean(1, keepdim=True) if average else expected)).abs().max().item()
        found += [] if error < FURTHEST else [f"average={average}: maps differ by {error:.2g}"]
    return found


def timed(run: Callable[[Call], object], calls: list[Call], device: str) -> float:
    """Microseconds of one call; infinite where it cannot run."""
    try:
        return card_us([functools.partial(run, call) for call in calls], device)[0]
    except Exception as error:
        tell(error)
        return math.inf


def pinned(name: str) -> Callable[[Call], object]:
    """One of torch's kernels."""

    def run(call: Call) -> object:
        with sdpa_kernel(PINNED[name]):
            return torch.nn.functional.scaled_dot_product_attention(*call.tensors)

    return run


def run_ways(call: Call) -> None:
    """All that is timed, once: what is compiled at first calls is compiled here."""
    for run in (recomputing, eager, functools.partial(with_maps, average=True)):
        run(call)


def measure_shape(shape: Shape, batch: int, problems: list[str], options: Options) -> dict[str, str]:
    """A row of the table; `problems` are those of its values."""
    size = 4 * batch * shape.heads * shape.queries * shape.head_dim
    count = 2 if options.tiny else max(2, min(12, math.ceil(CACHE_BYTES / size)))
    calls = [make_call(shape, batch, options.device) for _ in range(count)]
    theirs = {name: timed(pinned(name), calls, options.device) for name in ("cuDNN", "flash", "efficient")}
    if all(math.isinf(us) for us in theirs.values()):
        theirs = {"math": timed(pinned("math"), calls, options.device)}
    best = min(theirs, key=lambda name: theirs[name])
    runs: dict[str, Callable[[Call], object]] = {
        "ours": forward,
        "with maps": functools.partial(with_maps, average=True),
        "with maps of each head": functools.partial(with_maps, average=False),
        "maps computed again": recomputing,
        "eager with weights": eager,
    }
    times = {name: timed(run, calls, options.device) for name, run in runs.items()}
    return {
        "shape": shape.name,
        "sizes": f"{shape.queries} x {shape.keys}, {shape.heads} heads of {shape.head_dim}",
        "batch": str(batch),
        "best of torch, no maps": f"{theirs[best]:.1f} ({best})",
        **{name: f"{us:.1f}" for name, us in times.items()},
        "with maps / best of torch": f"{times['with maps'] / theirs[best]:.2f}",
        "bits and maps": "; ".join(problems) or "equal",
    }


def processor_us(options: Options) -> dict[str, str]:
    """What a call costs the processor, without and with maps: calls too small to keep the card busy."""
    call = make_call(Shape("", 8, 16, 77, 64), 2, options.device)
    cells = {}
    for name, run in (("forward", forward), ("with maps", functools.partial(with_maps, average=True))):
        repeats = 2 if options.tiny else 200
        for _ in range(repeats // 10 + 1):
            run(call)
        wait(options.device)
        begin = time.perf_counter()
        for _ in range(repeats):
            run(call)
        cells[name] = f"{(time.perf_counter() - begin) / repeats * 1e6:.0f}"
        wait(options.device)
    return cells


def main() -> int:
    """Every shape, the smaller batch first; 1 if a bit is not what it has to be."""
    options = read_options(__doc__)
    cases = list(itertools.product(BATCHES, TINY if options.tiny else WANTED))
    problems: dict[tuple[int, Shape], list[str]] = {}
    for batch, shape in cases:
        try:
            call = make_call(shape, batch, options.device)
            problems[batch, shape] = check(call)
            run_ways(call)
        except Exception as error:
            problems[batch, shape] = [f"{type(error).__name__}: {str(error)[:200]}"]
        print(f"  {shape.name}, batch {batch}: {'; '.join(problems[batch, shape]) or 'right'}", flush=True)
    status = Status()
    with options.turn() as begin:
        rows(problems, begin, options, status)
    return 1 if any(problems.values()) else status.code


def rows(problems: dict[tuple[int, Shape], list[str]], begin: float, options: Options, status: Status) -> None:
    """A row for each case, until `SECONDS` after `begin`."""
    ceilings = measure_ceilings(options)
    options.add("Ceilings beside maps", copy=f"{ceilings.bytes_per_s / 1e12:.2f} TB/s")
    for (batch, shape), wrong in problems.items():
        if time.perf_counter() - begin > SECONDS:
            status.skip(f"{shape.name}, batch {batch}")
            continue
        try:
            row = measure_shape(shape, batch, wrong, options)
        except Exception as error:
            wrong.append(f"{type(error).__name__}: {str(error)[:200]}")
            print(f"  {shape.name}, batch {batch}: {wrong[-1]}", flush=True)
            continue
        options.add(f"Attention with maps of {WORDS} words, µs", **row)
    options.add("A call with maps costs the processor, µs", **processor_us(options))


if __name__ == "__main__":
    sys.exit(main())
