"""The mean of checkpoints: of any folders, and of a run's last ones."""

from __future__ import annotations

import functools
import json
import signal

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmattn.errors import CheckpointError, ConfigError, UsageError
from mmattn.training import average_checkpoints, read_metrics, train
from mmattn.training.checkpoint import MANIFEST
from mmattn.training.state import TRAINED_FILE
from tests.training.pieces import KilledTask, run_in_child, run_piece, timeless_lines
from tests.training.test_loop import ScriptedTask
from tests.training.toy import ToyTask, toy_config


def make_tensors(seed, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": torch.randn(3, 5, generator=generator).to(dtype),
        "wide": torch.randn(7, generator=generator, dtype=torch.float64),
        "ids": torch.arange(11),
        "norm.num_batches_tracked": torch.tensor(seed),
    }


def make_folder(path, seed, **changes):
    (path / "unet").mkdir(parents=True)
    tensors = {**make_tensors(seed), **changes}
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path / "model.safetensors")
    metadata = {"format": "pt"}
    save_file({"half": torch.full((2,), float(seed), dtype=torch.bfloat16)}, path / "unet/a.safetensors", metadata)
    (path / "config.json").write_text(json.dumps({"seed": seed}))
    return path


def test_folders_average_by_hand(tmp_path):
    folders = [make_folder(tmp_path / str(seed), seed) for seed in (1, 2, 4)]
    target = average_checkpoints(folders, tmp_path / "mean")
    found, parts = load_file(target / "model.safetensors"), [make_tensors(seed) for seed in (1, 2, 4)]
    for name in ("weight", "wide"):
        expected = (sum(part[name].double() for part in parts) / 3).to(parts[0][name].dtype)
        assert torch.equal(found[name], expected)
    assert torch.equal(found["ids"], torch.arange(11))
    assert found["norm.num_batches_tracked"] == 4
    half = load_file(target / "unet/a.safetensors")["half"]
    assert half.dtype == torch.bfloat16
    assert half.tolist() == [torch.tensor(7 / 3).bfloat16()] * 2
    with safe_open(target / "unet/a.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}  # transformers refuses files without
    assert json.loads((target / "config.json").read_text()) == {"seed": 4}


def test_files_average_too(tmp_path):
    files = [make_folder(tmp_path / str(seed), seed) / "model.safetensors" for seed in (1, 3)]
    found = load_file(average_checkpoints(files, tmp_path / "mean.safetensors"))
    torch.testing.assert_close(found["weight"], (make_tensors(1)["weight"] + make_tensors(3)["weight"]) / 2)


def test_many_small_steps_are_not_lost(tmp_path):
    """Summed in bfloat16, the ones after 256 would be."""
    paths = []
    for number in range(300):
        paths.append(tmp_path / f"{number}.safetensors")
        save_file({"x": torch.tensor([1.0 + number % 2], dtype=torch.bfloat16)}, paths[-1])
    assert load_file(average_checkpoints(paths, tmp_path / "mean.safetensors"))["x"].item() == 1.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"ids": torch.arange(11) + 1},
            r"0/model\.\w+ with .*1/model\.\w+: ids \(torch.int64\) is no floating.*differs",
        ),
        ({"weight": torch.zeros(5, 3)}, r"of another form \['weight F32 \(5, 3\) instead of F32 \(3, 5\)'\]"),
        ({"weight": torch.zeros(3, 5).half()}, r"\['weight F16 \(3, 5\) instead of F32 \(3, 5\)'\]"),
        ({"weight": None}, r"missing \['weight'\], unexpected \[\]"),
        ({"more": torch.zeros(1)}, r"missing \[\], unexpected \['more'\]"),
    ],
)
def test_what_differs_is_named(tmp_path, changes, message):
    folders = [make_folder(tmp_path / "0", 1), make_folder(tmp_path / "1", 2, **changes)]
    with pytest.raises(CheckpointError, match=message) as caught:
        average_checkpoints(folders, tmp_path / "mean")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "mean").exists()


def test_sources_that_cannot_be_averaged(tmp_path):
    folder = make_folder(tmp_path / "0", 1)

    def refuse(message, sources, target=tmp_path / "mean"):
        with pytest.raises(UsageError, match=message):
            average_checkpoints(sources, target)
        assert not (tmp_path / "mean").exists()

    refuse("nothing to average", [])
    refuse("cannot average folders with files", [folder, folder / "model.safetensors"])
    refuse("0 exists: choose another target", [folder], folder)
    refuse(r"cannot average .*absent: there is no such folder or file", [tmp_path / "absent"])
    refuse(r"config\.json: it is no folder and no \.safetensors file", [folder / "config.json"])
    (tmp_path / "empty").mkdir()
    refuse(r"cannot average .*empty: it holds no \.safetensors file", [folder, tmp_path / "empty"])
    other = make_folder(tmp_path / "other", 2)
    (other / "unet/a.safetensors").rename(other / "b.safetensors")
    refuse(r"their weights lie in other files, \['b.safetensors', 'model.safetensors'\] and", [folder, other])
    (other / "pytorch_model.bin").write_bytes(b"")
    refuse(r"other: pytorch_model\.bin may hold weights, and only \.safetensors are averaged", [folder, other])
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"no tensors")
    refuse(r"cannot average .*damaged\.safetensors: ", [damaged])


