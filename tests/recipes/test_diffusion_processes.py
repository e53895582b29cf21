"""The diffusion recipe in two real processes on gloo: the losses of one process, whatever is trained."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mmattn.cli.recipe_main import run_recipe
from mmattn.config import load_recipe
from mmattn.training import read_metrics
from tests.inference.tiny_pipelines import stable_diffusion
from tests.ranks import Ranks

pytestmark = pytest.mark.slow

STEPS = ["training.max_steps=3", "training.eval_every=3", "evaluation.num_inference_steps=2", "evaluation.limit=2"]


def _train(words: list[str]) -> None:
    sys.exit(run_recipe(load_recipe("diffusion"), words))


def _losses(config: str, folder: Path, processes: int, *overrides: str) -> list[float]:
    words = ["--config", config, f"training.output_dir={folder}", *STEPS, *overrides]
    ended = Ranks(folder.parent / "said", _train, words, processes=processes, ACCELERATE_USE_CPU="true").end(240)
    assert [one.code for one in ended] == [0] * processes, [one.err[-3000:] for one in ended]
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl", kind="train")]


def test_from_scratch_with_its_text_encoder(tmp_path):
    one = _losses("diffusion/debug", tmp_path / "one", 1)
    assert _losses("diffusion/debug", tmp_path / "two", 2) == pytest.approx(one, rel=1e-4)
    assert len(one) == 3


@pytest.mark.parametrize("what", ["lora", "cross_attention_kv"])
def test_stable_diffusion(tmp_path, what):
    stable_diffusion().save_pretrained(tmp_path / "sd")
    draws, rows = np.random.default_rng(0), []
    for number in range(4):
        Image.fromarray(draws.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
        rows.append(json.dumps({"image": f"{number}.png", "text": ("a red <new1> circle", "a green star")[number % 2]}))
    (tmp_path / "captions.jsonl").write_text("\n".join(rows))
    overrides = [
        *[f"model.from_pretrained={tmp_path / 'sd'}", f"data.path={tmp_path / 'captions.jsonl'}", f"train_what={what}"],
        *["pictures.resolution=32", "pictures.buckets=false", "data.eval_fraction=0", "evaluation.splits=[]"],
        *["training.batch_size=4", "training.micro_batch_size=1", "training.num_workers=0", "training.warmup_steps=0"],
        *["training.save_every=0", "training.learning_rate=1e-2", "evaluation.sample_prompts=[a red circle]"],
    ]
    if what == "cross_attention_kv":
        overrides += ["new_token.token=<new1>", "new_token.initializer=circle"]
    one, two = (_losses("diffusion/finetune-sd-lora", tmp_path / f"{n}", n, *overrides) for n in (1, 2))
    assert two == pytest.approx(one, rel=1e-3)
    assert one[0] != one[-1]
