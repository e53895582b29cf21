"""DeepSpeed's ZeRO-3 in two real processes on gloo: what it trains is what DDP, FSDP2 and one process train."""

from __future__ import annotations

import importlib.util
import math
import shutil
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from mmattn.training import read_metrics
from mmattn.training.checkpoint import MANIFEST, CheckpointStore
from tests.training.layered_toy import launch, run_all
from tests.training.pieces import assert_same, assert_same_files, assert_whole

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
]

ZERO3 = {"sharding": "zero3"}
FLOAT32 = {"dtype": "float32"}
BASE = {"max_steps": 12, "save_every": 4, "eval_every": 6, "task": FLOAT32}
# DeepSpeed keeps float32 only: AdamW turns the rounding of small gradients into parts of the learning rate, 0.05.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {**BASE, "kept_gathered": 0},
    "kept": BASE,  # parameters stay gathered where they are as small as these
    "clipped": {**BASE, "max_grad_norm": 0.001, "micro_batch_size": 1, "kept_gathered": 0},
    "averaged": {**BASE, "ema_decay": 0.9},
    "skipping": {**BASE, "task": {**FLOAT32, "bad": [3]}, "micro_batch_size": 1, "kept_gathered": 0},
    "means": {**BASE, "average_last": 2},
    "recomputed": {**BASE, "activation_checkpointing": True, "kept_gathered": 0},
}


def test_two_processes_train_as_one_and_as_ddp_do(tmp_path):
    one = run_all([(tmp_path / f"one-{name}", options) for name, options in SETTINGS.items()])
    runs = [(tmp_path / f"ddp-{name}", options) for name, options in SETTINGS.items()]
    runs += [(tmp_path / f"zero3-{name}", {**options, **ZERO3}) for name, options in SETTINGS.items()]
    both = launch(runs, 2)
    assert len(both) == 2
    for results in both:
        for name, expected, ddp, result in zip(
            SETTINGS, one, results[: len(SETTINGS)], results[len(SETTINGS) :], strict=True
        ):
            assert result["losses"] == pytest.approx(ddp["losses"], rel=1e-6), name
            assert result["losses"] == pytest.approx(expected["losses"], rel=1e-3), name
            assert result["metrics"] == pytest.approx(ddp["metrics"], rel=1e-6), name
            status = "NOT_AVAILABLE" if "kept_gathered" in SETTINGS[name] else "AVAILABLE"
            assert [held[0] for held in result["held"]] == [status] * 19, name
            assert all(part == math.ceil(whole / 2) for _, part, whole in result["held"])
    for name in SETTINGS:
        assert_same_files(tmp_path / f"ddp-{name}", tmp_path / f"zero3-{name}", rtol=1e-5, atol=1e-6)
        norms = [
            [line["grad_norm"] for line in read_metrics(tmp_path / f"{kind}-{name}/metrics.jsonl", kind="train")]
            for kind in ("one", "zero3")
        ]
        assert norms[1] == pytest.approx(norms[0], rel=1e-3)
    assert min(norms[0]) > 0
    clipped = read_metrics(tmp_path / "zero3-clipped/metrics.jsonl", kind="train")
    assert sum(line["grad_norm"] > 0.001 for line in clipped) > 1
    assert one[0]["losses"] != pytest.approx(one[2]["losses"], rel=1e-3)  # clipping makes a difference
    skipped = read_metrics(tmp_path / "zero3-skipping/metrics.jsonl", kind="skipped")
    assert skipped
    assert all([example for _, example in line["draws"]] == [3] for line in skipped)


def test_dropout_batch_norm_and_bf16_are_those_of_ddp(tmp_path):
    settings = {
        "drawn": {**BASE, "task": {**FLOAT32, "dropout_p": 0.3, "has_batch_norm": True, "bad": [3]}},
        "bf16": {**BASE, "mixed_precision": "bf16", "kept_gathered": 0},
        "recomputed": {**BASE, "mixed_precision": "bf16", "activation_checkpointing": True, "kept_gathered": 0},
        "scoring": {"max_steps": 12, "task": {**FLOAT32, "kind": "ScoringTask"}, "kept_gathered": 0},
        "outputs": {"max_steps": 12, "task": {**FLOAT32, "kind": "OutputsTask"}, "kept_gathered": 0},
    }
    runs = [(tmp_path / f"ddp-{name}", options) for name, options in settings.items()]
    runs += [(tmp_path / f"zero3-{name}", {**options, **ZERO3}) for name, options in settings.items()]
    (results, _) = launch(runs, 2)
    for name, ddp, result in zip(settings, results[:5], results[5:], strict=True):
        assert result["losses"] == pytest.approx(ddp["losses"], rel=1e-6), name
        assert result["dtypes"] == ["torch.float32"]
    for name in ("drawn", "bf16", "recomputed"):
        assert_same_files(tmp_path / f"ddp-{name}", tmp_path / f"zero3-{name}", rtol=1e-5, atol=1e-6)


