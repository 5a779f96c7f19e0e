"""x · W^T and dY · W for few rows, with the 4-bit weight decoded inside the product. Plain Triton: start reading kernels here.

**The problem.** A product of a few rows with a large weight is a matter of bytes: every weight is read once and used once a row.
Dequantizing first writes 2 bytes a weight and reads them again, 4.5 bytes moved where the packed weight has 0.5. Decoded inside
the product, the packed bytes are all that moves.

**Triton in one paragraph.** A kernel is written for one *program*, and launched as a grid of them; each asks `tl.program_id` which
part of the work is its own. Values are small tensors ("tiles") that live in the registers of the threads which share the
program. `tl.load(pointer + offsets, mask)` reads one number for each offset: a tile of offsets gives a tile of values. So the
pointer arithmetic is written out: value (n, k) of a row-major matrix lies at n * row_length + k.

**The tile of one program.** BLOCK_N rows of W times BLOCK_K columns, again and again along k; BLOCK_M rows of x.

                k ->                     packed: two columns a byte, so the bytes of a row are in_features / 2 apart
         n  [ . . . . . . . ]
         |  [ . W tile . . . ]  x  [ x tile, read transposed: k down, m across ]   =   [ acc: n down, m across ]
         v  [ . . . . . . . ]

A byte holds the columns 2j (high half) and 2j + 1 (low half). A sum over k does not care about the order of k, so the even columns
make one product and the odd ones another: nothing is ever interleaved.

**Split k.** A weight of 4544 rows has 71 tiles of 64 rows, and an H100 has 132 multiprocessors. So several programs share a tile,
each with its own stretch of k, and a second kernel adds their float32 results in a fixed order: the same bits every time.

Any number of rows, any out_features, any even in_features; float32, float16 and bfloat16. in_features is even in every model
there is; an odd one would put the two halves of a byte in two rows, and takes the dequantized path.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# `nested` in a signature below: (absmax2, offset, code2, blocksize2). Then absmax holds 8-bit codes, and
#     absmax[b] = code2[codes[b]] * absmax2[b // blocksize2] + offset
# as double_quant.py explains. Without double quantization it is None, and absmax holds float32.


@triton.jit
def load_absmax(absmax, index, mask, absmax2, offset, code2, BLOCKSIZE2: tl.constexpr):
    """The absmax of the blocks in `index`."""
    if absmax2 is None:
        size = tl.load(absmax + index, mask=mask, other=0.0)
    else:
        codes = tl.load(absmax + index, mask=mask, other=0).to(tl.int32)
        size = tl.load(code2 + codes) * tl.load(absmax2 + index // BLOCKSIZE2, mask=mask, other=0.0) + tl.load(offset)
    return size


@triton.jit
def lookup(levels, codes):
    """levels[codes]. A gather among 16 values stays in registers; a load would be a request to the cache for each weight."""
    return tl.reshape(tl.gather(levels, tl.reshape(codes, codes.numel), 0), codes.shape)


@triton.jit
def product_kernel(
    x, packed, absmax, code, absmax2, offset, code2, bias, lora_xa, lora_B, scale, out,
    rows, out_features, in_features, stride_x, rank, steps_a_split,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, RANK: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, m, n] = sum over the split's k of code[W[n, k]] * absmax[block of (n, k)] * x[m, k]"""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)          # (BLOCK_N,) rows of W
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)          # (BLOCK_M,) rows of x
    n_ok, m_ok = n < out_features, m < rows
    dtype = x.dtype.element_ty
    levels = tl.load(code + tl.arange(0, 16)).to(dtype)
    start = n.to(tl.int64) * in_features                            # 64 bits: a weight may have more than 2^31 values
    x_row = x + m.to(tl.int64) * stride_x

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = split * steps_a_split
    for step in range(first, tl.minimum(first + steps_a_split, tl.cdiv(in_features, BLOCK_K))):
        k = step * BLOCK_K + 2 * tl.arange(0, BLOCK_K // 2)         # (BLOCK_K / 2,) the even columns
        w_ok = n_ok[:, None] & (k < in_features)[None, :]
        x_ok = (k < in_features)[:, None] & m_ok[None, :]
        position = start[:, None] + k[None, :]                      # (BLOCK_N, BLOCK_K / 2) in the flattened weight
        codes = tl.load(packed + position // 2, mask=w_ok, other=0).to(tl.int32)
        even = tl.load(x_row[None, :] + k[:, None], mask=x_ok, other=0.0)            # (BLOCK_K / 2, BLOCK_M)
        odd = tl.load(x_row[None, :] + k[:, None] + 1, mask=x_ok, other=0.0)
        high, low = lookup(levels, codes >> 4), lookup(levels, codes & 15)
        if WHOLE_BLOCKS:
            # The BLOCK_K columns of a row share a block: multiply by its absmax after the product, in float32. One multiplication
            # serves BLOCK_K weights, and no scaled weight is rounded to 16 bits on its way.
            some = tl.dot(high, even, input_precision="ieee")
            some = tl.dot(low, odd, some, input_precision="ieee")
            index = (start + step * BLOCK_K) // BLOCKSIZE
            acc += some * load_absmax(absmax, index, n_ok, absmax2, offset, code2, BLOCKSIZE2)[:, None]
        else:
            size = load_absmax(absmax, position // BLOCKSIZE, w_ok, absmax2, offset, code2, BLOCKSIZE2)
            acc = tl.dot((high * size).to(dtype), even, acc, input_precision="ieee")
            acc = tl.dot((low * size).to(dtype), odd, acc, input_precision="ieee")

    # Bias and LoRA enter once, with the first split.
    if split == 0:
        if bias is not None:
            acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
        if lora_xa is not None:
            r = tl.arange(0, RANK)
            b = tl.load(lora_B + n[:, None] * rank + r[None, :], mask=n_ok[:, None] & (r < rank)[None, :], other=0.0)
            xa = tl.load(lora_xa + m[None, :] * rank + r[:, None], mask=(r < rank)[:, None] & m_ok[None, :], other=0.0)
            acc += scale * tl.dot(b.to(dtype), xa.to(dtype), input_precision="ieee")
    place = (split * rows + m).to(tl.int64)[None, :] * out_features + n[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=n_ok[:, None] & m_ok[None, :])


@triton.jit
def grad_kernel(
    dy, packed, absmax, code, absmax2, offset, code2, out,
    rows, out_features, in_features, stride_dy, steps_a_split,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, WHOLE_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, m, k] = sum over the split's n of dy[m, n] * code[W[n, k]] * absmax[block of (n, k)]

    The sum now runs down the rows of W, and each row has another absmax: it is multiplied into the weight before the product.
    """
    pair = tl.program_id(0) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)
    k = 2 * pair                                                    # (BLOCK_K / 2,) the even columns
    split = tl.program_id(1)
    m = tl.program_id(2) * BLOCK_M + tl.arange(0, BLOCK_M)
    k_ok, m_ok = k < in_features, m < rows
    dtype = dy.dtype.element_ty
    levels = tl.load(code + tl.arange(0, 16))

    even = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    odd = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    first = split * steps_a_split
    for step in range(first, tl.minimum(first + steps_a_split, tl.cdiv(out_features, BLOCK_N))):
        n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        n_ok = n < out_features
        w_ok = n_ok[:, None] & k_ok[None, :]
        start = n.to(tl.int64) * in_features
        position = start[:, None] + k[None, :]                      # (BLOCK_N, BLOCK_K / 2)
        codes = tl.load(packed + position // 2, mask=w_ok, other=0).to(tl.int32)
        if WHOLE_BLOCKS:
            index = (start + tl.program_id(0) * BLOCK_K) // BLOCKSIZE
            size = load_absmax(absmax, index, n_ok, absmax2, offset, code2, BLOCKSIZE2)[:, None]
        else:
            size = load_absmax(absmax, position // BLOCKSIZE, w_ok, absmax2, offset, code2, BLOCKSIZE2)
        d_at = dy + m.to(tl.int64)[:, None] * stride_dy + n[None, :]
        d = tl.load(d_at, mask=m_ok[:, None] & n_ok[None, :], other=0.0)             # (BLOCK_M, BLOCK_N)
        even = tl.dot(d, (lookup(levels, codes >> 4) * size).to(dtype), even, input_precision="ieee")
        odd = tl.dot(d, (lookup(levels, codes & 15) * size).to(dtype), odd, input_precision="ieee")

    place = out + (split * rows + m).to(tl.int64)[:, None] * in_features + k[None, :]
    ok = m_ok[:, None] & k_ok[None, :]
    tl.store(place, even.to(out.dtype.element_ty), mask=ok)
    tl.store(place + 1, odd.to(out.dtype.element_ty), mask=ok)


@triton.jit
def sum_kernel(partial, out, size, splits, BLOCK: tl.constexpr):
    """out[i] = partial[0, i] + partial[1, i] + ..., always in this order."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        acc += tl.load(partial + split * size + i, mask=i < size, other=0.0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)


def product(x: Tensor, packed, absmax, code, out_features: int, blocksize: int, nested, bias, lora_xa, lora_B, scale, splits=None):
    """x (rows, in_features) · dequant(W)^T + bias + scale lora_xa lora_B^T, as (rows, out_features)."""
    rows, in_features = x.shape
    absmax2, offset, code2, blocksize2 = nested or (None, None, None, 1)
    rank = 0 if lora_B is None else lora_B.shape[1]
    block_m, block_n, block_k = tile(rows), 64, min(blocksize, 64)
    steps = triton.cdiv(in_features, block_k)
    tiles = triton.cdiv(out_features, block_n) * triton.cdiv(rows, block_m)
    splits, steps_a_split = split_evenly(steps, splits or wanted_splits(x, tiles, steps))
    out = torch.empty(splits, rows, out_features, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    grid = (triton.cdiv(out_features, block_n), splits, triton.cdiv(rows, block_m))
    product_kernel[grid](
        x, packed, absmax, code, absmax2, offset, code2, bias, lora_xa, lora_B, scale, out,
        rows, out_features, in_features, x.stride(0), rank, steps_a_split,
        BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2, RANK=max(16, triton.next_power_of_2(rank)),
        WHOLE_BLOCKS=in_features % block_k == 0, BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return sum_splits(out, x.dtype)


def grad(dy: Tensor, packed, absmax, code, in_features: int, blocksize: int, nested, splits=None):
    """dy (rows, out_features) · dequant(W), as (rows, in_features)."""
    rows, out_features = dy.shape
    absmax2, offset, code2, blocksize2 = nested or (None, None, None, 1)
    block_m, block_n, block_k = tile(rows), 64, min(blocksize, 64)
    steps = triton.cdiv(out_features, block_n)
    tiles = triton.cdiv(in_features, block_k) * triton.cdiv(rows, block_m)
    splits, steps_a_split = split_evenly(steps, splits or wanted_splits(dy, tiles, steps))
    out = torch.empty(splits, rows, in_features, dtype=dy.dtype if splits == 1 else torch.float32, device=dy.device)
    grid = (triton.cdiv(in_features, block_k), splits, triton.cdiv(rows, block_m))
    grad_kernel[grid](
        dy, packed, absmax, code, absmax2, offset, code2, out,
        rows, out_features, in_features, dy.stride(0), steps_a_split,
        BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2, WHOLE_BLOCKS=in_features % block_k == 0,
        BLOCK_M=block_m, BLOCK_N=block_n, BLOCK_K=block_k,
    )  # fmt: skip
    return sum_splits(out, dy.dtype)


def tile(rows: int) -> int:
    """Rows of x a program takes: 16 is the least that the tensor cores multiply, 64 the most that fits beside the weight."""
    return min(64, max(16, triton.next_power_of_2(rows)))


def wanted_splits(x: Tensor, tiles: int, steps: int) -> int:
    """Some four programs a multiprocessor, each with four steps or more."""
    processors = torch.cuda.get_device_properties(x.device).multi_processor_count if x.is_cuda else 1
    return max(1, min(4 * processors // tiles, steps // 4))


def split_evenly(steps: int, splits: int) -> tuple[int, int]:
    """The number of splits that leaves none of them empty, and the steps of each."""
    steps_a_split = triton.cdiv(steps, splits)
    return triton.cdiv(steps, steps_a_split), steps_a_split


def sum_splits(partial: Tensor, dtype: torch.dtype) -> Tensor:
    """(splits, rows, features) -> (rows, features) in dtype."""
    if partial.shape[0] == 1:
        return partial[0]
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    sum_kernel[(triton.cdiv(out.numel(), 1024),)](partial, out, out.numel(), partial.shape[0], BLOCK=1024)
    return out
