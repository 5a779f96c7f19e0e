"""What stands between the products of a decode step: the residual with its norm, GELU, and LoRA's two small products.

A decode step has one row a prompt, and its time is that of reading the weights. Everything else has to stay out of the way: each launch
costs some 2 µs before it does anything, and a block of Falcon-7B written out has a dozen of them beside its products.

**Residual and norm.** What the last block adds (attention, MLP, LoRA's part of both) is not summed where it is made. The next norm reads
the pieces, and writes their sum beside the normalized row:

    x' = x + first + second + third            out = layer_norm(x')

The definition is PyTorch's sum and `F.layer_norm`; here the sum is rounded once. One program takes one row, in registers.

**GELU and LoRA.** out = gelu(u + xa B^T), with u = h W_up^T from the 4-bit product and xa = h A^T (M, rank). The 4-bit product could add
the LoRA part itself, but would then wait for xa, a small product that is mostly launch. Added here, where u is read anyway, the LoRA part
leaves xa to be computed beside the 4-bit product. A program computes a tile of BLOCK_M x BLOCK_N and reads BLOCK_N rows of B.

**LoRA's outer product**, xa B^T, of two linears whose outputs are added anyway, attention's last and the MLP's: the same kernel without u
and GELU, and with a second pair. One launch for both; B is on its way before xa is there.

**LoRA's inner product**, x A^T for a few rows of x: one program takes one row of A from end to end, so that one launch does it. cuBLAS
cuts such a product into pieces and adds them in a second launch. Two linears that share x share the launch, and each gets its xa
contiguous.

B is scale * lora_B throughout. With OVERLAP a kernel starts before the one before it has ended, loads its weights and then waits
(`after_previous` in few_rows.py); `launch_pdl` asks for that. `tl.dot` wants sides of at least 16, hence BLOCK_M and PADDED even for one
row, and "ieee", or it would round float32 to TF32.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minqlora.kernels.few_rows import after_previous, overlaps
from minqlora.kernels.gelu import share_below


@triton.jit
def add_norm_kernel(x, first, second, third, weight, bias, total, out, n, eps, BLOCK: tl.constexpr, OVERLAP: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < n
    scale = tl.load(weight + columns, mask=inside, other=0).to(tl.float32)
    shift = tl.load(bias + columns, mask=inside, other=0).to(tl.float32)
    if OVERLAP:
        after_previous()
    at = tl.program_id(0).to(tl.int64) * n + columns
    values = tl.load(x + at, mask=inside, other=0)
    if first is not None:
        wide = values.to(tl.float32) + tl.load(first + at, mask=inside, other=0).to(tl.float32)
        if second is not None:
            wide += tl.load(second + at, mask=inside, other=0).to(tl.float32)
        if third is not None:
            wide += tl.load(third + at, mask=inside, other=0).to(tl.float32)
        # The norm is that of the sum as it is stored, which the next block adds to.
        values = wide.to(values.dtype)
        tl.store(total + at, values, mask=inside)
    values = values.to(tl.float32)
    centred = tl.where(inside, values - tl.sum(values) / n, 0.0)
    z = centred / tl.sqrt(tl.sum(centred * centred) / n + eps)
    tl.store(out + at, (z * scale + shift).to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["m", "first_rank"])
def inner_kernel(x, A, out, m, k, first_rank, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr, OVERLAP: tl.constexpr):
    """x (m, k), A (total, k), out flat: x A[:first_rank]^T (m, first_rank), behind it x A[first_rank:]^T."""
    r, total = tl.program_id(0), tl.num_programs(0)                                         # which row of A, of how many
    rows = (tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)                # (BLOCK_M,)
    columns = tl.arange(0, BLOCK_K)                                                         # (BLOCK_K,)
    row_of_A = A + r.to(tl.int64) * k
    a = tl.load(row_of_A + columns, mask=columns < k, other=0).to(tl.float32)               # (BLOCK_K,)
    if OVERLAP:
        after_previous()                                                                    # A was there before; x may be new
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + columns
        values = tl.load(x + rows[:, None] * k + at[None, :], mask=(rows < m)[:, None] & (at < k)[None, :], other=0)
        acc += values.to(tl.float32) * a[None, :]
        a = tl.load(row_of_A + at + BLOCK_K, mask=at + BLOCK_K < k, other=0).to(tl.float32) # of the next stretch
    second = r >= first_rank
    begin, column = tl.where(second, m * first_rank, 0), tl.where(second, r - first_rank, r)
    width = tl.where(second, total - first_rank, first_rank)
    tl.store(out + begin + rows * width + column, tl.sum(acc, axis=1).to(out.dtype.element_ty), mask=rows < m)


@triton.jit
def outer_kernel(
    u, xa, B, xa2, B2, out, m, n, xa_stride, xa2_stride,
    RANK: tl.constexpr, RANK2: tl.constexpr, PADDED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    GELU: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(1) * BLOCK_M + tl.arange(0, BLOCK_M)                               # (BLOCK_M,)
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)                            # (BLOCK_N,)
    at = rows.to(tl.int64)[:, None] * n + columns[None, :]
    row_ok, column_ok = (rows < m)[:, None], (columns < n)[None, :]
    r = tl.arange(0, PADDED)                                                                # (PADDED,)
    if xa is not None:
        right = tl.load(B + columns[None, :] * RANK + r[:, None], mask=column_ok & (r < RANK)[:, None], other=0)
    if xa2 is not None:
        right2 = tl.load(B2 + columns[None, :] * RANK2 + r[:, None], mask=column_ok & (r < RANK2)[:, None], other=0)
    if OVERLAP:
        after_previous()                                                                    # B was there before; u and xa may be new
    values = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if u is not None:
        values = tl.load(u + at, mask=row_ok & column_ok, other=0).to(tl.float32)
    if xa is not None:
        left = tl.load(xa + rows[:, None] * xa_stride + r[None, :], mask=row_ok & (r < RANK)[None, :], other=0)
        values = tl.dot(left, right, values, input_precision="ieee")
    if xa2 is not None:
        left2 = tl.load(xa2 + rows[:, None] * xa2_stride + r[None, :], mask=row_ok & (r < RANK2)[None, :], other=0)
        values = tl.dot(left2, right2, values, input_precision="ieee")
    if GELU:
        values *= share_below(values)
    tl.store(out + at, values.to(out.dtype.element_ty), mask=row_ok & column_ok)


def add_norm(x: Tensor, added: list[Tensor], weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x + the sum of at most three added, and its layer_norm; all (M, N) and contiguous."""
    m, n = x.shape
    assert len(added) <= 3 and all(part.shape == x.shape and part.is_contiguous() for part in (x, *added))
    first, second, third = (*added, None, None, None)[:3]
    total, out = torch.empty_like(x) if added else x, torch.empty_like(x)
    overlap = overlaps(x)
    with torch.cuda.device_of(x):
        add_norm_kernel[m,](
            x, first, second, third, weight, bias, total, out, n, eps,
            BLOCK=triton.next_power_of_2(n), OVERLAP=overlap, num_warps=8, launch_pdl=overlap,
        )  # fmt: skip
    return total, out


