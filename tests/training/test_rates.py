"""Speed, memory, time left, and the share of a card's arithmetic."""

from __future__ import annotations

import types

import pytest
import torch

from mmattn.training import read_metrics, train
from mmattn.training.rates import PEAK_TFLOPS, Rates, peak_flops, peak_memory
from tests.training.toy import ToyTask, toy_config


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA H200 NVL", 835.5),
        ("NVIDIA A100-SXM4-40GB MIG 1g.5gb", None),
        ("NVIDIA GeForce RTX 3090 Ti", None),
        ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 311.8),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.1),
        ("NVIDIA RTX A4000", None),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", None),
        ("Tesla K80", None),
    ],
)
def test_peaks_by_the_name_of_the_card(name, tflops):
    assert peak_flops(name) == (None if tflops is None else 1e12 * tflops)


def test_every_entry_of_the_table_can_be_reached():
    assert [peak_flops(f"NVIDIA {name} 80GB") for name, _ in PEAK_TFLOPS] == [1e12 * value for _, value in PEAK_TFLOPS]


def accelerator(device="cuda", precision="bf16", processes=3):
    return types.SimpleNamespace(
        device=torch.device(device), mixed_precision=precision, num_processes=processes, is_main_process=True
    )


def test_mfu_is_the_counted_operations_over_the_peak(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 17)
    rates = Rates(accelerator(), 0, 10)
    assert rates.remark is None
    weight = torch.randn(5, 7, requires_grad=True)
    for _ in range(2):
        with rates.counted():
            (torch.randn(3, 5) @ weight).sum().backward()
    first = rates.clock(1, 13, data_s=0.0, step_s=1.0)
    assert "mfu" not in first  # it was slowed down by the counting
    operations = 2 * (2 * 3 * 5 * 7)  # the product, and the gradient of the weight: once, not twice
    assert rates._flops_per_unit == pytest.approx(3 * operations / 13)
    rates._peak = 3 * 1e4
    clock = rates.clock(2, 26, data_s=0.0, step_s=0.5)
    assert clock["mfu"] == pytest.approx(operations / 13 * 52 / 1e4, abs=1e-4)
    assert clock["peak_memory_bytes"] == 17


def test_why_there_is_no_mfu_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla K80")
    assert Rates(accelerator(), 0, 10).remark == "no MFU is shown: the peak of Tesla K80 is not known"
    remark = Rates(accelerator(precision="no"), 0, 10).remark
    assert remark == "no MFU is shown: it is for bf16 and fp16, and the precision is no"
    assert Rates(accelerator("cpu"), 0, 10).remark is None


def test_time_left_and_memory():
    rates = Rates(accelerator("cpu"), 40, 100)
    rates.started -= 30.0
    clock = rates.clock(50, 11, data_s=0.25, step_s=2.0)
    assert clock["left_s"] == pytest.approx(150, abs=1)
    assert clock["steps_per_s"] == pytest.approx(1 / 3, abs=0.01)
    assert clock["tokens_per_s"] == 5.5
    assert peak_memory(torch.device("cpu")) == clock["peak_memory_bytes"] > 2**24


def test_counting_does_not_change_the_run(tmp_path, monkeypatch):
    options = {"max_steps": 5, "micro_batch_size": 2}
    plain = train(ToyTask(), toy_config(tmp_path / "plain", **options))
    monkeypatch.setattr(Rates, "_find_peak", lambda self: (1e12, None))
    counted = train(ToyTask(), toy_config(tmp_path / "counted", **options))
    assert counted.losses == plain.losses
    lines = read_metrics(tmp_path / "counted/metrics.jsonl", kind="train")
    assert ["mfu" in line["time"] for line in lines] == [False, True, True, True, True]
