"""Every recipe's debug run on 1, 2 and 4 processes: the same losses, to rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from mmattn.config import load_config, load_recipe
from mmattn.training import Task, TrainingResult, read_metrics
from tests.ranks import Ranks

pytestmark = pytest.mark.slow

STEPS = 6
OVERRIDES = {
    "translate": ["training.batch_tokens=600", "evaluation.best=null"],
    "vlm": ["model.network.text.dropout_p=0.0", "examples.token_dropout=0.2", "examples.view_min_area=0.5"],
    "diffusion": ["loss.caption_dropout=0.3", "pictures.flip=true", "evaluation.sample_prompts=[]"],
}


def _train_all(folder: Path, dtype: torch.dtype, recipes: dict[str, list[str]]) -> None:
    """In each process: every recipe, its model and its batches in `dtype`."""
    assert constants.HF_HUB_OFFLINE  # `tests/preloaded.py`
    for name, overrides in recipes.items():
        recipe = load_recipe(name)
        recipe.run_loop = functools.partial(_widened, recipe.run_loop, dtype)
        words = [*overrides, f"training.output_dir={folder / name}"]
        recipe.train(load_config(recipe.Config, f"{name}/debug", words))


def _widened(
    run_loop: Callable[..., TrainingResult], dtype: torch.dtype, task: Task, *arguments: Any, **options: Any
) -> TrainingResult:
    def wide(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    collate = task.collate
    task.model.to(dtype)
    task.collate = lambda draws: {key: wide(value) for key, value in collate(draws).items()}
    return run_loop(task, *arguments, **options)


def losses(tmp_path, processes, dtype):
    folder = tmp_path / f"{processes}"
    common = [f"training.max_steps={STEPS}", "training.eval_every=0", "training.save_every=0", "training.device=cpu"]
    common += ["training.ema_decay=null", "training.warmup_steps=1"]
    recipes = {name: [*overrides, *common] for name, overrides in OVERRIDES.items()}
    ended = Ranks(tmp_path / "said", _train_all, folder, dtype, recipes, processes=processes).end(500)
    said = "".join(one.err for one in ended)
    assert [one.code for one in ended] == [0] * processes, said[-3000:]
    assert said.count(f"on cpu, {processes} processes (gloo)") == (0 if processes == 1 else len(OVERRIDES))
    lines = {name: read_metrics(folder / name / "metrics.jsonl", kind="train") for name in OVERRIDES}
    assert all(len(steps) == STEPS for steps in lines.values())
    return {name: [[line["loss"], line["grad_norm"]] for line in steps] for name, steps in lines.items()}


@pytest.mark.parametrize(
    ("dtype", "counts", "tolerance"),
    [(torch.float64, (2, 4), 1e-6), (torch.float32, (2,), 1e-3)],
    ids=["float64", "float32"],
)
def test_losses_and_gradients_do_not_depend_on_the_number_of_processes(tmp_path, dtype, counts, tolerance):
    """In float64 the models' own float32 parts (losses, timesteps) leave 1e-7; in float32 six AdamW steps, each of
    which divides by the root of the second moment, turn 6e-8 into up to 1e-4."""
    one = losses(tmp_path, 1, dtype)
    for processes in counts:
        several = losses(tmp_path, processes, dtype)
        for name, expected in one.items():
            assert np.allclose(several[name], expected, rtol=tolerance, atol=0), name
