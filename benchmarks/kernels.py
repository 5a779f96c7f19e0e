"""The kernels against the reference, bitsandbytes and cuBLAS, on every shape of Falcon-7B and LLaMA.

    python benchmarks/kernels.py            the whole table, in about two minutes on a GPU
    python benchmarks/kernels.py --quick    two shapes
    python benchmarks/kernels.py --plot     and a chart of time over rows; with --read FILE of an earlier run, without a GPU

What is timed, and under what:
- weights are random normal, NF4 in blocks of 64, double-quantized; x is random normal bfloat16;
- a call is one of many in a CUDA graph, each on another copy of the weight, together four times the cache of an H100: the time of the
  GPU alone, from memory. Where a library cannot be captured (bitsandbytes quantizes on the default stream), calls run in
  a row on a stream, and the column says so; the reference runs on the CPU, once;
- of 15 runs, in which the contenders take turns, the median and the 20th and 80th percentile;
- `GB/s` counts each input read and each output written once; `TFLOP/s` 2 M N K. The peak is a copy of 1 GiB, and a bfloat16 product of
  8192 x 8192 x 8192, both timed in this run. The share is that of the one which bounds the row: the longer of bytes over bandwidth
  and operations over rate, over the time;
- `error` is |y - y64| / |y64| against float64 on at most 64 of the rows. It is checked before a row is timed, as are the bytes of
  quantize and the bits of dequantize, against bitsandbytes. bfloat16 alone makes 1.7e-3 of it: its output is rounded to 8 bits.

A row that fails says why, the others go on, and the exit code is 1. The results go to benchmarks/results/kernels-<gpu>.json.
"""

import argparse
import copy
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from common import about, header, leave_the_folder, results_path, write_results

leave_the_folder()

from minqlora import NF4, dequantize_4bit, double_dequantize, double_quantize, quantize_4bit  # noqa: E402
from minqlora.double_quant import DYNAMIC_MAP  # noqa: E402

SHAPES = {                                                         # (out_features, in_features)
    "falcon-7b qkv": (4672, 4544), "falcon-7b dense": (4544, 4544), "falcon-7b up": (18176, 4544), "falcon-7b down": (4544, 18176),
    "falcon-7b [qkv|up]": (22848, 4544), "falcon-7b [dense|down]": (4544, 22720),
    "llama-7b q": (4096, 4096), "llama-7b gate": (11008, 4096), "llama-7b down": (4096, 11008),
    "llama-65b q": (8192, 8192), "llama-65b gate": (22016, 8192), "llama-65b down": (8192, 22016),
}  # fmt: skip
ROWS = (1, 4, 16, 64, 512, 2048, 8192)
QUICK = {"shapes": ("falcon-7b qkv", "falcon-7b up"), "rows": (1, 16, 512)}
DEVICE, DTYPE = "cuda", torch.bfloat16
BLOCKSIZE, BLOCKSIZE2 = 64, 256
ROTATE = 200_000_000                                               # bytes of weights that the copies have together at least
WORST = 5e-3                                                       # error of a bfloat16 product that is not a mistake: three roundings


# --- Timing ---------------------------------------------------------------------------------------------------------------------------


def spread(times) -> list[float]:
    """Median, 20th and 80th percentile."""
    fifths = statistics.quantiles(times, n=5) if len(times) > 1 else times * 2
    return [statistics.median(times), fifths[0], fifths[-1]]


def prepare(call, copies: int, capture: bool = True, keep: bool = False):
    """A function that queues call(i) for i over the copies. What they return is kept if no two should write to the same memory."""
    for i in range(min(copies, 2)):
        call(i)                                                    # compiles
    torch.cuda.synchronize()

    def once():
        kept = []
        for i in range(copies):
            output = call(i)
            if keep:
                kept.append(output)
        return kept

    if not capture:
        return once
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = once()

    def replay(kept=kept):
        graph.replay()

    return replay


