"""x · W^T for 9 to 128 rows, on Hopper's own tensor core instruction. In Gluon.

With more rows the product itself begins to cost, and x no longer passes by unnoticed: every program reads all of it. So a tile has 128
rows of W (64 for 33 to 64 rows of x), and what Hopper brings for such work does the carrying.

**wgmma** multiplies 64 rows of W by up to 256 rows of x over 16 columns, in a *warpgroup* of four warps. W comes from registers, which is
what decoding needs; x comes straight from shared memory, and no lane ever holds it.

**The copy engine** (TMA) brings tiles of x and of packed W to shared memory by itself: one lane asks, and a barrier in shared memory
counts the bytes as they land. STAGES pairs of blocks are on their way at any time, and no register waits for them. It also fills in
zeros beyond the edges of x and W, so that no edge needs a mask here.

**Which lane needs which byte.** x lies in shared memory in its natural order, so W has to come in that order too: lane t of a quad holds,
of each word of four bytes, byte t.

    column 8 w + 2 t + i  =  byte t of word w of a block's row,  i = 0 for its high half and 1 for its low one

All four lanes of a quad read the same words, and each takes its own byte out: the multiplier of `dp4a` that picks a byte is then not
a constant but another one in each lane. It costs nothing.

**The absmax** comes after the product as in few_rows_mma.py: one (block, row) a lane, two exchanges, a multiplication in float32.

**The ladder**, us a call for 64 rows, one H100 in a CUDA graph over rotating weights: up, down, qkv. cuBLAS, with a weight of 16 bits,
takes 63.4, 66.1 and 18.2.

                                                              up     down    qkv
    few_rows_mma.py: x from the cache to all warps           134    147      30.6
    wgmma; x through registers, in the order of W's bytes     70.0   80.3    22.7   every step waits for its own loads
      two steps unrolled, at most 128 registers               66.8   75.7    24.1   still a fence a step, which waits for loads too
    the copy engine; W's bytes in the order of x              62.0   59.0    20.6   128 rows of W a tile, 142 registers
      two products in flight                                  60.8   58.5    21.0   not kept: 174 registers
    at most 128 registers                                     50.0   52.5    17.9   two programs a multiprocessor, not one
      without the early start (few_rows.after_previous)       51.5   53.4    19.2
    64 rows of W a tile, no limit                             48.2   43.7    17.1

In the same way 36.7, 37.8, 13.8 for 32 rows; 34.0, 36.5, 13.1 for 16; 89.2, 80.2, 29.4 for 128, where cuBLAS needs 65.1, 71.7, 18.7.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma, warpgroup_mma, warpgroup_mma_wait
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from minqlora.kernels.few_rows import after_previous, overlaps, processors, sum_splits
from minqlora.kernels.few_rows_mma import doublings
from minqlora.kernels.pair_table import LOOKUP_ONE, make_table_gluon, repeat

# Triton 3.6 has the copy under its first name.
async_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

# Layouts as in few_rows_mma.py: bases of the registers, of the lanes (t, then g), of the warps.


@gluon.constexpr_function
def bytes_layout(rows):
    """[row of W, word of a block, byte of the word, column of the byte]"""
    registers = [[0, 0, 0, 1], *doublings(1, 8, 1, 4), [8, 0, 0, 0]]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [1, 0, 0, 0], [2, 0, 0, 0], [4, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, doublings(16, rows, 0, 4), [], [rows, 8, 4, 2])


@gluon.constexpr_function
def words_layout(rows):
    """[row of W, the 16 words of two blocks]; the lanes of a quad hold the same."""
    registers = [*doublings(1, 16, 1, 2), [8, 0]]
    lanes = [[0, 0], [0, 0], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(registers, lanes, doublings(16, rows, 0, 2), [], [rows, 16])


@gluon.constexpr_function
def size_layout(rows, spread):
    """[two blocks, row of W]: the absmaxes of a quad, spread over its four lanes, over two, or all in each."""
    registers, lanes = {4: ([], [[1, 0], [0, 8]]), 2: ([[1, 0]], [[0, 0], [0, 8]]), 1: ([[1, 0], [0, 8]], [[0, 0], [0, 0]])}[spread]
    return gl.DistributedLinearLayout(registers, [*lanes, [0, 1], [0, 2], [0, 4]], doublings(16, rows, 1, 2), [], [2, rows])


@gluon.jit
def decode(words, select, table, BYTES: gl.constexpr, A: gl.constexpr, dtype: gl.constexpr):
    """[row, 8 words] -> [row, 64 columns] as the instruction's operand: from each word the byte that `select` names."""
    words = gl.convert_layout(words, gl.SliceLayout(2, gl.SliceLayout(3, BYTES)), assert_trivial=True)
    words = gl.expand_dims(gl.expand_dims(words, 2), 3)
    types: gl.constexpr = repeat(dtype, 1)
    pair = gl.inline_asm_elementwise(LOOKUP_ONE, "=r,r,r,r,r,r,r", [words, select, table], dtype=types, is_pure=True, pack=2)
    return gl.convert_layout(gl.reshape(pair[0], (words.shape[0], 64)), A, assert_trivial=True)


