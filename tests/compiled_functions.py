"""Autograd Functions in compiled code: the gradients of the eager call, on this torch and on 2.11.

torch 2.11 gives no gradient, in silence, to a Function that returns what an operation in place gives back (pytorch
issue 180642): the one tensor leaves the traced forward twice, and the gradient goes to the place that nobody uses.
Newer ones let it leave once. So it is asked here of what was traced, whatever the torch: what is returned is the result
of one operation.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._functorch.autograd_function import autograd_function_apply
from torch.fx import GraphModule, Interpreter, Node


class _Results(Interpreter):
    """Runs a Function's traced forward and keeps what each operation gave."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.results: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        result = self.results[n] = super().run_node(n)
        return result


class _Functions(Interpreter):
    """Runs a traced graph and looks at each Function in it; they are counted."""

    count = 0

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is autograd_function_apply:
            forward, _, *inputs = args
            inside = _Results(forward)
            (output, *_), _ = inside.run(*inputs)
            makers = [node.name for node, result in inside.results.items() if result is output]
            assert len(makers) < 2, f"in a compiled Function {', '.join(makers)} are one tensor, which it returns"
            self.count += 1
        return super().call_function(target, args, kwargs)


def check_compiled_functions(function: Callable[..., Tensor], *tensors: Tensor, count: int = 1) -> None:
    """Fail unless `function`, with so many autograd Functions of one output each, has eager's output and gradients when
    it is compiled."""
    counts = []

    def backend(graph: GraphModule, inputs: list[Any]) -> Any:
        found = _Functions(graph)
        with torch.no_grad():
            found.run(*(each.clone() if isinstance(each, Tensor) else each for each in inputs))
        counts.append(found.count)
        return aot_eager(graph, inputs)

    results = []
    for run in (torch.compile(function, backend=backend, fullgraph=True), function):
        output = run(*tensors)
        results.append((output, *torch.autograd.grad(output.square().sum(), tensors)))
    assert counts == [count]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)
