"""Triton kernels that multiply by packed S. Importing this needs Triton; triton_product.py decides about that."""

import triton
import triton.language as tl


@triton.jit
def load_codes(values, index, stored, codes: tl.constexpr):
    """Return the codes at an index in float32, 0 where they are not stored; arguments as of `multiply_packed`."""
    if codes == "int8":
        return tl.load(values + index, mask=stored, other=0).to(tl.float32)
    if codes == "int4":
        halves = tl.load(values + index // 2, mask=stored, other=0).to(tl.int32)
        half = (halves >> (index % 2 * 4).to(tl.int32)) & 15
        return ((half ^ 8) - 8).to(tl.float32)
    byte = tl.load(values + index, mask=stored, other=0).to(tl.int32)
    magnitude = (byte & 127) << 7  # as float16 of the same exponent and mantissa, 2^8 too small
    magnitude |= (magnitude + 128) & 16384  # 127 is NaN in float16 too
    half = (magnitude | (byte & 128) << 8).to(tl.int16).to(tl.float16, bitcast=True)
    return half.to(tl.float32) * 256.0


@triton.jit(do_not_specialize=["num_tokens"])
def multiply_packed(
    x,
    values,
    meta,
    row_offsets,
    ranks,
    scales,
    y,
    num_tokens,
    o,
    d,
    meta_width,
    row_values,
    num_values,
    x_token_stride,
    x_column_stride,
    num_groups,
    codes: tl.constexpr,
    columns_of_group: tl.constexpr,
    columns_of_byte: tl.constexpr,
    values_of_byte: tl.constexpr,
    has_offsets: tl.constexpr,
    in_float32: tl.constexpr,
    block_rows: tl.constexpr,
    block_tokens: tl.constexpr,
    block_columns: tl.constexpr,
    num_column_blocks: tl.constexpr,
):
    """Write y = x Sᵀ for one block of rows of S and one of tokens; S exists in registers only.

    A stored column's value is the one of its row with the number of stored columns before it. Where every byte of meta
    stores as many, that is the byte times their number plus the column's rank in the byte. Elsewhere the stored columns
    of each row are counted along the loop. Whatever meta and row_offsets say, no read is outside of a tensor.

    Args:
        x: [num_tokens, d], of any strides.
        values: [o, row_values], or [num_values] with row_offsets. Codes of int4 lie two in a byte.
        meta: uint8 [o, meta_width]; not read where columns_of_byte is 0.
        row_offsets: int64 [o + 1]; read where has_offsets.
        ranks: int16 [256, columns_of_byte], for each column of a byte how many columns the byte stores before it; -1
            for a column that it does not store; not read where columns_of_byte is 0.
        scales: [o, num_groups]; read where there are codes.
        y: [num_tokens, o], written.
        num_tokens: Rows of x.
        o: Rows of S.
        d: Columns of S.
        meta_width: Bytes of meta a row.
        row_values: Values of each row, or codes, with the zero behind an odd number; not read where has_offsets.
        num_values: Values of all rows.
        x_token_stride: Elements from a row of x to the next.
        x_column_stride: Elements from a column of x to the next.
        num_groups: Groups of columns of a row, each with a scale; not read without codes.
        codes: "int8"; "int4", of values in uint8; "fp8", e4m3 without infinities as bytes in uint8; "" for numbers.
        columns_of_group: Columns that share a scale; 0 without codes.
        columns_of_byte: Columns that a byte of meta describes; 0 where every column is stored.
        values_of_byte: Columns that a byte stores, where that is the same for every byte but the last of a row; else 0.
        has_offsets: Rows differ in their number of values.
        in_float32: Multiply in float32, whatever the dtypes: Triton's interpreter takes bfloat16 for integers.
        block_rows: Rows of S that a program works on.
        block_tokens: Tokens that it works on.
        block_columns: Columns that it unpacks and multiplies at a time.
        num_column_blocks: Blocks of d. A constant: the interpreter of Triton 3.6 fails on a loop to a value.
    """
    program = tl.program_id(0)
    num_row_blocks = tl.cdiv(o, block_rows)  # neighbours share a block of tokens, which stays in the L2 cache
    rows = (program % num_row_blocks) * block_rows + tl.arange(0, block_rows)
    tokens = (program // num_row_blocks) * block_tokens + tl.arange(0, block_tokens)
    row_inside = rows < o
    token_inside = tokens[None, :] < num_tokens
    wide_rows, wide_tokens = rows.to(tl.int64), tokens.to(tl.int64)[None, :]  # tensors may have more than 2^31 elements

    if has_offsets:
        first = tl.load(row_offsets + wide_rows, mask=row_inside, other=0)
        end = tl.load(row_offsets + wide_rows + 1, mask=row_inside, other=0)
        first = tl.minimum(tl.maximum(first, 0), num_values)
        end = tl.minimum(tl.maximum(end, first), num_values)
        count = tl.minimum(end - first, d).to(tl.int32)
    else:
        first = wide_rows * row_values
        count = tl.zeros((block_rows,), dtype=tl.int32) + row_values
    first = first[:, None]
    meta_of_rows = (meta + wide_rows * meta_width)[:, None]
    x_of_tokens = x + wide_tokens * x_token_stride

    stored_before = tl.zeros((block_rows,), dtype=tl.int32)
    sums = tl.zeros((block_rows, block_tokens), dtype=tl.float32)
    for step in range(num_column_blocks):
        columns = step * block_columns + tl.arange(0, block_columns)
        column_inside = columns < d
        inside = row_inside[:, None] & column_inside[None, :]
        if columns_of_byte == 0:
            stored, index = inside, columns[None, :]
        else:
            byte = (columns // columns_of_byte)[None, :]
            code = tl.load(meta_of_rows + byte, mask=inside, other=0).to(tl.int32)
            rank = tl.load(ranks + code * columns_of_byte + (columns % columns_of_byte)[None, :], mask=inside, other=-1)
            rank = rank.to(tl.int32)
            stored = rank >= 0
            if values_of_byte > 0:
                index = byte * values_of_byte + rank
            else:
                ones = stored.to(tl.int32)
                index = stored_before[:, None] + tl.cumsum(ones, axis=1) - ones
                stored_before += tl.sum(ones, axis=1)
        stored = stored & (index < count[:, None])
        if codes == "":
            S = tl.load(values + first + index, mask=stored, other=0.0)
        else:
            at_scales = scales + wide_rows[:, None] * num_groups + (columns // columns_of_group)[None, :]
            scale = tl.load(at_scales, mask=inside, other=0.0).to(tl.float32)
            S = load_codes(values, first + index, stored, codes) * scale
        S = S.to(x.dtype.element_ty)
        at_x = x_of_tokens + columns[:, None].to(tl.int64) * x_column_stride
        x_block = tl.load(at_x, mask=column_inside[:, None] & token_inside, other=0.0)
        if in_float32:
            S, x_block = S.to(tl.float32), x_block.to(tl.float32)
        sums = tl.dot(S, x_block, sums, input_precision="ieee")
    at_y = y + wide_tokens * o + rows[:, None]
    tl.store(at_y, sums.to(y.dtype.element_ty), mask=row_inside[:, None] & token_inside)


@triton.jit
def load_pair(values, pair, stored, codes: tl.constexpr):
    """Return two values or codes, one behind the other, in float32; the first is at 2 · pair of `values`."""
    if codes == "int4":
        both = tl.load(values + pair, mask=stored, other=0).to(tl.int32)
        first, second = ((both & 15) ^ 8) - 8, ((both >> 4) ^ 8) - 8
    elif codes == "":
        first = tl.load(values + 2 * pair, mask=stored, other=0.0)
        second = tl.load(values + 2 * pair + 1, mask=stored, other=0.0)
    else:
        first = load_codes(values, 2 * pair, stored, codes)
        second = load_codes(values, 2 * pair + 1, stored, codes)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit(do_not_specialize=["num_tokens"])
def multiply_2_of_4(
    x,
    values,
    meta,
    scales,
    y,
    num_tokens,
    o,
    d,
    meta_width,
    x_token_stride,
    x_column_stride,
    num_groups,
    codes: tl.constexpr,
    columns_of_group: tl.constexpr,
    block_rows: tl.constexpr,
    block_tokens: tl.constexpr,
    block_bytes: tl.constexpr,
    num_byte_blocks: tl.constexpr,
):
    """Write y = x Sᵀ for S of pattern 2:4 and one block of its rows; S is never in its place among zeros.

    A program reads meta and the values of its rows in their order, three groups a byte. Of the four numbers of x that a
    group multiplies it picks two, by comparisons: no address depends on meta, so damaged meta reads nothing outside.

    Args: as of `multiply_packed`, where not here.
        block_tokens: at least num_tokens.
        block_bytes: Bytes of meta of a row that a program reads at a time.
        num_byte_blocks: Blocks of meta_width.
    """
    rows = tl.program_id(0) * block_rows + tl.arange(0, block_rows)
    tokens = tl.arange(0, block_tokens)
    row_inside = (rows < o)[:, None]
    token_inside = (tokens < num_tokens)[:, None, None]
    wide_rows, wide_tokens = rows.to(tl.int64)[:, None], tokens.to(tl.int64)[:, None]
    meta_of_rows, pairs_of_rows = meta + wide_rows * meta_width, wide_rows * (d // 4)
    scales_of_rows = scales + wide_rows * num_groups
    x_of_tokens = (x + wide_tokens * x_token_stride)[:, :, None]

    sums = tl.zeros((block_tokens, block_rows, block_bytes), dtype=tl.float32)
    for step in range(num_byte_blocks):
        byte = step * block_bytes + tl.arange(0, block_bytes)[None, :]
        code = tl.load(meta_of_rows + byte, mask=row_inside & (byte < meta_width), other=0).to(tl.int32)
        for place in tl.static_range(3):
            group = 3 * byte + place
            group_inside = 4 * group < d
            digit = code % 6
            code = code // 6
            first = (2320 >> 2 * digit) & 3  # of digits 0 to 5: 0 0 1 0 1 2
            second = (4073 >> 2 * digit) & 3  # 1 2 2 3 3 3
            inside = row_inside & group_inside
            S_first, S_second = load_pair(values, pairs_of_rows + group, inside, codes)
            if codes != "":
                at_first, at_second = 4 * group + first, 4 * group + second
                if columns_of_group % 4 == 0:  # one scale for all four columns, whatever meta says
                    at_first, at_second = 4 * group, 4 * group
                at_scale = scales_of_rows + at_first // columns_of_group
                S_first = S_first * tl.load(at_scale, mask=inside, other=0.0).to(tl.float32)
                at_scale = scales_of_rows + at_second // columns_of_group
                S_second = S_second * tl.load(at_scale, mask=inside, other=0.0).to(tl.float32)
            S_first = S_first.to(x.dtype.element_ty).to(tl.float32)[None, :, :]
            S_second = S_second.to(x.dtype.element_ty).to(tl.float32)[None, :, :]
            at_x = x_of_tokens + (4 * group).to(tl.int64)[None, :, :] * x_column_stride
            inside = token_inside & group_inside[None, :, :]
            x_0 = tl.load(at_x, mask=inside, other=0.0).to(tl.float32)
            x_1 = tl.load(at_x + x_column_stride, mask=inside, other=0.0).to(tl.float32)
            x_2 = tl.load(at_x + 2 * x_column_stride, mask=inside, other=0.0).to(tl.float32)
            x_3 = tl.load(at_x + 3 * x_column_stride, mask=inside, other=0.0).to(tl.float32)
            first, second = first[None, :, :], second[None, :, :]
            x_first = tl.where(first == 0, x_0, tl.where(first == 1, x_1, x_2))
            x_second = tl.where(second == 1, x_1, tl.where(second == 2, x_2, x_3))
            sums += S_first * x_first + S_second * x_second
    y_inside = (tokens < num_tokens)[:, None] & (rows < o)[None, :]
    tl.store(y + wide_tokens * o + rows[None, :], tl.sum(sums, axis=2).to(y.dtype.element_ty), mask=y_inside)