@gluon.jit
def load_sizes(absmax, absmax2, index, last, BLOCKSIZE2: gl.constexpr):
    """Absmaxes as they are stored, and the scales of what is stored."""
    index = gl.minimum(index, last)
    stored = gl.load(absmax + index)
    if absmax2 is None:
        scale = stored
    else:
        stored = stored.to(gl.int32)
        scale = gl.load(absmax2 + index // BLOCKSIZE2)
    return stored, scale


@gluon.jit
def fetch(x_tiles, w_tiles, block, m0, n0, ready, to_x0, to_x1, to_w, wanted, BYTES: gl.constexpr):
    """Ask the copy engine for two blocks of W and of x; `ready` counts the bytes."""
    mbarrier.expect(ready, BYTES, pred=wanted)
    async_load(w_tiles, [n0, block * 8], ready, to_w, pred=wanted)
    async_load(x_tiles, [m0, block * 64], ready, to_x0, pred=wanted)
    async_load(x_tiles, [m0, block * 64 + 64], ready, to_x1, pred=wanted)


@gluon.jit
def add_product(acc, words, x_tile, size, select, table, zero, BYTES: gl.constexpr, A: gl.constexpr, S: gl.constexpr):
    """acc[n, m] += size[n] * sum over a block's columns of code[W[n, k]] x[m, k]"""
    weight = decode(words, select, table, BYTES, A, x_tile.dtype)
    part = warpgroup_mma(weight, x_tile.permute((1, 0)), zero, use_acc=False, is_async=True)
    part, weight = warpgroup_mma_wait(0, deps=(part, weight))
    part, size = gl.broadcast(part, gl.expand_dims(gl.convert_layout(size, S, assert_trivial=True), 1))
    return gl.fma(part, size, acc)


@gluon.jit
def add_lora(acc, zero, lora_xa, lora_B, scale, n0, m0, rows, out_features, rank, A: gl.constexpr, dtype: gl.constexpr):
    """acc + scale * lora_xa lora_B^T, 64 ranks at a time. Rows of lora_B are a weight that needs no decoding."""
    M: gl.constexpr = zero.shape[1]
    X: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    tile = gl.allocate_shared_memory(dtype, [M, 64], gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2))
    for start in range(0, rank, 64):
        m = m0 + gl.expand_dims(gl.arange(0, M, gl.SliceLayout(1, X)), 1)
        r = start + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, X)), 0)
        xa = gl.load(lora_xa + m * rank + r, mask=(m < rows) & (r < rank), other=0.0)
        tile.store(xa.to(dtype))
        fence_async_shared()                                        # what lanes wrote, the tensor cores read next
        tl.debug_barrier()
        n = n0 + gl.expand_dims(gl.arange(0, zero.shape[0], gl.SliceLayout(1, A)), 1)
        r_ = start + gl.expand_dims(gl.arange(0, 64, gl.SliceLayout(0, A)), 0)
        weight = gl.load(lora_B + n.to(gl.int64) * rank + r_, mask=(n < out_features) & (r_ < rank), other=0.0).to(dtype)
        acc += scale * warpgroup_mma(weight, tile.permute((1, 0)), zero, use_acc=False)
        tl.debug_barrier()
    return acc


