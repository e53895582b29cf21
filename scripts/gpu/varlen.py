"""Attention without padding (backends varlen and flash) on a card: text padded to a fixed length, and packed rows.

bfloat16, `[B, L, H, D]` storage; microseconds on the card, calls replayed as one CUDA graph over inputs larger than the
cache, medians. The floor counts the real keys only.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from attention import CACHE_BYTES, FURTHEST, PASSES, PINNED, Attend, Inputs, Shape, measured, ours, pinned, run_once
from measure import Ceilings, Options, Status, card_us, host_us, measure_ceilings, read_options, tell

import mmattn
from mmattn.ops.packed import packed_attention
from mmattn.ops.segments import Segments

PIXART = Shape("PixArt cross, 20 to 120 of 300 tokens", 16, 4096, 300, 72, real=120)
LONG_TEXT = Shape("cross, 21 to 128 of 512 tokens", 24, 4096, 512, 128, real=128)
LITTLE = replace(PIXART, name="PixArt cross, 50 to 300 of 300 tokens", real=300)
LITTLE_LONG = replace(LONG_TEXT, name="cross, 85 to 512 of 512 tokens", real=512)
MASKED = [(PIXART, 2), (PIXART, 4), (LONG_TEXT, 2), (PIXART, 16), (LITTLE, 4), (LITTLE_LONG, 2), (LITTLE, 16)]
TINY = [(Shape("tiny", 2, 33, 12, 8, real=6), 2)]
KERNELS = {name: PINNED[name] for name in ("cuDNN", "efficient")}
ROWS = ("varlen", "flash", "triton")
PACKED_ROWS = ("varlen", "flash", "triton_packed")
# Sentences of 8 to 64 tokens, self-attention of a translator's encoder: rows, heads, head_dim.
PACKED = (16384, 16, 64)


class Padded(Inputs):
    """As models have them: heads side by side in memory."""

    def __init__(self, shape: Shape, batch: int, device: str) -> None:
        super().__init__(shape, batch, device)
        side_by_side = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (*self.tensors, self.cotangent))
        self.query, self.key, self.value, self.cotangent = side_by_side


def input_sets(shape: Shape, batch: int, options: Options) -> list[Inputs]:
    """Together larger than the cache."""
    first = Padded(shape, batch, options.device)
    count = 2 if options.tiny else max(2, min(24, math.ceil(CACHE_BYTES / first.nbytes)))
    return [first, *(Padded(shape, batch, options.device) for _ in range(count - 1))]


def floor(shape: Shape, sets: list[Inputs], has_gradients: bool, ceilings: Ceilings) -> str:
    """Query and output, real keys and values once; backward reads these and the output's gradient, and writes three."""
    kept = [int(inputs.key_mask.sum()) for inputs in sets if inputs.key_mask is not None]
    num_keys, width = sum(kept) / len(kept), shape.heads * shape.head_dim
    rows, columns = 2.0 * width * sets[0].query.shape[0] * shape.queries, 2.0 * width * num_keys
    moved, flops = 2 * rows + 2 * columns, 4.0 * width * shape.queries * num_keys
    if has_gradients:
        moved, flops = moved + 4 * rows + 4 * columns, 3.5 * flops
    microseconds, which = ceilings.floor_us(moved, flops)
    return f"{microseconds:.1f} ({which})"


def usable(options: Options, names: Sequence[str] = ROWS) -> list[str]:
    """Those of ours that work here."""
    return [name for name in names if options.device in mmattn.backends()[name].usable_on]


def masked_rows(shape: Shape, batch: int, has_gradients: bool, ceilings: Ceilings, options: Options) -> None:
    """One row."""
    sets = input_sets(shape, batch, options)
    attends: dict[str, Attend] = {name: pinned(kernel) for name, kernel in KERNELS.items()}
    attends |= {f"mmattn {name}": ours(name) for name in ("auto", *usable(options))}
    cells = {name: measured(attend, sets, has_gradients, options.device) for name, attend in attends.items()}
    options.add(
        "Key mask, padded text, µs",
        shape=shape.name,
        sizes=f"{shape.queries} x {shape.keys}, {shape.heads} heads of {shape.head_dim}",
        batch=batch,
        **{"pass": PASSES[has_gradients]},
        **{name: cells.get(name, "-") for name in (*KERNELS, "mmattn auto", *(f"mmattn {name}" for name in ROWS))},
        **{"best of torch / varlen": ratio(cells, *KERNELS), "auto / varlen": ratio(cells, "mmattn auto")},
        floor=floor(shape, sets, has_gradients, ceilings),
    )


