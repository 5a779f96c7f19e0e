"""Dropout on a GPU that a backward can repeat: whether element i is kept is a function of a seed and i, so no mask is stored.

    out[i] = x[i] / (1 - p)  if random(seed, i) >= p,  else 0

random is Philox, the counter-based generator that PyTorch's own dropout on a GPU uses: a few integer multiplications a value, which
a kernel that waits for memory has time for. The seed is a number on the device, so that drawing one makes nobody wait.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def drop_kernel(x, seed, out, p, n, x_stride, BLOCK: tl.constexpr):
    pieces = tl.cdiv(n, BLOCK)                                                     # of a row
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(x + row * x_stride + columns, mask=columns < n, other=0).to(tl.float32)
    chance = tl.rand(tl.load(seed), (row * n + columns).to(tl.uint32))             # in [0, 1)
    tl.store(out + row * n + columns, tl.where(chance >= p, values / (1 - p), 0.0).to(out.dtype.element_ty), mask=columns < n)


def drop(x: Tensor, p: float, seed: Tensor) -> Tensor:
    """x (M, N), with contiguous rows, with a share p of its values dropped; seed () is an integer. The result is contiguous."""
    m, n = x.shape
    assert x.stride(1) == 1
    out = torch.empty(m, n, dtype=x.dtype, device=x.device)
    block = 1024
    if m:
        with torch.cuda.device_of(x):
            drop_kernel[m * triton.cdiv(n, block),](x, seed, out, p, n, x.stride(0), BLOCK=block, num_warps=4)
    return out
