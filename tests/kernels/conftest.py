"""Triton decides when a kernel is defined whether its interpreter runs it: tests marked `interpreter` have a process of
their own, `TRITON_INTERPRET=1 pytest -m interpreter tests/kernels` (scripts/test.sh starts it)."""

import os

import pytest

IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def pytest_collection_modifyitems(items):
    for item in items:
        wants = item.get_closest_marker("interpreter") is not None
        if wants and not IS_INTERPRETED:
            item.add_marker(pytest.mark.skip(reason="runs in a process with TRITON_INTERPRET=1"))
        if not wants and IS_INTERPRETED and "tests/kernels" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="not under Triton's interpreter"))
