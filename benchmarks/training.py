"""How fast, and in how much memory, does a Falcon train here and on the Hugging Face stack?

    python benchmarks/training.py                       # Falcon-7B, all rows, a table and a JSON file
    python benchmarks/training.py --rows 1x512 --stacks fused,kept --plot

Every stack trains the same thing: NF4 with double quantization, LoRA of rank 64 on all four linears of every block, adapters in float32,
computing in bfloat16, fused AdamW, the same batch shape, random weights and fresh random tokens, every token in the loss. Each stack runs
in a process of its own, one after the other, so that none pays for another's memory.

    readable   falcon.py and lora.py as they stand, whole blocks checkpointed
    fused      fast.py and fast_loss.py: only block inputs and the LoRA columns are kept; steps of at most 4096 tokens are replayed
    kept       the same with the memory that is left over put to use (`keep_bytes`)
    hf         transformers + peft + bitsandbytes, gradient checkpointing. transformers 5 leaves Falcon's linears in 16 bits
               (they are a subclass of nn.Linear), so they are replaced by hand here
    hf16       the same as it ships: asked for 4 bits, silently in 16

Tokens/s is the median over the timed steps (p20-p80 beside it), each ended by a synchronization. Peak is the allocator's maximum; "device"
is what the driver reports in use, context included. The matrix rate of an 8192-cube bf16 product is measured in the same run.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
ROWS = ("1x512", "4x512", "16x512", "1x2048", "4x2048")
STACKS = ("readable", "fused", "kept", "hf", "hf16")


def tokens_of(row: str) -> tuple[int, int]:
    batch, length = row.split("x")
    return int(batch), int(length)


def our_step(args, row, stack):
    """A function that takes one step of ours on fresh tokens, and returns its loss on the device."""
    from random_falcon import SHAPES, random_falcon

    from minqlora import add_lora
    from minqlora.data import Batch
    from minqlora.fast import fuse
    from minqlora.fast_loss import GraphedLoss
    from minqlora.optim import make_optimizer
    from minqlora.train import answer_loss

    batch, length = tokens_of(row)
    model = random_falcon(SHAPES[args.model])
    add_lora(model, rank=args.rank, alpha=16, dropout=args.dropout, dtype=getattr(torch, args.adapters))
    model.train()
    loss = answer_loss
    if stack == "readable":
        model.checkpointing = True
    else:
        loss = GraphedLoss(model, fuse(model, keep_bytes=int(args.keep * 2**30) if stack == "kept" else 0))
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, args.optimizer, lr=2e-4)
    learned = torch.arange(batch * length, device="cuda").view(batch, length)[:, 1:].flatten()

    def step():
        ids = torch.randint(model.config.vocab_size, (batch, length), device="cuda")
        total = loss(model, Batch(ids, ids, learned=learned, attention_mask=None, tokens=batch * length)) / len(learned)
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.detach()

    return step


def hf_step(args, row, stack):
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model
    from random_falcon import SHAPES
    from transformers import FalconConfig, FalconForCausalLM

    batch, length = tokens_of(row)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda"):
        model = FalconForCausalLM(FalconConfig(**{k: v for k, v in SHAPES[args.model].to_json().items() if v is not None}))
    torch.set_default_dtype(torch.float32)
    if stack == "hf":
        for block in model.transformer.h:
            for parent, name in (
                (block.self_attention, "query_key_value"), (block.self_attention, "dense"),
                (block.mlp, "dense_h_to_4h"), (block.mlp, "dense_4h_to_h"),
            ):  # fmt: skip
                old = getattr(parent, name)
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(old.weight.data.cpu(), requires_grad=False, compress_statistics=True, quant_type="nf4")
                setattr(parent, name, new.cuda())
        torch.cuda.empty_cache()
    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.enable_input_require_grads()
    model = get_peft_model(model, LoraConfig(r=args.rank, lora_alpha=16, lora_dropout=args.dropout, target_modules=targets))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    model.train()
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-4, fused=True)

    def step():
        ids = torch.randint(65024, (batch, length), device="cuda")
        with torch.autocast("cuda", torch.bfloat16):
            total = model(input_ids=ids, labels=ids).loss
        total.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return total.detach()

    return step


def measure(args, row: str, stack: str) -> dict:
    """Warm up, then time single steps."""
    batch, length = tokens_of(row)
    step = (hf_step if stack.startswith("hf") else our_step)(args, row, stack)
    torch.cuda.synchronize()
    base = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    losses = [step() for _ in range(args.warmup)]
    torch.cuda.synchronize()
    warm = time.perf_counter() - started
    times = []
    for _ in range(args.steps):
        started = time.perf_counter()
        losses.append(step())
        torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    free, total = torch.cuda.mem_get_info()
    quantiles = statistics.quantiles(times, n=10) if len(times) > 1 else [times[0]] * 9
    median = statistics.median(times)
    if args.profile:
        profile(step, RESULTS / f"profile-{stack}-{row}.txt")
    return {
        "row": row, "stack": stack, "tokens_per_second": batch * length / median,
        "p20": batch * length / quantiles[7], "p80": batch * length / quantiles[1], "ms": median * 1e3,
        "model_gb": base / 1e9, "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "device_gb": (total - free) / 1e9,
        "first_loss": losses[0].item(), "last_loss": losses[-1].item(), "warmup_s": warm,
    }  # fmt: skip


def profile(step, path: Path) -> None:
    """Where a step goes, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as run:
        step()
        torch.cuda.synchronize()
    path.parent.mkdir(exist_ok=True)
    path.write_text(run.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=90))


