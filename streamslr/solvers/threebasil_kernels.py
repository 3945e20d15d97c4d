"""Triton kernel of 3BASiL's elementwise step. Importing this needs Triton; threebasil_fused.py decides about that."""

import triton
import triton.language as tl


@triton.jit
def keep_largest(values, n: tl.constexpr, m: tl.constexpr):
    """Return the mask, bool [rows, columns], of the n largest magnitudes of every m neighbours; ties are all kept.

    The threshold starts at the largest magnitude of a group and goes to the next smaller one until n members reach it:
    the n-th largest, as `GroupMarker` has it.
    """
    rows: tl.constexpr = values.shape[0]
    columns: tl.constexpr = values.shape[1]
    groups = tl.reshape(tl.abs(values), (rows, columns // m, m))
    threshold = tl.max(groups, axis=2, keep_dims=True)
    for _ in tl.static_range(n - 1):
        reached = tl.sum((groups >= threshold).to(tl.int32), axis=2, keep_dims=True)
        next_smaller = tl.max(tl.where(groups < threshold, groups, -1.0), axis=2, keep_dims=True)
        threshold = tl.where(reached < n, next_smaller, threshold)
    return tl.reshape(groups >= threshold, (rows, columns))


@triton.jit
def sparse_step(
    sums,
    weight,
    scale,
    product,
    U,
    Q,
    next_input,
    counts,
    num_rows,
    d,
    rank,
    U_row_stride,
    U_rank_stride,
    Q_row_stride,
    Q_rank_stride,
    dual_scale,
    n: tl.constexpr,
    m: tl.constexpr,
    count_moved: tl.constexpr,
    block_rows: tl.constexpr,
    block_columns: tl.constexpr,
    block_rank: tl.constexpr,
    num_rank_blocks: tl.constexpr,
):
    """Do `threebasil_fused.step_in_torch` for one block of [num_rows, d].

    Args:
        sums: float32 [num_rows, d], Z; overwritten.
        weight: [num_rows, d], float32 or a shorter float.
        scale: float32 [d].
        product: bfloat16 [num_rows, d], C.
        U: float32 [num_rows, rank], of any strides.
        Q: float32 [d, rank], of any strides.
        next_input: bfloat16 [num_rows, d], T; written.
        counts: int32 [programs, 2], positions that moved and that are kept; written where count_moved.
        num_rows: Rows of the block.
        d: Columns.
        rank: Rank of U·V; of rank 0, U and Q are not read.
        U_row_stride: Elements from a row of U to the next, and so on.
        U_rank_stride: See above.
        Q_row_stride: See above.
        Q_rank_stride: See above.
        dual_scale: Factor on Y, at most 1.
        n: Weights kept of each group.
        m: Weights of a group; divides block_columns.
        count_moved: Write `counts`.
        block_rows: Rows that a program works on.
        block_columns: Columns that a program works on.
        block_rank: Part of the rank that it multiplies at a time.
        num_rank_blocks: Blocks of `rank`. A constant: the interpreter of Triton 3.6 fails on a loop to a value.
    """
    program = tl.program_id(0)
    num_column_blocks = tl.cdiv(d, block_columns)
    first_row = (program // num_column_blocks) * block_rows
    rows = first_row + tl.arange(0, block_rows)
    columns = (program % num_column_blocks) * block_columns + tl.arange(0, block_columns)
    row_inside = rows[:, None] < num_rows
    column_inside = columns[None, :] < d
    inside = row_inside & column_inside
    start = first_row.to(tl.int64) * d  # a linear may have more than 2**31 weights, a block of rows has not
    at = tl.arange(0, block_rows)[:, None] * d + columns[None, :]

    low_rank = tl.zeros((block_rows, block_columns), dtype=tl.float32)
    for step in range(num_rank_blocks):
        k = step * block_rank + tl.arange(0, block_rank)
        at_U = rows[:, None] * U_row_stride + k[None, :] * U_rank_stride
        at_Q = columns[None, :] * Q_row_stride + k[:, None] * Q_rank_stride
        u = tl.load(U + at_U, mask=row_inside & (k[None, :] < rank), other=0.0)
        q = tl.load(Q + at_Q, mask=column_inside & (k[:, None] < rank), other=0.0)
        low_rank = tl.dot(u, q, low_rank, input_precision="tf32x3")  # tf32 alone has 11 bits

    # Only now, so that these values hold no registers during the products.
    Z = tl.load(sums + start + at, mask=inside, other=0.0)
    W = tl.load(weight + start + at, mask=inside, other=0.0).to(tl.float32)
    W = W * tl.load(scale + columns[None, :], mask=column_inside, other=0.0)
    C = tl.load(product + start + at, mask=inside, other=0.0).to(tl.float32)
    kept_before = keep_largest(Z, n, m)
    new = W - low_rank + tl.where(kept_before, 0.0, Z) - C
    kept = keep_largest(new, n, m)
    if count_moved:
        support = kept & (new != 0.0) & inside
        moved = (kept_before & (Z != 0.0) & inside) != support
        tl.store(counts + 2 * program, tl.sum(tl.sum(moved.to(tl.int32), axis=1), axis=0))
        tl.store(counts + 2 * program + 1, tl.sum(tl.sum(support.to(tl.int32), axis=1), axis=0))
    new = tl.where(kept, new, dual_scale * new)
    tl.store(sums + start + at, new, mask=inside)
    T = W + tl.where(kept, -new, new)
    tl.store(next_input + start + at, T.to(tl.bfloat16), mask=inside)
