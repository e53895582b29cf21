"""Which model is published as the best, and what is said where there is none."""

from __future__ import annotations

import math

import pytest

from mmattn.training.checkpoint import CheckpointStore
from mmattn.training.publish import how_to_export, is_better, missing_best, publish_best
from tests.training.toy import ToyTask


def write(folder):
    (folder / "model").mkdir()
    (folder / "model/config.json").write_text(folder.name)


def write_in_pieces(folder):
    (folder / "trained-00000-of-00002.safetensors").write_text("x")


def test_the_best_is_copied_or_it_is_said_where_it_is(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(3, write)
    store.save(5, write_in_pieces)
    assert publish_best(store, 3) == ""
    assert (tmp_path / "best/config.json").exists()
    checkpoint = store.path(5)
    assert publish_best(store, 5) == (
        f"best/ is not of the best step, 5, whose checkpoint is sharded: make a model by mmattn export {checkpoint} "
        "FOLDER"
    )
    assert publish_best(store, 7) == f"best/ is not of the best step, 7: {store.path(7)} has gone"


def test_what_is_said_at_the_end_of_a_sharded_run(tmp_path):
    store = CheckpointStore(tmp_path)
    said = f"the checkpoints are sharded: make a model by mmattn export {tmp_path} FOLDER"
    assert how_to_export(store) == said
    (tmp_path / "final").mkdir()
    assert how_to_export(store) == f"{said}; final/ is of an earlier part of the run"
    (tmp_path / "best").mkdir()
    assert how_to_export(store) == f"{said}; best/ and final/ are of an earlier part of the run"


@pytest.mark.parametrize(
    ("value", "best_value", "expected"),
    [(0.7, None, True), (0.7, 0.9, True), (0.9, 0.7, False), (0.7, 0.7, False), (math.nan, None, False)],
)
def test_better_is_by_the_metric_of_the_task(value, best_value, expected):
    task = ToyTask()
    assert is_better(task, {"loss": value, "other": 0.0}, best_value) is expected
    assert missing_best(task, {"loss": value}, 7) == ""
    assert missing_best(task, {"other": value}, 7).startswith("evaluation gave no 'loss', by which the best is chosen")
    task.best = None
    assert not is_better(task, {"loss": value}, best_value)
    assert missing_best(task, {}, 7) == ""
