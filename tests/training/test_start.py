"""Where a run may start, and what is said when it may not."""

from __future__ import annotations

import errno
import functools
import json
import math
import os
import re

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn

from mmattn.errors import CheckpointError, ConfigError, OptionalPackageError, UsageError
from mmattn.training import TrainingConfig, read_metrics, train
from mmattn.training.lock import OutputLock
from tests.training.layered_toy import LayeredTask
from tests.training.pieces import run_in_child
from tests.training.toy import RaggedTask, ToyTask, toy_config


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished")
    train(
        ToyTask(), toy_config(folder, max_steps=6, save_every=3), resolved_config={"recipe": "toy"}, command="mmattn x"
    )
    return folder


def refuse(message, config, task=None, kind=UsageError, **options):
    with pytest.raises(kind, match=message) as caught:
        train(task or ToyTask(), config, **options)
    assert caught.value.exit_code == 2
    assert "\n" not in str(caught.value)


def test_a_folder_with_a_run_is_left_alone(finished):
    before = sorted(finished.rglob("*"))
    refuse(
        r"output_dir .* already holds a run \(step-00000006\): continue it with --resume, or choose another",
        toy_config(finished),
    )
    assert sorted(finished.rglob("*")) == before


def test_other_files_are_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    refuse("is not empty: choose another output_dir, or move its files away", toy_config(tmp_path))
    refuse("output_dir .*thesis.tex is a file", toy_config(tmp_path / "thesis.tex"))
    assert (tmp_path / "thesis.tex").read_text() == "x"


def test_resume_needs_a_checkpoint(tmp_path, finished):
    refuse(
        "nothing to resume: .* holds no complete checkpoint; start without --resume", toy_config(tmp_path), resume=True
    )
    refuse("is no complete checkpoint and no folder of a run", toy_config(tmp_path), resume=tmp_path / "absent")


def stands(model):
    """What a run could leave behind, hooks and parameters included."""
    own = [vars(module) for module in model.modules()]
    return [{name: dict(value) if isinstance(value, dict) else value for name, value in of.items()} for of in own]


def test_a_refused_start_leaves_the_model_as_it_was(tmp_path):
    task = LayeredTask()
    before = stands(task.model)
    config = toy_config(tmp_path, mixed_precision="bf16", activation_checkpointing=True)
    refuse("nothing to resume", config, task, resume=True)
    assert stands(task.model) == before


def test_a_model_that_cannot_be_prepared_is_left_as_it_was(tmp_path):
    config = toy_config(tmp_path, torch_compile=True, activation_checkpointing=True)
    task = LayeredTask()
    task.model.requires_grad_(False)
    before = stands(task.model)
    refuse("nothing to train", config, task)
    assert stands(task.model) == before
    task = LayeredTask()
    task.model.layers[1].norm = nn.BatchNorm1d(3)
    before = stands(task.model)
    refuse("layers.1 has a batch norm", config, task)
    assert stands(task.model) == before


def test_a_forward_of_the_models_own_computes_as_before(tmp_path):
    task = LayeredTask()
    task.model.forward = own = functools.partial(type(task.model).forward, task.model)
    train(task, toy_config(tmp_path, max_steps=2, mixed_precision="bf16"))
    assert vars(task.model)["forward"] is own
    assert not {"_original_forward", "_is_accelerate_prepared"} & vars(task.model).keys()


def test_a_damaged_checkpoint_is_named(tmp_path, capsys):
    train(ToyTask(), toy_config(tmp_path, max_steps=6, save_every=3))
    (tmp_path / "checkpoints/step-00000006/state.json").write_text("{}")
    result = train(ToyTask(), toy_config(tmp_path, max_steps=6, save_every=3), resume=True)
    assert len(result.losses) == 3
    assert "step-00000006: state.json has 2 bytes instead of" in capsys.readouterr().err
    for folder in tmp_path.glob("checkpoints/step-*"):
        (folder / "manifest.json").unlink(missing_ok=True)
    refuse(r"no complete checkpoint \(damaged: .*it has no manifest.json", toy_config(tmp_path), resume=True)


