"""The main job through its script, on a small random Falcon: what a person sees, what is on disk afterwards, and what is refused."""

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minqlora.load import load_falcon
from minqlora.lora import adapters, load_adapter

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "finetune_falcon.py"
spec = importlib.util.spec_from_file_location("finetune_falcon", SCRIPT)
script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(script)

SMALL = ["--rank", "4", "--alpha", "8", "--dropout", "0.1", "--length", "64", "--batch-size", "4", "--accumulate", "1", "--lr", "1e-2",
         "--eval-every", "0", "--save-every", "0", "--device", "cpu", "--answer-tokens", "8"]
RUN_FILES = {"adapter_config.json", "adapter_model.safetensors", "prompt_template.json", "run.json", "metrics.jsonl", "checkpoint.pt"}


def write(path, *lines):
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


@pytest.fixture
def data(tmp_path):
    """Questions of two kinds whose answers follow a rule, with a held-out part."""
    lines = [{"instruction": f"What is {a} and {b}?", "input": "", "output": f"{a}{b} is {a}{b}.", "kind": kind,
              "split": "held_out" if a == "d" else "train"} for a in "abcd" for b in "efgh" for kind in ("explained", "computed")]
    return write(tmp_path / "data.jsonl", *lines)


@pytest.fixture
def start(small_falcon, data, tmp_path, capsys):
    """Run the script in this process. Returns its exit status, its standard output and its standard error."""
    def run(*flags, output=tmp_path / "run", model=small_falcon, records=data, steps=6):
        argv = ["--model", model, "--data", records, "--output", output, *SMALL, "--steps", steps, *flags]
        return script.main(list(map(str, argv))), *capsys.readouterr()
    return run


def losses(output):
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line["loss"] for line in lines if "set" not in line}


def test_the_main_job_says_what_it_did_and_leaves_an_adapter_that_loads(start, small_falcon, tmp_path):
    status, out, err = start(steps=40)
    assert status == 0, err
    assert {path.name for path in (tmp_path / "run").iterdir()} == RUN_FILES
    assert "24 records" in out and "explained: 4 records" in out and "NF4 with double quantization" in out
    assert out.count("Question ") == out.count("  before ") == out.count("  after ") == out.count("  expected ") == 3
    for kind in ("explained", "computed"):
        before, after = map(float, re.search(rf"{kind} +4 +([\d.]+) -> ([\d.]+)", out).groups())
        assert after < before - 0.5, "the rule is learned"
    assert "tokens/s" in err and "MiB" in err and "left" in err
    assert shlex.split(out.strip().splitlines()[-1])[:1] == ["python"] and "ask.py" in out.strip().splitlines()[-1]
    model = load_falcon(small_falcon)
    load_adapter(model, tmp_path / "run")
    assert len(adapters(model)) == 8 and any(layer.lora_B.abs().max() > 0 for layer in adapters(model).values())


def test_a_place_that_holds_a_run_is_refused_and_overwriting_deletes_that_run_alone(start, tmp_path):
    start(steps=2)
    first = losses(tmp_path / "run")
    (tmp_path / "run" / "notes.txt").write_text("mine")
    status, _, err = start(steps=3)
    assert status == 1 and "already holds a run" in err and "--resume" in err and "--overwrite" in err
    assert losses(tmp_path / "run") == first
    status, _, err = start("--overwrite", "--rank", "0", steps=3)
    assert status == 1 and losses(tmp_path / "run") == first, "what cannot run deletes nothing"
    status, _, err = start("--overwrite", steps=3)
    assert status == 0 and len(losses(tmp_path / "run")) == 3
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"