OPTIONS = {"average_last": 3, "keep_last": 3, "eval_every": 10}


@pytest.fixture(scope="module")
def averaged(tmp_path_factory):
    folder = tmp_path_factory.mktemp("averaged")
    task = ToyTask()
    return folder, task, train(task, toy_config(folder, **OPTIONS))


def test_final_is_the_average_and_the_model_keeps_its_own(averaged, tmp_path):
    folder, task, _ = averaged
    checkpoints = [folder / f"checkpoints/step-{step:08d}" for step in (10, 15, 20)]
    final = load_file(folder / "final/model.safetensors")
    by_hand = load_file(average_checkpoints(checkpoints, tmp_path / "mean") / "model.safetensors")
    parts = [load_file(checkpoint / "model/model.safetensors") for checkpoint in checkpoints]
    assert final.keys() == by_hand.keys() == parts[0].keys()
    for name, tensor in final.items():
        assert torch.equal(tensor, by_hand[name])
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, sum(part[name] for part in parts) / 3)
    assert not torch.equal(final["head.weight"], parts[-1]["head.weight"])
    assert torch.equal(final["frozen_proj.weight"], parts[-1]["frozen_proj.weight"])
    assert all(torch.equal(value, parts[-1][name]) for name, value in task.model.state_dict().items())
    assert task.model.training


def test_the_average_is_evaluated_and_said(averaged, capsys, tmp_path):
    folder, _, result = averaged
    (line,) = read_metrics(folder / "metrics.jsonl", kind="final")
    assert (line["step"], line["averaged_steps"]) == (20, [10, 15, 20])
    task = ToyTask()
    task.model.load_state_dict(load_file(folder / "final/model.safetensors"))
    task.model.eval()
    with torch.no_grad():
        assert line["metrics"]["loss"] == pytest.approx(task.evaluate(task.model)["loss"], rel=1e-6)
    assert result.metrics == line["metrics"]
    train(ToyTask(), toy_config(tmp_path, **OPTIONS))
    said = capsys.readouterr().err
    assert "final/ will hold the average of the checkpoints of steps 10, 15, 20\n" in said
    assert f"holds the average of the checkpoints of steps 10, 15, 20 | loss {result.metrics['loss']:.4f}" in said


def test_without_evaluations_there_is_none_of_the_average(tmp_path):
    result = train(ToyTask(), toy_config(tmp_path, **{**OPTIONS, "eval_every": 0}))
    (line,) = read_metrics(tmp_path / "metrics.jsonl", kind="final")
    assert (line["metrics"], line["is_best"], result.metrics, result.best) == ({}, False, {}, None)


@pytest.mark.parametrize(("score", "best"), [(0.9, "final"), (0.5, "checkpoints/step-00000004/model")])
def test_the_average_may_be_the_best(tmp_path, score, best):
    task = ScriptedTask([0.1, 0.7, 0.2, score])
    result = train(task, toy_config(tmp_path, max_steps=6, eval_every=2, save_every=2, average_last=2))
    assert result.best == {"step": 6 if best == "final" else 4, "value": max(score, 0.7), "metric": "score"}
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("best", best))
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    state = json.loads((tmp_path / "checkpoints/step-00000006/state.json").read_text())
    assert (state["best_step"], state["best_value"]) == (4, 0.7)  # the average is no part of the training


def test_pieces_average_what_an_unbroken_run_does(tmp_path, averaged):
    task = KilledTask(9, signal.SIGTERM)  # saves step 9 too, which is not averaged
    assert run_in_child(functools.partial(run_piece, tmp_path, resume=False, task=task, **OPTIONS)) == 143
    assert run_in_child(functools.partial(run_piece, tmp_path, resume=True, task=KilledTask(8), **OPTIONS)) < 0
    run_piece(tmp_path, resume=True, **OPTIONS)
    for _ in range(2):
        assert timeless_lines(tmp_path) == timeless_lines(averaged[0])
        ours, theirs = (load_file(folder / "final/model.safetensors") for folder in (tmp_path, averaged[0]))
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
        run_piece(tmp_path, resume=True, **OPTIONS)  # once more, of a finished run


