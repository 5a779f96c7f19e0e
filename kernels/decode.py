"""What stands between the products of a decode step: the residual with its norm, and GELU with its LoRA part.

A decode step has one row a prompt, and its time is that of reading the weights. Everything else has to stay out of the way: each launch
costs some 2 µs before it does anything, and a block of Falcon-7B written out has a dozen of them beside its products.

**Residual and norm.** What the last block added, its attention and its MLP, is not added where it is made. The next norm reads all
three, and writes their sum beside the normalized row:

    x' = x + first + second            out = layer_norm(x')

The definition is PyTorch's sum and `F.layer_norm`; here the sum is rounded once. One program takes one row, in registers.

**GELU and LoRA.** out = gelu(u + xa B^T), with u = h W_up^T from the 4-bit product and xa = h A^T (M, rank). The 4-bit product could add
the LoRA part itself, and then would have to wait for xa, a small product that takes its launch to start and end. Added here, where u is
read anyway, it is made beside the 4-bit product. A program computes a tile of BLOCK_M x BLOCK_N and reads BLOCK_N rows of B.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minqlora.kernels.gelu import share_below


@triton.jit
def add_norm_kernel(x, first, second, weight, bias, total, out, n, eps, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    at = tl.program_id(0).to(tl.int64) * n + columns
    values = tl.load(x + at, mask=inside, other=0)
    if first is not None:
        wide = values.to(tl.float32) + tl.load(first + at, mask=inside, other=0).to(tl.float32)
        if second is not None:
            wide += tl.load(second + at, mask=inside, other=0).to(tl.float32)
        # The norm is that of the sum as it is stored, which the next block adds to.
        values = wide.to(values.dtype)
        tl.store(total + at, values, mask=inside)
    values = values.to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values) / n, 0.0)
    z = centred / tl.sqrt(tl.sum(centred * centred) / n + eps)
    scale = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
    tl.store(out + at, (z * scale + shift).to(out.dtype.element_ty), mask=inside)


@triton.jit
def gelu_kernel(
    u, xa, B, out, m, n, xa_stride,
    RANK: tl.constexpr, RANK_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)                               # (BLOCK_M,)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)                            # (BLOCK_N,)
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    inside = (rows < m)[:, None] & (columns < n)[None, :]
    values = tl.load(u + at, mask=inside, other=0).to(tl.float32)                           # (BLOCK_M, BLOCK_N)
    if xa is not None:
        ranks = tl.arange(0, RANK_PADDED)
        known = ranks < RANK
        left = tl.load(xa + rows[:, None] * xa_stride + ranks[None, :], mask=(rows < m)[:, None] & known[None, :], other=0)
        right = tl.load(B + columns[None, :] * RANK + ranks[:, None], mask=(columns < n)[None, :] & known[:, None], other=0)
        values += tl.dot(left, right, input_precision="ieee")
    tl.store(out + at, (values * share_below(values)).to(out.dtype.element_ty), mask=inside)


def add_norm(x: Tensor, added: list[Tensor], weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + the sum of at most two added, and its layer_norm; all (M, N) and contiguous."""
    m, n = x.shape
    assert len(added) <= 2 and all(part.shape == x.shape and part.is_contiguous() for part in (x, *added))
    first, second = (*added, None, None)[:2]
    total, out = torch.empty_like(x) if added else x, torch.empty_like(x)
    with torch.cuda.device_of(x):
        add_norm_kernel[m,](x, first, second, weight, bias, total, out, n, eps, BLOCK=triton.next_power_of_2(n), num_warps=8)
    return total, out


def gelu(u: Tensor, xa: Tensor | None = None, B: Tensor | None = None) -> Tensor:
    """gelu(u + xa B^T), for u (M, N), xa (M, rank) that may be some columns of a wider matrix, B (N, rank)."""
    m, n = u.shape
    rank = 0 if xa is None else xa.shape[1]
    assert u.is_contiguous()
    assert xa is None or (xa.stride(1) == 1 and B.is_contiguous() and xa.shape == (m, rank) and B.shape == (n, rank))
    out = torch.empty_like(u)
    block_m, block_n = 16, 64
    with torch.cuda.device_of(u):
        gelu_kernel[triton.cdiv(n, block_n), triton.cdiv(m, block_m)](
            u, xa, B, out, m, n, 0 if xa is None else xa.stride(0),
            RANK=rank, RANK_PADDED=max(16, triton.next_power_of_2(rank)), BLOCK_M=block_m, BLOCK_N=block_n, num_warps=4,
        )  # fmt: skip
    return out
