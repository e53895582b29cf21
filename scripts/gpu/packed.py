"""Packed sequences on a card: our kernels for short ones beside varlen and beside padded groups.

bfloat16, self-attention, causal, `[N, H, D]`; microseconds on the card, calls replayed as one CUDA graph, medians. The
floor is rows moved once at the copy rate: sequences this short cost next to no arithmetic.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

import torch
from attention import PASSES
from measure import Options, Status, card_us, measure_ceilings, read_options, tell
from torch import Tensor

import mmattn
from mmattn.ops.packed import packed_attention
from mmattn.ops.segments import Segments

# Rows of all sequences, heads, head_dim.
SIZES = (65536, 16, 64)
TINY = (149, 2, 16)
# Of the norm, against float32: what two roundings to bfloat16 cannot make.
FURTHEST = 0.02
# Configurations beside the one in force are tried until this process has computed so long; they compile meanwhile.
BUDGET_S = 80.0
# Rows that are computed in float32 too.
LAST_ROWS = 2048
BACKENDS = ("triton_packed", "varlen", "sdpa")


def lengths_of(kind: str, total: int) -> list[int]:
    """Lengths of sequences that have `total` rows together."""
    generator = torch.Generator().manual_seed(7)
    if kind == "scenes, mean 11":
        drawn = torch.randint(5, 18, (total,), generator=generator)
    elif kind.startswith("uniform"):
        drawn = torch.full((total,), int(kind.split()[-1]))
    else:
        mean, sigma = float(kind.split()[-1]), 0.6
        normal = torch.randn(total, generator=generator)
        drawn = (normal * sigma - sigma**2 / 2).exp().mul(mean).round().clamp(1, 8 * mean)
    lengths: list[int] = []
    for length in drawn.int().tolist():
        lengths.append(min(length, total))
        total -= lengths[-1]
        if not total:
            break
    return lengths


# The most important first.
KINDS = ("scenes, mean 11", "lognormal, mean 25", "lognormal, mean 64", "lognormal, mean 200", "uniform 512")


class Batch:
    """Random rows, as slices of a packed projection, and where the sequences lie."""

    def __init__(self, kind: str, options: Options) -> None:
        total, heads, head_dim = TINY if options.tiny else SIZES
        self.lengths = lengths_of(kind, total)
        self.segments = Segments.of(self.lengths, options.device)
        self.segments.row_numbers()
        self.dtype = torch.bfloat16 if options.device == "cuda" else torch.float32
        make = torch.Generator(options.device).manual_seed(11)
        draw = torch.randn(total, 4, heads, head_dim, generator=make, device=options.device, dtype=self.dtype)
        self.query, self.key, self.value, self.cotangent = draw.unbind(1)
        self.rows = (self.query, self.key, self.value)

    def attend(self, backend: str, has_gradients: bool) -> tuple[Tensor, ...]:
        """The output, and gradients if they are asked for."""
        rows = tuple(row.detach().requires_grad_(has_gradients) for row in self.rows)
        output = packed_attention(*rows, self.segments, is_causal=True, backend=backend)  # pyright: ignore[reportCallIssue]
        if not has_gradients:
            return (output,)
        return output, *torch.autograd.grad(output, rows, self.cotangent)


def usable(options: Options) -> list[str]:
    """Those that work here."""
    return [name for name in BACKENDS if options.device in mmattn.backends()[name].usable_on]


def errors(batch: Batch, names: list[str]) -> dict[str, float]:
    """How far output and gradients are off, as a part of the norm: each off float32 in the last sequences, which padded
    takes little memory, and ours off varlen in all."""
    found = {name: batch.attend(name, True) for name in names}
    lengths = list(batch.lengths[-1:])
    for length in batch.lengths[-2::-1]:
        if sum(lengths) + length > LAST_ROWS:
            break
        lengths.insert(0, length)
    last, segments = slice(-sum(lengths), None), Segments.of(lengths, batch.query.device)
    rows = tuple(row[last].float().requires_grad_() for row in batch.rows)
    output = packed_attention(*rows, segments, is_causal=True, backend="sdpa")  # pyright: ignore[reportCallIssue]
    exact = (output, *torch.autograd.grad(output, rows, batch.cotangent[last].float()))
    off = {name: furthest([each[last] for each in results], exact) for name, results in found.items()}
    if "varlen" in found and "triton_packed" in found:
        off["ours of varlen"] = furthest(found["triton_packed"], found["varlen"])
    return off


def furthest(results: Sequence[Tensor], wanted: Sequence[Tensor]) -> float:
    """The most that any is off, as a part of its norm."""
    pairs = zip(results, wanted, strict=True)
    return max(((got.float() - want.float()).norm() / want.float().norm()).item() for got, want in pairs)


def cell(call: Callable[[], Any], options: Options) -> str:
    """Microseconds, or a dash where the call is refused."""
    try:
        microseconds, is_graphed = card_us([call], options.device)
    except Exception as problem:
        tell(problem)
        return "-"
    return f"{microseconds:.1f}" + ("" if is_graphed or options.device == "cpu" else " (launches counted)")


def measured_row(kind: str, batch: Batch, has_gradients: bool, names: list[str], rate: float, options: Options) -> None:
    """One row."""
    cells = {name: cell(lambda name=name: batch.attend(name, has_gradients), options) for name in names}
    rows = batch.query.numel() * batch.query.element_size()
    # Query, key, value, output; backward reads these and the output's gradient, and writes three.
    moved = (12 if has_gradients else 4) * rows
    options.add(
        "Packed sequences, causal, µs",
        lengths=kind,
        sequences=len(batch.lengths),
        sizes=f"{len(batch.query)} rows, {batch.query.shape[1]} heads of {batch.query.shape[2]}",
        **{"pass": PASSES[has_gradients]},
        **{name: cells.get(name, "-") for name in BACKENDS},
        **{"varlen / ours": ratio(cells, "varlen", "triton_packed")},
        floor=f"{1e6 * moved / rate:.1f}",
    )


def ratio(cells: dict[str, str], one: str, other: str) -> str:
    """A dash where one of the two is no number."""
    numbers = [float(cells[name].split()[0]) for name in (one, other) if cells.get(name, "-") != "-"]
    return f"{numbers[0] / numbers[1]:.2f}" if len(numbers) == 2 else "-"


def configurations(batch: Batch, kind: str, options: Options, status: Status) -> None:
    """Other block sizes, all kernels with the same."""
    from mmattn.kernels import packed_rows, packed_rows_backward, packed_rows_forward
    from mmattn.kernels.packed_rows_blocks import RowsConfig

    tried = ((64, 64, 4, 2), (128, 64, 8, 2), (64, 32, 4, 3), (32, 32, 4, 2), (128, 32, 8, 2), (64, 16, 4, 2))
    for config in [RowsConfig(*numbers) for numbers in tried]:
        if time.process_time() > BUDGET_S:
            status.skip("other configurations")
            return
        with contextlib.ExitStack() as patches:
            for plans in (packed_rows._FORWARD, packed_rows._BACKWARD):
                patches.enter_context(mock.patch.object(plans, "plans", {}))
            for module in (packed_rows, packed_rows_forward, packed_rows_backward):
                chosen = mock.patch.object(module, "rows_config", lambda *_, config=config, **__: config)
                patches.enter_context(chosen)
            batch.attend("triton_packed", True)
            with options.turn():
                cells = {
                    PASSES[has_gradients]: cell(
                        lambda has_gradients=has_gradients: batch.attend("triton_packed", has_gradients), options
                    )
                    for has_gradients in (False, True)
                }
        options.add("Packed sequences, other configurations, µs", lengths=kind, configuration=str(config), **cells)


def main() -> int:
    """The most important rows first; values before times."""
    options, status = read_options(__doc__), Status()
    names = usable(options)
    with options.turn():
        rate = measure_ceilings(options).bytes_per_s
    wrong: dict[str, float] = {}
    first = Batch(KINDS[0], options)
    for kind in KINDS:
        with status.row(kind):
            batch = first if kind == KINDS[0] else Batch(kind, options)
            found = errors(batch, names)
            print(f"{kind}: off by {found}", flush=True)
            for what in ("triton_packed", "ours of varlen"):
                if what in found and not found[what] < FURTHEST:
                    wrong[f"{kind}, {what}"] = found[what]
            with options.turn():
                for has_gradients in (False, True):
                    measured_row(kind, batch, has_gradients, names, rate, options)
    if "triton_packed" in names:
        with status.row("other configurations"):
            configurations(first, KINDS[0], options, status)
        print(f"packed kernel: WRONG, off by {wrong}" if wrong else "packed kernel: right")
    else:
        reason = mmattn.backends()["triton_packed"].reasons.get(options.device)
        print(f"packed kernel: {'WRONG, ' if options.device == 'cuda' else ''}cannot be used here: {reason}")
    return 1 if wrong or (options.device == "cuda" and "triton_packed" not in names) else status.code


if __name__ == "__main__":
    sys.exit(main())
