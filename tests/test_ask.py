"""ask.py: the answer as it comes, the prompt, and the merged model that transformers opens."""

import builtins
import importlib.util
import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from minqlora.data import Template, tokenize
from minqlora.generate import generate
from minqlora.load import load_falcon, load_tokenizer
from minqlora.lora import adapters, load_adapter, save_adapter
from minqlora.qlora import add_lora

ROOT = Path(__file__).resolve().parent.parent
spec = importlib.util.spec_from_file_location("ask", ROOT / "examples" / "ask.py")
ask = importlib.util.module_from_spec(spec)
spec.loader.exec_module(ask)

TEMPLATE = Template(user="Q: {content}\nA:")


@pytest.fixture(scope="module")
def adapter(small_falcon, tmp_path_factory):
    """An adapter that changes the base, with a template and the arguments of its run beside it, as finetune_falcon.py leaves them."""
    directory = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(0)
    model = add_lora(load_falcon(small_falcon), rank=4, alpha=8, dropout=0.0)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.5)
    save_adapter(model, directory, base=str(small_falcon))
    TEMPLATE.save(directory)
    (directory / "run.json").write_text(json.dumps({"arguments": {"quantize": True, "double_quant": True}}))
    return directory


@pytest.fixture
def start(adapter, capsys):
    def run(*argv):
        return ask.main([*map(str, argv), "--device", "cpu"]), *capsys.readouterr()
    return run


def expected(small_falcon, adapter, question, tokens, template=TEMPLATE):
    """The answer by the library alone: greedy, in 4 bits, with the adapter."""
    model, tokenizer = load_falcon(small_falcon), load_tokenizer(small_falcon)
    if adapter:
        load_adapter(model, adapter)
    prompt, _ = tokenize((("user", question),), tokenizer, template, 0)
    ids = generate(model, torch.tensor([prompt]), max_new_tokens=tokens, eos_token_id=0)[0, len(prompt):]
    return tokenizer.decode(ids.tolist()).lstrip()


def test_the_answer_is_that_of_the_model_with_its_adapter_asked_by_the_saved_template(start, small_falcon, adapter):
    status, out, err = start("--adapter", adapter, "What is a bond?", "--max-new-tokens", 12, "--temperature", 0)
    assert status == 0, err
    assert out == expected(small_falcon, adapter, "What is a bond?", 12) + "\n"
    assert out != expected(small_falcon, adapter, "What is a bond?", 12, Template()) + "\n", "by another template it is another question"
    status, base, _ = start("--model", small_falcon, "What is a bond?", "--max-new-tokens", 12, "--temperature", 0)
    assert base == expected(small_falcon, None, "What is a bond?", 12, Template()) + "\n" != out


def test_an_answer_is_as_long_as_fits_unless_a_number_is_given_that_does_not(start, adapter):
    status, out, _ = start("--adapter", adapter, "bond?")
    assert status == 0 and out.strip()
    status, _, err = start("--adapter", adapter, "bond?", "--max-new-tokens", 500)
    assert status == 1 and "the model 128 positions" in err
    status, _, err = start("--adapter", adapter, "bond " * 200)
    assert status == 1 and "the model 128 positions" in err


def test_drawn_answers_depend_on_the_seed_alone(start, adapter):
    # The small model is sure of what it says: at a high temperature it draws.
    flags = ["--adapter", adapter, "bond?", "--temperature", 3, "--max-new-tokens", 12]
    first = start(*flags)[1]
    assert first == start(*flags)[1] != start(*flags, "--seed", 1)[1]


def test_text_comes_only_in_whole_characters():
    # One token a byte: the euro sign takes three, and none of them shows before the third.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: i for i, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    ids = tokenizer.encode(" 5 €.").ids
    assert len(ids) == 7
    assert list(ask.pieces(map(torch.tensor, ids), tokenizer, eos=-1)) == ["", "5", " ", "€", ".", ""]
    assert "".join(ask.pieces(map(torch.tensor, ids), tokenizer, eos=ids[-1])) == "5 €"


def typed(monkeypatch, *lines):
    """Answer `input` with these lines; an exception is raised as the keyboard would."""
    lines = iter([*lines, EOFError()])

    def read(prompt=""):
        line = next(lines)
        if isinstance(line, BaseException):
            raise line
        return line
    monkeypatch.setattr(builtins, "input", read)


def test_the_prompt_answers_until_ctrl_d_and_survives_ctrl_c_and_errors(start, small_falcon, adapter, monkeypatch):
    typed(monkeypatch, "bond?", "  ", KeyboardInterrupt(), "bond " * 200, "stock?")
    status, out, err = start("--adapter", adapter, "--max-new-tokens", 6, "--temperature", 0)
    answers = [expected(small_falcon, adapter, question, 6) for question in ("bond?", "stock?")]
    assert status == 0 and out == f"{answers[0]}\n\n{answers[1]}\n\n"
    assert "Ctrl-D leaves" in err and "128 positions" in err


