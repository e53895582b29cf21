"""A Chromium that starts: one of the system's, else Playwright's. By itself it exits with 0 or says why none is."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

CHROMIUMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
PATIENCE = 30_000  # milliseconds


class NoChromiumError(Exception):
    """None starts; the message says of each why."""


def open_chromium(playwright: Any) -> Any:
    """The first one that starts.

    Raises:
        NoChromiumError: none does.
    """
    from playwright.sync_api import Error

    reasons = []
    paths = [*filter(None, map(shutil.which, CHROMIUMS)), playwright.chromium.executable_path]
    for path in dict.fromkeys(path for path in paths if Path(path).exists()):
        try:
            return playwright.chromium.launch(executable_path=path, args=FLAGS, timeout=PATIENCE)
        except Error as error:
            reasons.append(f"{path} does not start: {error.message.splitlines()[0]}")
    raise NoChromiumError("; ".join(reasons) or "no Chromium: install one, or run `playwright install chromium`")


def main() -> None:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        try:
            open_chromium(playwright).close()
        except NoChromiumError as error:
            sys.exit(str(error))


if __name__ == "__main__":
    main()
