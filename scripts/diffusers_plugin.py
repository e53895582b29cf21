"""A pytest plugin for diffusers' own tests: our attention in every model that they build; and what to make of two runs.

    python -m pytest -p diffusers_plugin tests/...        as scripts/diffusers_tests.sh does, in a checkout
    python scripts/diffusers_plugin.py STOCK.json SWAPPED.json

Environment: `ATTENTION`, "stock" or "swapped"; `OUTCOMES`, the file for the results.

With "swapped", `mmattn.swap_attention` is called on each model of the classes below once it is built or loaded, and
before its next call after an IP-Adapter was loaded into it, as its owner would do. What a test installs itself stays.

In both runs more tests than stock's can do without the hub: stand-ins with random weights are made for the tiny
tokenizer and text encoder that most of them load from there, and transformers' test of peft's version is left out (it
asks for one that is not released, and adapters of text encoders work without).
"""

from __future__ import annotations

import functools
import json
import os
import sys
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers.loaders.unet import UNet2DConditionLoadersMixin
from diffusers.models.modeling_utils import ModelMixin

MODELS = (
    "AutoencoderKL",
    "ControlNetModel",
    "UNet2DConditionModel",
    "UNet2DModel",
    "UNetMotionModel",
)
STAND_INS = ("hf-internal-testing/tiny-random-clip", "peft-internal-testing/tiny-clip-text-2")
TEXT = {"vocab_size": 1000, "hidden_size": 32, "intermediate_size": 37, "num_hidden_layers": 5, "projection_dim": 32}
ENDS = {"bos_token_id": 0, "eos_token_id": 2, "pad_token_id": 1, "num_attention_heads": 4}

outcomes: dict[str, str] = {}
counts: Counter[str] = Counter()
waiting: weakref.WeakSet[Any] = weakref.WeakSet()  # models with a new IP-Adapter


def swap(model: Any) -> None:
    """Put our attention into a model that has its weights."""
    from mmattn import swap_attention
    from mmattn.errors import UsageError

    if any(parameter.is_meta for parameter in model.parameters()):
        return  # being loaded
    try:
        report = swap_attention(model).report()
    except UsageError as error:
        counts[f"not swapped: {error}"] += 1
        return
    counts["models"] += 1
    counts["layers"] += len(report.swapped)
    for layer in report.refused:
        counts[f"refused: {layer.refused}"] += 1


def after(owner: Any, name: str, action: Any) -> None:
    """Call `action(self, result)` whenever `owner.name` has run."""
    original = getattr(owner, name)

    @functools.wraps(original)
    def wrapped(self: Any, *arguments: Any, **keywords: Any) -> Any:
        result = original(self, *arguments, **keywords)
        action(self, result)
        return result

    setattr(owner, name, wrapped)


def swap_everything() -> None:
    """Patch the ways in which a model comes to be."""
    for name in MODELS:
        cls = getattr(diffusers, name)
        after(cls, "__init__", functools.partial(_swap_exact, cls))
    after(UNet2DConditionLoadersMixin, "_load_ip_adapter_weights", lambda model, _: waiting.add(model))
    forward = diffusers.UNet2DConditionModel.forward

    @functools.wraps(forward)
    def swapped_forward(self: Any, *arguments: Any, **keywords: Any) -> Any:
        if self in waiting:
            waiting.discard(self)
            swap(self)
        return forward(self, *arguments, **keywords)

    diffusers.UNet2DConditionModel.forward = swapped_forward
    load = ModelMixin.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(cls: type, *arguments: Any, **keywords: Any) -> Any:
        result = load(cls, *arguments, **keywords)
        if cls.__name__ in MODELS:
            swap(result[0] if isinstance(result, tuple) else result)
        return result

    ModelMixin.from_pretrained = classmethod(from_pretrained)


def _swap_exact(cls: type, model: Any, _: Any) -> None:
    if type(model) is cls:  # a subclass is not done yet
        swap(model)


def tokenizer() -> Any:
    """A tokenizer of CLIP's kind that knows single letters."""
    letters = [chr(code) for code in range(33, 127)]
    words = ["<|startoftext|>", "<|pad|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    vocabulary = {word: number for number, word in enumerate(words)}
    return transformers.CLIPTokenizer(vocab=vocabulary, pad_token="<|pad|>", model_max_length=77)


def text_encoder(cls: type) -> Any:
    """A text encoder with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return cls(transformers.CLIPTextConfig(**TEXT, **ENDS)).eval()


def stand_in(cls: type, make: Any) -> None:
    """Let `cls.from_pretrained` make what the hub would have given."""
    load = cls.from_pretrained.__func__

    @functools.wraps(load)
    def from_pretrained(called: type, name: Any, *arguments: Any, **keywords: Any) -> Any:
        return make(called) if name in STAND_INS else load(called, name, *arguments, **keywords)

    cls.from_pretrained = classmethod(from_pretrained)


def pytest_configure() -> None:
    stand_in(transformers.CLIPTokenizer, lambda _: tokenizer())
    stand_in(transformers.CLIPTextModel, text_encoder)
    stand_in(transformers.CLIPTextModelWithProjection, text_encoder)
    transformers.integrations.peft.check_peft_version = lambda min_version: None
    if os.environ.get("ATTENTION") == "swapped":
        swap_everything()


def pytest_collection_modifyitems(config: Any, items: list[Any]) -> None:
    """Of the tests of whole pipelines only those of IP-Adapters: most others are not about attention."""
    left = [item for item in items if "tests/pipelines/" in item.nodeid and "IPAdapter" not in item.nodeid]
    config.hook.pytest_deselected(items=left)
    items[:] = [item for item in items if item not in left]


def pytest_runtest_logreport(report: Any) -> None:
    if report.when == "call" or report.outcome != "passed":
        outcomes[report.nodeid] = report.outcome


def pytest_sessionfinish() -> None:
    facts = {"diffusers": diffusers.__version__, "from": diffusers.__file__, "counts": counts}
    Path(os.environ["OUTCOMES"]).write_text(json.dumps({"outcomes": outcomes, **facts}, indent=1), encoding="utf-8")


def compare(stock_file: str, swapped_file: str) -> int:
    """Print both sets; 1 when a test passed stock and not swapped, or nothing was swapped."""
    stock, swapped = (json.loads(Path(name).read_text(encoding="utf-8")) for name in (stock_file, swapped_file))
    for name, run in (("stock", stock), ("swapped", swapped)):
        kinds = Counter(run["outcomes"].values())
        print(f"{name}: {', '.join(f'{kinds[kind]} {kind}' for kind in ('passed', 'failed', 'skipped'))}")
    numbers = swapped["counts"]
    print(f"swapped in {numbers.get('models', 0)} models, {numbers.get('layers', 0)} layers")
    for what, count in sorted(numbers.items()):
        if what not in ("models", "layers"):
            print(f"  {count} x {what}")
    passed = {name for name, outcome in stock["outcomes"].items() if outcome == "passed"}
    lost = sorted(name for name in passed if swapped["outcomes"].get(name) != "passed")
    print(f"passed stock and not swapped: {len(lost)}", *(f"  {name}" for name in lost), sep="\n")
    return 1 if lost or not passed or not numbers.get("layers") else 0


if __name__ == "__main__":
    sys.exit(compare(*sys.argv[1:3]))
