"""A small language-model-like task: ragged token counts, dropout, batch norm, and a frozen part."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from mmattn.training import Batch, Draw, Loss, Task, TrainingConfig

VOCAB, WIDTH, LENGTH = 13, 11, 7


class ToyModel(nn.Module):
    def __init__(self, dropout_p: float, dtype: torch.dtype = torch.float32, has_batch_norm: bool = True) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB, WIDTH, dtype=dtype)
        self.frozen_proj = nn.Linear(WIDTH, WIDTH, dtype=dtype).requires_grad_(False)
        self.batch_norm = nn.BatchNorm1d(WIDTH, dtype=dtype) if has_batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout_p)
        self.head = nn.Linear(WIDTH, VOCAB, dtype=dtype)

    def forward(self, input_ids: Tensor, scale: Tensor) -> Tensor:
        hidden = self.frozen_proj(self.token_embedding(input_ids)) * scale[:, None, None].to(self.head.weight.dtype)
        hidden = self.batch_norm(hidden.transpose(1, 2)).transpose(1, 2)
        return self.head(self.dropout(hidden))


class ToyTask(Task):
    best = "loss"
    is_higher_better = False

    def __init__(
        self, *, num_examples: int = 23, dropout_p: float = 0.1, bad: Sequence[int] = (), **model_options: Any
    ) -> None:
        torch.manual_seed(5)
        self.num_examples, self.bad = num_examples, set(bad)
        self.model = ToyModel(dropout_p, **model_options)

    def __len__(self) -> int:
        return self.num_examples

    def collate(self, draws: Sequence[Draw]) -> Batch:
        rows, lengths = [], []
        for epoch, example in draws:
            random = np.random.default_rng([7, epoch, example])
            rows.append(random.integers(VOCAB, size=LENGTH))
            lengths.append(1 + example % LENGTH)
        input_ids = torch.tensor(np.array(rows))
        is_scored = torch.arange(LENGTH) < torch.tensor(lengths)[:, None]
        scale = torch.tensor([float("nan") if example in self.bad else 1.0 for _, example in draws])
        return {"input_ids": input_ids, "labels": input_ids.masked_fill(~is_scored, -100), "scale": scale}

    def count(self, batch: Batch) -> int:
        return int((batch["labels"] != -100).sum())

    def loss(self, model: nn.Module, batch: Batch) -> Loss:
        logits = model(batch["input_ids"], batch["scale"])
        labels = batch["labels"]
        total = nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")
        count = int((labels != -100).sum())
        return Loss(total, count, {"half": (total / 2, count)})

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        batch = self.collate([(0, example) for example in range(5)])
        device = next(model.parameters()).device
        loss = self.loss(model, {name: t.to(device) for name, t in {**batch, "scale": torch.ones(5)}.items()})
        return {"loss": float(loss.total) / loss.count}

    def save(self, model: nn.Module, folder: Path) -> None:
        save_file(
            {name: value.contiguous() for name, value in model.state_dict().items()}, folder / "model.safetensors"
        )


def toy_config(folder: Path, **changes: Any) -> TrainingConfig:
    settings: dict[str, Any] = {
        "output_dir": str(folder),
        "max_steps": 20,
        "batch_size": 6,
        "learning_rate": 0.05,
        "warmup_steps": 3,
        "device": "cpu",
        "save_every": 5,
        "log_every": 5,
    }
    return TrainingConfig(**{**settings, **changes})


class RaggedTask(ToyTask):
    """The toy with token counts, padded to the longest of a batch only."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.lengths = np.array([1 + example % LENGTH for example in range(len(self))])

    def collate(self, draws: Sequence[Draw]) -> Batch:
        batch = super().collate(draws)
        assert self.lengths is not None
        longest = int(self.lengths[[example for _, example in draws]].max())
        return {**batch, "input_ids": batch["input_ids"][:, :longest], "labels": batch["labels"][:, :longest]}
