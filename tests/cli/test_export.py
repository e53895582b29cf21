"""`mmattn export`: a run's model in a folder of its own, or one clear line. Sharded runs: `tests/recipes`."""

from __future__ import annotations

import json
import shutil

import pytest

from mmattn.cli.main import main
from mmattn.training import train
from mmattn.training.checkpoint import MANIFEST
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
    shutil.rmtree(pieces / "model")
    manifest = json.loads((pieces / MANIFEST).read_text())
    manifest["files"] = {name: entry for name, entry in manifest["files"].items() if not name.startswith("model/")}
    (pieces / MANIFEST).write_text(json.dumps(manifest))
    before = sorted(path.name for path in tmp_path.iterdir())
    fails(tmp_path / "nothing", tmp_path / "model", "no checkpoint here: give the output_dir of a run")
    fails(tmp_path / "empty", tmp_path / "model", "no checkpoint here")
    fails(tmp_path / "empty-run", tmp_path / "model", "holds no complete checkpoint to export")
    fails(damaged, tmp_path / "model", "is not a complete checkpoint: model/model.safetensors has 1 bytes")
    fails(run, tmp_path / "empty", "exists: nothing was written, choose another folder")
    fails(run, tmp_path / "no/model", "the folder " + str(tmp_path / "no") + " does not exist; make it first")
    fails(pieces, tmp_path / "model", "no recipe wrote it")


def _bytes(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}