@gluon.jit(do_not_specialize=["rows", "length", "rank"])
def product_kernel(
    x_tiles, w_tiles, absmax, code, absmax2, offset_at, code2, bias, lora_xa, lora_B, scale, out,
    rows, out_features, n_sizes, rank, length,
    IN: gl.constexpr, BLOCKSIZE: gl.constexpr, BLOCKSIZE2: gl.constexpr,
    ROWS: gl.constexpr, M: gl.constexpr, STAGES: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """out[split, m, n] for ROWS rows of W, `length` blocks of their columns, and M rows of x. Warps: ROWS / 16."""
    if OVERLAP:
        after_previous()
    WARPS: gl.constexpr = ROWS // 16
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[WARPS, 1], instr_shape=[16, M, 16])
    A: gl.constexpr = gl.DotOperandLayout(0, mma, 2)
    S: gl.constexpr = gl.SliceLayout(1, mma)
    BYTES: gl.constexpr = bytes_layout(ROWS)
    QUAD: gl.constexpr = size_layout(ROWS, 4)
    dtype: gl.constexpr = x_tiles.dtype
    PER: gl.constexpr = BLOCKSIZE // 64                             # blocks of 64 columns that share an absmax
    A_STAGE: gl.constexpr = ROWS * 64 + 2 * M * 128                 # bytes that land for a pair of blocks

    # Place for STAGES pairs of blocks, and a barrier for each that opens when they have landed.
    x_at = gl.allocate_shared_memory(dtype, [2 * STAGES, M, 64], x_tiles.layout)
    w_at = gl.allocate_shared_memory(gl.int32, [STAGES, ROWS, 16], w_tiles.layout)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(STAGES):
        mbarrier.init(ready.index(i), count=1)
    tl.debug_barrier()
    n0, m0 = gl.program_id(0) * ROWS, gl.program_id(2) * M
    begin = gl.program_id(1) * length
    blocks = gl.minimum(length, IN // 64 - begin)
    steps = (blocks + 1) // 2
    for i in gl.static_range(STAGES):
        fetch(
            x_tiles, w_tiles, begin + 2 * i, m0, n0, ready.index(i), x_at.index(2 * i), x_at.index(2 * i + 1), w_at.index(i),
            i < steps, A_STAGE,
        )  # fmt: skip

    # For each byte that a lane looks up: its copy of the table, and the multiplier that takes byte t out of a word.
    table = gl.full([ROWS, 8, 4, 2], make_table_gluon(code, dtype, WARPS), gl.int32, BYTES)
    t = gl.arange(0, 4, gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, BYTES))))
    t = gl.expand_dims(gl.expand_dims(gl.expand_dims(t, 0), 1), 3)
    select = (128 << (8 * t)) + gl.zeros([ROWS, 8, 4, 2], gl.int32, BYTES)

    row = n0 + gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(0, QUAD)), 0)
    pair = gl.expand_dims(gl.arange(0, 2, gl.SliceLayout(1, QUAD)), 1)
    block = row.to(gl.int64) * (IN // 64) + begin + pair
    offset = 0.0 if absmax2 is None else gl.load(offset_at)
    stored, scales = load_sizes(absmax, absmax2, block // PER, n_sizes - 1, BLOCKSIZE2)
    acc = gl.zeros([ROWS, M], gl.float32, mma)
    zero = gl.zeros([ROWS, M], gl.float32, mma)
    for i in range(steps):
        next_stored, next_scales = load_sizes(absmax, absmax2, (block + 2 * i + 2) // PER, n_sizes - 1, BLOCKSIZE2)
        size = stored if absmax2 is None else gl.fma(gl.load(code2 + stored), scales, offset)
        size = gl.where(2 * i + pair < blocks, size, 0.0)           # an odd number of blocks: the last pair has one
        size = gl.convert_layout(gl.convert_layout(size, size_layout(ROWS, 2)), size_layout(ROWS, 1))
        size0, size1 = gl.split(gl.permute(size, (1, 0)))           # [row] of the first block, of the second
        slot = i % STAGES
        mbarrier.wait(ready.index(slot), i // STAGES % 2)
        words = gl.reshape(w_at.index(slot).load(words_layout(ROWS)), (ROWS, 2, 8))
        words0, words1 = gl.split(gl.permute(words, (0, 2, 1)))
        acc = add_product(acc, words0, x_at.index(2 * slot), size0, select, table, zero, BYTES, A, S)
        acc = add_product(acc, words1, x_at.index(2 * slot + 1), size1, select, table, zero, BYTES, A, S)
        tl.debug_barrier()                                         # everyone is done with the slot: it can be filled again
        fetch(
            x_tiles, w_tiles, begin + 2 * (i + STAGES), m0, n0, ready.index(slot), x_at.index(2 * slot), x_at.index(2 * slot + 1),
            w_at.index(slot), i + STAGES < steps, A_STAGE,
        )  # fmt: skip
        stored, scales = next_stored, next_scales

    n = n0 + gl.expand_dims(gl.arange(0, ROWS, S), 1)
    m = m0 + gl.expand_dims(gl.arange(0, M, gl.SliceLayout(0, mma)), 0)
    if lora_xa is not None:  # noqa: SIM102, decided when compiling
        if gl.program_id(1) == 0:
            acc = add_lora(acc, zero, lora_xa, lora_B, scale, n0, m0, rows, out_features, rank, A, dtype)
    if bias is not None:  # noqa: SIM102, decided when compiling
        if gl.program_id(1) == 0:
            acc += gl.load(bias + n, mask=n < out_features, other=0.0).to(gl.float32)
    place = (gl.program_id(1) * rows + m).to(gl.int64) * out_features + n
    gl.store(out + place, acc.to(out.dtype.element_ty), mask=(m < rows) & (n < out_features))


# Tiles for the copy engine. 64 columns of 16 bits are the 128 bytes that the tensor cores' swizzle is made for.
X_TILES = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
W_TILES = gl.NVMMASharedLayout(swizzle_byte_width=64, element_bitwidth=32, rank=2)

# Rows of x in a tile: rows of W in it, pairs of blocks on their way, and the fewest pairs that are worth a program of their own.
# Triton counts more than 48 KiB of shared memory for each of these, and so asks for as much as there is; the pair table's 32, which it does
# not count, fit beside it. Between 16 and 48 it would not ask, and the launch would fail.
TILES = {16: (128, 4, 4), 32: (128, 3, 4), 64: (64, 3, 16), 128: (128, 3, 4)}


def product(x: Tensor, packed, absmax, code, out_features: int, blocksize: int, nested, bias, lora_xa, lora_B, scale):
    """x (rows, in_features) · dequant(W)^T + bias + scale lora_xa lora_B^T, as (rows, out_features)."""
    rows, in_features = x.shape
    absmax2, offset, code2, blocksize2 = nested or (None, None, None, 1)
    m = min(128, max(16, triton.next_power_of_2(rows)))
    w_rows, stages, least = TILES[m]
    tiles = triton.cdiv(out_features, w_rows) * triton.cdiv(rows, m)
    pairs = triton.cdiv(in_features // 64, 2)
    # Some four programs a multiprocessor, as far as there are columns to share.
    splits = max(1, min(8, round(4.3 * processors(x.device) / tiles), pairs // least))
    length = 2 * triton.cdiv(pairs, splits)
    splits = triton.cdiv(in_features // 64, length)
    out = torch.empty(splits, rows, out_features, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    x_tiles = TensorDescriptor.from_tensor(x, [m, 64], X_TILES)
    words = packed.view(out_features, in_features // 2).view(torch.int32)
    w_tiles = TensorDescriptor.from_tensor(words, [w_rows, 16], W_TILES)
    overlap = overlaps(x)
    product_kernel[(triton.cdiv(out_features, w_rows), splits, triton.cdiv(rows, m))](
        x_tiles, w_tiles, absmax, code, absmax2, offset, code2, bias, lora_xa, lora_B, scale, out,
        rows, out_features, absmax.numel(), 0 if lora_B is None else lora_B.shape[1], length,
        IN=in_features, BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2,
        ROWS=w_rows, M=m, STAGES=stages, OVERLAP=overlap, num_warps=w_rows // 16, launch_pdl=overlap,
    )  # fmt: skip
    return sum_splits(out, x.dtype, overlap)
