"""How fast does Falcon-7B answer in 4 bits, here and on the Hugging Face stack, and how far is that from what the memory allows?

    python benchmarks/decode.py                   every row of every stack: a table and a JSON file, in about five minutes
    python benchmarks/decode.py --quick --profile fewer rows; and where a step goes, by kernel
    python benchmarks/decode.py --plot            and a chart; with --read FILE of an earlier run, without a GPU

Random weights of the published shape, random prompts, greedy, no eos. Ours, ours16 and hf run in a process each, one after the other:

    ours, ours+lora     NF4 with double quantization; without and with an adapter of rank 64 on all linears, attached, not merged
    ours-serial         ours on one stream: attention's chain before the MLP's instead of beside it
    ours16              the same decoder over bfloat16 weights
    hf, hf+lora         transformers + bitsandbytes (+ peft). transformers 5 leaves Falcon's linears in 16 bits (they are a subclass of
                        nn.Linear), so they are replaced by hand here

A row is batch x prompt. `first token` is the time from the call to the first token in the host's hands: reading the prompt. `tokens/s` is
the batch over the time of one more token: from the first in the host's hands to the last, over their number; median of the repeats, and
p20-p80. The floor of a step is what it has to read, weights and head and the filled part of the cache, over the bandwidth of a copy
of 1 GiB timed in the same run; `of floor` is floor over time.

`error` is |logits - exact| / |exact| over 32 steps of the shape's first 4 layers, ours and hf with the same weights and tokens, ours with
an adapter too; exact is the dequantized model in float32. `plain` is falcon.py with its cache in bfloat16.
"""

import argparse
import copy
import dataclasses
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

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

from minqlora import add_lora, merge_lora  # noqa: E402
from minqlora.fast_decode import DECODERS, Decoder  # noqa: E402
from minqlora.generate import generate_steps  # noqa: E402
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


def ask_ours(model, ids, new) -> list[float]:
    return [time.perf_counter() for _ in generate_steps(model, ids, max_new_tokens=new)]


def ask_on_one_stream(model, ids, new) -> list[float]:
    batch, length = len(ids), ids.shape[1] + new
    known = DECODERS.get(model)
    if known is None or known.streams or not known.fits(model, batch, length):
        DECODERS[model] = Decoder(model, batch, length)
        DECODERS[model].streams = []
    return ask_ours(model, ids, new)


class Stamps:
    """A streamer of transformers that notes when tokens arrive. The first thing it is given is the prompt."""

    def __init__(self):
        self.prompt, self.times = None, []

    def put(self, ids) -> None:
        if self.prompt is None:
            self.prompt = ids
        else:
            self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def ask_hf(model, ids, new) -> list[float]:
    stamps = Stamps()
    # Falcon's own eos never ends a random answer early.
    model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=0,
        streamer=stamps,
    )  # fmt: skip
    return stamps.times


# --- Measuring --------------------------------------------------------------------------------------------------------------------------


