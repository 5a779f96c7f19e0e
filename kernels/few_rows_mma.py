"""x · W^T for one to eight rows, where every lane of a warp knows what it holds. In Gluon, Triton's explicit-layout language.

`few_rows.py` says *what* a program computes and leaves it to Triton which lane holds which value. At few rows most of its
instructions then move values between lanes. Here the layouts are written down, and nothing moves: a lane's packed bytes *are* the
register that its tensor core instruction reads.

**The instruction** m16n8k16 multiplies 16 rows of W by 8 rows of x over 16 columns, in one warp. Of W, lane 4g + t holds rows g and
g + 8, and in each of them two pairs of neighbouring columns: four registers of two values. Of x it holds the same columns of row g.
Four such instructions make a block of 64 columns.

**Which columns they are does not matter**, as long as W and x agree: a sum does not care about its order. So lane t takes the columns
16 t ... 16 t + 15 of a block. In the packed weight these are 8 bytes side by side: one load. In x they are 32 bytes side by side:
two loads. And a byte holds two neighbouring columns: one look-up in the pair table gives one register, ready to multiply.

    byte 2 j + h of lane t  =  columns 16 t + 4 j + 2 h + (0, 1)  =  pair h of the lane in instruction j of four

**The absmax** is multiplied after the product, in float32. A lane needs it for 2 rows of each block, and the lanes 4g to 4g + 3, a *quad*,
need the same ones: each lane loads and decodes one (block, row), and three shuffles spread them.

**The work is split along k twice**: the warps of a program take turns block by block, and add up at the end through shared memory; and
if W has few rows and long ones, two programs share them (`splits`), and `sum_kernel` adds theirs. Both in a fixed order.

**No masks on W.** The last blocks of a row rarely fill a step: the last step reaches back over blocks that are done, with absmax zero. The
last rows of W rarely fill a tile: the last tile reaches back over rows that another program computes too, and both store
the same values. (An infinity in the last columns of x becomes NaN by this: it is multiplied by zero.)

So it needs whole blocks in a row (in_features and blocksize multiples of 64) and eight of them, 16 rows of W, 16 bits a value, 16-byte
addresses, and a Hopper GPU, for which it was measured. Everything else takes another path; `matmul_4bit.py` has the rule.

**The ladder**, us a call for one row, one H100 in a CUDA graph over rotating weights: up (18176 x 4544), down (4544 x 18176), qkv
(4672 x 4544). bitsandbytes takes 42.9, 41.5 and 14.2; cuBLAS, with a weight of 16 bits, 60, 63 and 18.

                                                              up     down    qkv
    few_rows.py, with a gather                               202             43
    this layout; 8 warps a program, 16 blocks a step          33.2   33.1    12.9   2.1 instructions a weight
      every lane decodes all the absmaxes it needs            36.9   35.2    14.4   2.6; not kept
      a persistent grid, two programs a multiprocessor        35.0   36.8    14.2   not kept
    4 warps a program, 8 blocks a step                        24.8   28.9     9.7   more programs to switch between
      a step's loads held back until the one before is used   26.6   32.9    10.6   not kept: fewer loads in flight
    start before the kernel before has ended                  24.2   42.7    12.6   the next one takes the first places that are
                                                                                    free, so its few programs were unevenly spread
    two programs share a tile, and start early                       25.7           kept where rows of W are long and few
    lanes without a row of x read nothing                     24.3   24.3     9.7   kept; an early start for many programs only
    first the weight, then the wait, then let the next start  23.9   24.9     9.0   kept, for any number of programs
      W in loads of 16 bytes, exchanged between lanes         25.0   24.4    13.0   not kept
      code2 in shared memory too                              23.4   25.3    12.5   not kept: a second table, for 3 %
    few_rows_wgmma.py at one row                              35.0   36.0    12.5   it wins from 9 rows on

Five programs of 4 warps fit on a multiprocessor with 96 registers a lane; with 100 it is four, and up took 26.5.

What limits it is neither DRAM (1.8 of 3.0 TB/s) nor the issue of instructions (a quarter of the slots) but, by count, the unit that
serves loads and shared memory: some 50 of its cycles for 16 x 64 weights. 16 of them are look-ups, 16 the packed bytes (a load
touches eight rows, and so eight lines of the cache), 8 are x, the rest absmaxes.
"""

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from minqlora.kernels.few_rows import after_previous, overlaps, processors, sum_splits
from minqlora.kernels.pair_table import LOOKUP_EIGHT, make_table_gluon, repeat

