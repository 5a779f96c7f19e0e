"""benchmarks/kernels.py: what it says without a GPU, and its table and checks on a small weight, with a clock that stands still."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "kernels.py"
PEAK = {"GB/s": 1000.0, "TFLOP/s": 1.0}


@pytest.fixture
def benchmark(monkeypatch):
    """The script as a module, for small weights on the CPU: each contender runs once, and always takes 2 ms."""
    pytest.importorskip("bitsandbytes")
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("benchmark_kernels", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    path = sys.path[:]
    spec.loader.exec_module(module)
    sys.path[:] = path

    def prepare(call, *rest, **options):
        call(0)

    def clock(queued):
        return {name: [2.0, 1.5, 3.0] for name in queued}

    monkeypatch.setattr(module, "DEVICE", "cpu")
    # The interpreter neither rounds to bfloat16 nor multiplies in it.
    monkeypatch.setattr(module, "DTYPE", torch.float32)
    monkeypatch.setattr(module, "ROTATE", 1000)
    monkeypatch.setattr(module, "prepare", prepare)
    monkeypatch.setattr(module, "time_in_turn", clock)
    return module


@pytest.fixture
def weight(benchmark):
    if torch.cuda.is_available():
        pytest.skip("the interpreter is off where there is a GPU")
    torch.manual_seed(0)
    return benchmark.Weight(48, 64)


def test_without_a_gpu_it_says_so_in_one_line():
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=True)
    assert len(done.stdout.splitlines()) == 1 and "no CUDA device" in done.stdout


@pytest.mark.parametrize(("what", "rows", "who"), [
    ("dequantize", None, ["ours", "bitsandbytes", "reference"]),
    ("forward", 3, ["ours", "bitsandbytes", "cuBLAS bf16"]),
    ("grad of x", 70, ["ours", "bitsandbytes", "cuBLAS bf16"]),
])  # fmt: skip
def test_every_contender_is_checked_and_gets_a_row(benchmark, weight, what, rows, who):
    results = list(benchmark.measure(weight, "small", what, rows, PEAK))
    assert [row["who"] for row in results] == who
    for row in results:
        assert "failed" not in row and "FAILED" not in benchmark.line(row)
        assert json.loads(json.dumps(row))["who"] == row["who"]
        if rows:
            assert row["error"] < 1e-6                             # float32: roundings of 6e-8, summed over 64 terms


def test_quantize_is_compared_byte_for_byte(benchmark, weight):
    # On a CPU bitsandbytes divides where its CUDA kernel multiplies, and searches the 8-bit codes otherwise; the bytes of absmax alone can
    # differ here, and then the row has to say which.
    ours, theirs, *_ = benchmark.measure(weight, "small", "quantize", None, PEAK)
    assert "failed" not in theirs
    assert "failed" not in ours or ours["failed"].startswith("ValueError: not the bytes of bitsandbytes")


def test_the_share_is_that_of_the_longer_of_bytes_and_operations(benchmark, weight):
    # 4 bits of 48 x 64 weights are 1536 bytes, 48 blocks and one group give 48 + 4 more, x and y in float32 3 * (64 + 48) * 4. At 1000 GB/s
    # that is 2.9e-6 ms; 2 * 3 * 48 * 64 operations at 1 TFLOP/s are 1.8e-5 ms, longer, of 2 ms measured.
    row = next(benchmark.measure(weight, "small", "forward", 3, PEAK))
    assert row["bound"] == "operations" and row["share"] == pytest.approx(2 * 3 * 48 * 64 / 1e9 / 2)
    assert row["GB/s"] == pytest.approx((1536 + 48 + 4 + 3 * (64 + 48) * 4) / 2e-3 / 1e9)
    assert row["ms"] == [2.0, 1.5, 3.0]


def test_a_wrong_result_is_not_timed_and_the_others_go_on(benchmark, weight, monkeypatch):
    weight.exact[0, 0] += 100
    wrong = list(benchmark.measure(weight, "small", "forward", 4, PEAK))
    assert all("is not below" in row["failed"] and "ms" not in row for row in wrong) and len(wrong) == 3
    assert "FAILED" in benchmark.line(wrong[0])
    monkeypatch.setattr(benchmark, "product", None)                # a contender that cannot even be made
    (row,) = benchmark.measure(weight, "small", "forward", 4, PEAK)
    assert row["who"] == "all" and "TypeError" in row["failed"]


def test_the_summary_divides_the_others_by_ours(benchmark):
    rows = [
        {"shape": "up", "what": "forward", "rows": 4, "who": who, "ms": [ms, ms, ms]}
        for who, ms in (("ours", 0.5), ("bitsandbytes", 1.0), ("cuBLAS bf16", 0.75))
    ]
    last = benchmark.summary([*rows, {"shape": "up", "what": "forward", "rows": 64, "who": "ours", "failed": "no"}]).splitlines()[-1]
    assert last.split() == ["up", "forward", "M=4", "0.5000", "2.00", "1.50"]


def test_the_chart_is_drawn_from_results_alone(benchmark, tmp_path):
    pytest.importorskip("matplotlib")
    header = {"gpu": "a GPU", "torch": "2", "triton": "3", "bitsandbytes": "0"}
    rows = [
        {"shape": "falcon-7b up", "what": what, "rows": rows, "who": who, "ms": [rows / 100, 0, 0]}
        for what in ("forward", "grad of x") for rows in (1, 64) for who in ("ours", "cuBLAS bf16")
    ]  # fmt: skip
    benchmark.plot({"header": header, "rows": rows}, tmp_path / "chart.png")
    assert (tmp_path / "chart.png").read_bytes().startswith(b"\x89PNG")
