"""The toy in one of several processes, with what may happen to one of them.

`python -m tests.training.ranked_toy FOLDER JSON`, with a launcher before it or not, or `train_toy` by `tests.ranks`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from mmattn.errors import MmattnError
from mmattn.training import Batch, Draw, Loss, train
from tests.training.toy import RaggedTask, ToyTask, toy_config

EXTRA = {
    **{"bad": (), "resume": False, "sleep": 0, "fill_at": 0, "dies": None},
    **{"stop_in_evaluation": False, "stop_other_at": 0, "batch_norm": False},
}


def train_toy(folder: Path | str, options: dict[str, Any]) -> None:
    """Train, and write a line of JSON with what came of it."""
    extra = {key: options.get(key, default) for key, default in EXTRA.items()}
    settings = {key: value for key, value in options.items() if key not in EXTRA}
    kind = _WithBatchNorm if extra["batch_norm"] else _Ragged
    task = kind(dropout_p=0.0, dtype=torch.float64, has_batch_norm=extra["batch_norm"], bad=extra["bad"])
    task.extra, task.filler = extra, Path(folder).parent / "filler"
    try:
        result = train(task, toy_config(Path(folder), **settings), resume=extra["resume"])
    except MmattnError as error:
        print(f"rank {PartialState().process_index}: {error}", file=sys.stderr, flush=True)
        sys.exit(error.exit_code)
    line = json.dumps({"rank": PartialState().process_index, "losses": result.losses, "best": result.best})
    sys.stdout.write(line + "\n")  # in one piece: under a launcher all ranks write to one pipe


class _Accidents(ToyTask):
    extra: dict[str, Any]
    filler: Path
    saves = calls = 0

    def loss(self, model: torch.nn.Module, batch: Batch) -> Loss:
        self.calls += 1
        if self.calls == self.extra["stop_other_at"] and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(self.extra["sleep"])
        return super().loss(model, batch)

    def collate(self, draws: Sequence[Draw]) -> Batch:
        if int(os.environ.get("RANK", "0")) == 1 and self.extra["dies"] in [example for _, example in draws]:
            os._exit(3)
        return super().collate(draws)

    def evaluate(self, model: torch.nn.Module) -> dict[str, float]:
        if self.extra["stop_in_evaluation"]:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(100)
        return super().evaluate(model)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        self.saves += 1
        if self.saves == self.extra["fill_at"]:
            self._fill_the_disk()
        super().save(model, folder)

    def _fill_the_disk(self) -> None:
        with open(self.filler, "wb", buffering=0) as file:
            for size in (4096, 1):
                with contextlib.suppress(OSError):
                    while file.write(bytes(size)):
                        pass


class _WithBatchNorm(_Accidents):
    pass


class _Ragged(_Accidents, RaggedTask):
    pass


if __name__ == "__main__":
    train_toy(sys.argv[1], json.loads(sys.argv[2]))