def time_in_turn(queued: dict[str, tuple], repeats: int = 15) -> dict[str, list[float]]:
    """Milliseconds of one call of each, from {name: (what prepare gave, its copies)}.

    They take turns: a product of milliseconds makes the chip hot and slow, and who always came second would pay for who came first.
    """
    times = {name: [] for name in queued}
    for repeat in range(repeats + 2):
        for name, (run, copies) in queued.items():
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            run()
            end.record()
            end.synchronize()
            if repeat >= 2:                                        # two to warm up
                times[name].append(begin.elapsed_time(end) / copies)
    return {name: spread(some) for name, some in times.items()}


def time_cpu(call) -> list[float]:
    begin = time.perf_counter()
    call()
    return spread([(time.perf_counter() - begin) * 1e3])


def peaks() -> dict:
    source, target = (torch.randint(0, 256, (2**30,), dtype=torch.uint8, device="cuda") for _ in range(2))
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = time_in_turn({"copy": (prepare(lambda i: target.copy_(source), 3, capture=False), 3),     # a graph copies otherwise, and slower
                          "product": (prepare(lambda i: a @ b, 5), 5)})
    return {"GB/s": 2 * source.nbytes / times["copy"][0] / 1e6, "TFLOP/s": 2 * 8192**3 / times["product"][0] / 1e9}


# --- What is compared -----------------------------------------------------------------------------------------------------------------


