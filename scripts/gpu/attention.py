"""Attention by itself: torch's kernels, each pinned, beside `mmattn.attention` and flex, and the floors.

bfloat16; microseconds on the card, calls replayed as one CUDA graph over inputs larger than the cache, medians. The
floor is the larger of bytes moved once by the measured copy rate, and operations by the measured product rate.
"""

from __future__ import annotations

import contextlib
import functools
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest import mock

import torch
import torch.nn.functional as F
from measure import Ceilings, Options, Status, card_us, host_us, measure_ceilings, read_options, tell
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmattn
from mmattn.ops.registry import explain

PINNED = {
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}
PASSES = ("forward", "forward + backward")
NAMES = {kernel: name for name, kernel in PINNED.items()}
CACHE_BYTES = 150e6
MATH_BYTES = 1e9
FURTHEST = 0.02  # of the norm: bfloat16 rounding is a tenth of it
SECONDS = 90  # of its turn, after which only shapes of U-Nets are begun
BATCHES = (2, 4, 16)


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention; `real` is the longest text under a key mask."""

    name: str
    heads: int
    queries: int
    keys: int
    head_dim: int
    real: int | None = None
    has_flex: bool = False


SHAPES = [
    Shape("SD 1.5 cross, 64 x 64", 8, 4096, 77, 40),
    Shape("SD 1.5 cross, 32 x 32", 8, 1024, 77, 80),
    Shape("SD 1.5 cross, 16 x 16", 8, 256, 77, 160),
    Shape("SDXL cross, 64 x 64", 10, 4096, 77, 64, has_flex=True),
    Shape("SDXL cross, 32 x 32", 20, 1024, 77, 64),
    Shape("PixArt cross, text mask", 16, 4096, 300, 72, real=120, has_flex=True),
    Shape("SDXL self, 64 x 64", 10, 4096, 4096, 64, has_flex=True),
    Shape("video self, 8192", 12, 8192, 8192, 128),
]
TINY = [Shape("tiny cross", 2, 33, 7, 8, real=5), Shape("tiny self", 2, 13, 13, 8)]


class Inputs:
    """Query, key, value and output gradient for one call, and who may be attended to."""

    def __init__(self, shape: Shape, batch: int, device: str) -> None:
        def draw(length: int) -> Tensor:
            return torch.randn(batch, shape.heads, length, shape.head_dim, device=device, dtype=torch.bfloat16)

        self.query, self.key, self.value = draw(shape.queries), draw(shape.keys), draw(shape.keys)
        self.cotangent = draw(shape.queries)
        self.key_mask: Tensor | None = None
        if shape.real is not None:
            lengths = torch.randint(shape.real // 6, shape.real + 1, (batch, 1), device=device)
            self.key_mask = torch.arange(shape.keys, device=device) < lengths

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.tensors, self.cotangent))


Attend = Callable[[Inputs], Tensor]


def stock(inputs: Inputs) -> Tensor:
    """torch's own, given the key mask as it wants it."""
    mask = None if inputs.key_mask is None else inputs.key_mask[:, None, None, :]
    return F.scaled_dot_product_attention(*inputs.tensors, mask)


def pinned(kernel: SDPBackend) -> Attend:
    def run(inputs: Inputs) -> Tensor:
        with sdpa_kernel(kernel):
            return stock(inputs)

    return run


def ours(backend: str) -> Attend:
    return lambda inputs: mmattn.attention(*inputs.tensors, key_mask=inputs.key_mask, backend=backend)


def kernel_taken(attend: Attend, inputs: Inputs) -> str:
    """Which of torch's kernels a call comes to; "" when it calls none."""
    taken: list[str] = []

    def spy(query: Tensor, key: Tensor, value: Tensor, *rest: object, **options: object) -> Tensor:
        kernel = SDPBackend(torch._fused_sdp_choice(query, key, value, *rest, **options))
        taken.append(NAMES.get(kernel, kernel.name))
        return query

    with mock.patch.object(F, "scaled_dot_product_attention", spy):
        attend(inputs)
    return ", ".join(sorted(set(taken)))


def with_gradients(attend: Attend, inputs: Inputs) -> tuple[Tensor, ...]:
    """The output, and the gradients of query, key and value."""
    output = attend(inputs)
    return output, *torch.autograd.grad(output, inputs.tensors, inputs.cotangent)


