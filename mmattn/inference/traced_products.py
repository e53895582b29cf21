"""Fast products inside compiled code: an operator that torch.compile leaves as it is.

What a `FastProduct` decides while it runs cannot be traced, and the products that inductor puts in its place take up to
three times as long at a few rows on a CPU (docs/lab-notes.md).
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from mmattn.inference.linear import FastProduct
from mmattn.nn.projected_attention import ProjectedAttention

_LIBRARY = torch.library.Library("mmattn", "FRAGMENT")
_LIBRARY.define("fast_product(Tensor x, Tensor weight, Tensor? bias, int number) -> Tensor")
_NUMBERS = itertools.count()
# An operator takes no objects: compiled code names a product by its number, and lives no longer than it.
_PRODUCTS: weakref.WeakValueDictionary[int, TracedProduct] = weakref.WeakValueDictionary()


class TracedProduct(FastProduct):
    """A `FastProduct` that compiled code calls as one operator."""

    number: int

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `FastProduct`."""
        if torch.compiler.is_compiling():
            return torch.ops.mmattn.fast_product.default(x, weight, bias, self.number)
        return super().__call__(x, weight, bias)


@torch.library.impl(_LIBRARY, "fast_product", "CPU")
def _run(x: Tensor, weight: Tensor, bias: Tensor | None, number: int) -> Tensor:
    return _PRODUCTS[number](x, weight, bias)


@torch.library.impl(_LIBRARY, "fast_product", "Meta")
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None, number: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def trace_products(network: nn.Module) -> None:
    """Let the `FastProduct`s of a network be compiled, in place."""
    for product in _products(network):
        product.__class__ = TracedProduct
        assert isinstance(product, TracedProduct)
        product.number = next(_NUMBERS)
        _PRODUCTS[product.number] = product


def _products(network: nn.Module) -> Iterator[FastProduct]:
    for module in network.modules():
        product = getattr(module, "fast_product", None)
        if isinstance(module, ProjectedAttention) and module.packed is not None:
            product = module.packed.product
        if isinstance(product, FastProduct) and not isinstance(product, TracedProduct):
            yield product
