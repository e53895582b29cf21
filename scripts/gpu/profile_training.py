"""Where a training step's time goes on a card: kernels, launches and gaps of each recipe at the sizes of training.py.

One process, no launcher: bfloat16 on a card all the same. The steps up to the last six run beside whatever else there
is; of those, three are timed as they are, and three by torch.profiler. Nothing is saved.

A job's name is a recipe's with what is changed of it: `compiled` (training.torch_compile), `looked` (the loss and the
norm are looked at before the optimiser is asked to step), `uncast` (every product casts its input for itself), `stock`
(the U-Net's pictures as diffusers lays them out, with its norms), `resnets` (with `compiled`: ResNets too are, round
mmattn's own kernels), `benchmark` (cuDNN tries its convolutions).
"""

from __future__ import annotations

import collections
import contextlib
import functools
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from measure import Options, read_options, wait
from torch.profiler import ProfilerActivity, profile
from training import SIZES, overrides

STEPS, TINY_STEPS, EACH, TINY_EACH = 24, 6, 3, 1
COMPILED = "compiled"
CHANGED = ("", f"-{COMPILED}", "-looked", "-uncast", "-looked-uncast", f"-{COMPILED}-looked")
JOBS = (
    *(recipe + change for recipe in SIZES for change in CHANGED),
    *(f"diffusion-{change}" for change in ("stock", "benchmark")),
    *(f"diffusion-{COMPILED}-{change}" for change in ("stock", "resnets", "benchmark")),
)
TOP = 40
# The first that is found in a kernel's name is its class.
CLASSES: tuple[tuple[str, str], ...] = (
    ("nccl", r"nccl"),
    ("layout changes", r"nchwToNhwc|nhwcToNchw|[Tt]ranspose"),
    ("attention", r"flash|fmha|sdpa|attention|(packed|resident|streamed|queries|keys|split)_(fwd|bwd|maps)|partials"),
    ("optimizer, clipping, averages", r"multi_tensor_apply|[Aa]dam|LpNorm"),
    ("compiled pointwise", r"^triton_poi"),
    ("compiled reductions", r"^triton_(red|per)"),
    ("gemm, conv", r"gemm|nvjet|xmma|cutlass|[wd]grad|fprop|conv|cublas|splitK|^triton_tem|^triton_mm|winograd|fft"),
    ("norm", r"layer_?norm|group_?norm|batch_?norm|RowwiseMoments|GammaBeta|InternalGradients|FusedParams|LayerNorm"),
    ("copies, casts, fills", r"copy|[Mm]emcpy|[Mm]emset|CatArray|FillFunctor|Memcpy"),
    ("reductions", r"reduce_kernel|[Ss]oft[Mm]ax|argmax|[Rr]educe"),
    ("elementwise", r"elementwise|dropout|[Gg]elu|gather|scatter|index|[Ee]mbedding|triton"),
)


class EnoughError(Exception):
    """All has been measured: ends the run before it saves anything."""


@dataclass
class Watch:
    """Takes the place of the loop's `queue_step`: lets steps pass, times some, profiles some, and ends the run.

    Attributes:
        queue_step: the loop's own.
        options: of this script.
        before: steps that pass.
        each: steps that are timed, and then profiled.
        trace: a file for what the profiler saw.
    """

    queue_step: Callable[..., Any]
    options: Options
    before: int
    each: int
    trace: Path
    plain_ms: float = 0.0
    profiled_ms: float = 0.0
    _calls: int = 0
    _begin: float = 0.0
    _profile: profile | None = None
    _turn: contextlib.ExitStack = field(default_factory=contextlib.ExitStack)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._calls == self.before:
            self._turn.enter_context(self.options.turn())
            self._clock()
        elif self._calls == self.before + self.each:
            self.plain_ms = self._clock()
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self.options.device == "cuda")
            self._profile = profile(activities=activities, record_shapes=True)
            self._profile.start()
            self._clock()
        elif self._calls == self.before + 2 * self.each and self._profile is not None:
            self.profiled_ms = self._clock()
            self._profile.stop()
            self._turn.close()
            self._profile.export_chrome_trace(str(self.trace))
            raise EnoughError
        self._calls += 1
        return self.queue_step(*args, **kwargs)

    def _clock(self) -> float:
        """Milliseconds of each step since the call before."""
        wait(self.options.device)
        now = time.perf_counter()
        passed, self._begin = now - self._begin, now
        return 1000 * passed / self.each

    def close(self) -> None:
        """For a run that has ended before."""
        self._turn.close()


