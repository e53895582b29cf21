"""Each recipe in two real processes, by DDP, FSDP2 and DeepSpeed's ZeRO-3: it trains, saves, resumes, exports, and what
is exported is scored."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from mmattn.cli.main import main
from mmattn.config import load_config, load_recipe
from mmattn.models.translator import open_network
from mmattn.training import loop, read_metrics, zero3
from tests.ranks import Ranks

pytestmark = pytest.mark.slow

QUICK = {
    "translate": ["data.size=200", "evaluation.limit=3", "training.batch_tokens=300"],
    # Batch norm of the debug config's convolutions takes its figures from each process's share.
    "vlm": [
        *["data.size=60", "data.eval_size=4", "training.batch_size=8"],
        *["model.network.image.kind=vit", "model.network.image.patch_size=8"],
    ],
    "diffusion": ["data.size=60", "evaluation.limit=2", "evaluation.num_inference_steps=2", "training.batch_size=8"],
}
STEPS = [
    *["training.learning_rate=1e-3", "training.schedule=constant", "training.ema_decay=0.9", "training.eval_every=4"],
    "training.activation_checkpointing=true",
]
RUNS = {
    "ddp": ["training.sharding=none"],
    "fsdp2": ["training.sharding=fsdp2"],
    "pieces": ["training.sharding=fsdp2", "training.sharded_checkpoints=true"],
}
if find_spec("deepspeed") is not None:
    RUNS["zero3"] = ["training.sharding=zero3"]


def train_and_resume(name: str, folder: str, overrides: list[str]) -> None:
    """Two steps, and two more by a resume."""
    recipe = load_recipe(name)
    for steps in (2, 4):
        words = [f"training.output_dir={folder}", f"training.max_steps={steps}", *QUICK[name], *STEPS, *overrides]
        recipe.train(load_config(recipe.Config, f"{name}/debug", words), resume=steps > 2)


def _in_each_process(name: str, folder: Path) -> None:
    queue_step, kinds = loop.queue_step, set()

    def seen(task, model, *arguments, **options):
        kinds.update("cut" if hasattr(p, "ds_tensor") else type(p).__name__ for p in model.parameters())
        assert torch.distributed.get_world_size() == 2
        return queue_step(task, model, *arguments, **options)

    loop.queue_step = seen
    zero3.KEPT_GATHERED = 0
    for run, overrides in RUNS.items():
        kinds.clear()
        train_and_resume(name, str(folder / run), overrides)
        assert kinds == {{"ddp": "Parameter", "zero3": "cut"}.get(run, "DTensor")}, kinds


def _losses(folder: Path) -> list[float]:
    return [line["loss"] for line in read_metrics(folder / "metrics.jsonl", kind="train")]


@pytest.mark.parametrize("name", ["translate", "vlm", "diffusion"])
def test_two_processes(tmp_path, capsys, name):
    train_and_resume(name, str(tmp_path / "one"), ["training.sharding=none"])
    ended = Ranks(tmp_path / "said", _in_each_process, name, tmp_path, processes=2, ACCELERATE_USE_CPU="true").end(400)
    assert [one.code for one in ended] == [0, 0], [one.err[-3000:] for one in ended]
    assert "sharded by FSDP2 over 2 processes in" in ended[0].err
    one = _losses(tmp_path / "one")
    assert len(one) == 4
    assert one[0] != one[3]
    for run in RUNS:
        losses = _losses(tmp_path / run)
        assert losses[0] == pytest.approx(one[0], rel=1e-6)
        # AdamW's first steps turn rounding of gradients near zero into whole steps of the learning rate.
        assert losses == pytest.approx(one, rel=1e-4)
        _export_and_score(tmp_path / run, tmp_path / f"{run}-model", capsys)
        if name == "translate":  # the vector that decoding starts from stays at zero
            network = open_network(tmp_path / f"{run}-model")
            assert not network.decoder.words[network.config.pad_token_id].any()
    assert main(["eval", str(tmp_path / "pieces")]) == 2
    assert f"mmattn export {tmp_path / 'pieces'} NEW" in capsys.readouterr().err


def _export_and_score(run: Path, target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", str(run), str(target)]) == 0
    assert capsys.readouterr().out.endswith(f"written to {target}\n")
    config = run / "checkpoints/step-00000004/config.yaml"
    assert main(["eval", str(target), "--data", str(config), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    evaluated = read_metrics(run / "metrics.jsonl", kind="eval")
    best = [line for line in evaluated if line["is_best"]]  # none where the config names no metric
    trained = (best or evaluated)[-1]["metrics"]
    common = trained.keys() & scores.keys()
    assert common
    for name in common:
        assert scores[name] == pytest.approx(trained[name], rel=1e-3, abs=1e-3), name