def first_and_step(ask, model, ids, new: int) -> tuple[float, float]:
    """Seconds to the first token, and for each one after it. ask returns when each token was there."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    times = ask(model, ids, new)
    assert len(times) == new
    return times[0] - started, (times[-1] - times[0]) / (new - 1)


def bytes_of_a_step(config, batch: int, filled: float, lora: bool, bits: float) -> float:
    """What a step of a Falcon with a tied head must read: linears, head, adapter in 2 bytes a value, and the filled cache."""
    hidden, ffn, width = config.hidden_size, config.ffn_hidden_size, config.head_dim
    qkv = (config.num_attention_heads + 2 * config.num_kv_heads) * width
    linears = [(hidden, qkv), (hidden, hidden), (hidden, ffn), (ffn, hidden)]
    a_layer = sum(a * b * bits / 8 + lora * RANK * (a + b) * 2 for a, b in linears)
    cache = 2 * config.num_kv_heads * width * 2 * batch * filled
    return config.num_hidden_layers * (a_layer + cache) + 2 * config.vocab_size * hidden


def measure_rows(args, stack: str, model, ask) -> Iterator[dict]:
    config = shape(args)
    bits = 16 if stack == "ours16" else 4 + 8 / 64 + 32 / (64 * 256)
    new = args.tokens if stack.startswith("ours") else min(args.tokens, args.hf_tokens)
    for row in args.rows.split(","):
        batch, prompt = map(int, row.split("x"))
        prompts = torch.randint(config.vocab_size, (args.repeats + 1, batch, prompt), device=DEVICE)
        torch.cuda.reset_peak_memory_stats()
        started = time.perf_counter()
        ask(model, prompts[0], new)                                    # compiles, records, allocates
        torch.cuda.synchronize()
        warm = time.perf_counter() - started
        firsts, steps = zip(*(first_and_step(ask, model, ids, new) for ids in prompts[1:]), strict=True)
        once, steps = statistics.median(firsts), sorted(steps)
        step = statistics.median(steps)
        low, high = steps[round(0.2 * (len(steps) - 1))], steps[round(0.8 * (len(steps) - 1))]
        yield {
            "row": row, "stack": stack, "first_token_ms": once * 1e3, "step_ms": step * 1e3, "tokens_per_second": batch / step,
            "p20": batch / high, "p80": batch / low, "bytes": bytes_of_a_step(config, batch, prompt + new / 2, "lora" in stack, bits),
            "peak_gb": torch.cuda.max_memory_allocated() / 1e9, "warmup_s": warm,
        }  # fmt: skip
    if args.profile:
        # 16 steps and a prompt of 128 tokens.
        ids = torch.randint(config.vocab_size, (1, 128), device=DEVICE)
        write_profile(lambda: ask(model, ids, 17), args.output / f"profile-decode-{stack.replace('+', '-')}.txt")


@torch.no_grad()
def measure(args, process: str) -> Iterator[dict]:
    """All rows of what one process measures."""
    torch.manual_seed(0)
    config, model = shape(args), None
    if process == "error":
        yield from errors(config)
        return
    for stack in STACKS[process]:
        if stack not in args.stacks.split(","):
            continue
        if process != "hf":
            model = model or random_falcon(config, DEVICE, DTYPE, quantize=process == "ours").eval()
            if "lora" in stack:
                attach(model)
                model.eval()
            yield from measure_rows(args, stack, model, ask_on_one_stream if stack == "ours-serial" else ask_ours)
        else:
            if model is None:
                model = make_hf(config, DEVICE, DTYPE)
                quantize_by_hand(model, DTYPE)
            yield from measure_rows(args, stack, attach_hf(model, RANK) if "lora" in stack else model, ask_hf)
    if process == "ours":
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        cache = model.new_cache(1, 8192)
        yield {"row": "cache of 8192 tokens", "stack": "ours", "cache_bytes": torch.cuda.memory_allocated() - before}
        del cache


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
            theirs = make_hf(config, DEVICE, DTYPE)
            theirs.load_state_dict(plain16.state_dict())
            quantize_by_hand(theirs, DTYPE)
            past = theirs(ids[:, :prompt], use_cache=True).past_key_values
            logits = step_by_step(lambda column: theirs(column, past_key_values=past, use_cache=True).logits)    # noqa: B023
            rows.append({"stack": "hf", "error": off(logits, exact)})
    return rows


# --- The report -------------------------------------------------------------------------------------------------------------------------

WIDTHS = {"row": 8, "stack": 11, "tokens/s": 9, "p20 - p80": 17, "step ms": 8, "of floor": 8, "first token ms": 14, "peak GB": 8}
COLUMNS = " ".join(f"{name:>{width}}" for name, width in WIDTHS.items())


def line(head: dict, r: dict) -> str:
    if "failed" in r:
        return f"{r['row']:>8} {r['stack']:>11} {r['failed']}"
    if "error" in r:
        return f"error of {r['stack']:>11}: {r['error']:.2e}"
    if "cache_bytes" in r:
        return f"{r['row']}: {r['cache_bytes'] / 1e6:.1f} MB"
    share = r["bytes"] / head["copy_gb_per_second"] / 1e6 / r["step_ms"]
    return (f"{r['row']:>8} {r['stack']:>11} {r['tokens_per_second']:9,.1f} {r['p20']:8,.1f} {r['p80']:8,.1f} "
            f"{r['step_ms']:8.3f} {share:8.1%} {r['first_token_ms']:14.1f} {r['peak_gb']:8.2f}")  # fmt: skip


def table(head: dict, rows: list[dict]) -> str:
    return "\n".join([about(head), "", COLUMNS, *[line(head, row) for row in rows]])


def plot(head: dict, rows: list[dict], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stacks = [stack for process in STACKS.values() for stack in process if any(r["stack"] == stack and "step_ms" in r for r in rows)]
    timed = [r for r in rows if "step_ms" in r]
    names = list(dict.fromkeys(r["row"] for r in timed))
    panels = (("tokens_per_second", "tokens a second", "log", [n for n in names if n.endswith("x128")]),
              ("first_token_ms", "time to the first token, ms", "linear", [n for n in names if n.startswith("1x")]))
    figure, axes = plt.subplots(1, 2, figsize=(11, 4))
    for axis, (key, label, scale, shown) in zip(axes, panels, strict=True):
        values = {stack: {r["row"]: r[key] for r in timed if r["stack"] == stack} for stack in stacks}
        grouped_bars(axis, shown, values, ylabel=label, xlabel="batch x prompt", yscale=scale)
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
    flag("--output", type=Path, default=RESULTS, help="folder of what is written")
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
        for row in measure(args, args.one):
            print(json.dumps(row), flush=True)
        return 0

    settings = {name: getattr(args, name) for name in ("model", "tokens", "hf_tokens", "repeats")}
    head, rows = header(args.commit, **settings, copy_gb_per_second=asked_apart("copy_bandwidth()")), []
    path = results_path("decode", head, args.output)
    print(f"{about(head)}\n\n{COLUMNS}", flush=True)
    for process in (*STACKS, "error"):
        if process != "error" and not set(STACKS[process]) & set(args.stacks.split(",")):
            continue
        for found in rows_of_child(__file__, [*sys.argv[1:], "--one", process]):
            rows.append({"row": "all", "stack": process} | found)
            print(line(head, rows[-1]), flush=True)
            write_results(path, head, rows)
    if args.plot:
        plot(head, rows, path.with_suffix(".png"))
    return int(any("failed" in r for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