def as_stock() -> None:
    """Pictures as diffusers lays them out, and its norms."""
    from mmattn.models.unet import pictures

    pictures._DEVICES = ()


def compile_resnets() -> None:
    """Compile ResNets too, which leave their norms to kernels of mmattn's."""
    from mmattn.training import layer_compilation

    begin = layer_compilation._Compiled.__init__

    def initialised(self: Any, forward: Any, name: str, compiled: Any, runs_own_kernels: Any = None) -> None:
        begin(self, forward, name, compiled)

    layer_compilation._Compiled.__init__ = initialised


def look_first() -> None:
    """Let the loop look at every step before it is taken."""
    from mmattn.training import ahead

    ahead._AHEAD = ()


def cast_each() -> None:
    """Let every product cast its input for itself."""
    from mmattn.nn import shared_input

    shared_input._CASTS_ONCE = ()


def try_convolutions() -> None:
    """Have cuDNN measure which of its convolutions is fastest."""
    torch.backends.cudnn.benchmark = True


CHANGES: dict[str, Callable[[], None]] = {
    COMPILED: lambda: None,
    "stock": as_stock,
    "resnets": compile_resnets,
    "looked": look_first,
    "uncast": cast_each,
    "benchmark": try_convolutions,
}


def trained(recipe: str, folder: Path, options: Options, *, is_compiled: bool) -> Watch:
    """Run a recipe to the end of what is measured.

    Raises:
        RuntimeError: it ended before.
    """
    from mmattn.config import load_config, load_recipe
    from mmattn.training import loop

    steps, each = (TINY_STEPS, TINY_EACH) if options.tiny else (STEPS, EACH)
    watch = Watch(loop.queue_step, options, steps - 2 * each, each, folder.with_suffix(".json"))
    settings = {"save_every": 0, "torch_compile": is_compiled, "device": "cpu" if options.device == "cpu" else "auto"}
    module = load_recipe(recipe)
    config = load_config(module.Config, f"{recipe}/debug", overrides(recipe, folder, steps + 1, options, **settings))
    loop.queue_step = watch  # pyright: ignore[reportAttributeAccessIssue]
    try:
        module.train(config)
    except EnoughError:
        return watch
    finally:
        loop.queue_step = watch.queue_step
        watch.close()
    raise RuntimeError("the run ended before its steps were profiled")


@dataclass(frozen=True)
class Work:
    """One kernel, copy or fill: its beginning and length in microseconds, and the operator that asked for it."""

    name: str
    begin: float
    length: float
    operator: str


@functools.cache
def kind_of(name: str) -> str:
    """The class of a kernel by its name."""
    return next((kind for kind, pattern in CLASSES if re.search(pattern, name)), "other")


def works(events: Sequence[dict[str, Any]], device: str) -> list[Work]:
    """What the card did, in order; on a CPU the operators themselves."""
    wanted = ("kernel", "gpu_memcpy", "gpu_memset") if device == "cuda" else ("cpu_op",)
    operators = {
        each["args"]["External id"]: _operator(each)
        for each in events
        if each.get("cat") == "cpu_op" and "External id" in each.get("args", {})
    }
    found = [
        Work(
            each["name"], each["ts"], each["dur"], operators.get(each.get("args", {}).get("External id"), "no operator")
        )
        for each in events
        if each.get("cat") in wanted and each.get("ph") == "X"
    ]
    return sorted(found, key=lambda work: work.begin)


def _operator(event: dict[str, Any]) -> str:
    dims = [dims for dims in event["args"].get("Input Dims", []) if dims][:3]
    types = [kind for kind in event["args"].get("Input type", []) if kind and kind not in ("Scalar", "ScalarList")][:3]
    short = {"c10::BFloat16": "bf16", "float": "f32", "c10::Half": "f16", "long int": "i64", "unsigned char": "u8"}
    return f"{event['name']} {dims} {[short.get(kind, kind) for kind in types]}".replace("'", "")


