"""What the server of `tests/ranks.py` loads before it forks."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # of all its processes: huggingface_hub reads it once, when it is imported

import pytest  # noqa: F401 (the modules of tests need it)
import sacremoses  # noqa: F401 (tokenizers of Marian import it late)

from mmattn.config import load_recipe

for name in ("translate", "vlm", "diffusion"):
    load_recipe(name)
