"""The training loss of a text network: cross-entropy over the labels that count."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mmattn.errors import UsageError
from mmattn.models.linear_cross_entropy import linear_cross_entropy, row_chunks
from mmattn.nn.vocabulary_head import VocabularyHead

IGNORED_LABEL = -100


@dataclass(frozen=True)
class TextOutput:
    """What a pass over texts gives.

    Without labels `logits [R, L, V]` is set. With labels there are none, for they are never all in memory: `loss_sum`
    (a scalar with gradient), `num_tokens` (int64 scalar) and `targets` (int64 `[num_tokens]`, the labels that were
    scored, row after row) are set, and the mean loss is `loss_sum / num_tokens`.
    """

    logits: Tensor | None
    loss_sum: Tensor | None = None
    num_tokens: Tensor | None = None
    targets: Tensor | None = None


def score_labels(
    hidden: Tensor, labels: Tensor, head: VocabularyHead, words: Tensor, *, label_smoothing: float
) -> TextOutput:
    """The loss of hidden states `[..., C]` under the labels `[...]` of the same positions (-100: not scored).

    Args:
        hidden: `[R, L, C]`, or `[N, C]` of packed texts.
        labels: `[R, L]` or `[N]`.
        head: makes logits of states.
        words: the word embedding `[V, C]`, for a head without a matrix of its own.
        label_smoothing: of the loss.

    Raises:
        UsageError: labels of another shape.
    """
    if labels.shape != hidden.shape[:-1]:
        raise UsageError(f"labels has shape {list(labels.shape)}, the texts {list(hidden.shape[:-1])}: they must agree")
    # The vocabulary product is the largest of a step: spend it on positions that count only.
    is_scored = labels != IGNORED_LABEL
    targets, scored = labels[is_scored], head.transformed(hidden[is_scored])
    weight = words if head.weight is None else head.weight
    if torch.is_grad_enabled():
        fixed = head.fixed_token if head.weight is None else None
        loss_sum = linear_cross_entropy(
            scored, weight, head.bias, targets, label_smoothing=label_smoothing, fixed_token=fixed
        )
    else:
        loss_sum = _loss_without_gradient(scored, weight, head, targets, label_smoothing)
    num_tokens = torch.tensor(targets.shape[0], device=targets.device)
    return TextOutput(None, loss_sum, num_tokens, targets)


def _loss_without_gradient(
    scored: Tensor, weight: Tensor, head: VocabularyHead, targets: Tensor, label_smoothing: float
) -> Tensor:
    """The same by the head's own product, which inference may have put into another form."""
    total = torch.zeros((), dtype=torch.promote_types(scored.dtype, torch.float32), device=scored.device)
    for rows in row_chunks(len(scored), len(weight), scored.device.type):
        logits = head.product(scored[rows], weight, head.bias)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        total += F.cross_entropy(logits, targets[rows], reduction="sum", label_smoothing=label_smoothing)
    return total
