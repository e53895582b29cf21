"""A fixed context in 8 bits: keys and values widened inside the kernel that attends to them.

Steps of decoding at the sizes of vision-language models and translators (one query, or folded beams), and U-Nets' and
PixArt's cross-attention: our kernels (`context_8bit_kernels.py`) for int8 and float8_e4m3, with a scale for each
channel of a head or for each key; beside our kernels for 16 bits, torch's, each pinned, and torch.compile of
dequantising with torch's attention and with products written out. bfloat16 (float16 on a CPU); microseconds of the
card, calls replayed in turn as CUDA graphs over inputs larger than its cache, medians. Channels of keys differ in size,
as those of models do.

What a kernel does with the 8 bits is held to float64 by the tolerance rule; the errors in the table are the largest of
the output to float64 attention before rounding. The floor is the context in 8 bits, queries and output moved once.

    python scripts/gpu/experiments/context_8bit.py [--rows FILE] [--resources] [--tiny --device cpu]

About two minutes on an H100. A verdict for each shape: a gain over the best of torch, 16 bits included, or none.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import experiment
import torch
import torch.nn.functional as F
from attention import CACHE_BYTES, PINNED
from context_8bit_kernels import PER, Context, attend_8bit, in_8_bits, launches_8bit
from decode import Shape
from measure import Ceilings, Options, alternating_us, tell
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import mmattn
from mmattn.kernels.decode import MAX_QUERIES, DecodeConfig, decode_config
from mmattn.kernels.launch import STAND_IN, Launch

SECONDS = 45  # of its turn, after which no further shape is begun
DECODING = [
    Shape("picture", 8, 12, 12, 577, 64),
    Shape("picture, 4 beams folded", 8, 12, 12, 577, 64, queries=4),
    Shape("grouped heads", 1, 32, 8, 4096, 128),
    Shape("translator, 4 beams folded", 16, 16, 16, 1024, 64, queries=4),
    Shape("picture, batch", 64, 12, 12, 577, 64),
    Shape("translator, batch", 64, 16, 16, 1024, 64),
    Shape("grouped heads, batch", 16, 32, 8, 4096, 128),
]
SHORT_KEYS = [
    Shape(
        shape.name.removesuffix(", text mask"),
        batch,
        shape.heads,
        shape.heads,
        shape.keys,
        shape.head_dim,
        shape.queries,
    )
    for batch, shape in itertools.product(experiment.BATCHES, experiment.BLOCKS)
    if shape.queries == 4096
]
TINY = [Shape("tiny", 2, 6, 2, 77, 40), Shape("tiny, short keys", 1, 2, 2, 13, 8, queries=67)]
INT8, FLOAT8 = torch.int8, torch.float8_e4m3fn
NAMES = {INT8: "int8", FLOAT8: "e4m3"}
FIRST = "int8 per channel"
HELD_KEYS = 128  # by every card
FLOAT8_CAPABILITY = (8, 9)
SIXTEEN = "16 bits, ours"
Run = Callable[["Inputs"], Tensor]
Formats = dict[str, tuple[torch.dtype, str]]


def formats(capability: tuple[int, int]) -> Formats:
    """Those that a card knows, by name."""
    types = (INT8, FLOAT8) if capability >= FLOAT8_CAPABILITY else (INT8,)
    return {f"{NAMES[dtype]} per {per}": (dtype, per) for dtype, per in itertools.product(types, PER)}


def choices(shape: Shape) -> dict[str, DecodeConfig]:
    """Other blocks where the kernel walks over the keys."""
    if shape.queries > MAX_QUERIES and shape.keys <= HELD_KEYS:
        return {}
    own = decode_config(torch.bfloat16, shape.head_dim)
    tried = [(own.block_m, 2 * own.block_n, 8, 3, 1), (own.block_m, own.block_n, 4, 4, 3)]
    if shape.queries > MAX_QUERIES:
        tried = [(64, own.block_n, 4, 2, 2), (128, own.block_n, 8, 3, 1)]
    return {blocks_of(config): config for config in itertools.starmap(DecodeConfig, tried)}


def blocks_of(config: DecodeConfig) -> str:
    """In a line."""
    return f"blocks {config.block_m} x {config.block_n}, {config.num_warps} warps, {config.num_stages} deep"


class Inputs:
    """Query, key and value of one call [B, H, L, D] as layers have them in memory, and the context in 8 bits."""

    def __init__(self, shape: Shape, device: str, wanted: Formats) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float16
        # From a thirtieth to thirty times; as large together as standard normal ones.
        spread = torch.randn(shape.kv_heads, 1, shape.head_dim, device=device).exp()
        spread /= spread.square().mean(2, keepdim=True).sqrt()

        def draw(heads: int, length: int) -> Tensor:
            sizes = (shape.batch, length, heads, shape.head_dim)
            return torch.randn(sizes, device=device, dtype=dtype).transpose(1, 2)

        self.query = draw(shape.heads, shape.queries)
        self.key, self.value = draw(shape.kv_heads, shape.keys), draw(shape.kv_heads, shape.keys)
        self.key = (self.key * spread).to(dtype)
        if shape.queries <= MAX_QUERIES:  # a cache
            self.key, self.value = self.key.contiguous(), self.value.contiguous()
        self.contexts = {name: in_8_bits(self.key, self.value, *how) for name, how in wanted.items()}

    @property
    def nbytes(self) -> int:
        """What one call moves at least."""
        return 2 * self.query.nbytes + self.contexts[FIRST].nbytes


def grouped(query: Tensor, key: Tensor) -> Tensor:
    """Queries of the heads of a group in the place of queries of one head: keys are read once."""
    return query.reshape(*key.shape[:2], -1, query.shape[3])


def in_16_bits(inputs: Inputs) -> Tensor:
    """torch's attention."""
    query = grouped(inputs.query, inputs.key)
    return F.scaled_dot_product_attention(query, inputs.key, inputs.value)


