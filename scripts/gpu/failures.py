"""A pytest plugin: names a failed test when it fails, and says how many have ended when it is interrupted: a run which
is cut off has said what it found."""

from __future__ import annotations

from collections import Counter
from typing import Any

_ENDED: Counter[str] = Counter()


def pytest_runtest_logreport(report: Any) -> None:
    """One line for a failed test: its name, and what was wrong."""
    if report.when == "call" or report.outcome != "passed":
        _ENDED[report.outcome] += 1
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(crash.message if crash is not None else report.longrepr)
        print(f"\nFAILED {report.nodeid} - {' '.join(message.split())[:400]}", flush=True)


def pytest_keyboard_interrupt() -> None:
    """One line: pytest's own comes only after all workers, which may take longer to end than they are given."""
    found = ", ".join(f"{number} {outcome}" for outcome, number in _ENDED.items())
    print(f"\ninterrupted: {found or 'no test had ended'}", flush=True)
