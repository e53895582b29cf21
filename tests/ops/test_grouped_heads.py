"""Where sdpa leaves grouped heads to torch's kernels on a card, and where it folds them: asked without a card."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmattn.ops.backends import sdpa


class Machine:
    """What torch says of a card that is not there, and of its settings."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self._patch = monkeypatch
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.delenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", raising=False)
        self.has(capability=(9, 0), cudnn=91900, flash=True, cudnn_attention=True)

    def has(self, *, capability=None, cudnn=None, flash=None, cudnn_attention=None):
        """Set what is given."""
        for place, name, value in (
            (sdpa, "compute_capability", capability),
            (torch.backends.cudnn, "version", cudnn),
            (torch.backends.cuda, "flash_sdp_enabled", flash),
            (torch.backends.cuda, "cudnn_sdp_enabled", cudnn_attention),
        ):
            if value is not None:
                self._patch.setattr(place, name, lambda *_, value=value: value)


@pytest.fixture
def machine(monkeypatch):
    return Machine(monkeypatch)


def served(
    *, num_queries=1, num_keys=77, head_dim=64, dtype=torch.bfloat16, has_mask=False, dropout_p=0.0, mask_has_grad=False
):
    """What is said of a call of 8 heads in 2 groups."""
    with FakeTensorMode():
        query = torch.empty(2, 8, num_queries, head_dim, dtype=dtype, device="cuda")
        key = torch.empty(2, 2, num_keys, head_dim, dtype=dtype, device="cuda")
        mask = torch.empty(2, 1, 1, num_keys, dtype=dtype, device="cuda") if has_mask else None
        if mask is not None and mask_has_grad:
            mask.requires_grad_()
        return sdpa._is_served_in_groups(query, key, key, mask, dropout_p)


def both(**options):
    """Without and with a mask."""
    return served(**options), served(has_mask=True, **options)


def test_cards(machine):
    """Flash knows groups from compute capability 8 on, masks only cuDNN does, which torch asks first on 9."""
    for capability, expected in (
        ((7, 5), (False, False)),
        ((8, 0), (True, False)),
        ((8, 9), (True, False)),
        ((9, 0), (True, True)),
        ((10, 0), (True, False)),
        ((12, 0), (True, False)),
    ):
        machine.has(capability=capability)
        assert both() == expected, capability


def test_calls(machine):
    assert both() == both(dtype=torch.float16) == both(head_dim=128) == (True, True)
    assert both(num_queries=2) == (False, False)
    assert both(dtype=torch.float32) == both(head_dim=60) == both(head_dim=160) == (False, False)
    # What cuDNN refuses.
    assert both(num_keys=1) == both(dropout_p=0.1) == (True, False)
    assert not served(has_mask=True, mask_has_grad=True)
    machine.has(flash=False)
    assert both() == (True, True)
    assert both(num_keys=1) == (False, False)


@pytest.mark.parametrize("why", ["version", "none", "variable", "deterministic", "disabled"])
def test_cudnn_that_torch_does_not_ask_first(machine, monkeypatch, why):
    """Behind flash and the memory-efficient kernel, which know no masked groups, comes the slow one that knows all."""
    if why in ("version", "none"):
        monkeypatch.setattr(torch.backends.cudnn, "version", lambda: 91500 if why == "version" else None)
    elif why == "variable":
        monkeypatch.setenv("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")
    elif why == "deterministic":
        monkeypatch.setattr(torch, "get_deterministic_debug_mode", lambda: 2)
    else:
        machine.has(cudnn_attention=False)
    assert both() == (True, False)
    machine.has(flash=False)
    assert both() == (False, False)


def test_deterministic_algorithms_that_only_warn(machine, monkeypatch):
    monkeypatch.setattr(torch, "get_deterministic_debug_mode", lambda: 1)
    assert both() == (True, True)


def test_a_machine_without_a_card(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert both() == (False, False)
