"""The kernels for packed sequences, and which of them serves a call of `packed_attention`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from mmattn.errors import BackendError
from mmattn.ops.backends import flash, varlen
from mmattn.ops.limits import Limits
from mmattn.ops.registry import check_name
from mmattn.ops.request import Traits
from mmattn.ops.segments import PackedRequest


@dataclass(frozen=True)
class PackedBackend:
    """One kernel for packed sequences.

    Attributes:
        name: what users write.
        run: serves a request; returns output [N, H, D].
        limits: what it can do.
        unusable: why it cannot be used on this machine, per device type of `limits`; None when it can.
    """

    name: str
    run: Callable[[PackedRequest], Tensor]
    limits: Limits
    unusable: Callable[[str], str | None]

    def refusals(self, traits: Traits) -> list[str]:
        """Every reason against serving a call with these features on this machine."""
        reasons = self.limits.refusals(traits)
        reason = self.unusable(traits.device) if traits.device in self.limits.dtypes else None
        return reasons if reason is None else [*reasons, reason]


# Adding one is a file in `backends/` and a row here. "auto" takes the first row that can serve.
PACKED_TABLE: tuple[PackedBackend, ...] = (
    PackedBackend("varlen", varlen.run, varlen.LIMITS, varlen.unusable),
    PackedBackend("flash", flash.run, flash.LIMITS, flash.unusable),
)


def packed_backend(name: str, traits: Traits) -> PackedBackend | None:
    """The kernel that serves a call with these features; None where an ordinary backend has to, group by group.

    Raises:
        UsageError: an unknown name.
        BackendError: with every reason, when the kernel that was named cannot serve.
    """
    for row in PACKED_TABLE:
        if name == row.name:
            reasons = row.refusals(traits)
            if reasons:
                raise BackendError(f"attention backend {name!r} cannot serve this call: {'; '.join(reasons)}")
            return row
    check_name(name)
    if name != "auto":
        return None
    return next((row for row in PACKED_TABLE if not row.refusals(traits)), None)
