"""How fast, and in how much memory, does a Falcon train here and on the Hugging Face stack?

    python benchmarks/training.py                       # Falcon-7B, all rows, a table and a JSON file
    python benchmarks/training.py --rows 1x512 --stacks fused,kept --plot

Every stack trains the same thing: NF4 with double quantization, LoRA of rank 64 on all four linears of every block, adapters in float32,
computing in bfloat16, fused AdamW, the same batch shape, random weights and fresh random tokens, every token in the loss. Each stack runs
in a process of its own, one after the other, so that none pays for another's memory, and makes a new model for each batch shape.

    readable   falcon.py and lora.py as they stand, whole blocks checkpointed
    fused      fast.py and fast_loss.py: block inputs and LoRA columns are kept, and the products of the last blocks, as many of the 32 as
               BLOCKS_KEPT says; everything else is computed again. Steps of at most 4096 tokens are replayed
    kept       the same with the memory that is left over put to use (`keep_bytes`)
    hf         transformers + peft + bitsandbytes, gradient checkpointing, with the linears put into 4 bits by hand (hugging_face.py)
    dropout    fused, at the paper's dropout of 0.1
    bf16       fused, with adapters in bfloat16, which 8-bit AdamW takes
    hf16       hf in 16 bits, which is what asking transformers 5 for 4 gives: it passes over Falcon's linears in silence

The last three are measured at 16x512 alone.

Tokens/s is the median over the timed steps (p20-p80 beside it), from the end of one on the GPU to the end of the next: nobody waits in
between, as in training. Peak is the allocator's maximum; "device" is what the driver reports in use, context included.
The matrix rate of an 8192-cube bf16 product is measured in the same run.
"""

import argparse
import gc
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from common import (
    RESULTS,
    about,
    asked_apart,
    grouped_bars,
    header,
    leave_the_folder,
    results_path,
    rows_of_child,
    write_profile,
    write_results,
)
from hugging_face import attach_hf, make_hf, quantize_by_hand
from random_falcon import SHAPES, random_falcon

leave_the_folder()

from minqlora import add_lora  # noqa: E402
from minqlora.data import Batch  # noqa: E402
from minqlora.fast import fuse  # noqa: E402
from minqlora.fast_loss import GraphedLoss  # noqa: E402
from minqlora.optim import make_optimizer  # noqa: E402
from minqlora.train import answer_loss  # noqa: E402

DEVICE = "cuda"
ROWS = ("1x512", "4x512", "16x512", "1x2048", "4x2048")
BLOCKS_KEPT = {"1x512": 5, "4x512": 5, "16x512": 2, "1x2048": 5, "4x2048": 2}      # of the stack `fused`; another row keeps one
STACKS = ("readable", "fused", "kept", "dropout", "bf16", "hf", "hf16")
ONCE, ONE_ROW = ("dropout", "bf16", "hf16"), "16x512"


def tokens_of(row: str) -> tuple[int, int]:
    batch, length = row.split("x")
    return int(batch), int(length)


def stepper(new_loss, parameters, optimizer):
    """A function that takes one step and returns its loss, on the device."""

    def step():
        loss = new_loss()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return step


def our_step(args, row, stack):
    """A function that takes one step of ours on fresh tokens, and returns its loss on the device."""
    batch, length = tokens_of(row)
    dropout = 0.1 if stack == "dropout" else args.dropout
    adapters, optimizer = ("bfloat16", "adamw8bit") if stack == "bf16" else (args.adapters, args.optimizer)
    model = random_falcon(SHAPES[args.model], DEVICE)
    add_lora(model, rank=args.rank, alpha=16, dropout=dropout, dtype=getattr(torch, adapters))
    model.train()
    loss = answer_loss
    if stack == "readable":
        model.checkpointing = True
    else:
        blocks = fuse(model)
        a_block = batch * length * blocks[0].kept_width * 2
        spend = int(args.keep * 2**30) if stack == "kept" else BLOCKS_KEPT.get(row, 1) * a_block
        loss = GraphedLoss(model, fuse(model, spend, batch * length))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, optimizer, lr=2e-4)
    learned = torch.arange(batch * length, device=DEVICE).view(batch, length)[:, 1:].flatten()

    def new_loss():
        ids = torch.randint(model.config.vocab_size, (batch, length), device=DEVICE)
        return loss(model, Batch(ids, ids, learned=learned, attention_mask=None, tokens=batch * length)) / len(learned)

    return stepper(new_loss, parameters, optimizer)


def hf_step(args, row, stack):
    batch, length = tokens_of(row)
    model = make_hf(SHAPES[args.model], DEVICE)
    if stack == "hf":
        quantize_by_hand(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = attach_hf(model, args.rank, args.dropout).train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.data = parameter.data.float()
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)

    def new_loss():
        ids = torch.randint(model.config.vocab_size, (batch, length), device=DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            return model(input_ids=ids, labels=ids).loss

    return stepper(new_loss, parameters, optimizer)


def measure(args, row: str, stack: str) -> dict:
    """Warm up, then time single steps."""
    batch, length = tokens_of(row)
    began = time.perf_counter()
    step = (hf_step if stack.startswith("hf") else our_step)(args, row, stack)
    torch.cuda.synchronize()
    build = time.perf_counter() - began
    torch.cuda.empty_cache()                                         # what building the model left
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    losses = [step() for _ in range(args.warmup)]
    torch.cuda.synchronize()
    warm = time.perf_counter() - started
    ends = [torch.cuda.Event(enable_timing=True) for _ in range(args.steps + 1)]
    ends[0].record()
    for end in ends[1:]:
        losses.append(step())
        end.record()
    torch.cuda.synchronize()
    times = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(ends)]
    free, total = torch.cuda.mem_get_info()
    quantiles = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
    median = statistics.median(times)
    if args.profile:
        write_profile(step, args.output / f"profile-training-{stack}-{row}.txt")
    return {
        "row": row, "stack": stack, "tokens_per_second": batch * length / median,
        "p20": batch * length / quantiles[7], "p80": batch * length / quantiles[1], "ms": median * 1e3,
        "model_gb": base / 1e9, "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "device_gb": (total - free) / 1e9,
        "first_loss": losses[0].item(), "last_loss": losses[-1].item(), "build_s": build, "warmup_s": warm,
    }  # fmt: skip


