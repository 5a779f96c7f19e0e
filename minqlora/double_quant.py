"""2. Double quantization: the absmax in 8 bits (QLoRA section 3, the inner dequant of Eq. 6).

One float32 for 64 weights is 0.5 bit a parameter, 440 MB for a model of 7 billion. But the absmaxes of a matrix are much alike, so
they can be quantized in turn, to 8 bits, in groups of 256:

    offset  = mean(absmax)                                 they are all positive; centred, they use both signs of the code
    absmax2_g = max |absmax_b - offset|  over group g      the paper's c1; the absmax is its c2
    codes_b = the level of DYNAMIC_MAP nearest to (absmax_b - offset) / absmax2_g

    before: 32/64                 = 0.500 bit a parameter
    after:   8/64 + 32/(64 * 256) = 0.127 bit a parameter, and one float for the whole matrix

**The map.** The paper says FP8; what its authors run is neither of the FP8 formats that hardware has, but the signed *dynamic* map: a
decade is chosen first, and the bits that this choice leaves over divide it evenly. Near 1, 64 levels share 0.1 to 1; six decades
down, a single one stands for 1e-7 to 1e-6. 127 levels of either sign, zero, and one:

    { ± 10^(i - 6) * midpoints of linspace(0.1, 1, 2^i + 1) : i = 0..6 } + {0} + {1}

It is not symmetric: 1 is a level, and -1 is not (the lowest is -0.993), so an absmax far below the mean is off by up to 0.7 % of its
group's largest difference.

**The same codes as bitsandbytes.** Its CPU backend does not search the nearest of the 256 levels for the value itself, but for the
nearest of 65 536 points between -1 and 1. That decides about one code in 600, and is followed here. (It also leaves the seven levels
nearest to zero without use: the two points in the middle are ±1.5e-5.) The mean depends on how many threads add up; compare codes
within one process, and never hash them.

**Undoing it** is a product and then a sum, each rounded to float32. On a GPU the compiler would fuse the two into one rounding, and
the kernel has to say that it must not.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def dynamic_map() -> Tensor:
    """The 256 levels, ascending. Everything in float32: computed in float64, 72 of them come out differently."""
    levels = [torch.tensor([0.0, 1.0])]
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1)                   # (2^i + 1,)
        midpoints = (edges[:-1] + edges[1:]) / 2 * 10 ** (i - 6)   # (2^i,)
        levels += [midpoints, -midpoints]
    return torch.cat(levels).sort().values                         # (256,)


DYNAMIC_MAP = dynamic_map()


def double_quantize(absmax: Tensor, blocksize: int = 256) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize the absmaxes of a weight, float32 (n,) and finite, to 8 bits in groups of blocksize (QLoRA section 3).

    Returns codes, uint8 (n,), absmax2, float32 (ceil(n / blocksize),), and offset, float32 ().
    """
    check_blocksize(blocksize)
    if absmax.dtype != torch.float32 or absmax.ndim != 1 or absmax.numel() == 0:
        raise ValueError(f"absmax is {absmax.dtype} of shape {tuple(absmax.shape)}; it must be float32 of one dimension, and not empty")
    # One NaN would spread through the mean into every block of the matrix.
    if not absmax.isfinite().all():
        raise ValueError(f"absmax holds {absmax.isfinite().logical_not().sum()} values that are NaN or infinite: so does the weight")
    if absmax.is_cuda:
        from minqlora.kernels.double_quant import double_quantize as kernel

        return kernel(absmax, DYNAMIC_MAP.to(absmax.device), blocksize)

    n = absmax.numel()
    offset = absmax.mean()                                         # ()
    groups = F.pad(absmax - offset, (0, -n % blocksize)).view(-1, blocksize)          # (n_groups, blocksize)
    absmax2 = groups.abs().amax(dim=1)                             # (n_groups,)
    scaled = (groups * (1 / absmax2)[:, None]).clamp(-1, 1)        # (n_groups, blocksize)
    # Where all absmaxes equal the mean, that was 0 times infinity. bitsandbytes stores code 0; times absmax2, any code gives zero.
    scaled[absmax2 == 0] = -1
    # The points 0..65535 of bitsandbytes' table, and the level nearest to each: the number of midpoints below it.
    points = ((scaled + 1) * 0.5 * 65535 + 0.5).int()
    codes = torch.bucketize(points / 65535 * 2 - 1, (DYNAMIC_MAP[1:] + DYNAMIC_MAP[:-1]) / 2, out_int32=True)
    return codes.view(-1)[:n].to(torch.uint8), absmax2, offset


def double_dequantize(codes: Tensor, absmax2: Tensor, offset: Tensor, blocksize: int = 256) -> Tensor:
    """absmax_b = DYNAMIC_MAP[codes_b] * absmax2_g + offset: float32 (n,), the product rounded before the sum (inside Eq. 6)."""
    check_blocksize(blocksize)
    n = codes.numel()
    if absmax2.numel() != math.ceil(n / blocksize):
        raise ValueError(f"absmax2 holds {absmax2.numel()} groups; {n} codes are {math.ceil(n / blocksize)} groups of {blocksize}")
    if codes.is_cuda:
        from minqlora.kernels.double_quant import double_dequantize as kernel

        return kernel(codes, absmax2, offset, DYNAMIC_MAP.to(codes.device), blocksize)

    groups = F.pad(DYNAMIC_MAP[codes.int()], (0, -n % blocksize)).view(-1, blocksize)  # (n_groups, blocksize)
    return (groups * absmax2[:, None] + offset).view(-1)[:n]


def check_blocksize(blocksize: int) -> None:
    if blocksize not in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        raise ValueError(f"blocksize is {blocksize}; it must be a power of two from 32 to 4096")