def test_an_interrupted_run_says_how_to_go_on_and_ends_as_if_it_had_not_been(small_falcon, data, tmp_path):
    flags = ["--model", str(small_falcon), "--data", str(data), *SMALL, "--steps", "100", "--questions", "0"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, SCRIPT, *flags, "--output"]
    whole = subprocess.run([*command, tmp_path / "whole"], env=environment, capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    process = subprocess.Popen([*command, tmp_path / "stopped"], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        file, deadline = tmp_path / "stopped" / "metrics.jsonl", time.monotonic() + 120
        while not (file.exists() and '"grad_norm"' in file.read_text()) and time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert {path.name for path in (tmp_path / "stopped").iterdir()} == RUN_FILES
    stopped = len(losses(tmp_path / "stopped"))
    assert 0 < stopped < 100 and f"Stopped after step {stopped} of 100" in out
    line, = [line for line in out.splitlines() if "--resume" in line]
    resumed = subprocess.run([sys.executable, *shlex.split(line)[1:]], env=environment, capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert losses(tmp_path / "stopped") == losses(tmp_path / "whole")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "stopped" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_resumed_run_keeps_its_arguments_and_refuses_others(start, small_falcon, data, tmp_path, capsys):
    start(steps=3)
    resume = ["--output", str(tmp_path / "run"), "--resume"]
    assert script.main([*resume, "--lr", "0.5"]) == 1
    assert "--lr 0.5 (it was 0.01)" in capsys.readouterr().err
    assert script.main([*resume, "--steps", "5"]) == 0, "a constant rate may be followed for longer"
    assert sorted(losses(tmp_path / "run")) == [1, 2, 3, 4, 5]
    whole = tmp_path / "whole"
    assert start(steps=5, output=whole)[0] == 0
    assert losses(tmp_path / "run") == losses(whole)


def test_every_shape_of_training_runs(start, small_falcon, tmp_path):
    chat = write(tmp_path / "chat.jsonl", *({"messages": [{"role": "user", "content": f"a{i}?"}, {"role": "assistant", "content": "b."},
                                                          {"role": "user", "content": "so?"}, {"role": "assistant", "content": "c."}]}
                                            for i in range(30)))
    text = write(tmp_path / "text.jsonl", *({"text": f"A bond {i} is a loan. " * 20} for i in range(10)))
    status, out, err = start("--packing", "--train-on-inputs", "--held-out", "0.2", records=chat, output=tmp_path / "chat")
    assert status == 0 and "packed into" in out and "held out: 6 records" in out, err
    status, out, err = start("--no-quantize", "--checkpointing", "--held-out", "0", records=text, output=tmp_path / "text")
    assert status == 0 and "not quantized" in out and "10 too long and CUT" in out and "Question" not in out, err
    status, out, err = start("--eval-data", text, "--epochs", "2", "--optimizer", "adamw8bit", "--adapter-dtype", "bfloat16",
                             "--targets", "query_key_value", "mlp.dense_h_to_4h", records=chat, output=tmp_path / "epochs")
    assert status == 0 and "for 15 steps" in out and "on 4 linears" in out, err    # 2 epochs of 30 rows, 4 at a time
    template = write(tmp_path / "template.json", {"user": "<{content}>"})
    status, _, err = start("--template", template, "--held-out", "0.2", records=chat, output=tmp_path / "template")
    assert status == 0 and json.loads((tmp_path / "template" / "prompt_template.json").read_text())["user"] == "<{content}>", err


def test_the_command_it_ends_with_gives_the_answer_it_showed(start):
    spec = importlib.util.spec_from_file_location("ask", SCRIPT.with_name("ask.py"))
    ask = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(ask)
    status, out, _ = start("--answer-tokens", "30")
    assert status == 0
    shown = re.search(r"  after     (.*(?:\n {12}.*)*)", out)[1]
    _, _, *argv = shlex.split(out.strip().splitlines()[-1])
    start_of = len("".join(shown.split()).removesuffix("..."))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert ask.main([*argv, "--device", "cpu"]) == 0
    assert "".join(said.getvalue().split())[:start_of] == "".join(shown.split()).removesuffix("...")


def test_fused_blocks_take_the_steps_of_the_plain_ones(start, tmp_path):
    status, out, err = start(output=tmp_path / "plain")
    assert status == 0 and "torch's own functions" in out, err
    status, out, err = start("--fused", "--no-recorded", output=tmp_path / "fused")
    assert status == 0 and "fused blocks" in out, err
    plain, fused = losses(tmp_path / "plain"), losses(tmp_path / "fused")
    # At dropout 0 they would be equal up to float32; here each draws its own masks, and six steps are not enough to part them far.
    assert all(abs(plain[step] - fused[step]) < 0.2 for step in plain) and len(fused) == 6


def test_a_plan_is_printed_and_nothing_is_done(start, tmp_path):
    status, out, _ = start("--plan", "--memory", "24GiB", "--device", "cuda")
    assert status == 0 and "in use on the device" in out and "Fits into 24.00 GiB" in out and not (tmp_path / "run").exists()
    status, out, _ = start("--plan", "--memory", "1MiB")
    assert status == 0 and "Does NOT fit" in out
    status, out, err = start("--memory", "1MiB")
    assert status == 1 and "--plan says what would fit" in err and not (tmp_path / "run").exists()


def test_flags_of_the_base_that_is_named(tmp_path):
    embedded = script.parse(["--output", str(tmp_path)])
    assert embedded.model == str(script.TINY) and embedded.steps == script.EMBEDDED["steps"]
    real = script.parse(["--output", str(tmp_path), "--model", "tiiuae/falcon-7b"])
    paper = {"rank": 64, "alpha": 16, "dropout": 0.1, "lr": 2e-4, "clip": 0.3, "length": 512, "schedule": "constant"}
    assert {name: getattr(real, name) for name in paper} == paper and real.batch_size * real.accumulate == 16


# What is refused, before the model is loaded and with nothing written

@pytest.mark.parametrize("flags, message", [
    (["--rank", "0"], "rank is 0"),
    (["--alpha", "-1"], "alpha is -1"),
    (["--dropout", "1"], "dropout is 1"),
    (["--length", "129"], "between 2 and the model's 128 positions"),
    (["--length", "1"], "between 2 and the model's 128 positions"),
    (["--length", "8"], "every label is masked"),
    (["--targets", "q_proj"], "['q_proj'] match no linear layer"),
    (["--steps", "0"], "steps is 0"),
    (["--batch-size", "0"], "batch_size is 0"),
    (["--lr", "0"], "lr is 0"),
    (["--warmup", "6"], "warmup is 6"),
    (["--epochs", "0"], "--epochs 0"),
    (["--held-out", "1"], "--held-out 1"),
    (["--questions", "-1"], "--questions -1: it must be at least 0"),
    (["--answer-tokens", "0"], "--answer-tokens 0: it must be at least 1"),
    (["--resume", "--overwrite"], "no run to resume"),
    (["--resume"], "no run to resume"),
    (["--data", "missing.jsonl"], "missing.jsonl"),
    (["--eval-data", "missing.jsonl"], "missing.jsonl"),
    (["--template", "missing.json"], "missing.json"),
    (["--model", "./missing"], "no such directory"),
    pytest.param(["--device", "cuda"], "no CUDA device", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")),
], ids=" ".join)
def test_what_cannot_run_is_refused_with_its_reason(flags, message, start, tmp_path):
    status, out, err = start(*flags)
    assert status == 1 and message in err and err.startswith("error: ") and "base " not in out
    assert not (tmp_path / "run").exists() or not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("lines, message", [
    ([""], "the file is empty"),
    (['{"instruction": "a"'], "line 1: not JSON"),
    ([{"instruction": "a", "output": "b"}, {"instruction": "a"}], "line 2: a record without an answer"),
    ([{"input": "a", "output": "b"}], "nothing can be held out"),
    ([{"input": "a", "output": "b", "split": "held_out"}], "nothing is left to train on"),
    ([{"input": "a", "output": "b", "split": "train"}, {"input": "a", "output": "b"}], 'line 2: "split" is None'),
], ids=lambda value: None if isinstance(value, list) else value)
def test_data_that_cannot_be_trained_on_is_refused_with_its_reason(lines, message, start, tmp_path):
    status, _, err = start(records=write(tmp_path / "bad.jsonl", *lines))
    assert status == 1 and "bad.jsonl" in err and message in err


def test_a_base_that_is_no_falcon_or_no_safetensors_is_refused(start, small_falcon, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for path in small_falcon.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    status, _, err = start(model=other)
    assert status == 1 and "'llama' is not a Falcon" in err
    (other / "config.json").write_text(json.dumps(config))
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    status, _, err = start(model=other)
    assert status == 1 and "pytorch_model.bin" in err and "convert" in err