# A layout is a list of bases: basis i is what bit i of the register, lane or warp number adds to the position in the tensor. The lists
# below are ordered: registers, lanes (t in the two low bits, g in the three high ones), warps; [] is for several programs together.
# SliceLayout(axis, layout) is the layout without that axis. ROWS_OF_X is the instruction's eight.
ROWS_OF_X = 8


@gluon.constexpr_function
def doublings(start, stop, axis, rank):
    """Bases start, 2 start, 4 start, ... below stop, along one axis."""
    bases = []
    while start < stop:
        bases.append([start if i == axis else 0 for i in range(rank)])
        start *= 2
    return bases


@gluon.constexpr_function
def bytes_layout(blocks, rows, warps):
    """[block, row of W, 8 bytes of a lane, column of the pair]."""
    registers = [[0, 0, 0, 1], [0, 8, 0, 0], *doublings(16, rows, 1, 4), *doublings(warps, blocks, 0, 4)]
    lanes = [[0, 0, 1, 0], [0, 0, 2, 0], [0, 1, 0, 0], [0, 2, 0, 0], [0, 4, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, doublings(1, warps, 0, 4), [], [blocks, rows, 4, 2])


@gluon.constexpr_function
def x_layout(blocks, m, warps):
    """[block, column, row of x]: 16 columns a lane."""
    registers = [*doublings(1, 16, 1, 3), *doublings(8, m, 2, 3), *doublings(warps, blocks, 0, 3)]
    lanes = [[0, 16, 0], [0, 32, 0], [0, 0, 1], [0, 0, 2], [0, 0, 4]]
    return gl.DistributedLinearLayout(registers, lanes, doublings(1, warps, 0, 3), [], [blocks, 64, m])


@gluon.constexpr_function
def size_layout(blocks, rows, warps, spread):
    """[block, row of W]: the absmaxes of a quad, spread over its four lanes, or over two of them only."""
    bits = [*doublings(warps, blocks, 0, 2), [0, 8], *doublings(16, rows, 1, 2), [0, 0]]
    lanes, registers = (bits[:2], bits[2:]) if spread == 4 else ([[0, 0], bits[1]], [bits[0], *bits[2:]])
    registers = [basis for basis in registers if basis != [0, 0]]
    return gl.DistributedLinearLayout(registers, [*lanes, [0, 1], [0, 2], [0, 4]], doublings(1, warps, 0, 2), [], [blocks, rows])


@gluon.jit
def axes(n0: gl.constexpr, n1: gl.constexpr, n2: gl.constexpr, layout: gl.constexpr):
    """The three indices of a tensor of shape [n0, n1, n2] in a layout."""
    a = gl.expand_dims(gl.expand_dims(gl.arange(0, n0, gl.SliceLayout(1, gl.SliceLayout(2, layout))), 1), 2)
    b = gl.expand_dims(gl.expand_dims(gl.arange(0, n1, gl.SliceLayout(0, gl.SliceLayout(2, layout))), 0), 2)
    c = gl.expand_dims(gl.expand_dims(gl.arange(0, n2, gl.SliceLayout(0, gl.SliceLayout(1, layout))), 0), 1)
    return a, b, c


@gluon.jit
def decode(words, table, A: gl.constexpr, dtype: gl.constexpr):
    """[block, row, t] of 8 bytes -> [block, row, 64 columns] as the instruction's operand. No value changes its lane.

    DotOperandLayout(..., 8) says: of 64 columns lane t holds 8 t ... 8 t + 7 and 32 + 8 t ... 32 + 8 t + 7, and instruction j takes pair
    j of each half. So register h of instruction j is column 32 h + 8 t + 2 j + i. `assert_trivial`: it is an error if a value would
    change its lane.
    """
    types: gl.constexpr = repeat(dtype, 8)
    p = gl.inline_asm_elementwise(
        LOOKUP_EIGHT, "=r,=r,=r,=r,=r,=r,=r,=r,l,l,r,r", [gl.expand_dims(words, 3), table], dtype=types, is_pure=True, pack=2
    )
    # p[2 j + h] has the axes [block, row, t, i]. Each join adds an axis at the end: h, then the high bit of j, then its low bit.
    w = gl.join(gl.join(gl.join(p[0], p[1]), gl.join(p[4], p[5])), gl.join(gl.join(p[2], p[3]), gl.join(p[6], p[7])))
    w = gl.reshape(gl.permute(w, (0, 1, 4, 2, 5, 6, 3)), (words.shape[0], words.shape[1], 64))       # h, t, j, i: 64 columns
    return gl.convert_layout(w, A, assert_trivial=True)


@gluon.jit
def order_columns(xs, B: gl.constexpr):
    """The columns of x in the order of `decode`: 16 t + 4 j + 2 h + i goes to 32 h + 8 t + 2 j + i. No value changes its lane."""
    blocks: gl.constexpr = xs.shape[0]
    m: gl.constexpr = xs.shape[2]
    xs = gl.permute(gl.reshape(xs, (blocks, 4, 4, 2, 2, m)), (0, 3, 1, 2, 4, 5))
    return gl.convert_layout(gl.reshape(xs, (blocks, 64, m)), B, assert_trivial=True)


@gluon.jit
def load_step(start, end, words_at, sizes_at, absmax2, size, BLOCKS: gl.constexpr, PER: gl.constexpr, BLOCKSIZE2: gl.constexpr):
    """The packed bytes of the blocks start ... start + BLOCKS - 1, and their absmaxes as they are stored."""
    at = gl.minimum(start, end - BLOCKS)
    words = gl.load(words_at + at * 4)                              # 8 bytes each: a block of 64 columns has four
    index = (size + at) // PER
    stored = gl.load(sizes_at + index)
    if absmax2 is None:
        scale = stored
    else:
        stored = stored.to(gl.int32)
        scale = gl.load(absmax2 + index.to(gl.uint32) // BLOCKSIZE2)
    return words, stored, scale


@gluon.jit
def multiply_step(
    acc, start, end, step, x_at, x_ok, code2, offset, table, block, zero,
    A: gl.constexpr, B: gl.constexpr, HALF: gl.constexpr, S: gl.constexpr, BLOCKS: gl.constexpr,
):  # fmt: skip
    """acc[block, n, m] += absmax[block, n] * sum over the block's columns of code[W[n, k]] x[m, k]"""
    words, stored, scale = step
    at = gl.minimum(start, end - BLOCKS)
    xs = gl.load(x_at + at * 64, mask=x_ok, other=0.0)              # [block, 64 columns, m]
    size = stored if code2 is None else gl.fma(gl.load(code2 + stored), scale, offset)
    size = gl.where(at + block >= start, size, 0.0)                 # zero for what an earlier step has done
    size = gl.convert_layout(gl.convert_layout(size, HALF), S)      # two exchanges between neighbouring lanes
    part = mma_v2(decode(words, table, A, xs.dtype), order_columns(xs, B), zero)
    part, size = gl.broadcast(part, gl.expand_dims(size, 2))
    return gl.fma(part, size, acc)


@gluon.jit
def add_lora(acc, zero, lora_xa, lora_B, scale, n0, rows, rank, A: gl.constexpr, B: gl.constexpr, dtype: gl.constexpr):
    """acc + scale * lora_xa lora_B^T: a few more columns, with lora_B for a weight and `scale` for an absmax."""
    blocks: gl.constexpr = zero.shape[0]
    for start in range(0, rank, 64 * blocks):
        b, n, k = axes(blocks, zero.shape[1], 64, A)
        r = start + b * 64 + k
        weight = gl.load(lora_B + (n0 + n).to(gl.int64) * rank + r, mask=r < rank, other=0.0).to(dtype)
        b_, k_, m = axes(blocks, 64, zero.shape[2], B)
        r_ = start + b_ * 64 + k_
        xa = gl.load(lora_xa + m * rank + r_, mask=(m < rows) & (r_ < rank), other=0.0).to(dtype)
        acc += scale * mma_v2(weight, xa, zero)
    return acc


@gluon.jit(do_not_specialize=["rows", "length", "rank"])
def product_kernel(
    x, packed, absmax, code, absmax2, offset_at, code2, bias, lora_xa, lora_B, scale, out,
    rows, out_features, stride_x, rank, length,
    IN: gl.constexpr, BLOCKSIZE: gl.constexpr, BLOCKSIZE2: gl.constexpr,
    ROWS: gl.constexpr, BLOCKS: gl.constexpr, M: gl.constexpr, WARPS: gl.constexpr, OVERLAP: gl.constexpr,
):  # fmt: skip
    """out[split, m, n] for ROWS rows of W, `length` blocks of their columns, and up to M rows of x."""
    # The product has three axes, [block, row of W, row of x]; the warps share the blocks.
    mma: gl.constexpr = gl.NVMMADistributedLayout(version=[2, 0], warps_per_cta=[WARPS, 1, 1], instr_shape=[1, 16, 8])
    A: gl.constexpr = gl.DotOperandLayout(0, mma, 8)                # 8: see `decode`
    B: gl.constexpr = gl.DotOperandLayout(1, mma, 8)
    S: gl.constexpr = gl.SliceLayout(2, mma)
    Y: gl.constexpr = gl.SliceLayout(0, mma)
    PAIRS: gl.constexpr = bytes_layout(BLOCKS, ROWS, WARPS)
    WORDS: gl.constexpr = gl.SliceLayout(3, PAIRS)
    QUAD: gl.constexpr = size_layout(BLOCKS, ROWS, WARPS, 4)
    HALF: gl.constexpr = size_layout(BLOCKS, ROWS, WARPS, 2)
    ROW: gl.constexpr = IN // 64                                    # blocks of 64 columns in a row
    PER: gl.constexpr = BLOCKSIZE // 64                             # of which one absmax serves this many
    dtype: gl.constexpr = x.dtype.element_ty

    n0 = gl.minimum(gl.program_id(0) * ROWS, out_features - ROWS)
    begin = gl.program_id(1) * length
    end = gl.minimum(begin + length, ROW)
    first = n0.to(gl.int64) * ROW                                   # the tile's first block: 64 bits for large weights

    b, n, t = axes(BLOCKS, ROWS, 4, WORDS)
    words_at = packed.to(gl.pointer_type(gl.int64)) + first * 4 + (n * (ROW * 4) + b * 4 + t)
    # Absmaxes are counted from a multiple of what one absmax2 serves, so that 32 bits are enough for the rest.
    UNIT: gl.constexpr = PER if absmax2 is None else PER * BLOCKSIZE2
    block = gl.expand_dims(gl.arange(0, BLOCKS, gl.SliceLayout(1, QUAD)), 1)
    row = gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(0, QUAD)), 0)
    size = (first % UNIT).to(gl.int32) + row * ROW + block
    sizes_at = absmax + first // UNIT * (UNIT // PER)
    if absmax2 is None:
        scales_at = None
        offset = 0.0
    else:
        scales_at = absmax2 + first // UNIT
        offset = gl.load(offset_at)
    b, k, m = axes(BLOCKS, 64, M, x_layout(BLOCKS, M, WARPS))
    x_at = x + (m * stride_x + b * 64 + k)
    x_ok = (m < rows) & (b >= 0) & (k >= 0)                         # without a row of x nothing is read; b and k give the mask its shape

    # Two steps are always on their way from memory while others are multiplied.
    one = load_step(begin, end, words_at, sizes_at, scales_at, size, BLOCKS, PER, BLOCKSIZE2)
    two = load_step(begin + BLOCKS, end, words_at, sizes_at, scales_at, size, BLOCKS, PER, BLOCKSIZE2)
    table = gl.full([BLOCKS, ROWS, 4, 2], make_table_gluon(code, dtype, WARPS), gl.int32, PAIRS)
    zero = gl.zeros([BLOCKS, ROWS, M], gl.float32, mma)
    acc = zero
    if OVERLAP:
        after_previous()                                            # the weight is on its way; x may just have been written
    for start in range(begin, end, 2 * BLOCKS):
        acc = multiply_step(acc, start, end, one, x_at, x_ok, code2, offset, table, block, zero, A, B, HALF, S, BLOCKS)
        one = load_step(start + 2 * BLOCKS, end, words_at, sizes_at, scales_at, size, BLOCKS, PER, BLOCKSIZE2)
        acc = multiply_step(acc, start + BLOCKS, end, two, x_at, x_ok, code2, offset, table, block, zero, A, B, HALF, S, BLOCKS)
        two = load_step(start + 3 * BLOCKS, end, words_at, sizes_at, scales_at, size, BLOCKS, PER, BLOCKSIZE2)

    if lora_xa is not None:  # noqa: SIM102, decided when compiling
        if gl.program_id(1) == 0:
            acc = add_lora(acc, zero, lora_xa, lora_B, scale, n0, rows, rank, A, B, dtype)
    y = gl.sum(acc, 0)                                              # [n, m]
    n = n0 + gl.expand_dims(gl.arange(0, ROWS, gl.SliceLayout(1, Y)), 1)
    m = gl.expand_dims(gl.arange(0, M, gl.SliceLayout(0, Y)), 0)
    if bias is not None:  # noqa: SIM102, the outer one is decided when compiling
        if gl.program_id(1) == 0:
            y += gl.load(bias + n).to(gl.float32)
    place = (gl.program_id(1) * rows + m).to(gl.int64) * out_features + n
    gl.store(out + place, y.to(out.dtype.element_ty), mask=m < rows)


