"""Dequantize on a GPU: one launch from packed codes and absmax to bfloat16, float16 or float32.

The definition is `dequantize_4bit` of nf4.py: w_i = code[code_i] * absmax_b, one float32 product, rounded to the dtype.

**The problem.** Half a byte comes in and two bytes go out for each value: 4 of 5 bytes that move are stores, and the memory is the limit as
long as a value costs fewer than some 20 instructions. A program takes ROWS blocks as a tile (ROWS, BLOCK). Each thread reads four bytes,
which hold eight neighbouring values, and writes those eight as one store of 16 bytes:

    byte (r, j) of the tile holds columns 2j (high half) and 2j + 1 (low half)      tl.interleave(high, low): (ROWS, BLOCK)

**The levels** are 16 floats. With one warp a program, a lane holds one of them, and `tl.gather` is a shuffle between lanes.

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

TILE = 2048                                                        # values a program handles: 64 a lane


@triton.jit
def dequantize_kernel(
    packed, absmax, absmax2, offset, code2, code, out, n, n_bytes, n_blocks, row_blocks, row_stride,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, ROWS: tl.constexpr, STRIDED: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: ROWS blocks. absmax2 is None where absmax is not quantized itself."""
    tile = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)                                                                  # (ROWS,)
    values_left = tl.minimum(n - tile * (ROWS * BLOCK), ROWS * BLOCK).to(tl.int32)
    bytes_left = tl.minimum(n_bytes - tile * (ROWS * BLOCK // 2), ROWS * BLOCK // 2).to(tl.int32)
    in_blocks = rows < tl.minimum(n_blocks - tile * ROWS, ROWS).to(tl.int32)
    scale = tl.load(absmax + tile * ROWS + rows, mask=in_blocks, other=0)                      # (ROWS,)
    if absmax2 is not None:
        scale = decode_absmax(scale, (tile * ROWS + rows) // BLOCK2, absmax2, offset, code2, in_blocks, ASM)

    inside = rows[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]                  # (ROWS, BLOCK / 2)
    byte = tl.load(packed + tile * (ROWS * BLOCK // 2) + inside, mask=inside < bytes_left, other=0, eviction_policy="evict_first")
    byte = byte.to(tl.int32)
    codes = tl.reshape(tl.interleave(byte >> 4, byte & 15), [ROWS * BLOCK])
    levels = tl.load(code + tl.arange(0, 16))                                                  # (16,)
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
            dequantize_kernel[triton.cdiv(n_blocks, rows),](
                packed.contiguous(), absmax.contiguous(), absmax2, offset, code2, code, out, n, packed.numel(), n_blocks,
                row_blocks, row_stride, BLOCK=blocksize, BLOCK2=blocksize2, ROWS=rows, STRIDED=strided, ASM=packed.is_cuda,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip


def launch_new(packed, absmax, absmax2, offset, code2, blocksize2, code, blocksize, shape, dtype):
    out = torch.empty(shape, dtype=dtype, device=packed.device)
    launch(packed, absmax, absmax2, offset, code2, blocksize2, code, blocksize, out)
    return out


library = torch.library.Library("minqlora", "FRAGMENT")
common = "Tensor packed, Tensor absmax, Tensor? absmax2, Tensor? offset, Tensor? code2, int blocksize2, Tensor code, int blocksize"
library.define(f"dequantize_4bit({common}, SymInt[] shape, ScalarType dtype) -> Tensor")
library.define(f"dequantize_4bit.out({common}, *, Tensor(a!) out) -> ()")
library.impl("dequantize_4bit", launch_new, "CompositeExplicitAutograd")
library.impl("dequantize_4bit.out", lambda *inputs, out: launch(*inputs, out), "CompositeExplicitAutograd")


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
    if out is None:
        return torch.ops.minqlora.dequantize_4bit.default(
            packed, absmax, absmax2, offset, code2, blocksize2, code, blocksize, shape, dtype
        )
    if tuple(out.shape) != tuple(shape) or out.dtype != dtype or not fits(out, blocksize):
        raise ValueError(
            f"out is {out.dtype} of shape {tuple(out.shape)}, strides {out.stride()}; it must be {dtype} of shape {tuple(shape)}, "
            f"contiguous, or with contiguous rows of whole blocks of {blocksize}"
        )
    torch.ops.minqlora.dequantize_4bit.out(packed, absmax, absmax2, offset, code2, blocksize2, code, blocksize, out=out)
    return out
