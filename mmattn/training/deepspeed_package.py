"""DeepSpeed, an optional package, as it is opened for a run."""

from __future__ import annotations

import importlib
import os
import warnings
from contextlib import AbstractContextManager, nullcontext
from types import ModuleType

from packaging.specifiers import SpecifierSet

from mmattn._environment import changed_environment
from mmattn._optional import require
from mmattn.errors import UsageError

# Attributes of its parameters and of its optimiser are used (`zero3_pieces.py`, `zero3_steps.py`).
VERSIONS = SpecifierSet(">=0.19.8,<0.20")
_ACCELERATOR = "DS_ACCELERATOR"


def open_deepspeed(device_type: str) -> ModuleType:
    """The package, set up for that kind of device.

    Raises:
        OptionalPackageError: it is not installed.
        UsageError: it is of another version, or has been set up for another kind of device.
    """
    # On a CPU it would take a GPU that is there.
    with changed_environment({_ACCELERATOR: "cpu"}) if device_type == "cpu" else nullcontext():
        deepspeed = require("deepspeed", "training.sharding=zero3")
        found = importlib.import_module("deepspeed.accelerator").get_accelerator().device_name()
    if not VERSIONS.contains(deepspeed.__version__.split("+")[0], prereleases=True):
        raise UsageError(
            f"training.sharding=zero3 works with deepspeed{VERSIONS}, this is {deepspeed.__version__}: install one of "
            "those, or use training.sharding=fsdp2"
        )
    if found != device_type:
        raise UsageError(
            f"DeepSpeed was imported for {found}, and this run is on {device_type}: set {_ACCELERATOR}={device_type}"
        )
    if device_type == "cpu":
        # It would be compiled at the first use, and nothing here calls it. Past the module's own `__getattr__`, which
        # would try the compilers for each of its operations.
        vars(deepspeed.ops).setdefault("__compatible_ops__", {})["deepspeed_shm_comm"] = False
    # Said once elsewhere, and at every call under DeepSpeed, which calls the old names itself.
    warnings.filterwarnings("ignore", r"`?torch\.distributed\.[\w.]+`? is deprecated", FutureWarning)
    return deepspeed


def told_local_size() -> AbstractContextManager[None]:
    """Inside, DeepSpeed knows how many processes this machine has: on a CPU it would start `numactl` to count its nodes
    at every sum of gradients."""
    known = os.environ.get("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return changed_environment({"LOCAL_SIZE": known})
