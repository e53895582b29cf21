"""What ZeRO-3 needs beside DeepSpeed, without it."""

from __future__ import annotations

import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mmattn.errors import OptionalPackageError, UsageError
from mmattn.training import deepspeed_package
from mmattn.training.deepspeed_package import open_deepspeed
from mmattn.training.opened_outputs import OpenedOutputs
from mmattn.training.zero3_saved import views_without_weights


class Cut(nn.Parameter):
    """As DeepSpeed leaves a parameter between its uses: without its elements, until `all_gather`."""

    ds_tensor: Tensor

    def release(self) -> None:
        self.ds_tensor, self.data = self.data, self.data[:0]

    def all_gather(self) -> None:
        self.data = self.ds_tensor


def cut(*shape: int) -> Cut:
    parameter = Cut(torch.randn(*shape, dtype=torch.float64))
    parameter.ds_tensor = parameter.data
    return parameter


@pytest.mark.parametrize("is_gathered", [True, False])
def test_products_keep_no_weights(is_gathered):
    weight, bias, inputs = cut(4, 3), cut(4), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad((inputs @ weight.T + bias).tanh().sum(), (weight, inputs))
    with views_without_weights():
        loss = nn.functional.linear(inputs, weight, bias).tanh().sum()
    weight.release()
    saved = weight.ds_tensor.clone()
    weight.ds_tensor.fill_(torch.nan)  # whoever kept it has this now
    weight.ds_tensor = torch.cat([torch.zeros(1, 3).double(), saved])[1:]  # gathered elsewhere
    if is_gathered:
        weight.all_gather()
    found = torch.autograd.grad(loss, (weight, inputs))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


def test_other_tensors_are_kept_as_they_are():
    plain = nn.Linear(3, 4)
    inputs = torch.randn(5, 3)
    expected = torch.autograd.grad(plain(inputs).square().sum(), list(plain.parameters()))
    with views_without_weights():
        loss = plain(inputs).square().sum()
    assert all(map(torch.equal, torch.autograd.grad(loss, list(plain.parameters())), expected))


@dataclass(frozen=True)
class Pair:
    scores: Tensor
    name: str = "none"


class Inner(nn.Module):
    def forward(self, values: Tensor) -> Pair:
        return Pair(values * 2, "inner")


class Outer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Inner()

    def forward(self, values: Tensor) -> Pair:
        pair = self.inner(values)
        assert isinstance(pair, Pair)
        return Pair(pair.scores + 1, "outer")


class Around(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *inputs: Tensor) -> Any:
        return self.module(*inputs)


def test_dataclasses_are_dicts_to_the_hooks_between():
    model, seen = Outer(), []
    around = Around(model)
    outputs = OpenedOutputs(model)

    def double(module: nn.Module, args: Any, output: Any) -> None:
        seen.append(type(module).__name__)
        output["scores"] = output["scores"] * 10  # in place, as DeepSpeed does

    handles = [module.register_forward_hook(double) for module in model.modules()]
    outputs.close_again(around)
    assert around(torch.ones(1)) == Pair(torch.tensor([210.0]), "outer")
    assert seen == ["Inner", "Outer"]
    for handle in handles:
        handle.remove()
    outputs.undo()
    assert around(torch.ones(1)) == Pair(torch.tensor([3.0]), "outer")


@pytest.fixture
def installed(monkeypatch):
    def put(version: str, device: str) -> types.ModuleType:
        package, accelerator = types.ModuleType("deepspeed"), types.ModuleType("deepspeed.accelerator")
        package.__version__ = version
        package.ops = types.SimpleNamespace(__compatible_ops__={"deepspeed_shm_comm": True})
        accelerator.get_accelerator = lambda: types.SimpleNamespace(device_name=lambda: device)
        monkeypatch.setitem(sys.modules, "deepspeed", package)
        monkeypatch.setitem(sys.modules, "deepspeed.accelerator", accelerator)
        return package

    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    monkeypatch.setattr(deepspeed_package.warnings, "filterwarnings", lambda *_: None)
    return put


def test_nothing_is_compiled_on_a_cpu(installed):
    package = installed("0.19.8+unknown", "cpu")
    assert open_deepspeed("cpu") is package
    assert package.ops.__compatible_ops__ == {"deepspeed_shm_comm": False}
    assert "DS_ACCELERATOR" not in deepspeed_package.os.environ


@pytest.mark.parametrize(
    ("version", "device", "message"),
    [
        ("0.18.2", "cpu", r"works with deepspeed<0\.20,>=0\.19\.8, this is 0\.18\.2: install one of those"),
        ("0.20.0", "cpu", r"this is 0\.20\.0"),
        ("0.19.9", "cuda", "DeepSpeed was imported for cuda, and this run is on cpu: set DS_ACCELERATOR=cpu"),
    ],
)
def test_another_deepspeed_is_refused(installed, version, device, message):
    installed(version, device)
    with pytest.raises(UsageError, match=message):
        open_deepspeed("cpu")


def test_no_deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(OptionalPackageError, match=r"sharding=zero3 needs .*: pip install 'mmattn\[deepspeed\]'"):
        open_deepspeed("cpu")
