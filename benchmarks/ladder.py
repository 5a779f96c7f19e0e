"""The steps that led to the kernels: each ladder from the naive version to the final one, checked and timed on this machine.

    python benchmarks/ladder.py [--shape 18176 4544]

The files in kernels/ tell what each step changed. Here the steps can be run: one kernel with switches instead of the finished one
without. A step that lost stays. Every step gives the same bytes, and is compared with the finished kernel before it is timed. Times are
medians per call inside a CUDA graph over several copies of the weight, larger together than the cache.
"""

import argparse
import statistics
import sys

import torch
import triton
import triton.language as tl

from minqlora.double_quant import DYNAMIC_MAP
from minqlora.kernels.dequantize_4bit import dequantize_4bit
from minqlora.kernels.double_quant import decode_absmax, double_dequantize, double_quantize
from minqlora.kernels.quantize_4bit import bin_number, bins, flush, multiply, quantize_4bit, reciprocal, written_out
from minqlora.nf4 import NF4

BLOCK = 64
FIRST = ("evict_first", "evict_first")


@triton.jit
def tree(v, m):
    """Four comparisons in a row: each one chooses the next midpoint. m points to the 15 of them."""
    b3 = v > tl.load(m + 7)
    b2 = v > tl.where(b3, tl.load(m + 11), tl.load(m + 3))
    upper, lower = tl.where(b2, tl.load(m + 13), tl.load(m + 9)), tl.where(b2, tl.load(m + 5), tl.load(m + 1))
    b1 = v > tl.where(b3, upper, lower)
    upper = tl.where(b2, tl.where(b1, tl.load(m + 14), tl.load(m + 12)), tl.where(b1, tl.load(m + 10), tl.load(m + 8)))
    lower = tl.where(b2, tl.where(b1, tl.load(m + 6), tl.load(m + 4)), tl.where(b1, tl.load(m + 2), tl.load(m)))
    b0 = v > tl.where(b3, upper, lower)
    return b3.to(tl.int32) * 8 + b2.to(tl.int32) * 4 + b1.to(tl.int32) * 2 + b0.to(tl.int32)