def test_ctrl_c_stops_an_answer_and_the_next_question_is_answered_whole(start, small_falcon, adapter, monkeypatch):
    whole, interrupted = ask.pieces, []

    def pieces(*arguments):
        for number, piece in enumerate(whole(*arguments)):
            if number == 2 and not interrupted:
                interrupted.append(True)
                raise KeyboardInterrupt
            yield piece
    monkeypatch.setattr(ask, "pieces", pieces)
    typed(monkeypatch, "bond?", "stock?")
    status, out, _ = start("--adapter", adapter, "--max-new-tokens", 6, "--temperature", 0)
    assert status == 0 and interrupted
    assert expected(small_falcon, adapter, "stock?", 6) in out


def test_a_conversation_is_kept_when_asked_to_and_loses_its_oldest_turns_first(small_falcon, adapter, capsys):
    args = ask.parse(["--adapter", str(adapter), "--chat", "--max-new-tokens", "6", "--device", "cpu"])
    asker = ask.Asker(*ask.load(args), args)
    for question in ("bond?", "stock?"):
        asker.answer(question)
    assert [content for role, content in asker.said if role == "user"] == ["bond?", "stock?"]
    assert [role for role, _ in asker.said] == ["user", "assistant"] * 2

    def tokens(messages):
        return len(tokenize(messages, asker.tokenizer, asker.template, asker.eos)[0])
    # The longest question that fits beside the second turn, but not beside both.
    fitting = (q for n in range(1, 99) if tokens((*asker.said[2:], ("user", q := " ".join(["bond"] * n)))) <= 122)
    long = max(fitting, key=len)
    assert tokens((*asker.said, ("user", long))) > 122
    asker.answer(long)
    assert [content for role, content in asker.said if role == "user"] == ["stock?", long]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_merged_model_opens_in_transformers_with_the_same_logits(dtype, start, small_falcon, adapter, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer
    status, out, err = start("--adapter", adapter, "--merge", tmp_path / "merged", "--merge-dtype", dtype)
    assert status == 0 and "from_pretrained" in out, err
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
    ours = load_falcon(tmp_path / "merged", quantize=False)
    ids = torch.randint(0, 320, (2, 100), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = ours(ids)
        # float32 on both sides; logits of size 10 through two layers.
        torch.testing.assert_close(theirs(ids).logits, logits, rtol=0, atol=1e-4)
        quantized = load_falcon(small_falcon)
        load_adapter(quantized, adapter)
        # The sum is rounded once to the merged type: 2^-9 (or 2^-25) of a weight, some 30 of them a product, two layers, logits of 10.
        torch.testing.assert_close(quantized(ids), logits, rtol=0, atol={"bfloat16": 0.5, "float32": 1e-4}[dtype])
    assert AutoTokenizer.from_pretrained(tmp_path / "merged")("bond").input_ids == load_tokenizer(small_falcon).encode("bond").ids
    status, _, err = start("--adapter", adapter, "--merge", tmp_path / "merged")
    assert status == 1 and "a model is there already" in err
    status, _, err = start("--adapter", adapter, "--merge", adapter)
    assert status == 1 and "an adapter is there already" in err and not (adapter / "config.json").exists()
    status, _, err = start("--adapter", adapter, "--merge", adapter / "adapter_config.json")
    assert status == 1 and "a file is there already" in err


@pytest.mark.parametrize("argv, message", [
    ([], "whom shall the question go to"),
    (["--adapter", "missing", "a"], "missing: no adapter_config.json"),
    (["--adapter", "missing", "a", "--temperature", "-1"], "--temperature -1"),
    (["--adapter", "missing", "a", "--top-p", "0"], "--top-p 0"),
    (["--adapter", "missing", "a", "--max-new-tokens", "0"], "--max-new-tokens 0"),
    (["--model", "./missing", "a"], "no such directory"),
], ids=" ".join)
def test_what_cannot_be_asked_is_refused_with_its_reason(argv, message, start):
    status, _, err = start(*argv)
    assert status == 1 and err.startswith("error: ") and message in err


def test_an_empty_question_and_an_adapter_without_a_base_are_refused(start, small_falcon, adapter, tmp_path):
    status, _, err = start("--adapter", adapter, " ")
    assert status == 1 and "the question is empty" in err
    save_adapter(add_lora(load_falcon(small_falcon), rank=2), tmp_path)
    status, _, err = start("--adapter", tmp_path, "a")
    assert status == 1 and "give it with --model" in err
    assert start("--adapter", tmp_path, "--model", small_falcon, "a", "--max-new-tokens", 2)[0] == 0, "an adapter from elsewhere"