def dequantised(query: Tensor, context: Context) -> Tensor:
    """To be compiled: keys and values made anew in 16 bits, and torch's attention."""
    key, value = context.widened(query.dtype)
    return F.scaled_dot_product_attention(grouped(query, key), key, value)


def written_out(query: Tensor, context: Context) -> Tensor:
    """To be compiled: products and softmax, scales of channels outside of the products."""
    rows = (grouped(query, context.key) * context.key_scales.unsqueeze(2)).to(query.dtype)
    scores = (rows @ context.key.to(query.dtype).mT).float() * query.shape[3] ** -0.5
    output = scores.softmax(3).to(query.dtype) @ context.value.to(query.dtype)
    return (output * context.value_scales.unsqueeze(2)).to(query.dtype)


class Variant(NamedTuple):
    """What is timed.

    Attributes:
        run: the call: [B, H, Lq, D], or of torch's [B, G, H / G * Lq, D], since some of its kernels would have to copy.
        context: which of the contexts it takes; None: 16 bits.
        is_ours: it is judged; the others are what it is judged by.
    """

    run: Run
    context: str | None = None
    is_ours: bool = False


def of_context(function: Callable[[Tensor, Context], Tensor], name: str, is_ours: bool = False) -> Variant:
    """Of one of the contexts."""
    return Variant(lambda inputs: function(inputs.query, inputs.contexts[name]), name, is_ours)


def ours(config: DecodeConfig | None = None) -> Callable[[Tensor, Context], Tensor]:
    """Our kernels."""
    return lambda query, context: attend_8bit(query, context, query.shape[3] ** -0.5, config)


def variants(shape: Shape, wanted: Formats, options: Options) -> dict[str, Variant]:
    """All but those that the compiler tunes."""
    found = {name: of_context(ours(), name, True) for name in wanted}
    found |= {f"{FIRST}, {name}": of_context(ours(config), FIRST, True) for name, config in choices(shape).items()}
    for function, name in ((dequantised, FIRST), (written_out, FIRST), (dequantised, f"{NAMES[FLOAT8]} per channel")):
        if name in wanted:
            run = experiment.compiled(function, options, {})
            found[f"{name}, {function.__name__}, {experiment.COMPILED}"] = of_context(run, name)
    kernels = PINNED if options.device == "cpu" else {name: each for name, each in PINNED.items() if name != "math"}
    found |= {f"16 bits, {name}": Variant(pinned_to(kernel)) for name, kernel in kernels.items()}
    found[SIXTEEN] = Variant(in_16_bits_by_ours(shape))
    return found


