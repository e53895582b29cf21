"""What DeepSpeed keeps for the life of the process, and would keep a run's model and optimiser in memory by."""

from __future__ import annotations

import importlib
from typing import Any


class Leftovers:
    """Of one engine.

    Args:
        engine: DeepSpeed's, which has just been made.
    """

    def __init__(self, engine: Any) -> None:
        self._engine = engine
        self._modules_at_work: list[Any] = _zero("parameter_offload").FWD_MODULE_STACK
        self._first = len(self._modules_at_work)

    def trim(self) -> None:
        """Between passes: forget the modules whose forward passes were left early, as activation checkpointing leaves
        those that it computes anew."""
        del self._modules_at_work[self._first :]

    def give_back(self) -> None:
        """After the engine's own `destroy`."""
        del self._modules_at_work[self._first - 1 :]  # the engine has put the model itself there
        engine = self._engine
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        for parameter in engine.module.parameters():
            del parameter._z3_optimizer
        _clear_cache(_zero("partitioned_param_coordinator").PartitionedParameterCoordinator)


def _clear_cache(coordinators: Any) -> None:
    """Which parameters a module lets go of is remembered by class, with the module."""
    function = coordinators._PartitionedParameterCoordinator__params_to_release
    for cell in function.__closure__ or ():  # DeepSpeed's own decorator is around the one that remembers
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()


def _zero(name: str) -> Any:
    return importlib.import_module(f"deepspeed.runtime.zero.{name}")
