"""How fast does Falcon-7B answer in 4 bits, here and on the Hugging Face stack, and how far is that from what the memory allows?

    python benchmarks/decode.py                   every row of every stack: a table and a JSON file, in about five minutes
    python benchmarks/decode.py --quick --profile fewer rows; and where a step goes, by kernel
    python benchmarks/decode.py --plot            and a chart; with --read FILE of an earlier run, without a GPU

Random weights of the published shape, random prompts, greedy, no eos. Each stack runs in a process of its own:

    ours, ours+lora     NF4 with double quantization; without and with an adapter of rank 64 on all linears, attached, not merged
    ours-serial         ours on one stream: attention's chain after the MLP's instead of beside it
    ours16              the same decoder over bfloat16 weights
    hf, hf+lora         transformers + bitsandbytes (+ peft). transformers 5 leaves Falcon's linears in 16 bits (they are a subclass of
                        nn.Linear), so they are replaced by hand here

A row is batch x prompt. `first token` is the time of generate() for one token: reading the prompt. `tokens/s` is the batch over the time
of one more token: that of generate() for many, less that for one, over their number; median of the repeats (p20-p80 from the long
runs). The floor of a step is what it has to read, weights and head and the filled part of the cache, over the bandwidth of a copy
of 1 GiB timed in the same run; `of floor` is floor over time.

`error` is |logits - exact| / |exact| over 32 steps of the shape's first 4 layers, all stacks with the same weights and tokens; exact
is the dequantized model in float32. `plain` is falcon.py with its cache in bfloat16.
"""

import argparse
import copy
import dataclasses
import datetime
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch  # noqa: E402
from random_falcon import SHAPES, random_falcon  # noqa: E402

# Python puts this folder first on its path, and its kernels.py would then be the package `kernels` that bitsandbytes asks for.
sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]

from minqlora import add_lora, generate, merge_lora  # noqa: E402
from minqlora.fast_decode import DECODERS, Decoder  # noqa: E402
from minqlora.lora import adapters  # noqa: E402
from minqlora.qlora import quantize_linears  # noqa: E402

ROWS = ("1x128", "4x128", "16x128", "64x128", "1x512", "1x2048")
QUICK_ROWS = ("1x128", "16x128", "1x512", "1x2048")
STACKS = {"ours": ("ours", "ours-serial", "ours+lora"), "ours16": ("ours16",), "hf": ("hf", "hf+lora")}    # process -> what it measures
RANK = 64
DEVICE, DTYPE = "cuda", torch.bfloat16


def shape(args):
    """The published shape with room for 2048 tokens and an answer; nothing else depends on the number of positions."""
    return dataclasses.replace(SHAPES[args.model], max_position_embeddings=4096)


# --- The two stacks: how a model is made, and how it is asked ---------------------------------------------------------------------------


def attach(model) -> None:
    add_lora(model, rank=RANK, alpha=16)
    for adapter in adapters(model).values():
        torch.nn.init.normal_(adapter.lora_B, std=0.02)


def ask_ours(model, ids, new):
    generate(model, ids, max_new_tokens=new)


def ask_on_one_stream(model, ids, new):
    batch, length = len(ids), ids.shape[1] + new
    known = DECODERS.get(model)
    if known is None or known.stream is not None or not known.fits(model, batch, length):
        DECODERS[model] = Decoder(model, batch, length)
        DECODERS[model].stream = None
    ask_ours(model, ids, new)


def quantize_by_hand(model) -> None:
    """What load_in_4bit says and does not do."""
    import bitsandbytes as bnb

    for block in model.transformer.h:
        for parent, name in (
            (block.self_attention, "query_key_value"), (block.self_attention, "dense"),
            (block.mlp, "dense_h_to_4h"), (block.mlp, "dense_4h_to_h"),
        ):  # fmt: skip
            old = getattr(parent, name)
            new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=DTYPE, quant_type="nf4")
            new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, compress_statistics=True, quant_type="nf4")
            setattr(parent, name, new.to(DEVICE))
            old.weight.data = torch.empty(0)


def make_hf(config):
    from transformers import FalconConfig, FalconForCausalLM

    torch.set_default_dtype(DTYPE)
    with torch.device(DEVICE):
        model = FalconForCausalLM(FalconConfig(**{key: value for key, value in config.to_json().items() if value is not None}))
    torch.set_default_dtype(torch.float32)
    return model.eval()