def gaps(done: Sequence[Work]) -> list[tuple[float, str]]:
    """Microseconds in which the card did nothing, and what it did next."""
    found, until = [], done[0].begin if done else 0.0
    for work in done:
        if work.begin > until:
            found.append((work.begin - until, work.name))
        until = max(until, work.begin + work.length)
    return found


def table(title: str, lines: Iterable[tuple[str, float, float]], width: int) -> None:
    """Print name, times a step and milliseconds a step, the longest first."""
    print(f"\n{title}")
    for name, count, ms in sorted(lines, key=lambda line: -line[2])[:TOP]:
        print(f"{ms:9.3f} ms {count:8.1f} x  {name[:width]}")


def summed(done: Sequence[Work], key: Callable[[Work], str], steps: int) -> list[tuple[str, float, float]]:
    """Times and milliseconds a step by a key."""
    sums: dict[str, list[float]] = collections.defaultdict(list)
    for work in done:
        sums[key(work)].append(work.length)
    return [(name, len(lengths) / steps, sum(lengths) / 1000 / steps) for name, lengths in sums.items()]


def runtime(events: Sequence[dict[str, Any]], steps: int) -> list[tuple[str, float, float]]:
    """Times and milliseconds a step of each call to the driver."""
    calls = [
        Work(each["name"], each["ts"], each["dur"], "")
        for each in events
        if each.get("cat") in ("cuda_runtime", "cuda_driver") and each.get("ph") == "X"
    ]
    return summed(calls, lambda work: work.name, steps)


def tell(events: Sequence[dict[str, Any]], watch: Watch, steps: int, device: str) -> dict[str, str]:
    """Print the tables; the cells of a row that sums them up."""
    done = works(events, device)
    idle, calls = gaps(done), runtime(events, steps)
    span = max(work.begin + work.length for work in done) - done[0].begin
    busy = span - sum(gap for gap, _ in idle)
    table("By kernel", summed(done, lambda work: work.name, steps), 110)
    table("By operator, with the first shapes and types", summed(done, lambda work: work.operator, steps), 170)
    table("Calls to the driver", calls, 110)
    after = [Work(name, 0.0, gap, "") for gap, name in idle]
    table("Gaps, before which kernel", summed(after, lambda work: work.name, steps), 110)
    for least, most in ((0, 5), (5, 20), (20, 100), (100, 1e9)):
        lengths = [gap for gap, _ in idle if least <= gap < most]
        print(
            f"gaps of {least} to {most:.0f} us: {len(lengths) / steps:.1f} a step, {sum(lengths) / 1000 / steps:.2f} ms"
        )
    kinds = summed(done, lambda work: kind_of(work.name), steps)
    table("By class", kinds, 110)
    others = [work for work in done if kind_of(work.name) == "other"]
    table("Of no class", summed(others, lambda work: work.name, steps), 110)
    launches = sum(count for name, count, _ in calls if re.search("LaunchKernel|GraphLaunch", name))
    return {
        "ms a step": f"{watch.plain_ms:.1f}",
        "profiled": f"{watch.profiled_ms:.1f}",
        "card busy": f"{busy / 1000 / steps:.1f}",
        "idle in between": f"{sum(gap for gap, _ in idle) / 1000 / steps:.1f}",
        "kernels": f"{len(done) / steps:.0f}",
        "launches": f"{launches:.0f}",
        **{kind: f"{ms:.1f}" for kind, _, ms in sorted(kinds, key=lambda line: -line[2])},
    }


def main() -> int:
    """A row and its tables."""
    options = read_options(__doc__, JOBS)
    job = options.only
    if job is None:
        print("name a recipe, or one of the other jobs: --only " + ", ".join(JOBS))
        return 2
    recipe, *changes = job.split("-")
    for change in changes:
        CHANGES[change]()
    keep = os.environ.get("MMATTN_TRACES")  # a folder for the traces
    with tempfile.TemporaryDirectory() as name:
        watch = trained(recipe, Path(keep or name) / job, options, is_compiled=COMPILED in changes)
        events = json.loads(watch.trace.read_text(encoding="utf-8"))["traceEvents"]
        print(f"\n== {job}")
        cells = tell(events, watch, watch.each, options.device)
    options.add("Training steps, by the profiler, ms", recipe=recipe, changes=" ".join(changes) or "-", **cells)
    return 0


if __name__ == "__main__":
    sys.exit(main())
