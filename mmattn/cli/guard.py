"""Turns what a command raises into one line on stderr and an exit code.

0 done; 1 failed while running; 2 wrong usage, configuration or input; 130 interrupted.
"""

from __future__ import annotations

import errno
import os
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmattn.errors import MmattnError

_PACKAGE = Path(__file__).resolve().parents[1]


def split_debug(argv: Sequence[str]) -> tuple[list[str], bool]:
    """Take `--debug` out of a command line, wherever it stands before `--`: (the rest, whether it was there)."""
    argv = list(argv)
    end = argv.index("--") if "--" in argv else len(argv)
    options = [argument for argument in argv[:end] if argument != "--debug"]
    return options + argv[end:], len(options) < end


def run_guarded(action: Callable[[], Any], *, debug: bool) -> int:
    """Run a command and return its exit code; with `debug` the traceback is printed as well."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _shown_by(warnings.showwarning)
            action()
        return 0
    except SystemExit as stop:
        return _exit_code(stop)
    except KeyboardInterrupt:
        _say("interrupted", debug)
        return 130
    except BrokenPipeError:
        # The reader (`| head`) has gone. Python would complain again when it flushes stdout at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except MmattnError as error:
        _fail(_one_line(error), debug, error.exit_code, error)
        return error.exit_code
    except Exception as error:
        _fail(_unexpected(error, debug=debug), debug, 1, MmattnError())
        return 1


def _unexpected(error: Exception, *, debug: bool) -> str:
    if isinstance(error, UnicodeEncodeError) and "utf" not in error.encoding and "utf" not in sys.stdout.encoding:
        return (
            f"this output is written as {sys.stdout.encoding}, which has no {error.object[error.start]!a}: set "
            "PYTHONIOENCODING=utf-8"
        )
    if _is_out_of_memory(error):
        reason = f" ({_one_line(error)})" if str(error) else ""
        return f"out of memory{reason}: take smaller batches or pictures, or a device that has more of it"
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # of stdout it has no name
        return f"{error.filename or 'the output'}: cannot be written ({error.strerror}); make room, or write elsewhere"
    return f"{type(error).__name__}: {_one_line(error)}" + (
        "" if debug else " (unexpected; --debug shows the traceback)"
    )


def _is_out_of_memory(error: Exception) -> bool:
    """Of a card, or of this machine, for which torch has no class."""
    is_torchs = type(error).__name__ == "OutOfMemoryError" or "can't allocate memory" in str(error)
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and is_torchs)


def _shown_by(others: Callable[..., None]) -> Callable[..., None]:
    """Warnings of this package in a line, without the place in its code; those of others by `others`."""

    def show(message: Any, category: type[Warning], filename: str, *rest: Any) -> None:
        if issubclass(category, UserWarning) and Path(filename).resolve().is_relative_to(_PACKAGE):
            print(f"mmattn: warning: {_one_line(message)}", file=sys.stderr)
        else:
            others(message, category, filename, *rest)

    return show


def _exit_code(stop: SystemExit) -> int:
    if stop.code is None:
        return 0
    if isinstance(stop.code, int):
        return stop.code
    print(stop.code, file=sys.stderr)
    return 1


def _fail(message: str, debug: bool, exit_code: int, kind: MmattnError) -> None:
    if "RANK" not in os.environ:
        _say(message, debug)
        return
    from mmattn.training import rank_report

    is_repetition = kind.is_everywhere and not rank_report.is_first()
    rank_report.write_report(message, exit_code, is_consequence=kind.is_consequence or is_repetition)
    if debug:
        traceback.print_exc()
    if not is_repetition and not rank_report.is_launched():
        _say(message, debug=False)


def _say(message: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    print(f"mmattn: {message}", file=sys.stderr)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
