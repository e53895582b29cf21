"""Runs in forked children that may be killed, and what is compared afterwards."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from mmattn.errors import MmattnError
from mmattn.training import read_metrics, train, verify_checkpoint
from tests.training.toy import ToyTask, toy_config


def run_in_child(function: Callable[[], Any]) -> int | None:
    """Call a function in a forked child; its exit code as the command line would give it, negative when killed."""
    child = multiprocessing.get_context("fork").Process(target=_call, args=(function,))
    child.start()
    until = time.monotonic() + 120
    # `join` would wait for the data workers of a killed one too, which notice after seconds.
    while child.is_alive():
        if time.monotonic() > until:
            child.kill()
            raise AssertionError("the child hangs")
        time.sleep(0.01)
    return child.exitcode


def _call(function: Callable[[], Any]) -> None:
    torch.set_num_threads(1)
    try:
        function()
    except MmattnError as error:
        os._exit(error.exit_code)


def kill_at_call(names: list[str], number: int, *, after: bool = False) -> None:
    """Patch functions of `os` in this process so that the `number`-th call to any of them is its last."""
    calls = 0

    def patched(name: str) -> Callable[..., Any]:
        original = getattr(os, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls == number and not after:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*args, **kwargs)
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    for name in names:
        setattr(os, name, patched(name))


class KilledTask(ToyTask):
    """Kills its process, or sends another signal, in the middle of a step."""

    def __init__(self, at_call: int | None, number: int = signal.SIGKILL, **options: Any) -> None:
        super().__init__(**options)
        self.at_call, self.number, self.calls = at_call, number, 0

    def loss(self, model: torch.nn.Module, batch: dict) -> Any:
        self.calls += 1
        if self.calls == self.at_call:
            os.kill(os.getpid(), self.number)
        return super().loss(model, batch)


def run_piece(folder: Path, *, resume: bool, task: ToyTask | None = None, **changes: Any) -> Any:
    """Train the toy; a resume before the first checkpoint starts again, as a user would."""
    if resume and not list(folder.glob("checkpoints/step-*")):
        resume = False
    return train(task or ToyTask(), toy_config(folder, **changes), resume=resume)


def timeless_lines(folder: Path) -> list[dict[str, Any]]:
    """The metrics without what depends on the clock."""
    lines = read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key != "time"} for line in lines]


def assert_whole(folder: Path) -> None:
    """Nothing that has a checkpoint's name is half there."""
    for checkpoint in folder.glob("checkpoints/step-*"):
        verify_checkpoint(checkpoint)


def assert_same_files(one: Path, two: Path, **tolerance: float) -> None:
    """The models of two runs of 12 steps, in all the places where they are, are the same to rounding."""
    assert_whole(two)
    for part in ("final/model", "best/model", "checkpoints/step-00000012/model/model"):
        assert_same(one / f"{part}.safetensors", two / f"{part}.safetensors", **tolerance)


def assert_same(one: Path, two: Path, *, rtol: float = 1e-8, atol: float = 1e-10) -> None:
    """Two files hold the same tensors, to rounding."""
    ours, theirs = load_file(one), load_file(two)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        torch.testing.assert_close(theirs[name], tensor, rtol=rtol, atol=atol)
