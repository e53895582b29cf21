"""A step of decoding on a card: our split-K kernels beside torch's, each pinned, and the floors.

bfloat16 (float16 on a CPU), caches [B, G, Lk, D]. Microseconds of the card, calls replayed as one CUDA graph over
inputs larger than its cache, medians. "Folded" is what a caller can do with torch's kernels: queries of a group in the
place of queries of a head, so that keys are read once. The floor is keys and values moved once, at the copy rate that
is measured first.

    python scripts/gpu/decode.py [--rows FILE] [--tiny]        about a minute on an H100
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import math
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from attention import CACHE_BYTES, FURTHEST, MATH_BYTES, PINNED
from measure import Ceilings, Options, Status, card_us, host_us, measure_ceilings, read_options, tell
from processes import usable_cores
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmattn
from mmattn.kernels.decode import DecodeConfig, decode_launches
from mmattn.kernels.launch import Launch
from mmattn.kernels.resources import compiling_for
from mmattn.ops.replay import replayed

# Of its turn; after so many no other configurations are tried.
SECONDS = 60
FOLDED = ("cuDNN", "flash", "efficient")


@dataclass(frozen=True)
class Shape:
    """Sizes of one step; `real` is how many places of a static cache are filled, where it has a mask for them."""

    name: str
    batch: int
    heads: int
    kv_heads: int
    keys: int
    head_dim: int
    queries: int = 1
    real: int | None = None

    @property
    def sizes(self) -> str:
        """As in a table."""
        text = f"{self.batch} x {self.heads} heads on {self.kv_heads}, {self.queries} x {self.keys}, {self.head_dim}"
        return text if self.real is None else f"{text}, {self.real} seen"


SHAPES = [
    Shape("grouped heads", 1, 32, 8, 4096, 128),
    Shape("few heads", 1, 8, 8, 4096, 64),
    Shape("grouped heads, batch", 8, 32, 8, 8192, 128),
    Shape("4 beams folded", 1, 16, 16, 1024, 64, queries=4),
    Shape("translator, self", 1, 16, 16, 1024, 64),
    Shape("translator, batch", 64, 16, 16, 512, 64),
    Shape("long", 1, 32, 8, 32768, 128),
    Shape("static cache", 1, 32, 8, 4096, 128, real=1000),
    Shape("picture, 4 beams folded", 8, 12, 12, 577, 64, queries=4),
    Shape("heads of 80", 1, 32, 8, 4096, 80),
    Shape("translator, static cache", 1, 16, 16, 256, 64, real=40),
    Shape("translator, batch, static cache", 32, 16, 16, 256, 64, real=40),
    Shape("translator, padded source", 8, 16, 16, 64, 64, real=40),
    Shape("captions, static cache", 1, 12, 12, 32, 64, real=10),
    Shape("grouped heads, several queries", 1, 32, 8, 4096, 128, queries=8),
]
TINY = [Shape("tiny", 2, 6, 2, 77, 40), Shape("tiny, masked", 1, 2, 1, 37, 8, queries=3, real=11)]


class Inputs:
    """Query, key and value of one call, and the mask of a static cache."""

    def __init__(self, shape: Shape, device: str, is_empty: bool = False) -> None:
        # Triton's interpreter has no bfloat16; what is only compiled for a card is empty.
        dtype = torch.bfloat16 if device == "cuda" or is_empty else torch.float16

        def draw(heads: int, length: int) -> Tensor:
            tensor = torch.empty(shape.batch, heads, length, shape.head_dim, device=device, dtype=dtype)
            return tensor if is_empty else tensor.normal_()

        self.query = draw(shape.heads, shape.queries)
        self.key, self.value = draw(shape.kv_heads, shape.keys), draw(shape.kv_heads, shape.keys)
        self.mask = None
        if shape.real is not None:
            self.mask = (torch.arange(shape.keys, device=device) < shape.real)[None, None, None]
        # As packed sequences want them; not part of what is timed.
        self.packed: tuple[Tensor, ...] = ()

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.query, self.key, self.value

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.tensors)

    def pack(self) -> None:
        """Query, key and value in [B * L, H, D] storage, and where sequences begin."""
        rows = (tensor.transpose(1, 2).flatten(0, 1).contiguous() for tensor in self.tensors)
        batch = torch.arange(self.query.shape[0] + 1, device=self.query.device, dtype=torch.int32)
        self.packed = (*rows, batch * self.query.shape[2], batch * self.key.shape[2])


Attend = Callable[[Inputs], Tensor]


def stock(inputs: Inputs) -> Tensor:
    """torch's own."""
    is_grouped = inputs.query.shape[1] != inputs.key.shape[1]
    return F.scaled_dot_product_attention(*inputs.tensors, inputs.mask, enable_gqa=is_grouped)


