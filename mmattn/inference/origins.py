"""Which model encoded something: keys and values of another one would be taken, and nothing would say so."""

from __future__ import annotations

from pathlib import Path
from weakref import WeakKeyDictionary

from torch import nn


class Origin:
    """Stands for a model beside what it encoded. Copied or stored it is None: another process has other ones."""

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


_OF_NETWORKS: WeakKeyDictionary[nn.Module, Origin] = WeakKeyDictionary()
_OF_FOLDERS: dict[Path, Origin] = {}


def origin_of(network: nn.Module) -> Origin:
    """The one that stands for this network as long as it lives, in whatever dtype and on whatever device."""
    return _OF_NETWORKS.setdefault(network, Origin())


def opened_from(network: nn.Module, folder: Path) -> None:
    """Let all networks that are opened from a folder have one origin: they encode alike."""
    _OF_NETWORKS[network] = _OF_FOLDERS.setdefault(folder.resolve(), Origin())