def pinned_to(kernel: SDPBackend) -> Run:
    """One of torch's kernels."""

    def run(inputs: Inputs) -> Tensor:
        with sdpa_kernel(kernel):
            return in_16_bits(inputs)

    return run


def in_16_bits_by_ours(shape: Shape) -> Run:
    """Our kernel for 16 bits."""
    backend = "triton_decode" if shape.queries <= MAX_QUERIES else "triton"
    return lambda inputs: mmattn.attention(inputs.query, inputs.key, inputs.value, backend=backend)


class Case:
    """All variants at one shape: compiled, and held to float64, before anything is measured."""

    def __init__(self, shape: Shape, wanted: Formats, options: Options) -> None:
        self.shape, self.wanted, self.options = shape, wanted, options
        self.variants: dict[str, Variant] = {}
        self.problems: list[str] = []
        self.is_right = True
        self.errors: dict[str, float] = {}
        self._take(variants(shape, wanted, options))

    @property
    def where(self) -> str:
        """In a line."""
        return f"{self.shape.name}, batch {self.shape.batch}"

    def tune(self) -> None:
        """Products written out, with all that the compiler can try: of decoding."""
        if self.shape.queries > MAX_QUERIES:
            return
        run = experiment.compiled(written_out, self.options, experiment.TUNED)
        name = f"{FIRST}, written_out, {experiment.COMPILED} {experiment.TUNED['mode']}"
        self._take({name: of_context(run, FIRST)})

    @torch.no_grad()
    def _take(self, found: dict[str, Variant]) -> None:
        """Those that run; what is not right is not timed. All is looked at in the first row of the batch."""
        inputs = Inputs(self.shape, self.options.device, self.wanted)
        query, dtype = inputs.query[:1], inputs.query.dtype
        unrounded = (inputs.key[:1], inputs.value[:1])
        exact = eager(query.double(), *(each.double() for each in unrounded))
        for name, variant in found.items():
            context = None if variant.context is None else inputs.contexts[variant.context].first()
            low = eager(query, *(unrounded if context is None else context.widened(dtype)))
            reference = exact if context is None else eager(query.double(), *context.widened(torch.float64))
            try:
                got = variant.run(inputs)[:1].reshape(query.shape)
            except Exception as error:
                print(f"  {self.where}, {name}:", end="")
                tell(error)
                self.is_right &= not variant.is_ours
                continue
            problem = experiment.wrong(got, low, reference)
            if problem is None:
                self.variants[name] = variant
                self.errors[name] = (got.double() - exact).abs().max().item()
            else:
                self.problems.append(f"{name}: {problem}")
                self.is_right &= not variant.is_ours

    @torch.no_grad()
    def measure(self, ceilings: Ceilings) -> None:
        """A row of the table, a line of all variants, and the verdict."""
        first = Inputs(self.shape, self.options.device, self.wanted)
        count = 2 if self.options.tiny else max(2, min(experiment.MOST_SETS, math.ceil(CACHE_BYTES / first.nbytes)))
        sets = [first, *(Inputs(self.shape, self.options.device, self.wanted) for _ in range(count - 1))]
        calls = {name: [functools.partial(each.run, inputs) for inputs in sets] for name, each in self.variants.items()}
        times = alternating_us(calls, self.options.device)
        print(f"  {self.where}: " + ", ".join(f"{name} {us:.1f}" for name, us in times.items()), flush=True)
        judged = [name for name, each in self.variants.items() if each.is_ours]
        theirs = [name for name in times if name not in judged and name != SIXTEEN]
        groups = {
            "torch, 16 bits": [name for name in theirs if self.variants[name].context is None],
            "torch.compile, 8 bits": [name for name in theirs if self.variants[name].context is not None],
            "ours, 16 bits": [SIXTEEN],
            **{f"ours, {name}": [each for each in judged if each.startswith(name)] for name in self.wanted},
        }
        moved = 2 * first.query.nbytes + first.contexts[FIRST].nbytes
        rows = self.shape.heads * self.shape.queries
        flops = 4.0 * self.shape.batch * rows * self.shape.keys * self.shape.head_dim
        kept = first.key.nbytes + first.value.nbytes
        self.options.add(
            "Fixed context in 8 bits, µs",
            shape=self.shape.name,
            sizes=self.shape.sizes,
            **{group: best(names, times) for group, names in groups.items()},
            floor="{:.1f} ({})".format(*ceilings.floor_us(moved, flops)),
            **{"MiB, 16 bits": f"{kept / 2**20:.2f}"},
            **{"MiB, 8 bits": f"{first.contexts[FIRST].nbytes / 2**20:.2f}"},
            **self._errors(),
            values="; ".join(self.problems) or "right",
            verdict=experiment.verdict(self.where, times, judged, theirs, self.options.device),
        )

    def _errors(self) -> dict[str, str]:
        """Largest ones to float64 before rounding, and as multiples of that of 16 bits in our kernel."""
        own = self.errors.get(SIXTEEN, math.nan)
        found = {"largest error, ours, 16 bits": f"{own:.2g}"}
        wanted = {name: self.errors[name] for name in self.wanted if name in self.errors}
        return found | {f"largest error, {name}": f"{error:.2g} ({error / own:.1f}x)" for name, error in wanted.items()}


