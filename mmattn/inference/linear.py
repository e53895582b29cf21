"""Matrix products of few rows on a CPU, in the form that is fastest for their shape.

Decoding with a few beams multiplies as few rows with every weight of the model, and how fast that goes depends on how
the product is put to the library: for 2 to 8 float32 rows, `W @ x^T` takes 0.4 to 0.9 of the time of `x @ W^T` (MKL),
more so the larger the matrix. Results differ by rounding only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.models.vlm.text import VocabularyHead

_FEWEST, _MOST = 2, 8


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(x, weight, bias)`, to rounding: `[..., C]`, `[N, C]`, `[N]` to `[..., N]`.

    With gradients, on other devices, in other dtypes and for other numbers of rows it is `F.linear` itself.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    is_plain = x.dtype is torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
    if not (_FEWEST <= rows <= _MOST and is_plain):
        return F.linear(x, weight, bias)
    columns = x.reshape(rows, -1).t()
    product = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return product.t().contiguous().view(*x.shape[:-1], -1)


class FewRowsLinear(nn.Linear):
    """A Linear that uses `few_rows_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., C]` to `[..., N]`."""
        return few_rows_linear(input, self.weight, self.bias)


class FewRowsHead(VocabularyHead):
    """A vocabulary head that uses `few_rows_linear`."""

    def forward(self, hidden: Tensor, word_embedding: Tensor) -> Tensor:
        """`[..., C]` to `[..., V]`; see `VocabularyHead`."""
        if self.has_transform:
            hidden = self.norm(self.activation(self.dense(hidden)))
        return few_rows_linear(hidden, word_embedding if self.weight is None else self.weight, self.bias)


def use_few_rows_products(network: nn.Module) -> None:
    """Let every plain Linear and vocabulary head of a network use `few_rows_linear`, in place.

    Parameters, names and `state_dict` stay; adapters and quantised layers are left alone. Nothing is done where torch
    was built without MKL, for whose kernels the forms were chosen.
    """
    if not torch.backends.mkl.is_available():
        return
    faster: dict[type, type] = {nn.Linear: FewRowsLinear, VocabularyHead: FewRowsHead}
    for module in network.modules():
        # Exact classes only: a subclass has a forward of its own.
        if type(module) in faster:
            module.__class__ = faster[type(module)]
