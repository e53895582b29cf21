"""Which modules of a transformers model are attention, what role they have, and which must be left alone.

Nothing is told by a list of models. A class goes through the attention interface when its code names the registry
`ALL_ATTENTION_FUNCTIONS`; other attention is known by its name and by the projections that it holds. What it does
besides is read from its code too.
"""

from __future__ import annotations

import dis
import functools
import inspect
import itertools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import CodeType
from typing import Any

from torch import nn

from mmattn.swap.layers import JOINT
from mmattn.swap.transformers.interface import CHANGING
from mmattn.swap.transformers.settings import NAME, SERVED, implementation_of

_IS_ATTENTION = re.compile(r"Attention|Attn")
_IS_CROSS = re.compile(r"cross_?att|encoder_attn|encdecatt|encoder_decoder_att", re.IGNORECASE)
_EAGER = "eager_attention_forward"  # what most files call their own function, some with a prefix
_IS_MERGED = re.compile(r"MergedAtt|.PerceiverAtt")  # context and queries side by side in one softmax
_STANDARD = frozenset(
    [
        "module",
        "query",
        "key",
        "value",
        "query_states",
        "key_states",
        "value_states",
        "attention_mask",
        "scaling",
        "dropout",
        "is_causal",
        "position_bias",
        "sliding_window",
        "output_attentions",
    ]
)


@dataclass(frozen=True)
class Code:
    """What the code of an attention class says.

    Attributes:
        names: globals and attributes that its methods name.
        constants: strings in it, names of keyword arguments included.
        compared: strings that the name of the implementation is compared with.
        eager: the function that it calls where the implementation is "eager".
        unsupported: keyword arguments of that function that mmattn's attention does not know.
    """

    names: frozenset[str]
    constants: frozenset[str]
    compared: frozenset[str]
    eager: Callable[..., Any] | None
    unsupported: frozenset[str]

    @property
    def asks_interface(self) -> bool:
        """Whether attention goes through transformers' interface."""
        return "ALL_ATTENTION_FUNCTIONS" in self.names


@functools.cache
def code_of(cls: type) -> Code:
    """Read a class's methods, inherited ones included."""
    functions = list(_methods(cls))
    codes = [inner for function in functions for inner in _all_codes(function.__code__)]
    named = [(function.__globals__, name) for function in functions for name in function.__code__.co_names]
    eager = next((space[name] for space, name in named if name.endswith(_EAGER) and callable(space.get(name))), None)
    parameters = [] if eager is None else inspect.signature(eager).parameters.values()
    return Code(
        frozenset(name for code in codes for name in code.co_names),
        frozenset(text for code in codes for text in _strings(code.co_consts)),
        frozenset(text for code in codes for text in _compared(code)),
        eager,
        frozenset(each.name for each in parameters if each.kind is not each.VAR_KEYWORD) - _STANDARD,
    )


def _methods(cls: type) -> Iterator[Any]:
    """The Python functions that a class's instances have, but for `nn.Module`'s, without decorators."""
    names = {name for base in cls.__mro__ if base not in nn.Module.__mro__ for name in vars(base)}
    for name in sorted(names):
        function = inspect.unwrap(inspect.getattr_static(cls, name, None))  # pyright: ignore[reportArgumentType]
        if inspect.isfunction(function):
            yield function


def _all_codes(code: CodeType) -> Iterator[CodeType]:
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _all_codes(constant)


def _strings(constants: Any) -> Iterator[str]:
    for constant in constants:
        if isinstance(constant, str):
            yield constant
        elif isinstance(constant, tuple | frozenset):
            yield from _strings(constant)


def _compared(code: CodeType) -> Iterator[str]:
    """The strings in `x._attn_implementation == "..."` and `... in ("...", "...")`."""
    instructions = list(dis.get_instructions(code))
    for before, after in itertools.pairwise(instructions):
        if before.argval == "_attn_implementation" and after.opname.startswith("LOAD_CONST"):
            yield from _strings((after.argval,))


def is_attention_of_its_own(module: nn.Module) -> bool:
    """Whether a module is attention that does not go through the interface: by name, and because it projects."""
    if isinstance(module, nn.MultiheadAttention):
        return True
    if not _IS_ATTENTION.search(type(module).__name__):
        return False
    projections = [
        child for child in module.children() if any(word in type(child).__name__ for word in ("Linear", "Conv"))
    ]
    return len(projections) > 1


def role_of(module: nn.Module, name: str) -> str:
    """ "cross" by the module's flag, its class or its place in the model; "joint" where queries and context share one
    softmax; else "self", which is what the attention of picture encoders is."""
    cls = type(module).__name__
    if _IS_MERGED.search(cls):
        return JOINT
    flag = getattr(module, "is_cross_attention", None)
    if isinstance(flag, bool):
        return "cross" if flag else "self"
    is_cross = "CrossAtt" in cls or any(_IS_CROSS.search(piece) for piece in name.split(".")[-3:])
    return "cross" if is_cross else "self"


def refusal(module: nn.Module, config: Any) -> str | None:
    """Why a module that asks the interface must be left alone, or None. `config` is its stock config."""
    cls, code = type(module).__name__, code_of(type(module))
    implementation = implementation_of(config)
    if not hasattr(config, "_attn_implementation"):
        return f"{cls}: has no config that says which attention to call"
    if implementation not in SERVED:
        return (
            f"{cls}: masks are made for {implementation}, which mmattn cannot read; call "
            'model.set_attn_implementation("sdpa") first'
        )
    if (implementation or "eager") in code.compared and implementation != NAME:
        return f"{cls}: its code does something else when the implementation is not called {implementation}"
    if getattr(module, "sinks", None) is not None:
        return f"{cls}: attention sinks"
    for name in ("indices", "block_indices"):
        if name in code.constants and name in CHANGING:
            return f"{cls}: sparse attention"
    if "softcap" in code.constants and _softcap(module) is not None:
        return f"{cls}: caps its scores at {_softcap(module)}"
    value_dim = getattr(module, "v_head_dim", None)
    if value_dim is not None and value_dim != getattr(module, "qk_head_dim", value_dim):
        return f"{cls}: values of another head size than keys"
    return None


def _softcap(module: nn.Module) -> Any:
    named = (getattr(module, name, None) for name in ("attn_logit_softcapping", "softcap", "attn_logit_cap"))
    return next((value for value in named if value is not None), None)


def features(module: nn.Module) -> list[str]:
    """What our attention keeps of a module, for the report."""
    constants, kept = code_of(type(module)).constants, []
    if getattr(module, "num_key_value_groups", 1) != 1:
        kept.append("grouped heads")
    if "position_bias" in constants:
        kept.append("position bias")
    if getattr(module, "is_causal", False) is True:
        kept.append("causal")
    if "sliding_window" in constants and getattr(module, "sliding_window", None) is not None:
        kept.append("sliding window")
    return kept