def test_max_steps_may_grow_after_an_average(tmp_path):
    options = {**OPTIONS, "schedule": "constant"}
    train(ToyTask(), toy_config(tmp_path / "grown", **options))
    train(ToyTask(), toy_config(tmp_path / "long", **options, max_steps=30))
    train(ToyTask(), toy_config(tmp_path / "grown", **options, max_steps=30), resume=True)
    assert timeless_lines(tmp_path / "grown") == timeless_lines(tmp_path / "long")
    assert read_metrics(tmp_path / "long/metrics.jsonl", kind="final")[0]["averaged_steps"] == [20, 25, 30]


def test_those_to_be_averaged_stay_whatever_else_is_saved(tmp_path):
    task = ScriptedTask([step / 100 for step in range(24)])  # each the best, so saved
    train(task, toy_config(tmp_path, max_steps=23, eval_every=1, save_every=5, keep_last=3, average_last=3))
    kept = sorted(int(path.name[5:]) for path in tmp_path.glob("checkpoints/*"))
    assert kept == [10, 15, 20, 21, 22, 23]


def test_checkpoints_that_are_gone_are_said_before_the_first_step(tmp_path):
    train(ToyTask(), toy_config(tmp_path / "a", keep_last=2))
    with pytest.raises(
        UsageError,
        match=r"^average_last 4 needs the checkpoints of steps 5, 10, 15, 20, but .* has none of 5, 10: "
        r"set average_last to 2 or less, or raise max_steps$",
    ):
        train(ToyTask(), toy_config(tmp_path / "a", keep_last=4, average_last=4), resume=True)
    train(ToyTask(), toy_config(tmp_path / "a", keep_last=4, average_last=2), resume=True)
    (line,) = read_metrics(tmp_path / "a/metrics.jsonl", kind="final")
    assert line["averaged_steps"] == [15, 20]
    config = toy_config(tmp_path / "b", keep_last=2, average_last=2, max_steps=25)
    with pytest.raises(UsageError, match="has none of 20: set average_last to 1 or less"):
        train(ToyTask(), config, resume=tmp_path / "a")
    assert not (tmp_path / "b/checkpoints").exists()


def test_sharded_checkpoints_are_refused_before_any_step(tmp_path):
    train(ToyTask(), toy_config(tmp_path, max_steps=10))
    (tmp_path / "checkpoints/step-00000005" / TRAINED_FILE).unlink()
    manifest = tmp_path / "checkpoints/step-00000005" / MANIFEST
    files = json.loads(manifest.read_text())
    del files["files"][TRAINED_FILE]  # as where every process writes its own rows
    manifest.write_text(json.dumps(files))
    config = toy_config(tmp_path, max_steps=10, average_last=2)
    with pytest.raises(
        UsageError, match="averages whole checkpoints, and .*step-00000005 is sharded: set average_last"
    ):
        train(ToyTask(), config, resume=True)


def test_a_damaged_one_is_not_averaged(tmp_path):
    def damage():
        path = tmp_path / "checkpoints/step-00000015/trained.safetensors"
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(content)
        return path

    class Damaging(ToyTask):
        def evaluate(self, model):
            damage()
            return super().evaluate(model)

    message = (
        r"step-00000015 is not a complete checkpoint: trained\.safetensors has changed since .*, and average_last 2 "
        r"needs it: set average_last to 1 or less and go on with --resume$"
    )
    options = {"keep_last": 4, "average_last": 2}
    with pytest.raises(CheckpointError, match=message):  # after the last step
        train(Damaging(), toy_config(tmp_path, **options, eval_every=20))
    assert not (tmp_path / "final").exists()
    path = damage()  # which repairs it
    assert train(ToyTask(), toy_config(tmp_path, **options), resume=True).losses == []
    damage()
    with pytest.raises(CheckpointError, match=message):  # before the first
        train(ToyTask(), toy_config(tmp_path, **options), resume=True)
    train(ToyTask(), toy_config(tmp_path, keep_last=4, average_last=1), resume=True)
    with pytest.raises(CheckpointError, match="step-00000015 is not a complete checkpoint"):
        average_checkpoints([path.parent, tmp_path / "checkpoints/step-00000020"], tmp_path / "mean")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ema_decay": 0.9}, r"average_last 3 and ema_decay 0\.9 both say what final/ holds: set one of them"),
        ({"save_every": 0}, "average_last 3 averages the checkpoints of every save_every steps: set save_every"),
        ({"keep_last": 2}, "needs that many checkpoints, but keep_last 2 keeps fewer: set keep_last to 3 or more"),
        ({"max_steps": 14}, "needs that many checkpoints, but save_every 5 makes 2 in max_steps 14"),
        ({"average_last": -1}, "average_last must not be negative, is -1"),
    ],
)
def test_settings_that_do_not_go_together(changes, message):
    with pytest.raises(ConfigError, match=message):
        toy_config("x", **{**OPTIONS, **changes}).validate()