def ratio(cells: dict[str, str], *names: str) -> str:
    """The fastest of these over varlen; a dash where one of the two is no number."""
    numbers = {name: float(cell) for name, cell in cells.items() if cell.replace(".", "").isdigit()}
    theirs = [numbers[name] for name in names if name in numbers]
    return f"{min(theirs) / numbers['mmattn varlen']:.2f}" if theirs and "mmattn varlen" in numbers else "-"


def packed_rows(options: Options) -> None:
    """Self-attention of short sentences: one call over packed rows, beside sentences padded to the longest."""
    total, heads, head_dim = (97, 2, 8) if options.tiny else PACKED
    lengths = []
    while sum(lengths) < total:
        lengths.append(min(int(torch.randint(8, 65, ())), total - sum(lengths)))
    segments = Segments.of(lengths, options.device)
    shape = Shape("", heads, max(lengths), max(lengths), head_dim, real=max(lengths))
    padded = Padded(shape, len(lengths), options.device)
    padded.key_mask = torch.arange(max(lengths), device=options.device) < torch.tensor(
        lengths, device=options.device
    ).unsqueeze(1)
    query, key, value, cotangent = (
        torch.randn(total, heads, head_dim, device=options.device, dtype=torch.bfloat16) for _ in range(4)
    )
    for has_gradients in (False, True):
        for tensor in (query, key, value):
            tensor.requires_grad_(has_gradients)

        def packed(backend: str, has_gradients: bool = has_gradients) -> object:
            output = packed_attention(query, key, value, segments, backend=backend)
            return torch.autograd.grad(output, (query, key, value), cotangent) if has_gradients else output

        cells = {"padded, mmattn auto": measured(ours("auto"), [padded], has_gradients, options.device)}
        for name in usable(options, PACKED_ROWS) or ["sdpa"]:
            cells[f"packed, {name}"] = graph_us(lambda name=name: packed(name), options)
        options.add(
            "Packed sentences of 8 to 64 tokens, self-attention, µs",
            sizes=f"{len(lengths)} sentences, {total} tokens, {heads} heads of {head_dim}",
            **{"pass": PASSES[has_gradients]},
            **cells,
        )


def graph_us(call: Callable[[], object], options: Options) -> str:
    """A cell: microseconds, or a dash where the call is refused."""
    try:
        microseconds, is_graphed = card_us([call], options.device)
    except Exception as problem:
        tell(problem)
        return "-"
    return f"{microseconds:.1f}" + ("" if is_graphed or options.device == "cpu" else " (launches counted)")


def launch_row(options: Options) -> None:
    """What a masked call costs the processor."""
    shape = replace(PIXART, queries=16, keys=77, real=60)
    inputs = Padded(shape, 2, options.device)
    for has_gradients in (False, True):
        for tensor in inputs.tensors:
            tensor.requires_grad_(has_gradients)
        cells = {}
        for name in ("auto", *usable(options)):
            attend, count = ours(name), 3 if options.tiny else 300
            cells[f"mmattn {name}"] = f"{host_us(lambda attend=attend: attend(inputs), count, options.device):.1f}"
        options.add(
            "Launching one call with a key mask, µs of the processor",
            gradients="with" if has_gradients else "without",
            **cells,
        )


def value_errors(options: Options) -> dict[str, float]:
    """How far each is off eager with gaps in the mask and a row without keys, as a part of the norm. (`measured` looks
    at the first row only.)"""
    inputs = Padded(replace(PIXART, queries=128), 3, options.device)
    mask = torch.rand(3, PIXART.keys, device=options.device) < 0.3
    mask[1] = False
    outputs = {
        name: mmattn.attention(*inputs.tensors, key_mask=mask, backend=name).float()
        for name in ("eager", *usable(options))
    }
    want = outputs.pop("eager")
    return {name: ((output - want).norm() / want.norm()).item() for name, output in outputs.items()}


def main() -> int:
    """The most important rows first."""
    options, status = read_options(__doc__), Status()
    errors = value_errors(options)
    print(f"with gaps and an empty row, off by {errors}" if errors else "neither varlen nor flash can be used here")
    calls = TINY if options.tiny else MASKED
    for shape in dict.fromkeys(shape for shape, _ in calls):  # compiled kernels serve any batch
        for name in ("auto", *usable(options)):
            run_once(ours(name), Padded(shape, 2, options.device))
    with options.turn():
        ceilings = measure_ceilings(options)
        for shape, batch in calls:
            for has_gradients in (False, True):
                with status.row(f"{shape.name}, batch {batch}"):
                    masked_rows(shape, batch, has_gradients, ceilings, options)
        with status.row("launching"):
            launch_row(options)
        with status.row("packed sentences"):
            packed_rows(options)
    wrong = [name for name, error in errors.items() if not error < FURTHEST]
    print(f"wrong values: {', '.join(wrong)}" if wrong else "done")
    return 1 if wrong else status.code


if __name__ == "__main__":
    sys.exit(main())
