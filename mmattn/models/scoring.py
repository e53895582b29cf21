"""The training loss of a text network: cross-entropy over the labels that count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mmattn.errors import UsageError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class TextOutput:
    """What a pass over texts gives.

    Without labels `logits [R, L, V]` is set. With labels the vocabulary head runs on the scored positions only, so that
    `logits` is `[num_tokens, V]`, row after row, and `loss_sum` (a scalar with gradient) and `num_tokens` (int64
    scalar) are set: the mean loss is `loss_sum / num_tokens`.
    """

    logits: Tensor
    loss_sum: Tensor | None = None
    num_tokens: Tensor | None = None
    targets: Tensor | None = None


def score_labels(
    hidden: Tensor, labels: Tensor, logits: Callable[[Tensor], Tensor], *, label_smoothing: float
) -> TextOutput:
    """The loss of hidden states `[R, L, C]` under the labels `[R, L]` of the same positions (-100: not scored).

    Raises:
        UsageError: labels of another shape.
    """
    if labels.shape != hidden.shape[:2]:
        raise UsageError(f"labels has shape {list(labels.shape)}, the texts {list(hidden.shape[:2])}: they must agree")
    # The vocabulary product is the largest of a step: spend it on positions that count only.
    is_scored = labels != IGNORED_LABEL
    targets = labels[is_scored]
    scores = logits(hidden[is_scored])
    loss_sum = F.cross_entropy(scores.float(), targets, reduction="sum", label_smoothing=label_smoothing)
    num_tokens = torch.tensor(targets.shape[0], device=targets.device)
    return TextOutput(scores, loss_sum, num_tokens, targets)
