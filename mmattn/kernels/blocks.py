"""Parts that the attention kernels are put together from. A block that is no power of two is a tuple of blocks.

M queries of a block, N keys of a block, D a block of the head.
"""

# What Triton compiles is not what it looks like to a type checker.
# pyright: reportIndexIssue=false, reportAttributeAccessIssue=false, reportOperatorIssue=false
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportReturnType=false
from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
# Of float32 products: three matrix instructions for each, nearly exact. (Half types have one way only.)
PRECISION = tl.constexpr("tf32x3")


@triton.jit
def begin(IS_EARLY: tl.constexpr):
    """What a kernel does first: `Launch.is_early` ones run before the stream's last kernel has ended. Wait until all
    that it writes is there, and let the next one come, which will wait for this."""
    if IS_EARLY:
        tl.extra.cuda.gdc_wait()
        tl.extra.cuda.gdc_launch_dependents()


@triton.jit
def place(num_heads, num_parts):
    """(head, part, rest) of this program. Heads first: programs that run together read whole rows of [B, L, H, D]."""
    program = tl.program_id(0)
    rest = program // num_heads
    return (program % num_heads).to(tl.int64), rest % num_parts, rest // num_parts


@triton.jit
def head_of(tensor_ptr, strides, batch, head, UNIT: tl.constexpr):
    """Where one head of a tensor [B, H, L, D] begins."""
    return tensor_ptr + (batch * strides[0] + head * strides[1]) * UNIT


@triton.jit
def rows_of(tensor_ptr, strides, batch, head, start, UNIT: tl.constexpr):
    """Where the rows from `start` of one head begin."""
    return tensor_ptr + (batch * strides[0] + head * strides[1] + start * strides[2]) * UNIT


@triton.jit
def block_pointers(base, rows, is_row, strides, START: tl.constexpr, SIZE: tl.constexpr, HEAD_DIM: tl.constexpr,
                   UNIT: tl.constexpr):  # fmt: skip
    """(pointers, which of them are inside) of columns START to START + SIZE of rows [M or N]."""
    columns = START + tl.arange(0, SIZE)
    pointers = base + (rows * strides[2] * UNIT)[:, None] + (columns * strides[3])[None, :]
    is_inside = is_row[:, None]
    if START + SIZE > HEAD_DIM:
        is_inside = is_inside & (columns < HEAD_DIM)[None, :]
    return pointers, is_inside


