"""One process group at a time writes into an output folder."""

from __future__ import annotations

import errno
import logging
import os
from io import TextIOWrapper
from pathlib import Path
from types import TracebackType

from mmattn.errors import UsageError
from mmattn.training.start import LOCK_FILE

_log = logging.getLogger(__name__)


class OutputLock:
    """An advisory lock on `<output_dir>/.lock`, which ends with the process that holds it, however that ends."""

    def __init__(self, output_dir: Path, *, enabled: bool) -> None:
        self.output_dir, self.enabled = output_dir, enabled
        self._file: TextIOWrapper | None = None

    def __enter__(self) -> OutputLock:
        return self

    def check(self) -> None:
        """Take the lock.

        Raises:
            UsageError: when another run holds it, or `output_dir` is no folder, or cannot be written.
        """
        if not self.enabled or os.name != "posix":
            return
        import fcntl

        if self.output_dir.exists() and not self.output_dir.is_dir():
            raise UsageError(f"output_dir {self.output_dir} is a file")
        try:
            self.output_dir.mkdir(parents=True, exist_ok=True)
            self._file = open(self.output_dir / LOCK_FILE, "w")  # noqa: SIM115 (held as long as the run)
        except OSError as error:
            raise UsageError(
                f"output_dir {self.output_dir} cannot be written ({error.strerror}): mend that, or choose another"
            ) from error
        try:
            # Not flock: data workers would inherit it, and hold it for seconds after the run was killed.
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EAGAIN):  # some network file systems have no locks at all
                _log.warning("%s cannot be locked (%s): let no other run write there", self.output_dir, error.strerror)
                return
            raise UsageError(f"another run is writing into {self.output_dir}: choose another output_dir") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is not None:
            self._file.close()