class Weight:
    """One shape: its weight in 16 bits and, quantized by us and by bitsandbytes, in 4 bits, in as many copies as the cache asks for."""

    def __init__(self, out_features: int, in_features: int):
        from bitsandbytes import functional

        self.shape, self.n = (out_features, in_features), out_features * in_features
        self.original = torch.randn(self.shape, device=DEVICE, dtype=DTYPE)
        self.code, self.code2 = NF4.to(DEVICE), DYNAMIC_MAP.to(DEVICE)
        packed, state = functional.quantize_4bit(self.original, blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4")
        absmax2, self.offset = state.state2.absmax, state.offset
        absmax = double_dequantize(state.absmax, absmax2, self.offset, BLOCKSIZE2)
        # The weight that the bytes stand for, without a rounding; products are compared with it.
        self.exact = self.code.double()[torch.stack([packed >> 4, packed & 15], -1).int().view(-1, BLOCKSIZE)] * absmax.double()[:, None]
        self.exact = self.exact.view(self.shape)

        self.copies4 = max(4, math.ceil(ROTATE / packed.nbytes))
        self.copies16 = max(3, math.ceil(ROTATE / self.original.nbytes))
        self.packed = [packed.clone() for _ in range(self.copies4)]
        self.absmax = [state.absmax.clone() for _ in range(self.copies4)]
        self.nested = (absmax2, self.offset, self.code2, BLOCKSIZE2)
        self.states = []                                           # bitsandbytes' way to hold absmax
        for absmax in self.absmax:
            own = copy.copy(state)
            own.absmax = absmax
            self.states.append(own)
        weight = functional.dequantize_4bit(packed, state).view(self.shape)
        self.dequantized = [weight.clone() for _ in range(self.copies16)]
        self.bytes4 = packed.nbytes + state.absmax.nbytes + absmax2.nbytes


def quantize(w: Weight):
    """Name, function of the copy, number of copies, how it is timed; and a check of ours."""
    from bitsandbytes import functional

    from minqlora.kernels.double_quant import double_quantize as double
    from minqlora.kernels.quantize_4bit import quantize_4bit as kernel

    originals = [w.original, *(w.original.clone() for _ in range(w.copies16 - 1))]

    def ours(i):
        packed, absmax = kernel(originals[i], NF4, BLOCKSIZE)      # the levels are wanted on the host
        return packed, *double(absmax, w.code2, BLOCKSIZE2)

    def theirs(i):
        return functional.quantize_4bit(originals[i], blocksize=BLOCKSIZE, compress_statistics=True, quant_type="nf4")

    def reference(i):
        packed, absmax = quantize_4bit(on_cpu, NF4, BLOCKSIZE)
        return packed, *double_quantize(absmax, BLOCKSIZE2)

    def check():
        packed, absmax, absmax2, offset = ours(0)
        wanted, state = theirs(0)
        pairs = {"packed": (packed, wanted), "absmax": (absmax, state.absmax), "absmax2": (absmax2, state.state2.absmax)}
        wrong = [name for name, pair in (pairs | {"offset": (offset, state.offset)}).items() if not torch.equal(*pair)]
        return f"not the bytes of bitsandbytes: {', '.join(wrong)}" if wrong else None

    on_cpu = w.original.cpu()
    moved = w.original.nbytes + w.bytes4
    contenders = [("ours", ours, w.copies16, "graph", check), ("bitsandbytes", theirs, w.copies16, "stream", None)]
    return [*contenders, ("reference", reference, 1, "cpu", None)], moved, 0, {}


def dequantize(w: Weight):
    from bitsandbytes import functional

    from minqlora.kernels.dequantize_4bit import dequantize_4bit as kernel

    def ours(i):
        return kernel(w.packed[i], w.absmax[i], w.shape, w.code, BLOCKSIZE, DTYPE, w.nested)

    def theirs(i):
        return functional.dequantize_4bit(w.packed[i], w.states[i])

    def reference(i):
        return dequantize_4bit(on_cpu[0], double_dequantize(*on_cpu[1:], BLOCKSIZE2), w.shape, NF4, BLOCKSIZE, DTYPE)

    def check():
        return None if torch.equal(ours(0).view(torch.uint8), theirs(0).view(torch.uint8)) else "not the bits of bitsandbytes"

    on_cpu = [x.cpu() for x in (w.packed[0], w.absmax[0], *w.nested[:2])]
    # Few copies are enough: what is written is large.
    copies = min(w.copies4, w.copies16 + 2)
    contenders = [("ours", ours, copies, "graph", check), ("bitsandbytes", theirs, copies, "graph", None)]
    return [*contenders, ("reference", reference, 1, "cpu", None)], w.bytes4 + w.original.nbytes, 0, {}


def product(w: Weight, rows: int, transposed: bool):
    """y = x W^T, or, transposed, dx = dy W."""
    import bitsandbytes
    from bitsandbytes import functional

    from minqlora.kernels import matmul_4bit

    out_features, in_features = w.shape
    x = torch.randn(rows, out_features if transposed else in_features, device=DEVICE, dtype=DTYPE)
    some = torch.cat([x[:32], x[-32:]]) if rows > 64 else x
    exact = some.double() @ (w.exact if transposed else w.exact.T)

    def ours(i):
        sizes = (out_features, in_features, BLOCKSIZE)
        if transposed:
            return torch.ops.minqlora.matmul_4bit_grad(x, w.packed[i], w.absmax[i], w.code, *sizes, *w.nested)
        return matmul_4bit.matmul_4bit(x, w.packed[i], w.absmax[i], w.code, *sizes, w.nested)

    def theirs(i):
        if transposed:                                             # the line of its backward
            return x @ functional.dequantize_4bit(w.packed[i], w.states[i])
        return bitsandbytes.matmul_4bit(x, w.packed[i], w.states[i])

    def cublas(i):
        return x @ (w.dequantized[i] if transposed else w.dequantized[i].T)

    def checked(call):
        def check():
            y = call(0)
            y = torch.cat([y[:32], y[-32:]]) if rows > 64 else y
            errors[call] = float((y.double() - exact).norm() / exact.norm())
            return None if errors[call] < WORST else f"error {errors[call]:.1e} is not below {WORST}"      # NaN is not

        return check

    errors = {}
    moved = x.nbytes * (in_features + out_features) // x.shape[1]
    calls = [("ours", ours, w.copies4), ("bitsandbytes", theirs, w.copies4), ("cuBLAS bf16", cublas, w.copies16)]
    if rows > 64:                                                  # cuBLAS or not, the weight is no longer what takes the time
        calls = [(name, call, min(copies, 4)) for name, call, copies in calls]
    return [(name, call, copies, "graph", checked(call)) for name, call, copies in calls], moved, 2 * rows * w.n, errors


# --- The table ------------------------------------------------------------------------------------------------------------------------


def measure(w: Weight, shape_name: str, what: str, rows: int | None, peak: dict):
    """One result for each contender."""
    case = {"shape": shape_name, "size": w.shape, "what": what, "rows": rows}
    try:
        if what == "quantize":
            contenders, moved, operations, errors = quantize(w)
        elif what == "dequantize":
            contenders, moved, operations, errors = dequantize(w)
        else:
            contenders, moved, operations, errors = product(w, rows, what == "grad of x")
    except Exception as error:
        yield case | {"who": "all", "failed": f"{type(error).__name__}: {error}"}
        return
    rows, queued = {}, {}
    for name, call, copies, how, check in contenders:
        rows[name] = row = case | {"who": name, "error": None, "timed": how}
        try:
            wrong = check() if check else None
            row["error"] = errors.get(call)
            if wrong:
                raise ValueError(wrong)
            if how == "cpu":
                row["ms"] = time_cpu(lambda call=call: call(0))
            else:
                queued[name] = prepare(call, copies, how == "graph", keep=what in ("quantize", "dequantize")), copies
        except Exception as error:                                 # recorded, and the others go on
            row["failed"] = f"{type(error).__name__}: {error}"
    try:
        for name, ms in time_in_turn(queued).items():
            rows[name]["ms"] = ms
    except RuntimeError as error:
        for name in queued:
            rows[name]["failed"] = f"RuntimeError: {error}"
    for name, row in rows.items():
        if "ms" in row:
            bytes_moved = moved + (0 if not operations else w.original.nbytes if name == "cuBLAS bf16" else w.bytes4)
            ms = row["ms"][0]
            row |= {"GB/s": bytes_moved / ms / 1e6, "TFLOP/s": operations / ms / 1e9 if operations else None}
            floor = max(bytes_moved / peak["GB/s"] / 1e6, operations / peak["TFLOP/s"] / 1e9)
            row |= {"bound": "bytes" if floor > operations / peak["TFLOP/s"] / 1e9 else "operations", "share": floor / ms}
        yield row


def line(row: dict) -> str:
    name = f"{row['shape']:<22} {row['what']:<10} {'M=' + str(row['rows']) if row['rows'] else '':<7} {row['who']:<12}"
    if "failed" in row:
        return f"{name} FAILED: {row['failed']}"
    ms, low, high = row["ms"]
    rate = f"{row['TFLOP/s']:6.1f} TFLOP/s" if row["bound"] == "operations" else f"{row['GB/s']:6.0f} GB/s   "
    error = f"{row['error']:.2e}" if row["error"] is not None else ""
    share = "" if row["timed"] == "cpu" else f"{row['share']:4.0%}"
    return f"{name} {ms:9.4f} ms ({low:.4f}-{high:.4f})  {rate} {share:>4}  {error:<8} {row['timed']}"


def summary(rows: list[dict]) -> str:
    """Ours in milliseconds, then each peer's time over ours: above 1, ours is faster."""
    table: dict = {}
    for row in rows:
        if "ms" in row:
            table.setdefault((row["shape"], row["what"], row["rows"]), {})[row["who"]] = row["ms"][0]
    lines = ["", f"{'milliseconds, and the time of the others over it':<44}     ours   bitsandbytes   cuBLAS bf16"]
    for (shape, what, count), ms in table.items():
        if "ours" in ms:
            others = [f"{ms[who] / ms['ours']:.2f}" if who in ms else "" for who in ("bitsandbytes", "cuBLAS bf16")]
            name = f"{shape:<22} {what:<10} {'M=' + str(count) if count else ''}"
            lines.append(f"{name:<44} {ms['ours']:8.4f} {others[0]:>14} {others[1]:>13}")
    return "\n".join(lines)


def plot(results: dict, path: Path):
    """Time over rows, a panel for each shape and direction; both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    products = [row for row in results["rows"] if row["rows"] and "ms" in row]
    timed = {row["shape"] for row in products}
    shapes = [name for name in ("falcon-7b qkv", "falcon-7b up", "falcon-7b down", "llama-65b gate") if name in timed]
    size = (3.6 * len(shapes) + 0.6, 6.4)
    figure, axes = pyplot.subplots(2, len(shapes), figsize=size, squeeze=False, sharex=True, layout="constrained")
    for column, shape in enumerate(shapes):
        for axis, what in zip(axes[:, column], ("forward", "grad of x"), strict=True):
            for who, style in (("ours", "o-"), ("bitsandbytes", "s--"), ("cuBLAS bf16", "^:")):
                points = [(r["rows"], r["ms"][0]) for r in products if (r["shape"], r["what"], r["who"]) == (shape, what, who)]
                axis.plot(*zip(*points, strict=True), style, label=who) if points else None
            axis.set(xscale="log", yscale="log", title=f"{shape}, {what}", xlabel="rows of x", ylabel="ms")
            ticks = sorted({r["rows"] for r in products})
            axis.set_xticks(ticks, [str(tick) for tick in ticks])
            axis.minorticks_off()
            decade = [digit * 10.0**power for power in range(-3, 2) for digit in (1, 2, 5)]
            low, high = axis.get_ylim()
            axis.set_yticks([y for y in decade if low <= y <= high], [f"{y:g}" for y in decade if low <= y <= high])
            axis.grid(alpha=0.3)
    axes[0, 0].legend()
    about = results["header"]
    figure.suptitle(f"{about['gpu']}, torch {about['torch']}, triton {about['triton']}, bitsandbytes {about['bitsandbytes']}", fontsize=10)
    figure.savefig(path, dpi=110)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="two shapes and three numbers of rows; writes no results unless told where")
    parser.add_argument("--plot", action="store_true", help="draw the chart beside the results (needs matplotlib)")
    parser.add_argument("--read", type=Path, help="take the results of an earlier run from this file")
    parser.add_argument("--output", type=Path, help="folder of the results; benchmarks/results by default")
    parser.add_argument("--commit", default="", help="what the header says where there is no git repository")
    options = parser.parse_args()
    if options.read:
        results = json.loads(options.read.read_text())
        print(summary(results["rows"]))
        if options.plot:
            plot(results, options.read.with_suffix(".png"))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/kernels.py times GPU kernels, and there is no CUDA device here.")
        return 0

    torch.manual_seed(0)
    peak = peaks()
    results = {"header": header(options.commit, peak=peak), "rows": []}
    where = about({key: value for key, value in results["header"].items() if key != "peak"})
    print(f"{where}\npeak: a copy {peak['GB/s']:.0f} GB/s, a bfloat16 product {peak['TFLOP/s']:.0f} TFLOP/s\n")
    shapes = {name: size for name, size in SHAPES.items() if not options.quick or name in QUICK["shapes"]}
    cases = [("quantize", None), ("dequantize", None)]
    cases += [(what, rows) for what in ("forward", "grad of x") for rows in (QUICK["rows"] if options.quick else ROWS)]
    for name, size in shapes.items():
        try:
            weight = Weight(*size)
        except Exception as error:
            results["rows"].append({"shape": name, "what": "all", "rows": None, "who": "all", "failed": f"{type(error).__name__}: {error}"})
            continue
        for what, rows in cases:
            for row in measure(weight, name, what, rows, peak):
                results["rows"].append(row)
                print(line(row), flush=True)
        del weight                                                 # the next one needs the memory

    print(summary(results["rows"]))
    if options.output or not options.quick:
        path = results_path("kernels", results["header"], options.output)
        write_results(path, results["header"], results["rows"])
        if options.plot:
            plot(results, path.with_suffix(".png"))
    failed = [row for row in results["rows"] if "failed" in row]
    for row in failed:
        print(line(row))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
