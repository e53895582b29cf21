"""What ZeRO-3 needs beside DeepSpeed, without it."""

from __future__ import annotations

import enum
import os
import sys
import types
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers.utils import BaseOutput
from torch import Tensor, nn
from transformers.utils import ModelOutput

from mmattn.errors import OptionalPackageError, RunError, UsageError
from mmattn.training import deepspeed_package
from mmattn.training.deepspeed_package import open_deepspeed, told_local_size
from mmattn.training.opened_outputs import OpenedOutputs
from mmattn.training.zero3_saved import views_without_weights


class Status(enum.Enum):
    AVAILABLE = 1
    NOT_AVAILABLE = 2
    INFLIGHT = 3


class Cut(nn.Parameter):
    """As DeepSpeed leaves a parameter between its uses: without its elements, until `all_gather`."""

    ds_tensor: Tensor
    ds_status: Status
    ds_shape: torch.Size

    def release(self) -> None:
        self.ds_tensor, self.data, self.ds_status = self.data, self.data[:0], Status.NOT_AVAILABLE

    def all_gather(self) -> None:
        if self.ds_status == Status.NOT_AVAILABLE:  # DeepSpeed's does nothing for one that is on its way
            self.data, self.ds_status = self.ds_tensor, Status.AVAILABLE


class OnItsWay:
    """A handle of a parameter that has its memory already, with other values."""

    def __init__(self, parameter: Cut) -> None:
        self.parameter = parameter
        parameter.data, parameter.ds_status = torch.full_like(parameter.ds_tensor, torch.nan), Status.INFLIGHT

    def wait(self) -> None:
        self.parameter.data.copy_(self.parameter.ds_tensor)
        self.parameter.ds_status = Status.AVAILABLE


def cut(*shape: int) -> Cut:
    parameter = Cut(torch.randn(*shape, dtype=torch.float64))
    parameter.ds_tensor, parameter.ds_status, parameter.ds_shape = parameter.data, Status.AVAILABLE, parameter.shape
    return parameter


@pytest.mark.parametrize("status", Status)
def test_products_keep_no_weights(status):
    weight, bias, inputs = cut(4, 3), cut(4), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    expected = torch.autograd.grad((inputs @ weight.T + bias).tanh().sum(), (weight, inputs))
    in_flight: dict[Cut, OnItsWay] = {}
    with views_without_weights(in_flight):
        loss = nn.functional.linear(inputs, weight, bias).tanh().sum()
    weight.release()
    saved = weight.ds_tensor.clone()
    weight.ds_tensor.fill_(torch.nan)  # whoever kept it has this now
    weight.ds_tensor = torch.cat([torch.zeros(1, 3).double(), saved])[1:]  # gathered elsewhere
    if status == Status.AVAILABLE:
        weight.all_gather()
    elif status == Status.INFLIGHT:
        in_flight[weight] = OnItsWay(weight)
    found = torch.autograd.grad(loss, (weight, inputs))
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)
    assert in_flight == {}


def test_a_weight_that_is_never_there_is_said():
    weight, inputs = cut(4, 3), torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    with views_without_weights({}):
        loss = nn.functional.linear(inputs, weight).sum()
    weight.release()
    OnItsWay(weight)  # of which nobody has the handle
    with pytest.raises(
        RunError, match=r"DeepSpeed has not gathered a parameter of shape \[4, 3\] for the backward pass"
    ):
        torch.autograd.grad(loss, (weight, inputs))


def test_other_tensors_are_kept_as_they_are():
    plain = nn.Linear(3, 4)
    inputs = torch.randn(5, 3)
    expected = torch.autograd.grad(plain(inputs).square().sum(), list(plain.parameters()))
    with views_without_weights({}):
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


@dataclass
class OfTransformers(ModelOutput):
    scores: Tensor | None = None
    hidden: Tensor | None = None


@dataclass
class OfDiffusers(BaseOutput):
    scores: Tensor


@pytest.mark.parametrize("kind", [OfTransformers, OfDiffusers])
def test_outputs_that_are_dicts_stay_as_they_are(kind):
    class Model(nn.Module):
        def forward(self, values: Tensor) -> Any:
            return kind(scores=values * 2)

    def ten_times(module: nn.Module, args: Any, output: Any) -> None:
        for key in output:
            output[key] = output[key] * 10  # in place, as DeepSpeed does

    model = Model()
    around = Around(model)
    outputs = OpenedOutputs(model)
    model.register_forward_hook(ten_times)
    outputs.close_again(around)
    values = torch.ones(1, requires_grad=True)
    found = around(values)
    assert isinstance(found, kind)
    assert found.scores is found["scores"]
    assert found[0] is found["scores"]
    found[0].sum().backward()
    assert values.grad == 20


@pytest.fixture
def installed(monkeypatch):
    def put(version: str, device: str) -> types.ModuleType:
        package, accelerator = types.ModuleType("deepspeed"), types.ModuleType("deepspeed.accelerator")
        package.__version__ = version
        package.ops = types.ModuleType("deepspeed.ops")
        package.ops.__getattr__ = lambda name: pytest.fail(f"{name} tries all compilers")
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
    assert "DS_ACCELERATOR" not in os.environ
    package.ops.__compatible_ops__ = {"deepspeed_shm_comm": True, "cpu_adam": True}  # somebody has asked for it
    open_deepspeed("cpu")
    assert package.ops.__compatible_ops__ == {"deepspeed_shm_comm": False, "cpu_adam": True}


def test_the_local_size_is_told_for_a_while(monkeypatch):
    for before, expected in ((None, "2"), ("5", "5")):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
        monkeypatch.delenv("LOCAL_SIZE", raising=False)
        if before is not None:
            monkeypatch.setenv("LOCAL_SIZE", before)
        with told_local_size():
            assert os.environ["LOCAL_SIZE"] == expected
        assert os.environ.get("LOCAL_SIZE") == before


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
