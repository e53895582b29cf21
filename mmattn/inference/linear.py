"""Matrix products of few rows on a CPU, in the form that is fastest for their shape.

Decoding multiplies one row, or a few beams, with every weight of the model, and how fast that goes depends on how the
product is put to the library (MKL). One float32 row runs on one thread, so its weight is split into a batch of blocks,
over which the threads share the work: 0.6 to 0.75 of the time on two threads. For 2 to 8 rows `W @ x^T` takes 0.4 to
0.9 of the time of `x @ W^T`, more so the larger the matrix. Results differ by rounding only.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmattn.nn.vocabulary_head import VocabularyHead

_MOST_ROWS = 8


def few_rows_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`F.linear(x, weight, bias)`, to rounding: `[..., C]`, `[N, C]`, `[N]` to `[..., N]`.

    With gradients, on other devices, in other dtypes and for other numbers of rows it is `F.linear` itself.
    """
    rows = x.numel() // max(x.shape[-1], 1)
    is_plain = x.dtype is torch.float32 and x.device.type == "cpu" and not torch.is_grad_enabled()
    if not (1 <= rows <= _MOST_ROWS and is_plain):
        return F.linear(x, weight, bias)
    if rows == 1:
        blocks = _blocks(weight, torch.get_num_threads())
        return F.linear(x, weight, bias) if blocks == 1 else _one_row(x, weight, bias, blocks)
    columns = x.reshape(rows, -1).t()
    product = torch.mm(weight, columns) if bias is None else torch.addmm(bias[:, None], weight, columns)
    return product.t().contiguous().view(*x.shape[:-1], -1)


def _blocks(weight: Tensor, threads: int) -> int:
    """Into how many blocks of rows a weight is split: one to four a thread, and 1 where no even split exists."""
    if threads == 1 or not weight.is_contiguous():
        return 1
    return next((count for count in range(threads, 4 * threads + 1) if weight.shape[0] % count == 0), 1)


def _one_row(x: Tensor, weight: Tensor, bias: Tensor | None, blocks: int) -> Tensor:
    """One row times a weight split into `blocks` blocks of rows, as one batched product."""
    out_features, in_features = weight.shape
    row = x.reshape(1, 1, in_features).expand(blocks, 1, in_features)
    split = weight.view(blocks, out_features // blocks, in_features).transpose(1, 2)
    if bias is None:
        return torch.bmm(row, split).view(*x.shape[:-1], out_features)
    return torch.baddbmm(bias.view(blocks, 1, -1), row, split).view(*x.shape[:-1], out_features)


class FewRowsLinear(nn.Linear):
    """A Linear that uses `few_rows_linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """`[..., C]` to `[..., N]`."""
        return few_rows_linear(input, self.weight, self.bias)


class FewRowsHead(VocabularyHead):
    """A vocabulary head that uses `few_rows_linear`."""

    def product(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """See `VocabularyHead`."""
        return few_rows_linear(hidden, weight, bias)


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
