"""GELU on a GPU, between the two products of the MLP: forward into a wider matrix, backward in one pass with all it needs.

    g  = u Phi(u)                        Phi, phi: the standard normal distribution and its density
    du = dg (Phi(u) + u phi(u))

The definition is `F.gelu(u)`, the exact one by erf, and its autograd. The forward runs at nine tenths of what an H200's memory allows, the
backward at seven (82 % on an H100): a row of falcon-7b's MLP has 18176 values, and a step at 8192 tokens moves 0.3 GB for each matrix that
is read or written.

**Forward.** u and g are columns of wider matrices (fast.py keeps neighbours that are multiplied together side by side), so a program
takes a piece of one row: one division finds the row for all its values, and each thread moves 16 bytes at a time.

**Backward.** Three things want to be done to the same values, and one pass does them all:

    dg = dg_W + dxa A          dg_W came through the frozen weight, the rest through LoRA: (M, rank) times (rank, N)
    g  = u Phi(u)                again, for the gradient of A; it overwrites u, which nobody needs afterwards
    du = dg (Phi(u) + u phi(u))  overwrites dg_W

Done by themselves they read or write a matrix of that size seven times (dg_W, dg; u, g; dg, u, du); together two are read and two
written. A program computes TILES tiles of BLOCK_M x BLOCK_N below each other, so that it reads its columns of A once. A tile's share of
dxa A is one product of the matrix unit.

**The ladder** of the backward, ms for 8192 x 18176 in bfloat16 and rank 64 on one H100; its bytes alone take 0.41:

    a tile of 64 x 128 a program, 8 warps            about 1.1
    16 x 128, 4 warps                                0.68      more programs at a time wait for memory
    the same, neighbours below each other            0.77      lost: neighbours beside each other read memory in order
    8 tiles of 32 x 64 in a loop, 3 on their way     0.58
    Phi and phi from one exponential                 0.51      not in float32, where 1e-7 would show
    16 tiles of 16 x 128                             0.50      without dxa A 0.47
    32 x 128, 64 x 64, 64 x 128; 2 or 4 on their way 0.54 to 0.88      lost

and on one H200, between products that heat it as a step does; its bytes alone take 0.28:

    as above                                         0.445
    the division in two instructions                 0.393     `root` in below_and_density

The forward there: 0.213 with erf, 0.153 in its SHORT form; its bytes alone take 0.14.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def share_below(u):
    """Phi(u), the share of a normal distribution that lies below u."""
    return 0.5 * (1.0 + tl.math.erf(u * 0.7071067811865476))                                # 1 / sqrt(2)


@triton.jit
def below_and_density(u, SHORT: tl.constexpr):
    """Phi(u) and phi(u). With SHORT, Phi reuses phi's exponential, and is off by up to 1e-7 (Abramowitz and Stegun, 7.1.26)."""
    density = 0.3989422804014327 * tl.exp(-0.5 * u * u)             # 1 / sqrt(2 pi)
    if SHORT:
        root = tl.rsqrt(1.0 + 0.2316418882 * tl.abs(u))             # 0.3275911 / sqrt(2)
        t = root * root                                             # a reciprocal in two instructions; a division takes several
        series = (((1.061405429 * t - 1.453152027) * t + 1.421413741) * t - 0.284496736) * t + 0.254829592
        tail = 1.2533141373155003 * series * t * density            # sqrt(pi / 2) * density = exp(-u^2 / 2) / 2
        below = tl.where(u > 0, 1.0 - tail, tail)
    else:
        below = share_below(u)
    return below, density