@triton.jit
def load_rows(
    base, rows, is_row, strides, HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Rows [M or N, D] in blocks; zeros outside `is_row` and beyond HEAD_DIM."""
    blocks = ()
    for d in tl.static_range(len(DIM_TILES)):
        pointers, is_inside = block_pointers(
            base, rows, is_row, strides, DIM_TILES[d][0], DIM_TILES[d][1], HEAD_DIM, UNIT
        )  # fmt: skip
        blocks = blocks + (tl.load(pointers, mask=is_inside, other=0.0),)
    return blocks


@triton.jit
def load_rows_of(
    tensor_ptr, strides, batch, head, start, rows, is_row,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """`load_rows`, counted from `start` of one head."""
    base = rows_of(tensor_ptr, strides, batch, head, start, UNIT)
    return load_rows(base, rows, is_row, strides, HEAD_DIM, DIM_TILES, UNIT)


@triton.jit
def store_rows(
    base, blocks, rows, is_row, strides, HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr
):  # fmt: skip
    """Write blocks [M or N, D] where `load_rows` would read them."""
    for d in tl.static_range(len(DIM_TILES)):
        pointers, is_inside = block_pointers(
            base, rows, is_row, strides, DIM_TILES[d][0], DIM_TILES[d][1], HEAD_DIM, UNIT
        )  # fmt: skip
        tl.store(pointers, blocks[d].to(base.dtype.element_ty), mask=is_inside)


@triton.jit
def usable_keys(keys, num_keys, key_mask_row, key_mask_stride, HAS_KEY_MASK: tl.constexpr):
    """Which keys [N] exist and are not padding. Those left out are not even read: NaN in them goes nowhere."""
    is_key = keys < num_keys
    if HAS_KEY_MASK:
        is_key = is_key & (tl.load(key_mask_row + keys * key_mask_stride, mask=is_key, other=0) != 0)
    return is_key


@triton.jit
def row_products(left, right, DIM_TILES: tl.constexpr):
    """left [M, D] @ right [N, D]^T in float32, summed over the blocks of D."""
    products = tl.dot(left[0], right[0].T, input_precision=PRECISION)
    for d in tl.static_range(1, len(DIM_TILES)):
        products = tl.dot(left[d], right[d].T, products, input_precision=PRECISION)
    return products


@triton.jit
def masked_scores(
    query, key, scale, rows, is_row, keys, is_key, attn_mask_rows, attn_mask_strides,
    HAS_ATTN_MASK: tl.constexpr, DIM_TILES: tl.constexpr,
):  # fmt: skip
    """Scores [M, N] times `scale`, -inf where a query may not attend."""
    scores = row_products(query, key, DIM_TILES) * scale
    allowed = is_key[None, :]
    if HAS_ATTN_MASK:
        pointers = attn_mask_rows + (rows * attn_mask_strides[2])[:, None] + (keys * attn_mask_strides[3])[None, :]
        allowed = allowed & (tl.load(pointers, mask=is_row[:, None] & allowed, other=0) != 0)
    return tl.where(allowed, scores, float("-inf"))


@triton.jit
def add_products(totals, left, right, DIM_TILES: tl.constexpr):
    """totals [M, D] + left [M, N] @ right [N, D], each block of D."""
    sums = ()
    for d in tl.static_range(len(DIM_TILES)):
        sums = sums + (tl.dot(left.to(right[d].dtype), right[d], totals[d], input_precision=PRECISION),)
    return sums


@triton.jit
def zero_blocks(ROWS: tl.constexpr, DIM_TILES: tl.constexpr):
    """Float32 zeros [ROWS, D], each block of D."""
    blocks = ()
    for d in tl.static_range(len(DIM_TILES)):
        blocks = blocks + (tl.full([ROWS, DIM_TILES[d][1]], 0.0, dtype=tl.float32),)
    return blocks


@triton.jit
def scaled_rows(blocks, factors, DIM_TILES: tl.constexpr):
    """Blocks [M, D] with row m multiplied by factors[m]."""
    scaled = ()
    for d in tl.static_range(len(DIM_TILES)):
        scaled = scaled + (blocks[d] * factors[:, None],)
    return scaled


@triton.jit
def online_softmax(scores, total, row_max):
    """(weights [M, N], what all sums so far are to be multiplied by [M], sum of weights, largest score) with one more
    block of scores (arXiv 1805.02867)."""
    new_max = tl.maximum(row_max, tl.max(scores, axis=1))
    # Nothing so far: 0 instead of -inf, whose difference to itself is NaN; so the factor is exp2(-inf) = 0.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    weights = tl.exp2(scores - safe_max[:, None])
    factors = tl.exp2(row_max - safe_max)
    return weights, factors, total * factors + tl.sum(weights, axis=1), new_max


@triton.jit
def finish_rows(
    output, total, row_max, output_rows, lse_rows, rows, is_row, output_strides,
    HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Normalise and write; a row without keys has a total of 0, and zeros already."""
    is_empty = total == 0.0
    total = tl.where(is_empty, 1.0, total)
    output = scaled_rows(output, 1.0 / total, DIM_TILES)
    store_rows(output_rows, output, rows, is_row, output_strides, HEAD_DIM, DIM_TILES, UNIT)
    lse = tl.where(is_empty, float("-inf"), (row_max + tl.log2(total)) * LN_2)
    tl.store(lse_rows + rows, lse, mask=is_row)


@triton.jit
def row_sums(left, right, ROWS: tl.constexpr, DIM_TILES: tl.constexpr):
    """Sums [M] over D of left * right [M, D], in float32: delta, of an output and its gradient."""
    sums = tl.full([ROWS], 0.0, dtype=tl.float32)
    for d in tl.static_range(len(DIM_TILES)):
        sums += tl.sum(left[d].to(tl.float32) * right[d].to(tl.float32), axis=1)
    return sums


@triton.jit
def load_lse(lse_base, rows, is_row):
    """In powers of two. +inf instead of -inf for rows without keys, and for rows that do not exist: weights of 0."""
    lse = tl.load(lse_base + rows, mask=is_row, other=float("-inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)


@triton.jit
def store_scaled(
    base, blocks, rows, is_row, scale, strides,
    NUM_ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Write `scale` times blocks [M or N, D]."""
    scales = tl.full([NUM_ROWS], 0.0, dtype=tl.float32) + scale
    store_rows(base, scaled_rows(blocks, scales, DIM_TILES), rows, is_row, strides, HEAD_DIM, DIM_TILES, UNIT)


@triton.jit
def load_keys(
    key_ptr, value_ptr, key_mask_ptr, key_strides, value_strides, key_mask_strides, batch, kv_head, first, num_keys,
    KEY_TILES: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr,
):  # fmt: skip
    """(key, value, which keys are usable) of all blocks of a head's keys from `first`: tuples with an item a block."""
    key_base = head_of(key_ptr, key_strides, batch, kv_head, UNIT)
    value_base = head_of(value_ptr, value_strides, batch, kv_head, UNIT)
    key_mask_row = head_of(key_mask_ptr, key_mask_strides, batch, kv_head, 1)
    key = ()
    value = ()
    is_key = ()
    for n in tl.static_range(len(KEY_TILES)):
        keys = first + KEY_TILES[n][0] + tl.arange(0, KEY_TILES[n][1])
        usable = usable_keys(keys, num_keys, key_mask_row, key_mask_strides[2], HAS_KEY_MASK)
        key = key + (load_rows(key_base, keys, usable, key_strides, HEAD_DIM, DIM_TILES, UNIT),)
        value = value + (load_rows(value_base, keys, usable, value_strides, HEAD_DIM, DIM_TILES, UNIT),)
        is_key = is_key + (usable,)
    return key, value, is_key


@triton.jit
def score_block(
    query, rows, is_row, first, key_base, key_mask_row, attn_mask_rows,
    key_strides, key_mask_strides, attn_mask_strides, scale, num_keys,
    NUM_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, DIM_TILES: tl.constexpr, UNIT: tl.constexpr,
    HAS_KEY_MASK: tl.constexpr, HAS_ATTN_MASK: tl.constexpr,
):  # fmt: skip
    """(scores [M, N], key, positions of the keys, which are usable) of NUM_KEYS keys from `first`."""
    keys = first + tl.arange(0, NUM_KEYS)
    is_key = usable_keys(keys, num_keys, key_mask_row, key_mask_strides[2], HAS_KEY_MASK)
    key = load_rows(key_base, keys, is_key, key_strides, HEAD_DIM, DIM_TILES, UNIT)
    scores = masked_scores(
        query, key, scale, rows, is_row, keys, is_key, attn_mask_rows, attn_mask_strides, HAS_ATTN_MASK, DIM_TILES
    )  # fmt: skip
    return scores, key, keys, is_key
