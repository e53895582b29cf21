"""Rows of tensors in files: any process count reads what another wrote, and what is missing is named."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmattn.errors import CheckpointError
from mmattn.training.tensor_rows import Rows, TensorFiles, own_rows, write_rows

WHOLE = {
    "weight": torch.arange(35.0).view(7, 5),
    "gate": torch.tensor([3.0]),
    "table": torch.arange(11),
    "step": torch.tensor(4.0),
    "empty": torch.zeros(0, 5),
}


def _write(folder, parts):
    """As FSDP2 cuts: the last processes may have fewer rows, or none. What has no rows is the first one's."""
    for part in range(parts):
        rows = {}
        for name, tensor in WHOLE.items():
            if tensor.ndim == 0:
                if part == 0:
                    rows[name] = Rows(tensor, 0, ())
                continue
            size = -(-len(tensor) // parts)
            first = min(part * size, len(tensor))
            rows[name] = Rows(tensor[first : first + size], first, tuple(tensor.shape))
        write_rows(rows, folder, "trained", part, parts)


@pytest.mark.parametrize("parts", [1, 2, 3, 8])
@pytest.mark.parametrize("readers", [1, 2, 5])
def test_any_number_of_processes_reads_what_another_wrote(tmp_path, parts, readers):
    _write(tmp_path, parts)
    with TensorFiles(tmp_path, "trained") as files:
        assert files.shapes == {name: tuple(tensor.shape) for name, tensor in WHOLE.items()}
        for name, tensor in WHOLE.items():
            assert torch.equal(files.read(name), tensor)
            size = -(-len(tensor) // readers) if tensor.ndim else 1
            for reader in range(readers if tensor.ndim else 0):
                first = min(reader * size, len(tensor))
                found = files.read(name, first, len(tensor[first : first + size]))
                assert torch.equal(found, tensor[first : first + size])


def test_a_whole_file_is_read_alike(tmp_path):
    save_file(WHOLE, tmp_path / "trained.safetensors")
    target = torch.zeros(7, 5)
    with TensorFiles(tmp_path, "trained") as files:
        assert torch.equal(files.read("weight", 2, 3), WHOLE["weight"][2:5])
        files.read_into(target, "weight")
    assert torch.equal(target, WHOLE["weight"])
    rows = own_rows(target)
    assert (rows.first, rows.shape, rows.local.data_ptr()) == (0, (7, 5), target.data_ptr())


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no trained tensors: neither trained\.safetensors nor pieces"):
        TensorFiles(tmp_path, "trained").__enter__()
    _write(tmp_path, 3)
    assert TensorFiles.exist(tmp_path, "trained")
    assert not TensorFiles.exist(tmp_path, "average")
    (tmp_path / "trained-00001-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match="of the 3 pieces of its trained tensors, that of process 1 is missing"):
        TensorFiles(tmp_path, "trained").__enter__()
    (tmp_path / "trained-00001-of-00003.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="its trained tensors cannot be read"):
        TensorFiles(tmp_path, "trained").__enter__()


def test_rows_that_no_piece_has(tmp_path):
    _write(tmp_path, 2)
    tensors = load_file(tmp_path / "trained-00000-of-00002.safetensors")
    rows = {name: Rows(tensor, 0, (7, 5)) for name, tensor in tensors.items() if name == "weight"}
    write_rows(rows | {"weight": Rows(tensors["weight"][:2], 0, (7, 5))}, tmp_path, "trained", 0, 2)
    with pytest.raises(CheckpointError, match="rows from 2 on of weight are in none of its pieces"):
        TensorFiles(tmp_path, "trained").__enter__()
