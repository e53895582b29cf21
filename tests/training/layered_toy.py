"""A model of repeated layers with all that sharding may stumble over, and runs of it in several processes.

A run is a folder and settings, and what `_run` takes out of them.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from transformers.utils import ModelOutput

from mmattn.errors import MmattnError
from mmattn.training import Batch, Loss, checkpoint_writer, launcher_sharding, rates, sharding, train, zero3
from mmattn.training.state import LoopState
from tests.ranks import Ranks
from tests.training.toy import VOCAB, WIDTH, ToyTask, toy_config

# Of how much DeepSpeed gathers; the toy is smaller than all of them.
_GATHERING = {name: getattr(zero3, name) for name in ("KEPT_GATHERED", "MAX_GATHERED", "BUCKET")}


class ToyLayer(nn.Module):
    """Parameters of fewer rows than there are processes, of odd numbers of rows, and frozen ones among the others."""

    def __init__(self, dropout_p: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.inner_proj = nn.Linear(WIDTH, 17, dtype=dtype)
        self.frozen_proj = nn.Linear(17, WIDTH, bias=False, dtype=dtype).requires_grad_(False)
        self.out_proj = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.gate = nn.Parameter(torch.full((1,), 0.3, dtype=dtype))
        self.dropout = nn.Dropout(dropout_p)

    def forward(self, hidden: Tensor) -> Tensor:
        inner = self.frozen_proj(self.inner_proj(hidden).tanh())
        return hidden + self.gate * self.dropout(self.out_proj(inner))


class EndingLayer(ToyLayer):
    """Ends in a product, as layers of transformers do: computed anew it is left inside of it, where the last tensor has
    been saved."""

    def forward(self, hidden: Tensor) -> Tensor:
        gated = self.gate * hidden
        return gated + self.out_proj(self.frozen_proj(self.inner_proj(hidden).tanh()))


class LayeredModel(nn.Module):
    """Layers under a vocabulary table that is also the head; `unused` buffers are not stored."""

    layer_class: type[ToyLayer] = ToyLayer

    def __init__(self, dropout_p: float, dtype: torch.dtype, has_batch_norm: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCAB, WIDTH, dtype=dtype)
        self.layers = nn.ModuleList(self.layer_class(dropout_p, dtype) for _ in range(3))
        self.batch_norm = nn.BatchNorm1d(WIDTH, dtype=dtype) if has_batch_norm else nn.Identity()
        self.register_buffer("factor", torch.tensor(1.5, dtype=dtype), persistent=False)

    def forward(self, input_ids: Tensor, scale: Tensor) -> Tensor:
        hidden = self.words(input_ids) * scale[:, None, None].to(self.words.weight.dtype)
        for layer in self.layers:
            hidden = layer(hidden)
        hidden = self.batch_norm(hidden.transpose(1, 2)).transpose(1, 2)
        return hidden @ self.words.weight.T * self.factor


class LayeredTask(ToyTask):
    repeated_layers = (ToyLayer,)
    model_class: type[LayeredModel] = LayeredModel

    def __init__(
        self,
        *,
        dropout_p: float = 0.0,
        dtype: torch.dtype = torch.float64,
        has_batch_norm: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(**options)
        torch.manual_seed(7)
        self.model = self.model_class(dropout_p, dtype, has_batch_norm)
        self.models: list[nn.Module] = []

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        if not self.models:
            self.models.append(model)
        return super().loss(model, batch)


@dataclass(frozen=True)
class Scores:
    logits: Tensor


class ScoringModel(LayeredModel):
    """Uses parameters of its own and of others, a view of them too, in a pass that gives a dataclass."""

    def __init__(self, dropout_p: float, dtype: torch.dtype, has_batch_norm: bool) -> None:
        super().__init__(dropout_p, dtype, has_batch_norm)
        self.sizes = nn.Parameter(torch.linspace(0.5, 1.5, VOCAB, dtype=dtype))

    def forward(self, input_ids: Tensor, scale: Tensor) -> Scores:  # type: ignore[override]
        return Scores(super().forward(input_ids, scale).tanh() * self.used_sizes())

    def used_sizes(self) -> Tensor:
        return self.sizes


class ScoringTask(LayeredTask):
    model_class = ScoringModel

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        if not self.models:
            self.models.append(model)
        return ToyTask.loss(self, lambda *inputs: self.logits(model(*inputs)), batch)  # type: ignore[arg-type]

    def logits(self, outputs: Any) -> Tensor:
        return outputs.logits

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        return {}


class EndingModel(LayeredModel):
    layer_class = EndingLayer


class EndingTask(LayeredTask):
    repeated_layers = (EndingLayer,)
    model_class = EndingModel


class UnusedModel(LayeredModel):
    def __init__(self, dropout_p: float, dtype: torch.dtype, has_batch_norm: bool) -> None:
        super().__init__(dropout_p, dtype, has_batch_norm)
        self.spare = nn.Linear(3, 3, dtype=dtype)


class UnusedTask(LayeredTask):
    """Has a parameter that takes no part."""

    model_class = UnusedModel


class LatelyUnusedModel(UnusedModel):
    """Of a step's micro-batches the first alone uses what is spare."""

    calls = 0

    def forward(self, input_ids: Tensor, scale: Tensor) -> Tensor:
        self.calls += 1
        logits = super().forward(input_ids, scale)
        return logits if self.calls % 3 != 1 else logits + self.spare.weight.sum() + self.spare.bias.sum()


class LatelyUnusedTask(LayeredTask):
    model_class = LatelyUnusedModel


@dataclass
class Outputs(ModelOutput):
    logits: Tensor | None = None


