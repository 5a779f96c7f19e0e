"""benchmarks/decode.py: what it says without a GPU, its bytes by hand, and all of its errors and rows on a small model on the CPU."""

import argparse
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minqlora.falcon import FalconConfig

SCRIPT = Path(__file__).resolve().parent.parent / "benchmarks" / "decode.py"
SMALL = FalconConfig(vocab_size=97, hidden_size=128, num_hidden_layers=2, num_attention_heads=4, tie_word_embeddings=True)


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    spec = importlib.util.spec_from_file_location("benchmark_decode", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    path = sys.path[:]
    spec.loader.exec_module(module)
    sys.path[:] = path
    monkeypatch.setattr(module, "DEVICE", "cpu")
    monkeypatch.setattr(module, "DTYPE", torch.float32)
    monkeypatch.setattr(module, "RANK", 4)
    monkeypatch.setitem(module.SHAPES, "small", SMALL)
    for name in ("synchronize", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda: None)
    return module


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so it would measure")
def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == "benchmarks/decode.py measures a GPU, and there is none here\n"


def test_the_bytes_of_a_step_of_7b(benchmark, monkeypatch):
    config = benchmark.SHAPES["falcon-7b"]
    # 32 layers of qkv 4672 x 4544, dense 4544 x 4544, up and down 18176 x 4544
    weights = 32 * 4544 * (4672 + 4544 + 2 * 18176)
    head = 65024 * 4544 * 2
    # With nothing in the cache; a doubly quantized weight has 4.127 bits.
    bits = 4 + 8 / 64 + 32 / (64 * 256)
    assert benchmark.bytes_of_a_step(config, 1, 0, False, bits) == pytest.approx(weights * bits / 8 + head)
    # 8 KB for each token of each row
    assert benchmark.bytes_of_a_step(config, 3, 100, False, 16) == pytest.approx(weights * 2 + head + 300 * 8192)
    # 130.5 million values of an adapter of rank 64, 2 bytes each
    monkeypatch.setattr(benchmark, "RANK", 64)
    assert benchmark.bytes_of_a_step(config, 1, 0, True, 0) - head == pytest.approx(2 * 130.5e6, rel=1e-3)


def test_all_stacks_agree_on_a_small_model(benchmark):
    pytest.importorskip("bitsandbytes")
    pytest.importorskip("transformers")
    # bitsandbytes' layer on a CPU is not the one on a GPU: theirs gets the same weights, dequantized.
    benchmark.quantize_by_hand = lambda theirs, dtype: theirs.load_state_dict(dequantized(benchmark, theirs))
    with torch.no_grad():
        rows = benchmark.errors(SMALL)
    assert [row["stack"] for row in rows] == ["plain", "ours", "hf", "plain+lora", "ours+lora"]
    # Sums of at most 512 terms in float32 through 4 layers: sqrt(512) * 8 roundings.
    assert all(row["error"] < 512**0.5 * 8 * 6e-8 for row in rows), rows
    assert max(row["error"] for row in rows) > 0


def dequantized(benchmark, theirs):
    from minqlora.linear4bit import Linear4bit

    return {
        name: Linear4bit.from_weight(value).dequantize() if ".h." in name and value.ndim == 2 else value
        for name, value in theirs.state_dict().items()
    }


def test_rows_table_and_chart(benchmark, monkeypatch, tmp_path):
    pytest.importorskip("peft")
    stacks = ["ours", "ours-serial", "ours+lora", "ours16", "hf", "hf+lora"]
    args = argparse.Namespace(model="small", rows="1x5,2x3", stacks=",".join(stacks), tokens=4, hf_tokens=4, repeats=2,
                              profile=False, output=tmp_path)
    monkeypatch.setattr(benchmark, "quantize_by_hand", lambda theirs, dtype: None)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**9)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 0)
    # A clock that gains a second each time it is read: 1 s to the first token, and 1 s for each one after it.
    clock = itertools.count()
    monkeypatch.setattr(benchmark, "time", SimpleNamespace(perf_counter=lambda: float(next(clock))))
    rows = [row for process in benchmark.STACKS for row in benchmark.measure(args, process)]
    timed = [row for row in rows if "step_ms" in row]
    assert [(row["stack"], row["row"]) for row in timed] == [(stack, row) for stack in stacks for row in ("1x5", "2x3")]
    assert all(row["step_ms"] == 1000 and row["first_token_ms"] == 1000 for row in timed)
    assert [row["tokens_per_second"] for row in timed] == [1.0, 2.0] * 6
    head = {"gpu": "none", "torch": torch.__version__, "date": "today", "model": "small", "copy_gb_per_second": 1e-3}
    rows += [{"stack": "hf", "error": 0.5}, {"row": "all", "stack": "hf", "failed": "out of memory"}]
    lines = benchmark.table(head, rows).splitlines()
    # The floor of the second row: its bytes at 1 MB/s, beside 1 s.
    assert lines[4].split()[:2] == ["2x3", "ours"] and f"{timed[1]['bytes'] / 1e6:8.1%}" in lines[4]
    assert any("out of memory" in line for line in lines) and "5.00e-01" in lines[-2]
    pytest.importorskip("matplotlib")
    results = tmp_path / "decode.json"
    results.write_text(json.dumps({"header": head, "rows": rows}))
    benchmark.plot(head, rows, results.with_suffix(".png"))
    assert results.with_suffix(".png").stat().st_size > 1000