def measured(attend: Attend, sets: list[Inputs], has_gradients: bool, device: str) -> str:
    """A cell: microseconds, "wrong" with the error when the values are, or why there are none."""
    for inputs in sets:
        for tensor in inputs.tensors:
            tensor.requires_grad_(has_gradients)
    run = functools.partial(with_gradients, attend) if has_gradients else lambda inputs: (attend(inputs),)
    try:
        error = distance(run(sets[0]), sets[0])
        microseconds, is_graphed = card_us([functools.partial(run, inputs) for inputs in sets], device)
    except Exception as problem:  # a kernel that does not serve the call says so; the others' cells are wanted
        tell(problem)
        if device == "cuda":
            torch.cuda.empty_cache()
        return "-"
    text = f"{microseconds:.1f}" + ("" if is_graphed or device == "cpu" else " (launches counted)")
    return text if error < FURTHEST else f"wrong: {error:.2g}"


@torch.no_grad()
def distance(results: tuple[Tensor, ...], inputs: Inputs) -> float:
    """Of the output's first row to float32 attention, as a part of its norm; infinite when anything is not finite."""
    query, key, value = (tensor[:1].float() for tensor in inputs.tensors)
    mask = None if inputs.key_mask is None else inputs.key_mask[:1]
    parts = query.split(1024, dim=2)
    exact = torch.cat([mmattn.attention(part, key, value, key_mask=mask, backend="eager") for part in parts], dim=2)
    is_finite = all(bool(tensor.isfinite().all()) for tensor in results)
    return ((results[0][:1] - exact).norm() / exact.norm()).item() if is_finite else math.inf


def floor(shape: Shape, batch: int, has_gradients: bool, ceilings: Ceilings) -> str:
    """Query, key, value, output once; backward reads these and the output's gradient, and writes three."""
    rows, columns = (batch * shape.heads * length * shape.head_dim * 2.0 for length in (shape.queries, shape.keys))
    moved, flops = 2 * rows + 2 * columns, 4.0 * batch * shape.heads * shape.queries * shape.keys * shape.head_dim
    if has_gradients:
        moved, flops = moved + 4 * rows + 4 * columns, 3.5 * flops
    microseconds, which = ceilings.floor_us(moved, flops)
    return f"{microseconds:.1f} ({which})"


def input_sets(shape: Shape, batch: int, options: Options) -> list[Inputs]:
    """Together larger than the cache."""
    first = Inputs(shape, batch, options.device)
    count = 2 if options.tiny else max(1, min(24, math.ceil(CACHE_BYTES / first.nbytes)))
    return [first, *(Inputs(shape, batch, options.device) for _ in range(count - 1))]


def rows_of(shape: Shape, batch: int, ceilings: Ceilings, options: Options) -> None:
    """Forward, and forward with backward."""
    sets = input_sets(shape, batch, options)
    first = sets[0]
    scores = 6.0 * batch * shape.heads * shape.queries * shape.keys
    attends = {name: pinned(kernel) for name, kernel in PINNED.items() if name != "math" or scores < MATH_BYTES}
    attends["mmattn auto"] = ours("auto")
    for has_gradients in (False, True):
        cells = {name: measured(attend, sets, has_gradients, options.device) for name, attend in attends.items()}
        choice = explain(*first.tensors, key_mask=first.key_mask).chosen
        taken = kernel_taken(ours("auto"), first)
        options.add(
            "Attention, µs",
            shape=shape.name,
            sizes=f"{shape.queries} x {shape.keys}, {shape.heads} heads of {shape.head_dim}",
            batch=batch,
            **{"pass": PASSES[has_gradients]},
            **{name: cells.get(name, "-") for name in (*PINNED, "mmattn auto")},
            **{"auto took": f"{choice}: {taken}" if taken else choice},
            floor=floor(shape, batch, has_gradients, ceilings),
        )


def run_once(attend: Attend, inputs: Inputs) -> None:
    """Forward, and forward with backward: what is compiled at first calls is compiled here."""
    for has_gradients in (False, True):
        for tensor in inputs.tensors:
            tensor.requires_grad_(has_gradients)
        try:
            with_gradients(attend, inputs) if has_gradients else attend(inputs)
        except Exception as problem:  # said again where it is measured
            tell(problem)


