"""The tolerance rule: a fast path may differ from the float64 reference by at most twice what the eager path in the
same dtype differs, three times for gradients. No tolerance is chosen by taste; non-finite values fail by themselves."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FORWARD_FACTOR = 2.0
BACKWARD_FACTOR = 3.0


@dataclass(frozen=True)
class Deviation:
    """How far a result is from the reference, and how far it may be.

    Attributes:
        error: largest difference to the reference; infinite when the result is not finite where the reference is.
        eager_error: the eager path's, in the result's dtype.
        bound: what is allowed.
    """

    error: float
    eager_error: float
    bound: float

    @property
    def is_within(self) -> bool:
        """Whether the rule is kept."""
        return self.error <= self.bound


def deviation(
    got: Tensor, eager: Tensor, reference: Tensor, *, factor: float = FORWARD_FACTOR, unavoidable: float = 0.0
) -> Deviation:
    """Compare a result with the float64 reference, given what eager in the same dtype gives (float32 if that is
    float64: then scaled by the ratio of the two types' eps).

    Eager's error may be near nothing by luck, so one rounding of the largest result is allowed besides, and
    `unavoidable`: what rounding of cancelling terms may add.
    """
    if got.numel() == 0:
        return Deviation(0.0, 0.0, 0.0)
    reference = reference.double()
    error = (got.double() - reference).abs().max().item() if bool(got.isfinite().all()) else float("inf")
    eps = torch.finfo(got.dtype).eps
    eager_error = (eager.double() - reference).abs().max().item() * eps / torch.finfo(eager.dtype).eps
    bound = factor * eager_error + eps * reference.abs().max().item() + unavoidable
    return Deviation(error, eager_error, bound)
