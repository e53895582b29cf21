"""torch's scaled_dot_product_attention, given its inputs in the form that its fast kernels serve.

What is chosen here, always exactly (ratios: one process on a 2-core AVX2 machine, torch 2.13, float32):

- Grouped heads are folded into the query axis, [B, H, Lq, D] -> [B, G, H / G * Lq, D]: 1.5 to 2 times as fast as
  `enable_gqa` in decoding on a CPU, and on CUDA it keeps kernels open that know no groups. Where those that do will
  serve the call they are left to: in a step of decoding 4 to 9 times as fast on an H200 (docs/gpu.md).
- On a CPU, padding is cut off instead of masked (1.1 to 1.6 times as fast), for the batch as a whole or per run of
  rows of equal length, whichever reads less. On CUDA the lengths stay on the device: no synchronisation.
- A causal mask is a flag where torch's top-left aligned flag says the same, else a boolean mask.
"""

from __future__ import annotations

import contextlib
import math
import os

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mmattn.errors import BackendError
from mmattn.kernels.plain import is_eager_call, is_forward_mode, is_plain_call
from mmattn.ops import masks
from mmattn.ops.bias_parts import parts_of_bias
from mmattn.ops.derivatives import forward_mode_refused
from mmattn.ops.limits import FLOATS, HALVES, Backend, KnownBad, Limits, compute_capability, torch_device_missing
from mmattn.ops.request import Request, with_positive_scale

# What decides how padding is cut off, measured on that machine in multiplications of a fused product (25 per ns):
# one more call with its slices, the mask's own cost, a key read though it has few queries, an element looked at.
_CALL_COST = 750_000
_MASK_COST = 1_000_000
_READ_COST = 3
_LOOK_COST = 2


def run(request: Request) -> tuple[Tensor, None]:
    """Compute output [B, H, Lq, D]."""
    if is_forward_mode():
        with forward_mode_refused():
            return _run(request), None
    return _run(request), None


def _run(request: Request) -> Tensor:
    query, key, value, attn_mask = request.query, request.key, request.value, request.attn_mask
    if query.numel() == 0 or key.shape[2] == 0:  # without keys, CUDA kernels may leave their output unwritten
        return masks.nothing_for(query, key, value, attn_mask)
    offset = key.shape[2] - query.shape[2] if request.is_causal else None
    if request.key_mask is None:
        return _attend(request, query, key, value, attn_mask, None, offset)
    if not _may_look(query):
        return _attend(request, query, key, value, attn_mask, request.key_mask, offset)
    return _attend_padded(request, request.key_mask, offset)


def _may_look(tensor: Tensor) -> bool:
    """May values decide what is computed? On a CPU looking is free; elsewhere it would wait for the device, and a
    traced graph, a transform of torch.func or a fake tensor cannot."""
    return tensor.device.type == "cpu" and is_eager_call(tensor)


def _attend_padded(request: Request, key_mask: Tensor, offset: int | None) -> Tensor:
    """Cut padding off, on a CPU, where looking at the mask costs nothing."""
    spans, is_contiguous = masks.key_spans(key_mask)
    runs = _runs(spans)
    if is_contiguous and len(runs) > 1 and _runs_are_cheaper(request, spans, len(runs)):
        return _attend_runs(request, runs, offset)
    first = min((start for start, end in spans if end), default=0)
    last = max(end for _, end in spans)
    key, value, attn_mask = request.key, request.value, request.attn_mask
    if last == 0:
        return masks.nothing_for(request.query, key, value, attn_mask)
    if last - first < key.shape[2]:
        key, value, key_mask = key[:, :, first:last], value[:, :, first:last], key_mask[:, first:last]
        attn_mask = None if attn_mask is None else attn_mask[..., first:last]
        offset = None if offset is None else offset - first
    remaining = None if is_contiguous and len(runs) == 1 else key_mask
    return _attend(request, request.query, key, value, attn_mask, remaining, offset)