def folded(inputs: Inputs) -> Tensor:
    """torch's own; queries of the heads of a group are queries of one head."""
    batch, kv_heads, _, head_dim = inputs.key.shape
    query = inputs.query.reshape(batch, kv_heads, -1, head_dim)
    return F.scaled_dot_product_attention(query, inputs.key, inputs.value, inputs.mask).view(inputs.query.shape)


def pinned(attend: Attend, kernel: SDPBackend) -> Attend:
    """By one of torch's kernels."""

    def run(inputs: Inputs) -> Tensor:
        with sdpa_kernel(kernel):
            return attend(inputs)

    return run


def ours(backend: str) -> Attend:
    """By one of our backends, "auto" as where steps are replayed."""

    def run(inputs: Inputs) -> Tensor:
        with replayed() if backend == "auto" else contextlib.nullcontext():
            return mmattn.attention(*inputs.tensors, attn_mask=inputs.mask, backend=backend)

    return run


def varlen(inputs: Inputs) -> Tensor:
    """torch's kernel for packed sequences, without the cost of packing."""
    from torch.nn.attention import varlen as packed

    if inputs.mask is not None:
        raise RuntimeError("no mask")
    batch, heads, queries, head_dim = inputs.query.shape
    # torch 2.11 serves grouped heads without being told.
    has_flag = "enable_gqa" in inspect.signature(packed.varlen_attn).parameters
    flag: dict[str, Any] = {"enable_gqa": heads != inputs.key.shape[1]} if has_flag else {}
    attend: Callable[..., Any] = packed.varlen_attn
    output: Tensor = attend(*inputs.packed, queries, inputs.key.shape[2], **flag)
    return output.view(batch, queries, heads, head_dim).transpose(1, 2)


@torch.no_grad()
def distance(output: Tensor, inputs: Inputs) -> float:
    """Of the output's first and last row to float32 attention, as a part of its norm; infinite if anything is not
    finite."""
    if not output.isfinite().all():
        return math.inf
    errors = []
    for row in {0, output.shape[0] - 1}:
        tensors = (tensor[row : row + 1].float() for tensor in inputs.tensors)
        exact = mmattn.attention(*tensors, attn_mask=inputs.mask, backend="eager")
        errors.append(((output[row : row + 1] - exact).norm() / exact.norm()).item())
    return max(errors)


def timed(attend: Attend, sets: list[Inputs], device: str) -> tuple[float, str]:
    """(microseconds, a cell): infinite and "wrong" with the error when values are, or "-" where it cannot serve."""
    try:
        with torch.no_grad():
            error = distance(attend(sets[0]), sets[0])
            microseconds, is_graphed = card_us([functools.partial(attend, inputs) for inputs in sets], device)
    except Exception as problem:  # a kernel that does not serve the call says so; the others' rows are wanted
        tell(problem)
        if device == "cuda":
            torch.cuda.empty_cache()
        return math.inf, "-"
    if error > FURTHEST:
        return math.inf, f"wrong: {error:.2g}"
    return microseconds, f"{microseconds:.1f}" + ("" if is_graphed or device == "cpu" else " (launches counted)")


def input_sets(shape: Shape, options: Options) -> list[Inputs]:
    """Together larger than the cache."""
    first = Inputs(shape, options.device)
    count = 2 if options.tiny else max(1, min(40, math.ceil(CACHE_BYTES / first.nbytes)))
    return [first, *(Inputs(shape, options.device) for _ in range(count - 1))]


