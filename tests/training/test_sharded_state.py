"""What is said when a sharded checkpoint cannot be written; with processes: `test_sharding.py`."""

from __future__ import annotations

import errno
import types

import pytest
import torch

from mmattn.errors import RunError
from mmattn.training.checkpoint import CheckpointStore
from mmattn.training.sharded_state import save_sharded
from mmattn.training.tensor_rows import Rows

ALONE = types.SimpleNamespace(num_processes=1, process_index=0, is_main_process=True)


@pytest.fixture
def store(tmp_path):
    store = CheckpointStore(tmp_path)
    store.save(3, write_facts)
    return store


def write_facts(folder):
    (folder / "state.json").write_text("{}")


def save(store, write_rest, rows=None):
    def own_state():
        return {"trained": {"weight": Rows(torch.randn(5, 7), 0, (5, 7))} if rows is None else rows()}

    prepared = types.SimpleNamespace(own_state=own_state)
    return save_sharded(ALONE, store, 5, prepared, write_rest)  # pyright: ignore[reportArgumentType]


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_it_is_complete(store):
    save(store, write_facts)
    assert store.steps() == [3, 5]


@pytest.mark.parametrize(
    ("options", "who"), [({"write_rest": full_disk}, ""), ({"write_rest": None, "rows": full_disk}, "process 0: ")]
)
def test_a_full_disk_is_said_in_a_line_and_nothing_is_left(store, options, who):
    with pytest.raises(RunError) as caught:
        save(store, **options)
    assert str(caught.value) == (
        f"{who}cannot save {store.path(5)}: the disk is full; the checkpoint of step 3 is kept; make room, then go on "
        "with --resume"
    )
    assert [path.name for path in store.folder.iterdir()] == ["step-00000003"]