class OutputsModel(ScoringModel):
    """Gives what models of transformers give."""

    def forward(self, input_ids: Tensor, scale: Tensor) -> Outputs:  # type: ignore[override]
        return Outputs(logits=super().forward(input_ids, scale).logits)


class OutputsTask(ScoringTask):
    model_class = OutputsModel

    def logits(self, outputs: Any) -> Tensor:
        return outputs[0]


class PartlyUsedModel(ScoringModel):
    """One of its parameters takes part in the first process only."""

    def used_sizes(self) -> Tensor:
        return self.sizes if os.environ["RANK"] == "0" else self.sizes.detach()


class PartlyUsedTask(ScoringTask):
    model_class = PartlyUsedModel


class ScalarModel(LayeredModel):
    def __init__(self, dropout_p: float, dtype: torch.dtype, has_batch_norm: bool) -> None:
        super().__init__(dropout_p, dtype, has_batch_norm)
        self.temperature = nn.Parameter(torch.tensor(1.0, dtype=dtype))


class ScalarTask(LayeredTask):
    model_class = ScalarModel


class GoesAround(LayeredTask):
    """Does what `Task.loss` must not."""

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        return super().loss(self.model, batch)


TASKS = {
    kind.__name__: kind
    for kind in (
        *(LayeredTask, GoesAround, EndingTask, ScoringTask, OutputsTask),
        *(PartlyUsedTask, UnusedTask, LatelyUnusedTask, ScalarTask),
    )
}


def _run(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    resume, kill_at = options.pop("resume", False), options.pop("kill_at_fsync", None)
    full_at = options.pop("full_at_step", None)
    if options.pop("through_accelerate", False):
        _let_accelerate_shard()
    if options.pop("counts_operations", False):
        rates.Rates._find_peak = lambda self: (1e9, None)
    for name, value in _GATHERING.items():
        setattr(zero3, name, options.pop(name.lower(), value))
    own = dict(options.pop("task", {}))
    dtype = getattr(torch, own.pop("dtype", "float64"))
    task = TASKS[own.pop("kind", "LayeredTask")](**own, dtype=dtype)
    if kill_at is not None:
        _kill_at_fsync(*kill_at)
    with _full_disk(full_at):
        result = train(task, toy_config(folder, **options), resume=resume)
    is_cut = options.get("sharding") == "zero3" and bool(task.models)
    if options.get("sharding") == "fsdp2" and task.models:
        sharding.require_sharded(task.models[0], torch.distributed.get_world_size())
    held = [(p.ds_status.name, p.ds_tensor.numel(), p.ds_numel) for p in task.models[0].parameters()] if is_cut else []
    kinds = sorted({type(p).__name__ for p in task.models[0].parameters()}) if task.models else []
    dtypes = sorted({str(p.dtype) for p in task.models[0].parameters()}) if task.models else []
    return {"losses": result.losses, "metrics": result.metrics, "kinds": kinds, "dtypes": dtypes, "held": held}


def _let_accelerate_shard() -> None:
    def tell(accelerator: Accelerator, layers: dict[str, nn.Module]) -> None:
        accelerator.state.fsdp_plugin = launcher_sharding.fsdp_plugin()
        accelerator.state.distributed_type = DistributedType.FSDP
        original(accelerator, layers)

    def prepare(model: nn.Module, *arguments: Any) -> tuple[nn.Module, Any]:
        return sharding._by_accelerate(model, *arguments)

    original, sharding._tell_accelerate, sharding._by_torch = sharding._tell_accelerate, tell, prepare


def _kill_at_fsync(rank: int, number: int) -> None:
    if int(os.environ.get("RANK", "0")) != rank:
        return
    fsync, calls = os.fsync, 0

    def killing(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls == number:
            os.kill(os.getpid(), signal.SIGKILL)
        fsync(descriptor)

    os.fsync = killing


@contextlib.contextmanager
def _full_disk(step: int | None) -> Iterator[None]:
    """Inside, the facts of that step's checkpoint cannot be written."""
    write_state = checkpoint_writer.write_state

    def failing(folder: Path, state: LoopState, facts: dict[str, Any]) -> None:
        if state.step == step:
            raise OSError(errno.ENOSPC, "No space left on device")
        write_state(folder, state, facts)

    checkpoint_writer.write_state = failing
    try:
        yield
    finally:
        checkpoint_writer.write_state = write_state


def run_all(runs: list[tuple[Path, dict[str, Any]]]) -> list[dict[str, Any]]:
    """Train one after the other; what each gave, or the error that it ended in."""
    results = []
    for folder, options in runs:
        try:
            results.append(_run(folder, dict(options)))
        except MmattnError as error:
            results.append({"error": str(error)})
    return results


def launch(
    runs: list[tuple[Path, dict[str, Any]]],
    processes: int,
    *,
    killed: int | None = None,
    function: Callable[[list[tuple[Path, dict[str, Any]]]], None] | None = None,
    **environment: str,
) -> list[Any]:
    """Train in several processes: what `function` has said in each, but for the one that is to be killed in between.

    Without a function that is what `run_all` gave.
    """
    where = runs[0][0].parent / "said"
    own = {"ACCELERATE_USE_CPU": "true", **environment}
    ended = Ranks(where, function or _train_all, runs, processes=processes, **own).end()
    codes = [-signal.SIGKILL if rank == killed else 0 for rank in range(processes)]
    assert [one.code for one in ended] == codes, [one.err[-3000:] for one in ended]
    # DeepSpeed and Accelerate write there too.
    said = [line for one in ended for line in one.out.splitlines() if line.startswith('{"results"')]
    return [json.loads(line)["results"] for line in said]


def _train_all(runs: list[tuple[Path, dict[str, Any]]]) -> None:
    say(run_all(runs))


def say(results: Any) -> None:
    """To the process that has launched this one."""
    print(json.dumps({"results": results}))
