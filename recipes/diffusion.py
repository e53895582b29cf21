"""Text to image: in pixel space from scratch, or Stable Diffusion fine-tuned whole, by LoRA or by keys and values."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

from mmattn.data.counted import counted
from mmattn.data.readers import open_image_text
from mmattn.data.skipping import preview
from mmattn.errors import UsageError
from mmattn.inference.diffusion.scores import require_scorable
from mmattn.inference.diffusion.task import DiffusionConfig, DiffusionTask, evaluate_folder
from mmattn.training import TrainingResult
from mmattn.training import train as run_loop
from mmattn.training.memory import estimate_run

Config = DiffusionConfig
open_task = functools.partial(DiffusionTask, is_preview=True)  # for `mmattn export`


def train(config: Config, *, resume: bool | str = False) -> TrainingResult:
    """Train as the config says.

    With `train_what: all` the result opens with `TextToImage.from_pretrained(output_dir / "final")`; LoRA and keys and
    values are files that `load_lora` and `load_cross_attention_kv`, and stock diffusers, put into the model they
    started from.
    """
    config.training.validate()  # before anything is encoded, which may take long
    values = {"recipe": "diffusion", **dataclasses.asdict(config)}
    task = DiffusionTask(config)
    return run_loop(task, config.training, resume=resume, command=" ".join(sys.argv), resolved_config=values)


def check(config: Config) -> list[str]:
    """What training with this config would do: data, parameters, memory. Reads data, trains and writes nothing."""
    config.training.validate()
    task = DiffusionTask(config, is_preview=True)
    if config.training.eval_every:
        require_scorable(config.data, config.evaluation)
    lines = [task.describe()]
    for split in config.evaluation.splits:
        source = open_image_text(config.data, split)
        lines.append(f"{source.name}: {counted(len(source), 'picture')} for scores")
    memory = estimate_run(task, config.training)
    lines += preview(task.data.source, captions_only=True)
    return [*lines, f"memory of training, float32, one process: {memory}"]


def evaluate(folder: str | Path, config: Config) -> dict[str, float]:
    """Scores of a trained folder (its `best/` or else `final/`, or the folder itself) on the config's data.

    Raises:
        UsageError: the config asks for no score.
    """
    scores = evaluate_folder(Path(folder), config)
    if not scores:
        raise UsageError("nothing to score: evaluation.splits is empty, or loss, fid and clip_score are all off")
    return scores


if __name__ == "__main__":
    from mmattn.cli.recipe_main import run_recipe

    sys.exit(run_recipe(sys.modules[__name__]))
