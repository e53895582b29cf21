"""Functions that torch.compile keeps apart although they are the same."""

from __future__ import annotations

import types


def with_own_code(function: types.FunctionType) -> types.FunctionType:
    """A copy with a code object of its own: dynamo keeps and limits what it compiles by code object, so that models
    would count against one another, and what a backend's choice was compiled into would serve another choice."""
    code = function.__code__.replace(co_name=f"compiled_{function.__name__}")
    copy = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