def floor(shape: Shape, ceilings: Ceilings) -> float:
    """Microseconds: keys and values that are seen, queries and output once."""
    keys = shape.keys if shape.real is None else shape.real
    rows = shape.heads * shape.queries
    moved = 4.0 * shape.batch * shape.head_dim * (shape.kv_heads * keys + rows)
    return ceilings.floor_us(moved, 4.0 * shape.batch * rows * keys * shape.head_dim)[0]


def torch_cells(shape: Shape, sets: list[Inputs], device: str) -> tuple[dict[str, str], float]:
    """The cells of torch's kernels, and the least time of all of them."""
    is_small = 6.0 * shape.batch * shape.heads * shape.queries * shape.keys < MATH_BYTES
    names = [name for name in PINNED if name != "math" or is_small]
    whole = {name: timed(pinned(stock, PINNED[name]), sets, device) for name in names}
    cells = {name: whole[name][1] if name in whole else "-" for name in PINNED}
    found = [microseconds for microseconds, _ in whole.values()]
    cells["folded"] = "-"
    if shape.heads != shape.kv_heads:
        fold = {name: timed(pinned(folded, PINNED[name]), sets, device) for name in FOLDED}
        best = min(FOLDED, key=lambda name: fold[name][0])
        found.append(fold[best][0])
        cells["folded"] = f"{fold[best][1]} ({best})"
    for inputs in sets:
        inputs.pack()
    packed, cells["varlen"] = timed(varlen, sets, device)
    for inputs in sets:
        inputs.packed = ()
    return cells, min([*found, packed])


def row_of(shape: Shape, ceilings: Ceilings, options: Options) -> None:
    """A line of the table."""
    sets = input_sets(shape, options)
    cells, best = torch_cells(shape, sets, options.device)
    own, own_cell = timed(ours("triton_decode"), sets, options.device)
    _, auto_cell = timed(ours("auto"), sets, options.device)
    lowest = floor(shape, ceilings)
    options.add(
        "Decode attention, µs",
        shape=shape.name,
        sizes=shape.sizes,
        **cells,
        triton_decode=own_cell,
        **{"mmattn auto": auto_cell},
        **{"best / ours": f"{best / own:.2f}" if math.isfinite(best) and math.isfinite(own) else "-"},
        floor=f"{lowest:.1f}",
        **{"ours / floor": f"{own / lowest:.1f}" if math.isfinite(own) else "-"},
    )


def choices(shape: Shape) -> list[DecodeConfig]:
    """What is tried: keys a block, warps, pipeline depth, programs a processor; the first is the table's."""
    wide, narrow = (128, 64) if shape.head_dim <= 64 else (64, 32)
    tried = [(wide, 4, 3, 2), (wide, 4, 3, 1), (wide, 4, 3, 3), (wide, 4, 3, 4), (wide, 4, 4, 2), (wide, 4, 2, 2)]
    tried += [(wide, 8, 3, 2), (narrow, 4, 4, 2), (narrow, 4, 4, 4), (2 * wide, 8, 3, 1)]
    return [DecodeConfig(64, *numbers) for numbers in tried]


TUNED = [SHAPES[0], SHAPES[1], SHAPES[2]]
Job = tuple[Shape, "DecodeConfig | None", int, int]


def launches_of(inputs: Inputs, config: DecodeConfig | None) -> tuple[tuple[Launch, ...], Tensor]:
    """Our launches and what they fill."""
    output = torch.empty_like(inputs.query)
    mask = None if inputs.mask is None else inputs.mask.squeeze(2)
    scale = inputs.query.shape[3] ** -0.5
    return decode_launches(*inputs.tensors, mask, None, False, scale, output, config), output


def compile_job(job: Job) -> str | None:
    """Compile into Triton's cache on disk; the error if it cannot be."""
    shape, config, *card = job
    try:
        with compiling_for(*card):
            for launch in launches_of(Inputs(shape, "cpu", is_empty=True), config)[0]:
                launch.compile()
    except Exception as error:
        return f"{shape.name} {config}: {type(error).__name__}: {str(error)[:200]}"
    return None


