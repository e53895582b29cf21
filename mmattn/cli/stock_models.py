"""Opens models of diffusers and transformers: a pipeline, or one model, with its weights or from its config alone."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn

from mmattn.errors import UsageError
from mmattn.models.sources import read_json

PIPELINE, CONFIG = "model_index.json", "config.json"


class Outline:
    """The models of a pipeline, by component; schedulers, tokenizers and the like are left out."""

    def __init__(self, components: dict[str, nn.Module]) -> None:
        self.components = components


def open_model(name: str, parts: Collection[str]) -> Any:
    """A model with its weights, in evaluation mode; of a pipeline an `Outline` of the parts that are named.

    Args:
        name: a folder, or a hub id.
        parts: of a pipeline.

    Raises:
        UsageError: when it is neither, or cannot be opened; one line that says why.
    """
    facts, kind = model_facts(name)
    with _saying(name):
        if kind == CONFIG:
            return _class_of(facts, name).from_pretrained(name).eval()
        classes = {part: cls for part, cls in _part_classes(facts).items() if part in parts}
        opened = {part: cls.from_pretrained(name, subfolder=part).eval() for part, cls in classes.items()}
        return _outline(facts, opened)


def outline_model(name: str) -> Any:
    """The same from the config files alone, with every weight on meta. What cannot be made so is opened.

    Raises:
        UsageError: as `open_model`.
    """
    facts, kind = model_facts(name)
    classes = {"": _class_of(facts, name)} if kind == CONFIG else _part_classes(facts)
    made = {}
    for part, cls in classes.items():
        place = {"subfolder": part} if part else {}
        with _saying(name):
            try:
                with torch.device("meta"):
                    made[part] = _from_config(cls, name, place)
            except RuntimeError:  # its constructor computes with the numbers in tensors
                made[part] = cls.from_pretrained(name, **place)
    return made[""] if kind == CONFIG else _outline(facts, made)


def _outline(facts: dict[str, Any], models: dict[str, nn.Module]) -> Outline:
    """Of a class of the pipeline's name, so that reports have it."""
    return type(str(facts.get("_class_name", "Pipeline")), (Outline,), {})(models)


def model_facts(name: str) -> tuple[dict[str, Any], str]:
    """What a folder's or repository's main file says, and which of the two it is."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

    folder = Path(name).expanduser()
    if not folder.is_dir() and (name.startswith((".", "/", "~")) or name.count("/") > 1):
        raise UsageError(f"{name}: no such folder")
    for kind in (PIPELINE, CONFIG):
        path = folder / kind
        if not folder.is_dir():
            try:
                path = Path(hf_hub_download(name, kind))
            except LocalEntryNotFoundError as error:  # an EntryNotFoundError too: the hub was not asked, or not reached
                raise _not_found(name, error) from error
            except EntryNotFoundError:
                continue
            except (HFValidationError, OSError) as error:
                raise _not_found(name, error) from error
        if path.is_file():
            return read_json(path), kind
    raise UsageError(
        f"{name}: neither a diffusers pipeline ({PIPELINE}) nor a diffusers or transformers model ({CONFIG})"
    )


def _not_found(name: str, error: Exception) -> UsageError:
    return UsageError(
        f"{name}: no such folder, and not found on the hub (or the hub cannot be reached): check the spelling "
        f"({type(error).__name__})"
    )


def _class_of(facts: dict[str, Any], name: str) -> Any:
    """The class of a single model."""
    import diffusers
    import transformers

    if "_class_name" in facts:
        return _attribute(diffusers, facts["_class_name"], name)
    if str(facts.get("model_type")).startswith("mmattn_"):
        raise UsageError(f"{name}: a network of mmattn's own, whose attention is mmattn's already: nothing to swap")
    if facts.get("architectures"):
        return _attribute(transformers, facts["architectures"][0], name)
    if "model_type" in facts:
        return transformers.AutoModel
    raise UsageError(f"{name}: its {CONFIG} names no class (_class_name, architectures or model_type)")


def _attribute(library: ModuleType, class_name: Any, name: str) -> Any:
    cls = getattr(library, str(class_name), None)
    if cls is None:
        raise UsageError(f"{name}: {library.__name__} {library.__version__} has no class {class_name}")
    return cls


def _part_classes(facts: dict[str, Any]) -> dict[str, Any]:
    """The models among a pipeline's components: those of the libraries' own classes."""
    import diffusers
    import transformers

    libraries = {"diffusers": diffusers, "transformers": transformers}
    entries = {part: entry for part, entry in facts.items() if isinstance(entry, list) and len(entry) == 2}
    found = {part: getattr(libraries.get(str(library)), str(cls), None) for part, (library, cls) in entries.items()}
    return {part: cls for part, cls in found.items() if isinstance(cls, type) and issubclass(cls, nn.Module)}


def _from_config(cls: Any, name: str, place: dict[str, str]) -> nn.Module:
    import transformers

    if hasattr(cls, "load_config"):
        return cls.from_config(cls.load_config(name, **place))
    if cls is transformers.AutoModel:
        return cls.from_config(transformers.AutoConfig.from_pretrained(name, **place))
    return cls._from_config(cls.config_class.from_pretrained(name, **place))


@contextlib.contextmanager
def _saying(name: str) -> Iterator[None]:
    """Turn what goes wrong while a model is opened into one line."""
    from safetensors import SafetensorError

    try:
        yield
    except UsageError:
        raise
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        ImportError,
        RuntimeError,
        SafetensorError,
    ) as error:
        raise UsageError(f"{name}: cannot be opened: {error}") from error