@triton.jit
def quantize_step(
    weight, packed, absmax, midpoints, table, n,
    BLOCK: tl.constexpr, ROWS: tl.constexpr, BINS: tl.constexpr, SEARCH: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)
    inside = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    left = tl.minimum(n - tile * (ROWS * BLOCK), ROWS * BLOCK).to(tl.int32)
    w = tl.load(weight + tile * (ROWS * BLOCK) + inside, mask=inside < left, other=0.0, eviction_policy=IN).to(tl.float32)
    largest = flush(tl.max(tl.abs(w), axis=1))
    tl.store(absmax + tile * ROWS + rows, largest, mask=rows * BLOCK < left)
    v = tl.maximum(multiply(w, reciprocal(largest, True)[:, None], True), -1.0)
    if SEARCH == "comparisons":
        codes = tl.zeros(v.shape, tl.int32)
        for k in tl.static_range(15):
            codes += (v > tl.load(midpoints + k)).to(tl.int32)
    elif SEARCH == "tree":
        codes = tree(v, midpoints)
    else:
        number = bin_number(v, BINS, True)
        if SEARCH == "memory":
            midpoint = tl.load(table + number).to(tl.float32, bitcast=True)
            pair = tl.load(table + 2 * BINS + 2 + number)
        else:
            number = tl.reshape(number, [ROWS * BLOCK])
            entries = tl.arange(0, 2 * BINS + 2)
            midpoint = tl.gather(tl.load(table + entries).to(tl.float32, bitcast=True), number, 0)
            pair = tl.reshape(tl.gather(tl.load(table + 2 * BINS + 2 + entries), number, 0), [ROWS, BLOCK])
            midpoint = tl.reshape(midpoint, [ROWS, BLOCK])
        codes = tl.where(v > midpoint, pair >> 8, pair & 15)
    even, odd = tl.split(tl.reshape(codes, [ROWS, BLOCK // 2, 2]))
    inside = rows[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
    byte = (even * 16 + odd).to(tl.uint8)
    tl.store(packed + tile * (ROWS * BLOCK // 2) + inside, byte, mask=inside < left // 2, eviction_policy=OUT)


@triton.jit
def dequantize_step(
    packed, absmax, absmax2, offset, code2, code, out, n,
    BLOCK: tl.constexpr, BLOCK2: tl.constexpr, ROWS: tl.constexpr,
    LEVELS: tl.constexpr, WORDS: tl.constexpr, IN: tl.constexpr, OUT: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(0).to(tl.int64)
    rows = tl.arange(0, ROWS)
    left = tl.minimum(n - tile * (ROWS * BLOCK), ROWS * BLOCK).to(tl.int32)
    in_blocks = rows * BLOCK < left
    scale = tl.load(absmax + tile * ROWS + rows, mask=in_blocks, other=0)
    if absmax2 is not None:
        scale = decode_absmax(scale, (tile * ROWS + rows) // BLOCK2, absmax2, offset, code2, in_blocks, True)
    start = packed + tile * (ROWS * BLOCK // 2)
    if WORDS:
        # Four bytes at once: value k of the eight stands in byte k / 2, the even one in its high half.
        inside = rows[:, None] * (BLOCK // 8) + tl.arange(0, BLOCK // 8)[None, :]
        word = tl.load(start.to(tl.pointer_type(tl.int32)) + inside, mask=inside < left // 8, other=0, eviction_policy=IN)
        k = tl.arange(0, 8)
        codes = tl.reshape((word[:, :, None] >> (k // 2 * 8 + 4 - k % 2 * 4)[None, None, :]) & 15, [ROWS, BLOCK])
    else:
        inside = rows[:, None] * (BLOCK // 2) + tl.arange(0, BLOCK // 2)[None, :]
        byte = tl.load(start + inside, mask=inside < left // 2, other=0, eviction_policy=IN).to(tl.int32)
        codes = tl.interleave(byte >> 4, byte & 15)
    if LEVELS == "memory":
        values = tl.load(code + codes)
    else:
        values = tl.gather(tl.load(code + tl.arange(0, 16)), tl.reshape(codes, [ROWS * BLOCK]), 0)
        values = tl.reshape(values, [ROWS, BLOCK])
    inside = rows[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    values = multiply(values, scale[:, None], True).to(out.dtype.element_ty)
    tl.store(out + tile * (ROWS * BLOCK) + inside, values, mask=inside < left, eviction_policy=OUT)


def time_graph(call, copies: int) -> tuple[float, float, float]:
    """Median, 20th and 80th percentile of the milliseconds a call takes. call(i) works on copy i; what it returns is kept."""
    for i in range(min(copies, 3)):
        call(i)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call(i) for i in range(copies)]
    times = []
    for repeat in range(23):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        if repeat >= 3:                                            # the first ones warm up
            times.append(begin.elapsed_time(end) / copies)
    del kept
    fifths = statistics.quantiles(times, n=5)
    return statistics.median(times), fifths[0], fifths[-1]


def copy_bandwidth() -> float:
    """GB/s, read and written, of a large copy on the GPU: what a kernel that only moves memory is compared with."""
    source, target = (torch.randint(0, 256, (2**30,), dtype=torch.uint8, device="cuda") for _ in range(2))
    return 2 * source.nbytes / triton.testing.do_bench(lambda: target.copy_(source), return_mode="median") / 1e6


def report(name, time, moved, peak):
    ms, low, high = time
    print(f"{name:<64} {ms:.4f} ({low:.4f}-{high:.4f}) ms   {moved / ms / 1e6:5.0f} GB/s   {moved / ms / 1e6 / peak:4.0%} of a copy")


def quantize_ladder(weights, peak):
    n = weights[0].numel()
    copies = len(weights)
    wanted = quantize_4bit(weights[0], NF4, BLOCK)
    midpoints = torch.tensor([written_out(m) for m in ((NF4[1:].double() + NF4[:-1]) / 2).tolist()]).cuda()
    count, table = bins(tuple(NF4.tolist()), False, weights[0].device)
    moved = n * (2 + 0.5 + 4 / BLOCK)

    def step(name, search, rows, warps, evict=("", ""), **options):
        def call(i):
            packed, absmax = (torch.empty_like(x) for x in wanted)
            quantize_step[triton.cdiv(n, rows * BLOCK),](
                weights[i], packed, absmax, midpoints, table, n,
                BLOCK=BLOCK, ROWS=rows, BINS=count, SEARCH=search, IN=evict[0], OUT=evict[1], num_warps=warps, **options,
            )  # fmt: skip
            return packed, absmax

        check(name, call(0), wanted)
        report(name, time_graph(call, copies), moved, peak)

    print(f"\nquantize {tuple(weights[0].shape)} from bfloat16")
    step("one block a program, fifteen comparisons", "comparisons", 1, 1)
    step("32 blocks a program", "comparisons", 32, 1)
    step("a tree of comparisons", "tree", 32, 1)
    step("bins, their tables in memory", "memory", 32, 1)
    step("the same with 4 warps and 64 blocks", "memory", 64, 4)
    step("bins, their tables in the lanes of a warp", "lanes", 32, 1)
    step("16 blocks a program", "lanes", 16, 1)
    step("8 blocks a program", "lanes", 8, 1)
    step("64 blocks a program", "lanes", 64, 1)
    step("64 blocks and 2 warps: the tables in shared memory", "lanes", 64, 2)
    step("16 blocks, the weight leaves the cache first", "lanes", 16, 1, ("evict_first", ""))
    report("kernels/quantize_4bit.py", time_graph(lambda i: quantize_4bit(weights[i], NF4, BLOCK), copies), moved, peak)

    def both(i):
        packed, absmax = quantize_4bit(weights[i], NF4, BLOCK)
        return packed, *double_quantize(absmax, code2, 256)

    code2 = DYNAMIC_MAP.cuda()
    report("with double_quant.py after it", time_graph(both, copies), moved, peak)


def dequantize_ladder(weights, peak):
    shape, n, copies = weights[0].shape, weights[0].numel(), len(weights)
    packed, absmax = quantize_4bit(weights[0], NF4, BLOCK)
    code, code2 = NF4.cuda(), DYNAMIC_MAP.cuda()
    codes, absmax2, offset = double_quantize(absmax, code2, 256)
    inputs = [(packed.clone(), codes.clone()) for _ in range(copies)]
    outs = [torch.empty(shape, dtype=torch.bfloat16, device="cuda") for _ in range(copies)]
    wanted = dequantize_4bit(packed, codes, shape, code, BLOCK, torch.bfloat16, (absmax2, offset, code2, 256))
    moved = n * (2 + 0.5 + 1 / BLOCK)

    def step(name, levels, rows, warps, evict=("", ""), one_launch=True, words=False):
        def call(i):
            packed, absmax = inputs[i]
            nested = (absmax2, offset, code2) if one_launch else (None, None, None)
            if not one_launch:
                absmax = double_dequantize(absmax, absmax2, offset, code2, 256)
            dequantize_step[triton.cdiv(n, rows * BLOCK),](
                packed, absmax, *nested, code, outs[i], n,
                BLOCK=BLOCK, BLOCK2=256, ROWS=rows, LEVELS=levels, WORDS=words, IN=evict[0], OUT=evict[1],
                num_warps=warps, enable_fp_fusion=False,
            )  # fmt: skip
            return outs[i]

        outs[0].zero_()
        check(name, [call(0)], [wanted])
        report(name, time_graph(call, copies), moved, peak)

    print(f"\ndequantize {tuple(shape)} to bfloat16, double-quantized")
    step("two launches, one block a program, levels in memory", "memory", 1, 1, one_launch=False)
    step("64 blocks a program, 4 warps", "memory", 64, 4, one_launch=False)
    step("one launch", "memory", 64, 4)
    step("2 warps", "memory", 64, 2)
    step("levels in shared memory", "lanes", 64, 2)
    step("levels in the lanes of a warp (1 warp, 32 blocks)", "lanes", 32, 1)
    step("and both ends leave the cache first", "lanes", 32, 1, FIRST)
    step("words, 2 warps, 64 blocks", "lanes", 64, 2, FIRST, words=True)
    step("words, 1 warp, 32 blocks", "lanes", 32, 1, FIRST, words=True)
    step("words, 4 warps, 64 blocks", "lanes", 64, 4, FIRST, words=True)
    step("words, 2 warps, 128 blocks", "lanes", 128, 2, FIRST, words=True)
    nested = (absmax2, offset, code2, 256)
    final = time_graph(lambda i: dequantize_4bit(*inputs[i], shape, code, BLOCK, torch.bfloat16, nested, outs[i]), copies)
    report("kernels/dequantize_4bit.py", final, moved, peak)


def check(name, ours, wanted):
    if not all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True)):
        sys.exit(f"{name}: not the bytes of the finished kernel")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", type=int, nargs=2, default=(18176, 4544), help="of the weight: a multiple of 2048 values")
    shape = parser.parse_args().shape
    if not torch.cuda.is_available():
        sys.exit("The ladder is climbed on a GPU, and there is none here.")
    peak = copy_bandwidth()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, triton {triton.__version__}: a copy of 1 GiB moves {peak:.0f} GB/s")
    copies = max(3, 600_000_000 // (shape[0] * shape[1] * 2))
    weights = [torch.randn(*shape, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
    quantize_ladder(weights, peak)
    dequantize_ladder(weights, peak)


if __name__ == "__main__":
    main()
