"""Sums of what programs have found for gradients of keys and values, in a fixed order.

Shapes: B batch, H query heads, G key/value heads, Lk length, D head_dim, S splits.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from mmattn.kernels.launch import SIZES, Launch, card_of, tensor_arguments
from mmattn.kernels.tiles import ceil_div, power_of_two

# Sums that are added at once by one program: four of each thread, of as many parts.
_SUM_BLOCK, _LEAST_SUM_BLOCK = 512, 128
_MOST_PARTS_AT_ONCE = 16


@triton.jit(do_not_specialize=SIZES)
def sum_partials_kernel(
    partials_ptr, grad_key_ptr, grad_value_ptr, grad_key_strides, grad_value_strides,
    num_batches, num_heads, group, num_keys, num_parts, num_blocks,
    HEAD_DIM: tl.constexpr, STEPS: tl.constexpr, BLOCK_PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Gradients of keys and values as sums over splits and over the query heads of a group, in a fixed order."""
    program = tl.program_id(0)
    elements = (program % num_blocks) * BLOCK + tl.arange(0, BLOCK)
    rest = program // num_blocks
    kv_heads = num_heads // group
    kv_head = (rest % kv_heads).to(tl.int64)
    rest = rest // kv_heads
    batch = (rest % num_batches).to(tl.int64)
    which = rest // num_batches
    size = num_keys * HEAD_DIM
    is_element = elements < size
    total = tl.full([BLOCK], 0.0, dtype=tl.float32)
    for step in tl.range(STEPS):
        # One after another, so that every thread has its own sums; all of them on their way at once.
        for number in tl.static_range(BLOCK_PARTS):
            part = step * BLOCK_PARTS + number
            matrix = ((part // group * 2 + which) * num_batches + batch) * num_heads + kv_head * group + part % group
            is_inside = elements < tl.where(part < num_parts, size, 0)
            total += tl.load(partials_ptr + matrix * size + elements, mask=is_inside, other=0.0)
    keys = elements // HEAD_DIM
    columns = elements % HEAD_DIM
    if which == 0:
        base = grad_key_ptr + batch * grad_key_strides[0] + kv_head * grad_key_strides[1]
        pointers = base + keys * grad_key_strides[2] + columns * grad_key_strides[3]
        tl.store(pointers, total.to(grad_key_ptr.dtype.element_ty), mask=is_element)
    else:
        base = grad_value_ptr + batch * grad_value_strides[0] + kv_head * grad_value_strides[1]
        pointers = base + keys * grad_value_strides[2] + columns * grad_value_strides[3]
        tl.store(pointers, total.to(grad_value_ptr.dtype.element_ty), mask=is_element)


def sum_launch(partials: Tensor, grad_key: Tensor, grad_value: Tensor) -> Launch:
    """The launch that adds partials [S, 2, B, H, Lk, D] up into the gradients of keys and values."""
    num_splits, _, batch, heads, num_keys, head_dim = partials.shape
    kv_heads = grad_key.shape[1]
    num_parts = num_splits * (heads // kv_heads)
    block_parts = power_of_two(min(num_parts, _MOST_PARTS_AT_ONCE))
    # Where there is little to add, smaller blocks for more programs.
    wanted = 2 * card_of(partials.device).processors
    matrices = kv_heads * batch * 2
    block = _SUM_BLOCK
    while block > _LEAST_SUM_BLOCK and ceil_div(num_keys * head_dim, block) * matrices < wanted:
        block //= 2
    num_blocks = ceil_div(num_keys * head_dim, block)
    arguments = dict(
        partials_ptr=partials,
        **tensor_arguments(1, grad_key=grad_key, grad_value=grad_value),
        num_batches=batch,
        num_heads=heads,
        group=heads // kv_heads,
        num_keys=num_keys,
        num_parts=num_parts,
        num_blocks=num_blocks,
        HEAD_DIM=head_dim,
        STEPS=ceil_div(num_parts, block_parts),
        BLOCK_PARTS=block_parts,
        BLOCK=block,
    )
    return Launch(sum_partials_kernel, num_blocks * matrices, arguments, block // _LEAST_SUM_BLOCK, 1)
