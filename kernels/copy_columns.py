"""A matrix into some columns of a wider one, or out of them.

fast.py keeps side by side what is multiplied together, and attention wants its own matrix. PyTorch copies columns value by value, 2 bytes
at a time: 0.10 ms for 8192 x 4544 in bfloat16 on an H100. Here a thread moves 16 bytes: 0.08 ms.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def copy_kernel(source, out, n, source_stride, out_stride, BLOCK: tl.constexpr):
    row, columns = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(source + row * source_stride + columns, mask=columns < n)
    tl.store(out + row * out_stride + columns, values, mask=columns < n)


def copy_columns(source: Tensor, out: Tensor) -> None:
    """out = source, for source and out of (M, N), with rows of values side by side, that do not overlap."""
    m, n = source.shape
    assert out.shape == source.shape and out.dtype == source.dtype and source.stride(1) == out.stride(1) == 1
    block = min(8192, triton.next_power_of_2(n))
    if m:
        with torch.cuda.device_of(source):
            copy_kernel[m, triton.cdiv(n, block)](source, out, n, source.stride(0), out.stride(0), BLOCK=block, num_warps=8)