def _runs(spans: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Neighbouring rows of equal span as (number of rows, first key, last key + 1)."""
    runs: list[tuple[int, int, int]] = []
    for start, end in spans:
        if runs and runs[-1][1:] == (start, end):
            runs[-1] = (runs[-1][0] + 1, start, end)
        else:
            runs.append((1, start, end))
    return runs


def _runs_are_cheaper(request: Request, spans: list[tuple[int, int]], num_runs: int) -> bool:
    """Is one call per run of equal rows cheaper than one masked call over the longest row?"""
    _, heads, num_queries, head_dim = request.query.shape
    kept = sum(end - start for start, end in spans)
    longest = (max(end for _, end in spans) - min(start for start, end in spans if end)) * len(spans)
    per_key = 2 * heads * head_dim * (num_queries + _READ_COST)
    looked_at = 2 * request.key.shape[1] * head_dim * longest
    return kept * per_key + num_runs * _CALL_COST < longest * per_key + looked_at * _LOOK_COST + _MASK_COST


def _attend_runs(request: Request, runs: list[tuple[int, int, int]], offset: int | None) -> Tensor:
    """One call per run of rows that have the same valid keys: nothing masked, nothing copied but the output."""
    sizes = [rows for rows, _, _ in runs]
    mask = request.attn_mask
    has_mask_rows = mask is not None and mask.shape[0] > 1
    # split, not slices: its backward writes each row's gradient once.
    queries, keys, values = (t.split(sizes) for t in (request.query, request.key, request.value))
    mask_rows = mask.split(sizes) if mask is not None and has_mask_rows else [mask] * len(runs)
    outputs = []
    for (_, start, end), query, key, value, rows in zip(runs, queries, keys, values, mask_rows, strict=True):
        outputs.append(
            _attend(
                request,
                query,
                key[:, :, start:end],
                value[:, :, start:end],
                None if rows is None else rows[..., start:end],
                None,
                None if offset is None else offset - start,
            )
        )
    return torch.cat(outputs)


def _attend(
    request: Request,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None,
    key_mask: Tensor | None,
    offset: int | None,
) -> Tensor:
    """One call over all rows. A causal query i attends to keys j <= i + offset."""
    num_queries, num_keys = query.shape[2], key.shape[2]
    if attn_mask is None and key_mask is None:
        if offset is None or offset >= num_keys - 1:
            return _kernel(request, query, key, value, None, False)
        if offset == 0:
            return _kernel(request, query, key, value, None, True)
    extra = None if key_mask is None else key_mask[:, None, None, :]
    if offset is not None and offset < num_keys - 1:
        causal = masks.causal_mask(num_queries, num_keys, offset=offset, device=query.device)[None, None]
        extra = masks.combine(extra, causal)
    return _attend_masked(request, query, key, value, attn_mask, extra)


def _attend_masked(
    request: Request, query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, extra: Tensor | None
) -> Tensor:
    """A masked call; `extra` is a boolean mask to be met besides `attn_mask`. At least one of the two is there.

    Rows without keys: torch's CPU kernels give zeros and zero gradients. CUDA kernels differ among themselves, so
    there such rows attend to everything and their output is then set to zero, which makes their gradients zero too.
    """
    mask = _joined(attn_mask, extra, _bias_dtype(attn_mask, query))
    if _may_look(query):
        if not _is_finite(key, value):
            key, value = masks.zero_unused(key, value, _allowed(mask))
        return _kernel(request, query, key, value, mask, False)
    if mask.dtype is torch.bool and mask.shape[1:3] == (1, 1):
        return _attend_keys(request, query, key, value, mask)
    if mask.dtype is not torch.bool and mask.shape[2] == 1 and _fits_keys(mask, query, key):
        return _attend_bias(request, query, key, value, mask)
    allowed = _allowed(mask)
    key, value = masks.zero_unused(key, value, allowed)
    empty = masks.empty_rows(allowed)
    mask = mask | empty if mask.dtype is torch.bool else mask.masked_fill(empty, 0.0)
    return _kernel(request, query, key, value, mask, False).masked_fill(empty, 0.0)


def _attend_keys(request: Request, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """A call with a mask [B or 1, 1, 1, Lk] whose values stay on the device, in as few operations as there can be.

    A row without keys attends to all of them evenly, and all of its values are zeros: so is its output, and so are its
    gradients. Its mask has to say so: were "may not" a number far below all scores instead of -inf, such a row's
    log-sum-exp would be as far below, and its rounding alone makes exp(score - lse) infinite in a backward.
    """
    zero, may_not = _zero_and_may_not(query)
    is_used = mask.transpose(2, 3)
    key, value = torch.where(is_used, key, zero), torch.where(is_used, value, zero)
    may_not = torch.where(mask.any(dim=-1, keepdim=True), may_not, zero)
    return _kernel(request, query, key, value, torch.where(mask, zero, may_not), False)


def _fits_keys(mask: Tensor, query: Tensor, key: Tensor) -> bool:
    """Has each of its heads a head of keys?"""
    return mask.shape[1] == 1 or query.shape[1] == key.shape[1]


def _attend_bias(request: Request, query: Tensor, key: Tensor, value: Tensor, mask: Tensor) -> Tensor:
    """As `_attend_keys`, with a float mask [B or 1, H or 1, 1, Lk]: -inf leaves a key out."""
    zero, _ = _zero_and_may_not(query)
    is_used, bias = parts_of_bias(mask)
    key, value = torch.where(is_used, key, zero), torch.where(is_used, value, zero)
    return _kernel(request, query, key, value, bias, False)


# For each device and dtype, on the device: from Python each would be a kernel more in every call.
_NUMBERS: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}


def _zero_and_may_not(query: Tensor) -> tuple[Tensor, Tensor]:
    """0 and -inf, what is added to the score of a key that may not be attended to, in query's dtype."""
    if not is_plain_call(query):
        return _numbers(query)
    found = _NUMBERS.get((query.device, query.dtype))
    if found is None:
        with torch.inference_mode(False):
            found = _numbers(query)
        # What a CUDA graph makes is there when it is replayed, no sooner.
        if not (query.is_cuda and torch.cuda.is_current_stream_capturing()):
            _NUMBERS[query.device, query.dtype] = found
    return found


def _numbers(query: Tensor) -> tuple[Tensor, Tensor]:
    return query.new_zeros(()), query.new_full((), float("-inf"))


def _wants_grad(query: Tensor, key: Tensor, value: Tensor) -> bool:
    return torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)


