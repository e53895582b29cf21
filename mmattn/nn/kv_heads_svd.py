"""The key/value heads that come closest to the scores and outputs of many, by singular value decomposition.

What a query head h computes depends on two products only: scores on `Wq_h^T Wk_h`, outputs on `Wo_h Wv_h`. For heads
that are to share keys or values these matrices are stacked and replaced by the nearest one of rank D in least squares
(Eckart and Young, 1936): its right factor is the shared head, its left factor a new Wq_h or Wo_h for every query head.
C width of the queries, Cc of the context, D head_dim.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmattn.nn.projected_attention import ProjectedAttention


def svd_refusals(module: ProjectedAttention) -> list[str]:
    """Why the heads of a module cannot be merged in this way; empty when they can."""
    reasons = []
    if module.q_norm is not None:
        reasons.append("queries and keys are normed, so scores are no product of weights")
    if getattr(module, "rotary", None) is not None:
        reasons.append("queries and keys are rotated by their places, so scores are no product of weights")
    return reasons


@torch.no_grad()
def merge_by_svd(module: ProjectedAttention, num_kv_heads: int) -> None:
    """Reduce the key/value heads of a module that `svd_refusals` accepts to `num_kv_heads`, in place.

    All four projections change. A key's bias is dropped: it adds the same to all scores of a query, so that softmax
    does not see it.
    """
    head_dim, repeats = module.head_dim, module.num_heads // module.num_kv_heads
    queries = _with_bias(module.q_proj).unflatten(0, (module.num_heads, head_dim))  # [H, D, C + 1]
    keys = module.k_proj.weight.double().unflatten(0, (-1, head_dim)).repeat_interleave(repeats, dim=0)  # [H, D, Cc]
    values = _with_bias(module.v_proj).unflatten(0, (-1, head_dim)).repeat_interleave(repeats, dim=0)  # [H, D, Cc + 1]
    outputs = module.out_proj.weight.double().unflatten(1, (module.num_heads, head_dim)).movedim(1, 0)  # [H, C, D]
    scores = [_nearest(group, head_dim) for group in (queries.transpose(1, 2) @ keys).chunk(num_kv_heads)]
    mixed = [_nearest(group, head_dim) for group in (outputs @ values).chunk(num_kv_heads)]
    _replace(module.q_proj, torch.cat([left for left, _ in scores]).transpose(1, 2).flatten(0, 1))
    _replace(module.k_proj, torch.cat([right for _, right in scores]))
    _replace(module.v_proj, torch.cat([right for _, right in mixed]))
    bias = module.out_proj.bias
    _replace(module.out_proj, torch.cat([left for left, _ in mixed]).movedim(0, 1).flatten(1))
    module.out_proj.bias = bias


def _with_bias(linear: nn.Linear) -> Tensor:
    """The weight [N, K], with the bias as one more column: of an input that is always 1."""
    weight = linear.weight.double()
    return weight if linear.bias is None else torch.cat([weight, linear.bias.double()[:, None]], dim=1)


def _nearest(matrices: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """`[n, M, K]` as left factors `[n, M, rank]` and one right factor `[rank, K]`, nearest in the sum of squares.

    Both sides get the root of the singular values, so that neither learns faster than the other.
    """
    # The right singular vectors of the stacked matrices: K x K is much smaller than n * M x K.
    squares, vectors = torch.linalg.eigh(torch.einsum("nmk,nml->kl", matrices, matrices))
    roots = squares.flip(0)[:rank].clamp_min(0).pow(0.25)
    # Directions that nothing needs keep a right factor, so that training can still find a use for them.
    roots = roots.clamp_min(max(1e-6 * roots[0].item(), torch.finfo(roots.dtype).tiny))
    vectors = vectors.flip(1)[:, :rank]
    left, right = matrices @ vectors / roots, (vectors * roots).T
    missing = rank - right.shape[0]  # a context narrower than a head
    return nn.functional.pad(left, (0, missing)), nn.functional.pad(right, (0, 0, 0, missing))


def _replace(linear: nn.Linear, values: Tensor) -> None:
    """Give a Linear the weight `values`; the column beyond its width becomes the bias, which is zero without one."""
    width, old = linear.in_features, linear.weight
    weight, bias = values[:, :width], values[:, width:].sum(dim=1)
    linear.weight = nn.Parameter(weight.to(old.dtype).contiguous(), old.requires_grad)
    linear.out_features = weight.shape[0]
    if linear.bias is not None:
        linear.bias = nn.Parameter(bias.to(old.dtype), linear.bias.requires_grad)
