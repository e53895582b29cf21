"""Choosing what is trained: by name, and LoRA with weights that are not zero."""

import pytest
import torch
from torch import nn

from mmattn.errors import ConfigError
from mmattn.training.memory import estimate_memory
from mmattn.training.selection import LoRAConfig, adapter_state, add_lora, merged_copy, selection, train_only


def _network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 7), nn.ReLU(), nn.Linear(7, 3))


def test_train_only_freezes_everything_else():
    network = _network()
    train_only(network, {"2.weight"})
    assert [name for name, p in network.named_parameters() if p.requires_grad] == ["2.weight"]
    chosen = selection(network)
    assert (chosen.num_trained, chosen.num_parameters) == (21, 66)
    assert str(chosen) == "21 of 66 parameters (31.8%)"


def test_train_only_refuses_to_train_nothing():
    with pytest.raises(ConfigError, match="nothing to train: Sequential has none of the parameters"):
        train_only(_network(), {"3.weight"})


def test_lora_with_weights_merges_to_equal_outputs():
    network = add_lora(_network(), LoRAConfig(rank=2, alpha=3.0, targets=["0", "2"]))
    for name, parameter in network.named_parameters():
        if ".lora_" in name:
            nn.init.normal_(parameter)
    x = torch.randn(11, 5)
    merged = merged_copy(network)
    assert not any(".lora_" in name for name, _ in merged.named_parameters())
    torch.testing.assert_close(merged(x), network(x), rtol=1e-5, atol=1e-5)
    assert (merged(x) - _network()(x)).abs().max() > 0.1  # the adapter does something
    assert {name for name, p in network.named_parameters() if p.requires_grad} == {
        name for name, _ in network.named_parameters() if ".lora_" in name
    }
    assert sorted(adapter_state(network)) == [f"{i}.lora_{ab}.weight" for i in (0, 2) for ab in "AB"]


def test_lora_names_the_linears_when_no_target_fits():
    with pytest.raises(ConfigError, match=r"lora.targets \['q_proj'\] fit no module .* Linears are called 0, 2"):
        add_lora(_network(), LoRAConfig(targets=["q_proj"]))
    with pytest.raises(ConfigError, match="lora.rank must be at least 1, not 0"):
        add_lora(_network(), LoRAConfig(rank=0))


def test_memory_counts_what_training_holds():
    network = nn.Linear(16, 32, bias=False)
    x = torch.randn(3, 16)
    estimate = estimate_memory(network, lambda: (network(x) ** 2).sum(), scale=10, has_average=True)
    weights = 16 * 32 * 4
    assert (estimate.weights, estimate.gradients) == (weights, weights)
    assert (estimate.optimizer, estimate.average) == (2 * weights, weights)
    assert estimate.activations == 10 * (3 * 16 * 4 + 3 * 32 * 4)  # the input for the weight, the output for the square
    assert "activations" in str(estimate)