def inner(x: Tensor, A: Tensor, ranks: list[int]) -> list[Tensor]:
    """x A^T, for x (M, K) and A (sum of ranks, K), in at most two pieces (M, rank); all contiguous."""
    (m, k), total = x.shape, sum(ranks)
    assert x.is_contiguous() and A.is_contiguous() and A.shape == (total, k) and 1 <= len(ranks) <= 2
    out = x.new_empty(m * total)
    overlap, block_m = overlaps(x), min(4, triton.next_power_of_2(m))
    with torch.cuda.device_of(x):
        inner_kernel[total, triton.cdiv(m, block_m)](
            x, A, out, m, k, ranks[0], BLOCK_M=block_m, BLOCK_K=4096 // block_m, OVERLAP=overlap, num_warps=8, launch_pdl=overlap,
        )  # fmt: skip
    return [part.view(m, rank) for part, rank in zip(out.split([m * rank for rank in ranks]), ranks, strict=True)]


def gelu(u: Tensor, xa: Tensor | None = None, B: Tensor | None = None) -> Tensor:
    """gelu(u + xa B^T), for u (M, N), xa (M, rank) that may be some columns of a wider matrix, B (N, rank)."""
    return launch_outer(u, [] if xa is None else [(xa, B)], *u.shape, activate=True)


def outer(pairs: list[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of xa B^T over one or two pairs xa (M, rank), B (N, rank): (M, N)."""
    xa, B = pairs[0]
    return launch_outer(None, pairs, len(xa), len(B), activate=False)


def launch_outer(u: Tensor | None, pairs: list[tuple[Tensor, Tensor]], m: int, n: int, activate: bool) -> Tensor:
    assert len(pairs) <= 2 and (u is None or u.is_contiguous())
    if any(B.shape[1] > 128 for _, B in pairs):
        # The tiles of B grow with the rank, and would not fit into every GPU's shared memory. cuBLAS rounds after each product.
        for xa, B in pairs:
            u = xa @ B.T if u is None else torch.addmm(u, xa, B.T)
        if not activate:
            return u
        pairs = []
    for xa, B in pairs:
        assert xa.stride(1) == 1 and B.is_contiguous() and len(xa) == m and B.shape == (n, xa.shape[1])
    (xa, B), (xa2, B2) = [*pairs, (None, None), (None, None)][:2]
    ranks = [B.shape[1] for _, B in pairs] + [0, 0]
    like = xa if u is None else u
    out = like.new_empty(m, n)
    block_m, block_n = 16, 64
    overlap = overlaps(like)
    with torch.cuda.device_of(like):
        outer_kernel[triton.cdiv(n, block_n), triton.cdiv(m, block_m)](
            u, xa, B, xa2, B2, out, m, n, *(0 if x is None else x.stride(0) for x in (xa, xa2)),
            RANK=ranks[0], RANK2=ranks[1], PADDED=max(16, triton.next_power_of_2(max(ranks))), BLOCK_M=block_m, BLOCK_N=block_n,
            GELU=activate, OVERLAP=overlap, num_warps=4, launch_pdl=overlap,
        )  # fmt: skip
    return out
