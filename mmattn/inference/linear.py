"""Matrix products of few rows on a CPU, in the form that is measured to be fastest for their shape.

Decoding multiplies one row, or a few beams, with every weight of the model, and how fast that goes depends on how the
product is put to the library: up to three times from one form to another, and none is best everywhere. So the forms
are timed once per shape, number of rows (to the next power of two) and number of threads in a process, and the fastest
is kept. Results differ by rounding only. Forms:

- `linear`: `F.linear`.
- `transposed`: `W @ x^T`.
- `blocks`: one row against a batch of blocks of the weight, over which threads share the work.
- `columns`: one row times the weight copied column by column.
- `packed`: the weight copied once into oneDNN's own order.

The last two take the weight's memory again; only what is fastest for some number of rows is kept.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.nn import fuse
from mmattn.nn.projected_attention import ProjectedAttention
from mmattn.nn.vocabulary_head import VocabularyHead

_MOST_ROWS = 4096
_PACKED_FOR = 16  # rows for which oneDNN orders a packed weight; the order serves 1 to 128 rows within 10 %
_REPEATS = 4
_TRIAL_BYTES = 2**26  # weights read in one turn of a trial: more than a cache holds, as in a model

Form = Callable[[Tensor], Tensor]
Shape = tuple[int, int, bool]
"""N, K and whether there is a bias."""

_CHOICES: dict[tuple[Shape, int, int], str] = {}


def packing_is_possible() -> bool:
    """Whether this torch has oneDNN's packed products (private operations, used by inductor)."""
    operations = torch.ops.mkldnn
    return torch.backends.mkldnn.is_available() and all(
        hasattr(operations, name) for name in ("_reorder_linear_weight", "_linear_pointwise")
    )


def chosen_forms() -> dict[tuple[int, int, int], str]:
    """What was found fastest in this process: (N, K, most rows) to the name of the form."""
    return {(shape[0], shape[1], rows): name for (shape, rows, _), name in _CHOICES.items()}


class FastProduct:
    """`F.linear(x, weight, bias)` to rounding, for one weight: `[..., K]`, `[N, K]`, `[N]` to `[..., N]`.

    With gradients, on other devices, in other dtypes and for many rows it is `F.linear` itself.

    Args:
        group: the products of a network whose weights have the same shape, this one included; they are timed together,
            since a weight that is multiplied twice in a row comes from the cache and says little.
    """

    def __init__(self, group: list[FastProduct] | None = None) -> None:
        self._group = [self] if group is None else group
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._held: tuple[int, int] | None = None
        self._copies: dict[str, Tensor] = {}
        self._forms: dict[int, Form] = {}

    def __deepcopy__(self, memo: dict[int, Any]) -> FastProduct:
        return FastProduct()

    def __getstate__(self) -> dict[str, Any]:
        return FastProduct().__dict__

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The product; see the class."""
        rows = x.numel() // x.shape[-1]
        if torch.is_grad_enabled() or not 1 <= rows <= _MOST_ROWS:
            return F.linear(x, weight, bias)
        # A weight replaced or changed in place makes the copies worthless.
        if (weight.data_ptr(), 0 if weight.is_inference() else weight._version) != self._held:
            self.hold(weight, bias)
        form = self._forms.get(rows)
        if form is None:
            if not all(each.dtype is torch.float32 and each.device.type == "cpu" for each in (x, weight)):
                return F.linear(x, weight, bias)
            form = self._forms[rows] = self._choose(rows)
        return form(x)

    def hold(self, weight: Tensor, bias: Tensor | None) -> None:
        """Be for this weight from now on."""
        self._weight, self._bias = weight.detach(), None if bias is None else bias.detach()
        self._held = (weight.data_ptr(), 0 if weight.is_inference() else weight._version)
        self._copies.clear()
        self._forms.clear()

    @property
    def copied_bytes(self) -> int:
        """Bytes of copies of the weight in other orders, 0 where there is none."""
        return sum(copy.numel() * copy.element_size() for copy in self._copies.values())

    def _choose(self, rows: int) -> Form:
        weight = cast(Tensor, self._weight)
        most = 2 ** math.ceil(math.log2(rows))
        shape = (weight.shape[0], weight.shape[1], self._bias is not None)
        key = (shape, most, torch.get_num_threads())
        if key not in _CHOICES:
            _CHOICES[key] = _fastest(self._alike(shape), most)
        used = {kind for (of, _, _), kind in _CHOICES.items() if of == shape}
        for kind in set(self._copies) - used:
            del self._copies[kind]
        return self.form(_CHOICES[key])

    def _alike(self, shape: Shape) -> list[FastProduct]:
        """Products with weights of this shape, this one first, as many as make up a trial."""
        others = [each for each in self._group if each is not self and each._weight is not None]
        fitting = [each for each in others if each._weight is not None and tuple(each._weight.shape) == shape[:2]]
        return [self, *fitting][: max(1, _TRIAL_BYTES // (4 * shape[0] * shape[1]))]

    def candidates(self, rows: int) -> list[str]:
        """Names of the forms that can serve so many rows."""
        weight = cast(Tensor, self._weight)
        names = ["linear"]
        if rows <= 64:
            names.append("transposed")
        if rows == 1 and torch.get_num_threads() > 1 and weight.is_contiguous():
            names += ["columns", *(f"blocks{n}" for n in (2, 4, 8, 16) if weight.shape[0] % n == 0)]
        return [*names, "packed"] if packing_is_possible() else names

    def form(self, name: str) -> Form:
        """The product in the form of this name."""
        weight, bias = cast(Tensor, self._weight), self._bias
        if name == "linear":
            return lambda x: F.linear(x, weight, bias)
        if name == "transposed":
            return lambda x: _transposed(x, weight, bias)
        if name == "packed":
            packed, product = self._copy(name), torch.ops.mkldnn._linear_pointwise.default
            return lambda x: product(x, packed, bias, "none", [], "")
        if name == "columns":
            return _by_columns(self._copy(name), bias)
        return _in_blocks(weight, bias, int(name.removeprefix("blocks")))

    def _copy(self, name: str) -> Tensor:
        if name not in self._copies:
            weight = cast(Tensor, self._weight)
            if name == "packed":
                self._copies[name] = torch.ops.mkldnn._reorder_linear_weight.default(weight, _PACKED_FOR)
            else:
                self._copies[name] = weight.t().contiguous()
        return self._copies[name]


def _fastest(products: list[FastProduct], rows: int) -> str:
    """The name of the form in which these products of equal shape take least time for so many rows."""
    first = cast(Tensor, products[0]._weight)
    x = first.new_ones(rows, first.shape[1])
    forms = {name: [each.form(name) for each in products] for name in products[0].candidates(rows)}
    best = dict.fromkeys(forms, math.inf)
    for turn in range(_REPEATS + 1):
        for name, of_all in forms.items():
            start = time.perf_counter()
            for form in of_all:
                form(x)
            # The first turn sets things up; a thread that the system interrupts only ever makes a product slower.
            best[name] = min(best[name], math.inf if turn == 0 else time.perf_counter() - start)
    return min(best, key=lambda name: best[name])


def _transposed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    columns = x.reshape(-1, x.shape[-1]).t()
    product = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return product.t().contiguous().view(*x.shape[:-1], -1)


def _by_columns(columns: Tensor, bias: Tensor | None) -> Form:
    def product(x: Tensor) -> Tensor:
        flat = x.reshape(-1, x.shape[-1])
        out = torch.mm(flat, columns) if bias is None else torch.addmm(bias, flat, columns)
        return out.view(*x.shape[:-1], -1)

    return product


def _in_blocks(weight: Tensor, bias: Tensor | None, blocks: int) -> Form:
    """One row times a weight split into `blocks` blocks of rows, as one batched product."""
    out_features, in_features = weight.shape
    split = weight.view(blocks, out_features // blocks, in_features).transpose(1, 2)
    biases = None if bias is None else bias.view(blocks, 1, -1)

    def product(x: Tensor) -> Tensor:
        row = x.reshape(1, 1, in_features).expand(blocks, 1, in_features)
        out = torch.bmm(row, split) if biases is None else torch.baddbmm(biases, row, split)
        return out.view(*x.shape[:-1], out_features)

    return product


class FastLinear(nn.Linear):
    """A Linear that uses a `FastProduct`."""

    fast_product: FastProduct

    def forward(self, input: Tensor) -> Tensor:
        """`[..., K]` to `[..., N]`."""
        return self.fast_product(input, self.weight, self.bias)


class FastHead(VocabularyHead):
    """A vocabulary head that uses a `FastProduct`."""

    fast_product: FastProduct

    def product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `VocabularyHead`."""
        return self.fast_product(hidden, weight, bias)


