"""x · W^T and dY · W for few rows, with the 4-bit weight decoded inside the product, in plain Triton.

**The problem.** A product of a few rows with a large weight is a matter of bytes: every weight is read once and used once a row.
Dequantizing first writes 2 bytes a weight and reads them again, 4.5 bytes moved where the packed weight has 0.5. Decoded inside
the product, the packed bytes are all that moves.

**The tile of one program.** BLOCK_N rows of W times BLOCK_K columns, again and again along k; BLOCK_M rows of x.

                k ->                     packed: two columns a byte, so the bytes of a row are in_features / 2 apart
         n  [ . . . . . . . ]
         |  [ . W tile . . . ]  x  [ x tile, read transposed: k down, m across ]   =   [ acc: n down, m across ]
         v  [ . . . . . . . ]

A byte holds the columns 2j (high half) and 2j + 1 (low half). A sum over k does not care about the order of k, so the even columns
make one product and the odd ones another: nothing is ever interleaved.

**Split k.** A weight of 4544 rows has 71 tiles of 64 rows, and an H100 has 132 multiprocessors. So several programs share a tile,
each with its own stretch of k, and a second kernel adds their float32 results in a fixed order: the same bits every time.

Up to 16 rows, any out_features, any even in_features; float32, float16 and bfloat16. in_features is even in every model
there is; an odd one would put the two halves of a byte in two rows, and takes the dequantized path. Rows that are no whole blocks look
up by a gather; on a GPU matmul_4bit.py does not send them here.

**The ladder**, ms a call, bfloat16, doubly quantized, one H100 in a CUDA graph over rotating weights; up (18176 x 4544) / qkv
(4672 x 4544):

    forward, look-up by a gather among 16 values, one row     0.202 / 0.043    the gather passes its values through shared memory at
                                                                               every step, with barriers
    gradient of x, the same, one row                          0.146 / 0.043    0.179 / 0.078 for 64 rows
    gradient of x, look-up by the pair table, one row         0.088 / 0.028    0.090 / 0.028 for 16; pair_table.py: half a read a
                                                                               weight, and no barrier
    dequantize to a workspace, then cuBLAS                    0.138 / 0.034    what a fused kernel has to beat
    few_rows_mma.py, one row                                  0.024 / 0.010    it says which lane holds which value

Not measured: the forward with the pair table, since few_rows_mma.py takes its place on the GPU that these numbers are from.

With a table in bfloat16 the gradient's weight is rounded twice, as a level and as level times absmax: its error against float64 was
2.69e-3 where the workspace's is 2.33e-3. So the gradient's table is in float16, which has three bits more; then it was 2.33e-3.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from minqlora.kernels.pair_table import lookup_four, make_table

# `nested` in a signature below: (absmax2, offset, code2, blocksize2). Then absmax holds 8-bit codes, and
#     absmax[b] = code2[codes[b]] * absmax2[b // blocksize2] + offset
# as double_quant.py explains. Without double quantization it is None, and absmax holds float32.


@triton.jit
def load_absmax(absmax, index, mask, absmax2, offset, code2, BLOCKSIZE2: tl.constexpr):
    """The absmax of the blocks in `index`.

    Not `decode_absmax` of double_quant.py, which rounds twice as bitsandbytes does: a product has no bytes to agree with, and multiplies
    and adds in one rounding.
    """
    if absmax2 is None:
        size = tl.load(absmax + index, mask=mask, other=0.0)
    else:
        codes = tl.load(absmax + index, mask=mask, other=0).to(tl.int32)
        size = tl.load(code2 + codes) * tl.load(absmax2 + index // BLOCKSIZE2, mask=mask, other=0.0) + tl.load(offset)
    return size


@triton.jit
def lookup(codes, levels, table, TABLE: tl.constexpr):
    """(high, low): the levels of the high and of the low halves of packed bytes."""
    if TABLE:
        high, low = lookup_four(codes, table, levels.dtype)
    else:
        # The same in Triton's own words: a gather among 16 values.
        flat = tl.reshape(codes, codes.numel).to(tl.int32)
        high = tl.reshape(tl.gather(levels, flat >> 4, 0), codes.shape)
        low = tl.reshape(tl.gather(levels, flat & 15, 0), codes.shape)
    return high, low


@triton.jit
def product_kernel(
    x, packed, absmax, code, absmax2, offset, code2, bias, lora_xa, lora_B, scale, out,
    rows, out_features, in_features, stride_x, rank, steps_a_split,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, BLOCK_R: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, TABLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, m, n] = sum over the split's k of code[index of (n, k)] * absmax[block of (n, k)] * x[m, k]"""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)          # (BLOCK_N,) rows of W
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)                                       # (BLOCK_M,) rows of x
    n_ok, m_ok = n < out_features, m < rows
    dtype: tl.constexpr = x.dtype.element_ty
    # A level that is still to be multiplied by its absmax keeps more digits than bfloat16 has: rounding twice would show.
    LEVEL: tl.constexpr = dtype if WHOLE_BLOCKS else tl.float32
    levels = tl.load(code + tl.arange(0, 16)).to(LEVEL)
    table = make_table(code, LEVEL) if TABLE else 0
    start = n.to(tl.int64) * in_features                            # 64 bits: a weight may have more than 2^31 values
    row = packed + start // 2                                       # (BLOCK_N,) where each row of W begins
    x_row = x + m.to(tl.int64) * stride_x                           # (BLOCK_M,) where each row of x begins

    acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
    first = split * steps_a_split
    for step in range(first, tl.minimum(first + steps_a_split, tl.cdiv(in_features, BLOCK_K))):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)                  # (BLOCK_K,) columns
        pair = step * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)   # (BLOCK_K / 2,) the bytes that hold them
        w_ok = n_ok[:, None] & (2 * pair < in_features)[None, :]
        codes = tl.load(row[:, None] + pair[None, :], mask=w_ok, other=0)            # (BLOCK_N, BLOCK_K / 2)
        xs = tl.load(x_row[:, None] + k[None, :], mask=m_ok[:, None] & (k < in_features)[None, :], other=0.0)
        even, odd = tl.split(tl.reshape(xs, (BLOCK_M, BLOCK_K // 2, 2)))             # (BLOCK_M, BLOCK_K / 2) each
        high, low = lookup(codes, levels, table, TABLE)             # (BLOCK_N, BLOCK_K / 2) each
        if WHOLE_BLOCKS:
            # The BLOCK_K columns of a row share a block: multiply by its absmax after the product, in float32. One multiplication
            # serves BLOCK_K weights, and no scaled weight is rounded to 16 bits on its way.
            some = tl.dot(high, tl.trans(even), input_precision="ieee")
            some = tl.dot(low, tl.trans(odd), some, input_precision="ieee")
            index = (start + step * BLOCK_K) // BLOCKSIZE
            acc += some * load_absmax(absmax, index, n_ok, absmax2, offset, code2, BLOCKSIZE2)[:, None]
        else:
            index = (start[:, None] + 2 * pair[None, :]) // BLOCKSIZE
            size = load_absmax(absmax, index, w_ok, absmax2, offset, code2, BLOCKSIZE2)
            acc = tl.dot((high * size).to(dtype), tl.trans(even), acc, input_precision="ieee")
            acc = tl.dot((low * size).to(dtype), tl.trans(odd), acc, input_precision="ieee")

    # Bias and LoRA enter once, with the first split.
    if split == 0:
        if bias is not None:
            acc += tl.load(bias + n, mask=n_ok, other=0.0).to(tl.float32)[:, None]
        if lora_xa is not None:
            for start_r in tl.range(0, rank, BLOCK_R, num_stages=1):
                r = start_r + tl.arange(0, BLOCK_R)
                b = tl.load(lora_B + n[:, None] * rank + r[None, :], mask=n_ok[:, None] & (r < rank)[None, :], other=0.0)
                xa = tl.load(lora_xa + m[None, :] * rank + r[:, None], mask=(r < rank)[:, None] & m_ok[None, :], other=0.0)
                acc += scale * tl.dot(b.to(dtype), xa.to(dtype), input_precision="ieee")
    place = (split * rows + m).to(tl.int64)[None, :] * out_features + n[:, None]
    tl.store(out + place, acc.to(out.dtype.element_ty), mask=n_ok[:, None] & m_ok[None, :])


@triton.jit
def grad_kernel(
    dy, packed, absmax, code, absmax2, offset, code2, out,
    rows, out_features, in_features, stride_dy, steps_a_split,
    BLOCKSIZE: tl.constexpr, BLOCKSIZE2: tl.constexpr, WHOLE_BLOCKS: tl.constexpr, TABLE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[split, m, k] = sum over the split's n of dy[m, n] * code[index of (n, k)] * absmax[block of (n, k)]

    The sum now runs down the rows of W, and each row has another absmax: it is multiplied into the weight before the product.
    """
    pair = tl.program_id(0) * (BLOCK_K // 2) + tl.arange(0, BLOCK_K // 2)            # (BLOCK_K / 2,) bytes of a row
    split = tl.program_id(1)
    m = tl.arange(0, BLOCK_M)
    k_ok, m_ok = 2 * pair < in_features, m < rows
    dtype: tl.constexpr = dy.dtype.element_ty
    LEVEL: tl.constexpr = tl.float16 if TABLE else tl.float32
    levels = tl.load(code + tl.arange(0, 16)).to(LEVEL)
    table = make_table(code, LEVEL) if TABLE else 0

    even = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    odd = tl.zeros((BLOCK_M, BLOCK_K // 2), tl.float32)
    first = split * steps_a_split
    for step in range(first, tl.minimum(first + steps_a_split, tl.cdiv(out_features, BLOCK_N))):
        n = step * BLOCK_N + tl.arange(0, BLOCK_N)
        n_ok = n < out_features
        w_ok = n_ok[:, None] & k_ok[None, :]
        start = n.to(tl.int64) * in_features
        codes = tl.load(packed + (start // 2)[:, None] + pair[None, :], mask=w_ok, other=0)          # (BLOCK_N, BLOCK_K / 2)
        if WHOLE_BLOCKS:
            index = (start + tl.program_id(0) * BLOCK_K) // BLOCKSIZE
            size = load_absmax(absmax, index, n_ok, absmax2, offset, code2, BLOCKSIZE2)[:, None]     # (BLOCK_N, 1)
        else:
            index = (start[:, None] + 2 * pair[None, :]) // BLOCKSIZE
            size = load_absmax(absmax, index, w_ok, absmax2, offset, code2, BLOCKSIZE2)
        d_at = dy + m.to(tl.int64)[:, None] * stride_dy + n[None, :]
        d = tl.load(d_at, mask=m_ok[:, None] & n_ok[None, :], other=0.0)             # (BLOCK_M, BLOCK_N)
        high, low = lookup(codes, levels, table, TABLE)
        even = tl.dot(d, (high * size).to(dtype), even, input_precision="ieee")
        odd = tl.dot(d, (low * size).to(dtype), odd, input_precision="ieee")

    both = tl.reshape(tl.join(even, odd), (BLOCK_M, BLOCK_K))       # even and odd columns side by side again
    k = tl.program_id(0) * BLOCK_K + tl.arange(0, BLOCK_K)
    place = out + (split * rows + m).to(tl.int64)[:, None] * in_features + k[None, :]
    tl.store(place, both.to(out.dtype.element_ty), mask=m_ok[:, None] & (k < in_features)[None, :])


@triton.jit
def after_previous():
    """Wait for the kernel before, then let the next one start before this one ends.

    A kernel's first microseconds go by before it has anything to multiply: programs are placed, addresses computed, and the first
    bytes are on their way. With programmatic dependent launch (Hopper and later) they go by while the kernel before is still at work.
    What that kernel writes is there after the wait. Before it a program may read what no kernel on its way writes, such as weights, and
    must write nothing. In this order, because the next kernel's early reads then follow the end of everything but this one.
    """
    ask: tl.constexpr = "griddepcontrol.wait; griddepcontrol.launch_dependents; mov.u32 $0, 0;"
    tl.inline_asm_elementwise(ask, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def sum_kernel(partial, out, size, splits, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    """out[i] = partial[0, i] + partial[1, i] + ..., always in this order."""
    if OVERLAP:
        after_previous()
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    acc = tl.zeros((BLOCK,), tl.float32)
    for split in range(splits):
        acc += tl.load(partial + split * size + i, mask=i < size, other=0.0)
    tl.store(out + i, acc.to(out.dtype.element_ty), mask=i < size)


# A program's tile: rows of x (16 is the least that tensor cores take), rows of W, columns, which never cross two blocks of 64, and ranks.
BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R = 16, 64, 64, 32


def product(x: Tensor, packed, absmax, code, out_features: int, blocksize: int, nested, bias, lora_xa, lora_B, scale, splits=None):
    """x (rows <= 16, in_features) · dequant(W)^T + bias + scale lora_xa lora_B^T, as (rows, out_features)."""
    rows, in_features = x.shape
    assert rows <= BLOCK_M
    absmax2, offset, code2, blocksize2 = nested or (None, None, None, 1)
    rank = 0 if lora_B is None else lora_B.shape[1]
    block_k = min(blocksize, BLOCK_K)
    whole = whole_blocks(in_features, blocksize)
    tiles, steps = triton.cdiv(out_features, BLOCK_N), triton.cdiv(in_features, block_k)
    splits, steps_a_split = split_evenly(steps, splits or wanted_splits(x, tiles, steps))
    out = torch.empty(splits, rows, out_features, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    product_kernel[(tiles, splits)](
        x, packed, absmax, code, absmax2, offset, code2, bias, lora_xa, lora_B, scale, out,
        rows, out_features, in_features, x.stride(0), rank, steps_a_split,
        BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2, WHOLE_BLOCKS=whole, TABLE=whole and has_table(x),
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=block_k, BLOCK_R=BLOCK_R,
    )  # fmt: skip
    return sum_splits(out, x.dtype)


def grad(dy: Tensor, packed, absmax, code, in_features: int, blocksize: int, nested, splits=None):
    """dy (rows <= 16, out_features) · dequant(W), as (rows, in_features)."""
    rows, out_features = dy.shape
    assert rows <= BLOCK_M
    absmax2, offset, code2, blocksize2 = nested or (None, None, None, 1)
    block_k = min(blocksize, BLOCK_K)
    whole = whole_blocks(in_features, blocksize)
    tiles, steps = triton.cdiv(in_features, block_k), triton.cdiv(out_features, BLOCK_N)
    splits, steps_a_split = split_evenly(steps, splits or wanted_splits(dy, tiles, steps))
    out = torch.empty(splits, rows, in_features, dtype=dy.dtype if splits == 1 else torch.float32, device=dy.device)
    grad_kernel[(tiles, splits)](
        dy, packed, absmax, code, absmax2, offset, code2, out,
        rows, out_features, in_features, dy.stride(0), steps_a_split,
        BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2, WHOLE_BLOCKS=whole, TABLE=whole and has_table(dy),
        BLOCK_M=BLOCK_M, BLOCK_N=BLOCK_N, BLOCK_K=block_k,
    )  # fmt: skip
    return sum_splits(out, dy.dtype)


def whole_blocks(in_features: int, blocksize: int) -> bool:
    """Whether a step's columns share a block in each row. If not, there is no pair table either.

    Triton does not count the table's 32 KiB of shared memory. A launch has 48 without asking, and what Triton plans for ragged rows, which
    it loads ahead, does not fit beside the table.
    """
    return in_features % min(blocksize, BLOCK_K) == 0


def has_table(x: Tensor) -> bool:
    """The pair table is NVIDIA's assembly, and its pairs are 16 bits a value. The interpreter and float32 take the gather."""
    return x.is_cuda and torch.version.hip is None and x.dtype != torch.float32


def wanted_splits(x: Tensor, tiles: int, steps: int) -> int:
    """Some four programs a multiprocessor, each with four steps or more."""
    return max(1, min(4 * (processors(x.device) if x.is_cuda else 1) // tiles, steps // 4))


# PyTorch looks these up in a structure it makes anew, which takes as long as a launch.
@functools.cache
def processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def split_evenly(steps: int, splits: int) -> tuple[int, int]:
    """The number of splits that leaves none of them empty, and the steps of each."""
    steps_a_split = triton.cdiv(steps, splits)
    return triton.cdiv(steps, steps_a_split), steps_a_split


def sum_splits(partial: Tensor, dtype: torch.dtype, overlap: bool = False) -> Tensor:
    """(splits, rows, features) -> (rows, features) in dtype."""
    if partial.shape[0] == 1:
        return partial[0]
    out = torch.empty(partial.shape[1:], dtype=dtype, device=partial.device)
    size, block = out.numel(), 512
    sum_kernel[(triton.cdiv(size, block),)](partial, out, size, partial.shape[0], BLOCK=block, OVERLAP=overlap, launch_pdl=overlap)
    return out


def overlaps(x: Tensor) -> bool:
    """Whether kernels on x's device can overlap with the next one; see `after_previous`."""
    return x.is_cuda and torch.version.hip is None and capability(x.device) >= (9, 0)