def test_killed_and_resumed_as_whatever_else(tmp_path):
    """From ZeRO-3 to itself, DDP and FSDP2, by other numbers of processes, and back."""
    longer = {**BASE, "max_steps": 18, "ema_decay": 0.9, "schedule": "constant"}
    shorter = {**longer, "max_steps": 10}
    pieces = {**shorter, "sharding": "fsdp2", "sharded_checkpoints": True}
    unbroken, *_ = launch(
        [
            (tmp_path / "unbroken", longer),
            (tmp_path / "from-ddp", shorter),
            (tmp_path / "from-pieces", pieces),
            (tmp_path / "base", {**shorter, **ZERO3}),
        ],
        2,
    )[0]
    for name in ("killed", "to-ddp", "to-fsdp2", "to-one", "to-three"):
        shutil.copytree(tmp_path / "base", tmp_path / name)
    resumed = {**longer, "resume": True}
    ((left,),) = launch([(tmp_path / "killed", {**resumed, **ZERO3, "kill_at_fsync": [0, 3]})], 2, killed=0)
    assert "lost another of the 2 processes after step" in left["error"]
    assert_whole(tmp_path / "killed")
    assert CheckpointStore(tmp_path / "killed").steps()[-1] == 10
    results = launch(
        [
            *[(tmp_path / name, {**resumed, **ZERO3}) for name in ("killed", "from-ddp", "from-pieces")],
            (tmp_path / "to-ddp", resumed),
            (tmp_path / "to-fsdp2", {**resumed, "sharding": "fsdp2"}),
        ],
        2,
    )[0]
    results += launch([(tmp_path / "to-three", {**resumed, **ZERO3})], 3)[0]
    results += run_all([(tmp_path / "to-one", resumed)])
    for result in results:
        assert result["losses"] == pytest.approx(unbroken["losses"][10:], rel=1e-3)
        assert result["metrics"] == pytest.approx(unbroken["metrics"], rel=1e-3)
    for name in ("killed", "from-ddp", "from-pieces", "to-ddp", "to-fsdp2", "to-three", "to-one"):
        newest = "checkpoints/step-00000018"
        for file in ("trained", "average", "optimizer"):
            one, two = (tmp_path / run / newest / f"{file}.safetensors" for run in ("unbroken", name))
            assert_same(one, two, **CLOSE)
        assert_whole(tmp_path / name)
    exact = launch([(tmp_path / "exact", {**longer, **ZERO3})], 2)[0][0]
    assert exact["losses"][10:] == results[0]["losses"]
    assert_same(tmp_path / "exact/final/model.safetensors", tmp_path / "killed/final/model.safetensors", rtol=0, atol=0)


def test_what_cannot_be_cut_or_stepped_is_refused(tmp_path):
    launch([(tmp_path / "run", {**BASE, "max_steps": 4})], 2)
    _let_differ(tmp_path / "run", "step.layers.0.gate")
    base = {**BASE, **ZERO3}
    runs = [
        (tmp_path / "float64", {**base, "task": {}}),
        (tmp_path / "scalar", {**base, "task": {**FLOAT32, "kind": "ScalarTask"}}),
        (tmp_path / "unused", {**base, "task": {**FLOAT32, "kind": "UnusedTask"}}),
        (tmp_path / "partly", {**base, "task": {**FLOAT32, "kind": "PartlyUsedTask"}}),
        (tmp_path / "run", {**base, "resume": True}),
        (tmp_path / "after", {**base, "max_steps": 2, "counts_operations": True, "kept_gathered": 0}),
    ]
    for float64, scalar, unused, partly, counters, after in launch(runs, 2):
        assert float64["error"].startswith("training.sharding=zero3 keeps all weights in float32, and words.weight is")
        assert "cannot cut temperature, which has no dimension: give it the shape [1]" in scalar["error"]
        assert unused["error"].startswith("spare.bias, spare.weight took no part in a step, and DeepSpeed would decay")
        assert partly["error"].startswith(
            "parameters took part in a micro-batch on some processes only: sizes (1 of 2); DeepSpeed would mix up"
        )
        assert "has taken 4 steps and layers.0.gate 5, and DeepSpeed counts them together" in counters["error"]
        assert len(after["losses"]) == 2
    assert read_metrics(tmp_path / "after/metrics.jsonl", kind="train")[1]["time"]["mfu"] > 0


def _let_differ(run, name):
    store, old = CheckpointStore(run), run.with_name("old")
    shutil.copytree(store.path(4), old, ignore=shutil.ignore_patterns(MANIFEST))
    tensors = load_file(old / "optimizer.safetensors")
    tensors[name] += 1
    save_file(tensors, old / "optimizer.safetensors")
    store.save(4, lambda folder: shutil.copytree(old, folder, dirs_exist_ok=True))
