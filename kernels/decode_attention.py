"""Attention of one new token a row over its cache: rotary positions, the write into the cache and the weighted mean, in two launches.

    q, k, v = rotated parts of qkv                        k and v go into slot `filled` of the cache
    mixed   = softmax(q K^T / sqrt(head_dim) + bias) V    over the slots 0 .. filled that hold a token

The definition is `FalconAttention.mix` with a cache. It masks what is not filled, but reads it: a cache allocated for 2048 tokens costs
2048 tokens a step from the first one on. Here `filled` is read on the device, and a program whose slots are all free returns at once: a
step recorded once as a CUDA graph costs what its cache holds at the time.

**Many programs for one token.** With one key head for all of a row's queries there is little to do and nobody to do it: at batch 1 a
single program would walk along the whole cache. So the slots are cut into stretches, each program makes a softmax of its own stretch,

    peak_s = max over its scores      total_s = sum exp(score - peak_s)      acc_s = sum exp(score - peak_s) v

and a second kernel brings them to one peak and adds them, in a fixed order: exp(peak_s - peak) is what each stretch weighs. For a large
batch the rows are programs enough and the stretches are long, since what each leaves for the second kernel, a float32 head for every query,
is as large as `group` slots of the cache: 71 for Falcon-7B.

**All the queries of a key head together.** They are the rows of one matrix product, which reads each key once: 71 for Falcon-7B, padded
to 128. A head is kept as its two halves, because a rotation turns value i of the first half with value i of the second; a score is
then the sum of two products, and nothing is ever shuffled.

**The new token** is not read back from the cache, where another program may still be writing it: every program puts it at its place
among the keys it has loaded, and only the one whose stretch it lies in stores it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from minqlora.kernels.few_rows import after_previous, overlaps


@triton.jit
def load_rotated(head, c, s, d, inside, HALF: tl.constexpr):
    """The two halves of heads that start at `head`, turned by the angle whose cosine and sine are c and s."""
    a = tl.load(head + d, mask=inside, other=0).to(tl.float32)
    b = tl.load(head + HALF + d, mask=inside, other=0).to(tl.float32)
    return a * c - b * s, b * c + a * s


@triton.jit
def stretch_kernel(
    qkv, keys, values, positions, filled, cosine, sine, bias, acc_out, peak_out, total_out,
    length, bias_length, slots_a_split, splits, scale,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    TILES: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_L: tl.constexpr, PADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        after_previous()
    row = tl.program_id(0).to(tl.int64)
    kv_head, tile, split = tl.program_id(1) // TILES, tl.program_id(1) % TILES, tl.program_id(2)
    new = tl.load(filled).to(tl.int32)                              # the slot of the new token: those before it are taken
    first = split * slots_a_split
    if first > new:
        return
    HALF: tl.constexpr = HEAD_DIM // 2
    dtype = keys.dtype.element_ty
    h = tile * BLOCK_H + tl.arange(0, BLOCK_H)                      # (BLOCK_H,) queries of this key head
    d = tl.arange(0, PADDED // 2)                                   # (PADDED / 2,) one half of a head
    e = tl.arange(0, PADDED)                                        # (PADDED,) all of it
    d_ok, e_ok, h_ok = d < HALF, e < HEAD_DIM, h < GROUP

    # qkv of this key head: its queries, then its key, then its value.
    group = qkv + (row * KV_HEADS + kv_head) * (GROUP + 2) * HEAD_DIM
    position = tl.load(positions + row * length + new)
    if cosine is not None:
        c = tl.load(cosine + position * HALF + d, mask=d_ok, other=0).to(tl.float32)
        s = tl.load(sine + position * HALF + d, mask=d_ok, other=0).to(tl.float32)
    else:
        c, s = tl.full((PADDED // 2,), 1.0, tl.float32), tl.zeros((PADDED // 2,), tl.float32)
    q_at = group + h[:, None] * HEAD_DIM
    q_a, q_b = load_rotated(q_at, c[None, :], s[None, :], d[None, :], h_ok[:, None] & d_ok[None, :], HALF)   # (BLOCK_H, PADDED / 2) each
    q_a, q_b = q_a.to(dtype), q_b.to(dtype)
    k_a, k_b = load_rotated(group + GROUP * HEAD_DIM, c, s, d, d_ok, HALF)                                   # (PADDED / 2,) each
    k_a, k_b = k_a.to(dtype), k_b.to(dtype)
    v = tl.load(group + (GROUP + 1) * HEAD_DIM + e, mask=e_ok, other=0)                                      # (PADDED,)

    cache = (row * KV_HEADS + kv_head) * length * HEAD_DIM          # 64 bits, as row is
    keys, values = keys + cache, values + cache
    if (tile == 0) & (new < first + slots_a_split):
        tl.store(keys + new * HEAD_DIM + d, k_a, mask=d_ok)
        tl.store(keys + new * HEAD_DIM + HALF + d, k_b, mask=d_ok)
        tl.store(values + new * HEAD_DIM + e, v, mask=e_ok)

    peak = tl.full((BLOCK_H,), float("-inf"), tl.float32)
    total = tl.zeros((BLOCK_H,), tl.float32)
    acc = tl.zeros((BLOCK_H, PADDED), tl.float32)
    for start in range(first, tl.minimum(first + slots_a_split, new + 1), BLOCK_L):
        slot = start + tl.arange(0, BLOCK_L)                        # (BLOCK_L,)
        is_new = (slot == new)[:, None]
        old = (slot < new)[:, None]
        at = slot[:, None] * HEAD_DIM
        key_a = tl.load(keys + at + d[None, :], mask=old & d_ok[None, :], other=0)           # (BLOCK_L, PADDED / 2)
        key_b = tl.load(keys + at + HALF + d[None, :], mask=old & d_ok[None, :], other=0)
        value = tl.load(values + at + e[None, :], mask=old & e_ok[None, :], other=0)         # (BLOCK_L, PADDED)
        key_a, key_b = tl.where(is_new, k_a[None, :], key_a), tl.where(is_new, k_b[None, :], key_b)
        value = tl.where(is_new, v[None, :], value)
        # -1 where a slot holds padding
        stands = tl.load(positions + row * length + slot, mask=slot <= new, other=-1)        # (BLOCK_L,)
        seen = (stands >= 0)[None, :]
        score = tl.dot(q_a, tl.trans(key_a), input_precision="ieee")                         # (BLOCK_H, BLOCK_L)
        score = tl.dot(q_b, tl.trans(key_b), score, input_precision="ieee") * scale
        if bias is not None:
            bias_at = bias + (kv_head * GROUP + h)[:, None] * bias_length + stands[None, :]
            score += tl.load(bias_at, mask=h_ok[:, None] & seen, other=0).to(tl.float32)
        score = tl.where(seen, score, float("-inf"))
        higher = tl.maximum(peak, tl.max(score, axis=1))
        # Where nothing was seen yet the peak is -inf, and -inf - -inf would be NaN.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        weight = tl.exp(score - level[:, None])                     # (BLOCK_H, BLOCK_L)
        shrink = tl.exp(peak - level)
        total = total * shrink + tl.sum(weight, axis=1)
        acc = tl.dot(weight.to(dtype), value, acc * shrink[:, None], input_precision="ieee")
        peak = higher

    place = ((row * KV_HEADS + kv_head) * GROUP + h) * splits + split                        # (BLOCK_H,)
    tl.store(peak_out + place, peak, mask=h_ok)
    tl.store(total_out + place, total, mask=h_ok)
    tl.store(acc_out + place[:, None] * HEAD_DIM + e[None, :], acc, mask=h_ok[:, None] & e_ok[None, :])


@triton.jit
def combine_kernel(
    acc, peak, total, filled, out, slots_a_split, splits,
    HEAD_DIM: tl.constexpr, SPLITS: tl.constexpr, PADDED: tl.constexpr, OVERLAP: tl.constexpr,
):  # fmt: skip
    if OVERLAP:
        after_previous()
    head = tl.program_id(0).to(tl.int64)                            # of all heads of all rows
    e, split = tl.arange(0, PADDED), tl.arange(0, SPLITS)
    written = split < tl.load(filled).to(tl.int32) // slots_a_split + 1
    peaks = tl.load(peak + head * splits + split, mask=written, other=float("-inf"))
    weight = tl.exp(peaks - tl.max(peaks, axis=0))                  # (SPLITS,); the new token is seen, so one peak is finite
    whole = tl.sum(weight * tl.load(total + head * splits + split, mask=written, other=0.0), axis=0)
    at = (head * splits + split)[:, None] * HEAD_DIM + e[None, :]
    parts = tl.load(acc + at, mask=written[:, None] & (e < HEAD_DIM)[None, :], other=0.0)    # (SPLITS, PADDED)
    mixed = tl.sum(parts * weight[:, None], axis=0) / whole
    tl.store(out + head * HEAD_DIM + e, mixed.to(out.dtype.element_ty), mask=e < HEAD_DIM)


def decode_attention(
    qkv: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    filled: Tensor,
    rotary: tuple[Tensor, Tensor] | None,
    bias: Tensor | None,
    slots_a_split: int | None = None,
) -> Tensor:
    """qkv (batch, kv_heads * (group + 2) * head_dim) of one new token a row -> mixed (batch, kv_heads * group * head_dim).

    keys and values (batch, kv_heads, length, head_dim) take the new token in slot `filled`, () on the device, which stays as it is.
    positions (batch, length), int32: which position a slot's token has, -1 for padding; that of the new token is there already.
    rotary: cosine and sine (positions, head_dim / 2). bias: ALiBi's, (heads, positions), added to the scaled scores. That filled < length
    is the caller's to see to: it is read on the device.
    """
    batch, kv_heads, length, head_dim = keys.shape
    group = qkv.shape[1] // (kv_heads * head_dim) - 2
    tables = (*(rotary or ()), *(() if bias is None else (bias,)))
    assert all(t.is_contiguous() for t in (qkv, keys, values, positions, *tables)) and head_dim % 2 == 0
    block_h, block_l = min(128, max(16, triton.next_power_of_2(group))), 64
    tiles = triton.cdiv(group, block_h)
    slots_a_split = stretch(batch * kv_heads * tiles, length) if slots_a_split is None else slots_a_split
    assert slots_a_split % block_l == 0
    splits, padded = triton.cdiv(length, slots_a_split), max(32, triton.next_power_of_2(head_dim))
    heads = batch * kv_heads * group
    acc = torch.empty(heads, splits, head_dim, dtype=torch.float32, device=qkv.device)
    peak, total = (torch.empty(heads, splits, dtype=torch.float32, device=qkv.device) for _ in range(2))
    out = torch.empty(batch, kv_heads * group * head_dim, dtype=qkv.dtype, device=qkv.device)
    cosine, sine = rotary or (None, None)
    overlap = overlaps(qkv)
    with torch.cuda.device_of(qkv):
        stretch_kernel[batch, kv_heads * tiles, splits](
            qkv, keys, values, positions, filled, cosine, sine, bias, acc, peak, total,
            length, 0 if bias is None else bias.shape[1], slots_a_split, splits, head_dim**-0.5,
            KV_HEADS=kv_heads, GROUP=group, HEAD_DIM=head_dim, TILES=tiles, BLOCK_H=block_h, BLOCK_L=block_l, PADDED=padded,
            OVERLAP=overlap, num_warps=8 if block_h > 64 else 4, num_stages=2, launch_pdl=overlap,
        )  # fmt: skip
        combine_kernel[heads,](
            acc, peak, total, filled, out, slots_a_split, splits,
            HEAD_DIM=head_dim, SPLITS=triton.next_power_of_2(splits), PADDED=padded,
            OVERLAP=overlap, num_warps=2, launch_pdl=overlap,
        )  # fmt: skip
    return out


def stretch(programs: int, length: int) -> int:
    """Slots for one program: so many that all programs together are some 264, two for each multiprocessor of an H100; at least 128."""
    return max(128, triton.cdiv(triton.cdiv(length * programs, 264), 64) * 64)
