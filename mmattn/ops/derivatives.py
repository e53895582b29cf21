"""Forward-mode derivatives, which fused kernels do not have: who asks for them is told which backend has."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from mmattn.errors import BackendError


@contextlib.contextmanager
def forward_mode_refused() -> Iterator[None]:
    """Around a fused kernel's call within forward-mode derivatives: names the backend where it has none.

    Raises:
        BackendError: it has none.
    """
    try:
        yield
    except NotImplementedError as error:
        raise BackendError(
            "attention: torch's fused kernels have no forward-mode derivatives (torch.func.jvp, jacfwd): "
            'backend="eager" has them (mmattn.use_backend, or the argument of a call or block)'
        ) from error
