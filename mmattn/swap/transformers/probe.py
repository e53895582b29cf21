"""What `verify` runs: one attention layer on random inputs made from the module itself, and a whole model on inputs
made from its config.

Shapes: B batch, H query heads, G key/value heads, Lq / Lk lengths, D head_dim.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmattn.errors import BackendError
from mmattn.swap.transformers.find import code_of
from mmattn.swap.transformers.inputs import make_inputs
from mmattn.swap.transformers.settings import MASKS_LIKE_SDPA, implementation_of
from mmattn.swap.verify import ProbeError, probing

_BATCH, _QUERIES, _KEYS = 2, 7, 11
_HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads")
_DIMS = ("head_dim", "attention_head_size", "key_value_proj_dim", "head_size")


def heads_of(module: nn.Module) -> tuple[int, int, int] | None:
    """(H, G, D) of an attention module, as far as it says so."""
    config = getattr(module, "config", None)
    heads = _first(module, _HEADS) or _first(config, ("num_attention_heads", "num_heads"))
    if heads is None:
        return None
    inner = _first(getattr(module, "q_proj", None) or getattr(module, "query", None), ("out_features",))
    head_dim = _first(module, _DIMS) or (None if inner is None else inner // heads)
    if head_dim is None:
        return None
    groups = getattr(module, "num_key_value_groups", 1)
    return heads, heads // groups, head_dim


def _first(holder: Any, names: tuple[str, ...]) -> int | None:
    values = (getattr(holder, name, None) for name in names)
    return next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), None)


def run_interface(module: Any, role: str) -> Tensor:
    """What a module's attention function, whichever it is now, gives for fixed random queries, keys and values, and a
    mask of padding in the form that the model makes. [B, Lq, H, D]."""
    sizes = heads_of(module)
    assert sizes is not None  # the plan has looked
    heads, kv_heads, head_dim = sizes
    weight = next(iter(module.parameters()))
    num_keys = _KEYS if role == "cross" else _QUERIES
    random = _random(weight)
    query = random(_BATCH, heads, _QUERIES, head_dim)
    key, value = (random(_BATCH, kv_heads, num_keys, head_dim) for _ in range(2))
    mask: Tensor = torch.ones(_BATCH, 1, _QUERIES, num_keys, dtype=torch.bool, device=weight.device)
    mask[-1, :, :, num_keys - 3 :] = False
    if implementation_of(module.config) not in MASKS_LIKE_SDPA:
        lowest = torch.finfo(query.dtype).min
        mask = torch.where(mask, torch.zeros((), dtype=query.dtype, device=weight.device), lowest)
    scaling = getattr(module, "scaling", None)
    scaling = float(scaling) if isinstance(scaling, int | float) else head_dim**-0.5
    output, _ = _function_of(module)(module, query, key, value, mask, dropout=0.0, scaling=scaling)
    return output


def _function_of(module: Any) -> Callable[..., Any]:
    """The function that the module's forward would call."""
    eager: Any = code_of(type(module)).eager
    return ALL_ATTENTION_FUNCTIONS.get_interface(module.config._attn_implementation, eager)


def run_patched(module: Any, role: str) -> Tensor:
    """Output of a module whose forward is replaced, on fixed random inputs: padded states, or a context."""
    projection, key = (_first_child(module, names) for names in (("query", "q_proj", "qkv"), ("key", "k_proj", "qkv")))
    random = _random(projection.weight)
    arguments: dict[str, Any] = {}
    names = inspect.signature(inspect.unwrap(type(module).forward)).parameters
    if role == "cross":
        name = "encoder_hidden_states" if "encoder_hidden_states" in names else "key_value_states"
        arguments[name] = random(_BATCH, _KEYS, key.in_features)
    elif "attention_mask" in names:
        mask = torch.zeros(_BATCH, 1, _QUERIES, _QUERIES, dtype=projection.weight.dtype)
        mask[-1, :, :, -3:] = torch.finfo(mask.dtype).min
        arguments["attention_mask"] = mask.to(projection.weight.device)
    return module(random(_BATCH, _QUERIES, projection.in_features), **arguments)[0]


def _first_child(module: nn.Module, names: tuple[str, ...]) -> Any:
    return next(getattr(module, name) for name in names if hasattr(module, name))


def _random(weight: Tensor) -> Callable[..., Tensor]:
    generator = torch.Generator().manual_seed(0)
    is_real = weight.dtype.is_floating_point and weight.element_size() > 1
    dtype = weight.dtype if is_real else torch.float32

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight.device, dtype)

    return random


def model_probe(model: nn.Module) -> Callable[[], Tensor] | None:
    """A function that runs a model on the same random inputs each time; None where its config does not say enough."""
    if not hasattr(model, "config") or make_inputs(model) is None:
        return None
    return functools.partial(run_model, model)


def run_model(model: nn.Module) -> Tensor:
    """All float outputs of a model on its probe, in one row. A model in half precision is run in
    float32: in its own type, roundings everywhere else hide what attention does.

    Raises:
        ProbeError: when the model does not take what was made from its config.
    """
    inputs = make_inputs(model)
    assert inputs is not None  # the plan has looked
    with probing():
        outputs = list(_floats(_in_single_precision(model, inputs)))
    if not outputs:
        raise ProbeError("it returns no float tensor")
    return torch.cat([output.flatten().to(outputs[0].device) for output in outputs])


def _in_single_precision(model: nn.Module, inputs: dict[str, Any]) -> Any:
    """Call a model with its half-precision weights widened for this call, and nothing else touched."""
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    halves = {name: tensor for name, tensor in tensors.items() if tensor.dtype in (torch.float16, torch.bfloat16)}
    if not halves or any(parameter.element_size() == 1 for parameter in model.parameters()):  # quantised stay
        return model(**inputs)
    wide = {name: value.float() if _is_float(value) else value for name, value in inputs.items()}
    try:
        return functional_call(model, {name: tensor.float() for name, tensor in halves.items()}, (), wide)
    except BackendError:  # a backend that serves half types alone
        return model(**inputs)


def _floats(output: Any) -> Iterator[Tensor]:
    """The float tensors in an output of nested tuples, lists and dicts; not those in caches."""
    if _is_float(output):
        yield output
    elif isinstance(output, dict | list | tuple):
        for value in output.values() if isinstance(output, dict) else output:
            yield from _floats(value)


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
