"""What a swapped module carries with it: how its attention is to work, and what was there before.

Both live on the module, so that a deep copy of a swapped model is swapped as well, and knows its way back.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

ATTRIBUTE = "_mmattn"  # of a swapped module
NAME = "mmattn"  # of our attention function, in transformers' registries
MASKS_LIKE_SDPA = ("sdpa", NAME)  # implementations whose boolean masks may be None for "causal"
SERVED = ("sdpa", NAME, "eager", None)  # implementations whose masks our attention understands


class Settings:
    """How a swapped module is to work.

    Attributes:
        role: "self", "cross" or "joint".
        backend: a name of `mmattn.backends()`, or "auto".
        where: the layer's name, for messages.
        unsupported: keyword arguments that change what stock's function computes, and that ours does not know.
        stock: what the step that attached this has to put back.
    """

    def __init__(
        self,
        role: str = "self",
        backend: str = "auto",
        where: str = "an attention layer",
        unsupported: frozenset[str] = frozenset(),
        stock: Any = None,
    ) -> None:
        self.role = role
        self.backend = backend
        self.where = where
        self.unsupported = unsupported
        self.stock = stock

    @property
    def named_role(self) -> str | None:
        """The role, as `mmattn.attention` takes it."""
        return self.role if self.role in ("self", "cross") else None

    def attach(self, module: nn.Module) -> None:
        """Make them a module's settings."""
        setattr(module, ATTRIBUTE, self)
        _ATTACHED.add(self)

    def detach(self, module: nn.Module) -> None:
        """Take them off again."""
        vars(module).pop(ATTRIBUTE, None)
        _ATTACHED.discard(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy, or a model read from a file: in use from the start, and the registries may not know us yet.
        from mmattn.swap.transformers.registration import register

        vars(self).update(state)
        _ATTACHED.add(self)
        register()


_ATTACHED: weakref.WeakSet[Settings] = weakref.WeakSet()
_DEFAULT = Settings()  # for a model whose implementation somebody has set to our name by hand


def settings_of(module: nn.Module) -> Settings:
    """A module's settings; the defaults for one that was never swapped."""
    return getattr(module, ATTRIBUTE, _DEFAULT)


def attached(module: nn.Module) -> Settings | None:
    """A module's settings, None for one that is not swapped."""
    found = vars(module).get(ATTRIBUTE)
    return found if isinstance(found, Settings) else None


def are_in_use() -> bool:
    """Whether any module is swapped now, copies of swapped models included."""
    return len(_ATTACHED) > 0


def implementation_of(config: Any) -> str | None:
    """The name of the attention implementation that a config asks for, also when seen through a `ConfigView`. It
    decides what the model's masks look like."""
    return getattr(config, "_attn_implementation_internal", None)


class ConfigView:
    """Mixin of config classes, made by `view_of`: the same config, asking for our attention.

    Attention modules ask their config which implementation to call, and so does the code that makes masks. A module
    of its own view calls our attention, while masks, other modules, other models with the same config, and what
    `save_pretrained` writes stay as they were.
    """

    __slots__ = ()
    stock_config: PreTrainedConfig

    @property
    def _attn_implementation(self) -> str:
        return NAME

    @_attn_implementation.setter
    def _attn_implementation(self, value: Any) -> None:
        self.stock_config._attn_implementation = value

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return view_of(copy.deepcopy(self.stock_config, memo))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return view_of, (self.stock_config,)


_VIEW_CLASSES: dict[type, type] = {}


def view_of(config: PreTrainedConfig) -> Any:
    """A view of a config: an instance of its class that shares all its attributes, whoever sets them, but for the name
    of the attention implementation."""
    cls = type(config)
    view_class = _VIEW_CLASSES.get(cls)
    if view_class is None:
        contents = {"__slots__": ("stock_config",), "__module__": cls.__module__, "__qualname__": cls.__qualname__}
        view_class = _VIEW_CLASSES[cls] = type(cls.__name__, (ConfigView, cls), contents)
    view = object.__new__(view_class)
    object.__setattr__(view, "__dict__", vars(config))
    vars(view_class)["stock_config"].__set__(view, config)
    return view
