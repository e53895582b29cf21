"""What ZeRO-3 holds: weights for as long as they are needed, and nothing once a run is over.

The losses of a model that DeepSpeed has to let go of, gathers again and gathers ahead are those of DDP.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mmattn.training import Batch, Loss, train, zero3
from tests.training.layered_toy import EndingTask, launch, run_all, say
from tests.training.pieces import assert_same
from tests.training.toy import toy_config

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

FLOAT32 = {"dtype": "float32"}
BASE = {"max_steps": 6, "eval_every": 0, "task": FLOAT32}
SETTINGS: dict[str, dict[str, Any]] = {
    "accumulated": {**BASE, "micro_batch_size": 1, "max_grad_norm": 0.01, "task": {**FLOAT32, "bad": [3]}},
    "recomputed": {**BASE, "activation_checkpointing": True},
    "ending": {**BASE, "activation_checkpointing": True, "task": {**FLOAT32, "kind": "EndingTask"}},
    "scoring": {**BASE, "task": {**FLOAT32, "kind": "ScoringTask"}},
    "bf16": {**BASE, "mixed_precision": "bf16"},
    "bf16 recomputed": {**BASE, "mixed_precision": "bf16", "activation_checkpointing": True},
}
# A layer has 524 elements, the model 1715. As a large model does it: nothing stays, or more than one layer but not two.
GATHERING = {
    "nothing": {"kept_gathered": 0, "max_gathered": 0, "bucket": 600},
    "layer": {"kept_gathered": 0, "max_gathered": 800, "bucket": 600},
}


def _train_watched(runs: list[tuple[Path, dict[str, Any]]]) -> None:
    """As `run_all`; and, at each use of the last layer in a ZeRO-3 run, how a weight of the first one is and how many
    are on their way."""
    seen: list[list[tuple[str, int]]] = []
    initialize = zero3._initialize

    def watched(model: Any, *arguments: Any) -> Any:
        weight = model.layers[0].out_proj.weight  # in a forward pass DeepSpeed would gather it for who asks

        def look(*_: Any) -> None:
            seen[-1].append((weight.ds_status.name, len(model.ds_inflight_param_registry)))

        engine = initialize(model, *arguments)
        seen.append([])
        model.layers[2].register_forward_pre_hook(look)
        return engine

    zero3._initialize = watched
    say([run_all(runs), seen])


def test_weights_that_are_let_go_are_gathered_again_and_ahead(tmp_path):
    runs = [(tmp_path / f"ddp-{name}", options) for name, options in SETTINGS.items()]
    for gathering, more in GATHERING.items():
        runs += [
            (tmp_path / f"{gathering}-{name}", {**options, **more, "sharding": "zero3"})
            for name, options in SETTINGS.items()
        ]
    number = len(SETTINGS)
    for results, seen in launch(runs, 2, function=_train_watched):
        ddp = dict(zip(SETTINGS, results, strict=False))
        for index, (result, uses) in enumerate(zip(results[number:], seen, strict=True)):
            gathering, name = list(GATHERING)[index // number], list(SETTINGS)[index % number]
            assert result["losses"] == pytest.approx(ddp[name]["losses"], rel=1e-6), (gathering, name)
            assert len(result["losses"]) >= 4
            assert {status for status, _ in uses} == {"NOT_AVAILABLE"}, (gathering, name)
            ahead = [number for _, number in uses]
            assert max(ahead) == 0 if gathering == "nothing" else max(ahead[len(ahead) // 2 :]) > 0, (gathering, name)
    for name in SETTINGS:
        for gathering in GATHERING:
            files = [tmp_path / f"{kind}-{name}/final/model.safetensors" for kind in ("ddp", gathering)]
            assert_same(*files, rtol=1e-5, atol=1e-6)


class WatchedTask(EndingTask):
    """Remembers what DeepSpeed has, without holding it, and how many modules it takes to be at work."""

    def __init__(self, stack: list[nn.Module]) -> None:
        super().__init__(dtype=torch.float32)
        self.held: dict[str, weakref.ref[Any]] = {}
        self.stack, self.at_work = stack, []

    def loss(self, model: Any, batch: Batch) -> Loss:
        self.at_work.append(len(self.stack))
        optimizer = model.optimizer
        for name, value in (
            *(("engine", model), ("model", model.module), ("optimizer", optimizer)),
            *(
                ("gradients", optimizer.grad_partitions_flat_buffer),
                ("weights", optimizer.fp32_partitioned_groups_flat[0]),
            ),
            *(("moments", state["exp_avg"]) for state in optimizer.optimizer.state.values()),
        ):
            self.held[name] = weakref.ref(value)
        loss = super().loss(model, batch)
        self.models.clear()
        return loss


def _train_and_look(runs: list[tuple[Path, dict[str, Any]]]) -> None:
    deepspeed = importlib.import_module("deepspeed")
    stack = importlib.import_module("deepspeed.runtime.zero.parameter_offload").FWD_MODULE_STACK
    initialize, before, whole = deepspeed.initialize, dict(os.environ), []

    def looking(**arguments: Any) -> Any:
        whole.extend(p.numel() for p in arguments["model"].parameters() if p.numel())
        return initialize(**arguments)

    deepspeed.initialize = looking
    results = []
    for folder, options in runs:
        task = WatchedTask(stack)
        train(task, toy_config(folder, **options))
        gc.collect()
        alive = sorted(name for name, held in task.held.items() if held() is not None)
        results.append({"alive": alive, "watched": sorted(task.held), "at_work": task.at_work, "left": len(stack)})
    say({"runs": results, "whole": whole, "environment": before == dict(os.environ)})


def test_nothing_of_a_run_is_left(tmp_path):
    """Neither in memory nor in the environment; and no device has held the whole model, nor `numactl` been asked."""
    numactl, asked = tmp_path / "bin/numactl", tmp_path / "asked"
    numactl.parent.mkdir()
    numactl.write_text(f"#!/bin/sh\ntouch {asked}\n")
    numactl.chmod(0o755)
    options = {"max_steps": 4, "sharding": "zero3", "micro_batch_size": 1, "activation_checkpointing": True}
    runs = [(tmp_path / "one", options), (tmp_path / "two", options)]
    path = f"{numactl.parent}:{os.environ['PATH']}"
    first, second = launch(runs, 2, function=_train_and_look, DS_ACCELERATOR="cpu", PATH=path)
    for rank, said in enumerate((first, second)):
        for run in said["runs"]:
            assert run["watched"] == ["engine", "gradients", "model", "moments", "optimizer", "weights"]
            assert run["alive"] == ([] if rank == 0 else ["model"])  # there it is the task's own
            assert set(run["at_work"]) == {1}
            assert run["left"] == 0
        assert said["whole"] == []
        assert said["environment"]
    assert not asked.exists()