def _joined(attn_mask: Tensor | None, extra: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Both masks as one: boolean, or float with -inf where either forbids."""
    if attn_mask is None or attn_mask.dtype is torch.bool:
        mask = masks.combine(attn_mask, extra)
        assert mask is not None  # the caller has one of the two
        return mask
    attn_mask = masks.in_dtype(attn_mask, dtype)
    return attn_mask if extra is None else attn_mask.masked_fill(~extra, float("-inf"))


def _bias_dtype(attn_mask: Tensor | None, query: Tensor) -> torch.dtype:
    """What a float mask is added as. Torch's CPU kernels take float32 beside half types: nothing is rounded."""
    if attn_mask is None or attn_mask.dtype is query.dtype or query.device.type != "cpu":
        return query.dtype
    return torch.promote_types(query.dtype, torch.float32)


def _allowed(mask: Tensor) -> Tensor:
    return mask if mask.dtype is torch.bool else mask > float("-inf")


def _is_finite(key: Tensor, value: Tensor) -> bool:
    """True only if every element is finite: a sum passes on any NaN or infinity, and reads ten times as fast as a
    masked copy is made. (A sum that overflows costs that copy, nothing else.)"""
    return math.isfinite((key.detach().sum() + value.detach().sum()).item())


def _kernel(
    request: Request, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, is_causal: bool
) -> Tensor:
    """The fused call itself, grouped heads folded into the query axis."""
    shape = query.shape
    heads, kv_heads = shape[1], key.shape[1]
    is_grouped = False
    if heads != kv_heads:  # asked, so that the flag is a plain one when sizes are traced, too
        if not is_causal and not _is_served_in_groups(query, key, value, mask, request.dropout_p):
            query, mask = _fold(query, mask, kv_heads)
        elif _repeats_groups(query):
            key, value = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (key, value))
        else:
            is_grouped = True
    dropout_p = request.dropout_p
    query, scale = with_positive_scale(query, request.scale)
    if query.device.type == "cuda":
        with _safe_kernels(query, key, value, mask):
            output = F.scaled_dot_product_attention(
                query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=is_grouped
            )
    else:
        output = F.scaled_dot_product_attention(
            query, key, value, mask, dropout_p, is_causal, scale=scale, enable_gqa=is_grouped
        )
    return output if query.shape == shape else _unfold(output, shape)


# Of CUDA's kernels flash and cuDNN know groups, and of these only cuDNN a mask, up to this size of a head.
_MOST_GROUPED_HEAD_DIM = 128


def _is_served_in_groups(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout_p: float) -> bool:
    """Will a fast kernel that knows grouped heads take the call as it is? Where none does, torch takes its slowest."""
    if query.device.type != "cuda" or query.dtype not in HALVES:
        return False
    head_dim = query.shape[3]
    # Of several queries a head they are slower: flash has one program for all of them, once they are folded.
    if query.shape[2] != 1 or _wants_grad(query, key, value) or head_dim > _MOST_GROUPED_HEAD_DIM or head_dim % 8:
        return False
    has_flash, has_cudnn = _know_groups(query.device)
    if has_flash and mask is None:
        return True
    # What cuDNN refuses. (Of dropout only some: nobody wants it without gradients.)
    return has_cudnn and key.shape[2] > 1 and dropout_p == 0.0 and not (mask is not None and mask.requires_grad)


@torch.compiler.assume_constant_result
def _know_groups(device: torch.device) -> tuple[bool, bool]:
    """Whether flash serves such calls here, and cuDNN: the card and the caller's settings allow it."""
    if not torch.cuda.is_available():
        return False, False
    major = compute_capability(device)[0]
    backends = torch.backends.cuda
    has_flash = major >= 8 and backends.flash_sdp_enabled() and backends.is_flash_attention_available()
    return has_flash, major == 9 and backends.cudnn_sdp_enabled() and _is_cudnn_preferred()


