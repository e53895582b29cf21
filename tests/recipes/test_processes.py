"""Every recipe's debug run on 1, 2 and 4 processes: the same losses, to rounding."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

from mmattn.training import read_metrics

pytestmark = pytest.mark.slow

STEPS = 6
OVERRIDES = {
    "translate": ["training.batch_tokens=600", "evaluation.best=null"],
    "vlm": ["model.network.text.dropout_p=0.0", "examples.token_dropout=0.2", "examples.view_min_area=0.5"],
    "diffusion": ["loss.caption_dropout=0.3", "pictures.flip=true", "evaluation.sample_prompts=[]"],
}
SCRIPT = """
import json, sys, torch
from mmattn.config import load_config, load_recipe

folder, dtype, recipes = sys.argv[1], getattr(torch, sys.argv[2]), json.loads(sys.argv[3])

def wide(value):
    return value.to(dtype) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

for name, overrides in recipes.items():
    recipe = load_recipe(name)
    loop = recipe.run_loop

    def widened(task, *arguments, loop=loop, **options):
        collate = task.collate
        task.model.to(dtype)
        task.collate = lambda draws: {key: wide(value) for key, value in collate(draws).items()}
        return loop(task, *arguments, **options)

    recipe.run_loop = widened
    recipe.train(load_config(recipe.Config, f"{name}/debug", [*overrides, f"training.output_dir={folder}/{name}"]))
"""


def losses(tmp_path, processes, dtype):
    script, folder = tmp_path / "script.py", tmp_path / f"{processes}-{dtype}"
    script.write_text(SCRIPT)
    common = [f"training.max_steps={STEPS}", "training.eval_every=0", "training.save_every=0", "training.device=cpu"]
    common += ["training.ema_decay=null", "training.warmup_steps=1"]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    recipes = {name: [*overrides, *common] for name, overrides in OVERRIDES.items()}
    done = subprocess.run(
        [sys.executable, *(launcher if processes > 1 else []), str(script), str(folder), dtype, json.dumps(recipes)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count(f"on cpu, {processes} processes (gloo)") == (0 if processes == 1 else len(OVERRIDES))
    lines = {name: read_metrics(folder / name / "metrics.jsonl", kind="train") for name in OVERRIDES}
    assert all(len(steps) == STEPS for steps in lines.values())
    return {name: [[line["loss"], line["grad_norm"]] for line in steps] for name, steps in lines.items()}


@pytest.mark.parametrize(("dtype", "counts", "tolerance"), [("float64", (2, 4), 1e-6), ("float32", (2,), 1e-3)])
def test_losses_and_gradients_do_not_depend_on_the_number_of_processes(tmp_path, dtype, counts, tolerance):
    """In float64 the models' own float32 parts (losses, timesteps) leave 1e-7; in float32 six AdamW steps, each of
    which divides by the root of the second moment, turn 6e-8 into up to 1e-4."""
    one = losses(tmp_path, 1, dtype)
    for processes in counts:
        several = losses(tmp_path, processes, dtype)
        for name, expected in one.items():
            assert np.allclose(several[name], expected, rtol=tolerance, atol=0), name
