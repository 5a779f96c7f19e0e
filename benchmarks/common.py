"""What the benchmarks share: the header that says where a number was measured, a process for each stack, and results that last.

Every stack runs in a process of its own, one after the other, so that none pays for another's memory. A child prints a row as a line of
JSON as soon as it has one, and the file of results is written again after each: what was measured is there even if the rest never comes.
"""

import contextlib
import datetime
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"


def leave_the_folder() -> None:
    """Python puts the script's folder first on its path, and kernels.py there would be the package `kernels` that transformers asks for."""
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() != HERE]


def output_of(*command: str) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE).stdout.strip().splitlines()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return ""


def asked_apart(expression: str):
    """The value of an expression of this file, from a process of its own.

    Whoever asks the GPU anything gets a context on it, half a gigabyte, and the children would find it in use beside their own.
    """
    command = [sys.executable, "-c", f"import json, torch; from common import *; print(json.dumps({expression}))"]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True, cwd=HERE).stdout.splitlines()[-1])


def header(commit: str = "", **more) -> dict:
    """Where and with what something is measured. `commit` is what to say where there is no git repository, or another."""
    if torch.cuda.is_available():
        driver = output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        where = {"gpu": asked_apart("torch.cuda.get_device_name()"), "driver": driver, "cuda": torch.version.cuda}
    else:
        where = {"cpu": platform.machine(), "threads": torch.get_num_threads()}
    head = where | {"python": platform.python_version(), "torch": torch.__version__}
    for name in ("triton", "bitsandbytes", "transformers", "peft"):
        with contextlib.suppress(PackageNotFoundError):
            head[name] = version(name)
    return head | {"commit": commit or output_of("git", "rev-parse", "--short", "HEAD"), "date": datetime.date.today().isoformat()} | more


def about(head: dict) -> str:
    """The header in one line."""
    return ", ".join(f"{key} {value:.0f}" if isinstance(value, float) and value >= 10 else f"{key} {value}" for key, value in head.items())


def results_path(what: str, head: dict, folder: Path | None = None) -> Path:
    """results/training-h100.json"""
    return (folder or RESULTS) / f"{what}-{head.get('gpu', 'cpu').replace('NVIDIA', '').split()[0].lower()}.json"


def write_results(path: Path, head: dict, rows: list[dict]) -> None:
    """A row a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(row) for row in rows)
    path.write_text(f'{{"header": {json.dumps(head, indent=1)},\n"rows": [\n{lines}\n]}}\n')


def rows_of_child(script: str, arguments: list[str]) -> Iterator[dict]:
    """The rows that a process prints, as they come. If it fails, its standard error is printed, and the last row says {"failed": why}."""
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen([sys.executable, script, *arguments], stdout=subprocess.PIPE, stderr=errors, text=True) as child:
            for line in child.stdout:
                if line.startswith("{"):
                    yield json.loads(line)
        errors.seek(0)
        text = errors.read().strip()
    if child.returncode:
        print(text[-3000:], file=sys.stderr)
        yield {"failed": (text.splitlines() or ["died without a word"])[-1][:200]}


def write_profile(call, path: Path) -> None:
    """Where a call's time goes, by kernel."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as run:
        call()
        torch.cuda.synchronize()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(run.key_averages().table(sort_by="cuda_time_total", row_limit=45, max_name_column_width=90))


def median_ms(call, repeats: int = 20) -> float:
    """Milliseconds of a call on the device, after five to warm up."""
    times = []
    for _ in range(repeats + 5):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return statistics.median(times[5:])


def copy_bandwidth() -> float:
    """GB/s that a copy of 1 GiB reads and writes."""
    source = torch.randint(256, (2**30,), dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * 2**30 / median_ms(lambda: target.copy_(source)) / 1e6


def matrix_rate() -> float:
    """TFLOP/s of an 8192-cube product in bfloat16."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return 2 * 8192**3 / median_ms(lambda: a @ b) / 1e9


def grouped_bars(axis, names: list[str], values: dict[str, dict[str, float]], **labels) -> None:
    """A group of bars for each name, in it one for each stack of `values`; labels are what axis.set takes."""
    width = 0.8 / len(values)
    for i, (stack, found) in enumerate(values.items()):
        axis.bar([j + i * width for j in range(len(names))], [found.get(name, 0) for name in names], width, label=stack)
    axis.set_xticks([j + 0.4 - width / 2 for j in range(len(names))], names)
    axis.set(**labels)
    axis.spines[["top", "right"]].set_visible(False)
