"""Dequantize on a GPU: one launch from packed codes and absmax to bfloat16, float16 or float32.

The definition is `dequantize_4bit` of nf4.py: w_i = code[code_i] * absmax_b, one float32 product, rounded to the dtype. Read this kernel
first, after the example in `__init__.py`, and in it the branches without WORDS and STRIDED: they are the whole idea.

**The problem.** Half a byte comes in and two bytes go out for each value: 4 of 5 bytes that move are stores, and the memory is the limit as
long as a value costs fewer than some 20 instructions. A program takes ROWS blocks as a tile (ROWS, BLOCK). Each thread reads four bytes,
which hold eight neighbouring values, and writes those eight as one store of 16 bytes:

    byte (r, j) of the tile holds columns 2j (high half) and 2j + 1 (low half)
    word (r, i) of the tile holds columns 8i to 8i + 7, column 8i + k at bit 8 (k / 2) + (4 for an even k, 0 for an odd one)

Bytes that are no whole words, at the end of an odd weight or at an odd address, are read one by one.

**The ladder**, for a weight of 18176 x 4544 to bfloat16, double-quantized, on one H100 (`python benchmarks/ladder.py`; instructions a value
as compiled):

    two launches, one block a program, levels in memory   0.787 ms   46     one for absmax, as bitsandbytes does it (0.106 ms)
    64 blocks a program, 4 warps                          0.089      13     fewer, larger programs
    one launch                                            0.087      14     absmax is not written and read again: 2 % of the bytes
    2 warps                                               0.075       9     a thread has eight words to wait for, not four
    levels in shared memory                               0.075       8     `tl.gather` in place of a load
    levels in the lanes of a warp (1 warp, 32 blocks)     0.076       7     a shuffle in place of shared memory; no gain, the stores bind
    and both ends leave the cache first (`evict_first`)   0.0740      7     what is written is larger than the cache
    words, 2 warps, 64 blocks                             0.0738      7     94 % of a copy; 1.5 % on 4672 x 4544 (0.0201): this file
    words, 1 warp / 4 warps / 128 blocks                  0.0745             no better

**Double quantization** in the same launch: absmax then holds 8-bit codes, and a program decodes one absmax for each of its rows, with
`decode_absmax` of double_quant.py. Done in a launch of its own, as bitsandbytes does it, it writes 4 bytes a block and reads
them back, for nothing.

**The same bits as bitsandbytes**: the product flushes subnormal numbers to zero, as its build does. With ASM off, in the interpreter, it
keeps them, as nf4.py does.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minqlora.kernels.double_quant import decode_absmax
from minqlora.kernels.quantize_4bit import multiply

TILE = 4096                                                        # values a program handles: 64 a thread


@triton.jit
def dequantize_kernel(
    packed, absmax, absmax2, offset, code2, code, out, n, n_bytes, n_blocks, row_blocks, row_stride,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, ROWS: tl.constexpr, WORDS: tl.constexpr, STRIDED: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """One program: ROWS blocks. absmax2 is None where absmax is not quantized itself."""
    # 64 bits for where the tile begins, since a weight may have 2^31 values; 32 inside it, which cost less.
    tile = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)                                                                  # (ROWS,)
    values_left = tl.minimum(n - tile * (ROWS * BLOCK), ROWS * BLOCK).to(tl.int32)
    bytes_left = tl.minimum(n_bytes - tile * (ROWS * BLOCK // 2), ROWS * BLOCK // 2).to(tl.int32)
    in_blocks = rows < tl.minimum(n_blocks - tile * ROWS, ROWS).to(tl.int32)
    scale = tl.load(absmax + tile * ROWS + rows, mask=in_blocks, other=0)                      # (ROWS,)
    # An `if` on None or on a constexpr is decided when compiling: the other branch does not exist.
    if absmax2 is not None:
        scale = decode_absmax(scale, (tile * ROWS + rows) // BLOCK2, absmax2, offset, code2, in_blocks, ASM)

    start = packed + tile * (ROWS * BLOCK // 2)
    if WORDS:
        # Value k of the eight in a word stands in byte k / 2, the even one in its high half.
        inside = rows[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]              # (ROWS, BLOCK / 8)
        start = start.to(tl.pointer_type(tl.int32))
        word = tl.load(start + inside, mask=inside < bytes_left // 4, other=0, eviction_policy="evict_first")
        k = tl.arange(0, 8)
        codes = (word[:, :, None] >> (k // 2 * 8 + 4 - k % 2 * 4)[None, None, :]) & 15         # (ROWS, BLOCK / 8, 8)
    else:
        inside = rows[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]              # (ROWS, BLOCK / 2)
        byte = tl.load(start + inside, mask=inside < bytes_left, other=0, eviction_policy="evict_first").to(tl.int32)
        codes = tl.interleave(byte >> 4, byte & 15)                                            # (ROWS, BLOCK)
    codes = tl.reshape(codes, [ROWS * BLOCK])
    levels = tl.load(code + tl.arange(0, 16))                                                  # (16,)
    # gather(levels, codes, 0) is levels[codes]; `multiply` is a * b.
    values = multiply(tl.reshape(tl.gather(levels, codes, 0), [ROWS, BLOCK]), scale[:, None], ASM)

    inside = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]                              # (ROWS, BLOCK)
    values = values.to(out.dtype.element_ty)
    if STRIDED:
        # A row of out is row_blocks blocks and then a gap: each block is placed by itself.
        block = tile.to(tl.int32) * ROWS + rows
        row = block // row_blocks
        start = row.to(tl.int64) * row_stride + (block - row * row_blocks) * BLOCK             # (ROWS,)
        where = start[:, None] + tl.arange(0, BLOCK)[None, :]
    else:
        where = tile * (ROWS * BLOCK) + inside
    tl.store(out + where, values, mask=inside < values_left, eviction_policy="evict_first")


def fits(out: Tensor, blocksize: int) -> bool:
    """Contiguous, or the columns of a wider matrix with whole blocks in each row."""
    return out.is_contiguous() or (out.ndim == 2 and out.stride(1) == 1 and out.shape[1] % blocksize == 0)


def launch(
    packed: Tensor, absmax: Tensor, absmax2: Tensor | None, offset: Tensor | None, code2: Tensor | None, blocksize2: int,
    code: Tensor, blocksize: int, out: Tensor,
) -> None:  # fmt: skip
    n = out.numel()
    n_blocks = triton.cdiv(n, blocksize)
    assert fits(out, blocksize) and packed.numel() == (n + 1) // 2 and absmax.numel() == n_blocks
    assert absmax2 is None or absmax2.numel() == triton.cdiv(n_blocks, blocksize2)
    rows = max(1, TILE // blocksize)
    strided = not out.is_contiguous()
    row_blocks, row_stride = (out.shape[1] // blocksize, out.stride(0)) if strided else (0, 0)
    if n:
        with torch.cuda.device_of(packed):
            packed = packed.contiguous()
            words = packed.numel() % 4 == 0 and packed.data_ptr() % 4 == 0
            dequantize_kernel[triton.cdiv(n_blocks, rows),](
                packed, absmax.contiguous(), absmax2, offset, code2, code, out, n, packed.numel(), n_blocks,
                row_blocks, row_stride, BLOCK=blocksize, BLOCK2=blocksize2, ROWS=rows, WORDS=words, STRIDED=strided, ASM=packed.is_cuda,
                num_warps=2, enable_fp_fusion=False,
            )  # fmt: skip


def launch_new(packed, absmax, absmax2, offset, code2, blocksize2, code, blocksize, shape, dtype):
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    launch(packed, absmax, absmax2, offset, code2, blocksize2, code, blocksize, out)
    return out


def launch_out(*inputs, out):
    launch(*inputs, out)


library = torch.library.Library("minqlora", "FRAGMENT")
common = "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, Tensor? code2, int blocksize2, Tensor code, int blocksize"
library.define(f"dequantize_4bit({common}, SymInt[] shape, ScalarType dtype) -> Tensor")
library.define(f"dequantize_4bit.out({common}, *, Tensor(a!) out) -> ()")
library.impl("dequantize_4bit", launch_new, "CompositeExplicitAutograd")
library.impl("dequantize_4bit.out", launch_out, "CompositeExplicitAutograd")


@torch.library.register_fake("minqlora::dequantize_4bit")
def fake_new(packed, absmax, absmax2, offset, code2, blocksize2, code, blocksize, shape, dtype):
    return packed.new_empty(shape, dtype=dtype)


@torch.library.register_fake("minqlora::dequantize_4bit.out")
def fake_out(packed, absmax, absmax2, offset, code2, blocksize2, code, blocksize, *, out):
    return None


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, shape, code: Tensor, blocksize: int, dtype: torch.dtype,
    nested: tuple[Tensor, Tensor, Tensor, int] | None = None, out: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The weight in dtype. With nested = (absmax2, offset, code2, blocksize2), absmax holds the 8-bit codes of the absmaxes.

    With out, a tensor of that shape and dtype, the values go there. It is contiguous, or some columns of a wider matrix, if a row is
    whole blocks: so a merged product has its weights side by side.
    """
    absmax2, offset, code2, blocksize2 = nested or (None, None, None, 1)
    compiling = torch.compiler.is_compiling()                          # nobody differentiates this; see `run` in matmul_4bit.py
    if out is None and not compiling:
        return launch_new(packed, absmax, absmax2, offset, code2, blocksize2, code, blocksize, shape, dtype)
    if out is None:
        return torch.ops.minqlora.dequantize_4bit.default(
            packed, absmax, absmax2, offset, code2, blocksize2, code, blocksize, shape, dtype
        )
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype or not fits(out, blocksize):
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)}, strides {out.stride()}; it must be {dtype} of shape {tuple(shape)}, "
            f"contiguous, or with contiguous rows of whole blocks of {blocksize}"
        )
    write = torch.ops.minqlora.dequantize_4bit.out if compiling else launch_out
    write(packed, absmax, absmax2, offset, code2, blocksize2, code, blocksize, out=out)
    return out
