"""Which network encoded something: keys and values of another one would be taken, and nothing would say so."""

from __future__ import annotations

from weakref import WeakKeyDictionary

from torch import nn


class Origin:
    """Stands for a network beside what it encoded. Copied or stored it is None: other processes have other networks."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


_ORIGINS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()


def origin_of(network: nn.Module) -> Origin:
    """The one that stands for this network as long as it lives, in whatever dtype and on whatever device."""
    return _ORIGINS.setdefault(network, Origin())
