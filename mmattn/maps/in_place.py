"""What recording and steering put into other people's objects: once for all blocks that need it, and away with the
last of them, in whatever order threads and tasks end."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mmattn.swap.layers import Step, take

_log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Installed:
    target: Any
    steps: list[Step]
    users: int = 0


class Hook:
    """A hook of ours on somebody's module. In a copy of the module, deep or pickled, it does and holds nothing.

    Args:
        call: what it does.
    """

    def __init__(self, call: Callable[..., None]) -> None:
        self._call = call

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        self._call(*args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> Hook:
        return _idle()

    def __reduce__(self) -> tuple[Callable[[], Hook], tuple[()]]:
        return _idle, ()


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    pass


def _idle() -> Hook:
    return Hook(_do_nothing)


_LOCK = threading.RLock()
_INSTALLED: dict[tuple[int, str], _Installed] = {}  # by identity of the target, which is held


@contextlib.contextmanager
def in_place(target: Any, purpose: str, make: Callable[[], list[Step]]) -> Iterator[None]:
    """Within the block the steps are taken. They serve every block of this target and purpose that is open meanwhile,
    in any thread, and are undone with the last.

    Args:
        target: what the steps change.
        purpose: what for; steps of one purpose do the same whoever makes them.
        make: the steps.
    """
    key = id(target), purpose
    with _LOCK:
        installed = _INSTALLED.get(key)
        if installed is None:
            installed = _Installed(target, make())
            take(installed.steps)
            _INSTALLED[key] = installed
        installed.users += 1
    try:
        yield
    finally:
        with _LOCK:
            installed.users -= 1
            if not installed.users:
                del _INSTALLED[key]
                problems = [step.undo() for step in reversed(installed.steps)]
                for problem in filter(None, problems):
                    _log.warning("%s: not restored: %s", purpose, problem)