def attach_hf(model):
    from peft import LoraConfig, get_peft_model

    targets = ["query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"]
    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=16, lora_dropout=0.0, target_modules=targets)).eval()


def ask_hf(model, ids, new):
    # Falcon's own eos never ends a random answer early.
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0
    )


# --- Measuring --------------------------------------------------------------------------------------------------------------------------


def seconds(call) -> float:
    torch.cuda.synchronize()
    started = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - started


def copy_bandwidth() -> float:
    """Bytes a second that a copy of 1 GiB reads and writes: median of 20."""
    source = torch.empty(2**30, dtype=torch.uint8, device=DEVICE)
    target, times = torch.empty_like(source), []
    for _ in range(25):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        target.copy_(source)
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return 2 * 2**30 / statistics.median(times[5:]) * 1e3


def bytes_of_a_step(config, batch: int, filled: float, lora: bool, bits: float) -> float:
    """What a step of a Falcon with a tied head must read: linears, head, adapter in 2 bytes a value, and the filled cache."""
    hidden, ffn, width = config.hidden_size, config.ffn_hidden_size, config.head_dim
    qkv = (config.num_attention_heads + 2 * config.num_kv_heads) * width
    linears = [(hidden, qkv), (hidden, hidden), (hidden, ffn), (ffn, hidden)]
    a_layer = sum(a * b * bits / 8 + lora * RANK * (a + b) * 2 for a, b in linears)
    cache = 2 * config.num_kv_heads * width * 2 * batch * filled
    return config.num_hidden_layers * (a_layer + cache) + 2 * config.vocab_size * hidden


