"""Cross-entropy on a GPU, and its gradient in the place of the logits: two passes over a row, nothing in memory but the row itself.

    loss = log sum_j e^(z_j) - z_label             z: the logits of a token, (vocab_size,), 65024 for falcon-7b
    dz   = softmax(z) - one-hot(label)

The definition is `F.cross_entropy(..., reduction="sum")` and its autograd, which write log-probabilities and two gradients of the logits'
size in float32. Here a program takes a row. The first pass keeps the largest value seen and the sum of e^(z - largest); whenever a larger
one comes, what is summed so far is scaled down to it, so that no power overflows. The second pass reads the row again, from the cache,
since it has only 130 KB, computes the softmax from both, and overwrites it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def cross_entropy_kernel(logits, labels, losses, ignored, vocab_size, stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    label = tl.load(labels + row)
    logits += row * stride
    columns = tl.arange(0, BLOCK)
    if label == ignored:
        tl.store(losses + row, 0.0)
        for start in range(0, vocab_size, BLOCK):
            tl.store(logits + start + columns, tl.zeros((BLOCK,), logits.dtype.element_ty), mask=start + columns < vocab_size)
    else:
        at_label = tl.load(logits + label).to(tl.float32)           # before it is overwritten
        # BLOCK maxima and sums side by side, brought together once.
        peaks = tl.full((BLOCK,), -1e30, tl.float32)                # finite, so that -inf beyond the row adds e^-inf = 0
        sums = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, vocab_size, BLOCK):
            z = tl.load(logits + start + columns, mask=start + columns < vocab_size, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(peaks, z)
            sums = sums * tl.exp(peaks - higher) + tl.exp(z - higher)
            peaks = higher
        peak = tl.max(peaks)
        total = peak + tl.log(tl.sum(sums * tl.exp(peaks - peak)))
        tl.store(losses + row, total - at_label)
        for start in range(0, vocab_size, BLOCK):
            place = start + columns
            z = tl.load(logits + place, mask=place < vocab_size, other=float("-inf")).to(tl.float32)
            change = tl.exp(z - total) - tl.where(place == label, 1.0, 0.0)
            tl.store(logits + place, change.to(logits.dtype.element_ty), mask=place < vocab_size)


def cross_entropy_(logits: Tensor, labels: Tensor, losses: Tensor, ignored: int) -> None:
    """losses (M,), float32, become the cross-entropies of logits (M, vocab_size) and labels (M,); logits become the gradient of their sum.

    Where the label is `ignored`, both are zero. Other labels must lie in [0, vocab_size): nobody checks.
    """
    m, vocab_size = logits.shape
    assert logits.stride(1) == 1 and labels.shape == losses.shape == (m,) and labels.is_contiguous() and losses.is_contiguous()
    if m:
        with torch.cuda.device_of(logits):
            cross_entropy_kernel[m,](logits, labels, losses, ignored, vocab_size, logits.stride(0), BLOCK=4096, num_warps=8)
