"""What a person sees of a run, and how they stop it: the progress bar, metrics.jsonl, Ctrl-C.

**The device is not kept waiting.** A loss stays on it until it is shown, twice a second: only then does anyone wait for the device.
metrics.jsonl still holds every step.
"""

import json
import math
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm


class Interrupt:
    """Turns the first Ctrl-C or SIGTERM into a request that the loop looks at between steps."""

    def __init__(self):
        self.signal, self.previous = 0, {}

    def __enter__(self) -> "Interrupt":
        # Python delivers signals to the main thread, and lets no other one ask for them.
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self.handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def handle(self, number: int, frame) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        # Not print: the signal may have come in the middle of one, which does not bear another inside it.
        os.write(2, b"\nStopping after this step, then saving. Ctrl-C again stops at once.\n")

    def __exit__(self, *error) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)


class Display:
    """The progress bar and metrics.jsonl. Collects what is on the device and fetches it in one go, twice a second."""

    def __init__(self, path: Path, steps: int, state: dict, device: torch.device, show: bool):
        self.state, self.device = state, device
        self.file = open(path, "a", encoding="utf-8")              # noqa: SIM115 (closed in __exit__)
        self.recent = deque(maxlen=20)                             # losses; what the bar shows is their mean
        self.pending = []                                          # step, tokens, lr; and (loss, norm) on the device
        self.before = state["seconds"], state["tokens"]
        # In a log file a bar is a line each time: there, one every ten seconds.
        self.bar = tqdm(total=steps, initial=state["step"], desc="training", unit="step", disable=not show, dynamic_ncols=True,
                        mininterval=0.1 if sys.stderr.isatty() else 10,
                        bar_format="{desc} {n_fmt}/{total_fmt} |{bar:20}| {elapsed} elapsed, {remaining} left{postfix}")

    def __enter__(self) -> "Display":
        self.since = self.shown = time.perf_counter()
        return self

    def add(self, loss: Tensor, norm: Tensor, lr: float) -> None:
        self.pending.append((self.state["step"], self.state["tokens"], lr, torch.stack((loss, norm))))
        # At most ten, so that the loop does not run far ahead of the device.
        if time.perf_counter() - self.shown > 0.5 or len(self.pending) == 10:
            self.flush()

    def flush(self) -> None:
        if not self.pending:
            return
        values = torch.stack([both for *_, both in self.pending]).tolist()
        self.shown = time.perf_counter()
        self.state["seconds"] += self.shown - self.since
        self.since = self.shown
        for (step, tokens, lr, _), (loss, norm) in zip(self.pending, values, strict=True):
            if not (math.isfinite(loss) and math.isfinite(norm)):
                raise FloatingPointError(f"step {step}: the loss is {loss} and the gradient's norm {norm}, at lr {lr:.3g}. "
                                         "A lower lr or a warmup usually helps; nothing was saved after the last checkpoint")
            self.recent.append(loss)
            self.write({"step": step, "loss": loss, "grad_norm": norm, "lr": lr, "tokens": tokens, "seconds": self.state["seconds"]})
        seconds, tokens = self.state["seconds"] - self.before[0], self.state["tokens"] - self.before[1]
        memory = peak_memory(self.device)
        self.bar.set_postfix_str(f"loss {sum(self.recent) / len(self.recent):.3f}, {tokens / seconds:,.0f} tokens/s, "
                                 f"peak {memory / 2**20:,.0f} MiB", refresh=False)
        self.bar.update(len(self.pending))
        self.pending = []

    def write(self, line: dict) -> None:
        self.file.write(json.dumps(line) + "\n")
        self.file.flush()

    def evaluated(self, name: str, result) -> None:
        """result: train.py's Evaluation of the held-out set `name`."""
        step = self.state["step"]
        self.write({"step": step, "set": name, "loss": result.loss, "perplexity": result.perplexity, "tokens": result.tokens})
        if not self.bar.disable:
            self.bar.write(f"step {step}: {name} loss {result.loss:.3f}, perplexity {result.perplexity:.2f}", file=sys.stderr)

    @contextmanager
    def pause(self) -> Iterator[None]:
        """What takes its time in here is not a step."""
        self.flush()
        yield
        self.since = self.shown = time.perf_counter()

    def __exit__(self, *error) -> None:
        try:
            if error[0] is None:
                self.flush()
        finally:
            self.bar.close()
            self.file.close()


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: tensors on a GPU, the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Not getrusage on Linux: its maximum is inherited from whatever started this process.
    if sys.platform == "linux":
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
