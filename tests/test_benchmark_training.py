"""benchmarks/common.py, training.py, memory.py, loading.py and optimizers.py: what can be shown of them without a GPU."""

import argparse
import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture
def load(monkeypatch):
    """A script of the folder as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    path = sys.path[:]

    def import_it(name):
        sys.path[:] = path
        module = importlib.import_module(name)
        sys.path[:] = path
        return module

    yield import_it
    for name in ("training", "memory", "optimizers", "common", "hugging_face", "random_falcon"):
        sys.modules.pop(name, None)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device, so it would measure")
@pytest.mark.parametrize("script", ["training.py", "memory.py", "loading.py"])
def test_without_a_gpu_they_say_so_in_one_line(script):
    done = subprocess.run([sys.executable, FOLDER / script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == f"benchmarks/{script} measures a GPU, and there is none here\n"


def test_rows_arrive_one_by_one_and_a_failure_is_the_last_of_them(load, tmp_path, capsys):
    child = tmp_path / "child.py"
    child.write_text('import sys\nprint(\'{"a": 1}\')\nprint("a word")\nprint(\'{"a": 2}\')\nsys.exit("out of memory")\n')
    assert list(load("common").rows_of_child(str(child), [])) == [{"a": 1}, {"a": 2}, {"failed": "out of memory"}]
    assert "out of memory" in capsys.readouterr().err


def test_results_are_written_as_json_a_row_a_line(load, tmp_path):
    common = load("common")
    path = common.results_path("training", {"gpu": "NVIDIA H100 80GB HBM3"}, tmp_path / "new")
    assert path.name == "training-h100.json"
    common.write_results(path, {"gpu": "a GPU"}, [{"a": 1}, {"a": 2}])
    assert json.loads(path.read_text()) == {"header": {"gpu": "a GPU"}, "rows": [{"a": 1}, {"a": 2}]}
    assert '{"a": 1},\n{"a": 2}' in path.read_text()


def test_the_share_of_the_matrix_rate_by_hand(load):
    training = load("training")
    # falcon-7b: 32 layers of qkv 4672 x 4544, dense 4544 x 4544, up and down 18176 x 4544; the head 65024 x 4544.
    weights = 32 * 4544 * (4672 + 4544 + 2 * 18176) + 65024 * 4544
    # Four operations a weight, and 2 * 512 * 4544 in each layer's attention, three times.
    a_token = 4 * weights + 3 * 32 * 2 * 512 * 4544
    row = {"row": "16x512", "stack": "fused", "tokens_per_second": 10_000.0}
    assert training.matrix_share({"model": "falcon-7b", "bf16_tflops": 800.0}, row) == pytest.approx(10_000 * a_token / 800e12)


@pytest.mark.parametrize("stack", ["readable", "hf16"])
def test_both_stacks_learn_on_a_small_model(load, monkeypatch, stack):
    pytest.importorskip("peft")
    from minqlora.falcon import FalconConfig

    training = load("training")
    monkeypatch.setattr(training, "DEVICE", "cpu")
    monkeypatch.setitem(training.SHAPES, "small", FalconConfig(97, 64, 2, 4, tie_word_embeddings=True))
    args = argparse.Namespace(model="small", rank=4, dropout=0.0, adapters="float32", optimizer="adamw", keep=0)
    torch.manual_seed(0)
    step = (training.hf_step if stack == "hf16" else training.our_step)(args, "2x16", stack)
    ids = torch.randint(97, (2, 16))
    monkeypatch.setattr(torch, "randint", lambda *_, **__: ids)              # the same tokens again
    losses = [step().item() for _ in range(5)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < losses[0]


def test_every_committed_result_can_be_read(load):
    training, found = load("training"), FOLDER / "results" / "training-h100.json"
    results = json.loads(found.read_text())
    assert all(training.line(results["header"], row) for row in results["rows"])


def test_stand_ins_have_the_parameters_of_what_they_stand_for(load):
    from minqlora.plan import parameter_count

    shapes = load("random_falcon").SHAPES
    # LLaMA-33B and 65B have 32.5 and 65.2 billion, with a vocabulary of 32 000 twice; these have 65 024 once.
    assert parameter_count(shapes["llama-33B"]) == pytest.approx(32.5e9, rel=0.01)
    assert parameter_count(shapes["llama-65B"]) == pytest.approx(65.2e9, rel=0.01)


def test_the_plan_says_that_every_row_of_memory_fits(load):
    from minqlora.plan import parse_memory, plan

    memory = load("memory")
    for row in memory.ROWS:
        name, cap = row.split("@")
        assert plan(memory.SHAPES[name], memory.flags_of(row)).total <= parse_memory(cap), row


def test_optimizers_are_compared_with_the_noise_of_seeds(load):
    rows = [{"optimizer": optimizer, "seed": seed, "losses": {"explained": {"10": loss}}, "tokens_per_second": 100.0}
            for optimizer, losses in (("adamw", (1.0, 3.0)), ("adamw8bit", (2.0, 2.5))) for seed, loss in enumerate(losses)]
    lines = load("optimizers").summary([*rows, {"optimizer": "paged", "seed": 0, "failed": "out of memory"}]).splitlines()
    # Means 2 and 2.25; the deviation of 1 and 3 is the square root of 2.
    assert lines[1].split() == ["explained", "10", "adamw", "2.0000", "1.4142"]
    assert lines[2].split() == ["explained", "10", "adamw8bit", "2.2500", "+0.2500", "1.4142"]
    assert "adamw: 100 tokens a second" in lines and lines[-1] == "paged, seed 0: out of memory"
