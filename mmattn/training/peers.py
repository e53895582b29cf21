"""What a process of a run sees when another one, of the run or a data worker of its own, has died."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from torch.distributed import DistError

from mmattn.errors import RunError


class LostProcessError(RunError):
    """Another process of the run has died or failed; that one, or its launcher, knows why."""

    is_consequence = True


@contextmanager
def deaths_said(num_processes: int, output_dir: Path | str, step: Callable[[], int]) -> Iterator[None]:
    """Inside, the end of another process is said in one line.

    Args:
        num_processes: of the run.
        output_dir: of the run.
        step: the steps done.

    Raises:
        LostProcessError: the connection to another process of the run was lost.
        RunError: a data worker of this process has died.
    """
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        # Raised wherever this process happens to be when the worker ends.
        if "DataLoader worker" in text and "exited unexpectedly" in text:
            raise RunError(f"a data worker died at step {step()}: {text}") from error
        if num_processes > 1 and is_lost_connection(error):
            raise LostProcessError(
                f"lost another of the {num_processes} processes after step {step()}, which was killed or has failed "
                f"(its own line says why): this one ends too; go on with --resume from what lies in {output_dir}"
            ) from error
        raise


def is_lost_connection(error: BaseException) -> bool:
    """Whether an error is one of torch.distributed's about processes that cannot be reached."""
    # gloo's have no class of their own, but name the file that they come from.
    return isinstance(error, DistError) or "gloo/transport" in str(error)