def matrix_rate() -> float:
    """TFLOP/s of an 8192-cube product in bfloat16, random data, median of 20."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    times = []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        a @ b
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 8192**3 / statistics.median(times[5:]) / 1e9


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def header(commit: str) -> dict:
    """Where and with what this was measured. `commit` is what to say where git is not there."""
    import triton

    commit = output_of("git", "-C", str(Path(__file__).parent), "rev-parse", "--short", "HEAD") or commit
    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name(), "driver": driver, "torch": torch.__version__, "triton": triton.__version__,
        "commit": commit, "date": date.today().isoformat(), "bf16_tflops": matrix_rate(),
    }  # fmt: skip


def print_table(head: dict, rows: list[dict]) -> None:
    print("  ".join(f"{key} {value:.0f}" if isinstance(value, float) and value > 1 else f"{key} {value}" for key, value in head.items()))
    print(f"{'batch':>8} {'stack':>9} {'tokens/s':>9} {'p20 - p80':>17} {'peak GB':>8} {'device GB':>9} {'loss':>13}")
    for r in rows:
        if "error" in r:
            print(f"{r['row']:>8} {r['stack']:>9} {r['error']}")
            continue
        print(f"{r['row']:>8} {r['stack']:>9} {r['tokens_per_second']:9,.0f} {r['p20']:8,.0f} {r['p80']:8,.0f} "
              f"{r['peak_gb']:8.2f} {r['device_gb']:9.2f} {r['first_loss']:6.3f}>{r['last_loss']:6.3f}")  # fmt: skip


def plot(head: dict, rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(r["row"] for r in rows))
    stacks = [stack for stack in STACKS if any(r["stack"] == stack for r in rows)]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, key, label in ((axes[0], "tokens_per_second", "tokens a second"), (axes[1], "peak_gb", "peak memory, GB")):
        for i, stack in enumerate(stacks):
            found = {r["row"]: r.get(key, 0) for r in rows if r["stack"] == stack}
            places = [j + 0.8 * i / len(stacks) for j in range(len(names))]
            axis.bar(places, [found.get(name, 0) for name in names], 0.8 / len(stacks), label=stack)
        axis.set_xticks([j + 0.4 - 0.4 / len(stacks) for j in range(len(names))], names)
        axis.set_ylabel(label)
        axis.spines[["top", "right"]].set_visible(False)
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
    parser.add_argument("--keep", type=float, default=24.0, help="GiB that the stack `kept` may spend on activations")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--steps", type=int, default=7)
    parser.add_argument("--profile", action="store_true", help="write a table of kernels for each row under results/")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", action="store_true")
    parser.add_argument("--commit", default="", help="what the header says where git is not there")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)      # a child process: one row of one stack
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/training.py measures a GPU, and there is none here")
        return 1
    if args.one:
        print(json.dumps(measure(args, args.rows, args.stacks)))
        return 0

    settings = {name: getattr(args, name) for name in ("model", "rank", "adapters", "optimizer", "dropout", "steps")}
    head, rows = header(args.commit) | settings, []
    for row in args.rows.split(","):
        for stack in args.stacks.split(","):
            child = [sys.executable, __file__, *sys.argv[1:], "--rows", row, "--stacks", stack, "--one"]
            done = subprocess.run(child, capture_output=True, text=True)
            if done.returncode:
                reason = (done.stderr.strip().splitlines() or ["died without a word"])[-1]
                rows.append({"row": row, "stack": stack, "error": reason[:200]})
                print(done.stderr[-2000:], file=sys.stderr)
            else:
                rows.append(json.loads(done.stdout.splitlines()[-1]))
    print_table(head, rows)
    path = args.json or RESULTS / f"training-{head['gpu'].replace(' ', '-')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"header": head, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(head, rows, path.with_suffix(".png"))
    return int(any("error" in r for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