def product(x: Tensor, packed, absmax, code, out_features: int, blocksize: int, nested, bias, lora_xa, lora_B, scale):
    """x (rows <= 8, in_features) · dequant(W)^T + bias + scale lora_xa lora_B^T, as (rows, out_features)."""
    rows, in_features = x.shape
    assert rows <= ROWS_OF_X
    absmax2, offset, code2, blocksize2 = nested or (None, None, None, 1)
    tiles, blocks = triton.cdiv(out_features, 16), in_features // 64
    # Few and long rows of W leave too few programs to hide the memory's latency: then two share a tile.
    splits = 2 if tiles < 3 * processors(x.device) and blocks >= 128 else 1
    out = torch.empty(splits, rows, out_features, dtype=x.dtype if splits == 1 else torch.float32, device=x.device)
    overlap = overlaps(x)
    product_kernel[(tiles, splits)](
        x, packed, absmax, code, absmax2, offset, code2, bias, lora_xa, lora_B, scale, out,
        rows, out_features, x.stride(0), 0 if lora_B is None else lora_B.shape[1], triton.cdiv(blocks, splits),
        IN=in_features, BLOCKSIZE=blocksize, BLOCKSIZE2=blocksize2,
        ROWS=16, BLOCKS=8, M=ROWS_OF_X, WARPS=4, OVERLAP=overlap, num_warps=4, maxnreg=96, launch_pdl=overlap,
    )  # fmt: skip
    return sum_splits(out, x.dtype, overlap)
