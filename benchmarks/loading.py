"""How long from sharded bfloat16 safetensors to a model in 4 bits on the GPU, and in how much memory?

    python benchmarks/loading.py                                 # writes Falcon-7B's shape (14 GB) to --folder, loads it, deletes it
    python benchmarks/loading.py --model falcon-11B --repeats 5

The files hold random weights and have just been written, so they are in the page cache, as for who loads a model the second time. Each
stack loads in a process of its own that has imported everything and compiled the kernels, by loading two small layers, before the
clock starts.

    ours     load_falcon
    hf       transformers reads the shards to the GPU in 16 bits, then bitsandbytes quantizes the linears by hand: what its load_in_4bit
             does not do for Falcon. Its peak is therefore the 16-bit model's; for one that it does quantize on the way it is less

`host` is the most that the process held in anonymous memory beyond what it held before: mapped files do not count. `peak` is the
allocator's maximum; `model` what is left at the end, and `tensor` the largest one in the files.
"""

import argparse
import json
import shutil
import statistics
import tempfile
import threading
import time
from pathlib import Path

import torch
from common import RESULTS, about, header, leave_the_folder, results_path, rows_of_child, write_results
from hugging_face import quantize_by_hand
from random_falcon import SHAPES, random_falcon

leave_the_folder()

from minqlora.falcon import FalconConfig  # noqa: E402
from minqlora.load import load_falcon, save_falcon  # noqa: E402


class AnonymousMemory(threading.Thread):
    """The most anonymous memory that this process has while the thread runs, in bytes; read from /proc a hundred times a second."""

    def __init__(self):
        super().__init__(daemon=True)
        self.most, self.stopped = 0, threading.Event()

    @staticmethod
    def now() -> int:
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
        return int(line.split()[1]) * 1024

    def run(self) -> None:
        while not self.stopped.wait(0.01):
            self.most = max(self.most, self.now())

    def __enter__(self):
        self.before = self.most = self.now()
        self.start()
        return self

    def __exit__(self, *error) -> None:
        self.most = max(self.most, self.now())
        self.stopped.set()
        self.join()


def load_ours(folder: Path):
    return load_falcon(folder, device="cuda")


def load_hf(folder: Path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, device_map="cuda")
    quantize_by_hand(model)
    return model


LOADERS = {"ours": load_ours, "hf": load_hf}


def measure(folder: Path, stack: str, repeats: int) -> dict:
    with tempfile.TemporaryDirectory() as small:
        # Whatever happens once: imports, the context, kernels.
        save_falcon(random_falcon(FalconConfig(1000, 4544, 2, 71, ffn_hidden_size=256), "cpu", quantize=False), small)
        LOADERS[stack](Path(small))
    times = []
    for _ in range(repeats):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with AnonymousMemory() as host:
            started = time.perf_counter()
            model = LOADERS[stack](folder)
            torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        kept, peak = torch.cuda.memory_allocated() - before, torch.cuda.max_memory_allocated() - before
        del model
    low, high = min(times), max(times)
    return {"stack": stack, "seconds": statistics.median(times), "fastest": low, "slowest": high, "peak": peak, "model": kept,
            "host": host.most - host.before}


def line(r: dict) -> str:
    if "failed" in r:
        return f"{r['stack']:>6} {r['failed']}"
    return (f"{r['stack']:>6} {r['seconds']:8.2f} {r['fastest']:6.2f} - {r['slowest']:5.2f} {r['peak'] / 1e9:9.3f} {r['model'] / 1e9:9.3f} "
            f"{r['host'] / 1e9:9.3f}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="falcon-7b", choices=SHAPES)
    parser.add_argument("--folder", type=Path, help="where the files are written; a temporary one by default")
    parser.add_argument("--stacks", default=",".join(LOADERS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of what is written")
    parser.add_argument("--commit", default="", help="what the header says where git is not there")
    parser.add_argument("--one", help=argparse.SUPPRESS)              # a child process: the stack that it measures
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks/loading.py measures a GPU, and there is none here")
        return 1
    if args.one:
        print(json.dumps(measure(args.folder, args.one, args.repeats)))
        return 0
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    try:
        model = random_falcon(SHAPES[args.model], quantize=False)
        tensor = max(p.nbytes for p in model.parameters())
        save_falcon(model.cpu(), folder)
        size = sum(path.stat().st_size for path in folder.iterdir())
        del model
        torch.cuda.empty_cache()
        head, rows = header(args.commit, model=args.model, files_gb=size / 1e9, tensor_gb=tensor / 1e9, repeats=args.repeats), []
        path = results_path("loading", head, args.output)
        print(f"{about(head)}\n{'stack':>6} {'seconds':>8} {'min - max':>14} {'peak GB':>9} {'model GB':>9} {'host GB':>9}", flush=True)
        for stack in args.stacks.split(","):
            for found in rows_of_child(__file__, ["--one", stack, "--folder", str(folder), "--repeats", str(args.repeats)]):
                rows.append({"stack": stack} | found)
                print(line(rows[-1]), flush=True)
                write_results(path, head, rows)
    finally:
        shutil.rmtree(folder)
    return int(any("failed" in r for r in rows))


if __name__ == "__main__":
    raise SystemExit(main())
