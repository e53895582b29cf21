"""Recorded maps as a NumPy file."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmattn.errors import RunError, UsageError
from mmattn.maps.recordings import Recorded


def save_maps(path: str | Path, texts: Sequence[Recorded], role: str, layer_names: Mapping[int, str]) -> None:
    """Write arrays `TEXT/LAYER` and `about`; see `AttentionMaps.save`.

    Raises:
        UsageError: a name that does not end in .npz.
        RunError: the file cannot be written.
    """
    path = Path(path)
    if path.suffix != ".npz":
        raise UsageError(f"{path}: maps are saved as NumPy's .npz: give a name that ends so")
    arrays: dict[str, Any] = {}
    for number, recorded in enumerate(texts):
        arrays |= {f"{number}/{layer}": weights.numpy() for layer, weights in recorded.weights.items()}
    names = {str(number): name for number, name in layer_names.items()}
    about = {"role": role, "layers": names, "texts": [recorded.about() for recorded in texts]}
    arrays["about"] = np.array(json.dumps(about, ensure_ascii=False))
    part = path.with_name(f"{path.name}.part")
    try:
        with part.open("wb") as file:
            np.savez_compressed(file, **arrays)
        os.replace(part, path)  # what has this name is complete
    except OSError as error:
        with contextlib.suppress(OSError):  # nothing can be deleted either where nothing can be written
            part.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written ({error.strerror or error})") from error