COLUMNS = (f"{'batch':>8} {'stack':>9} {'tokens/s':>9} {'p20 - p80':>17} {'peak GB':>8} {'device GB':>9} {'of matrix rate':>14} "
           f"{'loss':>13}")  # fmt: skip


def matrix_share(head: dict, row: dict) -> float:
    """Of the matrix rate measured in the same run, what the operations that a step cannot do without take.

    Two operations a weight and token, for the forward and again for the gradient of x; the head's, and attention's. Not counted: what
    checkpointing computes again, LoRA, and the gradients of its matrices.
    """
    config, (_, length) = SHAPES[head["model"]], tokens_of(row["row"])
    heads = config.num_attention_heads + 2 * config.num_kv_heads
    weights = config.num_hidden_layers * config.hidden_size * (heads * config.head_dim + config.hidden_size + 2 * config.ffn_hidden_size)
    weights += config.vocab_size * config.hidden_size
    # Queries times keys and weights times values, for half of the pairs; and twice that in the backward.
    attention = 3 * config.num_hidden_layers * 2 * length * config.hidden_size
    return row["tokens_per_second"] * (4 * weights + attention) / head["bf16_tflops"] / 1e12


def line(head: dict, r: dict) -> str:
    if "failed" in r:
        return f"{r['row']:>8} {r['stack']:>9} {r['failed']}"
    return (f"{r['row']:>8} {r['stack']:>9} {r['tokens_per_second']:9,.0f} {r['p20']:8,.0f} {r['p80']:8,.0f} {r['peak_gb']:8.2f} "
            f"{r['device_gb']:9.2f} {matrix_share(head | r, r):14.1%} {r['first_loss']:6.3f}>{r['last_loss']:6.3f}")  # fmt: skip


def plot(head: dict, rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in rows if r["stack"] not in ONCE]
    names = list(dict.fromkeys(r["row"] for r in rows))
    stacks = [stack for stack in STACKS if any(r["stack"] == stack for r in rows)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, key, label in ((axes[0], "tokens_per_second", "tokens a second"), (axes[1], "peak_gb", "peak memory, GB")):
        values = {stack: {r["row"]: r.get(key, 0) for r in rows if r["stack"] == stack} for stack in stacks}
        grouped_bars(axis, names, values, ylabel=label, xlabel="batch x length")
    axes[0].legend(frameon=False)
    figure.suptitle(f"{head['model']}, QLoRA rank {head['rank']}, {head['gpu']}, torch {head['torch']}, {head['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="falcon-7b")
    parser.add_argument("--rows", default=",".join(ROWS), help="batch x length, comma-separated")
    parser.add_argument("--stacks", default=",".join(STACKS))
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--adapters", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--optimizer", default="adamw", choices=("adamw", "adamw8bit", "paged"))
    parser.add_argument("--keep", type=float, default=32.0, help="GiB that the stack `kept` may spend on activations")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="write a table of kernels for each row under results/")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of what is written")
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--read", type=Path, help="take the results of an earlier run from this file")
    parser.add_argument("--commit", default="", help="what the header says where git is not there")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)      # a child process: one row of one stack
    args = parser.parse_args()
    if args.read:
        results = json.loads(args.read.read_text())
        print("\n".join([about(results["header"]), COLUMNS, *[line(results["header"], row) for row in results["rows"]]]))
        if args.plot:
            plot(results["header"], results["rows"], args.read.with_suffix(".png"))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/training.py measures a GPU, and there is none here")
        return 1
    rows_of = {stack: [row for row in args.rows.split(",") if stack not in ONCE or row == ONE_ROW] for stack in args.stacks.split(",")}
    if args.one:
        for row in rows_of[args.stacks]:
            try:
                print(json.dumps(measure(args, row, args.stacks)), flush=True)
            except torch.OutOfMemoryError as error:
                print(json.dumps({"row": row, "stack": args.stacks, "failed": str(error).splitlines()[0][:200]}), flush=True)
            # A model with hooks and graphs is full of cycles; and cuBLAS keeps a workspace for every stream that graphs were captured on.
            gc.collect()
            torch._C._cuda_clearCublasWorkspaces()
            torch.cuda.empty_cache()
        return 0

    settings = {name: getattr(args, name) for name in ("model", "rank", "adapters", "optimizer", "dropout", "keep", "steps")}
    head, rows = header(args.commit, **settings, bf16_tflops=asked_apart("matrix_rate()")), []
    path = results_path("training", head, args.output)
    print(f"{about(head)}\n{COLUMNS}", flush=True)
    for stack, its_rows in rows_of.items():
        if not its_rows:
            print(f"{'':>8} {stack:>9} is measured at {ONE_ROW} alone", flush=True)
            continue
        for found in rows_of_child(__file__, [*sys.argv[1:], "--stacks", stack, "--one"]):
            rows.append({"row": "all", "stack": stack} | found)
            print(line(head, rows[-1]), flush=True)
            write_results(path, head, rows)
    if args.plot:
        plot(head, rows, path.with_suffix(".png"))
    return int(any("failed" in r for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
