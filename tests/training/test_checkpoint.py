from __future__ import annotations

import errno
import os
import shutil
import signal

import pytest
from safetensors import SafetensorError

from mmattn.errors import CheckpointError, RunError
from mmattn.training import latest_checkpoint, verify_checkpoint
from mmattn.training.checkpoint import CheckpointStore
from tests.training.pieces import assert_whole, kill_at_call, run_in_child


def write(folder):
    (folder / "weights").write_bytes(b"abc" * 100)
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text("{}")


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path)
    for step in (10, 20, 30):
        store.save(step, write)
    return store


def test_names_and_order(store):
    assert store.steps() == [10, 20, 30]
    assert latest_checkpoint(store.output_dir) == store.path(30)
    assert store.path(30).name == "step-00000030"
    assert latest_checkpoint(store.output_dir / "elsewhere") is None


def damage_cut(folder):
    (folder / "weights").write_bytes(b"abc")


def damage_bit(folder):
    (folder / "weights").write_bytes(b"abd" + b"abc" * 99)


def damage_missing(folder):
    (folder / "model" / "config.json").unlink()


def damage_manifest(folder):
    (folder / "manifest.json").write_text('{"files": {')


def damage_no_manifest(folder):
    (folder / "manifest.json").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damage_cut, "weights has 3 bytes instead of 300"),
        (damage_bit, r"weights has changed since it was written \(SHA-256 differs\)"),
        (damage_missing, "model/config.json is missing"),
        (damage_manifest, "its manifest.json is damaged"),
        (damage_no_manifest, "it has no manifest.json"),
    ],
)
def test_damage_is_found_and_passed_over(store, damage, reason):
    damage(store.path(30))
    with pytest.raises(CheckpointError, match=f"step-00000030 is not a complete checkpoint: {reason}"):
        verify_checkpoint(store.path(30))
    latest, problems = store.latest()
    assert latest == store.path(20)
    assert len(problems) == 1
    store.save(30, write)  # the damaged one steps aside, and is not lost
    assert latest_checkpoint(store.output_dir) == store.path(30)
    assert (store.folder / "step-00000030.damaged").exists()


def test_prune_keeps_the_newest_and_the_best(store):
    store.save(40, write)
    damage_cut(store.path(40))  # not a checkpoint any more, so it does not count as one of those kept
    store.prune(1, {10})
    assert store.steps() == [10, 30]
    assert store.path(40).exists()
    assert not list(store.folder.glob(".tmp-*"))


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def full_disk_of_safetensors(folder):
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


@pytest.mark.parametrize("failing", [full_disk, full_disk_of_safetensors])
def test_a_full_disk_keeps_what_is_there(store, failing):
    with pytest.raises(
        RunError,
        match=r"^cannot save .*step-00000040: the disk is full; the checkpoint of step 30 is kept; make room, then go",
    ):
        store.save(40, failing)
    assert store.steps() == [10, 20, 30]
    assert not list(store.folder.glob(".tmp-*"))


def test_a_disk_that_is_full_at_the_sync(store, monkeypatch):
    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(RunError, match="the disk is full"):
        store.save(40, write)
    with pytest.raises(RunError, match=r"cannot save .*final: the disk is full"):
        store.publish(store.path(30) / "model", "final")
    monkeypatch.undo()
    assert latest_checkpoint(store.output_dir) == store.path(30)
    assert not list(store.output_dir.rglob(".tmp-*"))


def test_publish_replaces(store):
    store.publish(store.path(20), "final")
    final = store.publish(store.path(30) / "model", "final")
    assert [path.name for path in final.iterdir()] == ["config.json"]


def test_links_to_folders_that_were_moved_are_replaced_and_pruned(store, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    store.publish(store.path(20), "best")
    for folder in (store.path(10), store.path(30), store.output_dir / "best"):
        shutil.move(folder, elsewhere / folder.name)
        folder.symlink_to(elsewhere / folder.name)
    assert store.steps() == [10, 20, 30]
    for step in (20, 30):
        store.publish(store.path(step), "best")
    store.save(30, write_otherwise)
    store.prune(1, ())
    assert store.steps() == [30]
    assert store.clean() == 0
    assert sorted(path.name for path in elsewhere.iterdir()) == ["best", "step-00000010", "step-00000030"]


def test_clean_removes_leftovers_only(store):
    for folder in (store.folder / ".tmp-step-00000040", store.output_dir / ".tmp-best"):
        folder.mkdir()
        (folder / "weights").write_text("half")
    assert store.clean() == 2
    assert store.steps() == [10, 20, 30]


def write_otherwise(folder):
    (folder / "weights").write_bytes(b"otherwise")


def test_a_step_that_is_saved_again_replaces_its_checkpoint(store):
    store.save(30, write_otherwise)
    assert_whole(store.output_dir)
    assert (store.path(30) / "weights").read_bytes() == b"otherwise"
    assert sorted(path.name for path in store.folder.iterdir()) == [f"step-000000{step}" for step in (10, 20, 30)]


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("number", [1, 2])
def test_killed_while_a_checkpoint_is_replaced(store, number, after):
    def save_again():
        kill_at_call(["rename"], number, after=after)
        store.save(30, write_otherwise)

    assert run_in_child(save_again) == -signal.SIGKILL
    store.clean()
    assert_whole(store.output_dir)
    assert store.steps() == [10, 20, 30]
    is_new = (number, after) == (2, True)
    assert (store.path(30) / "weights").read_bytes() == (b"otherwise" if is_new else b"abc" * 100)
    assert len(list(store.folder.iterdir())) == 3


def denied(*_, **__):
    raise PermissionError(errno.EACCES, "Permission denied", "step-00000010")


def test_what_cannot_be_deleted_or_renamed_is_said(store, monkeypatch):
    kept = r"the checkpoint of step 30 is kept; look at the disk and its permissions, then go on with --resume$"
    for module, name, left in ((os, "rename", "step-00000010"), (shutil, "rmtree", ".tmp-delete-00000010")):
        monkeypatch.setattr(module, name, denied)
        with pytest.raises(
            RunError, match=rf"^cannot delete .*step-00000010: .*Permission denied: 'step-00000010'; {kept}"
        ):
            store.prune(2, ())
        assert (store.folder / left).exists()
        monkeypatch.undo()
    assert store.steps() == [20, 30]
    monkeypatch.setattr(shutil, "rmtree", denied)
    with pytest.raises(RunError, match=rf"^cannot delete .*\.tmp-delete-00000010: .*; {kept}"):
        store.clean()
    monkeypatch.undo()
    os.rename(store.path(20), store.folder / "step-00000020.replaced")
    monkeypatch.setattr(os, "rename", denied)
    with pytest.raises(RunError, match=rf"^cannot rename .*step-00000020\.replaced: .*; {kept}"):
        store.clean()
    monkeypatch.undo()
    assert store.clean() == 1
    assert store.steps() == [20, 30]
