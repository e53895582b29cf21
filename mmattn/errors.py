"""The errors that mmattn raises on purpose. Each message is one line: what, where, what to do.

The command line prints the message without a traceback and exits with the class's `exit_code`:
2 for wrong usage, configuration or input found before work starts, 1 for a failure while running.
"""

from __future__ import annotations


class MmattnError(Exception):
    """An expected failure.

    Attributes:
        exit_code: of the command line.
        is_everywhere: every process of the run raises it, so that the first alone needs to say it.
        is_consequence: of another process's failure, which says more.
    """

    exit_code = 1
    is_everywhere = False
    is_consequence = False


class UsageError(MmattnError, ValueError):
    """A wrong argument, option or input, known before any work is done."""

    exit_code = 2


class ConfigError(UsageError):
    """A configuration file or override that cannot be used as written."""


class DataError(UsageError):
    """A data set that cannot be used: missing file, wrong column, nothing in it."""


class CheckpointError(UsageError):
    """A checkpoint that cannot be opened: missing, extra or mis-shaped tensors, unsafe or damaged files."""


class BackendError(UsageError):
    """An attention backend that cannot serve the call; the message holds every reason."""


class OptionalPackageError(UsageError, ImportError):
    """A feature needs a package that is not installed; the message says how to install it."""


class RunError(MmattnError):
    """A failure while running: too many bad examples, non-finite training, a full disk."""