def measure_rows(args, stack: str, model, ask) -> list[dict]:
    config, rows = shape(args), []
    bits = 16 if stack == "ours16" else 4 + 8 / 64 + 32 / (64 * 256)
    new = args.tokens if stack.startswith("ours") else min(args.tokens, args.hf_tokens)
    for row in args.rows.split(","):
        batch, prompt = map(int, row.split("x"))
        ids = torch.randint(config.vocab_size, (batch, prompt), device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        ask(model, ids, new)                                           # compiles, records, allocates
        torch.cuda.synchronize()
        warm = time.perf_counter() - started
        ask(model, ids, 1)
        first = [seconds(lambda: ask(model, ids, 1)) for _ in range(args.repeats)]             # noqa: B023 (called at once)
        whole = [seconds(lambda: ask(model, ids, new)) for _ in range(args.repeats)]           # noqa: B023
        once = statistics.median(first)
        steps = sorted((t - once) / (new - 1) for t in whole)
        step = statistics.median(steps)
        low, high = steps[round(0.2 * (len(steps) - 1))], steps[round(0.8 * (len(steps) - 1))]
        rows.append({
            "row": row, "stack": stack, "first_token_ms": once * 1e3, "step_ms": step * 1e3, "tokens_per_second": batch / step,
            "p20": batch / high, "p80": batch / low, "bytes": bytes_of_a_step(config, batch, prompt + new / 2, "lora" in stack, bits),
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "warmup_s": warm,
        })  # fmt: skip
    if args.profile:
        ids = torch.randint(config.vocab_size, (1, 128), device=DEVICE)
        profile(lambda: ask(model, ids, 17), args.output / f"profile-decode-{stack}.txt")
    return rows


@torch.no_grad()
def measure(args, process: str) -> list[dict]:
    """All rows of what one process measures."""
    torch.manual_seed(0)
    config, rows = shape(args), []
    if process == "error":
        return errors(config)
    for stack in STACKS[process]:
        if stack not in args.stacks.split(","):
            continue
        if process != "hf":
            if not rows:
                model = random_falcon(config, DEVICE, DTYPE, quantize=process == "ours").eval()
            if "lora" in stack:
                attach(model)
                model.eval()
            rows += measure_rows(args, stack, model, ask_on_one_stream if stack == "ours-serial" else ask_ours)
        else:
            if not rows:
                model = make_hf(config)
                quantize_by_hand(model)
                torch.cuda.empty_cache()
            rows += measure_rows(args, stack, attach_hf(model) if "lora" in stack else model, ask_hf)
    if process == "ours":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        cache = model.new_cache(1, 8192)
        rows.append({"row": "cache of 8192 tokens", "stack": "ours", "cache_bytes": torch.cuda.memory_allocated() - before})
        del cache
    return rows


def errors(config) -> list[dict]:
    config, prompt, new = dataclasses.replace(config, num_hidden_layers=4), 64, 32
    plain16 = random_falcon(config, DEVICE, DTYPE, quantize=False)
    ids = torch.randint(config.vocab_size, (2, prompt + new), device=DEVICE)

    def step_by_step(ask):
        return torch.stack([ask(ids[:, i : i + 1])[:, -1] for i in range(prompt, prompt + new)], dim=1).float()

    def off(logits, exact):
        return ((logits - exact).norm() / exact.norm()).item()

    rows = []
    for adapter in (False, True):
        model = quantize_linears(copy.deepcopy(plain16)).eval()
        if adapter:
            attach(model)
            model.eval()
        exact = merge_lora(copy.deepcopy(model), torch.float32)(ids)[:, prompt:]
        cache = model.new_cache(2, prompt + new)
        model(ids[:, :prompt], None, cache)
        suffix = "+lora" if adapter else ""
        rows.append({"stack": "plain" + suffix, "error": off(step_by_step(lambda column: model(column, None, cache)), exact)})    # noqa: B023

        decoder = Decoder(model, 2, prompt + new)
        decoder.refresh()
        decoder.prefill(model, ids[:, :prompt], None)

        def recorded(column):
            decoder.ids.copy_(column[:, 0])                            # noqa: B023 (called at once)
            return decoder.step(model)[:, None].clone()                # noqa: B023

        rows.append({"stack": "ours" + suffix, "error": off(step_by_step(recorded), exact)})
        if not adapter:
            theirs = make_hf(config)
            theirs.load_state_dict(plain16.state_dict())
            quantize_by_hand(theirs)
            past = theirs(ids[:, :prompt], use_cache=True).past_key_values
            logits = step_by_step(lambda column: theirs(column, past_key_values=past, use_cache=True).logits)    # noqa: B023
            rows.append({"stack": "hf", "error": off(logits, exact)})
    return rows


def profile(call, path: Path) -> None:
    """Where 16 steps and a prompt of 128 tokens go, by kernel."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as torch_profile

    with torch_profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as run:
        call()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run.key_averages().table(sort_by="cuda_time_total", row_limit=40, max_name_column_width=80))


# --- The report -------------------------------------------------------------------------------------------------------------------------


def output_of(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True).stdout.strip()


def header(args) -> dict:
    from importlib.metadata import version

    driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return {
        "gpu": torch.cuda.get_device_name(), "driver": driver.splitlines()[0], "torch": torch.__version__,
        **{name: version(name) for name in ("triton", "transformers", "bitsandbytes", "peft")},
        "commit": args.commit or output_of("git", "-C", str(HERE), "rev-parse", "--short", "HEAD"),
        "date": datetime.date.today().isoformat(), "model": args.model, "tokens": args.tokens, "hf_tokens": args.hf_tokens,
        "repeats": args.repeats, "copy_gb_per_second": copy_bandwidth() / 1e9,
    }  # fmt: skip


def table(head: dict, rows: list[dict]) -> str:
    lines = ["  ".join(f"{key} {value:.0f}" if isinstance(value, float) else f"{key} {value}" for key, value in head.items()), ""]
    columns = {"row": 8, "stack": 10, "tokens/s": 9, "p20 - p80": 17, "step ms": 8, "of floor": 8, "first token ms": 14, "peak GB": 8}
    lines.append(" ".join(f"{name:>{width}}" for name, width in columns.items()))
    for r in rows:
        if "failed" in r:
            lines.append(f"{r['row']:>8} {r['stack']:>10} {r['failed']}")
        elif "step_ms" in r:
            share = r["bytes"] / head["copy_gb_per_second"] / 1e6 / r["step_ms"]
            lines.append(f"{r['row']:>8} {r['stack']:>10} {r['tokens_per_second']:9,.1f} {r['p20']:8,.1f} {r['p80']:8,.1f} "
                         f"{r['step_ms']:8.3f} {share:8.1%} {r['first_token_ms']:14.1f} {r['peak_gb']:8.2f}")  # fmt: skip
    lines += [f"error of {r['stack']:>10}: {r['error']:.2e}" for r in rows if "error" in r]
    lines += [f"{r['row']}: {r['cache_bytes'] / 1e6:.1f} MB" for r in rows if "cache_bytes" in r]
    return "\n".join(lines)


def plot(head: dict, rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stacks = [stack for process in STACKS.values() for stack in process if any(r["stack"] == stack and "step_ms" in r for r in rows)]
    timed = [r for r in rows if "step_ms" in r]
    names = list(dict.fromkeys(r["row"] for r in timed))
    panels = (("tokens_per_second", "tokens a second", [n for n in names if n.endswith("x128")]),
              ("first_token_ms", "time to the first token, ms", [n for n in names if n.startswith("1x")]))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, (key, label, shown) in zip(axes, panels, strict=True):
        for i, stack in enumerate(stacks):
            found = {r["row"]: r[key] for r in timed if r["stack"] == stack}
            places, heights = [j + 0.8 * i / len(stacks) for j in range(len(shown))], [found.get(name, 0) for name in shown]
            axis.bar(places, heights, 0.8 / len(stacks), label=stack)
        axis.set_xticks([j + 0.4 - 0.4 / len(stacks) for j in range(len(shown))], shown)
        axis.set(ylabel=label, xlabel="batch x prompt", yscale="log")
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False)
    figure.suptitle(f"{head['model']} decoding, {head['gpu']}, torch {head['torch']}, {head['date']}", fontsize=10)
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    flag = parser.add_argument
    flag("--quick", action="store_true", help="four rows, fewer tokens and repeats, no hf+lora")
    flag("--model", default="falcon-7b")
    flag("--rows", help="batch x prompt, comma-separated")
    flag("--stacks", help="of " + ", ".join(stack for process in STACKS.values() for stack in process))
    flag("--tokens", type=int, help="of an answer of ours")
    flag("--hf-tokens", type=int, help="of theirs, which take longer")
    flag("--repeats", type=int)
    flag("--profile", action="store_true", help="write a table of kernels for each stack")
    flag("--plot", action="store_true")
    flag("--read", type=Path, help="take the results of an earlier run from this file")
    flag("--output", type=Path, default=HERE / "results", help="folder of what is written")
    flag("--commit", default="", help="what the header says where git is not there")
    flag("--one", help=argparse.SUPPRESS)                              # a child process: what it measures
    args = parser.parse_args()
    if args.read:
        results = json.loads(args.read.read_text())
        print(table(results["header"], results["rows"]))
        if args.plot:
            plot(results["header"], results["rows"], args.read.with_suffix(".png"))
        return 0
    if not torch.cuda.is_available():
        print("benchmarks/decode.py measures a GPU, and there is none here")
        return 1
    every = [stack for process in STACKS.values() for stack in process]
    args.rows = args.rows or ",".join(QUICK_ROWS if args.quick else ROWS)
    args.stacks = args.stacks or ",".join(stack for stack in every if not (args.quick and stack == "hf+lora"))
    args.tokens = args.tokens or (65 if args.quick else 129)
    args.hf_tokens = args.hf_tokens or (17 if args.quick else 33)
    args.repeats = args.repeats or (3 if args.quick else 7)
    unknown = set(args.stacks.split(",")) - set(every)
    if unknown:
        raise SystemExit(f"--stacks: {', '.join(sorted(unknown))} unknown; there are {', '.join(every)}")
    if args.one:
        print(json.dumps(measure(args, args.one)))
        return 0

    head, rows = header(args), []
    torch.cuda.empty_cache()
    for process in (*STACKS, "error"):
        if process != "error" and not set(STACKS[process]) & set(args.stacks.split(",")):
            continue
        done = subprocess.run([sys.executable, __file__, *sys.argv[1:], "--one", process], capture_output=True, text=True)
        if done.returncode:
            reason = (done.stderr.strip().splitlines() or ["died without a word"])[-1]
            rows.append({"row": "all", "stack": process, "failed": reason[:200]})
            print(done.stderr[-3000:], file=sys.stderr)
        else:
            rows += json.loads(done.stdout.splitlines()[-1])
    print(table(head, rows))
    args.output.mkdir(parents=True, exist_ok=True)
    path = args.output / f"decode-{head['gpu'].replace('NVIDIA', '').split()[0].lower()}.json"
    path.write_text(json.dumps({"header": head, "rows": rows}, indent=1) + "\n")
    if args.plot:
        plot(head, rows, path.with_suffix(".png"))
    return int(any("failed" in r for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
