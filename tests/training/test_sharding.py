"""FSDP2 in two real processes on gloo: what it trains is what one process trains."""

from __future__ import annotations

import shutil
from typing import Any

import pytest
import torch

from mmattn.training import read_metrics
from mmattn.training.export import export_model, exported_part
from tests.training.layered_toy import LayeredTask, launch, run_all
from tests.training.pieces import assert_same, assert_same_files, assert_whole

pytestmark = pytest.mark.slow

FSDP2 = {"sharding": "fsdp2"}
BASE = {"max_steps": 12, "save_every": 4, "eval_every": 6}


def test_two_sharded_processes_train_as_one_process_does(tmp_path):
    settings: dict[str, dict[str, Any]] = {
        "plain": BASE,
        "clipped": {**BASE, "max_grad_norm": 0.05, "micro_batch_size": 1},
        "averaged": {**BASE, "ema_decay": 0.9},
        "skipping": {**BASE, "task": {"bad": [3]}, "micro_batch_size": 1},
        "means": {**BASE, "average_last": 2},
    }
    found = run_all([(tmp_path / f"one-{name}", options) for name, options in settings.items()])
    expected = dict(zip(settings, found, strict=True))
    both = launch([(tmp_path / f"two-{name}", {**options, **FSDP2}) for name, options in settings.items()], 2)
    assert len(both) == 2
    for results in both:
        for name, result in zip(settings, results, strict=True):
            assert result["kinds"] == ["DTensor"], result
            assert result["losses"] == pytest.approx(expected[name]["losses"], rel=1e-9), name
            assert result["metrics"] == pytest.approx(expected[name]["metrics"], rel=1e-9), name
    for name in settings:
        assert_same_files(tmp_path / f"one-{name}", tmp_path / f"two-{name}")
    skipped = read_metrics(tmp_path / "two-skipping/metrics.jsonl", kind="skipped")
    assert skipped
    assert all([example for _, example in line["draws"]] == [3] for line in skipped)


def test_resume_with_another_number_of_processes(tmp_path):
    longer = {**BASE, "max_steps": 18, "ema_decay": 0.9}
    shorter = {**longer, "max_steps": 10, "schedule": "constant"}
    longer["schedule"] = "constant"
    (unbroken, *_) = run_all([(tmp_path / "unbroken", longer), (tmp_path / "to-two", shorter)])
    sharded = {**FSDP2, "sharded_checkpoints": True}
    both = launch(
        [
            (tmp_path / "to-two", {**longer, **FSDP2, "resume": True}),
            (tmp_path / "to-one", {**shorter, **FSDP2}),
            (tmp_path / "pieces-to-one", {**shorter, **sharded}),
            (tmp_path / "pieces", {**shorter, **sharded}),
            (tmp_path / "pieces", {**longer, **sharded, "resume": True}),
        ],
        2,
    )
    to_one, pieces = run_all([(tmp_path / name, {**longer, "resume": True}) for name in ("to-one", "pieces-to-one")])
    for result in (both[0][0], both[1][0], both[0][4], to_one, pieces):
        assert result["losses"] == pytest.approx(unbroken["losses"][10:], rel=1e-9)
        assert result["metrics"] == pytest.approx(unbroken["metrics"], rel=1e-9)
    for name in ("to-two", "to-one", "pieces-to-one"):
        assert_same(tmp_path / "unbroken/final/model.safetensors", tmp_path / name / "final/model.safetensors")
    assert not (tmp_path / "pieces/final").exists()
    (newest,) = (tmp_path / "pieces/checkpoints").glob("step-00000018")
    assert_whole(tmp_path / "pieces")
    assert sorted(path.name for path in newest.glob("*.safetensors")) == [
        f"{kind}-{part:05d}-of-00002.safetensors" for kind in ("average", "optimizer", "trained") for part in (0, 1)
    ]
    export_model(exported_part(newest), tmp_path / "exported", LayeredTask)
    assert_same(tmp_path / "unbroken/final/model.safetensors", tmp_path / "exported/model.safetensors")


def test_dropout_and_batch_norm_are_those_of_ddp(tmp_path):
    """Each process draws and norms its own share, in both."""
    options = {**BASE, "task": {"dropout_p": 0.3, "has_batch_norm": True, "bad": [3]}, "micro_batch_size": 1}
    ddp, sharded = launch([(tmp_path / "ddp", options), (tmp_path / "sharded", {**options, **FSDP2})], 2)[0]
    assert sharded["losses"] == pytest.approx(ddp["losses"], rel=1e-9)
    assert sharded["metrics"] == pytest.approx(ddp["metrics"], rel=1e-9)
    assert_same_files(tmp_path / "ddp", tmp_path / "sharded")


def test_killed_inside_a_sharded_save(tmp_path):
    """While a process writes its part, after it has, and while the main process completes the checkpoint."""
    options = {**BASE, **FSDP2, "sharded_checkpoints": True, "eval_every": 0}
    (unbroken,) = run_all([(tmp_path / "unbroken", BASE | {"eval_every": 0})])
    launch([(tmp_path / "base", {**options, "max_steps": 4})], 2)
    again = []
    for rank, number in ((0, 1), (1, 2), (0, 5)):
        folder = shutil.copytree(tmp_path / "base", tmp_path / f"{rank}-{number}")
        again.append((folder, {**options, "resume": True}))
        killing = {**options, "resume": True, "kill_at_fsync": [rank, number]}
        ((left,),) = launch([(folder, killing)], 2, killed=rank)
        assert "lost another of the 2 processes after step" in left["error"]
        assert_whole(folder)
        assert [path.name for path in (folder / "checkpoints").glob("step-*")] == ["step-00000004"]
    for (folder, _), resumed in zip(again, launch(again, 2)[0], strict=True):
        assert resumed["losses"] == pytest.approx(unbroken["losses"][4:], rel=1e-9)
        assert_whole(folder)
        assert not list((folder / "checkpoints").glob(".tmp-*"))