def flex_rows(shape: Shape, batch: int, options: Options) -> None:
    """Apart, because it compiles for each kind of call."""
    for name in ("flex", "auto"):
        run_once(ours(name), Inputs(shape, batch, options.device))
    with options.turn():
        _flex_rows(shape, batch, options)


def _flex_rows(shape: Shape, batch: int, options: Options) -> None:
    sets = input_sets(shape, batch, options)
    for has_gradients in (False, True):
        cells = {name: measured(ours(name), sets, has_gradients, options.device) for name in ("flex", "auto")}
        cells = {f"mmattn {name}": cell for name, cell in cells.items()}
        options.add(
            "FlexAttention (backend flex), µs",
            shape=shape.name,
            batch=batch,
            **{"pass": PASSES[has_gradients]},
            **cells,
        )


def launch_rows(options: Options) -> None:
    """What a call costs the processor: many calls too small to keep the card busy."""
    shape = Shape("launch", 8, 16, 16, 64, real=16)
    inputs = Inputs(shape, 2, options.device)
    masked, inputs.key_mask = inputs.key_mask, None
    for name, attend in (("torch SDPA", stock), ("mmattn auto", ours("auto"))):
        cells = {}
        for kind, mask in (("no mask", None), ("key mask", masked)):
            inputs.key_mask = mask
            for has_gradients in (False, True):
                for tensor in inputs.tensors:
                    tensor.requires_grad_(has_gradients)
                count = 3 if options.tiny else 500
                us = host_us(functools.partial(attend, inputs), count, options.device)
                cells[f"{kind}, {'with' if has_gradients else 'no'} gradients"] = f"{us:.1f}"
        options.add("Launching one forward call from Python, µs of the processor", call=name, **cells)


def cudnn_nan_row(options: Options) -> None:
    """pytorch issue 196678: masked backward, Lq % 128 == 64, every log-sum-exp below -88.7."""
    inputs = Inputs(Shape("", 2, 704, 704, 64), 2, options.device)
    with torch.no_grad():
        inputs.query.abs_().add_(4)
        inputs.key.abs_().add_(4).neg_()
    mask = torch.ones(704, 704, dtype=torch.bool, device=options.device).tril_()
    found = {}
    for name, context, attend in (
        ("stock, cuDNN pinned", sdpa_kernel(SDPBackend.CUDNN_ATTENTION), F.scaled_dot_product_attention),
        ("stock, default", contextlib.nullcontext(), F.scaled_dot_product_attention),
        ("mmattn auto", contextlib.nullcontext(), mmattn.attention),
    ):
        for tensor in inputs.tensors:
            tensor.requires_grad_()
        try:
            with context:
                output = attend(*inputs.tensors, attn_mask=mask)
                grads = torch.autograd.grad(output, inputs.tensors, inputs.cotangent)
            count = sum(int((~grad.isfinite()).sum()) for grad in grads)
            found[name] = f"{count} non-finite gradients" if count else "finite"
        except RuntimeError as error:
            found[name] = str(error).splitlines()[0][:80]
    options.add("Masked backward at the shape where cuDNN makes NaN (704 x 704, bfloat16)", **found)


def main() -> int:
    """All rows, those of U-Nets first; each of FlexAttention when it is compiled."""
    options, status = read_options(__doc__), Status()
    shapes = TINY if options.tiny else SHAPES
    calls = [(shape, batch) for shape in shapes for batch in BATCHES]
    for shape, batch in calls:
        run_once(ours("auto"), Inputs(shape, batch, options.device))
    print("warm", flush=True)
    with options.turn() as begin:
        ceilings = measure_ceilings(options)
        options.add(
            "Ceilings, measured",
            **{"memory, TB/s read + written": f"{ceilings.bytes_per_s / 1e12:.2f}"},
            **{"bf16 product 8192^3, TFLOP/s": f"{ceilings.flops_per_s / 1e12:.0f}"},
        )
        launch_rows(options)
        cudnn_nan_row(options)
        for shape, batch in calls:
            if time.perf_counter() - begin > SECONDS and shape.keys != 77:
                status.skip(f"{shape.name}, batch {batch}")
                continue
            with status.row(f"{shape.name}, batch {batch}"):
                rows_of(shape, batch, ceilings, options)
    for shape in shapes:
        if shape.has_flex and options.device in mmattn.backends()["flex"].usable_on:
            with status.row(f"{shape.name}, FlexAttention"):
                flex_rows(shape, 4, options)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
