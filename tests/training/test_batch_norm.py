"""Batch norm over several processes in compiled layers; test_processes.py has the processes."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn

from mmattn.training.batch_norm import shared_batch_norm
from tests.compiled_functions import check_compiled_functions


def test_gradients_of_compiled_code(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(dist, "all_reduce", lambda tensor: tensor.mul_(3))  # as three processes with the same examples
    model = nn.BatchNorm1d(5, dtype=torch.float64)
    inputs = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).requires_grad_()
    with shared_batch_norm(model, num_processes=3):
        check_compiled_functions(model, inputs, count=2)
