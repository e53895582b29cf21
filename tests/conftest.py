"""Of the whole suite."""

import gc


def pytest_collection_finish() -> None:
    """What the libraries made when they were imported stays: collections need not look at it again and again."""
    gc.collect()
    gc.freeze()


def pytest_unconfigure() -> None:
    """At the end it may go: libraries complain of what is left."""
    gc.unfreeze()
