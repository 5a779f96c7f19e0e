"""Quantize to 4 bits on a GPU: one launch reads the weight once and writes absmax and codes.

The definition is `quantize_4bit` of nf4.py; this is the same function in Triton.

**The problem.** The weight is n values in a row, cut into blocks of `blocksize`. A program takes ROWS whole blocks as a tile (ROWS, BLOCK).
With `first` its first value, element (r, c) of its tile stands at

    weight + first + r * BLOCK + c                 the codes of (r, 2j) and (r, 2j + 1) go to byte packed + first / 2 + r * BLOCK / 2 + j

It takes the maximum of each row of the tile, scales the row, finds 16-level codes and packs two of them a byte. Nothing is read twice,
so the memory is the limit: 2 bytes in, 0.5625 out for a bf16 weight. The rest of this file is about staying below that limit
with everything else. In the time the memory needs, the chip issues about 22 instructions a value.

**The ladder**, for a weight of 18176 x 4544 from bfloat16 on one H100 (`python benchmarks/ladder.py`; instructions a value as compiled):

    one block a program, fifteen comparisons        0.781 ms   84     code = how many midpoints lie below the value
    32 blocks a program                             0.271      57     fewer, larger programs: there had been 1.3 million, for 64 values each
    a tree of comparisons                           0.149      32     four comparisons in place of fifteen, each choosing the next midpoint
    bins, their tables in memory                    0.098      18     one comparison, see below; but two loads a value
    the same with 4 warps and 64 blocks             0.089      21     more warps hide the loads, at the price of a barrier
    bins, their tables in the lanes of a warp       0.074      15     two shuffles in place of two loads
    16 blocks a program                             0.0729     16     97 % of the bandwidth of a copy: this file
    8 blocks a program                              0.102             lost: too little work for the cost of starting it
    64 blocks a program                             0.074      15     lost: 168 registers a thread leave room for few programs
    64 blocks and 2 warps                           0.091      19     lost: with two warps a gather goes through shared memory
    16 blocks, the weight leaves the cache first    0.076      16     lost, though nothing is read twice

bitsandbytes takes 1.03 ms with double quantization; this takes 0.090 with double_quant.py after it.

**Bins.** Nearest level means: count the midpoints between levels that lie below the value. Cut [-1, 1] into bins so narrow that none
holds more than one midpoint. For NF4, 31 bins of width 1/15 are enough:

    bin(v) = ceil(15 v)                            code(v) = above[bin] if v > midpoint[bin] else below[bin]

The bin costs one instruction: a fused multiply-add that rounds *up*, 15 v + (1.5 * 2^23 + 15). Floats of that size are whole numbers,
so the addition does the ceiling, and the bin's number stands in the low bits of the result. The two tables have 32 entries,
one for each lane of a warp: with one warp a program, `tl.gather` is a shuffle between lanes, and no
memory is touched. `bins` derives the tables from the code, so any code of 16 levels works; one with midpoints closer
together gets more bins, and reads its tables from memory.

**The same bytes as bitsandbytes on CUDA**, which is built with fast math:
- the reciprocal of absmax is the hardware's approximate one; it is off by at most one unit in the last place, which moves a few values
  in ten million to the neighbouring level;
- its source has the midpoints as decimals of 16 digits. Four of NF4's 15 lie half-way between two floats, and there the decimal,
  a little below or above, decides; torch rounds to the even one. So four midpoints are one unit off those of nf4.py
  (`written_out` makes them): 11 bytes in 67 million;
- subnormal numbers count as zero (`ftz`), in absmax and in the product;
- a block of zeros is scaled by 1/0, its values become NaN, and NaN is above no midpoint: code 0. So is a NaN of the weight, whose
  block otherwise ignores it.
With `exact_reciprocal=True` the kernel follows nf4.py in every bit instead: the exact reciprocal, a floor of 1e-38 under absmax, a
division in the ragged last block, and a NaN that spreads over its block. The approximate instructions are inline assembly,
behind the switch ASM; their twins in plain Triton run in the interpreter, and where ASM is off.
"""

import functools
import math
from fractions import Fraction

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024                                                        # values a program handles: 32 a lane


@triton.jit
def multiply(a, b, ASM: tl.constexpr):
    """a * b in float32, subnormals flushed to zero as bitsandbytes' build does; the plain product where ASM is off."""
    if ASM:
        return tl.inline_asm_elementwise("mul.ftz.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1)
    return a * b


@triton.jit
def reciprocal(a, ASM: tl.constexpr):
    """1 / a in float32: the hardware's approximation, or correctly rounded where ASM is off."""
    if ASM:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [a], dtype=tl.float32, is_pure=True, pack=1)
    return tl.math.div_rn(tl.full(a.shape, 1.0, tl.float32), a)


@triton.jit
def flush(a):
    """The subnormal numbers of a as zeros."""
    return tl.where(tl.abs(a) < 1.1754943508222875e-38, 0.0, a)