def _is_cudnn_preferred() -> bool:
    """Does torch ask cuDNN first? Else its slowest kernel comes before (pytorch issue 169849: wheels for CUDA 12)."""
    if torch.get_deterministic_debug_mode() == 2 or os.environ.get("TORCH_CUDNN_SDPA_DEPRIORITIZED") == "1":
        return False
    return (torch.backends.cudnn.version() or 0) > 91500


def _repeats_groups(query: Tensor) -> bool:
    """Of CUDA's kernels flash and cuDNN know groups, and neither knows float32: keys and values are repeated there,
    which opens the memory-efficient kernel to the call."""
    return query.device.type == "cuda" and query.dtype is torch.float32


def _fold(query: Tensor, mask: Tensor | None, kv_heads: int) -> tuple[Tensor, Tensor | None]:
    """Query [B, H, Lq, D] as [B, G, H / G * Lq, D], and a mask that broadcasts to [B, H, Lq, Lk] to match."""
    batch, heads, num_queries, head_dim = query.shape
    group = heads // kv_heads
    folded = query.reshape(batch, kv_heads, group * num_queries, head_dim)
    if mask is None or (mask.shape[1] == 1 and mask.shape[2] == 1):
        return folded, mask
    rows, mask_heads, _, num_keys = mask.shape
    if mask_heads == 1:
        mask = mask.unsqueeze(2).expand(rows, 1, group, num_queries, num_keys)
    else:
        mask = mask.expand(rows, heads, num_queries, num_keys).unflatten(1, (kv_heads, group))
    return folded, mask.flatten(2, 3)


def _unfold(output: Tensor, shape: torch.Size) -> Tensor:
    """An output of folded queries as one of queries of this shape [B, H, Lq, D]."""
    if not torch.compiler.is_exporting():
        return output.reshape(shape)
    # Of the layouts that kernels give their outputs `reshape` asks, of any number of queries, what torch.export cannot
    # prove.
    return torch.cat([heads.unflatten(1, (-1, shape[2])) for heads in output.unbind(1)], dim=1)


_CUDNN_MASK = KnownBad(
    what="cuDNN attention backward with a mask, or with a single query (CUDA, torch >= 2.11)",
    effect="NaN in the gradients of query, key or value",
    action="cuDNN is left out of such calls when gradients are wanted",
    reference="pytorch issue 196678, cudnn-frontend issue 1072",
)
_CUDNN_GROUPS = KnownBad(
    what="cuDNN attention with fewer than 8 key/value heads on compute capability 10 (B200)",
    effect="wrong values without an error",
    action="cuDNN is left out of such calls",
    reference="pytorch issue 193893",
)
_IS_ENABLED = (
    (SDPBackend.FLASH_ATTENTION, torch.backends.cuda.flash_sdp_enabled),
    (SDPBackend.EFFICIENT_ATTENTION, torch.backends.cuda.mem_efficient_sdp_enabled),
    (SDPBackend.MATH, torch.backends.cuda.math_sdp_enabled),
)


@torch.compiler.assume_constant_result
def _kernels_without_cudnn() -> list[SDPBackend]:
    """Those that the caller's own `sdpa_kernel` leaves; compiled code keeps what was so when it was compiled."""
    return [kernel for kernel, is_enabled in _IS_ENABLED if is_enabled()]


def _safe_kernels(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None
) -> contextlib.AbstractContextManager[object]:
    """Kernels without those that are known to be wrong for a CUDA call.

    Raises:
        BackendError: when the caller has enabled no other.
    """
    has_grad = _wants_grad(query, key, value)
    is_bad = has_grad and (mask is not None or query.shape[2] == 1)
    is_bad = is_bad or (key.shape[1] < 8 and compute_capability(query.device)[0] == 10)
    if not is_bad:
        return contextlib.nullcontext()
    kernels = _kernels_without_cudnn()
    if not kernels:
        raise BackendError(
            "attention backend 'sdpa': only cuDNN is enabled (sdpa_kernel), and it is known to be wrong for this call "
            "(see mmattn.backends()); enable another kernel"
        )
    return sdpa_kernel(kernels)


BACKEND = Backend(
    name="sdpa",
    run=run,
    limits=Limits(dtypes={"cpu": FLOATS, "cuda": FLOATS}, grad_devices=("cpu", "cuda")),
    unusable=torch_device_missing,
    auto_devices=("cpu", "cuda"),
    known_bad=(_CUDNN_MASK, _CUDNN_GROUPS),
)
