"""Double quantization on a GPU: absmax to 8 bits and back. The definition is double_quant.py of minqlora.

**The problem.** A weight of 18176 x 4544 has 1.29 million absmaxes, 5 MB: little beside the weight's 165 MB, and it must take little time.
A program takes ROWS groups of `blocksize` absmaxes as a tile (ROWS, BLOCK), subtracts the mean from each, takes the largest magnitude
of a row, and looks up the level for each scaled value. The mean is PyTorch's: the order of its additions decides its last bit, and
bitsandbytes calls the same function. On one H100 the mean takes 0.0085 ms for that weight, and the kernel 0.0101 with one group and one
warp a program; 1024 values with 4 warps take 0.0107, with 8 warps 0.0114. The search waits for loads that come one after the other.

**The search is not the one of the reference.** On a CPU, bitsandbytes rounds to one of 65 536 points and then takes the nearest level. On
CUDA it descends through the 256 ascending levels in seven steps from the 127th:

    pivot = 127;  for step in 64, 32, .., 1:  pivot += step if x > code[pivot] else -step

which ends beside the value, on an even number; one neighbour is left, the next level up or down, and the midpoint decides. On a
midpoint, the level where the search ended stays. About one code in 600 differs from the CPU's. As for the weight, the reciprocal is the
hardware's, and a group of equal absmaxes is zeros times 1/0: NaN, which is above nothing, so code 0.

**Back** is a product and a sum, each rounded: `decode_absmax`, which the other kernels call where they need an absmax. Left to itself the
compiler would fuse the two into one rounding; the launch has to forbid that (`enable_fp_fusion=False`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minqlora.kernels.quantize_4bit import flush, multiply, reciprocal

TILE = 256                                                         # absmaxes a program handles


@triton.jit
def decode_absmax(code, group, absmax2, offset, code2, mask, ASM: tl.constexpr):
    """code2[code] * absmax2[group] + offset: two roundings."""
    scale = tl.load(absmax2 + group, mask=mask, other=0.0)
    return multiply(tl.load(code2 + code.to(tl.int32)), scale, ASM) + tl.load(offset)


@triton.jit
def search(x, code2):
    """The code of each scaled value."""
    pivot = tl.full(x.shape, 127, tl.int32)
    for k in tl.static_range(7):
        pivot += tl.where(x > tl.load(code2 + pivot), 64 >> k, -(64 >> k))
    level = tl.load(code2 + pivot)
    up = x > level
    # The ends have a neighbour on one side alone; below the lowest level, that is the level itself.
    neighbour = tl.maximum(pivot + tl.where(up, 1, -1), 0)
    midpoint = (tl.load(code2 + neighbour) + level) * 0.5
    return tl.where(tl.where(up, x > midpoint, x < midpoint), neighbour, pivot)


@triton.jit
def double_quantize_kernel(absmax, offset, code2, codes, absmax2, n, BLOCK: tl.constexpr, ROWS: tl.constexpr, ASM: tl.constexpr):
    tile = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)                                                                  # (ROWS,)
    inside = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]                              # (ROWS, BLOCK)
    left = tl.minimum(n - tile * (ROWS * BLOCK), ROWS * BLOCK).to(tl.int32)
    x = tl.load(absmax + tile * (ROWS * BLOCK) + inside, mask=inside < left, other=0.0)
    # Padding is zero after the mean is taken off, not before.
    x = tl.where(inside < left, x - tl.load(offset), 0.0)                                      # (ROWS, BLOCK)
    largest = flush(tl.max(tl.abs(x), axis=1))                                                 # (ROWS,)
    tl.store(absmax2 + tile * ROWS + rows, largest, mask=rows * BLOCK < left)
    scaled = multiply(x, reciprocal(largest, ASM)[:, None], ASM)
    tl.store(codes + tile * (ROWS * BLOCK) + inside, search(scaled, code2).to(tl.uint8), mask=inside < left)


@triton.jit
def double_dequantize_kernel(codes, absmax2, offset, code2, absmax, n, BLOCK: tl.constexpr, TILE: tl.constexpr, ASM: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * TILE
    inside = tl.arange(0, TILE)                                                                # (TILE,)
    mask = inside < tl.minimum(n - start, TILE).to(tl.int32)
    code = tl.load(codes + start + inside, mask=mask, other=0)
    tl.store(absmax + start + inside, decode_absmax(code, (start + inside) // BLOCK, absmax2, offset, code2, mask, ASM), mask=mask)


def launch_quantize(absmax: Tensor, code2: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    absmax = absmax.contiguous()
    n = absmax.numel()
    offset = absmax.mean()                                         # ()
    codes = torch.empty(n, dtype=torch.uint8, device=absmax.device)
    absmax2 = torch.empty(triton.cdiv(n, blocksize), dtype=torch.float32, device=absmax.device)
    rows = max(1, TILE // blocksize)
    if n:
        with torch.cuda.device_of(absmax):
            double_quantize_kernel[triton.cdiv(n, rows * blocksize),](
                absmax, offset, code2, codes, absmax2, n, BLOCK=blocksize, ROWS=rows, ASM=absmax.is_cuda,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
    return codes, absmax2, offset


def launch_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, code2: Tensor, blocksize: int) -> Tensor:
    codes = codes.contiguous()
    n = codes.numel()
    absmax = torch.empty(n, dtype=torch.float32, device=codes.device)
    if n:
        with torch.cuda.device_of(codes):
            double_dequantize_kernel[triton.cdiv(n, TILE),](
                codes, absmax2, offset, code2, absmax, n, BLOCK=blocksize, TILE=TILE, ASM=codes.is_cuda,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
    return absmax


library = torch.library.Library("minqlora", "FRAGMENT")
library.define("double_quantize(Tensor absmax, Tensor code2, int blocksize) -> (Tensor, Tensor, Tensor)")
library.define("double_dequantize(Tensor codes, Tensor absmax2, Tensor offset, Tensor code2, int blocksize) -> Tensor")
library.impl("double_quantize", launch_quantize, "CompositeExplicitAutograd")
library.impl("double_dequantize", launch_dequantize, "CompositeExplicitAutograd")


@torch.library.register_fake("minqlora::double_quantize")
def fake_quantize(absmax, code2, blocksize):
    n = absmax.numel()
    return absmax.new_empty((n,), dtype=torch.uint8), absmax.new_empty(((n + blocksize - 1) // blocksize,)), absmax.new_empty(())


@torch.library.register_fake("minqlora::double_dequantize")
def fake_dequantize(codes, absmax2, offset, code2, blocksize):
    return codes.new_empty((codes.numel(),), dtype=torch.float32)


def double_quantize(absmax: Tensor, code2: Tensor, blocksize: int) -> tuple[Tensor, Tensor, Tensor]:
    """codes, uint8 (n,), absmax2, float32 (ceil(n / blocksize),), and offset, float32 (); see double_quant.py of minqlora."""
    return torch.ops.minqlora.double_quantize.default(absmax, code2, blocksize)


def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, code2: Tensor, blocksize: int) -> Tensor:
    """absmax_b = code2[codes_b] * absmax2_g + offset: float32 (n,)."""
    return torch.ops.minqlora.double_dequantize.default(codes, absmax2, offset, code2, blocksize)
