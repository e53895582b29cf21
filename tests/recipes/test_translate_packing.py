"""The translation recipe's packed batches."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import recipes.translate as recipe
from mmattn.config.load import load_config
from mmattn.errors import ConfigError


def _config(folder: Path, *overrides: str) -> recipe.Config:
    settings = [
        f"training.output_dir={folder}",
        "training.max_steps=3",
        "training.eval_every=0",
        "training.save_every=0",
        "data.size=90",
        "data.eval_size=4",
        "examples.guided_alignment_weight=0",
    ]
    return load_config(recipe.Config, Path("configs/translate/debug.yaml"), [*settings, *overrides])


def test_auto_packs_but_for_guided_alignment(tmp_path: Path):
    batch = recipe.TranslateTask(_config(tmp_path)).collate([(0, 0), (0, 1)])
    assert batch["source_ids"].dim() == 1
    guided = recipe.TranslateTask(_config(tmp_path, "examples.guided_alignment_weight=0.1"))
    assert guided.collate([(0, 0), (0, 1)])["source_ids"].dim() == 2
    with pytest.raises(ConfigError, match=r"examples.packing=true: guided alignment reads padded batches"):
        _config(tmp_path, "examples.guided_alignment_weight=0.1", "examples.packing=true")
    with pytest.raises(ConfigError, match="examples.packing must be true, false or auto, not 'maybe'"):
        _config(tmp_path, "examples.packing=maybe")


def test_a_packed_run_is_a_padded_run_but_for_rounding(tmp_path: Path):
    losses = [
        recipe.train(_config(tmp_path / packing, f"examples.packing={packing}", "examples.label_smoothing=0.1")).losses
        for packing in ("true", "false")
    ]
    torch.testing.assert_close(torch.tensor(losses[0]), torch.tensor(losses[1]), rtol=1e-5, atol=1e-5)