@triton.jit
def forward_kernel(u, out, n, u_stride, out_stride, BLOCK: tl.constexpr, SHORT: tl.constexpr):
    pieces = tl.cdiv(n, BLOCK)                                      # of a row; neighbouring programs take neighbouring pieces
    row = (tl.program_id(0) // pieces).to(tl.int64)
    columns = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(u + row * u_stride + columns, mask=columns < n, other=0).to(tl.float32)
    below, _ = below_and_density(values, SHORT)
    tl.store(out + row * out_stride + columns, (values * below).to(out.dtype.element_ty), mask=columns < n)


@triton.jit
def backward_kernel(
    u, grad, dxa, A, m, n, u_stride, grad_stride, dxa_stride, A_stride,
    RANK: tl.constexpr, RANK_PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
    SHORT: tl.constexpr,
):  # fmt: skip
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)                            # (BLOCK_N,)
    c_ok = columns < n
    ranks = tl.arange(0, RANK_PADDED)
    if dxa is not None:
        right = tl.load(A + ranks[:, None] * A_stride + columns[None, :], mask=(ranks < RANK)[:, None] & c_ok[None, :], other=0)
    # While one tile is computed, the next are on their way.
    for i in tl.range(0, TILES, num_stages=3):
        rows = (tl.program_id(1).to(tl.int64) * TILES + i) * BLOCK_M + tl.arange(0, BLOCK_M)        # (BLOCK_M,)
        inside = (rows < m)[:, None] & c_ok[None, :]
        u_at = u + rows[:, None] * u_stride + columns[None, :]
        grad_at = grad + rows[:, None] * grad_stride + columns[None, :]
        values = tl.load(u_at, mask=inside, other=0).to(tl.float32)                         # (BLOCK_M, BLOCK_N)
        change = tl.load(grad_at, mask=inside, other=0).to(tl.float32)
        if dxa is not None:
            left_ok = (rows < m)[:, None] & (ranks < RANK)[None, :]
            left = tl.load(dxa + rows[:, None] * dxa_stride + ranks[None, :], mask=left_ok, other=0)
            change = tl.dot(left, right, change, input_precision="ieee")
        below, density = below_and_density(values, SHORT)
        slope = below + values * density
        tl.store(u_at, (values * below).to(u.dtype.element_ty), mask=inside)
        tl.store(grad_at, (change * slope).to(grad.dtype.element_ty), mask=inside)


def gelu_into(u: Tensor, out: Tensor) -> None:
    """out = gelu(u), for u and out of (M, N) with contiguous rows."""
    m, n = u.shape
    assert out.shape == u.shape and u.stride(1) == out.stride(1) == 1
    block = 2048
    if m:
        with torch.cuda.device_of(u):
            forward_kernel[m * triton.cdiv(n, block),](
                u, out, n, u.stride(0), out.stride(0), BLOCK=block, SHORT=u.dtype != torch.float32, num_warps=4
            )


def gelu_backward_(u: Tensor, grad: Tensor, dxa: Tensor | None = None, A: Tensor | None = None) -> None:
    """grad (M, N), of g = gelu(u), becomes that of u, once dxa (M, rank) times A (rank, N) is added to it; u becomes g."""
    m, n = u.shape
    assert grad.shape == u.shape and u.stride(1) == grad.stride(1) == 1
    rank = 0 if A is None else A.shape[0]
    assert A is None or (A.stride(1) == dxa.stride(1) == 1 and dxa.shape == (m, rank) and A.shape == (rank, n))
    block_m, block_n, tiles = 16, 128, 16
    if rank > 128:
        # What is loaded ahead of dxa grows with the rank, and would not fit into every GPU's shared memory.
        grad.addmm_(dxa, A)
        rank, dxa, A = 0, None, None
    if m:
        with torch.cuda.device_of(u):
            backward_kernel[triton.cdiv(n, block_n), triton.cdiv(m, block_m * tiles)](
                u, grad, dxa, A, m, n, u.stride(0), grad.stride(0), 0 if A is None else dxa.stride(0), 0 if A is None else A.stride(0),
                RANK=rank, RANK_PADDED=max(16, triton.next_power_of_2(rank)), BLOCK_M=block_m, BLOCK_N=block_n, TILES=tiles,
                SHORT=u.dtype != torch.float32, num_warps=4,
            )  # fmt: skip
