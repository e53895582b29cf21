"""`mmattn export`: a run's model in a folder of its own, or one clear line. Sharded runs: `tests/recipes`."""

from __future__ import annotations

import json
import shutil

import pytest

from mmattn.cli.main import main
from mmattn.errors import CheckpointError
from mmattn.inference.trained import run_part, trained_model
from mmattn.training import train
from mmattn.training.checkpoint import MANIFEST, _complete
from mmattn.training.export import exported_part
from tests.training.toy import ToyTask, toy_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "run"
    train(ToyTask(), toy_config(folder, eval_every=5, max_steps=10))
    return folder


def test_a_run_is_its_best_model(run, tmp_path, capsys):
    assert main(["export", str(run), str(tmp_path / "model")]) == 0
    assert capsys.readouterr().out == f"{run / 'best'} written to {tmp_path / 'model'}\n"
    assert _bytes(tmp_path / "model") == _bytes(run / "best")
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_else_its_last_or_the_newest_checkpoint(run, tmp_path, capsys):
    copied = shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(copied / "best")
    for source, target in ((copied / "final", "last"), (copied / "checkpoints/step-00000010", "newest")):
        assert main(["export", str(copied), str(tmp_path / target)]) == 0
        assert capsys.readouterr().out.startswith(str(source)) or target == "newest"
        assert (tmp_path / target / "model.safetensors").is_file()
        shutil.rmtree(copied / "final", ignore_errors=True)


def test_one_checkpoint(run, tmp_path):
    assert main(["export", str(run / "checkpoints/step-00000005"), str(tmp_path / "model")]) == 0
    assert _bytes(tmp_path / "model") == _bytes(run / "checkpoints/step-00000005/model")


def test_what_cannot_be_exported(run, tmp_path, capsys):
    def fails(source, target, message):
        assert main(["export", str(source), str(target)]) == 2
        assert message in capsys.readouterr().err
        assert sorted(path.name for path in tmp_path.iterdir()) == before

    (tmp_path / "empty").mkdir()
    (tmp_path / "empty-run/checkpoints").mkdir(parents=True)
    damaged = shutil.copytree(run / "checkpoints/step-00000010", tmp_path / "damaged")
    (damaged / "model/model.safetensors").write_bytes(b"x")
    pieces = shutil.copytree(run / "checkpoints/step-00000010", tmp_path / "pieces")
    _shard(pieces)
    before = sorted(path.name for path in tmp_path.iterdir())
    fails(tmp_path / "nothing", tmp_path / "model", "no checkpoint here: give the output_dir of a run")
    fails(tmp_path / "empty", tmp_path / "model", "no checkpoint here")
    fails(tmp_path / "empty-run", tmp_path / "model", "holds no complete checkpoint to export")
    fails(damaged, tmp_path / "model", "is not a complete checkpoint: model/model.safetensors has 1 bytes")
    fails(run, tmp_path / "empty", "exists: nothing was written, choose another folder")
    fails(run, tmp_path / "no/model", "the folder " + str(tmp_path / "no") + " does not exist; make it first")
    fails(pieces, tmp_path / "model", "no recipe wrote it")


@pytest.fixture
def copied(run, tmp_path):
    """A run whose best step is not its last."""
    copied = shutil.copytree(run, tmp_path / "run")
    state = copied / "checkpoints/step-00000010/state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), "best_step": 5}))
    _seal(state.parent)
    return copied


def _shard(checkpoint):
    """As of a sharded one: without a model."""
    shutil.rmtree(checkpoint / "model")
    _seal(checkpoint)


def _seal(checkpoint):
    (checkpoint / MANIFEST).unlink()
    _complete(checkpoint, {})


@pytest.mark.parametrize("sharded", [[10], [5], [5, 10]], ids=["newest", "best", "both"])
def test_models_that_sharded_checkpoints_have_left_behind_are_not_taken(copied, tmp_path, sharded):
    assert exported_part(copied) == copied / "best"
    for step in sharded:
        _shard(copied / f"checkpoints/step-{step:08d}")
    assert exported_part(copied) == copied / "checkpoints/step-00000005"
    message = (
        f"{copied}: its checkpoints are sharded, and best/ and final/ of an earlier part of the run: make a model of "
        f"them by mmattn export {copied} NEW"
    )
    for open_run in (trained_model, run_part):
        with pytest.raises(CheckpointError) as caught:
            open_run(copied)
        assert str(caught.value) == message
    assert run_part(copied / "final") == copied / "final"  # where it is named, it is meant


def test_sharded_checkpoints_alone(copied, tmp_path):
    _shard(copied / "checkpoints/step-00000010")
    for name in ("best", "final"):
        shutil.rmtree(copied / name)
    with pytest.raises(CheckpointError, match=f"run: its checkpoints are sharded: make .* mmattn export {copied} NEW"):
        trained_model(copied)
    assert main(["export", str(copied), str(tmp_path / "model")]) == 0
    assert _bytes(tmp_path / "model") == _bytes(copied / "checkpoints/step-00000005/model")


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
