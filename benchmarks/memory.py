"""How large a Falcon can be fine-tuned in how much memory, and does --plan know it beforehand?

    python benchmarks/memory.py                                    # the rows whose cap this device has: a table and a JSON file
    python benchmarks/memory.py --rows falcon-40b@24GiB

A row is a model and a cap on what the device reports in use, context included. Each runs in a process of its own, in which torch's
allocator is given the cap less the context and fails beyond it. The model is made in 4 bits layer by layer, with random weights of the
real shape (LLaMA's sizes are Falcons of its width, depth and parameter count); rank 64 on all linears, dropout 0, the fused blocks of
fast.py. A few real steps are taken on one batch of random tokens, so that the loss can fall.

    allocated   the allocator's maximum, measured and as plan.py has it
    device      what the driver reports in use at the end: allocated, the allocator's gaps, the context

Below the table stands each row's ledger: the parts that stay, counted from the tensors themselves, and what comes and goes, which is the
rest of the peak.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")            # before torch: segments grow, and leave smaller gaps

import torch
from common import RESULTS, about, asked_apart, header, leave_the_folder, results_path, rows_of_child, write_results
from random_falcon import SHAPES, random_falcon

leave_the_folder()

from minqlora import add_lora  # noqa: E402
from minqlora.activations import Flags  # noqa: E402
from minqlora.data import Batch  # noqa: E402
from minqlora.fast import fuse  # noqa: E402
from minqlora.fast_loss import fused_loss  # noqa: E402
from minqlora.optim import make_optimizer  # noqa: E402
from minqlora.plan import CONTEXT, parameter_count, parse_memory, plan  # noqa: E402

# name: batch x length, adapters, optimizer.
ROWS = {
    "falcon-7b@6.5GB": ("1x512", "bfloat16", "paged"),
    "falcon-7b@16GB": ("16x512", "float32", "adamw"),
    "llama-33B@24GB": ("1x512", "float32", "adamw8bit"),
    "llama-65B@48GB": ("1x512", "float32", "adamw"),
    "llama-65B@42GB": ("1x512", "bfloat16", "adamw8bit"),
    "falcon-40b@24GiB": ("1x512", "bfloat16", "paged"),
    "falcon-180B@141GB": ("1x512", "float32", "adamw"),
}
RANK = 64


def flags_of(row: str):
    shape, adapters, optimizer = ROWS[row]
    batch, length = map(int, shape.split("x"))
    return Flags(batch_size=batch, length=length, accumulate=1, rank=RANK, dropout=0.0, adapter_dtype=getattr(torch, adapters),
                 optimizer=optimizer, fused=True)


def in_use() -> int:
    free, total = torch.cuda.mem_get_info()
    return total - free


def measure(row: str, steps: int) -> dict:
    name, cap = row.split("@")
    cap, config, flags = parse_memory(cap), SHAPES[name], flags_of(row)
    torch.cuda.init()
    torch.cuda.set_per_process_memory_fraction(min(1.0, (cap - CONTEXT) / torch.cuda.get_device_properties(0).total_memory))
    started = time.perf_counter()
    model = random_falcon(config)
    add_lora(model, rank=RANK, alpha=16, dropout=0.0, dtype=flags.adapter_dtype).train()
    fuse(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(parameters, flags.optimizer, lr=2e-4)
    torch.cuda.synchronize()
    built = time.perf_counter() - started

    ids = torch.randint(config.vocab_size, (flags.batch_size, flags.length), device="cuda")
    learned = torch.arange(ids.numel(), device="cuda").view_as(ids)[:, 1:].flatten()
    batch = Batch(ids, ids, learned, None, ids.numel())
    losses, times = [], []
    for _ in range(steps):
        # The first step loads kernels and makes the optimizer's states.
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        loss = fused_loss(model, batch) / len(learned)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.3)
        optimizer.step()
        gradients = sum(p.grad.nbytes for p in parameters)
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
        times.append(time.perf_counter() - started)
    peak, device = torch.cuda.max_memory_allocated(), in_use()

    stays = {"weights in 4 bits": 0, "absmax": 0, "embeddings, norms": 0, "adapters": sum(p.nbytes for p in parameters)}
    seen = set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if tensor.data_ptr() in seen or tensor.requires_grad or not tensor.is_cuda:
            continue
        seen.add(tensor.data_ptr())
        packed = tensor.dtype == torch.uint8 and key.endswith("weight")
        stays["weights in 4 bits" if packed else "absmax" if "weight." in key else "embeddings, norms"] += tensor.nbytes
    states = [t for state in optimizer.state.values() for t in state.values() if torch.is_tensor(t) and t.is_cuda]
    states += [window for _, window in getattr(optimizer, "windows", [])]
    stays["optimizer states"] = sum(t.nbytes for t in states)
    ledger = plan(config, flags)
    return {
        "row": row, "parameters": parameter_count(config), "batch": ROWS[row][0], "adapters": ROWS[row][1], "optimizer": flags.optimizer,
        "cap": cap, "peak": peak, "planned": ledger.allocated, "device": device, "planned_device": ledger.total,
        "gaps": torch.cuda.memory_reserved() - peak, "context": device - torch.cuda.memory_reserved(),
        "losses": losses, "tokens_per_second": ids.numel() / statistics.median(times[1:]), "seconds_to_build": built,
        "stays": stays, "gradients": gradients, "comes and goes": peak - sum(stays.values()),
        "planned stays": ledger.resident, "planned moment": ledger.moments[ledger.peak], "moment": ledger.peak,
    }  # fmt: skip


COLUMNS = (f"{'model@cap':<20}{'batch':>7} {'adapters':<9} {'optimizer':<10}{'allocated GB':>13}{'planned':>9}{'off':>7}{'device GB':>11}"
           f"{'fits':>6}{'tokens/s':>10}  loss")  # fmt: skip


def line(r: dict) -> str:
    if "failed" in r:
        return f"{r['row']:<20} {r['failed']}"
    return (f"{r['row']:<20}{r['batch']:>7} {r['adapters']:<9} {r['optimizer']:<10}{r['peak'] / 1e9:>13.2f}{r['planned'] / 1e9:>9.2f}"
            f"{r['planned'] / r['peak'] - 1:>7.1%}{r['device'] / 1e9:>11.2f}{'yes' if r['device'] <= r['cap'] else 'NO':>6}"
            f"{r['tokens_per_second']:>10,.0f}  {r['losses'][0]:.3f} > {r['losses'][-1]:.3f}")  # fmt: skip


def ledger_lines(r: dict) -> list[str]:
    def parts(*some: dict) -> str:
        return ", ".join(f"{name} {size / 1e9:.3f}" for part in some for name, size in part.items())

    comes = {"comes and goes": r["comes and goes"], "gaps": r["gaps"], "context": r["context"]}
    return ["", f"{r['row']}, GB: {parts(r['stays'], comes)}",
            f"    planned, in the {r['moment']}: {parts(r['planned stays'], r['planned moment'])}"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", help=f"some of {', '.join(ROWS)}; by default those whose cap this device has")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of what is written")
    parser.add_argument("--commit", default="", help="what the header says where git is not there")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)      # a child process: one row
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/memory.py measures a GPU, and there is none here")
        return 1
    if args.one:
        print(json.dumps(measure(args.rows, args.steps)))
        return 0
    there = asked_apart("torch.cuda.get_device_properties(0).total_memory")
    chosen = args.rows.split(",") if args.rows else [row for row in ROWS if parse_memory(row.split("@")[1]) <= there]
    for row in chosen:
        if row not in ROWS:
            parser.error(f"--rows {row} is not one of {', '.join(ROWS)}")
    rows, head = [], header(args.commit, rank=RANK, steps=args.steps)
    path = results_path("memory", head, args.output)
    print(f"{about(head)}\n{COLUMNS}", flush=True)
    for row in chosen:
        for found in rows_of_child(__file__, ["--rows", row, "--steps", str(args.steps), "--one"]):
            rows.append({"row": row} | found)
            print(line(rows[-1]), flush=True)
            write_results(path, head, rows)
    for row in rows:
        if "failed" not in row:
            print("\n".join(ledger_lines(row)))
    return int(any("failed" in r for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