@triton.jit
def bin_number(scaled, BINS: tl.constexpr, ASM: tl.constexpr):
    """ceil(BINS * scaled) + BINS, from 0 to 2 * BINS + 1, for scaled in [-1, 1] up to a rounding."""
    if ASM:
        # 12582912 = 1.5 * 2^23. The whole number stands in the low bits of the float.
        number = tl.inline_asm_elementwise(
            "fma.rp.f32 $0, $1, $2, $3;", "=r,f,f,f", [scaled, BINS * 1.0, BINS + 12582912.0], dtype=tl.int32, is_pure=True, pack=1
        )
        return number & (2 * BINS + 1)
    # Not `tl.ceil`, which counts subnormal numbers as zero when compiled.
    place = scaled * BINS
    whole = place.to(tl.int32)
    return whole + (place > whole.to(tl.float32)).to(tl.int32) + BINS


@triton.jit
def from_lanes(table, number):
    """table[number] for a table of 32 entries: a lane holds one, and hands it to whoever asks."""
    flat = tl.gather(tl.load(table + tl.arange(0, 32)), tl.reshape(number, [number.numel]), 0)
    return tl.reshape(flat, number.shape)


@triton.jit
def quantize_kernel(
    weight, packed, absmax, table, n, n_bytes, n_blocks,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr, EXACT: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """One program: ROWS blocks. Offsets inside its tile are small; those of the tile itself need 64 bits from 2^31 values on."""
    tile = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)                                                                  # (ROWS,)
    inside = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]                              # (ROWS, BLOCK)
    # What is left of the weight from here on. Comparing small numbers with it is a third of the instructions of a 64-bit mask.
    values_left = tl.minimum(n - tile * (ROWS * BLOCK), ROWS * BLOCK).to(tl.int32)
    blocks_left = tl.minimum(n_blocks - tile * ROWS, ROWS).to(tl.int32)
    bytes_left = tl.minimum(n_bytes - tile * (ROWS * BLOCK // 2), ROWS * BLOCK // 2).to(tl.int32)

    w = tl.load(weight + tile * (ROWS * BLOCK) + inside, mask=inside < values_left, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(w), axis=1)                                                        # (ROWS,)
    if EXACT:
        largest = tl.where(tl.max((w != w).to(tl.int32), axis=1) > 0, float("nan"), largest)
        floor = tl.full([ROWS], 1e-38, tl.float32)             # a subnormal number: a literal would become a float64
        floored = tl.where(largest < floor, floor, largest)
        ragged = (tile * ROWS + rows == n_blocks - 1) & (n % BLOCK != 0)                       # (ROWS,)
        largest = tl.where(ragged, floored, largest)
        divided = tl.math.div_rn(w, tl.broadcast_to(largest[:, None], [ROWS, BLOCK]))
        scaled = tl.where(ragged[:, None], divided, w * reciprocal(floored, False)[:, None])
        # The padding of an odd n is the code of zero, beside a NaN too.
        scaled = tl.where(inside < values_left, scaled, 0.0)
    else:
        # A maximum over nothing but NaN is what it started from, the lowest float.
        largest = tl.maximum(flush(largest), -3.4028234663852886e38)
        scaled = multiply(w if ASM else flush(w), reciprocal(largest, ASM)[:, None], ASM)
    tl.store(absmax + tile * ROWS + rows, largest, mask=rows < blocks_left)

    # A maximum with NaN is the other number: -1, which gets the lowest code. That also takes back a rounding beyond -1.
    within = tl.maximum(scaled, -1.0)                                                          # (ROWS, BLOCK)
    number = bin_number(within, BINS, ASM)                                                     # (ROWS, BLOCK)
    if BINS == 15:
        midpoint = from_lanes(table, number).to(tl.float32, bitcast=True)
        pair = from_lanes(table + 2 * BINS + 2, number)
    else:                                                          # more entries than lanes: from memory
        midpoint = tl.load(table + number).to(tl.float32, bitcast=True)
        pair = tl.load(table + 2 * BINS + 2 + number)
    codes = tl.where(within > midpoint, pair >> 8, pair & 15)
    if EXACT:
        # nf4.py counts NaN above all midpoints. The last entry of the table is above the last one.
        codes = tl.where(scaled != scaled, tl.load(table + 4 * BINS + 3) >> 8, codes)

    # Columns 2j and 2j + 1 lie in the same lane: splitting the tile in even and odd columns moves nothing.
    even, odd = tl.split(tl.reshape(codes, [ROWS, BLOCK // 2, 2]))
    inside = rows[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]                  # (ROWS, BLOCK / 2)
    byte = (even * 16 + odd).to(tl.uint8)
    tl.store(packed + tile * (ROWS * BLOCK // 2) + inside, byte, mask=inside < bytes_left)


def written_out(midpoint: float) -> float:
    """The float32 that a compiler makes of a midpoint written as a decimal, which is how bitsandbytes' source has them."""
    nearest = torch.tensor([midpoint, midpoint, midpoint])                                     # float32: half-way cases go to the even one
    candidates = nearest.nextafter(torch.tensor([-2.0, midpoint, 2.0])).tolist()
    return min(candidates, key=lambda candidate: abs(Fraction(candidate) - Fraction(repr(midpoint))))


@functools.lru_cache
def bins(levels: tuple[float, ...], exact: bool, device: torch.device) -> tuple[int, Tensor]:
    """How many bins a unit is cut into so that none holds two midpoints, and the two tables of the kernel, int32 (2, 2 * bins + 2).

    Entry b is about the values in (b - 1 - bins, b - bins] / bins: the bits of their midpoint (or infinity), and above << 8 | below.
    """
    ordered, codes = torch.tensor(levels).sort(stable=True)                                    # as nf4.py does it
    if exact:
        midpoints = ((ordered[1:] + ordered[:-1]) / 2).tolist()                                # 15, each a float32
    else:
        midpoints = [written_out(midpoint) for midpoint in ((ordered[1:].double() + ordered[:-1]) / 2).tolist()]
    codes = codes.tolist()
    for count in (15, 31, 63, 127, 255, 511, 1023):
        # Where the midpoints lie, in bins; exact, since a float32 times ten bits fits into a Python float. Bin b is (b - 1, b]. A
        # midpoint on its upper end splits no value of it from another; that is where zero lies, between the two zeros of a code.
        places = [midpoint * count + count for midpoint in midpoints]
        inside = {}
        for place, midpoint in zip(places, midpoints, strict=True):
            if place % 1:
                inside.setdefault(math.ceil(place), set()).add(midpoint)
        # The interpreter rounds 15 v before it takes the ceiling: no midpoint may be that close to a border.
        close = any(0 < abs(place - round(place)) < 1e-4 for place in places)
        if not close and all(len(some) == 1 for some in inside.values()):
            break
    else:
        raise ValueError(f"code has midpoints between levels that no 1023 bins separate: {levels}")
    numbers = range(2 * count + 2)
    below = [codes[sum(math.ceil(place) < b for place in places)] for b in numbers]
    above = [codes[sum(place < b for place in places)] for b in numbers]
    midpoint = torch.tensor([max(inside.get(b, {math.inf})) for b in numbers]).view(torch.int32)
    pair = torch.tensor([high << 8 | low for low, high in zip(below, above, strict=True)], dtype=torch.int32)
    return count, torch.stack([midpoint, pair]).to(device)


def launch(weight: Tensor, code: Tensor, blocksize: int, exact_reciprocal: bool) -> tuple[Tensor, Tensor]:
    if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        weight = weight.float()
    weight = weight.contiguous()
    n = weight.numel()
    n_bytes, n_blocks = (n + 1) // 2, triton.cdiv(n, blocksize)
    packed = torch.empty(n_bytes, 1, dtype=torch.uint8, device=weight.device)
    absmax = torch.empty(n_blocks, dtype=torch.float32, device=weight.device)
    count, table = bins(tuple(code.tolist()), exact_reciprocal, weight.device)
    rows = max(1, TILE // blocksize)
    if n:
        with torch.cuda.device_of(weight):
            quantize_kernel[triton.cdiv(n_blocks, rows),](
                weight, packed, absmax, table, n, n_bytes, n_blocks,
                BLOCK=blocksize, ROWS=rows, BINS=count, EXACT=exact_reciprocal, ASM=weight.is_cuda and not exact_reciprocal,
                num_warps=1, enable_fp_fusion=False,
            )  # fmt: skip
    return packed, absmax


# A registered operator is a single node for torch.compile, which knows from the fake what comes out. `Library` takes a third of the
# time that `custom_op` takes on each call.
library = torch.library.Library("minqlora", "FRAGMENT")
library.define("quantize_4bit(Tensor weight, Tensor code, int blocksize, bool exact_reciprocal) -> (Tensor, Tensor)")
library.impl("quantize_4bit", launch, "CompositeExplicitAutograd")


@torch.library.register_fake("minqlora::quantize_4bit")
def fake(weight, code, blocksize, exact_reciprocal):
    n = weight.numel()
    packed = weight.new_empty(((n + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty(((n + blocksize - 1) // blocksize,), dtype=torch.float32)


def quantize_4bit(weight: Tensor, code: Tensor, blocksize: int, exact_reciprocal: bool = False) -> tuple[Tensor, Tensor]:
    """packed, uint8 ((n + 1) // 2, 1), and absmax, float32 (ceil(n / blocksize),); see nf4.py.

    The levels are needed on the host: a code on the GPU is waited for.
    """
    return torch.ops.minqlora.quantize_4bit.default(weight.detach(), code, blocksize, exact_reciprocal)
