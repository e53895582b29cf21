"""A pytest plugin: names a failed test when it fails, so that a run which is cut off has said what it found."""

from __future__ import annotations

from typing import Any


def pytest_runtest_logreport(report: Any) -> None:
    """One line: the test, and what was wrong."""
    if report.failed:
        crash = getattr(report.longrepr, "reprcrash", None)
        message = str(crash.message if crash is not None else report.longrepr)
        print(f"\nFAILED {report.nodeid} - {' '.join(message.split())[:400]}", flush=True)
