"""Rotary positions on a GPU, on both sides of attention: from query_key_value to queries and keys, and back to its gradient.

    a' = a cos - b sin,    b' = b cos + a sin        (a, b) = (x[i], x[i + head_dim / 2]), for every query and every key
    da = da' cos + db' sin,  db = db' cos - da' sin  turned back by the same angle

The definition is `falcon.rotate` and its autograd. Both kernels are bound by memory: each value is read once and written once.

**There.** A row of query_key_value holds, for each key head, its queries, its key and its value, head_dim numbers each. A program takes
BLOCK_H of the heads to be turned of one token, reads the halves a and b, and writes them where attention wants them: queries to one
tensor, keys to another. Values are not turned, and attention reads them where they are.

**Back.** Attention gives a gradient for every query head, of the key and the value too, since it saw each key once for every query of
its group. So a key's gradient is a sum over the group. Written with PyTorch's functions that are five passes (two sums, the rotation,
and twice putting things side by side); here it is one, which writes into the columns of the matrix that the next product reads.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_H = 32        # heads that a program turns


@triton.jit
def angles(cosine, sine, row, period, d, d_ok, HEAD_DIM: tl.constexpr):
    """Cosine and sine (HALF,) of a token. The tables hold `period` tokens, and repeat; the halves of their rows are equal."""
    at = (row % period) * HEAD_DIM + d
    return tl.load(cosine + at, mask=d_ok, other=0).to(tl.float32), tl.load(sine + at, mask=d_ok, other=0).to(tl.float32)


@triton.jit(do_not_specialize=["period"])
def turn_kernel(
    qkv, cosine, sine, query, key, qkv_stride, period,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    h = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)          # heads to be turned: GROUP queries and a key, for each key head
    d = tl.arange(0, HALF)                                          # HALF: head_dim / 2, rounded up to a power of two
    d_ok = d < HEAD_DIM // 2
    kv_head, i = h // (GROUP + 1), h % (GROUP + 1)
    ok = (kv_head < KV_HEADS)[:, None] & d_ok[None, :]
    source = qkv + row * qkv_stride + ((kv_head * (GROUP + 2) + i) * HEAD_DIM)[:, None] + d[None, :]
    a = tl.load(source, mask=ok, other=0).to(tl.float32)            # (BLOCK_H, HALF)
    b = tl.load(source + HEAD_DIM // 2, mask=ok, other=0).to(tl.float32)
    if cosine is not None:
        c, s = angles(cosine, sine, row, period, d, d_ok, HEAD_DIM)
        a, b = a * c[None, :] - b * s[None, :], b * c[None, :] + a * s[None, :]
    to_query = query + (row * KV_HEADS * GROUP + kv_head * GROUP + i) * HEAD_DIM
    to_key = key + (row * KV_HEADS + kv_head) * HEAD_DIM
    to = tl.where(i < GROUP, to_query, to_key)[:, None] + d[None, :]
    tl.store(to, a.to(query.dtype.element_ty), mask=ok)
    tl.store(to + HEAD_DIM // 2, b.to(query.dtype.element_ty), mask=ok)


@triton.jit
def store_turned_back(out, a, b, c, s, ok, HALF_DIM: tl.constexpr):
    tl.store(out, (a * c + b * s).to(out.dtype.element_ty), mask=ok)
    tl.store(out + HALF_DIM, (b * c - a * s).to(out.dtype.element_ty), mask=ok)


@triton.jit(do_not_specialize=["tokens", "period"])
def turn_back_kernel(
    dq, dk, dv, cosine, sine, out, tokens, period, out_stride,
    dq_batch, dq_head, dq_token, dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    # part 0 is the key's gradient, 1 the value's, 2 and more are the queries'.
    row, kv_head, part = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    batch, token = row // tokens, row % tokens
    HALF_DIM: tl.constexpr = HEAD_DIM // 2
    d = tl.arange(0, HALF)
    d_ok = d < HALF_DIM
    if cosine is not None:
        c, s = angles(cosine, sine, row, period, d, d_ok, HEAD_DIM)
    else:
        c, s = tl.full((HALF,), 1.0, tl.float32), tl.zeros((HALF,), tl.float32)
    out += row * out_stride + kv_head * (GROUP + 2) * HEAD_DIM      # this key head's queries, then its key, then its value
    first = kv_head * GROUP
    if part >= 2:
        i = (part - 2) * BLOCK_H + tl.arange(0, BLOCK_H)            # queries of the group
        ok = (i < GROUP)[:, None] & d_ok[None, :]
        source = dq + batch * dq_batch + token * dq_token + ((first + i) * dq_head)[:, None] + d[None, :]
        a = tl.load(source, mask=ok, other=0).to(tl.float32)
        b = tl.load(source + HALF_DIM, mask=ok, other=0).to(tl.float32)
        store_turned_back(out + (i * HEAD_DIM)[:, None] + d[None, :], a, b, c[None, :], s[None, :], ok, HALF_DIM)
    else:
        # A sum over the group. The value has not been turned.
        if part == 0:
            summed = dk + batch * dk_batch + token * dk_token
            head_stride = dk_head
        else:
            summed = dv + batch * dv_batch + token * dv_token
            head_stride = dv_head
        sum_a = tl.zeros((HALF,), tl.float32)
        sum_b = tl.zeros((HALF,), tl.float32)
        for start in range(0, GROUP, BLOCK_H):
            i = start + tl.arange(0, BLOCK_H)
            ok = (i < GROUP)[:, None] & d_ok[None, :]
            at = summed + ((first + i) * head_stride)[:, None] + d[None, :]
            sum_a += tl.sum(tl.load(at, mask=ok, other=0).to(tl.float32), 0)
            sum_b += tl.sum(tl.load(at + HALF_DIM, mask=ok, other=0).to(tl.float32), 0)
        c = tl.where(part == 0, c, 1.0)
        s = tl.where(part == 0, s, 0.0)
        store_turned_back(out + (GROUP + part) * HEAD_DIM + d, sum_a, sum_b, c, s, d_ok, HALF_DIM)


def tables(rotary: tuple[Tensor, Tensor] | None) -> tuple[Tensor | None, Tensor | None, int]:
    """Cosine and sine with contiguous rows, and how many rows they have."""
    if rotary is None:
        return None, None, 1
    cosine, sine = (table.contiguous() for table in rotary)
    return cosine, sine, cosine.shape[0] * cosine.shape[1]


def turn(qkv: Tensor, rotary: tuple[Tensor, Tensor] | None, kv_heads: int, head_dim: int) -> tuple[Tensor, Tensor]:
    """Queries (M, heads, head_dim) and keys (M, kv_heads, head_dim), turned by their positions, from qkv (M, rows of query_key_value).

    M is batch * tokens; the columns of qkv may be some of a wider matrix. rotary is cosine and sine, each (batch or 1, tokens, head_dim);
    None copies.
    """
    m, group = len(qkv), qkv.shape[1] // head_dim // kv_heads - 2
    assert qkv.stride(1) == 1 and head_dim % 2 == 0
    query, key = qkv.new_empty(m, kv_heads * group, head_dim), qkv.new_empty(m, kv_heads, head_dim)
    cosine, sine, period = tables(rotary)
    assert m % period == 0
    if m:
        with torch.cuda.device_of(qkv):
            turn_kernel[m, triton.cdiv(kv_heads * (group + 1), BLOCK_H)](
                qkv, cosine, sine, query, key, qkv.stride(0), period,
                KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, HALF=triton.next_power_of_2(head_dim // 2), BLOCK_H=BLOCK_H,
                num_warps=4,
            )  # fmt: skip
    return query, key


def turn_back(dq: Tensor, dk: Tensor, dv: Tensor, rotary: tuple[Tensor, Tensor] | None, kv_heads: int, out: Tensor) -> None:
    """The gradient of qkv into out (M, rows of query_key_value), from those of what attention read: all (batch, heads, tokens, head_dim).

    Keys and values were read once for every query head; their gradients are summed over the heads that share one.
    """
    batch, heads, tokens, head_dim = dq.shape
    group = heads // kv_heads
    dq, dk, dv = (grad if grad.stride(3) == 1 else grad.contiguous() for grad in (dq, dk, dv))
    assert dk.shape == dv.shape == dq.shape and out.shape == (batch * tokens, kv_heads * (group + 2) * head_dim) and out.stride(1) == 1
    cosine, sine, period = tables(rotary)
    if len(out):
        with torch.cuda.device_of(dq):
            # Many heads in few warps: each thread then has many loads on their way (0.14 ms for Falcon-7B's 8192 tokens on an H100; 32
            # heads in 4 warps took 0.26).
            block_h = min(128, triton.next_power_of_2(group))
            turn_back_kernel[len(out), kv_heads, 2 + triton.cdiv(group, block_h)](
                dq, dk, dv, cosine, sine, out, tokens, period, out.stride(0), *dq.stride()[:3], *dk.stride()[:3], *dv.stride()[:3],
                GROUP=group, HEAD_DIM=head_dim, HALF=triton.next_power_of_2(head_dim // 2), BLOCK_H=block_h, num_warps=2,
            )  # fmt: skip
