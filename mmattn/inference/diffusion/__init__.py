"""Text to image: pipelines, prompts, text encoders, and what training needs of them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from transformers.utils import logging as transformers_logging


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)


# Without torchvision, importing diffusers' pipelines makes transformers say twice which image processor it takes
# instead. Text to image has no use for either.
with _quiet_transformers():
    import diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion
    import diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl  # noqa: F401