def compile_all(shapes: list[Shape], tuned: list[Shape]) -> None:
    """Compile all that will be timed, in processes of their own."""
    begin = time.perf_counter()
    major, minor = torch.cuda.get_device_capability()
    card = (10 * major + minor, torch.cuda.get_device_properties(0).multi_processor_count)
    jobs: list[Job] = [(shape, None, *card) for shape in shapes]
    jobs += [(shape, config, *card) for shape in tuned for config in choices(shape)[1:]]
    # Importing takes each of them as long as a third of the kernels.
    with multiprocessing.get_context("spawn").Pool(max(1, min(4, usable_cores() - 2))) as pool:
        for problem in pool.imap_unordered(compile_job, jobs):
            if problem:
                print(f"  not compiled: {problem}", flush=True)
    print(f"compiled for {len(jobs)} calls in {time.perf_counter() - begin:.0f} s", flush=True)


def tuning_row(shape: Shape, options: Options) -> None:
    """Each configuration's time, the table's first."""
    sets = input_sets(shape, options)
    cells = {}
    for config in choices(shape):

        def run(inputs: Inputs, config: DecodeConfig = config) -> Tensor:
            launches, output = launches_of(inputs, config)
            for launch in launches:
                launch.run(inputs.query.device)
            return output

        numbers = (config.block_n, config.num_warps, config.num_stages, config.programs_per_processor)
        name = "{} keys, {} warps, {} deep, {} a processor".format(*numbers)
        cells[name] = timed(run, sets, options.device)[1]
    options.add("Decode configurations, µs", shape=shape.name, **cells)


def flex_row(shape: Shape, options: Options) -> None:
    """Apart and last, because it compiles, before its turn."""
    try:
        with torch.no_grad():
            ours("flex")(Inputs(shape, options.device))
    except Exception as problem:  # the row has a dash
        tell(problem)
    with options.turn():
        _flex_row(shape, options)


def _flex_row(shape: Shape, options: Options) -> None:
    sets = input_sets(shape, options)
    cells = {name: timed(ours(name), sets, options.device)[1] for name in ("flex", "triton_decode")}
    options.add("Decode attention beside FlexAttention (backend flex), µs", shape=shape.name, **cells)


def launch_row(options: Options) -> None:
    """What a call costs the processor: a call too small to keep the card busy, without a mask and with one."""
    attends = {"torch SDPA": stock, "mmattn sdpa": ours("sdpa"), "triton_decode": ours("triton_decode")}
    for mask, real in (("no", None), ("boolean", 1000)):
        _launch_row(Inputs(Shape("launch", 1, 8, 8, 1024, 64, real=real), options.device), mask, attends, options)


def _launch_row(inputs: Inputs, mask: str, attends: dict[str, Attend], options: Options) -> None:
    cells = {}
    with torch.no_grad():
        for name, attend in attends.items():
            try:
                call = functools.partial(attend, inputs)
                call()
                cells[name] = f"{host_us(call, 3 if options.tiny else 500, options.device):.1f}"
            except Exception as problem:
                tell(problem)
                cells[name] = "-"
    options.add("Launching one decoding attention from Python, µs of the processor", mask=mask, **cells)


def main() -> int:
    """All rows, the most telling first."""
    options, status = read_options(__doc__), Status()
    shapes = TINY if options.tiny else SHAPES
    tuned = [] if options.tiny else TUNED
    has_flex = not options.tiny and options.device in mmattn.backends()["flex"].usable_on
    if options.device == "cuda":
        compile_all(shapes, tuned)
    with options.turn() as begin:
        ceilings = measure_ceilings(options)
        for shape in shapes:
            with status.row(shape.name):
                row_of(shape, ceilings, options)
        launch_row(options)
        for shape in tuned:
            if time.perf_counter() - begin > SECONDS:
                status.skip(f"other configurations of {shape.name}")
                continue
            with status.row(f"other configurations of {shape.name}"):
                tuning_row(shape, options)
    if has_flex:
        with status.row("FlexAttention"):
            flex_row(shapes[0], options)
    return status.code


if __name__ == "__main__":
    sys.exit(main())
