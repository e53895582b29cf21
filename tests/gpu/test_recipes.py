"""The recipes' debug configurations, trained on a card from the command line: bf16, checkpoints, resuming."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from mmattn.cli.main import main
from mmattn.inference.translator import Translator
from mmattn.inference.vlm import VisionLanguageModel
from mmattn.training import read_metrics
from tests.gpu.card import DEVICE, MARKS
from tests.inference.tiny_models import pictures

pytestmark = MARKS
SMALL = {
    "translate/debug": [
        "training.batch_tokens=300",
        "data.size=200",
        "data.eval_size=8",
        "evaluation.max_new_tokens=9",
    ],
    "vlm/debug": ["training.batch_size=8", "data.eval_size=8"],
}


def run(config: str, folder: Path, steps: int, *words: str) -> None:
    settings = [f"training.output_dir={folder}", f"training.max_steps={steps}", "training.schedule=constant"]
    settings += ["training.save_every=2", "training.eval_every=4", *SMALL[config]]
    settings += ["training.device=cpu"] if DEVICE == "cpu" else []
    assert main(["train", config, *settings, *words]) == 0


@pytest.mark.parametrize("config", SMALL)
def test_training_on_the_card_and_resuming(config, tmp_path):
    run(config, tmp_path / "whole", 6)
    run(config, tmp_path / "pieces", 4)
    run(config, tmp_path / "pieces", 6, "--resume")
    whole, pieces = (
        {line["step"]: line["loss"] for line in read_metrics(tmp_path / name / "metrics.jsonl", kind="train")}
        for name in ("whole", "pieces")
    )
    assert list(pieces) == [1, 2, 3, 4, 5, 6]
    # A card adds up in an order of its own from run to run: near, not equal.
    assert list(pieces.values()) == pytest.approx(list(whole.values()), rel=0.02)
    if DEVICE == "cuda":
        line = read_metrics(tmp_path / "pieces" / "metrics.jsonl", kind="train")[0]
        assert line["time"]["peak_memory_bytes"] > 0
    state = json.loads((tmp_path / "pieces/checkpoints/step-00000006/state.json").read_text())
    assert state["step"] == 6
    final = tmp_path / "pieces" / "final"
    if config == "vlm/debug":
        model = VisionLanguageModel.from_pretrained(final, device=DEVICE)
        assert isinstance(model.caption(pictures(1)[0], max_new_tokens=5), str)
    else:
        assert isinstance(Translator.from_pretrained(final, device=DEVICE).translate("the red square"), str)


def test_the_default_is_the_card_in_bf16(tmp_path, capsys):
    if DEVICE == "cpu":
        pytest.skip("no card")
    run("vlm/debug", tmp_path, 2)
    printed = "".join(capsys.readouterr())
    expected = "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "no"
    assert f"on cuda, precision {expected}" in printed
