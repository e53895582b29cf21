"""Of the whole suite."""

import gc


def pytest_collection_finish() -> None:
    """What the libraries made when they were imported stays: collections need not look at it again and again."""
    gc.collect()
    gc.freeze()