def test_a_full_disk_at_the_end_of_a_sharded_save_is_said_by_both(tmp_path):
    """When the main process alone writes, after all have written their part."""
    options = {**BASE, **FSDP2, "sharded_checkpoints": True}
    runs = [(tmp_path / "run", {**options, "full_at_step": 8}), (tmp_path / "run", {**options, "resume": True})]
    both = launch(runs, 2)
    for failed, resumed in both:
        assert failed["error"] == (
            f"cannot save {tmp_path}/run/checkpoints/step-00000008: the disk is full; the checkpoint of step 6 is kept;"
            " make room, then go on with --resume"
        )
        assert len(resumed["losses"]) == 6
    assert_whole(tmp_path / "run")


def test_a_finished_run_goes_on_with_whole_checkpoints(tmp_path):
    """Published is what the last step's sharded checkpoint holds, which becomes a whole one."""
    options = {**BASE, "ema_decay": 0.9}
    sharded = {**options, **FSDP2, "sharded_checkpoints": True}
    run_all([(tmp_path / "plain", options)])
    again = [(tmp_path / "by-two", {**options, **FSDP2, "resume": True})]
    launch([(tmp_path / name, sharded) for name in ("by-one", "by-two")] + again, 2)
    assert exported_part(tmp_path / "by-one").parent.name == "checkpoints"
    run_all([(tmp_path / "by-one", {**options, "resume": True})])
    for name in ("by-one", "by-two"):
        assert_same_files(tmp_path / "plain", tmp_path / name)
        assert exported_part(tmp_path / name) == tmp_path / name / "best"
        assert not list((tmp_path / name / "checkpoints").glob("*.replaced"))


def test_models_published_before_checkpoints_were_sharded_are_not_exported(tmp_path):
    options = {**BASE, **FSDP2, "schedule": "constant"}
    longer = {**options, "max_steps": 18, "sharded_checkpoints": True, "resume": True}
    first, second = launch([(tmp_path / "run", options), (tmp_path / "run", longer)], 2)[0]
    assert first["metrics"]["loss"] > second["metrics"]["loss"]
    part = exported_part(tmp_path / "run")
    assert part == tmp_path / "run/checkpoints/step-00000018"
    task = LayeredTask()
    export_model(part, tmp_path / "model", lambda: task)
    with torch.no_grad():
        assert task.evaluate(task.model) == pytest.approx(second["metrics"], rel=1e-9)


def test_bf16_keeps_weights_in_float32_and_what_goes_around_is_refused(tmp_path):
    options = {**BASE, "mixed_precision": "bf16", "task": {"dtype": "float32"}}
    around = {**BASE, "task": {"kind": "GoesAround"}}
    runs = [
        (tmp_path / "ddp", options),
        (tmp_path / "sharded", {**options, **FSDP2}),
        (tmp_path / "around-ddp", around),
        (tmp_path / "around", {**around, **FSDP2}),
    ]
    both = launch(runs, 2)
    for ddp, sharded, around_ddp, _ in both:
        assert sharded["dtypes"] == ["torch.float32"]
        assert sharded["losses"] == pytest.approx(ddp["losses"], rel=1e-6)
        assert "GoesAround.loss has to call the model that it receives" in around_ddp["error"]
    assert "GoesAround.loss has to call the model that it receives" in both[0][3]["error"]  # the other waits for it


def test_accelerate_shards_alike(tmp_path):
    """The way that a GPU takes: model and optimiser through Accelerate, told here that it may shard on a CPU."""
    options = {**BASE, **FSDP2, "ema_decay": 0.9, "max_grad_norm": 0.05}
    (one,) = run_all([(tmp_path / "one", {**options, "sharding": "none"})])
    sharded = {**options, "through_accelerate": True}
    # Twice in one process: Accelerate keeps for its life how the processes have joined.
    for folder, result in zip(
        ("two", "again"), launch([(tmp_path / "two", sharded), (tmp_path / "again", sharded)], 2)[1], strict=True
    ):
        assert result["kinds"] == ["DTensor"]
        assert result["losses"] == pytest.approx(one["losses"], rel=1e-9)
        assert_same_files(tmp_path / "one", tmp_path / folder)


def test_the_launcher_is_asked(tmp_path):
    """`auto` shards as `accelerate launch` says, and what it says otherwise is refused."""
    accelerate = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
    options = {**BASE, "max_steps": 2}
    runs = [(tmp_path / "auto", options), (tmp_path / "none", {**options, "sharding": "none"})]
    for auto, none in launch(runs, 2, **accelerate, FSDP_TRANSFORMER_CLS_TO_WRAP="ToyLayer"):
        assert auto["kinds"] == ["DTensor"]
        assert "the launcher asks for FSDP and training.sharding is none" in none["error"]
    for (result,) in launch(runs[:1], 2, **accelerate, FSDP_TRANSFORMER_CLS_TO_WRAP="Toylayer"):
        assert "fsdp_transformer_layer_cls_to_wrap names Toylayer, of which LayeredModel has none" in result["error"]