def test_a_run_without_a_checkpoint_is_started_again(tmp_path, capsys):
    (tmp_path / "checkpoints/.tmp-step-00000003").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n{"kind"')
    train(ToyTask(), toy_config(tmp_path, max_steps=2))
    assert "ended before its first checkpoint: it is started again" in capsys.readouterr().err
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_lines_of_a_run_without_a_checkpoint_are_not_those_of_another(finished, tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\n')
    train(ToyTask(), toy_config(tmp_path, max_steps=7), resume=finished)
    assert [line["step"] for line in read_metrics(tmp_path / "metrics.jsonl")] == [7]


def test_changed_mathematics_is_refused_in_place_and_said_elsewhere(finished, tmp_path, capsys):
    refuse(
        r"cannot resume .* with other settings \(learning_rate: 0.05 -> 0.1; seed: 0 -> 4\): restore them, or",
        toy_config(finished, learning_rate=0.1, seed=4),
        resume=True,
    )
    refuse(r"\(num_examples: 23 -> 29\)", toy_config(finished), ToyTask(num_examples=29), resume=True)
    result = train(ToyTask(), toy_config(tmp_path, learning_rate=0.1, max_steps=8), resume=finished)
    assert (result.step, len(result.losses)) == (8, 2)
    said = capsys.readouterr().err
    assert "differs from the checkpoint: learning_rate: 0.05 -> 0.1" in said
    assert "a new run from" in said


def test_another_dtype_or_arithmetic_is_refused_in_place_and_said_elsewhere(finished, tmp_path, capsys):
    refuse("; dtype: float32 -> float64", toy_config(finished), ToyTask(dtype=torch.float64), resume=True)
    config = toy_config(tmp_path, max_steps=7, mixed_precision="bf16")
    result = train(ToyTask(dtype=torch.float64), config, resume=finished)
    assert math.isfinite(*result.losses)
    said = capsys.readouterr().err
    assert "differs from the checkpoint: dtype: float32 -> float64" in said
    assert "changed, so losses agree to rounding only: arithmetic: no on cpu -> bf16 on cpu" in said


def test_batches_by_tokens_that_change_are_refused(tmp_path, capsys):
    options = {"batch_tokens": 20, "max_steps": 4}
    train(RaggedTask(), toy_config(tmp_path, **options))
    said = capsys.readouterr().err
    assert "precision no, batches of up to 20 tokens\n" in said
    assert re.search(r"batches by tokens: \d+ batches an epoch, \d\d% of the slots hold tokens; batch_size is", said)
    for other in (21, None):
        config = toy_config(tmp_path, **{**options, "batch_tokens": other})
        refuse(rf"\(batch_tokens: 20 -> {other}", config, RaggedTask(), resume=True)
    task = RaggedTask()
    task.lengths[3] += 1
    refuse(r"\(lengths_checksum: \w+ -> \w+\)", toy_config(tmp_path, **options), task, resume=True)
    options = {**options, "batch_size": 999, "micro_batch_tokens": 8, "max_steps": 5}
    assert train(RaggedTask(), toy_config(tmp_path, **options), resume=True).step == 5
    said = capsys.readouterr().err
    assert "losses agree to rounding only: micro_batch_tokens: None -> 8" in said
    assert "batches of up to 20 tokens in micro-batches of up to 8\n" in said


def test_examples_and_tokens_are_not_mixed():
    refuse_settings = [
        ({"batch_tokens": 0}, "batch_tokens must be at least 1 or null, not 0"),
        ({"batch_tokens": 9, "micro_batch_tokens": 0}, "micro_batch_tokens must be at least 1 or null, not 0"),
        ({"micro_batch_tokens": 8}, "micro_batch_tokens needs batch_tokens: set it, or use micro_batch_size"),
        (
            {"batch_tokens": 9, "micro_batch_size": 2},
            "micro_batch_size counts examples, and batch_tokens is set: use micro_batch_tokens",
        ),
    ]
    for changes, message in refuse_settings:
        with pytest.raises(ConfigError, match=message):
            toy_config("x", **changes).validate()


def test_changed_frozen_weights_are_refused(finished):
    task = ToyTask()
    task.model.frozen_proj.weight.data[0, 0] += 1
    refuse("with other settings .*frozen_checksum", toy_config(finished), task, resume=True)


def test_another_choice_of_what_to_train_is_refused(finished, tmp_path):
    task = ToyTask()
    task.model.frozen_proj.requires_grad_(True)
    refuse(
        r"another choice of what to train: missing \['frozen_proj.bias', 'frozen_proj.weight'\]",
        toy_config(tmp_path),
        task,
        CheckpointError,
        resume=finished,
    )


def test_an_older_checkpoint_of_the_same_run_is_refused(finished):
    refuse(
        "is older than step-00000006 of the same run: to start again from it, choose another output_dir",
        toy_config(finished),
        resume=finished / "checkpoints/step-00000003",
    )
    refuse("is at step 6, beyond max_steps 4", toy_config(finished, max_steps=4), resume=True)


def test_a_finished_run_resumed_does_nothing(finished):
    before = load_file(finished / "final/model.safetensors")
    result = train(ToyTask(), toy_config(finished, max_steps=6), resume=True)
    assert (result.step, result.losses) == (6, [])
    assert before.keys() == load_file(finished / "final/model.safetensors").keys()


def test_what_stands_beside_a_checkpoint(finished):
    folder = finished / "checkpoints/step-00000006"
    assert sorted(path.name for path in folder.iterdir()) == [
        "config.yaml",
        "manifest.json",
        "model",
        "optimizer.safetensors",
        "run.json",
        "state.json",
        "trained.safetensors",
    ]
    run = json.loads((folder / "run.json").read_text())
    assert run["command"] == "mmattn x"
    assert {"python", "torch", "accelerate"} <= run["versions"].keys()
    assert run["training"]["max_steps"] == 6
    assert yaml.safe_load((folder / "config.yaml").read_text()) == {"recipe": "toy"}
    assert "frozen_proj.weight" not in load_file(folder / "trained.safetensors")
    assert "batch_norm.running_mean" in load_file(folder / "trained.safetensors")


def test_a_path_may_be_the_output_dir(tmp_path):
    assert train(ToyTask(), TrainingConfig(tmp_path / "run", max_steps=1, device="cpu")).output_dir == tmp_path / "run"
    assert train(ToyTask(), TrainingConfig(str(tmp_path / "run"), max_steps=1, device="cpu"), resume=True).step == 1


def test_one_run_at_a_time(tmp_path):
    with OutputLock(tmp_path, enabled=True) as lock:
        lock.check()

        def intrude():
            refuse("another run is writing into .*: choose another output_dir", toy_config(tmp_path))

        assert run_in_child(intrude) == 0
    train(ToyTask(), toy_config(tmp_path, max_steps=1))


def test_an_output_dir_that_cannot_be_written_or_locked(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    refuse("output_dir .*run cannot be written .Not a directory.: mend that, or", toy_config(tmp_path / "file" / "run"))

    def lockf(*_):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.lockf", lockf)
    train(ToyTask(), toy_config(tmp_path / "run", max_steps=1))
    assert "run cannot be locked (Function not implemented): let no other run write there" in caplog.text


def test_settings_that_cannot_be_used_are_all_named():
    config = TrainingConfig(
        "", 0, schedule="linear", betas=(0.9, 1.0), trackers=["mlflow"], learning_rate=float("nan"), seed=2**63
    )
    with pytest.raises(ConfigError) as caught:
        config.validate()
    for part in (
        "output_dir is empty",
        "max_steps must be at least 1, not 0",
        "schedule must be one of cosine, constant, not 'linear'",
        "betas must be two numbers in [0, 1), not (0.9, 1.0)",
        "trackers must be one of tensorboard, wandb, trackio, not 'mlflow'",
        "learning_rate must be positive, not nan",
        "seed must be below 2**63, is 9223372036854775808",
    ):
        assert re.search(re.escape(part), str(caught.value))


def test_precision_and_trackers_that_are_not_here(tmp_path):
    refuse("fp16 needs a CUDA device, this run is on cpu", toy_config(tmp_path, mixed_precision="fp16"))
    refuse(
        r"training.trackers=trackio needs the package trackio, which is not installed: pip install trackio",
        toy_config(tmp_path, trackers=["trackio"]),
        kind=OptionalPackageError,
    )


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"MMATTN_PROCESSES": "3"}, r"3 processes were asked for \(MMATTN_PROCESSES\), but 1 have joined this run"),
        ({"WORLD_SIZE": "2"}, r"2 processes were launched, but each would train alone \(1 process\)"),
        (
            {"ACCELERATE_MIXED_PRECISION": "no", "MASTER_ADDR": "127.0.0.1"},
            "accelerate was asked for several processes and started one, as it does with --cpu: launch with",
        ),
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "the launcher asks for mixed precision fp8: use bf16, fp16 or no"),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, "fp16 needs a CUDA device, this run is on cpu"),
    ],
)
def test_a_launcher_that_gave_something_else_is_refused(tmp_path, environment, message):
    def begin():
        os.environ.update(environment)
        refuse(message, toy_config(tmp_path / "run"))

    assert run_in_child(begin) == 0  # Accelerate reads the environment once in a process
    assert not (tmp_path / "run").exists()


def test_two_precisions_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    message = "the launcher asks for mixed precision fp16, training.mixed_precision for bf16"
    refuse(message, toy_config(tmp_path, mixed_precision="bf16"))
