"""1. NF4: a weight in 4 bits (QLoRA section 2 and 3, Eq. 1, 2 and 4).

To fine-tune a model of 7 billion weights, one has to hold them first: 14 GB in 16 bits, 3.5 GB in 4. A weight matrix of a language
model looks like noise: its values are close to normally distributed around zero. Four bits give 16 values to choose from, so the
question is which 16, and how to stretch them over a matrix whose values are of any size.

**Blocks.** The matrix is read row by row as one long row of n values, and cut into blocks of 64. Each block keeps one float32, the
largest magnitude in it, and is divided by that:

    absmax_b = max |w_i|            v_i = w_i / absmax_b   in [-1, 1]                                       (Eq. 1)

An outlier then spoils 63 neighbours, and not a whole matrix. The price is 32 bits a block: 4 + 32/64 = 4.5 bits a parameter
(`double_quant.py` brings it down to 4.127). The paper calls this absmax c2 and the next file's scale c1; here they are `absmax`
and `absmax2`.

**Levels.** A code is a list of 16 levels in [-1, 1], and a value becomes the index of the nearest one. In the source `code` is the
list, and `codes` are the indices. NF4 takes quantiles of the normal distribution, so that no level is used rarely: narrow steps near
zero, where weights crowd, and wide steps at the ends. Seven levels are negative, eight are positive and one is exactly zero: a weight
that was pruned, or a padded row, stays what it was.

    NF4 = sort( {Q(p): p in linspace(0.9677083, 1/2, 9)[:-1]} + {0} + {-Q(p): p in linspace(0.9677083, 1/2, 8)[:-1]} ) / max

with Q the quantile of the standard normal distribution. This is what the authors' code computes, and a test derives it again. The
paper's Eq. 4 says it otherwise, as the mean of neighbouring quantiles; read to the letter, that is symmetric, without a zero,
and infinite at both ends. 0.9677083 stops the outermost quantile short of infinity. It is likely 929/960, the mean of 1 - 1/32 and
1 - 1/30.

**Memory layout.** Two codes make a byte, the even element in the high half:

    packed[i] = codes[2 i] << 4 | codes[2 i + 1]        uint8 ((n + 1) // 2, 1)
    absmax[b]                                           float32 (ceil(n / 64),)

The last block may be ragged (shorter than the others), and an odd n is padded with the code of zero.

**The same bytes as bitsandbytes.** On a CPU, `packed` and `absmax` equal those of bitsandbytes' CPU backend in every byte, at all of
its block sizes. Three details decide that, each marked below: the reciprocal, the ragged block, and ties. Dequantized
values are one product, rounded once: code[codes] * absmax in float32, then the dtype asked for. bitsandbytes agrees wherever
the block size divides the last dimension; elsewhere the AVX512 code of its version 0.50 takes the absmax of another block (a test
shows it).

**On a GPU** the same functions run `kernels/quantize_4bit.py` and `kernels/dequantize_4bit.py`. There bitsandbytes multiplies by the
approximate reciprocal of the hardware and has four of the 15 midpoints one float off, and so has the kernel: a few values in ten
million land on the neighbouring level. A block of zeros becomes code 0 times absmax 0 in place of code 7 times absmax 0: the same zeros.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

NF4 = torch.tensor([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453,
    -0.28444138169288635, -0.18477343022833234, -0.09105003625154495, 0.0,
    0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
])  # fmt: skip

# bitsandbytes' 4-bit float, in the order of its bit patterns: sign, then seven magnitudes that no IEEE rule gives. Zero stands twice.
FP4 = torch.tensor([0, 0.0625, 8, 12, 4, 6, 2, 3, 0, -0.0625, -8, -12, -4, -6, -2, -3]) / 12

# The usual 4-bit float (two bits of exponent, one of mantissa), in the order of its bit patterns. Zero stands twice.
FP4_E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]) / 6

# Sixteen even steps would have no zero; fifteen do. Zero stands twice here too, so that a code always has 16 levels.
INT4 = torch.tensor([-7.0, -6, -5, -4, -3, -2, -1, 0, 0, 1, 2, 3, 4, 5, 6, 7]) / 7

# Values that one step of the loops below handles. A large weight then needs a few megabytes of float32 beside itself, and not several
# copies of its own size; the bytes are the same, because a step holds whole blocks.
STEP = 2**20


def quantize_4bit(weight: Tensor, code: Tensor = NF4, blocksize: int = 64) -> tuple[Tensor, Tensor]:
    """Quantize a weight of any shape to 4 bits, block by block (QLoRA section 2, Eq. 1).

        absmax_b = max |w_i|  over the blocksize values of block b
        codes_i  = argmin_j | w_i / absmax_b - code[j] |

    Returns packed, uint8 ((n + 1) // 2, 1), and absmax, float32 (ceil(n / blocksize),), on the weight's device.
    """
    check_code(code, blocksize)
    if not weight.is_floating_point():
        raise ValueError(f"weight has dtype {weight.dtype}; a floating-point weight can be quantized")
    weight = weight.detach()
    if weight.is_cuda:
        from minqlora.kernels.quantize_4bit import quantize_4bit as kernel

        return kernel(weight, code, blocksize)

    n = weight.numel()
    flat = weight.reshape(-1)                                      # (n,)
    packed = torch.empty((n + 1) // 2, 1, dtype=torch.uint8)
    absmax = torch.empty(math.ceil(n / blocksize))
    # Between two neighbouring levels the nearest one changes at their midpoint, so the nearest of 16 is a search among 15 midpoints.
    # The sort is stable: of two zeros the first gets the values just below zero, as in bitsandbytes.
    levels, order = code.sort(stable=True)                         # (16,) ascending; (16,) where each stands in the code
    midpoints = (levels[1:] + levels[:-1]) / 2                     # (15,)
    order = order.to(torch.uint8)

    for start in range(0, n, STEP):
        values = flat[start : start + STEP].float()
        ragged = values.numel() % blocksize
        blocks = F.pad(values, (0, -values.numel() % blocksize)).view(-1, blocksize)      # (n_blocks, blocksize)
        largest = blocks.abs().amax(dim=1)                         # (n_blocks,)
        # Multiply by the rounded reciprocal, as bitsandbytes does: a division lands on another level about once in 17 million values.
        # Without the floor, a block of zeros would become NaN.
        scaled = blocks * (1 / largest.clamp_min(1e-38))[:, None]  # (n_blocks, blocksize), in [-1, 1] up to a rounding
        if ragged:
            # bitsandbytes treats the ragged block apart: it stores the floor, and divides. The padding stays zero, beside a NaN too.
            largest[-1].clamp_(min=1e-38)
            scaled[-1] = F.pad(values[-ragged:] / largest[-1], (0, blocksize - ragged))
        # The number of midpoints below a value: one that lies on a midpoint takes the lower level. NaN is above them all.
        codes = order[torch.bucketize(scaled, midpoints, out_int32=True)].view(-1, 2)     # (n_blocks * blocksize / 2, 2)
        halves = packed[start // 2 : (start + STEP) // 2, 0]       # the padding has no place in it but one half of an odd n's last byte
        halves.copy_((codes[:, 0] << 4 | codes[:, 1])[: halves.numel()])
        absmax[start // blocksize : (start + STEP) // blocksize] = largest
    return packed, absmax


def dequantize_4bit(
    packed: Tensor, absmax: Tensor, shape, code: Tensor = NF4, blocksize: int = 64, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Undo `quantize_4bit` up to the rounding to 16 levels (QLoRA section 2, Eq. 2).

        w_i = code[codes_i] * absmax_b     one float32 product, rounded to dtype

    packed and absmax are what quantize_4bit returned for a weight of this shape, with the same code and blocksize. ValueError if they
    cannot be. Returns the weight, in dtype.
    """
    check_code(code, blocksize)
    n = math.prod(shape)
    if packed.numel() != (n + 1) // 2:
        raise ValueError(f"packed holds {packed.numel()} bytes; shape {tuple(shape)} needs {(n + 1) // 2}")
    if absmax.numel() != math.ceil(n / blocksize):
        raise ValueError(f"absmax holds {absmax.numel()} blocks; shape {tuple(shape)} has {math.ceil(n / blocksize)} of {blocksize}")
    if packed.is_cuda:
        from minqlora.kernels.dequantize_4bit import dequantize_4bit as kernel

        return kernel(packed, absmax, shape, code.to(packed.device), blocksize, dtype)

    # One look-up gives the two values of a byte.
    pairs = torch.cartesian_prod(code, code)                       # (256, 2): row b is code[b >> 4], code[b & 15]
    packed = packed.reshape(-1)
    weight = torch.empty(n, dtype=dtype)
    for start in range(0, n, STEP):
        some = packed[start // 2 : (start + STEP) // 2].int()
        some = F.pad(some, (0, -some.numel() % (blocksize // 2)))  # whole blocks
        blocks = pairs.index_select(0, some).view(-1, blocksize)   # (n_blocks, blocksize)
        blocks *= absmax[start // blocksize : (start + STEP) // blocksize, None]
        out = weight[start : start + STEP]
        out.copy_(blocks.view(-1)[: out.numel()])
    return weight.view(shape)


def check_code(code: Tensor, blocksize: int) -> None:
    """ValueError unless code is 16 levels in float32, and blocksize one that the kernels have."""
    if code.shape != (16,) or code.dtype != torch.float32:
        raise ValueError(f"code is {code.dtype} of shape {tuple(code.shape)}; it must be float32 of shape (16,)")
    if blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"blocksize is {blocksize}; it must be a power of two from 32 to 4096")
