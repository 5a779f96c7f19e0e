"""The pair table: one read of shared memory turns a packed byte into its two weights.

A byte of the packed weight holds two 4-bit codes. Looked up one by one, each costs a shift, a mask, an address and a read, and then
the two values have to be packed into the 32-bit register that a tensor core reads: about ten instructions a weight, and a product
of few rows is bound by exactly that. But a byte has only 256 values. A table of *pairs*,

    table[byte] = (code[byte >> 4], code[byte & 15])        two 16-bit values in one 32-bit word

gives both weights at once, in the register in which they are needed: half a read a weight.

**32 copies.** Shared memory has 32 banks of four bytes, and serves 32 lanes in one cycle only if each reads from another bank. Lanes
look up whatever bytes they hold, so with one table they would collide. Here entry b lies 32 times in a row, at the bytes
128 b ... 128 b + 127, and lane l reads copy l: always bank l, never a collision. The table takes 32 KB of the 227 KB that a
multiprocessor of an H100 has.

**One instruction for the address.** The address is base + 128 * byte, for each of the four bytes of a word. `dp4a` multiplies the
four bytes of one word with the four of another and adds the products to a third: with 128 in one place and zeros elsewhere it takes
out a byte, scales it and adds the base. A shift and a mask would be three.

Neither Triton nor Gluon has a name for a read at a computed place in shared memory, so these few lines are inline assembly. Every
kernel that uses them has a twin in plain Triton (`lookup` in few_rows.py), which the interpreter runs, and float32.

How to read it: `inline_asm_elementwise` runs the text once for `pack` neighbouring elements. "=r" is a 32-bit result, "r" a 32-bit and "l"
a 64-bit argument, numbered $0, $1, ... in the order of that list. An argument comes once for each element, or packed where it is
narrower: four bytes are one r. With pack=2 the two elements are the columns of one byte, with the same word and table: the second
copies go unread.
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

# Reserves the table and tells where it lies.
RESERVE = tl.constexpr(".shared .align 128 .b32 pair_table[8192]; mov.u32 $0, pair_table;")

# Writes the 32 copies of pair $1 for entry $2, 16 bytes at a time. The lanes of a warp hold neighbouring entries, which start in the same
# bank: each begins at another of its eight 16-byte pieces (the xor), so that the stores do not collide either.
FILL = tl.constexpr(
    "{ .reg .b32 at, piece; mov.u32 at, pair_table; mad.lo.u32 at, $2, 128, at; and.b32 piece, $2, 7; mad.lo.u32 at, piece, 16, at; "
    + "".join(f"xor.b32 piece, at, {16 * i}; st.shared.v4.b32 [piece], {{$1, $1, $1, $1}}; " for i in range(8))
    + "mov.u32 $0, 0; }"
)

# When every warp has filled its part: the place of this lane's own copy. Every look-up takes it as an argument, and so comes after it.
READY = tl.constexpr("{ .reg .b32 lane; bar.sync 0; mov.u32 lane, %laneid; mad.lo.u32 $0, lane, 4, $1; }")

# Four bytes $4 give high0 high1 | high2 high3 and low0 low1 | low2 low3. ($5 to $8 are the same lane's place, once for each byte.)
LOOKUP_FOUR = tl.constexpr(
    "{ .reg .b32 at<4>, pair<4>; "
    + "".join(f"dp4a.u32.u32 at{i}, $4, {128 << (8 * i)}, $5; ld.shared.b32 pair{i}, [at{i}]; " for i in range(4))
    + "prmt.b32 $0, pair0, pair1, 0x5410; prmt.b32 $1, pair2, pair3, 0x5410; "
    + "prmt.b32 $2, pair0, pair1, 0x7632; prmt.b32 $3, pair2, pair3, 0x7632; }"
)

# The eight bytes of the 64-bit $8 give eight pairs, in the order of the bytes.
LOOKUP_EIGHT = tl.constexpr(
    "{ .reg .b32 word<2>, at<8>; mov.b64 {word0, word1}, $8; "
    + "".join(f"dp4a.u32.u32 at{i}, word{i // 4}, {128 << (8 * (i % 4))}, $10; " for i in range(8))
    + "".join(f"ld.shared.b32 ${i}, [at{i}]; " for i in range(8))
    + "}"
)

# The byte of word $1 that the multiplier $3 takes out (128 << 8 * byte) gives one pair.
LOOKUP_ONE = tl.constexpr("{ .reg .b32 at; dp4a.u32.u32 at, $1, $3, $5; ld.shared.b32 $0, [at]; }")


@triton.jit
def pair_of(code, entry, dtype: tl.constexpr):
    """The two levels of a byte side by side: the even column in the low half, where a tensor core wants it."""
    even = tl.load(code + (entry >> 4)).to(dtype).to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
    odd = tl.load(code + (entry & 15)).to(dtype).to(tl.int16, bitcast=True).to(tl.int32)
    return even | (odd << 16)


@triton.jit
def make_table(code, dtype: tl.constexpr):
    """Fill the table, and give back the place of this lane's copy. For kernels in Triton."""
    entry = tl.arange(0, 256)
    base = tl.inline_asm_elementwise(RESERVE, "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.inline_asm_elementwise(FILL, "=r,r,r", [pair_of(code, entry, dtype), entry], dtype=tl.int32, is_pure=False, pack=1)
    return tl.inline_asm_elementwise(READY, "=r,r", [base], dtype=tl.int32, is_pure=False, pack=1)


@gluon.jit
def make_table_gluon(code, dtype: gl.constexpr, WARPS: gl.constexpr):
    """The same for kernels in Gluon, where every tensor says which lane holds what."""
    entry = gl.arange(0, 256, layout=gl.BlockedLayout([1], [32], [WARPS], [0]))
    base = gl.inline_asm_elementwise(RESERVE, "=r", [], dtype=gl.int32, is_pure=False, pack=1)
    gl.inline_asm_elementwise(FILL, "=r,r,r", [pair_of(code, entry, dtype), entry], dtype=gl.int32, is_pure=False, pack=1)
    return gl.inline_asm_elementwise(READY, "=r,r", [base], dtype=gl.int32, is_pure=False, pack=1)


@triton.constexpr_function
def repeat(dtype, times):
    """The types of what a look-up gives back."""
    return (dtype,) * times


@triton.jit
def lookup_four(codes, table, dtype: tl.constexpr):
    """(high, low): the levels of the high and of the low halves of packed bytes."""
    types: tl.constexpr = repeat(dtype, 2)
    return tl.inline_asm_elementwise(LOOKUP_FOUR, "=r,=r,=r,=r,r,r,r,r,r", [codes, table], dtype=types, is_pure=True, pack=4)