def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """The definition."""
    return mmattn.attention(query, key, value, backend="eager")


def best(names: list[str], times: dict[str, float]) -> str:
    """A cell: the least time of some variants and whose it is."""
    found = {name: times[name] for name in names if math.isfinite(times.get(name, math.inf))}
    if not found:
        return "-"
    name = min(found, key=lambda name: found[name])
    return f"{found[name]:.1f}" if name == names[0] else f"{found[name]:.1f} ({name.split(', ', 1)[1]})"


def launches_of(shape: Shape, how: tuple[torch.dtype, str], config: DecodeConfig | None) -> tuple[Launch, ...]:
    """On tensors that are only compiled for."""
    dtype, per = how
    query = torch.empty(shape.batch, shape.queries, shape.heads, shape.head_dim, dtype=torch.bfloat16).transpose(1, 2)
    key = torch.empty(shape.batch, shape.keys, shape.kv_heads, shape.head_dim, dtype=dtype).transpose(1, 2)
    if shape.queries <= MAX_QUERIES:
        key = key.contiguous()
    scales = torch.empty(*key.shape[:2], shape.head_dim if per == "channel" else shape.keys)
    return launches_8bit(query, Context(key, key, scales, scales, per), 0.3, query, config)


def launches() -> Iterator[tuple[str, Launch]]:
    """Each kernel once, and what it is for."""
    wanted, seen = formats(STAND_IN.get().capability), set()
    for shape in [*DECODING, *SHORT_KEYS]:
        for name, config in [*((name, None) for name in wanted), *((FIRST, each) for each in choices(shape).values())]:
            what = f"{name}, {shape.queries} x {shape.keys}, head {shape.head_dim}"
            for launch in launches_of(shape, wanted[name], config):
                constants = [(key, value) for key, value in launch.arguments.items() if key.isupper()]
                dtype = launch.arguments["key_ptr"].dtype if "key_ptr" in launch.arguments else None
                own = (launch.kernel.__name__, dtype, launch.num_warps, launch.num_stages, *constants)
                if own not in seen:
                    seen.add(own)
                    yield what if config is None else f"{what}, {blocks_of(config)}", launch


def main() -> int:
    """All shapes; 1 if something of ours is not right or does not run."""
    options = experiment.start(__doc__, launches)
    shapes, wanted = TINY if options.tiny else [*DECODING, *SHORT_KEYS], formats((9, 0))
    if options.device == "cuda":
        wanted = formats(torch.cuda.get_device_capability())
        experiment.compile_launches(launches, options)
    named = [(f"{shape.name}, batch {shape.batch}", shape) for shape in shapes]
    return experiment.run_cases(named, lambda shape: Case(shape, wanted, options), options, SECONDS)


if __name__ == "__main__":
    sys.exit(main())