_FASTER: dict[type, type] = {nn.Linear: FastLinear, VocabularyHead: FastHead}
_PLAIN = {fast: plain for plain, fast in _FASTER.items()}


def use_fast_products(network: nn.Module) -> None:
    """Let every plain Linear and vocabulary head of a network use a `FastProduct`, in place.

    Queries, keys and values of one input become one product. Parameters, names and `state_dict` stay; adapters and
    quantised layers are left alone.

    Raises:
        UsageError: a network in training mode, or one whose projections cannot be fused; see `mmattn.nn.fuse`.
    """
    fuse(network)
    add_fast_products(network)


def add_fast_products(network: nn.Module) -> None:
    """As `use_fast_products`, for a network whose projections stay as they are, fused or not."""
    groups: dict[tuple[int, ...], list[FastProduct]] = {}

    def product_for(weight: Tensor | None, bias: Tensor | None) -> FastProduct:
        group = groups.setdefault(() if weight is None else tuple(weight.shape), [])
        product = FastProduct(group)
        group.append(product)
        if weight is not None:
            product.hold(weight, bias)
        return product

    for module in network.modules():
        # Exact classes only: a subclass has a forward of its own.
        if type(module) in _FASTER:
            weight = cast("Tensor | None", module.weight)
            product = product_for(weight, cast("Tensor | None", module.bias))
            module.__class__ = _FASTER[type(module)]
            module.fast_product = product  # type: ignore[assignment]
        elif isinstance(module, ProjectedAttention) and module.packed is not None:
            module.packed.product = product_for(module.packed.weight, module.packed.bias)


def drop_fast_products(network: nn.Module) -> bool:
    """Undo `add_fast_products`, in place; whether there were any."""
    fast = [module for module in network.modules() if type(module) in _PLAIN]
    for module in fast:
        module.__class__ = _PLAIN[type(module)]
        del module.fast_product
    for module in network.modules():
        if isinstance(module, ProjectedAttention) and module.packed is not None:
            module.packed.product = None
    return bool(fast)


def copied_bytes(network: nn.Module) -> int:
    """Bytes that copies of a network's weights in other orders take beside the weights."""
    products: list[Any] = []
    for module in network.modules():
        products.append(getattr(module, "fast_product", None))
        if isinstance(module, ProjectedAttention) and module.packed is not None:
            products.append(module.packed.product)
    return sum(product.copied_bytes for product in products if isinstance(product, FastProduct))
